"""Into how many parts a linear divides: whole units of 64 and whole rotation blocks along K, whole heads along N."""

from __future__ import annotations

from collections.abc import Iterable

from ..errors import ShardingError
from ..format import hif4

__all__ = ["check_columns", "check_rows", "column_degrees", "row_degrees"]


def _divisors(n: int) -> list[int]:
    return [i for i in range(1, n + 1) if n % i == 0]


def row_degrees(k: int, hadamard_block: int = 0) -> list[int]:
    """Return into how many equal parts K divides: each whole units of 64 values and whole rotation blocks."""
    grain = max(hif4.UNIT, hadamard_block)
    return _divisors(k // grain) if k % grain == 0 else [1]


def column_degrees(n: int) -> list[int]:
    """Return into how many equal parts the rows of a weight divide."""
    return _divisors(n)


def check_rows(name: str, k: int, degree: int, hadamard_block: int = 0) -> None:
    """Refuse a row-parallel division that cuts a unit or a rotation block.

    Args:
        name: of the linear, for the message.
        k: input features.
        degree: parts.
        hadamard_block: width of the rotation along K, 0 for none.

    Raises:
        ShardingError: it does; the message names the degrees, and narrower rotations, that work.
    """
    fits = row_degrees(k, hadamard_block)
    if degree in fits:
        return
    grain = max(hif4.UNIT, hadamard_block)
    advice = f"degrees that work are {_list(fits)}"
    narrower = hadamard_block
    while narrower > hif4.UNIT and degree not in row_degrees(k, narrower):
        narrower //= 2
    if narrower != hadamard_block and degree in row_degrees(k, narrower):
        advice += f", or a rotation of {narrower} channels"
    raise ShardingError(
        f"{name} cannot be row-parallel over {degree} ranks: K={k} is {k / grain:g} blocks of {grain} channels (units "
        f"of 64{f', rotation of {hadamard_block}' if hadamard_block else ''}), and each rank needs whole ones; {advice}"
    )


def check_columns(name: str, n: int, degree: int) -> None:
    """Refuse a column-parallel division into unequal parts.

    Raises:
        ShardingError: it is; the message names the degrees that work.
    """
    if n % degree:
        raise ShardingError(
            f"{name} cannot be column-parallel over {degree} ranks: N={n} output features do not divide into equal "
            f"parts; degrees that work are {_list(column_degrees(n))}"
        )


def _list(degrees: Iterable[int]) -> str:
    shown = [str(degree) for degree in degrees]
    return ", ".join(shown if len(shown) <= 16 else [*shown[:16], "..."])
