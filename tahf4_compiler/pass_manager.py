"""Runs passes one after the other, and does between them what every pass needs.

After each pass the graph is linted, shapes and dtypes of changed nodes are propagated again, the outputs are
compared with what they were, matches and time are recorded, and the readable graph is kept for the dump.
With ``verify=True`` the graph also runs before and after on the example inputs.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from .binding import Binding, packed_fake
from .errors import PassError, Tahf4Error
from .graph import INPUT, GraphInput, PackedInput, is_written, mutates, tensor_meta
from .packing import store
from .pass_base import Context, Pass, PassResult

__all__ = ["PassManager", "PassRecord"]

log = logging.getLogger("tahf4_compiler.passes")


@dataclass
class PassRecord:
    """What one pass did.

    Attributes:
        name: of the pass; ``"captured"`` for the graph before the first one.
        matches: how often its pattern matched.
        modified: whether it changed the graph.
        seconds: it took.
        nodes: of the graph after it.
        readable: the graph after it as Python text.
        error: relative error of the outputs that this pass added (``verify=True`` only), 0 is none.
        total_error: the same against the captured graph.
    """

    name: str
    matches: int = 0
    modified: bool = False
    seconds: float = 0.0
    nodes: int = 0
    readable: str = field(default="", repr=False)
    error: float | None = None
    total_error: float | None = None


class PassManager:
    """Runs an ordered list of passes over a graph.

    Attributes:
        passes: in execution order.
        keep_text: whether records hold the readable graphs.
        on_graph: called with a stage's name and its graph: ``"captured"``, then after each pass.
    """

    def __init__(
        self,
        passes: Sequence[Pass],
        *,
        keep_text: bool = False,
        on_graph: Callable[[str, fx.GraphModule], None] | None = None,
    ) -> None:
        """Take passes in their final order."""
        self.passes = list(passes)
        self.keep_text = keep_text
        self.on_graph = on_graph

    def run(self, graph_module: fx.GraphModule, context: Context) -> tuple[fx.GraphModule, list[PassRecord]]:
        """Run every pass.

        Args:
            graph_module: the captured graph; it is changed in place.
            context: shared by the passes.

        Returns:
            The last graph and one record for the captured graph and each pass.

        Raises:
            PassError: a pass raised, broke a condition of its own, or left a graph that breaks the contract
                (dangling use, lost input, outputs of another shape or dtype). The message names the pass.
        """
        records = [self._record("captured", graph_module)]
        reference = previous = self._outputs(graph_module, context) if context.options.verify else None
        for item in self.passes:
            start = time.perf_counter()
            context.matches, context.current = 0, item.name
            before = _interface(graph_module)
            result = self._call(item, graph_module, context)
            graph_module = result.graph_module
            self._check(item, graph_module, context, before)
            record = self._record(item.name, graph_module)
            record.matches, record.modified = context.matches, result.modified
            record.seconds = time.perf_counter() - start
            if reference is not None:
                outputs = self._outputs(graph_module, context)
                record.error = relative_error(previous, outputs)
                record.total_error = relative_error(reference, outputs)
                previous = outputs
            records.append(record)
            logging.getLogger(f"{log.name}.{item.name}").info(
                "%s: %d matches, %d nodes, %.3f s", item.name, record.matches, record.nodes, record.seconds
            )
        graph_module.recompile()
        return graph_module, records

    def _record(self, name: str, graph_module: fx.GraphModule) -> PassRecord:
        text = readable(graph_module) if self.keep_text else ""
        if self.on_graph is not None:
            self.on_graph(name, graph_module)
        return PassRecord(name, nodes=len(graph_module.graph.nodes), readable=text)

    def _call(self, item: Pass, graph_module: fx.GraphModule, context: Context) -> PassResult:
        _conditions(item, "requires", graph_module, context)
        try:
            result = item(graph_module, context)
        except Tahf4Error:
            raise
        except Exception as error:
            raise PassError(
                f"pass {item.name!r} ({type(item).__module__}.{type(item).__qualname__}) failed: "
                f"{type(error).__name__}: {error}. Leave it out with options={{'disable_passes': [{item.name!r}]}}."
            ) from error
        if not isinstance(result, PassResult):
            raise PassError(
                f"pass {item.name!r} returned {type(result).__name__}; expected PassResult(graph_module, modified)"
            )
        _conditions(item, "ensures", result.graph_module, context)
        return result

    def _check(self, item: Pass, graph_module: fx.GraphModule, context: Context, before: _Interface) -> None:
        try:
            graph_module.graph.lint()
        except Exception as error:
            raise PassError(f"pass {item.name!r} left a broken graph: {error}") from error
        propagate(graph_module, context, item.name)
        after = _interface(graph_module)
        lost = sorted(before.inputs - after.inputs)
        if lost:
            raise PassError(
                f"pass {item.name!r} removed the graph's inputs {', '.join(lost)}. Inputs other than parameters must "
                "stay, used or not."
            )
        if before.outputs != after.outputs:
            changed = [
                f"output {i}: {_words(old)} became {_words(new)}"
                for i, (old, new) in enumerate(zip(before.outputs, after.outputs, strict=False))
                if old != new
            ] or [f"{len(before.outputs)} outputs became {len(after.outputs)}"]
            raise PassError(f"pass {item.name!r} changed the graph's outputs: {'; '.join(changed)}")

    def _outputs(self, graph_module: fx.GraphModule, context: Context) -> list[Any]:
        """Run a graph on the example inputs; parameters are used as they are unless it writes to them."""
        kinds = {
            node.meta[INPUT].index: "written" if is_written(node) else node.meta[INPUT].kind
            for node in graph_module.graph.nodes
            if node.op == "placeholder" and isinstance(node.meta[INPUT], GraphInput)
        }

        def copied(index: int) -> bool:
            return kinds.get(index, "parameter") != "parameter"

        args = [
            value.clone() if isinstance(value, torch.Tensor) and copied(i) else _concrete(value)
            for i, value in enumerate(context.inputs)
        ]
        from torch._subclasses.fake_tensor import unset_fake_temporarily

        with unset_fake_temporarily(), torch.no_grad():
            bound = Binding(graph_module)(args, store, context.options.weight_check)
            flat = fx.Interpreter(graph_module).run(*bound)
        return [value for value in torch.utils._pytree.tree_leaves(flat) if isinstance(value, torch.Tensor)]


@dataclass(frozen=True)
class _Interface:
    inputs: frozenset[str]
    outputs: tuple[Any, ...]


def _interface(graph_module: fx.GraphModule) -> _Interface:
    inputs = frozenset(
        node.name
        for node in graph_module.graph.nodes
        if node.op == "placeholder"
        and isinstance(source := node.meta.get(INPUT), GraphInput)
        and source.kind != "parameter"
    )
    (output,) = graph_module.graph.find_nodes(op="output")
    leaves = torch.utils._pytree.tree_leaves(output.args[0])
    values = (leaf.meta.get("val") if isinstance(leaf, fx.Node) else leaf for leaf in leaves)
    return _Interface(inputs, tuple(tensor_meta(value) for value in values))


def _words(meta: Any) -> str:
    if meta is None:
        return "no tensor"
    shape, dtype, device = meta
    return f"{str(dtype).removeprefix('torch.')}[{', '.join(shape)}] on {device}"


def _concrete(value: Any) -> Any:
    return value.node.hint if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool) else value


def _conditions(item: Pass, which: str, graph_module: fx.GraphModule, context: Context) -> None:
    for condition in getattr(item, which):
        wrong = condition(graph_module, context)
        if wrong:
            verb = "needs" if which == "requires" else "promises"
            raise PassError(f"pass {item.name!r} {verb} {getattr(condition, '__name__', 'a condition')}: {wrong}")


def propagate(graph_module: fx.GraphModule, context: Context, pass_name: str) -> None:
    """Fill in ``meta["val"]`` for new nodes and for nodes whose inputs changed shape, dtype or device.

    Args:
        graph_module: whose placeholders all have a value, except new packed inputs.
        context: has the fake mode.
        pass_name: for the error message.

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
            weights = [by_index.get(i, context.inputs[i]) for i in source.weights]
            with context.fake_mode:
                fakes = [w if hasattr(w, "fake_mode") else context.fake_mode.from_tensor(w) for w in weights]
                node.meta["val"] = packed_fake(source, fakes)
        elif node.op == "call_function" and ("val" not in node.meta or changed & set(node.all_input_nodes)):
            old = node.meta.get("val")
            new = _value(node, context, pass_name)
            node.meta["val"] = new
            if [_full(v) for v in torch.utils._pytree.tree_leaves(old)] != [
                _full(v) for v in torch.utils._pytree.tree_leaves(new)
            ]:
                changed.add(node)


def _full(value: Any) -> Any:
    meta = tensor_meta(value)
    if meta is None or value.layout != torch.strided:
        return meta if meta is not None else str(value)
    return (*meta, tuple(str(s) for s in value.stride()))


def _value(node: fx.Node, context: Context, pass_name: str) -> Any:
    def value(arg: fx.Node) -> Any:
        if "val" in arg.meta:
            return arg.meta["val"]
        if arg.op == "get_attr":
            return context.fake_mode.from_tensor(getattr(arg.graph.owning_module, str(arg.target)))
        return None

    args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
    if mutates(node) and "val" in node.meta:
        return node.meta["val"]  # running it again would change its inputs' fake tensors
    try:
        with context.fake_mode:
            return node.target(*args, **kwargs)  # type: ignore[operator]
    except Exception as error:
        modules = ", ".join(path for path, _ in (node.meta.get("nn_module_stack") or {}).values()) or "no module"
        raise PassError(
            f"pass {pass_name!r} left node {node.name!r} ({node.target}, in {modules}) that cannot be computed: "
            f"{type(error).__name__}: {error}"
        ) from error


def relative_error(reference: Sequence[torch.Tensor] | None, value: Sequence[torch.Tensor]) -> float:
    """Return ``||value - reference|| / ||reference||`` over all floating-point outputs together."""
    difference = norm = 0.0
    for old, new in zip(reference or (), value, strict=True):
        if old.is_floating_point():
            difference += (new.double() - old.double()).square().sum().item()
            norm += old.double().square().sum().item()
        elif not torch.equal(old, new):
            return float("inf")
    return (difference / norm) ** 0.5 if norm else float(difference > 0)


def readable(graph_module: fx.GraphModule) -> str:
    """Return a graph as Python text with shapes and dtypes."""
    return graph_module.print_readable(print_output=False)
