"""What observing costs: `python -m tahf4_compiler.tools.evaluation.calibration_cost`.

Times a model compiled by Inductor as it is and with observers, in turns, and prints the ratio of the medians: the
transformer of the tiny pipeline, and one block at the width of Wan2.2 A14B. Then times the reconstruction of a part of
a weight of that width, with second moments in blocks of 1024.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import nn

from ...calibration.calibration import calibrate
from ...format.reconstruct import reconstruct
from ..generation import load_pipeline
from ..tiny_wan import settings

__all__ = ["cost"]

Arguments = dict[str, Any]


def cost(model: nn.Module, arguments: Arguments, calls: int, rows: int = 64) -> tuple[float, float, list[float]]:
    """Return the median seconds of a plain and of an observed call, and the ratio of each pair.

    Args:
        model: not compiled.
        arguments: of a call.
        calls: timed of each, in turns.
        rows: sample rows of the calibration.
    """
    plain = torch.compile(model, backend="inductor")
    times: list[list[float]] = [[], []]
    with torch.no_grad():
        plain(**arguments)
        with calibrate(model, rows=rows):
            for _ in range(3):  # compiles, then fills the sample
                model(**arguments)
            observed = model._compiled_call_impl

            def as_it_is(**kwargs: Any) -> Any:
                model._compiled_call_impl = None
                try:
                    return plain(**kwargs)
                finally:
                    model._compiled_call_impl = observed

            runs: tuple[Callable[..., Any], ...] = (as_it_is, model)
            for _ in range(calls):
                for run, found in zip(runs, times, strict=True):
                    start = time.perf_counter()
                    run(**arguments)
                    found.append(time.perf_counter() - start)
    ratios = [b / a for a, b in zip(*times, strict=True)]
    return statistics.median(times[0]), statistics.median(times[1]), ratios


def _print(name: str, result: tuple[float, float, list[float]]) -> None:
    plain, observed, ratios = result
    print(
        f"{name}: {1e3 * plain:.1f} ms plain, {1e3 * observed:.1f} ms observed, ratio {statistics.median(ratios):.2f} "
        f"(middle half {statistics.quantiles(ratios, n=4)[0]:.2f} to {statistics.quantiles(ratios, n=4)[2]:.2f})"
    )


def main() -> None:
    """Measure and print."""
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        tiny = load_pipeline(settings.PIPELINE_DIR, dtype, "cpu").transformer
        arguments = {
            "hidden_states": torch.randn(1, 16, 5, 8, 8, generator=generator).to(dtype),
            "timestep": torch.tensor([900]),
            "encoder_hidden_states": torch.randn(1, 16, 64, generator=generator).to(dtype),
            "return_dict": False,
        }
        _print(f"tiny Wan2.2, {dtype}, one call", cost(tiny, arguments, 60))
        torch._dynamo.reset()
    block = WanTransformer3DModel(num_layers=1, ffn_dim=13824).eval()
    wide = {
        "hidden_states": torch.randn(1, 16, 1, 32, 32, generator=generator),
        "timestep": torch.tensor([900]),
        "encoder_hidden_states": torch.randn(1, 512, 4096, generator=generator),
        "return_dict": False,
    }
    _print("one block of Wan2.2 A14B, 256 tokens, float32", cost(block, wide, 7))
    rows = torch.randn(2048, 1024, generator=generator)
    weight, moments, times = torch.randn(5120, 1024, generator=generator), rows.T @ rows / len(rows), []
    for _ in range(5):
        start = time.perf_counter()
        reconstruct(weight, moments)
        times.append(time.perf_counter() - start)
    parts = 40 * (8 * 5 + 2 * 13.5)  # of an expert: 8 weights of 5120 x 5120 and 2 of 13824 x 5120 a block
    seconds = statistics.median(times)
    print(f"reconstruction of [5120, 1024]: {seconds:.2f} s ({min(times):.2f} to {max(times):.2f})")
    print(f"all {parts:.0f} such parts of an expert of A14B: {parts * seconds / 60:.0f} minutes")


if __name__ == "__main__":
    main()
