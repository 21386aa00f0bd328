"""Which path and tile a product takes: measured once for each kind of product on a chip, and kept in a file.

Only large products are measured (few candidates, each some milliseconds); small ones and everything in the interpreter
take the default. ``TAHF4_AUTOTUNE=0`` measures nothing. While a CUDA graph is captured nothing is measured: it gets
what runs before it have measured.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import os
import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ...files.replacing import replacing
from .call import Call
from .source import kernel_folder
from .tiling import Tile

__all__ = ["Choice", "choose", "key_of"]

log = logging.getLogger(__name__)
_lock = threading.Lock()
ENOUGH_ROWS = 1024
"""Rows from which a product is measured."""

Choice = tuple[str, Tile]


def key_of(kernel: Any, rows: int, columns: int, unit_count: int) -> str:
    """Return a key that products of one kind share: rows count in powers of two, so that sizes stay dynamic."""
    bucket = 1 << max(0, rows - 1).bit_length()
    text = repr((dataclasses.astuple(dataclasses.replace(kernel, path="")), columns, unit_count))
    return f"{bucket}x{unit_count * 64}x{columns}_{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def wanted(device: torch.device, rows: int) -> bool:
    """Whether a product takes what was measured for it."""
    return device.type == "cuda" and rows >= ENOUGH_ROWS and os.environ.get("TAHF4_AUTOTUNE", "1") != "0"


def choose(
    key: str,
    chip: str,
    candidates: Sequence[Choice],
    launches: Callable[[Choice], list[Call]],
    timer: Callable[[Callable[[], Any]], float] | None = None,
) -> Choice:
    """Return the fastest candidate, from the file if it was measured before.

    Args:
        key: see :func:`key_of`.
        chip: name of the device; each has a file.
        candidates: the default first.
        launches: makes what a candidate launches.
        timer: milliseconds of a function; Triton's ``do_bench`` if None.
    """
    with _lock:
        known = _read(chip)
        if key in known:
            path, *sizes = known[key]
            choice = path, Tile(*sizes)
            if choice in candidates:
                return choice
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return candidates[0]  # nothing can be timed here; a run before the capture would have measured it
        times = [_time(launches, candidate, timer or _do_bench) for candidate in candidates]
        best = candidates[times.index(min(times))]
        if min(times) == float("inf"):
            return candidates[0]  # launching it says what is wrong
        log.info("%s on %s: %s of %s", key, chip, best, dict(zip(map(str, candidates), times, strict=True)))
        known[key] = [best[0], *dataclasses.astuple(best[1])]
        _write(chip, {**_from_file(_file(chip)), **known})
        return best


def _time(
    launches: Callable[[Choice], list[Call]], candidate: Choice, timer: Callable[[Callable[[], Any]], float]
) -> float:
    try:
        calls = launches(candidate)

        def run() -> None:
            for call in calls:
                call.run()

        return timer(run)
    except Exception as error:  # too much shared memory, say: another candidate will do
        log.info("%s cannot run: %s", candidate, error)
        return float("inf")


def _do_bench(function: Callable[[], Any]) -> float:
    from triton.testing import do_bench

    return float(do_bench(function, warmup=10, rep=30, return_mode="median"))


def _file(chip: str) -> Path:
    import triton

    name = re.sub(r"[^A-Za-z0-9.]+", "_", f"{chip} triton {triton.__version__}").lower()
    return kernel_folder() / f"tuned_{name}.json"


@functools.cache
def _memory(path: Path) -> dict[str, Any]:
    return _from_file(path)


def _read(chip: str) -> dict[str, Any]:
    return _memory(_file(chip))


def _from_file(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none yet, or half of one: measured again
        return {}
    return found if isinstance(found, dict) else {}


def _write(chip: str, known: dict[str, Any]) -> None:
    path = _file(chip)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as beside:
            beside.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    except OSError as error:
        log.warning("cannot keep what was measured in %s: %s", path, error)
