"""Passes alone: small graphs, reference operators, nothing compiled."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference runs, which gives the same bits fused and not."""
    monkeypatch.setenv("TAHF4_NO_CPP", "1")
