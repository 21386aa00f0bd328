"""Which linears get a low-rank branch, and what it leaves of their weights."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..format import hif4
from ..format.low_rank import LowRank, leading, rank_of, remainder
from .layer import Layer
from .reconstruction import reconstructed
from .seen import Seen
from .sensitivity import output_error

__all__ = ["with_branches"]

SAVED = 0.05
"""Share of a linear's output error on sample rows that its branch must take away."""


def with_branches(
    calibration: Seen,
    layer: Layer,
    mask: Tensor | None,
    search: str,
    packed: Mapping[str, hif4.Packed],
    span: int = 1,
) -> tuple[dict[str, LowRank], dict[str, hif4.Packed], dict[str, str]]:
    """Return branches of the linears that read an activation, all packed weights, and why a linear has none.

    Without sample rows every linear gets a branch whose width allows it.

    Args:
        calibration: that has seen the model.
        layer: the activation and its weights; its choices say how wide branches are.
        mask: of the activation.
        search: how weights are rounded.
        packed: weights without branches, for ``search="reconstruct"``.
        span: a form (:mod:`tahf4_compiler.format.spans`): units that share a level-1 scale, and the rounding.
    """
    activation, percent = layer.cells.activation, layer.choices.low_rank
    assert percent is not None
    named = list(zip(activation.members, layer.weights, strict=True))
    ranks = {path: rank_of((weight.shape[0], weight.shape[1]), percent) for path, weight in named}
    refused = {path: "no low-rank branch: as wide as the weight" for path, rank in ranks.items() if not rank}
    found = {path: leading(weight, mask, ranks[path]) for path, weight in named if ranks[path]}
    if not found:
        return {}, dict(packed), refused
    rest = [remainder(weight, found.get(path)) for path, weight in named]
    again = reconstructed(calibration, layer.cells, rest, mask, layer.seed, layer.block, span) if packed else {}
    if len(layer.rows):
        errors = [
            output_error(layer.rows, layer.weights, layer.product(mask, search, parts, branches, span))
            for parts, branches in ((packed, {}), (again, found))
        ]
        for path, before, after in zip(activation.members, *errors, strict=True):
            if path in found and not after < (1 - SAVED) * before:
                del found[path]
                left = after / max(before, 1e-30)
                refused[path] = f"no low-rank branch: it leaves {left:.2f} of the output's error"
    chosen = {path: again[path] if path in found else part for path, part in packed.items()}
    branches = {path: LowRank(branch.a.cpu(), branch.b.cpu()) for path, branch in found.items()}
    return branches, chosen, refused
