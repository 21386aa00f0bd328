"""Run a product of the generated kernels as it is asked for, not as its sizes choose."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["own_on_path"]


def own_on_path(path: str, codes: Tensor, *args: Any, **how: Any) -> list[Tensor]:
    """Run a product on a path, whatever the sizes; the arguments are those of ``linear.calls``."""
    from ...backends.triton import linear
    from ...backends.triton import run as run_calls

    capability, processors = None, 4
    if codes.device.type == "cuda":
        capability = torch.cuda.get_device_capability(codes.device)
        processors = torch.cuda.get_device_properties(codes.device).multi_processor_count
    results, calls = linear.calls(codes, *args, capability=capability, processors=processors, path=path, **how)
    run_calls(calls)
    return results
