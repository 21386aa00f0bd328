"""``fuse_lora`` on a packed model puts an adapter into the branch of low rank, and ``unfuse_lora`` takes it out."""

from __future__ import annotations

import copy
import sys

import peft
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from diffusers.hooks import apply_group_offloading
from helpers import relative
from models import Stack, branched, masked_recipe, output, wan
from peft import LoraConfig, get_peft_model
from torch import nn

import tahf4_compiler as tahf4
from tahf4_compiler.packed.convert import packed_linears

GRAPH = {"inductor": False}
PLAIN = "condition_embedder.text_embedder.linear_1"  # stays as it is
TARGETS = ["to_q", "to_v", "ffn.net.2", PLAIN]


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def packed_wan():
    model, inputs = wan(num_layers=1)
    tahf4.quantize_(model.requires_grad_(False))
    return model, inputs


def lora(rank=5, targets=TARGETS, **values):
    values = {"lora_alpha": 2 * rank, "target_modules": targets, "init_lora_weights": False, **values}
    return LoraConfig(r=rank, **values)


def adapted(model, name="style", **values):
    """Return a copy of a model with an adapter."""
    model = copy.deepcopy(model)
    model.add_adapter(lora(**values), name)
    return model.requires_grad_(False)


def stack(*adapters, depth=1, **values):
    """Return a packed model under peft, and an input."""
    model = Stack(depth).requires_grad_(False)
    tahf4.quantize_(model)
    model = get_peft_model(model, lora(targets=["up", "down"], **values)).eval()
    for name in adapters:
        model.add_adapter(name, lora(targets=["up", "down"], **values))
    return model.requires_grad_(False), torch.randn(4, 64)


def held(model):
    """Return copies of what packed linears hold."""
    linears = packed_linears(model).items()
    return {f"{path}.{n}": p.clone() for path, linear in linears for n, p in linear.named_parameters()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("early", [True, False], ids=["adapter, then packed", "packed, then adapter"])
@pytest.mark.parametrize("with_branch", [True, False])
def test_a_fused_adapter_computes_what_it_computed_beside_the_product(early, with_branch):
    model, inputs = wan(num_layers=1)
    model.requires_grad_(False)
    recipe = branched(masked_recipe(model), model) if with_branch else None
    if not early:
        tahf4.quantize_(model, recipe)
    model = adapted(model, lora_bias=True)
    if early:
        tahf4.quantize_(model, recipe)
    before, plain = held(model), model.get_submodule(PLAIN).base_layer.weight.clone()
    model.set_adapters("style", 0.8)
    beside = output(model(**inputs))
    model.set_adapters("style", 1.0)
    model.fuse_lora(lora_scale=0.8)
    ranks = {path.rpartition(".base_layer")[0]: linear.rank for path, linear in packed_linears(model).items()}
    own = 8 if with_branch else 0
    assert ranks["blocks.0.attn1.to_q"] == own + 5 and set(ranks.values()) == {own, own + 5}
    assert not torch.equal(model.get_submodule(PLAIN).base_layer.weight, plain), "fused as ever"
    fused, after = output(model(**inputs)), held(model)
    assert relative(fused, beside) < 1e-5
    model.unfuse_lora()
    assert same(held(model), before)
    model.fuse_lora()
    assert same(held(model), after), "nothing drifts"
    model.unload_lora()
    assert isinstance(model.blocks[0].attn1.to_q, tahf4.HiF4Linear)
    assert torch.isfinite(fused).all() and relative(output(model(**inputs)), fused) < 1e-5


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_a_fused_linear_is_the_product_and_the_adapter_in_float64(bits):
    model, x = stack("other", rank=4, use_rslora=True, lora_bias=True, alpha_pattern={"up": 5}, rank_pattern={"up": 9})
    tahf4.set_activation_bits(model, bits)
    wrapper = model.base_model.model.blocks[0].up
    linear = wrapper.base_layer
    want = linear(x).double()
    wrapper.set_adapter(["default", "other"])
    wrapper.set_scale("other", 0.3)
    for name, scale in (("default", 5 / 3), ("other", 0.3 * 5 / 3)):  # alpha / sqrt(rank)
        down, up = wrapper.lora_A[name].weight.double(), wrapper.lora_B[name]
        want += (x.double() @ down.t() @ up.weight.double().t() + up.bias.double()) * scale
    weight = linear.dequantized().double()
    wrapper.merge()
    assert linear.rank == 18
    torch.testing.assert_close(wrapper(x).double(), want, rtol=1e-5, atol=1e-5)
    delta = sum(wrapper.get_delta_weight(name).double() for name in ("default", "other"))
    torch.testing.assert_close(linear.to_linear().weight.double(), weight + delta, rtol=1e-5, atol=1e-5)


def test_adapters_are_fused_one_after_the_other_and_one_that_was_deleted_or_unloaded_stays():
    model, _ = stack("a", "b", lora_bias=True)
    wrapper = model.base_model.model.blocks[0].up
    linear, plain = wrapper.base_layer, held(model)
    wrapper.merge(adapter_names=["a"])
    first, bias = held(model), linear.bias.clone()
    wrapper.merge(adapter_names=["a", "b"])  # "a" is there already
    assert linear.rank == 10 and wrapper.merged_adapters == ["a", "b"]
    wrapper.delete_adapter("a")
    wrapper.unmerge()
    torch.testing.assert_close(linear.bias, bias)
    linear.bias.copy_(bias)
    assert same(held(model), first)
    model.set_adapter("b")
    model.merge_and_unload()
    assert linear.rank == 10 and not hasattr(linear, "lora_A")
    again = get_peft_model(model.base_model.model, lora(targets=["up"], lora_bias=True), adapter_name="b").eval()
    before = held(again)
    again.merge_adapter()
    assert linear.rank == 15
    again.unmerge_adapter()
    assert same(held(again), before) and not same(before, plain)
    with pytest.warns(UserWarning, match="Already unmerged"):
        again.unmerge_adapter()


def test_halves_round_an_adapter_once_and_keep_the_bytes_of_a_branch():
    model, _ = wan(num_layers=1)
    model.requires_grad_(False).to(torch.bfloat16)
    tahf4.quantize_(model, branched(masked_recipe(model), model))
    model = adapted(model)
    linear, wrapper = model.blocks[0].attn1.to_q.base_layer, model.blocks[0].attn1.to_q.float()
    linear.to(torch.bfloat16)
    before = held(model)
    model.fuse_lora(lora_scale=0.3)
    a = (wrapper.lora_A["style"].weight * (2 * 0.3)).t().to(torch.bfloat16)
    assert linear.low_rank_a.dtype == torch.bfloat16 and torch.equal(linear.low_rank_a[:, 8:], a)
    assert torch.equal(linear.low_rank_b[8:], wrapper.lora_B["style"].weight.t().to(torch.bfloat16))
    model.unfuse_lora()
    assert same(held(model), before)


@pytest.mark.parametrize(
    ("blocks", "rank"), [(True, 5), pytest.param(False, 64, marks=pytest.mark.slow)], ids=["by blocks", "whole"]
)
def test_a_compiled_model_follows_its_adapters(blocks, rank):
    model, x = stack(depth=2, rank=rank, lora_bias=True)
    eager, inner = copy.deepcopy(model), model.base_model.model
    model.disable_adapter_layers()
    for part in inner.blocks if blocks else [model]:
        part.compile(backend="tahf4", fullgraph=True, options=GRAPH)
    without, fused = model(x), []
    changes = ("enable_adapter_layers", "merge_adapter", "unmerge_adapter", "merge_adapter", "disable_adapter_layers")
    for change in changes:
        for each in (model, eager):
            getattr(each, change)()
        model.requires_grad_(False)
        want = eager(x)
        assert relative(model(x), want) < 1e-5, change
        assert (relative(want, without) < 1e-3) == (change == "disable_adapter_layers")
        fused += [model(x)] if change == "merge_adapter" else []
    assert torch.equal(fused[0], fused[1])


def test_a_saved_model_has_the_adapter_in_its_branch(packed_wan, tmp_path):
    model, inputs = adapted(packed_wan[0], targets=TARGETS[:3]), packed_wan[1]
    model.fuse_lora()
    with pytest.raises(tahf4.PackedError, match="unload_lora"):
        model.save_pretrained(tmp_path)
    model.unload_lora()
    model.save_pretrained(tmp_path)
    loaded = WanTransformer3DModel.from_pretrained(tmp_path)
    assert same(held(loaded), held(model)) and loaded.blocks[0].attn1.to_q.rank == 5
    assert torch.equal(output(loaded(**inputs)), output(model(**inputs)))


def refused(model, before, match, error=tahf4.PackedError, call="merge_adapter", **arguments):
    with pytest.raises(error, match=match):
        getattr(model, call)(**arguments)
    assert same(held(model), before) and not any(getattr(module, "merged_adapters", ()) for module in model.modules())


@pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload"])
def test_a_model_is_fused_whole_or_not_at_all(call):
    model, _ = stack(rank_pattern={"down": 65})  # the last linear
    before = held(model)
    refused(model, before, r"blocks\.0\.down.*its rank is 65, more than the smaller side", call=call)
    model, _ = stack(rank=64)
    before = held(model)
    nan = model.base_model.model.blocks[0].down.lora_B["default"].weight[0]
    nan[0] = torch.nan
    refused(model, before, "NaNs detected.*adapter default", ValueError, call=call, safe_merge=True)
    model.merge_adapter()
    assert packed_linears(model)["base_model.model.blocks.0.up.base_layer"].rank == 64


@pytest.mark.parametrize("kind", ["LoHaConfig", "VeraConfig", "IA3Config"])
def test_adapters_that_are_no_lora_are_refused(kind):
    model = Stack(depth=2).requires_grad_(False)
    tahf4.quantize_(model)
    extra = {"feedforward_modules": []} if kind == "IA3Config" else {"r": 4}
    settings = getattr(peft, kind)(target_modules=["first", "down"], **extra)
    model = peft.get_peft_model(model, settings).eval().requires_grad_(False)
    first = model.base_model.model.first.base_layer.weight.clone()
    refused(model, held(model), rf"tuners\.{kind[:-6].lower()}.*takes a plain LoRA alone")
    assert torch.equal(model.base_model.model.first.base_layer.weight, first)
    with pytest.raises(tahf4.PackedError, match="only a plain LoRA"):
        model.base_model.model.blocks[0].down.merge()


def test_adapters_of_several_kinds_are_refused_together():
    model = Stack(depth=1).requires_grad_(False)
    tahf4.quantize_(model)
    model = peft.get_peft_model(model, lora(targets=["up"]), "a", mixed=True)
    model.add_adapter("b", peft.LoHaConfig(target_modules=["down"], r=4))
    model.set_adapter(["a", "b"])
    refused(model, held(model), "down.*takes a plain LoRA alone", call="merge_and_unload")


def test_variants_and_biases_that_have_no_place_are_refused():
    model, _ = stack(alora_invocation_tokens=[1])
    refused(model, held(model), "ALoraLinearVariant")
    plain = Stack(depth=1).requires_grad_(False)
    plain.blocks[0].up.bias = None
    tahf4.quantize_(plain)
    model = get_peft_model(plain, lora(targets=["up"], lora_bias=True)).eval()
    refused(model, held(model), "lora_bias")
    wrapper = model.base_model.model.blocks[0].up
    with pytest.raises(tahf4.PackedError, match="a linear, which is packed: it has a bias"):
        wrapper.merge()
    model, _ = stack()
    model.base_model.model.blocks[0].up.base_layer.out_features //= 2  # as of a rank of tensor parallelism
    refused(model, held(model), "offloaded or divided")
    model, _ = stack()
    model.base_model.model.blocks[0].to("meta")
    with pytest.raises(tahf4.PackedError, match="offloaded or divided"):
        model.merge_adapter()


def test_a_pipeline_is_fused_whole_or_not_at_all(packed_wan):
    first, second = (adapted(packed_wan[0], rank_pattern={"ffn.net.2": rank}) for rank in (5, 200))
    pipe = WanPipeline(None, None, None, FlowMatchEulerDiscreteScheduler(), first, transformer_2=second)
    before, scaling = held(first), dict(first.blocks[0].attn1.to_q.scaling)
    with pytest.raises(tahf4.PackedError, match="its rank is 200"):
        pipe.fuse_lora(components=["transformer", "transformer_2"], lora_scale=0.5)
    assert same(held(first), before) and first.blocks[0].attn1.to_q.scaling == scaling
    pipe.fuse_lora(lora_scale=0.5)  # the first alone
    assert pipe.num_fused_loras == 1 and first.blocks[0].attn1.to_q.base_layer.rank == 5
    pipe.unfuse_lora()
    assert same(held(first), before)


def test_an_adapter_is_fused_before_the_model_is_offloaded(packed_wan):
    model, inputs = adapted(packed_wan[0]), packed_wan[1]
    offload = {"onload_device": torch.device("cpu"), "offload_device": torch.device("cpu")}
    late = copy.deepcopy(model)
    late.enable_group_offload(**offload, offload_type="leaf_level")
    with pytest.raises(tahf4.PackedError, match="Fuse the adapter first"):
        late.fuse_lora()
    leaves, _ = stack()  # the linears are hooked, and nothing around them
    apply_group_offloading(leaves, **offload, offload_type="leaf_level")
    with pytest.raises(tahf4.PackedError, match=r"offloaded by .*\.base_layer"):
        leaves.merge_adapter()
    model.fuse_lora()
    want = output(model(**inputs))
    model.enable_group_offload(**offload, offload_type="leaf_level")
    assert torch.equal(output(model(**inputs)), want)
    before, pipe = held(model), WanPipeline(None, None, None, FlowMatchEulerDiscreteScheduler(), model)
    for unfuse in (model.unfuse_lora, pipe.unfuse_lora):
        with pytest.raises(tahf4.PackedError, match="Take the offloading off, unfuse"):
            unfuse()
    assert same(held(model), before) and torch.equal(output(model(**inputs)), want)


def test_what_is_fused_stays_in_a_linear_that_is_not_in_memory_or_a_part():
    model, _ = stack(lora_bias=True)
    model.merge_adapter()
    linear = model.base_model.model.blocks[0].up.base_layer
    bias = linear.bias
    linear.bias = nn.Parameter(bias[:64].clone(), requires_grad=False)  # as of a rank of tensor parallelism
    before = held(model)
    with pytest.raises(tahf4.PackedError, match="up is offloaded or divided among ranks"):
        model.unmerge_adapter()
    with pytest.raises(tahf4.PackedError, match="a linear is offloaded or divided among ranks"):
        model.base_model.model.blocks[0].up.unmerge()
    assert same(held(model), before)
    linear.bias = bias
    model.unmerge_adapter()
    assert linear.rank == 0


def test_broken_adapters_of_plain_linears_are_refused_before_a_packed_one_is_fused(packed_wan):
    model = adapted(packed_wan[0])
    before = held(model)
    model.get_submodule(PLAIN).lora_A["style"].weight[0, 0] = torch.inf
    with pytest.raises(ValueError, match=f"NaNs detected.*adapter style.*{PLAIN}"):
        model.fuse_lora(safe_fusing=True)
    assert same(held(model), before)
    with pytest.raises(ValueError, match="components"):
        WanPipeline(None, None, None, FlowMatchEulerDiscreteScheduler(), model).fuse_lora(components=None)


def test_without_peft_the_error_is_that_of_diffusers(packed_wan, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "peft"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr("diffusers.loaders.peft.USE_PEFT_BACKEND", False)
    with pytest.raises(ValueError, match="PEFT backend is required"):
        packed_wan[0].fuse_lora()


def test_a_linear_that_only_stores_its_values_in_fewer_bits_takes_no_adapter():
    model = nn.Sequential(Stack(depth=1).requires_grad_(False))
    tahf4.quantize_(model)
    model = get_peft_model(model, lora(targets=["up"])).eval()
    model.base_model.model[0].blocks[0].up.base_layer.to(torch.float8_e4m3fn)
    refused(model, held(model), "float8")
