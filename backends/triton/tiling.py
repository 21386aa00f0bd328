"""How a product is cut into tiles."""

from __future__ import annotations

import os
from dataclasses import dataclass

from ...errors import OptionError

__all__ = ["PATHS", "Tile", "adds_over_spans", "candidates", "choose_path", "fits_library", "is_tight", "tiles"]

PATHS = ("packed", "int8", "bf16", "library")

FEW_ROWS = 192
"""Rows below which the weights' bytes are the time."""

TCGEN05 = (10, 11)
"""Major compute capabilities with products of tcgen05, of which Triton has none for integers. GeForce cards of the same
generation (12) have those of Ampere."""


@dataclass(frozen=True)
class Tile:
    """Sizes of a launch.

    Attributes:
        rows: of the product that a block of threads computes.
        columns: of it.
        warps: of a block.
        stages: of loads ahead.
        split: parts of K.
    """

    rows: int
    columns: int
    warps: int
    stages: int
    split: int = 1


def fits_library(rows: int, columns: int, span: int) -> bool:
    """Whether a product can take the path ``library``: see :data:`PATHS`.

    Args:
        rows: of the activation. ``torch._int_mm`` refuses up to 16 on CUDA.
        columns: of the weight, there a multiple of 8.
        span: units whose integers may be added before they are scaled: all of a row, which is 0.
    """
    return span == 0 and rows > 16 and columns % 8 == 0


def choose_path(rows: int, capability: tuple[int, int] | None, library: bool = False) -> str:
    """Return how a product is computed.

    Args:
        rows: of the activation.
        capability: of the device, or None for the interpreter.
        library: see :func:`fits_library`. Another product has its default where that path is forced.

    Raises:
        OptionError: ``TAHF4_LINEAR_PATH`` names no path.
    """
    forced = os.environ.get("TAHF4_LINEAR_PATH")
    if forced and forced not in PATHS:
        raise OptionError(f"TAHF4_LINEAR_PATH is {forced!r}; expected one of {', '.join(PATHS)}")
    if forced and (forced != "library" or library):
        return forced
    if rows < FEW_ROWS:
        return "packed"
    return path_of_many(capability)


def path_of_many(capability: tuple[int, int] | None) -> str:
    """Return how a product of many rows is computed where no environment variable says it."""
    return "bf16" if capability is not None and capability[0] in TCGEN05 else "int8"


def adds_over_spans(capability: tuple[int, int] | None) -> bool:
    """Whether products of many rows add integers over a span by default, so that it saves scaling them."""
    return choose_path(FEW_ROWS, capability, library=True) in ("int8", "library")


def is_tight(capability: tuple[int, int] | None, quantized: bool) -> bool:
    """Whether a product's accumulators take so many registers that none are left to quantize its result."""
    return quantized and capability is not None and capability[0] not in (9, *TCGEN05)


def tiles(
    path: str,
    rows: int,
    columns: int,
    unit_count: int,
    processors: int,
    block: int = 0,
    tight: bool = False,
    span: int = 1,
) -> list[Tile]:
    """Return the sizes to try for a product, the default first.

    Args:
        path: one of :data:`PATHS`.
        rows: of the activation.
        columns: of the weight.
        unit_count: units along K.
        processors: of the chip.
        block: Hadamard block of a result that is quantized: a tile holds whole ones.
        tight: see :func:`is_tight`: smaller tiles, so that nothing spills.
        span: units whose integers are added before they are scaled, 0 for a row.
    """
    width = max(64, block)
    if path == "library":  # of what follows the product
        return [Tile(64, 128, 8, 1)]
    if path != "packed" and tight:
        wide = Tile(64, 128, 8, 3)
        return [wide, Tile(64, width, 4, 3) if block > 64 else Tile(128, 64, 8, 3)]
    if path != "packed":
        many = [Tile(128, 128, 8, 3), Tile(128, 128, 8, 4), Tile(128, width, 4, 4)]
        if path == "bf16" or span == 0:  # one accumulator an output, which others have beside what they scale
            many.append(Tile(128, 256, 8, 3))
        return [Tile(64, width, 4, 3), *many[1:]] if rows < 512 and columns < 1024 else many
    height = 16 if rows <= 16 else 32 if rows <= 32 else 64
    blocks = -(-rows // height) * -(-columns // width)
    split = max(1, min(2 * processors // max(1, blocks), unit_count // 4, 16))
    return [Tile(height, width, 4, 3, split), Tile(height, width, 4, 4, max(1, split // 2))]


def candidates(
    rows: int,
    columns: int,
    unit_count: int,
    capability: tuple[int, int],
    processors: int,
    block: int,
    quantized: bool,
    span: int = 1,
) -> list[tuple[str, Tile]]:
    """Return the paths and tiles to measure for a product, the default first."""
    library = fits_library(rows, columns, span)
    default = choose_path(rows, capability, library)
    paths = [default]
    if default != "packed" and not os.environ.get("TAHF4_LINEAR_PATH"):
        # Two instructions a sum and unit for the scales may cost what the faster product of int8 gains.
        known = ("int8", "bf16") if capability[0] not in TCGEN05 else ("bf16",)
        paths += [path for path in (*known, "library") if path != default and (path != "library" or library)]
    sizes = (rows, columns, unit_count, processors, block, is_tight(capability, quantized), span)
    return [(path, tile) for path in paths for tile in tiles(path, *sizes)]
