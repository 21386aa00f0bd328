"""Packed models in transformers: folders, quantization while loading, pipelines of diffusers, and who may save."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from models import branched, masked_recipe
from safetensors.torch import load_file, load_model, save_file, save_model
from tahf4_compiler.tools import tiny_wan
from torch import nn

import tahf4_compiler as tahf4
from tahf4_compiler.packed.convert import packed_linears
from tahf4_compiler.packed.loading import Loading
from tahf4_compiler.recipe.entries import LinearEntry, RecipeEntry
from tahf4_compiler.weights.checksum import checksum

PIPELINE = Path(tiny_wan.__file__).parent / "pipeline"
IDS = torch.arange(1, 13)[None]
_T5 = {"vocab_size": 100, "d_model": 128, "d_kv": 64, "d_ff": 256, "num_layers": 2, "num_heads": 2}
_CLIP = {
    "vocab_size": 100,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
_LLAMA = {**_CLIP, "num_key_value_heads": 1}


def umt5():
    return transformers.UMT5EncoderModel(transformers.UMT5Config(**_T5))


def t5():
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**_T5, decoder_start_token_id=0))


def clip():
    return transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**_CLIP))


def llama(**settings):
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**{**_LLAMA, "tie_word_embeddings": True, "eos_token_id": None, **settings})
    )


def qwen():
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**_LLAMA, head_dim=64, tie_word_embeddings=False))


@pytest.fixture(autouse=True)
def _no_grad():
    transformers.utils.logging.disable_progress_bar()
    with torch.no_grad():
        yield


def equal(first: nn.Module, second: nn.Module) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return list(a) == list(b) and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def run(model: nn.Module) -> torch.Tensor:
    if model.can_generate():
        return model.generate(IDS, max_new_tokens=4, do_sample=False)
    return model(IDS)[0]


@pytest.mark.parametrize(
    ("make", "dtype", "packed"),
    [
        (umt5, torch.bfloat16, 14),
        (t5, torch.float16, 32),  # transformers keeps `wo` in float32 then
        (clip, torch.float32, 12),
        (llama, torch.bfloat16, 14),
        (qwen, torch.bfloat16, 14),
    ],
)
def test_a_model_is_packed_while_it_loads_and_a_packed_folder_loads_as_it_was(make, dtype, packed, tmp_path):
    make().save_pretrained(tmp_path / "plain")
    cls = type(make())
    model = cls.from_pretrained(tmp_path / "plain", dtype=dtype)
    plan = tahf4.quantize_(model)
    assert len(packed_linears(model)) == packed
    loaded = cls.from_pretrained(tmp_path / "plain", dtype=dtype, quantization_config=tahf4.TaHF4Config())
    assert equal(loaded, model)
    model.save_pretrained(tmp_path / "packed", max_shard_size="100KB")
    assert len(list((tmp_path / "packed").glob("*.safetensors"))) > 1
    again = cls.from_pretrained(tmp_path / "packed")
    assert equal(again, model) and again.dtype == dtype
    for other in (loaded, again):
        assert torch.equal(run(other), run(model))
        mine, its = packed_linears(model), packed_linears(other)
        for path, linear in mine.items():
            told = (linear.weight_dtype, linear.hadamard_block, linear.activation, linear.in_features)
            assert told == (
                its[path].weight_dtype, its[path].hadamard_block, its[path].activation, its[path].in_features
            )
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_bytes() == (tmp_path / "packed" / "config.json").read_bytes()
    reasons = {d.module: d.reason for d in plan if d.decision != "hif4"}
    tied = {llama: "Embedding model.embed_tokens reads it too", t5: "reads it too", qwen: "boundary", clip: "boundary"}
    assert all(tied[make] in reason for reason in reasons.values())
    if make is t5:
        assert packed_linears(again)["encoder.block.0.layer.1.DenseReluDense.wo"].weight_dtype == torch.float32
        assert again.lm_head.weight is again.shared.weight


@pytest.mark.parametrize("make", [llama, t5])
def test_linears_without_a_bias_load_in_the_dtype_that_is_asked_for(make, tmp_path):
    model = make()
    tahf4.quantize_(model)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=torch.float16)
    kept = {path for path in packed_linears(model) if path.endswith(".wo")}  # that T5 needs in float32
    for path, linear in packed_linears(again).items():
        assert linear.bias is None
        assert linear.weight_dtype == (torch.float32 if path in kept else torch.float16), path
    tahf4.dequantize_(again)
    assert run(again).isfinite().all(), "no linear has another dtype than its input"


def test_one_weight_at_a_time_is_in_memory_while_packing(tmp_path, monkeypatch):
    llama().save_pretrained(tmp_path)
    seen = []

    def pack(self, model, path, weight):
        plain = [p for p in self.transforms if not isinstance(model.get_submodule(p), tahf4.HiF4Linear)]
        seen.append(sum(model.get_submodule(p).weight.device.type != "meta" for p in plain))
        return original(self, model, path, weight)

    original = Loading.pack
    monkeypatch.setattr(Loading, "pack", pack)
    transformers.LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=tahf4.TaHF4Config())
    assert seen == [0] * 14


def test_a_recipe_is_applied_while_loading_and_its_weights_are_checked(tmp_path):
    model = umt5()
    model.save_pretrained(tmp_path / "plain")
    recipe = masked_recipe(model, ["encoder.block.1.layer.0.SelfAttention.o"])
    config = tahf4.TaHF4Config(recipe=recipe)
    loaded = type(model).from_pretrained(tmp_path / "plain", quantization_config=config)
    tahf4.quantize_(model, recipe)
    assert len(packed_linears(model)) == 13 and equal(loaded, model)
    loaded.save_pretrained(tmp_path / "packed")
    again = type(model).from_pretrained(tmp_path / "packed", dtype=torch.bfloat16)
    name = "encoder.block.0.layer.0.SelfAttention.q.multiplier"
    assert torch.equal(again.state_dict()[name], model.state_dict()[name]), "float32, not rounded to the model's dtype"
    umt5().save_pretrained(tmp_path / "plain")
    with pytest.raises(tahf4.RecipeError, match="other weights"):
        type(model).from_pretrained(tmp_path / "plain", quantization_config=config)


def test_branches_of_a_recipe_are_packed_while_loading_and_saved(tmp_path):
    model = umt5()
    model.save_pretrained(tmp_path / "plain")
    recipe = branched(masked_recipe(model), model)
    loaded = type(model).from_pretrained(tmp_path / "plain", quantization_config=tahf4.TaHF4Config(recipe=recipe))
    tahf4.quantize_(model, recipe)
    assert {linear.rank for linear in packed_linears(model).values()} == {8} and equal(loaded, model)
    loaded.save_pretrained(tmp_path / "packed")
    assert equal(type(model).from_pretrained(tmp_path / "packed"), model)


def test_a_packed_folder_loads_with_its_head_or_without(tmp_path):
    model = llama()
    tahf4.quantize_(model)
    model.save_pretrained(tmp_path / "whole")
    body = transformers.LlamaModel.from_pretrained(tmp_path / "whole")
    assert equal(body, model.model)
    body.save_pretrained(tmp_path / "body")
    assert equal(type(model).from_pretrained(tmp_path / "body"), model)


def test_a_state_dict_that_is_given_to_save_pretrained_is_what_is_written(tmp_path):
    model = clip().eval()
    tahf4.quantize_(model)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    state["text_projection.weight"].fill_(3)
    model.save_pretrained(tmp_path, state_dict=state)
    loaded = type(model).from_pretrained(tmp_path)
    assert len(packed_linears(loaded)) == 12
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())
    assert not torch.equal(loaded.text_projection.weight, model.text_projection.weight)


def test_a_part_of_a_packed_model_of_two_is_not_loaded_with_random_weights(tmp_path):
    vision = {**_CLIP, "image_size": 16, "patch_size": 8}
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=_CLIP, vision_config=vision)).eval()
    model.save_pretrained(tmp_path / "plain")
    tahf4.quantize_(model)
    model.save_pretrained(tmp_path / "packed")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):  # the part's own settings know no packing
        transformers.CLIPTextModel.from_pretrained(tmp_path / "packed")
    with pytest.raises(tahf4.PackedError, match=r"Load the folder with its config.json"):
        transformers.CLIPTextModel.from_pretrained(tmp_path / "packed", quantization_config=tahf4.TaHF4Config())
    part = transformers.CLIPTextModel.from_pretrained(tmp_path / "plain", quantization_config=tahf4.TaHF4Config())
    assert len(packed_linears(part)) == 12 and equal(part, model.text_model)


def test_a_head_that_is_the_embedding_stays_plain_whatever_a_recipe_says(tmp_path):
    model = llama()
    model.save_pretrained(tmp_path)
    head = LinearEntry((100, 128), int(checksum(model.lm_head.weight)), "hif4", "by hand")
    recipe = masked_recipe(model)
    recipe = tahf4.Recipe({"": {**recipe.experts[""], "lm_head": RecipeEntry({"lm_head": head})}})
    config = tahf4.TaHF4Config(recipe=recipe)
    loaded = type(model).from_pretrained(tmp_path, quantization_config=config)
    tahf4.quantize_(model, recipe)
    assert type(loaded.lm_head) is nn.Linear and loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert equal(loaded, model)


def test_linears_without_a_multiplier_load_again(tmp_path):
    model = umt5()
    recipe = masked_recipe(model)
    bare = {"mask": None, "percentile": None, "seed": None, "hadamard_block": 0}
    entries = {name: replace(entry, **bare) for name, entry in recipe.experts[""].items()}
    tahf4.quantize_(model, tahf4.Recipe({"": entries}))
    assert all(linear.multiplier is None for linear in packed_linears(model).values())
    model.save_pretrained(tmp_path)
    assert equal(type(model).from_pretrained(tmp_path), model)


def test_what_is_packed_while_it_loads_is_not_left_on_disk(tmp_path):
    model = llama()
    model.save_pretrained(tmp_path / "plain")
    places = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu", "model.norm": "cpu"}
    with pytest.raises(tahf4.PackedError, match=r"\(model\.layers\.0\..*load a packed model into memory"):
        type(model).from_pretrained(
            tmp_path / "plain",
            device_map={**places, "model.rotary_emb": "cpu", "lm_head": "cpu"},
            offload_folder=tmp_path / "disk",
            quantization_config=tahf4.TaHF4Config(),
        )


def test_a_damaged_checkpoint_is_refused_by_name(tmp_path):
    model = umt5()
    tahf4.quantize_(model)
    model.save_pretrained(tmp_path)
    file, settings = tmp_path / "model.safetensors", json.loads((tmp_path / "config.json").read_text())
    tensors = load_file(file)
    name = "encoder.block.0.layer.0.SelfAttention.q"
    for leaf, value, message in (
        ("multiplier", None, "lacks tensors of 1 packed"),
        ("weight_codes", None, "lacks tensors of 1 packed"),
        ("weight_scales", tensors[f"{name}.weight_scales"].long(), "is of torch.int64"),
    ):
        changed = {k: v for k, v in {**tensors, f"{name}.{leaf}": value}.items() if v is not None}
        save_file(changed, file, metadata={"format": "pt"})
        with pytest.raises(tahf4.PackedError, match=message):
            type(model).from_pretrained(tmp_path)
    save_file(tensors, file, metadata={"format": "pt"})
    del settings["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(tahf4.PackedError, match="were not read with it"):
        type(model).from_pretrained(tmp_path, quantization_config=tahf4.TaHF4Config())


def test_a_model_goes_back_to_plain_and_leaves_the_configuration_of_others_alone(tmp_path):
    config = transformers.UMT5Config(**_T5)
    model, other = (transformers.UMT5EncoderModel(config) for _ in range(2))
    tahf4.quantize_(model)
    assert not hasattr(other.config, "quantization_config") and model.encoder.config is not other.encoder.config
    want = model.encoder.block[0].layer[0].SelfAttention.q.dequantized()
    assert model.dequantize() is model and not packed_linears(model)
    assert not hasattr(model.config, "quantization_config") and not model.is_quantized
    model.save_pretrained(tmp_path)
    plain = type(model).from_pretrained(tmp_path)
    assert type(plain.encoder.block[0].layer[0].SelfAttention.q) is nn.Linear
    assert torch.equal(plain.encoder.block[0].layer[0].SelfAttention.q.weight, want)


def test_text_encoders_of_pipelines(tmp_path):
    from diffusers import PipelineQuantizationConfig, WanPipeline

    def load(folder, **options):
        return WanPipeline.from_pretrained(folder, dtype=torch.bfloat16, **options)

    components = ["text_encoder", "transformer", "transformer_2"]
    pipe = load(PIPELINE)
    tahf4.quantize_(pipe)
    tahf4.quantize_(pipe.text_encoder)
    assert len(packed_linears(pipe.text_encoder)) == 14
    pipe.save_pretrained(tmp_path)
    backend = {"quant_backend": "tahf4", "quant_kwargs": {"keep": []}, "components_to_quantize": components}
    mapping = {"quant_mapping": {name: tahf4.TaHF4Config() for name in components}}
    asked = [PipelineQuantizationConfig(**settings) for settings in (backend, mapping)]
    found = [load(tmp_path), *(load(PIPELINE, quantization_config=config) for config in asked)]
    for other in found:
        assert all(equal(getattr(other, name), getattr(pipe, name)) for name in components)
    (first, _), (second, _) = (
        p.encode_prompt("a red circle", do_classifier_free_guidance=False) for p in (found[0], pipe)
    )
    assert torch.equal(first, second)
    with pytest.raises(ValueError, match="quantized model"):
        WanPipeline.from_pipe(pipe)
    assert WanPipeline(**pipe.components).transformer is pipe.transformer


class Mine(nn.Module):
    """Holds a text encoder beside something of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.head = umt5(), nn.Linear(128, 64)


def test_whoever_cannot_say_that_a_model_is_packed_does_not_save_it(tmp_path):
    from huggingface_hub import PyTorchModelHubMixin
    from peft import LoraConfig, get_peft_model

    class Hub(Mine, PyTorchModelHubMixin):
        pass

    hub = Hub()
    tahf4.quantize_(hub)
    with pytest.raises(tahf4.PackedError, match=r"Hub.save_pretrained would save text.encoder.block.0"):
        hub.save_pretrained(tmp_path / "hub")
    hub.text.save_pretrained(tmp_path / "text")
    assert equal(transformers.UMT5EncoderModel.from_pretrained(tmp_path / "text"), hub.text)
    save_model(hub, str(tmp_path / "state.safetensors"))
    other = Hub()
    tahf4.quantize_(other)
    load_model(other, str(tmp_path / "state.safetensors"))
    assert equal(other, hub)

    part = llama()
    tahf4.quantize_(part.model)
    with pytest.raises(tahf4.PackedError, match="call it again with the whole model"):
        part.save_pretrained(tmp_path / "part")
    tahf4.quantize_(part)
    part.save_pretrained(tmp_path / "part")
    assert equal(transformers.LlamaForCausalLM.from_pretrained(tmp_path / "part"), part)

    adapted = get_peft_model(part, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    assert len(load_file(tmp_path / "adapter" / "adapter_model.safetensors")) == 4


@pytest.mark.slow  # test_import_hook.py has both orders
def test_transformers_knows_the_quantizer_if_it_was_imported_first():
    script = """
        import transformers.modeling_utils, tahf4_compiler
        from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, AUTO_QUANTIZATION_CONFIG_MAPPING
        assert AUTO_QUANTIZATION_CONFIG_MAPPING["tahf4"] is tahf4_compiler.TaHF4Config
        print(AUTO_QUANTIZER_MAPPING["tahf4"].__name__)
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert result.stdout.strip() == "TaHF4HfQuantizer", result.stderr


@pytest.mark.slow
def test_packing_needs_neither_library():
    script = """
        import sys
        sys.modules.update(transformers=None, diffusers=None, accelerate=None)
        import torch, tahf4_compiler as tahf4
        nn = torch.nn
        blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)) for _ in "ab")
        tahf4.quantize_(blocks)
        packed = sum(isinstance(m, tahf4.HiF4Linear) for m in blocks.modules())
        print(packed, tahf4.TaHF4Config().to_dict()["quant_method"])
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert result.stdout.split() == ["4", "tahf4"], result.stderr


def test_plain_weights_beside_the_configuration_of_a_packed_model_are_told_apart_from_damaged_ones(tmp_path):
    model = umt5()
    tahf4.quantize_(model)
    type(model)(model.config).save_pretrained(tmp_path)
    with pytest.raises(tahf4.PackedError, match=r"weights beside it are plain.*Delete quantization_config"):
        type(model).from_pretrained(tmp_path)


def test_a_packed_folder_is_refused_where_tahf4_is_not_known(tmp_path, monkeypatch):
    from transformers.quantizers import auto

    model = llama()
    tahf4.quantize_(model)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    for cls in (type(model), transformers.LlamaModel):
        _, told = cls.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(told.values()), "nothing is unexpected"
    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "tahf4")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        type(model).from_pretrained(tmp_path)


def test_a_folder_keeps_the_bits_of_activations(tmp_path):
    model = llama()
    tahf4.quantize_(model)
    tahf4.set_activation_bits(model, {"mlp": 8})
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    found = {path: linear.activation_bits for path, linear in packed_linears(again).items()}
    assert {path for path, bits in found.items() if bits == 8} == {path for path in found if ".mlp." in path} != set()
    assert torch.equal(run(model), run(again))
