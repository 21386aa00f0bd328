"""Packed Wan models in a folder of ComfyUI's models, and the nodes as ComfyUI imports a copied folder."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy_stand_in
import pytest
from comfy_models import NODES, import_nodes, plain_wan
from models import branched, masked_recipe
from torch import nn

import tahf4_compiler as tahf4


@pytest.fixture
def copied(tmp_path) -> Iterator[Path]:
    """The folder of the nodes, copied into ``custom_nodes``."""
    folder = tmp_path / "ComfyUI" / "custom_nodes" / "tahf4"
    shutil.copytree(NODES, folder, ignore=shutil.ignore_patterns("__pycache__"))
    yield folder
    for name in [name for name in sys.modules if name.startswith(str(folder))]:
        del sys.modules[name]


@pytest.fixture(scope="session")
def packed_wan(tmp_path_factory) -> tuple[nn.Module, nn.Module, Path]:
    """Return a plain Wan, the same packed with masks, rotations and branches, and the folder that holds the latter."""
    plain, packed = plain_wan(), plain_wan()
    tahf4.quantize_(packed, recipe=branched(masked_recipe(packed), packed, rank=1))
    folder = tmp_path_factory.mktemp("packed")
    packed.save_pretrained(folder)
    return plain, packed, folder


@pytest.fixture
def comfy(copied, tmp_path, monkeypatch, packed_wan) -> SimpleNamespace:
    """ComfyUI's stand-in with the nodes, and the packed Wan in its folder of models."""
    models = tmp_path / "ComfyUI" / "models"
    for kind in ("diffusion_models/wan", "loras"):
        (models / kind).mkdir(parents=True)
    plain, packed, folder = packed_wan
    shutil.copytree(folder, models / "diffusion_models" / "wan" / "high")
    comfy_stand_in.install(monkeypatch, models)
    package = import_nodes(copied, str(copied))

    def submodule(name: str) -> Any:
        return sys.modules[f"{copied}.{name}"]

    def load(name: str = "wan/high") -> Any:
        return package.NODE_CLASS_MAPPINGS["TAHF4DiffusionModelLoader"]().load_model(name)[0]

    return SimpleNamespace(
        package=package,
        models=models,
        plain=plain,
        packed=packed,
        submodule=submodule,
        load=load,
        stand_in=comfy_stand_in,
    )
