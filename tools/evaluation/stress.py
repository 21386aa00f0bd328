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
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from torch import Tensor, nn

from ...model.components import WAN_EXPERTS
from ..tiny_wan import data, settings
from .sampling import channel_ratios, largest_of, maximum_and_percentile, sampled_inputs
from .stress_report import SiteReport, StressReport
from .stress_sites import sites, widen

__all__ = ["stress_", "stress_pipeline_"]


def stress_(
    transformer: WanTransformer3DModel,
    seed: int,
    *,
    samples: Mapping[str, Tensor] | None = None,
    outlier_share: float = 0.01,
    spike_share: float = 0.005,
    factors: Sequence[int] = (16, 32, 64, 128),
    hidden_units: int = 64,
    undone_by_masks: bool = True,
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
        undone_by_masks: whether weights are small where an activation is large, so that a channel mask undoes it
            all. False: only the feed-forward is stressed, and the weights that read its large units are as large as the
            others; no channel is multiplied.

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
            reports.append(
                widen(transformer, index, rng, samples, outlier_share, factors, hidden_units, undone_by_masks)
            )
        for site in sites(transformer) if undone_by_masks else ():
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
                before = largest_of([channel_ratios(r) for r in rows])
                after = largest_of([channel_ratios(r * multiplier.to(r)) for r in rows])
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
    models = {name: model for name in WAN_EXPERTS if (model := getattr(pipe, name, None)) is not None}
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
        statistics = [maximum_and_percentile(r) for r in rows]
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
