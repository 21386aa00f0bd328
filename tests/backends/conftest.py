"""What tests of backends share."""

from __future__ import annotations

import cpu_operators
import pytest
import torch

from tahf4_compiler.ops import registry


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run what asks for an instruction set with each; only then is the library of the kernels built."""
    if "each_set" in metafunc.fixturenames:
        metafunc.parametrize("each_set", cpu_operators.sets(), indirect=True)


@pytest.fixture
def each_set(request, monkeypatch):
    monkeypatch.setenv("TAHF4_CPU_ISA", request.param)
    registry.kernels()
    return request.param


@pytest.fixture
def no_grad():
    """What modules ask for whose models are run only; others look at gradients too."""
    with torch.no_grad():
        yield


@pytest.fixture
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
