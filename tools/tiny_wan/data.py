"""Synthetic captioned clips: one coloured shape that moves over a light background.

A caption reads "a {small|large} {colour} {shape} moving {direction}". Every clip is a function of its
caption and of a random generator, so that a training step can be repeated exactly.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch

FRAMES = 9
"""Frames in a clip."""

SIZE = 64
"""Height and width of a frame, in pixels."""

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.10, 0.12),
    "green": (0.10, 0.62, 0.20),
    "blue": (0.12, 0.25, 0.86),
    "yellow": (0.95, 0.78, 0.08),
    "purple": (0.58, 0.14, 0.72),
    "cyan": (0.08, 0.74, 0.80),
}
"""RGB in [0, 1] of every colour that a caption can name."""

SHAPES = ("circle", "square", "triangle", "cross")

RADII = {"small": 8.0, "large": 13.0}
"""Nominal radius in pixels; every shape of a size has about the area of the circle of this radius."""

DIRECTIONS: dict[str, tuple[float, float]] = {
    "right": (1.0, 0.0),
    "left": (-1.0, 0.0),
    "down": (0.0, 1.0),
    "up": (0.0, -1.0),
}
"""Unit vector (x to the right, y downwards) of every direction that a caption can name."""


@dataclass(frozen=True)
class Caption:
    """What a clip shows, as words."""

    size: str
    colour: str
    shape: str
    direction: str

    def __str__(self) -> str:
        """Return the prompt, such as "a small red circle moving left"."""
        return f"a {self.size} {self.colour} {self.shape} moving {self.direction}"


def all_captions() -> list[Caption]:
    """Return every caption there is, in a fixed order."""
    return [Caption(*words) for words in itertools.product(RADII, COLOURS, SHAPES, DIRECTIONS)]


def random_captions(count: int, rng: np.random.Generator) -> list[Caption]:
    """Draw `count` captions evenly, with replacement."""
    captions = all_captions()
    return [captions[i] for i in rng.integers(len(captions), size=count)]


def _box_distance(x: torch.Tensor, y: torch.Tensor, half_x: float, half_y: float) -> torch.Tensor:
    """Return the signed distance to an axis-aligned box centred at the origin."""
    dx, dy = x.abs() - half_x, y.abs() - half_y
    outside = torch.hypot(dx.clamp(min=0), dy.clamp(min=0))
    return outside + torch.maximum(dx, dy).clamp(max=0)


def signed_distance(shape: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return the signed distance from points to the outline of a shape of unit nominal radius.

    Args:
        shape: One of `SHAPES`.
        x: Horizontal offsets from the shape's centroid, in nominal radii, any shape.
        y: Vertical offsets, downwards, like `x`.

    Returns:
        Distances in nominal radii, negative inside, shaped like `x`.

    Raises:
        ValueError: If the shape is unknown.
    """
    if shape == "circle":
        return torch.hypot(x, y) - 1.0
    if shape == "square":
        return _box_distance(x, y, 0.89, 0.89)
    if shape == "triangle":
        # Equilateral, apex up: three half planes. Outside a corner this is too small, which no edge shows.
        inradius = 0.74
        sides = (y, -0.5 * y + 0.8660254 * x, -0.5 * y - 0.8660254 * x)
        return torch.stack(sides).amax(0) - inradius
    if shape == "cross":
        return torch.minimum(_box_distance(x, y, 1.25, 0.42), _box_distance(x, y, 0.42, 1.25))
    raise ValueError(f"unknown shape {shape!r}; expected one of {', '.join(SHAPES)}")


def coverage(shape: str, radius: float, centres: torch.Tensor, height: int = SIZE, width: int = SIZE) -> torch.Tensor:
    """Render the anti-aliased mask of a shape at several places.

    Args:
        shape: One of `SHAPES`.
        radius: Nominal radius in pixels.
        centres: `[frames, 2]` centroids (x, y) in pixels.
        height: Rows of the mask.
        width: Columns of the mask.

    Returns:
        `[frames, height, width]` coverage in [0, 1], with edges one pixel wide.
    """
    rows, columns = torch.arange(height) + 0.5, torch.arange(width) + 0.5
    grid_y, grid_x = torch.meshgrid(rows, columns, indexing="ij")
    x = (grid_x[None] - centres[:, 0, None, None]) / radius
    y = (grid_y[None] - centres[:, 1, None, None]) / radius
    return (0.5 - signed_distance(shape, x, y) * radius).clamp(0, 1)


def render(caption: Caption, rng: np.random.Generator, frames: int = FRAMES) -> tuple[torch.Tensor, torch.Tensor]:
    """Render one clip.

    The object stays in the picture, but for the tip of a large triangle. Place, speed (2.4 to 3.0
    pixels a frame), size (±6 %), shade (±4 %) and the background vary with `rng`.

    Args:
        caption: What to show.
        rng: Where the variation comes from; the same state gives the same clip.
        frames: Frames to render.

    Returns:
        The clip `[3, frames, SIZE, SIZE]` in [0, 1], and the object's coverage `[frames, SIZE, SIZE]`.
    """
    radius = RADII[caption.size] * rng.uniform(0.94, 1.06)
    step = np.array(DIRECTIONS[caption.direction]) * rng.uniform(2.4, 3.0)
    offsets = (np.arange(frames) - (FRAMES - 1) / 2)[:, None] * step
    slack_along, slack_across = 2.0, SIZE / 2 - 1.35 * radius
    slack = np.where(np.abs(step) > 0, slack_along, slack_across)
    centres = SIZE / 2 + offsets + rng.uniform(-slack, slack)
    mask = coverage(caption.shape, radius, torch.from_numpy(centres).float())

    ramp = torch.linspace(-1, 1, SIZE)
    slope_x, slope_y = rng.uniform(-0.03, 0.03, size=2)
    background = rng.uniform(0.88, 0.94) + slope_x * ramp[None, :] + slope_y * ramp[:, None]
    colour = torch.tensor(COLOURS[caption.colour]) * rng.uniform(0.96, 1.04)
    clip = background + mask * (colour[:, None, None, None] - background)
    return clip.clamp(0, 1).float(), mask


def render_batch(
    captions: list[Caption], rng: np.random.Generator, frames: int = FRAMES
) -> tuple[torch.Tensor, torch.Tensor]:
    """Render several clips: `[clips, 3, frames, SIZE, SIZE]` in [0, 1] and `[clips, frames, SIZE, SIZE]`."""
    clips, masks = zip(*(render(caption, rng, frames) for caption in captions), strict=True)
    return torch.stack(clips), torch.stack(masks)
