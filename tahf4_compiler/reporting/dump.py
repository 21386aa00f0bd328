"""Writes what the compiler did to a folder: one sub-folder for each compiled graph, numbered in run order."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import OptionError
from ..files.replacing import replacing
from ..pipeline.records import PassRecord
from ..torch_private.dynamo import debug_folder, log_artifact

__all__ = ["GraphDump", "dump_folder", "trace_artifacts"]


class GraphDump:
    """One compiled graph's folder: a file a pass, ``plan.json``, ``passes.json``, ``graph.json``, ``report.txt``."""

    def __init__(self, folder: Path) -> None:
        """Take a folder that exists."""
        self.folder = folder

    def write(self, name: str, text: str) -> None:
        """Write a file; no reader sees half of it."""
        with replacing(self.folder / name) as beside:
            beside.write_text(text, encoding="utf-8")

    def write_graphs(self, history: Sequence[PassRecord]) -> None:
        """Write the readable graph after each pass."""
        for index, record in enumerate(history):
            self.write(f"{index:02d}_{record.name}.py", record.readable)

    def write_passes(self, history: Sequence[PassRecord], notes: Mapping[str, Sequence[str]]) -> None:
        """Write what each pass did and said: ``passes.json``. An error that is no finite number is written as text."""
        fields = ("name", "matches", "nodes", "seconds", "error", "total_error")
        passes = [{name: _plain(getattr(record, name)) for name in fields} for record in history]
        found = {"passes": passes, "notes": {name: list(texts) for name, texts in notes.items()}}
        self.write("passes.json", json.dumps(found, indent=1) + "\n")


def _plain(value: Any) -> Any:
    """Return a value as JSON has it, which has no NaN and no infinities."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def dump_folder(dump_dir: str | None) -> Path | None:
    """Return where dumps go: the option or ``TAHF4_DUMP_DIR``, else beside Inductor's under TORCH_COMPILE_DEBUG.

    None where nothing is dumped, which includes every rank but the first.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
        return None
    if dump_dir:
        return Path(dump_dir)
    if os.environ.get("TORCH_COMPILE_DEBUG", "0") == "1":
        return debug_folder() / "tahf4"
    return None


def new_graph_dump(dump_dir: Path, name: str) -> GraphDump:
    """Create the next numbered folder; folders of earlier runs stay."""
    try:
        dump_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(dump_dir, error) from error
    numbers = (re.match(r"graph_(\d+)_", entry.name) for entry in dump_dir.iterdir())
    start = max((int(match.group(1)) for match in numbers if match), default=-1) + 1
    for number in itertools.count(start):
        folder = dump_dir / f"graph_{number:03d}_{re.sub(r'[^A-Za-z0-9_]+', '_', name)}"
        try:
            folder.mkdir()
        except FileExistsError:  # another process was faster
            continue
        except OSError as error:
            raise _unwritable(dump_dir, error) from error
        return GraphDump(folder)
    raise AssertionError  # itertools.count does not end


def _unwritable(dump_dir: Path, error: OSError) -> OptionError:
    return OptionError(f"cannot write to dump_dir {str(dump_dir)!r}: {error}. Choose another folder.")


def trace_artifacts(history: Sequence[PassRecord]) -> None:
    """Hand every graph to PyTorch's structured trace, where ``tlparse`` shows it."""
    for index, record in enumerate(history):
        log_artifact(f"tahf4_{index:02d}_{record.name}", record.readable)
