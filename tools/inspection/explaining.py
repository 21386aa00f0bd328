"""Plain text about a report: every linear in a table, and one linear in full."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ...model.reasons import Cause
from ...reporting.report import ACTIVATIONS
from ...reporting.snapshot import NodeView
from ..errors import CommandError
from .report import Report

ROUNDINGS = {
    "bfloat16_half_away": "in-group values become bfloat16 before they become elements",
    "least_error": "the level-1 scale of each unit is the one of least squared error among four",
}

__all__ = ["chosen", "explanations", "overview", "what_would_change"]


def chosen(plan: Sequence[Mapping[str, Any]]) -> str:
    """Return how many linears run in 4 bits and in which formats, such as ``"6 of 8 linears in HiF4"``."""
    counts = Counter(str(entry["decision"]) for entry in plan if entry["decision"] != "high_precision")
    first, *others = [(count, _NAMES.get(name, name)) for name, count in counts.items()] or [(0, "HiF4")]
    more = "".join(f", {count} in {name}" for count, name in others)
    return f"{first[0]} of {len(plan)} linears in {first[1]}{more}"


_NAMES = {"hif4": "HiF4"}


def overview(report: Report) -> str:
    """Return every linear as a line, then what the passes did."""
    lines = [f"{report.title} ({report.source})", ""]
    rows = report.linears()
    width = max((len(row["module"]) for row in rows), default=0)
    for row in rows:
        numbers = [f"{row['k']} -> {row['n']}"]
        if row.get("sqnr_db") is not None:
            numbers.append(f"SQNR {row['sqnr_db']:.1f} dB")
        if "milliseconds" in row:
            numbers.append(f"{row['milliseconds']:.3f} ms")
        if row.get("activation_bits") in ACTIVATIONS:
            numbers.append(f"{ACTIVATIONS[row['activation_bits']]} activation")
        if row.get("rank"):
            numbers.append(f"rank {row['rank']}")
        if row.get("scale_span") not in (None, 1):
            numbers.append(f"span {row['scale_span']}")
        if row.get("rounding") not in (None, "half_away"):
            numbers.append(f"rounding {row['rounding']}")
        lines.append(f"{row['module']:{width}}  {row['decision']:14}  {', '.join(numbers)}  {row['reason']}")
    lines.append("")
    for entry in report.passes:
        lines.append(f"{entry['name']:14} {entry.get('matches', ''):>6} matches  {entry['nodes']:>6} nodes")
    lines += [f"{name}: {text}" for name, texts in report.notes.items() for text in texts]
    return "\n".join(lines) + "\n"


def regular(pattern: str) -> re.Pattern[str]:
    """Return a regular expression.

    Raises:
        CommandError: it is none.
    """
    try:
        return re.compile(pattern)
    except re.error as error:
        raise CommandError(f"{pattern!r} is no regular expression: {error}") from error


def explanations(report: Report, wanted: re.Pattern[str]) -> Iterator[str]:
    """Yield a text for each linear whose module path a pattern is found in."""
    views = {node.name: node for node in report.snapshots[-1].nodes} if report.snapshots else {}
    for row in report.linears():
        if wanted.search(row["module"]):
            yield "\n".join(_lines(report, row, views)) + "\n"


def _lines(report: Report, row: Mapping[str, Any], views: Mapping[str, NodeView]) -> Iterator[str]:
    yield f"{row['module']}  ({row['k']} -> {row['n']}, {report.title})"
    saved = f"{row['bytes_before']:,} -> {row['bytes_after']:,} bytes"
    decisions = {"hif4": f"HiF4 W4A{row.get('activation_bits') or 4}", "high_precision": "high precision"}
    yield f"  decision    {decisions.get(row['decision'], row['decision'])}, {saved}"
    if row.get("activation_bits") == 8:
        yield "  activation  8 bits: int8, with a float32 scale for each unit of 64 values"
    if row.get("activation_bits") == 16:
        yield "  activation  16 bits: not quantized; the weight is dequantized in each call (W4A16)"
    if row.get("rank"):
        yield f"  branch      rank {row['rank']}, in the precision of the original; its bytes are among those above"
    if row.get("scale_span") not in (None, 1):
        yield f"  span        {row['scale_span']}: so many units of 64 values share a level-1 scale"
    if row.get("rounding") not in (None, "half_away"):
        yield f"  rounding    {row['rounding']}: {ROUNDINGS[row['rounding']]}"
    yield f"  reason      {row['reason']}"
    yield f"  FLOPs       {row['flops']:,} a call"
    yield from (f"  {text}" for text in _statistics(report, row))
    node = views.get(row.get("node", ""))
    if node is not None and row["decision"] != "high_precision":
        others = _linears_of_others(report, node)
        old = [n for n in report.ancestors(node.name) if n.op == "call_function" and n.name not in others]
        counts = Counter(n.target.removeprefix("aten.") for n in old)
        words = ", ".join(name if count == 1 else f"{count} x {name}" for name, count in counts.items())
        yield f"  runs as     {node.name} = {node.target}, in the place of {words}"
        for other in row.get("with", ()):
            yield f"  merged with {other}"
        for source in _quantizations(node, views):
            before = [n.target for n in report.ancestors(source.name) if n.op == "call_function"]
            names = ", ".join(dict.fromkeys(t.removeprefix("aten.") for t in before if t != "aten.linear"))
            yield f"  reads       {source.name} = {source.target}" + (f", in the place of {names}" if names else "")
        ran = any(snapshot.stage == "lower" for snapshot in report.snapshots)
        none = f"none registered for {node.target}" if ran else "none chosen: the pass lower did not run"
        yield f"  kernel      {row['kernel'] or none}"
    elif row["decision"] == "high_precision":
        if node is not None:
            yield f"  runs as     {node.name} = {node.target}" + (", by PyTorch" if _is_torchs(node) else "")
            yield from (f"  merged with {other}" for other in row.get("with", ()))
            if row["kernel"]:
                yield f"  kernel      {row['kernel']}"
        elif views:
            yield "  runs as     no node of the last graph says that it computes this linear"
    if "milliseconds" in row:
        yield f"  time        {row['milliseconds']} ms ({report.device})"
    for name, value in row.get("numbers", {}).items():
        yield f"  {name:11} {value}"
    for text in what_would_change(row):
        yield f"  to change   {text}"


def _is_torchs(node: NodeView) -> bool:
    return node.target.partition(".")[0] in ("aten", "prims")


def _linears_of_others(report: Report, node: NodeView) -> set[str]:
    """Return the linears that a node does not compute, though it may quantize what they read."""
    return {
        n.name
        for snapshot in report.snapshots
        for n in snapshot.nodes
        if n.target == "aten.linear" and n.linears and not set(n.linears) & set(node.linears)
    }


def _quantizations(node: NodeView, views: Mapping[str, NodeView]) -> list[NodeView]:
    """Return what wrote the codes that a product reads."""
    found = []
    for name in node.inputs[:2]:
        source = views.get(name)
        while source is not None and source.target == "getitem":
            source = views.get(source.inputs[0])
        if source is not None and source.op == "call_function" and source not in found:
            found.append(source)
    return found


def _statistics(report: Report, row: Mapping[str, Any]) -> Iterator[str]:
    if not report.evidence.linears:
        yield "statistics  none: give a recipe (--recipe)"
        return
    if "activation" not in row:
        yield "statistics  the recipe has nothing on this linear"
        return
    measured = [
        f"SQNR {row['sqnr_db']:.1f} dB of its own output" if row.get("sqnr_db") is not None else "SQNR not measured",
        f"effect {row['effect']:.2e} on the output" if row.get("effect") is not None else "effect not measured",
    ]
    yield f"error       {', '.join(measured)}"
    if len(along := row.get("step_sqnr_db") or ()) > 1:
        words = ", ".join("none seen" if db is None else f"{db:.1f}" for db in along)
        yield f"along steps SQNR {words} dB in the {len(along)} parts of the schedule"
    how = [f"shares the activation of {row['activation']}" if row["activation"] != row["module"] else "own activation"]
    if row.get("weight_exponent") is not None:
        how.append(f"mask of the {_statistic(report, row)}, weight exponent {row['weight_exponent']:g}")
    if (mask := row.get("mask")) is not None:
        how.append(f"mask {mask['min']:g} to {mask['max']:g}, {100 * mask['far']:.1f} % of channels 4x off the median")
    how.append(f"rotation of {row['hadamard_block']}" if row.get("hadamard_block") else "no rotation")
    if row.get("search"):
        how.append(f"scales by {row['search']} error")
    yield f"transform   {', '.join(how)}"
    if report.evidence.high_precision_steps:
        yield f"steps       {_numbers(report.evidence.high_precision_steps)} in high precision, by the recipe"
    if (seen := report.evidence.activations.get(row["activation"])) is not None:
        yield (
            f"activation  |x| up to {seen['max']:g}; percentile {seen['percent']:g} of the largest channel "
            f"{seen['percentile']:g}, of the median channel {seen['median']:g}; {seen['rows']:,} rows"
        )


def _statistic(report: Report, row: Mapping[str, Any]) -> str:
    """Return what the mask of a linear's activation was made with, in words."""
    if row["percentile"] is not None:
        return f"percentile {row['percentile']:g}"
    weights = report.evidence.provenance.get("choices", {}).get("mask") == "weights"
    return "weights alone" if weights else "root mean square"


def _numbers(steps: Sequence[int]) -> str:
    return ", ".join(f"{step}" if step >= 0 else f"{step} (from the end)" for step in steps)


def what_would_change(row: Mapping[str, Any]) -> list[str]:
    """Return, for a linear of a report, what one would do for another decision."""
    pattern = re.escape(row["module"]).replace("\\-", "-")
    if row["decision"] != "high_precision":
        found = [f'options={{"keep": [r"^{pattern}$"]}}, or tahf4.keep(model, [...]), keeps it in high precision']
        if row.get("activation_bits") == 4:
            found.append(f'options={{"activation_bits": {{r"^{pattern}$": 8}}}} gives its activation 8 bits')
        if row.get("effect") is not None:
            found.append("recipe.plan(max_high_precision_linears=n) protects it if its effect is among the n largest")
        elif "activation" not in row:
            found.append("a recipe (tahf4 calibrate) with a budget protects it if its measured effect is large")
        return found
    cause = Cause(row.get("cause", "other"))
    if cause is Cause.SMALL:
        return [f'options={{"plan.min_features": {min(row["k"], row["n"])}}} lets it in; units are mostly padding then']
    if cause in _CHANGES:
        return [_CHANGES[cause]]
    return ["the recipe, or the pass that gave this reason"]


_MODEL = "only the model: the weight must be a plain two-dimensional parameter of 16 bits or more"
_CHANGES = {
    Cause.BOUNDARY: "a recipe that names it and says hif4; outside of repeated blocks nothing is quantized by rule",
    Cause.KEPT: "leave the pattern out of keep (options, or tahf4.keep)",
    Cause.SENSITIVITY: "recipe.plan(...) with fewer high-precision linears or blocks, or a larger min_flops_4bit",
    Cause.DTYPE: _MODEL,
    Cause.WEIGHT: _MODEL,
    Cause.SHAPE: _MODEL,
    Cause.REGION: "only the model: linears outside of torch.cond, while_loop, map and the like",
    Cause.CLASS: "only the model: plain nn.Linear modules whose own forward runs are packed",
    Cause.NOT_PACKED: "tahf4.dequantize_ and tahf4.quantize_ again, if it is a plain nn.Linear",
    Cause.ADAPTER: "nothing: adapters stay in high precision; fuse one into its linear before packing",
    Cause.STEP: "recipe.high_precision_steps without the step",
    Cause.NOT_REWRITTEN: "the passes: disable_passes left the rewrite out, or a pass of your own did not carry it out",
}
