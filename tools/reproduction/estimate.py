"""What a reproduction takes, computed from shapes before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

from ...packed.plan import plan_modules
from ..evaluation.report import markdown_table
from ..kernels.roofline import CHIPS, parts, step_seconds
from ..kernels.wan import Model
from .model import Structure
from .protocol import Protocol

__all__ = ["estimate"]

ROWS = 64
"""Sample rows that a calibration keeps for each activation, step group and branch."""

MOMENTS = 1024
"""Channels whose second moments a calibration keeps together."""

GB = 1e9


def estimate(protocol: Protocol, found: Structure, settings: int) -> str:
    """Return disk, memory and hours as Markdown.

    Args:
        protocol: what is generated.
        found: by which pipeline.
        settings: in 4 bits, beside the original.
    """
    size = getattr(torch, protocol.dtype).itemsize
    with torch.device("meta"):
        models = {name: diffusers.WanTransformer3DModel.from_config(found.components[name]) for name in found.experts}
        vae = diffusers.AutoencoderKLWan.from_config(found.components["vae"])
        text = transformers.UMT5EncoderModel(transformers.UMT5Config(**found.components["text_encoder"]))
    dtype = getattr(torch, protocol.dtype)
    plans = {name: plan_modules(nn.Module.to(model, dtype)) for name, model in models.items()}
    experts = sum(_values(model) for model in models.values()) * size
    packed = sum(d.bytes_after for plan in plans.values() for d in plan if d.decision == "hif4")
    saved = sum(d.bytes_before for plan in plans.values() for d in plan if d.decision == "hif4") - packed
    others = _values(text) * size + _values(vae) * 4
    statistics = sum(_statistics(found.components[name], protocol, size) for name in found.experts)
    generate, clips = protocol.generate, len(protocol.clips())
    frames = generate["num_frames"] * generate["height"] * generate["width"] * 3
    counts = [(len(plan), sum(d.decision == "hif4" for d in plan)) for plan in plans.values()]
    lines = [
        "# Before anything is loaded",
        "",
        f"**Computed, not measured**: {found.pipeline}, {len(found.experts)} transformer(s), protocol {protocol.name}: "
        f"{clips} clips of {generate['num_frames']} frames of {generate['height']} x {generate['width']} in "
        f"{protocol.steps} steps ({found.tokens(protocol):,} tokens, {protocol.calls} call(s) a step), the original "
        f"and {settings} settings in 4 bits. {sum(q for _, q in counts)} of {sum(n for n, _ in counts)} linears are in "
        f"4 bits, {sum(n - q for n, q in counts)} stay.",
        "",
        markdown_table(["disk", "GB"], [
            ["the model itself is not counted", ""],
            [f"{clips * (settings + 1)} clips, at most (their frames before compression)",
             _gb(clips * (settings + 1) * frames)],
            ["statistics of the calibration, at most", _gb(statistics)],
            ["recipes: the packed weights that reconstruction makes", _gb(packed)],
        ]),
        markdown_table(["memory, beside activations and what a kernel needs", "GB"], [
            [f"GPU: the original in {protocol.dtype}, text encoder and autoencoder", _gb(experts + others)],
            ["GPU: the same while it is calibrated, at most", _gb(experts + others + statistics)],
            ["GPU: in 4 bits", _gb(experts - saved + others)],
            ["GPU: with --offload, the largest component (the original)",
             _gb(max(_values(text), *map(_values, models.values())) * size)],
            ["host: the original while it is packed", _gb(experts + packed + others)],
        ]),
        _hours(protocol, found, settings, clips),
    ]  # fmt: skip
    return "\n".join(lines)


def _hours(protocol: Protocol, found: Structure, settings: int, clips: int) -> str:
    config = found.components["transformer"]
    model = Model(
        found.pipeline,
        config["num_attention_heads"] * config["attention_head_dim"],
        config["ffn_dim"],
        config["num_attention_heads"],
        config["num_layers"],
        protocol.generate.get("max_sequence_length", 512),
        bool(found.index.get("expand_timesteps")),
    )
    head = ["least hours", "s a step, original", "s a step, W4A4", "calibration", "original", "4 bits", "in all"]
    lines: list[Sequence[str]] = []
    for chip in CHIPS:
        before, after = (
            step_seconds(model, parts(model, found.tokens(protocol), chip, precision), protocol.calls)
            for precision in ("bf16", "w4a4")
        )
        steps = protocol.steps / 3600
        hours = (
            len(protocol.calibration_prompts) * steps * before,
            clips * steps * before,
            clips * settings * steps * after,
        )
        lines.append([chip.name, *(f"{s:.3g}" for s in (before, after)), *(f"{h:.2g}" for h in (*hours, sum(hours)))])
    return markdown_table(head, lines) + (
        "\nThe hours are those of the roofline (`tahf4 roofline`): the denoising steps alone, at the peak rates of "
        "data sheets, with an original in bfloat16. Loading, the text encoder, the autoencoder, compilation, the "
        "searches and the reconstruction of the recipe, and the scorers come on top.\n"
    )


def _values(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _statistics(config: dict[str, Any], protocol: Protocol, size: int) -> int:
    """Return the most bytes that a calibration keeps of a transformer: see :func:`tahf4_compiler.calibrate`."""
    width = config["num_attention_heads"] * config["attention_head_dim"]
    inputs = [*[width] * 6, config["ffn_dim"]]  # of a block: attn1 in and out, attn2 q, k and v, out, ffn in, middle
    cells = protocol.step_groups * protocol.calls
    each = sum(k * (404 + ROWS * size) * cells + 4 * k * min(k, MOMENTS) for k in inputs)
    return int(config["num_layers"] * each)


def _gb(count: float) -> str:
    return f"{count / GB:.3g}"
