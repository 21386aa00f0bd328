"""``tahf4 quantize`` reads NVFP4 and MXFP4: the same bits as from the values that they stand for."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from diffusers import WanTransformer3DModel
from models import wan
from safetensors.torch import load_file, save_file
from tahf4_compiler.tools.cli import app
from typer.testing import CliRunner

import tahf4_compiler as tahf4
from tahf4_compiler.checkpoint import stream
from tahf4_compiler.checkpoint.convert import quantize_checkpoint
from tahf4_compiler.errors import CheckpointError
from tahf4_compiler.format import hif4

runner = CliRunner(env={"COLUMNS": "200", "TERM": "dumb", "TAHF4_DEBUG": ""})
NAME = "diffusion_pytorch_model.safetensors"
E2M1 = (0, 0.5, 1, 1.5, 2, 3, 4, 6)
KINDS = ("modelopt", "modelopt mxfp4", "compressed", "compressed mxfp4", "comfy", "comfy metadata")
HELD = "blocks.0.attn1.to_q"


def codes_of(weight, scale):
    """The nearest E2M1 code of each value, and what the codes stand for."""
    block = weight.shape[1] // scale.shape[1]
    wide = scale.repeat_interleave(block, 1)
    grid = torch.tensor([*E2M1, *(-v for v in E2M1)])
    codes = ((weight / wide)[..., None] - grid).abs().argmin(-1)
    return codes.to(torch.uint8), grid[codes] * wide


def in_tiles(scale):
    """Scales where cuBLAS looks for them, one by one."""
    rows, columns = scale.shape
    tiles = math.ceil(columns / 4)
    found = torch.zeros(math.ceil(rows / 128) * 128 * tiles * 4)
    for r in range(rows):
        for c in range(columns):
            found[(r // 128 * tiles + c // 4) * 512 + r % 32 * 16 + r % 128 // 32 * 4 + c % 4] = scale[r, c]
    return found.view(-1, tiles * 4)


def held(path, weight, kind):
    """The tensors of one weight in a kind of checkpoint, and the values that they stand for."""
    n, k = weight.shape
    if kind.endswith("mxfp4"):
        exponents = weight.view(n, k // 32, 32).abs().amax(-1).log2().floor().clamp(-100, 100) - 1
        codes, values = codes_of(weight, torch.exp2(exponents))
        parts = {"weight_scale": (exponents + 127).to(torch.uint8)}
    else:
        total = weight.abs().max() / (6 * 448)
        scale = (weight.view(n, k // 16, 16).abs().amax(-1) / 6 / total).to(torch.float8_e4m3fn)
        codes, values = codes_of(weight, scale.float() * total)
        if kind == "compressed":
            total = 1 / total
            values = codes_of(weight, scale.float() / total)[1]
            codes = codes_of(weight, scale.float() / total)[0]
            parts = {"weight_scale": scale, "weight_global_scale": total.view(1), "input_global_scale": torch.ones(1)}
        else:
            parts = {"weight_scale": scale, "weight_scale_2": total, "input_scale": torch.tensor(1.0)}
    even, odd = codes[:, 0::2], codes[:, 1::2]
    if kind.startswith("comfy"):
        even, odd = odd, even
        parts["weight_scale"] = in_tiles(parts["weight_scale"].float()).to(torch.float8_e4m3fn)
        if kind == "comfy":
            parts["comfy_quant"] = torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)
    leaf = "weight_packed" if kind.startswith("compressed") else "weight"
    parts[leaf] = even | odd << 4
    return {f"{path}.{name}": value for name, value in parts.items()}, values.bfloat16()


def linears(model):
    return {p: m for p, m in model.named_modules() if isinstance(m, torch.nn.Linear) and p.startswith("blocks.")}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return wan(ffn_dim=192)[0].bfloat16()


def saved(model, folder, kind):
    """A folder in which the linears of blocks are held in a kind; the model of the values that they stand for."""
    model = copy.deepcopy(model)
    model.save_pretrained(folder)
    content = load_file(folder / NAME)
    for path, linear in linears(model).items():
        del content[f"{path}.weight"]
        parts, values = held(path, linear.weight.detach().float(), kind)
        content |= parts
        linear.weight.data = values
    metadata = {"format": "pt"}
    if kind == "comfy metadata":
        layers = {path: {"format": "nvfp4"} for path in linears(model)}
        metadata["_quantization_metadata"] = json.dumps({"format_version": "1.0", "layers": layers})
    save_file({name: value.contiguous() for name, value in content.items()}, folder / NAME, metadata)
    config = json.loads((folder / "config.json").read_text())
    if not kind.startswith("comfy"):
        config["quantization_config"] = {"quant_method": kind.split()[0]}
    (folder / "config.json").write_text(json.dumps(config))
    return model


def tensors(folder):
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


@pytest.mark.parametrize("kind", KINDS)
def test_the_bits_are_those_of_the_values_in_memory(model, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(stream, "_ROWS", 50 * 128)  # several pieces of a weight, that cut tiles
    monkeypatch.setattr(stream, "_COPY", 1 << 12)
    exact = saved(model, tmp_path / "held", kind)
    done = quantize_checkpoint(tmp_path / "held", tmp_path / "ours", keep=[r"blocks\.1\.attn2\.to_v"])
    tahf4.quantize_(exact, keep=[r"blocks\.1\.attn2\.to_v"])
    exact.save_pretrained(tmp_path / "memory")
    found, wanted = tensors(tmp_path / "ours"), tensors(tmp_path / "memory")
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name
    assert done.held == {"": "MXFP4" if kind.endswith("mxfp4") else "NVFP4"}
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "tahf4"
    loaded = WanTransformer3DModel.from_pretrained(tmp_path / "ours", torch_dtype=torch.bfloat16)
    assert torch.equal(loaded.blocks[0].attn1.to_q.weight_codes, exact.blocks[0].attn1.to_q.weight_codes)


def test_what_is_lost_is_measured_and_printed(model, tmp_path):
    exact = saved(model, tmp_path / "held", "modelopt")
    result = runner.invoke(app, ["quantize", str(tmp_path / "held"), "-o", str(tmp_path / "ours")])
    assert result.exit_code == 0, result.output
    assert "20 of 20 linears in HiF4 were in NVFP4; relative error of HiF4 against that: 0." in result.output
    done = quantize_checkpoint(tmp_path / "held", tmp_path / "again")
    losses = done.losses[""]
    assert losses.keys() == linears(exact).keys()
    weights = {path: linear.weight.detach().float() for path, linear in linears(exact).items()}
    tahf4.quantize_(exact)
    for path, loss in losses.items():
        error = (exact.get_submodule(path).dequantized(torch.float32) - weights[path]).norm() / weights[path].norm()
        assert loss == pytest.approx(float(error), rel=1e-3)
        assert 0.02 < loss < 0.12
    assert quantize_checkpoint(tmp_path / "held", tmp_path / "again").losses == {}


def test_a_model_that_is_not_held_in_4_bits_loses_nothing_that_is_told(model, tmp_path):
    model.save_pretrained(tmp_path / "plain")
    done = quantize_checkpoint(tmp_path / "plain", tmp_path / "ours")
    assert (done.held, done.losses) == ({}, {})


def without(*leaves):
    def edit(content):
        for leaf in leaves:
            content.pop(f"{HELD}.{leaf}")

    return edit


def instead(leaf, value):
    return lambda content: content.update({f"{HELD}.{leaf}": value})


def mark(text):
    return instead("comfy_quant", torch.tensor(list(text), dtype=torch.uint8))


U8 = torch.uint8
BAD = [
    ("modelopt", without("weight_scale"), "in uint8 and has no weight_scale"),
    ("modelopt", without("weight_scale_2"), "has the weight_scale_2 none; expected one number"),
    ("modelopt", without("weight"), "is missing|is no tensor of the model"),
    ("modelopt", instead("weight_scale", torch.zeros(128, 7).to(torch.float8_e4m3fn)), r"expected F8_E4M3 \(128, 8\)"),
    ("modelopt", instead("weight_scale", torch.zeros(128, 8)), r"weight_scale F32 \(128, 8\); expected"),
    ("modelopt", instead("weight", torch.zeros(128, 60, dtype=U8)), "expected"),
    ("modelopt", instead("pre_quant_scale", torch.ones(128)), "activations are multiplied before the product"),
    ("modelopt mxfp4", instead("weight_scale", torch.zeros(128, 8, dtype=U8)), r"U8 \(128, 4\) .MXFP4"),
    ("compressed", without("weight_global_scale"), "has the weight_global_scale none"),
    ("compressed", instead("weight_packed", torch.zeros(128, 16, dtype=torch.int32)), "expected U8"),
    ("comfy", mark(b'{"format": "int8_tensorwise"}'), "ComfyUI's format 'int8_tensorwise'"),
    ("comfy", mark(b'{"format": "nvfp4", "convrot": true}'), "'convrot'; it is not known here"),
    ("modelopt", instead("weight", torch.zeros(128, 128).to(torch.float8_e4m3fn)), "scaled FP8 is not read"),
    ("modelopt mxfp4", instead("weight_scale_2", torch.ones(())), "weight_scale_2 beside it, which MXFP4 has not"),
    ("comfy", mark(b"[1"), "comfy_quant"),
    ("comfy", mark(b'{"form": 1}'), "expected a format"),
    ("comfy", without("comfy_quant"), "has ComfyUI's marks, and none for"),
    ("comfy", instead("weight_scale", torch.zeros(128, 7).to(torch.float8_e4m3fn)), "expected F8_E4M3"),
]


@pytest.mark.parametrize(("kind", "edit", "message"), BAD)
def test_bad_files_are_refused(model, tmp_path, kind, edit, message):
    saved(model, tmp_path / "held", kind)
    content = load_file(tmp_path / "held" / NAME)
    edit(content)
    save_file(content, tmp_path / "held" / NAME)
    with pytest.raises(CheckpointError, match=message):
        quantize_checkpoint(tmp_path / "held", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_a_quantized_folder_of_another_kind_is_refused(model, tmp_path):
    model.save_pretrained(tmp_path / "plain")
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes"}
    (tmp_path / "plain" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="quantized already, and holds no weight in NVFP4"):
        quantize_checkpoint(tmp_path / "plain", tmp_path / "ours")


def test_not_finite_and_extreme_scales(tmp_path):
    """An exponent of 255 stands for NaN, and 0 for 2**-127."""
    from tahf4_compiler.checkpoint.fp4 import Fp4Weight, with_fp4
    from tahf4_compiler.files.reading import read_header

    codes = torch.full((3, 16), 0x72, dtype=U8)  # 1 and 6
    save_file({"a.weight": codes, "a.weight_scale": torch.tensor([[0], [255], [127]], dtype=U8)}, tmp_path / "x")
    found, formats = with_fp4(read_header(tmp_path / "x").tensors, tmp_path)
    weight = found["a.weight"]
    assert isinstance(weight, Fp4Weight) and formats == "MXFP4"
    values = weight.read(0, 3)
    assert values[0].tolist() == [2.0**-127, 6 * 2.0**-127] * 16
    assert values[1].isnan().all() and values[2].tolist() == [1.0, 6.0] * 16
    assert (hif4.quantize(values).scales[1] & 0xFF == 0xFF).all()


def test_a_file_of_comfyui_with_the_original_names(model, tmp_path):
    """One file, the prefix of ComfyUI, the names of the official Wan; marks with and without the prefix."""
    from test_quantize_command import original_names

    exact, content, marks = copy.deepcopy(model), {}, {}
    values = {}
    for name, value in original_names(model).items():
        path, _, leaf = name.rpartition(".")
        if leaf != "weight" or not name.startswith("blocks.") or value.dim() != 2:
            content[f"model.diffusion_model.{name}"] = value.clone()
            continue
        parts, values[name] = held(f"model.diffusion_model.{path}", value.float(), "comfy metadata")
        content |= parts
        marks[path] = {"format": "nvfp4"}
    assert len(values) == len(linears(exact))
    (tmp_path / "held").mkdir()
    text = json.dumps({"layers": marks})
    save_file(
        {name: value.contiguous() for name, value in content.items()},
        tmp_path / "held" / NAME,
        {"_quantization_metadata": text},
    )
    (tmp_path / "held" / "config.json").write_text(json.dumps({"_class_name": "WanModel", "num_heads": 2}))
    done = quantize_checkpoint(tmp_path / "held", tmp_path / "ours")
    assert len(done.losses[""]) == len(values)
    by_codes = {path: linear.weight_codes for path, linear in _quantized(exact, values).items()}
    found = tensors(tmp_path / "ours")
    assert all(torch.equal(found[f"{path}.weight_codes"], codes) for path, codes in by_codes.items())


def _quantized(model, values):
    """The model of the values that some original names stand for, packed."""
    from test_quantize_command import original_names

    where = {value.data_ptr(): name for name, value in original_names(model).items()}
    chosen = linears(model)
    for linear in chosen.values():
        name = where[linear.weight.data_ptr()]
        linear.weight.data.copy_(values[name])
    tahf4.quantize_(model)
    return {path: model.get_submodule(path) for path in chosen}
