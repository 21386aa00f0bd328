"""Generated Triton kernels: on NVIDIA GPUs, and on the CPU in Triton's interpreter.

Each operator of a lowered graph has a counterpart in the namespace ``tahf4_triton`` that generates a kernel for what it
is called with, or takes it from the cache, and launches it.

The counterparts are opaque to Inductor. ``triton_op`` would show it the launch, but there
is nothing left to gain: what Inductor could fuse is in the kernel already, and grid, strides and paths are chosen from
the sizes at run time, which would otherwise be specialized for each number of tokens.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ... import ops
from ...errors import FormatError
from ...format import hif4, int8
from ...format.spans import ROUNDED, alone, check_form, units_of
from ...ops import fused
from ...ops.attention_codes import ATTENTIONS
from ...ops.define import define
from ...ops.program import DTYPES, Program
from ...ops.registry import arguments, in_16_bits, register_kernel
from ...plugins import host
from .call import Call

__all__ = ["available", "calls_of", "checksums", "register", "run", "sources_of", "why_not"]

_LIBRARY = torch.library.Library("tahf4_triton", "FRAGMENT")
_FLOATS = tuple(DTYPES.values())
_CAPABILITY = (8, 0)
MAX_QUANTIZE_BLOCK = 4096
MAX_SHARED_BLOCK = 128
"""Of a rotation in a kernel that multiplies as well: wider ones would spill."""
MAX_CHANNELS = 256
"""Of a head of queries in attention: those of more do not fit the registers."""


def why_not(device: torch.device) -> str | None:
    """Return why no kernel can run on a device; None if they can."""
    from .interpreter import interpreting

    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device.type == "cpu":
        return None if interpreting() else "Triton has no CPU (TRITON_INTERPRET=1 runs its interpreter, for tests)"
    if device.type != "cuda" or torch.version.hip is not None:
        return f"no kernels for device {device.type!r} of this build"
    if not torch.cuda.is_available():
        return "CUDA is not available"
    found = torch.cuda.get_device_capability(device)
    return None if found >= _CAPABILITY else f"compute capability {found[0]}.{found[1]} is below 8.0"


@functools.cache
def available(device: torch.device) -> bool:
    """Whether kernels run on a device."""
    return why_not(device) is None


def run(calls: Sequence[Call]) -> None:
    """Launch, one after the other."""
    from .interpreter import interpreting, mend

    if interpreting():
        mend()
    for call in calls:
        call.run()


@functools.cache
def _device_facts(device: torch.device) -> tuple[tuple[int, int] | None, int]:
    """Return compute capability (None for the interpreter) and number of processors."""
    if device.type != "cuda":
        return None, 4
    return torch.cuda.get_device_capability(device), torch.cuda.get_device_properties(device).multi_processor_count


# What each operator launches: results, empty, and launches that fill them. The device may be the meta device.


def _quantize(
    x: Tensor, multiplier: Tensor | None = None, hadamard_block: int = 0, bits: int = 4, span: int = 1
) -> tuple[Any, list[Call]]:
    from . import quantize

    int8.check_bits(bits, quantized=True)
    ops.check_transform(x.shape[-1], multiplier, hadamard_block)
    return quantize.call([x], "", _dense(multiplier), hadamard_block, bits, _form(bits, span))


def _fused_quantize(
    inputs: list[Tensor],
    program: str,
    multiplier: Tensor | None = None,
    hadamard_block: int = 0,
    bits: int = 4,
    span: int = 1,
) -> tuple[Any, list[Call]]:
    from . import quantize

    int8.check_bits(bits, quantized=True)
    fused.program_before(program)
    ops.check_transform(torch.broadcast_shapes(*(i.shape for i in inputs))[-1], multiplier, hadamard_block)
    return quantize.call(inputs, program, _dense(multiplier), hadamard_block, bits, _form(bits, span))


def _branched_quantize(*args: Any, **kwargs: Any) -> tuple[list[Tensor], list[Call]]:
    from . import branches

    return branches.calls(*args, **kwargs)


def _dequantize(codes: Tensor, scales: Tensor, k: int, dtype: torch.dtype) -> tuple[Any, list[Call]]:
    from . import expand

    return expand.dequantize(codes, scales, k, dtype)


def _linear(
    codes: Tensor,
    scales: Tensor,
    weight_codes: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    span: int = 1,
) -> tuple[Any, list[Call]]:
    sizes = [weight_codes.shape[0]]
    results, calls = _fused_linear(
        codes, scales, weight_codes, weight_scales, bias, out_dtype, sizes, [], "", out_dtype, span
    )
    return results[0], calls


def _fused_linear(
    codes: Tensor,
    scales: Tensor,
    weight_codes: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    sizes: list[int],
    inputs: list[Tensor],
    program: str,
    result_dtype: torch.dtype,
    span: int = 1,
) -> tuple[Any, list[Call]]:
    hif4.check_span(span)
    ops.check_linear(codes, scales, weight_codes, weight_scales, bias)
    fused.check_sizes(sizes, len(weight_codes), program)
    statements = Program.parse(program).statements
    found = statements[-1].dtype if statements else out_dtype
    if found != result_dtype:
        raise FormatError(f"the program's result is {found}; result_dtype says {result_dtype}")
    operands = (codes, scales, weight_codes, weight_scales, _dense(bias), out_dtype)
    return _product(*operands, sizes, inputs, program, result_dtype, span=span)


def _linear_quantize(
    codes: Tensor,
    scales: Tensor,
    weight_codes: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    inputs: list[Tensor],
    program: str,
    multiplier: Tensor | None,
    hadamard_block: int,
    bits: int = 4,
    span: int = 1,
) -> tuple[Any, list[Call]]:
    rounding = check_form(alone(span)) // ROUNDED if bits == 4 else 0
    int8.check_bits(bits, quantized=True)
    ops.check_linear(codes, scales, weight_codes, weight_scales, bias)
    n = weight_codes.shape[0]
    ops.check_transform(n, multiplier, hadamard_block)
    operands = (codes, scales, weight_codes, weight_scales, _dense(bias), out_dtype)
    after = (program, None, _dense(multiplier), hadamard_block, bits, rounding)
    results, calls = _product(*operands, [n], inputs, *after, span=units_of(span))
    return tuple(results), calls


def _of_attention(function: str, on: int = 0) -> Callable[..., tuple[Any, list[Call]]]:
    """Return a function of :mod:`.attention` or :mod:`.attention_fused`; ``on``: an argument that is a tensor."""

    def launched(*args: Any, **kwargs: Any) -> tuple[Any, list[Call]]:
        from . import attention, attention_fused

        owner = attention if hasattr(attention, function) else attention_fused
        capability = _device_facts(args[on].device)[0]
        found: tuple[Any, list[Call]] = getattr(owner, function)(*args, **kwargs, capability=capability)
        return found

    return launched


def _form(bits: int, span: int) -> int:
    """Return the form of an activation, checked: one of 8 bits has none."""
    return check_form(span) if bits == 4 else 1


def _dense(values: Tensor | None) -> Tensor | None:
    """Return a bias or multiplier as kernels read it: one value behind the other."""
    return None if values is None else values.contiguous()


def _product(codes: Tensor, scales: Tensor, *args: Any, span: int) -> tuple[list[Tensor], list[Call]]:
    from . import linear, tiling, tune

    int8.check_bits(ops.activation_bits(codes), quantized=True)
    device, rows = codes.device, math.prod(codes.shape[:-1])
    capability, processors = _device_facts(device)

    def launched(path: str | None = None, tile: Any = None) -> tuple[list[Tensor], list[Call]]:
        how: dict[str, Any] = {"span": span, "path": path, "tile": tile}
        return linear.calls(codes, scales, *args, capability=capability, processors=processors, **how)

    if not tune.wanted(device, rows):
        return launched()
    weight_codes, block = args[0], args[9] if len(args) > 9 else 0
    n, count = weight_codes.shape[0], scales.shape[-1]
    span = linear.usable_span(codes, scales, span)
    key = linear.key_of(codes, scales, *args, span=span)
    assert capability is not None
    known = tiling.candidates(rows, n, count, capability, processors, block, args[7] is None, span)
    chip = torch.cuda.get_device_name(device)
    path, tile = tune.choose(tune.key_of(key, rows, n, count), chip, known, lambda choice: launched(*choice)[1])
    return launched(path, tile)


_CALLS: dict[str, Callable[..., tuple[Any, list[Call]]]] = {
    "quantize": _quantize,
    "dequantize": _dequantize,
    "linear": _linear,
    "fused_quantize": _fused_quantize,
    "branched_quantize": _branched_quantize,
    "fused_linear": _fused_linear,
    "linear_quantize": _linear_quantize,
    "attention": _of_attention("calls"),
    "attention_lse": _of_attention("calls_with_lse"),
    "attention_of_codes": _of_attention("calls_of_codes"),
    "attention_quantize": _of_attention("quantized_calls"),
    "fused_attention": _of_attention("calls_of_programs", 4),
    "fused_attention_quantize": _of_attention("quantized_calls_of_programs", 4),
}


def calls_of(node: fx.Node) -> list[Call]:
    """Return what a node of a lowered graph would launch, on the meta device, for the sizes of the example."""
    from ...graph.nodes import size_hint

    def meta(arg: fx.Node) -> Any:
        value = arg.meta["val"]
        if not isinstance(value, Tensor):
            return size_hint(value)
        shape, stride = [size_hint(s) for s in value.shape], [size_hint(s) for s in value.stride()]
        return torch.empty_strided(shape, stride, dtype=value.dtype, device="meta")

    args, kwargs = fx.node.map_arg((node.args, node.kwargs), meta)
    return _CALLS[node.target._opname](*args, **kwargs)[1]  # type: ignore[union-attr]


def sources_of(node: fx.Node) -> dict[str, str]:
    """Return the files of the kernels that a node launches, each with a ``__main__`` that launches it alone."""
    return {f"kernel_{call.digest}.py": call.standalone() for call in calls_of(node)}


def _eager(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cuda" and dtype in _FLOATS and available(device)


def _serves(node: fx.Node) -> bool:
    values = [n.meta.get("val") for n in node.all_input_nodes]
    tensors = [value for value in values if isinstance(value, Tensor)]
    if not tensors or len({value.device for value in tensors}) > 1 or not available(tensors[0].device):
        return False
    if in_16_bits(node):
        return False
    given = arguments(node)
    block = given.get("hadamard_block")
    limit = MAX_SHARED_BLOCK if "weight_codes" in given or "factors" in given else MAX_QUANTIZE_BLOCK
    dtypes = [value.dtype for value in tensors] + [v for v in given.values() if isinstance(v, torch.dtype)]
    packed = (torch.uint8, torch.int32, torch.int8)
    if node.target in ATTENTIONS or "q_program" in given:
        from .attention_fused import serves

        wide = "query" in given and given["query"].meta["val"].shape[-1] > MAX_CHANNELS
        return serves(given) and not wide and all(dtype in (*_FLOATS, torch.bool, *packed) for dtype in dtypes)
    if "factors" in given and units_of(given.get("span", 1)) != 1:
        return False  # a block of threads holds no whole rows
    if any(factor.meta["val"].dtype == torch.float32 for factor in given.get("factors", ())):
        return False  # without matrix units the sums fill the registers; PyTorch's product does better
    narrow = not isinstance(block, int) or block <= limit
    return narrow and all(dtype in _FLOATS or dtype in packed for dtype in dtypes)


def _operator(name: str, function: Callable[..., Any]) -> torch._ops.OpOverload:
    """Define ``tahf4_triton::name`` with the arguments, results and fake kernel of ``tahf4::name``."""
    schema = getattr(torch.ops.tahf4, name).default._schema
    text = str(schema).removeprefix(f"tahf4::{name}")

    def launched(*args: Any, **kwargs: Any) -> Any:
        results, calls = function(*args, **kwargs)
        run(calls)
        return results

    found = define(_LIBRARY, name, text, launched)
    torch.library.register_fake(f"tahf4_triton::{name}", _fake(name), lib=_LIBRARY)
    return found


def _fake(name: str) -> Callable[..., Any]:
    """Return a function that gives what ``tahf4::name`` gives for fake tensors."""
    operator = getattr(torch.ops.tahf4, name).default

    def fake(*args: Any, **kwargs: Any) -> Any:
        return operator(*args, **kwargs)

    return fake


@functools.cache
def register() -> None:
    """Register the kernels, once."""
    assert fused
    for name, function in _CALLS.items():
        register_kernel(
            "triton", getattr(torch.ops.tahf4, name).default, _operator(name, function), _serves, sources_of, _eager
        )
    host.register("dequantize", _expands, torch.ops.tahf4_triton.dequantize.default)
    host.register("checksums", _reads, checksums)
    host.register("spans_save_time", available, _spans_save_time)
    host.register("round_unit", _rounds, round_unit)
    host.register("descend_unit", _rounds, descend_unit)


def _spans_save_time(device: torch.device) -> bool:
    from . import tiling

    return tiling.adds_over_spans(_device_facts(device)[0])


def round_unit(values: Tensor, steps: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Round one unit of a reconstructed weight: see :func:`.rounding.round_unit`."""
    from . import rounding

    results, launch = rounding.round_unit(values, steps, factor)
    run([launch])
    return results


def descend_unit(rounded: Tensor, slopes: Tensor, steps: Tensor, moments: Tensor) -> None:
    """Round one unit of a reconstructed weight again, in place: see :func:`.rounding.descend_unit`."""
    from . import rounding

    run([rounding.descend_unit(rounded, slopes, steps, moments)])


def checksums(data: Sequence[Tensor], factors: Tensor) -> list[int]:
    """Return the checksums of tensors on one device, with a launch for each and one wait.

    The reference is :func:`tahf4_compiler.weights.checksum.checksum`.

    Args:
        data: contiguous uint8 ``[B]`` each.
        factors: int64 ``[4096]`` of the lanes.
    """
    from . import checksum

    out, launches = checksum.calls(data, factors)
    run(launches)
    found: list[int] = out.tolist()
    return found


def _reads(data: Sequence[Tensor]) -> bool:
    return bool(data) and all(part.is_cuda and type(part) is Tensor for part in data) and available(data[0].device)


def _rounds(values: Tensor) -> bool:
    return values.is_cuda and type(values) is Tensor and available(values.device)


def _expands(codes: Tensor) -> bool:
    return type(codes) in (Tensor, torch.nn.Parameter) and available(codes.device)
