"""``tahf4 bench``: check and time the generated kernels on a GPU, or time those of the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["bench"]


def bench(
    tokens: Annotated[
        int, typer.Option(min=64, help="Rows of the large products; 32,760 is 81 frames in 480p.")
    ] = 32760,
    only_check: Annotated[bool, typer.Option("--only-check", help="Compare with the reference, time nothing.")] = False,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for JSON and Markdown.")] = Path("out/bench"),
    cpu: Annotated[bool, typer.Option("--cpu", help="Time the kernels of the CPU instead.")] = False,
    branches: Annotated[
        bool, typer.Option("--branches", help="Time a block on the CPU with branches of low rank and without instead.")
    ] = False,
    attention: Annotated[
        bool, typer.Option("--attention", help="Time a block of --tokens on the CPU with attention in 8 bits instead.")
    ] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of each comparison on the CPU.")] = 7,
) -> None:
    """Compare every generated kernel with the reference on the GPU, then time them beside PyTorch's own.

    Quantizing kernels against a plain copy, products against bfloat16 and float8, and a whole block of Wan2.2-A14B
    against eager PyTorch and torch.compile, in one process. From a checkout without installation:
    `python tools/gpu_check.py`.

    With `--cpu`: quantization against a copy, linears and a block of Wan2.2-TI2V-5B against float32, bfloat16 and
    dynamic int8 of PyTorch, side by side, on as many threads as PyTorch uses (`OMP_NUM_THREADS`).
    """
    if branches:
        from . import branch_bench

        branch_bench.main(output, rounds)
        return
    if attention:
        from . import attention_bench

        attention_bench.main(output, tokens, rounds)
        return
    if cpu:
        from . import cpu_bench

        cpu_bench.main(output, rounds)
        return
    from . import gpu_check

    arguments = ["--tokens", str(tokens), "-o", str(output), *(["--only-check"] if only_check else [])]
    if code := gpu_check.main(arguments):
        raise typer.Exit(code)
