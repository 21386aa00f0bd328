"""Checksums of tensors: how changed weights are noticed."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from ..model import parts
from ..plugins import host

__all__ = ["checksum", "checksums", "contents", "identity"]

_LANES = 4096
_CHECKED = 256 * _LANES  # words summed at a time: bounds the temporaries to 8 MB


def checksum(weight: Tensor) -> Tensor:
    """Return an int64 scalar that depends on every byte of a tensor and on where it stands.

    The bytes are read as 32-bit words, each times a random 64-bit factor of its lane and one of its row, summed
    modulo 2**64. With factors twice as wide as the words even changes of top bits alone (signs) show.
    """
    data = _bytes(weight)
    if (fast := host.find("checksums", [data])) is not None:
        return torch.tensor(fast([data], _lane_factors(data.device))[0], dtype=torch.int64, device="cpu")
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


def contents(weights: Sequence[Tensor]) -> list[int]:
    """Return the checksums of tensors as numbers, with one wait for each device."""
    data = [_bytes(weight) for weight in weights]
    if data and (fast := host.find("checksums", data)) is not None:  # one read of each, on all threads
        found: list[int] = fast(data, _lane_factors(data[0].device))
        return found
    return _read([checksum(weight) for weight in weights])


def _bytes(weight: Tensor) -> Tensor:
    return parts.whole(weight).detach().contiguous().reshape(-1).view(torch.uint8)


@functools.cache
def _lane_factors(device: torch.device) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(0x4F4)
    limits, host = (-(1 << 63), (1 << 63) - 1), torch.device("cpu")
    return torch.randint(*limits, (_LANES,), generator=generator, dtype=torch.int64, device=host).to(device)


def _row_factors(first: int, count: int, device: torch.device) -> Tensor:
    mixed = torch.arange(first + 1, first + count + 1, device=device, dtype=torch.int64) * -0x61C8864680B583EB
    mixed = (mixed ^ (mixed >> 29)) * -0x40A7B892E31B1A47
    return (mixed ^ (mixed >> 32)) | 1


def _read(values: list[Tensor]) -> list[int]:
    """Copy scalars to the host, with one synchronization for each device."""
    out: dict[int, int] = {}
    for device in {value.device for value in values}:
        here = [i for i, value in enumerate(values) if value.device == device]
        out.update(zip(here, torch.stack([values[i] for i in here]).tolist(), strict=True))
    return [out[i] for i in range(len(values))]


def checksums(values: Sequence[Tensor], check: str = "auto") -> list[int]:
    """Return the checksums of tensors, read again where they may have changed.

    Args:
        values: on any device; those on the meta device hold nothing, and have 0.
        check: see :class:`tahf4_compiler.options.Options`.
    """
    _watch_data()
    states = [(identity(v), v.data_ptr()) for v in values]
    old = [_sums.get(value) for value in values]
    stale = [
        i
        for i, (value, state) in enumerate(zip(values, states, strict=True))
        if _reads_always(value, check) or old[i] is None or old[i][0] != state or old[i][1] is None
    ]
    # Kept before they are read: who takes .data meanwhile, in another thread, lets them be forgotten again.
    for i in stale:
        _sums[values[i]] = old[i] = [states[i], 0 if values[i].device.type == "meta" else None]
    real = [i for i in stale if values[i].device.type != "meta"]
    for i, total in zip(real, contents([values[i] for i in real]), strict=True):
        old[i][1] = total
    return [entry[1] for entry in old]


def _reads_always(value: Tensor, check: str) -> bool:
    """Whether a tensor is read at each call: where that is cheap, and where it has no version counter."""
    return check == "content" or value.is_inference() or (check == "auto" and value.device.type == "cpu")


_sums: WeakIdKeyDictionary = WeakIdKeyDictionary()


@functools.cache
def _watch_data() -> None:
    """Forget the checksum of a parameter whose ``.data`` somebody takes or sets.

    What is written through ``.data`` leaves the version counter and, as ``weight.data += x`` (peft's merging) does, the
    address as they were.
    """
    own = Tensor.data

    def get(self: nn.Parameter) -> Tensor:
        _sums.pop(self, None)
        found: Tensor = own.__get__(self)  # type: ignore[attr-defined]
        return found

    def put(self: nn.Parameter, value: Tensor) -> None:
        _sums.pop(self, None)
        own.__set__(self, value)  # type: ignore[attr-defined]

    nn.Parameter.data = property(get, put)  # type: ignore[assignment]


def identity(weight: Tensor) -> tuple[object, ...]:
    """Return what tells without reading a tensor that it may have changed: version, dtype and shape."""
    version = 0 if weight.is_inference() else weight._version
    return version, weight.dtype, tuple(weight.shape)
