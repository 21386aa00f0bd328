"""Where the time of a lowered graph goes: milliseconds of each node, a trace for Chrome, and a whole call compiled."""

from __future__ import annotations

import copy
import statistics
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.profiler import ProfilerActivity, profile, record_function

from ...backends.run import make_runner
from ...lowering import Lowered
from ..errors import CommandError

__all__ = ["compiled_milliseconds", "milliseconds"]

PREFIX = "tahf4::node "
"""Of the ranges. The profiler has operators as ``tahf4::NAME`` too, and no name of an operator has a space."""


class _Ranges(fx.Interpreter):
    """Runs a graph with a range around each node."""

    def run_node(self, n: fx.Node) -> Any:
        """Run a node."""
        if n.op != "call_function":
            return super().run_node(n)
        with record_function(PREFIX + n.name):
            return super().run_node(n)


def milliseconds(
    lowered: Lowered, arguments: Mapping[str, Any], trace: Path | None = None, runs: int = 3
) -> tuple[dict[str, float], str]:
    """Run a lowered graph node by node, as it is (not through Inductor).

    Args:
        lowered: on weights that it can run with.
        arguments: of the model, positional ones under ``"*"``.
        trace: file for Chrome's tracing (``chrome://tracing``, Perfetto), with a range ``tahf4::node NAME`` a node.
        runs: that are averaged, after one that is not counted.

    Returns:
        Mean milliseconds by node, and what they are of (the GPU's time where the node ran there).

    Raises:
        CommandError: the trace cannot be written.
    """
    args, kwargs = arguments.get("*", ()), {k: v for k, v in arguments.items() if k != "*"}
    flat = lowered.bound(*args, **kwargs)
    interpreter = _Ranges(lowered.graph_module)
    activities = [ProfilerActivity.CPU]
    gpu = torch.cuda.is_available() and any(isinstance(v, torch.Tensor) and v.is_cuda for v in flat)
    if gpu:
        activities.append(ProfilerActivity.CUDA)
    with torch.no_grad():
        interpreter.run(*flat)
        with profile(activities=activities) as profiler:
            for _ in range(runs):
                interpreter.run(*flat)
                if gpu:
                    torch.cuda.synchronize()
    total: dict[str, float] = defaultdict(float)
    for event in profiler.events() or []:
        on_gpu = event.device_type != torch.autograd.DeviceType.CPU
        if event.name.startswith(PREFIX) and not on_gpu:
            took = event.device_time_total if gpu else event.cpu_time_total
            total[event.name.removeprefix(PREFIX)] += took / 1000 / runs
    if trace is not None:
        try:
            profiler.export_chrome_trace(str(trace))
        except OSError as error:
            raise CommandError(f"cannot write {trace}: {error}") from error
    return dict(total), "GPU" if gpu else f"CPU, {torch.get_num_threads()} threads"


def compiled_milliseconds(lowered: Lowered, arguments: Mapping[str, Any], runs: int = 5) -> tuple[float | None, str]:
    """Time a call of the graph as a whole, compiled as the backend does: through Inductor, weights packed already.

    Args:
        lowered: on weights that it can run with.
        arguments: as of :func:`milliseconds`.
        runs: that the median is taken of, after one that is not counted.

    Returns:
        Median milliseconds and ``""``, or None and why it was not compiled.
    """
    if lowered.options.inductor is False:
        return None, "the option inductor is False"
    args, kwargs = arguments.get("*", ()), {k: v for k, v in arguments.items() if k != "*"}
    flat = lowered.bound(*args, **kwargs)
    gpu = any(isinstance(v, torch.Tensor) and v.is_cuda for v in flat)
    took = []
    try:
        with torch.no_grad():
            graph_module = fx.GraphModule(lowered.graph_module, copy.deepcopy(lowered.graph_module.graph))
            run = make_runner(graph_module, lowered.options, flat)
            for _ in range(runs + 1):
                start = time.perf_counter()
                run(*flat)
                if gpu:
                    torch.cuda.synchronize()
                took.append(1000 * (time.perf_counter() - start))
    except Exception as error:  # of Inductor and of the compilers that it calls
        return None, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return statistics.median(took[1:]), ""
