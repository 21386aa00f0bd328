"""What joins through entry points: the passes, kernels and pages that ship here, and those of other packages.

The core names none of them. Each group is read once in a process; what this distribution brings comes first.
"""

from __future__ import annotations

import functools
import importlib.metadata
from typing import Any

from ..errors import PipelineError

__all__ = ["KERNELS", "PASSES", "PIPELINES", "REPORTS", "load"]

PASSES = "tahf4.passes"
"""Passes that join the default pipeline: a class, or a list of classes."""

PIPELINES = "tahf4.pipelines"
"""Whole pipelines by name: a list of classes."""

KERNELS = "tahf4.kernels"
"""Functions without arguments that register kernels (:func:`tahf4_compiler.register_kernel`)."""

REPORTS = "tahf4.reports"
"""Functions by kind of file that write a report: ``(lowered, path, recipe, calibration)``."""


@functools.cache
def load(group: str) -> dict[str, Any]:
    """Return what the installed packages bring to a group, by name.

    Raises:
        PipelineError: one cannot be imported.
    """
    points = importlib.metadata.entry_points(group=group)
    found: dict[str, Any] = {}
    for point in sorted(points, key=lambda p: not p.value.startswith("tahf4_compiler.")):
        try:
            found.setdefault(point.name, point.load())
        except Exception as error:
            raise PipelineError(
                f"the plug-in {point.name!r} of {group!r} ({point.value}) failed to load: {error}. Mend it or "
                "uninstall it."
            ) from error
    return found
