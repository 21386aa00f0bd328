"""Multiply an activation's channels by a mask, and divide the weights that read it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from ..pipeline.activations import activations
from ..pipeline.base import Pass, PassResult
from ..pipeline.context import Context


@dataclass(frozen=True)
class Smooth(Pass):
    """Put the channel masks of a recipe before quantization.

    Before::

        codes, scales = tahf4.quantize(x)
        y = tahf4.linear(codes, scales, w_codes, w_scales, bias, dtype)

    After (``multiplier`` is a new input; ``w_codes`` and ``w_scales`` now hold the weight divided by it)::

        codes, scales = tahf4.quantize(x, multiplier)
        y = tahf4.linear(codes, scales, w_codes, w_scales, bias, dtype)

    Masks come from calibration (``tahf4.apply_recipe``); without a recipe nothing matches.
    """

    after = ("share",)

    def __call__(self, graph_module: fx.GraphModule, context: Context) -> PassResult:
        """Rewrite in place."""
        before = context.matches
        for activation in activations(graph_module.graph):
            recipe = activation.attached(context)
            if recipe is not None and recipe.masked:
                activation.change(masked=True)
                activation.multiply()
                context.matched(activation.node)
        return PassResult(graph_module, context.matches > before)
