"""What is drawn into quantizations and products, and what must not be; the numbers stay the same bits."""

from __future__ import annotations

import operator

import pytest
import torch
from models import wan
from torch import nn

import tahf4_compiler as tahf4
from tahf4_compiler.ops.program import Program


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True)
def _reference(monkeypatch):
    """The reference gives the same bits fused and not."""
    monkeypatch.setenv("TAHF4_NO_CPP", "1")


def lowered(model, *args, **options):
    """Return a model lowered with and without fusion."""
    captured = tahf4.capture(model, args)
    return [
        tahf4.lower(captured, options={"fuse.always": True, **options}),
        tahf4.lower(captured, options={"disable_passes": ["fuse"], **options}),
    ]


def calls(low):
    return [n for n in low.graph_module.graph.nodes if n.op == "call_function"]


def named(low, name):
    return [n for n in calls(low) if getattr(n.target, "_opname", "") == name]


def programs(low):
    found = []
    for node in calls(low):
        found += [a for a in node.args if isinstance(a, str) and a]
    return found


class Blocks(nn.Module):
    """Two alike blocks, so that their linears are in a repeated body."""

    def __init__(self, block):
        super().__init__()
        self.blocks = nn.ModuleList([block() for _ in range(2)])

    def forward(self, *args):
        x, *rest = args
        for block in self.blocks:
            x = block(x, *rest)
        return x


class Mlp(nn.Module):
    def __init__(self, middle):
        super().__init__()
        self.norm = nn.LayerNorm(128)
        self.up, self.down = nn.Linear(128, 256), nn.Linear(256, 128)
        self.middle = middle

    def forward(self, x):
        return x + self.down(self.middle(self.up(self.norm(x))))


def same(pair, *args):
    a, b = (low(*args) for low in pair)
    assert torch.equal(a, b)


def test_norm_gelu_and_residual_are_drawn_in():
    model, x = Blocks(lambda: Mlp(nn.GELU("tanh"))), torch.randn(3, 128)
    pair = lowered(model, x)
    assert [len(named(pair[0], n)) for n in ("fused_quantize", "linear_quantize", "fused_linear")] == [2, 2, 2]
    assert not named(pair[0], "gelu") and not named(pair[0], "layer_norm") and not named(pair[0], "add")
    assert programs(pair[0])[:3] == [
        "v0: float32 = layer_norm(x0, x1, x2, 1e-05)",
        "v0: float32 = gelu_tanh(y)",
        "v0: float32 = add(x0, y)",
    ]
    same(pair, x)


def test_nothing_is_fused_where_only_the_reference_could_run_it():
    model, x = Blocks(lambda: Mlp(nn.GELU())), torch.randn(3, 128)
    low = tahf4.lower(tahf4.capture(model, (x,)))
    assert not programs(low)
    assert "fuse: 0 products" in low.report()


class Twice(nn.Module):
    """The activation between the linears is read a second time."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(128, 128), nn.Linear(128, 128)

    def forward(self, x):
        middle = torch.nn.functional.silu(self.up(x))
        return self.down(middle) + middle


def test_a_value_that_others_read_is_computed_once_and_kept():
    model, x = Blocks(Twice), torch.randn(3, 128)
    pair = lowered(model, x)
    assert not any("silu" in node.args[7] for node in named(pair[0], "linear_quantize"))
    assert named(pair[0], "fused_linear")[0].args[8] == "v0: float32 = silu(y)"
    assert "".join(programs(pair[0])).count("silu") == 2
    same(pair, x)


class Writes(nn.Module):
    """A buffer that the epilogue reads is written between the product and its reader."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(128, 128)
        self.register_buffer("state", torch.zeros(128))

    def forward(self, x):
        y = self.up(x * self.state)
        self.state.add_(1.0)
        return y + self.state


def test_nothing_moves_across_a_write():
    model, x = Blocks(Writes), torch.randn(3, 128)
    captured = tahf4.capture(model, (x,))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    a = tahf4.lower(captured, options={"fuse.always": True})(x)
    model.load_state_dict(before)
    b = tahf4.lower(captured, options={"disable_passes": ["fuse"]})(x)
    assert torch.equal(a, b)


class Merged(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(128, n) for n in (128, 64, 128))

    def forward(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        return (q.view(-1, 8, 16) * k[:, :1, None]).flatten(1) + v


def test_merged_products_have_one_contiguous_result_each():
    model, x = Blocks(Merged), torch.randn(3, 128)
    pair = lowered(model, x)
    (first, *_) = named(pair[0], "fused_linear")
    assert first.args[6] == [128, 64, 128]
    assert not named(pair[0], "split_with_sizes")
    same(pair, x)


class Casts(nn.Module):
    """As Wan's blocks: norms and gates in float32 around bfloat16 linears."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, 3, 128))
        self.up = nn.Linear(128, 128)

    def forward(self, x, temb):
        shift, scale, gate = (self.table + temb.float()).chunk(3, dim=1)
        h = (nn.functional.layer_norm(x.float(), (128,)) * (1 + scale) + shift).type_as(x)
        return (x.float() + self.up(h) * gate).type_as(x)


@pytest.mark.parametrize("rows", [1, 5])
def test_casts_and_modulation(rows):
    model = Blocks(Casts)
    for block in model.blocks:
        block.up.to(torch.bfloat16)
    args = torch.randn(2, rows, 128).bfloat16(), torch.randn(2, 3, 128).bfloat16()
    pair = lowered(model, *args)
    quantizations, products = named(pair[0], "fused_quantize"), named(pair[0], "fused_linear")
    assert len(quantizations) == len(products) == 2
    text = Program.parse(quantizations[0].args[1])
    assert [s.function for s in text.statements] == ["to", "layer_norm", "add", "mul", "add", "to"]
    # The residual is read in bfloat16, not in the float32 that the graph made of it.
    assert all(leaf.meta["val"].dtype == torch.bfloat16 for leaf in products[0].args[7][1:])
    same(pair, *args)


class Wide(nn.Module):
    """The result is cast to a wider type: the narrow one is written."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(128, 128)

    def forward(self, x):
        y = torch.nn.functional.silu(self.up(x)).float()
        return (y * y.mean()).bfloat16()


def test_a_widening_cast_at_the_end_stays_outside():
    model, x = Blocks(Wide).bfloat16(), torch.randn(3, 128).bfloat16()
    pair = lowered(model, x)
    assert all(p == "v0: bfloat16 = silu(y)" for p in programs(pair[0]) if "silu" in p)
    assert "".join(programs(pair[0])).count("silu") == 2
    same(pair, x)


class Inner(nn.Module):
    """Two norms in a row, a norm over two axes, a sum over rows: one reduction along the last axis is taken."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(128, 128)

    def forward(self, x):
        h = nn.functional.layer_norm(nn.functional.layer_norm(x, (128,)), (128,))
        h = self.up(h)
        return self.up(nn.functional.layer_norm(h, h.shape[-2:])) * h.sum(-2, keepdim=True)


def test_only_one_reduction_along_the_last_axis_is_drawn_in():
    model, x = Blocks(Inner), torch.randn(2, 3, 128)
    pair = lowered(model, x)
    norms = [p.count("layer_norm") for p in programs(pair[0])]
    assert max(norms) == 1 and sum(norms) == 2
    assert len(named(pair[0], "layer_norm")) == 4
    same(pair, x)


def test_a_whole_wan_keeps_its_bits_and_decisions():
    model, args = wan()
    captured = tahf4.capture(model, (), args)
    pair = [
        tahf4.lower(captured, options=o)
        for o in ({"fuse.always": True, "verify": True}, {"disable_passes": ["fuse"]})
    ]
    assert torch.equal(*(low(**args)[0] for low in pair))
    added = [r.error for r in pair[0].history if r.name == "fuse"]
    assert added == [0.0]
    decided = [[(d.module, d.decision, bool(d.kernel)) for d in low.plan] for low in pair]
    assert decided[0] == decided[1]
    quantized = sum(d.decision == "hif4" for d in pair[0].plan)
    assert quantized and all(d.kernel for d in pair[0].plan if d.decision == "hif4")


def test_dynamic_sizes_stay_dynamic():
    model = Blocks(lambda: Mlp(nn.GELU("tanh")))
    inputs = [torch.randn(rows, 128) for rows in (3, 17, 40)]
    results = []
    for options in ({"fuse.always": True}, {"disable_passes": ["fuse"]}):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        compiled = torch.compile(model, backend="tahf4", dynamic=True, options={"inductor": False, **options})
        results.append([compiled(x) for x in inputs])
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert all(torch.equal(a, b) for a, b in zip(*results))


class Awkward(nn.Module):
    """Things around a linear that must keep their meaning."""

    def __init__(self, kind):
        super().__init__()
        self.up, self.kind = nn.Linear(128, 128), kind
        self.register_buffer("zero_dim", torch.tensor(1.5, dtype=torch.float64))

    def forward(self, x):
        y = self.up(x)
        if self.kind == "infinite scalar":
            return torch.nn.functional.relu(y) * float("inf")
        if self.kind == "permuted residual":
            return y + x.t().contiguous().t()
        if self.kind == "zero-dimensional":
            return y * self.zero_dim + x
        if self.kind == "alpha":
            return torch.add(x, y, alpha=2)
        if self.kind == "in place":
            y.mul_(2)
            return y + x
        if self.kind == "more axes":
            return (y[None] * torch.ones(2, 1, 1)).sum(0)
        if self.kind == "view":
            return (y.view(-1, 64) * 2).view_as(x)
        if self.kind == "both sides":
            return y * y + y
        assert self.kind == "comparison"
        return torch.where(y > 0, y, x)


@pytest.mark.parametrize(
    "kind",
    ["infinite scalar", "permuted residual", "zero-dimensional", "alpha", "in place", "more axes", "view", "both sides",
     "comparison"],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_awkward_neighbours_keep_their_meaning(kind, dtype):
    model, x = Blocks(lambda: Awkward(kind)).to(dtype), torch.randn(3, 128, dtype=dtype)
    pair = lowered(model, x)
    a, b = (low(x) for low in pair)
    assert torch.equal(a.nan_to_num(3.0), b.nan_to_num(3.0)) and a.dtype == b.dtype
    if kind == "permuted residual":
        assert a.stride() == b.stride()


def test_getitem_is_only_a_result():
    model, x = Blocks(lambda: Mlp(nn.GELU())), torch.randn(3, 128)
    low, _ = lowered(model, x)
    for node in named(low, "fused_linear"):
        assert [(u.target, u.args[1]) for u in node.users] == [(operator.getitem, 0)]


class Around(nn.Module):
    """A linear in a repeated block with something around it."""

    def __init__(self, width, function):
        super().__init__()
        self.up, self.function = nn.Linear(128, width), function

    def forward(self, x):
        return self.function(self.up, x)


def copied_and_written(up, x):
    q, k = up(x).split([128, 128], -1)
    a = q.contiguous()
    a.mul_(2.0)
    return a + q + k


def copied_twice(up, x):
    q, k = up(x).split([128, 128], -1)
    a, b = q.contiguous(), q.contiguous()
    a.add_(1.0)
    return a + b + k


ZERO_DIM = torch.tensor(0.1)


@pytest.mark.parametrize(
    ("width", "function"),
    [
        (256, copied_and_written),
        (256, copied_twice),
        (128, lambda up, x: x.type_as(nn.functional.silu(up(x)))),
        (128, lambda up, x: up(x - x.mean(dim=None, keepdim=True))),
        (128, lambda up, x: up(x - x.mean(dim=[0, 1], keepdim=True))),
        (128, lambda up, x: up(x * 1e-40 / 1e-40)),
    ],
)
def test_what_a_fused_node_would_get_wrong(width, function):
    model, x = Blocks(lambda: Around(width, function)), torch.randn(3, 128)
    same(lowered(model, x, **{"rotate.block": 0}), x)


def test_an_operand_without_axes_is_rounded_first_and_not_drawn_in():
    model = Blocks(lambda: Around(128, lambda up, x: up(x) * ZERO_DIM + x)).bfloat16()
    x = torch.randn(3, 128, dtype=torch.bfloat16)
    pair = lowered(model, x)
    assert not any("mul" in program for program in programs(pair[0]))
    same(pair, x)


def test_parts_that_leave_the_graph_keep_their_strides():
    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(128, 128) for _ in range(3)])

        def forward(self, x):
            return self.blocks[2](self.blocks[1](self.blocks[0](x))).split([64, 64], -1)

    pair = lowered(Parts(), torch.randn(3, 128))
    a, b = (low(torch.ones(3, 128)) for low in pair)
    assert [t.stride() for t in a] == [t.stride() for t in b]
