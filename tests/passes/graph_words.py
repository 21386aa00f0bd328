"""The words of the texts of ``graphs.py``, for those who read and who print them."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch

DTYPES = {
    "f64": torch.float64, "f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "i64": torch.int64,
    "f8": torch.float8_e4m3fn, "i32": torch.int32, "i16": torch.int16, "i8": torch.int8, "u8": torch.uint8,
    "bool": torch.bool,
}  # fmt: skip
CONSTANTS = {
    **DTYPES, "contiguous": torch.contiguous_format, "channels_last": torch.channels_last,
    "preserve": torch.preserve_format, "strided": torch.strided, "inf": float("inf"), "cpu": torch.device("cpu"),
}  # fmt: skip
WORDS = {value: name for name, value in CONSTANTS.items() if not isinstance(value, float)}
SIZES = {"n": 5, "m": 7}
"""Dynamic sizes, with those of the example."""

_SPACES = ("tahf4.", "tahf4_tests.", "prims.")


def statements(text: str) -> Iterator[str]:
    """Yield the statements: a line goes on while a bracket is open."""
    pending = ""
    for line in text.splitlines():
        pending = f"{pending} {line.strip()}".strip()
        if pending and pending.count("(") + pending.count("[") <= pending.count(")") + pending.count("]"):
            yield re.sub(r"([(\[]) ", r"\1", pending)
            pending = ""
    assert not pending, f"a bracket is open: {pending}"


def normal(text: str) -> str:
    return "\n".join(statements(text))


def divided(line: str) -> tuple[str, str]:
    """Return a statement and what stands behind it."""
    statement, _, comment = line.partition("  # ")
    return statement.rstrip(), comment.strip()


def defined_names(text: str) -> list[str]:
    """Return what a text defines, in order."""
    found: list[str] = []
    for line in statements(text):
        statement, _ = divided(line)
        if (match := re.match(r"([\w, ]+?),? = \w", statement)) is not None:
            found += [part.strip() for part in match[1].split(",") if part.strip() not in ("", "_")]
        elif (match := re.match(r"(\w+): (?:multiplier|observer|low_rank_[ab]|held) ", statement)) is not None:
            found.append(match[1])
    return found


def operator_of(function: str, args: Sequence[Any]) -> Any:
    if function == "getitem":
        return operator.getitem
    space, *names = function.split(".") if function.startswith(_SPACES) else ["aten", *function.split(".")]
    packet = getattr(getattr(torch.ops, space), names[0])
    if len(names) > 1:
        return getattr(packet, names[1])
    return getattr(packet, next((name for name in ("Tensor", "default") if name in packet.overloads()), "none"), None)
