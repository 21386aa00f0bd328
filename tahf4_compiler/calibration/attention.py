"""What attention in 8 bits costs: error and effect of each attention, measured on the calls that a calibration kept."""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary
from tqdm.auto import tqdm

from ..errors import CalibrationError
from ..files.memo import Measured
from ..model.linears import module_around
from ..model.parts import part_of, running_weights
from ..ops.observers import Handles
from ..ops.registry import dispatch
from ..options import reference_forced
from ..recipe.entries import AttentionEntry
from ..torch_private.calls import compiled_whole
from .seen import Seen
from .sensitivity import ENTRIES, Network, sqnr_db

__all__ = ["ATTENTION_TOLERANCE", "attention_entries"]

ATTENTION_TOLERANCE = 0.01
"""Relative squared error of an attention (20 dB): about what a linear in 4 bits has."""

QUERIES = 256
"""Of each head, evenly spread. A row of queries is on its own, so these have the errors that they have among all."""

_EIGHT_BITS = torch.ops.tahf4.attention.default


class _Observed:
    """What is seen of the attentions of a module, while it runs compiled with observers.

    Attributes:
        sums: by the linears of an attention's module: squares of its errors, one for each of ``bits``, squares of
            itself, and FLOPs.
        bits: of queries and keys whose error is measured: 8, and perhaps 4.
        value_bits: of values and probabilities.
        chosen: the attention that runs in 8 bits, by its linears, and the bits of its queries and keys; ``()`` for
            none of them, None to measure errors.
        ran: whether it was met.
    """

    def __init__(
        self,
        module: nn.Module,
        name: str,
        paths: Mapping[Tensor, str],
        reference: bool,
        bits: tuple[int, ...],
        value_bits: int,
    ) -> None:
        """Observe nothing yet."""
        self.sums: dict[tuple[str, ...], tuple[float, ...]] = defaultdict(lambda: (0,) * (len(bits) + 2))
        self.bits, self.value_bits = bits, value_bits
        self.chosen: tuple[tuple[str, ...], int] | tuple[()] | None = None
        self.ran = False
        self._module, self._name, self._paths, self._reference, self._heard = module, name, paths, reference, 0

    def observer_of(self, weights: tuple[Tensor, ...]) -> Callable[[Any], None]:
        """Return what takes the operands of attentions that some weights belong to."""
        linears = tuple(self._paths[weight] for weight in weights if weight in self._paths)

        def observe(x: Any) -> None:
            self._heard += 1
            if isinstance(x, Tensor) or not linears:  # a tensor is an activation of linears
                return
            *operands, output = x
            if self.chosen is None:
                found = *_squares(tuple(operands), self.bits, self.value_bits, self._reference), _flops(*operands[:3])
                self.sums[linears] = tuple(a + b for a, b in zip(self.sums[linears], found, strict=True))
            elif self.chosen and self.chosen[0] == linears:
                kernel = dispatch(_EIGHT_BITS, output, reference=self._reference)
                output.copy_(kernel.target(*operands, self.chosen[1], self.value_bits))
                self.ran = True

        return observe

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module.

        Raises:
            CalibrationError: nothing was observed.
        """
        before = self._heard
        found = self._module(*args, **kwargs)
        if self._heard == before:
            raise CalibrationError(
                f"a call of {self._name} was not observed, so that no error of its attention is known: torch.compile "
                "ran it as it is (TORCHDYNAMO_DISABLE, or more shapes than torch._dynamo.config.recompile_limit)"
            )
        return found

    def effect(self, linears: tuple[str, ...], bits: int, network: Network) -> float | None:
        """Return the error of the network's output with one attention in 8 bits; None if no call met it."""
        self.chosen, self.ran = (linears, bits), False
        try:
            errors = network.errors_now()
        finally:
            self.chosen = ()
        return _finite(statistics.fmean(errors)) if self.ran else None


def attention_entries(
    calibration: Seen, expert: str, kind: str, tolerance: float, network: Network | None, measured: Measured
) -> dict[str, AttentionEntry]:
    """Return the error of each attention of an expert that would run in 8 bits, and what follows, by module path.

    Args:
        calibration: its kept calls are run, compiled with observers.
        expert: which one.
        kind: ``"int8"``, or ``"hif4"`` to measure queries and keys in HiF4 as well.
        tolerance: relative squared error above which an attention stays in high precision, or has no HiF4.
        network: the expert on the kept calls, for the effect of each attention; None to measure none.
        measured: where the effects are kept.

    Raises:
        CalibrationError: no call was kept, ranks divide the model or its sequences, or torch.compile is off.
    """
    module, calls = calibration.models[expert], calibration.kept.calls.get(expert, [])
    name = expert or type(module).__name__
    if not calls:
        raise CalibrationError(
            f"attention={kind!r} is measured on calls of {name}, and the calibration kept none: it keeps calls whose "
            "arguments are plain values and tensors. Make the recipe with attention='high_precision'"
        )
    paths: WeakIdKeyDictionary = WeakIdKeyDictionary()
    for path, weight in running_weights(module):
        paths.setdefault(weight, path)
    if {*calibration.joined} - {"inputs"} or any(part_of(weight) is not None for weight in paths):
        raise CalibrationError(
            f"attention={kind!r} is measured where one process holds {name} whole, and ranks divide it or its "
            "sequences here. Make the recipe with attention='high_precision', or on one process"
        )
    reference = reference_forced() or calibration.options.kernels == "reference"
    given = {option: value for owner, option, value in calibration.options.pass_options if owner == "attention"}
    value_bits = given.get("value_bits", 8)
    observed = _Observed(module, name, paths, reference, (8, 4) if kind == "hif4" else (8,), value_bits)
    few = network.few() if network is not None else None
    options = dataclasses.replace(calibration.options, pipeline="calibration", attention="int8", inductor=False)
    compiled = compiled_whole(module, lambda call: call, backend="tahf4", options=options)
    entries: dict[tuple[str, ...], AttentionEntry] = {}
    seen = sum(count for (owner, _), (count, _) in calibration.kept.seen.items() if owner == expert)
    with Handles(observed.observer_of), compiled, torch.no_grad():
        for args, kwargs in tqdm(calls, desc=f"attention {expert}".strip(), unit="call", delay=1.0):
            observed.run(*args, **kwargs)
        for linears, (*errors, norm, flops) in sorted(observed.sums.items()):
            relative = [error / max(norm, 1e-30) for error in errors]
            flops_of_all = int(flops) * seen // len(calls)
            entries[linears] = _entry(linears, relative, tolerance, flops_of_all, value_bits)
        if few is not None and entries:
            # Against the compiled network: it rounds otherwise than the one that is not, as much as 8 bits may.
            observed.chosen = ()
            few = few.run_by(observed.run)
            for linears, entry in tqdm(entries.items(), desc="sensitivity", unit="attention", delay=1.0):
                bits, how = (4, ", q and k in HiF4") if entry.decision == "hif4" else (8, "")
                how += ", values in 16 bits" if value_bits == 16 else ""
                key = f"effect in {expert!r} of attention in 8 bits{how}: {' '.join(linears)}"
                effect = measured.value(key, functools.partial(observed.effect, linears, bits, few))
                entries[linears] = _with_effect(entry, effect)
    return {module_around(linears): entry for linears, entry in entries.items()}


def _entry(
    linears: tuple[str, ...], errors: Sequence[float], tolerance: float, flops: int, value_bits: int = 8
) -> AttentionEntry:
    """Return the decision of an attention's own error: the fewest bits that keep it within the tolerance.

    Args:
        linears: of its module.
        errors: relative squared ones: in 8 bits, and with queries and keys in HiF4 if that was measured.
        tolerance: the largest that is taken.
        flops: of its core.
        value_bits: of its values.
    """
    finite = [_finite(error) for error in errors]
    db, *hif4_db = (round(sqnr_db(error), 3) for error in finite)
    reason, decision = "", "hif4" if hif4_db and finite[1] <= tolerance else "int8"
    if decision == "int8" and finite[0] > tolerance:
        decision = "high_precision"
        values = " with values in 16" if value_bits == 16 else ""
        reason = f"sensitivity: SQNR {db:.1f} dB in 8 bits{values}, less than {sqnr_db(tolerance):.1f} dB"
    return AttentionEntry(linears, db, decision, reason, None, flops, hif4_sqnr_db=next(iter(hif4_db), None))


def _with_effect(entry: AttentionEntry, effect: float | None) -> AttentionEntry:
    said = f"; effect on the output {effect:.2e}" if entry.reason and effect is not None else ""
    return dataclasses.replace(entry, effect=effect, reason=entry.reason + said)


def _finite(error: float) -> float:
    """Return an error as a number that a file takes."""
    return error if math.isfinite(error) else 1e30


def _flops(query: Tensor, key: Tensor, value: Tensor) -> int:
    return 2 * math.prod(query.shape[:3]) * key.shape[2] * (query.shape[3] + value.shape[3])


def _squares(operands: tuple[Any, ...], bits: Sequence[int], value_bits: int, reference: bool) -> list[float]:
    """Return sums of squares: of the errors of an attention in 8 bits, and of itself, on some of its queries.

    They are at most :data:`QUERIES` rows of at most :data:`ENTRIES` entries of the batch, with all their keys.

    Args:
        operands: of the attention, as ``tahf4::observe_attention`` is given them.
        bits: of queries and keys, one for each error.
        value_bits: of values and probabilities.
        reference: whether the operator runs as its reference.
    """
    query, key, value, mask, is_causal, scale, enable_gqa = operands
    count = query.shape[2]
    rows = torch.arange(0, count, math.ceil(count / QUERIES), dtype=torch.int64, device=query.device)
    if is_causal:
        mask = torch.arange(key.shape[2], dtype=torch.int64, device=query.device) <= rows[:, None]
    elif mask is not None and mask.dim() > 1 and mask.shape[-2] > 1:
        mask = mask.index_select(-2, rows)
    if mask is not None and mask.dim() == 4:
        mask = mask[:ENTRIES]
    query, key, value = query[:ENTRIES, :, rows], key[:ENTRIES], value[:ENTRIES]
    wanted = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, mask, scale=scale, enable_gqa=enable_gqa
    )
    kernel, wanted = dispatch(_EIGHT_BITS, query, reference=reference), wanted.to(torch.float32)
    found = (kernel.target(query, key, value, mask, False, scale, enable_gqa, each, value_bits) for each in bits)
    return [float(part.square().sum()) for part in (*(x.to(torch.float32) - wanted for x in found), wanted)]
