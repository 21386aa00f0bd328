"""Files that an earlier state of the project wrote are read as they were, byte for byte.

``tests/data/earlier`` holds a small model, a recipe for it, and the model packed by that recipe.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tahf4_compiler as tahf4

EARLIER = Path(__file__).parent / "data" / "earlier"
WEIGHTS = "diffusion_pytorch_model.safetensors"


def settings(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    packed = {name.removesuffix("_codes") for name in found if name.endswith(".weight_codes")}
    assert found.keys() == wanted.keys() | packed, "what stands for a weight that is not there is newer"
    for name, value in wanted.items():
        mine = found[name].to(value.dtype)  # diffusers reads some parameters as float32
        assert torch.equal(mine.view(torch.uint8), value.view(torch.uint8)), name


@pytest.fixture
def plain():
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel.from_pretrained(EARLIER / "model", torch_dtype=torch.bfloat16)


def test_a_recipe_is_written_again_with_the_same_bytes(tmp_path):
    tahf4.Recipe.load(EARLIER / "recipe.safetensors").save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (EARLIER / "recipe.safetensors").read_bytes()


def test_a_recipe_packs_the_same_model(plain, tmp_path):
    plain.to(torch.bfloat16)
    plan = tahf4.quantize_(plain, tahf4.Recipe.load(EARLIER / "recipe.safetensors"))
    assert [d.module for d in plan if d.decision != "hif4" and "by hand" in d.reason] == ["blocks.0.ffn.net.2"]
    plain.save_pretrained(tmp_path)
    same(load_file(tmp_path / WEIGHTS), load_file(EARLIER / "packed" / WEIGHTS))
    assert settings(tmp_path) == settings(EARLIER / "packed")


def test_a_packed_checkpoint_loads_and_is_saved_again(tmp_path):
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel.from_pretrained(EARLIER / "packed")
    assert sum(isinstance(m, tahf4.HiF4Linear) for m in model.modules()) == 9
    model.save_pretrained(tmp_path)
    same(load_file(tmp_path / WEIGHTS), load_file(EARLIER / "packed" / WEIGHTS))
    again, earlier = settings(tmp_path), settings(EARLIER / "packed")
    for linear in (*again["linears"].values(), *earlier["linears"].values()):
        del linear["dtype"]  # the one that the model was loaded in
    assert again == earlier
