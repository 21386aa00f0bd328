"""Let units of an activation and its weights share their level-1 scales, or round their elements in another way."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass

from torch import fx

from ..format.spans import alone, joined, parted, span_name, units_of
from ..model.parts import part_of
from ..pipeline.activations import Activation, activations, bits_of, form_of, quantization_of
from ..pipeline.base import Pass, PassResult
from ..pipeline.context import Context, decisions_of
from ..pipeline.rules import OVERRULED, span_obstacle, with_span
from ..weights.held import packed_products

log = logging.getLogger(__name__)


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

    A kernel may then add the products of a row as integers, and scale them once. The option
    ``rounding="bfloat16_half_away"`` is written with the span, as 8 more. What a recipe says about an activation
    comes before the option, and so does how a model's own weights were packed. A span is refused, with a reason in the
    plan, where there is neither mask nor rotation, where the activation has other than 4 bits, and where a rank holds a
    part of K.
    """

    after = ("share", "smooth", "rotate")

    def __call__(self, graph_module: fx.GraphModule, context: Context) -> PassResult:
        """Rewrite in place."""
        spans: Counter[int | str] = Counter()
        roundings: Counter[str] = Counter()
        asked = joined(context.options.scale_span, context.options.rounding)
        quantizations = {quantization_of(product): None for product in packed_products(graph_module.graph)}
        held = [form_of(node) for node in quantizations if node is not None and bits_of(node) == 4]
        changed, overruled = False, sum(asked not in (1, form) for form in held)
        for activation in activations(graph_module.graph):
            recipe = activation.attached(context)
            form = recipe.span if recipe is not None else asked
            overruled += recipe is not None and asked not in (1, form)
            wanted, rounding = parted(form)
            obstacle = _obstacle(activation, context) if wanted != 1 else None
            form = form if obstacle is None else alone(form)
            for product in activation.products:
                for decision in decisions_of(product):
                    decision.span, decision.rounding = parted(form)
                    decision.reason = with_span(decision.reason, wanted, obstacle)
            if form == 1:
                continue
            _share(activation, form)
            context.matched(activation.node)
            changed = True
            if units_of(form) != 1:
                spans[span_name(wanted)] += 1
            roundings[rounding] += rounding != "half_away"
        if overruled:
            context.note(f"{overruled} activations {OVERRULED}")
            log.warning("%d activations %s", overruled, OVERRULED)
        for span, count in spans.items():
            units = "row" if span == "row" else f"{span} units"
            context.note(f"{count} activations with a level-1 scale for each {units}")
        for rounding, count in (+roundings).items():
            context.note(f"{count} activations with the rounding {rounding!r}")
        return PassResult(graph_module, changed)


def _obstacle(activation: Activation, context: Context) -> str | None:
    parts = [part_of(context.inputs[index]) for index in activation.weights]
    if any(part is not None and part.axis == 1 for part in parts):
        return "a rank holds a part of the input features"
    how = activation.weight()
    return span_obstacle(bits_of(activation.node), how.masked, how.hadamard_block)


def _share(activation: Activation, form: int) -> None:
    activation.change(span=form)
    node = activation.node
    if bits_of(node) == 4:
        node.args = (*node.args[:3], 4, form)
    if (span := units_of(form)) != 1:
        for product in activation.products:
            product.args = (*product.args[:6], span)
