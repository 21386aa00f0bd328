"""An installed wheel with kernels, where there is no compiler: ``make wheel`` runs these tests."""

from __future__ import annotations

import logging

import pytest
import torch
from models import Stack
from tahf4_compiler.backends.cpu import build

import tahf4_compiler as tahf4

pytestmark = pytest.mark.skipif(not build.PREBUILT.exists(), reason="needs the kernels of a wheel")


def test_kernels_come_with_it_and_no_compiler_does():
    assert build.library() is not None and build.operators() is None


def test_what_inductor_would_compile_runs_without_it(caplog):
    model, x = Stack().eval().requires_grad_(False), torch.randn(5, 64)
    with caplog.at_level(logging.WARNING):
        y = torch.compile(lambda x: model(x.sin()).cos(), backend="tahf4")(x)
    assert "lowered graphs run without Inductor" in caplog.text
    lowered = tahf4.lower(tahf4.capture(model, (x.sin(),)), options={"inductor": False, "kernels": "reference"})
    assert (y - lowered(x.sin()).cos()).norm() < 1e-3 * y.norm()
