"""Runs a function on several local ranks with gloo."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

# One process imports torch; ranks are forked from it, which takes a moment instead of seconds.
multiprocessing.set_forkserver_preload(
    [
        "diffusers.models.transformers.transformer_wan",
        "tahf4_compiler.backends.dynamo",
        "tahf4_compiler.distributed.styles",
        "torch._dynamo",
        "torch.distributed.fsdp",
    ]
)


def run(size: int, work: Callable[..., None], *arguments: Any) -> None:
    """Call ``work(rank, size, *arguments)`` on ranks that form the default process group; their failures fail here."""
    import torch.multiprocessing as processes

    with tempfile.TemporaryDirectory() as folder:
        processes.start_processes(
            _rank, (size, str(Path(folder) / "store"), work, arguments), size, start_method="forkserver"
        )


def _rank(rank: int, size: int, store: str, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    try:
        with torch.no_grad():
            work(rank, size, *arguments)
        dist.barrier()
    finally:
        dist.destroy_process_group()
