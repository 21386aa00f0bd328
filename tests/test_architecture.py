"""The structure of the package: imports go down, no circle, no private name of another module.

``pytest tests/test_architecture.py -s`` prints the floors.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import networkx as nx

ROOT = Path(__file__).parents[1]
PACKAGE = "tahf4_compiler"
FOLDERS = {"tahf4_compiler": PACKAGE, **{name: f"{PACKAGE}.{name}" for name in ("passes", "backends", "tools")}}

FLOORS = (
    ("errors", "graph", "import_hook", "torch_private"),
    ("files", "options", "plugins"),
    ("format",),
    ("model", "ops"),
    ("graph_capture", "weights"),
    ("pipeline", "recipe"),
    ("packed", "reporting"),
    ("diffusers_integration", "distributed", "lowering", "rewriting", "transformers_integration"),
    ("calibration", "checkpoint", "debugging"),
    ("",),  # the public face, tahf4_compiler/__init__.py
    ("backends", "passes"),  # they join through entry points: nothing above imports them
    ("tools",),
)
"""From the ground up: a room imports from floors below its own, and from itself."""


class Import(NamedTuple):
    """One name that a module imports from another module of the package."""

    source: str
    target: str
    name: str
    line: int


@cache
def modules() -> dict[str, Path]:
    found = {}
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([package, *parts]).removesuffix(".__init__")] = path
    return found


def imports() -> Iterator[Import]:
    """Yield every import of the package's own modules, inside functions and for types too."""
    known = modules()
    for module, path in known.items():
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name.partition(".")[0] == PACKAGE:
                        yield Import(module, alias.name, "", node.lineno)
            elif isinstance(node, ast.ImportFrom):
                base = node.module or ""
                if node.level:
                    parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                    base = ".".join([*parents, *filter(None, [node.module])])
                if base.partition(".")[0] != PACKAGE:
                    continue
                for alias in node.names:
                    inner = f"{base}.{alias.name}"
                    yield Import(module, inner if inner in known else base, alias.name, node.lineno)


def room(module: str) -> str:
    return f"{module}.".split(".")[1]


def test_imports_go_down():
    floor = {name: i for i, names in enumerate(FLOORS) for name in names}
    rooms = {room(module) for module in modules()}
    assert rooms == set(floor), "every room has a floor"
    for i, names in enumerate(FLOORS):
        print(f"{i + 1:2}  {', '.join(name or PACKAGE for name in names)}")
    wrong = [
        f"{i.source}:{i.line} imports {i.target}"
        for i in imports()
        if room(i.source) != room(i.target) and floor[room(i.target)] >= floor[room(i.source)]
    ]
    assert not wrong, "\n".join(wrong)


def test_no_modules_import_each_other():
    graph = nx.DiGraph((i.source, i.target) for i in imports() if i.source != i.target)
    circles = [sorted(found) for found in nx.strongly_connected_components(graph) if len(found) > 1]
    assert not circles


def test_no_module_reaches_a_private_name_of_another():
    found = list(imports())
    wrong = [
        f"{i.source}:{i.line} imports {i.name} of {i.target}"
        for i in found
        if i.name.startswith("_") and not i.name.startswith("__")
    ]
    for module, path in modules().items():
        others = {i.name: i.target for i in found if i.source == module and i.target.endswith(f".{i.name}")}
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Attribute) or not isinstance(node.value, ast.Name):
                continue
            if node.value.id in others and node.attr.startswith("_") and not node.attr.startswith("__"):
                wrong.append(f"{module}:{node.lineno} reads {others[node.value.id]}.{node.attr}")
    assert not wrong, "\n".join(wrong)
