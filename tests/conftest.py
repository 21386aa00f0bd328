"""Settings that every test shares."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Iterator

# Two cores and parallel workers: one thread each, or the workers wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# Where nothing is compiled yet, Inductor would compile a program for each set of instructions that the processor has.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
os.environ.pop("TAHF4_DUMP_DIR", None)

import pytest
import registries
import torch
import torch._dynamo.guards

# pytest listens to loggers that do not propagate. To this one, PyTorch writes every graph as text if anybody listens.
logging.root.manager.loggerDict.pop("torch.__trace")
# To the others it attaches its handlers before each part of a test, and takes them off behind it: some 57, one by one.
for logger in logging.root.manager.loggerDict.values():
    if isinstance(logger, logging.Logger) and logger.name.split(".")[0] == "torch":
        logger.propagate = True
# Dynamo measures the guards of each graph that it compiles, for its log, and empties the caches of the CPU before: half
# of the time of a small compilation.
torch._dynamo.guards.profile_guard_manager = lambda *_: 0.0
torch._dynamo.config.run_gc_after_compile = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The walks first: they take longest, and at the end one worker would wait for the other's."""
    items.sort(key=lambda item: "/walk/" not in str(item.path))


def pytest_collection_finish() -> None:
    """Look through objects less often: what is imported and collected stays to the end, and tests make few cycles."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """Every test starts with its own seed, without compiled code, and without Dynamo's reasons of another test."""
    torch.default_generator.manual_seed(0)  # torch.manual_seed writes down for each GPU backend where it was called
    yield
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


@pytest.fixture(autouse=True)
def _registries() -> Iterator[None]:
    """A test leaves nothing behind that it registers, and takes nothing away."""
    with registries.restored():
        yield
