"""``tahf4 bench --attention``: a block of Wan2.2-TI2V-5B on the CPU, with attention in float32 and in 8 bits."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import typer
from tqdm.auto import tqdm

from .cpu_bench import facts
from .kernels.block import WanBlock, rotary_of
from .staging import write_text

__all__ = ["block", "main", "markdown"]

TEXT = 512
"""Tokens of a prompt, which cross-attention reads."""
BASE = "torch.compile, float32"


@torch.no_grad()
def block(dim: int, ffn: int, heads: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Time a block of Wan that Inductor compiles, in W4A4, and in W4A4 with attention in 8 bits.

    Each is called once to compile, and then ``rounds`` times, in turn. A call of many tokens takes minutes, so nothing
    is called more often.
    """
    torch.manual_seed(0)
    model = WanBlock(dim, ffn, heads).eval()
    inputs = torch.randn(1, tokens, dim), torch.randn(1, TEXT, dim), torch.randn(1, 6, dim) * 0.1
    rotary = rotary_of(tokens, dim // heads, "cpu")

    def compiled(backend: str, **options: Any) -> Callable[[], Any]:
        found = torch.compile(model, backend=backend, options=options or None)
        return lambda: found(*inputs, rotary)

    functions = {
        BASE: compiled("inductor"),
        "W4A4": compiled("tahf4"),
        "W4A4, attention in 8 bits": compiled("tahf4", attention="int8"),
    }
    outputs = {name: function() for name, function in functions.items()}
    want, times = outputs[BASE], {name: list[float]() for name in functions}
    for _ in tqdm(range(rounds), desc="rounds", leave=False, disable=None):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return {
        "dim": dim, "ffn": ffn, "tokens": tokens, "rounds": rounds, "times": times,
        "errors": {name: float((out - want).norm() / want.norm()) for name, out in outputs.items()},
    }


def markdown(found: Mapping[str, Any], known: Mapping[str, Any]) -> str:
    """Return the table of a measurement."""
    lines = [f"{', '.join(f'{name} {value}' for name, value in known.items())}; medians of {found['rounds']}.", ""]
    title = f"block of {found['dim']} / {found['ffn']}, {found['tokens']:,} tokens, {TEXT} of the text"
    lines += [f"| {title} | seconds | faster than float32 | spread | relative error |", "|---" * 5 + "|"]
    base = statistics.median(found["times"][BASE])
    for name, times in found["times"].items():
        middle = statistics.median(times)
        spread = (max(times) - min(times)) / middle
        error = found["errors"][name]
        lines.append(f"| {name} | {middle:.2f} | {base / middle:.2f} | {spread:.0%} | {error:.4f} |")
    return "\n".join(lines) + "\n"


def main(output: Path, tokens: int, rounds: int) -> None:
    """Measure, print, and write ``attention.json`` and ``attention.md`` into a folder."""
    known, found = facts(), block(3072, 14336, 24, tokens, rounds)
    text = markdown(found, known)
    typer.echo(text)
    content = json.dumps({"facts": known, **found}, indent=1) + "\n"
    for name, written in (("attention.json", content), ("attention.md", text)):
        write_text(output / name, written)
