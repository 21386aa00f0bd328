"""Checksums of tensors: how changed weights are noticed."""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import CaptureError
from ..import_hook import when_imported
from ..model import parts
from ..plugins import host
from ..torch_private.writes import watch_data, watch_fused_optimizers, watch_gathering

__all__ = ["capturing", "checksum", "checksums", "contents", "forget", "refuse_capture"]

log = logging.getLogger(__name__)

_LANES = 4096
_CHECKED = 256 * _LANES  # words summed at a time: bounds the temporaries to 8 MB


def checksum(weight: Tensor) -> Tensor:
    """Return an int64 scalar that depends on every byte of a tensor and on where it stands.

    The bytes are read as 32-bit words, each times a random 64-bit factor of its lane and one of its row, summed
    modulo 2**64. With factors twice as wide as the words even changes of top bits alone (signs) show.
    """
    data = _bytes(parts.whole(weight))
    if (fast := host.find("checksums", [data])) is not None:
        return torch.tensor(fast([data], _lane_factors(data.device))[0], dtype=torch.int64, device="cpu")
    return _sum(data)


def contents(values: Sequence[Tensor]) -> list[int]:
    """Return the checksums of tensors as numbers, with one wait for each device; of a divided one, of the part here.

    Those on the meta device hold nothing and have 0.
    """
    out = [0] * len(values)
    for device in {value.device for value in values if value.device.type != "meta"}:
        here = [i for i, value in enumerate(values) if value.device == device]
        data = [_bytes(values[i]) for i in here]
        fast = host.find("checksums", data)  # one read of each
        found = fast(data, _lane_factors(device)) if fast else torch.stack([_sum(part) for part in data]).tolist()
        for i, total in zip(here, found, strict=True):
            out[i] = total
    return out


def _sum(data: Tensor) -> Tensor:
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


def _bytes(weight: Tensor) -> Tensor:
    return weight.detach().contiguous().reshape(-1).view(torch.uint8)


@functools.cache
def _lane_factors(device: torch.device) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(0x4F4)
    limits, host = (-(1 << 63), (1 << 63) - 1), torch.device("cpu")
    return torch.randint(*limits, (_LANES,), generator=generator, dtype=torch.int64, device=host).to(device)


def _row_factors(first: int, count: int, device: torch.device) -> Tensor:
    mixed = torch.arange(first + 1, first + count + 1, device=device, dtype=torch.int64) * -0x61C8864680B583EB
    mixed = (mixed ^ (mixed >> 29)) * -0x40A7B892E31B1A47
    return (mixed ^ (mixed >> 32)) | 1


@dataclass
class _Known:
    tensor: weakref.ref[Tensor]
    state: tuple[object, ...]
    total: int | None = None  # while it is read


_known: dict[int, _Known] = {}  # by id: whoever takes a parameter's .data waits for a look into it


def checksums(values: Sequence[Tensor], check: str = "auto") -> list[int]:
    """Return the checksums of tensors, read again where they may have changed.

    While a CUDA graph is captured only what is new or changed would be read: replays look at no weight, either.

    Args:
        values: on any device; no subclasses but parameters.
        check: see :class:`tahf4_compiler.options.Options`.

    Raises:
        CaptureError: something would have to be read while a CUDA graph is captured.
    """
    always = [_reads_always(value, check) for value in values]
    if not all(always):
        _watch()
    if any(always) and capturing():
        always = [False] * len(values)
    states = [_state(value) for value in values]
    found = [_known.get(id(value)) for value in values]
    stale = [
        i
        for i, known in enumerate(found)
        if always[i]
        or known is None
        or known.tensor() is not values[i]
        or known.state != states[i]
        or known.total is None
    ]
    if stale:
        refuse_capture()
        # Kept before they are read: a write meanwhile, in another thread, lets them be forgotten again.
        for i in stale:
            gone = functools.partial(_forget_id, id(values[i]))
            _known[id(values[i])] = found[i] = _Known(weakref.ref(values[i], gone), states[i])
        for i, total in zip(stale, contents([values[i] for i in stale]), strict=True):
            if (known := found[i]) is not None:
                known.total = total
    return [known.total for known in found if known is not None and known.total is not None]


def _reads_always(value: Tensor, check: str) -> bool:
    """Whether a tensor is read at each call: where that is cheap, and where it has no version counter."""
    cheap = value.device.type == "cpu"
    if check != "content" and value.is_inference() and not cheap:
        _say_inference()
        return True
    return check == "content" or value.is_inference() or (check == "auto" and cheap)


def _state(value: Tensor) -> tuple[object, ...]:
    """Return what tells without reading a tensor that it may have changed."""
    version = 0 if value.is_inference() else value._version
    return version, value.data_ptr(), value.dtype, tuple(value.shape)


def forget(value: Tensor) -> None:
    """Read a tensor again at the next call."""
    _known.pop(id(value), None)


def _forget_id(key: int, _: object) -> None:
    _known.pop(key, None)


@functools.cache
def _watch() -> None:
    """Forget what is written where version counter and address do not show it."""
    watch_data(forget)
    watch_fused_optimizers(forget)
    when_imported("torch.distributed.fsdp._fully_shard._fsdp_param", lambda: watch_gathering(forget))
    _known.clear()  # nobody watched so far


@functools.cache
def _say_inference() -> None:
    log.warning(
        "weights are inference tensors, which have no version counter: each call reads them and waits for the device. "
        "Load and move the model outside of torch.inference_mode()."
    )


def capturing() -> bool:
    """Whether a CUDA graph is captured on the stream at hand."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def refuse_capture() -> None:
    """Raise an error while a CUDA graph is captured.

    Raises:
        CaptureError: one is.
    """
    if capturing():
        raise CaptureError(
            "a CUDA graph is captured, and a weight is new or changed: to pack it, it would have to be read, which "
            "waits for the device. Call the compiled model once before the capture, with the same shapes, under the "
            "same torch.cuda.stream; after a change of weights capture again."
        )
