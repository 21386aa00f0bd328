"""The names of Wan's modules: those of the original code, which ComfyUI has, and those of diffusers."""

from __future__ import annotations

import re

__all__ = ["IN_BLOCKS", "OUTSIDE", "to_diffusers", "to_original"]

OUTSIDE = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
}
"""Modules and parameters outside of the blocks: the original name, and that of diffusers."""

IN_BLOCKS = {
    "self_attn.q": "attn1.to_q",
    "self_attn.k": "attn1.to_k",
    "self_attn.v": "attn1.to_v",
    "self_attn.o": "attn1.to_out.0",
    "self_attn.norm_q": "attn1.norm_q",
    "self_attn.norm_k": "attn1.norm_k",
    "cross_attn.q": "attn2.to_q",
    "cross_attn.k": "attn2.to_k",
    "cross_attn.v": "attn2.to_v",
    "cross_attn.o": "attn2.to_out.0",
    "cross_attn.norm_q": "attn2.norm_q",
    "cross_attn.norm_k": "attn2.norm_k",
    "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj",
    "cross_attn.norm_k_img": "attn2.norm_added_k",
    "norm3": "norm2",  # of the cross attention; the other two norms of a block have no parameters
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "modulation": "scale_shift_table",
}
"""The same inside of ``blocks.N``."""

_BLOCK = re.compile(r"(blocks\.\d+\.)(.+)")


def to_original(name: str) -> str | None:
    """Return the original name of a module or tensor that has diffusers' name, or None for one that Wan has not.

    Args:
        name: a module path, alone or with the name of a tensor of the module (``weight_codes``, ``lora_A.weight``).
    """
    return _renamed(name, {new: old for old, new in OUTSIDE.items()}, {new: old for old, new in IN_BLOCKS.items()})


def to_diffusers(name: str) -> str | None:
    """Return diffusers' name of a module or tensor that has the original name, or None for one that Wan has not."""
    return _renamed(name, OUTSIDE, IN_BLOCKS)


def _renamed(name: str, outside: dict[str, str], inside: dict[str, str]) -> str | None:
    prefix, rest, table = "", name, outside
    if block := _BLOCK.fullmatch(name):
        prefix, rest, table = block[1], block[2], inside
    parts = rest.split(".")
    for end in range(len(parts), 0, -1):
        if (found := table.get(".".join(parts[:end]))) is not None:
            return prefix + ".".join([found, *parts[end:]])
    return None
