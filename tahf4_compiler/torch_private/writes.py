"""Where PyTorch writes to parameters and leaves their version counters as they were.

What these functions put into PyTorch stays until the process ends.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

__all__ = ["watch_data", "watch_fused_optimizers", "watch_gathering"]

Forget = Callable[[Tensor], None]


def watch_data(forget: Forget) -> None:
    """Call a function with each ``nn.Parameter`` whose ``.data`` somebody takes or sets.

    ``weight.data += x`` writes through what was taken, and what is set has a version counter of its own. Code that
    Dynamo compiles, and C++, take and set it by other ways. What runs beside that code, as hooks do that cast layers,
    comes here, and Dynamo would compile this code for each parameter anew.
    """
    from torch._dynamo.eval_frame import skip_code

    own: Any = Tensor.data

    def get(self: nn.Parameter) -> Tensor:
        forget(self)
        found: Tensor = own.__get__(self)
        return found

    def put(self: nn.Parameter, value: Tensor) -> None:
        forget(self)
        own.__set__(self, value)

    for function in (get, put):
        skip_code(function.__code__)
    nn.Parameter.data = property(get, put, own.__delete__, own.__doc__)  # type: ignore[assignment]


def watch_fused_optimizers(forget: Forget) -> None:
    """Call a function with each parameter that a step of an optimizer with ``fused=True`` may have changed."""

    def after(optimizer: Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"] if group.get("fused") else ():
                forget(parameter)

    register_optimizer_step_post_hook(after)


def watch_gathering(forget: Forget) -> None:
    """Call a function with each whole parameter that FSDP2 has gathered into memory that it had before."""
    from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam

    own = FSDPParam.to_unsharded

    @functools.wraps(own)
    def to_unsharded(self: FSDPParam) -> None:
        own(self)
        forget(self._unsharded_param)

    FSDPParam.to_unsharded = to_unsharded  # type: ignore[method-assign]
