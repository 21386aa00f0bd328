"""The kernels that are listed and computed about are those that a Wan2.2 block launches."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import wan
from tahf4_compiler.backends.triton import calls_of
from tahf4_compiler.tools.kernels import roofline
from tahf4_compiler.tools.kernels.block import WanBlock
from tahf4_compiler.tools.kernels.wan import A14B, NORM_ROTARY, TI2V_5B, block_steps

import tahf4_compiler as tahf4
from tahf4_compiler.format.spans import check_span

FUSED = ("quantize", "linear", "fused_quantize", "fused_linear", "linear_quantize")


def _wan_in_16_bits():
    """Return a Wan as diffusers loads it in bfloat16: norms, tables and the time embedding stay in float32."""
    model, args = wan()
    keep = ("norm", "scale_shift_table", "time_embedder")
    for name, parameter in model.named_parameters():
        if not any(word in name for word in keep) or "norm_q" in name or "norm_k" in name:
            parameter.data = parameter.data.to(torch.bfloat16)
    return model, {k: v.to(torch.bfloat16) if v.is_floating_point() and v.dim() > 1 else v for k, v in args.items()}


def test_the_listed_program_of_queries_and_keys_is_that_of_the_graph():
    model, args = _wan_in_16_bits()
    asked = {"attention": "int8", "attention.min_tokens": 1, "kernels": "reference", "attention_prologue.always": True}
    low = tahf4.lower(tahf4.capture(model, (), args), options=asked)
    fused = [n for n in low.graph_module.graph.nodes if n.target is torch.ops.tahf4.fused_attention.default]
    own, text = fused[::2], fused[1::2]
    assert len(own) == len(text) == 2
    assert all(node.args[1] == node.args[3] == NORM_ROTARY for node in own)
    assert all(node.args[1] == node.args[3] == NORM_ROTARY.splitlines()[0] for node in text)
    flops = {s.stage: sum(n.flops for n in s.nodes) for s in low.snapshots}
    assert flops["attention"] == flops["attention_prologue"] == flops["lower"]


@pytest.mark.parametrize(("expand_timesteps", "span"), [(False, 1), (True, 1), (False, "row")])
def test_the_listed_kernels_are_those_of_the_graph(expand_timesteps, span, monkeypatch):
    if span != 1:  # which counts for many rows
        monkeypatch.setenv("TAHF4_LINEAR_PATH", "int8")
    model, args = _wan_in_16_bits()
    if expand_timesteps:
        args["timestep"] = torch.full((1, 32), 10.0)
    low = tahf4.lower(tahf4.capture(model, (), args), options={"fuse.always": True, "scale_span": span})
    nodes = low.graph_module.graph.nodes
    inside = [n for n in nodes if str(n.target).startswith("tahf4") and n.target._opname in FUSED]
    launched = {call.text for node in inside for call in calls_of(node)}
    sizes = dataclasses.replace(TI2V_5B if expand_timesteps else A14B, text=12)
    steps = block_steps(sizes, 32, span=check_span(span))
    listed = {call.text for step in steps for call in step.calls((9, 0), 132)}
    assert launched == listed


def test_the_block_without_diffusers_is_that_of_diffusers():
    from diffusers.models.transformers.transformer_wan import WanTransformerBlock

    torch.manual_seed(0)
    theirs = WanTransformerBlock(128, 256, 2, "rms_norm_across_heads", cross_attn_norm=True, eps=1e-6).eval()
    mine = WanBlock(128, 256, 2).eval()
    missing, unexpected = mine.load_state_dict(theirs.state_dict(), strict=False)
    assert not missing and not unexpected
    x, text, temb = torch.randn(2, 10, 128), torch.randn(2, 5, 128), torch.randn(2, 6, 128)
    angle = torch.randn(1, 10, 1, 32)
    wide = [t.repeat_interleave(2, -1) for t in (angle.cos(), angle.sin())]
    with torch.no_grad():
        wanted = theirs(x, text, temb, wide)
        got = mine(x, text, temb, (angle.cos(), angle.sin()))
    assert torch.allclose(got, wanted, atol=1e-5)


def test_all_linears_of_the_block_run_in_4_bits(tmp_path):
    block = WanBlock(128, 256, 2).eval()
    args = torch.randn(1, 6, 128), torch.randn(1, 5, 128), torch.randn(1, 6, 128), (torch.ones(1, 6, 1, 32),) * 2
    compiled = torch.compile(block, backend="tahf4", options={"inductor": False, "dump_dir": str(tmp_path)})
    with torch.no_grad():
        got, wanted = compiled(*args), block(*args)
    assert (got - wanted).norm() < 0.2 * wanted.norm()
    assert "linears in HiF4       10 of 10" in next(tmp_path.glob("*/report.txt")).read_text()


@pytest.mark.slow
def test_the_script_runs_from_a_checkout_and_says_what_it_needs(tmp_path):
    script = Path(__file__).parents[2] / "tools" / "gpu_check.py"
    done = subprocess.run([sys.executable, script, "-o", tmp_path], capture_output=True, text=True, cwd=tmp_path)
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert done.returncode == 2
    assert "This needs an NVIDIA GPU" in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_roofline_of_attention_in_8_bits_counts_operations_instructions_and_bytes():
    tokens, d = 32760, A14B.dim
    for chip in roofline.CHIPS:
        bound = "lanes" if chip.name in ("A100 80 GB", "H100 SXM", "H200", "B200") else "matrix"
        core, eight, wide = roofline.attention(A14B, tokens, chip)
        assert core in roofline.parts(A14B, tokens, chip, "w4a4")
        assert eight.bound == bound
        assert eight.seconds["matrix"] / core.seconds["matrix"] == pytest.approx(chip.bf16 / chip.int8)
        assert eight.seconds["lanes"] == pytest.approx(30 * 40 * tokens**2 / chip.lanes)
        # v: 2 bytes read and 1 written; then 1 read of q, k and v each, and a result of 2.
        assert eight.seconds["memory"] == pytest.approx((3 + 3 + 2) * tokens * d / chip.bandwidth)
        # 1 byte of q and k each, values of 2, and a result of 2.
        assert wide.seconds["memory"] == pytest.approx((2 + 2 + 2) * tokens * d / chip.bandwidth)
        # q and k of self-attention: 2 bytes read, and 2 or 1 written.
        plain, quantized = (roofline.norms(A14B, tokens, chip, how).seconds for how in (False, True))
        assert plain["memory"] - quantized["memory"] == pytest.approx(2 * tokens * d / chip.bandwidth)
        assert quantized["lanes"] == pytest.approx(53 * 2 * tokens * d / chip.lanes) and "lanes" not in plain
        half = (core.seconds["matrix"] + eight.seconds["matrix"]) / 2
        assert wide.seconds["matrix"] == pytest.approx(half)
        assert wide.seconds["lanes"] < 0.6 * eight.seconds["lanes"]
    page = roofline.page(A14B)
    assert "| RTX 4090 | 10.64 | 2.66 | matrix | 4.00 | 6.65 | matrix | 1.60 |" in page
    _, eight, _ = roofline.attention(A14B, tokens, chip)
    _, joint, wide = roofline.attention(A14B, tokens, chip, quantized=True)
    saved = tokens * d * (2 - 36 / 64) / chip.bandwidth  # codes are written in place of 16 bits
    assert joint.seconds["memory"] == pytest.approx(eight.seconds["memory"] - saved)
    for part, instructions in ((joint, 30), (wide, 11)):
        lanes = (instructions * 40 * tokens**2 + 75 * tokens * d) / chip.lanes
        assert part.seconds["lanes"] == pytest.approx(lanes)


def test_the_roofline_of_branches_counts_what_they_add():
    chip, m, d, rank = next(c for c in roofline.CHIPS if c.name == "RTX 4090"), 32760, A14B.dim, 32
    plain, part = (
        {p.name: p.seconds for p in roofline.parts(A14B, m, chip, "w4a4", *ranks)} for ranks in ((), (rank,))
    )
    name, units, product = "attn1 out, gate, residual", 36 / 64, 2 * m * d * rank / chip.bf16
    assert part[name]["matrix"] - plain[name]["matrix"] == pytest.approx(product)
    more = part[name]["memory"] - plain[name]["memory"]
    assert more == pytest.approx(2 * (m + d) * rank / chip.bandwidth)
    # A quantization reads its input once for all branches: three of them, then one.
    for quantization, count in (("norm1, modulation -> quantize", 3), ("norm2 -> quantize", 1)):
        assert part[quantization]["matrix"] == pytest.approx(count * product)
        memory = m * d * (2 + units) + 2 * count * rank * (m + d)
        assert part[quantization]["memory"] == pytest.approx(memory / chip.bandwidth)
        assert part[quantization]["lanes"] == pytest.approx(61 * m * d / chip.lanes)
    assert part["text -> quantize"]["matrix"] == pytest.approx(2 * 2 * A14B.text * d * rank / chip.bf16)
    # Behind a GELU the product writes 16 bits.
    quantized = part["ffn 1, GELU -> quantize"]
    memory = m * A14B.ffn * (2 + units) + 2 * rank * (m + A14B.ffn)
    assert quantized["memory"] == pytest.approx(memory / chip.bandwidth)
    assert quantized["lanes"] == pytest.approx(31 * m * A14B.ffn / chip.lanes)
    assert part["ffn 1, GELU"]["memory"] > plain["ffn 1, GELU -> quantize"]["memory"]
    assert "| RTX 4090 | 13.73 | 1.01 | 1.02 | 3.09 | 1.06 | 1.08 |" in roofline.page(A14B)


def test_the_roofline_of_one_scale_a_row_counts_a_scaling_for_each_output_and_threads_without_a_unit():
    chip, m, d, f = next(c for c in roofline.CHIPS if c.name == "RTX 4090"), 32760, A14B.dim, A14B.ffn
    found = [roofline.parts(A14B, m, chip, "w4a4", row=row) for row in (False, True)]
    plain, row = ({part.name: part.seconds for part in parts} for parts in found)
    assert row["attn2 q"]["lanes"] == pytest.approx(3 * m * d / chip.lanes)
    assert plain["attn2 q"]["lanes"] == pytest.approx(d / 64 * row["attn2 q"]["lanes"])
    assert row["attn2 q"]["matrix"] == plain["attn2 q"]["matrix"]
    assert row["attn2 q"]["memory"] == pytest.approx(((m + d) * d + 2 * m * d) / chip.bandwidth)
    assert row["ffn 1, GELU"]["memory"] == pytest.approx(((m + f) * d + 2 * m * f) / chip.bandwidth)
    name = "ffn 1 output -> quantize"
    assert row[name]["memory"] == pytest.approx((2 + 36 / 64) * m * f / chip.bandwidth)
    assert row[name]["lanes"] == pytest.approx(26 * m * f * 256 / 216 / chip.lanes)  # 216 units of a row
    assert row["norm2 -> quantize"]["lanes"] == pytest.approx(40 * m * d * 256 / 240 / chip.lanes)  # 3 rows of 80
    product = next(part for part in found[0] if part.name == "attn2 q")
    assert product.least_apart == pytest.approx(product.seconds["matrix"] + product.seconds["lanes"])
    assert "| RTX 4090 | 13.73 | 13.82 | 0.99 | 3.09 | 3.18 | 0.97 | 4.05 | 3.19 | 1.27 |" in roofline.page(A14B)


def test_the_roofline_of_products_through_the_library_counts_their_dots_twice():
    chip, m, d = next(c for c in roofline.CHIPS if c.name == "RTX 4090"), 32760, A14B.dim
    step = next(step for step in block_steps(A14B, m, span=0) if step.name == "attn2 q")
    _, dots, after = roofline._w4a4(step, chip, row=True, library=True)
    assert dots.seconds["memory"] == pytest.approx(((m + d) * d + 4 * m * d) / chip.bandwidth)
    assert dots.seconds["matrix"] == pytest.approx(2 * m * d * d / chip.int8)
    assert after.seconds["memory"] == pytest.approx((4 + 2) * m * d / chip.bandwidth)
    assert after.seconds["lanes"] == pytest.approx(3 * m * d / chip.lanes)
    page = roofline.page(A14B)
    assert "| RTX 4090 | int8 | 2.38 | 3.23 | 0.74 |" in page and "| B200 | bf16 | 0.70 | 0.46 | 1.53 |" in page
