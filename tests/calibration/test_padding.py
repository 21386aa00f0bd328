"""Tokens that an attention mask hides count in no statistic and in no error."""

from __future__ import annotations

import pytest
import torch
from helpers import relative
from models import Stack
from torch import nn

import tahf4_compiler as tahf4
from tahf4_compiler.calibration.padding import kept_tokens, token_masks
from tahf4_compiler.calibration.sensitivity import Network

LENGTHS = 7, 3, 12


class Encoder(Stack):
    """Reads tokens, and is told which of them count."""

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(x)


class Flat(Encoder):
    """All tokens of a batch stand in one axis."""

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(x.flatten(0, 1)).view_as(x)


def batch() -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Return padded sequences, their mask, and the sequences alone."""
    generator = torch.Generator().manual_seed(0)
    alone = [torch.randn(1, length, 64, generator=generator) for length in LENGTHS]
    x, mask = torch.full((3, 12, 64), 50.0), torch.zeros(3, 12, dtype=torch.int64)
    for row, part in enumerate(alone):
        x[row, : part.shape[1]], mask[row, : part.shape[1]] = part[0], 1
    return x, mask, alone


@pytest.mark.parametrize("kind", [Encoder, Flat])
@pytest.mark.parametrize("named", [True, False])
def test_statistics_are_those_of_the_tokens_that_count(kind, named):
    torch.manual_seed(0)
    model, (x, mask, alone) = kind(2).eval().requires_grad_(False), batch()
    with torch.no_grad():
        with tahf4.calibrate(model, options={"inductor": False}) as padded:
            model(x, attention_mask=mask) if named else model(x, mask.bool())
        with tahf4.calibrate(model, options={"inductor": False}) as single:
            for part in alone:
                model(part)
    for key, cells in single.activations.items():
        want, found = single.sketch(key[1]), padded.sketch(key[1])
        assert found.rows == want.rows == sum(LENGTHS)
        assert relative(found.maxima, want.maxima) < 1e-5
        assert relative(padded.activations[key].moments.blocks[0], cells.moments.blocks[0]) < 1e-5
        rows = padded.activations[key].rows()
        assert len(rows) == sum(LENGTHS) and float(rows.abs().amax(0).sub(found.maxima).abs().max()) < 1e-5


def test_the_error_of_the_output_is_that_of_the_tokens_that_count(monkeypatch):
    torch.manual_seed(0)
    model, (x, mask, _) = Encoder(1).eval().requires_grad_(False), batch()
    network = Network(model, [((x, mask), {}), ((x,), {})])
    wanted = network._wanted[0][0]
    wrong = wanted.clone()
    wrong[mask == 0] *= 2
    monkeypatch.setattr(Network, "_outputs", lambda self: [[wrong], [wrong]])
    hidden, seen = network.errors({})
    assert hidden == 0.0 and seen > 0.1


def test_what_hides_tokens_is_told_by_its_name_and_its_values():
    mask, none = torch.tensor([[1, 1, 0], [1, 0, 0]]), torch.ones(2, 3)

    class Model(nn.Module):
        def forward(self, x, encoder_attention_mask=None, scores=None, **kwargs):
            return x

    found = token_masks(Model(), (None, mask), {"scores": mask, "encoder_hidden_states_mask": mask.float()})
    assert len(found) == 2 and all(torch.equal(each, mask.bool()) for each in found)
    others = [none, torch.zeros(2, 3), (1.0 - mask) * -1e4, mask[:, None], mask[0], "mask", None]
    assert [token_masks(Model(), (None, other), {}) for other in others] == [[]] * len(others)
    assert token_masks(Model(), (), {"wrong": 1, "attention_mask": mask})[0].dtype == torch.bool


def test_masks_of_one_shape_that_differ_hide_nothing():
    first, second = torch.tensor([[True, False]]), torch.tensor([[False, True]])
    assert kept_tokens([first, first.clone()], (1, 2)) is first and kept_tokens([first], (2,)) is first
    assert kept_tokens([first, second], (1, 2)) is None
    assert kept_tokens([first], (2, 1)) is None and kept_tokens([], (1, 2)) is None
