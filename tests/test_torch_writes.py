"""What tahf4 relies on where PyTorch writes to parameters unseen: the contracts of ``torch_private.writes``."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from torch import Tensor, nn

from tahf4_compiler.torch_private import writes


@pytest.fixture
def told(monkeypatch):
    """Watch ``.data`` for one test; return the parameters that were told of."""
    found: list[Tensor] = []
    if "data" in nn.Parameter.__dict__:  # an earlier test of this process watches for good
        monkeypatch.delattr(nn.Parameter, "data")
    monkeypatch.setattr(nn.Parameter, "data", None, raising=False)
    writes.watch_data(found.append)
    return found


class Lowers(nn.Parameter):
    """A parameter with its own ``data``, as libraries of quantized weights have."""

    @property
    def data(self):
        return super().data.half()


def test_data_is_what_it_was_and_is_told_of(told):
    parameter, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.zeros(2))
    address = parameter.data_ptr()
    assert parameter.data.data_ptr() == address and parameter.data.requires_grad is False
    parameter.data += 1
    parameter.data = torch.full((3,), 5.0)
    assert parameter.tolist() == [5.0, 5.0, 5.0] and other.tolist() == [0.0, 0.0]
    assert len(told) == 5 and all(seen is parameter for seen in told)
    assert type(parameter).data.__get__(parameter).tolist() == parameter.tolist()
    assert type(parameter).data.__doc__ == Tensor.data.__doc__


def test_what_data_refuses_it_still_refuses(told):
    parameter = nn.Parameter(torch.ones(2))
    with pytest.raises(RuntimeError, match="Deleting tensor data is not allowed"):
        del parameter.data
    with pytest.raises(RuntimeError, match="incompatible tensor type"):
        parameter.data = torch.empty(2, device="meta")
    with pytest.raises(TypeError):
        parameter.data = 3


def test_dynamo_compiles_nothing_of_what_watches(monkeypatch):
    """Hooks that cast layers set ``.data`` of every parameter beside graphs: one compilation each, or a limit hit."""
    seen = {}

    def forget(parameter):
        seen.pop(id(parameter), None)

    monkeypatch.setattr(nn.Parameter, "data", None, raising=False)
    writes.watch_data(forget)

    def scale(parameters):
        for parameter in parameters:
            torch._dynamo.graph_break()  # in a loop: this code runs as it is, and what it calls may be compiled
            parameter.data = parameter.data * 2

    parameters = [nn.Parameter(torch.ones(2)) for _ in range(4)]
    seen.update((id(parameter), True) for parameter in parameters)
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
        torch.compile(scale, backend="eager")(parameters)
    assert [parameter.tolist() for parameter in parameters] == [[2.0, 2.0]] * 4 and not seen


def test_a_subclass_keeps_its_own_data(told):
    lowers = Lowers(torch.ones(2))
    assert lowers.data.dtype == torch.float16 and [seen is lowers for seen in told] == [True]
    del told[:]
    assert torch.ones(2).data.tolist() == [1.0, 1.0] and not told  # a tensor is no parameter


def test_parameters_without_shapes_yet_get_them(told):
    linear = nn.LazyLinear(4)
    assert linear(torch.ones(2, 3)).shape == (2, 4)
    assert type(linear.weight) is nn.Parameter and linear.weight.shape == (4, 3)


def test_parameters_are_copied_and_pickled(told):
    parameter = nn.Parameter(torch.ones(2), requires_grad=False)
    for copied in (copy.deepcopy(parameter), pickle.loads(pickle.dumps(parameter))):
        assert torch.equal(copied, parameter) and type(copied) is nn.Parameter and not copied.requires_grad


class ReadsData(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data = self.weight.data + 1
        return x @ self.weight.data


def test_dynamo_traces_data_as_before(told, monkeypatch):
    def traced() -> tuple[list[str], Tensor, Tensor]:
        torch._dynamo.reset()
        names: list[str] = []

        def backend(graph_module, example_inputs):
            names.extend(str(node.target) for node in graph_module.graph.nodes if node.op == "call_function")
            return graph_module.forward

        model = ReadsData()
        with torch.no_grad():
            result = torch.compile(model, backend=backend, fullgraph=True)(torch.ones(2, 3))
        return [name.partition(" at ")[0] for name in names], result, model.weight.detach()

    watched = traced()
    monkeypatch.delattr(nn.Parameter, "data")
    plain = traced()
    assert watched[0] == plain[0] and plain[0]
    assert torch.equal(watched[1], plain[1]) and torch.equal(watched[2], plain[2])


def test_threads_read_their_own_data(told):
    parameters = [nn.Parameter(torch.full((2,), float(i))) for i in range(4)]
    wrong: list[int] = []

    def read(i: int) -> None:
        wrong.extend(i for _ in range(500) if parameters[i].data[0] != i)

    threads = [threading.Thread(target=read, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(told) == 4 * 500


@pytest.mark.parametrize("fused", [True, False])
def test_steps_of_fused_optimizers_are_told_of_and_no_others(fused):
    """They alone leave version counters as they were."""
    found: list[Tensor] = []
    writes.watch_fused_optimizers(found.append)
    for cls in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad):
        del found[:]
        parameter = nn.Parameter(torch.ones(2))
        parameter.grad = torch.ones(2)
        version = parameter._version
        cls([parameter], lr=0.1, fused=fused).step()
        assert parameter.tolist() != [1.0, 1.0]
        assert (parameter._version == version) is fused
        assert [seen is parameter for seen in found] == ([True] if fused else [])



@pytest.fixture
def alone():
    """Let this process be a process group."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_what_fsdp_gathers_is_told_of(alone):
    """It writes into memory that the parameter had before, and keeps its version counter."""
    from torch.distributed.fsdp import fully_shard

    found: list[Tensor] = []
    writes.watch_gathering(found.append)
    linear = fully_shard(nn.Linear(4, 4, bias=False))
    linear.unshard()
    (first,) = found
    assert first is linear.weight and type(first) is nn.Parameter
    version = first._version
    linear.reshard()
    with torch.no_grad():
        linear.weight.fill_(3)
    linear.unshard()
    assert linear.weight is first and first._version == version and first.unique().tolist() == [3.0]
    assert len(found) == 2 and found[1] is first
    linear.unshard()
    assert len(found) == 2, "it was whole"
