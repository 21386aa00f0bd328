"""What attention in 8 bits costs: the error of each attention, measured on the calls that a calibration kept."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary
from tqdm.auto import tqdm

from ..errors import CalibrationError
from ..model.linears import module_around
from ..model.parts import part_of, running_weights
from ..ops.observers import Handles
from ..ops.registry import dispatch
from ..options import reference_forced
from ..recipe.entries import AttentionEntry
from ..torch_private.calls import compiled_whole
from .seen import Seen
from .sensitivity import ENTRIES, sqnr_db

__all__ = ["ATTENTION_TOLERANCE", "attention_entries"]

ATTENTION_TOLERANCE = 0.01
"""Relative squared error of an attention (20 dB): about what a linear in 4 bits has."""

QUERIES = 256
"""Of each head, evenly spread. A row of queries is on its own, so these have the errors that they have among all."""

_INT8 = torch.ops.tahf4.attention.default


def attention_entries(calibration: Seen, expert: str, tolerance: float) -> dict[str, AttentionEntry]:
    """Return the error of each attention of an expert that would run in 8 bits, and what follows, by module path.

    Args:
        calibration: its kept calls are run, compiled with observers.
        expert: which one.
        tolerance: relative squared error above which an attention stays in high precision.

    Raises:
        CalibrationError: no call was kept, ranks divide the model or its sequences, or torch.compile is off.
    """
    module, calls = calibration.models[expert], calibration.kept.calls.get(expert, [])
    name = expert or type(module).__name__
    if not calls:
        raise CalibrationError(
            f"attention='int8' is measured on calls of {name}, and the calibration kept none: it keeps calls whose "
            "arguments are plain values and tensors. Make the recipe with attention='high_precision'"
        )
    paths: WeakIdKeyDictionary = WeakIdKeyDictionary()
    for path, weight in running_weights(module):
        paths.setdefault(weight, path)
    if {*calibration.joined} - {"inputs"} or any(part_of(weight) is not None for weight in paths):
        raise CalibrationError(
            f"attention='int8' is measured where one process holds {name} whole, and ranks divide it or its sequences "
            "here. Make the recipe with attention='high_precision', or on one process"
        )
    sums: dict[tuple[str, ...], tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
    reference = reference_forced() or calibration.options.kernels == "reference"
    heard = 0

    def observer_of(weights: tuple[Tensor, ...]) -> Callable[[Any], None]:
        linears = tuple(paths[weight] for weight in weights if weight in paths)

        def observe(x: Any) -> None:
            nonlocal heard
            heard += 1
            if not isinstance(x, Tensor) and linears:  # a tensor is an activation of linears
                error, norm = _squares(x, reference)
                sums[linears] = sums[linears][0] + error, sums[linears][1] + norm

        return observe

    options = dataclasses.replace(calibration.options, pipeline="calibration", attention="int8", inductor=False)
    compiled = compiled_whole(module, lambda call: call, backend="tahf4", options=options)
    with Handles(observer_of), compiled, torch.no_grad():
        for args, kwargs in tqdm(calls, desc=f"attention {expert}".strip(), unit="call", delay=1.0):
            before = heard
            module(*args, **kwargs)
            if heard == before:
                raise CalibrationError(
                    f"a call of {name} was not observed, so that no error of its attention is known: torch.compile ran "
                    "it as it is (TORCHDYNAMO_DISABLE, or more shapes than torch._dynamo.config.recompile_limit)"
                )
    return {module_around(linears): _entry(linears, *sums[linears], tolerance) for linears in sorted(sums)}


def _entry(linears: tuple[str, ...], error: float, norm: float, tolerance: float) -> AttentionEntry:
    relative = error / max(norm, 1e-30)
    if not math.isfinite(relative):
        relative = 1e30
    db = round(sqnr_db(relative), 3)
    if relative <= tolerance:
        return AttentionEntry(linears, db)
    reason = f"sensitivity: SQNR {db:.1f} dB in 8 bits, less than {sqnr_db(tolerance):.1f} dB"
    return AttentionEntry(linears, db, "high_precision", reason)


def _squares(operands: tuple[Any, ...], reference: bool) -> tuple[float, float]:
    """Return the sum of squares of the error of an attention in 8 bits, and of the attention, on some of its queries.

    They are at most :data:`QUERIES` rows of at most :data:`ENTRIES` entries of the batch, with all their keys.

    Args:
        operands: what ``tahf4::observe_attention`` is given.
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
    kernel = dispatch(_INT8, query, reference=reference)
    found = kernel.target(query, key, value, mask, False, scale, enable_gqa)
    error = (found.to(torch.float32) - wanted.to(torch.float32)).square().sum()
    return float(error), float(wanted.to(torch.float32).square().sum())
