"""The last stage: a lowered graph becomes a function, through Inductor or as it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import fx

from ..errors import CaptureError
from ..options import Options

__all__ = ["make_runner"]

_FALLBACKS = (
    torch._subclasses.fake_tensor.DataDependentOutputException,
    torch._subclasses.fake_tensor.DynamicOutputShapeException,
    torch._subclasses.fake_tensor.UnsupportedFakeTensorException,
    torch._subclasses.fake_tensor.UnsupportedOperatorException,
)


def make_runner(
    graph_module: fx.GraphModule, options: Options, example: Sequence[Any] | None = None
) -> Callable[..., Any]:
    """Return a function that runs a lowered graph.

    Args:
        graph_module: lowered; its placeholders' ``meta["val"]`` are fake tensors and symbolic integers.
        options: ``inductor`` says how it runs.
        example: arguments whose shapes the function may be specialized to, called outside of a Dynamo
            compilation. None inside one, where symbolic shapes and their guards are Dynamo's.

    Returns:
        A function of the lowered graph's arguments, that returns its outputs.
    """
    config = options.inductor_options()
    if config is None:
        return graph_module
    from torch._inductor.compile_fx import compile_fx

    if example is None:
        inputs = [node.meta["val"] for node in graph_module.graph.nodes if node.op == "placeholder"]
        try:
            return cast(Callable[..., Any], compile_fx(graph_module, inputs, config_patches=config or None))
        except _FALLBACKS as error:
            # Dynamo would take these for a graph break and run the original linears without a word.
            raise CaptureError(
                f"Inductor cannot compile the lowered graph: {type(error).__name__}: {error}. "
                "options={'inductor': False} runs the graph as it is."
            ) from error
    fake_mode = torch._subclasses.FakeTensorMode()
    inputs = [
        fake_mode.from_tensor(value, static_shapes=True) if isinstance(value, torch.Tensor) else value
        for value in example
    ]
    with torch._guards.tracing(torch._guards.TracingContext(fake_mode)):
        return cast(Callable[..., Any], compile_fx(graph_module, inputs, config_patches=config or None))
