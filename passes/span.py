"""Let units of an activation and its weights share their level-1 scales."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import fx

from ..format.spans import span_name
from ..model.parts import part_of
from ..pipeline.activations import Activation, activations, bits_of
from ..pipeline.base import Pass, PassResult
from ..pipeline.context import Context, decisions_of
from ..pipeline.rules import span_obstacle, with_span


@dataclass(frozen=True)
class Span(Pass):
    """Give activations and the weights that read them a level-1 scale for several units of a row.

    Before::

        codes, scales = tahf4.quantize(x, multiplier, 64)
        y = tahf4.linear(codes, scales, w_codes, w_scales, bias, dtype)

    After, with the option ``scale_span="row"`` (``w_codes`` and ``w_scales`` now hold the weight with one level-1 scale
    for each row, and 0 stands for a row)::

        codes, scales = tahf4.quantize(x, multiplier, 64, 4, 0)
        y = tahf4.linear(codes, scales, w_codes, w_scales, bias, dtype, 0)

    A kernel may then add the products of a row as integers, and scale them once. What a recipe says about an activation
    comes before the option. A span is refused, with a reason in the plan, where there is neither mask nor rotation,
    where the activation has other than 4 bits, and where a rank holds a part of K.
    """

    after = ("share", "smooth", "rotate")

    def __call__(self, graph_module: fx.GraphModule, context: Context) -> PassResult:
        """Rewrite in place."""
        spans: Counter[int | str] = Counter()
        for activation in activations(graph_module.graph):
            recipe = activation.attached(context)
            wanted = recipe.span if recipe is not None else context.options.scale_span
            if wanted == 1:
                continue
            obstacle = _obstacle(activation, context)
            for product in activation.products:
                for decision in decisions_of(product):
                    decision.span = wanted if obstacle is None else 1
                    decision.reason = with_span(decision.reason, wanted, obstacle)
            if obstacle is None:
                _share(activation, wanted)
                context.matched(activation.node)
                spans[span_name(wanted)] += 1
        for span, count in spans.items():
            units = "row" if span == "row" else f"{span} units"
            context.note(f"{count} activations with a level-1 scale for each {units}")
        return PassResult(graph_module, bool(spans))


def _obstacle(activation: Activation, context: Context) -> str | None:
    parts = [part_of(context.inputs[index]) for index in activation.weights]
    if any(part is not None and part.axis == 1 for part in parts):
        return "a rank holds a part of the input features"
    how = activation.weight()
    return span_obstacle(bits_of(activation.node), how.masked, how.hadamard_block)


def _share(activation: Activation, span: int) -> None:
    activation.change(span=span)
    node = activation.node
    node.args = (*node.args[:3], bits_of(node), span)
    for product in activation.products:
        product.args = (*product.args[:6], span)
