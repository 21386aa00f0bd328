"""Time and memory of ``tahf4 quantize`` beside a plain copy, on a synthetic checkpoint of Wan2.2-A14B's real shapes.

``python -m tahf4_compiler.tools.checkpoint_bench --blocks 8 --folder DIR`` writes the checkpoint, copies it and
quantizes it, in turns and each in a process of its own, and removes everything. Each is timed until its files are on
the disk (``os.sync``). Of the copy one file stands at a time, so that the disk need not hold the model twice.

``--recipe`` quantizes by a recipe with a mask for each linear, a rotation and the search of scales.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["bench"]

_CONFIG = {"num_layers": 40, "ffn_dim": 13824, "num_attention_heads": 40, "attention_head_dim": 128, "text_dim": 4096}
_COPY = 4 << 20

_QUANTIZE = """
import sys
from pathlib import Path
from tahf4_compiler.checkpoint.convert import quantize_checkpoint
from tahf4_compiler import Recipe
from tahf4_compiler.tools.checkpoint_bench import report
quantize_checkpoint(sys.argv[1], sys.argv[2])  # small and first: imports and the compiler are not what is timed
recipe = Recipe.load(sys.argv[5]) if len(sys.argv) > 5 else None
report(lambda: quantize_checkpoint(sys.argv[3], sys.argv[4], recipe, check_weights=False))
"""
_COPYING = """
import sys
from tahf4_compiler.tools.checkpoint_bench import copy, report
report(lambda: copy(sys.argv[1], sys.argv[2]))
"""


def report(work: Any) -> None:
    """Run something in this process and print its seconds and the peak memory of the process."""
    os.sync()
    start = time.perf_counter()
    work()
    made = time.perf_counter() - start
    os.sync()
    seconds = time.perf_counter() - start
    # Not getrusage: its maximum is that of the parent, if that was larger when it started this process.
    status = Path("/proc/self/status").read_text(encoding="ascii")
    peak = int(status.partition("VmHWM:")[2].split()[0]) * 1024
    print(json.dumps({"seconds": seconds, "unsynced": made, "peak": peak}))


def copy(source: str, target: str) -> None:
    """Copy a folder with plain reads and writes, as ``cp`` does where files cannot be cloned; drop what is on disk."""
    Path(target).mkdir()
    buffer = bytearray(_COPY)
    for path in sorted(Path(source).iterdir()):
        with path.open("rb", buffering=0) as file, (Path(target) / path.name).open("wb", buffering=0) as out:
            while count := file.readinto(buffer):
                out.write(memoryview(buffer)[:count])
            os.fsync(out.fileno())
        (Path(target) / path.name).unlink()


def make(folder: Path, blocks: int, config: dict[str, Any] | None = None) -> int:
    """Write a bfloat16 checkpoint with random weights, two blocks a file; return its bytes."""
    import torch
    from diffusers import WanTransformer3DModel
    from safetensors.torch import save_file

    folder.mkdir()
    with torch.device("meta"):
        model = WanTransformer3DModel(**{**(config or _CONFIG), "num_layers": blocks})
    (folder / "config.json").write_text(model.to_json_string())
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    parts: dict[int, list[str]] = {}
    for name in shapes:
        parts.setdefault(int(name.split(".")[1]) // 2 if name.startswith("blocks.") else blocks, []).append(name)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn((1 << 22) + 64, generator=generator).bfloat16() * 0.02
    weight_map: dict[str, str] = {}
    for i, names in enumerate(parts.values(), 1):
        file = f"diffusion_pytorch_model-{i:05}-of-{len(parts):05}.safetensors"
        values = {name: torch.empty(shapes[name], dtype=torch.bfloat16) for name in names}
        for value in values.values():
            flat = value.view(-1)
            for start in range(0, len(flat), 1 << 22):
                flat[start : start + (1 << 22)] = noise[: min(1 << 22, len(flat) - start)]
        save_file(values, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def bench(
    blocks: Annotated[int, typer.Option(min=2, help="Blocks of 40; each takes 0.7 GB, and as much for its copy.")] = 6,
    rounds: Annotated[int, typer.Option(min=1, help="Times that each is measured.")] = 2,
    folder: Annotated[Path | None, typer.Option(help="On the disk that is measured.")] = None,
    recipe: Annotated[bool, typer.Option("--recipe", help="With masks, rotation and the search of scales.")] = False,
    small: Annotated[bool, typer.Option("--small", help="A tiny model, to try the script.")] = False,
) -> None:
    """Measure seconds per GB and peak memory of quantizing beside those of copying."""
    base = Path(tempfile.mkdtemp(prefix="tahf4-bench-", dir=folder))
    tiny = {"num_layers": 2, "ffn_dim": 128, "num_attention_heads": 1, "attention_head_dim": 64, "text_dim": 64}
    try:
        make(base / "tiny", 2, tiny)
        size = make(base / "model", blocks, tiny if small else None)
        typer.echo(f"{blocks} blocks, {size:,} bytes in bfloat16, {os.cpu_count()} cores")
        before = _linear_bytes(base / "model")
        given = [_recipe(base / "model", base / "recipe.safetensors")] if recipe else []
        for i in range(rounds):
            copied = _child(_COPYING, base / "model", base / "copy")
            shutil.rmtree(base / "copy")
            made = _child(_QUANTIZE, base / "tiny", base / f"warm{i}", base / "model", base / "out", *given)
            after = _packed_bytes(base / "out")
            shutil.rmtree(base / "out")
            for name, found in (("copy", copied), ("quantize", made)):
                whole, made_in = (found[key] / size * 1e9 for key in ("seconds", "unsynced"))
                typer.echo(f"{name}: {whole:.2f} s/GB ({made_in:.2f} before sync), peak {found['peak'] / 1e6:,.0f} MB")
            typer.echo(f"speed of the copy: {copied['seconds'] / made['seconds']:.2f}")
        typer.echo(f"quantized linears: {after:,} of {before:,} bytes, {after / before:.4f}")
    finally:
        shutil.rmtree(base, ignore_errors=True)


def _recipe(model: Path, path: Path) -> Path:
    """Write a recipe with everything for each linear of the blocks, of random masks."""
    import torch

    from ..files.reading import read_header
    from ..recipe.entries import LinearEntry, RecipeEntry
    from ..recipe.recipe import Recipe

    generator, entries = torch.Generator().manual_seed(1), {}
    headers = [read_header(file).tensors for file in sorted(model.glob("*.safetensors"))]
    for name, info in (item for tensors in headers for item in tensors.items()):
        if name.startswith("blocks.") and name.endswith(".weight") and ".norm" not in name:
            n, k = info.shape
            linear = name.removesuffix(".weight")
            mask = torch.rand(k, generator=generator) + 0.5
            entries[linear] = RecipeEntry({linear: LinearEntry((n, k), 0)}, 64, 1, "squared", 99.9, 0.5, mask)
    Recipe({"": entries}).save(path)
    return path


def _child(text: str, *arguments: Path) -> dict[str, float]:
    done = subprocess.run([sys.executable, "-c", text, *map(str, arguments)], stdout=subprocess.PIPE, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _sizes(folder: Path, *ends: str) -> dict[str, int]:
    from ..files.reading import read_header

    headers = [read_header(path).tensors for path in folder.glob("*.safetensors")]
    return {name: info.size for tensors in headers for name, info in tensors.items() if name.endswith(ends)}


def _linear_bytes(folder: Path) -> int:
    weights = _sizes(folder, ".weight")
    return sum(n for name, n in weights.items() if name.startswith("blocks.") and ".norm" not in name)


def _packed_bytes(folder: Path) -> int:
    return sum(_sizes(folder, "weight_codes", "weight_scales", "multiplier").values())


if __name__ == "__main__":
    typer.run(bench)
