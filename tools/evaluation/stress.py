"""Give a trained Wan transformer the activations of a large model, without changing its function.

Large diffusion transformers have a few channels that are 20 to 100 times the rest on every token, and channels that are
ordinary on most tokens and very large on a few ("spikes"). A small model has neither. Between two linear
maps a channel can be multiplied by ``s`` and the column of each weight that reads it divided by ``s``: the
function stays, the activation does not. Every ``s`` is a power of two, so products keep their bits in float32,
bfloat16 and float64 alike; only ``1 + scale`` of a modulated norm is rounded again, in the precision that it is
computed in. (Rounding the stressed ``scale_shift_table`` itself to bfloat16 would round it more coarsely: diffusers
keeps it in float32.)

Sites, as in ``diffusers.models.transformers.transformer_wan`` (rows of ``scale_shift_table`` and sixths of
``time_proj``: shift, scale, gate before attn1, then shift, scale, gate before the feed-forward):

========  ==================================================  ==========================================
site      multiplied                                          divided (columns)
========  ==================================================  ==========================================
norm1     rows 0, 1 of every table and of ``time_proj``       ``attn1.to_{q,k,v}`` of every block
norm3     rows 3, 4 of every table and of ``time_proj``       ``ffn.net.0.proj`` of every block
text      ``condition_embedder.text_embedder.linear_2``       ``attn2.to_{k,v}`` of every block
value1    ``attn1.to_v``                                      ``attn1.to_out.0``
value2    ``attn2.to_v`` (and ``add_v_proj``)                 ``attn2.to_out.0``
norm2     ``norm2.weight``, ``norm2.bias``                    ``attn2.to_q``
hidden    units added to the feed-forward                     \
========  ==================================================  ==========================================

No factor passes through a GELU. There the layer grows by pairs of units: both of a pair compute the same value, and
their output columns are opposite, so that they cancel.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from torch import Tensor, nn

from ..tiny_wan import data, settings

__all__ = ["SiteReport", "StressReport", "channel_ratios", "sampled_inputs", "stress_", "stress_pipeline_"]

EXPERTS = ("transformer", "transformer_2")

_SHIFT, _SCALE, _FFN_SHIFT, _FFN_SCALE = 0, 1, 3, 4  # rows of scale_shift_table; 2 and 5 are gates

NORMAL_TAIL = (3.1, 4.2)
"""Standard deviations where a unit starts to fire, and that it is taken to reach, where there are no samples."""


@dataclass(frozen=True)
class SiteReport:
    """What was done to one activation.

    Attributes:
        site: name of the table above, with the block where each block has its own channels.
        readers: paths of the linears that read it.
        outliers: channel -> factor, large on every token. For ``hidden``, the new units and the magnitude
            that they have on a typical token, over that of the old units.
        spikes: channel -> factor, those of the longest tail. For ``hidden``, the new units and their
            largest magnitude over that of the old units.
        before: :func:`channel_ratios` of the samples, or None without samples.
        after: the same afterwards, computed from the samples.
    """

    site: str
    readers: tuple[str, ...]
    outliers: Mapping[int, float]
    spikes: Mapping[int, float]
    before: tuple[float, float] | None = None
    after: tuple[float, float] | None = None

    def __str__(self) -> str:
        """Return one line."""

        def listed(factors: Mapping[int, float]) -> str:
            shown = " ".join(f"{c}x{factor:.3g}" for c, factor in sorted(factors.items())[:6])
            return f"{len(factors)} [{shown}{' ...' if len(factors) > 6 else ''}]"

        line = f"{self.site:18} outliers {listed(self.outliers)}, spikes {listed(self.spikes)}"
        if self.before is not None and self.after is not None:
            line += f"; max/median {self.before[0]:.1f} -> {self.after[0]:.1f}"
            line += f", max/p99.9 {self.before[1]:.1f} -> {self.after[1]:.1f}"
        return line


@dataclass(frozen=True)
class StressReport:
    """What :func:`stress_` did.

    Attributes:
        seed: of the channels and factors.
        sites: one an activation; the norms and the text embedding, whose channels all blocks share, once.
    """

    seed: int
    sites: tuple[SiteReport, ...]

    def __str__(self) -> str:
        """Return a line for each site."""
        return "\n".join([f"seed {self.seed}", *(str(site) for site in self.sites)])


@dataclass(frozen=True)
class _Site:
    name: str
    width: int
    readers: list[str]
    multiply: Callable[[Tensor], None]


def channel_ratios(rows: Tensor) -> tuple[float, float]:
    """Describe the outliers of an activation.

    Args:
        rows: ``[R, K]`` of a floating-point type.

    Returns:
        The largest over the median of the channels' maxima of ``|x|``; and the largest, over channels, of the maximum
        over the 99.9th percentile of ``|x|`` (which counts as at least a hundredth of the median maximum: units
        behind a GELU are zero on most tokens).
    """
    amax, high = _maximum_and_percentile(rows)
    typical = amax.median().clamp(min=1e-30)
    return float(amax.max() / typical), float((amax / high.clamp(min=0.01 * typical)).max())


def stress_(
    transformer: WanTransformer3DModel,
    seed: int,
    *,
    samples: Mapping[str, Tensor] | None = None,
    outlier_share: float = 0.01,
    spike_share: float = 0.005,
    factors: Sequence[int] = (16, 32, 64, 128),
    hidden_units: int = 64,
) -> StressReport:
    """Put outlier channels and token spikes into a Wan transformer, in place, keeping its function.

    Args:
        transformer: trained, not compiled, its projections not fused.
        seed: of channels and factors; experts of one pipeline take different ones.
        samples: module path -> ``[R, K]``, rows that the linear reads (:func:`sampled_inputs`). Outliers are then
            drawn among the channels from the median one to the 80th percentile, and the channels of the longest tail
            (maximum over 99.9th percentile of ``|x|``) become spikes. Without samples no channel becomes a spike
            except in the feed-forward, where the thresholds assume inputs of unit variance.
        outlier_share: of the channels of a site, at least two.
        spike_share: of the channels of a site, at least one.
        factors: powers of two to draw from; one channel of each site takes the largest.
        hidden_units: units added to each feed-forward, a multiple of 4 (of 64 to keep whole quantization units), or
            0. They lie evenly among the old ones. ``outlier_share`` of the width fire on every token, the others
            on about one token in a thousand.

    Returns:
        What was done.

    Raises:
        ValueError: a factor is no power of two above 1, ``hidden_units`` is no multiple of 4, the projections
            are fused, or the transformer is compiled.
    """
    _check(transformer, factors, hidden_units)
    samples = dict(samples or {})
    reports = []
    with torch.no_grad():
        for index in range(len(transformer.blocks) if hidden_units else 0):
            rng = _rng(seed, f"hidden.{index}")
            reports.append(_widen(transformer, index, rng, samples, outlier_share, factors, hidden_units))
        for site in _sites(transformer):
            rng = _rng(seed, site.name)
            rows = [samples[path] for path in site.readers if path in samples]
            outliers, spikes = _choose(site.width, rng, rows, outlier_share, spike_share, factors)
            multiplier = torch.ones(site.width, dtype=torch.float64)
            for channel, factor in (spikes | outliers).items():
                multiplier[channel] = factor
            site.multiply(multiplier)
            for path in site.readers:
                weight = transformer.get_submodule(path).weight
                assert isinstance(weight, Tensor)
                weight.div_(multiplier.to(weight))
            before = after = None
            if rows:
                before = _largest([channel_ratios(r) for r in rows])
                after = _largest([channel_ratios(r * multiplier.to(r)) for r in rows])
            reports.append(SiteReport(site.name, tuple(site.readers), outliers, spikes, before, after))
    return StressReport(seed, tuple(reports))


def stress_pipeline_(
    pipe: WanPipeline, seed: int, arguments: Mapping[str, Any] | None = None, **choices: Any
) -> dict[str, StressReport]:
    """Stress each expert of a pipeline in channels of its own.

    Args:
        pipe: not compiled; changed in place.
        seed: of everything.
        arguments: of a short call of the pipeline, during which activations are sampled; by default two captions
            of the tiny pipeline in six steps.
        choices: of :func:`stress_`.

    Returns:
        Expert name -> what was done.
    """
    models = {name: model for name in EXPERTS if (model := getattr(pipe, name, None)) is not None}
    for model in models.values():
        _check(model, (2,), 0)
    if arguments is None:
        captions = [str(data.all_captions()[i]) for i in (5, 100)]
        noise = [torch.Generator().manual_seed(seed + i) for i in range(len(captions))]
        arguments = {**settings.GENERATION, "prompt": captions, "generator": noise, "num_inference_steps": 6}
        arguments["negative_prompt"] = [arguments["negative_prompt"]] * len(captions)
        arguments["output_type"] = "latent"
    with sampled_inputs(models) as samples, torch.no_grad():
        pipe(**arguments)
    return {
        name: stress_(model, _seed_of(f"{seed}/{name}"), samples=samples[name], **choices)
        for name, model in models.items()
    }


@contextmanager
def sampled_inputs(
    models: Mapping[str, nn.Module], *, rows_per_call: int = 4096
) -> Iterator[dict[str, dict[str, Tensor]]]:
    """Collect what the linears of blocks read, while the context is open.

    Args:
        models: name -> module with ``blocks``, not compiled.
        rows_per_call: rows that are kept of each call, evenly spread; every row if there are no more.

    Yields:
        name -> module path -> float32 ``[R, K]`` on the CPU, filled in when the context closes. Of linears
        that read one tensor only ``to_q`` (or ``to_k`` of a cross-attention) is kept.
    """
    found: dict[str, dict[str, Tensor]] = {name: {} for name in models}
    parts: dict[tuple[str, str], list[Tensor]] = {}
    handles = []

    def listener(key: tuple[str, str]) -> Callable[[nn.Module, Any], None]:
        def listen(module: nn.Module, inputs: Any) -> None:
            rows = inputs[0].detach().flatten(0, -2)
            step = -(-len(rows) // rows_per_call)
            parts.setdefault(key, []).append(rows[::step].to("cpu", torch.float32, copy=True))

        return listen

    for name, model in models.items():
        for path, module in model.named_modules():
            again = path.endswith((".to_v", "attn1.to_k"))
            if isinstance(module, nn.Linear) and path.startswith("blocks.") and not again:
                handles.append(module.register_forward_pre_hook(listener((name, path))))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
        for (name, path), rows in parts.items():
            found[name][path] = torch.cat(rows)


def _check(transformer: nn.Module, factors: Sequence[int], hidden_units: int) -> None:
    if not factors or any(f < 2 or int(f) != f or int(f) & (int(f) - 1) for f in factors):
        raise ValueError(f"factors are {list(factors)}; expected powers of two above 1, which keep the products' bits")
    if hidden_units < 0 or hidden_units % 4:
        raise ValueError(f"hidden_units is {hidden_units}; expected a multiple of 4: pairs on every and on rare tokens")
    if getattr(transformer, "_compiled_call_impl", None) is not None:
        raise ValueError("the transformer is compiled; stress it before it is compiled")
    if any(getattr(module, "fused_projections", False) for module in transformer.modules()):
        raise ValueError("the projections are fused; call unfuse_projections() first")


def _seed_of(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def _rng(seed: int, site: str) -> np.random.Generator:
    return np.random.default_rng(_seed_of(f"{seed}/{site}"))


def _maximum_and_percentile(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the maximum and the 99.9th percentile of ``|x|`` for each channel of ``[R, K]``: ``[K]`` each."""
    magnitude = rows.abs().to(torch.float32)
    rank = round(0.999 * (len(rows) - 1))  # of the order statistics: torch.quantile refuses large tensors
    top = magnitude.topk(len(rows) - rank, dim=0).values
    return top[0], top[-1]


def _largest(ratios: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return max(r[0] for r in ratios), max(r[1] for r in ratios)


def _choose(
    width: int,
    rng: np.random.Generator,
    rows: Sequence[Tensor],
    outlier_share: float,
    spike_share: float,
    factors: Sequence[int],
) -> tuple[dict[int, float], dict[int, float]]:
    """Return the outlier channels and the spike channels of a site with their factors; none is both."""
    candidates, spiky = np.arange(width), np.empty(0, np.int64)
    if rows:
        statistics = [_maximum_and_percentile(r) for r in rows]
        amax = torch.stack([a for a, _ in statistics]).amax(0)
        tails = torch.stack([a / h.clamp(min=1e-20) for a, h in statistics]).amax(0)
        spiky = tails.argsort(descending=True)[: max(1, round(spike_share * width))].numpy()
        middle = (amax >= amax.median()) & (amax <= amax.quantile(0.8))
        candidates = np.setdiff1d(np.flatnonzero(middle.numpy()), spiky)
    count = min(len(candidates), max(2, round(outlier_share * width)))
    outliers = rng.choice(candidates, count, replace=False)
    drawn = rng.choice(np.asarray(factors), count)
    drawn[0] = max(factors)
    return (
        {int(c): float(f) for c, f in zip(outliers, drawn, strict=True)},
        {int(c): float(f) for c, f in zip(spiky, rng.choice(np.asarray(factors), len(spiky)), strict=True)},
    )


def _scale_rows(linear: Any, multiplier: Tensor, rows: slice = slice(None)) -> None:
    linear.weight[rows] *= multiplier.to(linear.weight)[:, None]
    if linear.bias is not None:
        linear.bias[rows] *= multiplier.to(linear.bias)


def _sites(model: WanTransformer3DModel) -> Iterator[_Site]:
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

    yield _Site("norm1", dim, every("attn1.to_q", "attn1.to_k", "attn1.to_v"), modulation(_SHIFT, _SCALE))
    yield _Site("norm3", dim, every("ffn.net.0.proj"), modulation(_FFN_SHIFT, _FFN_SCALE))
    text = condition.text_embedder.linear_2
    yield _Site("text", text.out_features, every("attn2.to_k", "attn2.to_v"), values(text))
    for i, block in enumerate(blocks):
        one, two = block.attn1, block.attn2
        yield _Site(f"blocks.{i}.value1", one.to_v.out_features, [f"blocks.{i}.attn1.to_out.0"], values(one.to_v))
        linears = (two.to_v, two.add_v_proj)
        yield _Site(f"blocks.{i}.value2", two.to_v.out_features, [f"blocks.{i}.attn2.to_out.0"], values(*linears))
        if getattr(block.norm2, "weight", None) is not None:  # cross_attn_norm=False has none
            yield _Site(f"blocks.{i}.norm2", dim, [f"blocks.{i}.attn2.to_q"], affine(block.norm2))


def _widen(
    model: WanTransformer3DModel,
    index: int,
    rng: np.random.Generator,
    samples: Mapping[str, Tensor],
    outlier_share: float,
    factors: Sequence[int],
    count: int,
) -> SiteReport:
    """Add ``count`` hidden units to a block's feed-forward, in pairs that cancel.

    A unit is ``gelu(k (w_j x + b_j - t))`` with the row ``w_j`` of an old unit. One that fires on rare tokens has ``t``
    at the 99.9th percentile of ``w_j x + b_j`` and ``k`` such that it reaches a factor times what old units reach.
    One that fires on every token has a large bias in place of ``-k t``. Output columns are an old unit's, divided by
    the factor, with both signs.
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
        column = last.weight[:, int(rng.integers(width))] / factor
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
