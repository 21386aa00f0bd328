"""Compiled code leaves a model's parameters where they are: whoever looks at storages sees what was there before."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_model
from torch import nn

import tahf4_compiler as tahf4

GRAPH = {"inductor": False}


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(64, 64) for _ in range(4))

    def forward(self, x):
        return x + self.to_out(self.to_q(x) * self.to_k(x) + self.to_v(x))


def model(*, packed: bool) -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(Attention(), Attention()).eval().requires_grad_(False)
    if packed:
        tahf4.quantize_(made)
    return made


def places(made: nn.Module) -> dict[str, tuple]:
    """Say of each tensor which memory it has, and who else has it."""
    tensors = {**dict(made.named_parameters()), **dict(made.named_buffers())}
    return {
        name: (t.untyped_storage()._cdata, t.untyped_storage().nbytes(), t.data_ptr(), t._version)
        for name, t in tensors.items()
    }


def written(made: nn.Module) -> int:
    file = io.BytesIO()
    torch.save({name: value for name, value in made.state_dict().items() if "0.to_k" in name}, file)
    return len(file.getvalue())


def with_accelerate(made: nn.Module, folder: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerate.Accelerator(cpu=True).save_model(made, folder)


def with_hub(made: nn.Module, folder: Path) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")
    huggingface_hub.save_torch_model(made, folder)


def with_safetensors(made: nn.Module, folder: Path) -> None:
    save_model(made, str(folder / "model.safetensors"))


SAVERS = [with_accelerate, with_hub, with_safetensors]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("merge", [True, False])
def test_a_compiled_call_leaves_every_tensor_in_its_memory(packed, merge):
    made, x = model(packed=packed), torch.randn(5, 64)
    before, size = places(made), written(made)
    assert len({place[0] for place in before.values()}) == len(before), "nothing is tied"
    compiled = torch.compile(made, backend="tahf4", options={**GRAPH, "share.merge": merge})
    compiled(x)
    lowered = tahf4.lower(tahf4.capture(made, (x,)), options=GRAPH)
    lowered(x)
    assert places(made) == before
    assert written(made) == size
    again = places(copy.deepcopy(made))
    assert [place[1] for place in again.values()] == [place[1] for place in before.values()]


@pytest.mark.parametrize("save", SAVERS)
def test_savers_write_every_tensor_of_a_packed_model_after_a_call(save, tmp_path):
    made = model(packed=True)
    torch.compile(made, backend="tahf4", options=GRAPH)(torch.randn(5, 64))
    save(made, tmp_path)
    found, want = load_file(tmp_path / "model.safetensors"), made.state_dict()
    assert found.keys() == want.keys()
    assert all(torch.equal(found[name], want[name]) for name in want)
