"""A whole small Wan2.2 through the generated kernels, and the files that a dump has of them."""

import os
import subprocess
import sys

import pytest
import torch
from helpers import relative
from models import Stack
from tahf4_compiler.tools.branch_bench import branched_block
from tahf4_compiler.tools.generation import load_pipeline
from tahf4_compiler.tools.kernels.block import rotary_of
from tahf4_compiler.tools.tiny_wan import settings

import tahf4_compiler as tahf4
from tahf4_compiler.ops import registry


@pytest.fixture(scope="module")
def example():
    pipe = load_pipeline(settings.PIPELINE_DIR, torch.float32, "cpu")
    model = pipe.transformer
    model.blocks = model.blocks[:1]
    generator = torch.Generator().manual_seed(0)
    args = (
        torch.randn(1, model.config.in_channels, 2, 4, 4, generator=generator),
        torch.tensor([500]),
        torch.randn(1, 8, model.config.text_dim, generator=generator),
    )
    with torch.no_grad():
        yield model, args, tahf4.capture(model, args)


def test_a_step_of_the_tiny_wan_equals_the_reference(example, tmp_path, monkeypatch):
    model, args, captured = example
    low = tahf4.lower(captured, options={"dump_dir": str(tmp_path)})
    assert {d.kernel for d in low.plan if d.decision == "hif4"} == {"triton"}
    ran = {
        node.target for node in low.graph_module.graph.nodes if getattr(node.target, "namespace", "") == "tahf4_triton"
    }
    assert {op._opname for op in ran} >= {"fused_quantize", "fused_linear", "linear_quantize", "quantize"}
    with torch.no_grad():
        got = low(*args)[0]
        monkeypatch.setattr(registry, "_kernels", [k for k in registry.kernels() if k.name == "reference"])
        reference = tahf4.lower(captured)
        assert {d.kernel for d in reference.plan if d.decision == "hif4"} == {"reference"}
        wanted = reference(*args)[0]
        original = model(*args)[0]
    error = ((got - wanted).norm() / wanted.norm()).item()
    quantization = ((wanted - original).norm() / original.norm()).item()
    print(f"kernels against the reference {error:.2e}, HiF4 against float32 {quantization:.2e}")
    # Sums in another order move single codes; the whole stays far below what the format itself changes.
    assert error < 0.05 * quantization
    files = sorted(tmp_path.glob("*/kernel_*.py"))
    assert len(files) > 5
    text = files[0].read_text()
    assert text.startswith("# Runs ") and "@triton.jit" in text
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, files[0]], capture_output=True, text=True, env=environment, check=True)
    assert "torch." in done.stdout
    assert "tahf4_compiler" not in text  # it stands alone


@pytest.mark.parametrize("value_bits", [8, 16])
def test_norms_and_rotary_embeddings_of_the_tiny_wan_go_into_attention_in_8_bits(example, value_bits):
    model, args, captured = example
    asked = {"attention": "int8", "attention.min_tokens": 1, "attention.value_bits": value_bits}
    low = tahf4.lower(captured, options=asked)
    apart = tahf4.lower(captured, options={**asked, "disable_passes": ["attention_prologue"]})
    left = [str(node.target) for node in low.graph_module.graph.nodes]
    assert left.count("tahf4_triton.fused_attention_quantize.default") == 2
    assert not [target for target in left if "rms_norm" in target or "empty_like" in target]
    with torch.no_grad():
        got, wanted, original = low(*args)[0], apart(*args)[0], model(*args)[0]
    # Norms in other orders of sums may move single codes.
    assert relative(got, wanted) < 0.05 * relative(wanted, original)


def test_torch_compile_runs_the_kernels_for_other_sizes_without_compiling_again():
    model = Stack().eval().requires_grad_(False)
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, backend="tahf4", dynamic=True, options={"inductor": False})
    for rows in (6, 9):
        x = torch.randn(rows, 64)
        assert 0 < relative(compiled(x), model(x)) < 0.2
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_branches_of_a_packed_block_are_computed_where_it_quantizes(dtype, monkeypatch):
    """In 16 bits; in float32 they are products of PyTorch."""
    block = branched_block(64, 128, 1, 8, dtype)
    args = torch.randn(1, 6, 64).to(dtype), torch.randn(1, 5, 64).to(dtype), torch.randn(1, 6, 64)
    args = (*args, rotary_of(6, 64, "cpu"))
    captured = tahf4.capture(block, args)
    low = tahf4.lower(captured)
    nodes = low.graph_module.graph.nodes
    quantized = [node for node in nodes if node.target is torch.ops.tahf4_triton.branched_quantize.default]
    products = [node for node in nodes if node.target is torch.ops.aten.matmul.default]
    if dtype == torch.float32:
        assert not quantized and len(products) == 10
        return
    # q, k and v; the output; q again, whose k and v read the text; the output; and the feed-forward.
    assert [len(node.args[2]) for node in quantized] == [3, 1, 1, 2, 1, 1, 1] and not products
    assert sum("layer_norm" in node.args[1] for node in quantized) == 3
    with torch.no_grad():
        got = low(*args)
        monkeypatch.setattr(registry, "_kernels", [k for k in registry.kernels() if k.name == "reference"])
        plain = tahf4.lower(captured)
        assert "branched_quantize" not in str(plain.graph_module.graph)
        assert relative(got, plain(*args)) < 1e-2
