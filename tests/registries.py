"""All that can be registered with the package in a process, and how it becomes again what it was."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Iterator
from typing import Any

from tahf4_compiler.ops import registry
from tahf4_compiler.packed import convert
from tahf4_compiler.pipeline import base as pass_base
from tahf4_compiler.plugins import host
from tahf4_compiler.weights import formats

REGISTRIES: tuple[Any, ...] = (
    registry._kernels, host._functions, formats._formats, convert.observers,
    pass_base._registry, pass_base._from_entry_points,
)  # fmt: skip
"""Lists, sets and dictionaries, whose entries are pairs."""

PACKAGES = ("tahf4_compiler", "tahf4_nvfp4")
"""What their modules register stays: they are imported once in a process."""

_COUNTS = "tahf4_nvfp4.count_gelus"
"""But for this module, whose pass would join the pipelines of all tests that follow: it is imported anew."""


@contextlib.contextmanager
def restored() -> Iterator[None]:
    """Let every registry be in the end what it was, but for what modules brought that were imported meanwhile."""
    registry.kernels()  # those of this project are registered when somebody first asks
    before = [_entries(held) for held in REGISTRIES]
    try:
        yield
    finally:
        for held, old in zip(REGISTRIES, before, strict=True):
            if _COUNTS not in sys.modules and _entries(held) == old:
                continue
            new = [entry for entry in _entries(held) if entry not in old and _of_a_package(entry)]
            stays = [entry for entry in new + old if _COUNTS not in _makers(entry)]
            held.clear()
            (held.extend if isinstance(held, list) else held.update)(stays)
        registry._eager.cache_clear()
        for name in (_COUNTS, "tahf4_nvfp4"):
            sys.modules.pop(name, None)


def _entries(held: Any) -> list[Any]:
    return list(held.items() if isinstance(held, dict) else held)


def _of_a_package(entry: Any) -> bool:
    return all(module.partition(".")[0] in PACKAGES for module in _makers(entry))


def _makers(value: Any) -> Iterator[str]:
    """Yield the modules of the functions, classes and objects that an entry is made of."""
    if isinstance(value, functools.partial):
        value = (value.func, *value.args, *value.keywords.values())
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = [getattr(value, part.name) for part in dataclasses.fields(value)]
    if isinstance(value, tuple | list):
        for part in value:
            yield from _makers(part)
    elif not isinstance(value, str | int | float | None):
        yield getattr(value, "__module__", None) or ""
