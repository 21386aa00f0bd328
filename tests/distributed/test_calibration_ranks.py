"""Ranks that divide prompts, inputs or sequences calibrate what one process does."""

from __future__ import annotations

import hashlib

import pytest
import torch
from models import Stack
from ranks import run
from torch import nn

import tahf4_compiler as tahf4
from tahf4_compiler.distributed.exchange import Exchange

GRAPH = {"inductor": False}
PROMPTS = ["a", "bb", "ccc", "dddd", "eeeee"]


class Pipe:
    """A pipeline of one model, that names guidance branches and takes some steps more for longer prompts."""

    def __init__(self):
        torch.manual_seed(0)
        self.transformer = Stack(2).eval()
        self.branch = None

    def __call__(self, prompt, generator=None):
        x = torch.randn(2, 8, 64, generator=generator)
        for i in range(2 + len(prompt) % 2):
            with self.calibration.at(branch="cond"):
                self.transformer(x + i)
            with self.calibration.at(branch="uncond"):
                self.transformer(x * 2 - i)


def one_process(tmp, **choices):
    pipe = Pipe()
    with tahf4.calibrate(pipe, rows=16, options=GRAPH) as calibration:
        pipe.calibration = calibration
        calibration.run(PROMPTS)
    return calibration, saved(calibration, tmp / "one", **choices)


def saved(calibration, path, **choices):
    # Moments are added in another order, so that reconstructed weights are not those of one process bit for bit.
    calibration.recipe(**{"scale_search": "squared", **choices}).save(path)
    return path.read_bytes()


def divided_prompts(rank, size, tmp):
    from torch.distributed.device_mesh import init_device_mesh

    tmp = tmp / str(rank)
    tmp.mkdir()
    group = init_device_mesh("cpu", (size,)).get_group()
    pipe = Pipe()
    with tahf4.calibrate(pipe, rows=16, options=GRAPH) as calibration:
        pipe.calibration = calibration
        calibration.run(PROMPTS, group=group)
    assert calibration.prompts == PROMPTS
    found = saved(calibration, tmp / "many")
    if rank == 0:  # all ranks have the same, so one comparison will do
        one, wanted = one_process(tmp)
        assert len(one.kept.calls["transformer"]) < sum(2 * (2 + len(p) % 2) for p in PROMPTS)  # some had to go
        assert found == wanted
    digest = torch.tensor(list(hashlib.sha256(found).digest()))
    assert all(torch.equal(digest, other) for other in Exchange(group).gather(digest))
    with pytest.raises(tahf4.CalibrationError, match="would count again"):
        calibration.all_reduce(group)
    other = tahf4.calibrate(pipe, options=GRAPH)
    with pytest.raises(tahf4.CalibrationError, match="different prompts"), other:
        other.run(PROMPTS[rank:], group=group)


def divided_inputs(rank, size, tmp):
    x = torch.randn(6, 10, 64)
    x[:, :, 3] *= 30
    model = Stack(2).eval()
    with tahf4.calibrate(model, rows=16, options=GRAPH) as one:
        for i, rows in enumerate(x):
            with one.at(source=str(i)):
                model(rows)
    for order in (list(range(6))[rank::size], list(range(6))[::-1][rank::size]):  # another rank, another order
        with tahf4.calibrate(model, rows=16, options=GRAPH) as many:
            for i in order:
                with many.at(source=str(i)):
                    model(x[i])
        many.all_reduce()
        for key, cells in one.activations.items():
            (sketch, sample), (mine, rows) = cells.cells[(0, "")], many.activations[key].cells[(0, "")]
            assert torch.equal(sketch.counts, mine.counts)
            assert torch.equal(sketch.maxima, mine.maxima)
            assert torch.allclose(sketch.squares, mine.squares, rtol=1e-14)
            assert (sketch.rows, int(sketch.nonfinite)) == (mine.rows, int(mine.nonfinite))
            assert torch.equal(sample.rows, rows.rows)
        same = {"mask": "layer_search", "scale_search": "weighted"}
        tmp_one, tmp_many = tmp / f"one{rank}", tmp / f"many{rank}"
        assert saved(one, tmp_one, **same) == saved(many, tmp_many, **same)
    with tahf4.calibrate(model, options=GRAPH) as empty:
        model(x[0] * (float("nan") if rank else 1))
    empty.all_reduce()
    with pytest.raises(tahf4.CalibrationError, match="NaN or infinite"):  # on the rank that saw none as well
        empty.recipe(mask="max")


class Reader(nn.Module):
    """A block that reads a sequence, and a text that no rank divides."""

    def __init__(self):
        super().__init__()
        self.up, self.text = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x, text):
        return x + torch.tanh(self.up(x)) + self.text(text).mean(-2, keepdim=True)


class Attentive(nn.Module):
    """Two of them."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Reader() for _ in "ab")

    def forward(self, x, text):
        for block in self.blocks:
            x = block(x, text)
        return x


def divided_sequence(rank, size, tmp):
    import torch.distributed as dist

    model = Attentive().eval()
    x, text = torch.randn(3, 2, 4 * size, 64), torch.randn(3, 2, 5, 64)
    found = []
    for group in (None, dist.group.WORLD):
        with tahf4.calibrate(model, rows=8, options=GRAPH, sequence_group=group) as calibration:
            for a, b in zip(x, text, strict=True):
                model(a if group is None else a.chunk(size, 1)[rank], b)
        found.append(calibration)
    found[1].all_reduce(over="sequence")
    for name in ("blocks.0.up", "blocks.1.up", "blocks.0.text"):
        sketches = [calibration.sketch(name) for calibration in found]
        assert sketches[0].rows == sketches[1].rows
        assert torch.equal(sketches[0].counts, sketches[1].counts)
        samples = [c.activations[("", name)].cells[(0, "")][1] for c in found]
        assert torch.equal(samples[0].priorities, samples[1].priorities)
        assert torch.allclose(samples[0].rows, samples[1].rows)
    choices = {"mask": "percentile", "scale_search": "weighted"}
    recipes = [calibration.recipe(**choices).experts[""] for calibration in found]
    for name, entry in recipes[0].items():
        assert torch.equal(entry.mask, recipes[1][name].mask)
        assert torch.equal(entry.second_moment, recipes[1][name].second_moment)


def tensors_of_any_kind(rank, size, tmp):
    half = torch.ones(2, 2).bfloat16().T
    mine = {"one": torch.tensor(rank).expand(1), "none": torch.zeros(0, 3 + rank), "half": half}
    for other, found in enumerate(Exchange().tensors(mine)):
        assert found["one"].tolist() == [other] and found["none"].shape == (0, 3 + other)
        assert torch.equal(found["half"], mine["half"])


def wrong_models(rank, size, tmp):
    model = Stack(2, 64 if rank else 128).eval()
    with tahf4.calibrate(model, options=GRAPH) as calibration:
        model(torch.randn(4, 64 if rank else 128))
    with pytest.raises(tahf4.CalibrationError, match="calibrated another model"):
        calibration.all_reduce()
    with pytest.raises(tahf4.OptionError, match="'sequence'"):
        calibration.all_reduce(over="tokens")


def everything(rank, size, tmp):
    for work in (divided_inputs, divided_sequence, tensors_of_any_kind, wrong_models, divided_prompts):
        torch.manual_seed(0)
        torch._dynamo.reset()
        work(rank, size, tmp)


@pytest.mark.slow
def test_ranks_calibrate_what_one_process_does(tmp_path):
    run(2, everything, tmp_path)


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_divide_five_prompts(ranks, tmp_path):
    run(ranks, divided_prompts, tmp_path)


def test_without_a_process_group_the_error_says_what_to_do():
    model = Stack(2).eval()
    with torch.no_grad(), tahf4.calibrate(model, options=GRAPH) as calibration:
        model(torch.randn(4, 64))
    with pytest.raises(tahf4.CalibrationError, match="torchrun"):
        calibration.all_reduce()
