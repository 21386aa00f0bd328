"""Pipelines by name, and the order of passes."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import re
from collections.abc import Sequence
from typing import Any

import networkx as nx

from ..errors import PipelineError
from ..options import Options
from ..plugins import entry_points
from .base import Pass, registered_passes

__all__ = ["build_pipeline", "default_passes", "named_pipeline", "order", "provenance"]


def default_passes() -> list[Pass]:
    """Return the default pipeline, in order."""
    return named_pipeline("default")


def named_pipeline(name: str) -> list[Pass]:
    """Return a pipeline that a package brings (entry points of the group ``tahf4.pipelines``).

    Raises:
        PipelineError: there is none of that name.
    """
    known = entry_points.load(entry_points.PIPELINES)
    if name not in known:
        raise PipelineError(f"no pipeline is named {name!r}; there are {', '.join(known) or 'none'}")
    if not isinstance(known[name], Sequence):
        raise PipelineError(f"the pipeline {name!r} is {known[name]!r}; expected a list of passes")
    return [_instance(item) for item in known[name]]


def build_pipeline(options: Options, passes: Sequence[Any] | None = None) -> list[Pass]:
    """Return the passes that a compilation runs, in order, with their options set.

    Args:
        options: names passes to add or leave out, and options of passes.
        passes: in place of the pipeline that the options name and of the registered ones, if not None;
            ``options.passes`` are added.

    Raises:
        PipelineError: something that is no pass, two of one name, an unknown name, or a cycle.
        OptionError: an option that a pass does not have.
    """
    base: list[Any] = list(passes) if passes is not None else [*named_pipeline(options.pipeline)]
    if passes is None and options.pipeline == "default":
        base += registered_passes()
    instances = [_instance(item) for item in (*base, *options.passes)]
    by_name: dict[str, Pass] = {}
    for item in instances:
        other = by_name.get(item.name)
        if other is not None and other != item:
            raise PipelineError(
                f"two passes are named {item.name!r}: {type(other).__qualname__} and {type(item).__qualname__}. "
                f"Give one another `name`, or let one replace the other with replaces={item.name!r} and a name of "
                "its own."
            )
        by_name[item.name] = item
    everything = set(by_name)
    for name in options.disable_passes:
        if name not in by_name:
            raise PipelineError(f"disable_passes names {name!r}; the pipeline has {', '.join(by_name)}")
        del by_name[name]
    for pass_name, option, value in options.pass_options:
        if pass_name not in everything:
            raise PipelineError(
                f"option {pass_name}.{option}: no pass is named {pass_name!r}; the pipeline has {', '.join(by_name)}"
            )
        if pass_name in by_name:
            by_name[pass_name] = by_name[pass_name].with_options({option: value})
    return order(list(by_name.values()), known=everything)


def provenance(options: Options) -> list[dict[str, Any]]:
    """Return what there is to know about the passes that a compilation runs, as JSON can hold it, in order.

    Args:
        options: those that name a pass which is not in the default pipeline are left out.

    Returns:
        For each pass its name, class and options; for a plug-in's also the distribution that it comes from.
    """
    present: list[Any] = [*default_passes(), *registered_passes(), *options.passes]
    known = {_instance(item).name for item in present}
    fitting = dataclasses.replace(
        options,
        pass_options=tuple(o for o in options.pass_options if o[0] in known),
        disable_passes=tuple(name for name in options.disable_passes if name in known),
    )
    return [
        {
            "name": item.name,
            "class": f"{type(item).__module__}.{type(item).__qualname__}",
            "options": {name: plain(value) for name, value in item.options().items()},
            **_distribution(type(item).__module__.partition(".")[0]),
        }
        for item in build_pipeline(fitting)
    ]


def _distribution(package: str) -> dict[str, str]:
    if package == "tahf4_compiler":
        return {}
    found = importlib.metadata.packages_distributions().get(package, [])
    return {"distribution": f"{found[0]} {importlib.metadata.version(found[0])}"} if found else {}


def plain(value: Any) -> Any:
    """Return a value as JSON can hold it."""
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return value if value is None or isinstance(value, bool | int | float | str) else repr(value)


def _instance(item: Any) -> Pass:
    if isinstance(item, type) and issubclass(item, Pass):
        item = _made(item)
    if isinstance(item, Pass) and not re.fullmatch(r"[\w-]+", str(item.name or "")):
        raise PipelineError(
            f"a pass is named {item.name!r}; expected letters, digits, _ and -: it stands in options and names of files"
        )
    if isinstance(item, Pass):
        return item
    raise PipelineError(f"{item!r} is not a pass; expected a subclass of tahf4_compiler.Pass or an instance of one")


def _made(cls: type[Pass]) -> Pass:
    try:
        return cls()
    except TypeError as error:
        raise PipelineError(
            f"pass {cls.name!r} cannot be made without arguments: {error}. Give each option a default, or add an "
            "instance of the pass."
        ) from error


def order(passes: Sequence[Pass], known: set[str] | None = None) -> list[Pass]:
    """Sort passes by their ``after`` and ``before``; ties keep the order they are given in.

    Args:
        passes: of distinct names.
        known: further names that ``after`` and ``before`` may mention (passes left out).

    Raises:
        PipelineError: a name that no pass has, or a cycle.
    """
    by_name = {p.name: p for p in passes}
    replaced = {p.replaces: p.name for p in passes if p.replaces}
    names = set(by_name) | set(replaced) | (known or set())
    position = {p.name: i for i, p in enumerate(passes)}
    graph = nx.DiGraph()
    graph.add_nodes_from(p.name for p in passes if p.name not in replaced)

    for item in passes:
        if item.replaces and item.replaces not in by_name and item.replaces not in (known or ()):
            raise PipelineError(_unknown(item, "replaces", item.replaces, by_name))
        if item.name in replaced:
            continue
        # A pass that stands in for another inherits its place.
        stand_in = by_name.get(item.replaces or "")
        for relation in ("after", "before"):
            if not isinstance(names_given := getattr(item, relation), tuple | list):
                raise PipelineError(f"pass {item.name!r} says {relation}={names_given!r}; expected names of passes")
            inherited = getattr(stand_in, relation) if stand_in is not None else ()
            for other in (*getattr(item, relation), *inherited):
                if other not in names:
                    raise PipelineError(_unknown(item, relation, other, by_name))
                other = replaced.get(other, other)
                if other in graph and other != item.name:
                    graph.add_edge(*((other, item.name) if relation == "after" else (item.name, other)))
        if stand_in is not None:
            position[item.name] = position[stand_in.name]
    try:
        return [by_name[name] for name in nx.lexicographical_topological_sort(graph, key=position.__getitem__)]
    except nx.NetworkXUnfeasible as error:
        cycle = " -> ".join(edge[0] for edge in nx.find_cycle(graph))
        raise PipelineError(
            f"the passes cannot be put in an order: {cycle} -> (again). Drop one `after` or `before`."
        ) from error


def _unknown(item: Pass, relation: str, other: str, by_name: dict[str, Pass]) -> str:
    return f"pass {item.name!r} says {relation}={other!r}, but no pass has that name; there are {', '.join(by_name)}"
