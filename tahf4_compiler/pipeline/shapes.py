"""Shapes and dtypes of what a pass added or changed, from the operators' fake kernels.

Operators that are called many times on values of the same shapes (the blocks of a transformer) are asked once.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from ..errors import PassError
from ..graph.inputs import INPUT, GraphInput, PackedInput, PackedWeight
from ..graph.nodes import LINEAR, mutates, node_words, tensor_meta
from ..torch_private.tensors import python_kernels
from ..weights.binding import packed_fake
from .context import Context

__all__ = ["propagate"]


def propagate(
    graph_module: fx.GraphModule,
    context: Context,
    pass_name: str,
    before: Mapping[fx.Node, tuple[Any, ...]] | None = None,
) -> None:
    """Fill in ``meta["val"]`` for new nodes, for nodes that call something else, and for what changes with them.

    Args:
        graph_module: whose placeholders all have a value, except new packed inputs.
        context: has the fake mode.
        pass_name: for the error message.
        before: target, arguments and keyword arguments of each node before the pass.

    Raises:
        PassError: a node cannot be computed from its inputs' shapes.
    """
    by_index = {
        node.meta[INPUT].index: node.meta.get("val")
        for node in graph_module.graph.nodes
        if node.op == "placeholder" and isinstance(node.meta.get(INPUT), GraphInput)
    }
    changed: set[fx.Node] = set()
    for node in graph_module.graph.nodes:
        if node.op == "placeholder" and "val" not in node.meta:
            source = node.meta.get(INPUT)
            if not isinstance(source, PackedInput):
                raise PassError(
                    f"pass {pass_name!r} added the input {node.name!r} without a PackedInput in node.meta[{INPUT!r}]"
                )
            weights = [by_index.get(i, context.inputs[i]) for i in source.positions]
            try:
                with context.fake_mode:
                    # A weight's sizes are not symbolic.
                    fakes = [
                        w if hasattr(w, "fake_mode") else context.fake_mode.from_tensor(w, static_shapes=True)
                        for w in weights
                    ]
                    node.meta["val"] = _packed(source, fakes, context.sizes)
            except Exception as error:
                raise PassError(
                    f"pass {pass_name!r} added the input {node.name!r}, whose shape cannot be found: "
                    f"{type(error).__name__}: {error}"
                ) from error
        elif node.op == "get_attr" and "val" not in node.meta:
            held = operator.attrgetter(str(node.target))(graph_module)
            if isinstance(held, torch.Tensor):
                node.meta["val"] = context.fake_mode.from_tensor(held, static_shapes=True)
        elif node.op == "call_function" and (
            "val" not in node.meta
            or not changed.isdisjoint(node.all_input_nodes)
            or (before is not None and not _same_call(node, before.get(node)))
        ):
            old = node.meta.get("val")
            new = _value(node, context, pass_name)
            node.meta["val"] = new
            if old is None or _leaves(old) != _leaves(new):
                changed.add(node)


def _same_call(node: fx.Node, before: tuple[Any, ...] | None) -> bool:
    """Whether a node calls what it called before a pass, on values of the same shapes and dtypes; no new one does."""
    if before is None or node.target is not before[0] or node.meta.get("val") is not before[3]:
        return False
    if node.args is before[1] and node.kwargs is before[2]:
        return True
    old, old_spec = torch.utils._pytree.tree_flatten(before[1:3])
    new, new_spec = torch.utils._pytree.tree_flatten((node.args, node.kwargs))
    return old_spec == new_spec and all(map(_same_argument, old, new))


def _same_argument(old: Any, new: Any) -> bool:
    if old is new:
        return True
    if isinstance(old, fx.Node) and isinstance(new, fx.Node):
        return str(_full(old.meta.get("val"))) == str(_full(new.meta.get("val")))
    plain = (bool, int, float, str, torch.dtype, torch.device)
    return type(old) is type(new) and isinstance(old, plain) and old == new


def _packed(source: PackedInput, weights: list[Any], results: dict[Any, Any]) -> torch.Tensor:
    """Return the value of a packed input, whose shape depends on those of its weights, and not on which they are."""
    how, sizes = source.weight, tuple(map(_Size.of, weights))
    assert isinstance(how, PackedWeight), "what a model holds packed is an input of its graph already"
    key = (source.part, how.format, how.hadamard_block, how.rank, sizes)
    if key in results:
        size: _Size = results[key]
        return size.empty()
    value = packed_fake(source, weights)
    if None not in sizes and (made := _Size.of(value)) is not None:
        results[key] = made
    return value


def _leaves(value: Any) -> list[Any]:
    return [_full(leaf) for leaf in torch.utils._pytree.tree_leaves(value)]


def _full(value: Any) -> Any:
    meta = tensor_meta(value)
    if meta is None or value.layout != torch.strided:
        return meta if meta is not None else str(value)
    return (*meta, tuple(str(s) for s in value.stride()))


def _value(node: fx.Node, context: Context, pass_name: str) -> Any:
    def value(arg: fx.Node) -> Any:
        if "val" in arg.meta:
            return arg.meta["val"]
        return None

    args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
    if mutates(node) and "val" in node.meta:
        return node.meta["val"]  # running it again would change its inputs' fake tensors
    if node.target is LINEAR:
        _check_dtypes(node, [v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)], pass_name)
    key = _call_key(node, args, kwargs)
    try:
        if node.target is operator.getitem and type(args[0]) in (tuple, list):
            return operator.getitem(*args)
        # As a lowered graph runs; PyTorch 2.11 cannot compute symbolic sizes of a linear without its Python dispatcher.
        with python_kernels(), context.fake_mode, torch.no_grad():
            if key is not None and key in context.sizes:
                return torch.utils._pytree.tree_map(lambda size: size.empty(), context.sizes[key])
            value = node.target(*args, **kwargs)  # type: ignore[operator]
    except Exception as error:
        raise PassError(
            f"pass {pass_name!r} left node {node_words(node)} that cannot be computed: "
            f"{type(error).__name__}: {error}"
        ) from error
    if key is not None and (sizes := _sizes(value)) is not None:
        context.sizes[key] = sizes
    return value


def _check_dtypes(node: fx.Node, operands: list[torch.Tensor], pass_name: str) -> None:
    """Raise :class:`PassError` if a linear cannot run: without values, nothing looks at its operands' dtypes."""
    dtypes = [str(value.dtype).removeprefix("torch.") for value in operands]
    if len(set(dtypes)) < 2 or any("autocast" in str(other.target) for other in node.graph.nodes):
        return
    raise PassError(
        f"pass {pass_name!r} left node {node_words(node)} that cannot be computed: its operands are "
        f"{', '.join(dtypes)}; expected one dtype. Cast what the pass added to the dtype of what it stands for."
    )


@dataclass(frozen=True)
class _Size:
    """Everything about a plain fake tensor."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, value: torch.Tensor) -> _Size | None:
        """Return it for a tensor that has nothing else: no symbolic size, no known value."""
        plain = type(value) is FakeTensor and value.layout == torch.strided and value.constant is None
        if not plain or value.is_conj() or value.is_neg():
            return None
        shape, stride = tuple(value.shape), tuple(value.stride())
        if not all(type(size) is int for size in (*shape, *stride, value.storage_offset())):
            return None
        return cls(shape, stride, value.dtype, value.device)

    def empty(self) -> torch.Tensor:
        """Return a new tensor like it, under the fake mode at hand."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)


def _call_key(node: fx.Node, args: Any, kwargs: Any) -> Any:
    """Return what the shapes of a result depend on; None where another call could give something else."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or any(
        part.alias_info is not None for part in (*target._schema.arguments, *target._schema.returns)
    ):
        return None
    key = _argument_key((args, kwargs))
    return None if key is None else (target, key)


def _argument_key(value: Any) -> Any:
    if isinstance(value, list | tuple):
        parts = tuple(map(_argument_key, value))
        return None if None in parts else parts
    if isinstance(value, dict):
        return _argument_key([part for item in value.items() for part in item])
    if isinstance(value, torch.Tensor):
        size = _Size.of(value)
        return None if size is None else (size, value.storage_offset())
    return (type(value), value) if type(value) in _PLAIN else None


def _sizes(value: Any) -> Any:
    """Return a result with the sizes of its tensors in their places, or None."""
    leaves, spec = torch.utils._pytree.tree_flatten(value)
    if not all(isinstance(leaf, torch.Tensor) and leaf.storage_offset() == 0 for leaf in leaves):
        return None
    sizes = [_Size.of(leaf) for leaf in leaves]
    return None if None in sizes else torch.utils._pytree.tree_unflatten(sizes, spec)


_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
