"""The report of a reproduction: the same content as Markdown and as HTML, and a contact sheet."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from ..evaluation.report import cells, markdown_table, table
from ..evaluation.results import write_beside
from ..media import Comparison, contact_sheet, shown
from .clips import ClipFile, run_of
from .protocol import DIMENSIONS, Protocol
from .run import ORIGINAL, Device, Setting, versions

__all__ = ["Part", "published", "write_report"]

FRAMES = 5
SHEET = "contact_sheet.png"

AGAINST = {"psnr": ("PSNR dB", 2), "ssim": ("SSIM", 3), "lpips": ("LPIPS", 3)}
STEP = (
    "The median of the denoising steps: calls of a transformer, guidance and scheduler. Not among them are the first "
    "step of a clip and the first of an expert in each clip."
)


@dataclass(frozen=True)
class Part:
    """A part of the report.

    Attributes:
        title: of the part.
        text: paragraphs.
        head: of a table, none if empty.
        lines: of the table.
        picture: name of a file beside the report.
    """

    title: str
    text: Sequence[str] = ()
    head: Sequence[str] = ()
    lines: Sequence[Sequence[str]] = ()
    picture: str = ""


def published() -> list[dict[str, Any]]:
    """Return the figures that others published, each with its source: ``published.yaml``."""
    content = yaml.safe_load(Path(__file__).with_name("published.yaml").read_text(encoding="utf-8"))
    return list(content)


def write_report(
    protocol: Protocol,
    model: str,
    clips: Mapping[Setting, list[ClipFile]],
    files: Sequence[Path],
    reasons: Sequence[str],
    out: Path,
    device: Device,
) -> list[Path]:
    """Write report.md, report.html, report.json and the contact sheet.

    Args:
        protocol: that ran.
        model: its folder or name.
        clips: of each setting.
        files: of the scores, the original first.
        reasons: why something was not scored.
        out: the folder.
        device: where it ran.

    Returns:
        The files.
    """
    columns = {name: (name.replace("_", " "), 4) for name in (*protocol.dimensions, "mean")} | AGAINST
    rows = table(files, columns)
    columns = {name: value for name, value in columns.items() if any(name in row["measures"] for row in rows)}
    _sheet(protocol, clips, out / SHEET)
    costs = {setting.row.name: _cost(mine) for setting, mine in clips.items()}
    found = _parts(protocol, model, columns, rows, costs, reasons, device)
    content = {
        "protocol": protocol.fingerprint(),
        "model": model,
        "lora": [str(part) for part in protocol.lora],
        "versions": versions(),
        "rows": rows,
        "costs": costs,
        "not_scored": list(reasons),
    }
    texts = {
        "report.md": _markdown(found),
        "report.html": _html(found),
        "report.json": json.dumps(content, indent=1, allow_nan=False) + "\n",
    }
    for name, text in texts.items():
        write_beside(out / name, text.encode())
    return [out / name for name in (*texts, SHEET)]


def _parts(
    protocol: Protocol,
    model: str,
    columns: Mapping[str, tuple[str, int]],
    rows: Sequence[dict[str, Any]],
    costs: Mapping[str, dict[str, Any]],
    reasons: Sequence[str],
    device: Device,
) -> list[Part]:
    sizes = protocol.generate
    what = (
        f"{model}, protocol {protocol.name}: {len(protocol.prompts)} prompts x {len(protocol.seeds)} seeds, "
        f"{sizes['num_frames']} frames of {sizes['height']} x {sizes['width']}, {protocol.steps} steps, "
        f"{protocol.calls} call(s) of a transformer in a step; the original in {protocol.dtype}, on "
        f"{_device(device)}. {', '.join(f'{name} {version}' for name, version in versions().items())}."
    )
    lines = cells(rows, columns)
    for entry in published() if protocol.scorer == "vbench" else ():
        for name, values in entry["rows"].items():
            figures = [f"{values[key]:.4f}" if key in values and _comparable(key, protocol) else "" for key in columns]
            if any(figures):
                lines.append([f"published: {entry['name']}, {name}", *figures])
    beside = "The published figures are VBench's, so none stands beside these of the judge."
    if protocol.scorer == "vbench":
        beside = (
            "Published figures are of other prompts and seeds: compare how far a row in 4 bits is from its own "
            "original."
        )
    scored = [
        "Means over clips, and half of a 95 % interval, bootstrapped over prompts; with few prompts it is too narrow. "
        "PSNR, SSIM and LPIPS are against the original with the same seed.",
        beside,
        "The publication of the percentile mask names no percentile, no exponent and no rotation. The row here has "
        "99.9, 0.5 and none.",
        *(f"Not scored. {reason}." for reason in reasons),
    ]
    sources = [[entry["name"], entry["model"], entry["source"], " ".join(entry["note"].split())]
               for entry in published()]  # fmt: skip
    return [
        Part("Reproduction", [what, *filter(None, [protocol.about, _student(protocol)])]),
        Part("Quality", scored, ["", *(name for name, _ in columns.values())], lines),
        Part(
            "Time and memory",
            [STEP, *(["Memory was not measured: there is no CUDA device."] if not torch.cuda.is_available() else [])],
            ["", "s a step", "steps measured", "peak GB of the GPU", "linears in 4 bits", "GB of linears"],
            [_cost_line(name, cost) for name, cost in costs.items()],
        ),
        Part("What was published", [], ["", "model", "source", ""], sources),
        Part("Frames", ["The first seed of each prompt."], picture=SHEET),
    ]


def _student(protocol: Protocol) -> str:
    """Return what was fused into the weights, nothing where nothing was."""
    fused = "; ".join(map(str, protocol.lora))
    return f"Every setting, the original too, has these LoRAs fused into its weights: {fused}." if fused else ""


def _comparable(measure: str, protocol: Protocol) -> bool:
    """Say whether a published figure is of the same thing: a mean is of five dimensions."""
    return measure != "mean" or set(protocol.dimensions) == set(DIMENSIONS["vbench"][:5])


def _cost(clips: list[ClipFile]) -> dict[str, Any]:
    run, peak = run_of(clips)
    return {
        "seconds_per_step": run.seconds_per_step(),
        "steps_measured": len(run.measured()),
        "calls_per_step": run.calls_per_step,
        "peak_gpu_bytes": peak or None,
        "linears": clips[0].linears(),
    }


def _cost_line(name: str, cost: Mapping[str, Any]) -> list[str]:
    seconds, peak, linears = cost["seconds_per_step"], cost["peak_gpu_bytes"], cost["linears"]
    counts = f"{linears['in_4_bits']} of {linears['in_4_bits'] + linears['in_high_precision']}" if linears else ""
    return [
        name,
        f"{seconds:.3f}" if seconds is not None else "",
        str(cost["steps_measured"]),
        f"{peak / 1e9:.1f}" if peak else "",
        counts,
        f"{linears['bytes_before'] / 1e9:.3g} to {linears['bytes_after'] / 1e9:.3g}" if linears else "",
    ]


def _sheet(protocol: Protocol, clips: Mapping[Setting, list[ClipFile]], path: Path) -> None:
    """Write the contact sheet; a few frames of each clip are read, not all."""
    first = [i for i, (*_, seed) in enumerate(protocol.clips()) if seed == protocol.seeds[0]]
    original = clips[ORIGINAL]
    chosen = shown(original[0].length(), FRAMES)
    comparisons = [
        Comparison(original[i].text, {s.row.name: mine[i].frames(chosen) for s, mine in clips.items()}) for i in first
    ]
    contact_sheet(comparisons, path, frames=FRAMES)


def _device(device: Device) -> str:
    name = torch.cuda.get_device_name() if device.name == "cuda" else f"the {device.name}"
    return name + (", offloaded" if device.offload else "")


def _markdown(found: Sequence[Part]) -> str:
    blocks = []
    for i, part in enumerate(found):
        blocks += [f"{'#' if i == 0 else '##'} {part.title}", *part.text]
        if part.head:
            blocks.append(markdown_table(part.head, part.lines).strip())
        if part.picture:
            blocks.append(f"![{part.title}]({part.picture})")
    return "\n\n".join(blocks) + "\n"


def _html(found: Sequence[Part]) -> str:
    style = (
        "body{font:15px/1.5 sans-serif;max-width:75em;margin:2em auto;padding:0 1em;color:#222}"
        "table{border-collapse:collapse}td,th{border:1px solid #ccc;padding:.3em .6em;text-align:left}"
        "img{max-width:100%}.table{overflow-x:auto}"
    )
    body = []
    for i, part in enumerate(found):
        level = "h1" if i == 0 else "h2"
        body.append(f"<{level}>{html.escape(part.title)}</{level}>")
        body += [f"<p>{html.escape(text)}</p>" for text in part.text]
        if part.head:
            rows = [_html_row("th", part.head), *(_html_row("td", line) for line in part.lines)]
            body.append(f'<div class="table"><table>{"".join(rows)}</table></div>')
        if part.picture:
            body.append(f'<p><img src="{html.escape(part.picture)}" alt="{html.escape(part.title)}"></p>')
    head = f'<meta charset="utf-8"><title>{html.escape(found[0].title)}</title><style>{style}</style>'
    return f"<!doctype html>\n<html lang=\"en\"><head>{head}</head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n"


def _html_row(tag: str, line: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in line) + "</tr>\n"
