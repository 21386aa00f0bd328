"""``tahf4 memory``: what Wan2.2 A14B needs on a card, from the shapes of its tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ...packed.convert import quantize_
from ..staging import write_text
from .wan import A14B, Model

__all__ = ["CARDS", "Parts", "activations", "memory", "parts", "peaks"]

CARDS = (16, 24, 32)
"""GB of cards; one that is sold as 24 GB has 24 * 2**30 bytes."""

VIDEOS = (("480p", 832, 480), ("720p", 1280, 720))
FRAMES, LATENT_FRAMES = 81, 21

OVERHEAD = 1e9
"""Bytes of the CUDA context, workspaces of libraries and gaps between allocations: an assumption, not measured."""


class PeakBytes(TorchDispatchMode):
    """Finds how many bytes live at once of what operators make; on the meta device these are shapes alone."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._live = {key: found for key, found in self._live.items() if not found[0].expired()}
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                reference = StorageWeakRef(storage)
                self._live[reference.cdata] = reference, storage.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return result


@dataclass(frozen=True)
class Parts:
    """Bytes of the parameters and buffers of a pipeline's models.

    Attributes:
        expert: one of the two transformers.
        text: the text encoder.
        vae: the VAE.
    """

    expert: int
    text: int
    vae: int


def _on_meta(kind: str) -> nn.Module:
    with torch.device("meta"):
        if kind == "expert":
            from diffusers import WanTransformer3DModel

            found = WanTransformer3DModel(
                num_attention_heads=A14B.heads, attention_head_dim=A14B.dim // A14B.heads, ffn_dim=A14B.ffn,
                num_layers=A14B.layers, text_dim=4096, freq_dim=256,
            )  # fmt: skip
        elif kind == "text":
            from transformers import UMT5Config, UMT5EncoderModel

            # google/umt5-xxl
            found = UMT5EncoderModel(
                UMT5Config(
                    vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
                    feed_forward_proj="gated-gelu",
                )
            )  # fmt: skip
        else:
            from diffusers import AutoencoderKLWan

            found = AutoencoderKLWan()
    high = getattr(found, "_keep_in_fp32_modules", None) or []
    high = [] if kind == "text" else high  # transformers keeps its for float16 alone
    for name, parameter in found.named_parameters():
        if not any(part in name for part in high):
            parameter.data = parameter.data.to(torch.bfloat16)
    return found.eval().requires_grad_(False)


def _bytes(model: nn.Module) -> int:
    return sum(value.nbytes for value in (*model.parameters(), *model.buffers()))


def parts(packed: bool) -> Parts:
    """Return the sizes of the models in bfloat16, or with expert and text encoder packed."""
    found = {}
    for kind in ("expert", "text", "vae"):
        model = _on_meta(kind)
        if packed and kind != "vae":
            quantize_(model)
        found[kind] = _bytes(model)
    return Parts(**found)


def activations(model: Model, tokens: int) -> Iterator[tuple[str, int]]:
    """Yield where in a block of a compiled model many bytes live at once, and how many.

    A compiled block holds the hidden states and what stands between two fused operators; products of many rows expand
    both of their sides to int8 and a float32 scale a unit first.
    """
    hidden, codes, expanded = 2 * tokens * model.dim, 36 / 64, 1 + 4 / 64
    yield "attention: hidden states, q, k, v, rotated q and k, output", 7 * hidden
    columns, rows = 3 * model.dim, tokens
    sides = (rows + columns) * model.dim * expanded
    yield "q, k, v: hidden states, codes, expanded sides, outputs", int(4 * hidden + rows * model.dim * codes + sides)
    sides = (rows + model.dim) * model.ffn * expanded
    yield "second linear of the feed-forward", int(2 * hidden + rows * model.ffn * codes + sides)


def peaks() -> dict[tuple[str, bool], int]:
    """Return the most bytes of activations while a video is decoded, by video and by whether the VAE tiles it.

    Three of the latent's frames are run; the others add to the video that is kept.
    """
    found = {}
    vae: Any = _on_meta("vae")
    for name, width, height in VIDEOS:
        video = 2 * 3 * FRAMES * width * height
        for tiled in (False, True):
            sizes = (256, 256) if tiled else (height, width)  # AutoencoderKLWan's tiles
            latent = torch.empty(1, 16, 3, *(size // 8 for size in sizes), dtype=torch.bfloat16, device="meta")
            with torch.no_grad(), PeakBytes() as mode:
                vae.decode(latent)
            found[name, tiled] = mode.peak + (2 * video if tiled else video)
    return found


def page() -> str:
    """Return the whole page."""
    plain, packed = parts(False), parts(True)
    decoding = peaks()
    tokens = {name: LATENT_FRAMES * (height // 16) * (width // 16) for name, width, height in VIDEOS}
    running = {name: max(size for _, size in activations(A14B, count)) for name, count in tokens.items()}
    lines = [
        f"# Memory of {A14B.name}",
        "",
        "Made by `tahf4 memory`. **Computed from shapes, not measured.** GB are 10^9 bytes.",
        "",
        "| | bfloat16 | packed |",
        "|---|---|---|",
        f"| one expert, of two | {plain.expert / 1e9:.1f} | {packed.expert / 1e9:.1f} |",
        f"| text encoder (UMT5-XXL) | {plain.text / 1e9:.1f} | {packed.text / 1e9:.1f} |",
        f"| VAE | {plain.vae / 1e9:.1f} | {packed.vae / 1e9:.1f} |",
        *(f"| activations of an expert, {name}, {FRAMES} frames | | {running[name] / 1e9:.1f} |" for name in running),
        *(
            f"| decoding, {name}{', tiled' if tiled else ''} | {size / 1e9:.1f} | {size / 1e9:.1f} |"
            for (name, tiled), size in decoding.items()
        ),
        "",
        f"Added to each sum: {OVERHEAD / 1e9:g} GB for the CUDA context, workspaces and gaps, an assumption. The VAE",
        "tiles. Both calls of guidance run one after the other. bfloat16 is counted with the same activations. A sum",
        "that fits by less than 1 GB is no promise. A card of 24 GB has 24 x 2^30 bytes.",
        "",
        "| on the card at once | video | bfloat16, GB | smallest card | packed, GB | smallest card |",
        "|---|---|---|---|---|---|",
    ]
    for what, held in _SCENARIOS.items():
        for name in running:
            cells = []
            for sizes in (plain, packed):
                total = held(sizes, running[name], decoding[name, True]) + OVERHEAD
                fits = next((f"{card} GB" for card in CARDS if total <= card * 2**30), "none of them")
                close = any(0 <= card * 2**30 - total < OVERHEAD for card in CARDS)
                fits += ", by less than 1 GB" if close else ""
                cells += [f"{total / 1e9:.1f}", fits]
            lines.append(f"| {what} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


_SCENARIOS = {
    "everything": lambda s, run, decode: 2 * s.expert + s.text + s.vae + max(run, decode),
    "both experts and the VAE; the text encoder before them": lambda s, run, decode: max(
        s.text, 2 * s.expert + s.vae + max(run, decode)
    ),
    "one model at a time (`enable_model_cpu_offload`)": lambda s, run, decode: max(
        s.text, s.expert + run, s.vae + decode
    ),
}


def memory(
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Markdown file to write.")] = None,
) -> None:
    """Compute what Wan2.2-A14B needs on cards of 16, 24 and 32 GB, in bfloat16 and packed."""
    text = page()
    typer.echo(text)
    if output is not None:
        write_text(output, text)
        typer.echo(f"wrote {output}")
