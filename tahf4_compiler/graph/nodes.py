"""What the placeholders of a captured graph stand for, and small helpers that passes share.

A graph is a ``torch.fx.GraphModule`` of pre-dispatch ATen operators. Weights are inputs of it: each
placeholder carries a :class:`GraphInput` or a :class:`PackedInput` in ``node.meta[INPUT]``, so a rewritten
graph says by itself what it must be called with.
"""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Container, Iterator
from typing import Any

import torch
from torch import fx

from .inputs import BESIDE, DECISION, INPUT, GraphInput, PackedInput

__all__ = [
    "input_roots",
    "is_product",
    "is_view",
    "is_written",
    "linear_path",
    "linears",
    "module_classes",
    "module_path",
    "mutates",
    "node_arg",
    "node_words",
    "product_weights",
    "size_hint",
    "tensor_meta",
    "weight_input",
]

LINEAR = torch.ops.aten.linear.default

_MATMULS = (
    torch.ops.aten.matmul.default,
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.baddbmm.default,
)

_CASTS = (
    torch.ops.aten.to.dtype,
    torch.ops.aten.to.dtype_layout,
    torch.ops.aten.to.device,
    torch.ops.aten._to_copy.default,
    torch.ops.aten.detach.default,
    torch.ops.aten.alias.default,
)


def node_arg(node: fx.Node, index: int) -> fx.Node:
    """Return an argument that is a node."""
    arg = node.args[index]
    if not isinstance(arg, fx.Node):
        raise TypeError(f"argument {index} of {node.name} is {arg!r}; expected a node")
    return arg


def node_words(node: fx.Node) -> str:
    """Name a node for an error message: its name, its operator and the module that it was called in."""
    modules = module_classes(node)
    where = next(reversed(modules), "") if modules else ""
    return f"{node.name!r} ({node.target if node.op == 'call_function' else node.op}, in {where or 'no module'})"


def weight_input(node: fx.Node) -> fx.Node | None:
    """Return the parameter placeholder that ``node`` is, or is a cast of; None for anything computed."""
    while node.op == "call_function" and node.target in _CASTS:
        if not _keeps_values(node):
            return None
        node = node_arg(node, 0)
    source = node.meta.get(INPUT)
    if isinstance(source, GraphInput) and source.kind == "parameter":
        return node
    return None


def _keeps_values(node: fx.Node) -> bool:
    """Whether a cast stays among floating types of 16 bits and more, on one device."""
    before, after = node_arg(node, 0).meta.get("val"), node.meta.get("val")
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return False
    wide = all(t.dtype.is_floating_point and t.element_size() >= 2 for t in (before, after))
    return wide and before.device == after.device


def is_view(node: fx.Node) -> bool:
    """Whether a node's result shares memory with its first argument."""
    return isinstance(node.target, torch._ops.OpOverload) and any(
        result.alias_info is not None and not result.alias_info.is_write for result in node.target._schema.returns
    )


def input_roots(node: fx.Node, *, views: bool = True) -> set[fx.Node]:
    """Return what a node's arguments are casts of, or (``views``) views of; an argument that is neither is its own."""
    return {_root(source, views) for source in node.all_input_nodes}


def _root(node: fx.Node, views: bool) -> fx.Node:
    while node.op == "call_function" and (node.target in _CASTS or (views and is_view(node))):
        node = node_arg(node, 0)
    return node


def product_weights(node: fx.Node) -> set[fx.Node]:
    """Return what holds the weights of a linear, or of what took the place of one: inputs, packed or not."""
    if node.target is LINEAR:
        weight = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
        return {_root(weight, False)} if isinstance(weight, fx.Node) else set()
    wanted = {decision.weight_index for decision in node.meta.get(DECISION, ())}
    found = set()
    for root in input_roots(node):
        source = root.meta.get(INPUT)
        if isinstance(source, PackedInput):
            held = source.part not in BESIDE and not wanted.isdisjoint(source.weights)
        else:
            held = isinstance(source, GraphInput) and source.index in wanted
        if held:
            found.add(root)
    return found


def is_product(node: fx.Node, weights: Container[fx.Node]) -> bool:
    """Whether a node computes the product with one of some weights.

    Args:
        node: any node.
        weights: nodes that hold the weights, packed or not.

    Returns:
        True for ``aten.linear`` and matrix products of ATen that read such a weight, and for operators of this
        compiler and of plug-ins that do.
    """
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    if node.target.namespace == "aten" and node.target is not LINEAR and node.target not in _MATMULS:
        return False
    return any(root in weights for root in input_roots(node, views=node.target is not LINEAR))


def may_share(user: fx.Node, node: fx.Node) -> bool:
    """Whether a user's result may share memory with a node: a view of it, one of its parts, or ``type_as``."""
    shares = is_view(user) or user.target in (operator.getitem, torch.ops.aten.type_as.default)
    return shares and bool(user.args) and user.args[0] is node


def is_written(node: fx.Node) -> bool:
    """Whether the graph writes to a tensor, directly or through what shares its memory."""
    return any(_writes(user, node) or (may_share(user, node) and is_written(user)) for user in node.users)


def _writes(user: fx.Node, node: fx.Node) -> bool:
    """Whether a node may write to one of the values that it reads; an operator's schema says to which ones."""
    if not mutates(user) or not isinstance(user.target, torch._ops.OpOverload):
        return mutates(user)
    arguments = user.target._schema.arguments
    given = [
        *zip(arguments, user.args, strict=False),
        *((a, user.kwargs[a.name]) for a in arguments if a.name in user.kwargs),
    ]
    return any(
        argument.alias_info is not None
        and argument.alias_info.is_write
        and node in torch.utils._pytree.tree_leaves(value)
        for argument, value in given
    )


def linears(graph: fx.Graph) -> Iterator[fx.Node]:
    """Yield the ``aten.linear`` nodes in execution order."""
    yield from (node for node in graph.nodes if node.op == "call_function" and node.target is LINEAR)


@functools.lru_cache(maxsize=1 << 16)
def module_path(expression: str) -> str:
    """Return the dotted path below the root module for a Dynamo source or an ``nn_module_stack`` path.

    ``L['self']._modules['blocks']._modules['0']._parameters['weight']`` gives ``blocks.0.weight``;
    a path that torch.export wrote (``blocks.0``) is returned as it is.
    """
    rest = re.sub(r"^[LG]\['[^']*'\]", "", expression)
    parts = [a or b or c for a, b, c in re.findall(r"\['([^']*)'\]|\[(\d+)\]|\.?([A-Za-z0-9_]+)", rest)]
    hidden = {"__dict__", "_modules", "_parameters", "_buffers", "_orig_mod"}
    return ".".join(part for part in parts if part not in hidden)


def linear_path(parameter: str) -> str:
    """Return the module path of a linear from the name of its weight, packed or not."""
    return parameter.removesuffix(".weight").removesuffix(".weight_codes")


def root_expression(expression: str) -> str:
    """Return the variable that a Dynamo source starts from (``L['self']``), or an empty string."""
    match = re.match(r"^[LG]\['[^']*'\]", expression)
    return match.group(0) if match else ""


def module_classes(node: fx.Node) -> dict[str, str]:
    """Return ``path -> class name`` for every module that a node was called in, outermost first."""
    found: dict[str, str] = {}
    for path, cls in (node.meta.get("nn_module_stack") or {}).values():
        name = cls if isinstance(cls, str) else f"{cls.__module__}.{cls.__qualname__}"
        if inner := module_path(path):
            found[inner] = name
    return found


def mutates(node: fx.Node) -> bool:
    """Whether a node may write to one of its inputs or change a global state (autocast, gradients)."""
    if node.op != "call_function":
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    module = getattr(node.target, "__module__", "") or ""
    return not (module.startswith(("operator", "_operator", "math")) or node.target in _PURE)


_PURE = (torch.sym_max, torch.sym_min, torch.sym_float, torch.sym_int, torch.sym_not, torch.sym_ite)


UNBACKED_SIZE = 8192
"""Stands for a size that no example has, such as the length of ``nonzero()``; Inductor takes the same."""


def size_hint(value: Any) -> int:
    """Return an integer for a size that may be symbolic, to choose by: it is no fact about the size.

    That is the size of the example for a dynamic one, and :data:`UNBACKED_SIZE` where it depends on values.
    """
    if isinstance(value, torch.SymInt):
        hint = value.node.hint
        return int(hint) if hint is not None else UNBACKED_SIZE
    return int(value)


def tensor_meta(value: Any) -> tuple[Any, ...] | None:
    """Return what must not change about a graph's output: shape, dtype and device; None for no tensor."""
    if isinstance(value, torch.Tensor):
        return tuple(str(size) for size in value.shape), value.dtype, value.device
    return None
