"""Tokens that an attention mask hides count in no statistic and in no error."""

from __future__ import annotations

import types

import pytest
import torch
from helpers import relative
from models import Stack
from torch import nn

import tahf4_compiler as tahf4
from tahf4_compiler.calibration.padding import kept_tokens, token_mask
from tahf4_compiler.calibration.sensitivity import Network

LENGTHS = 7, 3, 12


class Encoder(Stack):
    """Reads tokens, and is told which of them count."""

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(x)


def batch() -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Return padded sequences, their mask, and the sequences alone."""
    generator = torch.Generator().manual_seed(0)
    alone = [torch.randn(1, length, 64, generator=generator) for length in LENGTHS]
    x, mask = torch.full((3, 12, 64), 50.0), torch.zeros(3, 12, dtype=torch.int64)
    for row, part in enumerate(alone):
        x[row, : part.shape[1]], mask[row, : part.shape[1]] = part[0], 1
    return x, mask, alone


@pytest.mark.parametrize("named", [True, False])
def test_statistics_are_those_of_the_tokens_that_count(named):
    torch.manual_seed(0)
    model, (x, mask, alone) = Encoder(2).eval().requires_grad_(False), batch()
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


class Model(nn.Module):
    """Takes everything."""

    config = types.SimpleNamespace(is_encoder_decoder=False)

    def forward(self, x=None, attention_mask=None, position_ids=None, labels=None, **extra):
        return x


MASK = torch.tensor([[1, 1, 0], [1, 0, 0]])


def test_a_mask_hides_tokens_where_the_call_reads_one_sequence():
    model, x = Model(), torch.zeros(2, 3, 8)
    for args, kwargs in (
        ((x, MASK), {}),
        ((x, MASK.bool()), {}),
        ((x,), {"attention_mask": MASK.float()}),
        ((), {"attention_mask": MASK, "input_ids": MASK, "position_ids": MASK, "token_type_ids": MASK}),
        ((x, MASK), {"timestep": torch.zeros(2), "labels": None}),
    ):
        assert torch.equal(token_mask(model, args, kwargs), MASK.bool())


def test_where_it_cannot_be_told_every_token_counts():
    model, x = Model(), torch.zeros(2, 3, 8)
    decoder = Model()
    decoder.config = types.SimpleNamespace(is_encoder_decoder=True)
    for which, args, kwargs in (
        (decoder, (x, MASK), {}),
        (model, (x, MASK), {"labels": MASK}),  # a decoder may read them
        (model, (x, MASK), {"pixel_values": torch.zeros(2, 3, 4, 4)}),
        (model, (x, MASK), {"encoder_hidden_states": torch.zeros(2, 3, 8)}),
        (model, (x,), {"encoder_attention_mask": MASK}),
        (model, (x,), {"global_attention_mask": MASK}),
        (model, (torch.zeros(2, 4, 8), MASK), {}),
        (model, (torch.zeros(3, 3, 8), torch.ones(3, 3).tril()), {}),  # of pairs, or tokens first
        (model, (None, MASK), {}),
        (model, (x, torch.ones(2, 3)), {}),
        (model, (x, torch.zeros(2, 3)), {}),
        (model, (x, (1.0 - MASK) * -1e4), {}),  # that is added to scores
        (model, (x, MASK[:, None]), {}),
        (model, (x, "mask"), {}),
        (model, (x, None), {}),
        (nn.Linear(8, 8), (x, MASK), {}),  # the call itself says what is wrong
    ):
        assert token_mask(which, args, kwargs) is None, kwargs


def test_a_mask_is_that_of_tensors_of_its_batch_and_tokens():
    mask = MASK.bool()
    assert torch.equal(kept_tokens(mask, torch.zeros(2, 3, 8)), mask)
    for shape in ((2, 4, 8), (3, 2, 8), (6, 8), (2, 3), (2, 3, 4, 8)):
        assert kept_tokens(mask, torch.zeros(shape)) is None
    assert kept_tokens(None, torch.zeros(2, 3, 8)) is None


def test_an_output_that_is_zero_at_all_tokens_that_count_is_judged_whole(monkeypatch):
    torch.manual_seed(0)
    model, (x, mask, _) = Encoder(1).eval().requires_grad_(False), batch()
    network = Network(model, [((x, mask), {})])
    network._wanted[0][0][mask == 1] = 0.0
    network._wanted[0].append(torch.zeros(3, 12, 64))  # of which no error is relative
    monkeypatch.setattr(Network, "_outputs", lambda self: [[network._wanted[0][0] * 2, torch.ones(3, 12, 64)]])
    assert network.errors({}) == [1.0]
