"""The tables of parallelism count what the models have."""

from __future__ import annotations

import pytest
import torch
from tahf4_compiler.tools.cli import app
from tahf4_compiler.tools.kernels.wan import A14B, TI2V_5B
from tahf4_compiler.tools.parallel import CHANNELS, block_values, other_values, page, tensor_misfit, ways
from typer.testing import CliRunner

from tahf4_compiler.distributed.sizes import check_columns, check_rows, row_degrees
from tahf4_compiler.errors import ShardingError


@pytest.mark.parametrize("model", [A14B, TI2V_5B], ids=lambda model: model.name)
def test_parameters_are_those_of_the_model(model):
    from diffusers import WanTransformer3DModel

    channels = CHANNELS[model.name]
    with torch.device("meta"):
        real = WanTransformer3DModel(
            num_attention_heads=model.heads,
            ffn_dim=model.ffn,
            num_layers=2,
            in_channels=channels,
            out_channels=channels,
        )
    inside = sum(p.numel() for name, p in real.named_parameters() if name.startswith("blocks.") and p.dim() == 2)
    small = type(model)(model.name, model.dim, model.ffn, model.heads, 2)
    assert real.config.num_attention_heads * real.config.attention_head_dim == model.dim
    assert 2 * block_values(model) == inside
    assert other_values(small) == sum(p.numel() for p in real.parameters()) - inside


def test_degrees_and_bytes():
    assert [n for n in range(1, 65) if not tensor_misfit(A14B, n)] == [1, 2, 4, 8]
    assert [n for n in range(1, 65) if not tensor_misfit(A14B, n, 128)] == [1, 2, 4]
    tensor, ulysses, ring, fsdp = ways()
    tokens = 32760
    assert ring.sent(A14B, tokens, 2) == pytest.approx(ulysses.sent(A14B, tokens, 2))  # half of k and v, either way
    assert ulysses.sent(A14B, tokens, 8) < ring.sent(A14B, tokens, 8) < tensor.sent(A14B, tokens, 8)
    assert fsdp.weights(A14B, 1) == tensor.weights(A14B, 1) == ulysses.weights(A14B, 64)


def test_the_page_is_printed_and_written(tmp_path):
    result = CliRunner().invoke(app, ["parallel", "-o", str(tmp_path / "p.md")])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "p.md").read_text() == page()
    assert "no: 40 heads" in page() and "Computed, not measured" in page()


def test_the_error_names_the_degrees_that_work():
    assert row_degrees(13824, 512) == [1, 3, 9, 27]
    with pytest.raises(ShardingError, match=r"rotation of 128.*degrees that work are 1, 2, 3, 4, .*rotation of 64"):
        check_rows("ffn.net.2", 13824, 8, 128)
    with pytest.raises(ShardingError, match="1.5 blocks of 64.*degrees that work are 1$"):
        check_rows("x", 96, 2)
    with pytest.raises(ShardingError, match="N=10 .*work are 1, 2, 5, 10"):
        check_columns("x", 10, 4)
    check_rows("ffn.net.2", 13824, 8, 64)
