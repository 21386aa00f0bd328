"""Correctness of the generated kernels on a device, then their speed beside PyTorch's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...format import hif4
from ...format.hif4 import UNIT
from ...ops import registry
from .attention import check_attention, time_attention
from .block import WanBlock, rotary_of
from .rounding import check_rounding
from .running import own_on_path
from .spans import check_spans, time_spans
from .wan import A14B, GATE, GELU, MODULATE, NORM, Model

__all__ = ["check", "check_products", "check_quantizing", "facts", "judged", "measure"]

Timer = Callable[[Callable[[], Any]], float]
Shown = Callable[[str], None]


def facts(device: torch.device) -> dict[str, Any]:
    """Return what a measurement depends on."""
    found: dict[str, Any] = {"torch": torch.__version__, "device": str(device)}
    if device.type == "cuda":
        import triton

        properties = torch.cuda.get_device_properties(device)
        found |= {
            "chip": properties.name,
            "processors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "capability": ".".join(map(str, torch.cuda.get_device_capability(device))),
            "cuda": torch.version.cuda,
            "triton": triton.__version__,
        }
    return found


def do_bench(function: Callable[[], Any]) -> float:
    """Return the median milliseconds of a call."""
    from triton.testing import do_bench as bench

    return float(bench(function, warmup=50, rep=200, return_mode="median"))


# Correctness


def check(device: torch.device, *, k: int = 5120, rows: Sequence[int] = (1, 48, 640)) -> Iterator[dict[str, Any]]:
    """Compare every operator's kernel with the reference on the same device.

    Args:
        device: that Triton serves.
        k: width of the activations; odd widths are tried besides.
        rows: of the activations.

    Yields:
        One record for each comparison: ``name``, ``ok``, ``detail``.
    """
    yield from check_quantizing(device, k)
    yield from check_products(device, k, rows)
    yield from check_attention(device)
    yield from check_rounding(device)
    yield from check_spans(device, k, rows)
    if device.type == "cuda":
        yield from _check_tiles(device)


def _random(device: torch.device) -> Callable[..., Tensor]:
    registry.kernels()
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    return random


def _record(name: str, ok: bool, detail: str) -> dict[str, Any]:
    return {"name": name, "ok": bool(ok), "detail": detail}


def _compare(name: str, got: Any, wanted: Any, allowed: float) -> dict[str, Any]:
    wrong = [int((a != b).sum()) for a, b in zip(got, wanted, strict=True)]
    detail = f"{wrong[0]} of {got[0].numel()} bytes of codes, {wrong[1]} of {got[1].numel()} scales differ"
    shares = [w / max(1, g.numel()) for w, g in zip(wrong, got, strict=True)]
    # A unit has 32 bytes of codes: one of them at a boundary may change the unit's scale, and that all the others.
    return _record(name, shares[0] <= allowed and shares[1] <= allowed, detail)


def check_quantizing(device: torch.device, k: int) -> Iterator[dict[str, Any]]:
    """Compare the kernels that quantize and dequantize: see :func:`check`."""
    random = _random(device)
    own, reference = torch.ops.tahf4_triton, torch.ops.tahf4
    tokens = 67 if device.type == "cuda" else 13
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for width, block in ((k, 0), (k, 64), (k, 128), (100, 64)):
            x = random(3, tokens, width, dtype=dtype)
            x[0, 0, 3], x[0, 1, 64] = float("nan"), float("inf")
            x[0, 2] = 0
            multiplier = random(width, dtype=torch.float32).exp()
            name = f"quantize {str(dtype)[6:]} {width}, block {block}"
            yield _compare(name, own.quantize(x, multiplier, block), reference.quantize(x, multiplier, block), 0)
            codes, scales = reference.quantize(x)
            a, b = own.dequantize(codes, scales, width, dtype), reference.dequantize(codes, scales, width, dtype)
            same = torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
            yield _record(f"dequantize {str(dtype)[6:]} {width}", same, "bit for bit")
    table, x = random(2, 6, k, dtype=torch.float32), random(2, tokens, k)
    programs = {
        "modulation": (MODULATE, [x, table[:, 1:2], table[:, 2:3]]),
        "norm": (NORM, [x, table[0, 1], table[0, 2]]),
        "RMS norm": ("v0: bfloat16 = rms_norm(x0, x1, 1e-06)", [x, random(k)]),
        "mean": ("v0: float32 = to(x0)\nv1: float32 = mean(v0)\nv2: float32 = sub(v0, v1)", [x]),
        "GELU": ("v0: float32 = to(x0)\nv1: float32 = gelu(v0)", [x]),
        "SiLU": ("v0: float32 = to(x0)\nv1: float32 = silu(v0)", [x]),
    }
    for name, (text, inputs) in programs.items():
        got, wanted = (f.fused_quantize(inputs, text, None, 0) for f in (own, reference))
        yield _compare(f"{name} -> quantize", got, wanted, 2e-3)


def check_products(device: torch.device, k: int, rows: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Compare the kernels of products, on each path: see :func:`check`."""
    random = _random(device)
    own, reference = torch.ops.tahf4_triton, torch.ops.tahf4
    for path in ("packed", "int8", "bf16"):
        for m in rows:
            n = 192
            operands = (*reference.quantize(random(m, k)), *reference.quantize(random(n, k)))
            exact = _exact(*operands)
            got = own_on_path(path, *operands, None, torch.float32, [n], [], "", torch.float32)[0]
            error = float((got.double() - exact).norm() / exact.norm())
            yield _record(f"linear {path}, {m} rows", error < 1e-5, f"relative error {error:.1e}")
            gate, residual = random(n, dtype=torch.float32), random(m, n)
            args = (*operands, random(n), torch.bfloat16, [n], [gate, residual], GATE, torch.bfloat16)
            got, wanted = own_on_path(path, *args)[0], reference.fused_linear(*args)[0]
            error = float((got.double() - wanted.double()).norm() / wanted.double().norm())
            yield _record(f"linear {path}, {m} rows, gate and residual", error < 2e-3, f"relative error {error:.1e}")
            for function in ("gelu", "gelu_tanh", "silu"):
                args = (*operands, random(n), torch.float32, [n], [], f"v0: float32 = {function}(y)", torch.float32)
                got, wanted = own_on_path(path, *args)[0], reference.fused_linear(*args)[0]
                error = float((got.double() - wanted.double()).norm() / wanted.double().norm())
                yield _record(f"linear {path}, {m} rows, {function}", error < 1e-5, f"relative error {error:.1e}")
            whole = own_on_path(path, *operands, None, torch.bfloat16, [n], [], "", torch.bfloat16)[0]
            parts = own_on_path(path, *operands, None, torch.bfloat16, [64, 32, 96], [], "", torch.bfloat16)
            same = torch.equal(torch.cat(parts, -1), whole)
            yield _record(f"linear {path}, {m} rows, three results", same, "bit for bit")
            multiplier = random(n, dtype=torch.float32).exp()
            operands[1][-1, 0] |= 0xFF  # a unit that is no number: so is its row
            args = (*operands, random(n), torch.bfloat16, [n], [], GELU)
            pair = own_on_path(path, *args, None, multiplier, 64)
            separate = own.quantize(own_on_path(path, *args, torch.bfloat16)[0], multiplier, 64)
            yield _compare(f"linear {path}, {m} rows, GELU -> quantize", pair, separate, 2e-3)
            nothing = bool((pair[0][-1] == 0).all()) and bool((pair[1][-1] == 0xFF).all())
            yield _record(f"linear {path}, {m} rows, NaN -> quantize", nothing, "codes 0, scales 255")


def _check_tiles(device: torch.device) -> Iterator[dict[str, Any]]:
    """Compare every tile that the autotuner may choose, and what it chooses."""
    from ...backends.triton import tiling

    random = _random(device)
    capability = torch.cuda.get_device_capability(device)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    m, n, k = 2048 + 40, 1024 + 64, 1024
    operands = (*torch.ops.tahf4.quantize(random(m, k)), *torch.ops.tahf4.quantize(random(n, k)))
    exact = _exact(*operands)
    for path, tile in tiling.candidates(m, n, k // UNIT, capability, processors, 0, False):
        got = own_on_path(path, *operands, None, torch.float32, [n], [], "", torch.float32, tile=tile)[0]
        error = float((got.double() - exact).norm() / exact.norm())
        yield _record(f"linear {path}, {tile}", error < 1e-5, f"relative error {error:.1e}")
    got = torch.ops.tahf4_triton.linear(*operands, None, torch.float32)
    error = float((got.double() - exact).norm() / exact.norm())
    yield _record("linear as chosen", error < 1e-5, f"relative error {error:.1e}")


def judged(block: dict[str, Any]) -> list[dict[str, Any]]:
    """Return checks of whole blocks: W4A4 is some percent away from 16 bits; 0 would mean that nothing was replaced."""
    rows = {name: row["relative_error"] for name, row in block.items() if "relative_error" in row}
    return [
        {"name": f"block {name}", "ok": 1e-3 < error < 0.3, "detail": f"relative error {error:.3g}"}
        for name, error in rows.items()
    ]


def _exact(codes: Tensor, scales: Tensor, weight_codes: Tensor, weight_scales: Tensor) -> Tensor:
    k = scales.shape[-1] * UNIT
    left = hif4.dequantize(hif4.Packed(codes, scales, k), torch.float64)
    return left @ hif4.dequantize(hif4.Packed(weight_codes, weight_scales, k), torch.float64).t()


# Speed


def measure(
    device: torch.device,
    *,
    model: Model = A14B,
    tokens: int = 32760,
    few: Sequence[int] = (1, 16, 64),
    square: int = 8192,
    copied: int = 1 << 30,
    timer: Timer = do_bench,
    show: Shown = print,
) -> dict[str, Any]:
    """Time kernels, products and a whole block, with PyTorch's own in the same process.

    Args:
        device: with the kernels.
        model: whose sizes.
        tokens: of the video.
        few: rows of small products.
        square: size of the product that is the ceiling of arithmetic.
        copied: bytes of the copy that is the ceiling of bandwidth.
        timer: median milliseconds of a call.
        show: takes a line for each finding.

    Returns:
        Everything, for JSON.
    """
    registry.kernels()
    with torch.no_grad():
        ceilings = _ceilings(device, square, copied, timer)
        found: dict[str, Any] = {"tokens": tokens, "model": model.name, "ceilings": ceilings}
        show(f"ceilings: copy {ceilings['copy_gb_s']:.0f} GB/s, bf16 {ceilings['bf16_tflops']:.0f} TFLOP/s")
        found["quantize"] = _quantizing(device, model, tokens, ceilings["copy_gb_s"], timer, show)
        found["linear"] = _products(device, model, tokens, few, ceilings["bf16_tflops"], timer, show)
        found["spans"] = time_spans(device, model, tokens, timer, show)
        found["attention"] = time_attention(device, model, tokens, timer, show)
        found["block"] = _block(device, model, tokens, timer, show)
    return found


def _ceilings(device: torch.device, square: int, copied: int, timer: Timer) -> dict[str, float]:
    source = torch.empty(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    milliseconds = timer(lambda: target.copy_(source))
    a, b = (torch.randn(square, square, device=device).to(torch.bfloat16) for _ in range(2))
    product = timer(lambda: a @ b)
    return {"copy_gb_s": 2 * copied / milliseconds / 1e6, "bf16_tflops": 2 * square**3 / product / 1e9}


def _quantizing(
    device: torch.device, model: Model, tokens: int, ceiling: float, timer: Timer, show: Shown
) -> list[dict[str, Any]]:
    d = model.dim
    x = torch.randn(1, tokens, d, device=device).to(torch.bfloat16)
    wide = torch.randn(1, tokens, model.ffn, device=device).to(torch.bfloat16)
    table = torch.randn(1, 6, d, device=device)
    multiplier = torch.rand(d, device=device) + 0.5
    own = torch.ops.tahf4_triton
    codes, scales = own.quantize(x, multiplier, 64)
    cases: list[tuple[str, Callable[[], Any], int, float]] = [
        ("quantize", lambda: own.quantize(x, multiplier, 64), x.numel(), 2),
        ("quantize, no rotation", lambda: own.quantize(x, multiplier, 0), x.numel(), 2),
        ("quantize, wide", lambda: own.quantize(wide, None, 64), wide.numel(), 2),
        (
            "norm, modulation -> quantize",
            lambda: own.fused_quantize([x, table[:, 1:2], table[:, 2:3]], MODULATE, multiplier, 64),
            x.numel(),
            2,
        ),
        (
            "GELU -> quantize",
            lambda: own.fused_quantize([wide], "v0: bfloat16 = gelu_tanh(x0)", None, 64),
            wide.numel(),
            2,
        ),
        ("dequantize", lambda: own.dequantize(codes, scales, d, torch.bfloat16), x.numel(), 2),
    ]
    rows = []
    for name, function, values, size in cases:
        milliseconds = timer(function)
        speed = values * (size + 36 / 64) / milliseconds / 1e6
        rows.append({"name": name, "ms": milliseconds, "gb_s": speed, "share_of_copy": speed / ceiling})
        show(f"{name}: {milliseconds:.3f} ms, {speed:.0f} GB/s, {speed / ceiling:.0%} of the copy")
    return rows


def _products(
    device: torch.device,
    model: Model,
    tokens: int,
    few: Sequence[int],
    ceiling: float,
    timer: Timer,
    show: Shown,
) -> list[dict[str, Any]]:
    d, f = model.dim, model.ffn
    shapes = [(tokens, d, 3 * d), (tokens, d, d), (tokens, d, f), (tokens, f, d), (model.text, d, 2 * d)]
    shapes += [(rows, d, n) for rows in few for n in (d, f)]
    rows = []
    for m, k, n in shapes:
        x, weight = (torch.randn(s, k, device=device).to(torch.bfloat16) for s in (m, n))
        packed, operand = torch.ops.tahf4_triton.quantize(weight), torch.ops.tahf4_triton.quantize(x)
        row: dict[str, Any] = {"m": m, "k": k, "n": n, "flops": 2 * m * n * k}
        row["bf16_ms"] = timer(lambda x=x, weight=weight: F.linear(x, weight))  # type: ignore[misc]
        row["fp8_ms"] = _fp8(x, weight, timer)
        for path in ("packed", "int8", "bf16"):
            if path == "packed" and m > 4096:
                continue  # unpacked again for each tile: far from the fastest

            def product(path: str = path, operand: Any = operand, packed: Any = packed, n: int = n) -> Any:
                return own_on_path(path, *operand, *packed, None, torch.bfloat16, [n], [], "", torch.bfloat16)

            row["expanded_bf16_ms" if path == "bf16" else f"{path}_ms"] = timer(product)
        row["default_ms"] = timer(
            lambda operand=operand, packed=packed: torch.ops.tahf4_triton.linear(  # type: ignore[misc]
                *operand, *packed, None, torch.bfloat16
            )
        )
        row["w4a4_ms"] = timer(
            lambda x=x, packed=packed: torch.ops.tahf4_triton.linear(  # type: ignore[misc]
                *torch.ops.tahf4_triton.quantize(x, None, 64), *packed, None, torch.bfloat16
            )
        )
        row["speedup"] = row["bf16_ms"] / row["default_ms"]
        row["speedup_with_quantization"] = row["bf16_ms"] / row["w4a4_ms"]
        row["share_of_bf16_ceiling"] = row["flops"] / row["default_ms"] / 1e9 / ceiling
        rows.append(row)
        show(
            f"linear {m} x {k} x {n}: bf16 {row['bf16_ms']:.3f} ms, default {row['default_ms']:.3f} ms "
            f"({row['speedup']:.2f}x; with quantization {row['speedup_with_quantization']:.2f}x), "
            + ", ".join(f"{p} {row[f'{p}_ms']:.3f}" for p in ("packed", "int8", "expanded_bf16") if f"{p}_ms" in row)
            + (f", fp8 {row['fp8_ms']:.3f}" if row["fp8_ms"] else "")
        )
    return rows


def _fp8(x: Tensor, weight: Tensor, timer: Timer) -> float | None:
    """Return the milliseconds of ``torch._scaled_mm``, a scale a row, quantized beforehand; None if it refuses."""

    def side(t: Tensor) -> tuple[Tensor, Tensor]:
        scale = t.abs().amax(1, keepdim=True).float() / 448
        return (t.float() / scale).to(torch.float8_e4m3fn), scale

    try:
        (a, sa), (b, sb) = side(x), side(weight)
        run = lambda: torch._scaled_mm(a, b.t(), scale_a=sa, scale_b=sb.t(), out_dtype=torch.bfloat16)  # noqa: E731
        run()
    except (RuntimeError, ValueError, NotImplementedError):
        return None
    return timer(run)


def _block(device: torch.device, model: Model, tokens: int, timer: Timer, show: Shown) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for core in (True, False):
        torch.manual_seed(0)
        block = WanBlock(model.dim, model.ffn, model.heads, core).cast(torch.bfloat16).to(device).eval()
        x = torch.randn(1, tokens, model.dim, device=device).to(torch.bfloat16)
        text = torch.randn(1, model.text, model.dim, device=device).to(torch.bfloat16)
        temb = torch.randn(1, 6, model.dim, device=device)
        args = (x, text, temb, rotary_of(tokens, model.dim // model.heads, device))
        name = "block" if core else "block without attention cores"
        row: dict[str, Any] = {"eager_ms": timer(lambda block=block, args=args: block(*args))}  # type: ignore[misc]
        results = {"eager": block(*args)}
        choices: tuple[tuple[str, dict[str, Any]], ...] = (("inductor", {}), ("tahf4", {"weight_check": "version"}))
        for backend, options in choices:
            torch._dynamo.reset()
            # mode and options exclude each other; both run Inductor's defaults for what is around the linears.
            compiled = torch.compile(block, backend=backend, options=options or None)
            results[backend] = compiled(*args)
            row[f"{backend}_ms"] = timer(lambda compiled=compiled, args=args: compiled(*args))  # type: ignore[misc]
        torch._dynamo.reset()
        row["speedup_over_eager"] = row["eager_ms"] / row["tahf4_ms"]
        row["speedup_over_compile"] = row["inductor_ms"] / row["tahf4_ms"]
        wanted = results["eager"].double()
        row["relative_error"] = float((results["tahf4"].double() - wanted).norm() / wanted.norm())
        found[name] = row
        show(
            f"{name}: eager {row['eager_ms']:.2f} ms, torch.compile {row['inductor_ms']:.2f} ms, tahf4 "
            f"{row['tahf4_ms']:.2f} ms: {row['speedup_over_compile']:.2f}x torch.compile; relative error "
            f"{row['relative_error']:.3f}"
        )
    linears = [m for m in block.modules() if isinstance(m, torch.nn.Linear)]
    before = sum(m.weight.numel() * 2 for m in linears)
    after = sum(m.out_features * math.ceil(m.in_features / UNIT) * hif4.BYTES_PER_UNIT for m in linears)
    found["weights"] = {"bf16_bytes": before, "hif4_bytes": after, "smaller": before / after}
    return found
