"""A script that runs the smallest failing subgraph alone, before and after a pass, and prints the error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import fx

from ..torch_private.graphs import import_lines
from .mixture import Hybrid, Pair

__all__ = ["write_reproducer"]

_SCRIPT = '''"""Written by `tahf4 bisect`: {about}.

Runs what the graph computed before and after, from the inputs in {inputs!r}, and prints the relative error.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file

import tahf4_compiler  # defines the operators
from tahf4_compiler.ops.registry import kernels
{imports}
kernels()  # defines those of the backends


{before}


{after}


if __name__ == "__main__":
    inputs = load_file(Path(__file__).with_suffix(".safetensors"))
    inputs |= {scalars}
    with torch.no_grad():
        old = before(None, **{{name: inputs[name] for name in {before_names}}}).double()
        new = after(None, **{{name: inputs[name] for name in {after_names}}}).double()
    print(f"relative error {{((new - old).norm() / old.norm()).item():.6e}} (found: {error:.6e})")
'''


def write_reproducer(
    path: Path, hybrid: Hybrid, pair: Pair, about: str, error: float, modules: Sequence[str] = ()
) -> Path:
    """Write the script and its inputs.

    Args:
        path: of the script.
        hybrid: both graphs.
        pair: the value that fails.
        about: in words.
        error: that was found.
        modules: of plug-ins, imported where the subgraph calls an operator that is none of ours.

    Returns:
        ``path``.
    """
    after = _extract(pair.after, lambda node: hybrid.leaf(node) is not None)
    leaves = {leaf for node in after[1] if (leaf := hybrid.leaf(node)) is not None}
    shared = {hybrid.leaf(node) for node in hybrid.after.graph.nodes} - {None}
    before = _extract(pair.before, lambda node: node in leaves or node in shared, whole=pair.before in leaves)
    values: dict[str, Any] = {}
    for node in after[1]:
        twin = hybrid.leaf(node)
        values[f"new_{node.name}"] = hybrid.inputs(node) if twin is None else hybrid.value(twin)
    for node in before[1]:
        values[f"old_{node.name}"] = hybrid.value(node)
    tensors = {name: v.detach().clone().contiguous() for name, v in values.items() if isinstance(v, torch.Tensor)}
    scalars = {name: value for name, value in values.items() if name not in tensors}
    old_code, new_code = _source(before, "before", "old_"), _source(after, "after", "new_")
    foreign = {
        node.target.namespace
        for node in after[0].nodes
        if isinstance(node.target, torch._ops.OpOverload)
    } - {"aten", "prim", "prims", "tahf4", "tahf4_cpu", "tahf4_triton"}  # fmt: skip
    lines = [*dict.fromkeys(import_lines({**old_code[1], **new_code[1]})), *(f"import {m}" for m in modules if foreign)]
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path.with_suffix(".safetensors"))
    text = _SCRIPT.format(
        about=about,
        inputs=path.with_suffix(".safetensors").name,
        imports="\n".join(lines),
        error=error,
        before=old_code[0],
        after=new_code[0],
        scalars=repr(scalars),
        before_names=[f"old_{n.name}" for n in before[1]],
        after_names=[f"new_{n.name}" for n in after[1]],
    )
    path.write_text(text, encoding="utf-8")
    return path


def _extract(
    end: fx.Node, is_leaf: Callable[[fx.Node], bool], *, whole: bool = False
) -> tuple[fx.Graph, list[fx.Node], fx.Node]:
    """Return the nodes that a value needs down to leaves, as (graph, leaves, end)."""
    needed, inputs, waiting = {end}, set(), [end]
    if whole:
        return end.graph, [end], end
    while waiting:
        for source in waiting.pop().all_input_nodes:
            if source.op in ("placeholder", "get_attr") or is_leaf(source):
                inputs.add(source)
            elif source not in needed:
                needed.add(source)
                waiting.append(source)
    order = list(end.graph.nodes)
    graph = fx.Graph(owning_module=end.graph.owning_module)
    new: dict[fx.Node, fx.Node] = {node: graph.placeholder(node.name) for node in order if node in inputs}
    for node in order:
        if node in needed:
            new[node] = graph.node_copy(node, new.__getitem__)
    graph.output(new[end])
    return graph, [node for node in order if node in inputs], end


def _source(part: tuple[fx.Graph, list[fx.Node], fx.Node], name: str, prefix: str) -> tuple[str, dict[str, Any]]:
    """Return a function's text and the globals that it needs."""
    graph, inputs, end = part
    if inputs == [end]:
        return f"def {name}(self, {prefix}{end.name}):\n    return {prefix}{end.name}", {}
    renamed = fx.Graph(owning_module=graph.owning_module)
    new: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            new[node] = renamed.placeholder(f"{prefix}{node.name}")
        else:
            new[node] = renamed.node_copy(node, new.__getitem__)
    code = renamed.python_code("self")
    return code.src.strip().replace("def forward(", f"def {name}(", 1), dict(code.globals)
