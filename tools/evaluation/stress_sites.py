"""Where the stress variant widens channels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from .sampling import channel_ratios
from .stress_report import SiteReport

_SHIFT, _SCALE, _FFN_SHIFT, _FFN_SCALE = 0, 1, 3, 4  # rows of scale_shift_table; 2 and 5 are gates

NORMAL_TAIL = (3.1, 4.2)
"""Standard deviations where a unit starts to fire, and that it is taken to reach, where there are no samples."""


@dataclass(frozen=True)
class Site:
    """Channels that are widened: what writes them, and what reads them."""

    name: str
    width: int
    readers: list[str]
    multiply: Callable[[Tensor], None]


def _scale_rows(linear: Any, multiplier: Tensor, rows: slice = slice(None)) -> None:
    linear.weight[rows] *= multiplier.to(linear.weight)[:, None]
    if linear.bias is not None:
        linear.bias[rows] *= multiplier.to(linear.bias)


def sites(model: WanTransformer3DModel) -> Iterator[Site]:
    """Yield the places of a transformer where channels can be widened."""
    blocks: list[Any] = list(model.blocks)
    condition: Any = model.condition_embedder
    dim = condition.time_proj.out_features // 6

    def modulation(shift: int, scale: int) -> Callable[[Tensor], None]:
        def multiply(multiplier: Tensor) -> None:
            for slot in (shift, scale):
                _scale_rows(condition.time_proj, multiplier, slice(slot * dim, (slot + 1) * dim))
                for block in blocks:
                    table = block.scale_shift_table[:, slot]
                    # s (1 + table + time) = 1 + (s table + (s - 1)) + s time
                    factors = multiplier.to(table.device)
                    table.copy_(factors * table.double() + (factors - 1 if slot == scale else 0))

        return multiply

    def values(*linears: Any) -> Callable[[Tensor], None]:
        def multiply(multiplier: Tensor) -> None:
            for linear in linears:
                if linear is not None:
                    _scale_rows(linear, multiplier)

        return multiply

    def affine(norm: Any) -> Callable[[Tensor], None]:
        def multiply(multiplier: Tensor) -> None:
            norm.weight.mul_(multiplier.to(norm.weight))
            norm.bias.mul_(multiplier.to(norm.bias))

        return multiply

    def every(*names: str) -> list[str]:
        return [f"blocks.{i}.{name}" for i in range(len(blocks)) for name in names]

    yield Site("norm1", dim, every("attn1.to_q", "attn1.to_k", "attn1.to_v"), modulation(_SHIFT, _SCALE))
    yield Site("norm3", dim, every("ffn.net.0.proj"), modulation(_FFN_SHIFT, _FFN_SCALE))
    text = condition.text_embedder.linear_2
    yield Site("text", text.out_features, every("attn2.to_k", "attn2.to_v"), values(text))
    for i, block in enumerate(blocks):
        one, two = block.attn1, block.attn2
        yield Site(f"blocks.{i}.value1", one.to_v.out_features, [f"blocks.{i}.attn1.to_out.0"], values(one.to_v))
        linears = (two.to_v, two.add_v_proj)
        yield Site(f"blocks.{i}.value2", two.to_v.out_features, [f"blocks.{i}.attn2.to_out.0"], values(*linears))
        if getattr(block.norm2, "weight", None) is not None:  # cross_attn_norm=False has none
            yield Site(f"blocks.{i}.norm2", dim, [f"blocks.{i}.attn2.to_q"], affine(block.norm2))


def widen(
    model: WanTransformer3DModel,
    index: int,
    rng: np.random.Generator,
    samples: Mapping[str, Tensor],
    outlier_share: float,
    factors: Sequence[int],
    count: int,
    shrink: bool = True,
) -> SiteReport:
    """Add ``count`` hidden units to a block's feed-forward, in pairs that cancel.

    A unit is ``gelu(k (w_j x + b_j - t))`` with the row ``w_j`` of an old unit. One that fires on rare tokens has ``t``
    at the 99.9th percentile of ``w_j x + b_j`` and ``k`` such that it reaches a factor times what old units reach.
    One that fires on every token has a large bias in place of ``-k t``. Output columns are an old unit's with both
    signs, and divided by the factor unless ``shrink`` is False.
    """
    block: Any = model.blocks[index]
    first, last = block.ffn.net[0].proj, block.ffn.net[2]
    width, pairs = first.out_features, count // 2
    weight, bias = first.weight.double(), first.bias.double()
    # Channels [width] of the value before the GELU: its middle, deviation, threshold and largest value.
    rows = samples.get(f"blocks.{index}.ffn.net.0.proj")
    if rows is not None:
        value = rows.to(bias) @ weight.T + bias
        top = value.topk(len(value) - round(0.999 * (len(value) - 1)), dim=0).values
        middle, deviation, high, largest = value.median(0).values, value.std(0), top[-1], top[0]
    else:
        middle, deviation = bias, weight.norm(dim=1)
        high, largest = (middle + factor * deviation for factor in NORMAL_TAIL)
    typical = float(largest.clamp(min=0).median())  # gelu(v) is v where v is large
    steady = min(pairs // 2, max(1, round(outlier_share * width / 2)))
    tails = (largest - high) / (high - middle).clamp(min=1e-6)
    spiky = tails.argsort(descending=True)[: max(2 * pairs, width // 4)].cpu().numpy()
    sources = [*rng.choice(width, steady, replace=False), *rng.choice(spiky, pairs - steady, replace=width < 8 * pairs)]
    drawn = rng.choice(np.asarray(factors, dtype=np.float64), pairs)
    drawn[0] = max(factors)

    def power(x: float) -> float:
        return float(2.0 ** np.round(np.log2(max(x, 2.0**-30))))

    units = []  # (row, bias, output column), one a pair
    for pair, (j, factor) in enumerate(zip(sources, drawn, strict=True)):
        if pair < steady:
            k = power(0.125 * factor * typical / max(float(deviation[j]), 1e-6))
            offset = power(factor * typical) - k * float(middle[j] - bias[j])
        else:
            k = power(min(factor * typical / max(float(largest[j] - high[j]), 1e-6), 2.0**12))
            offset = k * float(bias[j] - high[j])
        column = last.weight[:, int(rng.integers(width))] / (factor if shrink else 1)
        units.append((first.weight[j] * k, offset, column))

    total = width + count
    new = (np.arange(count) * 2 + 1) * total // (2 * count)  # evenly among the old, the two of a pair half way apart
    old = np.setdiff1d(np.arange(total), new)
    shuffled = rng.permutation(pairs)
    place = np.stack([new[shuffled], new[shuffled + pairs]], 1)  # [pairs, 2]
    wide_in, wide_bias = first.weight.new_zeros(total, first.in_features), first.bias.new_zeros(total)
    wide_out = last.weight.new_zeros(last.out_features, total)
    wide_in[old], wide_bias[old], wide_out[:, old] = first.weight, first.bias, last.weight
    for (row, offset, column), (one, other) in zip(units, place, strict=True):
        wide_in[one] = wide_in[other] = row
        wide_bias[one] = wide_bias[other] = offset
        wide_out[:, one], wide_out[:, other] = column, -column
    for linear, parameters in ((first, {"weight": wide_in, "bias": wide_bias}), (last, {"weight": wide_out})):
        for name, value in parameters.items():
            grad = getattr(linear, name).requires_grad
            setattr(linear, name, nn.Parameter(value, requires_grad=grad))
    first.out_features = last.in_features = total
    model.register_to_config(ffn_dim=total)

    before = after = None
    if rows is not None:
        act = block.ffn.net[0].gelu
        before = channel_ratios(samples.get(f"blocks.{index}.ffn.net.2", act(rows.to(bias) @ weight.T + bias)))
        after = channel_ratios(act(rows.to(bias) @ wide_in.double().T + wide_bias.double()))
    kinds: tuple[dict[int, float], dict[int, float]] = ({}, {})
    for pair, factor in enumerate(drawn):
        kinds[pair >= steady].update({int(unit): float(factor) for unit in place[pair]})
    return SiteReport(f"blocks.{index}.hidden", (f"blocks.{index}.ffn.net.2",), *kinds, before, after)
