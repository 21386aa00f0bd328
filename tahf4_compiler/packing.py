"""Weights in HiF4, made once for each parameter and found again by its identity.

Dynamo hands one compiled graph to every module of a class, so a graph cannot hold its weights. It asks here at
each call, with the parameters it was called with. An entry lives as long as its parameters do; it is made
again when their contents change.
"""

from __future__ import annotations

import functools
import logging
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary
from tqdm.auto import tqdm

from . import hif4, kernels, sharded
from .attach import Attachment, attached_recipe
from .graph import PackedWeight
from .hif4 import Packed
from .scale_search import search_scales
from .transforms import multipliers
from .weight_formats import pack_rows

__all__ = [
    "PackedStore",
    "checksum",
    "checksums",
    "moment_as_quantized",
    "pack_transformed",
    "pack_weight",
    "store",
    "warn_not_finite",
]

log = logging.getLogger(__name__)

_ROW_CHUNK = 1 << 22  # values converted at a time: bounds the temporaries to about 100 MB
_LANES = 4096
_CHECKED = 256 * _LANES  # words summed at a time: bounds the temporaries to 8 MB


@dataclass
class _Entry:
    state: tuple[object, ...]
    recipe: Attachment | None
    others: tuple[weakref.ref[Tensor], ...]
    packed: Any  # hif4.Packed, or the parts of a plug-in's format by name


def pack_weight(
    weight: Tensor,
    multiplier: Tensor | None = None,
    hadamard_block: int = 0,
    *,
    search: str = "",
    importance: Tensor | None = None,
) -> hif4.Packed:
    """Transform and convert one weight, some rows at a time.

    Args:
        weight: ``[N, K]`` of a floating-point type.
        multiplier: float32 ``[K]`` or None: ``signs / mask``, see :mod:`tahf4_compiler.transforms`.
        hadamard_block: width of the rotation along K, 0 for none.
        search: ``""``, ``"squared"`` or ``"weighted"``, see :class:`tahf4_compiler.graph.PackedWeight`.
        importance: float32 ``[K]``, the second moment of the activation's channels as they are quantized, for
            ``"weighted"``.

    Returns:
        Codes uint8 ``[N, ceil(K / 64) * 32]`` and scales int32 ``[N, ceil(K / 64)]`` on the weight's device.

    Raises:
        FormatError: the weight is not floating point, or the transform does not fit K.
    """
    from .backends.cpu import search as cpp

    rows = max(1, _ROW_CHUNK // max(1, weight.shape[1]))
    codes, scales = [], []
    for chunk in weight.detach().split(rows):
        if search:
            moved = cpp.transform(chunk, multiplier, hadamard_block)
            packed = search_scales(moved, importance if search == "weighted" else None)
            parts = packed.codes, packed.scales
        else:
            parts = kernels.quantize(chunk, multiplier, hadamard_block)
        codes.append(parts[0])
        scales.append(parts[1])
    return hif4.Packed(torch.cat(codes), torch.cat(scales), weight.shape[1])


def warn_not_finite(paths: Sequence[str], model: str = "") -> None:
    """Warn of linears whose weights hold NaN or infinities; the first three are named.

    Args:
        paths: of the linears; nothing is said if there are none.
        model: name of the model in its pipeline, or ``""``.
    """
    if paths:
        more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
        log.warning(
            "%sthe weights of %d %s hold NaN or infinities: %s%s. Their units of 64 values are packed as NaN, and "
            "so is what is computed with them. Get the weights again, or keep these linears in high precision (keep).",
            f"{model}: " if model else "",
            len(paths),
            "linears" if len(paths) > 1 else "linear",
            ", ".join(paths[:3]),
            more,
        )


def checksum(weight: Tensor) -> Tensor:
    """Return an int64 scalar that depends on every byte of a tensor and on where it stands.

    The bytes are read as 32-bit words, each times a random 64-bit factor of its lane and one of its row, summed
    modulo 2**64. With factors twice as wide as the words even changes of top bits alone (signs) show.
    """
    data = sharded.whole(weight).detach().contiguous().reshape(-1).view(torch.uint8)
    if data.numel() % 4 == 0 and data.device.type == "cpu" and type(data) is Tensor:
        from .backends import cpu

        if cpu.available():  # one read, on all threads
            return torch.tensor(cpu.checksum(data, _lane_factors(data.device)))
    data = torch.nn.functional.pad(data, (0, -data.numel() % 4))
    words = data.view(torch.int32)
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    for start in range(0, words.numel(), _CHECKED):
        part = words[start : start + _CHECKED]
        whole = part.numel() // _LANES * _LANES
        for rows in (part[:whole].view(-1, _LANES), part[whole:].view(1, -1)):
            sums = (rows.to(torch.int64) * _lane_factors(data.device)[: rows.shape[1]]).sum(1)
            first = start // _LANES + (whole // _LANES if rows.shape[1] != _LANES else 0)
            total = total + (sums * _row_factors(first, len(rows), data.device)).sum()
    return total


@functools.cache
def _lane_factors(device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0x4F4)
    return torch.randint(-(1 << 63), (1 << 63) - 1, (_LANES,), generator=generator, dtype=torch.int64).to(device)


def _row_factors(first: int, count: int, device: torch.device) -> Tensor:
    mixed = torch.arange(first + 1, first + count + 1, device=device, dtype=torch.int64) * -0x61C8864680B583EB
    mixed = (mixed ^ (mixed >> 29)) * -0x40A7B892E31B1A47
    return (mixed ^ (mixed >> 32)) | 1


def pack_transformed(
    weight: Tensor, mask: Tensor | None, seed: int | None, block: int, search: str = "", moment: Tensor | None = None
) -> hif4.Packed:
    """Convert one weight with the inverse of its activation's transform.

    Args:
        weight: ``[N, K]`` of a floating-point type.
        mask: float32 ``[K]`` that the activation is multiplied by, or None.
        seed: of the rotation's signs, or None.
        block: width of the rotation, 0 for none.
        search: see :class:`tahf4_compiler.graph.PackedWeight`.
        moment: ``[K]``, second moment of the activation's channels before the transform, for ``"weighted"``.

    Returns:
        As :func:`pack_weight`, on the weight's device.

    Raises:
        FormatError: as :func:`pack_weight`.
    """
    device = weight.device
    multiplier = multipliers(weight.shape[1], mask, seed)[1]
    multiplier = multiplier.to(device) if multiplier is not None else None
    importance = None
    if search == "weighted" and moment is not None:
        importance = moment_as_quantized(moment, mask, block).to(device)
    return pack_weight(weight, multiplier, block, search=search, importance=importance)


class PackedStore:
    """Packed weights by parameter identity, shared by all graphs of a process. Safe under several threads."""

    def __init__(self) -> None:
        """Start empty."""
        self._entries: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._multipliers: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._lock = threading.RLock()
        self.conversions = 0

    def get(self, requests: Sequence[tuple[tuple[Tensor, ...], PackedWeight]], check: str = "content") -> list[Any]:
        """Return one packed weight for each request, converting those that are new or whose contents changed.

        Args:
            requests: ``(weights, how they are transformed)``; the rows of several weights are joined.
            check: ``"content"`` or ``"version"``, see :class:`tahf4_compiler.options.Options`.

        Returns:
            Packed weights in the order of the requests, on the weights' device: :class:`tahf4_compiler.hif4.Packed`,
            or for a plug-in's format its parts by name.
        """
        with self._lock, torch.no_grad():
            states = _states([weights for weights, _ in requests], check)
            found = [self._find(w, how, state) for (w, how), state in zip(requests, states, strict=True)]
            missing = [i for i, packed in enumerate(found) if packed is None]
            if missing:
                total = sum(w.numel() for i in missing for w in requests[i][0])
                # Shown only when it takes more than a second.
                with tqdm(total=total, desc="HiF4 weights", unit="value", unit_scale=True, delay=1.0) as bar:
                    for i in missing:
                        weights, how = requests[i]
                        # A weight that two requests name is converted for the first of them.
                        found[i] = self._find(weights, how, states[i]) or self._pack(weights, how, states[i], bar)
            return [packed for packed in found if packed is not None]

    def multiplier(self, weights: tuple[Tensor, ...], how: PackedWeight) -> Tensor:
        """Return the factors of the channels that some weights read: float32 ``[K]`` on the weights' device."""
        first, recipe = weights[0], _recipe(weights[0], how)
        key = (how.masked, how.seed, first.device)
        with self._lock:
            mine = self._multipliers.setdefault(first, {})
            if key not in mine or mine[key][0] is not recipe:
                factors, _ = multipliers(first.shape[1], *_values(recipe, how))
                mine[key] = recipe, (factors if factors is not None else torch.ones(first.shape[1])).to(first.device)
            return mine[key][1]

    def _find(self, weights: tuple[Tensor, ...], how: PackedWeight, state: tuple[object, ...]) -> Any:
        entry = self._entries.get(weights[0], {}).get(_key(weights, how))
        if entry is None or entry.state != state or entry.recipe is not _recipe(weights[0], how):
            return None
        same = all(ref() is weight for ref, weight in zip(entry.others, weights[1:], strict=True))
        held = next(iter(entry.packed.values())) if isinstance(entry.packed, dict) else entry.packed.codes
        on_device = held.device == weights[0].device
        return entry.packed if same and on_device else None

    def _pack(self, weights: tuple[Tensor, ...], how: PackedWeight, state: tuple[object, ...], bar: tqdm) -> Any:
        recipe = _recipe(weights[0], how)
        mask, seed = _values(recipe, how)
        packed: Any
        if how.format:
            multiplier = multipliers(weights[0].shape[1], mask, seed)[1]
            multiplier = multiplier.to(weights[0].device) if multiplier is not None else None
            packed = pack_rows(how.format, weights, multiplier, how.hadamard_block)
            bar.update(sum(weight.numel() for weight in weights))
        else:
            moment = recipe.second_moment if recipe is not None else None
            parts = []
            for weight in weights:
                parts.append(pack_transformed(weight, mask, seed, how.hadamard_block, how.search, moment))
                bar.update(weight.numel())
            packed = parts[0]
            if len(parts) > 1:
                packed = Packed(torch.cat([p.codes for p in parts]), torch.cat([p.scales for p in parts]), packed.k)
        self.conversions += len(weights)
        entry = _Entry(state, recipe, tuple(weakref.ref(weight) for weight in weights[1:]), packed)
        mine = self._entries.setdefault(weights[0], {})
        for key in [key for key, old in mine.items() if any(ref() is None for ref in old.others)]:
            del mine[key]
        mine[_key(weights, how)] = entry
        return packed


def _key(weights: tuple[Tensor, ...], how: PackedWeight) -> tuple[object, ...]:
    """Tell the groups that begin with one weight apart; identities are checked against the entry's references."""
    return (replace(how, weights=()), *(id(weight) for weight in weights[1:]))


def _recipe(weight: Tensor, how: PackedWeight) -> Attachment | None:
    """Return what is attached to a weight if its packed form depends on it."""
    return attached_recipe(weight) if how.masked or how.seed is not None or how.search == "weighted" else None


def _values(recipe: Attachment | None, how: PackedWeight) -> tuple[Tensor | None, int | None]:
    """Return the mask and the seed."""
    seed = how.seed
    if seed is not None and recipe is not None and recipe.seed is not None:
        seed = recipe.seed
    return (recipe.mask if recipe is not None and how.masked else None), seed


def moment_as_quantized(moment: Tensor, mask: Tensor | None, block: int) -> Tensor:
    """Return the second moment of an activation's channels after mask and rotation.

    A rotation with random signs spreads the energy of a block evenly over it, as far as channels are uncorrelated.
    """
    moment = moment.to(torch.float32) * (mask.square() if mask is not None else 1.0)
    if block:
        padded = torch.nn.functional.pad(moment, (0, hif4.units(len(moment)) * hif4.UNIT - len(moment)))
        moment = padded.unflatten(0, (-1, block)).mean(1, keepdim=True).expand(-1, block).flatten()
    return moment


def _states(groups: Sequence[tuple[Tensor, ...]], check: str) -> list[tuple[object, ...]]:
    """Return, for each group of weights, what changes when their contents do."""
    def counted(weight: Tensor) -> bool:
        return check == "version" and not weight.is_inference()  # inference tensors have no version counter

    sums = iter(_read([checksum(w) for group in groups for w in group if not counted(w)]))
    return [tuple((*_identity(w), w.data_ptr() if counted(w) else next(sums)) for w in group) for group in groups]


def _read(values: list[Tensor]) -> list[int]:
    """Copy scalars to the host, with one synchronization for each device."""
    out: dict[int, int] = {}
    for device in {value.device for value in values}:
        here = [i for i, value in enumerate(values) if value.device == device]
        out.update(zip(here, torch.stack([values[i] for i in here]).tolist(), strict=True))
    return [out[i] for i in range(len(values))]


def checksums(values: Sequence[Tensor], check: str = "content") -> list[int]:
    """Return the checksums of tensors, read again where they may have changed.

    Args:
        values: no subclasses.
        check: see :class:`tahf4_compiler.options.Options`; ``"version"`` keeps those of unchanged tensors.
    """
    states = [(_identity(v), v.data_ptr()) for v in values]
    old = [_sums.get(value) for value in values]
    stale = [
        i
        for i, (value, state) in enumerate(zip(values, states, strict=True))
        if check == "content" or value.is_inference() or old[i] is None or old[i][0] != state
    ]
    for i, total in zip(stale, _read([checksum(values[i]) for i in stale]), strict=True):
        _sums[values[i]] = old[i] = (states[i], total)
    return [entry[1] for entry in old]


_sums: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _identity(weight: Tensor) -> tuple[object, ...]:
    version = 0 if weight.is_inference() else weight._version
    return version, weight.dtype, tuple(weight.shape)


store = PackedStore()
"""The store of this process."""
