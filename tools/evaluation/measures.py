"""What clips are worth: how far from their reference, what they show by themselves, and means with intervals.

Videos are floats ``[clips, frames, height, width, 3]`` in [0, 1]. A clip that holds a NaN or an infinity is a
failure, not an error: it counts as a PSNR of 0 dB, an SSIM of 0, nothing right, and no consistency or smoothness;
latents that do count as a relative error of infinity, which makes the mean infinite. A reference that is not finite
is an error.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ..media import psnr
from ..tiny_wan import data
from ..tiny_wan.judge import NOTHING, judge

__all__ = [
    "WORDS",
    "Interval",
    "bootstrap",
    "judgements",
    "measure",
    "psnrs",
    "relative_errors",
    "ssim",
    "ssims",
    "summarize",
]

WORDS = ("colour", "shape", "size", "direction")
"""What a clip shows right or wrong of its caption."""

Array = NDArray[np.floating]

_WINDOW, _SIGMA = 11, 1.5
_C1, _C2 = 0.01**2, 0.03**2


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % confidence interval.

    Attributes:
        mean: over clips.
        low: 2.5th percentile of the bootstrap.
        high: 97.5th percentile of the bootstrap.
    """

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        """Return the three numbers."""
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def psnrs(reference: Array, videos: Array) -> Array:
    """Return each clip's peak signal-to-noise ratio in dB, infinity for equal clips.

    Args:
        reference: ``[clips, ...]`` in [0, 1].
        videos: the same shape.

    Returns:
        float64 ``[clips]``.

    Raises:
        ValueError: the shapes differ, or the reference is not finite.
    """
    _check_pair(reference, videos)
    return np.array([psnr(a, b) if np.isfinite(b).all() else 0.0 for a, b in zip(reference, videos, strict=True)])


def ssims(reference: Array, videos: Array) -> Array:
    """Return each clip's structural similarity, the mean over its frames (:func:`ssim`).

    Args:
        reference: ``[clips, frames, height, width, 3]`` in [0, 1].
        videos: the same shape.

    Returns:
        float64 ``[clips]``.

    Raises:
        ValueError: the shapes differ or are too small, or the reference is not finite.
    """
    _check_pair(reference, videos)
    return np.array([ssim(a, b) if np.isfinite(b).all() else 0.0 for a, b in zip(reference, videos, strict=True)])


def ssim(reference: Array, video: Array) -> float:
    """Return the mean structural similarity of frames, for each colour channel by itself, then averaged.

    Wang, Bovik, Sheikh, Simoncelli, "Image quality assessment: from error visibility to structural similarity", IEEE
    TIP 13 (2004): an 11 x 11 Gaussian window of sigma 1.5, K1 = 0.01, K2 = 0.03, here with L = 1; the mean over the
    places where the window lies inside the frame. Computed in float64.

    Args:
        reference: ``[frames, height, width, channels]`` in [0, 1], at least 11 pixels high and wide.
        video: the same shape.

    Raises:
        ValueError: the shapes differ or are too small.
    """
    if reference.shape != video.shape or reference.ndim != 4:
        raise ValueError(
            f"ssim of arrays of shapes {reference.shape} and {video.shape}; expected one shape "
            "[frames, height, width, channels]"
        )
    if min(reference.shape[1:3]) < _WINDOW:
        height, width = reference.shape[1:3]
        raise ValueError(f"frames of {height} x {width} pixels; ssim needs {_WINDOW} x {_WINDOW}")
    # Frame by frame: a clip of 720 x 1280 would take tens of gigabytes at once.
    return float(np.mean([_ssim_of_frame(a, b) for a, b in zip(reference, video, strict=True)]))


def _ssim_of_frame(reference: Array, frame: Array) -> float:
    """Return the mean structural similarity of ``[height, width, channels]``."""
    x, y = (
        torch.from_numpy(np.ascontiguousarray(v, np.float64)).permute(2, 0, 1)[:, None] for v in (reference, frame)
    )
    offsets = torch.arange(_WINDOW, dtype=torch.float64) - _WINDOW // 2
    line = torch.exp(-(offsets**2) / (2 * _SIGMA**2))
    line = line / line.sum()

    def blur(image: torch.Tensor) -> torch.Tensor:
        across = torch.nn.functional.conv2d(image, line.view(1, 1, 1, -1))
        return torch.nn.functional.conv2d(across, line.view(1, 1, -1, 1))

    # One convolution over all five: [5 * channels, 1, height, width].
    mx, my, xx, yy, xy = blur(torch.cat((x, y, x * x, y * y, x * y))).chunk(5)
    vx, vy, covariance = xx - mx * mx, yy - my * my, xy - mx * my
    value = (2 * mx * my + _C1) * (2 * covariance + _C2) / ((mx * mx + my * my + _C1) * (vx + vy + _C2))
    return float(value.mean())


def relative_errors(reference: Array, latents: Array) -> Array:
    """Return ``|latents - reference| / |reference|`` of each clip, in the Euclidean norm.

    Args:
        reference: ``[clips, ...]``.
        latents: the same shape.

    Returns:
        float64 ``[clips]``: infinity where latents are not finite, or where the reference is zero and they are not.

    Raises:
        ValueError: the shapes differ, or the reference is not finite.
    """
    _check_pair(reference, latents)
    wanted = np.asarray(reference, np.float64).reshape(len(reference), -1)
    found = np.asarray(latents, np.float64).reshape(len(latents), -1)
    finite = np.asarray(np.isfinite(found).all(1))
    distance = np.linalg.norm(np.where(finite[:, None], found, 0.0) - wanted, axis=1)
    size = np.linalg.norm(wanted, axis=1)
    ratio = np.divide(distance, size, out=np.where(distance > 0, math.inf, 0.0), where=size > 0)
    return np.where(finite, ratio, math.inf)


def judgements(videos: Array, captions: Sequence[data.Caption]) -> dict[str, NDArray[np.generic]]:
    """Judge clips of the tiny pipeline without a reference clip (:mod:`tahf4_compiler.tools.tiny_wan.judge`).

    Args:
        videos: ``[clips, frames, height, width, 3]`` in [0, 1].
        captions: what each clip should show.

    Returns:
        bool ``[clips]`` for each of :data:`WORDS` and for ``all_words``; float64 ``[clips]`` in [0, 1] for
        ``subject_consistency`` and ``motion_smoothness``.

    Raises:
        ValueError: the numbers of clips and captions differ, or finite values lie outside of [0, 1].
    """
    if len(videos) != len(captions):
        raise ValueError(f"{len(videos)} clips and {len(captions)} captions; expected one caption a clip")
    found = []
    for clip, video in enumerate(videos):
        if not np.isfinite(video).all():
            found.append(NOTHING)
            continue
        if video.min() < -1e-3 or video.max() > 1 + 1e-3:
            raise ValueError(f"clip {clip} spans {video.min():.3g} to {video.max():.3g}; expected values in [0, 1]")
        found.append(judge(video))
    matches = [verdict.matches(caption) for verdict, caption in zip(found, captions, strict=True)]
    return {
        **{word: np.array([match[word] for match in matches], dtype=bool) for word in WORDS},
        "all_words": np.array([all(match.values()) for match in matches], dtype=bool),
        "subject_consistency": np.array([verdict.subject_consistency for verdict in found], dtype=np.float64),
        "motion_smoothness": np.array([verdict.motion_smoothness for verdict in found], dtype=np.float64),
    }


def measure(
    videos: Array,
    captions: Sequence[data.Caption],
    *,
    reference: Array | None = None,
    latents: Array | None = None,
    reference_latents: Array | None = None,
) -> dict[str, NDArray[np.generic]]:
    """Measure everything there is to measure of some clips.

    Args:
        videos: ``[clips, frames, height, width, 3]`` in [0, 1].
        captions: what each clip should show.
        reference: the clips of the same prompts and seeds in high precision; gives ``psnr`` and ``ssim``.
        latents: ``[clips, ...]``, the latents of the clips.
        reference_latents: those of the reference; gives ``latent_error``.

    Returns:
        Name -> ``[clips]``, see :func:`judgements`, :func:`psnrs`, :func:`ssims` and :func:`relative_errors`.

    Raises:
        ValueError: as those functions; or latents without those of the reference.
    """
    if (latents is None) != (reference_latents is None):
        raise ValueError("latents and reference_latents belong together; got one of them")
    table = judgements(videos, captions)
    if reference is not None:
        table |= {"psnr": psnrs(reference, videos), "ssim": ssims(reference, videos)}
    if latents is not None and reference_latents is not None:
        table["latent_error"] = relative_errors(reference_latents, latents)
    return table


def bootstrap(
    values: NDArray[np.generic] | Sequence[float], prompts: Sequence[Hashable], *, seed: int = 0, draws: int = 10_000
) -> Interval:
    """Return a mean over clips with a 95 % confidence interval clustered by prompt.

    Clips of one prompt resemble each other: they are drawn together, by a percentile bootstrap over prompts (Field
    and Welsh, "Bootstrapping clustered data", JRSS B 69, 2007). With one prompt the interval is the mean alone, and
    with fewer than about ten it is too narrow.

    Args:
        values: one a clip; booleans count as 0 and 1. Infinite values make the mean infinite.
        prompts: of each clip.
        seed: of the draws.
        draws: of the bootstrap.

    Raises:
        ValueError: there are no values, their number is not that of the prompts, or one is NaN.
    """
    numbers = np.asarray(values, np.float64)
    if numbers.ndim != 1 or len(numbers) != len(prompts) or not len(numbers):
        raise ValueError(f"values of shape {numbers.shape} and {len(prompts)} prompts; expected one prompt a value")
    if np.isnan(numbers).any():
        raise ValueError(f"{int(np.isnan(numbers).sum())} of {len(numbers)} values are NaN; a failed clip has a number")
    index: dict[Hashable, int] = {}
    group = np.array([index.setdefault(prompt, len(index)) for prompt in prompts])
    sums, counts = np.bincount(group, weights=numbers), np.bincount(group)
    drawn = np.random.default_rng(seed).integers(len(index), size=(draws, len(index)))
    means = np.sort(sums[drawn].sum(1) / counts[drawn].sum(1))
    # Order statistics: between infinities there is nothing to interpolate.
    low, high = (float(means[min(draws - 1, int(q * draws))]) for q in (0.025, 0.975))
    return Interval(float(sums.sum() / counts.sum()), low, high)


def summarize(
    table: Mapping[str, NDArray[np.generic]], prompts: Sequence[Hashable], *, seed: int = 0, draws: int = 10_000
) -> dict[str, Interval]:
    """Return the :func:`bootstrap` interval of each measure.

    Args:
        table: name -> ``[clips]``, as :func:`measure` returns it.
        prompts: of each clip.
        seed: of the draws, the same for each measure.
        draws: of the bootstrap.
    """
    return {name: bootstrap(values, prompts, seed=seed, draws=draws) for name, values in table.items()}


def _check_pair(reference: Array, other: Array) -> None:
    if reference.shape != other.shape:
        raise ValueError(f"arrays of shapes {reference.shape} and {other.shape}; expected one shape")
    bad = [i for i, clip in enumerate(reference) if not np.isfinite(clip).all()]
    if bad:
        raise ValueError(f"the reference is not finite in clips {bad[:8]}; there is nothing to compare with")
