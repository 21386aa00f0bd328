"""What a captured graph was made for is checked when it is captured and when it is called."""

from __future__ import annotations

import contextlib

import pytest
import torch
from helpers import GRAPH
from torch import nn

import tahf4_compiler as tahf4
from tahf4_compiler.graph_capture.export import _check_arguments, capture_program


class Counts(nn.Module):
    """Counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.add_(1)
        return x + self.calls


def test_a_program_that_gives_back_what_it_writes_to_buffers_is_refused() -> None:
    program = torch.export.export(Counts(), (torch.ones(2),)).run_decompositions()
    with pytest.raises(tahf4.CaptureError, match="what it writes to its buffers or inputs"):
        capture_program(program)


@pytest.mark.parametrize(
    "other",
    [torch.ones(5, 64), torch.ones(4, 64, dtype=torch.float64), torch.ones(4), torch.ones(4, 64, device="meta")],
    ids=["rows", "dtype", "axes", "device"],
)
def test_an_argument_of_another_kind_than_captured_is_refused(other: torch.Tensor) -> None:
    lowered = tahf4.lower(tahf4.capture(nn.Sequential(nn.Linear(64, 64)).eval(), (torch.ones(4, 64),)))
    with pytest.raises(tahf4.CaptureError, match="the graph was captured for"):
        lowered(other)


@pytest.mark.parametrize(
    ("captured", "given", "refused"),
    [(0.0, 0.0, False), (0.0, -0.0, True), (0.0, 0, True), (float("nan"), float("nan"), False), ("a", "b", True)],
)
def test_a_number_is_a_constant_of_the_graph_with_its_sign_and_its_type(captured, given, refused) -> None:
    node = torch.fx.Graph().placeholder("number")
    node.meta["val"] = captured
    raised = pytest.raises(tahf4.CaptureError, match="a constant of the graph")
    with raised if refused else contextlib.nullcontext():
        _check_arguments([given], [node], [captured], {})


class Sum(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + y


@pytest.mark.parametrize(
    ("rows", "refused"),
    [((2, 2), False), ((8, 8), False), ((2, 4), True), ((1, 1), True), ((9, 9), True)],
)
def test_sizes_of_one_dynamic_axis_are_equal_and_in_its_range(rows: tuple[int, int], refused: bool) -> None:
    axis = {0: torch.export.Dim("rows", min=2, max=8)}
    lowered = tahf4.lower(
        tahf4.capture(Sum(), (torch.ones(4, 3), torch.ones(4, 3)), dynamic_shapes={"x": axis, "y": axis})
    )
    given = [torch.ones(count, 3) for count in rows]
    if not refused:
        torch.testing.assert_close(lowered(*given), given[0] * 2)
        given = [value.double() for value in given]
    with pytest.raises(tahf4.CaptureError, match="the graph was captured for"):
        lowered(*given)


def test_weights_without_a_version_counter_are_read_under_the_version_check() -> None:
    with torch.inference_mode():
        model, x = nn.Linear(64, 64), torch.ones(4, 64)
        lowered = torch.compile(model, backend="tahf4", options={**GRAPH, "weight_check": "version"})
        first = lowered(x).clone()
        model.weight.mul_(2)
        assert not torch.allclose(lowered(x), first), "the change was not seen"
