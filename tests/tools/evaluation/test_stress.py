"""A stressed model computes what it computed, with the activations of a large one."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from diffusers import WanTransformer3DModel
from tahf4_compiler.tools.evaluation.sampling import channel_ratios, sampled_inputs
from tahf4_compiler.tools.evaluation.stress import stress_, stress_pipeline_
from tahf4_compiler.tools.tiny_wan import data, evaluate, model, settings
from torch import Tensor

BODY = ("attn1.to_q", "attn1.to_out.0", "attn2.to_q", "attn2.to_k", "attn2.to_out.0", "ffn.net.0.proj", "ffn.net.2")


def relative(value: Tensor, reference: Tensor) -> float:
    return ((value.double() - reference.double()).norm() / reference.double().norm()).item()


@pytest.fixture(scope="module")
def original():
    return model.load_pipeline(settings.PIPELINE_DIR)


@pytest.fixture(scope="module")
def stressed(original):
    parts = {name: copy.deepcopy(part) for name, part in original.components.items()}
    pipe = type(original)(**parts, boundary_ratio=original.config.boundary_ratio)
    pipe.set_progress_bar_config(disable=True)
    reports = stress_pipeline_(pipe, 3)
    return pipe, reports


def inputs(seed: int, transformer: WanTransformer3DModel) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    dtype = transformer.proj_out.weight.dtype
    latent = torch.randn(2, transformer.config.in_channels, 3, 4, 6, generator=generator, dtype=torch.float64)
    text = torch.randn(2, 16, transformer.config.text_dim, generator=generator, dtype=torch.float64)
    time = torch.randint(0, 1000, (2,), generator=generator)
    return {"hidden_states": latent.to(dtype), "timestep": time, "encoder_hidden_states": text.to(dtype)}


def output(transformer: WanTransformer3DModel, seed: int) -> Tensor:
    with torch.no_grad():
        return transformer(**inputs(seed, transformer)).sample


@pytest.mark.parametrize("name", ["transformer", "transformer_2"])
def test_the_function_stays_in_float32(original, stressed, name):
    pipe, _ = stressed
    for seed in range(4):
        assert relative(output(getattr(pipe, name), seed), output(getattr(original, name), seed)) < 1e-5


@pytest.fixture
def no_float32(monkeypatch):
    """Norms and modulation of Wan compute in float32 whatever the model is in; here they keep float64."""
    monkeypatch.setattr(Tensor, "float", lambda self: self)


@pytest.mark.parametrize(("with_samples", "masks"), [(True, True), (False, True), (True, False)])
def test_the_function_stays_in_float64(original, no_float32, with_samples, masks):
    before = copy.deepcopy(original.transformer).double()
    after = copy.deepcopy(before)
    with sampled_inputs({"it": after}) as samples:
        output(after, 9)
    stress_(after, 5, samples=samples["it"] if with_samples else None, undone_by_masks=masks)
    for seed in range(3):
        wanted = output(before, seed)
        assert wanted.dtype == torch.float64
        assert relative(output(after, seed), wanted) < 1e-12


def test_the_clips_stay(original, stressed):
    pipe, _ = stressed
    captions = data.all_captions()[:1]
    one, other = (evaluate.generate(p, captions, 5, num_inference_steps=4) for p in (original, pipe))
    assert abs(one - other).max() < 1e-3


@pytest.mark.slow
def test_activations_have_outliers_and_spikes(original, stressed):
    pipe, reports = stressed
    captions = data.all_captions()[30::50]
    found = {}
    for which, p in (("original", original), ("stressed", pipe)):
        with sampled_inputs({"transformer": p.transformer, "transformer_2": p.transformer_2}) as samples:
            evaluate.generate(p, captions, 77, num_inference_steps=6)
        found[which] = samples
    for expert, report in reports.items():
        print(f"\n{expert}\n{report}")
        for i, site in itertools.product(range(4), BODY):
            before = channel_ratios(found["original"][expert][f"blocks.{i}.{site}"])
            after = channel_ratios(found["stressed"][expert][f"blocks.{i}.{site}"])
            assert after[0] >= 16, (expert, i, site, before, after)
            if site == "ffn.net.2":
                assert after[1] >= 5, (expert, i, site, before, after)


def test_every_hidden_unit_of_64_has_a_new_one(stressed):
    pipe, reports = stressed
    assert pipe.transformer.config.ffn_dim == 576
    for block in pipe.transformer.blocks:
        assert block.ffn.net[0].proj.weight.shape == (576, 192) and block.ffn.net[2].weight.shape == (192, 576)
    for report in reports.values():
        for site in report.sites:
            if site.site.endswith("hidden"):
                assert {unit // 64 for unit in (*site.outliers, *site.spikes)} == set(range(9))


def test_spikes_that_no_mask_undoes_meet_weights_as_large_as_the_others(original):
    transformer = copy.deepcopy(original.transformer)
    report = stress_(transformer, 3, undone_by_masks=False)
    assert [site.site for site in report.sites] == [f"blocks.{i}.hidden" for i in range(4)]
    for block, site in zip(transformer.blocks, report.sites, strict=True):
        columns = block.ffn.net[2].weight.norm(dim=0)
        new = [*site.outliers, *site.spikes]
        old = sorted(set(range(576)) - set(new))
        assert columns[new].median() > 0.7 * columns[old].median()
    for seed in range(2):
        assert relative(output(transformer, seed), output(original.transformer, seed)) < 1e-5


def test_experts_and_seeds_have_their_own_channels(original, stressed):
    _, reports = stressed
    first, second = ([site.outliers for site in report.sites] for report in reports.values())
    assert all(one.keys() != other.keys() for one, other in zip(first, second, strict=True))
    models = [copy.deepcopy(original.transformer) for _ in range(3)]
    one, same, other = (stress_(m, seed) for m, seed in zip(models, (1, 1, 2), strict=True))
    assert one == same
    assert [s.outliers for s in one.sites] != [s.outliers for s in other.sites]
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))


def test_a_stressed_model_is_saved_and_loaded(stressed, tmp_path):
    pipe, _ = stressed
    pipe.transformer.save_pretrained(tmp_path)
    again = WanTransformer3DModel.from_pretrained(tmp_path)
    assert torch.equal(output(again, 0), output(pipe.transformer, 0))


def test_factors_are_powers_of_two_and_a_compiled_model_is_refused(original):
    with pytest.raises(ValueError, match="powers of two"):
        stress_(original.transformer, 0, factors=(3,))
    with pytest.raises(ValueError, match="multiple of 4"):
        stress_(original.transformer, 0, hidden_units=6)
    compiled = copy.deepcopy(original.transformer)
    compiled.compile(backend="eager")
    with pytest.raises(ValueError, match="compiled"):
        stress_(compiled, 0)


def test_image_to_video_keeps_its_function_too():
    torch.manual_seed(0)
    before = WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=32,
        ffn_dim=128,
        num_layers=2,
        image_dim=24,
        added_kv_proj_dim=64,
        rope_max_seq_len=32,
    )
    after = copy.deepcopy(before)
    stress_(after, 1)
    arguments = {
        "hidden_states": torch.randn(1, 4, 2, 4, 4),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 512, 32),
        "encoder_hidden_states_image": torch.randn(1, 5, 24),
    }
    with torch.no_grad():
        assert relative(after(**arguments).sample, before(**arguments).sample) < 1e-5
