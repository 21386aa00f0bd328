"""Bits of the activations of packed linears, by the steps of a sampler."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from comfy.patcher_extension import WrappersMP

from tahf4_compiler.errors import OptionError
from tahf4_compiler.packed.convert import packed_linears

__all__ = ["set_bits"]


def set_bits(patcher: Any, bits: int, steps: Sequence[int] | None) -> None:
    """Let the packed linears of a model have activations of other bits.

    Args:
        patcher: a ``ModelPatcher`` of its own, which changes.
        bits: 8 or 16.
        steps: of the sampler that runs the model, negative ones from its end; None: all.
    """

    counts: set[int] = set()

    def call(run: Callable[..., Any], x: Any, t: Any, *args: Any, **kwargs: Any) -> Any:
        if steps is not None and not _is_in(t, _options(args, kwargs), steps, counts):
            return run(x, t, *args, **kwargs)
        linears = packed_linears(patcher.model).values()
        before = [linear.activation_bits for linear in linears]
        try:
            for linear in linears:
                linear.activation_bits = bits
            return run(x, t, *args, **kwargs)
        finally:
            for linear, own in zip(linears, before, strict=True):
                linear.activation_bits = own

    patcher.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "tahf4", call)


def _options(args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the ``transformer_options`` of a call ``apply_model(x, t, c_concat, c_crossattn, control, options)``."""
    found = args[3] if len(args) > 3 else kwargs.get("transformer_options")
    return found if isinstance(found, dict) else {}


def _is_in(t: Any, options: dict[str, Any], steps: Sequence[int], counts: set[int]) -> bool:
    """Whether a call at a time is one of these steps; say once for each number of steps which of these it has not."""
    sigmas = options.get("sample_sigmas")
    if sigmas is None:
        raise OptionError(
            "TAHF4 Activation Bits got a call that does not say which step it is (transformer_options has no "
            "sample_sigmas). Write all for its steps, or take the node off."
        )
    count = len(sigmas) - 1
    if (none := [step for step in steps if not -count <= step < count]) and count not in counts:
        shown = ", ".join(map(str, none))
        logging.warning("tahf4: TAHF4 Activation Bits: %s is no step of a sampler of %d steps", shown, count)
    counts.add(count)
    now = float(t.flatten()[0])
    # A sampler may evaluate between two steps: the step that began last.
    step = max((i for i in range(count) if float(sigmas[i]) >= now - 1e-6 * abs(now)), default=0)
    return step in {s + count if s < 0 else s for s in steps}
