"""What tahf4 relies on in PyTorch's insides: each function of ``torch_private`` keeps its contract."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
from models import Block, Stack
from torch import nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from tahf4_compiler.torch_private import calls, dynamo, frames, graphs, inductor, tensors

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield


def recording(found):
    def backend(graph_module, example_inputs):
        nodes = graph_module.graph.find_nodes(op="placeholder")
        scope, context = dynamo.dynamo_scope(), torch._guards.TracingContext.get()
        found.append(
            {
                "sources": [dynamo.dynamo_source(node) for node in nodes],
                "self": scope["L"].get("self"),
                "fakes": [dynamo.fake_input(context, value) for value in example_inputs],
                "fake_mode": context.fake_mode,
                "caller": frames.caller_that_holds(scope["L"].get("self")),
            }
        )
        return graph_module.forward

    return backend


def test_dynamo_says_where_inputs_come_from_and_what_it_compiles():
    found = []
    model = Stack(depth=1)
    torch.compile(model, backend=recording(found), fullgraph=True)(torch.randn(3, 64))
    (graph,) = found
    assert graph["self"] is model
    assert "L['x']" in graph["sources"]
    assert any(name.startswith("L['self']._modules['first']") and "weight" in name for name in graph["sources"])


def test_inputs_keep_their_symbols_in_the_fake_mode_of_the_compilation():
    found = []
    model = torch.compile(Block(), backend=recording(found), dynamic=True)
    model(torch.randn(3, 64))
    rows = [f for f in found[0]["fakes"] if isinstance(f, torch.Tensor) and isinstance((*f.shape, 0)[0], torch.SymInt)]
    assert len(rows) == 1
    assert all(f.fake_mode is found[0]["fake_mode"] for f in found[0]["fakes"] if isinstance(f, torch.Tensor))


class Broken(nn.Module):
    """Blocks that Dynamo compiles one by one: each breaks the graph."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            torch._dynamo.graph_break()
            x = block(x)
        return x


def test_the_module_that_was_compiled_is_found_from_a_piece_of_it():
    found = []
    model = Broken()
    model.compile(backend=recording(found))
    model(torch.randn(3, 64))
    pieces = [graph for graph in found if isinstance(graph["self"], Block)]
    assert pieces and all(graph["caller"] is model for graph in pieces)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("own", [Stack, lambda: nn.TransformerEncoderLayer(64, 2, 64)])
def test_a_module_runs_compiled_whole_and_then_as_before(own, wrapped):
    graphs, called = [], []
    model = own().eval()
    given = torch.compile(model, backend="eager") if wrapped else model
    before = given(x := torch.randn(2, 3, 64))

    def around(call):
        return lambda *args, **kwargs: called.append(1) or call(*args, **kwargs)

    def backend(graph_module, example_inputs):
        graphs.append(graph_module)
        return graph_module.forward

    with calls.compiled_whole(given, around, backend=backend):
        assert torch.allclose(given(x), before, atol=1e-5)
    assert len(called) == len(graphs) == 1
    given(x)
    assert len(called) == 1
    assert model._compiled_call_impl is None


def test_what_was_compiled_inside_runs_as_it_is():
    graphs = []
    model = Stack(depth=1)
    model.blocks[0].compile(backend=lambda graph_module, _: graphs.append(1) or graph_module.forward)
    with calls.without_compiled_calls(model):
        model(torch.randn(3, 64))
    assert not graphs
    model(torch.randn(3, 64))
    assert graphs


def test_every_eager_linear_can_be_another_function():
    weights = []

    def around(original):
        return lambda x, weight, bias=None: weights.append(tuple(weight.shape)) or original(x, weight, bias)

    model = nn.TransformerEncoderLayer(64, 2, 128, batch_first=True).eval()
    original = nn.functional.linear
    with calls.replaced_linear(around):
        model(torch.randn(1, 3, 64))
    assert sorted(weights) == [(64, 64), (64, 128), (128, 64), (192, 64)]
    assert nn.functional.linear is original


def test_a_traced_graph_has_the_types_of_its_autocast_regions():
    begin, end = graphs.AUTOCAST
    graph = torch.fx.Graph()
    x, weight = graph.placeholder("x"), graph.placeholder("weight")
    mode = graph.call_function(begin, ("cpu", torch.bfloat16, True, True))
    inside = graph.call_function(nn.functional.linear, (x, weight))
    graph.call_function(end, (mode,))
    graph.output((inside, graph.call_function(nn.functional.linear, (x, weight))))
    graph_module = torch.fx.GraphModule(nn.Module(), graph)
    inputs = (torch.randn(4, 8), torch.randn(8, 8))
    traced = make_fx(graphs.Interpreter(graph_module).run, pre_dispatch=True)(*inputs)
    nodes = [node for node in traced.graph.nodes if node.op == "call_function"]
    assert [node.target for node in nodes] == [
        begin,
        torch.ops.aten.linear.default,
        end,
        torch.ops.aten.linear.default,
    ]
    assert nodes[2].args == (nodes[0],)
    assert [nodes[i].meta["val"].dtype for i in (1, 3)] == [torch.bfloat16, torch.float32]
    assert [value.dtype for value in traced(*inputs)] == [torch.bfloat16, torch.float32]
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("whole", [False, True])
def test_the_calls_of_a_compiled_module_go_through_a_function_until_it_has_seen_enough(whole):
    model, x, seen = Stack(depth=1), torch.randn(3, 64), []

    def around(call, args, kwargs):
        seen.append(args)
        return call(*args, **kwargs), len(seen) == 2

    def backend(graph_module, example_inputs):
        for _ in range(2):
            calls.around_calls(model, around)  # the second changes nothing
        return graph_module.forward

    given = torch.compile(model, backend=backend) if whole else model
    if not whole:
        model.compile(backend=backend)
    results = [given(x) for _ in range(4)]
    assert len(seen) == 2 and all(args[0] is x for args in seen)
    assert all(torch.equal(result, results[0]) for result in results)


def test_dynamo_traces_through_what_stands_around_a_compiled_call():
    model, x, seen = Stack(depth=1), torch.randn(3, 64), []

    def around(call, args, kwargs):
        seen.append(args)
        return call(*args, **kwargs), False

    def backend(graph_module, example_inputs):
        calls.around_calls(model, around)
        return graph_module.forward

    model.compile(backend=backend)
    want = model(x)
    outer = torch.compile(lambda x: model(x) + 1, backend="eager", fullgraph=True)
    assert torch.allclose(outer(x), want + 1)
    assert not seen


def test_modules_are_told_before_dynamo_compiles_them_also_where_it_gives_up():
    def mine(graph_module, example_inputs, options=None):
        return graph_module.forward

    def tell(*what):
        told.append(what)

    class Hidden(Stack):
        def forward(self, x):
            for block in self.blocks:
                x = self.hidden(block, x)
            return x

        @torch.compiler.disable
        def hidden(self, block, x):
            return block(x)

    told, overruled, x = [], [], torch.randn(3, 64)

    def tell_overruled(*what):
        overruled.append(what)

    for _ in range(2):
        dynamo.before_frames(mine, tell, tell_overruled)
    models = [Stack(depth=1), Hidden(depth=1)]
    torch.compile(Stack(depth=1), backend="eager")(x)
    assert told == []
    for model in models:
        model.compile(backend=mine, options={"some": 1})
        model(x)
    assert {model for model, _, _ in told} == set(models)
    assert all(what[1:] == ({"options": {"some": 1}}, False) for what in told)
    del told[:]
    models = [Stack(depth=1), Stack(depth=1)]
    for model, options in zip(models, ({}, {"some": 1}), strict=True):
        torch.vmap(torch.compile(model, backend=mine, options=options))(x)
        torch._dynamo.reset()
        dynamo.before_frames(mine, tell, tell_overruled)
    assert {model for model, _, transformed in told if transformed} == set(models)
    assert overruled == []
    model = Stack(depth=2)
    model.blocks[0].compile(backend=mine, options={"some": 1})
    model.blocks[1].compile(backend="eager")
    torch.compile(model, backend="eager")(x)
    assert overruled == [(model, [model.blocks[0]])]
    torch._dynamo.utils.counters.clear()
    torch.vmap(torch.compile(Stack(depth=1), backend=mine))(x)
    (why,) = dynamo.graph_breaks()
    assert "Calling torch.func.vmap(compiled_fn) function from eager mode is not supported" in why


def test_dynamo_says_why_it_broke_graphs():
    torch._dynamo.utils.counters.clear()

    @torch.compiler.disable
    def hidden(x):
        return x + 1

    torch.compile(lambda x: hidden(x) * 2, backend="eager")(torch.randn(3))
    (why,) = dynamo.graph_breaks()
    assert "hidden" in why and "torch.compiler.disable" in why
    with torch._dynamo.config.patch(recompile_limit=1):
        compiled = torch.compile(lambda x, y: hidden(hidden(x) * 2) * y, backend="eager")
        for y in (1, 2, 3):
            compiled(torch.randn(3), y)
    limit, why = dynamo.graph_breaks()
    assert "hidden" in why, "a recompile limit comes first, however often another reason is met"
    assert "recompile_limit" in limit and "Raise it before the first call" in limit


def test_regions_under_transforms_of_functions_are_told_in_a_graph():
    def function(x):
        first = torch.vmap(torch.vmap(torch.sin))(x).exp()
        value, pull = torch.func.vjp(torch.cos, first)
        return pull(value.relu())[0] + x.tan()

    found = []

    def backend(graph_module, example_inputs):
        regions = dynamo.transformed_regions(graph_module.graph)
        found.extend({getattr(n.target, "__name__", n.target) for n in region} for region in regions)
        found.append([n.target for n in graph_module.graph.nodes if not any(n in region for region in regions)])
        return graph_module.forward

    torch.compile(function, backend=backend, fullgraph=True)(torch.randn(2, 3))
    first, second, outside = found
    assert "sin" in first and "cos" not in first
    assert {"cos", "relu", "_autograd_grad"} <= second
    assert {"exp", "tan"} <= set(outside) and not {"sin", "cos", "relu"} & set(outside)


def test_tracing_can_be_left_and_nothing_is_recorded_meanwhile():
    def function(x):
        with tensors.outside_of_tracing():
            real = torch.ones(2, device="cpu", dtype=torch.float32).sin()
        assert not isinstance(real, torch._subclasses.FakeTensor)
        return x.cos()

    for before in (True, False):
        traced = make_fx(function, tracing_mode="fake", pre_dispatch=before)(torch.randn(2))
        assert [n.target for n in traced.graph.find_nodes(op="call_function", target=torch.ops.aten.sin.default)] == []
        assert len(traced.graph.find_nodes(op="call_function", target=torch.ops.aten.cos.default)) == 1


@torch.library.custom_op("tahf4_tests::refused", mutates_args=())
def refused(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


@refused.register_fake
def _(x):
    return torch.empty_like(x)


def test_inductor_refuses_an_operator_whose_result_is_read():
    importlib.import_module("torch._inductor.lowering")
    inductor.refuse_in_inductor(refused._opoverload, lambda: ValueError("not to be read"))
    options = {"fx_graph_cache": False}
    asks = torch.compile(lambda x: x + refused(x).shape[0], options=options)
    assert torch.equal(asks(torch.ones(2)), torch.full((2,), 3.0))
    with pytest.raises(Exception, match="not to be read"):
        torch.compile(lambda x: refused(x) + 1, options=options)(torch.ones(2))


def test_dynamo_says_when_it_makes_weights_constants():
    found = []

    def backend(graph_module, example_inputs):
        found.append((dynamo.constant_weights().rpartition(".")[2], len(list(graph_module.parameters()))))
        return graph_module.forward

    of_dynamo = ("install_free_tensors", "prepare_freezing")
    settings = ((torch._inductor, "freezing"), *((torch._dynamo, name) for name in of_dynamo))
    for where, name in settings:
        torch._dynamo.reset()
        with where.config.patch(**{name: True}):
            torch.compile(nn.Linear(2, 2), backend=backend)(torch.ones(1, 2))
    torch._dynamo.reset()
    torch.compile(nn.Linear(2, 2), backend=backend)(torch.ones(1, 2))
    assert found == [(name, 2) for _, name in settings] + [("", 0)]


def test_a_derivative_is_asked_for_by_gradients_and_by_tangents():
    x = torch.randn(3)
    asked = tensors.derivative_asked
    assert not asked([x.clone().requires_grad_()]), "gradient mode is off"
    with torch.enable_grad():
        assert asked([x, x.clone().requires_grad_()])
        assert not asked([x])
    with forward_ad.dual_level():
        assert not asked([x])
        assert asked([x, forward_ad.make_dual(x, x)])
    seen = []
    torch.func.jvp(lambda value: (seen.append(asked([value])), value)[1], (x,), (x,))
    assert seen == [True]


def test_an_operator_runs_below_its_function_for_autograd():
    with torch.library._scoped_library("tahf4_tests", "FRAGMENT") as library:
        library.define("below(Tensor x) -> Tensor")
        operator, seen = torch.ops.tahf4_tests.below.default, []

        def autograd(keyset, *args):
            seen.append("autograd")
            return tensors.below_autograd(operator, keyset, args, {})

        library.impl("below", autograd, "Autograd", with_keyset=True)
        library.impl("below", lambda x: x + 1, "CompositeExplicitAutograd")
        x = torch.zeros(2, requires_grad=True)
        with torch.enable_grad():
            y = operator(x)
        assert seen == ["autograd"]
        assert torch.equal(y, torch.ones(2))
        assert not y.requires_grad, "nothing below records"


def test_dynamo_begins_again_with_floats_as_constants():
    found = []

    def backend(graph_module, example_inputs):
        context = torch._guards.TracingContext.get()
        fakes = [dynamo.fake_input(context, value) for value in example_inputs]
        reads = [node for node in graph_module.graph.nodes if node.target == "item"]
        numbers = [fake.item() for fake in fakes if fake.ndim == 0]
        twins = [fake.detach() for fake in fakes if fake.ndim == 0]
        for fake, twin in zip([fake for fake in fakes if fake.ndim == 0], twins, strict=True):
            dynamo.keep_number(fake, twin)
            assert str(twin.item()) == str(fake.item())
        symbols = set().union(*map(dynamo.changing_floats, numbers))
        found.append((len(reads), len(symbols)))
        if symbols:
            dynamo.compile_for_values(symbols)
        return graph_module.forward

    torch._dynamo.reset()
    compiled = torch.compile(lambda x, scale: x * scale, backend=backend)
    x = torch.randn(3)
    for scale in (1.0, 0.5, 0.25):
        assert torch.equal(compiled(x, scale), x * scale)
    assert found[:3] == [(0, 0), (1, 1), (0, 0)]
    assert dynamo.changing_floats(3) == dynamo.changing_floats(None) == set()


@pytest.mark.parametrize("by", ["environment", "settings", "nothing"])
def test_the_compiler_is_off_where_a_backend_gets_nothing(by, monkeypatch):
    graphs = []
    if by == "environment":
        monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    with torch._dynamo.config.patch(disable=by == "settings"):
        assert dynamo.compiler_is_off() == (by != "nothing")
        torch.compile(Block(), backend=lambda graph, inputs: graphs.append(graph) or graph)(torch.randn(2, 64))
    assert bool(graphs) == (by == "nothing")


def test_a_module_is_told_where_it_is_compiled_and_its_calls_go_through_a_function(monkeypatch):
    from torch._dynamo.eval_frame import OptimizeContext

    def mine(graph_module, example_inputs, options=None):
        return graph_module.forward

    def around(call, args, kwargs):
        seen.append(frames.outermost_that_holds(model.blocks[0]))
        return call(*args, **kwargs), False

    def tell(*what):
        told.append(what)
        return around

    told, functions, seen, x = [], [], [], torch.randn(3, 64)
    monkeypatch.setattr(OptimizeContext, "__call__", OptimizeContext.__call__)
    dynamo.when_compiled(mine, tell, lambda *what: functions.append(what))
    torch.compile(Stack(depth=1), backend="eager")(x)
    torch.compile(lambda x: x + 1, backend="eager")(x)
    assert told == []
    model = Stack(depth=1)
    want = torch.compile(model, backend=mine, options={"some": 1})(x)
    model.blocks[0].compile(backend=mine)
    assert functions == []
    assert told == [(model, {"options": {"some": 1}}), (model.blocks[0], {})] and seen == [model]
    assert torch.equal(model(x), want) and seen == [model, model]
    assert frames.outermost_that_holds(model) is model


def test_a_function_is_told_where_it_is_compiled_with_the_module_whose_method_it_is(monkeypatch):
    from torch._dynamo.eval_frame import OptimizeContext

    def mine(graph_module, example_inputs, options=None):
        return graph_module.forward

    def around(call, args, kwargs):
        seen.append(args)
        return call(*args, **kwargs), True  # there is no last call of a function: who holds it goes on calling it

    def tell(*what):
        told.append(what)
        return around

    told, modules, seen, x = [], [], [], torch.randn(3, 64)
    monkeypatch.setattr(OptimizeContext, "__call__", OptimizeContext.__call__)
    dynamo.when_compiled(mine, lambda *what: modules.append(what), tell)
    model, plain = Stack(depth=1), nn.Sequential(nn.Linear(64, 64))
    forward = torch.compile(model.forward, backend=mine, options={"some": 1})
    step = torch.compile(lambda x: model(x) + 1, backend=mine)
    assert told == [(model, {"options": {"some": 1}}), (None, {})]
    assert torch.equal(step(x), forward(x) + 1) and torch.equal(step(x), forward(x) + 1) and len(seen) == 4
    assert not modules
    torch.compile(plain, backend=mine)(x)  # PyTorch wraps the forward of its own modules into a function
    copy.deepcopy(torch.compile(model, backend=mine))(x)
    plain.compile(backend=mine)
    assert len(told) == 2 and [what[0] for what in modules] == [plain, model, plain]


def test_a_model_that_is_handed_back_uncompiled_is_told_with_the_backend(monkeypatch):
    from torch._dynamo.eval_frame import _NullDecorator

    def mine(graph, inputs):
        raise AssertionError("nothing is compiled")

    told = []
    monkeypatch.setattr(_NullDecorator, "__call__", _NullDecorator.__call__)
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    dynamo.when_not_compiled(mine, lambda: told.append(1))
    model = Block()
    assert torch.compile(model, backend="eager") is torch.compile(model, backend=mine, disable=True) is model
    assert told == []
    assert torch.compile(model, backend=mine) is model and told == [1]
    model.compile(backend=mine, options={"some": 1})
    assert told == [1, 1]


def test_the_stance_of_the_compiler_is_known():
    assert dynamo.compiler_stance() == "default"
    with torch.compiler.set_stance("force_eager"):
        assert dynamo.compiler_stance() == "force_eager"
