"""The product of a packed linear: in a graph, before passes see it, one operator, which no kernel is chosen for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import FormatError, GradientError, PackedError
from ..format.spans import units_of
from ..options import reference_forced
from . import registry
from .define import operator
from .reference import check_memory

__all__ = ["packed_linear", "packed_product"]

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_CODES_DTYPE = (
    ". Code that casts to next(module.parameters()).dtype finds the type of the codes there if a packed linear has "
    "neither bias nor multiplier: cast to the dtype of its weight (linear.weight.dtype), or of the model in diffusers "
    "and transformers (model.dtype)."
)


def product(
    x: Tensor,
    multiplier: Tensor | None,
    hadamard_block: int,
    weight_codes: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    bits: int = 4,
    span: int = 1,
    by_step: bool = False,
    k: int = 0,
) -> Tensor:
    """Quantize an activation and multiply it, each with the kernel that is best on its device.

    The backend ``tahf4`` puts ``tahf4::quantize`` and ``tahf4::linear`` in the place of this operator.

    Args:
        x: ``[..., K]``.
        multiplier: with the next one, as for ``tahf4::quantize``.
        hadamard_block: see there.
        weight_codes: with the next three, as for ``tahf4::linear``.
        weight_scales: see there.
        bias: see there.
        out_dtype: see there.
        bits: of the activation.
        span: a form, as for ``tahf4::quantize``.
        by_step: whether the denoising step decides on the bits. Only the backend knows the step.
        k: features that the linear reads, where nothing else holds the input against them; else 0.

    Returns:
        ``[..., N]``.

    Raises:
        PackedError: the step decides.
        FormatError: the input has another width.
    """
    if by_step:
        raise PackedError(
            "a packed model has steps in high precision, and something else than the backend 'tahf4' compiled, "
            "exported or traced it, which cannot know the step. Compile it with backend='tahf4', run it as it is, or "
            "take the steps off first: tahf4.set_high_precision_steps(model, ())"
        )
    if k:
        _check_width(x, k, weight_codes)
    reference = reference_forced()
    codes, scales = registry.quantize(x, multiplier, hadamard_block, bits, span, reference)
    return registry.linear(codes, scales, weight_codes, weight_scales, bias, out_dtype, units_of(span), reference)


def _check_width(x: Tensor, k: int, codes: Tensor) -> None:
    """Refuse another width: codes are filled up to whole units, and a narrower input would be, too."""
    if x.dim() == 0 or x.shape[-1] != k:
        raise FormatError(
            f"a packed linear of {k} -> {codes.shape[0]} features got a tensor of shape {tuple(x.shape)}, "
            f"expected {k} along its last axis"
        )


packed_linear = operator(product, "packed_linear")


@torch.library.register_fake("tahf4::packed_linear")
def _(*given: Any) -> Tensor:
    check_memory("packed_linear", *(value for value in given if isinstance(value, Tensor)))
    return product(*given[:9])  # whose shape no step decides on


@torch.fx.wrap  # asks the input for its values' device and dtype, which nothing has that traces symbolically
def packed_product(
    input: Tensor,
    multiplier: Tensor | None,
    *weight: Any,
    k: int,
    out_dtype: torch.dtype | None,
    bits: int,
    span: int,
    by_step: bool,
) -> Tensor:
    """Return what a packed linear does to its input; ``torch.fx.symbolic_trace`` takes this call as a whole.

    Args:
        input: ``[..., K]``.
        multiplier: as for :func:`product`.
        weight: what stands between the multiplier and the dtype there.
        k: features that the linear reads.
        out_dtype: of the result; None for the input's (under autocast, for its dtype).
        bits: as for :func:`product`.
        span: see there.
        by_step: see there.

    Raises:
        GradientError: a gradient or a forward-mode derivative is asked for.
        FormatError: the input is nested, no floating-point tensor or of another width, or the multiplier was cast.
    """
    kind = input.device.type
    autocast = kind != "meta" and torch.is_autocast_enabled(kind)  # which knows no meta device
    if autocast and input.dtype != torch.float64:  # which autocast leaves alone
        input = input.to(torch.get_autocast_dtype(kind))
    if torch.is_grad_enabled() and input.requires_grad:
        raise GradientError(
            "a packed linear got an input that needs gradients, but 4-bit codes have none. Call the model under "
            "torch.no_grad() or torch.inference_mode(), or freeze it with model.requires_grad_(False)."
        )
    if input.dtype not in _FLOATS:
        raise FormatError(
            f"a packed linear got a tensor of {input.dtype}, expected float32, bfloat16, float16 or float64"
            + (_CODES_DTYPE if input.dtype == torch.uint8 else "")
        )
    if multiplier is not None and multiplier.dtype != torch.float32:
        raise FormatError(
            f"the multiplier of a packed linear is of {multiplier.dtype}, expected float32: something cast parameters "
            "one by one, which rounds it. Load the model again, and cast it with model.to(dtype), which leaves it."
        )
    if input.is_nested:
        raise FormatError(
            "a packed linear got a nested tensor, expected a plain one. Pad it (torch.nested.to_padded_tensor), or "
            "call the model with each of its parts (.unbind())."
        )
    traced = torch.jit.is_tracing()  # which keeps operators alone, and no check
    if not traced:
        _check_width(input, k, weight[1])
    # A graph is not of one device, nor of one backend: what compiles or runs it chooses the kernels.
    graph = torch.compiler.is_compiling() or traced or by_step
    run: Any = torch.ops.tahf4.packed_linear if graph else product
    result: Tensor = run(input, multiplier, *weight, out_dtype or input.dtype, bits, span, by_step, k if traced else 0)
    return result
