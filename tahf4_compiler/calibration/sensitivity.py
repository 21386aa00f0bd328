"""How much each linear costs in quality when it runs in 4 bits, and which to protect under a budget."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import math
import statistics
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..errors import CalibrationError
from ..files.memo import Measured
from ..format import hif4
from ..format.low_rank import LowRank, remainder
from ..format.spans import alone, units_of
from ..format.transforms import multipliers
from ..model.parts import Part, part_of, running_weights
from ..ops import registry
from ..torch_private.calls import replaced_linear, without_compiled_calls
from ..weights.packing import pack_weight
from .padding import kept_tokens, token_mask

__all__ = ["ENTRIES", "Network", "QuantizedWeight", "output_error", "sqnr_db", "squares"]


ENTRIES = 16
"""Entries of a call's batch on which the effect of a linear is measured; the pass is made for each linear."""


class QuantizedWeight:
    """A weight in HiF4 with its transform; calling it is a W4A4 or W4A8 product in float32."""

    def __init__(
        self,
        weight: Tensor,
        mask: Tensor | None,
        seed: int | None,
        block: int,
        search: str = "",
        importance: Tensor | None = None,
        packed: hif4.Packed | None = None,
        activation_bits: int = 4,
        low_rank: LowRank | None = None,
        span: int = 1,
    ) -> None:
        """Transform and convert ``[N, K]``, less its branch; or take what was packed before, on the weight's device."""
        forward, backward = multipliers(weight.shape[1], mask, seed)
        self.multiplier = forward.to(weight.device) if forward is not None else None
        self.block, self.activation_bits, self.span = block, activation_bits, span
        inverse = backward.to(weight.device) if backward is not None else None
        if packed is None:
            rest = remainder(weight, low_rank)
            packed = pack_weight(rest, inverse, block, search=search, importance=importance, span=span)
        self.packed = packed
        self.low_rank = low_rank and LowRank(*(factor.to(weight.device, torch.float32) for factor in low_rank))

    def part(self, part: Part | None) -> QuantizedWeight:
        """Return what a rank that holds a part of the weight computes, or this if it holds all.

        Raises:
            CalibrationError: the part cuts a unit or a rotation block.
        """
        if part is None:
            return self
        mine = copy.copy(self)
        k = self.packed.k
        if part.axis == 1:
            if k % (part.size * max(hif4.UNIT, self.block)):
                raise CalibrationError(
                    f"a rotation of {self.block} channels does not fit {part.size} parts of {k} "
                    "input features; choose a narrower block, or make the recipe on fewer ranks"
                )
            k //= part.size
            mine.span = alone(self.span)
            mine.multiplier = part.of(self.multiplier, 0) if self.multiplier is not None else None
        if self.low_rank is not None:
            a, b = self.low_rank
            mine.low_rank = LowRank(part.of(a, 0), b) if part.axis == 1 else LowRank(a, part.of(b, 1))
        mine.packed = hif4.Packed(part.of(self.packed.codes), part.of(self.packed.scales), k)
        return mine

    def __call__(self, x: Tensor, first: int = 0, count: int | None = None) -> Tensor:
        """Return the product of ``[..., K]`` with some rows of the weight: float32 ``[..., count]``."""
        rows = slice(first, None if count is None else first + count)
        codes, scales = (part[rows].contiguous() for part in self.packed[:2])
        left = registry.quantize(x, self.multiplier, self.block, self.activation_bits, self.span)
        out = registry.linear(*left, codes, scales, span=units_of(self.span))
        if self.low_rank is None:
            return out
        return out + x.to(torch.float32) @ self.low_rank.a @ self.low_rank.b[:, rows]


def output_error(rows: Tensor, weights: Sequence[Tensor], product: Callable[[Tensor], Tensor]) -> list[float]:
    """Return the relative squared error of each linear's output on sample rows.

    Args:
        rows: ``[R, K]``.
        weights: ``[N_i, K]`` each.
        product: of the weights' rows joined, as :class:`QuantizedWeight`.
    """
    return [error / max(norm, 1e-30) for error, norm in squares(rows, weights, product)]


def squares(
    rows: Tensor, weights: Sequence[Tensor], product: Callable[[Tensor], Tensor]
) -> list[tuple[float, float]]:
    """Return for each linear the sum of squares of its output's error and of the output itself.

    Args:
        rows: ``[R, K]``.
        weights: ``[N_i, K]`` each.
        product: of the weights' rows joined, as :class:`QuantizedWeight`.
    """
    x = rows.to(torch.float32)
    found = product(rows).split([len(weight) for weight in weights], -1)
    sums = []
    for weight, value in zip(weights, found, strict=True):
        want = nn.functional.linear(x, weight.detach().to(torch.float32))
        sums.append((float((value - want).square().sum()), float(want.square().sum())))
    return sums


def sqnr_db(error: float) -> float:
    """Return a relative squared error as a signal-to-quantization-noise ratio in dB."""
    return -10 * math.log10(max(error, 1e-30))


class Network:
    """A model's outputs on a few calls, and their relative squared error when some linears are quantized.

    The outputs of a call are all floating-point tensors in what the model returns, but for single numbers: with the
    first alone, a linear that feeds another one would seem to cost nothing. The error of a call is the mean of theirs,
    without those that are zero everywhere: no error is relative to them.
    The model runs as it is, not compiled, in its own precision. Each call draws the same random numbers, so dropout in
    training mode is no error. Linears are found where
    ``torch.nn.functional.linear`` reads their weight: in ``nn.Linear``, ``nn.MultiheadAttention`` and functional calls.

    Raises:
        CalibrationError: its output is NaN or infinite in its own precision, or zero everywhere, or empty, or holds no
            floating-point tensor.
    """

    def __init__(
        self,
        model: nn.Module,
        calls: Sequence[tuple[Sequence[Any], Mapping[str, Any]]],
        run: Callable[..., Any] | None = None,
        kept: Collection[str] = (),
    ) -> None:
        """Run the calls (arguments and keyword arguments) in the original precision.

        Args:
            model: whose outputs they are.
            calls: of it.
            run: calls the model in another way than not compiled.
            kept: paths of linears that are never quantized.
        """
        self._model, self._calls, self._run = model, calls, run or functools.partial(_eagerly, model)
        self._kept = frozenset(kept)
        self._weights: dict[str, list[Tensor]] = {}
        for path, weight in running_weights(model):
            self._weights.setdefault(path, []).append(weight)
        self._masks = [token_mask(model, args, kwargs) for args, kwargs in calls]
        self._wanted = self._outputs()
        if not all(bool(value.isfinite().all()) for call in self._wanted for value in call):
            raise CalibrationError(
                f"the output of {type(model).__name__} is NaN or infinite in its original precision on the calls that "
                "the calibration kept; calibrate with finite inputs, or mend the model (float16 overflows where "
                "bfloat16 does not)"
            )
        if not all(any(bool(value.any()) for value in call) for call in self._wanted):
            raise CalibrationError(
                f"the output of {type(model).__name__} is empty or zero everywhere on a call that the calibration "
                "kept, so that no error is relative to it; calibrate with trained weights and with inputs that are not "
                "empty, or make the recipe with another mask and sensitivity=False"
            )

    def _outputs(self) -> list[list[Tensor]]:
        return [self._output(call) for call in self._calls]

    def _output(self, call: tuple[Sequence[Any], Mapping[str, Any]]) -> list[Tensor]:
        args, kwargs = call
        devices = range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0)
        with torch.no_grad(), torch.random.fork_rng(devices):
            torch.manual_seed(0)
            value = self._run(*args, **kwargs)
        if found := list(_floating(value)):
            wide = [tensor for tensor in found if tensor.numel() > 1] or found  # a loss may be anything near zero
            return [tensor.float() for tensor in wide]
        raise CalibrationError(
            f"{type(self._model).__name__} returned {type(value).__name__}, and no floating-point tensor was found in "
            "it; to measure the network's output, return tensors, alone or in tuples, lists, dicts or dataclasses "
            "(logits and not tokens), or make the recipe with another mask and sensitivity=False"
        )

    def few(self, most: int = ENTRIES) -> Network:
        """Return this network with at most ``most`` entries of each call's batch.

        A call is cut if the model then gives what it gave for these entries; if not, it stays whole: its first axis is
        no batch.
        """
        calls = [self._cut(call, want, most) for call, want in zip(self._calls, self._wanted, strict=True)]
        same = all(a is b for a, b in zip(calls, self._calls, strict=True))
        return self if same else Network(self._model, calls, kept=self._kept)

    def run_by(self, run: Callable[..., Any]) -> Network:
        """Return this network, called in another way."""
        return Network(self._model, self._calls, run, self._kept)

    def _cut(
        self, call: tuple[Sequence[Any], Mapping[str, Any]], wanted: list[Tensor], most: int
    ) -> tuple[Sequence[Any], Mapping[str, Any]]:
        entries = len(wanted[0]) if wanted[0].dim() else 0
        if entries <= most:
            return call

        def few(value: Any) -> Any:
            return value[:most] if isinstance(value, Tensor) and value.dim() and len(value) == entries else value

        cut: tuple[Sequence[Any], Mapping[str, Any]] = torch.utils._pytree.tree_map(few, call)
        try:
            found = self._output(cut)
        except Exception:  # of whatever kind the model raises for shapes that it does not take
            return call
        want = [few(value) for value in wanted]
        same = [a.shape for a in found] == [b.shape for b in want]
        return cut if same and max(_errors(found, want), default=1) <= 1e-4 else call

    def read(self) -> set[str]:
        """Return the paths of the weights that linears read in the calls."""
        met: set[int] = set()

        def around(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
            def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
                met.update((id(weight), id(getattr(weight, "_base", None))))
                return original(x, weight, bias)

            return linear

        with replaced_linear(around):
            self._outputs()
        return {path for path, weights in self._weights.items() if any(id(weight) in met for weight in weights)}

    def error(self, quantized: Mapping[str, QuantizedWeight]) -> float | None:
        """Return the mean over the calls of the relative squared error, with these linears quantized, by path.

        None if no call read any of their weights as a linear: nothing was measured.
        """
        errors = self.errors(quantized)
        return sum(errors) / len(errors) if errors is not None else None

    def errors(self, quantized: Mapping[str, QuantizedWeight]) -> list[float] | None:
        """Return each call's relative squared error, with these linears quantized, by path; None as :meth:`error`."""
        products = {
            id(weight): product.part(part_of(weight))
            for path, product in quantized.items()
            if path not in self._kept
            for weight in self._weights[path]
        }
        with _quantized(products) as used:
            found = self.errors_now()
        return None if quantized and not used else found

    def errors_now(self) -> list[float]:
        """Return each call's relative squared error, as the model runs at the moment."""
        each = zip(self._outputs(), self._wanted, self._masks, strict=True)
        return [statistics.fmean(_errors(found, wanted, mask)) for found, wanted, mask in each]

    def effects(
        self, quantized: Mapping[str, Callable[[], QuantizedWeight]], measured: Measured, kind: str
    ) -> dict[str, float | None]:
        """Return the error when only one linear is quantized, for each: one pass a linear and call, no estimate.

        None for a weight that no linear reads in the calls.

        Args:
            quantized: what makes each linear's product, by path.
            measured: where the errors are kept.
            kind: under which name.
        """
        bar = tqdm(quantized.items(), desc="sensitivity", unit="linear", delay=1.0)
        return {
            path: measured.value(f"{kind} {path}", lambda path=path, make=make: self.error({path: make()}))  # type: ignore[misc]
            for path, make in bar
        }


def _eagerly(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    with without_compiled_calls(model), torch.compiler.set_stance("force_eager"):
        return model(*args, **kwargs)


@contextlib.contextmanager
def _quantized(products: Mapping[int, QuantizedWeight]) -> Iterator[set[int]]:
    """Run linears whose weight has one of these identities in 4 bits; yield the identities that were met."""
    used: set[int] = set()

    def around(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            whole = weight if id(weight) in products else getattr(weight, "_base", None)
            product = products.get(id(whole)) if whole is not None else None
            if product is None or whole is None:
                return original(x, weight, bias)
            used.add(id(whole))
            # Some rows, as attention takes q, k and v out of one parameter.
            first = (weight.storage_offset() - whole.storage_offset()) // whole.stride(0)
            out = product(x, first, len(weight))
            return (out if bias is None else out + bias.float()).to(x.dtype)

        return linear

    with replaced_linear(around):
        yield used


def _errors(found: Sequence[Tensor], wanted: Sequence[Tensor], mask: Tensor | None = None) -> list[float]:
    """Return the relative squared error of each tensor that is not zero everywhere, over the tokens that count."""
    every = [(a, b) for a, b in zip(found, wanted, strict=True) if b.any()]
    pairs = [(a, b) for a, b in (_counted(a, b, mask) for a, b in every) if b.any()] or every
    return [float((a - b).square().sum() / b.square().sum().clamp(min=1e-30)) for a, b in pairs]


def _counted(a: Tensor, b: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    kept = kept_tokens(mask, a)
    return (a, b) if kept is None else (a[kept], b[kept])


def _floating(value: Any) -> Iterator[Tensor]:
    """Yield the floating-point tensors in tuples, lists, dicts and dataclasses."""
    for leaf in torch.utils._pytree.tree_leaves(value):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            yield leaf
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            for field in dataclasses.fields(leaf):
                yield from _floating(getattr(leaf, field.name))
