"""Choose the scales of packed weights by squared error."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from ..errors import OptionError
from ..pipeline.activations import activations
from ..pipeline.base import Pass, PassResult
from ..pipeline.context import Context

SEARCHES = ("", "squared", "weighted")


@dataclass(frozen=True)
class ScaleSearch(Pass):
    """Pack weights with the scales of least squared error, not those of the largest magnitude.

    The graph's operators stay; its packed inputs hold other codes and scales. The search runs once, when a
    weight is packed (:func:`tahf4_compiler.format.scale_search.search_scales`); activations are not searched.

    Attributes:
        by: ``"squared"``, ``"weighted"`` (by the second moment of the activation's channels, where a recipe
            holds it) or ``""`` for no search. What a recipe says comes first.
    """

    after = ("share", "smooth", "rotate")
    by: str = ""

    def __call__(self, graph_module: fx.GraphModule, context: Context) -> PassResult:
        """Rewrite in place."""
        if self.by not in SEARCHES:
            raise OptionError(f"option scale_search.by is {self.by!r}; expected one of {SEARCHES}")
        before = context.matches
        for activation in activations(graph_module.graph):
            recipe = activation.attached(context)
            search = recipe.search if recipe is not None else self.by
            if search:
                activation.change(search=search)
                context.matched(activation.node)
        return PassResult(graph_module, context.matches > before)
