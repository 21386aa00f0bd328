"""``tahf4 bench --cpu``: W4A4 on the CPU beside PyTorch's own, interleaved in one process."""

from __future__ import annotations

import copy
import functools
import json
import math
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import typer
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..backends import cpu
from ..errors import OptionError
from ..format import hif4
from ..format.spans import SEARCHED
from ..ops import registry
from .kernels.block import WanBlock, rotary_of
from .staging import write_text

__all__ = [
    "ATTENTION",
    "LINEARS",
    "QUANTIZED",
    "attention",
    "block",
    "facts",
    "linears",
    "main",
    "markdown",
    "pipeline",
    "quantizing",
]

QUANTIZED = ((512, 3072), (1024, 5120), (4096, 5120))
"""Rows and columns of activations."""

LINEARS = (
    *((1024, 1536, 1536), (1024, 5120, 5120), (256, 5120, 13824), (48, 256, 1024)),
    *((8, 5120, 5120), (1, 5120, 5120)),
)
"""M, K, N."""

ATTENTION = ((512, 8, 128), (4096, 4, 128), (8192, 2, 128))
"""Tokens, heads, channels of a head."""

Times = dict[str, dict[str, float]]
_LONG, _FEW = 1.0, 3  # seconds, rounds
_HOPELESS = 10.0  # times float32's


def interleaved(
    functions: Mapping[str, Callable[[], Any]],
    rounds: int,
    least: float = 0.02,
    clock: Callable[[], float] = time.perf_counter,
) -> Times:
    """Return the median and least seconds of each function over rounds in turn, and their spread.

    The spread is (largest - least) / median.

    ``least``: seconds that one measurement takes at least. What takes longer than ``_LONG`` is measured without a call
    before it, and at most three times. ``clock``: returns seconds.
    """
    repeats, first = {}, {}
    for name, function in tqdm(functions.items(), desc="warm", leave=False, disable=None):
        function()
        start = clock()
        function()
        first[name] = clock() - start
        repeats[name] = max(1, math.ceil(least / max(first[name], 1e-7)))
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in tqdm(range(rounds), desc="rounds", leave=False, disable=None):
        for name, function in functions.items():
            if first[name] < _LONG:
                function()  # what ran before has taken the cache
            elif turn >= _FEW:
                continue
            start = clock()
            for _ in range(repeats[name]):
                function()
            times[name].append((clock() - start) / repeats[name])
    return {
        name: {"seconds": statistics.median(t), "spread": (max(t) - min(t)) / statistics.median(t), "least": min(t)}
        for name, t in times.items()
    }


def facts() -> dict[str, Any]:
    """Return what a measurement depends on."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    known = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "TAHF4_CPU_ISA")
    limits = {n: os.environ[n] for n in known if n in os.environ}
    return {
        "processor": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "PyTorch's instructions": torch.backends.cpu.get_cpu_capability(),
        "ours": cpu.instruction_set(),
        **limits,
    }


def quantizing(shapes: Sequence[tuple[int, int]], rounds: int) -> list[dict[str, Any]]:
    """Time quantization of float32 and bfloat16 beside a copy of the same float32 tensor."""
    rows = []
    for m, k in shapes:
        x = torch.randn(m, k)
        half, target, multiplier = x.bfloat16(), torch.empty_like(x), torch.rand(k) + 0.5
        times = interleaved(
            {
                "copy": lambda x=x, target=target: target.copy_(x),  # type: ignore[misc]
                "quantize": lambda x=x: cpu.quantize(x),  # type: ignore[misc]
                "mask, rotation": lambda x=x, f=multiplier: cpu.quantize(x, f, 64),  # type: ignore[misc]
                "least error": lambda x=x, f=multiplier: cpu.quantize(x, f, 64, 4, SEARCHED + 1),  # type: ignore[misc]
                "to 8 bits": lambda x=x, f=multiplier: cpu.quantize(x, f, 64, 8),  # type: ignore[misc]
                "bfloat16": lambda x=half: cpu.quantize(x),  # type: ignore[misc]
            },
            rounds,
        )
        rows.append({"m": m, "k": k, "values": m * k, "times": times})
    return rows


def _int8(module: nn.Module) -> nn.Module:
    """Return PyTorch's own dynamic int8 form."""
    from torch.ao.quantization import quantize_dynamic

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found: nn.Module = quantize_dynamic(module, {nn.Linear}, dtype=torch.qint8)
    return found


def _torchao(module: nn.Module) -> nn.Module | None:
    """Return torchao's dynamic int8 form through Inductor, as its documents say; None where torchao is missing."""
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    except ImportError:
        return None
    quantize_(module, Int8DynamicActivationInt8WeightConfig())
    found: nn.Module = torch.compile(module)  # type: ignore[assignment]
    return found


def _packed(x: Tensor, weight: tuple[Tensor, Tensor], bias: Tensor, bits: int = 4, span: int = 1) -> Tensor:
    # As lowered graphs call them.
    codes, scales = torch.ops.tahf4_cpu.quantize.default(x, None, 64, bits, span)
    out: Tensor = torch.ops.tahf4_cpu.linear.default(codes, scales, weight[0], weight[1], bias, torch.float32, span)
    return out


@torch.no_grad()
def linears(shapes: Sequence[tuple[int, int, int]], rounds: int) -> list[dict[str, Any]]:
    """Time W4A4, also with a level-1 scale a row, and W4A8, quantization of the activation included; and PyTorch's."""
    rows: list[dict[str, Any]] = []
    for m, k, n in shapes:
        linear, x = nn.Linear(k, n), torch.randn(m, k)
        half, half_x = nn.Linear(k, n).bfloat16(), x.bfloat16()
        int8 = _int8(nn.Sequential(nn.Linear(k, n)))
        weight, row = cpu.quantize(linear.weight), cpu.quantize(linear.weight, span=0)
        functions: dict[str, Callable[[], Any]] = {
            "float32": lambda f=linear, x=x: f(x),  # type: ignore[misc]
            "bfloat16": lambda f=half, x=half_x: f(x),  # type: ignore[misc]
            "int8": lambda f=int8, x=x: f(x),  # type: ignore[misc]
            "W4A4": lambda x=x, w=weight, b=linear.bias: _packed(x, w, b),  # type: ignore[misc]
            "W4A4, span row": lambda x=x, w=row, b=linear.bias: _packed(x, w, b, 4, 0),  # type: ignore[misc]
            "W4A8": lambda x=x, w=weight, b=linear.bias: _packed(x, w, b, 8),  # type: ignore[misc]
        }
        if usable(rows) and (torchao := _torchao(nn.Sequential(nn.Linear(k, n)))) is not None:
            functions["torchao int8"] = lambda f=torchao, x=x: f(x)  # type: ignore[misc]
        times = interleaved(functions, rounds)
        rows.append({"m": m, "k": k, "n": n, "operations": 2 * m * k * n, "times": times})
    return rows


@torch.no_grad()
def attention(shapes: Sequence[tuple[int, int, int]], rounds: int) -> list[dict[str, Any]]:
    """Time attention in 8 bits, the quantization of q, k and v included, beside PyTorch's."""
    rows = []
    for tokens, heads, width in shapes:
        # As models split their heads off.
        q, k, v = (torch.randn(1, tokens, heads, width).transpose(1, 2) for _ in range(3))
        functions: dict[str, Callable[[], Any]] = {
            "float32": functools.partial(nn.functional.scaled_dot_product_attention, q, k, v),
            "int8": functools.partial(torch.ops.tahf4_cpu.attention.default, q, k, v),
        }
        rows.append({"tokens": tokens, "heads": heads, "width": width, "times": interleaved(functions, rounds)})
    return rows


def usable(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether torchao is worth more measurements: where it has no kernel a block would take minutes a call."""
    found = [row["times"] for row in rows if "torchao int8" in row["times"]]
    return not rows or any(t["torchao int8"]["seconds"] < _HOPELESS * t["float32"]["seconds"] for t in found)


def block(dim: int, ffn: int, heads: int, tokens: int, rounds: int, torchao_too: bool = True) -> dict[str, Any]:
    """Time a block of Wan in float32, bfloat16, int8 and W4A4, with and without the pass ``fuse``."""
    torch.manual_seed(0)
    model = WanBlock(dim, ffn, heads).eval()
    inputs = torch.randn(1, tokens, dim), torch.randn(1, tokens, dim), torch.randn(1, 6, dim) * 0.1
    rotary = rotary_of(tokens, dim // heads, "cpu")
    half = WanBlock(dim, ffn, heads).cast(torch.bfloat16).eval()
    half_inputs = inputs[0].bfloat16(), inputs[1].bfloat16(), inputs[2]

    def compiled(backend: str, **options: Any) -> Callable[[], Any]:
        found = torch.compile(model, backend=backend, options=options or None)
        return lambda: found(*inputs, rotary)

    functions: dict[str, Callable[[], Any]] = {
        "float32": lambda: model(*inputs, rotary),
        "bfloat16": lambda: half(*half_inputs, rotary),
    }
    int8 = _int8(WanBlock(dim, ffn, heads).eval())
    functions["int8"] = lambda: int8(*inputs, rotary)

    if torchao_too and (torchao := _torchao(WanBlock(dim, ffn, heads).eval())) is not None:
        functions["torchao int8, compiled"] = lambda: torchao(*inputs, rotary)
    functions["torch.compile, float32"] = compiled("inductor")
    functions["W4A4"] = compiled("tahf4")
    functions["W4A4, weight_check=version"] = compiled("tahf4", weight_check="version")
    narrow = torch.compile(half, backend="tahf4")
    wide = torch.compile(half, backend="tahf4", options={"upcast.dtype": "float32"})
    functions["W4A4 of bfloat16"] = lambda: narrow(*half_inputs, rotary)
    functions["W4A4 of bfloat16, upcast"] = lambda: wide(*half_inputs, rotary)
    functions["W4A4, version, not fused"] = compiled("tahf4", weight_check="version", disable_passes=["fuse"])
    with torch.no_grad():
        times = interleaved(functions, rounds)
        wanted, got = functions["float32"](), functions["W4A4"]()
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    packed = sum(w.shape[0] * math.ceil(w.shape[1] / hif4.UNIT) * hif4.BYTES_PER_UNIT for w in weights)
    return {
        "dim": dim, "ffn": ffn, "tokens": tokens, "times": times,
        "relative_error": float((got - wanted).norm() / wanted.norm()),
        "weight_bytes": {"float32": sum(4 * w.numel() for w in weights), "hif4": packed},
    }


def pipeline(rounds: int) -> dict[str, Any]:
    """Time a call of the shipped pipeline's first expert, as a step with its prompt makes it."""
    from .generation import load_pipeline
    from .tiny_wan import settings

    models: dict[str, tuple[nn.Module, dict[str, Any]]] = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        pipe = load_pipeline(settings.PIPELINE_DIR, dtype, "cpu")
        pipe.set_progress_bar_config(disable=True)
        seen: list[dict[str, Any]] = []
        hook = pipe.transformer.register_forward_pre_hook(
            lambda module, args, kwargs, seen=seen: seen.append(kwargs), with_kwargs=True
        )
        first = {**settings.GENERATION, "num_inference_steps": 1, "output_type": "latent"}  # its call is what is timed
        pipe("a large red circle moving right", **first, generator=torch.Generator().manual_seed(0))
        hook.remove()
        models[name] = pipe.transformer.eval().requires_grad_(False), seen[0]
    functions: dict[str, Callable[[], Any]] = {}

    def add(name: str, model: Any, given: dict[str, Any]) -> None:
        functions[name] = lambda: model(**given)

    for name, (model, given) in models.items():
        add(name, model, given)
        add(f"torch.compile, {name}", torch.compile(model), given)
        add(f"W4A4 of {name}", torch.compile(model, backend="tahf4"), given)
    int8 = copy.deepcopy(models["float32"][0])
    int8.blocks = _int8(int8.get_submodule("blocks"))  # the rest of the model asks its linears for their dtype
    add("int8 blocks", int8, models["float32"][1])
    tokens = math.prod(models["float32"][1]["hidden_states"].shape[-3:]) // 4
    return {"tokens": tokens, "times": interleaved(functions, rounds)}


def main(output: Path, rounds: int) -> None:
    """Measure everything, print it, and write ``cpu.json`` and ``cpu.md`` into a folder."""
    registry.kernels()
    if not cpu.available():
        raise OptionError("there are no C++ kernels here: no compiler was found, or TAHF4_NO_CPP is set")
    with torch.no_grad():
        found: dict[str, Any] = {"facts": facts(), "rounds": rounds}
        found["quantize"] = quantizing(QUANTIZED, rounds)
        found["linear"] = linears(LINEARS, rounds)
        found["attention"] = attention(ATTENTION, rounds)
        found["block"] = block(3072, 14336, 24, 512, rounds, usable(found["linear"]))
        found["pipeline"] = pipeline(rounds)
    text = markdown(found)
    typer.echo(text)
    for name, content in (("cpu.json", json.dumps(found, indent=1) + "\n"), ("cpu.md", text)):
        write_text(output / name, content)


def markdown(found: Mapping[str, Any]) -> str:
    """Return the tables of a measurement."""
    known = ", ".join(f"{name} {value}" for name, value in found["facts"].items())
    lines = [f"{known}; medians of {found['rounds']}.", ""]
    columns = "copy", "quantize", "mask, rotation", "... least error", "... 8 bits", "from bfloat16", "quantize / copy"
    lines += [f"| million values/s | {' | '.join(columns)} |"]
    lines += ["|---" * 8 + "|"]
    for row in found["quantize"]:
        speed = {name: row["values"] / t["seconds"] / 1e6 for name, t in row["times"].items()}
        cells = [f"{s:,.0f}" for s in speed.values()] + [f"{speed['quantize'] / speed['copy']:.2f}"]
        lines.append(f"| {row['m']} x {row['k']} | " + " | ".join(cells) + " |")
    names = list(found["linear"][0]["times"])
    lines += ["", "| GOP/s, M x K x N | " + " | ".join(names) + " | " + " | ".join(
        f"{'W4A4 ' if i == 0 else ''}/ {n}" for i, n in enumerate(n for n in names if n != "W4A4")
    ) + " | spread |"]
    lines.append("|---" * (2 * len(names) + 1) + "|")
    for row in found["linear"]:
        times = row["times"]
        cells = [f"{row['operations'] / times[n]['seconds'] / 1e9:,.0f}" if n in times else "" for n in names]
        cells += [
            f"{times[n]['seconds'] / times['W4A4']['seconds']:.2f}" if n in times else "" for n in names if n != "W4A4"
        ]
        cells.append(f"{max(t['spread'] for t in times.values()):.0%}")
        lines.append(f"| {row['m']} x {row['k']} x {row['n']} | " + " | ".join(cells) + " |")
    lines += ["", "| attention, tokens x heads x channels | float32, ms | int8, ms | int8 is faster | spread |"]
    lines += ["|---" * 5 + "|"]
    for row in found["attention"]:
        seconds = {name: t["seconds"] for name, t in row["times"].items()}
        cells = [f"{s * 1e3:.1f}" for s in seconds.values()] + [f"{seconds['float32'] / seconds['int8']:.2f}"]
        cells.append(f"{max(t['spread'] for t in row['times'].values()):.0%}")
        lines.append(f"| {row['tokens']} x {row['heads']} x {row['width']} | " + " | ".join(cells) + " |")
    whole = found["block"]
    title = f"block of {whole['dim']} / {whole['ffn']}, {whole['tokens']} tokens"
    lines += ["", f"| {title} | ms | W4A4 is faster | spread |"]
    lines += ["|---" * 4 + "|"]
    for name, t in whole["times"].items():
        ratio = t["seconds"] / whole["times"]["W4A4"]["seconds"]
        lines.append(f"| {name} | {t['seconds'] * 1e3:.1f} | {ratio:.2f} | {t['spread']:.0%} |")
    sizes = whole["weight_bytes"]
    lines += [
        "",
        f"Relative error of the block in W4A4 {whole['relative_error']:.3f}; its linear weights take "
        f"{sizes['hif4'] / 2**20:.0f} MiB packed, {sizes['float32'] / 2**20:.0f} MiB in float32 "
        f"({sizes['hif4'] / sizes['float32']:.3f}).",
    ]
    small = found["pipeline"]
    lines += ["", f"| the tiny pipeline's expert, {small['tokens']} tokens | ms a call | times bfloat16's | spread |"]
    lines += ["|---" * 4 + "|"]
    for name, t in small["times"].items():
        ratio = t["seconds"] / small["times"]["bfloat16"]["seconds"]
        lines.append(f"| {name} | {t['seconds'] * 1e3:.1f} | {ratio:.2f} | {t['spread']:.0%} |")
    return "\n".join(lines) + "\n"
