"""Everything that is known about one lowered graph, and the forms in which it is written."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.resources
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...lowering import Lowered
from ...reporting.compact import fold, unfold
from ...reporting.snapshot import NodeView, Snapshot
from ..errors import CommandError
from ..staging import write_text
from .statistics import Evidence

__all__ = ["Report", "read_dump"]


@dataclass(frozen=True)
class Report:
    """A lowered graph for people.

    Attributes:
        title: of the page.
        source: where it comes from, in words.
        plan: one object a linear, as ``plan.json`` has them.
        passes: one object a pass: name, matches, nodes, seconds, error.
        notes: of the passes.
        snapshots: the graph after each pass.
        texts: the readable graph after each pass.
        evidence: of a recipe and its calibration.
        milliseconds: by node of the last graph, if it was run, node by node and not compiled.
        compiled: milliseconds of a whole call of the compiled graph, or None.
        device: that it was run on.
    """

    title: str
    source: str
    plan: Sequence[Mapping[str, Any]]
    passes: Sequence[Mapping[str, Any]]
    notes: Mapping[str, Sequence[str]]
    snapshots: Sequence[Snapshot]
    texts: Mapping[str, str]
    evidence: Evidence = field(default_factory=Evidence)
    milliseconds: Mapping[str, float] = field(default_factory=dict)
    device: str = ""
    compiled: float | None = None

    @classmethod
    def of(cls, lowered: Lowered, evidence: Evidence, *, title: str = "", source: str = "") -> Report:
        """Take a lowered model."""
        plan = json.loads(lowered.plan_json())
        for entry, decision in zip(plan, lowered.plan, strict=True):
            entry["numbers"] = dict(getattr(decision, "numbers", {}))
        passes = [
            {"name": r.name, "matches": r.matches, "nodes": r.nodes, "seconds": round(r.seconds, 4), "error": r.error}
            for r in lowered.history
        ]
        return cls(
            title or lowered.name,
            source or "Python",
            plan,
            passes,
            lowered.notes,
            lowered.snapshots,
            {record.name: record.readable for record in lowered.history},
        ).with_evidence(evidence)

    def with_evidence(self, evidence: Evidence) -> Report:
        """Return the report with a recipe's numbers."""
        said = [f"the recipe says: {text}" for text in evidence.attentions]
        notes = {**self.notes, "attention": [*self.notes.get("attention", ()), *said]} if said else self.notes
        return dataclasses.replace(self, evidence=evidence, notes=notes)

    # -- what is known about a linear ------------------------------------------------------------------------------

    def linears(self) -> list[dict[str, Any]]:
        """Return the plan with the recipe's numbers, and what computes each linear in the last graph."""
        last = self.snapshots[-1] if self.snapshots else None
        nodes: dict[str, NodeView] = {}
        for node in last.nodes if last is not None else ():
            for path in node.linears:
                nodes.setdefault(path, node)
        own: dict[str, Mapping[str, Any]] = {str(entry["module"]): entry.get("numbers", {}) for entry in self.plan}
        found = []
        for entry in self.plan:
            path = str(entry["module"])
            row = {**entry, **self.evidence.linears.get(path, {})}
            if path in nodes:
                view = nodes[path]
                row["node"] = view.name
                # A merged product has the numbers of one of its linears, which say nothing about the others.
                others = {name for other in view.linears for name in own.get(other, {})}
                shared = {name: value for name, value in view.numbers.items() if name not in others}
                row["numbers"] = {**shared, **entry.get("numbers", {})}
                row["with"] = [other for other in view.linears if other != path]
                if view.name in self.milliseconds:
                    row["milliseconds"] = round(self.milliseconds[view.name], 4)
            found.append(row)
        return found

    def ancestors(self, name: str) -> list[NodeView]:
        """Return the captured graph's nodes that a node of the last graph came in the place of."""
        wanted = {name}
        for snapshot in reversed(self.snapshots[1:]):
            wanted = {old for new in wanted for old in snapshot.origins.get(new, (new,))}
        return [node for node in self.snapshots[0].nodes if node.name in wanted] if self.snapshots else []

    def _shown(self) -> list[Snapshot]:
        """Return the graphs, where operators of a plug-in's number format have its name as their precision."""
        core = ("hif4", "high_precision")
        other = {str(d["module"]): str(d["decision"]) for d in self.plan if d["decision"] not in core}
        if not other:
            return list(self.snapshots)
        libraries = {
            library: other[path]
            for snapshot in self.snapshots
            for node in snapshot.nodes
            for path in node.linears
            if path in other and (library := node.target.partition(".")[0]) not in ("aten", "prims")
        }
        return [
            dataclasses.replace(
                snapshot,
                nodes=tuple(
                    dataclasses.replace(node, precision=libraries[library])
                    if node.op == "call_function" and (library := node.target.partition(".")[0]) in libraries
                    else node
                    for node in snapshot.nodes
                ),
            )
            for snapshot in self.snapshots
        ]

    # -- texts -----------------------------------------------------------------------------------------------------

    def stage(self, name: str) -> str:
        """Return the readable graph after a pass.

        Raises:
            CommandError: no such pass ran.
        """
        if name not in self.texts:
            raise CommandError(f"no pass {name!r} ran; there are {', '.join(self.texts)}")
        return self.texts[name]

    def diff(self, first: str, second: str) -> str:
        """Return a unified diff of the graphs after two passes.

        Raises:
            CommandError: no such pass ran.
        """
        a, b = self.stage(first).splitlines(keepends=True), self.stage(second).splitlines(keepends=True)
        return "".join(difflib.unified_diff(a, b, f"after {first}", f"after {second}"))

    def dot(self, stage: str | None = None) -> str:
        """Return a graph for Graphviz: modules as clusters, 4-bit operators in colour."""
        snapshots = self._shown()
        snapshot = snapshots[-1]
        if stage is not None:
            self.stage(stage)
            snapshot = next(s for s in snapshots if s.stage == stage)
        others = dict.fromkeys((str(entry["decision"]) for entry in self.plan), _OTHER)
        colours = {**others, **_COLOURS}
        lines = [f"digraph {_quoted(self.title)} {{", "  rankdir=TB; node [shape=box, style=filled];"]
        clusters: dict[str, list[NodeView]] = {}
        for node in snapshot.nodes:
            clusters.setdefault(node.module, []).append(node)
        for i, (module, nodes) in enumerate(clusters.items()):
            lines.append(f"  subgraph cluster_{i} {{ label={_quoted(module or self.title)};")
            for node in nodes:
                label = f"{node.target}\\n{node.value}" if node.value else node.target
                colour = colours.get(node.precision, "#eeeeee")
                lines.append(f"    {_quoted(node.name)} [label={_quoted(label)}, fillcolor={_quoted(colour)}];")
            lines.append("  }")
        lines += [f"  {_quoted(source)} -> {_quoted(n.name)};" for n in snapshot.nodes for source in n.inputs]
        return "\n".join([*lines, "}"]) + "\n"

    def data(self) -> dict[str, Any]:
        """Return everything as plain data, as the page has it; what is no number in JSON (NaN) as a text."""
        data = {
            "title": self.title,
            "source": self.source,
            "passes": list(self.passes),
            "notes": {name: list(texts) for name, texts in self.notes.items()},
            "linears": self.linears(),
            "evidence": {
                "activations": dict(self.evidence.activations),
                "steps": self.evidence.steps,
                "errors": list(self.evidence.errors),
                "high_precision_steps": list(self.evidence.high_precision_steps),
                "provenance": dict(self.evidence.provenance),
                "sources": list(self.evidence.sources),
            },
            "milliseconds": {name: round(value, 4) for name, value in self.milliseconds.items()},
            "device": self.device,
            "compiled": None if self.compiled is None else round(self.compiled, 4),
        }
        return {**_finite(data), "graph": fold(self._shown())}

    def html(self, data: Mapping[str, Any] | None = None) -> str:
        """Return one page that holds everything: styles, code and data (of :meth:`data`, if they are at hand)."""
        here = importlib.resources.files(__package__)
        page = (here / "page.html").read_text(encoding="utf-8")
        text = json.dumps(data or self.data(), separators=(",", ":"), allow_nan=False, default=str)
        # Inside <script> only "</" and "<!--" end or change the text; both need a "<".
        text = text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
        parts = {"title": _escaped(self.title), "data": text}
        for part in ("page.css", "plots.js", "graph.js", "summary.js", "page.js"):
            parts[part] = (here / part).read_text(encoding="utf-8")
        return re.sub(r"\{\{ ([\w.]+) \}\}", lambda match: parts[match.group(1)], page)

    def write_html(self, path: Path, data: Mapping[str, Any] | None = None) -> None:
        """Write the page; ``data`` as in :meth:`html`.

        Raises:
            CommandError: it cannot be written.
        """
        write_text(path, self.html(data))


def _finite(value: Any) -> Any:
    """Return plain data without the floats that JSON lacks."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return value


_COLOURS = {"hif4": "#7fd3b5", "bf16": "#a9c7f5", "f16": "#a9c7f5", "f32": "#f5d19a", "f64": "#f2b3a0"}
_OTHER = "#cdb8f0"


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace("\\\\n", "\\n").replace('"', '\\"').replace("\n", " ") + '"'


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def read_dump(folder: Path) -> Report:
    """Read a folder that a compilation with ``dump_dir`` wrote.

    Raises:
        CommandError: files are missing or damaged.
    """
    graph = folder / "graph.json"
    if not graph.is_file():
        raise CommandError(
            f"{folder} has no graph.json: it was written by an older version of tahf4, or not to its end. Compile "
            "again with dump_dir."
        )
    try:
        snapshots = unfold(json.loads(graph.read_text(encoding="utf-8")))
        plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
        if not isinstance(plan, list) or not all(isinstance(d, dict) and "module" in d for d in plan):
            raise ValueError("plan.json is no list of linears")
        recorded, notes = _passes(folder)
        texts = {}
        for path in sorted(folder.glob("[0-9][0-9]_*.py")):
            texts[path.stem[3:]] = path.read_text(encoding="utf-8")
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise CommandError(f"{folder} is damaged: {type(error).__name__}: {error}. Compile again.") from error
    passes = [{"name": s.stage, "nodes": len(s.nodes), **recorded.get(s.stage, {})} for s in snapshots]
    title = folder.name.partition("_")[2].partition("_")[2] or folder.name
    return Report(title, str(folder), plan, passes, notes, snapshots, texts)


def _passes(folder: Path) -> tuple[dict[str, dict[str, Any]], dict[str, list[str]]]:
    """Return what ``passes.json`` of a dump says about each pass, and the passes' notes.

    Raises:
        OSError, ValueError, KeyError, TypeError, AttributeError: it cannot be read.
    """
    path = folder / "passes.json"
    if not path.is_file():
        missing = "the dump has no passes.json: matches, seconds, added errors and notes of its compilation are unknown"
        return {}, {"captured": [missing]}
    found = json.loads(path.read_text(encoding="utf-8"))
    passes = {}
    notes = {str(name): [str(text) for text in texts] for name, texts in found["notes"].items()}
    for entry in found["passes"]:
        name, error = str(entry["name"]), entry["error"]
        if isinstance(error, str):  # no finite number
            notes.setdefault(name, []).append(f"added error: {error}")
        passes[name] = {
            "matches": int(entry["matches"]),
            "seconds": round(float(entry["seconds"]), 4),
            "error": None if error is None or isinstance(error, str) else float(error),
        }
    return passes, notes


def write_page(lowered: Any, path: Path, recipe: Any, calibration: Path | None) -> None:
    """Write a lowered model's page: what :meth:`tahf4_compiler.Lowered.report` asks for.

    Args:
        lowered: a :class:`tahf4_compiler.Lowered`.
        path: of the HTML file.
        recipe: a :class:`tahf4_compiler.Recipe` whose numbers the page shows, or None.
        calibration: the checkpoint of a calibration, or None.

    Raises:
        CommandError: the file cannot be written, or the calibration cannot be read.
    """
    Report.of(lowered, Evidence.of(recipe, calibration)).write_html(path)
