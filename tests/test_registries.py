"""What a test registers is gone after it, whatever it is, and what it takes away is there again."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest
import registries
import torch

import tahf4_compiler as tahf4
from tahf4_compiler.ops import registry
from tahf4_compiler.packed import convert
from tahf4_compiler.plugins import host
from tahf4_compiler.weights import formats

OPERATOR = torch.ops.tahf4.linear.default


def serves(answer, *given):
    return answer


def a_kernel():
    tahf4.register_kernel("mine", OPERATOR, OPERATOR, functools.partial(serves, True), eager=lambda *given: True)
    assert registry._eager(OPERATOR, torch.device("cpu"), torch.float32).name == "mine"


def a_kernel_that_serves_as_another():
    tahf4.register_kernel("mine", OPERATOR, OPERATOR, registry.kernels()[0].serves)


def a_function():
    host.register("checksums", functools.partial(serves, True), serves)


def a_pass():
    tahf4.register_pass(type("Mine", (tahf4.Pass,), {"__call__": lambda *given: None}))


def a_format():
    tahf4.register_weight_format("mine", lambda weight, multiplier, block: {"codes": weight})


def an_observer():
    convert.observers.append(SimpleNamespace(packed=print, unpacked=print))


def nothing_is_left():
    for held in registries.REGISTRIES:
        held.clear()


def in_another_order():
    registry._kernels.reverse()


@pytest.mark.parametrize(
    "change",
    [
        a_kernel, a_kernel_that_serves_as_another, a_function, a_pass, a_format, an_observer, nothing_is_left,
        in_another_order,
    ],
    ids=lambda change: change.__name__,
)  # fmt: skip
def test_registries_are_what_they_were(change):
    def state():
        eager = registry._eager(OPERATOR, torch.device("cpu"), torch.float32)
        return [registries._entries(held) for held in registries.REGISTRIES], eager

    before = state()
    with registries.restored():
        change()
        assert [registries._entries(held) for held in registries.REGISTRIES] != before[0]
    assert state() == before


def test_what_a_module_of_a_package_brings_stays(monkeypatch):
    old, theirs, mine = formats.pack_rows, functools.partial(host.find, "theirs"), functools.partial(host.find, serves)
    for held, expected in (
        ([old], [theirs, old]),
        ({old}, {theirs, old}),
        ({"old": old}, {"theirs": theirs, "old": old}),
    ):
        monkeypatch.setattr(registries, "REGISTRIES", (held,))
        with registries.restored():
            if isinstance(held, dict):
                held.update(theirs=theirs, mine=mine, old=mine)
            else:
                (held.extend if isinstance(held, list) else held.update)([theirs, mine])
        assert held == expected
