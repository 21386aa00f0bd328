"""Checks of what a recipe file holds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from ..errors import RecipeError
from ..format import hif4
from ..format.spans import FORM_ROUNDINGS
from ..options import ACTIVATION_BITS, ATTENTION, PROTECTING_BITS
from .entries import AttentionEntry, CallError, LinearEntry, RecipeEntry


def read_linear(values: Mapping[str, Any]) -> LinearEntry:
    """Return a linear of a recipe from what its file holds."""
    along = tuple(values.get("step_sqnr_db", ()))
    return LinearEntry(**{**values, "shape": tuple(values["shape"]), "step_sqnr_db": along})


def read_call_error(values: Mapping[str, Any], where: str) -> CallError:
    """Return the error of a call from what a file holds; raise :class:`RecipeError` if it is damaged."""
    found = CallError(**values)
    if not (_is_number(found.error) and type(found.step) is type(found.steps) is int and 0 <= found.step < found.steps):
        raise RecipeError(f"{where}: the error of a call is {dict(values)}; the file is damaged or was edited")
    return found


def read_attention(values: Mapping[str, Any], where: str) -> AttentionEntry:
    """Return an attention of a recipe from what a file holds; raise :class:`RecipeError` if it is damaged."""
    found = AttentionEntry(**{**values, "linears": tuple(values["linears"])})
    texts = all(isinstance(text, str) for text in (*found.linears, found.reason, found.budget))
    values_given = (found.sqnr_db, found.effect or 0.0, found.hif4_sqnr_db or 0.0)
    numbers = all(map(_is_number, values_given)) and type(found.flops) is int
    decided = found.decision in ATTENTION and found.by_error in ("", "int8", "hif4")
    if not (texts and numbers and decided and found.linears and found.flops >= 0):
        raise RecipeError(f"{where}: an attention is {dict(values)}; the file is damaged or was edited")
    return found


def check_steps(steps: Any, bits: Any, where: str) -> tuple[tuple[int, ...], int | None]:
    """Return the steps in high precision and the bits of their activations, of what a file holds.

    Raises:
        RecipeError: the file is damaged.
    """
    whole = isinstance(steps, list | tuple) and all(type(step) is int for step in steps)
    if not whole or type(bits) not in (int, type(None)) or bits not in PROTECTING_BITS:
        raise RecipeError(
            f"{where}: the steps in high precision are {steps!r}, with activations of {bits!r} bits; expected a list "
            "of integers, and 8, 16 or nothing; the file is damaged or was edited"
        )
    return tuple(steps), bits


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_entry(entry: RecipeEntry, where: str, cause: str = "the file is damaged or was edited") -> None:
    """Raise :class:`RecipeError` if the parts of an entry do not fit each other.

    Args:
        entry: an activation of a recipe.
        where: it stands.
        cause: why it may be so, for the message.
    """
    damaged = f"{where}: {{}}; {cause}"
    if not all(len(linear.shape) == 2 for linear in entry.linears.values()):
        raise RecipeError(damaged.format("a shape does not have two sizes"))
    ks = {linear.shape[1] for linear in entry.linears.values()}
    k = next(iter(ks), 0)
    for part in (entry.mask, entry.second_moment):
        if len(ks) != 1 or (part is not None and tuple(part.shape) != (k,)):
            raise RecipeError(damaged.format("mask and shapes of the linears do not fit each other"))
    if entry.mask is not None and entry.mask.dtype != torch.float32:
        raise RecipeError(damaged.format(f"the mask is of {entry.mask.dtype}, expected float32"))
    if entry.search not in ("", "squared", "weighted", "reconstruct"):
        raise RecipeError(damaged.format(f"the search is {entry.search!r}"))
    if type(entry.span) is not int or entry.span not in (0, 1, 2, 4):
        raise RecipeError(damaged.format(f"the span is {entry.span!r}, expected 1, 2 or 4 units, or 0 for a row"))
    if not isinstance(entry.span_reason, str):
        raise RecipeError(damaged.format(f"the reason of the span is {entry.span_reason!r}, expected a text"))
    if entry.rounding not in FORM_ROUNDINGS:
        known = ", ".join(map(repr, FORM_ROUNDINGS))
        raise RecipeError(damaged.format(f"the rounding is {entry.rounding!r}, expected one of {known}"))
    if entry.rounding == "least_error" and entry.span != 1:
        raise RecipeError(damaged.format(f"the rounding is {entry.rounding!r} and the span {entry.span}, expected 1"))
    for path, linear in entry.linears.items():
        if (path in entry.packed) != (entry.search == "reconstruct"):
            raise RecipeError(damaged.format(f"the search is {entry.search!r}, and the packed weight of {path} is not"))
        if path in entry.packed:
            _check_packed(entry.packed[path], linear.shape, damaged.format(f"the packed weight of {path} does not fit"))
            shared = entry.mask is not None or entry.hadamard_block  # without both a span is refused
            if shared and linear.activation_bits == 4 and not hif4.holds_span(entry.packed[path], entry.span):
                raise RecipeError(damaged.format(f"units of {path} do not share level-1 scales, as its span says"))
    for path, (a, b) in entry.low_rank.items():
        n = entry.linears[path].shape[0] if path in entry.linears else -1
        fits = a.dim() == b.dim() == 2 and tuple(a.shape) == (k, b.shape[0]) and b.shape[1] == n
        if not fits or not all(f.dtype == torch.bfloat16 and bool(torch.isfinite(f).all()) for f in (a, b)):
            raise RecipeError(damaged.format(f"the low-rank branch of {path} does not fit"))
    block, padded = entry.hadamard_block, (k + 63) // 64 * 64
    if type(block) is not int or block < 0 or block & (block - 1) or (block and padded % block):
        raise RecipeError(
            damaged.format(f"the Hadamard block is {block!r}, expected a power of two that divides {padded}")
        )
    if (block > 0) != (entry.seed is not None) or (block and not _is_seed(entry.seed)):
        raise RecipeError(damaged.format(f"the seed is {entry.seed!r} with a Hadamard block of {block}"))
    if entry.second_moment is not None and not bool(torch.isfinite(entry.second_moment).all()):
        raise RecipeError(damaged.format("the second moment is not finite"))
    for path, linear in entry.linears.items():
        for value in (linear.sqnr_db, linear.effect, *linear.step_sqnr_db):
            if value is not None and not _is_number(value):
                raise RecipeError(damaged.format(f"an error of {path} is {value!r}, expected a number"))
        if linear.decision not in ("hif4", "high_precision"):
            raise RecipeError(damaged.format(f"the decision of {path} is {linear.decision!r}"))
        if type(bits := linear.activation_bits) is not int or bits not in ACTIVATION_BITS:
            raise RecipeError(damaged.format(f"the activation of {path} has {bits!r} bits, expected 4, 8 or 16"))
    if entry.mask is not None and not bool((torch.isfinite(entry.mask) & (entry.mask > 0)).all()):
        raise RecipeError(damaged.format("the mask holds values that are not positive and finite"))


def _check_packed(packed: hif4.Packed, shape: tuple[int, int], message: str) -> None:
    n, k = shape
    count = hif4.units(k)
    fits = tuple(packed.codes.shape) == (n, count * hif4.UNIT // 2) and tuple(packed.scales.shape) == (n, count)
    if not fits or packed.codes.dtype != torch.uint8 or packed.scales.dtype != torch.int32:
        raise RecipeError(message)


def _is_seed(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63
