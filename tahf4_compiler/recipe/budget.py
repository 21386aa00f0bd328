"""Which linears stay in high precision within a budget."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from ..errors import OptionError
from ..options import check_protecting_bits

__all__ = ["check_budget", "choose"]


def check_budget(*, protect_bits: Any = None, **budget: Any) -> None:
    """Check a budget of :func:`choose`, and what it protects by.

    Raises:
        OptionError: an unknown name, not exactly one budget, or one out of range.
    """
    check_protecting_bits("protect_bits", protect_bits)
    if protect_bits is not None and budget.get("max_8bit_flops") is not None:
        raise OptionError("max_8bit_flops gives 8 bits already; leave protect_bits out, or use min_flops_4bit")
    known = ("max_high_precision_linears", "max_high_precision_blocks", "min_flops_4bit", "max_8bit_flops")
    for name in budget:
        if name not in known:
            raise OptionError(f"unknown budget {name!r}; expected one of {', '.join(known)}")
    given = {name: value for name, value in budget.items() if value is not None}
    if len(given) != 1:
        raise OptionError(f"a budget is one of {', '.join(known[:-1])} and {known[-1]}; got {len(given)} of them")
    ((name, value),) = given.items()
    if name in ("min_flops_4bit", "max_8bit_flops"):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise OptionError(f"{name} is {value!r}; expected a share from 0 to 1")
    elif type(value) is not int or value < 0:
        raise OptionError(f"the budget {name} is {value!r}; expected an integer of at least 0")


def choose(
    effects: Mapping[str, float],
    flops: Mapping[str, float],
    block_of: Callable[[str], str],
    *,
    max_high_precision_linears: int | None = None,
    max_high_precision_blocks: int | None = None,
    min_flops_4bit: float | None = None,
    max_8bit_flops: float | None = None,
    attentions: Mapping[str, Collection[str]] | None = None,
    staying: Collection[str] = (),
) -> list[str]:
    """Return the linears and attentions to keep in high precision, or the linears to give activations in 8 bits.

    They are those of the greatest effect, within a budget.

    Effects of different ones are taken to add up, as independent errors do.

    Args:
        effects: relative squared error of the output for each linear and attention.
        flops: of each of them, in any unit.
        block_of: name of the block around one.
        max_high_precision_linears: keep at most so many linears.
        max_high_precision_blocks: keep at most so many whole blocks.
        min_flops_4bit: keep linears while at least this share (0 to 1) of ``flops`` stays in 4 bits, those of
            the greatest effect for their FLOPs first.
        max_8bit_flops: give linears activations in 8 bits while they have at most this share (0 to 1) of ``flops``,
            those of the greatest effect for their FLOPs first.
        attentions: the linears of the module of each attention; with the last of them it stays, too.
        staying: attentions that stay in high precision anyway, which takes of ``flops``.

    Raises:
        OptionError: not exactly one budget, or one out of range.
    """
    check_budget(
        max_high_precision_linears=max_high_precision_linears,
        max_high_precision_blocks=max_high_precision_blocks,
        min_flops_4bit=min_flops_4bit,
        max_8bit_flops=max_8bit_flops,
    )
    share = 1 - min_flops_4bit if min_flops_4bit is not None else max_8bit_flops
    if share is not None:
        allowed, kept = share * sum(flops.values()) - sum(flops[path] for path in staying), list[str]()
        for path in sorted(effects, key=lambda p: (-effects[p] / max(flops[p], 1), p)):
            if path in kept:
                continue
            new = [path, *_with_the_last(path, attentions or {}, {*flops} - {*kept, path, *staying})]
            cost = sum(flops[one] for one in new)
            if cost <= allowed * (1 + 1e-9):
                allowed -= cost
                kept += new
        return kept
    count = max_high_precision_linears if max_high_precision_linears is not None else max_high_precision_blocks
    assert count is not None
    if max_high_precision_linears is not None:
        return sorted(effects, key=lambda p: (-effects[p], p))[:count]
    blocks: dict[str, float] = {}
    for path, effect in effects.items():
        blocks[block_of(path)] = blocks.get(block_of(path), 0.0) + effect
    chosen = sorted(blocks, key=lambda b: (-blocks[b], b))[:count]
    return [path for path in effects if block_of(path) in chosen]


def _with_the_last(path: str, attentions: Mapping[str, Collection[str]], rest: Collection[str]) -> list[str]:
    """Return the attentions that stay with a linear: none of the rest is a linear of their module."""
    return [
        name
        for name, linears in attentions.items()
        if path in linears and name in rest and not any(linear in rest for linear in linears)
    ]
