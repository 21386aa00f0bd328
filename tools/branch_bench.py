"""``tahf4 bench --branches``: a block on the CPU with branches of low rank beside the same block without."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
import typer
from torch import nn

from ..backends import cpu
from ..errors import OptionError
from ..ops import registry
from ..packed.convert import quantize_
from ..packed.linear import HiF4Linear
from .cpu_bench import Times, facts, interleaved
from .kernels.block import WanBlock, rotary_of
from .staging import write_text

__all__ = ["RANKS", "branched_block", "main", "markdown", "times"]

RANKS = (0, 16, 32)
DIM, FFN, HEADS, TOKENS = 1536, 6144, 12, (512, 1024)


def branched_block(dim: int, ffn: int, heads: int, rank: int, dtype: torch.dtype) -> nn.Module:
    """Return a packed block of Wan; each linear has a branch of a rank, unless that is 0."""
    torch.manual_seed(0)
    block = WanBlock(dim, ffn, heads).cast(dtype).eval().requires_grad_(False)
    quantize_(block)
    for linear in block.modules():
        if isinstance(linear, HiF4Linear) and rank:
            k, n = linear.in_features, linear.out_features
            for name, shape in (("low_rank_a", (k, rank)), ("low_rank_b", (rank, n))):
                factor = (torch.randn(shape) / k**0.5).to(linear.weight_dtype)
                linear.register_parameter(name, nn.Parameter(factor, requires_grad=False))
    return block


@torch.no_grad()
def times(dim: int, ffn: int, heads: int, tokens: int, rounds: int, dtype: torch.dtype) -> Times:
    """Return the processor's time of the compiled block with branches of each of :data:`RANKS`, in turn."""
    x, text = (torch.randn(1, tokens, dim).to(dtype) for _ in range(2))
    given = (x, text, torch.randn(1, 6, dim) * 0.1, rotary_of(tokens, dim // heads, "cpu"))
    blocks = {str(rank): torch.compile(branched_block(dim, ffn, heads, rank, dtype), backend="tahf4") for rank in RANKS}
    functions = {name: lambda block=block: block(*given) for name, block in blocks.items()}
    return interleaved(functions, rounds, clock=time.process_time)  # the machine may be busy with other work


def main(output: Path, rounds: int) -> None:
    """Measure, print, and write ``branches.md`` into a folder.

    Raises:
        OptionError: there are no kernels for the CPU.
    """
    registry.kernels()
    if not cpu.available():
        raise OptionError("there are no C++ kernels here: no compiler was found, or TAHF4_NO_CPP is set")
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        for tokens in TOKENS:
            found[str(dtype)[6:], tokens] = times(DIM, FFN, HEADS, tokens, rounds, dtype)
    text = markdown(facts(), rounds, found)
    typer.echo(text)
    write_text(output / "branches.md", text)


def markdown(about: dict[str, Any], rounds: int, found: dict[tuple[str, int], Times]) -> str:
    """Return the table: milliseconds without branches, and times as long with them; in brackets the fastest turns."""
    known = ", ".join(f"{name} {value}" for name, value in about.items())
    lines = [f"{known}; block of {DIM} / {FFN}, medians (least) of {rounds} of the processor's time.", ""]
    lines.append("| type, rows | no branch, ms | " + " | ".join(f"rank {rank}" for rank in RANKS[1:]) + " | spread |")
    lines.append("|---" * (len(RANKS) + 2) + "|")
    for (dtype, tokens), each in found.items():
        base, least = each["0"]["seconds"], each["0"]["least"]
        cells = [
            f"{each[str(rank)]['seconds'] / base:.2f} ({each[str(rank)]['least'] / least:.2f})" for rank in RANKS[1:]
        ]
        spread = max(t["spread"] for t in each.values())
        cells = [f"{base * 1e3:.1f} ({least * 1e3:.1f})", *cells, f"{spread:.0%}"]
        lines.append(f"| {dtype}, {tokens} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
