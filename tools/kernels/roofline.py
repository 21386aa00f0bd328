"""``tahf4 roofline``: the least time that a step of Wan2.2 can take, from bytes and operations."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from ...backends.triton.quantize import threads_of_rows
from ..staging import write_text
from .chips import CHIPS, Chip
from .wan import A14B, Model, Step, block_steps

__all__ = ["Part", "linears_ratio", "norms", "parts", "roofline", "step_seconds"]

HIF4 = 36 / 64
"""Bytes of a value in HiF4."""

GUIDANCE = 2
"""Calls of a transformer in a step: with and without the prompt."""


RESOLUTIONS = (("480p (832 x 480), 81 frames", 32760), ("720p (1280 x 720), 81 frames", 75600))

QUANTIZE_INSTRUCTIONS = {"norm": 37, "plain": 25}
"""Instructions a value, from the table of ``tahf4 kernels`` (sm_90)."""

BRANCHED_INSTRUCTIONS = {"norm": 61, "plain": 31}
"""The same with branches: those of a warp in the loops of the kernel for three of rank 32, as compiled for sm_90. One
has 59 and 29. Here the pass over a norm's rows counts as often as it runs, 12 instructions a value."""

ROW_INSTRUCTIONS = {"norm": 40, "plain": 26}
"""The same for one level-1 scale a row."""

SCALE_INSTRUCTIONS = 3
"""Instructions for each output and unit on the int8 path: start of the accumulator and two fused multiply-adds. With
one level-1 scale a row for each output: a conversion, a multiplication and a fused multiply-add."""

ATTENTION_INSTRUCTIONS = 30
"""Instructions a score of attention in 8 bits, with heads of 128: those of a warp in the loop over keys, as compiled
for sm_80, sm_90 and sm_120 (942 to 973), for the 32 scores of a thread in it."""

WIDE_INSTRUCTIONS = {8: 16, 9: 12, 10: 11, 12: 16}
"""The same with values in 16 bits, by the first number of the compute capability: 128 keys at a time for 9 and 10, and
64 for the others."""

ROTARY_INSTRUCTIONS = 53
"""Instructions a value of q or k for its norm, rotary embedding, rotation and quantization to 8 bits: those of the
kernel's text, as compiled for sm_90, by the 64 values of a thread."""

EPILOGUE_INSTRUCTIONS = 75
"""Instructions an output of a product whose result is rotated and quantized."""

RANKS = (32, 64)
"""Of branches; a product computes those of up to 64."""


@dataclass(frozen=True)
class Part:
    """One kernel, or what PyTorch runs in its place.

    Attributes:
        name: where it stands.
        seconds: by bound: ``"memory"``, ``"matrix"``, ``"lanes"``; the largest holds.
    """

    name: str
    seconds: dict[str, float]

    @property
    def bound(self) -> str:
        """Which bound holds."""
        return max(self.seconds, key=self.seconds.__getitem__)

    @property
    def least(self) -> float:
        """Least seconds."""
        return max(self.seconds.values())

    @property
    def least_apart(self) -> float:
        """Least seconds where the lanes wait for the matrix units, and these for the lanes."""
        return max(self.seconds["memory"], self.seconds.get("matrix", 0.0) + self.seconds.get("lanes", 0.0))


def _after(step: Step) -> int:
    """Return how many tensors of the output's size a product's epilogue reads."""
    return int("residual" in step.name)


def _quantization(name: str, rows: int, k: int, chip: Chip, kind: str = "plain", row: bool = False) -> Part:
    values = rows * k
    lanes = values * QUANTIZE_INSTRUCTIONS[kind] / chip.lanes
    if row:  # some threads have no unit
        units = k // 64
        threads = threads_of_rows(units)
        lanes = values * ROW_INSTRUCTIONS[kind] * threads / (threads // units * units) / chip.lanes
    return Part(name, {"memory": values * (2 + HIF4) / chip.bandwidth, "lanes": lanes})


def _w4a4(step: Step, chip: Chip, row: bool = False, library: bool = False) -> list[Part]:
    """Return the kernels of a step in W4A4, with a level-1 scale a unit or a row, or a row through the library."""
    m, k, n = step.rows, step.k, step.n
    if n == 0:
        kind = "norm" if "norm" in step.name else "plain"
        return [_quantization(step.name, m, k, chip, kind, row)]
    path = "library" if library else chip.path
    wide = 2 if path == "bf16" else 1 + 4 / 64
    values = (m + n) * k
    expand = Part(f"{step.name}: expand", {"memory": values * (HIF4 + wide) / chip.bandwidth})
    quantizes = "quantize" in step.name
    out = m * n * (HIF4 if quantizes else 2) + _after(step) * m * n * 2
    scaled = 1 if row else k / 64
    read = values * (1 if row and path != "bf16" else wide)
    lanes = m * n * scaled * SCALE_INSTRUCTIONS if path != "bf16" else 0.0
    lanes += m * n * EPILOGUE_INSTRUCTIONS if quantizes else 0.0
    rate = chip.bf16 if path == "bf16" else chip.int8
    if path == "library":
        dots = m * n * 4
        bare = {"memory": (read + dots) / chip.bandwidth, "matrix": 2 * m * n * k / rate}
        after = {"memory": (dots + out) / chip.bandwidth, "lanes": lanes / chip.lanes}
        return [expand, Part(f"{step.name}: dots", bare), Part(step.name, after)]
    product = {
        "memory": (read + out) / chip.bandwidth,
        "matrix": 2 * m * n * k / rate,
        "lanes": lanes / chip.lanes,
    }
    return [expand, Part(step.name, product)]


def _branched(steps: Sequence[Step], chip: Chip, rank: int) -> list[Part]:
    """Return the kernels of a block in W4A4 whose linears have branches ``(x A) B``.

    A quantization computes the ``x A`` of the linears that read it, and their products add ``(x A) B``. A product that
    a GELU follows writes 16 bits, which the next quantization reads. Linears are not merged.
    """
    found: list[Part] = []
    for step, after in zip(steps, [*steps[1:], None]):
        m, k, n = step.rows, step.k, step.n // step.linears
        if after is not None and n == 0:
            found.append(_branched_quantization(step.name, m, k, chip, rank * after.linears))
            continue
        alone = replace(step, n=n, name=step.name.replace("-> quantize", "").strip())
        expand, product = _w4a4(alone, chip)
        up = {"memory": 2 * (m + n) * rank / chip.bandwidth, "matrix": 2 * m * n * rank / chip.bf16}
        with_up = {bound: least + up.get(bound, 0.0) for bound, least in product.seconds.items()}
        found += [expand, Part(alone.name, with_up)] * step.linears
        if after is not None and alone.name != step.name:
            found.append(_branched_quantization(step.name, m, n, chip, rank * after.linears))
    return found


def _branched_quantization(name: str, rows: int, k: int, chip: Chip, ranks: int) -> Part:
    values, kind = rows * k, "norm" if "norm" in name else "plain"
    memory = values * (2 + HIF4) + 2 * (k + rows) * ranks
    lanes = values * BRANCHED_INSTRUCTIONS[kind] / chip.lanes
    return Part(name, {"memory": memory / chip.bandwidth, "matrix": 2 * values * ranks / chip.bf16, "lanes": lanes})


def _bf16(step: Step, chip: Chip) -> list[Part]:
    m, k, n = step.rows, step.k, step.n
    if n == 0:
        if "norm" not in step.name:
            return []  # nothing to do in bfloat16
        return [Part(step.name, {"memory": m * k * 4 / chip.bandwidth})]
    found = [
        Part(step.name, {"memory": 2 * (m * k + n * k + m * n) / chip.bandwidth, "matrix": 2 * m * n * k / chip.bf16})
    ]
    if _after(step) or "GELU" in step.name:
        # cuBLAS, then one pointwise kernel that reads the product (and the residual) and writes the result.
        found.append(Part(f"{step.name}: pointwise", {"memory": m * n * 2 * (2 + _after(step)) / chip.bandwidth}))
    return found


def norms(model: Model, tokens: int, chip: Chip, quantized: bool = False) -> Part:
    """Return the norms and the rotary embedding of q and k, in self- and cross-attention of one block, one call.

    Args:
        model: whose block.
        tokens: of the video.
        chip: where.
        quantized: whether q and k of self-attention are quantized there, and written in 8 bits.
    """
    values, others = 2 * tokens * model.dim, (tokens + model.text) * model.dim
    lanes = {"lanes": values * ROTARY_INSTRUCTIONS / chip.lanes} if quantized else {}
    memory = values * (2 + (1 if quantized else 2)) + others * 4
    return Part("q, k norms and rotary embedding", {"memory": memory / chip.bandwidth, **lanes})


def _rest(model: Model, tokens: int, chip: Chip) -> list[Part]:
    """Return what is the same in both: norms of q and k, rotary embedding, attention cores."""
    d = model.dim
    return [
        norms(model, tokens, chip),
        attention(model, tokens, chip)[0],
        Part(
            "cross-attention core",
            {"memory": 8 * tokens * d / chip.bandwidth, "matrix": 4 * tokens * model.text * d / chip.bf16},
        ),
    ]


def attention(model: Model, tokens: int, chip: Chip, quantized: bool = False) -> tuple[Part, Part, Part]:
    """Return the self-attention core of one block, one call: in bfloat16, in 8 bits, and with values in 16 bits.

    The last two have the quantization of v in them; q and k come quantized, see :func:`norms`. If ``quantized``, they
    have that of the result, too, with a level-1 scale for each unit.
    """
    d, scores = model.dim, tokens**2 * model.heads
    matrix = 4 * tokens**2 * d
    before = tokens * d * (2 + 1)  # v is read in 16 bits, and written in 8
    written = tokens * d * (HIF4 if quantized else 2)
    after = tokens * d * EPILOGUE_INSTRUCTIONS if quantized else 0
    eight = {
        "memory": (before + tokens * d * 3 + written) / chip.bandwidth,
        "matrix": matrix / chip.int8,
        "lanes": (scores * ATTENTION_INSTRUCTIONS + after) / chip.lanes,
    }
    wide = {
        "memory": (tokens * d * (2 + 2) + written) / chip.bandwidth,
        "matrix": matrix / 2 / chip.int8 + matrix / 2 / chip.bf16,
        "lanes": (scores * WIDE_INSTRUCTIONS[chip.capability[0]] + after) / chip.lanes,
    }
    core = {"memory": 8 * tokens * d / chip.bandwidth, "matrix": matrix / chip.bf16}
    name = "self-attention core"
    return Part(name, core), Part(f"{name} in 8 bits", eight), Part(f"{name} in 8 bits, values in 16", wide)


def parts(model: Model, tokens: int, chip: Chip, precision: str, rank: int = 0, row: bool = False) -> list[Part]:
    """Return the kernels of one block, one call.

    Args:
        model: whose block.
        tokens: of the video.
        chip: where.
        precision: ``"bf16"`` or ``"w4a4"``.
        rank: of a branch of each linear in W4A4, 0 for none.
        row: whether operands have one level-1 scale a row, in W4A4 without branches.
    """
    steps, rest = block_steps(model, tokens, span=0 if row else 1), _rest(model, tokens, chip)
    if rank and precision == "w4a4":
        return _branched(steps, chip, rank) + rest
    one = functools.partial(_w4a4, row=row) if precision == "w4a4" else _bf16
    return [part for step in steps for part in one(step, chip)] + rest


def step_seconds(model: Model, found: Sequence[Part], calls: int = GUIDANCE) -> float:
    """Return the least seconds of a denoising step: all blocks, all calls (two with guidance)."""
    return calls * model.layers * sum(part.least for part in found)


def linears_ratio(model: Model, chip: Chip, tokens: int = RESOLUTIONS[0][1]) -> float:
    """Return how many times faster than bfloat16 a block without its self-attention core can be at most."""
    both = [parts(model, tokens, chip, precision) for precision in ("bf16", "w4a4")]
    plain, packed = (sum(p.least for p in found if p.name != "self-attention core") for found in both)
    return plain / packed


def _branches(model: Model, tokens: int) -> list[str]:
    """Return the lines of a table: seconds of a step in W4A4, and times as long with branches."""
    columns = " | ".join(f"rank {rank}" for rank in RANKS)
    lines = [
        f"| chip | W4A4 s/step | {columns} | without self-attention: W4A4 | {columns} |",
        "|---" * (3 + 2 * len(RANKS)) + "|",
    ]
    for chip in CHIPS:
        all_parts = [parts(model, tokens, chip, "w4a4", rank) for rank in (0, *RANKS)]
        cells = []
        for left_out in ("", "self-attention core"):
            first, *more = (step_seconds(model, [p for p in found if p.name != left_out]) for found in all_parts)
            cells += [f"{first:.2f}", *(f"{seconds / first:.2f}" for seconds in more)]
        lines.append(f"| {chip.name} | {' | '.join(cells)} |")
    return lines


def _rows(model: Model) -> list[str]:
    """Return the lines of a table: seconds of a step in W4A4 with a level-1 scale a unit, and a row."""
    columns = "W4A4 | span row | ratio"
    lines = [
        f"| chip | {columns} | without self-attention: {columns} | one after the other: {columns} |",
        "|---" * 10 + "|",
    ]
    for chip in CHIPS:
        both = [parts(model, RESOLUTIONS[0][1], chip, "w4a4", row=row) for row in (False, True)]
        less = [[part for part in found if part.name != "self-attention core"] for found in both]
        cells = [[step_seconds(model, found) for found in pair] for pair in (both, less)]
        cells.append([GUIDANCE * model.layers * sum(part.least_apart for part in found) for found in less])
        texts = [f"{unit:.2f} | {row:.2f} | {unit / row:.2f}" for unit, row in cells]
        lines.append(f"| {chip.name} | {' | '.join(texts)} |")
    return lines


def _attentions(model: Model) -> list[str]:
    """Return the lines of two tables: seconds of self-attention in a step, and how many times as fast the step is.

    The last column says what is saved because the result is neither written nor read in 16 bits.
    """
    lines = ["| chip | bf16 | 8 bits | bound | ratio | values in 16 bits | bound | ratio |", "|---" * 8 + "|"]
    steps = [
        "",
        "The whole step, in W4A4 with one level-1 scale a row: how many times as fast as in bfloat16. Where attention",
        "is in 8 bits one kernel has the norms, the rotary embedding and the quantization of q and k. The last column",
        "says what is saved, with a scale for each unit, because the kernel of attention quantizes its result.",
        "",
        "| chip | attention in bf16 | 8 bits | values in 16 bits | quantized result |",
        "|---" * 5 + "|",
    ]
    tokens, name = RESOLUTIONS[0][1], "attn1 output -> quantize"
    for chip in CHIPS:
        core, *others = attention(model, tokens, chip)
        whole, row = parts(model, tokens, chip, "bf16"), parts(model, tokens, chip, "w4a4", row=True)
        before = [norms(model, tokens, chip, quantized) for quantized in (False, True, True)]
        rest = [part for part in row if part.name not in (core.name, before[0].name)]
        ratios = (f"{step_seconds(model, [x]):.2f} | {x.bound} | {core.least / x.least:.2f}" for x in others)
        lines.append(f"| {chip.name} | {step_seconds(model, [core]):.2f} | {' | '.join(ratios)} |")
        seconds = [step_seconds(model, [*rest, *two]) for two in zip(before, (core, *others))]
        cells = [f"{step_seconds(model, whole) / each:.2f}" for each in seconds]
        unit = [part for part in parts(model, tokens, chip, "w4a4") if part.name not in (core.name, before[0].name)]
        apart = min(step_seconds(model, [*unit, before[1], part]) for part in others)
        unit = [part for part in unit if part.name != name]
        joint = [*unit, before[1]]
        least = min(step_seconds(model, [*joint, x]) for x in attention(model, tokens, chip, quantized=True)[1:])
        cells.append(f"{100 * (1 - least / apart):.1f} %")
        steps.append(f"| {chip.name} | {' | '.join(cells)} |")
    return lines + steps


def _by_library(model: Model) -> list[str]:
    """Return the lines of a table: seconds of a step's products with one level-1 scale a row, by who multiplies."""
    lines = ["| chip | generated kernel, in | generated | library | ratio |", "|---" * 5 + "|"]
    for chip in CHIPS:
        steps = [step for step in block_steps(model, RESOLUTIONS[0][1], span=0) if step.n]
        both = [[part for step in steps for part in _w4a4(step, chip, True, library)] for library in (False, True)]
        own, other = (step_seconds(model, [p for p in found if ": expand" not in p.name]) for found in both)
        lines.append(f"| {chip.name} | {chip.path} | {own:.2f} | {other:.2f} | {own / other:.2f} |")
    return lines


def page(model: Model) -> str:
    """Return the whole page."""
    lines = [
        f"# Roofline of {model.name}",
        "",
        "Made by `tahf4 roofline`. **Computed, not measured**: for each kernel the largest of bytes over bandwidth,",
        "operations over the rate of the matrix units, and instructions over the rate of the lanes; no launch, no",
        "waiting, no cache miss. It says what is worth mending, not what a chip does.",
        "",
        f"A step is {GUIDANCE} calls (guidance) of {model.layers} blocks; embedding and output layers are left out.",
        "Attention cores run in bfloat16 in both. Products: both sides are expanded, then multiplied: to int8 with a",
        "float32 scale a unit, or to bfloat16 on B200, where Triton has no int8 product.",
        "",
        "Rates are dense, with sums in float32 or int32. Lanes are half of the float32 operations. That a chip reaches",
        "them is an assumption, and the same for all.",
        "",
        "| chip | capability | memory | GB/s | bf16, TFLOP/s | int8, TOP/s | products in | source |",
        "|---|---|---|---|---|---|---|---|",
        *(
            f"| {c.name} | {c.capability[0]}.{c.capability[1]} | {c.memory:g} GB | {c.bandwidth / 1e9:,.0f} | "
            f"{c.bf16 / 1e12:g} | {c.int8 / 1e12:g} | {c.path} | {c.source} |"
            for c in CHIPS
        ),
        "",
        "| chip | video | bf16 s/step | W4A4 s/step | ratio | without self-attention: bf16 | W4A4 | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for chip in CHIPS:
        for name, tokens in RESOLUTIONS:
            both = [parts(model, tokens, chip, precision) for precision in ("bf16", "w4a4")]
            whole = [step_seconds(model, found) for found in both]
            less = [step_seconds(model, [p for p in found if p.name != "self-attention core"]) for found in both]
            lines.append(
                f"| {chip.name} | {name} | {whole[0]:.2f} | {whole[1]:.2f} | {whole[0] / whole[1]:.2f} | "
                f"{less[0]:.2f} | {less[1]:.2f} | {less[0] / less[1]:.2f} |"
            )
    lines += [
        "",
        f"## Self-attention in 8 bits, {RESOLUTIONS[0][0]}: a step, seconds",
        "",
        *_attentions(model),
        "",
        f"## Branches of low rank at each linear, {RESOLUTIONS[0][0]}: times as long",
        "",
        *_branches(model, RESOLUTIONS[0][1]),
        "",
        f"## One level-1 scale a row, {RESOLUTIONS[0][0]}: a step, seconds",
        "",
        "In the last columns lanes and matrix units wait for each other; elsewhere the longer of the two counts.",
        "",
        *_rows(model),
        "",
        f"## One level-1 scale a row, products through the library, {RESOLUTIONS[0][0]}: a step, seconds",
        "",
        "Products alone, of sides that are expanded. The library writes the dots of rows in int32, and a kernel reads",
        "them for what follows.",
        "",
        *_by_library(model),
    ]
    for chip in CHIPS:
        name, tokens = RESOLUTIONS[0]
        lines += [
            "",
            f"## {chip.name}, {name}: one block, milliseconds",
            "",
            "| kernel | bf16 | bound | W4A4 | bound | span row | bound |",
            "|---|---|---|---|---|---|---|",
        ]
        columns = [parts(model, tokens, chip, precision) for precision in ("bf16", "w4a4")]
        columns.append(parts(model, tokens, chip, "w4a4", row=True))
        tables = [{p.name: p for p in found} for found in columns]
        for part in dict.fromkeys([*tables[1], *tables[2], *tables[0]]):
            cells = [f"{t[part].least * 1e3:.3f} | {t[part].bound}" if part in t else " | " for t in tables]
            lines.append(f"| {part} | {' | '.join(cells)} |")
    bytes_bf16 = sum(2 * s.k * s.n for s in block_steps(model, 64)) * model.layers
    lines += [
        "",
        f"Weights of the linears in blocks: {bytes_bf16 / 1e9:.1f} GB in bfloat16, "
        f"{bytes_bf16 * HIF4 / 2 / 1e9:.1f} GB in HiF4 ({2 / HIF4:.2f}x smaller), for each expert.",
        "",
        "What it says: GeForce cards multiply int8 at four times the rate of bfloat16 with float32 sums, so there",
        "linears gain most. On A100, H100 and H200 the scales of the units cost the lanes more than the int8 product",
        "costs the matrix units. On B200 the product runs at the rate of bfloat16, and W4A4 saves memory, not time.",
        "Quantization with a rotation and a norm is bound by instructions.",
    ]
    return "\n".join(lines) + "\n"


def roofline(
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Markdown file to write.")] = None,
) -> None:
    """Compute the least time of a step of Wan2.2-A14B in bfloat16 and W4A4, for eight cards."""
    text = page(A14B)
    typer.echo(text)
    if output is not None:
        write_text(output, text)
        typer.echo(f"wrote {output}")
