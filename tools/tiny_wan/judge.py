"""Judge a clip against the words of a caption, without a reference clip and without a learned network.

The object is what differs in colour from a grey background. Its colour is compared with the palette, its
outline with rendered templates of equal area, its path with the four directions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from . import data

CORE_CHROMA = 0.3
"""Largest minus smallest channel above which a pixel surely belongs to the object."""

GREY_CHROMA = 0.15
"""Largest minus smallest channel below which a pixel surely belongs to the background."""

MIN_CORE_PIXELS = 20
"""Core pixels that a frame needs for an object to count as present."""

MIN_OVERLAP = 0.7
"""Intersection over union with the best template below which the outline is no known shape."""

MIN_SPEED = 0.5
"""Pixels a frame below which the object counts as resting."""

ALPHA_FLOOR = 0.25
"""Coverage below which a pixel counts as background, so that noise does not pull at the centroid."""


@dataclass(frozen=True)
class Judgement:
    """What a clip shows. A word is None where the clip shows none of the known words."""

    colour: str | None
    shape: str | None
    size: str | None
    direction: str | None
    shape_overlap: float
    """Mean intersection over union with the template of the best shape, in [0, 1]."""

    subject_consistency: float
    """1 for an object of constant colour and area over the frames, falling to 0 as they vary."""

    motion_smoothness: float
    """1 for constant velocity, falling to 0 as the velocity changes as much as it measures."""

    def matches(self, caption: data.Caption) -> dict[str, bool]:
        """Say for each word of a caption whether the clip shows it."""
        words = ("colour", "shape", "size", "direction")
        return {word: getattr(self, word) == getattr(caption, word) for word in words}


NOTHING = Judgement(None, None, None, None, 0.0, 0.0, 0.0)
"""The judgement of a clip in which some frame shows no object."""


def _find_object(video: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Separate the object from the background.

    Args:
        video: `[frames, height, width, 3]` in [0, 1].

    Returns:
        The object's coverage `[frames, height, width]` in [0, 1] and its colour in each frame
        `[frames, 3]`; None if some frame lacks an object or a background.
    """
    chroma = video.max(-1) - video.min(-1)
    core, grey = chroma > CORE_CHROMA, chroma < GREY_CHROMA
    if core.sum((1, 2)).min() < MIN_CORE_PIXELS or not grey.any((1, 2)).all():
        return None
    colours = np.stack([np.median(frame[inside], 0) for frame, inside in zip(video, core, strict=True)])
    backgrounds = np.stack([np.median(frame[outside], 0) for frame, outside in zip(video, grey, strict=True)])
    axis = (colours - backgrounds)[:, None, None]
    alpha = ((video - backgrounds[:, None, None]) * axis).sum(-1) / (axis**2).sum(-1)
    alpha = np.clip(alpha, 0.0, 1.0)
    return np.where(alpha < ALPHA_FLOOR, 0.0, alpha), colours


def _overlap(shape: str, alpha: np.ndarray, centres: np.ndarray) -> float:
    """Return the mean soft intersection over union of `[frames, height, width]` with a shape's template."""
    height, width = alpha.shape[1:]
    middle = torch.tensor([[width / 2, height / 2]])
    unit_area = data.coverage(shape, 10.0, middle, height, width).sum().item() / 10.0**2
    scores = []
    for frame, centre in zip(alpha, centres, strict=True):
        radius = float(np.sqrt(frame.sum() / unit_area))
        place = torch.from_numpy(centre[None]).float()
        template = data.coverage(shape, radius, place, height, width).numpy()[0]
        scores.append(np.minimum(frame, template).sum() / np.maximum(frame, template).sum())
    return float(np.mean(scores))


def _direction(centres: np.ndarray) -> str | None:
    """Name the direction of the fitted velocity of centroids `[frames, 2]`."""
    time = np.arange(len(centres)) - (len(centres) - 1) / 2
    velocity = (time[:, None] * centres).sum(0) / (time**2).sum()
    if np.hypot(*velocity) < MIN_SPEED:
        return None
    return max(data.DIRECTIONS, key=lambda name: float(velocity @ np.array(data.DIRECTIONS[name])))


def _smoothness(centres: np.ndarray) -> float:
    """Return 1 minus the mean change of velocity over the mean speed of centroids `[frames, 2]`."""
    velocities = np.diff(centres, axis=0)
    speed = np.hypot(*velocities.T).mean()
    change = np.hypot(*np.diff(velocities, axis=0).T).mean()
    return float(np.clip(1 - change / max(speed, MIN_SPEED), 0, 1))


def judge(video: np.ndarray) -> Judgement:
    """Judge a clip.

    Args:
        video: `[frames, height, width, 3]` floats in [0, 1], at least three frames, at the scale of the
            rendered clips.

    Returns:
        What the clip shows.

    Raises:
        ValueError: If the array is no such clip.
    """
    if video.ndim != 4 or video.shape[-1] != 3 or len(video) < 3:
        raise ValueError(f"expected [frames >= 3, height, width, 3], found {list(video.shape)}")
    found = _find_object(video.astype(np.float64))
    if found is None:
        return NOTHING
    alpha, colours = found
    area = alpha.sum((1, 2))
    grid_y, grid_x = np.mgrid[: alpha.shape[1], : alpha.shape[2]] + 0.5
    centres = np.stack([(alpha * grid_x).sum((1, 2)), (alpha * grid_y).sum((1, 2))], -1) / area[:, None]

    overlaps = {shape: _overlap(shape, alpha, centres) for shape in data.SHAPES}
    shape = max(overlaps, key=lambda name: overlaps[name])
    radius = float(np.sqrt(np.median(area) / np.pi))
    colour = np.median(colours, 0)
    spread = np.linalg.norm(colours - colour, axis=-1).mean() + area.std() / area.mean()
    return Judgement(
        colour=min(data.COLOURS, key=lambda name: float(np.linalg.norm(colour - data.COLOURS[name]))),
        shape=shape if overlaps[shape] >= MIN_OVERLAP else None,
        size=min(data.RADII, key=lambda name: abs(np.log(radius / data.RADII[name]))),
        direction=_direction(centres),
        shape_overlap=overlaps[shape],
        subject_consistency=float(np.clip(1 - spread, 0, 1)),
        motion_smoothness=_smoothness(centres),
    )
