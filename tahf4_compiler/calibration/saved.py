"""The file of a calibration: what it has seen, as safetensors with a JSON header."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import CalibrationError
from ..files.tensors import load_tensors, save_tensors
from .moments import Moments
from .seen import Seen
from .sketch import Sketch
from .statistics import Activation, Cells

__all__ = ["read", "write"]

FORMAT = "tahf4-calibration-3"


def write(seen: Seen, path: Path) -> None:
    """Write everything seen so far, beside the file and renamed."""
    tensors: dict[str, Tensor] = {}
    index: list[dict[str, Any]] = []
    for i, ((expert, name), cells) in enumerate(sorted(seen.activations.items())):
        index.append({"expert": expert, "name": name, "members": list(cells.activation.members), "cells": []})
        if cells.moments is not None:
            tensors |= {f"{i}.{key}": value for key, value in cells.moments.tensors().items()}
        for j, ((group, branch), (sketch, sample)) in enumerate(sorted(cells.cells.items())):
            index[-1]["cells"].append([group, branch])
            for key, value in {**sketch.tensors(), **sample.tensors()}.items():
                tensors[f"{i}.{j}.{key}"] = value
    header = {
        "calls": seen.kept.header(tensors),
        "step_groups": seen.step_groups,
        "rows": seen.rows,
        "moments": seen.moments,
        "prompts": seen.prompts,
        "arguments": seen.arguments,
        "weights": seen.weight_sums(),
        "activations": index,
    }
    save_tensors(path, tensors, FORMAT, header, CalibrationError)


def read(path: Path, like: Seen) -> Seen:
    """Return what a file holds that :func:`write` wrote.

    Args:
        path: of the file.
        like: of the same models and settings.

    Raises:
        CalibrationError: the file is no such file, or of other weights or settings.
    """
    tensors, header = load_tensors(path, FORMAT, CalibrationError)
    header.setdefault("moments", 0)  # earlier versions kept none
    for what, mine in (("step_groups", like.step_groups), ("rows", like.rows), ("moments", like.moments)):
        if header[what] != mine:
            raise CalibrationError(
                f"{path} was made with {what}={header[what]}, this calibration has {mine}; use the same, or "
                "another file"
            )
    if header["weights"] != like.weight_sums():
        raise CalibrationError(f"{path} was made with other weights; use another checkpoint file")
    found = Seen(
        like.models, percentile=like.percentile, step_groups=like.step_groups, rows=like.rows, moments=like.moments
    )
    for i, entry in enumerate(header["activations"]):
        first = tensors[f"{i}.0.counts"]
        activation = Activation(entry["expert"], entry["name"], tuple(entry["members"]), len(first))
        cells = found.activations[(entry["expert"], entry["name"])] = Cells(activation, like.rows, like.step_groups)
        prefix = f"{i}.moments."
        known = {key.removeprefix(f"{i}."): v for key, v in tensors.items() if key.startswith(prefix)}
        cells.moments = Moments.from_tensors(known) if known else None
        for j, (group, branch) in enumerate(entry["cells"]):
            prefix = f"{i}.{j}."
            part = {key.removeprefix(prefix): v for key, v in tensors.items() if key.startswith(prefix)}
            sample = cells.cell((group, branch))[1]
            sample.load(part)
            cells.cells[(group, branch)] = Sketch.from_tensors(part), sample
    found.prompts, found.arguments = list(header["prompts"]), header["arguments"]
    devices = {expert: next(model.parameters()).device for expert, model in like.models.items()}
    found.kept.load(header["calls"], tensors, devices)
    return found
