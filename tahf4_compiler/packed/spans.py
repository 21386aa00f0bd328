"""Whether a packed weight keeps the promise of its span."""

from __future__ import annotations

from torch import Tensor

from ..errors import PackedError
from ..format import hif4
from ..format.spans import span_name

__all__ = ["require_span"]


def require_span(scales: Tensor, span: int, where: str = "") -> None:
    """Raise :class:`PackedError` if the units of a weight do not share their level-1 scales as they should."""
    if span != 1 and not scales.is_meta and not hif4.scales_hold_span(scales, span):
        raise PackedError(
            f"a packed weight{where} has the span {span_name(span)!r}, and the level-1 scales of its units differ. It "
            "was packed otherwise, or is damaged: load it into a model that was packed as it was."
        )
