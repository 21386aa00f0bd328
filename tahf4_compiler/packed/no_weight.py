"""What stands for the weight of a packed linear: its shape, dtype and device, and no values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import PackedError
from ..import_hook import when_imported
from ..torch_private.inductor import refuse_in_inductor

__all__ = ["NoWeight", "NoWeightError", "no_weight"]

_PROPERTIES = ("shape", "dtype", "device", "requires_grad", "ndim", "layout", "is_meta", "is_cuda", "is_cpu", "is_leaf")
_METHODS = ("dim", "size", "numel", "stride", "element_size", "is_floating_point", "is_complex", "get_device")


class NoWeightError(PackedError):
    """Somebody asked a packed linear for the values of its weight."""


class NoWeight(Tensor):
    """A tensor that answers what it looks like, and refuses everything else.

    Libraries ask a linear's weight for its dtype, device and shape (adapters are made alike, activations cast); merging
    an adapter would write to it, which must not pass in silence.
    """

    _is_hf_initialized = True
    """transformers initializes what lacks this mark; there is nothing to initialize."""

    @staticmethod
    def __new__(cls, n: int, k: int, dtype: torch.dtype, device: torch.device) -> NoWeight:
        """Stand for a weight ``[n, k]``."""
        make: Any = Tensor._make_wrapper_subclass
        made: NoWeight = make(cls, (n, k), dtype=dtype, device=device, requires_grad=False)
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer questions about shape, dtype and device."""
        if func in _ANSWERED:
            return super().__torch_function__(func, types, args, kwargs)
        if func == _DATA:
            return args[0]  # diffusers asks it in turn
        raise _refused(func)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Refuse what comes past ``__torch_function__``."""
        raise _refused(func)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Return what it stands for."""
        return f"NoWeight(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"


def _refused(func: Any) -> NoWeightError:
    what = getattr(func, "__name__", func)
    if what == "__get__":  # of a property, whose own name its __self__ has
        what = getattr(func.__self__, "__name__", what)
    return NoWeightError(
        f"this linear is packed: it has weight_codes and weight_scales, and no weight for {what!r} to read or write. "
        "What changes or joins weights (as fuse_qkv_projections) comes before quantize_. "
        "An adapter runs beside the 4-bit product; only a plain LoRA can be fused into it. To fuse another, call "
        "tahf4_compiler.dequantize_(model) or load the original, fuse, and call tahf4_compiler.quantize_(model). "
        "An adapter that reads the weight (DoRA) must be there before quantize_, which then leaves the linear as it is."
    )


_ANSWERED = {
    *(getattr(Tensor, name).__get__ for name in _PROPERTIES),
    *(getattr(Tensor, name) for name in _METHODS),
}


_DATA = Tensor.data.__get__  # type: ignore[attr-defined]


@torch.library.custom_op("tahf4::no_weight", mutates_args=())
def no_weight(n: int, k: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a :class:`NoWeight` ``[n, k]`` that Dynamo can trace: code that reads its dtype leaves nothing in a graph.

    Code that reads its values keeps this operator, and so raises :class:`NoWeightError` when the graph runs.
    """
    return NoWeight(n, k, dtype, device)


def _refuse_in_inductor() -> None:
    refuse_in_inductor(torch.ops.tahf4.no_weight.default, lambda: _refused("compiled code"))


# What Inductor compiles would read memory that a NoWeight does not have, past all checks.
when_imported("torch._inductor.lowering", _refuse_in_inductor)


@no_weight.register_fake
def _(n: int, k: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty((n, k), dtype=dtype, device=device)
