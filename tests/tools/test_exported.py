"""Exported programs are read without running what they carry."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from tahf4_compiler.tools.errors import CommandError
from tahf4_compiler.tools.exported import load_program
from torch import nn


class Touch:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "linear.pt2"
    torch.export.save(torch.export.export(nn.Linear(4, 4), (torch.randn(2, 4),)), path)
    return path


def test_a_program_is_read_with_its_inputs(program):
    assert load_program(program).example_inputs[0][0].shape == (2, 4)


@pytest.mark.parametrize("member", ["sample_inputs/model.pt", "weights/weight_0"])
def test_what_a_file_carries_does_not_run(program, tmp_path, member):
    mark, hostile = tmp_path / "touched", tmp_path / "hostile.pt2"
    with zipfile.ZipFile(program) as source, zipfile.ZipFile(hostile, "w") as target:
        for name in source.namelist():
            data = source.read(name)
            if name.endswith(member):
                data = pickle.dumps((Touch(mark),))
            if "weights" in member and name.endswith("model_weights_config.json"):
                data = data.replace(b'"use_pickle": false', b'"use_pickle": true')
            target.writestr(name, data)
    with pytest.raises(CommandError, match="tensors only"):
        load_program(hostile)
    assert not mark.exists()


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "x.pt2"
    path.write_bytes(b"no zip")
    with pytest.raises(CommandError, match=r"x\.pt2 cannot be read"):
        load_program(path)
