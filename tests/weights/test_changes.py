"""What changes a weight is noticed by ``weight_check="version"``, and what leaves its values packs nothing again."""

from __future__ import annotations

import importlib
import logging
import threading

import pytest
import torch
from torch import Tensor, nn

from tahf4_compiler.errors import CaptureError
from tahf4_compiler.graph.inputs import PackedWeight
from tahf4_compiler.weights import checksum
from tahf4_compiler.weights.held import ties
from tahf4_compiler.weights.store import PackedStore

PLAIN = PackedWeight((0,))


@pytest.fixture
def store():
    return PackedStore()


@pytest.fixture
def linear():
    return nn.Linear(64, 32, bias=False)


@pytest.fixture
def read(monkeypatch):
    """Return how many weights were read, for each time that some were."""
    counts: list[int] = []
    contents = checksum.contents
    monkeypatch.setattr(checksum, "contents", lambda given: counts.append(len(given)) or contents(given))
    return counts


def get(store: PackedStore, weight: Tensor, check: str = "version") -> Tensor:
    (found,) = store.get([((weight,), PLAIN)], check)
    return found.codes


def optimizer(cls, **settings):
    def step(linear: nn.Linear) -> None:
        linear.weight.grad = torch.randn(32, 64)
        cls([linear.weight], lr=0.1, **settings).step()

    return step


def no_grad(change):
    return lambda linear: torch.no_grad()(change)(linear)


def inference(change):
    return lambda linear: torch.inference_mode()(change)(linear)


def out(linear: nn.Linear) -> None:
    torch.mul(linear.weight, 3, out=linear.weight)


def set_data(weight: Tensor) -> None:
    weight.data = weight + 1


CHANGES = {
    "SGD": optimizer(torch.optim.SGD),
    "AdamW of lists": optimizer(torch.optim.AdamW, foreach=True),
    "AdamW, fused": optimizer(torch.optim.AdamW, fused=True),
    "in inference mode": inference(lambda linear: linear.weight.add_(1)),
    "moved in inference mode": inference(lambda linear: setattr(linear.weight, "data", linear.weight + 1)),
    "lists": no_grad(lambda linear: torch._foreach_copy_([linear.weight], [torch.randn(32, 64)])),
    "set_": no_grad(lambda linear: linear.weight.set_(torch.randn(32, 64))),
    "out=": no_grad(out),
    "a part": no_grad(lambda linear: linear.weight.__setitem__(3, 7.0)),
    "detached": lambda linear: linear.weight.detach().view(-1)[:5].fill_(9.0),
    "initialized": lambda linear: nn.init.normal_(linear.weight),
    "state": lambda linear: linear.load_state_dict({"weight": torch.randn(32, 64)}),
    "assigned state": lambda linear: linear.load_state_dict({"weight": torch.randn(32, 64)}, assign=True),
    "a vector": lambda linear: nn.utils.vector_to_parameters(torch.randn(32 * 64), [linear.weight]),
    "data, in place": lambda linear: linear.weight.data.add_(1),
    "data, set": lambda linear: setattr(linear.weight, "data", torch.randn(32, 64)),
    "data, transposed": lambda linear: setattr(linear.weight, "data", linear.weight.data.view(64, 32).t()),
    "data, by C++": lambda linear: Tensor.data.__set__(linear.weight, torch.randn(32, 64)),
    "data, compiled": no_grad(lambda linear: torch.compile(set_data, backend="aot_eager")(linear.weight)),
    "other type": lambda linear: linear.to(torch.bfloat16),
    "compiled": no_grad(lambda linear: torch.compile(lambda w: w.mul_(3), backend="aot_eager")(linear.weight)),
    "compiled optimizer": lambda linear: torch.compile(optimizer(torch.optim.Adam), backend="aot_eager")(linear),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed(store, linear, change):
    linear.requires_grad_("Adam" in change or "optim" in change or change == "SGD")
    first = get(store, linear.weight)
    assert get(store, linear.weight) is first
    CHANGES[change](linear)
    again = get(store, linear.weight)
    assert torch.equal(again, get(PackedStore(), linear.weight, "content"))
    assert change == "other type" or not torch.equal(again, first)


def test_a_write_from_another_thread_while_a_weight_is_read_is_noticed(store, linear, monkeypatch):
    contents = checksum.contents

    def slow(given):
        found = contents(given)
        thread = threading.Thread(target=lambda: linear.weight.data.add_(1))
        thread.start(), thread.join()
        return found

    monkeypatch.setattr(checksum, "contents", slow)
    get(store, linear.weight)
    monkeypatch.setattr(checksum, "contents", contents)
    assert torch.equal(get(store, linear.weight), get(PackedStore(), linear.weight, "content"))


def test_a_weight_that_another_thread_reads_has_its_checksum(linear, monkeypatch):
    contents, inside = checksum.contents, []

    def slow(given):
        if not inside:
            inside.append(None)
            thread = threading.Thread(target=lambda: inside.append(checksum.checksums([linear.weight], "version")))
            thread.start(), thread.join()
        return contents(given)

    monkeypatch.setattr(checksum, "contents", slow)
    found = checksum.checksums([linear.weight], "version")
    assert inside == [None, found] and found[0] != 0


def test_fsdp_gathering_is_watched_wherever_it_is_imported(monkeypatch):
    asked = []
    monkeypatch.setattr(checksum, "when_imported", lambda name, then: asked.append((name, then)))
    monkeypatch.setattr(checksum, "watch_gathering", asked.append)
    checksum._watch.__wrapped__()
    ((name, then),) = asked
    then()
    assert importlib.import_module(name).FSDPParam and asked[1] is checksum.forget


KEEPS = {
    "moved": lambda linear: setattr(linear.weight, "data", linear.weight.data.clone()),
    "moved in inference mode": inference(lambda linear: setattr(linear.weight, "data", linear.weight.data.clone())),
    "the same state": lambda linear: linear.load_state_dict({"weight": linear.weight.clone()}),
    "taken": lambda linear: linear.weight.data.norm(),
}


@pytest.mark.parametrize("change", KEEPS)
def test_what_leaves_the_values_is_read_once_and_not_packed_again(store, linear, read, change):
    linear.requires_grad_(False)
    first = get(store, linear.weight)
    KEEPS[change](linear)
    assert get(store, linear.weight) is first and store.conversions == 1
    assert read == [1, 1]
    if not linear.weight.is_inference():
        get(store, linear.weight)
        assert read == [1, 1]


def test_what_was_read_before_anybody_watched_is_read_again(store, linear, read, monkeypatch):
    checksum._watch.cache_clear()  # as in a process that reads all weights at each call
    monkeypatch.delattr(nn.Parameter, "data", raising=False)
    get(store, linear.weight, "content")
    linear.weight.data  # noqa: B018
    get(store, linear.weight, "version")
    assert read == [1, 1]


def test_checksums_live_as_long_as_their_weights(linear):
    before = len(checksum._known)
    checksum.checksums([linear.weight], "version")
    assert len(checksum._known) == before + 1
    del linear.weight
    assert len(checksum._known) == before


@pytest.fixture
def capture(monkeypatch):
    """Let it seem, from a call on, that a CUDA graph is captured."""

    def begin() -> None:
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)

    return begin


@pytest.mark.parametrize("check", ["version", "content"])
def test_a_capture_reads_no_weight_that_is_known(store, linear, read, capture, check):
    with torch.inference_mode():
        weights = [linear.weight, torch.randn(32, 64)]
    before = [get(store, weight, check) for weight in weights]
    del read[:]
    capture()
    assert all(get(store, weight, check) is codes for weight, codes in zip(weights, before, strict=True))
    assert not read


@pytest.mark.parametrize("check", ["version", "content"])
def test_a_capture_refuses_what_it_would_have_to_read_or_pack(store, linear, read, capture, check):
    get(store, linear.weight, check)
    capture()
    with pytest.raises(CaptureError, match="Call the compiled model once before the capture"):
        store.get([((linear.weight,), PackedWeight((0,), hadamard_block=64))], check)
    linear.weight.data.add_(1)
    with pytest.raises(CaptureError, match="a weight is new or changed"):
        get(store, linear.weight, check)
    with pytest.raises(CaptureError, match="a weight is new or changed"):
        get(store, nn.Linear(64, 32).weight, check)
    assert read == [1]


def test_weights_that_each_call_reads_on_a_device_are_named_once(caplog):
    checksum._say_inference.cache_clear()
    with torch.inference_mode():
        near, far = torch.zeros(4), torch.zeros(4, device="meta")
    with caplog.at_level(logging.WARNING):
        checksum.checksums([near], "version")
        assert not caplog.records
        for _ in range(2):
            checksum.checksums([far], "auto")
    assert [record.message.partition(":")[0] for record in caplog.records] == [
        "weights are inference tensors, which have no version counter"
    ]


def test_equal_multipliers_are_read_once(read):
    a, b, c = (nn.Parameter(torch.linspace(1, end, 64), requires_grad=False) for end in (2, 2, 3))
    for _ in range(2):
        assert ties([(0, 1, 2)], [a, b, c], "version") == ((0, 0, 2),)
    assert read == [3]
    b.data += 1
    assert ties([(0, 1, 2)], [a, b, c], "version") == ((0, 1, 2),)
    assert read == [3, 1]
