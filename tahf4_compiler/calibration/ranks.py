"""Merge what the processes of a group calibrated, so that each has what one process would have.

Counts are summed and maxima compared by all-reduce, which gives the same whatever the order of the ranks. Sums of
squares are floating point: they are gathered, sorted and added, so they do not depend on the order either. Sample rows
have priorities by place (:class:`~tahf4_compiler.calibration.sketch.RowSample`), so the largest of all are those of
one process. Everything goes as tensors, and JSON in them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm.auto import tqdm

from ..distributed.exchange import Exchange
from ..errors import CalibrationError, OptionError
from ..files.tensors import decode, digest, encode
from ..model.linears import linear_weights
from ..model.parts import part_of
from .calls import KeptCalls, Place
from .moments import Moments
from .seen import Seen
from .sketch import RowSample, Sketch
from .statistics import Activation, Cells

__all__ = ["all_reduce"]

_MOST_ROWS = 2**31 - 1


def all_reduce(seen: Seen, group: Any = None, *, over: str = "inputs", calls: bool = True) -> None:
    """Give every process of a group what all of them saw: see :meth:`tahf4_compiler.Calibration.all_reduce`."""
    if over not in ("inputs", "sequence", "channels"):
        raise OptionError(f"over is {over!r}; expected 'inputs', 'sequence' or 'channels'")
    exchange = Exchange(group)
    headers = exchange.texts(_header(seen))
    _check(seen, headers, over)
    places = sorted({tuple(cell[:4]) for header in headers for cell in header["cells"]})
    for place in places:
        found = [next((c for c in h["cells"] if tuple(c[:4]) == place), None) for h in headers]
        if over == "channels":
            _join_channels(seen, exchange, place)
        else:
            _merge_cell(seen, exchange, place, found, over)
    for expert, name in sorted({place[:2] for place in places}):
        _merge_moments(seen, exchange, (expert, name), headers, over)
    if over == "inputs":
        if calls:
            _merge_calls(seen, exchange)
        seen.prompts = sorted({prompt for header in headers for prompt in header["prompts"]})
    seen.joined.append(over)


def run_divided(seen: Seen, todo: list[str], group: Any, run: Callable[[int, str], None]) -> None:
    """Run prompts in rounds, one a rank, and merge: see :meth:`tahf4_compiler.Calibration.run`.

    Which calls are kept depends on how many came before, so all of a round are held until every rank knows of all.
    """
    exchange = Exchange(group)
    listed = exchange.texts([todo, seen.checkpoint is not None, bool(seen.activations)])
    if any(entry != listed[0] for entry in listed):
        raise CalibrationError("the ranks were given different prompts or checkpoints; give all of them the same")
    if listed[0][1] or listed[0][2]:
        raise CalibrationError(
            "prompts are divided in a calibration that has no checkpoint file and has seen nothing before; save() it "
            "afterwards"
        )
    for start in tqdm(range(0, len(todo), exchange.size), desc="calibration", unit="round", disable=exchange.rank > 0):
        mine = seen.kept.held = []
        try:
            if (i := start + exchange.rank) < len(todo):
                run(i, todo[i])
        finally:
            seen.kept.held = None
        events = exchange.texts([[expert, astuple(place), call is not None] for expert, place, call in mine])
        for rank, calls in enumerate(events):
            for j, (expert, place, plain) in enumerate(calls):
                call: Any = mine[j][2] if rank == exchange.rank else _Elsewhere(rank)
                seen.kept.add(expert, Place(*place), call if plain else None)
    _fetch_calls(seen, exchange)
    all_reduce(seen, group, calls=False)
    seen.prompts = list(todo)


@dataclass(frozen=True)
class _Elsewhere:
    """Stands for a call that another rank holds."""

    rank: int


def _fetch_calls(seen: Seen, exchange: Exchange) -> None:
    mine: dict[str, Tensor] = {}
    coded = {
        expert: [
            None if isinstance(call, _Elsewhere) else encode(call, mine, f"{expert}.{i}")
            for i, call in enumerate(calls)
        ]
        for expert, calls in seen.kept.calls.items()
    }
    headers, tensors = exchange.texts(coded), exchange.tensors(mine)
    for expert, calls in seen.kept.calls.items():
        device = next(seen.models[expert].parameters()).device
        for i, held in enumerate(calls):
            if isinstance(held, _Elsewhere):
                calls[i] = decode(headers[held.rank][expert][i], tensors[held.rank], device)


def _header(seen: Seen) -> dict[str, Any]:
    cells = []
    for (expert, name), held in sorted(seen.activations.items()):
        for (step, branch), (sketch, sample) in sorted(held.cells.items()):
            rows = sample.rows
            cells.append(
                [
                    expert, name, step, branch, list(held.activation.members), held.activation.channels, sketch.rows,
                    digest({}, sketch.tensors()), None if rows is None else str(rows.dtype).removeprefix("torch."),
                ]
            )  # fmt: skip
    return {
        "step_groups": seen.step_groups, "rows": seen.rows, "moments": seen.moments, "prompts": seen.prompts,
        "cells": cells, "merged": seen.joined,
    }  # fmt: skip


def _check(seen: Seen, headers: list[dict[str, Any]], over: str) -> None:
    """Raise the same error on every rank, before anything is changed."""
    for what in ("step_groups", "rows", "moments", "merged"):
        values = [header[what] for header in headers]
        if any(value != values[0] for value in values):
            raise CalibrationError(f"{what} are {values} on the ranks; expected one value")
    if over in seen.joined:
        raise CalibrationError(f"this calibration was merged over {over!r} before; everything would count again")
    channels: dict[tuple[str, str], int] = {}
    for rank, header in enumerate(headers):
        for expert, name, _, _, members, width, *_ in header["cells"]:
            known = expert in seen.models and set(members) <= seen.known_paths(expert)
            if not known or channels.setdefault((expert, name), width) != width:
                raise CalibrationError(
                    f"rank {rank} calibrated another model: it saw {'/'.join(filter(None, (expert, name)))} with "
                    f"{width} channels, which others do not have"
                )
    if over == "inputs":
        prompts = [prompt for header in headers for prompt in header["prompts"]]
        twice = sorted({prompt for prompt in prompts if prompts.count(prompt) > 1})
        if twice:
            raise CalibrationError(
                f"several ranks saw {twice[0]!r} ({len(twice)} prompts in all), which would count twice; divide the "
                "prompts: calibration.run(prompts[rank::world_size])"
            )


def _merge_cell(
    seen: Seen, exchange: Exchange, place: tuple[Any, ...], found: list[Any], over: str
) -> None:
    expert, name, step, branch = place
    there = [cell for cell in found if cell is not None]
    if over == "sequence" and len(there) == len(found) and all(cell[7] == there[0][7] for cell in there):
        # Not divided: each rank saw all of it. The first rank's rows have the places that one process gives them.
        _share_sample(seen, exchange, place, there, only_first=True)
        return
    members = max((tuple(cell[4]) for cell in there), key=lambda paths: (len(paths), paths))
    activation = Activation(expert, name, members, there[0][5])
    empty = Cells(activation, seen.rows, seen.step_groups)
    held = seen.activations.setdefault((expert, name), empty)
    held.activation = activation
    if sum(cell[6] for cell in there) > _MOST_ROWS:
        raise CalibrationError(f"{name} would have more than 2**31 - 1 rows; merge fewer processes")
    sketch, sample = held.cell((step, branch), exchange.device)
    whole = Sketch(0)
    whole.counts = exchange.reduce(sketch.counts, dist.ReduceOp.SUM)
    whole.maxima = exchange.reduce(sketch.maxima, dist.ReduceOp.MAX)
    whole.nonfinite = exchange.reduce(sketch.nonfinite, dist.ReduceOp.SUM)
    whole.squares = _sum(exchange.gather(sketch.squares))
    whole.rows = sum(cell[6] for cell in there)
    held.cells[(step, branch)] = whole, sample
    _share_sample(seen, exchange, place, there)


def _join_channels(seen: Seen, exchange: Exchange, place: tuple[Any, ...]) -> None:
    """Join the channels of an activation that row-parallel linears read; of others take the first rank's statistics."""
    expert, name, step, branch = place
    held = seen.activations[(expert, name)]
    sketch, sample = held.cells[(step, branch)]
    weight = dict(linear_weights(seen.models[expert]))[name]
    part = part_of(weight)
    divided = part is not None and part.axis == 1

    def join(value: Tensor, axis: int = 0) -> Tensor:
        parts = exchange.gather(value)
        return torch.cat(parts, axis) if divided else parts[0]

    whole = Sketch(0)
    whole.counts, whole.maxima, whole.squares = join(sketch.counts), join(sketch.maxima), join(sketch.squares)
    whole.nonfinite = exchange.reduce(sketch.nonfinite, dist.ReduceOp.SUM) if divided else join(sketch.nonfinite)
    whole.rows = sketch.rows
    merged = RowSample(sample.size, sample.name)
    merged.count_on(sample)
    if (rows := sample.rows) is not None:
        merged.offer(join(rows, 1), sample.priorities.tolist())  # the same places on all ranks, so the same priorities
    held.activation = replace(held.activation, channels=len(whole.maxima))
    held.cells[(step, branch)] = whole, merged


def _merge_moments(
    seen: Seen, exchange: Exchange, key: tuple[str, str], headers: list[dict[str, Any]], over: str
) -> None:
    """Add the moments of all ranks; where all saw the same, take the first rank's."""
    held = seen.activations[key]
    if not seen.moments:
        return
    mine = held.moments or Moments(held.activation.channels, seen.moments, exchange.device)
    if held.activation.channels != sum(len(block) for block in mine.blocks):
        held.moments = None  # channels were joined: no rank saw those of two ranks together
        return
    listed = [[cell[2:4] + cell[7:8] for cell in header["cells"] if tuple(cell[:2]) == key] for header in headers]
    same = over == "channels" or (over == "sequence" and all(cells == listed[0] for cells in listed))
    for i, block in enumerate(mine.blocks):
        mine.blocks[i] = exchange.gather(block)[0] if same else exchange.reduce(block, dist.ReduceOp.SUM)
    held.moments = mine


def _sum(parts: list[Tensor]) -> Tensor:
    """Add tensors so that their order does not matter."""
    total = torch.zeros_like(parts[0])
    for part in torch.stack(parts).sort(0).values:
        total = total + part
    return total


def _share_sample(
    seen: Seen, exchange: Exchange, place: tuple[Any, ...], there: list[Any], only_first: bool = False
) -> None:
    """Give every rank the sample of all, or of the first."""
    expert, name, step, branch = place
    dtypes = {cell[8] for cell in there if cell[8] is not None}
    if not seen.rows or not dtypes:
        return
    if len(dtypes) > 1:
        raise CalibrationError(f"{name} has rows of {' and '.join(sorted(dtypes))}; use one dtype on all ranks")
    sketch, sample = seen.activations[(expert, name)].cells[(step, branch)]
    rows = sample.rows
    count = 0 if rows is None else len(rows)
    sent = torch.zeros(sample.size, len(sketch.maxima), dtype=getattr(torch, dtypes.pop()), device=sketch.maxima.device)
    priorities = torch.full((sample.size,), -1.0, dtype=torch.float64, device="cpu")
    if rows is not None:
        sent[:count], priorities[:count] = rows, sample.priorities
    parts = list(zip(exchange.gather(sent), exchange.gather(priorities), strict=True))
    merged = RowSample(sample.size, sample.name)
    merged.count_on(sample)
    for rows_of, values in parts[: 1 if only_first else None]:
        merged.offer(rows_of[values >= 0], values[values >= 0].tolist())
    seen.activations[(expert, name)].cells[(step, branch)] = sketch, merged


def _merge_calls(seen: Seen, exchange: Exchange) -> None:
    """Give every rank the calls that all ranks kept, thinned as one process thins its own."""
    mine: dict[str, Tensor] = {}
    headers = exchange.texts(seen.kept.header(mine))
    tensors = exchange.tensors(mine)
    seen.kept = KeptCalls()
    for header in headers:
        seen.kept.count(header["seen"])
    for expert in sorted({expert for header in headers for expert in header["kept"]}):
        device = next(seen.models[expert].parameters()).device
        entries = [
            (Place(*place), decode(call, tensors[rank], device))
            for rank, header in enumerate(headers)
            for place, call in header["kept"].get(expert, ())
        ]
        entries.sort(key=lambda entry: entry[0].source)  # stable: calls of one input stay in order
        seen.kept.extend(expert, entries)
