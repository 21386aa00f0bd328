"""The ``torch.compile`` backend, found through the entry-point group ``torch_dynamo_backends``."""

from __future__ import annotations

import functools
import logging
import operator
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from ..errors import CaptureError, GradientError, Tahf4Error
from ..graph.inputs import INPUT, GraphInput
from ..graph.nodes import linear_path, linears
from ..graph_capture.captured import Capture
from ..graph_capture.dynamo import capture_dynamo
from ..lowering import LoweredGraph, lower_graph
from ..model.attachments import attached, attached_attention, attached_recipe, changes, owner_of
from ..model.linears import matching
from ..model.steps import StepPrecision
from ..options import Options
from ..reporting.report import Totals
from ..torch_private.calls import Around
from ..torch_private.dynamo import before_frames, compiled_in_place, when_compiled, when_not_compiled
from ..torch_private.frames import caller_that_holds
from ..torch_private.tensors import has_tangent, real_tensors
from ..weights.held import multiplier_groups, ties
from ..weights.store import store
from .coverage import function_watcher, mark_copied, ran, say_behind, watch, watcher
from .messages import USED_OTHERWISE, keeping_errors, lacks_4_bits, say_graph, say_off, say_overruled, say_transformed
from .run import make_runner

__all__ = ["tahf4"]

log = logging.getLogger(__name__)


def tahf4(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | Options | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Compile a Dynamo graph with its linears in HiFloat4 W4A4: ``torch.compile(model, backend="tahf4")``.

    Args:
        graph_module: Dynamo's graph.
        example_inputs: its real inputs.
        options: see :class:`tahf4_compiler.options.Options`.
        mode: a mode of ``torch.compile``, for Inductor.

    Returns:
        A function that takes the graph's inputs and returns its outputs.

    Raises:
        OptionError, PatternError: the options are wrong.
        GradientError: the graph needs gradients.
        CaptureError, PassError, PipelineError: see there. Dynamo wraps all of them in
            ``BackendCompilerFailed``, with their message.
    """
    before_frames(tahf4, _begin, say_overruled)  # again, since torch._dynamo.reset() forgets it
    start = time.perf_counter()
    with keeping_errors():
        parsed = Options.parse(options, mode)
        captured = capture_dynamo(graph_module, example_inputs)
        captured.seconds = time.perf_counter() - start
        compiled = CompiledGraph(captured, parsed)
    return lambda *args: compiled(*args)


def _begin(model: nn.Module, keywords: Mapping[str, Any], transformed: bool) -> None:
    """Watch a model before anything of it is compiled: it may be that Dynamo hands over nothing at all."""
    if transformed:
        say_transformed(model)
        return
    with keeping_errors():
        options = Options.parse(keywords.get("options"), keywords.get("mode"))
    if options.pipeline == "default":
        watch(model, options.keep)


def _given(model: nn.Module, keywords: Mapping[str, Any]) -> Around | None:
    """Watch a model from its first call on: it may be that Dynamo does not even begin."""
    mark_copied(model, lambda model: compiled_in_place(model, tahf4))
    keep = _watched(keywords)
    return None if keep is None else watcher(model, keep)


def _given_function(model: nn.Module | None, keywords: Mapping[str, Any]) -> Around | None:
    """Watch what a function calls, and the model whose method it is."""
    keep = _watched(keywords)
    return None if keep is None else function_watcher(model, keep)


def _watched(keywords: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Return the patterns of linears that are kept, or None if nothing is watched."""
    try:
        options = Options.parse(keywords.get("options"), keywords.get("mode"))
    except Tahf4Error:  # raised again where Dynamo comes to the backend, and said if it is set to suppress that
        return ()
    return options.keep if options.pipeline == "default" else None


before_frames(tahf4, _begin, say_overruled)
when_compiled(tahf4, _given, _given_function)
when_not_compiled(tahf4, say_off)
say_off()  # PyTorch imports this module where a model is compiled, also when it compiles nothing


class CompiledGraph:
    """One Dynamo graph and its lowerings.

    Dynamo calls the same graph with the parameters of every module that passes its guards. The weights are
    looked up by identity at each call; where other parameters carry other decisions
    (:func:`tahf4_compiler.keep`), another lowering is made and kept beside the first.
    """

    def __init__(self, captured: Capture, options: Options) -> None:
        """Lower the graph for the parameters of the example."""
        if any(isinstance(value, torch._subclasses.FakeTensor) for value in captured.example_inputs):
            raise CaptureError(
                "the graph came without its weights, as where Dynamo splits it into the buckets of "
                "DistributedDataParallel. Set torch._dynamo.config.optimize_ddp = False before the first call."
            )
        self._captured = captured
        self._options = options
        self._lock = threading.Lock()
        graph = captured.graph_module.graph
        sources = {
            source.index: source.path
            for node in graph.find_nodes(op="placeholder")
            if isinstance(source := node.meta[INPUT], GraphInput)
            and source.kind == "parameter"
            and node.meta["val"].dim() == 2
            and (node.meta["val"].is_floating_point() or source.path.endswith("weight_codes"))
        }
        known = {i: captured.surroundings.path(captured.example_inputs[i]) for i in sources}
        names = {i: linear_path(path) for i, path in sources.items()}
        self._weights = {i: known[i] or name for i, name in names.items()}
        # A piece of the compiled module, named otherwise inside: other pieces of its class may stand elsewhere.
        self._piece = any(known[i] not in (None, name) for i, name in names.items())
        # Tensors that the graph held as attributes are inputs at the end, which Dynamo does not pass.
        self._lifted = captured.example_inputs[self._called_with(graph) :]
        self._factors = multiplier_groups(graph)  # of packed linears: equal ones let quantizations be shared
        first = lower_graph(captured, options)
        self._planned = {d.weight_index for d in first.plan if d.cause not in USED_OTHERWISE}
        self._reasons = {d.weight_index: str(d.reason) for d in first.plan if d.cause in USED_OTHERWISE}
        self._quantized = Totals.of(first.plan).quantized
        self._known: dict[tuple[int, ...], _Known] = {}
        first_key, _ = self._decisions(captured.example_inputs)
        self._variants: dict[Any, tuple[LoweredGraph, Callable[..., Any]]] = {
            first_key: (first, _finish(first, options, None))
        }
        with real_tensors():
            first.binding(captured.example_inputs, store, options.weight_check)  # convert now, not in the first step
        # The example's tensors must not live as long as the compiled code.
        self._captured = replace(captured, example_inputs=())
        _announce(first, captured)
        if (root := captured.surroundings.root) is not None and options.pipeline == "default":
            watch(caller_that_holds(root) or root, options.keep)

    def __call__(self, *args: Any) -> Any:
        """Run the lowering that fits the parameters among ``args``.

        Raises:
            GradientError: an argument has a tangent, which Inductor's kernels would not see.
        """
        if has_tangent(args):
            raise GradientError(
                "a compiled model got a tensor with a tangent (torch.autograd.forward_ad), but 4-bit codes have no "
                "derivative. Differentiate the model as it was before torch.compile."
            )
        args = (*args, *self._lifted)
        key, known = self._decisions(args)
        if key not in self._variants:
            key = (key, tuple(_size(value) for value in args))
        if key not in self._variants:
            self._add_variant(key, args)
        lowered, run = self._variants[key]
        ran(known.planned, known.read, self._quantized)
        return run(*lowered.binding(args, store, self._options.weight_check))

    def _decisions(self, args: Sequence[Any]) -> tuple[tuple[Any, ...], _Known]:
        """Return what may set these parameters' decisions apart from others': attachments and paths."""
        weights = [args[index] for index in self._weights]
        key = tuple(map(id, weights))
        known = self._known.get(key)
        if known is None or not known.holds(weights):
            known = self._known[key] = self._look_up(weights)
        return (ties(self._factors, args, self._options.weight_check), *known.decisions), known

    def _look_up(self, weights: Sequence[Any]) -> _Known:
        for weight in weights:
            attached(weight)  # notices a parameter that left its module, and finds the one that came instead
        for key in [key for key, known in list(self._known.items()) if not known.alive()]:
            self._known.pop(key, None)
        seen = {id(ref()) for known in list(self._known.values()) for ref in known.weights}
        if unseen := [weight for weight in weights if id(weight) not in seen]:
            self._captured.surroundings.learn(unseen)  # another module's, or parameters that were replaced
            if (model := caller_that_holds(unseen[0])) is not None and self._options.pipeline == "default":
                watch(model, self._options.keep)
        names: dict[str, int] = {}
        now = changes()  # before anything is read: what another thread attaches meanwhile is looked up again
        recipes = [attached_recipe(weight) for weight in weights]
        steps = list({id(r.steps): r.steps for r in recipes if r is not None and r.steps is not None}.values())
        high = [clock.high() for clock in steps]
        held = [attached(weight) for weight in weights]
        owners = [(i, owner) for i, weight in enumerate(weights) if (owner := owner_of(weight)) is not None]
        # Which weights are transformed alike is part of the graph; what their activation is called is not.
        decisions: list[Any] = [
            (a, names.setdefault(a.activation, len(names)) if a is not None else -1) for a in held
        ]
        if self._options.attention != "high_precision":
            said = ((found := attached_attention(weight)) and found.decision for weight in weights)
            decisions = list(zip(decisions, said, strict=True))
        if self._piece:
            where, keep = self._captured.surroundings, self._options.keep
            paths = [where.path(weight) or name for weight, name in zip(weights, self._weights.values(), strict=True)]
            decisions = [
                (decision, matching(keep, path, *where.names(weight)) is not None, where.block_of(path) is not None)
                for decision, path, weight in zip(decisions, paths, weights, strict=True)
            ]
        planned = frozenset(id(weight) for i, weight in zip(self._weights, weights, strict=True) if i in self._planned)
        reasons = [self._reasons.get(i, "") for i in self._weights]
        read = {id(w): (weakref.ref(w), why) for w, why in zip(weights, reasons, strict=True)}
        return _Known(
            [weakref.ref(weight) for weight in weights], tuple(decisions), owners, steps, high, now, planned, read
        )

    def _called_with(self, graph: fx.Graph) -> int:
        return sum(n.op == "placeholder" and not n.meta.get("tahf4_lifted", False) for n in graph.nodes)

    def _add_variant(self, key: Any, args: tuple[Any, ...]) -> None:
        """Lower the graph again; without Dynamo's guards it is compiled for the sizes at hand."""
        with self._lock:
            if key in self._variants:
                return
            lowered = lower_graph(replace(self._captured, example_inputs=args), self._options)
            bound = lowered.binding(args, store, self._options.weight_check)
            self._variants[key] = (lowered, _finish(lowered, self._options, bound))
            _announce(lowered, self._captured)


@dataclass
class _Known:
    """What was found out about some parameters, and when it has to be found out again."""

    weights: list[weakref.ref[Any]]
    decisions: tuple[Any, ...]
    owners: list[tuple[int, tuple[weakref.ref[Any], str]]]
    steps: list[StepPrecision]
    high: list[bool]
    changes: int
    planned: frozenset[int]
    read: dict[int, tuple[weakref.ref[Any], str]]

    def holds(self, weights: Sequence[Any]) -> bool:
        same = all(map(operator.is_, [ref() for ref in self.weights], weights)) and self.changes == changes()
        if not same or self.high != [clock.high() for clock in self.steps]:
            return False
        return all(
            (module := reference()) is not None and module._parameters.get(name) is weights[i]
            for i, (reference, name) in self.owners
        )

    def alive(self) -> bool:
        return all(ref() is not None for ref in self.weights)


def _size(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, torch.Tensor) else value


def _finish(lowered: LoweredGraph, options: Options, example: Sequence[Any] | None) -> Callable[..., Any]:
    start = time.perf_counter()
    run = make_runner(lowered.graph_module, options, example)
    lowered.seconds["inductor" if options.inductor is not False else "graph as it is"] = time.perf_counter() - start
    lowered.write_report()
    return run


def _announce(lowered: LoweredGraph, captured: Capture) -> None:
    totals, where = Totals.of(lowered.plan), captured.surroundings
    log.info(
        "%s: %d of %d linears in HiF4; %s",
        lowered.name,
        totals.quantized,
        totals.linears,
        ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in lowered.seconds.items()),
    )
    if not lowered.plan and any(linears(lowered.graph_module.graph)):
        log.warning("%s: the linears have no plan, so none runs in 4 bits (is the pass 'plan' left out?)", lowered.name)
    # A packed linear whose codes are arguments, as under functional_call, runs in 4 bits and is in no plan.
    packed = captured.graph_module.graph.find_nodes(op="call_function", target=torch.ops.tahf4.packed_linear.default)
    if lowered.plan and not packed and lacks_4_bits(lowered.plan, lambda path: where.block_of(path) is None):
        say_behind(lowered.plan, functools.partial(say_graph, lowered.name, lowered.plan, where.root))
