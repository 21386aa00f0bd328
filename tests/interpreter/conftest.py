"""Triton's interpreter is a setting of the whole process: these tests run in one of their own.

``make test`` does; alone: ``TRITON_INTERPRET=1 pytest tests/interpreter``.
"""

import dataclasses
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


@pytest.fixture(autouse=True, scope="session")
def a_launch_prepares_the_language_once():
    """The interpreter replaces the functions of Triton's language at each launch, and looks through all of them again
    at each call of a function inside of it: a quarter of the time of these tests.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    replace = interpreter._patch_lang

    def replace_once(function):
        languages = [value for value in function.__globals__.values() if value is tl or value is tl.core]
        if languages and not any(isinstance(language.range, type) for language in languages):  # as Triton has it
            return None
        return replace(function)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", replace_once)
        yield


@pytest.fixture(autouse=True, scope="session")
def integers_are_not_computed_twice():
    """The interpreter computes each int32 a second time in int64, for an assertion that it leaves out unless it debugs:
    a quarter of the time of what is left.
    """
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=False))
        yield
