"""Operators that ``fuse`` makes of several nodes: ``torch.ops.tahf4.{fused_quantize, fused_linear, linear_quantize}``,
and ``branched_quantize``.

What is computed around a quantization or a product is a :class:`~tahf4_compiler.ops.program.Program`, as text in the
node's arguments. The references replay it with PyTorch's own operators, so they give the numbers of the graph before
``fuse``. A backend generates a kernel from it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import FormatError
from ..format import int8
from ..format.spans import alone, check_form, units_of
from .define import operator
from .program import Program
from .reference import check_memory, empty_units, linear, quantize

__all__ = [
    "branched_quantize",
    "check_factors",
    "check_sizes",
    "fused_linear",
    "fused_quantize",
    "linear_quantize",
    "program_after",
    "program_before",
]


def _named(inputs: list[Tensor]) -> dict[str, Tensor]:
    return {f"x{i}": value for i, value in enumerate(inputs)}


def _shape(inputs: list[Tensor]) -> torch.Size:
    return torch.broadcast_shapes(*(value.shape for value in inputs))


def program_before(text: str) -> Program:
    """Return a program that ends in a quantization.

    Raises:
        FormatError: it cannot be read, or it has a ``matmul``, which only follows a product, or a ``rotary``, which
            only attention has.
    """
    program = Program.parse(text)
    if program.factors():
        raise FormatError("a program before a quantization has a matmul; expected it after a product")
    return _without_angles(program)


def program_after(text: str) -> Program:
    """Return a program behind a product.

    Raises:
        FormatError: it cannot be read, or it has a ``rotary``, which only attention has.
    """
    return _without_angles(Program.parse(text))


def _without_angles(program: Program) -> Program:
    if program.angles():
        raise FormatError("a program of a linear has a rotary embedding; expected it before attention alone")
    return program


def _after(y: Tensor, program: str, inputs: list[Tensor]) -> Tensor:
    """Return a program's result on a product."""
    found = program_after(program).run({"y": y, **_named(inputs)}, "y")
    if found.shape != y.shape:
        raise FormatError(f"the program's result is {tuple(found.shape)}; expected {tuple(y.shape)}, as the product's")
    return found


def _before(inputs: list[Tensor], program: str) -> Tensor:
    """Return the result of a program that ends in a quantization."""
    x = program_before(program).run(_named(inputs), "x0")
    if x.shape != _shape(inputs):
        raise FormatError(f"the program's result is {tuple(x.shape)}; expected {tuple(_shape(inputs))}, as its inputs")
    return x


@operator
def fused_quantize(
    inputs: list[Tensor],
    program: str,
    multiplier: Tensor | None = None,
    hadamard_block: int = 0,
    bits: int = 4,
    span: int = 1,
) -> tuple[Tensor, Tensor]:
    """Compute a program and quantize its result, which never reaches memory in a kernel.

    Args:
        inputs: ``x0, x1, ...`` of the program, that broadcast to ``[..., K]``.
        program: see :mod:`tahf4_compiler.ops.program`; its result has the shape that the inputs broadcast to.
        multiplier: float32 ``[K]`` or None, as for ``tahf4::quantize``.
        hadamard_block: as for ``tahf4::quantize``.
        bits: 4 or 8, as for ``tahf4::quantize``.
        span: as for ``tahf4::quantize``.

    Returns:
        Codes and scales of ``[..., K]``, as ``tahf4::quantize``.

    Raises:
        FormatError: as ``tahf4::quantize``; a program that cannot be read, or whose result is smaller than its inputs.
    """
    int8.check_bits(bits, quantized=True)
    codes, scales = quantize(_before(inputs, program), multiplier, hadamard_block, bits, span)
    return codes, scales


@torch.library.register_fake("tahf4::fused_quantize")
def _(
    inputs: list[Tensor],
    program: str,
    multiplier: Tensor | None = None,
    hadamard_block: int = 0,
    bits: int = 4,
    span: int = 1,
) -> tuple[Tensor, Tensor]:
    int8.check_bits(bits, quantized=True)
    check_memory("fused_quantize", *inputs, multiplier)
    return empty_units(inputs[0], _shape(inputs), bits)


@operator
def branched_quantize(
    inputs: list[Tensor],
    program: str,
    factors: list[Tensor],
    multiplier: Tensor | None = None,
    hadamard_block: int = 0,
    bits: int = 4,
    span: int = 1,
) -> list[Tensor]:
    """Compute a program, quantize its result ``x``, and multiply ``x`` by the first factors of branches of low rank.

    Args:
        inputs: and the next one as for ``tahf4::fused_quantize``. An empty program returns ``x0``.
        program: see there.
        factors: ``[K, r]`` of each branch, of the dtype of ``x``.
        multiplier: and the following as for ``tahf4::quantize``. They transform what is quantized, and not what is
            multiplied.
        hadamard_block: see there.
        bits: 4 or 8, see there.
        span: see there.

    Returns:
        Codes and scales of ``[..., K]``, as ``tahf4::quantize``, and ``x @ factor``, contiguous ``[..., r]``, for each
        factor.

    Raises:
        FormatError: as ``tahf4::fused_quantize``; a factor that does not fit ``x``.
    """
    int8.check_bits(bits, quantized=True)
    x = _before(inputs, program)
    check_factors(factors, x.shape[-1], x.dtype)
    with torch.autocast(x.device.type, enabled=False):  # which would cast the product
        products = [torch.matmul(x, factor).contiguous() for factor in factors]
    return [*quantize(x, multiplier, hadamard_block, bits, span), *products]


@torch.library.register_fake("tahf4::branched_quantize")
def _(
    inputs: list[Tensor],
    program: str,
    factors: list[Tensor],
    multiplier: Tensor | None = None,
    hadamard_block: int = 0,
    bits: int = 4,
    span: int = 1,
) -> list[Tensor]:
    int8.check_bits(bits, quantized=True)
    check_memory("branched_quantize", *inputs, *factors, multiplier)
    shape = _shape(inputs)
    products = [factor.new_empty((*shape[:-1], factor.shape[1])) for factor in factors]
    return [*empty_units(inputs[0], shape, bits), *products]


def check_factors(factors: Sequence[Tensor], k: int, dtype: torch.dtype) -> None:
    """Refuse factors that do not fit an activation ``[..., K]`` of a dtype."""
    for factor in factors:
        if factor.dim() != 2 or factor.shape[0] != k or factor.dtype != dtype:
            raise FormatError(
                f"a factor of a branch is {factor.dtype} {tuple(factor.shape)}; expected {dtype} {(k, 'r')}, as the "
                "activation"
            )


@operator
def fused_linear(
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
) -> list[Tensor]:
    """W4A4 or W4A8 linear, then a program on its result, or several contiguous results.

    Args:
        codes: and the next five as for ``tahf4::linear``; its result is ``y`` of the program.
        scales: of the activation.
        weight_codes: of the weight.
        weight_scales: of the weight.
        bias: or None.
        out_dtype: of ``y``.
        sizes: columns of each result; they sum to N. More than one only with an empty program.
        inputs: ``x0, x1, ...`` of the program, that broadcast to ``[..., N]``.
        program: see :mod:`tahf4_compiler.ops.program`.
        result_dtype: of the results: that of the program's last statement, ``out_dtype`` if it is empty.

    Returns:
        ``[..., size]`` for each of the sizes.

    Raises:
        FormatError: as ``tahf4::linear``; a program that cannot be read, or whose result is not of the product's shape;
            sizes that do not fit.
    """
    y = linear(codes, scales, weight_codes, weight_scales, bias, out_dtype, span)
    check_sizes(sizes, y.shape[-1], program)
    y = _after(y, program, inputs)
    if y.dtype != result_dtype:
        raise FormatError(f"the program's result is {y.dtype}; result_dtype says {result_dtype}")
    if len(sizes) == 1:
        return [y.contiguous()]
    return [part.clone(memory_format=torch.contiguous_format) for part in y.split(sizes, -1)]


@torch.library.register_fake("tahf4::fused_linear")
def _(
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
) -> list[Tensor]:
    check_sizes(sizes, weight_codes.shape[0], program)
    check_memory("fused_linear", codes, scales, weight_codes, weight_scales, bias, *inputs)
    return [codes.new_empty((*codes.shape[:-1], size), dtype=result_dtype) for size in sizes]


def check_sizes(sizes: Sequence[int], n: int, program: str) -> None:
    """Refuse sizes of results that do not fit a product of ``n`` columns."""
    if sum(sizes) != n or min(sizes, default=0) < 0 or (len(sizes) != 1 and program):
        raise FormatError(
            f"sizes {list(sizes)} with {n} columns; expected their sum, and one size where there is a program"
        )


@operator
def linear_quantize(
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
) -> tuple[Tensor, Tensor]:
    """W4A4 or W4A8 linear, a program on its result (bias, GELU), and the quantization of that.

    Args:
        codes: and the following as for ``tahf4::fused_linear``.
        scales: of the activation.
        weight_codes: of the weight.
        weight_scales: of the weight.
        bias: or None.
        out_dtype: of ``y``.
        inputs: of the program.
        program: see :mod:`tahf4_compiler.ops.program`.
        multiplier: float32 ``[N]`` or None, as for ``tahf4::quantize``.
        hadamard_block: as for ``tahf4::quantize``.
        bits: of the result, 4 or 8, as for ``tahf4::quantize``.
        span: of the operands, as for ``tahf4::linear``. The result has none: a row of it would have to be known whole.
            8 or 16 more for the rounding of the result, as for ``tahf4::quantize``.

    Returns:
        Codes and scales of ``[..., N]``, as ``tahf4::quantize``.

    Raises:
        FormatError: as ``tahf4::linear`` and ``tahf4::quantize``; a program that cannot be read, or whose result is not
            of the product's shape.
    """
    int8.check_bits(bits, quantized=True)
    y = linear(codes, scales, weight_codes, weight_scales, bias, out_dtype, units_of(span))
    y = _after(y, program, inputs)
    found, metadata = quantize(y, multiplier, hadamard_block, bits, check_form(alone(span)))
    return found, metadata


@torch.library.register_fake("tahf4::linear_quantize")
def _(
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
) -> tuple[Tensor, Tensor]:
    int8.check_bits(bits, quantized=True)
    check_memory("linear_quantize", codes, scales, weight_codes, weight_scales, bias, *inputs, multiplier)
    return empty_units(codes, (*codes.shape[:-1], weight_codes.shape[0]), bits)
