"""Snapshots as compact JSON: blocks that are alike are written once, and what a pass left alone is not repeated."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from .snapshot import NodeView, Snapshot, block_path

__all__ = ["fold", "graph_json", "unfold"]

FORMAT = "tahf4-graph-1"


class _Pool:
    """Values by number; equal ones have one number."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self._index: dict[str, int] = {}

    def put(self, value: Any) -> int:
        key = json.dumps(value, separators=(",", ":"))
        if key not in self._index:
            self._index[key] = len(self.values)
            self.values.append(value)
        return self._index[key]


def fold(snapshots: Sequence[Snapshot]) -> dict[str, Any]:
    """Return snapshots as plain data for JSON.

    A stage is a list of parts in the order of their first nodes, and ``runs``, the order of all. A part is ``[path of
    the block, body, names, outer]``, the last three as numbers in pools. In a body, inputs are positions in the part,
    or ``-1 - i`` for the ``i``-th name in ``outer``, and origins are positions in ``outer``. The block's own path is
    written ``~`` there.
    """
    bodies, names, outers = _Pool(), _Pool(), _Pool()
    stages = []
    for snapshot in snapshots:
        parts: dict[str, list[NodeView]] = {}
        for node in snapshot.nodes:
            parts.setdefault(block_path(node.module), []).append(node)
        rows, here = [], {}
        for p, (path, nodes) in enumerate(parts.items()):
            position = {node.name: i for i, node in enumerate(nodes)}
            here.update(dict.fromkeys(position, p))
            outer: list[str] = []
            body = [_row(node, path, position, outer, snapshot) for node in nodes]
            rows.append(
                [path, bodies.put(body), names.put(" ".join(n.name for n in nodes)), outers.put(" ".join(outer))]
            )
        stages.append({"name": snapshot.stage, "parts": rows, "runs": _runs(snapshot.nodes, here)})
    return {
        "format": FORMAT, "stages": stages, "bodies": bodies.values, "names": names.values, "outers": outers.values,
    }  # fmt: skip


def _runs(nodes: Sequence[NodeView], part: Mapping[str, int]) -> list[list[int]]:
    """Return the execution order as ``[part, how many of its nodes follow]``."""
    runs: list[list[int]] = []
    for node in nodes:
        if runs and runs[-1][0] == part[node.name]:
            runs[-1][1] += 1
        else:
            runs.append([part[node.name], 1])
    return runs


def _row(
    node: NodeView,
    path: str,
    position: Mapping[str, int],
    outer: list[str],
    snapshot: Snapshot,
) -> list[Any]:
    def reference(name: str) -> int:
        if name in position:
            return position[name]
        if name not in outer:
            outer.append(name)
        return -1 - outer.index(name)

    inputs = [reference(name) for name in node.inputs]
    text = node.arguments
    # Names of nodes differ from block to block: the text has their place among the inputs.
    for i, name in sorted(enumerate(node.inputs), key=lambda pair: -len(pair[1])):
        if name in text:
            text = _substitute(text, name, f"\x01{i}\x02")
    origins = [_origin(name, outer) for name in snapshot.origins.get(node.name, ())]

    def relative(value: str) -> str:
        return f"~{value[len(path) :]}" if path and (value == path or value.startswith(f"{path}.")) else value

    return [
        node.op, node.target, relative(text), inputs, relative(node.module), node.value, node.bytes, node.flops,
        node.precision, node.kernel, [relative(p) for p in node.linears], dict(node.numbers), origins,
    ]  # fmt: skip


def _origin(name: str, outer: list[str]) -> int:
    if name not in outer:
        outer.append(name)
    return outer.index(name)


def _substitute(text: str, name: str, by: str) -> str:
    out, at = [], 0
    while (found := text.find(name, at)) >= 0:
        end = found + len(name)
        whole = not (found and (text[found - 1].isalnum() or text[found - 1] in "_\x01.")) and not (
            end < len(text) and (text[end].isalnum() or text[end] in "_\x02")
        )
        out += [text[at:found], by if whole else name]
        at = end
    return "".join([*out, text[at:]])


def unfold(data: Mapping[str, Any]) -> list[Snapshot]:
    """Undo :func:`fold`.

    Raises:
        KeyError, IndexError, TypeError, ValueError: the data are not what it writes.
    """
    if data["format"] != FORMAT:
        raise ValueError(f"format {data['format']!r}, expected {FORMAT!r}")
    found = []
    for stage in data["stages"]:
        parts: list[list[NodeView]] = []
        origins: dict[str, tuple[str, ...]] = {}
        for path, body, names, outer in stage["parts"]:
            parts.append([])
            here, outside = data["names"][names].split(" "), data["outers"][outer].split(" ")

            def absolute(value: str, path: str = path) -> str:
                return path + value[1:] if value.startswith("~") else value

            for name, row in zip(here, data["bodies"][body], strict=True):
                op, target, text, inputs, module, value, size, flops, precision, kernel, linears, numbers, old = row
                given = tuple(here[i] if i >= 0 else outside[-1 - i] for i in inputs)
                for i, source in enumerate(given):
                    text = text.replace(f"\x01{i}\x02", source)
                view = NodeView(
                    name, op, target, absolute(text), given, absolute(module), value, size, flops, precision, kernel,
                    tuple(absolute(p) for p in linears), numbers,
                )  # fmt: skip
                parts[-1].append(view)
                if old:
                    origins[name] = tuple(outside[i] for i in old)
        following = [iter(part) for part in parts]
        nodes = [next(following[part]) for part, count in stage["runs"] for _ in range(count)]
        found.append(Snapshot(stage["name"], tuple(nodes), origins))
    return found


def graph_json(snapshots: Sequence[Snapshot]) -> str:
    """Return :func:`fold` as compact JSON."""
    return json.dumps(fold(snapshots), separators=(",", ":"))
