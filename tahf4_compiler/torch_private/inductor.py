"""What Inductor compiles with, and how it is told."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from torch import fx
from torch._subclasses import fake_tensor

__all__ = [
    "FAKE_ERRORS",
    "cache_folder",
    "compile_graph",
    "cpp_compiler",
    "is_gcc",
    "library_builder",
    "refuse_in_inductor",
    "vector_bits",
]

FAKE_ERRORS = (
    fake_tensor.DataDependentOutputException,
    fake_tensor.DynamicOutputShapeException,
    fake_tensor.UnsupportedFakeTensorException,
    fake_tensor.UnsupportedOperatorException,
)
"""What operators raise that no fake tensor can run. Dynamo takes them for graph breaks."""


def compile_graph(
    graph_module: fx.GraphModule, inputs: Sequence[Any], config: Mapping[str, Any], stay: Sequence[int] | None = None
) -> Callable[..., Any]:
    """Return what Inductor makes of a graph.

    Args:
        graph_module: of ATen operators.
        inputs: fake tensors and numbers.
        config: Inductor's options.
        stay: positions of the inputs that stay where they are from call to call, for CUDA graphs; None: no marks.
    """
    import torch._functorch.config as functorch
    from torch._inductor import compile_fx

    patches = dict(config) or None
    if stay is None:
        return cast(Callable[..., Any], compile_fx.compile_fx(graph_module, inputs, config_patches=patches))

    def inner(lowered: fx.GraphModule, given: Sequence[Any], **settings: Any) -> Any:
        if len(given) == len(inputs):  # none was added or dropped on the way
            settings["static_input_idxs"] = stay
        return compile_fx.compile_fx_inner(lowered, given, **settings)

    with functorch.patch(enable_autograd_cache=False):  # whose keys do not know the marks
        found = compile_fx.compile_fx(graph_module, inputs, inner_compile=inner, config_patches=patches)
    return cast(Callable[..., Any], found)


def cpp_compiler() -> str | None:
    """Return the C++ compiler that Inductor takes, or None if it accepts none."""
    from torch._inductor import cpp_builder, exc

    try:
        return str(cpp_builder.get_cpp_compiler())
    except exc.InvalidCxxCompiler:
        return None


def is_gcc() -> bool:
    """Whether the C++ compiler that Inductor takes is GCC."""
    from torch._inductor import cpp_builder

    return bool(cpp_builder.is_gcc())


def vector_bits() -> int:
    """Return the width of the vectors that Inductor writes C++ for, as its settings are now."""
    from torch._inductor import cpu_vec_isa

    return int(cpu_vec_isa.pick_vec_isa().bit_width())


def library_builder(
    name: str, sources: Sequence[Path], folder: Path, flags: Sequence[str], *, compile_only: bool = False
) -> Any:
    """Return what builds a shared library against PyTorch, as Inductor builds its own.

    Its ``build()`` writes the file ``get_target_file_path()`` by ``get_command_line()``. ``compile_only``: an object
    file, which is then a source of the library.
    """
    from torch._inductor.cpp_builder import CppBuilder, CppTorchOptions

    options = CppTorchOptions(include_pytorch=True, warning_all=False, extra_flags=flags, compile_only=compile_only)
    return CppBuilder(name=name, sources=[*map(str, sources)], BuildOption=options, output_dir=str(folder))


def cache_folder(*, made: bool = True) -> Path:
    """Return where Inductor keeps what it compiled; ``made``: create it if there is none."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir, default_cache_dir

    if made:
        return Path(cache_dir())
    return Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or default_cache_dir())


def refuse_in_inductor(operator: Any, error: Callable[[], Exception]) -> None:
    """Let Inductor raise an error where it would compile an operator whose result is read.

    ``torch._inductor.lowering`` must be imported.
    """
    from torch._inductor.lowering import register_lowering

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise error()

    register_lowering(operator, type_promotion_kind=None)(refuse)
