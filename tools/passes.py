"""``tahf4 passes``: the pipeline as it runs."""

from __future__ import annotations

import inspect
import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..pipeline.base import Pass

__all__ = ["describe", "passes"]


def passes(
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Whole descriptions, with graphs before and after.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the passes that a compilation runs, in order, with their options.

    Passes of installed plug-ins (entry-point group tahf4.passes) are among them. An option is set with
    torch.compile(model, backend="tahf4", options={"PASS.OPTION": VALUE}); a pass is left out with
    options={"disable_passes": ["PASS"]}.
    """
    from ..options import Options
    from ..pipeline.order import build_pipeline

    described = [describe(item) for item in build_pipeline(Options())]
    if as_json:
        typer.echo(json.dumps(described, indent=1))
    elif verbose:
        typer.echo("\n\n".join(_page(i, entry) for i, entry in enumerate(described, 1)))
    else:
        _print_list(described)


def describe(item: Pass) -> dict[str, Any]:
    """Return what there is to know about a pass."""
    from ..pipeline.order import plain

    text = inspect.getdoc(type(item)) or ""
    return {
        "name": item.name,
        "summary": text.partition("\n")[0],
        "description": text,
        "after": list(item.after),
        "before": list(item.before),
        "replaces": item.replaces,
        "options": {name: plain(value) for name, value in item.options().items()},
        "module": type(item).__module__,
    }


def _options(entry: dict[str, Any]) -> list[tuple[str, str, Any]]:
    return [(entry["name"], option, value) for option, value in entry["options"].items()]


def _order(entry: dict[str, Any]) -> list[str]:
    relations = [relation for relation in ("after", "before") if entry[relation]]
    return [f"runs {relation} {', '.join(entry[relation])}" for relation in relations] + (
        [f"replaces {entry['replaces']}"] if entry["replaces"] else []
    )


def _page(number: int, entry: dict[str, Any]) -> str:
    head = [f"{number}. {entry['name']}  ({entry['module']})", *(f"   {line}" for line in _details(entry))]
    return "\n".join([*head, "", *(f"   {line}".rstrip() for line in entry["description"].splitlines())])


def _details(entry: dict[str, Any]) -> list[str]:
    return [*_order(entry), *(f"option {name}.{key} = {value!r}" for name, key, value in _options(entry))]


def _print_list(described: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    console = Console()
    for i, entry in enumerate(described, 1):
        title = Text(f"{i:2}. ").append(entry["name"], "bold").append(f"  {entry['module']}", "dim")
        console.print(title, soft_wrap=True)
        console.print(Padding(Text(entry["summary"]), (0, 0, 0, 4)))
        for line in _details(entry):
            console.print(Padding(Text(line, "cyan"), (0, 0, 0, 4)))
