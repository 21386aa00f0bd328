"""Each fault of the list still has its place in the source."""

from __future__ import annotations

import pytest
from mutants import ROOT, read

EVERY = read()


@pytest.mark.parametrize("file", sorted({mutant.file for mutant in EVERY}))
def test_the_text_of_each_fault_stands_once_in_its_file(file):
    text = (ROOT / file).read_text()
    found = {str(mutant): text.count(mutant.old) for mutant in EVERY if mutant.file == file}
    assert {name: count for name, count in found.items() if count != 1} == {}


def test_each_fault_is_listed_once_and_names_tests_that_exist():
    assert len({(mutant.file, mutant.old, mutant.new) for mutant in EVERY}) == len(EVERY)
    assert all(mutant.old != mutant.new for mutant in EVERY)
    for test in sorted({test for mutant in EVERY for test in mutant.tests}):
        file, _, name = test.partition("::")
        text = (ROOT / file).read_text()
        assert not name or f"def {name.partition('[')[0]}(" in text, test
