"""Triton's interpreter is a setting of the whole process: these tests run in one of their own.

``make test`` does; alone: ``TRITON_INTERPRET=1 pytest tests/interpreter``.
"""

import os

import pytest


def pytest_collection_modifyitems(items):
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        return
    here = os.path.dirname(__file__)
    for item in items:
        if str(item.path).startswith(here):
            item.add_marker(pytest.mark.skip(reason="needs a process with TRITON_INTERPRET=1, as make test starts"))


@pytest.fixture(autouse=True, scope="session")
def kernels_in_a_folder(tmp_path_factory):
    os.environ["TAHF4_KERNEL_DIR"] = str(tmp_path_factory.mktemp("kernels"))


@pytest.fixture(autouse=True)
def operators():
    from tahf4_compiler.ops import registry

    registry.kernels()  # registers them
