"""What the sources of the package import from each other, read without running them."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import NamedTuple

PACKAGE = "tahf4_compiler"
_NAMED_TUPLE = ("_asdict", "_fields", "_make", "_replace")
"""Public, whatever they are called."""


class Source:
    """A module as it is written."""

    def __init__(self, text: str, package: bool = False) -> None:
        self.text, self.package = text, package

    @cached_property
    def nodes(self) -> list[ast.AST]:
        """All nodes, inside functions too, and what is for types alone."""
        return list(ast.walk(ast.parse(self.text)))


class Import(NamedTuple):
    """One name that a module imports from a module of the package; no name for the module itself."""

    source: str
    target: str
    name: str
    line: int


def imports(sources: Mapping[str, Source]) -> Iterator[Import]:
    """Yield every import of the package's own modules.

    Raises:
        AssertionError: one is of a computed name, so that nobody can tell of what.
    """
    for module in sources:
        yield from _Reader(sources, module).imports()


def private_reads(sources: Mapping[str, Source]) -> Iterator[str]:
    """Yield where a module reaches a private name of another, or of what it imports from another."""
    for module in sources:
        yield from _Reader(sources, module).private_reads()


class _Reader:
    def __init__(self, sources: Mapping[str, Source], module: str) -> None:
        self.sources, self.module, self.source = sources, module, sources[module]
        self.package = module if self.source.package else module.rpartition(".")[0]
        self.importers = {"__import__", "import_module"}
        for node in self.source.nodes:
            if isinstance(node, ast.ImportFrom) and node.module == "importlib":
                self.importers |= {a.asname or a.name for a in node.names if a.name in self.importers}

    def imports(self) -> Iterator[Import]:
        for node in self.source.nodes:
            if isinstance(node, ast.Import):
                for alias in node.names:
                    if _own(alias.name):
                        yield Import(self.module, alias.name, "", node.lineno)
            elif isinstance(node, ast.ImportFrom):
                base = self.base(node)
                for alias in node.names if _own(base) else ():
                    yield Import(self.module, self.inner(base, alias.name) or base, alias.name, node.lineno)
            elif isinstance(node, ast.Call) and self.is_import(node) and _own(target := self.called(node)):
                yield Import(self.module, target, "", node.lineno)

    def private_reads(self) -> Iterator[str]:
        for found in self.imports():
            if _private(found.name):
                yield f"{self.module}:{found.line} imports {found.name} of {found.target}"
        places = self.places()
        for node in self.source.nodes:
            if isinstance(node, ast.Attribute):
                owner, name = node.value, node.attr
            elif isinstance(node, ast.Call) and _is_getattr(node):
                owner, name = node.args[0], ast.literal_eval(node.args[1])
            else:
                continue
            if _private(name) and (place := self.place(owner, places)) is not None:
                yield f"{self.module}:{node.lineno} reads {place}.{name}"

    def places(self) -> dict[str, str]:
        """Return what local names stand for: modules of the package, and what is imported from them."""
        found: dict[str, str] = {}
        for node in self.source.nodes:
            if isinstance(node, ast.Import):
                for alias in node.names:
                    if _own(alias.name):
                        found[alias.asname or PACKAGE] = alias.name if alias.asname else PACKAGE
            elif isinstance(node, ast.ImportFrom) and _own(base := self.base(node)):
                found |= {alias.asname or alias.name: f"{base}.{alias.name}" for alias in node.names}
        for node in self.source.nodes:  # s = store
            if isinstance(node, ast.Assign) and (place := self.place(node.value, found)) in self.sources:
                found |= {goal.id: place for goal in node.targets if isinstance(goal, ast.Name)}
        return found

    def place(self, expression: ast.expr, places: Mapping[str, str]) -> str | None:
        """Return what an expression stands for, if that is a module of the package or was imported from one."""
        if isinstance(expression, ast.Name):
            return places.get(expression.id)
        if isinstance(expression, ast.Call) and self.is_import(expression):
            return self.called(expression)
        if isinstance(expression, ast.Attribute) and (base := self.place(expression.value, places)) is not None:
            return self.inner(base, expression.attr)
        return None

    def inner(self, base: str, name: str) -> str | None:
        """Return the module of a name in a package, or None."""
        inner = f"{base}.{name}"
        return inner if any(known == inner or known.startswith(f"{inner}.") for known in self.sources) else None

    def base(self, node: ast.ImportFrom) -> str:
        """Return the module that names are imported from."""
        return _resolved("." * node.level + (node.module or ""), self.package)

    def is_import(self, call: ast.Call) -> bool:
        function = call.func
        if isinstance(function, ast.Attribute):
            return function.attr in ("import_module", "__import__")
        return isinstance(function, ast.Name) and function.id in self.importers

    def called(self, call: ast.Call) -> str:
        """Return the module that a call imports."""
        given = dict(zip(("name", "package"), call.args, strict=False)) | {k.arg: k.value for k in call.keywords}
        name, package = (self.text(given.get(key)) for key in ("name", "package"))
        known = name is not None and (package is not None or not name.startswith("."))
        assert known, f"{self.module}:{call.lineno} imports a computed name: write an import statement"
        assert name is not None
        return _resolved(name, package or "")

    def text(self, expression: ast.expr | None) -> str | None:
        if isinstance(expression, ast.Name):
            return {"__name__": self.module, "__package__": self.package}.get(expression.id)
        return expression.value if isinstance(expression, ast.Constant) and isinstance(expression.value, str) else None


def _resolved(name: str, package: str) -> str:
    """Return a name as it is from outside: each dot after the first goes up one package."""
    rest = name.lstrip(".")
    level = len(name) - len(rest)
    parents = package.split(".")[: len(package.split(".")) - level + 1] if level else []
    return ".".join(filter(None, [*parents, rest]))


def _own(name: str) -> bool:
    return name.partition(".")[0] == PACKAGE


def _private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in _NAMED_TUPLE


def _is_getattr(call: ast.Call) -> bool:
    named = isinstance(call.func, ast.Name) and call.func.id == "getattr" and len(call.args) > 1
    return named and isinstance(call.args[1], ast.Constant) and isinstance(call.args[1].value, str)
