"""Small Wan models, and the nodes as ComfyUI imports them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

NODES = Path(__file__).parents[2] / "tools" / "comfyui"
SIZES = {"num_attention_heads": 1, "attention_head_dim": 128, "in_channels": 4, "out_channels": 4}
SIZES |= {"text_dim": 4096, "freq_dim": 256, "ffn_dim": 256, "num_layers": 2}  # what ComfyUI takes for granted


def import_nodes(folder: Path, name: str) -> Any:
    """Import a folder as ComfyUI's ``load_custom_node`` does; the name of the module is its path."""
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def plain_wan(**config: Any) -> nn.Module:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(1)
    model = WanTransformer3DModel(**{**SIZES, "cross_attn_norm": True, **config}).eval().requires_grad_(False)
    for name, value in model.named_parameters():
        if "norm" in name and value.ndim == 1:  # as after training: all of them matter
            value.add_(0.1 * torch.randn_like(value))
        if name.startswith("blocks") and name.endswith("scale_shift_table"):
            value.mul_(5)  # the gates: what a block computes weighs
    return model
