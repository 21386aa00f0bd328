"""What the compiler decided for each expert, read from the plans that it dumped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from .errors import CommandError

__all__ = ["ExpertPlan", "count_graphs", "expert_plan", "read_plans"]


@dataclass(frozen=True)
class ExpertPlan:
    """The linears of one expert.

    Attributes:
        name: of the expert in the pipeline.
        linears: entries of ``plan.json``, one for each weight of this expert.
    """

    name: str
    linears: list[dict[str, Any]]

    def quantized(self) -> list[dict[str, Any]]:
        """Return the linears in HiF4."""
        return [linear for linear in self.linears if linear["decision"] != "high_precision"]

    def kernels(self) -> set[str]:
        """Return the names of the kernels that run the linears in HiF4."""
        return {linear["kernel"] for linear in self.quantized()}

    def as_json(self) -> dict[str, Any]:
        """Return the counts, the bytes and the linears in high precision with their reasons."""
        kept = [linear for linear in self.linears if linear["decision"] == "high_precision"]
        return {
            "name": self.name,
            "linears": len(self.linears),
            "quantized": len(self.quantized()),
            "bytes_before": sum(linear["bytes_before"] for linear in self.linears),
            "bytes_after": sum(linear["bytes_after"] for linear in self.linears),
            "high_precision": {linear["module"]: linear["reason"] for linear in kept},
        }


def count_graphs(dumps: Path) -> int:
    """Return how many graphs were compiled."""
    return sum(1 for _ in dumps.glob("graph_*"))


def read_plans(dumps: Path) -> list[dict[str, Any]]:
    """Return the plans of all compiled graphs as one list.

    Raises:
        CommandError: nothing was compiled.
    """
    paths = sorted(dumps.glob("graph_*/plan.json"))
    if not paths:
        raise CommandError(
            "no graph was compiled, so nothing ran in 4 bits. Is torch.compile switched off "
            "(TORCH_COMPILE_DISABLE, TORCHDYNAMO_DISABLE)?"
        )
    return [linear for path in paths for linear in json.loads(path.read_text(encoding="utf-8"))]


def expert_plan(name: str, module: nn.Module, plans: list[dict[str, Any]]) -> ExpertPlan:
    """Return what the plans say about the weights of one expert.

    A graph that serves two experts counts for each, since each has weights of its own; a weight that is in
    several graphs (compiled again for another shape) counts once.

    Args:
        name: of the expert.
        module: the expert.
        plans: of all compiled graphs.
    """
    parameters = dict(module.named_parameters(remove_duplicate=False))
    mine = (entry for entry in plans if _shape(entry, parameters) == (entry["n"], entry["k"]))
    return ExpertPlan(name, list({entry["module"]: entry for entry in mine}.values()))


def _shape(entry: Mapping[str, Any], parameters: Mapping[str, nn.Parameter]) -> tuple[int, ...] | None:
    parameter = parameters.get(f"{entry['module']}.weight", parameters.get(entry["module"]))
    return None if parameter is None else tuple(parameter.shape)
