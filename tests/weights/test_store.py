"""Weights in HiF4 are made once, and again when they or what is attached to them changed."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor, nn

from tahf4_compiler.format.hif4 import Packed
from tahf4_compiler.format.low_rank import LowRank
from tahf4_compiler.graph.inputs import PackedWeight
from tahf4_compiler.model.attachments import Attachment, attach
from tahf4_compiler.weights import checksum
from tahf4_compiler.weights import store as module
from tahf4_compiler.weights.store import PackedStore

PLAIN = PackedWeight((0,))
MASKED = PackedWeight((0,), masked=True)
TWO = PackedWeight((0, 1))


@pytest.fixture
def model():
    return nn.ModuleDict({name: nn.Linear(64, 32, bias=False).requires_grad_(False) for name in ("q", "k", "v")})


@pytest.fixture
def store():
    return PackedStore()


def weights(model: nn.ModuleDict, names: str) -> tuple[Tensor, ...]:
    return tuple(model[name].weight for name in names)


def get(store: PackedStore, given: tuple[Tensor, ...], how: PackedWeight = PLAIN, check: str = "auto") -> Tensor:
    (found,) = store.get([(given, how)], check)
    return found.codes


def mask(value: float) -> Attachment:
    return Attachment("hif4", "", masked=True, mask=torch.linspace(1, value, 64))


def test_a_weight_is_made_once_wherever_it_stands(store, model):
    first = get(store, weights(model, "q"))
    assert get(store, weights(model, "q"), PackedWeight((7,))) is first
    assert store.conversions == 1


def test_one_request_may_name_a_weight_twice(store, model):
    first, second = store.get([(weights(model, "q"), PLAIN), (weights(model, "q"), PackedWeight((3,)))])
    assert first is second and store.conversions == 1


@pytest.mark.parametrize("check", ["auto", "content", "version"])
@pytest.mark.parametrize("change", ["in place", "other memory"])
def test_a_weight_that_changed_is_made_again(store, model, check, change):
    (weight,) = weights(model, "q")
    first = get(store, (weight,), check=check)
    if change == "in place":
        weight.mul_(-1)
    else:
        weight.data = torch.randn(32, 64)
    again = get(store, (weight,), check=check)
    assert not torch.equal(again, first)
    assert torch.equal(again, get(PackedStore(), (weight,)))


@pytest.fixture
def read(monkeypatch):
    """Return how many weights were read, for each time that some were."""
    counts: list[int] = []
    contents = checksum.contents
    monkeypatch.setattr(checksum, "contents", lambda given: counts.append(len(given)) or contents(given))
    return counts


def test_under_the_version_check_weights_are_read_once_unless_they_have_no_version(store, model, read):
    for _ in range(2):
        get(store, weights(model, "q"), check="version")
    with torch.inference_mode():
        weight = torch.randn(32, 64)
    for _ in range(2):
        get(store, (weight,), check="version")
    for check in ("content", "auto"):  # on the CPU
        get(store, weights(model, "q"), check=check)
    assert read == [1, 1, 1, 1, 1]


def test_groups_that_begin_alike_are_made_apart_and_dropped_with_their_members(store, model):
    first, second = get(store, weights(model, "qk"), TWO), get(store, weights(model, "qv"), TWO)
    assert torch.equal(first[:32], second[:32]) and not torch.equal(first[32:], second[32:])
    assert len(store._entries[model["q"].weight]) == 2
    del model["k"]
    gc.collect()
    model["q"].weight.mul_(2)
    get(store, weights(model, "qv"), TWO)
    assert len(store._entries[model["q"].weight]) == 1


def branch() -> Attachment:
    return Attachment("hif4", "", rank=8, low_rank=LowRank(torch.ones(64, 8), torch.ones(8, 32)))


def test_a_group_is_known_by_its_members_where_another_weight_got_the_id_of_one(store, model, monkeypatch):
    monkeypatch.setattr(module, "id", lambda weight: 0, raising=False)
    model["v"].weight.copy_(model["k"].weight)
    attach(model, {"k": branch()})
    how = PackedWeight((0, 1), rank=8)
    first, second = get(store, weights(model, "qk"), how), get(store, weights(model, "qv"), how)
    assert torch.equal(first[:32], second[:32]) and not torch.equal(first[32:], second[32:])


def test_what_is_attached_to_any_weight_of_a_group_is_noticed(store, model):
    how, given = PackedWeight((0, 1), rank=8), weights(model, "qk")
    first = get(store, given, how)
    attach(model["k"], {"": branch()})
    assert not torch.equal(get(store, given, how)[32:], first[32:])


def test_a_weight_that_is_on_another_device_than_its_codes_is_made_there(store, model):
    (weight,) = weights(model, "q")
    first = get(store, (weight,))
    (entry,) = store._entries[weight].values()
    entry.packed = Packed(*(part.to("meta") for part in entry.packed[:2]), entry.packed.k)
    again = get(store, (weight,))
    assert again.device == weight.device and torch.equal(again, first)


def test_a_weight_of_another_shape_is_made_again_though_its_bytes_are_the_same(store):
    weight = nn.Parameter(torch.zeros(32, 128), requires_grad=False)
    get(store, (weight,))
    weight.data = torch.zeros(64, 64)
    assert get(store, (weight,)).shape == (64, 32)


def test_a_multiplier_lies_where_its_weight_lies(store, model):
    given = weights(model, "q")
    store.multiplier(given, MASKED)
    given[0].__class__ = type("Moved", (nn.Parameter,), {"device": torch.device("meta")})
    assert store.multiplier(given, MASKED).device.type == "meta"


@pytest.mark.parametrize(
    ("how", "attachment"),
    [
        (MASKED, mask(3.0)),
        (PackedWeight((0,), seed=1, hadamard_block=64), Attachment("hif4", "", seed=5)),
        (PackedWeight((0,), search="weighted"), Attachment("hif4", "", second_moment=torch.linspace(1, 900, 64))),
    ],
    ids=["mask", "seed", "second moment"],
)
def test_what_is_attached_later_is_noticed_where_it_matters(store, model, how, attachment):
    given = weights(model, "q")
    plain, first = get(store, given), get(store, given, how)
    attach(model, {"q": attachment})
    again = get(store, given, how)
    assert not torch.equal(again, first)
    assert torch.equal(again, get(PackedStore(), given, how))
    before = store.conversions
    assert get(store, given) is plain and get(store, given, how) is again and store.conversions == before


def test_a_multiplier_is_made_again_for_another_mask_only(store, model):
    given = weights(model, "q")
    attach(model, {"q": mask(3.0)})
    first = store.multiplier(given, MASKED)
    assert torch.equal(first, torch.linspace(1, 3, 64))
    assert store.multiplier(given, MASKED) is first
    attach(nn.Linear(2, 2), {})
    assert store.multiplier(given, MASKED) is first, "nothing that it depends on has changed"
    attach(model, {"q": mask(2.0)})
    assert torch.equal(store.multiplier(given, MASKED), torch.linspace(1, 2, 64))


def test_what_is_attached_is_looked_up_only_after_something_was_attached(store, model, monkeypatch):
    given = weights(model, "q")
    looked = []
    recipe = module.attached_recipe
    monkeypatch.setattr(module, "attached_recipe", lambda weight: looked.append(weight) or recipe(weight))

    def count() -> int:
        looked.clear()
        get(store, given, MASKED)
        store.multiplier(given, MASKED)
        return len(looked)

    attach(model, {"q": mask(3.0)})
    count()
    assert count() == 0
    attach(nn.Linear(2, 2), {})
    assert (count(), count()) == (2, 0)


def test_a_recipe_that_comes_while_a_weight_is_packed_is_used_from_then_on(monkeypatch):
    from tahf4_compiler.model.attachments import Attachment, attach
    from tahf4_compiler.weights import store as module

    model = torch.nn.Sequential(torch.nn.Linear(64, 64))
    weight, how = model[0].weight, PackedWeight((0,), masked=True)

    def put(value: float) -> None:
        attach(model, {"0": Attachment("hif4", "", masked=True, activation="a", mask=torch.full((64,), value))})

    put(1.0)
    pack = module.pack_transformed
    monkeypatch.setattr(module, "pack_transformed", lambda *args: (put(3.0), pack(*args))[1])  # another thread's
    store = module.PackedStore()
    store.get([((weight,), how)])
    monkeypatch.setattr(module, "pack_transformed", pack)
    (found,), (wanted,) = store.get([((weight,), how)]), module.PackedStore().get([((weight,), how)])
    assert torch.equal(found.scales, wanted.scales) and torch.equal(found.codes, wanted.codes)
