"""Functions that backends bring for the host, and what happens where one cannot be loaded."""

from __future__ import annotations

import threading

import pytest

import tahf4_compiler as tahf4
from tahf4_compiler.plugins import entry_points, host


@pytest.fixture
def fresh(monkeypatch):
    monkeypatch.setattr(host, "_loaded", False)
    monkeypatch.setattr(host, "_functions", [])


def test_a_backend_that_cannot_be_loaded_is_told_each_time(fresh, monkeypatch):
    def broken(group):
        raise tahf4.PipelineError("no such module")

    monkeypatch.setattr(entry_points, "load", broken)
    for _ in range(2):
        with pytest.raises(tahf4.PipelineError, match="no such module"):
            host.find("checksums", [])


def test_threads_wait_until_all_backends_have_registered(fresh, monkeypatch):
    began, go_on, found = threading.Event(), threading.Event(), []

    def slow():
        began.set()
        assert go_on.wait(10)
        host.register("double", lambda x: True, lambda x: 2 * x)

    monkeypatch.setattr(entry_points, "load", lambda group: {"slow": slow})
    first = threading.Thread(target=host.load_backends)
    second = threading.Thread(target=lambda: found.append(host.find("double", 1)))
    first.start()
    assert began.wait(10)
    second.start()
    go_on.set()
    first.join(10)
    second.join(10)
    assert found[0] is not None and found[0](4) == 8


def test_the_one_registered_last_is_asked_first(fresh, monkeypatch):
    monkeypatch.setattr(entry_points, "load", lambda group: {})
    host.register("name", lambda x: True, lambda: "first")
    host.register("name", lambda x: x > 1, lambda: "second")
    assert [host.find("name", x)() for x in (1, 2)] == ["first", "second"]
    assert host.find("other") is None
