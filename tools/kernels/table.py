"""``tahf4 kernels``: what the generated kernels need on GPUs, from code compiled for them here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm

from ...backends.triton.call import Call
from ...backends.triton.targets import SHARED_LIMIT, Resources, compile_call
from ...errors import OptionError
from ..staging import write_text
from .wan import A14B, TI2V_5B, Model, attention_calls, block_steps, call_name

__all__ = ["Entry", "entries", "kernels", "markdown"]

TOKENS = 32760
SMALL_TOKENS = 1
ATTENTION = {"kernel": "q, k -> quantize", "quantize_values": "v -> quantize", "attend": "rows through all keys"}
"""What its kernels do."""


@dataclass(frozen=True)
class Entry:
    """A kernel and where it is launched.

    Attributes:
        name: of the fused operator.
        model: whose sizes.
        call: the launch.
    """

    name: str
    model: Model
    call: Call


def entries(capability: int) -> list[Entry]:
    """Return the distinct kernels that Wan2.2 launches on an architecture, each with its default configuration."""
    found: dict[tuple[object, ...], Entry] = {}
    for model, tokens, span in ((A14B, TOKENS, 1), (TI2V_5B, TOKENS, 1), (A14B, SMALL_TOKENS, 1), (A14B, TOKENS, 0)):
        for step in block_steps(model, tokens, span=span):
            for call in step.calls((capability // 10, capability % 10), 132):
                name = step.name if step.n == 0 else f"{step.name}: {call_name(call)}"
                name = f"codes {call_name(call)}" if "out" in call.arguments else name
                name += " (few rows)" if tokens == SMALL_TOKENS else ""
                name += f" ({model.name})" if model is not A14B else ""
                if not span:
                    name += " (span row)"
                found.setdefault(_key(call), Entry(name, model, call))
    for value_bits, programs in ((8, False), (16, False), (8, True), (16, True)):
        name = "attention in 8 bits" + (", values in 16" if value_bits == 16 else "")
        name += ", with norms and rotary embedding" if programs else ""
        for call in attention_calls(A14B, TOKENS, value_bits, (capability // 10, capability % 10), programs):
            found.setdefault(_key(call), Entry(f"{name}: {ATTENTION[call.name]}", A14B, call))
    return list(found.values())


def _key(call: Call) -> tuple[object, ...]:
    return call.text, call.name, tuple(call.constants.items()), call.warps, call.stages


def markdown(capability: int, measured: Sequence[tuple[Entry, Resources]]) -> str:
    """Return the table of an architecture."""
    lines = [
        f"## sm_{capability}",
        "",
        "| kernel | tile | warps | registers | spills | shared | instructions | matrix | wide loads | wide stores |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for entry, r in measured:
        call = entry.call
        tile = "x".join(str(call.constants[c]) for c in ("BM", "BN", "C") if c in call.constants) or "units"
        kind = ", ".join(f"{r.counts[m]} {m}" for m in ("wgmma", "tcgen05", "mma") if r.counts[m]) or "-"
        loads = f"{r.counts['loads of 16 bytes']} of {r.counts['loads']}"
        stores = f"{r.counts['stores of 16 bytes']} of {r.counts['stores']}"
        lines.append(
            f"| {entry.name} | {tile} | {call.warps} | {r.registers} | {r.spills} | {r.shared:,} | "
            f"{r.instructions:,} | {kind} | {loads} | {stores} |"
        )
    return "\n".join(lines) + "\n"


def kernels(
    capability: Annotated[
        list[int] | None, typer.Option("--capability", "-c", help="Compute capability, times ten; all by default.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Markdown file to write.")] = None,
) -> None:
    """Compile the kernels of Wan2.2 for GPUs (none is needed here) and list registers, spills and instructions."""
    chosen = capability or sorted(SHARED_LIMIT)
    if unknown := [c for c in chosen if c not in SHARED_LIMIT]:
        raise OptionError(f"--capability {unknown[0]}; expected one of {', '.join(map(str, SHARED_LIMIT))}")
    parts = [_HEAD.format(command="tahf4 kernels", triton=version("triton"))]
    for each in chosen:
        listed = entries(each)
        measured = [(e, compile_call(e.call, each)) for e in tqdm(listed, desc=f"sm_{each}", unit="kernel")]
        parts.append(markdown(each, measured))
        typer.echo(parts[-1])
    if output is not None:
        write_text(output, "\n".join(parts))
        typer.echo(f"wrote {output}")


_HEAD = """# Kernels

Made by `{command}` with Triton {triton}: each kernel that a block of Wan2.2 launches (A14B and TI2V-5B at 32,760
tokens, and few rows; A14B with one level-1 scale a row), compiled in its default configuration. Nothing here was timed:
these are compilers' figures.

`tile` is rows x columns of a product; quantizing kernels give each thread whole units of 64 values. `spills` counts
instructions that read or write local memory, `matrix` matrix instructions; wide loads and stores are of 16 bytes.
Instructions are those of the whole program text.
"""
