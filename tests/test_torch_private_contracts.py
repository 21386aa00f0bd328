"""More of what tahf4 relies on in PyTorch's insides: modes, Inductor, logs, and the stack."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest
import torch
from models import Stack
from torch import nn
from torch._subclasses import FakeTensor, FakeTensorMode

from tahf4_compiler.format import hif4
from tahf4_compiler.ops import reference
from tahf4_compiler.torch_private import collectives, dynamo, frames, graphs, inductor, tensors


def test_the_stack_tells_functions_their_variables_and_libraries():
    def outer(wanted):
        return inner()

    def inner():
        return next(caller for caller in frames.callers() if caller.name == "outer")

    found = outer("this one")
    assert found.variable("wanted") == "this one" and found.variable("other") is None
    assert found.code is outer.__code__ and found.library == __name__.partition(".")[0]
    assert next(frames.callers()).name == "test_the_stack_tells_functions_their_variables_and_libraries"


@pytest.mark.parametrize(("rows", "columns", "k"), [(1, 3, 64), (17, 8, 320)])
def test_products_of_bytes_are_exact_in_32_bits(rows, columns, k):
    left, right = (torch.randint(-128, 128, (size, k), dtype=torch.int8) for size in (rows, columns))
    left[0], right[0] = -128, -128
    out = torch.empty(rows, columns, dtype=torch.int32)
    tensors.int_product(left, right, out)
    assert torch.equal(out.long(), left.long() @ right.long().t())


def test_linears_that_python_calls_are_collected_and_compiled_ones_are_not():
    model, x, found, functional = Stack(depth=1), torch.randn(2, 64), set(), {}
    with frames.python_linears(found, functional):
        model.first(x)
    assert found == {model.first} and functional == {}
    with frames.python_linears(set(), functional):
        nn.functional.linear(x, weight=model.last.weight)
        nn.functional.linear(x, model.first.weight.t())
        codes = [part for tensor in (x, model.last.weight) for part in hif4.quantize(tensor)[:2]]
        reference.linear(*codes, None, x.dtype)  # reads F.linear itself
    assert [text.partition(":")[0] for text in functional] == [
        "test_linears_that_python_calls_are_collected_and_compiled_ones_are_not, test_torch_private_contracts.py"
    ]
    assert [*functional.values()] == [{id(model.last.weight), id(model.first.weight)}]
    assert not torch.overrides._get_current_function_mode_stack()
    attention = nn.MultiheadAttention(64, 1)
    functional.clear()
    found.clear()
    with frames.python_linears(found, functional, [nn.MultiheadAttention]):
        attention(x, x, x)  # calls F.multi_head_attention_forward
    assert found == {attention} and functional == {}
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    found.clear()
    with frames.python_linears(found, functional):
        compiled(x)
    assert found == set()
    assert sys.getprofile() is None


def test_fake_modes_are_told_and_left():
    assert not tensors.under_modes()
    with FakeTensorMode():
        assert tensors.under_modes()
        assert isinstance(torch.ones(1), FakeTensor)
        with tensors.real_tensors():
            assert not isinstance(torch.ones(1), FakeTensor)


def test_symbolic_sizes_run_by_the_kernels_in_python():
    found = []

    def backend(graph_module, example_inputs):
        context = dynamo.compilation()
        (x,) = [dynamo.fake_input(context, v) for v in example_inputs if isinstance(v, torch.Tensor)]
        with tensors.python_kernels(), context.fake_mode:
            found.append((context.fake_mode, torch.ops.aten.linear.default(x, torch.empty(3, 4)).shape))
        return graph_module.forward

    torch.compile(lambda x: x + 1, backend=backend, dynamic=True)(torch.randn(5, 4))
    ((mode, shape),) = found
    assert isinstance(mode, FakeTensorMode)
    assert isinstance(shape[0], torch.SymInt) and shape[1] == 3
    assert dynamo.compilation() is None


def test_a_compilation_of_ones_own_has_its_fake_mode():
    mode = FakeTensorMode()
    with dynamo.tracing(mode):
        assert dynamo.compilation().fake_mode is mode
    assert dynamo.compilation() is None


def test_dynamo_leaves_a_hidden_function_alone():
    graphs_seen = []
    hidden = tensors.hidden_from_dynamo(lambda x: x + 1)
    function = torch.compile(hidden, backend=lambda graph, inputs: graphs_seen.append(graph) or graph.forward)
    assert torch.equal(function(torch.ones(1)), torch.full((1,), 2.0))
    assert graphs_seen == []


def test_data_of_another_kind_is_not_taken():
    x = nn.Parameter(torch.ones(2))
    assert tensors.takes_data(x, torch.zeros(3))
    assert not tensors.takes_data(x, torch.zeros(2).to_sparse())


def test_the_strides_of_contiguous_tensors():
    for shape in ((), (3,), (2, 1, 5)):
        assert tuple(tensors.contiguous_strides(shape)) == torch.empty(shape).stride()


def test_the_code_of_a_graph_says_what_it_imports():
    traced = torch.fx.symbolic_trace(lambda x: torch.nn.functional.relu(x))
    code = traced.graph.python_code("self")
    scope: dict[str, object] = {}
    exec("\n".join([*graphs.import_lines(code.globals), code.src]), scope)
    assert code.globals and all(scope[name] is value for name, value in code.globals.items())
    assert torch.equal(scope["forward"](None, torch.tensor([-1.0, 1.0])), torch.tensor([0.0, 1.0]))
    assert graphs.import_lines({}) == []


def test_artifacts_are_written_where_somebody_reads_them(monkeypatch):
    class Reader(logging.Handler):
        def emit(self, record):
            if "artifact" in record.metadata:  # other records name the files on the stack
                found.append((record.metadata["artifact"]["name"], record.payload))

    found: list[tuple[str, str]] = []
    log = torch._logging._internal.trace_log
    monkeypatch.setattr(log, "handlers", [])
    assert not dynamo.logs_artifacts()
    monkeypatch.setattr(log, "handlers", [Reader()])
    assert dynamo.logs_artifacts()
    dynamo.log_artifact("a name", "a text")
    assert found == [("a name", "a text")]


def test_there_is_a_folder_for_debugging(tmp_path, monkeypatch):
    monkeypatch.setattr(torch._dynamo.config, "debug_dir_root", str(tmp_path))
    assert dynamo.debug_folder().parent == tmp_path


def test_inductor_compiles_a_graph_and_is_told_which_inputs_stay(monkeypatch):
    from functorch.compile import make_boxed_func
    from torch._inductor import compile_fx

    def inner(lowered, given, **settings):
        told.append(settings)
        return make_boxed_func(lowered.forward)

    told: list[dict[str, object]] = []
    monkeypatch.setattr(compile_fx, "compile_fx_inner", inner)
    traced = torch.fx.experimental.proxy_tensor.make_fx(lambda x, y: [x * y + 1])(torch.ones(4), torch.ones(4))
    mode = FakeTensorMode()
    fakes = [mode.from_tensor(torch.ones(4)) for _ in range(2)]
    with dynamo.tracing(mode), torch.no_grad():
        run = inductor.compile_graph(traced, fakes, {"fx_graph_cache": False}, stay=[1])
    assert told[0]["static_input_idxs"] == [1]
    assert torch.equal(run(torch.ones(4), torch.full((4,), 2.0))[0], torch.full((4,), 3.0))


def test_inductor_says_what_it_compiles_with(monkeypatch, tmp_path):
    from torch._inductor import cpp_builder

    assert inductor.cpp_compiler() == cpp_builder.get_cpp_compiler()
    assert isinstance(inductor.is_gcc(), bool) and inductor.vector_bits() % 64 == 0
    builder = inductor.library_builder("some", [tmp_path / "a.cpp"], tmp_path / "out", ("-DMARK",))
    command, target = builder.get_command_line(), Path(builder.get_target_file_path())
    assert str(tmp_path / "a.cpp") in command and "-DMARK" in command and str(target) in command
    assert target.parent == tmp_path / "out" and target.name.startswith("some")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    assert inductor.cache_folder(made=False) == tmp_path / "cache" and not (tmp_path / "cache").exists()
    assert inductor.cache_folder() == tmp_path / "cache" and (tmp_path / "cache").is_dir()
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
        assert inductor.cpp_compiler() is None


def test_errors_of_fake_tensors_are_told():
    with FakeTensorMode() as mode:
        x = mode.from_tensor(torch.ones(3))
        with pytest.raises(inductor.FAKE_ERRORS):
            x.nonzero()


def test_results_of_collectives_are_new_tensors(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        part = torch.ones(3)
        whole = collectives.sum_of_ranks(part, torch.distributed.group.WORLD) + 1
        assert torch.equal(whole, torch.full((3,), 2.0)) and torch.equal(part, torch.ones(3))
        for function in (collectives.largest_of_ranks, collectives.gathered_of_ranks):
            assert torch.equal(function(part, torch.distributed.group.WORLD) + 1, whole)
    finally:
        torch.distributed.destroy_process_group()
