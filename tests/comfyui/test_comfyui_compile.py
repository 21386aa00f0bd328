"""The node that compiles a model: packed or plain, with LoRA that change afterwards."""

from __future__ import annotations

import copy
import functools
import logging

import pytest
import torch
from helpers import relative
from test_comfyui_workflow import CLOSE, FAR, SIGMAS, by_diffusers, factors, inputs, lora
from torch import nn
from torch._dynamo.utils import counters

import tahf4_compiler as tahf4

PATH, NAME = "blocks.0.ffn.net.0.proj", "diffusion_model.blocks.0.ffn.0"


@pytest.fixture
def compiled(comfy, monkeypatch):
    """What the node makes of a patcher; without Inductor, which takes most of the time."""
    nodes = comfy.submodule("nodes")
    quick = functools.partial(comfy.stand_in.set_torch_compile_wrapper, options={"inductor": False})
    monkeypatch.setattr(nodes, "set_torch_compile_wrapper", quick)
    yield lambda patcher: nodes.CompileModel().compile_model(patcher)[0]
    torch._dynamo.reset()


@torch.inference_mode()  # as ComfyUI runs all nodes: what they load are inference tensors
def load_plain(comfy):
    rename = comfy.submodule("names").to_original
    state = {rename(name): value.clone() for name, value in comfy.plain.state_dict().items()}
    return comfy.stand_in.load_diffusion_model_state_dict(state, disable_dynamic=True)


def with_lora(comfy, patcher, strength, seed=0):
    return comfy.stand_in.load_lora_for_models(patcher, None, lora(PATH, NAME, seed), strength, 0)[0]


class Nothing(nn.Module):
    """A model without a flow."""

    def forward(self, x, *args, **kwargs):
        return torch.zeros_like(x)


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def test_the_node_compiles_a_clone_for_as_long_as_it_is_applied(comfy, monkeypatch):
    made = []

    def compile(part, backend, options):
        made.append((part, backend, options))
        return Nothing()

    monkeypatch.setattr(torch, "compile", compile)
    model = comfy.load()
    (clone,) = comfy.package.NODE_CLASS_MAPPINGS["TAHF4CompileModel"]().compile_model(model)
    part = model.model.diffusion_model
    assert made == [(part, "tahf4", None)] and clone is not model
    noise, context = inputs()
    assert torch.equal(comfy.stand_in.sample(clone, noise, context, SIGMAS), noise * SIGMAS[0])
    assert not torch.equal(comfy.stand_in.sample(model, noise, context, SIGMAS), noise * SIGMAS[0])
    assert clone.model.diffusion_model is part


@pytest.mark.slow
def test_a_compiled_packed_model_has_the_lora_and_the_bits_of_the_patcher_that_samples(comfy, compiled, caplog):
    noise, context = inputs()
    with torch.inference_mode():
        base = comfy.load()
    clone, bits = compiled(base), comfy.package.NODE_CLASS_MAPPINGS["TAHF4ActivationBits"]()
    changes = [
        (lambda model: model, 1),
        (lambda model: with_lora(comfy, model, 0.7), 1),
        (lambda model: with_lora(comfy, model, -0.7), 0),  # other numbers, the same graph
        (lambda model: with_lora(comfy, model, 0.7, seed=2), 0),
        (lambda model: bits.set_bits(model, "8", "all")[0], 1),
        (lambda model: model, 0),
    ]
    seen = []
    with caplog.at_level(logging.WARNING):
        for change, new in changes:
            expected = comfy.stand_in.sample(change(base), noise, context, SIGMAS)
            before = graphs()
            out = comfy.stand_in.sample(change(clone), noise, context, SIGMAS)
            assert relative(out, expected) < CLOSE and graphs() - before == new
            seen.append(out)
    assert torch.equal(seen[0], seen[-1]) and not caplog.records
    assert min(relative(a, b) for a, b in zip(seen[:3], seen[1:4])) > FAR


@pytest.mark.slow
def test_a_plain_model_runs_in_4_bits_with_the_lora_that_is_patched_into_its_weights(comfy, compiled, caplog):
    noise, context = inputs()
    base = load_plain(comfy)
    clone, seen, before = compiled(base), [], graphs()
    with caplog.at_level(logging.WARNING):
        for strength in (0.0, 0.7, -0.7, 0.0):
            patcher = with_lora(comfy, clone, strength) if strength else clone
            reference = copy.deepcopy(comfy.plain)
            up, down = factors(PATH)
            reference.get_submodule(PATH).weight.add_(strength * up @ down)
            high = by_diffusers(reference, noise, context)
            seen.append(comfy.stand_in.sample(patcher, noise, context, SIGMAS))
            tahf4.quantize_(reference)
            assert relative(seen[-1], by_diffusers(reference, noise, context)) < CLOSE
            assert relative(seen[-1], high) > FAR
        assert graphs() - before == 1, "other weights, the same graph"
        assert torch.equal(seen[0], seen[-1]) and not caplog.records
        torch.inference_mode()(base.detach)()
        comfy.stand_in.sample(with_lora(comfy, clone, 0.7), noise, context, SIGMAS, memory=1)
    (record,) = caplog.records
    assert "1 linears of its repeated blocks run in high precision" in record.getMessage()
    assert "(blocks.0.ffn.0: " in record.getMessage()
