"""Activations of 16 bits: packed weights are dequantized in each product, and the activation stays as it is."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from diffusers import WanTransformer3DModel
from models import Stack, wan
from tahf4_compiler.passes.lower import _say_once

import tahf4_compiler as tahf4
from tahf4_compiler.format import hif4
from tahf4_compiler.format.transforms import transform


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def stack():
    torch.manual_seed(0)
    return Stack().eval()


@pytest.fixture
def x():
    return torch.randn(4, 6, 64, generator=torch.Generator().manual_seed(1))


def error(got, wanted):
    return float((got.float() - wanted.float()).norm() / wanted.float().norm())


def lowered(model, x, **options):
    return tahf4.lower(tahf4.capture(model, (x,)), options=options)


def unpacked(model):
    """Return the model with plain linears that hold the values of its codes."""
    plain = copy.deepcopy(model)
    tahf4.dequantize_(plain)
    return plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k, block", [(128, 64), (100, 128), (70, 0)])
def test_the_operators_hold_the_activation_and_dequantize_the_weight(dtype, k, block):
    x, mask, bias = (torch.randn(3, 5, k) * 8).to(dtype), torch.rand(k) + 0.5, torch.randn(40).to(dtype)
    weight = torch.ops.tahf4.quantize(transform(torch.randn(40, k) / mask, None, block))
    codes, scales = torch.ops.tahf4.quantize(x, mask, block, 16)
    wide = torch.bfloat16 if dtype is torch.bfloat16 else torch.float32
    assert codes.dtype is wide and codes.shape == (3, 5, 128) and torch.equal(scales, torch.ones(3, 5, 2))
    whole = torch.nn.functional.pad(transform(x.float(), mask, block), (0, 128))[..., :128]
    assert torch.equal(codes, whole.to(wide)), "transformed, and not quantized"
    values = hif4.dequantize(hif4.Packed(*weight, 128), torch.float64)
    for operator in (torch.ops.tahf4.linear, torch.ops.tahf4_cpu.linear):
        got = operator(codes, scales, *weight, bias, dtype)
        assert got.dtype is dtype
        assert error(got, codes.double() @ values.T + bias.double()) < (1e-6 if dtype is torch.float32 else 4e-3)
    fake = torch.ops.tahf4.quantize(x.to("meta"), mask.to("meta"), block, 16)
    assert [(t.shape, t.dtype) for t in fake] == [(t.shape, t.dtype) for t in (codes, scales)]


def test_16_bits_do_not_overflow_where_the_mask_makes_a_weight_large():
    x, mask = torch.full((2, 64), 0.01, dtype=torch.float16), torch.full((64,), 1e-6)
    weight = torch.ops.tahf4.quantize(torch.full((64, 64), 0.25) / mask)
    product = torch.ops.tahf4.linear(*torch.ops.tahf4.quantize(x, mask, 0, 16), *weight, None, torch.float16)
    assert error(product, torch.full((2, 64), 0.16)) < 0.1


def test_a_packed_model_computes_what_its_codes_stand_for(stack, x):
    wanted = stack(x)
    tahf4.quantize_(stack)
    eight = error(stack(x), wanted), tahf4.set_activation_bits(stack, 8), error(stack(x), wanted)
    tahf4.set_activation_bits(stack, {r"\.up$": 16, "": 16})
    plain = unpacked(stack)(x)
    assert error(stack(x), plain) < 1e-5
    assert error(stack(x), wanted) < eight[2] < eight[0]
    tahf4_eager = torch.compile(stack, backend="tahf4", options={"inductor": False})
    for compiled in (lowered(stack, x), tahf4_eager, torch.compile(stack, backend="aot_eager")):
        assert error(compiled(x), plain) < 1e-5
        torch._dynamo.reset()
    program = torch.export.export(stack, (x,))
    assert error(program.module()(x), plain) < 1e-5


@pytest.mark.parametrize("inductor", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_option_of_a_compilation(stack, x, inductor):
    packed = copy.deepcopy(stack)
    tahf4.quantize_(packed)
    plain = unpacked(packed)(x)
    torch._dynamo.reset()
    options = {"inductor": inductor, "activation_bits": 16}
    for model in (stack, packed):
        assert error(torch.compile(model, backend="tahf4", options=options)(x), plain) < 1e-5


def test_reports_say_it(stack, x, caplog):
    _say_once.cache_clear()
    found = lowered(stack, x, activation_bits={r"blocks\.0": 16, r"blocks\.1": 8})
    assert [d.activation_bits for d in found.plan if d.decision == "hif4"] == [16, 16, 8, 8, 4, 4]
    report = found.report()
    assert report.count("hif4, 16-bit activation") == 2 and report.count("hif4, int8 activation") == 2
    assert "% with activations in 8 bits" in report and "% with activations in 16 bits" in report
    assert {d.kernel for d in found.plan if d.activation_bits == 16} == {"reference"}
    assert "no compiled HiF4 kernel" not in caplog.text
    always = lowered(stack, x, activation_bits=16, kernels="reference", **{"fuse.always": True})
    assert error(always(x), found(x)) < 0.2 and "fused_quantize" not in str(always.graph_module.graph)


def test_a_recipe_has_them(stack, x, tmp_path):
    with tahf4.calibrate(stack, options={"inductor": False}) as calibration:
        stack(x)
    fast = {"mask": "max", "scale_search": "", "sensitivity": True}
    four, sixteen = (calibration.recipe(**fast, activation_bits=bits) for bits in (4, 16))
    assert all(sixteen.linears("")[path].sqnr_db > linear.sqnr_db for path, linear in four.linears("").items())
    sixteen.save(tmp_path / "r.safetensors")
    packed = copy.deepcopy(stack)
    tahf4.quantize_(packed, tahf4.Recipe.load(tmp_path / "r.safetensors"))
    assert {m.activation_bits for m in packed.modules() if isinstance(m, tahf4.HiF4Linear)} == {16}
    tahf4.apply_recipe(stack, sixteen)
    assert error(lowered(stack, x)(x), packed(x)) < 1e-5
    assert error(packed(x), unpacked(packed)(x)) < 1e-5
    with pytest.raises(tahf4.OptionError, match="leave one of them out"):
        calibration.recipe(**fast, activation_bits=16, max_8bit_flops=0.2)


def test_a_folder_keeps_it(tmp_path):
    model, inputs = wan()
    model.requires_grad_(False)
    tahf4.quantize_(model)
    tahf4.set_activation_bits(model, {r"ffn": 16})
    model.save_pretrained(tmp_path)
    linears = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["linears"]
    chosen = {path for path, each in linears.items() if each.get("activation_bits") == 16}
    assert chosen == {path for path in linears if "ffn" in path} != set()
    loaded = WanTransformer3DModel.from_pretrained(tmp_path)
    assert torch.equal(loaded(**inputs)[0], model(**inputs)[0])



def test_a_module_with_several_names_is_found_by_any():
    model = Stack().eval()
    model.again = model.blocks[1]
    tahf4.quantize_(model)
    assert tahf4.set_activation_bits(model, {r"^again\.up$": 16})["blocks.1.up"] == 16
