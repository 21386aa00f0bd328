"""Settings that every test shares."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Two cores and parallel workers: one thread each, or the workers wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
os.environ.pop("TAHF4_DUMP_DIR", None)

import pytest
import torch

from tahf4_compiler.ops import registry
from tahf4_compiler.pipeline import base as pass_base
from tahf4_compiler.weights import formats as weight_formats


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The walks first: they take longest, and at the end one worker would wait for the other's."""
    items.sort(key=lambda item: "/walk/" not in str(item.path))


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """Every test starts with its own seed, without compiled code, and without Dynamo's reasons of another test."""
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


@pytest.fixture(autouse=True)
def _registries() -> Iterator[None]:
    """A test leaves no pass, kernel or number format behind that it defines, and takes none away.

    What a plug-in's package registers when it is imported stays: it is imported once in a process.
    """
    registry.kernels()  # those of this project are registered when somebody first asks
    known = list(registry._kernels)
    named = [(formats, dict(formats)) for formats in (pass_base._registry, weight_formats._formats)]
    yield
    registry._kernels[:] = [k for k in registry._kernels if k not in known and not _of_a_test(k.serves)] + known
    for formats, before in named:
        for name, found in list(formats.items()):
            if name not in before and _of_a_test(found):
                del formats[name]
        formats.update(before)


def _of_a_test(found: object) -> bool:
    return getattr(found, "__module__", "").rpartition(".")[2].startswith(("test_", "graphs", "conftest"))
