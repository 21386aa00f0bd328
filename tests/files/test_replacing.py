"""Files are missing or whole."""

from __future__ import annotations

import os

import pytest

from tahf4_compiler.files.replacing import replacing


def test_a_file_takes_its_place_when_it_is_whole(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with replacing(path) as beside:
        beside.write_text("new")
        assert path.read_text() == "old"
        assert beside.parent == tmp_path and beside.name.endswith("a.json"), "in one file system, with its suffix"
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["a.json"]


def test_after_an_error_nothing_is_left_and_what_was_there_stays(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(KeyError), replacing(path) as beside:
        beside.write_text("half")
        raise KeyError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.json"]


def test_what_cannot_be_written_says_so(tmp_path):
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "missing" / "a.json") as beside:
        beside.write_text("new")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"), replacing(tmp_path / "folder") as beside:
        beside.write_text("new")
    assert os.listdir(tmp_path) == ["folder"]
