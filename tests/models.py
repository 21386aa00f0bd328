"""Small models of real architectures, with example inputs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """A residual feed-forward block."""

    def __init__(self, dim: int = 64, hidden: int = 128) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, hidden)
        self.down = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Stack(nn.Module):
    """Blocks between two boundary linears."""

    def __init__(self, depth: int = 3, dim: int = 64, hidden: int = 128) -> None:
        super().__init__()
        self.first = nn.Linear(dim, dim)
        self.blocks = nn.ModuleList(Block(dim, hidden) for _ in range(depth))
        self.last = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x)


def output(value: Any) -> Tensor:
    """Return the tensor of a model's output."""
    return value if isinstance(value, Tensor) else value[0]


def wan(**config: Any) -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import WanTransformer3DModel

    defaults: dict[str, Any] = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 64,
        "in_channels": 8,
        "out_channels": 8,
        "text_dim": 64,
        "freq_dim": 64,
        "ffn_dim": 256,
        "num_layers": 2,
    }
    model = WanTransformer3DModel(**{**defaults, **config}).eval()
    inputs: dict[str, Any] = {
        "hidden_states": torch.randn(1, 8, 2, 8, 8),
        "timestep": torch.tensor([10.0]),
        "encoder_hidden_states": torch.randn(1, 12, 64),
    }
    if "image_dim" in config:
        inputs["encoder_hidden_states_image"] = torch.randn(1, 5, config["image_dim"])
    return model, inputs


def flux() -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=64,
        num_attention_heads=2,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        axes_dims_rope=(16, 24, 24),
        guidance_embeds=True,
    ).eval()
    return model, {
        "hidden_states": torch.randn(1, 16, 16),
        "encoder_hidden_states": torch.randn(1, 8, 64),
        "pooled_projections": torch.randn(1, 64),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(8, 3),
        "guidance": torch.tensor([3.5]),
    }


def sd3() -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_layers=3,
        attention_head_dim=64,
        num_attention_heads=2,
        caption_projection_dim=128,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        out_channels=4,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
    ).eval()
    return model, {
        "hidden_states": torch.randn(1, 4, 8, 8),
        "encoder_hidden_states": torch.randn(1, 6, 64),
        "pooled_projections": torch.randn(1, 64),
        "timestep": torch.tensor([10.0]),
    }


def pixart() -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import PixArtTransformer2DModel

    model = PixArtTransformer2DModel(
        num_layers=2,
        attention_head_dim=64,
        num_attention_heads=3,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=192,
        sample_size=8,
        patch_size=2,
        caption_channels=64,
        use_additional_conditions=True,
    ).eval()
    return model, {
        "hidden_states": torch.randn(1, 4, 8, 8),
        "encoder_hidden_states": torch.randn(1, 6, 64),
        "timestep": torch.tensor([10]),
        "added_cond_kwargs": {"resolution": torch.tensor([[8.0, 8.0]]), "aspect_ratio": torch.tensor([[1.0]])},
    }


def encoder(**config: Any) -> tuple[nn.Module, dict[str, Any]]:
    layer = nn.TransformerEncoderLayer(128, 2, 256, batch_first=True, **config)
    return nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval(), {"src": torch.randn(2, 10, 128)}


def masked_recipe(model: nn.Module, high: Sequence[str] = (), widest: int = 128) -> Any:
    """Return a recipe with a mask for each activation, some of them rotated, and some scales searched."""
    from tahf4_compiler.packed.plan import plan_modules, plan_transforms
    from tahf4_compiler.recipe.entries import LinearEntry, RecipeEntry
    from tahf4_compiler.recipe.recipe import Recipe
    from tahf4_compiler.weights.checksum import checksum

    transforms = plan_transforms(model, plan_modules(model))
    entries: dict[str, dict] = {}
    for path in transforms:
        weight = model.get_submodule(path).weight
        decision = "high_precision" if path in high else "hif4"
        linear = LinearEntry(tuple(weight.shape), int(checksum(weight)), decision, "by hand")
        activation = re.sub(r"attn1\.to_[kv]$", "attn1.to_q", re.sub(r"attn2\.to_v$", "attn2.to_k", path))
        entries.setdefault(activation, {})[path] = linear
    made = {}
    for i, (name, linears) in enumerate(entries.items()):
        k = next(iter(linears.values())).shape[1]
        made[name] = RecipeEntry(
            linears,
            hadamard_block=(0, 64, widest)[i % 3],
            seed=(None, i, i)[i % 3],
            search=("squared", "")[i % 2],
            percentile=99.9,
            mask=torch.rand(k, dtype=torch.float32) + 0.5,
        )
    return Recipe({"": made})


def branched(recipe: Any, model: nn.Module, rank: int = 8) -> Any:
    """Return a recipe that gives every linear a branch of low rank, too."""
    from dataclasses import replace

    from tahf4_compiler.format.low_rank import leading

    def with_branches(entry: Any) -> Any:
        weights = {path: model.get_submodule(path).weight for path in entry.linears}
        return replace(entry, low_rank={path: leading(weight, entry.mask, rank) for path, weight in weights.items()})

    experts = {
        expert: {name: with_branches(entry) for name, entry in entries.items()}
        for expert, entries in recipe.experts.items()
    }
    return replace(recipe, experts=experts)
