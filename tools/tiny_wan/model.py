"""The components of the tiny Wan2.2 pipeline, all of the classes that the real pipeline uses."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

from . import data

LATENT_CHANNELS = 16
TEXT_DIM = 64

FLOW_SHIFT = 3.0
"""Shift of the noise schedule: sigma = shift·s / (1 + (shift − 1)·s) for s uniform in [0, 1]."""

BOUNDARY_RATIO = 0.75
"""Sigma at and above which the high-noise expert denoises; half of the shifted steps lie on each side."""


def build_vae() -> AutoencoderKLWan:
    """Return an untrained autoencoder: 8× spatial and 2× temporal compression, 16 latent channels."""
    return AutoencoderKLWan(
        base_dim=16,
        decoder_base_dim=24,
        z_dim=LATENT_CHANNELS,
        dim_mult=[2, 2],
        num_res_blocks=1,
        temperal_downsample=[True],
        is_residual=True,
        patch_size=4,
        in_channels=48,
        out_channels=48,
        scale_factor_temporal=2,
        scale_factor_spatial=8,
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
    )


def build_tokenizer() -> T5Tokenizer:
    """Return a T5 tokenizer that knows the words of the captions; any other word is `<unk>`."""
    words = {word for caption in data.all_captions() for word in str(caption).split()}
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocabulary = [*special, *((f"▁{word}", -1.0) for word in sorted(words))]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0)


def build_text_encoder(vocabulary_size: int) -> UMT5EncoderModel:
    """Return an untrained text encoder of `TEXT_DIM` channels."""
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=vocabulary_size,
            d_model=TEXT_DIM,
            d_kv=32,
            d_ff=128,
            num_layers=2,
            num_heads=2,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
        )
    )


def build_transformer() -> WanTransformer3DModel:
    """Return an untrained expert: 4 layers, 3 heads of 64 channels, one token per latent position."""
    return WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=3,
        attention_head_dim=64,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=TEXT_DIM,
        freq_dim=128,
        ffn_dim=512,
        num_layers=4,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=64,
    )


def build_scheduler() -> UniPCMultistepScheduler:
    """Return Wan's sampler: UniPC on the shifted flow-matching schedule."""
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=FLOW_SHIFT,
        num_train_timesteps=1000,
    )


def build_pipeline(seed: int) -> WanPipeline:
    """Return an untrained pipeline in float32, its weights drawn from `seed`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vae = build_vae()
        tokenizer = build_tokenizer()
        return WanPipeline(
            tokenizer=tokenizer,
            text_encoder=build_text_encoder(len(tokenizer)),
            vae=vae,
            scheduler=build_scheduler(),
            transformer=build_transformer(),
            transformer_2=build_transformer(),
            boundary_ratio=BOUNDARY_RATIO,
        )


def shift_sigma(uniform: torch.Tensor, shift: float = FLOW_SHIFT) -> torch.Tensor:
    """Map evenly spread values in [0, 1] to the sigmas of the sampler's schedule."""
    return shift * uniform / (1 + (shift - 1) * uniform)


def unshift_sigma(sigma: float, shift: float = FLOW_SHIFT) -> float:
    """Return the evenly spread value that `shift_sigma` maps to `sigma`."""
    return sigma / (shift - (shift - 1) * sigma)


def round_to_bfloat16(module: torch.nn.Module) -> None:
    """Round the weights in place to values that the saved bfloat16 file holds exactly."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(parameter.bfloat16())


def normalize_latents(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """Bring encoder latents `[clips, channels, frames, height, width]` to mean 0 and deviation 1."""
    mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    return (latents - mean) / std


def save_pipeline(pipeline: WanPipeline, path: Path) -> None:
    """Save a pipeline in bfloat16, written beside `path`, then renamed over what is there.

    The pipeline's modules are float32 again afterwards, with rounded weights.
    """
    partial, old = path.with_name(path.name + ".partial"), path.with_name(path.name + ".old")
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    modules = [pipeline.vae, pipeline.text_encoder, pipeline.transformer, pipeline.transformer_2]
    for module in modules:
        for parameter in module.parameters():
            parameter.data = parameter.data.bfloat16()
    pipeline.save_pretrained(partial, safe_serialization=True)
    for module in modules:
        module.float()
    if path.exists():
        os.replace(path, old)
    os.replace(partial, path)
    shutil.rmtree(old, ignore_errors=True)


def load_pipeline(path: Path) -> WanPipeline:
    """Load a saved pipeline in float32, without a network and without its own progress bar."""
    pipeline = WanPipeline.from_pretrained(path, torch_dtype=torch.float32, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
