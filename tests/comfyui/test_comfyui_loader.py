"""What the loader accepts, what it refuses, and what ComfyUI sees of a loaded model."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from comfy_models import NODES, import_nodes, plain_wan
from helpers import relative
from safetensors.torch import load_file, save_file

import tahf4_compiler as tahf4
from tahf4_compiler.errors import CheckpointError, OptionError, PackedError
from tahf4_compiler.model.attachments import attached
from tahf4_compiler.packed.linear import HiF4Linear


def place(comfy) -> Path:
    return comfy.models / "diffusion_models"


def lora(key: str, n: int = 256, k: int = 128, rank: int = 2, **more) -> dict:
    return {f"{key}.lora_up.weight": torch.randn(n, rank), f"{key}.lora_down.weight": torch.randn(rank, k), **more}


def test_the_loader_lists_packed_folders_and_files(comfy):
    shutil.copytree(place(comfy) / "wan" / "high", place(comfy) / "pipeline" / "transformer")
    (place(comfy) / "pipeline" / "text_encoder").mkdir()
    save_file({"x": torch.ones(1)}, place(comfy) / "pipeline" / "text_encoder" / "model.safetensors")
    (place(comfy) / "pipeline" / "text_encoder" / "config.json").write_text("{}")
    save_file({"x": torch.ones(1)}, place(comfy) / "plain.safetensors")
    node = comfy.package.NODE_CLASS_MAPPINGS["TAHF4DiffusionModelLoader"]
    (names,) = node.INPUT_TYPES()["required"]["model_name"]
    files = ["pipeline/text_encoder/model.safetensors", "plain.safetensors"]
    assert names == ["pipeline/transformer", "wan/high", *files]
    assert node.RETURN_TYPES == ("MODEL",) and node.CATEGORY == "advanced/loaders"
    assert set(comfy.package.NODE_DISPLAY_NAME_MAPPINGS) == set(comfy.package.NODE_CLASS_MAPPINGS)


@pytest.mark.parametrize("kind", ["single file", "shards"])
def test_other_forms_of_the_same_model_load_alike(comfy, kind):
    first = comfy.load()
    if kind == "single file":
        write = comfy.submodule("checkpoint").write_single_file
        write(place(comfy) / "wan" / "high", place(comfy) / "high.safetensors")
        assert "blocks.0.self_attn.q.weight_codes" in load_file(place(comfy) / "high.safetensors")
        second = comfy.load("high.safetensors")
    else:
        comfy.packed.save_pretrained(place(comfy) / "parts", max_shard_size="1MB")
        shard = min((place(comfy) / "parts").glob("*.safetensors"))
        with pytest.raises(PackedError, match=r"one of the \d files of a packed model; choose .*parts"):
            comfy.load(f"parts/{shard.name}")
        second = comfy.load("parts")
    ours, others = first.model.state_dict(), second.model.state_dict()
    assert list(ours) == list(others) and all(torch.equal(ours[key], others[key]) for key in ours)
    assert all(m.extra_repr() == second.model.get_submodule(p).extra_repr() for p, m in packed(first).items())


@torch.no_grad()
def test_linears_compute_as_the_file_says(comfy):
    model, x = copy.deepcopy(comfy.plain), torch.randn(3, 128)
    tahf4.quantize_(model, scale_span="row", rounding="bfloat16_half_away")
    model.save_pretrained(place(comfy) / "row")
    ours = packed(comfy.load("row"))["diffusion_model.blocks.0.ffn.0"]
    theirs = model.get_submodule("blocks.0.ffn.net.0.proj")
    assert (ours.span, ours.rounding) == (theirs.span, theirs.rounding) == (0, "bfloat16_half_away")
    assert torch.equal(ours(x), theirs(x))

    def unequal(tensors, config):
        tensors["blocks.0.ffn.net.0.proj.weight_scales"][0, 0] += 1

    spoil(place(comfy) / "row", unequal)
    with pytest.raises(PackedError, match=r"ffn\.0\) has the span 'row', and the level-1 scales of its units differ"):
        comfy.load("row")


def packed(patcher) -> dict:
    return {path: module for path, module in patcher.model.named_modules() if isinstance(module, HiF4Linear)}


def test_comfyui_sees_the_packed_size_and_no_missing_tensor(comfy, caplog):
    model = comfy.load()
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    size = sum(value.nelement() * value.element_size() for value in model.model.parameters())
    assert model.model_size() == size + len(packed(model))  # a byte for each name of a weight
    assert all(module.weight_codes.dtype == torch.uint8 for module in packed(model).values())
    state = model.model.state_dict()
    assert state["diffusion_model.blocks.0.ffn.0.weight"].shape == (1,), "no plain model, should somebody save it"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_of_16_bits(comfy, dtype):
    model = plain_wan().to(dtype)
    tahf4.quantize_(model)
    model.save_pretrained(place(comfy) / "half")
    loaded = comfy.load("half")
    linear = loaded.model.diffusion_model.blocks[0].ffn[0]
    assert linear.bias.dtype == linear.weight_dtype == dtype and linear.multiplier.dtype == torch.float32
    x = torch.randn(5, 128, dtype=dtype)
    assert torch.equal(linear(x), model.blocks[0].ffn.net[0].proj(x))
    patched, _ = comfy.stand_in.load_lora_for_models(loaded, None, lora("diffusion_model.blocks.0.ffn.0"), 1.0, 0)
    noise, context = torch.randn(1, 4, 2, 4, 4), torch.randn(1, 3, 4096)
    out = comfy.stand_in.sample(patched, noise, context, torch.tensor([0.5, 0.0]))
    assert linear.adapter[0].dtype == dtype and out.isfinite().all()
    moved = loaded.model.to(torch.float32).diffusion_model.blocks[0].ffn[0]
    assert moved.bias.dtype == torch.float32 and moved.weight_codes.dtype == torch.uint8
    assert relative(moved(x.float()), linear(x)) < 1e-1


def test_a_folder_with_steps_in_high_precision_says_which_node_applies_them(comfy, caplog):
    def steps(tensors, config):
        config["quantization_config"] |= {"high_precision_steps": [0, -1], "step_activation_bits": 16}

    spoil(place(comfy) / "wan" / "high", steps)
    comfy.load()
    (record,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert "more bits in the steps 0, -1" in record.getMessage() and "TAHF4 Activation Bits" in record.getMessage()


def test_a_deep_copy_stands_alone(comfy):
    model = comfy.load()
    other = copy.deepcopy(model.model)
    x = torch.randn(3, 128)
    before = other.diffusion_model.blocks[0].ffn[0](x)
    with torch.no_grad():
        model.model.diffusion_model.blocks[0].ffn[0].weight_codes.zero_()
    assert torch.equal(other.diffusion_model.blocks[0].ffn[0](x), before)


@pytest.mark.parametrize(
    ("patch", "words"),
    [
        ({"{}.diff": torch.ones(256, 128)}, "of the kind diff"),
        ({"{}.set_weight": torch.ones(256, 128)}, "of the kind set"),
        ({"{}.lokr_w1": torch.ones(2, 2), "{}.lokr_w2": torch.ones(128, 64)}, "of the kind lokr"),
        (lora("{}", **{"{}.dora_scale": torch.ones(256, 1)}), "DoRA"),
        (lora("{}", n=128), "belongs to another model"),
    ],
    ids=["diff", "set", "lokr", "dora", "another shape"],
)
@pytest.mark.parametrize("memory", [None, 1], ids=["whole", "low memory"])
def test_other_patches_of_packed_weights_are_refused_by_name(comfy, patch, words, memory):
    base = comfy.load()
    before = {name: value.clone() for name, value in base.model.named_parameters()}
    tensors = {key.format("diffusion_model.blocks.0.ffn.0"): value for key, value in patch.items()}
    patched, _ = comfy.stand_in.load_lora_for_models(base, None, tensors, 1.0, 0)
    noise, context, sigmas = torch.randn(1, 4, 2, 4, 4), torch.randn(1, 3, 4096), torch.tensor([0.5, 0.0])
    with pytest.raises(PackedError, match=rf"diffusion_model\.blocks\.0\.ffn\.0\.weight .*{words}"):
        comfy.stand_in.sample(patched, noise, context, sigmas, memory=memory)
    comfy.stand_in.sample(base, noise, context, sigmas)
    assert all(torch.equal(before[name], value) for name, value in base.model.named_parameters())


def test_merging_saving_and_wrappers_of_weights_are_refused(comfy):
    base, other = comfy.load(), comfy.load()
    before = {name: value.clone() for name, value in base.model.named_parameters()}
    merged = base.clone()
    merged.add_patches({key: value for key, value in other.get_key_patches().items() if "codes" in key}, 0.5, 0.5)
    with pytest.raises(PackedError, match=r"a patch of .*weight_codes changes codes"):
        merged.partially_load(torch.device("cpu"), 10**9)
    assert all(torch.equal(before[name], value) for name, value in base.model.named_parameters())
    linear = base.model.diffusion_model.blocks[0].ffn[0]
    linear.weight_function = [lambda weight: weight * 2]
    with pytest.raises(PackedError, match="change the weight of a packed linear"):
        linear(torch.randn(2, 128))
    patched, _ = comfy.stand_in.load_lora_for_models(base, None, lora("diffusion_model.blocks.0.ffn.0"), 1.0, 0)
    with pytest.raises(PackedError, match="to save one or to extract a LoRA"):
        patched.partially_load(torch.device("cpu"), 10**9, force_patch_weights=True)
    with pytest.raises(PackedError):
        patched.partially_load(torch.device("cpu"), 1, force_patch_weights=True)


def spoil(folder: Path, change) -> None:
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    config = json.loads((folder / "config.json").read_text())
    change(tensors, config)
    save_file(tensors, file)
    (folder / "config.json").write_text(json.dumps(config))


def drop_codes(tensors, config):
    del tensors["blocks.0.attn1.to_q.weight_codes"]


def forget_linear(tensors, config):
    del config["quantization_config"]["linears"]["blocks.0.attn1.to_q"]


def other_sizes(tensors, config):
    config["quantization_config"]["linears"]["blocks.0.attn1.to_q"]["n"] = 64


def more_linears(tensors, config):
    linears = config["quantization_config"]["linears"]
    linears["blocks.0.attn2.add_k_proj"] = linears["blocks.0.attn2.to_q"]
    for name in [name for name in tensors if name.startswith("blocks.0.attn2.to_q.")]:
        tensors[name.replace("to_q", "add_k_proj")] = tensors[name].clone()


def of_vace(tensors, config):
    tensors["vace_blocks.0.proj_in.weight"] = torch.ones(1)


def not_wan(tensors, config):
    for name in list(tensors):
        tensors[f"transformer.{name}"] = tensors.pop(name)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop_codes, r"lacks blocks\.0\.self_attn\.q\.weight_codes"),
        (forget_linear, r"holds blocks\.0\.self_attn\.q\.weight_codes.* damaged"),
        (other_sizes, r"blocks\.0\.self_attn\.q is packed with 128 -> 64 features"),
        (more_linears, r"packs blocks\.0\.cross_attn\.k_img, which ComfyUI's model has not"),
        (of_vace, r"holds vace_blocks\.0\.proj_in\.weight, which a Wan model"),
        (not_wan, r"holds .*, which a Wan model"),
    ],
)
def test_a_damaged_or_foreign_folder_is_refused_by_name(comfy, change, words):
    spoil(place(comfy) / "wan" / "high", change)
    with pytest.raises(PackedError, match=words):
        comfy.load()


def test_a_plain_model_is_refused(comfy):
    comfy.plain.save_pretrained(place(comfy) / "plain")
    save_file({"head.modulation": torch.ones(1, 2, 128)}, place(comfy) / "wan.safetensors")
    for name in ("plain/diffusion_pytorch_model.safetensors", "wan.safetensors"):
        with pytest.raises(
            PackedError, match=r"holds no model that tahf4 packed. Load a plain model with ComfyUI's own"
        ):
            comfy.load(name)
    (place(comfy) / "cut.safetensors").write_bytes(b"1234567")
    with pytest.raises(CheckpointError):
        comfy.load("cut.safetensors")


def test_a_lora_of_another_model_and_bits_of_a_plain_one_are_refused(comfy):
    nodes = comfy.package.NODE_CLASS_MAPPINGS
    save_file(lora("lora_unet_down_blocks_0"), comfy.models / "loras" / "other.safetensors")
    with pytest.raises(PackedError, match="no tensor of .*other.safetensors belongs to this model"):
        nodes["TAHF4LoraLoader"]().load_lora(comfy.load(), "other.safetensors", 1.0)
    with pytest.raises(OptionError, match="expected numbers"):
        nodes["TAHF4ActivationBits"]().set_bits(comfy.load(), "8", "first")


def test_without_comfyui_the_package_registers_nothing(copied):
    code = (
        "import importlib.util, sys; "
        "spec = importlib.util.spec_from_file_location('nodes_of_tahf4', sys.argv[1]); "
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module); "
        "assert module.NODE_CLASS_MAPPINGS == module.NODE_DISPLAY_NAME_MAPPINGS == {}; "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, copied / "__init__.py"], check=True)
    assert (NODES / "pyproject.toml").read_text().count("[tool.comfy]") == 1


def test_without_tahf4_comfyui_says_what_to_install(comfy, copied, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tahf4_compiler" else find(name))
    with pytest.raises(ImportError, match="python -m pip install PATH_TO_TAHF4"):
        import_nodes(copied, f"{copied}.again")


def test_linears_that_are_not_packed_stay_so_when_the_model_is_compiled(comfy):
    modules = comfy.load().model.diffusion_model.modules()
    plain = [m for m in modules if isinstance(m, torch.nn.Linear) and not isinstance(m, HiF4Linear)]
    assert plain and all(attached(linear.weight).decision == "high_precision" for linear in plain)
