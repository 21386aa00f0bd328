"""The networks of the walks: small ones whose numbers no order of a sum can change, and the tiny Wan transformer.

All linears of :class:`Network` in 4 bits have 64 input features: one unit, whose product is exact. Between products
it adds, subtracts and takes the larger of two numbers. So every way of running it must give the same bits in float32,
and a wrong weight cannot hide behind a rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from models import wan
from torch import Tensor, nn

__all__ = ["DTYPES", "KINDS", "inputs", "make"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDTH = 64


class Block(nn.Module):
    """Three linears of one activation and three of their own."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH) if norm else nn.Identity()
        self.act = nn.GELU() if norm else nn.ReLU()
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = self.to_q(y), self.to_k(y), self.to_v(y)
        x = x + self.to_out(self.act(q + k) - v)
        return x + self.down(self.act(self.up(x)))


def _build(model: nn.Module, norm: bool) -> None:
    model.first, model.time, model.last = nn.Linear(WIDTH, WIDTH), nn.Linear(16, WIDTH), nn.Linear(WIDTH, 32)
    model.blocks = nn.ModuleList(Block(norm) for _ in range(2))


def _run(model: Any, x: Tensor) -> Tensor:
    x = model.first(x) + model.time(x[..., :16])
    for block in model.blocks:
        x = block(x)
    return model.last(x)


class Network(nn.Module):
    """A plain module, in the way of a model that its user wrote."""

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        _build(self, norm)

    def forward(self, x: Tensor) -> Tensor:
        return _run(self, x)


class MixinNetwork(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """The same as a model of diffusers."""

    _repeated_blocks = ["Block"]  # noqa: RUF012
    _no_split_modules = ["Block"]  # noqa: RUF012

    @register_to_config
    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        _build(self, norm)

    def forward(self, x: Tensor) -> Tensor:
        return _run(self, x)


KINDS: dict[str, Callable[[], nn.Module]] = {
    "module": Network,
    "diffusers": MixinNetwork,
    "norms": lambda: MixinNetwork(norm=True),
    "wan": lambda: wan()[0],
}


def make(kind: str, seed: int) -> nn.Module:
    """Return a network of a kind, frozen, with weights of a seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return KINDS[kind]().eval().requires_grad_(False)


def inputs(kind: str, rows: int, seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the arguments of a call."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype)

    if kind != "wan":
        return {"x": draw(rows, 5, WIDTH)}
    return {
        "hidden_states": draw(rows, 8, 1, 4, 4),
        "timestep": torch.tensor([10.0] * rows, dtype=torch.float32),
        "encoder_hidden_states": draw(rows, 6, 64),
    }
