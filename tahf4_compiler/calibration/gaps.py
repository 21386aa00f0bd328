"""What a calibration did not see, and values that HiF4 does not hold."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import torch

from ..format import hif4
from ..format.transforms import multipliers, transform
from ..model.linears import linear_weights
from ..packed.plan import plan_modules
from ..recipe.entries import RecipeEntry
from .seen import Seen
from .sensitivity import Network
from .sketch import LARGEST
from .statistics import Cells

__all__ = ["unseen", "warn_of_range"]

log = logging.getLogger(__name__)


def warn_of_range(cells: Cells, entry: RecipeEntry) -> None:
    """Warn of values that the statistics or HiF4 itself do not hold."""
    name, rows, mask = cells.activation.name, cells.rows(), entry.mask
    maxima = torch.stack([sketch.maxima.cpu() for sketch, _ in cells.cells.values()]).amax(0)
    if entry.percentile is not None and entry.percentile < 100 and float(maxima.max()) >= LARGEST:
        text = "%s: values up to %.3g; percentiles above %g are taken as the maximum"
        log.warning(text, name, float(maxima.max()), LARGEST)
    factors = multipliers(len(maxima), mask, entry.seed)[0]
    moved = transform(rows, None if factors is None else factors.to(rows.device), entry.hadamard_block).abs()
    # A rotation spreads a value over a block at the most, and adds up what the other channels have.
    sure = (maxima * mask if mask is not None else maxima).max() / max(1, entry.hadamard_block) ** 0.5
    reached = max(float(sure), float(moved.max()) if moved.numel() else 0.0)
    if reached > hif4.LARGEST:
        share = float((moved > hif4.LARGEST).double().mean()) if moved.numel() else 0.0
        log.warning(
            "%s: what it reads reaches %.3g after mask and rotation, and HiF4 holds no more than %d: %.2g%% of the "
            "values of %d sample rows are cut to that. Keep all that reads it in high precision (tahf4.keep).",
            name, reached, int(hif4.LARGEST), 100 * share, len(rows),
        )  # fmt: skip


def unseen(
    calibration: Seen, expert: str, entries: Mapping[str, RecipeEntry], network_of: Callable[[str], Network | None]
) -> dict[str, str]:
    """Return why linears that run in 4 bits by plan were not observed, by path, and warn of them.

    Args:
        calibration: that has seen the model.
        expert: which model.
        entries: of its recipe.
        network_of: gives an expert's outputs in the calls that were kept; None if there are none.
    """
    model = calibration.models[expert]
    planned = [d.module for d in plan_modules(model) if d.decision == "hif4"]
    known = {path for entry in entries.values() for path in entry.linears}
    weights = dict(linear_weights(model))
    observed = {id(weights[path]) for path in known if path in weights}  # several linears may share a weight
    missing = [path for path in planned if path not in known and id(weights[path]) not in observed]
    if not missing:
        return {}
    network = network_of(expert)
    run = network.read() if network is not None else set()
    called = any(expert == name for name, _ in calibration.kept.seen)

    def why(path: str) -> str:
        if path in run:
            return (
                "it runs outside of the repeated blocks of the compiled graphs: in a hook, under "
                "torch.compiler.disable, or in another frame that Dynamo skips; if a router chooses its tokens, set "
                "torch._dynamo.config.capture_dynamic_output_shape_ops = True before"
            )
        return "no call reached it" if network is not None or not called else "no call was kept that tells why"

    causes: dict[str, list[str]] = {}
    for path in missing:
        causes.setdefault(why(path), []).append(path)
    for cause, paths in causes.items():
        more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
        log.warning(
            "%s%d of %d linears that are planned for 4 bits were not observed: %s%s (%s). The recipe does not know "
            "them, so they get a rotation and no mask. Keep them in high precision (tahf4.keep), or calibrate with "
            "calls and code that show them.",
            f"{expert}: " if expert else "", len(paths), len(planned), ", ".join(paths[:3]), more, cause,
        )  # fmt: skip
    return {path: cause for cause, paths in causes.items() for path in paths}
