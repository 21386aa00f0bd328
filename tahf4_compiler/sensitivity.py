"""How much each linear costs in quality when it runs in 4 bits, and which to protect under a budget."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from . import hif4, kernels
from .errors import OptionError
from .packing import pack_weight
from .transforms import multipliers

__all__ = ["Network", "QuantizedWeight", "choose", "output_error", "sqnr_db"]


class QuantizedWeight:
    """A weight in HiF4 with its transform, dequantized once; calling it is a W4A4 product in float32."""

    def __init__(
        self,
        weight: Tensor,
        mask: Tensor | None,
        seed: int | None,
        block: int,
        search: str = "",
        importance: Tensor | None = None,
    ) -> None:
        """Transform, convert and dequantize ``[N, K]``."""
        forward, backward = multipliers(weight.shape[1], mask, seed)
        self.multiplier = forward.to(weight.device) if forward is not None else None
        self.block = block
        inverse = backward.to(weight.device) if backward is not None else None
        packed = pack_weight(weight, inverse, block, search=search, importance=importance)
        self.weight = _whole(packed.codes, packed.scales)

    def quantize(self, x: Tensor) -> Tensor:
        """Return what the product reads of an activation ``[..., K]``: float32, K in whole units of 64."""
        return _whole(*kernels.quantize(x, self.multiplier, self.block))

    def __call__(self, x: Tensor) -> Tensor:
        """Return the W4A4 product of ``[..., K]``: float32 ``[..., N]``."""
        return nn.functional.linear(self.quantize(x), self.weight)


def _whole(codes: Tensor, scales: Tensor) -> Tensor:
    return hif4.dequantize(hif4.Packed(codes, scales, scales.shape[-1] * hif4.UNIT))


def output_error(rows: Tensor, weights: Sequence[Tensor], product: Callable[[Tensor], Tensor]) -> list[float]:
    """Return the relative squared error of each linear's output on sample rows.

    Args:
        rows: ``[R, K]``.
        weights: ``[N_i, K]`` each.
        product: of the weights' rows joined, as :class:`QuantizedWeight`.
    """
    x = rows.to(torch.float32)
    found = product(rows).split([len(weight) for weight in weights], -1)
    errors = []
    for weight, value in zip(weights, found, strict=True):
        want = nn.functional.linear(x, weight.detach().to(torch.float32))
        errors.append(float((value - want).square().sum() / want.square().sum().clamp(min=1e-30)))
    return errors


def sqnr_db(error: float) -> float:
    """Return a relative squared error as a signal-to-quantization-noise ratio in dB."""
    return -10 * math.log10(max(error, 1e-30))


class Network:
    """A model's outputs on a few calls, and their relative squared error when some linears are quantized.

    The model runs as it is, not compiled, in its own precision.
    """

    def __init__(self, model: nn.Module, calls: Sequence[tuple[Sequence[Any], Mapping[str, Any]]]) -> None:
        """Run the calls (arguments and keyword arguments) in the original precision."""
        self._model, self._calls = model, calls
        self._wanted = self._outputs()

    def _outputs(self) -> list[Tensor]:
        # Not a compiled one, whatever is compiled inside.
        held = {m: m._compiled_call_impl for m in self._model.modules() if m._compiled_call_impl is not None}
        for module in held:
            module._compiled_call_impl = None
        try:
            with torch.no_grad():
                return [_first(self._model(*args, **kwargs)).float() for args, kwargs in self._calls]
        finally:
            for module, call in held.items():
                module._compiled_call_impl = call

    def error(self, quantized: Mapping[str, QuantizedWeight]) -> float:
        """Return the mean over the calls of the relative squared error, with these linears quantized, by path."""
        with contextlib.ExitStack() as stack:
            for path, product in quantized.items():
                stack.enter_context(_quantized(self._model.get_submodule(path), product))
            found = self._outputs()
        pairs = zip(found, self._wanted, strict=True)
        errors = [float((a - b).square().sum() / b.square().sum().clamp(min=1e-30)) for a, b in pairs]
        return sum(errors) / len(errors)

    def effects(self, quantized: Mapping[str, Callable[[], QuantizedWeight]]) -> dict[str, float]:
        """Return the error when only one linear is quantized, for each: one pass a linear and call, no estimate."""
        bar = tqdm(quantized.items(), desc="sensitivity", unit="linear", delay=1.0)
        return {path: self.error({path: make()}) for path, make in bar}


@contextlib.contextmanager
def _quantized(linear: nn.Module, product: QuantizedWeight) -> Iterator[None]:
    def forward(x: Tensor) -> Tensor:
        out = product(x)
        bias = getattr(linear, "bias", None)
        return (out if bias is None else out + bias.float()).to(x.dtype)

    linear.__dict__["forward"] = forward
    try:
        yield
    finally:
        del linear.__dict__["forward"]


def _first(value: Any) -> Tensor:
    return next(leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, Tensor))


def choose(
    effects: Mapping[str, float],
    flops: Mapping[str, float],
    block_of: Callable[[str], str],
    *,
    max_high_precision_linears: int | None = None,
    max_high_precision_blocks: int | None = None,
    min_flops_4bit: float | None = None,
) -> list[str]:
    """Return the linears to keep in high precision: those of the greatest effect, within a budget.

    Effects of different linears are taken to add up, as independent errors do.

    Args:
        effects: relative squared error of the output for each linear.
        flops: of each linear, in any unit.
        block_of: name of the block around a linear.
        max_high_precision_linears: keep at most so many linears.
        max_high_precision_blocks: keep at most so many whole blocks.
        min_flops_4bit: keep linears while at least this share (0 to 1) of ``flops`` stays in 4 bits, those of
            the greatest effect for their FLOPs first.

    Raises:
        OptionError: not exactly one budget, or one out of range.
    """
    budgets = [max_high_precision_linears, max_high_precision_blocks, min_flops_4bit]
    if sum(budget is not None for budget in budgets) != 1:
        raise OptionError(
            "a budget is one of max_high_precision_linears, max_high_precision_blocks and min_flops_4bit; "
            f"got {sum(budget is not None for budget in budgets)} of them"
        )
    if min_flops_4bit is not None:
        if not 0 <= min_flops_4bit <= 1:
            raise OptionError(f"min_flops_4bit is {min_flops_4bit}; expected a share from 0 to 1")
        allowed, kept = (1 - min_flops_4bit) * sum(flops.values()), []
        for path in sorted(effects, key=lambda p: (-effects[p] / max(flops[p], 1), p)):
            if flops[path] <= allowed * (1 + 1e-9):
                allowed -= flops[path]
                kept.append(path)
        return kept
    count = max_high_precision_linears if max_high_precision_linears is not None else max_high_precision_blocks
    if not isinstance(count, int) or isinstance(count, bool) or count < 0:
        raise OptionError(f"the budget is {count!r}; expected an integer of at least 0")
    if max_high_precision_linears is not None:
        return sorted(effects, key=lambda p: (-effects[p], p))[:count]
    blocks: dict[str, float] = {}
    for path, effect in effects.items():
        blocks[block_of(path)] = blocks.get(block_of(path), 0.0) + effect
    chosen = sorted(blocks, key=lambda b: (-blocks[b], b))[:count]
    return [path for path in effects if block_of(path) in chosen]
