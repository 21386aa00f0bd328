"""Measuring candidates: the fastest wins, is kept in a file, and what cannot run is passed over."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("triton")

from tahf4_compiler.backends.triton import linear, linear_source, tiling, tune
from tahf4_compiler.backends.triton.tiling import Tile

FAST, SLOW, BROKEN = ("int8", Tile(128, 128, 8, 3)), ("bf16", Tile(128, 128, 8, 4)), ("int8", Tile(128, 64, 4, 4))


class Fake:
    def __init__(self, choice, seen):
        self.choice, self.seen = choice, seen

    def run(self):
        if self.choice == BROKEN:
            raise RuntimeError("out of resource: shared memory")
        self.seen.append(self.choice)


@pytest.fixture
def measured(tmp_path, monkeypatch):
    monkeypatch.setenv("TAHF4_KERNEL_DIR", str(tmp_path))
    tune._memory.cache_clear()
    yield tmp_path
    tune._memory.cache_clear()


def choose(key="k", candidates=(SLOW, BROKEN, FAST)):
    seen = []

    def timer(function):
        function()
        return 1.0 if seen[-1] == FAST else 2.0

    return tune.choose(key, "A chip", list(candidates), lambda c: [Fake(c, seen)], timer), seen


def test_the_fastest_that_runs_is_chosen_and_kept(measured):
    choice, seen = choose()
    assert choice == FAST and seen == [SLOW, FAST]
    (file,) = measured.glob("tuned_a_chip_*.json")
    assert json.loads(file.read_text()) == {"k": ["int8", 128, 128, 8, 3, 1]}
    assert choose() == (FAST, [])
    tune._memory.cache_clear()  # another process
    assert choose() == (FAST, [])
    assert choose("another")[1] == [SLOW, FAST]
    assert set(json.loads(file.read_text())) == {"k", "another"}


@pytest.mark.parametrize("content", ["", "{", "[]", '{"k": ["int8", 1, 1, 1, 1, 1]}'])
def test_a_damaged_or_outdated_file_is_measured_again(measured, content):
    tune._file("A chip").write_text(content)
    assert choose() == (FAST, [SLOW, FAST])


def test_where_nothing_runs_the_default_says_why(measured):
    assert choose(candidates=(BROKEN,))[0] == BROKEN
    assert not list(measured.glob("tuned_*"))


def test_rows_count_in_powers_of_two():
    kernel = linear_source.kernel_for("", 1, True, torch.bfloat16, "", (), torch.bfloat16, False, 0)
    keys = [tune.key_of(kernel, rows, 5120, 80) for rows in (1025, 2048, 2049)]
    assert keys[0] == keys[1] != keys[2]
    assert tune.key_of(kernel, 1025, 5120, 81) != keys[0]


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0), (12, 0)])
def test_the_library_is_a_candidate_where_its_product_fits(capability, monkeypatch):
    def paths(rows=32760, columns=5120, span=0):
        return [path for path, _ in tiling.candidates(rows, columns, 80, capability, 132, 0, False, span)]

    default = "bf16" if capability[0] == 10 else "int8"
    assert paths()[0] == default and paths().count("library") == 1
    assert not any("library" in paths(**other) for other in ({"columns": 5124}, {"span": 1}, {"span": 4}, {"rows": 16}))
    monkeypatch.setenv("TAHF4_LINEAR_PATH", "library")
    assert paths() == ["library"] and set(paths(span=1)) == {default}


def test_spans_save_time_where_products_of_many_rows_add_integers_over_them(monkeypatch):
    def where():
        return [c for c in ((8, 0), (8, 9), (9, 0), (10, 0), (11, 0), (12, 0)) if tiling.adds_over_spans(c)]

    assert where() == [(8, 0), (8, 9), (9, 0), (12, 0)]
    for path, count in (("bf16", 0), ("packed", 0), ("int8", 6), ("library", 6)):
        monkeypatch.setenv("TAHF4_LINEAR_PATH", path)
        assert len(where()) == count


def test_candidates_start_with_the_default_and_stay_few():
    both = {"int8", "bf16"}
    for capability, first, paths in (((8, 0), "int8", both), ((12, 0), "int8", both), ((10, 0), "bf16", {"bf16"})):
        found = tiling.candidates(32760, 5120, 80, capability, 132, 64, quantized=False)
        assert found[0] == (first, Tile(128, 128, 8, 3)) and {p for p, _ in found} == paths
        assert len(found) <= 8
        for _, tile in tiling.candidates(32760, 5120, 80, capability, 132, 128, quantized=True):
            assert tile.columns % 128 == 0, "whole Hadamard blocks"
    assert {p for p, _ in tiling.candidates(1, 5120, 80, (9, 0), 132, 64, quantized=False)} == {"packed"}


def test_with_one_scale_a_row_both_paths_try_wide_tiles():
    wide = Tile(128, 256, 8, 3)
    for span, paths in ((0, {"int8", "bf16"}), (4, {"bf16"})):
        found = tiling.candidates(32760, 5120, 80, (9, 0), 132, 64, False, span)
        assert {path for path, tile in found if tile == wide} == paths


def test_products_with_a_span_are_measured_apart():
    empty = [torch.empty(2, size, dtype=dtype) for size, dtype in ((32, torch.uint8), (1, torch.int32))]
    after = (*empty, *empty, None, torch.float32, [2], [], "", torch.float32)
    assert len({tune.key_of(linear.key_of(*after, span=span), 1024, 2, 1) for span in (0, 1, 2, 4)}) == 4


def test_a_cpu_is_never_measured():
    assert not tune.wanted(torch.device("cpu"), 1 << 20)
