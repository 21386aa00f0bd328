"""FSDP2: the same results and recipes as on one rank."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from models import Stack
from ranks import run

import tahf4_compiler as tahf4
from tahf4_compiler.weights import checksum

GRAPH = {"inductor": False}


def divide(model, mesh):
    from torch.distributed.fsdp import fully_shard

    for part in (*model.blocks, model):
        fully_shard(part, mesh=mesh)


def stack(shard=None):
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = Stack(2, 64, 256).eval().requires_grad_(False)
    if shard is not None:
        divide(model, shard)
    return model


def compiled_blocks(rank, mesh, tmp, x):
    recipe = tahf4.Recipe.load(tmp / f"recipe{rank}")
    for given in (None, recipe):
        found = []
        for shard, recipe_first in ((None, True), (mesh, False), (mesh, True)):
            model = stack(None if recipe_first else shard)
            tahf4.apply_recipe(model, given)
            if recipe_first and shard is not None:
                divide(model, shard)
            for block in model.blocks:
                block.compile(backend="tahf4", options=GRAPH)
            found += [model(x), model(x)]
        assert all(torch.equal(found[0], other) for other in found[1:])
        assert not torch.equal(found[0], stack()(x))


def compiled_whole(rank, mesh, tmp, x):
    # Dynamo breaks the graph at FSDP's hooks: each block is a graph of its own.
    model = stack(mesh)
    model.compile(backend="tahf4", options={**GRAPH, "rotate.block": 0})
    reference = stack()
    for block in reference.blocks:
        block.compile(backend="tahf4", options={**GRAPH, "rotate.block": 0})
    assert torch.equal(model(x), reference(x))


class Counted:
    """Reads weights, and writes down how many."""

    def __init__(self, counts):
        self.counts, self.contents = counts, checksum.contents

    def __call__(self, values):
        self.counts.append(len(values))
        return self.contents(values)


def changed(rank, mesh, tmp, x):
    """Gathering writes into memory that a parameter had before, and leaves its version counter as it was."""
    options = {**GRAPH, "weight_check": "version"}
    for reshard in (True, False):
        model = stack()
        for part in (*model.blocks, model):
            torch.distributed.fsdp.fully_shard(part, mesh=mesh, reshard_after_forward=reshard)
        for block in model.blocks:
            block.compile(backend="tahf4", options=options)
        model(x), model(x)
        for module in (*model.blocks, model):
            module.reshard()
        model.blocks[0].up.weight.mul_(-2)
        reference = stack()
        reference.blocks[0].up.weight.mul_(-2)
        for block in reference.blocks:
            block.compile(backend="tahf4", options=options)
        assert torch.equal(model(x), reference(x))
        read = []
        with mock.patch.object(checksum, "contents", Counted(read)):
            model(x)
        assert read == ([2, 2] if reshard else []), "what is not gathered again is not read again"


def calibrated(rank, mesh, tmp, x):
    found = []
    for shard in (None, mesh):
        model = stack(shard)
        with tahf4.calibrate(model, rows=8, options=GRAPH) as calibration:
            model(x)
            model(x * 2)
        calibration.recipe().save(tmp / f"recipe{rank}")  # the same inputs on all ranks: nothing to merge
        found.append((tmp / f"recipe{rank}").read_bytes())
    assert found[0] == found[1]
    for linear in calibration.recipe().experts[""]["blocks.0.up"].linears.values():
        assert linear.effect is not None and linear.effect > 0


def packed(rank, mesh, tmp, x):
    one = stack()
    tahf4.quantize_(one)
    many = stack()
    tahf4.quantize_(many)
    divide(many, mesh)
    up = many.blocks[0].up
    assert up.weight_codes.to_local().numel() * mesh.size() == one.blocks[0].up.weight_codes.numel()
    assert (up.weight_codes.dtype, up.weight_scales.dtype) == (torch.uint8, torch.int32)
    assert torch.equal(many(x), one(x))
    many.to("cpu")
    assert torch.equal(many(x), one(x))
    for model in (one, many):
        for block in model.blocks:
            block.compile(backend="tahf4", options=GRAPH)
    assert torch.equal(many(x), one(x))


def everything(rank, size, tmp):
    from torch.distributed.device_mesh import init_device_mesh

    mesh, x = init_device_mesh("cpu", (size,)), torch.randn(8, 64)
    for work in (calibrated, compiled_blocks, compiled_whole, changed, packed):
        work(rank, mesh, tmp, x)


@pytest.mark.slow
@pytest.mark.skipif(torch.__version__ < "2.12", reason="FSDP2 of PyTorch 2.11 asks codes for gradients")
def test_sharded_parameters_give_what_whole_ones_do(tmp_path):
    run(2, everything, tmp_path)
