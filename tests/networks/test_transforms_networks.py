"""Mask, rotation and scale search as passes: the numbers they mean, in every way of compiling."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import GRAPH, block_linears, relative
from models import Stack, output, wan
from torch import nn

import tahf4_compiler as tahf4
from tahf4_compiler.format import hif4
from tahf4_compiler.format.scale_search import search_scales
from tahf4_compiler.format.transforms import SEED, hadamard, hadamard_block, multipliers, seed_of, signs
from tahf4_compiler.model.attachments import Attachment, attach

ROTATED = {"inductor": False}
CLOSE = 1e-5


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


class Meaning(nn.Module):
    """A W4A4 linear with a transform, written without the compiler."""

    def __init__(self, linear, mask, seed, block, search):
        super().__init__()
        self.bias, self.block = linear.bias, block
        self.factors = mask * signs(seed, len(mask)) if seed is not None else mask
        weight = self.move(linear.weight.detach() / self.factors)
        self.weight = hif4.dequantize(search_scales(weight) if search else hif4.quantize(weight), torch.float64)

    def move(self, x):
        if not self.block:
            return x
        x = nn.functional.pad(x, (0, -x.shape[-1] % 64))
        return hadamard(x, self.block)

    def forward(self, x):
        x = hif4.dequantize(hif4.quantize(self.move(x * self.factors)), torch.float64)
        return nn.functional.linear(x, self.weight, self.bias.double()).float()


def meaning(model, attachments):
    model = copy.deepcopy(model)
    for path, a in attachments.items():
        parent, _, leaf = path.rpartition(".")
        linear = model.get_submodule(path)
        mask = a.mask if a.mask is not None else torch.ones(linear.in_features)
        new = Meaning(linear, mask, a.seed, a.hadamard_block, a.search)
        setattr(model.get_submodule(parent), leaf, new)
    return model


def attachments(model, *, block=64, search="squared", masked=True, seed=None):
    generator = torch.Generator().manual_seed(3)
    found = {}
    for path in block_linears(model):
        k = model.get_submodule(path).in_features
        mask = torch.rand(k, generator=generator) + 0.5 if masked else None
        own = seed_of(path) if seed is None else seed
        found[path] = Attachment("hif4", "test", masked, block, search, path, mask, own if block else None)
    return found


def test_the_default_rotates_without_data():
    model, x = Stack().eval(), torch.randn(5, 64)
    wanted = meaning(model, attachments(model, search="", masked=False, seed=SEED))
    lowered = tahf4.lower(tahf4.capture(model, (x,)))
    assert relative(lowered(x), wanted(x)) < CLOSE
    compiled = torch.compile(model, backend="tahf4", options=ROTATED)
    assert relative(compiled(x), wanted(x)) < CLOSE
    assert "quantize.default(layer_norm, " in "".join(r.readable for r in lowered.history)


@pytest.mark.parametrize(
    ("block", "search", "masked"),
    [
        *((0, "", True), (64, "", False), (64, "squared", True)),
        *(pytest.param(*it, marks=pytest.mark.slow) for it in ((0, "squared", False), (64, "squared", False))),
        *(pytest.param(*it, marks=pytest.mark.slow) for it in ((0, "squared", True), (64, "", True))),
    ],
)
def test_what_is_attached_is_computed_whole_and_by_blocks(block, search, masked):
    model, x = Stack(depth=4).eval(), torch.randn(5, 64)
    chosen = attachments(model, block=block, search=search, masked=masked)
    wanted = meaning(model, chosen)(x)
    attach(model, chosen)
    assert relative(torch.compile(model, backend="tahf4", options=ROTATED)(x), wanted) < CLOSE
    for part in model.blocks:
        part.compile(backend="tahf4", options=ROTATED, fullgraph=True)
    assert relative(model(x), wanted) < CLOSE


def test_two_models_of_one_class_keep_their_own_masks(tmp_path):
    models = [Stack().eval() for _ in range(2)]
    x = torch.randn(5, 64)
    wanted = []
    for i, model in enumerate(models):
        chosen = attachments(model)
        if i:
            chosen = {p: Attachment("hif4", "test", True, 64, "", p, 3 / a.mask, a.seed) for p, a in chosen.items()}
        attach(model, chosen)
        wanted.append(meaning(model, chosen)(x))
        model.compile(backend="tahf4", options=ROTATED)
    for _ in range(2):
        for model, want in zip(models, wanted, strict=True):
            assert relative(model(x), want) < CLOSE


def test_a_mask_that_is_replaced_is_seen_without_a_recompile(tmp_path):
    model, x = Stack().eval(), torch.randn(5, 64)
    model.compile(backend="tahf4", options={**ROTATED, "dump_dir": str(tmp_path)})
    for factor in (1.0, 3.0):
        chosen = attachments(model)
        for path, a in chosen.items():
            chosen[path] = Attachment(a.decision, a.reason, True, 64, "", path, a.mask**factor, a.seed)
        attach(model, chosen)
        assert relative(model(x), meaning(model, chosen)(x)) < CLOSE
    assert len(list(tmp_path.iterdir())) == 1


def test_a_changed_weight_is_packed_again_under_its_mask():
    model, x = Stack().eval(), torch.randn(5, 64)
    chosen = attachments(model)
    attach(model, chosen)
    model.compile(backend="tahf4", options=ROTATED)
    model(x)
    model.blocks[1].up.weight.data.mul_(1.7)
    assert relative(model(x), meaning(model, chosen)(x)) < CLOSE


def test_siblings_under_one_name_share_a_quantization_and_others_do_not():
    model, inputs = wan()
    paths = [f"blocks.0.attn1.to_{part}" for part in "qkv"]

    def lowered(names):
        mask = torch.ones(128) * 2
        pairs = zip(paths, names, strict=True)
        attach(model, {p: Attachment("hif4", "test", True, 64, "", n, mask) for p, n in pairs})
        options = {"disable_passes": ["fuse", "lower"], "keep": ["blocks.1"]}
        result = tahf4.lower(tahf4.capture(model, (), inputs), options=options)
        target = torch.ops.tahf4.quantize.default
        quantized = result.graph_module.graph.find_nodes(op="call_function", target=target)
        return len(list(quantized)), output(result(**inputs))

    together, first = lowered(["a", "a", "a"])
    apart, second = lowered(["a", "b", "b"])
    assert apart == together + 1
    assert relative(second, first) < 0.2


def test_verify_shows_what_each_transform_adds():
    model, x = Stack().eval(), torch.randn(64, 64)
    lowered = tahf4.lower(tahf4.capture(model, (x,)), options={"verify": True, "scale_search.by": "squared"})
    errors = {record.name: record.total_error for record in lowered.history}
    assert errors["plan"] == 0
    assert errors["quantize"] > 0.01
    assert 0.01 < errors["rotate"] < 0.5
    assert errors["scale_search"] != errors["rotate"]
    assert errors["lower"] == pytest.approx(errors["scale_search"], rel=1e-3)


@pytest.mark.parametrize(("k", "limit", "block"), [
    (5120, 4096, 1024), (13824, 4096, 512), (14336, 4096, 2048), (3072, 4096, 1024), (5120, 64, 64), (100, 4096, 128),
    (192, 256, 64), (64, 0, 0), (5120, 100, 64),
])
def test_the_widest_block_divides_the_padded_width(k, limit, block):
    assert hadamard_block(k, limit) == block


def test_signs_are_the_same_forever():
    assert seed_of("blocks.0.attn1.to_q") == 1524361578175648872
    assert signs(1, 16).tolist() == [1, -1, 1, 1, 1, 1, 1, 1, 1, 1, -1, 1, -1, 1, 1, -1]
    assert set(signs(7, 5120).tolist()) == {1.0, -1.0}
    assert abs(float(signs(7, 5120).mean())) < 0.05


def test_multipliers_are_inverse():
    mask = torch.rand(64) + 0.1
    forward, backward = multipliers(64, mask, 5)
    assert torch.allclose(forward * backward, torch.ones(64))
    assert multipliers(64, None, None) == (None, None)


@pytest.mark.parametrize("options", [{"rotate.block": 48}, {"rotate.block": -64}, {"scale_search.by": "cubed"}])
def test_wrong_options_are_refused(options):
    with pytest.raises(tahf4.OptionError, match="expected"):
        tahf4.lower(tahf4.capture(Stack().eval(), (torch.randn(2, 64),)), options=options)


def test_no_rotation_is_no_multiplier():
    lowered = tahf4.lower(tahf4.capture(Stack().eval(), (torch.randn(2, 64),)), options=GRAPH)
    assert "multiplier" not in lowered.print_readable()
