"""What linears read while a pipeline generates, sampled."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["channel_ratios", "sampled_inputs"]


def channel_ratios(rows: Tensor) -> tuple[float, float]:
    """Describe the outliers of an activation.

    Args:
        rows: ``[R, K]`` of a floating-point type.

    Returns:
        The largest over the median of the channels' maxima of ``|x|``; and the largest, over channels, of the maximum
        over the 99.9th percentile of ``|x|`` (which counts as at least a hundredth of the median maximum: units
        behind a GELU are zero on most tokens).
    """
    amax, high = maximum_and_percentile(rows)
    typical = amax.median().clamp(min=1e-30)
    return float(amax.max() / typical), float((amax / high.clamp(min=0.01 * typical)).max())


@contextmanager
def sampled_inputs(
    models: Mapping[str, nn.Module], *, rows_per_call: int = 4096
) -> Iterator[dict[str, dict[str, Tensor]]]:
    """Collect what the linears of blocks read, while the context is open.

    Args:
        models: name -> module with ``blocks``, not compiled.
        rows_per_call: rows that are kept of each call, evenly spread; every row if there are no more.

    Yields:
        name -> module path -> float32 ``[R, K]`` on the CPU, filled in when the context closes. Of linears
        that read one tensor only ``to_q`` (or ``to_k`` of a cross-attention) is kept.
    """
    found: dict[str, dict[str, Tensor]] = {name: {} for name in models}
    parts: dict[tuple[str, str], list[Tensor]] = {}
    handles = []

    def listener(key: tuple[str, str]) -> Callable[[nn.Module, Any], None]:
        def listen(module: nn.Module, inputs: Any) -> None:
            rows = inputs[0].detach().flatten(0, -2)
            step = -(-len(rows) // rows_per_call)
            parts.setdefault(key, []).append(rows[::step].to("cpu", torch.float32, copy=True))

        return listen

    for name, model in models.items():
        for path, module in model.named_modules():
            again = path.endswith((".to_v", "attn1.to_k"))
            if isinstance(module, nn.Linear) and path.startswith("blocks.") and not again:
                handles.append(module.register_forward_pre_hook(listener((name, path))))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
        for (name, path), rows in parts.items():
            found[name][path] = torch.cat(rows)


def maximum_and_percentile(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the maximum and the 99.9th percentile of ``|x|`` for each channel of ``[R, K]``: ``[K]`` each."""
    magnitude = rows.abs().to(torch.float32)
    rank = round(0.999 * (len(rows) - 1))  # of the order statistics: torch.quantile refuses large tensors
    top = magnitude.topk(len(rows) - rank, dim=0).values
    return top[0], top[-1]


def largest_of(ratios: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return max(r[0] for r in ratios), max(r[1] for r in ratios)
