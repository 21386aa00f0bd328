"""Adapters run beside 4-bit products, whatever their rank, and libraries do with them what they do without tahf4."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from helpers import plans, relative
from models import Stack, branched, flux, masked_recipe, output, wan
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict

import tahf4_compiler as tahf4
from tahf4_compiler.model.reasons import Cause
from tahf4_compiler.packed.convert import packed_linears

GRAPH = {"inductor": False}
TARGETS = ["to_q", "to_v", "ffn.net.2"]


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def frozen():
    model, inputs = wan(num_layers=1)
    return model.requires_grad_(False), inputs


def config(rank, **values):
    """Describe an adapter; a state dict of one says nothing about its weight, so that is 1."""
    return LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS, init_lora_weights=False, **values)


def added(model, rank, **values):
    """Return a copy of a model with an adapter, and the state dict of the adapter."""
    model = copy.deepcopy(model)
    model.add_adapter(config(rank, **values), "style")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter *= 3  # it matters more than the quantization
    state = get_peft_model_state_dict(model, adapter_name="style")
    model.requires_grad_(False)
    return model, {f"transformer.{key}": value.clone() for key, value in state.items()}


@pytest.mark.parametrize("rank", [4, 64])
def test_adapters_are_weighted_switched_and_deleted_on_a_packed_model(rank):
    model, inputs = frozen()
    late = copy.deepcopy(model)
    tahf4.quantize_(late)
    without = output(late(**inputs))
    early, state = added(model, rank)
    want = output(early(**inputs))
    plan = tahf4.quantize_(early)
    assert {d.cause for d in plan if ".lora_" in d.module} == {Cause.ADAPTER}
    late.load_lora_adapter(state, adapter_name="style")
    for packed in (early, late):
        assert isinstance(packed.blocks[0].attn1.to_q.base_layer, tahf4.HiF4Linear)
        assert len(packed_linears(packed)) == 10
        whole = output(packed(**inputs))
        assert relative(whole, want) < 0.5 * relative(without, want)
        packed.set_adapters("style", 0.5)
        assert relative(output(packed(**inputs)), whole) > 0.01
        packed.disable_adapters()
        assert torch.equal(output(packed(**inputs)), without)
        packed.enable_adapters()
        packed.set_adapters("style", 1.0)
        assert torch.equal(output(packed(**inputs)), whole)
        packed.delete_adapters("style")
        assert torch.equal(output(packed(**inputs)), without), "packed alike, before the adapter came and after"


@pytest.mark.slow  # a float that changes: test_changing_floats.py
def test_an_adapter_of_a_compiled_model_takes_another_scale():
    model, inputs = frozen()
    _, state = added(model, 4)
    model.load_lora_adapter(state, adapter_name="style")
    model.requires_grad_(False)
    packed = copy.deepcopy(model)
    tahf4.quantize_(packed)
    # Through Inductor: tests/graph_capture/test_changing_floats.py.
    model.compile(backend="tahf4", dynamic=True, options=GRAPH)  # else the first graph has a constant
    outputs = []
    for scale in (1.0, 0.5, 0.25):
        for one in (model, packed):
            one.set_adapters("style", scale)
        outputs.append(output(packed(**inputs)))
        assert relative(output(model(**inputs)), outputs[-1]) < 1e-2
    assert relative(outputs[0], outputs[1]) > 0.05 and relative(outputs[1], outputs[2]) > 0.03


@pytest.mark.parametrize("way", ["compiled", "packed"])
def test_an_adapter_is_swapped_while_the_model_runs(way):
    model, inputs = frozen()
    running, packed = copy.deepcopy(model), copy.deepcopy(model)
    running.enable_lora_hotswap(target_rank=128)
    tahf4.quantize_(packed)
    without = output(packed(**inputs))
    for i, rank in enumerate((4, 128, 64)):
        _, state = added(model, rank)
        running.load_lora_adapter(state, adapter_name="style", hotswap=i > 0)
        running.requires_grad_(False)
        if i == 0 and way == "packed":
            tahf4.quantize_(running)
        elif i == 0:
            running.compile(backend="tahf4", options=GRAPH)
        packed.load_lora_adapter(state, adapter_name="style")
        want = output(packed(**inputs))
        assert relative(output(running(**inputs)), want) < 1e-3 < 0.01 < relative(want, without)
        packed.delete_adapters("style")


def test_a_linear_under_dora_stays_and_one_that_is_packed_refuses_it():
    model, inputs = frozen()
    adapted, _ = added(model, 64, use_dora=True)
    want = output(adapted(**inputs))
    plan = {d.module: d for d in tahf4.quantize_(adapted)}
    assert plan["blocks.0.attn1.to_q.base_layer"].reason == "class: DoRA reads the weight itself"
    assert len(packed_linears(adapted)) == 5
    assert relative(output(adapted(**inputs)), want) < 0.1
    tahf4.quantize_(model)
    before = output(model(**inputs))
    with pytest.raises(tahf4.PackedError, match="DoRA"):
        model.add_adapter(config(64, use_dora=True), "late")
    assert torch.equal(output(model(**inputs)), before)


READ = {
    "HRAConfig": {},
    "ShiraConfig": {},
    "MissConfig": {"init_weights": "bat", "r": 8},
    "HiraConfig": {},
    "GloraConfig": {},
    "PeanutConfig": {},
    "LoraConfig": {"target_parameters": ["up.weight"]},
}


@pytest.mark.parametrize("kind", [*READ, "MissConfig beside"])
def test_what_an_adapter_computes_with_stays_and_what_it_runs_beside_is_packed(kind, caplog):
    model, x = Stack(1).eval().requires_grad_(False), torch.randn(7, 64)
    extra = {"target_modules": ["up"]} | READ.get(kind, {})
    if "target_parameters" in extra:
        del extra["target_modules"]
    adapted = peft.get_peft_model(model, getattr(peft, kind.partition(" ")[0])(**extra)).eval().requires_grad_(False)
    want = adapted(x)
    linear = model.blocks[0].up.base_layer
    plan = {d.module.rpartition("blocks.0.")[2]: d for d in tahf4.quantize_(adapted)}
    assert relative(adapted(x), want) < 0.2
    assert plan["down"].decision == "hif4"
    if kind in READ:
        assert model.blocks[0].up.base_layer is linear
        assert f"class: an adapter (peft.tuners.{kind.removesuffix('Config').lower()}." in plan["up.base_layer"].reason
        assert "1 linears of its repeated blocks cannot be packed" in caplog.text
    else:
        assert plan["up.base_layer"].decision == "hif4" and not caplog.text


def test_no_matrix_of_dora_is_quantized_in_the_frames_below_a_graph_break(tmp_path):
    model = Stack(2).eval()
    inject_adapter_in_model(
        LoraConfig(r=64, target_modules=["up"], init_lora_weights=False, use_dora=True), model, "style"
    )
    model.requires_grad_(False)
    x = torch.randn(4, 64)
    want = model(x)
    model.compile(backend="tahf4", options={**GRAPH, "dump_dir": str(tmp_path)})
    assert relative(model(x), want) < 0.1
    rows = [row for plan in plans(tmp_path) for row in plan if "lora" in row["module"]]
    assert rows and {row["decision"] for row in rows} == {"high_precision"}
    assert {row["cause"] for row in rows} == {"adapter"}


def test_a_module_that_peft_copied_to_train_stays_and_the_original_is_packed():
    settings = LoraConfig(r=64, target_modules=["up"], modules_to_save=["down"], init_lora_weights=False)
    model = get_peft_model(Stack(2).eval(), settings)
    found = {d.module.partition("down.")[2]: d.cause for d in tahf4.quantize_(model) if "down." in d.module}
    assert found == {"original_module": Cause.BODY, "modules_to_save.default": Cause.ADAPTER}


def test_a_recipe_fits_before_and_after_an_adapter_is_loaded():
    model, _ = frozen()
    recipe = masked_recipe(model)
    adapted, _ = added(model, 64)
    late = copy.deepcopy(adapted)
    tahf4.quantize_(adapted, recipe)
    tahf4.apply_recipe(late, recipe)
    assert {d.reason for d in tahf4.plan_modules(late) if d.decision == "hif4"} == {"by hand"}
    with_adapter = masked_recipe(late)
    assert any(path.endswith(".base_layer") for path in with_adapter.linears(""))
    tahf4.quantize_(model, with_adapter)
    assert len(packed_linears(model)) == len(packed_linears(adapted)) == 10


def test_an_adapter_runs_beside_a_product_with_its_branch():
    model, inputs = frozen()
    recipe, early = branched(masked_recipe(model), model), added(model, 8)[0]
    packed, late = copy.deepcopy(early), copy.deepcopy(early)
    tahf4.quantize_(packed, recipe)
    assert {linear.rank for linear in packed_linears(packed).values()} >= {8}
    tahf4.apply_recipe(late, recipe)
    late.compile(backend="tahf4", options=GRAPH)
    with_adapter = output(packed(**inputs))
    assert relative(output(late(**inputs)), with_adapter) < 1e-5
    packed.disable_adapters()
    plain = copy.deepcopy(model)
    tahf4.quantize_(plain, recipe)
    assert torch.equal(output(packed(**inputs)), output(plain(**inputs)))
    assert relative(with_adapter, output(plain(**inputs))) > 1e-4


@pytest.mark.parametrize("fuse", ["fuse_lora", "merge_adapter"])
def test_a_weight_with_a_fused_adapter_is_not_packed_until_it_is_unfused_or_the_adapter_unloaded(fuse):
    model, inputs = frozen()
    adapted, _ = added(model, 4)
    if fuse == "fuse_lora":
        adapted.fuse_lora()
    else:
        wrappers = [m for m in adapted.modules() if hasattr(m, "merged_adapters")]
        for wrapper in wrappers[:1]:  # one of many
            wrapper.merge()
    want = output(adapted(**inputs))
    with pytest.raises(tahf4.PackedError, match=r"has adapters fused into it \(style\).*Unfuse them first"):
        tahf4.quantize_(adapted)
    assert not packed_linears(adapted) and torch.equal(output(adapted(**inputs)), want)
    fused = copy.deepcopy(adapted)
    adapted.unfuse_lora()
    tahf4.quantize_(adapted)
    assert relative(output(adapted(**inputs)), want) < 0.3
    if fuse == "fuse_lora":
        fused.unload_lora()
        tahf4.quantize_(fused)
        assert relative(output(fused(**inputs)), want) < 0.3


@pytest.mark.slow  # by blocks: test_fused_adapters.py
def test_a_compiled_model_follows_its_adapters_when_they_are_fused_and_unfused():
    model, inputs = frozen()
    adapted, _ = added(model, 4)
    want = output(adapted(**inputs))
    for each in (model, adapted):
        each.compile(backend="tahf4", options=GRAPH)
    without, beside = output(model(**inputs)), output(adapted(**inputs))
    adapted.fuse_lora()
    fused = output(adapted(**inputs))
    for whole in (beside, fused):
        assert relative(whole, want) < 0.7 * relative(without, want)
    adapted.unfuse_lora()
    assert relative(output(adapted(**inputs)), beside) < 1e-3
    adapted.disable_lora()
    assert relative(output(adapted(**inputs)), without) < 1e-3 < 0.05 < relative(fused, without)


@pytest.mark.parametrize("kind", ["IA3Config", "LoHaConfig", "LoKrConfig", "VeraConfig"])
def test_other_adapters_of_peft_are_unloaded_from_a_packed_model(kind):
    model = Stack(depth=1).requires_grad_(False)
    tahf4.quantize_(model)
    x = torch.randn(4, 64)
    without = model(x)
    extra = {"feedforward_modules": ["down"]} if kind == "IA3Config" else {"r": 4}
    adapted = peft.get_peft_model(model, getattr(peft, kind)(target_modules=["up", "down"], **extra)).eval()
    adapted.requires_grad_(False)
    for name, parameter in adapted.named_parameters():
        if "default" in name and parameter.is_floating_point():  # the name of the adapter
            parameter += 0.1
    assert relative(adapted(x), without) > 0.01
    plain = adapted.unload()
    assert isinstance(plain.blocks[0].up, tahf4.HiF4Linear)
    assert torch.equal(plain(x), without)
    with pytest.raises(tahf4.PackedError, match="takes no weight"):
        plain.blocks[0].up.weight = torch.randn(128, 64)


def flux_pipe():
    """Return a pipeline of Flux whose denoiser is packed, with its inputs."""
    model, inputs = flux()
    model.requires_grad_(False)
    tahf4.quantize_(model)
    return FluxPipeline(FlowMatchEulerDiscreteScheduler(), None, None, None, None, None, model), inputs


def factors(name, k, n, rank=4):
    """Return the state of a LoRA of one linear, in which every product matters."""
    named = (f"transformer.{name}.lora_A.weight", f"transformer.{name}.lora_B.weight")
    return dict(zip(named, (torch.randn(rank, k), torch.randn(n, rank)), strict=True))


def test_a_lora_of_flux_runs_beside_packed_products():
    """diffusers compares its shapes with those of all weights first."""
    pipe, inputs = flux_pipe()
    name = "transformer_blocks.0.attn.to_q"
    linear = pipe.transformer.get_submodule(name)
    assert isinstance(linear, tahf4.HiF4Linear)
    assert not any(key.endswith("to_q.weight") for key in pipe.transformer.state_dict())
    states = [factors(name, 128, 128) for _ in range(2)]
    narrow = f"transformer.{name}.lora_A.weight"
    states[1][narrow] = states[1][narrow][:, :96]  # diffusers fills up with zeros
    x, before = torch.randn(3, 128), output(pipe.transformer(**inputs))
    want = linear(x)
    for i, state in enumerate(states):
        pipe.load_lora_weights(dict(state), adapter_name=f"style{i}")
        a, b = state.values()
        want = want + x[:, : a.shape[1]] @ a.t() @ b.t()
    pipe.set_adapters(["style0", "style1"])
    torch.testing.assert_close(pipe.transformer.get_submodule(name)(x), want)
    assert relative(output(pipe.transformer(**inputs)), before) > 0.01
    pipe.unload_lora_weights()
    assert torch.equal(output(pipe.transformer(**inputs)), before)


def test_a_control_lora_widens_what_is_not_packed_alone():
    pipe, _ = flux_pipe()
    x, state = torch.randn(3, 32), factors("x_embedder", 32, 128)
    a, b = state.values()
    want = pipe.transformer.x_embedder(x[:, :16]) + x @ a.t() @ b.t()
    pipe.load_lora_weights(dict(state))
    torch.testing.assert_close(pipe.transformer.x_embedder(x), want)
    with pytest.raises(tahf4.PackedError, match="this linear is packed"):
        pipe.load_lora_weights(factors("transformer_blocks.0.attn.to_q", 192, 128))
