"""``tahf4 convert``: the layouts of others, as they are."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ..errors import OptionError

__all__ = ["convert"]


class Layout(StrEnum):
    """Who writes it."""

    amct = "amct"
    tahf4 = "tahf4"


def convert(
    folder: Annotated[Path, typer.Argument(help="A folder with one model.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The new folder.")],
    source: Annotated[Layout, typer.Option("--from", help="Who wrote the folder.")] = Layout.amct,
    target: Annotated[Layout, typer.Option("--to", help="Who is to read the new one.")] = Layout.tahf4,
) -> None:
    """Write HiF4 weights in the layout of another tool, bit for bit: Huawei's AMCT, or tahf4.

    Nothing is quantized: see `tahf4 quantize` for that, which also reads NVFP4 and MXFP4.
    """
    from ..checkpoint.amct import from_amct, to_amct

    if source is target:
        raise OptionError(f"--from and --to are both {source.value}; expected amct and tahf4, in either order")
    paths = from_amct(folder, out) if source is Layout.amct else to_amct(folder, out)
    typer.echo(f"{out}: {len(paths)} linears in HiF4, all bits of weights kept")
