"""Packed models that were changed after they were packed: what is saved is what is there, or saving refuses."""

from __future__ import annotations

import copy
import gc
import io
import json
import weakref
from types import SimpleNamespace

import pytest
import torch
from diffusers import SD3ControlNetModel, SD3Transformer2DModel
from models import masked_recipe, output, wan
from peft import LoraConfig
from safetensors.torch import load_file

import tahf4_compiler as tahf4
from tahf4_compiler.packed.convert import packed_linears

LORA = LoraConfig(r=4, target_modules=["to_q"], init_lora_weights=False)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def packed():
    model, inputs = wan()
    tahf4.quantize_(model)
    return model, inputs


def saved(model, folder):
    """Save a model, load it, and return it."""
    model.save_pretrained(folder)
    found = type(model).from_pretrained(folder)
    assert sorted(packed_linears(found)) == sorted(packed_linears(model))
    return found


def test_a_model_that_was_packed_with_an_adapter_is_saved_once_that_is_unloaded(tmp_path):
    model, inputs = wan()
    model.add_adapter(LORA, "style")
    tahf4.quantize_(model)
    for change in (lambda: None, lambda: model.delete_adapters("style")):
        change()
        message = r"could not be loaded.*to_q\.base_layer.*[^.]\. A folder .*unload_lora"
        with pytest.raises(tahf4.PackedError, match=message):
            model.save_pretrained(tmp_path)
        assert not any(tmp_path.iterdir()), "refused before anything is written"
    model.unload_lora()
    assert torch.equal(output(saved(model, tmp_path)(**inputs)), output(model(**inputs)))


def test_fused_projections_are_saved_when_they_are_undone(tmp_path):
    model, inputs = wan()
    model.fuse_qkv_projections()
    tahf4.quantize_(model)
    with pytest.raises(tahf4.PackedError, match=r"to_qkv.*unfuse_qkv_projections"):
        model.save_pretrained(tmp_path)
    model.unfuse_qkv_projections()
    assert torch.equal(output(saved(model, tmp_path)(**inputs)), output(model(**inputs)))


def test_a_part_that_was_unpacked_is_saved_as_it_is(tmp_path):
    model, inputs = packed()
    tahf4.dequantize_(model.blocks[0])
    found = saved(model, tmp_path)
    assert len(packed_linears(found)) == 10
    assert torch.equal(output(found(**inputs)), output(model(**inputs)))


def unpickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, unpickled])
def test_a_copy_is_saved_as_what_the_copy_holds(copied, tmp_path):
    model, _ = packed()
    other = copied(model)
    tahf4.dequantize_(other.blocks[0])
    for each, count in ((other, 10), (model, 20)):
        assert len(packed_linears(saved(each, tmp_path / str(count)))) == count
    gone = weakref.ref(model)
    gc.collect()
    gc.disable()
    try:
        del model, each
        assert gone() is None, "no cycle keeps a model in memory"
    finally:
        gc.enable()
    assert len(packed_linears(saved(other, tmp_path / "again"))) == 10


def test_a_second_packing_keeps_what_the_first_was_told(tmp_path):
    model, _ = wan()
    recipe = masked_recipe(model)
    recipe.provenance["prompts"] = 3
    tahf4.quantize_(model, recipe, keep=["ffn"])
    tahf4.quantize_(model, keep=["proj_out"])
    model.save_pretrained(tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert said["keep"] == ["ffn", "proj_out"] and said["recipe"] == {"prompts": 3}


def test_a_quantizer_of_another_kind_keeps_its_settings(tmp_path):
    from diffusers.quantizers.base import DiffusersQuantizer

    class Other(DiffusersQuantizer):
        is_serializable = is_trainable = True
        _process_model_before_weight_loading = _process_model_after_weight_loading = None

    model, _ = wan()
    model.hf_quantizer = Other(SimpleNamespace(linears={}))
    mine = model.hf_quantizer.quantization_config
    tahf4.quantize_(model)
    assert model.hf_quantizer.quantization_config is mine and not mine.linears
    with pytest.raises(tahf4.PackedError, match="nothing that says so"):
        model.save_pretrained(tmp_path)


def test_plain_weights_beside_the_configuration_of_a_packed_model_are_told_apart_from_damaged_ones(tmp_path):
    model, _ = packed()
    plain = type(model).from_config(model.config)
    plain.save_pretrained(tmp_path)
    with pytest.raises(tahf4.PackedError, match=r"weights beside it are plain.*Delete quantization_config"):
        type(model).from_pretrained(tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())
    del said["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(said))
    assert torch.equal(type(model).from_pretrained(tmp_path).proj_out.weight, plain.proj_out.weight)


@pytest.mark.parametrize("shards", ["10GB", "100KB"])
def test_a_packed_folder_with_the_original_configuration_is_refused(shards, tmp_path):
    model, inputs = packed()
    model.save_pretrained(tmp_path, max_shard_size=shards)
    found, told = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(told.values()) and torch.equal(output(found(**inputs)), output(model(**inputs)))
    said = json.loads((tmp_path / "config.json").read_text())
    del said["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(said))
    with pytest.raises(ValueError, match=r"\.weight expected shape .* but got torch.Size\(\[1\]\)"):
        type(model).from_pretrained(tmp_path)


def test_the_tensors_of_a_folder_load_into_a_packed_model_and_into_no_plain_one(tmp_path):
    model, inputs = packed()
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    other, _ = packed()
    other.load_state_dict(state)
    assert torch.equal(output(other(**inputs)), output(model(**inputs)))
    with pytest.raises(ValueError, match="expected shape"):
        type(model).from_single_file(tmp_path / "diffusion_pytorch_model.safetensors", config=str(tmp_path))
    with pytest.raises(tahf4.PackedError, match="linears that are not packed in WanTransformer3DModel"):
        wan()[0].load_state_dict(state, strict=False)


def on_disk(model, folder):
    device = torch.device("cpu")
    model.enable_group_offload(
        onload_device=device, offload_device=device, offload_type="block_level", num_blocks_per_group=1,
        offload_to_disk_path=str(folder / "offloaded"),
    )  # fmt: skip


def on_meta(model, folder):
    from accelerate import cpu_offload

    cpu_offload(model, execution_device="cpu")


def in_float8(model, folder):
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


@pytest.mark.parametrize(
    ("change", "told"), [(on_disk, "are offloaded"), (on_meta, "are offloaded"), (in_float8, "float8_e4m3fn")]
)
def test_a_model_whose_values_are_elsewhere_is_not_saved(change, told, tmp_path):
    model, _ = packed()
    change(model, tmp_path)
    with pytest.raises(tahf4.PackedError, match=f"{told}.*Save the model before"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("keep", [["attn1"], []])
def test_a_packed_model_with_an_adapter_on_plain_linears_is_not_saved(keep, tmp_path):
    """The folder would hold their weights under the names that the adapter gives them."""
    model = wan()[0]
    tahf4.quantize_(model, keep=keep)
    targets = ["to_q"] if keep else ["proj_out"]
    model.add_adapter(LoraConfig(r=4, target_modules=targets, init_lora_weights=False), "a")
    with pytest.raises(tahf4.PackedError, match="could not be loaded"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_packed_model_without_one_of_its_blocks_is_not_saved(tmp_path):
    model = wan()[0]
    tahf4.quantize_(model)
    model.blocks = model.blocks[:1]
    with pytest.raises(tahf4.PackedError, match="it lacks blocks.1"):
        model.save_pretrained(tmp_path)


def test_a_model_that_was_unpacked_in_parts_is_saved_as_plain(tmp_path):
    model, inputs = packed()
    for block in model.blocks:
        tahf4.dequantize_(block)
    found = saved(model, tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    torch.testing.assert_close(found.state_dict(), model.state_dict(), rtol=0, atol=0)
    # MKL's sums depend on how a weight lies in memory, on AMD's processors.
    torch.testing.assert_close(output(found(**inputs)), output(model(**inputs)))


def test_a_shallow_copy_whose_model_is_gone_is_not_saved(tmp_path):
    model, _ = packed()
    shallow = copy.copy(model)
    del model
    gc.collect()
    with pytest.raises(tahf4.PackedError, match=r"copy\.deepcopy"):
        shallow.save_pretrained(tmp_path)


def test_a_packed_folder_that_is_loaded_onto_disk_is_refused(tmp_path):
    model, _ = packed()
    model.save_pretrained(tmp_path / "folder")
    with pytest.raises(tahf4.PackedError, match=r"load a packed model into memory"):
        type(model).from_pretrained(tmp_path / "folder", device_map={"": "disk"}, offload_folder=tmp_path / "disk")


def test_a_control_net_is_not_made_of_a_packed_model():
    model = SD3Transformer2DModel(
        sample_size=8, num_layers=2, attention_head_dim=64, num_attention_heads=2, joint_attention_dim=64,
        caption_projection_dim=128, pooled_projection_dim=64,
    )  # fmt: skip
    made = SD3ControlNetModel.from_transformer(model, num_layers=1)
    assert torch.equal(made.transformer_blocks[0].attn.to_q.weight, model.transformer_blocks[0].attn.to_q.weight)
    tahf4.quantize_(model)
    with pytest.raises(tahf4.PackedError, match=r"from_transformer would take .*Make the new model"):
        SD3ControlNetModel.from_transformer(model, num_layers=1)
