"""``tahf4 parallel``: how Wan2.2 divides among GPUs, with the memory and communication of each way, computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ..distributed.sizes import column_degrees, row_degrees
from .kernels.wan import A14B, TI2V_5B, Model
from .staging import write_text

__all__ = ["GPUS", "VIDEOS", "Video", "Way", "block_values", "other_values", "page", "parallel", "ways"]

GPUS = (1, 2, 4, 8, 16, 32, 64)
BF16, FLOAT32, HIF4 = 2, 4, 36 / 64
"""Bytes of a value."""

CHANNELS = {A14B.name: 16, TI2V_5B.name: 48}
"""Latent channels that a transformer reads and writes, of the text-to-video checkpoints."""

EXPERTS = {A14B.name: 2, TI2V_5B.name: 1}
TEXT_WIDTH, FREQUENCIES = 4096, 256


@dataclass(frozen=True)
class Video:
    """A clip.

    Attributes:
        name: size and frames.
        tokens: that the transformer reads of it.
    """

    name: str
    tokens: int


VIDEOS = {
    A14B.name: (Video("832 x 480, 81 frames", 32760), Video("1280 x 720, 81 frames", 75600)),
    TI2V_5B.name: (Video("1280 x 704, 121 frames", 27280),),
}


def block_values(model: Model) -> int:
    """Return the weights of the ten linears of a block: two attentions of four, the feed-forward of two."""
    return 8 * model.dim**2 + 2 * model.dim * model.ffn


def other_values(model: Model) -> int:
    """Return all other parameters of a transformer: biases, norms, modulation, embedders, output."""
    d, c = model.dim, CHANNELS[model.name]
    block = (9 * d + model.ffn) + 4 * d + 2 * d + 6 * d  # biases; q and k norms; norm2; modulation
    patches = 4 * c * d + d
    text = TEXT_WIDTH * d + d + d * d + d
    time = FREQUENCIES * d + d + d * d + d + 6 * d * d + 6 * d
    out = 4 * c * d + 4 * c + 2 * d
    return model.layers * block + patches + text + time + out


@dataclass(frozen=True)
class Way:
    """One way to divide a model among n GPUs.

    Attributes:
        name: of the column.
        misfit: model, tokens, n -> why it cannot, or "".
        weights: model, n -> bytes of one expert on a GPU.
        sent: model, tokens, n -> bytes that a GPU sends in one call of the transformer.
    """

    name: str
    misfit: Callable[[Model, int, int], str]
    weights: Callable[[Model, int], float]
    sent: Callable[[Model, int, int], float]


def _packed(model: Model) -> float:
    return model.layers * block_values(model) * HIF4


def _rest(model: Model) -> float:
    return float(other_values(model) * BF16)


def tensor_misfit(model: Model, n: int, block: int = 64) -> str:
    """Return why a model cannot be divided by tensor parallelism, or ""."""
    if model.heads % n:
        return f"{model.heads} heads"
    wrong = [k for k in (model.dim, model.ffn) if n not in row_degrees(k, block)]
    return f"{wrong[0]} = {wrong[0] // block} x {block}" if wrong else ""


def _tensor_sent(model: Model, tokens: int, n: int) -> float:
    # Three sums of the residual's size, and the mean square of q (twice), k and the text's k.
    sums = 3 * tokens * model.dim + 3 * tokens + model.text
    return model.layers * 2 * (n - 1) / n * sums * FLOAT32


def _output(model: Model, tokens: int, n: int) -> float:
    return (n - 1) / n * tokens * 4 * CHANNELS[model.name] * BF16


def _ulysses_sent(model: Model, tokens: int, n: int) -> float:
    return model.layers * 4 * (n - 1) / n * (tokens / n) * model.dim * BF16 + _output(model, tokens, n)


def _ring_sent(model: Model, tokens: int, n: int) -> float:
    return model.layers * 2 * (n - 1) / n * tokens * model.dim * BF16 + _output(model, tokens, n)


def ways() -> tuple[Way, ...]:
    """Return the ways that the table has."""
    return (
        Way(
            "tensor",
            lambda model, tokens, n: tensor_misfit(model, n),
            lambda model, n: _packed(model) / n + _rest(model),
            _tensor_sent,
        ),
        Way(
            "Ulysses",
            lambda model, tokens, n: f"{model.heads} heads" if model.heads % n else "tokens" if tokens % n else "",
            lambda model, n: _packed(model) + _rest(model),
            _ulysses_sent,
        ),
        Way(
            "ring",
            lambda model, tokens, n: "tokens" if tokens % n else "",
            lambda model, n: _packed(model) + _rest(model),
            _ring_sent,
        ),
        Way(
            "FSDP2",
            lambda model, tokens, n: "",
            # Its part of all, and two whole blocks: one that runs, one that is fetched.
            lambda model, n: (_packed(model) + _rest(model)) / n + (2 * block_values(model) * HIF4 if n > 1 else 0),
            lambda model, tokens, n: (n - 1) / n * (_packed(model) + _rest(model)),
        ),
    )


def activations(model: Model, tokens: int, n: int, way: str) -> float:
    """Return bytes of the largest tensors that live at once in a block: residual, q, k, v and attention's result."""
    whole = tokens * model.dim * BF16
    if way == "FSDP2":
        return 5 * whole  # each GPU has a clip of its own
    return whole + 4 * whole / n if way == "tensor" else 5 * whole / n


def _table(model: Model, video: Video) -> list[str]:
    lines = [
        f"### {model.name}, {video.name}: {video.tokens:,} tokens",
        "",
        "GB on a GPU: weights of one expert + activations; GB that a GPU sends in one call.",
        "",
        "| GPUs | " + " | ".join(f"{way.name}: memory | sent" for way in ways()) + " |",
        "|---|" + "---|---|" * len(ways()),
    ]
    for n in GPUS:
        cells = []
        for way in ways():
            if n > 1 and (why := way.misfit(model, video.tokens, n)):
                cells.append(f"no: {why} | ")
                continue
            memory = way.weights(model, n), activations(model, video.tokens, n, way.name)
            sent = way.sent(model, video.tokens, n) if n > 1 else 0.0
            cells.append(f"{memory[0] / 1e9:.2f} + {memory[1] / 1e9:.2f} | {sent / 1e9:.2f}")
        lines.append(f"| {n} | {' | '.join(cells)} |")
    return [*lines, ""]


def _degrees(model: Model, block: int) -> str:
    return ", ".join(str(n) for n in range(1, 129) if not tensor_misfit(model, n, block))


def page(models: Sequence[Model] = (A14B, TI2V_5B)) -> str:
    """Return the tables, with their formulas."""
    lines = [_HEAD]
    lines += [
        "| model | heads | dim | ffn | tensor: rotation 64 (default) | 128 | 256 | Ulysses: divisors of the heads |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for model in models:
        cells = " | ".join(_degrees(model, block) for block in (64, 128, 256))
        heads = ", ".join(map(str, column_degrees(model.heads)))
        lines.append(f"| {model.name} | {model.heads} | {model.dim} | {model.ffn} | {cells} | {heads} |")
    lines.append("")
    for model in models:
        high = model.layers * block_values(model) * BF16 + _rest(model)
        lines += [
            f"{model.name}: {model.layers * block_values(model):,} weights of linears in blocks and "
            f"{other_values(model):,} other parameters in each of {EXPERTS[model.name]} "
            f"expert{'s' if EXPERTS[model.name] > 1 else ''}: {high / 1e9:.2f} GB in bfloat16, "
            f"{(_packed(model) + _rest(model)) / 1e9:.2f} GB packed.",
            "",
        ]
    for model in models:
        for video in VIDEOS[model.name]:
            lines += _table(model, video)
    return "\n".join(lines)


def parallel(
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Markdown file to write.")] = None,
) -> None:
    """Compute which degrees of parallelism fit Wan2.2, and memory and communication for 1 to 64 GPUs."""
    text = page()
    typer.echo(text)
    if output is not None:
        write_text(output, text)
        typer.echo(f"wrote {output}")


_HEAD = """## Computed tables

Made by `tahf4 parallel`. **Computed, not measured**: sizes of tensors, nothing else. No allocator, no workspace, no
time; whether communication hides behind products is another matter.

With d = dim, f = ffn, L = blocks, T = tokens of the clip, t = 512 tokens of the text, n = GPUs; a value takes 2 bytes
in bfloat16, 4 in float32, 36/64 in HiF4:

* weights: L (8 d^2 + 2 d f) values in HiF4, all other parameters in bfloat16. Tensor parallelism divides the former by
  n; FSDP2 divides everything, and holds two whole blocks besides; Ulysses and ring divide none.
* activations: the residual, q, k, v and the result of attention, 2 T d bytes each. Ulysses and ring divide all by n,
  tensor parallelism all but the residual; with FSDP2 alone each GPU has a clip of its own.
* sent, tensor: L * 2 (n-1)/n * (3 T d + 3 T + t) * 4 bytes: a ring all-reduce in float32 of three row-parallel products
  and of the mean squares of q and k.
* sent, Ulysses: L * 4 (n-1)/n * (T/n) d * 2 bytes (all-to-all of q, k, v and the result), and the output once.
* sent, ring: L * 2 (n-1)/n * T d * 2 bytes (k and v of every other rank), and the output once.
* sent, FSDP2: (n-1)/n of all weights.

A step of guidance is two calls. Ulysses and ring need T divisible by n, Ulysses the heads as well (diffusers'
`ulysses_anything` and `ring_anything` lift that, at one degree alone).

Degrees of tensor parallelism (up to 128) that divide heads, dim and ffn into whole units of 64 and rotation blocks:
"""
