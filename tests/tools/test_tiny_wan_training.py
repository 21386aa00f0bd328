"""Training is exactly resumable, skips what is done, and ends in a pipeline that loads and runs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tahf4_compiler.tools.tiny_wan import data, evaluate, loop, model, train, train_vae
from torch import nn


def weights(module: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def small_vae_run(work_dir, stop_after=None):
    stage = loop.Stage("vae", 6, 2e-3, save_every=2)
    vae = model.build_pipeline(0).vae
    return train_vae.train_vae(vae, stage, work_dir, seed=0, stop_after=stop_after)


@pytest.fixture
def short_phases(monkeypatch):
    phases = (train_vae.Phase(0.5, 1, 2), train_vae.Phase(0.5, 5, 2))
    monkeypatch.setattr(train_vae, "PHASES", phases)


@pytest.mark.slow
@pytest.mark.parametrize(
    "stop_after",
    [pytest.param(2, marks=pytest.mark.slow, id="at a checkpoint"), pytest.param(3, id="after a checkpoint")],
)
def test_interrupted_and_resumed_equals_continued(tmp_path, short_phases, stop_after):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    expected = small_vae_run(whole)
    stopped = small_vae_run(parts, stop_after=stop_after)
    assert not torch.equal(weights(stopped), weights(expected))
    assert torch.equal(weights(small_vae_run(parts)), weights(expected))


@pytest.mark.slow
def test_a_finished_stage_is_read_and_not_trained_again(tmp_path, short_phases):
    first = small_vae_run(tmp_path)
    written = (tmp_path / "vae.pt").stat().st_mtime_ns
    assert torch.equal(weights(small_vae_run(tmp_path)), weights(first))
    assert (tmp_path / "vae.pt").stat().st_mtime_ns == written


def test_training_lowers_the_loss(tmp_path):
    target = torch.tensor([1.0, -2.0])
    values = []

    def loss(module, step, rng, generator):
        value = (module.weight[0] - target).square().sum()
        values.append(value.item())
        return value

    loop.train(loop.Stage("line", 60, 0.1, warmup=5), nn.Linear(2, 1), loss, tmp_path, seed=0)
    assert values[-1] < 0.01 * values[0]


def test_steps_draw_different_numbers_and_repeat_them():
    def draw(step: int) -> tuple[float, float]:
        rng, generator = loop.step_generators(0, "vae", step)
        return rng.random(), torch.rand((), generator=generator).item()

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_the_unclamped_decoder_is_the_decoder_before_its_clamp():
    vae = model.build_pipeline(0).vae
    latents = torch.randn(1, model.LATENT_CHANNELS, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = vae.decode(20 * latents).sample
        found = train_vae.decode_unclamped(vae, 20 * latents)
    assert found.abs().max() > 1
    assert torch.equal(found.clamp(-1, 1), expected)


def test_sigmas_follow_the_schedulers_shift():
    assert model.unshift_sigma(model.shift_sigma(torch.tensor(0.3)).item()) == pytest.approx(0.3)
    scheduler = model.build_scheduler()
    scheduler.set_timesteps(16)
    evenly = torch.linspace(1, 1 / 1000, 17)[:-1]
    assert torch.allclose(scheduler.sigmas[:16], model.shift_sigma(evenly), atol=2e-3)
    high = (scheduler.timesteps >= 1000 * model.BOUNDARY_RATIO).sum().item()
    assert high in (8, 9)


@pytest.mark.slow
def test_a_quick_run_ends_in_a_pipeline_that_generates(tmp_path, short_phases):
    quick = train.QUICK
    schedule = replace(
        quick,
        vae=replace(quick.vae, steps=2),
        clips=16,
        base=replace(quick.base, steps=2),
        high_noise=replace(quick.high_noise, steps=1),
        low_noise=replace(quick.low_noise, steps=1),
    )
    train.train_pipeline(schedule, tmp_path / "pipeline", tmp_path / "work", seed=0)
    pipeline = model.load_pipeline(tmp_path / "pipeline")
    first, second = weights(pipeline.transformer), weights(pipeline.transformer_2)
    assert not torch.equal(first, second)
    assert pipeline.vae.config.latents_std != model.build_vae().config.latents_std
    captions = data.all_captions()[:2]
    videos = evaluate.generate(pipeline, captions, seed=0, num_inference_steps=2)
    assert videos.shape == (2, 9, 64, 64, 3)
    assert set(evaluate.rates(videos, captions)) >= {"colour", "shape", "size", "direction"}
