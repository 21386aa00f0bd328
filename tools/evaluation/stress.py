"""A model of the same function whose activations look like those of large models.

Large diffusion transformers have a few channels that are 20 to 100 times the rest, and channels that are ordinary on
most tokens and very large on a few. A small model can be given both without changing what it computes: a
channel between two linear maps is multiplied by a power of two, and the matching column of the weights that read it
is divided by it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import WanPipeline, WanTransformer3DModel
from torch import Tensor, nn

__all__ = ["StressReport", "sampled_activations", "stress_", "stress_pipeline_"]

OUTLIER_SHARE = 0.01
"""Share of a site's channels that become outliers for every token, at least two."""

SPIKE_SHARE = 0.01
"""Share of a site's channels, those of the longest tail, that become outliers for few tokens, at least two."""

FACTORS = (32.0, 64.0, 128.0)
SPIKE_FACTORS = (16.0, 32.0)

_SHIFT, _SCALE, _C_SHIFT, _C_SCALE = 0, 1, 3, 4  # rows of scale_shift_table; 2 and 5 are gates


@dataclass(frozen=True)
class StressReport:
    """What was changed.

    Attributes:
        channels: site -> channel -> factor.
    """

    channels: dict[str, dict[int, float]] = field(default_factory=dict)

    def __str__(self) -> str:
        """Return one line a site."""
        lines = []
        for site, factors in self.channels.items():
            lines.append(f"{site}: " + ", ".join(f"channel {c} x {factor:g}" for c, factor in factors.items()))
        return "\n".join(lines)


@dataclass(frozen=True)
class _Site:
    """A tensor between two maps: how to multiply its channels, and who reads it."""

    name: str
    width: int
    readers: list[nn.Linear]
    multiply: Callable[[Tensor], None]
    sample: str


def stress_(
    transformer: WanTransformer3DModel, seed: int, samples: Mapping[str, Tensor] | None = None
) -> StressReport:
    """Put outlier channels and token spikes into a Wan transformer, in place, keeping its function.

    Sites: the modulated norms before ``attn1`` and ``ffn`` (their scale and shift come from a projection that all
    blocks share, so all blocks get the same channels there), ``norm2``, the values of both attentions, and
    the text embedding. ``ffn.net.2`` reads a GELU, which no factor passes through: it stays.

    Args:
        transformer: of float32 weights (powers of two keep them exact but for ``(1 + scale) - 1``).
        seed: of the channels and factors.
        samples: rows ``[R, K]`` that linears read, by module path; the channels of the longest tail there become
            spikes. Without samples there are none.

    Returns:
        What was changed.
    """
    generator = torch.Generator().manual_seed(seed)
    report = StressReport()
    with torch.no_grad():
        for site in _sites(transformer):
            factors = _factors(site.width, generator, (samples or {}).get(site.sample))
            site.multiply(factors)
            for reader in site.readers:
                reader.weight.div_(factors.to(reader.weight))
            report.channels[site.name] = {int(c): float(factors[c]) for c in torch.nonzero(factors != 1)}
    return report


def stress_pipeline_(pipe: WanPipeline, seed: int, arguments: Mapping[str, Any]) -> dict[str, StressReport]:
    """Stress both experts of a pipeline, each in channels of its own.

    Args:
        pipe: in float32.
        seed: of the channels.
        arguments: of a short call of the pipeline, during which activations are sampled.

    Returns:
        What was changed, by expert.
    """
    models = {name: getattr(pipe, name) for name in ("transformer", "transformer_2") if getattr(pipe, name, None)}
    with sampled_activations(models) as samples, torch.no_grad():
        pipe(**arguments)
    return {name: stress_(model, seed + i, samples[name]) for i, (name, model) in enumerate(models.items())}


@contextmanager
def sampled_activations(models: Mapping[str, nn.Module], calls: int = 8) -> Iterator[dict[str, dict[str, Tensor]]]:
    """Collect what linears read: expert -> module path -> ``[R, K]``, filled in when the block ends.

    Args:
        models: not compiled.
        calls: of each linear whose rows are kept; every third call from the first.
    """
    found: dict[str, dict[str, Tensor]] = {name: {} for name in models}
    kept: dict[tuple[str, str], list[Tensor]] = defaultdict(list)
    seen: dict[tuple[str, str], int] = defaultdict(int)
    handles = []

    def hook(key: tuple[str, str]) -> Callable[[nn.Module, Any], None]:
        def listen(module: nn.Module, args: Any) -> None:
            seen[key] += 1
            if seen[key] % 3 == 1 and len(kept[key]) < calls:
                kept[key].append(args[0].detach().reshape(-1, args[0].shape[-1]).float().clone())

        return listen

    for name, model in models.items():
        for path, module in model.named_modules():
            if isinstance(module, nn.Linear):
                handles.append(module.register_forward_pre_hook(hook((name, path))))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
        for (name, path), rows in kept.items():
            found[name][path] = torch.cat(rows)


def _sites(model: WanTransformer3DModel) -> Iterator[_Site]:
    blocks: list[Any] = list(model.blocks)
    condition: Any = model.condition_embedder
    dim = condition.time_proj.out_features // 6

    def modulation(shift: int, scale: int) -> Callable[[Tensor], None]:
        def multiply(factors: Tensor) -> None:
            for slot in (shift, scale):
                rows = slice(slot * dim, (slot + 1) * dim)
                condition.time_proj.weight[rows] *= factors.to(condition.time_proj.weight)[:, None]
                condition.time_proj.bias[rows] *= factors.to(condition.time_proj.bias)
                for block in blocks:
                    table = block.scale_shift_table[:, slot]
                    table *= factors.to(table)
                    if slot == scale:  # 1 + scale is multiplied
                        table += factors.to(table) - 1

        return multiply

    def values(linear: nn.Linear) -> Callable[[Tensor], None]:
        def multiply(factors: Tensor) -> None:
            linear.weight.mul_(factors.to(linear.weight)[:, None])
            if linear.bias is not None:
                linear.bias.mul_(factors.to(linear.bias))

        return multiply

    def affine(norm: Any) -> Callable[[Tensor], None]:
        def multiply(factors: Tensor) -> None:
            norm.weight.mul_(factors.to(norm.weight))
            norm.bias.mul_(factors.to(norm.bias))

        return multiply

    attention = [r for b in blocks for r in (b.attn1.to_q, b.attn1.to_k, b.attn1.to_v)]
    yield _Site("norm1", dim, attention, modulation(_SHIFT, _SCALE), "blocks.0.attn1.to_q")
    feed = [b.ffn.net[0].proj for b in blocks]
    yield _Site("norm3", dim, feed, modulation(_C_SHIFT, _C_SCALE), "blocks.0.ffn.net.0.proj")
    text = condition.text_embedder.linear_2
    readers = [r for b in blocks for r in (b.attn2.to_k, b.attn2.to_v)]
    yield _Site("text", text.out_features, readers, values(text), "blocks.0.attn2.to_k")
    for i, block in enumerate(blocks):
        for name in ("attn1", "attn2"):
            part = getattr(block, name)
            width = part.to_v.out_features
            site = f"blocks.{i}.{name}.to_out.0"
            yield _Site(site, width, [part.to_out[0]], values(part.to_v), site)
        if isinstance(getattr(block.norm2, "weight", None), Tensor):
            width = block.attn2.to_q.in_features
            yield _Site(f"blocks.{i}.norm2", width, [block.attn2.to_q], affine(block.norm2), f"blocks.{i}.attn2.to_q")


def _factors(width: int, generator: torch.Generator, sample: Tensor | None) -> Tensor:
    factors = torch.ones(width)
    count = max(2, round(OUTLIER_SHARE * width))
    chosen = torch.randperm(width, generator=generator)[:count]
    factors[chosen] = torch.tensor(FACTORS)[torch.randint(len(FACTORS), (count,), generator=generator)]
    if sample is not None:
        count = max(2, round(SPIKE_SHARE * width))
        spikes = _tail(sample).argsort(descending=True)[:count]
        drawn = torch.tensor(SPIKE_FACTORS)[torch.randint(len(SPIKE_FACTORS), (count,), generator=generator)]
        factors[spikes] = torch.maximum(factors[spikes], drawn)
    return factors


def _tail(sample: Tensor) -> Tensor:
    """Return for each channel its maximum over its 99th percentile, of magnitudes."""
    magnitude = sample.abs()
    high = magnitude.quantile(0.99, dim=0) if len(magnitude) < 50_000 else magnitude[:50_000].quantile(0.99, dim=0)
    return magnitude.amax(0) / high.clamp(min=1e-6)
