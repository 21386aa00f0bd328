"""Collectives of a process group, for tensors and JSON."""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import CalibrationError

__all__ = ["Exchange"]


class Exchange:
    """Collectives of a process group, on the device that its backend needs.

    Attributes:
        rank: of this process in the group.
        size: processes in the group.
        device: of the tensors that are sent.
    """

    def __init__(self, group: Any = None) -> None:
        """Use a process group, the default one if None.

        Raises:
            CalibrationError: there is none.
        """
        if not dist.is_available() or not dist.is_initialized():
            raise CalibrationError(
                "no process group: start the processes with torchrun and call torch.distributed.init_process_group() "
                "before calibrations are merged"
            )
        self._group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        nccl = "nccl" in dist.get_backend(group)
        self.device = torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")

    def reduce(self, value: Tensor, op: Any) -> Tensor:
        """Return the sum or maximum of all ranks' tensors, of one shape, where this rank's was."""
        sent = value.to(self.device, copy=True).contiguous()
        dist.all_reduce(sent, op, group=self._group)
        return sent.to(value.device)

    def gather(self, value: Tensor) -> list[Tensor]:
        """Return all ranks' tensors, of one shape and dtype, by rank, on this rank's device."""
        sent = value.to(self.device).contiguous()
        found = [torch.empty_like(sent) for _ in range(self.size)]
        dist.all_gather(found, sent, group=self._group)
        return [part.to(value.device) for part in found]

    def texts(self, content: Any) -> list[Any]:
        """Return what JSON can hold of all ranks, by rank."""
        data = torch.frombuffer(bytearray(json.dumps(content).encode()), dtype=torch.uint8)
        lengths = [int(n) for n in self.gather(torch.tensor([len(data)], dtype=torch.int64, device="cpu"))]
        padded = torch.nn.functional.pad(data, (0, max(lengths) - len(data)))
        parts = self.gather(padded)
        return [json.loads(bytes(part[:n].tolist())) for part, n in zip(parts, lengths, strict=True)]

    def tensors(self, mine: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """Return all ranks' tensors by name, by rank, on the CPU; shapes and dtypes may differ."""
        listed = self.texts([[name, str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in mine.items()])
        found = []
        for rank, entries in enumerate(listed):
            part = {}
            for name, dtype, shape in entries:
                empty = torch.empty(shape, dtype=getattr(torch, dtype), device="cpu")
                value = mine[name] if rank == self.rank else empty
                # A copy into a new tensor: an expanded one of one element has no stride that can be viewed as bytes.
                flat = torch.empty(value.numel(), dtype=value.dtype, device=self.device)
                flat = flat.copy_(value.detach().reshape(-1)).view(torch.uint8)
                source = rank if self._group is None else dist.get_global_rank(self._group, rank)
                dist.broadcast(flat, source, group=self._group)
                part[name] = flat.cpu().view(getattr(torch, dtype)).reshape(shape)
            found.append(part)
        return found
