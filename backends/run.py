"""The last stage: a lowered graph becomes a function, through Inductor or as it is."""

from __future__ import annotations

import functools
import logging
import platform
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from ..errors import CaptureError
from ..graph.inputs import INPUT, GraphInput, PackedInput
from ..options import Options
from ..torch_private.dynamo import tracing
from ..torch_private.inductor import FAKE_ERRORS, compile_graph, cpp_compiler, is_gcc, vector_bits

__all__ = ["make_runner"]

log = logging.getLogger(__name__)

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
    if config is None or _lacks_compiler(graph_module):
        return graph_module
    config = {**config, **_around_cpp_wrapper(config)}
    config = {**config, **_around_gcc(graph_module, config)}
    if example is None:
        inputs = [node.meta["val"] for node in graph_module.graph.nodes if node.op == "placeholder"]
        try:
            return _compile(graph_module, inputs, config)
        except FAKE_ERRORS as error:
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
    with tracing(fake_mode):
        return _compile(graph_module, inputs, config)


def _compile(graph_module: fx.GraphModule, inputs: Sequence[Any], config: Mapping[str, Any]) -> Callable[..., Any]:
    """Return what Inductor makes of a graph.

    A CUDA graph (``mode="reduce-overhead"``) reads its inputs where they were, so that Inductor copies at each call
    what is not marked as staying there. Marks of Dynamo are gone from a lowered graph; its weights are marked here.
    """
    import torch._inductor.config as inductor

    with inductor.patch(dict(config)):
        if not inductor.triton.cudagraphs:
            return compile_graph(graph_module, inputs, config)
    sources = [node.meta.get(INPUT) for node in graph_module.graph.find_nodes(op="placeholder")]
    stay = [
        i
        for i, source in enumerate(sources)
        if isinstance(source, PackedInput) or (isinstance(source, GraphInput) and source.kind != "user")
    ]
    return compile_graph(graph_module, inputs, config, stay)


def _lacks_compiler(graph_module: fx.GraphModule) -> bool:
    """Whether Inductor could compile nothing here: a graph of the CPU, on a machine without a C++ compiler."""
    if {value.device.type for value in _values(graph_module)} - {"cpu"}:
        return False
    if cpp_compiler() is None:
        _say_without_compiler()
        return True
    return False


@functools.cache
def _say_without_compiler() -> None:
    log.warning(
        "Inductor needs a C++ compiler for the CPU, and none was found: lowered graphs run without Inductor, which "
        "makes what is around the products slower. Install g++ or clang, or name one in CXX"
    )


def _values(graph_module: fx.GraphModule) -> list[torch.Tensor]:
    values = pytree.tree_leaves([node.meta.get("val") for node in graph_module.graph.nodes])
    return [value for value in values if isinstance(value, torch.Tensor)]


def _around_cpp_wrapper(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of Inductor without its C++ wrapper.

    It crashes on operators that return one tensor in a list, as those of :mod:`tahf4_compiler.ops.fused` do.
    """
    import torch._inductor.config as inductor

    with inductor.patch(dict(config)):
        if not inductor.cpp_wrapper:
            return {}
    _say_without_cpp_wrapper()
    return {"cpp_wrapper": False}


@functools.cache
def _say_without_cpp_wrapper() -> None:
    log.warning(
        "Inductor's option cpp_wrapper is on; graphs of tahf4 are compiled without it, because it crashes on operators "
        "that return a list of one tensor"
    )


# GCC 12.2 at -O3 makes the last loop of Inductor's AVX-512 transposition of 32 x 32 halves a copy of memory, and then
# deletes the stores that fill what is copied: a kernel that transposes two tiles reads leftovers of the stack. Without
# this step the loop stays a loop. Other versions of GCC are told the same.
_NO_COPY = "-fno-tree-loop-distribute-patterns"


def _around_gcc(graph_module: fx.GraphModule, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of Inductor with which GCC translates the transpositions of a lowered graph rightly."""
    halves = (torch.bfloat16, torch.float16)
    if platform.machine() not in ("x86_64", "AMD64") or not any(
        value.device.type == "cpu" and value.dtype in halves for value in _values(graph_module)
    ):
        return {}
    import torch._inductor.config as inductor

    with inductor.patch(dict(config)):
        try:
            affected = is_gcc() and vector_bits() == 512
        except Exception:  # no compiler, which Inductor itself says if it needs one
            return {}
        if not affected:
            return {}
        # Inductor has no option for flags. What it writes behind -march= is split at spaces.
        march = getattr(inductor.cpp, "march", "")
        return {"cpp.march": f"{march or 'native'} {_NO_COPY}"} if march != "" else {"cpp.simdlen": 256}
