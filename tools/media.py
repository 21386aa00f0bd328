"""Videos as pictures: animated comparisons, contact sheets, and the distance between two videos.

A video is a float array ``[frames, height, width, 3]`` in [0, 1].
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..files.replacing import replacing

__all__ = ["Comparison", "comparison_gif", "contact_sheet", "psnr", "shown"]

GAP = 8
"""Pixels between pictures."""

LINE = 26
"""Height of a line of text in pixels."""

TEXT = (32, 32, 32)
PAPER = (255, 255, 255)


@dataclass(frozen=True)
class Comparison:
    """Videos of one prompt and one seed.

    Attributes:
        caption: printed above them.
        videos: by the name of what made them, such as ``"original"`` and ``"W4A4"``; all of one length.
    """

    caption: str
    videos: Mapping[str, np.ndarray]


def psnr(reference: np.ndarray, video: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio in dB of values in [0, 1].

    Args:
        reference: any shape.
        video: of the same shape.

    Returns:
        ``-10 log10(mean squared error)``; infinity for equal arrays, NaN where either holds a NaN.

    Raises:
        ValueError: the shapes differ.
    """
    if reference.shape != video.shape:
        raise ValueError(f"psnr of arrays of shapes {reference.shape} and {video.shape}; expected one shape")
    error = float(np.mean((reference.astype(np.float64) - video.astype(np.float64)) ** 2))
    return math.inf if error == 0 else -10 * math.log10(error)


def comparison_gif(comparison: Comparison, path: Path, *, frames_per_second: float, height: int = 256) -> None:
    """Write an endless animated GIF: the videos side by side, each under its name.

    Args:
        comparison: the videos.
        path: of the file; missing or replaced as a whole, never half written.
        frames_per_second: a GIF holds times in hundredths of a second.
        height: of a frame in pixels, about: small frames grow by whole factors.
    """
    pages = [
        _labelled(comparison.caption, list(zip(comparison.videos, pictures)), height).quantize(
            256, dither=Image.Dither.NONE
        )
        for pictures in zip(*comparison.videos.values(), strict=True)
    ]
    duration = max(20, round(1000 / frames_per_second))
    _save(pages[0], path, "GIF", save_all=True, append_images=pages[1:], duration=duration, loop=0)


def contact_sheet(comparisons: Sequence[Comparison], path: Path, *, frames: int = 5, height: int = 128) -> None:
    """Write one PNG: for each prompt a few frames of each video, one video below the other.

    Args:
        comparisons: one a prompt.
        path: of the file; missing or replaced as a whole, never half written.
        frames: to show of each video, evenly spread; its first and its last are among them.
        height: of a frame in pixels, about: small frames grow by whole factors.
    """
    blocks = [_block(comparison, frames, height) for comparison in comparisons]
    sheet = Image.new(
        "RGB",
        (max(b.width for b in blocks) + 2 * GAP, sum(b.height + 2 * GAP for b in blocks) + GAP),
        PAPER,
    )
    y = GAP
    for block in blocks:
        sheet.paste(block, (GAP, y))
        y += block.height + 2 * GAP
    _save(sheet, path, "PNG")


def shown(length: int, frames: int) -> list[int]:
    """Return the indices of so many frames of a video, evenly spread from the first to the last."""
    return sorted(set(np.linspace(0, length - 1, min(frames, length)).round().astype(int).tolist()))


def _block(comparison: Comparison, frames: int, height: int) -> Image.Image:
    """Return one prompt's part of a contact sheet."""
    rows = [[_picture(video[i], height) for i in shown(len(video), frames)] for video in comparison.videos.values()]
    width, tall = rows[0][0].size
    label = max(84, *(GAP + math.ceil(_font(15).getlength(name)) for name in comparison.videos))
    size = (label + len(rows[0]) * (width + GAP) - GAP, LINE + len(rows) * (tall + GAP) - GAP)
    page = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(page)
    draw.text((0, 2), _fit(draw, comparison.caption, page.width, 17), TEXT, _font(17))
    for row, name in enumerate(comparison.videos):
        y = LINE + row * (tall + GAP)
        draw.text((0, y + tall // 2 - 9), name, TEXT, _font(15))
        for column, picture in enumerate(rows[row]):
            page.paste(picture, (label + column * (width + GAP), y))
    return page


def _labelled(caption: str, pictures: Sequence[tuple[str, np.ndarray]], height: int) -> Image.Image:
    """Return pictures side by side, each under its label, all under one caption."""
    drawn = [(label, _picture(frame, height)) for label, frame in pictures]
    width, tall = drawn[0][1].size
    page = Image.new("RGB", (len(drawn) * (width + GAP) + GAP, tall + 2 * LINE + 2 * GAP), PAPER)
    draw = ImageDraw.Draw(page)
    draw.text((GAP, 4), _fit(draw, caption, page.width - 2 * GAP, 17), TEXT, _font(17))
    for column, (label, picture) in enumerate(drawn):
        x = GAP + column * (width + GAP)
        draw.text((x, LINE + 4), label, TEXT, _font(15))
        page.paste(picture, (x, 2 * LINE + GAP))
    return page


def _picture(frame: np.ndarray, height: int) -> Image.Image:
    """Return a frame ``[height, width, 3]`` at about the wanted height."""
    values = np.nan_to_num(np.clip(frame, 0, 1)) * 255
    picture = Image.fromarray(values.round().astype(np.uint8))
    if picture.height <= height:
        factor = max(1, height // picture.height)
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    return picture.resize((round(picture.width * height / picture.height), height), Image.Resampling.LANCZOS)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _fit(draw: ImageDraw.ImageDraw, text: str, width: int, size: int) -> str:
    """Return a text, shortened until it fits a width in pixels."""
    text = " ".join(text.split())
    font = _font(size)
    if draw.textlength(text, font) <= width:
        return text
    widths = [draw.textlength(text[:cut] + "...", font) for cut in range(min(len(text), width))]
    return text[: max(0, bisect.bisect_right(widths, width) - 1)].rstrip() + "..."


def _save(image: Image.Image, path: Path, kind: str, **options: object) -> None:
    """Write a picture, so that it is missing or whole."""
    with replacing(path) as beside:
        image.save(beside, kind, **options)
