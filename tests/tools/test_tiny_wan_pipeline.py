"""The shipped pipeline is small, in bfloat16, quantizable in 64-wide units, and shows what a prompt says."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from tahf4_compiler.tools.tiny_wan import data, evaluate, model, settings

MAX_BYTES = 12_000_000


@pytest.fixture(scope="module")
def pipeline():
    return model.load_pipeline(settings.PIPELINE_DIR)


def test_the_directory_is_at_most_12_megabytes():
    files = [file for file in settings.PIPELINE_DIR.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= MAX_BYTES


def test_every_stored_weight_is_bfloat16():
    stored = list(settings.PIPELINE_DIR.rglob("*.safetensors"))
    assert len(stored) == 4
    for path in stored:
        with safe_open(path, framework="pt") as weights:
            assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"BF16"}, path  # noqa: SIM118


def test_it_has_two_different_experts_of_one_configuration(pipeline):
    first, second = pipeline.transformer, pipeline.transformer_2
    assert dict(first.config) | {"_name_or_path": ""} == dict(second.config) | {"_name_or_path": ""}
    assert not torch.equal(first.proj_out.weight, second.proj_out.weight)
    assert 0 < pipeline.config.boundary_ratio < 1


def test_the_experts_can_be_quantized_in_units_of_64(pipeline):
    config = pipeline.transformer.config
    inner = config.num_attention_heads * config.attention_head_dim
    assert inner >= 128
    assert [width % 64 for width in (inner, config.ffn_dim, config.text_dim)] == [0, 0, 0]
    assert config.num_layers >= 4
    assert config.qk_norm == "rms_norm_across_heads"
    assert config.cross_attn_norm is True


def test_saving_it_again_keeps_every_weight(pipeline, tmp_path):
    model.save_pipeline(pipeline, tmp_path / "again")
    again = model.load_pipeline(tmp_path / "again")
    for name in ("vae", "text_encoder", "transformer", "transformer_2"):
        expected = getattr(pipeline, name).state_dict()
        found = getattr(again, name).state_dict()
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected), name


def test_the_tokenizer_knows_every_word_of_the_captions(pipeline):
    tokenizer = pipeline.tokenizer
    for caption in data.all_captions():
        tokens = tokenizer(str(caption)).input_ids
        assert tokenizer.unk_token_id not in tokens
        assert len(tokens) == 7
    assert tokenizer.unk_token_id in tokenizer("a wooden boat").input_ids


def test_reconstructions_show_what_was_rendered(pipeline):
    captions = data.all_captions()[::16]
    table = evaluate.rates(evaluate.reconstruct(pipeline.vae, captions, seed=0), captions)
    assert table["all words"] >= 0.9


@pytest.mark.slow
def test_generated_clips_show_what_was_asked_for(pipeline):
    captions = data.all_captions()[5::24]
    table = evaluate.rates(evaluate.generate(pipeline, captions, seed=0), captions)
    assert all(table[word] >= 0.75 for word in ("colour", "shape", "size", "direction"))


def test_the_same_seed_generates_the_same_clip(pipeline):
    def clip():
        return evaluate.generate(pipeline, data.all_captions()[:1], seed=7, num_inference_steps=3)

    assert (clip() == clip()).all()
