"""Measures of clips, against definitions written out, and intervals with known coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest
from tahf4_compiler.tools.evaluation import measures
from tahf4_compiler.tools.evaluation.measures import bootstrap, judgements, measure, psnrs, relative_errors, ssim, ssims
from tahf4_compiler.tools.tiny_wan import data

CAPTIONS = data.all_captions()[3::40]


def clips() -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.stack([data.render(c, rng)[0].permute(1, 2, 3, 0).numpy() for c in CAPTIONS])


def ssim_by_definition(x: np.ndarray, y: np.ndarray) -> float:
    """Return the SSIM of one channel ``[height, width]``, window by window."""
    place = np.arange(11) - 5
    window = np.exp(-(place[:, None] ** 2 + place[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    values = []
    for row in range(x.shape[0] - 10):
        for column in range(x.shape[1] - 10):
            a, b = (v[row : row + 11, column : column + 11].astype(np.float64) for v in (x, y))
            ma, mb = (window * a).sum(), (window * b).sum()
            va, vb = (window * (a - ma) ** 2).sum(), (window * (b - mb) ** 2).sum()
            cov = (window * (a - ma) * (b - mb)).sum()
            top = (2 * ma * mb + 0.01**2) * (2 * cov + 0.03**2)
            values.append(top / ((ma**2 + mb**2 + 0.01**2) * (va + vb + 0.03**2)))
    return float(np.mean(values))


def test_ssim_is_its_definition():
    rng = np.random.default_rng(1)
    x = rng.random((2, 14, 17, 3)).astype(np.float32)
    y = np.clip(x + 0.2 * rng.standard_normal(x.shape), 0, 1).astype(np.float32)
    wanted = np.mean([ssim_by_definition(x[f, ..., c], y[f, ..., c]) for f in range(2) for c in range(3)])
    assert ssim(x, y) == pytest.approx(wanted, abs=1e-12)
    assert ssim(x, x) == pytest.approx(1.0, abs=1e-12)
    assert ssim(x, 1 - x) < 0
    constant = ssim(np.full((1, 11, 11, 3), 0.5), np.full((1, 11, 11, 3), 0.25))
    assert constant == pytest.approx((2 * 0.125 + 1e-4) / (0.3125 + 1e-4))


def test_psnr_is_of_each_clip():
    x = np.zeros((3, 2, 4, 4, 3))
    y = x + np.array([0.1, 0.01, 0.0]).reshape(-1, 1, 1, 1, 1)
    assert psnrs(x, y) == pytest.approx([20, 40, math.inf])


def test_relative_error_is_of_each_clip():
    x = np.ones((4, 2, 8), np.float32)
    x[3] = 0
    y = x.copy()
    y[1] *= 1.5
    y[2, 0, 0] = math.nan
    assert relative_errors(x, y).tolist() == [0, 0.5, math.inf, 0]
    y[3, 0] = 1
    assert relative_errors(x, y)[3] == math.inf


def test_rendered_clips_are_right_and_others_are_not():
    videos = clips()
    table = judgements(videos, CAPTIONS)
    assert all(table[word].dtype == bool and table[word].all() for word in (*measures.WORDS, "all_words"))
    assert table["subject_consistency"].min() > 0.9 and table["motion_smoothness"].min() > 0.9
    wrong = judgements(videos[:, ::-1], CAPTIONS)
    assert not wrong["direction"].any() and wrong["colour"].all() and not wrong["all_words"].any()


def test_a_clip_of_nan_counts_as_a_failure():
    reference = clips()
    videos = reference.copy()
    videos[1, 4, 5, 6, 0] = math.nan
    latents = np.ones((len(videos), 4), np.float32)
    broken = latents.copy()
    broken[1] = math.nan
    table = measure(videos, CAPTIONS, reference=reference, latents=broken, reference_latents=latents)
    assert table["psnr"][1] == 0 and table["ssim"][1] == 0 and table["latent_error"][1] == math.inf
    assert not any(table[word][1] for word in (*measures.WORDS, "all_words"))
    assert table["subject_consistency"][1] == 0 and table["motion_smoothness"][1] == 0
    assert table["colour"][0] and table["psnr"][0] == math.inf and table["latent_error"][0] == 0
    assert all(not np.isnan(values).any() for values in table.values())
    summary = measures.summarize(table, [str(c) for c in CAPTIONS])
    assert summary["latent_error"].mean == math.inf and summary["psnr"].mean == math.inf
    assert summary["colour"].mean == pytest.approx(1 - 1 / len(CAPTIONS))


@pytest.mark.parametrize("function", [psnrs, ssims, relative_errors])
def test_a_broken_reference_or_another_shape_is_refused(function):
    videos = clips()[:2]
    broken = videos.copy()
    broken[1] = math.nan
    with pytest.raises(ValueError, match=r"not finite in clips \[1\]"):
        function(broken, videos)
    with pytest.raises(ValueError, match="expected one shape"):
        function(videos, videos[:, :3])


def test_other_arguments_are_refused():
    videos = clips()
    with pytest.raises(ValueError, match="one caption a clip"):
        judgements(videos, CAPTIONS[1:])
    with pytest.raises(ValueError, match="clip 0 spans"):
        judgements(videos * 255, CAPTIONS)
    with pytest.raises(ValueError, match="belong together"):
        measure(videos, CAPTIONS, latents=np.ones((len(videos), 4)))
    with pytest.raises(ValueError, match="needs 11 x 11"):
        ssim(np.zeros((1, 8, 20, 3)), np.zeros((1, 8, 20, 3)))
    for values, prompts in (([], []), ([1.0], ["a", "b"])):
        with pytest.raises(ValueError, match="one prompt a value"):
            bootstrap(values, prompts)
    with pytest.raises(ValueError, match="1 of 2 values are NaN"):
        bootstrap([1.0, math.nan], ["a", "b"])


def test_intervals_cover_the_truth_only_when_prompts_are_drawn_together():
    rng = np.random.default_rng(5)
    prompts = np.repeat(np.arange(40), 5)
    covered = {True: 0, False: 0}
    for trial in range(150):
        values = np.repeat(rng.standard_normal(40), 5) + 0.1 * rng.standard_normal(200)
        for clustered in covered:
            groups = prompts if clustered else np.arange(200)
            interval = bootstrap(values, groups.tolist(), seed=trial, draws=400)
            covered[clustered] += interval.low <= 0 <= interval.high
    assert 0.88 <= covered[True] / 150 <= 0.99
    assert covered[False] / 150 < 0.75


def test_the_mean_is_over_clips_and_the_seed_repeats():
    values, prompts = [1.0, 1.0, 1.0, 0.0], ["a", "a", "a", "b"]
    interval = bootstrap(values, prompts)
    assert (interval.mean, interval.low, interval.high) == (0.75, 0.0, 1.0)
    rng = np.random.default_rng(0)
    values = rng.random(30).tolist()
    one, same, other = (bootstrap(values, [*range(30)], seed=s) for s in (1, 1, 2))
    assert one == same and one != other
    assert bootstrap([3.0, 5.0], ["a", "a"]) == measures.Interval(4.0, 4.0, 4.0)
