"""A part of a model is packed: the rest of it compiles as in any model, and what the part left stays left."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from helpers import relative
from models import Stack
from torch import Tensor, nn

import tahf4_compiler as tahf4
from tahf4_compiler.model.attachments import attached, changes, refresh

OPTIONS = {"inductor": False}


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def compiled(model: nn.Module):
    return torch.compile(model, backend="tahf4", options=OPTIONS)


@pytest.mark.parametrize("part", ["blocks.0", "blocks.1.ff"])
def test_what_is_not_packed_runs_in_4_bits_where_the_whole_is_compiled(part, caplog):
    model, x = Stack().eval(), torch.randn(4, 64)
    for block in model.blocks:
        block.ff = nn.ModuleList([block.up])  # a part of a block that can be packed alone
    whole = copy.deepcopy(model)
    tahf4.quantize_(whole)
    want, plain = whole(x), model(x)
    tahf4.quantize_(model.get_submodule(part))
    call = compiled(model)
    for _ in range(3):
        assert relative(call(x), want) < 1e-5 < relative(want, plain)
    assert "high precision" not in caplog.text


def test_what_comes_to_a_packed_model_later_is_compiled_as_in_any_model():
    model, x = Stack().eval(), torch.randn(4, 64)
    tahf4.quantize_(model)
    model.blocks[1] = Stack().blocks[0]
    whole = copy.deepcopy(model)
    tahf4.quantize_(whole)
    assert relative(compiled(model)(x), whole(x)) < 1e-5 < relative(model(x), whole(x))


class Matrices(nn.Module):
    """Blocks with a matrix that is no weight of an ``nn.Linear``."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)
        self.w = nn.Parameter(torch.randn(64, 64) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + nn.functional.linear(self.down(self.up(x).relu()), self.w)


@pytest.mark.parametrize("loaded", [False, True])
def test_what_quantize_left_stays_as_it_is_in_a_compiled_model(loaded):
    model, x = nn.Sequential(*(nn.Sequential(Matrices()) for _ in range(3))).eval(), torch.randn(4, 64)
    tahf4.quantize_(model, keep=[r"^2\."])
    if loaded:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        model = torch.load(file, weights_only=False)
    assert relative(compiled(model)(x), model(x)) < 1e-5


@pytest.mark.parametrize("way", ["saved", "unflattened"])
def test_what_quantize_left_stays_as_it_is_in_an_exported_program(way):
    model, x = Stack().eval().requires_grad_(False), torch.randn(4, 64)
    tahf4.quantize_(model, keep=[r"blocks\.1\."])
    program = torch.export.export(model, (x,))
    if way == "saved":
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        loaded = torch.export.load(file).module()
    else:
        loaded = torch.export.unflatten(program)
    assert relative(compiled(loaded)(x), model(x)) < 1e-5


def test_a_matrix_that_an_embedding_reads_too_has_one_decision():
    model = Stack().eval()
    model.table = nn.Embedding(64, 64)
    model.table.weight = model.last.weight
    tahf4.quantize_(model)
    before = changes()
    for _ in range(2):
        refresh(model)
    assert changes() == before and attached(model.last.weight).reason.startswith("weight: Embedding table")
