"""What many tests need: the plan of a compilation, and the same model with fake-quantized linears."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tahf4_compiler.backends import dynamo
from torch import Tensor, nn

from tahf4_compiler.format import hif4
from tahf4_compiler.reporting.report import plan_json

GRAPH = {"inductor": False, "rotate.block": 0}
"""Options that run the lowered graph as it is, without a rotation: what ``expected`` computes, before Inductor."""


def said(caplog: Any, module: str = "backends.messages") -> list[str]:
    """Return what a module of the package logged."""
    return [record.getMessage() for record in caplog.records if record.name == f"tahf4_compiler.{module}"]


def warned(caplog: Any) -> list[str]:
    """Return what any module of the package warned of."""
    own = [record for record in caplog.records if record.name.startswith("tahf4_compiler.")]
    return [record.getMessage() for record in own if record.levelno >= logging.WARNING]


def by_turns(names: str, cases: Iterable[Any], ids: list[str] | None = None) -> Any:
    """Run a test for each case compiled whole or in place, by turns; the other way is a slow test."""
    turns = [
        pytest.param(*(case if "," in names else (case,)), whole, marks=() if (i + whole) % 2 else pytest.mark.slow,
                     id=f"{ids[i] if ids else getattr(case, '__name__', case)}-{whole}")
        for i, case in enumerate(cases)
        for whole in (False, True)
    ]  # fmt: skip
    return pytest.mark.parametrize(f"{names}, whole", turns)


class FakeLinear(nn.Module):
    """The meaning of a W4A4 linear, written without the compiler."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        left = hif4.dequantize(hif4.quantize(x), torch.float64)
        right = hif4.dequantize(hif4.quantize(self.weight.detach()), torch.float64)
        bias = None if self.bias is None else self.bias.double()
        return nn.functional.linear(left, right, bias).to(x.dtype)


def compiled(model: nn.Module, whole: bool, **options: Any) -> Any:
    """Compile a model with tahf4, whole or in place; options are those of the backend, graphs run without Inductor."""
    if whole:
        return torch.compile(model, backend="tahf4", options={**GRAPH, **options})
    model.compile(backend="tahf4", options={**GRAPH, **options})
    return model


def expected(model: nn.Module, quantized: Iterable[str]) -> nn.Module:
    """Return a copy of a model whose named linears are W4A4 by definition, in eager mode."""
    model = copy.deepcopy(model)
    for path in quantized:
        parent, _, leaf = path.rpartition(".")
        linear = model.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        setattr(model.get_submodule(parent), leaf, FakeLinear(linear))
    return model


def block_linears(model: nn.Module, container: str = "blocks") -> list[str]:
    """Return the paths of the linears inside a container."""
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith(f"{container}.")]


def plans(dump_dir: Path) -> list[list[dict[str, Any]]]:
    """Return the plan of every graph dumped to a folder, in run order."""
    return [json.loads((folder / "plan.json").read_text()) for folder in sorted(dump_dir.iterdir())]


@contextlib.contextmanager
def planned() -> Iterator[list[list[dict[str, Any]]]]:
    """Yield the plans of the graphs that are compiled inside, in run order: a dump of them takes longer to write."""
    found, real = [], dynamo.lower_graph

    def lower_graph(*args: Any) -> Any:
        lowered = real(*args)
        found.append(json.loads(plan_json(lowered.plan)))
        return lowered

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamo, "lower_graph", lower_graph)
        yield found


def relative(value: Tensor, reference: Tensor) -> float:
    """Return the relative error of a tensor."""
    return ((value.double() - reference.double()).norm() / reference.double().norm()).item()
