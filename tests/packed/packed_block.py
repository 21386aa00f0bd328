"""A block of two linears, plain or packed in one of the forms that HiF4 has."""

from __future__ import annotations

from typing import Any

import torch
from models import Block
from torch import nn

import tahf4_compiler as tahf4

GRAPH = {"inductor": False}


def make(**how: Any) -> nn.Module:
    """Return a block for the fixture ``x``, always the same one; packed if there are arguments of ``quantize_``."""
    torch.manual_seed(0)
    model = Block(256, 512).eval().requires_grad_(False)
    if how:
        tahf4.quantize_(model, **how)
    return model
