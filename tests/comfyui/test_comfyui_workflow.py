"""Loader, LoRA and sampling in a stand-in for ComfyUI, against diffusers on the same weights."""

from __future__ import annotations

import copy
import json
import logging

import pytest
import torch
from helpers import relative
from torch import Tensor

import tahf4_compiler as tahf4
from tahf4_compiler.packed.linear import HiF4Linear

SIGMAS = torch.tensor([0.9, 0.6, 0.3, 0.0])
K, N = 128, 256  # of ffn.0
# Where the same sums are added in another order, a few values fall on the other side of a rounding border.
CLOSE, FAR = 4e-3, 2e-2


def inputs() -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    return torch.randn(1, 4, 2, 8, 8), torch.randn(1, 12, 4096)


@torch.inference_mode()
def by_diffusers(model, noise: Tensor, context: Tensor) -> Tensor:
    x = noise * SIGMAS[0]
    for sigma, after in zip(SIGMAS[:-1], SIGMAS[1:]):
        flow = model(hidden_states=x, timestep=sigma.repeat(1) * 1000, encoder_hidden_states=context)[0]
        x = x + flow * (after - sigma)
    return x


def factors(path: str, seed: int = 0, rank: int = 4) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(seed)
    n, k = {"ffn.net.0.proj": (N, K), "ffn.net.2": (K, N)}.get(path.split(".", 2)[2], (K, K))
    return torch.randn(n, rank, generator=made) * 0.5, torch.randn(rank, k, generator=made) * 0.5


def with_lora(model, path: str, strength: float, seed: int = 0, alpha: float | None = None):
    """A LoRA beside a packed linear of diffusers, written down as plainly as it can be."""
    model = copy.deepcopy(model)
    up, down = factors(path, seed)
    scale = strength * (alpha / 4 if alpha is not None else 1.0)
    model.get_submodule(path).register_forward_hook(lambda _, args, out: out + scale * (args[0] @ down.T @ up.T))
    return model


def lora(path: str, key: str, seed: int = 0, up: str = "lora_up", down: str = "lora_down", alpha: float | None = None):
    first, second = factors(path, seed)
    made = {f"{key}.{up}.weight": first, f"{key}.{down}.weight": second}
    return made if alpha is None else {**made, f"{key}.alpha": torch.tensor(alpha)}


def held(patcher) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in patcher.model.named_parameters()}


def test_sampling_gives_what_diffusers_gives(comfy):
    model = comfy.load()
    noise, context = inputs()
    linears = {p: m for p, m in model.model.diffusion_model.named_modules() if isinstance(m, HiF4Linear)}
    assert len(linears) == 20 and {m.hadamard_block for m in linears.values()} == {0, 64, 128}
    blocks = model.model.diffusion_model.blocks
    qkv = [getattr(blocks[1].self_attn, name) for name in "qkv"]  # one activation: one mask, one rotation, one name
    assert len({linear.activation for linear in qkv}) == 1 and all(
        torch.equal(linear.multiplier, qkv[0].multiplier) for linear in qkv
    )
    reference = by_diffusers(comfy.packed, noise, context)
    out = comfy.stand_in.sample(model, noise, context, SIGMAS)
    assert relative(out, reference) < CLOSE
    assert relative(by_diffusers(comfy.plain, noise, context), reference) > FAR, "and not what plain weights give"


def test_swapped_names_would_be_seen(comfy, monkeypatch):
    table = comfy.submodule("names").IN_BLOCKS
    monkeypatch.setitem(table, "self_attn.q", "attn1.to_k")
    monkeypatch.setitem(table, "self_attn.k", "attn1.to_q")
    noise, context = inputs()
    out = comfy.stand_in.sample(comfy.load(), noise, context, SIGMAS)
    assert relative(out, by_diffusers(comfy.packed, noise, context)) > FAR


@pytest.mark.parametrize(
    ("key", "up", "down"),
    [
        ("transformer.blocks.0.ffn.net.0.proj", "lora_B", "lora_A"),  # diffusers
        ("diffusion_model.blocks.0.ffn.0", "lora_B", "lora_A"),  # original
        ("lora_unet_blocks_0_ffn_0", "lora_up", "lora_down"),  # kohya
    ],
)
def test_a_lora_of_each_convention_runs_beside_the_product(comfy, key, up, down):
    from safetensors.torch import save_file

    path = "blocks.0.ffn.net.0.proj"
    save_file(lora(path, key, up=up, down=down, alpha=2.0), comfy.models / "loras" / "style.safetensors")
    node = comfy.package.NODE_CLASS_MAPPINGS["TAHF4LoraLoader"]()
    (model,) = node.load_lora(comfy.load(), "style.safetensors", 0.7)
    noise, context = inputs()
    expected = by_diffusers(with_lora(comfy.packed, path, 0.7, alpha=2.0), noise, context)
    out = comfy.stand_in.sample(model, noise, context, SIGMAS)
    assert relative(out, expected) < CLOSE
    assert relative(by_diffusers(comfy.packed, noise, context), expected) > FAR


@pytest.mark.parametrize(
    ("settings", "alpha"),
    [
        ({"lora_alpha": 8}, 8.0),
        ({"lora_alpha": 8, "alpha_pattern": {"net.0.proj": 2}}, 2.0),
        ({"lora_alpha": 8, "use_rslora": True}, 16.0),  # divided by the root of the rank, 4
    ],
)
def test_the_alpha_that_diffusers_writes_into_the_header_counts(comfy, settings, alpha):
    from safetensors.torch import save_file

    path = "blocks.0.ffn.net.0.proj"
    header = json.dumps({f"transformer.{name}": value for name, value in settings.items()})
    factors = lora(path, f"transformer.{path}", up="lora_B", down="lora_A")
    save_file(factors, comfy.models / "loras" / "header.safetensors", {"lora_adapter_metadata": header})
    node = comfy.package.NODE_CLASS_MAPPINGS["TAHF4LoraLoader"]()
    (model,) = node.load_lora(comfy.load(), "header.safetensors", 0.7)
    noise, context = inputs()
    expected = by_diffusers(with_lora(comfy.packed, path, 0.7, alpha=alpha), noise, context)
    assert relative(comfy.stand_in.sample(model, noise, context, SIGMAS), expected) < CLOSE
    dora = json.dumps({"transformer.lora_alpha": 1, "transformer.use_dora": True})
    none = json.dumps({"transformer.lora_alpha": None})
    word = json.dumps({"transformer.lora_alpha": 1, "transformer.alpha_pattern": {"net.0.proj": "8"}})
    numbers = ((none, "is None; expected a number"), (word, "is '8'; expected a number"))
    for header, what in (("[1", "no JSON object"), (dora, "DoRA"), *numbers):
        save_file(factors, comfy.models / "loras" / "header.safetensors", {"lora_adapter_metadata": header})
        with pytest.raises(tahf4.PackedError, match=what):
            node.load_lora(comfy.load(), "header.safetensors", 0.7)


def test_strengths_several_loras_and_back(comfy):
    """One model in memory, as ComfyUI holds it: what counts is the patcher that sampled last."""
    first, second = "blocks.0.ffn.net.0.proj", "blocks.1.attn1.to_v"
    noise, context = inputs()
    base = comfy.load()
    before, clean = held(base), comfy.stand_in.sample(base, noise, context, SIGMAS)
    apply = comfy.stand_in.load_lora_for_models
    name = "diffusion_model.blocks.0.ffn.0"
    weak, _ = apply(base, None, lora(first, name), 0.3, 0)
    twice, _ = apply(weak, None, lora(first, name, seed=1), -0.5, 0)
    both, _ = apply(twice, None, lora(second, "diffusion_model.blocks.1.self_attn.v", seed=2), 0.8, 0)
    one = with_lora(comfy.packed, first, 0.3)
    two = with_lora(one, first, -0.5, seed=1)
    three = with_lora(two, second, 0.8, seed=2)
    for patcher, reference in ((weak, one), (both, three), (twice, two), (weak, one)):
        out = comfy.stand_in.sample(patcher, noise, context, SIGMAS)
        assert relative(out, by_diffusers(reference, noise, context)) < CLOSE
        assert patcher.model is base.model, "clones share the weights"
        assert all(torch.equal(before[k], v) for k, v in held(base).items()), "no byte of a weight changed"
    assert torch.equal(comfy.stand_in.sample(base, noise, context, SIGMAS), clean)
    comfy.stand_in.sample(both, noise, context, SIGMAS)
    both.detach()
    assert all(m.adapter is None for m in base.model.modules() if isinstance(m, HiF4Linear)), "factors are freed"


def test_a_clone_that_goes_takes_nothing_from_the_one_that_is_loaded(comfy):
    base = comfy.load()
    patched, _ = comfy.stand_in.load_lora_for_models(
        base, None, lora("blocks.0.ffn.net.0.proj", "diffusion_model.blocks.0.ffn.0"), 0.7, 0
    )
    noise, context = inputs()
    out = comfy.stand_in.sample(patched, noise, context, SIGMAS)
    clone = base.clone()
    del clone  # nothing holds it: it is gone at once
    assert torch.equal(comfy.stand_in.sample(patched, noise, context, SIGMAS), out)


@pytest.mark.parametrize("memory", [1, 300_000], ids=["nothing fits", "half fits"])
def test_low_memory_gives_the_same(comfy, memory):
    noise, context = inputs()
    path = "blocks.0.ffn.net.0.proj"
    base = comfy.load()
    biased = {**lora(path, "diffusion_model.blocks.0.ffn.0"), "diffusion_model.blocks.0.ffn.0.diff_b": torch.ones(N)}
    patched, _ = comfy.stand_in.load_lora_for_models(base, None, biased, 0.7, 0)
    whole = comfy.stand_in.sample(patched, noise, context, SIGMAS)
    patched.detach()
    part = comfy.stand_in.sample(patched, noise, context, SIGMAS, memory=memory)
    assert relative(part, whole) < CLOSE
    assert any(m.bias_function for m in base.model.modules() if isinstance(m, HiF4Linear)) == (memory == 1)
    reference = with_lora(comfy.packed, path, 0.7)
    reference.get_submodule(path).bias.add_(0.7)
    assert relative(whole, by_diffusers(reference, noise, context)) < CLOSE


def test_an_offloaded_linear_moves_what_it_holds(comfy):
    model = comfy.load()
    linear = model.model.diffusion_model.blocks[0].ffn[0]
    linear.adapter = torch.randn(K, 2), torch.randn(2, N)
    for call in (linear, torch.compile(linear, backend="tahf4", options={"inductor": False})):
        with torch.inference_mode():
            out = call(torch.empty(3, K, device="meta"))
        assert out.device.type == "meta" and out.shape == (3, N)
    assert all(value.device.type == "cpu" for value in linear.parameters())


def test_more_bits_in_some_steps(comfy):
    node = comfy.package.NODE_CLASS_MAPPINGS["TAHF4ActivationBits"]()
    noise, context = inputs()
    model = comfy.load()
    used: list[set[int]] = []
    linears = [m for m in model.model.modules() if isinstance(m, HiF4Linear)]
    model.model.diffusion_model.register_forward_pre_hook(lambda *_: used.append({m.activation_bits for m in linears}))
    (changed,) = node.set_bits(model, "16", "0, -1")
    out = comfy.stand_in.sample(changed, noise, context, SIGMAS)
    assert used == [{16}, {4}, {16}]
    used.clear()
    plain = comfy.stand_in.sample(model, noise, context, SIGMAS)
    assert used == [{4}] * 3 and not torch.equal(out, plain)
    used.clear()
    comfy.stand_in.sample(node.set_bits(model, "8", "all")[0], noise, context, SIGMAS)
    assert used == [{8}] * 3


def test_steps_that_a_sampler_has_not_are_said_once(comfy, caplog):
    node = comfy.package.NODE_CLASS_MAPPINGS["TAHF4ActivationBits"]()
    (model,) = node.set_bits(comfy.load(), "16", "0, 3, -4")
    with caplog.at_level(logging.WARNING):
        comfy.stand_in.sample(model, *inputs(), SIGMAS)
    (said,) = [record.message for record in caplog.records if "Activation Bits" in record.message]
    assert "3, -4 is no step of a sampler of 3 steps" in said
    for nothing in ("", ",", "1,"):
        with pytest.raises(tahf4.OptionError, match="expected numbers"):
            node.set_bits(model, "16", nothing)
