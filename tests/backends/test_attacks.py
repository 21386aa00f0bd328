"""Ways in which a compiled model could be wrong without a word. Each was seen once."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import GRAPH, FakeLinear, block_linears, expected, plans, relative
from models import Block, Stack, wan
from torch import Tensor, nn
from torch.nn import functional

import tahf4_compiler as tahf4
from tahf4_compiler.weights.checksum import checksum

CLOSE = 1e-5


pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(64, 64), (512, 512), (5000, 64), (7, 3)])
def test_the_checksum_sees_signs_scales_and_exchanged_rows(dtype, shape):
    weight = torch.randn(shape).to(dtype)
    changed = {
        "negated": -weight,
        "column negated": weight.index_fill(1, torch.tensor([1]), 0) - _only(weight, 1),
        "column doubled": weight + _only(weight, 2),
        "rows exchanged": weight[_swap(shape[0], 0, shape[0] - 1)],
        "far rows exchanged": weight[_swap(shape[0], 0, min(4096, shape[0] - 2))],
        "one sign": weight * (1 - 2 * torch.eye(*shape, dtype=dtype)[torch.randperm(shape[0])]),
    }
    sums = {name: checksum(value).item() for name, value in changed.items()}
    assert checksum(weight.clone()).item() not in sums.values()
    assert checksum(weight.clone()) == checksum(weight)


def _only(weight: Tensor, column: int) -> Tensor:
    out = torch.zeros_like(weight)
    out[:, column] = weight[:, column]
    return out


def _swap(count: int, a: int, b: int) -> list[int]:
    order = list(range(count))
    order[a], order[b] = order[b], order[a]
    return order


class Two(nn.Module):
    """Two linears; subclasses say how they are used."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(64, 64) for _ in range(3))


class DataWrite(Two):
    def forward(self, x):
        h = x * 1
        h.data.mul_(2)
        return self.a(h)


class Strided(Two):
    def forward(self, x):
        q, k = self.a(x), self.b(x)
        return q.as_strided((4, 32), (64, 1), 0) + k.as_strided((4, 32), (64, 1), 0)


class Flat(Two):
    def forward(self, x):
        return self.a(x).view(-1), self.b(x).view(-1, 4)


class Outputs(Two):
    def forward(self, x):
        return self.a(x), self.b(x)


class Overlapping(Two):
    def forward(self, x):
        y = x + 1
        return self.a(x) + self.b(x), self.a(y) + self.c(y)


class ScalarBias(Two):
    def forward(self, x):
        return torch.addmm(self.b.bias[:1], x, self.a.weight.t()) + torch.matmul(x, self.c.weight.mT)


@pytest.mark.parametrize("build", [DataWrite, Strided, Flat, Outputs, Overlapping])
def test_a_graph_computes_what_w4a4_means_however_results_are_used(build):
    model, x = build().eval(), torch.randn(4, 64)
    want = expected(model, ["a", "b", "c"])(x)
    for options in (GRAPH, {**GRAPH, "inductor": True}) if build in (DataWrite, Strided) else (GRAPH,):
        torch._dynamo.reset()
        got = torch.compile(model, backend="tahf4", options=options)(x)
        for value, reference in zip(*(v if isinstance(v, tuple) else (v,) for v in (got, want)), strict=True):
            assert relative(value, reference) < CLOSE
            assert value.stride() == reference.stride()


def test_a_bias_of_one_value_is_no_bias_of_a_linear():
    model, x = ScalarBias().eval(), torch.randn(4, 64)
    kept = torch.compile(model, backend="tahf4", options={**GRAPH, "keep": ["."]})(x)
    assert relative(kept, model(x)) < CLOSE
    torch._dynamo.reset()
    assert relative(torch.compile(model, backend="tahf4", options=GRAPH)(x), model(x)) < 0.2


class WrittenWeight(Two):
    def forward(self, x):
        self.a.weight.view(-1).mul_(2.0)
        return self.a(x)


def test_a_weight_that_the_graph_writes_stays_in_high_precision(tmp_path):
    model, x = WrittenWeight().eval(), torch.randn(4, 64)
    want = functional.linear(x, 2 * model.a.weight, model.a.bias)
    before = model.a.weight.clone()
    options = {**GRAPH, "dump_dir": str(tmp_path), "verify": True}
    assert relative(torch.compile(model, backend="tahf4", options=options)(x), want) < CLOSE
    assert plans(tmp_path)[0][0]["reason"] == "weight: the graph writes to it"
    assert torch.equal(model.a.weight, 2 * before), "verify=True must not run on the model's own tensors"


class IntegerCast(Two):
    def forward(self, x):
        return functional.linear(x, (self.a.weight * 1).to(torch.int32).to(torch.float32)) + functional.linear(
            x, self.b.weight.to(torch.int32).to(torch.float32)
        )


def test_a_cast_that_changes_values_is_not_looked_through():
    model, x = IntegerCast().eval(), torch.randn(4, 64)
    model.a.weight.mul_(20)
    model.b.weight.mul_(20)
    assert relative(torch.compile(model, backend="tahf4", options=GRAPH)(x), model(x)) < CLOSE


class ParallelAndBody(nn.Module):
    """Blocks side by side, then blocks in a chain."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.body = nn.ModuleList(Block() for _ in range(4))

    def forward(self, x):
        x = self.blocks[0](x) + self.blocks[1](x)
        for block in self.body:
            x = block(x)
        return x


def test_two_models_in_one_function_do_not_decide_for_one_another():
    a, b, x = Stack().eval(), ParallelAndBody().eval(), torch.randn(4, 64)
    got = torch.compile(lambda x: (a(x), b(x)), backend="tahf4", options=GRAPH)(x)
    assert relative(got[0], expected(a, block_linears(a))(x)) < CLOSE
    assert relative(got[1], expected(b, block_linears(b, "body"))(x)) < CLOSE


@pytest.mark.parametrize("how", ["assign", "deepcopy", "parameter"])
def test_keep_survives_replaced_parameters_and_copies(how):
    model, x = Stack().eval(), torch.randn(4, 64)
    tahf4.keep(model, [r"blocks\.0"])
    compiled = torch.compile(model, backend="tahf4", options=GRAPH)
    compiled(x)
    if how == "assign":
        model.load_state_dict({k: v.clone() for k, v in Stack().state_dict().items()}, assign=True)
    elif how == "deepcopy":
        model = copy.deepcopy(model)
        compiled = torch.compile(model, backend="tahf4", options=GRAPH)
    else:
        model.blocks[0].up.weight = nn.Parameter(torch.randn(128, 64))
    want = [path for path in block_linears(model) if not path.startswith("blocks.0.")]
    assert relative(compiled(x), expected(model, want)(x)) < CLOSE


def test_a_lowered_model_refuses_arguments_that_it_was_not_captured_for():
    class Scaled(Two):
        def forward(self, x, factor, flag=True):
            y = self.a(x) * factor
            return y if flag else -y

    x = torch.randn(4, 64)
    lowered = tahf4.lower(tahf4.capture(Scaled().eval(), (x, 2), {"flag": True}))
    lowered(x, 2, flag=True)
    for bad in (
        lambda: lowered(x, 3, flag=True),
        lambda: lowered(x, 2, flag=False),
        lambda: lowered(torch.randn(8, 64), 2, flag=True),
        lambda: lowered(x.double(), 2, flag=True),
        lambda: lowered(x.tolist(), 2, flag=True),
    ):
        with pytest.raises(tahf4.CaptureError):
            bad()


def test_a_replaced_buffer_is_seen_by_a_lowered_model():
    class Buffered(Two):
        def __init__(self):
            super().__init__()
            self.register_buffer("scale", torch.ones(()), persistent=False)

        def forward(self, x):
            return self.a(x) * self.scale

    model, x = Buffered().eval(), torch.randn(4, 64)
    lowered = tahf4.lower(tahf4.capture(model, (x,)))
    before = lowered(x)
    model.scale = torch.full((), 2.0)
    assert torch.equal(lowered(x), 2 * before)


def test_the_report_says_what_runs_when_a_pass_is_left_out(caplog):
    captured = tahf4.capture(Stack().eval(), (torch.randn(4, 64),))
    lowered = tahf4.lower(captured, options={"disable_passes": ["quantize"]})
    assert {d.decision for d in lowered.plan} == {"high_precision"}
    assert "no pass rewrote it" in lowered.report()
    torch.compile(Stack().eval(), backend="tahf4", options={**GRAPH, "disable_passes": ["plan"]})(torch.randn(4, 64))
    assert "the linears have no plan" in caplog.text


def test_a_pass_cannot_hide_a_change():
    class Sneaky(tahf4.Pass):
        """Change the graph and say nothing."""

        after = ("plan",)
        before = ("quantize",)

        def __call__(self, graph_module, context):
            for node in graph_module.graph.find_nodes(op="call_function", target=torch.ops.aten.gelu.default):
                node.target = torch.ops.aten.relu.default
            return tahf4.PassResult(graph_module, modified=False)

    model, x = Stack().eval(), torch.randn(4, 64)
    captured = tahf4.capture(model, (x,))
    plain = tahf4.lower(captured)(x)
    assert relative(tahf4.lower(captured, options={"passes": [Sneaky]})(x), plain) > 0.01


def test_a_model_of_one_layer_keeps_its_boundary(tmp_path):
    model, inputs = wan(num_layers=1)
    torch.compile(model, backend="tahf4", options={**GRAPH, "dump_dir": str(tmp_path)})(**inputs)
    (plan,) = plans(tmp_path)
    assert {d["module"].split(".")[0] for d in plan if d["decision"] == "hif4"} == {"blocks"}
    assert sum(d["decision"] == "hif4" for d in plan) == 10


def test_weights_written_through_data_under_dynamic_shapes_and_inductor():
    model, x = Block().eval(), torch.randn(4, 64)
    compiled = torch.compile(model, backend="tahf4", options={**GRAPH, "inductor": True})
    compiled(x)
    model.up.weight.data[:, 1].neg_()
    assert relative(compiled(x), expected(model, ["up", "down"])(x)) < CLOSE


@pytest.mark.parametrize(
    "options",
    [{"inductor": {"nonsense": 1}}, {"dump_dir": "/proc/nothing/here"}, {"plan.min_features": True}],
)
def test_bad_values_of_options_are_errors_of_our_own(options):
    with pytest.raises(tahf4.OptionError):
        tahf4.lower(tahf4.capture(Stack().eval(), (torch.randn(4, 64),)), options=options)


def test_the_reference_of_these_tests_is_the_operators_meaning():
    linear, x = nn.Linear(100, 70), torch.randn(3, 100)
    got = torch.compile(linear, backend="tahf4", options=GRAPH)(x)
    assert relative(got, FakeLinear(linear)(x)) < CLOSE


def quantized_as(model: nn.Module, names: list[str], got: Tensor, x: Tensor) -> bool:
    return relative(got, expected(model, names)(x)) < CLOSE


class Pair(Two):
    def forward(self, x):
        return self.b(functional.silu(self.a(x)))


def test_keep_holds_for_copies_called_beside_the_original():
    model, x = Pair().eval(), torch.randn(4, 64)
    tahf4.keep(model, ["a"])
    copied = copy.deepcopy(model)
    copied.a.weight.mul_(3)
    got = torch.compile(lambda x: (model(x), copied(x)), backend="tahf4", options=GRAPH)(x)
    assert quantized_as(model, ["b"], got[0], x)
    assert quantized_as(copied, ["b"], got[1], x)


@pytest.mark.parametrize("first", [True, False])
def test_keep_stays_with_the_module_when_weights_are_exchanged(first):
    model, x = Pair().eval(), torch.randn(4, 64)
    tahf4.keep(model, ["a"])
    compiled = torch.compile(model, backend="tahf4", options=GRAPH)
    if first:
        compiled(x)
    model.a.weight, model.b.weight = model.b.weight, model.a.weight
    assert quantized_as(model, ["b"], compiled(x), x)


def test_a_keep_that_was_taken_back_does_not_return_with_its_parameter():
    model, x = Pair().eval(), torch.randn(4, 64)
    tahf4.keep(model, ["a"])
    weight, compiled = model.a.weight, torch.compile(model, backend="tahf4", options=GRAPH)
    model.a.weight = nn.Parameter(torch.randn(64, 64))
    assert quantized_as(model, ["b"], compiled(x), x)
    tahf4.keep(model, [])
    model.a.weight = weight
    assert quantized_as(model, ["a", "b"], compiled(x), x)
