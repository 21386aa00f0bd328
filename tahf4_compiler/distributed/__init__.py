"""Many devices: tensor parallelism by ``torch.distributed.tensor``, and what calibration and packed weights need there.

FSDP2 (``fully_shard``) and diffusers' context parallelism need nothing from here; ``docs/distributed.md`` shows all.
Importing this package is cheap; the parallel styles import ``torch.distributed.tensor`` when they are first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .sizes import check_columns, check_rows, column_degrees, row_degrees

if TYPE_CHECKING:
    from .division import tensor_parallel
    from .styles import HiF4ColwiseParallel, HiF4RowwiseParallel

__all__ = [
    "HiF4ColwiseParallel",
    "HiF4RowwiseParallel",
    "check_columns",
    "check_rows",
    "column_degrees",
    "row_degrees",
    "tensor_parallel",
]


def __getattr__(name: str) -> Any:
    """Import what needs ``torch.distributed.tensor``, and register the sharding rules."""
    if name not in ("HiF4ColwiseParallel", "HiF4RowwiseParallel", "tensor_parallel"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import division, styles

    return getattr(division if name == "tensor_parallel" else styles, name)
