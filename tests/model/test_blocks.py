"""Repeated blocks of a tree of modules, by sizes alone."""

from __future__ import annotations

import pytest
import torch
from models import Block, Stack
from torch import nn

import tahf4_compiler as tahf4
from tahf4_compiler.model.blocks import block_of, module_blocks
from tahf4_compiler.model.reasons import Cause
from tahf4_compiler.pipeline.rules import role_of


class Four(nn.Module):
    """Four linears, one after the other."""

    def __init__(self, k: int = 64, n: int = 64) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(k, 64), nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, n)


def tree(**children: nn.Module) -> nn.Module:
    model = nn.Module()
    for name, child in children.items():
        model.add_module(name, child)
    return model


def test_members_that_fit_together_are_blocks():
    assert module_blocks(Stack(depth=2)) == {"blocks.0": "Block", "blocks.1": "Block"}


def test_members_that_read_other_sizes_than_those_before_write_are_none():
    def embedder() -> nn.Module:
        return nn.Sequential(nn.Linear(48, 64), nn.Linear(64, 64))

    last = nn.Linear(64, 1024)
    assert module_blocks(tree(embedders=nn.ModuleList([embedder(), embedder()]), last=last)) == {}
    # The last linear writes what the first one reads, whatever stands between them.
    wide = [nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 64)) for _ in range(2)]
    assert len(module_blocks(tree(blocks=nn.ModuleList(wide)))) == 2
    apart = [nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 48)) for _ in range(2)]
    assert module_blocks(tree(blocks=nn.ModuleList(apart), last=last)) == {}


def test_members_that_hold_nearly_all_are_blocks_in_whatever_order_they_run():
    apart = [nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 48)) for _ in range(2)]
    assert len(module_blocks(tree(blocks=nn.ModuleList(apart), last=nn.Linear(64, 53)))) == 2
    assert module_blocks(tree(blocks=nn.ModuleList(apart), last=nn.Linear(64, 54))) == {}


def test_towers_with_blocks_inside_are_none():
    inside = {f"{tower}.blocks.{i}" for tower in ("text", "image") for i in range(2)}
    assert module_blocks(tree(text=Stack(2), image=Stack(2))).keys() == inside
    for features, found in ((384, inside), (385, {"text", "image"})):  # then the blocks inside hold less than half
        text, image = Stack(2), Stack(2)
        text.rest, image.rest = nn.Linear(64, features), nn.Linear(64, features)
        assert module_blocks(tree(text=text, image=image)).keys() == found


def test_members_of_several_linears_may_declare_them_in_any_order():
    class Llama(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.o = nn.Linear(64, 64), nn.Linear(64, 64)
            self.w1, self.w2, self.w3 = nn.Linear(64, 192), nn.Linear(192, 64), nn.Linear(64, 192)

    class Conditioned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.modulation = nn.Linear(32, 6 * 64)  # reads the time
            self.q, self.o, self.up, self.down = (nn.Linear(64, 64) for _ in range(4))
            self.last_modulation = nn.Linear(32, 2 * 64)

    for kind in (Llama, Conditioned):
        found = module_blocks(tree(layers=nn.ModuleList(kind() for _ in range(2)), final=nn.Linear(64, 512)))
        assert found.keys() == {"layers.0", "layers.1"}


class Chain(nn.Module):
    """Linears in the order of their declaration, each given as what it reads and what it writes."""

    def __init__(self, *sizes: tuple[int, int]) -> None:
        super().__init__()
        for i, (k, n) in enumerate(sizes):
            self.add_module(f"linear{i}", nn.Linear(k, n))


def members(*sizes: tuple[int, int], count: int = 2) -> nn.ModuleList:
    return nn.ModuleList(Chain(*sizes) for _ in range(count))


LAST = nn.Linear(64, 8000)  # more than half of the weights
LARGER = members((64, 64), (64, 600))  # heads, which hold more than the blocks
UP_DOWN = (64, 128), (128, 64)


def test_what_only_reads_a_condition_hides_no_blocks():
    for sizes in (((96, 192), *UP_DOWN), (*UP_DOWN, (96, 192)), ((96, 128), (64, 64))):
        found = module_blocks(tree(blocks=members(*sizes), heads=LARGER))
        assert found == {"blocks.0": "Chain", "blocks.1": "Chain"}


def test_gates_and_skips_hide_no_blocks_of_the_container_that_holds_most():
    few = members((64, 16), (16, 64))
    for sizes in ((*UP_DOWN, (64, 8)), ((128, 64), *UP_DOWN), (*UP_DOWN, (64, 128))):
        found = module_blocks(tree(blocks=members(*sizes), last=LAST))
        assert found == {"blocks.0": "Chain", "blocks.1": "Chain"}
        beside = {"blocks.0", "blocks.1", "few.0", "few.1"}
        assert module_blocks(tree(blocks=members(*sizes), few=few, last=LAST)).keys() == beside
        assert module_blocks(tree(blocks=members(*sizes), heads=LARGER, last=LAST)) == {}


def test_heads_side_by_side_are_none():
    for sizes in (((64, 64), (64, 64), (64, 4)), ((64, 64), (64, 64), (64, 128)), ((64, 64),) * 3 + ((64, 4),)):
        found = module_blocks(tree(blocks=members(*UP_DOWN, count=4), heads=members(*sizes), last=LAST))
        assert found.keys() == {f"blocks.{i}" for i in range(4)}
    for sizes in (((64, 64), (64, 64), (64, 80)), ((64, 64),) * 3 + ((64, 80),)):  # also where they hold most
        assert module_blocks(tree(heads=members(*sizes), last=LAST)) == {}
    trunk = Chain(*[(64, 64)] * 8)  # holds more than they do
    assert module_blocks(tree(trunk=trunk, heads=members((64, 64), (64, 64), (64, 4)), last=LAST)) == {}


def test_embedders_of_three_linears_are_none():
    found = module_blocks(tree(embedders=members((48, 64), (64, 64), (64, 64)), blocks=members(*UP_DOWN, count=4)))
    assert found.keys() == {f"blocks.{i}" for i in range(4)}


def test_what_shifts_and_scales_may_be_declared_last():
    modulated = members((64, 160), (160, 64), (64, 64), (64, 64), (64, 128))  # two pieces of 64
    assert module_blocks(tree(blocks=modulated, heads=LARGER)).keys() == {"blocks.0", "blocks.1"}


def test_modules_whose_linears_only_read_conditions_fit_in_any_order():
    convolutions = nn.ModuleList([Chain(*[(96, 64)] * 4), Chain((40, 48), *[(64, 48)] * 3)])
    assert module_blocks(tree(blocks=convolutions, last=LAST)).keys() == {"blocks.0", "blocks.1"}
    assert module_blocks(tree(blocks=members(*[(32, 64)] * 3), last=LAST)) == {}


def test_what_is_around_a_container_does_not_hold_more():
    gated = tree(blocks=members(*UP_DOWN, (64, 8)), rest=nn.Linear(64, 64))
    towers = nn.ModuleList([gated, tree(blocks=members((32, 48), (48, 32)))])
    inside = {f"towers.{i}.blocks.{j}" for i in range(2) for j in range(2)}
    assert module_blocks(tree(towers=towers, last=LAST)).keys() == inside
    whole = nn.Sequential(Chain((96, 64), (64, 64)), gated, LAST)
    assert module_blocks(whole) == {"1": "Module"}, "the only one of its class beside blocks"


def around(*inside: nn.Module, ends: int = 64, count: int = 1) -> nn.Sequential:
    """Return modules with as many of one class before them and one after them."""

    def end() -> nn.Module:
        return Chain((64, ends), (ends, 64))

    return nn.Sequential(*(end() for _ in range(count)), *inside, end(), LAST)


def test_an_embedder_and_a_head_of_one_class_are_none():
    blocks = Block(), Block()
    assert module_blocks(around(*blocks)) == {"1": "Block", "2": "Block"}
    assert module_blocks(around(nn.ModuleList(blocks))) == {"1.0": "Block", "1.1": "Block"}
    elsewhere = tree(inner=around(*blocks), more=nn.ModuleList(blocks))
    assert module_blocks(elsewhere).keys() == {"inner.1", "inner.2", "more.0", "more.1"}
    # But they are where others stand beside them, and where there are more of them or nothing is between them.
    assert module_blocks(nn.Sequential(*around(*blocks), *blocks)).keys() == {*"012356"}
    assert module_blocks(around(*blocks, count=2)).keys() == {*"01234"}
    assert module_blocks(around(Four(), Chain((64, 64)))).keys() >= {"0", "3"}
    # The first and the last layer of a network may be of another class than those between them.
    assert module_blocks(nn.Sequential(Four(), *blocks, Four(), LAST)).keys() == {*"0123"}


def test_blocks_of_two_kinds_in_turn_are_all_blocks():
    turns = [make() for _ in range(2) for make in (Block, lambda: Chain(*UP_DOWN))]
    assert module_blocks(nn.Sequential(*turns, LAST)).keys() == {*"0123"}


def test_beside_blocks_a_single_member_that_reads_another_width_than_it_writes_is_none():
    blocks = Block(), Block()
    three = [(64, 64)] * 3
    gated, modulated, head = (Chain(*three, *more) for more in ([*UP_DOWN, (64, 128)], [(64, 384)], [(64, 640)]))
    cases = ((Four(k=48), False), (Four(n=80), False), (Four(), True), (gated, True), (modulated, True), (head, False))
    for other, found in cases:
        model = nn.Sequential(other, nn.ModuleList(blocks), LAST)
        assert ("0" in module_blocks(model)) is found


def tower(k: int, n: int) -> nn.Module:
    return tree(embed=nn.Linear(k, 64), blocks=members(*UP_DOWN), head=nn.Linear(64, n))


def test_towers_in_a_list_are_none():
    inside = {f"towers.{i}.blocks.{j}" for i in range(2) for j in range(2)}
    for k, n, found in ((48, 48, inside), (48, 96, inside), (64, 48, inside), (64, 64, {"towers.0", "towers.1"})):
        model = tree(towers=nn.ModuleList(tower(k, n) for _ in range(2)), last=LAST)
        assert module_blocks(model).keys() == found
    # Stages go on at the width that the one before has written.
    stages = [tree(blocks=members(*UP_DOWN), down=nn.Linear(64, 128)), tree(blocks=members((128, 128), (128, 128)))]
    assert module_blocks(tree(stages=nn.ModuleList(stages), last=LAST)).keys() == {"stages.0", "stages.1"}
    # The first brings its input to the width at which the others read and write.
    stages = [tree(widen=nn.Linear(48, 64), blocks=members(*UP_DOWN)), tree(blocks=members(*UP_DOWN))]
    assert module_blocks(tree(stages=nn.ModuleList(stages), last=LAST)).keys() == {"stages.0", "stages.1"}
    assert module_blocks(nn.Sequential(nn.Linear(64, 48), tower(48, 48))).keys() == {"1.blocks.0", "1.blocks.1"}


def test_heads_whose_width_no_other_linear_reads_are_none_wherever_they_declare_it():
    heads = members((64, 64), (64, 32), (64, 64))
    found = module_blocks(tree(blocks=members(*UP_DOWN, count=4), heads=heads))
    assert found.keys() == {f"blocks.{i}" for i in range(4)}
    for sizes in (((64, 96), (96, 64), (64, 64)), ((64, 192), *UP_DOWN)):  # the second shifts, scales and gates
        found = module_blocks(tree(blocks=members(*UP_DOWN), more=members(*sizes), heads=LARGER, last=LAST))
        assert found.keys() == {f"{name}.{i}" for name in ("blocks", "more") for i in range(2)}


def test_linears_without_features_do_not_count():
    empty = members((0, 64), *UP_DOWN, (64, 64))
    assert module_blocks(tree(blocks=empty, only=members((0, 64), (64, 0)))).keys() == {"blocks.0", "blocks.1"}


def test_members_of_other_classes_are_none():
    assert module_blocks(tree(blocks=nn.ModuleList([Block(), Four()]), last=nn.Linear(64, 1024))) == {}


def test_attributes_of_one_structure_are_blocks_if_they_hold_nearly_all():
    assert module_blocks(tree(early=Four(), late=Four())) == {"early": "Four", "late": "Four"}
    assert module_blocks(tree(early=Four(), late=Four(n=128))) == module_blocks(tree(only=Four())) == {}
    assert module_blocks(tree(early=Four(), late=Four(), last=nn.Linear(64, 1024))) == {}


def test_a_container_is_no_block_itself():
    down, up = (nn.ModuleList([Block(), Block()]) for _ in range(2))
    assert set(module_blocks(tree(down=down, up=up))) == {"down.0", "down.1", "up.0", "up.1"}
    down, up = (nn.ModuleList([nn.Linear(64, 64), nn.Linear(64, 64)]) for _ in range(2))
    assert module_blocks(tree(down=down, up=up)) == {}


def test_the_only_member_of_a_container_is_a_block_if_it_holds_half_of_the_weights():
    alone = {"blocks": nn.ModuleList([Four()])}
    assert module_blocks(tree(**alone, last=nn.Linear(64, 256))) == {"blocks.0": "Four"}
    assert module_blocks(tree(**alone, last=nn.Linear(64, 257))) == {}


def test_two_linears_may_read_more_than_they_have_written():
    joined = members((64, 90), (128, 64))  # the second reads what others wrote, too
    assert module_blocks(tree(blocks=joined, last=LAST)).keys() == {"blocks.0", "blocks.1"}


@pytest.mark.parametrize("tied", [False, True])
def test_tables_of_embeddings_are_no_linears(tied):
    model = tree(table=nn.Embedding(10_000, 64), blocks=nn.ModuleList([Four()]))
    if tied:
        model.head = nn.Linear(64, 10_000)
        model.head.weight = model.table.weight
    assert module_blocks(model) == {"blocks.0": "Four"}


def test_packed_linears_count_as_they_did_before():
    narrow = Stack(2, dim=96, hidden=100)  # codes are padded to whole units
    for model in (Stack(depth=2), narrow, tree(blocks=nn.ModuleList([Four()]), last=nn.Linear(64, 256))):
        before = module_blocks(model)
        with torch.no_grad():
            assert any(decision.cause is Cause.BODY for decision in tahf4.quantize_(model))
        assert before and module_blocks(model) == before


def test_the_block_around_a_path():
    blocks = {"blocks.1": "One", "blocks.10": "Ten"}
    assert block_of("blocks.10.up", blocks) == ("blocks.10", "Ten")
    assert block_of("blocks.2.up", blocks) is None


def test_where_a_linear_stands_has_a_kind():
    inside, whole, outside = role_of(("blocks.0", "Block")), role_of(None, "all is one block"), role_of(None)
    assert (inside.body, whole.body, outside.body) == (True, True, False)
    assert [role.reason.cause for role in (inside, whole, outside)] == [Cause.BODY, Cause.BODY, Cause.BOUNDARY]
