"""The rows of an evaluation as a table, as JSON and as a plot."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...files.replacing import replacing
from .measures import summarize

__all__ = ["COLUMNS", "cells", "markdown", "markdown_table", "plot", "table"]

COLUMNS = {
    "psnr": ("PSNR dB", 2),
    "ssim": ("SSIM", 3),
    "latent_error": ("latent error", 3),
    "subject_consistency": ("subject consistency", 3),
    "colour": ("colour", 3),
    "shape": ("shape", 3),
    "direction": ("motion", 3),
    "motion_smoothness": ("smoothness", 3),
}
"""Measure -> its name in tables, digits."""

AGAINST_REFERENCE = ("psnr", "ssim", "lpips", "latent_error")


def table(files: Sequence[Path], columns: Mapping[str, tuple[str, int]] = COLUMNS) -> list[dict[str, Any]]:
    """Read rows' files: for each row its name, means and half widths of 95 % intervals, and mean step errors.

    Args:
        files: of rows.
        columns: measures that are read; a row has those that all of its clips have.
    """
    rows = []
    for path in files:
        content = json.loads(path.read_text(encoding="utf-8"))
        clips = content["clips"]
        measured = [name for name in columns if all(name in clip for clip in clips)]
        values = {name: np.array([_finite(clip[name]) for clip in clips]) for name in measured}
        summary = summarize(values, [clip["prompt"] for clip in clips])
        steps = np.array([[_finite(value) for value in clip.get("step_errors", ())] for clip in clips])
        rows.append(
            {
                "row": content["row"],
                "clips": len(clips),
                "measures": {
                    name: {"mean": i.mean, "low": i.low, "high": i.high, "error": (i.high - i.low) / 2}
                    if math.isfinite(i.high) and math.isfinite(i.low)
                    else {"mean": i.mean if math.isfinite(i.mean) else None, "low": None, "high": None, "error": None}
                    for name, i in summary.items()
                },
                "step_errors": [value if math.isfinite(value) else None for value in steps.mean(0).tolist()],
                "high_precision": content.get("high_precision", {}),
            }
        )
    return rows


def _finite(value: float | None) -> float:
    return math.inf if value is None else value


def cells(rows: Sequence[dict[str, Any]], columns: Mapping[str, tuple[str, int]] = COLUMNS) -> list[list[str]]:
    """Return a line for each row: its name, and for each measure the mean and half the width of its 95 % interval."""
    lines = []
    for i, row in enumerate(rows):
        line = [row["row"]]
        for key, (_, digits) in columns.items():
            value = row["measures"].get(key)
            if value is None or (i == 0 and key in AGAINST_REFERENCE):
                line.append("")
            elif value["error"] is None:
                line.append("not finite")
            else:
                line.append(f"{value['mean']:.{digits}f} ± {value['error']:.{digits}f}")
        lines.append(line)
    return lines


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Return :func:`cells` as a table in Markdown."""
    return markdown_table(["", *(name for name, _ in COLUMNS.values())], cells(rows))


def markdown_table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown; a bar or a new line in a cell does not end it."""
    shown = [[" ".join(cell.split()).replace("|", "\\|") for cell in line] for line in (head, *lines)]
    text = ["| " + " | ".join(line) + " |" for line in shown]
    return "\n".join([text[0].replace("|  |", "| |", 1), "|" + "---|" * len(head), *text[1:]]) + "\n"


def plot(variants: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Write a PNG: PSNR of each row with its error bar, and the error of the latents after each step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(variants), 2, figsize=(15, 5.5 * len(variants)), squeeze=False)
    for (variant, rows), (left, right) in zip(variants.items(), axes, strict=True):
        shown = rows[1:]
        means = [row["measures"]["psnr"]["mean"] or 0.0 for row in shown]
        errors = [row["measures"]["psnr"]["error"] or 0.0 for row in shown]
        left.barh([row["row"] for row in shown], means, xerr=errors, color="#4c78a8")
        left.invert_yaxis()
        left.set_xlabel("PSNR of the video against high precision, dB")
        left.set_title(f"{variant}: {rows[0]['clips']} clips, bars are 95 % intervals")
        for i, row in enumerate(shown):
            style = ("-", "--", ":")[i // 10 % 3]
            values = [math.nan if value is None else value for value in row["step_errors"]]
            right.plot(range(1, len(values) + 1), [value or math.nan for value in values], style, label=row["row"])
        right.set_yscale("log")
        right.set_xlabel("denoising step")
        right.set_ylabel("relative error of the latents")
        right.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    with replacing(path) as beside:
        figure.savefig(beside, dpi=110)
    pyplot.close(figure)
