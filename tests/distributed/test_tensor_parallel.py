"""Tensor parallelism: the operators' rules, the parallel styles, a packed Wan; against one rank."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from helpers import relative
from models import Stack, branched, masked_recipe, output, wan
from ranks import run
from torch import nn

import tahf4_compiler as tahf4
from tahf4_compiler.distributed import tensor_parallel
from tahf4_compiler.distributed.styles import HiF4ColwiseParallel, HiF4RowwiseParallel

SUM_ORDER = 1e-6
"""Relative difference that the order of a float32 sum makes."""


def mesh_of(*shape, names=None):
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def rules(rank, size):
    from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor

    mesh = mesh_of(size)
    x, w, b = torch.randn(2, 6, 256), torch.randn(192, 256), torch.randn(192)
    x[0, 0, 70] = float("nan")
    multiplier = torch.rand(256) + 0.5

    def placed(tensor, placement):
        return distribute_tensor(tensor, mesh, [placement])

    for ops in (torch.ops.tahf4, torch.ops.tahf4_cpu):
        codes, scales = ops.quantize(x, multiplier, 64)
        wc, ws = ops.quantize(w, None, 0)
        y = ops.linear(codes, scales, wc, ws, b, torch.float32)
        for at, factors in ((Shard(2), Shard(0)), (Shard(1), Replicate()), (Shard(0), Replicate())):
            parts = ops.quantize(placed(x, at), placed(multiplier, factors), 64)
            assert all(part.placements == (at,) for part in parts)
            assert all(torch.equal(p.full_tensor(), want) for p, want in zip(parts, (codes, scales), strict=True))
        # 256 is one block of 256: no rank may have a part of it.
        assert ops.quantize(placed(x, Shard(2)), placed(multiplier, Shard(0)), 256)[0].placements == (Replicate(),)

        def linear(left, right, bias, dtype=torch.float32, ops=ops, parts=(codes, scales, wc, ws)):
            placements = (left, left, right, right)
            operands = [placed(t, p) for t, p in zip(parts, placements, strict=True)]
            added = None if bias is None else placed(b, Shard(0) if right == Shard(0) else Replicate())
            return ops.linear(*operands, added, dtype)

        for left, right, bias, want in (
            (Replicate(), Shard(0), b, Shard(2)),
            (Shard(1), Replicate(), b, Shard(1)),
            (Shard(2), Shard(1), b, Replicate()),  # a bias is added once: gathered instead
        ):
            found = linear(left, right, bias)
            assert found.placements == (want,)
            assert torch.equal(found.full_tensor().nan_to_num(7.0), y.nan_to_num(7.0))
        partial = linear(Shard(2), Shard(1), None)
        assert partial.placements == (Partial(),)
        assert torch.allclose(partial.full_tensor() + b, y, rtol=1e-5, atol=1e-4, equal_nan=True)
        assert linear(Shard(2), Shard(1), None, torch.bfloat16).placements == (Replicate(),)  # no sum of rounded parts

        program = "v0: float32 = layer_norm(x0, None, None, 1e-06)\nv1: float32 = mul(v0, x1)"
        inputs = [x, torch.randn(2, 1, 256, generator=torch.Generator().manual_seed(1))]
        want = ops.fused_quantize(inputs, program, multiplier, 64)
        spread = [placed(inputs[0], Shard(1)), placed(inputs[1], Replicate())]
        found = ops.fused_quantize(spread, program, placed(multiplier, Replicate()), 64)
        assert found[0].placements == (Shard(1),) and torch.equal(found[0].full_tensor(), want[0])
        with pytest.raises(NotImplementedError, match="fused_linear.*sharding strategy"):
            ops.fused_linear(placed(codes, Shard(1)), placed(scales, Shard(1)), placed(wc, Replicate()),
                             placed(ws, Replicate()), None, torch.float32, [192], [], "", torch.float32)  # fmt: skip
    whole = torch.ops.tahf4.packed_linear(x, multiplier, 64, wc, ws, b, torch.float32)
    for left, right, want in ((Shard(1), Replicate(), Shard(1)), (Replicate(), Shard(0), Shard(2))):
        given = placed(x, left), placed(multiplier, Replicate()), 64, *(placed(t, right) for t in (wc, ws, b))
        found = torch.ops.tahf4.packed_linear(*given, torch.float32)
        assert found.placements == (want,)
        assert torch.equal(found.full_tensor().nan_to_num(7.0), whole.nan_to_num(7.0))
    plain = torch.ops.tahf4.dequantize(placed(codes, Shard(1)), placed(scales, Shard(1)), 256, torch.float32)
    assert plain.placements == (Shard(1),)
    want = torch.ops.tahf4.dequantize(codes, scales, 256, torch.float32)
    assert torch.equal(plain.full_tensor().nan_to_num(7.0), want.nan_to_num(7.0))


def packed_stack(hidden=256):
    torch.manual_seed(0)
    model = Stack(2, 64, hidden).eval().requires_grad_(False)
    tahf4.quantize_(model)
    return model


def styles(rank, size):
    from torch.distributed.tensor import DTensor, Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh, x = mesh_of(size), torch.randn(5, 64)
    one = packed_stack()
    up, down = one.blocks[0].up, one.blocks[0].down
    wanted = up(x)
    for local in (False, True):
        column = parallelize_module(copy.deepcopy(up), mesh, HiF4ColwiseParallel(local=local))
        assert torch.equal(column(x), wanted.chunk(size, -1)[rank])
        assert isinstance(column.weight_codes, DTensor) != local
        row = parallelize_module(copy.deepcopy(down), mesh, HiF4RowwiseParallel(local=local))
        assert relative(row(wanted.chunk(size, -1)[rank].clone()), down(wanted)) < SUM_ORDER
        half = row(wanted.chunk(size, -1)[rank].clone().bfloat16())
        assert half.dtype == torch.bfloat16 and relative(half, down(wanted.bfloat16())) < 2**-8
        assert (half != down(wanted.bfloat16())).float().mean() < 0.02, "parts are summed in float32"
        with pytest.raises(tahf4.ShardingError, match="divided among ranks already"):
            parallelize_module(row, mesh, HiF4RowwiseParallel(local=local))
        for bits in (8, 16):
            more, part = copy.deepcopy(one.blocks[0]), wanted.chunk(size, -1)[rank].clone()
            tahf4.set_activation_bits(more, bits)
            column = parallelize_module(copy.deepcopy(more.up), mesh, HiF4ColwiseParallel(local=local))
            assert relative(column(x), more.up(x).chunk(size, -1)[rank]) < SUM_ORDER
            row = parallelize_module(copy.deepcopy(more.down), mesh, HiF4RowwiseParallel(local=local))
            assert relative(row(part), more.down(wanted)) < SUM_ORDER
            row.activation_bits, scheduler = 4, FlowMatchEulerDiscreteScheduler()
            assert relative(row(part), down(wanted)) < SUM_ORDER
            tahf4.set_high_precision_steps(row, [0], bits=bits, scheduler=scheduler)
            assert relative(row(part), more.down(wanted)) < SUM_ORDER
    branches(mesh, rank, size)
    torch._dynamo.reset()
    plain = parallelize_module(Stack(2).eval(), mesh, {"blocks.0.up": HiF4ColwiseParallel()})
    with pytest.raises(Exception, match="graph reads DTensors.*local=True"):
        torch.compile(plain.blocks[0].up, backend="tahf4", options={"inductor": False})(x)
    gathered = parallelize_module(copy.deepcopy(up), mesh, HiF4ColwiseParallel(output_layouts=Replicate()))
    assert torch.equal(gathered(x), wanted)
    torchs = parallelize_module(copy.deepcopy(up), mesh, ColwiseParallel())  # through the operators' rules
    assert torch.equal(torchs(x), wanted.chunk(size, -1)[rank])
    with pytest.raises(tahf4.PackedError, match="packed"):
        parallelize_module(copy.deepcopy(down), mesh, RowwiseParallel())
    wide = copy.deepcopy(down)
    wide.hadamard_block = 256
    before = copy.deepcopy(wide.state_dict())
    with pytest.raises(tahf4.ShardingError, match="ffn cannot.*rotation of 256.*work are 1, or a rotation of 128"):
        parallelize_module(wide, mesh, HiF4RowwiseParallel(name="ffn"))
    assert all(torch.equal(before[key], value) for key, value in wide.state_dict().items())
    uneven = nn.Sequential(*(nn.Linear(96, 96) for _ in range(4))).eval()  # K is no multiple of 64
    tahf4.quantize_(uneven)
    rows = torch.randn(0 if rank else 3, 96)  # a rank may have no rows
    divided = parallelize_module(copy.deepcopy(uneven[0]), mesh, HiF4ColwiseParallel(local=True))
    assert torch.equal(divided(rows), uneven[0](rows).chunk(size, -1)[rank])
    with pytest.raises(tahf4.ShardingError, match="K=96 is 1.5 blocks.*work are 1$"):
        parallelize_module(uneven[0], mesh, HiF4RowwiseParallel())
    with pytest.raises(tahf4.ShardingError, match="Embedding; expected an nn.Linear"):
        parallelize_module(nn.Embedding(4, 4), mesh, HiF4ColwiseParallel())


def branches(mesh, rank, size):
    from torch.distributed.tensor.parallel import parallelize_module

    torch.manual_seed(0)
    model, x = Stack(2, 64, 256).eval().requires_grad_(False), torch.randn(5, 64)
    tahf4.quantize_(model, branched(masked_recipe(model, widest=64), model))
    up, down = model.blocks[0].up, model.blocks[0].down
    wanted, part = up(x), up(x).chunk(size, -1)[rank].clone()
    assert up.rank == down.rank == 8
    for local in (False, True):
        column = parallelize_module(copy.deepcopy(up), mesh, HiF4ColwiseParallel(local=local))
        assert relative(column(x), part) < SUM_ORDER
        row = parallelize_module(copy.deepcopy(down), mesh, HiF4RowwiseParallel(local=local))
        assert relative(row(part), down(wanted)) < SUM_ORDER
    plain = Stack(2, 64, 256).eval().requires_grad_(False)
    tahf4.apply_recipe(plain, branched(masked_recipe(plain, widest=64), plain))
    divided = parallelize_module(plain, mesh, {"blocks.0.up": HiF4ColwiseParallel(local=True)})
    with pytest.raises(Exception, match="low-rank branch.*a rank holds a part of it"):
        torch.compile(divided.blocks[0].up, backend="tahf4", options={"inductor": False})(x)


def packed_wan(rank, size, **config):
    mesh = mesh_of(size)
    one, inputs = wan(num_attention_heads=size, ffn_dim=128 * size, **config)
    one.requires_grad_(False)
    tahf4.quantize_(one)
    many = tensor_parallel(copy.deepcopy(one), mesh)
    held = [sum(p.numel() for n, p in m.named_parameters() if n.endswith("weight_codes")) for m in (one, many)]
    assert held[1] * size == held[0]
    assert relative(output(many(**inputs)), output(one(**inputs))) < 1e-5
    with pytest.raises(tahf4.ShardingError, match="already"):
        tensor_parallel(many, mesh)
    return one, many, inputs


def compiled_wan(rank, size):
    one, many, inputs = packed_wan(rank, size, num_layers=1)
    found = []
    for model in (one, many) if rank == 0 else (many,):  # one rank alone is enough to compare with
        torch._dynamo.reset()
        model.compile(backend="tahf4", options={"inductor": False})
        found.append(output(model(**inputs)))
    assert relative(found[-1], found[0]) < 1e-5
    odd = wan(num_attention_heads=3)[0]
    before = [p.shape for p in odd.parameters()]
    with pytest.raises(tahf4.ShardingError, match="3 heads do not divide.*1, 3"):
        tensor_parallel(odd, mesh_of(size))
    narrow = wan(ffn_dim=64)[0]
    with pytest.raises(tahf4.ShardingError, match="block 0, ffn.net.2 cannot be row-parallel.*K=64"):
        tensor_parallel(narrow, mesh_of(size))
    assert before == [p.shape for p in odd.parameters()]  # refused before anything changed


def calibrated_wan(rank, size):
    recipes = []
    first, inputs = wan()
    for parallel in (False, True) if rank == 0 else (True,):
        torch._dynamo.reset()
        model = wan()[0].requires_grad_(False)
        model.load_state_dict(first.state_dict())
        if parallel:
            tensor_parallel(model, mesh_of(size))
        with tahf4.calibrate(model, rows=8, options={"inductor": False}) as calibration:
            model(**inputs)
        if parallel:
            calibration.all_reduce(over="channels")
        recipes.append(calibration.recipe(mask="percentile", scale_search="squared").experts[""])
    assert list(recipes[0]) == list(recipes[-1])
    for name, entry in recipes[0].items():
        other = recipes[-1][name]
        assert torch.allclose(entry.mask, other.mask, rtol=1e-3), name
        for path, linear in entry.linears.items():
            mine = other.linears[path]
            assert (mine.shape, mine.weight_sum, mine.flops) == (linear.shape, linear.weight_sum, linear.flops)
            assert mine.sqnr_db == pytest.approx(linear.sqnr_db, abs=0.3)
            assert mine.effect == pytest.approx(linear.effect, rel=0.05)


def spans(rank, size):
    from torch.distributed.tensor.parallel import parallelize_module

    mesh, x = mesh_of(size), torch.randn(3, 256)
    for span, left in (("row", 1), (4, 1), (2, 2)):  # 4 units, of which a rank has 2
        one = nn.Sequential(nn.Linear(256, 128)).requires_grad_(False)
        tahf4.quantize_(one, scale_span=span)
        many = parallelize_module(copy.deepcopy(one), mesh, {"0": HiF4RowwiseParallel(local=True)})
        assert many[0].span == left
        one[0].span = left  # on the same weight
        assert relative(many(x.chunk(size, 1)[rank]), one(x)) < SUM_ORDER
    for ops in (torch.ops.tahf4, torch.ops.tahf4_cpu):
        from torch.distributed.tensor import Replicate, Shard, distribute_tensor

        for span, at in ((0, Replicate()), (4, Replicate()), (2, Shard(1))):
            found = ops.quantize(distribute_tensor(x, mesh, [Shard(1)]), None, 64, 4, span)
            assert found[0].placements == (at,)
            assert torch.equal(found[1].full_tensor(), ops.quantize(x, None, 64, 4, span)[1])


def two(rank, size):
    for work in (rules, styles, spans, compiled_wan):
        torch.manual_seed(0)
        work(rank, size)


def four(rank, size):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    packed_wan(rank, size)
    both = mesh_of(2, 2, names=("dp", "tp"))
    one, inputs = wan()
    one.requires_grad_(False)
    tahf4.quantize_(one)
    many = tensor_parallel(copy.deepcopy(one), both["tp"])
    for part in (*many.blocks, many):
        fully_shard(part, mesh=both["dp"])
    assert relative(output(many(**inputs)), output(one(**inputs))) < 1e-5
    with pytest.raises(tahf4.ShardingError, match="2 axes"):
        tensor_parallel(copy.deepcopy(one), both)

    mesh, x = mesh_of(2, 2), torch.randn(4, 256)
    want = torch.ops.tahf4.quantize(x, None, 64)
    for at in ((Shard(0), Shard(1)), (Shard(1), Shard(1)), (Replicate(), Shard(1))):
        found = torch.ops.tahf4.quantize(distribute_tensor(x, mesh, at), None, 64)
        assert torch.equal(found[0].full_tensor(), want[0]) and torch.equal(found[1].full_tensor(), want[1])
    # 128 in four parts would cut units: gathered.
    found = torch.ops.tahf4.quantize(distribute_tensor(x[:, :128], mesh, (Shard(1), Shard(1))), None, 64)
    assert torch.equal(found[0].full_tensor(), torch.ops.tahf4.quantize(x[:, :128], None, 64)[0])


def test_two_ranks():
    run(2, two)


@pytest.mark.slow  # ranks that divide prompts, in test_calibration_ranks.py, put sketches together in the same way
def test_two_ranks_calibrate_one_model():
    run(2, calibrated_wan)


@pytest.mark.skipif(torch.__version__ < "2.12", reason="FSDP2 of PyTorch 2.11 asks codes for gradients")
def test_four_ranks():
    run(4, four)
