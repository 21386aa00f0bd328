"""A call on a device that is not the CPU runs its lowered graph, reads no weight and waits for nothing.

The meta device stands for such a device: it has no values, so that whatever reads one raises an error.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import accelerate
import pytest
import torch
from diffusers.hooks import apply_group_offloading
from models import Block, Stack
from tahf4_compiler.backends.dynamo import CompiledGraph
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import tahf4_compiler as tahf4
from tahf4_compiler.weights import checksum
from tahf4_compiler.weights.store import store

BACKEND: dict[str, Any] = {"backend": "tahf4", "fullgraph": True, "options": {"inductor": False}}


class Count(TorchDispatchMode):
    """Counts operators; those inside of an operator of tahf4 belong to it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[func] += 1
        return func(*args, **(kwargs or {}))


class Gated(Block):
    """Two linears read one activation: products can be merged, and multipliers compared."""

    def __init__(self, dim: int = 64, hidden: int = 128) -> None:
        super().__init__(dim, hidden)
        self.gate = nn.Linear(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.down(self.up(y) * self.gate(y))


@pytest.fixture
def counts(monkeypatch):
    """Return two counts of operators: of calls of compiled graphs, and of the lowered graphs alone."""
    call, ran, wanted = CompiledGraph.__call__, Count(), Count()

    def counted(self: CompiledGraph, *args: Any) -> Any:
        with ran:
            result = call(self, *args)
        (lowered, run), *_ = self._variants.values()
        bound = lowered.binding((*args, *self._lifted), store)
        with wanted:
            run(*bound)
        return result

    monkeypatch.setattr(CompiledGraph, "__call__", counted)
    return ran.seen, wanted.seen


@pytest.fixture
def read(monkeypatch):
    """Return how many weights were read, for each time that some were."""
    counts: list[int] = []
    contents = checksum.contents
    monkeypatch.setattr(checksum, "contents", lambda given: counts.append(len(given)) or contents(given))
    return counts


def whole(model: nn.Module) -> None:
    model.compile(**BACKEND)


def by_blocks(model: nn.Module) -> None:
    for block in model.blocks:
        block.compile(**BACKEND)


@pytest.mark.parametrize(("compiled", "depth"), [(whole, 4), (by_blocks, 12)])
@pytest.mark.parametrize("packed", [False, True])
def test_a_call_runs_the_operators_of_its_graph_alone(counts, read, compiled, depth, packed):
    model = gated(depth)
    if packed:
        tahf4.quantize_(model)
    compiled(model.to("meta"))
    x = torch.empty(4, 64, device="meta")
    ran, wanted = counts
    with torch.no_grad():
        model(x)
        assert bool(read) is not packed, "packed weights are never read"
        ran.clear(), wanted.clear(), read.clear()
        model(x)
    assert wanted[torch.ops.tahf4.linear.default] >= 2 * depth
    assert ran == wanted
    assert not read


@pytest.mark.parametrize(
    "wait",
    [
        Tensor.item,
        Tensor.tolist,
        Tensor.cpu,
        Tensor.numpy,
        Tensor.nonzero,
        Tensor.__bool__,
        Tensor.__float__,
        lambda x: torch.equal(x, x.clone()),
        lambda x: x.new_zeros(1)[x.bool()],
        lambda x: torch.zeros(1).copy_(x),
    ],
)
def test_the_meta_device_would_show_a_wait(wait):
    with pytest.raises((RuntimeError, NotImplementedError, TypeError)):
        wait(torch.empty(1, device="meta"))


def gated(depth: int) -> Stack:
    model = Stack(depth)
    model.blocks = nn.ModuleList(Gated() for _ in range(depth))
    return model.requires_grad_(False).eval()


def offload(model: nn.Module, kind: str) -> None:
    """Let diffusers set ``.data`` of every parameter before and after every call of its block or leaf."""
    groups = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    here = torch.device("cpu")
    apply_group_offloading(model, here, here, offload_type=kind, **groups)
    for block in model.blocks:
        block.compile(backend="tahf4", options={"inductor": False, "weight_check": "version"})


@pytest.mark.parametrize(("kind", "waits"), [("block_level", 2), ("leaf_level", 6)])
def test_group_offloading_reads_a_weight_once_a_call_and_packs_it_once(read, kind, waits):
    """Nothing tells that what comes back is what was read before; each graph waits once for its weights."""
    model, x, before = gated(2), torch.randn(4, 64), store.conversions
    offload(model, kind)
    with torch.no_grad():
        first = model(x)
        read.clear()
        assert torch.equal(model(x), first)
    assert sum(read) == store.conversions - before == 6
    assert len(read) == waits


@pytest.mark.parametrize(("kind", "multipliers"), [("block_level", [2, 2]), ("leaf_level", [])])
def test_group_offloading_of_a_packed_model_reads_multipliers_of_one_activation_alone(read, kind, multipliers):
    model, x = gated(2), torch.randn(4, 64)
    tahf4.quantize_(model)
    offload(model, kind)
    with torch.no_grad():
        first = model(x)
        read.clear()
        assert torch.equal(model(x), first)
    assert read == multipliers


@pytest.mark.parametrize("moves", ["model", "sequential"])
def test_offloading_by_accelerate_packs_again_where_parameters_are_new(read, moves):
    model, x, here = gated(2), torch.randn(4, 64), "cpu"
    for block in model.blocks:
        block.compile(backend="tahf4", options={"inductor": False, "weight_check": "version"})
    if moves == "model":
        model, hook = accelerate.cpu_offload_with_hook(model, here)
    else:
        accelerate.cpu_offload(model, execution_device=here)
    with torch.no_grad():
        first = model(x)
        for _ in range(2):
            if moves == "model":
                hook.offload()
            read.clear()
            before = store.conversions
            assert torch.equal(model(x), first)
            assert sum(read) == 6 and store.conversions - before == (0 if moves == "model" else 6)
