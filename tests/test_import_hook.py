"""What waits for a module to be imported."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch

import tahf4_compiler as tahf4
import tahf4_compiler.import_hook as hook


@pytest.fixture
def imported_later(tmp_path, monkeypatch):
    """The name of a module that can be imported and is not yet."""
    (tmp_path / "waited_for.py").write_text("import sys\nready = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.delitem(sys.modules, "waited_for", raising=False)
    yield "waited_for"
    sys.modules.pop("waited_for", None)


def test_a_module_that_is_imported_already_is_not_waited_for():
    found, before = [], list(sys.meta_path)
    hook.when_imported("torch", lambda: found.append(torch.nn))
    assert found == [torch.nn] and sys.meta_path == before


def test_a_module_that_is_imported_later_has_run_by_then_and_is_heard_once(imported_later):
    found = []
    for _ in "ab":
        hook.when_imported(imported_later, lambda: found.append(sys.modules[imported_later].ready))
    importlib.import_module("textwrap")
    assert found == []
    importlib.import_module(imported_later)
    assert found == [True]
    importlib.reload(sys.modules[imported_later])
    assert found == [True]


def test_diffusers_and_transformers_are_told_of_the_quantizers():
    from diffusers.quantizers import auto as of_diffusers
    from transformers.quantizers import auto as of_transformers

    assert of_diffusers.AUTO_QUANTIZATION_CONFIG_MAPPING["tahf4"] is tahf4.TaHF4Config
    assert of_transformers.AUTO_QUANTIZATION_CONFIG_MAPPING["tahf4"] is tahf4.TaHF4Config
    assert of_diffusers.AUTO_QUANTIZER_MAPPING["tahf4"].__name__ == "TaHF4Quantizer"
    assert of_transformers.AUTO_QUANTIZER_MAPPING["tahf4"].__name__ == "TaHF4HfQuantizer"
