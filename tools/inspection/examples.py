"""Example arguments for the transformers of diffusers, from their configuration alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CommandError

__all__ = ["example_arguments", "parse_shape"]

Shape = tuple[int, ...]
TEXT_TOKENS = 512


def parse_shape(text: str | None) -> Shape | None:
    """Return the sizes of ``FRAMESxHEIGHTxWIDTH`` or ``HEIGHTxWIDTH``, in units of the latent tensor.

    Raises:
        CommandError: another form.
    """
    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) not in (2, 3) or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise CommandError(
            f"--shape {text!r}; expected FRAMESxHEIGHTxWIDTH (video) or HEIGHTxWIDTH (image) of the latent tensor, "
            "such as 21x60x104, which is 81 frames of 480x832 with the autoencoder of Wan2.2 A14B"
        )
    return tuple(map(int, parts))


def example_arguments(model: nn.Module, shape: Shape | None, dtype: torch.dtype) -> dict[str, Any]:
    """Return keyword arguments that a transformer of diffusers can be called with.

    Args:
        model: of a class in :data:`MAKERS`, with its ``config``.
        shape: sizes of the latent, or None for a default that fits the model.
        dtype: of floating-point arguments but timesteps.

    Raises:
        CommandError: another class, or a shape that the model does not take.
    """
    name = type(model).__name__
    maker = MAKERS.get(name)
    if maker is None:
        parameters = inspect.signature(model.forward).parameters.values()
        needed = [p.name for p in parameters if p.default is inspect.Parameter.empty and p.kind is not p.VAR_KEYWORD]
        raise CommandError(
            f"example arguments of a {name} are not known; known are {', '.join(MAKERS)}. Its forward needs "
            f"{', '.join(needed)}: give them in Python with tahf4.lower(tahf4.capture(model, args, kwargs))"
            ".report('out.html'), or export the model with torch.export and inspect the .pt2 file."
        )
    try:
        return maker(model.config, shape, dtype)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CommandError(f"the configuration of {name} does not fit: {error}") from error


def _sizes(shape: Shape | None, default: Shape) -> Shape:
    if shape is None:
        return default
    if len(shape) != len(default):
        words = "FRAMESxHEIGHTxWIDTH" if len(default) == 3 else "HEIGHTxWIDTH"
        raise CommandError(f"--shape has {len(shape)} sizes; this model takes {words} of the latent tensor")
    return shape


def _wan(config: Any, shape: Shape | None, dtype: torch.dtype) -> dict[str, Any]:
    patch = config.patch_size
    small = config.num_attention_heads * config.attention_head_dim < 1024
    default = (5, 16, 16) if small else (21, 60, 104)
    sizes = _sizes(shape, default)
    for name, size, step in zip(("frames", "height", "width"), sizes, patch, strict=True):
        if size % step or size // step > config.rope_max_seq_len:
            raise CommandError(
                f"--shape: {name} {size} must be a multiple of the patch {step}, up to {config.rope_max_seq_len * step}"
            )
    found: dict[str, Any] = {
        "hidden_states": torch.randn(1, config.in_channels, *sizes, dtype=dtype),
        "timestep": torch.full((1,), 500.0),
        "encoder_hidden_states": torch.randn(1, TEXT_TOKENS, config.text_dim, dtype=dtype),
    }
    if config.image_dim:
        found["encoder_hidden_states_image"] = torch.randn(1, 257, config.image_dim, dtype=dtype)
    return found


def _flux(config: Any, shape: Shape | None, dtype: torch.dtype) -> dict[str, Any]:
    height, width = _sizes(shape, (128, 128))
    tokens = max(1, height // 2) * max(1, width // 2)
    found: dict[str, Any] = {
        "hidden_states": torch.randn(1, tokens, config.in_channels, dtype=dtype),
        "encoder_hidden_states": torch.randn(1, TEXT_TOKENS, config.joint_attention_dim, dtype=dtype),
        "pooled_projections": torch.randn(1, config.pooled_projection_dim, dtype=dtype),
        "timestep": torch.full((1,), 0.5, dtype=dtype),
        "img_ids": torch.zeros(tokens, 3),
        "txt_ids": torch.zeros(TEXT_TOKENS, 3),
    }
    if config.guidance_embeds:
        found["guidance"] = torch.full((1,), 3.5, dtype=dtype)
    return found


def _sd3(config: Any, shape: Shape | None, dtype: torch.dtype) -> dict[str, Any]:
    height, width = _sizes(shape, (config.sample_size, config.sample_size))
    return {
        "hidden_states": torch.randn(1, config.in_channels, height, width, dtype=dtype),
        "encoder_hidden_states": torch.randn(1, 333, config.joint_attention_dim, dtype=dtype),
        "pooled_projections": torch.randn(1, config.pooled_projection_dim, dtype=dtype),
        "timestep": torch.full((1,), 500.0),
    }


def _pixart(config: Any, shape: Shape | None, dtype: torch.dtype) -> dict[str, Any]:
    height, width = _sizes(shape, (config.sample_size, config.sample_size))
    more: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
    if config.use_additional_conditions or (config.use_additional_conditions is None and config.sample_size == 128):
        more = {
            "resolution": torch.tensor([[8.0 * height, 8.0 * width]]).to(dtype),
            "aspect_ratio": torch.ones(1, 1).to(dtype),
        }
    text = config.caption_channels or config.cross_attention_dim
    return {
        "hidden_states": torch.randn(1, config.in_channels, height, width, dtype=dtype),
        "encoder_hidden_states": torch.randn(1, 300, text, dtype=dtype),
        "timestep": torch.full((1,), 500),
        "added_cond_kwargs": more,
    }


MAKERS: Mapping[str, Callable[[Any, Shape | None, torch.dtype], dict[str, Any]]] = {
    "WanTransformer3DModel": _wan,
    "FluxTransformer2DModel": _flux,
    "SD3Transformer2DModel": _sd3,
    "PixArtTransformer2DModel": _pixart,
}
"""What makes the arguments, by class name."""
