"""The rules that keep compiled code correct, one claim a test."""

from __future__ import annotations

import ast
import gc
import os
import shutil
import subprocess
import sys
import textwrap
import weakref
from pathlib import Path

import pytest
import torch
from helpers import GRAPH, block_linears, expected, plans, relative
from models import Block, Stack, output, wan
from torch import Tensor, nn

import tahf4_compiler as tahf4
from tahf4_compiler.graph.inputs import PackedWeight
from tahf4_compiler.ops import registry
from tahf4_compiler.weights.store import store

CLOSE = 1e-5


pytestmark = pytest.mark.usefixtures("no_grad")


def test_a_compiled_model_computes_what_w4a4_means():
    model, x = Stack().eval(), torch.randn(5, 64)
    compiled = torch.compile(model, backend="tahf4", options=GRAPH, fullgraph=True)
    assert relative(compiled(x), expected(model, block_linears(model))(x)) < CLOSE
    assert relative(compiled(x), model(x)) > 1e-3, "nothing was quantized"


def test_two_models_of_one_class_keep_their_own_weights():
    models = [Stack().eval() for _ in range(2)]
    x = torch.randn(5, 64)
    for model in models:
        model.compile(backend="tahf4", options=GRAPH)
    for _ in range(2):
        for model in models:
            assert relative(model(x), expected(model, block_linears(model))(x)) < CLOSE


def test_blocks_compiled_one_by_one_keep_their_own_weights(tmp_path):
    model, x = Stack(depth=5).eval(), torch.randn(5, 64)
    want = expected(model, block_linears(model))(x)
    for block in model.blocks:
        block.compile(backend="tahf4", options={**GRAPH, "dump_dir": str(tmp_path)}, fullgraph=True)
    assert relative(model(x), want) < CLOSE
    assert len(plans(tmp_path)) == 1, "five blocks of one class share one compiled graph"


@pytest.mark.slow
def test_compile_repeated_blocks_gives_the_numbers_of_the_whole_model():
    model, inputs = wan()
    whole = output(torch.compile(model, backend="tahf4", options=GRAPH)(**inputs))
    torch._dynamo.reset()
    model.compile_repeated_blocks(backend="tahf4", options=GRAPH, fullgraph=True)
    assert relative(output(model(**inputs)), whole) < CLOSE


@pytest.mark.parametrize("change", ["mul_", "data", "data_element", "load_state_dict", "swap_rows", "peft_style"])
def test_a_changed_weight_is_packed_again(change):
    model, x = Stack().eval(), torch.randn(5, 64)
    compiled = torch.compile(model, backend="tahf4", options=GRAPH)
    compiled(x)
    weight = model.blocks[1].up.weight
    if change == "mul_":
        weight.mul_(1.5)
    elif change == "data":
        weight.data = torch.randn_like(weight)
    elif change == "data_element":
        weight.data[3, 5] += 8.0
    elif change == "load_state_dict":
        model.load_state_dict(Stack().state_dict())
    elif change == "swap_rows":
        weight.data[[0, 7]] = weight.data[[7, 0]].clone()
    else:
        weight.data += 0.2 * torch.randn_like(weight)
    assert relative(compiled(x), expected(model, block_linears(model))(x)) < CLOSE


def test_a_replaced_parameter_is_packed_again():
    model, x = Stack().eval(), torch.randn(5, 64)
    compiled = torch.compile(model, backend="tahf4", options=GRAPH)
    compiled(x)
    model.blocks[0].down.weight = nn.Parameter(torch.randn_like(model.blocks[0].down.weight))
    assert relative(compiled(x), expected(model, block_linears(model))(x)) < CLOSE


def test_the_version_check_sees_in_place_changes_and_needs_no_reading():
    model, x = Stack().eval(), torch.randn(5, 64)
    compiled = torch.compile(model, backend="tahf4", options={**GRAPH, "weight_check": "version"})
    compiled(x)
    model.blocks[1].up.weight.mul_(1.5)
    assert relative(compiled(x), expected(model, block_linears(model))(x)) < CLOSE


def test_weights_are_converted_once_over_calls_shapes_and_recompiles():
    model = Stack().eval()
    compiled = torch.compile(model, backend="tahf4", options=GRAPH, dynamic=False)
    before = store.conversions
    for rows in (5, 5, 7, 9):
        compiled(torch.randn(rows, 64))
    assert store.conversions - before == len(block_linears(model))


def test_another_decision_for_another_model_is_another_lowering():
    plain, kept = Stack().eval(), Stack().eval()
    tahf4.keep(kept, [r"blocks\.0\.", r"down"])
    x = torch.randn(5, 64)
    for model in (plain, kept):
        model.compile(backend="tahf4", options=GRAPH)
    want = [p for p in block_linears(kept) if not p.startswith("blocks.0.") and not p.endswith("down")]
    for _ in range(2):
        assert relative(plain(x), expected(plain, block_linears(plain))(x)) < CLOSE
        assert relative(kept(x), expected(kept, want)(x)) < CLOSE


@pytest.mark.slow
def test_another_decision_goes_through_inductor_too():
    plain, kept = Block().eval(), Block().eval()
    tahf4.keep(kept, ["up"])
    x = torch.randn(5, 64)
    for model in (plain, kept):
        model.compile(backend="tahf4", dynamic=True, options={**GRAPH, "inductor": True})
    for rows in (5, 9):
        x = torch.randn(rows, 64)
        assert relative(plain(x), expected(plain, ["up", "down"])(x)) < CLOSE
        assert relative(kept(x), expected(kept, ["down"])(x)) < CLOSE


def test_models_and_weights_are_freed():
    model, x = Stack().eval(), torch.randn(5, 64)
    torch.compile(model, backend="tahf4", options=GRAPH)(x)
    weight = weakref.ref(model.blocks[0].up.weight)
    del model
    torch._dynamo.reset()
    gc.collect()
    assert weight() is None


@pytest.mark.parametrize("dynamic", [None, *(pytest.param(it, marks=pytest.mark.slow) for it in (True, False))])
def test_new_shapes_give_the_right_numbers(dynamic):
    model = Stack().eval()
    want = expected(model, block_linears(model))
    compiled = torch.compile(model, backend="tahf4", options=GRAPH, dynamic=dynamic)
    for shape in ((5, 64), (6, 64), (2, 3, 64), (64,), (9, 64), (1, 64)):
        x = torch.randn(shape)
        assert relative(compiled(x), want(x)) < CLOSE


def test_a_dynamic_graph_is_compiled_once(tmp_path):
    model = Stack().eval()
    compiled = torch.compile(model, backend="tahf4", options={**GRAPH, "dump_dir": str(tmp_path)}, dynamic=True)
    for rows in (5, 6, 9, 40):
        compiled(torch.randn(rows, 64))
    assert len(plans(tmp_path)) == 1


def test_results_do_not_depend_on_the_other_tokens():
    model, x = Stack().eval(), torch.randn(6, 64)
    compiled = torch.compile(model, backend="tahf4", options=GRAPH, dynamic=True)
    whole = compiled(x)
    x[3:] *= 1000
    assert torch.equal(compiled(x)[:3], whole[:3])
    torch.testing.assert_close(compiled(x[:3]), whole[:3], rtol=1e-5, atol=1e-6)


def test_a_graph_that_needs_gradients_is_refused():
    model, x = Stack(), torch.randn(5, 64)
    with torch.enable_grad(), pytest.raises(Exception, match=r"torch\.no_grad\(\)") as caught:
        torch.compile(model, backend="tahf4", options=GRAPH)(x)
    assert isinstance(caught.value.__cause__ or caught.value.inner_exception, tahf4.GradientError)


def test_a_frozen_model_runs_in_gradient_mode():
    model, x = Stack().eval().requires_grad_(False), torch.randn(5, 64)
    with torch.enable_grad():
        assert not torch.compile(model, backend="tahf4", options=GRAPH)(x).requires_grad


def test_inference_mode_works():
    model, x = Stack().eval(), torch.randn(5, 64)
    with torch.inference_mode():
        y = torch.compile(model, backend="tahf4", options=GRAPH)(x)
    assert relative(y, expected(model, block_linears(model))(x)) < CLOSE


def test_inductor_gives_the_numbers_of_the_graph():
    model, x = Stack().eval(), torch.randn(5, 64)
    graph = torch.compile(model, backend="tahf4", options=GRAPH)(x)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="tahf4", options={**GRAPH, "inductor": True})(x)
    assert relative(compiled, graph) < CLOSE


class Scaled(Stack):
    """Multiplies by a Python number, which dynamic=True makes a symbolic input."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = 0.75

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * self.scale)


@pytest.mark.parametrize("inductor", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_python_number_may_be_symbolic(inductor):
    model, x = Scaled().eval(), torch.randn(5, 64)
    options = {**GRAPH, "inductor": inductor}
    compiled = torch.compile(model, backend="tahf4", options=options, dynamic=True, fullgraph=True)
    for scale in (0.75, 0.5):
        model.scale = scale
        assert relative(compiled(x), expected(model, block_linears(model))(x)) < CLOSE


SECOND_PROCESS = """
    import os, sys, torch
    import torch._inductor.compile_fx
    import tahf4_compiler.backends.dynamo
    from models import Stack

    def run(keep):
        torch.manual_seed(0)
        model, x = Stack(2).eval(), torch.randn(5, 64)
        with torch.no_grad():
            y = torch.compile(model, backend="tahf4", options={"keep": keep})(x)
            torch._dynamo.reset()
            z = torch.compile(model, backend="tahf4", options={"keep": keep, "inductor": False})(x)
        torch.testing.assert_close(y, z, rtol=1e-5, atol=1e-6)
        print(y.double().sum().item(), flush=True)

    for keep in sys.argv[1:]:  # a process for each, which has imported everything and compiled nothing
        child = os.fork()
        if not child:
            code = 1
            try:
                run(keep.split(",") if keep else [])
                code = 0
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                os._exit(code)
        assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.slow
def test_a_second_process_with_another_configuration_and_a_warm_cache_is_right(tmp_path):
    from torch._inductor.codecache import cache_dir

    registry.kernels()  # the C++ kernels are built
    if (built := Path(cache_dir(), "tahf4")).is_dir():
        shutil.copytree(built, tmp_path / "tahf4")
    environment = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    keeps = ["", r"blocks\.1\.,up", ""]
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SECOND_PROCESS), *keeps],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    sums = run.stdout.split()
    assert sums[0] == sums[2] != sums[1]


def test_the_backend_is_listed_once_and_found_by_name():
    assert torch._dynamo.list_backends().count("tahf4") == 1


def test_threads_share_one_conversion():
    from concurrent.futures import ThreadPoolExecutor

    weights = [nn.Parameter(torch.randn(64, 128)) for _ in range(4)]
    before = store.conversions
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: store.get([((w,), PackedWeight((0,))) for w in weights]), range(8)))
    assert store.conversions - before == len(weights)
    assert all(torch.equal(r[0].codes, results[0][0].codes) for r in results)


def test_nothing_is_unpickled():
    root = Path(__file__).parents[2]
    sources = [p for folder in ("tahf4_compiler", "passes", "backends", "tools") for p in (root / folder).rglob("*.py")]
    assert len(sources) > 30
    for path in sources:
        text = path.read_text()
        nodes = list(ast.walk(ast.parse(text)))
        names = {alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names}
        names |= {n.module for n in nodes if isinstance(n, ast.ImportFrom) and n.module}
        assert not {name for name in names if name.split(".")[0] in ("pickle", "cloudpickle", "dill", "joblib")}, path
        assert text.count("torch.load(") == text.count("weights_only=True"), f"{path}: checkpoints hold tensors only"
