"""Rotate activations and weights by a block Hadamard matrix with random signs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import fx

from ..errors import OptionError
from ..format.transforms import SEED, hadamard_block
from ..graph.nodes import size_hint
from ..pipeline.activations import activations
from ..pipeline.base import Pass, PassResult
from ..pipeline.context import Context


@dataclass(frozen=True)
class Rotate(Pass):
    """Spread outliers over a block of channels. Needs no data.

    Before::

        codes, scales = tahf4.quantize(x, multiplier)

    After (``multiplier`` is one of the graph's inputs, with the random signs folded in; the packed weights hold
    the weight rotated the same way)::

        codes, scales = tahf4.quantize(x, multiplier, 64)

    The signs are the same for every weight, so that its packed form does not depend on the graph. A recipe's own
    rotation comes first.

    Attributes:
        block: width of the Hadamard blocks, a power of two; the widest up to it that divides K (rounded up to
            whole units of 64) is taken. 0 for no rotation.
    """

    after = ("share", "smooth")
    block: int = 64

    def __call__(self, graph_module: fx.GraphModule, context: Context) -> PassResult:
        """Rewrite in place."""
        if self.block < 0 or self.block & (self.block - 1):
            raise OptionError(f"option rotate.block is {self.block}; expected a power of two, or 0 for no rotation")
        widths: Counter[int] = Counter()
        for activation in activations(graph_module.graph):
            recipe = activation.attached(context)
            if recipe is not None:
                block = recipe.hadamard_block
            else:
                block = hadamard_block(size_hint(activation.node.args[0].meta["val"].shape[-1]), self.block)  # type: ignore[union-attr]
            if not block:
                continue
            activation.change(seed=SEED, hadamard_block=block)
            activation.multiply()
            activation.node.update_arg(2, block)
            context.matched(activation.node)
            widths[block] += 1
        for width, count in sorted(widths.items()):
            context.note(f"{count} activations in Hadamard blocks of {width}")
        return PassResult(graph_module, bool(widths))
