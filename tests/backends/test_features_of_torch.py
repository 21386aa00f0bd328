"""Features of PyTorch around a compiled model, that change what runs: in 4 bits, or said."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from helpers import GRAPH
from models import Stack
from tahf4_compiler.backends import dynamo, messages
from torch import nn

from tahf4_compiler.torch_private.dynamo import before_frames


@pytest.fixture(autouse=True)
def _no_grad():
    before_frames(dynamo.tahf4, dynamo._begin, messages.say_overruled)  # as torch.compile(backend="tahf4") does first
    with torch.no_grad():
        yield


def compiled(model: nn.Module, **options):
    return torch.compile(model, backend="tahf4", options={**GRAPH, **options})


@pytest.mark.parametrize("stance", [pytest.param("force_eager", marks=pytest.mark.slow), "eager_on_recompile"])
def test_calls_that_a_stance_leaves_uncompiled_are_said_once(stance, caplog):
    model = Stack().eval()
    call = compiled(model)
    for _ in range(2):
        call(torch.randn(4, 64))
    x = torch.randn(7, 64)
    with torch.compiler.set_stance(stance):
        for _ in range(3):
            assert torch.equal(call(x), model(x)), "it runs as it is"
    (message,) = [r.getMessage() for r in caplog.records if r.name == messages.__name__]
    assert "6 linears of its repeated blocks run in high precision, because Dynamo did not hand" in message
    assert not torch.equal(call(x), model(x))


def test_threads_that_compile_one_model_at_once_get_one_result():
    model, x, found = Stack().eval(), torch.randn(4, 64), []
    want, call = compiled(copy.deepcopy(model))(x), compiled(model)
    torch._dynamo.reset()

    def run():
        with torch.no_grad():
            found.append(call(x))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2 and all(torch.equal(value, want) for value in found)


def test_weights_that_are_replaced_are_seen_without_guards():
    model, x = Stack().eval(), torch.randn(4, 64)
    call = compiled(model, guard_filter_fn=torch.compiler.skip_guard_on_all_nn_modules_unsafe)
    before = call(x)
    for block in model.blocks:
        block.up.weight = nn.Parameter(block.up.weight * -2)
    found = call(x)
    torch._dynamo.reset()
    assert torch.equal(found, compiled(copy.deepcopy(model))(x)) and not torch.equal(found, before)


def test_an_exported_program_that_is_compiled_runs_in_4_bits():
    model, x = Stack().eval(), torch.randn(4, 64)
    want = compiled(copy.deepcopy(model))(x)
    assert torch.allclose(compiled(torch.export.export(model, (x,)).module())(x), want, atol=1e-6)


def test_a_compiled_model_in_inference_mode_or_pickled_or_in_data_parallel_runs_in_4_bits():
    model, x = Stack(depth=1).eval(), torch.randn(4, 64)
    plain = model(x)
    call = compiled(model)
    with torch.inference_mode():
        found = call(x)
    assert not torch.allclose(found, plain, atol=1e-3)
    for other in (call, pickle.loads(pickle.dumps(call)), nn.DataParallel(call)):
        assert torch.equal(other(x), found)
    model.requires_grad_(False)
    assert torch.equal(call(x), found)


def test_pytorch_drops_the_compilation_in_place_from_a_shallow_copy():
    """If this fails, PyTorch keeps it: the row of docs/compatibility.md goes."""
    model, x = Stack(depth=1).eval(), torch.randn(4, 64)
    plain = model(x)
    model.compile(backend="tahf4", options=GRAPH)
    assert not torch.equal(model(x), plain) and torch.equal(copy.copy(model)(x), plain)
