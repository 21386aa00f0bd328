"""How far a clip is from its reference, and what it shows by itself; means with error bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from ..media import psnr
from ..tiny_wan import data
from ..tiny_wan.judge import judge

__all__ = ["against_reference", "by_itself", "mean_and_error", "ssim"]

WORDS = ("colour", "shape", "size", "direction")


def ssim(reference: NDArray[np.floating], video: NDArray[np.floating]) -> float:
    """Return the mean structural similarity of frames.

    Wang et al., "Image quality assessment: from error visibility to structural similarity", IEEE TIP 2004: a Gaussian
    window of 11 x 11 pixels with sigma 1.5, K1 = 0.01, K2 = 0.03, data range 1, the mean over the window's
    valid places and the colour channels.

    Args:
        reference: ``[frames, height, width, 3]`` in [0, 1], at least 11 pixels high and wide.
        video: the same shape.
    """
    if reference.shape != video.shape:
        raise ValueError(f"ssim of arrays of shapes {reference.shape} and {video.shape}; expected one shape")
    x, y = (torch.from_numpy(np.asarray(v, np.float64)).permute(0, 3, 1, 2).flatten(0, 1)[:, None] for v in (reference, video))
    line = torch.exp(-(torch.arange(-5, 6, dtype=torch.float64) ** 2) / (2 * 1.5**2))
    line = line / line.sum()

    def blur(v: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.conv2d(torch.nn.functional.conv2d(v, line.view(1, 1, 1, -1)), line.view(1, 1, -1, 1))

    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    value = ((2 * mx * my + c1) * (2 * cov + c2)) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return float(value.mean())


def against_reference(
    reference: NDArray[np.floating],
    video: NDArray[np.floating],
    reference_latents: NDArray[np.floating],
    latents: NDArray[np.floating],
) -> dict[str, float | list[float]]:
    """Measure one clip against the clip of the same prompt and seed in high precision.

    Args:
        reference: ``[frames, height, width, 3]`` in [0, 1].
        video: the same shape. A NaN anywhere counts as a PSNR and SSIM of 0 and an error of 1.
        reference_latents: ``[steps, ...]`` after each step.
        latents: the same shape.

    Returns:
        ``psnr`` in dB (100 for equal clips), ``ssim``, ``latent_error`` (relative, after the last step) and
        ``step_errors`` (relative, after each step).
    """
    if not (np.isfinite(video).all() and np.isfinite(latents).all()):
        return {"psnr": 0.0, "ssim": 0.0, "latent_error": 1.0, "step_errors": [1.0] * len(latents)}
    errors = [
        float(np.linalg.norm(b.astype(np.float64) - a) / max(float(np.linalg.norm(a)), 1e-30))
        for a, b in zip(reference_latents, latents, strict=True)
    ]
    return {
        "psnr": min(100.0, psnr(reference, video)),
        "ssim": ssim(reference, video),
        "latent_error": errors[-1],
        "step_errors": errors,
    }


def by_itself(video: NDArray[np.floating], caption: data.Caption) -> dict[str, float]:
    """Measure what a clip of the tiny pipeline shows, against its caption: no reference clip.

    Returns:
        1 or 0 for each word of the caption; subject consistency and motion smoothness, 0 to 1.
    """
    found = judge(np.nan_to_num(video))
    return {
        **{word: float(right) for word, right in found.matches(caption).items()},
        "subject_consistency": found.subject_consistency,
        "motion_smoothness": found.motion_smoothness,
    }


def mean_and_error(values: Sequence[float], groups: Sequence[int], *, draws: int = 2000) -> tuple[float, float]:
    """Return a mean and half the width of its 95 % interval, by a bootstrap over groups (prompts).

    Args:
        values: one a clip.
        groups: which prompt each belongs to; clips of one prompt are no independent draws.
        draws: of the bootstrap, from a fixed seed.
    """
    by_group: dict[int, list[float]] = {}
    for value, group in zip(values, groups, strict=True):
        by_group.setdefault(group, []).append(value)
    means = np.array([np.mean(members) for members in by_group.values()])
    chosen = np.random.default_rng(0).integers(len(means), size=(draws, len(means)))
    low, high = np.percentile(means[chosen].mean(1), [2.5, 97.5])
    return float(np.mean(means)), float(high - low) / 2


def summarize(clips: Sequence[Mapping[str, float]], groups: Sequence[int]) -> dict[str, tuple[float, float]]:
    """Return mean and error of every measure of some clips."""
    names = [name for name, value in clips[0].items() if isinstance(value, float)]
    return {name: mean_and_error([clip[name] for clip in clips], groups) for name in names}
