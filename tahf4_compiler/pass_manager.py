"""Runs passes one after the other, and does between them what every pass needs.

After each pass the graph is linted, shapes and dtypes of changed nodes are propagated again, the outputs are
compared with what they were, matches and time are recorded, and the readable graph is kept for the dump.
With ``verify=True`` the graph also runs before and after on the example inputs.
"""

from __future__ import annotations

import contextlib
import logging
import operator
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from .binding import Binding
from .errors import PassError, Tahf4Error
from .graph import INPUT, GraphInput, is_written, node_words, tensor_meta
from .packing import store
from .pass_base import Context, Pass, PassResult
from .propagation import propagate

__all__ = ["PassManager", "PassRecord", "graph_arguments", "run_graph"]

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
    """

    def __init__(self, passes: Sequence[Pass], *, keep_text: bool = False) -> None:
        """Take passes in their final order."""
        self.passes = list(passes)
        self.keep_text = keep_text

    def run(
        self,
        graph_module: fx.GraphModule,
        context: Context,
        each: Callable[[PassRecord, fx.GraphModule], None] | None = None,
    ) -> tuple[fx.GraphModule, list[PassRecord]]:
        """Run every pass.

        Args:
            graph_module: the captured graph; it is changed in place.
            context: shared by the passes.
            each: called with the record and the graph after each pass, and for the captured graph. The graph goes on
                to change: keep a copy.

        Returns:
            The last graph and one record for the captured graph and each pass.

        Raises:
            PassError: a pass raised, broke a condition of its own, or left a graph that breaks the contract
                (dangling use, lost input, outputs of another shape or dtype), or changed results although it claims
                not to (``verify_tolerance``). The message names the pass.
        """
        text = readable(graph_module) if self.keep_text else ""
        records = [self._record("captured", graph_module, text)]
        reference = previous = run_graph(graph_module, context) if context.options.verify else None
        if reference is not None and not _finite(reference):
            records[0].error = float("nan")  # nothing can be compared with it
        if each is not None:
            each(records[0], graph_module)
        for item in self.passes:
            start = time.perf_counter()
            context.matches, context.current, context.last = 0, item.name, None
            shown = _shown(graph_module) if self.keep_text else []
            before = _interface(graph_module)
            result = self._call(item, graph_module, context)
            graph_module = result.graph_module
            _check(item, graph_module, context, before)
            if self.keep_text and not _same(shown, _shown(graph_module)):
                text = readable(graph_module)
            record = self._record(item.name, graph_module, text)
            record.matches, record.modified = context.matches, result.modified
            record.seconds = time.perf_counter() - start
            if reference is not None:
                try:
                    outputs = run_graph(graph_module, context)
                except Exception as error:
                    raise PassError(
                        f"the graph does not run after pass {item.name!r}: {type(error).__name__}: {error}"
                    ) from error
                record.error = relative_error(previous, outputs)
                record.total_error = relative_error(reference, outputs)
                if records[0].error is None:
                    _check_error(item, record, context.options.verify_tolerance)
                previous = outputs
            records.append(record)
            if each is not None:
                each(record, graph_module)
            logging.getLogger(f"{log.name}.{item.name}").info(
                "%s: %d matches, %d nodes, %.3f s", item.name, record.matches, record.nodes, record.seconds
            )
        graph_module.recompile()
        return graph_module, records

    def _record(self, name: str, graph_module: fx.GraphModule, text: str) -> PassRecord:
        return PassRecord(name, nodes=len(graph_module.graph.nodes), readable=text)

    def _call(self, item: Pass, graph_module: fx.GraphModule, context: Context) -> PassResult:
        _conditions(item, "requires", graph_module, context)
        try:
            result = item(graph_module, context)
        except Tahf4Error as error:
            if type(item).__module__.startswith("tahf4_compiler.") or repr(item.name) in str(error):
                raise
            raise type(error)(f"pass {item.name!r}{_where(error, context)}: {error}") from error
        except Exception as error:
            raise PassError(
                f"pass {item.name!r} ({type(item).__module__}.{type(item).__qualname__}) failed"
                f"{_where(error, context)}: {type(error).__name__}: {error}. Leave it out with "
                f"options={{'disable_passes': [{item.name!r}]}}."
            ) from error
        if not isinstance(result, PassResult) or not isinstance(result.graph_module, fx.GraphModule):
            found = result.graph_module if isinstance(result, PassResult) else result
            raise PassError(
                f"pass {item.name!r} returned {type(found).__name__}; expected PassResult(graph_module, modified)"
            )
        _conditions(item, "ensures", result.graph_module, context)
        return result


def _check(item: Pass, graph_module: fx.GraphModule, context: Context, before: _Interface) -> None:
    """Raise :class:`PassError` if a pass broke the contract."""
    graph = graph_module.graph
    if (found := _dangling(graph)) is not None:
        user, lost = found
        raise PassError(
            f"pass {item.name!r} left a broken graph: node {node_words(user)} reads {lost.name!r}, which the graph "
            "does not hold before it. Insert what it reads above it, or replace its uses before erasing it."
        )
    if (strange := [n for n in graph.find_nodes(op="placeholder") if n.meta.get(INPUT) is None]) != []:
        raise PassError(
            f"pass {item.name!r} added the input {strange[0].name!r} without a PackedInput in node.meta[{INPUT!r}], or "
            "dropped the metadata of an input; nothing says what it is called with"
        )
    try:
        graph.lint()
    except Exception as error:
        raise PassError(f"pass {item.name!r} left a broken graph: {error}") from error
    if len(list(graph.find_nodes(op="output"))) != 1:
        raise PassError(f"pass {item.name!r} left a graph without its output")
    for node in graph.nodes:
        if node.op in ("call_module", "call_method"):
            raise PassError(
                f"pass {item.name!r} added the {node.op} {node_words(node)}; a graph holds calls of operators only "
                "(torch.ops.aten...)"
            )
    if written := sorted((_written(graph) & before.placeholders) - before.written):  # its own new inputs are its own
        raise PassError(
            f"pass {item.name!r} writes to the graph's inputs {', '.join(written)}, which nothing wrote to before it: "
            "weights and callers' tensors would change. Compute a new tensor instead."
        )
    propagate(graph_module, context, item.name, before.calls)
    after = _interface(graph_module)
    lost_inputs = sorted(before.inputs - after.inputs)
    if lost_inputs:
        raise PassError(
            f"pass {item.name!r} removed the graph's inputs {', '.join(lost_inputs)}. Inputs other than parameters "
            "must stay, used or not."
        )
    for name, source in after.sources.items():
        if (old := before.sources.get(name, source)) != source:
            raise PassError(
                f"pass {item.name!r} made the input {name!r} stand for {source.path!r}; before it, it stood for "
                f"{old.path!r}. Leave node.meta[{INPUT!r}] as it is, and change what reads the inputs."
            )
    if before.outputs != after.outputs:
        changed = [
            f"output {i}: {_words(old)} became {_words(new)}" + (f" at node {node_words(n)}" if n is not None else "")
            for i, (old, new, n) in enumerate(zip(before.outputs, after.outputs, after.nodes, strict=False))
            if old != new
        ] or [f"{len(before.outputs)} outputs became {len(after.outputs)}"]
        raise PassError(f"pass {item.name!r} changed the graph's outputs: {'; '.join(changed)}")


def _check_error(item: Pass, record: PassRecord, tolerance: float | None) -> None:
    """Raise :class:`PassError` if a pass that claims to keep results changed them."""
    if tolerance is None or (record.modified and not item.exact) or (record.error or 0.0) <= tolerance:
        return
    claim = "only how something is computed (exact)" if record.modified else "nothing (modified=False)"
    raise PassError(
        f"pass {item.name!r} says that it changed {claim}, but the outputs' relative error grew by {record.error:.3e}; "
        f"verify_tolerance is {tolerance:g}. Look for swapped operands, or for results of one shape in another order."
    )


def _dangling(graph: fx.Graph) -> tuple[fx.Node, fx.Node] | None:
    """Return the first node that reads what is not computed before it, and what it reads."""
    seen: set[fx.Node] = set()
    for node in graph.nodes:
        for source in node.all_input_nodes:
            if source not in seen:
                return node, source
        seen.add(node)
    return None


def _where(error: BaseException, context: Context) -> str:
    """Say which node a pass was at: the local variable ``node`` where it raised, or else what it matched last."""
    trace, found = error.__traceback__, context.last
    while trace is not None:
        here = trace.tb_frame.f_locals.get("node")
        found = here if isinstance(here, fx.Node) else found
        trace = trace.tb_next
    return f" at node {node_words(found)}" if found is not None else ""


def run_graph(graph_module: fx.GraphModule, context: Context) -> list[torch.Tensor]:
    """Run a graph on the example inputs; parameters are used as they are unless it writes to them.

    Args:
        graph_module: captured, or after some passes.
        context: has the example inputs.

    Returns:
        The output tensors.
    """
    with running():
        flat = fx.Interpreter(graph_module).run(*graph_arguments(graph_module, context))
    return [value for value in torch.utils._pytree.tree_leaves(flat) if isinstance(value, torch.Tensor)]


@contextlib.contextmanager
def running() -> Iterator[None]:
    """Run graphs with real tensors inside, also in the middle of a compilation."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with unset_fake_temporarily(), torch.no_grad():
        yield


def graph_arguments(graph_module: fx.GraphModule, context: Context) -> list[Any]:
    """Return what a graph is called with for the example inputs: copies of what is no parameter."""
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
    with running():
        return Binding(graph_module)(args, store, context.options.weight_check)


@dataclass(frozen=True)
class _Interface:
    """What a pass must keep, and what the graph's calls were before it."""

    inputs: frozenset[str]
    placeholders: frozenset[str]
    outputs: tuple[Any, ...]
    nodes: tuple[fx.Node | None, ...]
    written: frozenset[str]
    sources: Mapping[str, GraphInput]
    calls: Mapping[fx.Node, tuple[Any, ...]]


def _interface(graph_module: fx.GraphModule) -> _Interface:
    inputs = frozenset(
        node.name
        for node in graph_module.graph.nodes
        if node.op == "placeholder"
        and isinstance(source := node.meta.get(INPUT), GraphInput)
        and source.kind != "parameter"
    )
    found = list(graph_module.graph.find_nodes(op="placeholder"))
    placeholders = frozenset(node.name for node in found)
    sources = {node.name: source for node in found if isinstance(source := node.meta.get(INPUT), GraphInput)}
    (output,) = graph_module.graph.find_nodes(op="output")
    leaves = torch.utils._pytree.tree_leaves(output.args[0])
    values = (leaf.meta.get("val") if isinstance(leaf, fx.Node) else leaf for leaf in leaves)
    nodes = tuple(leaf if isinstance(leaf, fx.Node) else None for leaf in leaves)
    calls = {
        n: (n.target, n.args, n.kwargs, n.meta.get("val")) for n in graph_module.graph.nodes if n.op == "call_function"
    }
    metas = tuple(tensor_meta(value) for value in values)
    return _Interface(inputs, placeholders, metas, nodes, _written(graph_module.graph), sources, calls)


def _written(graph: fx.Graph) -> frozenset[str]:
    return frozenset(node.name for node in graph.find_nodes(op="placeholder") if is_written(node))


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


def _finite(values: Sequence[torch.Tensor]) -> bool:
    return all(bool(value.isfinite().all()) for value in values if value.is_floating_point())


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


def _shown(graph_module: fx.GraphModule) -> list[Any]:
    """Return what the readable text of a graph is made from: objects that are replaced when they change."""
    return [
        part
        for n in graph_module.graph.nodes
        for part in (n, n.name, n.target, n.args, n.kwargs, n.type, *map(n.meta.get, _SHOWN))
    ]


_SHOWN = ("val", "tensor_meta", "example_value", "stack_trace", "custom", "recompute", "ac_graph_id")


def _same(old: Sequence[Any], new: Sequence[Any]) -> bool:
    return len(old) == len(new) and all(map(operator.is_, old, new))


def readable(graph_module: fx.GraphModule) -> str:
    """Return a graph as Python text with shapes and dtypes."""
    return graph_module.print_readable(print_output=False)
