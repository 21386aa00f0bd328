"""The table of Wan's names, in both directions."""

from __future__ import annotations

import pytest
from comfy_models import plain_wan
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from tahf4_compiler.tools.comfyui.names import to_diffusers, to_original


@pytest.mark.parametrize("image", [False, True])
def test_every_tensor_of_wan_has_an_original_name_that_diffusers_converts_back(image):
    config = {"image_dim": 32, "added_kv_proj_dim": 128} if image else {}
    names = list(plain_wan(**config).state_dict())
    original = {name: to_original(name) for name in names}
    assert None not in original.values() and len(set(original.values())) == len(names)
    assert [to_diffusers(name) for name in original.values()] == names
    assert list(convert_wan_transformer_to_diffusers(dict.fromkeys(original.values(), ()))) == names
    assert original["blocks.1.attn1.to_q.weight"] == "blocks.1.self_attn.q.weight"
    assert original["blocks.1.norm2.weight"] == "blocks.1.norm3.weight"
    assert original["scale_shift_table"] == "head.modulation"
