"""From a captured graph to a lowered one, and a lowered model that can be called and read."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import fx

from .errors import CaptureError, OptionError, PackedError
from .graph.inputs import INPUT, PackedInput
from .graph.nodes import linear_path
from .graph_capture.captured import Capture
from .model.reasons import Cause, Reason
from .ops.registry import generated_sources
from .options import Options
from .pipeline.context import Context, Decision
from .pipeline.manager import PassManager
from .pipeline.order import build_pipeline
from .pipeline.records import PassRecord, readable
from .plugins import entry_points
from .recipe.recipe import Recipe
from .reporting.compact import graph_json
from .reporting.dump import GraphDump, dump_folder, new_graph_dump, trace_artifacts
from .reporting.report import plan_json, report
from .reporting.snapshot import Recorder, Snapshot
from .torch_private.dynamo import logs_artifacts
from .weights.binding import Binding
from .weights.held import multiplier_groups, ties
from .weights.store import store

__all__ = ["Lowered", "LoweredGraph", "lower", "lower_graph"]


@dataclass
class LoweredGraph:
    """A graph after the last pass, with everything that the compilation knows about it.

    Attributes:
        graph_module: the lowered graph.
        binding: makes its arguments from those of the captured graph.
        plan: one decision for each linear.
        history: the captured graph and one record for each pass.
        notes: what the passes had to say.
        seconds: of each stage.
        name: of the compiled module's class.
        dump: where it is written, or None.
        snapshots: the graph after each pass as plain data, where somebody asked for texts.
    """

    graph_module: fx.GraphModule
    binding: Binding
    plan: list[Decision]
    history: list[PassRecord]
    notes: dict[str, list[str]]
    seconds: dict[str, float]
    name: str
    dump: GraphDump | None = None
    snapshots: list[Snapshot] = field(default_factory=list, repr=False)

    def report(self) -> str:
        """Return the plan as a table, what each pass did, totals and compile times."""
        return report(self.name, self.plan, self.history, self.notes, self.seconds)

    def write_report(self) -> None:
        """Write ``report.txt`` to the dump folder, if there is one."""
        if self.dump is not None:
            self.dump.write("report.txt", self.report())


def lower_graph(
    captured: Capture,
    options: Options,
    passes: Sequence[Any] | None = None,
    *,
    keep_text: bool = False,
    each: Callable[[PassRecord, fx.GraphModule], None] | None = None,
) -> LoweredGraph:
    """Run the pipeline over a copy of a captured graph.

    Args:
        captured: stays as it is, so that another decision can be lowered later.
        options: validated.
        passes: in place of the default pipeline.
        keep_text: keep the readable graph after each pass.
        each: see :meth:`PassManager.run`.

    Returns:
        The lowered graph; dumped if the options or the environment ask for it.

    Raises:
        PassError, PipelineError, OptionError, PatternError: see the passes and the pipeline.
    """
    pipeline = build_pipeline(options, passes)
    folder = dump_folder(options.dump_dir)
    tracing = logs_artifacts()
    graph_module = fx.GraphModule(captured.graph_module, copy.deepcopy(captured.graph_module.graph))
    context = context_of(captured, options)
    for node in graph_module.graph.find_nodes(op="placeholder"):
        if node.meta[INPUT].kind == "parameter":
            context.paths[node.meta[INPUT].index] = linear_path(node.meta[INPUT].path)
    groups = multiplier_groups(graph_module.graph)
    for group, same in zip(groups, ties(groups, captured.example_inputs, options.weight_check), strict=True):
        context.tied.update(zip(group, same, strict=True))
    start = time.perf_counter()
    keep_text = keep_text or folder is not None or tracing
    recorder = Recorder()

    def seen(record: PassRecord, graph_module: fx.GraphModule) -> None:
        if keep_text:
            recorder(record.name, graph_module)
        if each is not None:
            each(record, graph_module)

    graph_module, history = PassManager(pipeline, keep_text=keep_text).run(graph_module, context, seen)
    recorder.end(graph_module)
    _check_plan_against_graph(graph_module, context.plan)
    seconds = {"capture": captured.seconds, "passes": time.perf_counter() - start}
    lowered = LoweredGraph(
        graph_module,
        Binding(graph_module, captured.surroundings.path),
        context.plan,
        history,
        context.notes,
        seconds,
        captured.name,
    )
    lowered.snapshots = recorder.snapshots
    if tracing:
        trace_artifacts(history)
    if folder is not None:
        lowered.dump = new_graph_dump(folder, captured.name)
        lowered.dump.write_graphs(history)
        lowered.dump.write("plan.json", plan_json(context.plan))
        lowered.dump.write_passes(history, context.notes)
        lowered.dump.write("graph.json", graph_json(recorder.snapshots))
        for name, (text, nodes) in generated_sources(graph_module.graph).items():
            lowered.dump.write(name, "".join(f"# Runs {node}.\n" for node in nodes) + text)
        lowered.write_report()
    return lowered


def context_of(captured: Capture, options: Options) -> Context:
    """Return what passes over a captured graph share."""
    return Context(options, captured.example_inputs, captured.surroundings, captured.fake_mode)


def _check_plan_against_graph(graph_module: fx.GraphModule, plan: Sequence[Decision]) -> None:
    """Correct decisions that no pass carried out: the report says what runs, not what was wanted."""
    sources = (node.meta.get(INPUT) for node in graph_module.graph.nodes if node.op == "placeholder")
    packed = {index for source in sources if isinstance(source, PackedInput) for index in source.weights}
    for decision in plan:
        if decision.decision != "high_precision" and decision.weight_index not in packed:
            decision.decision, decision.bytes_after = "high_precision", decision.bytes_before
            text = f"planned for 4 bits, but no pass rewrote it ({decision.reason})"
            decision.reason = Reason(Cause.NOT_REWRITTEN, text)


class Lowered:
    """A captured model after the passes: callable, printable, with its history.

    Attributes:
        graph_module: the lowered graph; its placeholders say in their metadata what they stand for.
        history: the captured graph and one record for each pass, with the readable graph.
        plan: one decision for each linear.
    """

    def __init__(self, captured: Capture, lowered: LoweredGraph, options: Options) -> None:
        """Use :func:`lower`."""
        self._captured = captured
        self._lowered = lowered
        self._options = options
        self.graph_module = lowered.graph_module
        self.history = lowered.history
        self.plan = lowered.plan
        self._factors = multiplier_groups(captured.graph_module.graph)
        self._tied = self._ties(captured.example_inputs)

    def _ties(self, values: Sequence[Any]) -> tuple[tuple[int, ...], ...]:
        return ties(self._factors, values, self._options.weight_check)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the lowered graph with the arguments of the captured model.

        Raises:
            CaptureError: the arguments are not of the structure that was captured.
        """
        assert self._captured.unflatten is not None
        with torch.no_grad():
            return self._captured.unflatten(list(self.graph_module(*self.bound(*args, **kwargs))))

    def __copy__(self) -> Lowered:
        """Return the lowered model itself: it has no state of its own."""
        return self

    def __deepcopy__(self, memo: Any) -> Lowered:
        """Refuse: the copy would run with the weights of the model that was captured."""
        raise _bound_to_its_model("copied")

    def __reduce__(self) -> Any:
        """Refuse: a file would lack the weights of the model that was captured."""
        raise _bound_to_its_model("saved")

    def bound(self, *args: Any, **kwargs: Any) -> list[Any]:
        """Return the arguments of ``graph_module`` for a call: weights are packed here, if they are new.

        Raises:
            CaptureError: the arguments are not of the structure that was captured.
        """
        assert self._captured.bind is not None
        with torch.no_grad():
            flat = self._captured.bind(args, kwargs)
            if self._ties(flat) != self._tied:
                raise PackedError(
                    "the multipliers of packed linears are not equal in the way that they were when the model was "
                    "lowered. Capture and lower the model again."
                )
            return self._lowered.binding(flat, store, self._options.weight_check)

    def report(self, path: str | Path | None = None, *, recipe: Any = None, calibration: Any = None) -> str:
        """Return the plan as a table, what each pass did, and totals.

        Args:
            path: of a file to write besides. ``.html``: the graph after each pass, every linear, and plots, without
                links to other files. Plug-ins may bring other kinds.
            recipe: a :class:`tahf4_compiler.Recipe` whose numbers the file shows.
            calibration: path of the checkpoint of a calibration, for the distribution of activations.

        Raises:
            CommandError: the file cannot be written, or the calibration cannot be read.
            OptionError: nothing writes this kind of file, or ``recipe`` is none.
        """
        if recipe is not None and not isinstance(recipe, Recipe):
            raise OptionError(f"recipe is {recipe!r}; expected a Recipe (tahf4.Recipe.load reads a file)")
        if path is not None:
            kinds, suffix = entry_points.load(entry_points.REPORTS), Path(path).suffix.lstrip(".").lower()
            write = kinds.get("html" if suffix in ("", "htm") else suffix)
            if write is None:
                raise OptionError(f"{path}: no report is written as .{suffix}; expected {', '.join(kinds)}")
            write(self, Path(path), recipe, Path(calibration) if calibration is not None else None)
        return self._lowered.report()

    @property
    def snapshots(self) -> list[Snapshot]:
        """The graph after each pass as plain data."""
        return self._lowered.snapshots

    @property
    def options(self) -> Options:
        """The validated options that it was lowered with."""
        return self._options

    @property
    def name(self) -> str:
        """Class name of the captured model."""
        return self._lowered.name

    @property
    def notes(self) -> Mapping[str, Sequence[str]]:
        """What the passes had to say."""
        return self._lowered.notes

    def plan_json(self) -> str:
        """Return the plan as JSON, one object a linear."""
        return plan_json(self.plan)

    def print_readable(self, after: str | None = None) -> str:
        """Print a graph with shapes and dtypes, and return the text.

        Args:
            after: name of a pass, or ``"captured"``; the lowered graph if None.

        Raises:
            OptionError: no pass of that name ran.
        """
        if after is None:
            text = readable(self.graph_module)
        else:
            texts = {record.name: record.readable for record in self.history}
            if after not in texts:
                raise OptionError(f"no pass {after!r} ran; there are {', '.join(texts)}")
            text = texts[after]
        print(text)
        return text


def _bound_to_its_model(what: str) -> CaptureError:
    return CaptureError(
        f"a lowered model cannot be {what}: it reads the weights of the model that was captured. Copy or save that "
        "model (packed by tahf4.quantize_, if it should be small), then capture and lower the new one. "
        "torch.export.export of a packed model gives a program that can be saved."
    )


def lower(
    captured: Capture, *, passes: Sequence[Any] | None = None, options: Mapping[str, Any] | None = None
) -> Lowered:
    """Run the pipeline over a model captured with :func:`tahf4_compiler.capture`.

    Args:
        captured: by :func:`tahf4_compiler.capture`.
        passes: the whole pipeline, in place of the default one; they are ordered by their declarations.
        options: as for ``torch.compile(backend="tahf4", options=...)``; ``inductor`` has no effect, since a
            lowered model runs its graph as it is.

    Returns:
        The lowered model.

    Raises:
        PassError, PipelineError, OptionError, PatternError: see the passes and the pipeline.
    """
    if not isinstance(captured, Capture) or captured.bind is None:
        raise OptionError(f"lower got {type(captured).__name__}; expected what tahf4.capture(model, args) returns")
    parsed = Options.parse(options)
    return Lowered(captured, lower_graph(captured, parsed, passes, keep_text=True), parsed)
