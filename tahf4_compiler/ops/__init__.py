"""The operators that a lowered graph is made of: ``torch.ops.tahf4``. Importing this defines them."""

from ..format.transforms import check_transform, hadamard, transform
from . import fused as fused
from .attention import check_attention
from .packed_linear import packed_linear
from .reference import activation_bits, check_linear, check_memory, dequantize, linear, observe, quantize

__all__ = [
    "activation_bits",
    "check_attention",
    "check_linear",
    "check_memory",
    "check_transform",
    "dequantize",
    "hadamard",
    "linear",
    "observe",
    "packed_linear",
    "quantize",
    "transform",
]
