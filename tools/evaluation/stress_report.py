"""What the stress variant has changed, as numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["SiteReport", "StressReport"]


@dataclass(frozen=True)
class SiteReport:
    """What was done to one activation.

    Attributes:
        site: name of the table above, with the block where each block has its own channels.
        readers: paths of the linears that read it.
        outliers: channel -> factor, large on every token. For ``hidden``, the new units and the magnitude
            that they have on a typical token, over that of the old units.
        spikes: channel -> factor, those of the longest tail. For ``hidden``, the new units and their
            largest magnitude over that of the old units.
        before: :func:`channel_ratios` of the samples, or None without samples.
        after: the same afterwards, computed from the samples.
    """

    site: str
    readers: tuple[str, ...]
    outliers: Mapping[int, float]
    spikes: Mapping[int, float]
    before: tuple[float, float] | None = None
    after: tuple[float, float] | None = None

    def __str__(self) -> str:
        """Return one line."""

        def listed(factors: Mapping[int, float]) -> str:
            shown = " ".join(f"{c}x{factor:.3g}" for c, factor in sorted(factors.items())[:6])
            return f"{len(factors)} [{shown}{' ...' if len(factors) > 6 else ''}]"

        line = f"{self.site:18} outliers {listed(self.outliers)}, spikes {listed(self.spikes)}"
        if self.before is not None and self.after is not None:
            line += f"; max/median {self.before[0]:.1f} -> {self.after[0]:.1f}"
            line += f", max/p99.9 {self.before[1]:.1f} -> {self.after[1]:.1f}"
        return line


@dataclass(frozen=True)
class StressReport:
    """What :func:`stress_` did.

    Attributes:
        seed: of the channels and factors.
        sites: one an activation; the norms and the text embedding, whose channels all blocks share, once.
    """

    seed: int
    sites: tuple[SiteReport, ...]

    def __str__(self) -> str:
        """Return a line for each site."""
        return "\n".join([f"seed {self.seed}", *(str(site) for site in self.sites)])
