"""A recipe without data: masks from the weights alone."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from helpers import compiled, relative
from models import masked_recipe, wan
from torch import nn

import tahf4_compiler as tahf4
from tahf4_compiler.errors import OptionError, RecipeError

WIDTH = 128


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


class Block(nn.Module):
    """q, k and v of one activation, of which v may be told by its weights; a feed-forward."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x):
        x = x + self.v(self.norm(x)) * torch.sigmoid(self.q(self.norm(x)) + self.k(self.norm(x)))
        return x + self.out(x)


class Net(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return x


def net() -> Net:
    """A network whose norms write large values into some channels, which the next weights take back."""
    torch.manual_seed(0)
    model = Net().eval()
    for block in model.blocks:
        for linear in (block.q, block.k, block.v, block.out):
            linear.weight.mul_(4)
        large = torch.randperm(WIDTH)[:6]
        block.norm.weight[large] *= 60
        for linear in (block.q, block.k, block.v):
            linear.weight[:, large] /= 60
    return model


def inputs() -> torch.Tensor:
    return torch.randn(32, WIDTH, generator=torch.Generator().manual_seed(1))


def test_a_mask_is_the_norm_of_the_columns_to_a_power():
    model = net()
    recipe = tahf4.recipe_from_weights(model, weight_exponent=0.25)
    entries = recipe.experts[""]
    assert list(entries) == ["blocks.0.q", "blocks.0.out", "blocks.1.q", "blocks.1.out"], "the boundary has none"
    entry, block = entries["blocks.0.q"], model.blocks[0]
    assert list(entry.linears) == ["blocks.0.q", "blocks.0.k", "blocks.0.v"]
    norms = torch.cat([block.q.weight, block.k.weight, block.v.weight]).norm(dim=0)
    want = norms**0.25
    assert torch.allclose(entry.mask, want / want.log().mean().exp())
    assert (entry.hadamard_block, entry.search, entry.rounding) == (64, "squared", "least_error")


def test_linears_whose_columns_differ_have_a_mask_each():
    model = net()
    columns = model.blocks[0].v.weight
    columns.mul_(torch.logspace(-0.5, 0.5, WIDTH))  # as of another activation
    model.blocks[1].v.weight.mul_(10)  # as a whole: a mask has no scale
    entries = tahf4.recipe_from_weights(model).experts[""]
    assert list(entries["blocks.0.q"].linears) == ["blocks.0.q", "blocks.0.k"]
    assert list(entries["blocks.0.v"].linears) == ["blocks.0.v"]
    assert list(entries["blocks.1.q"].linears) == ["blocks.1.q", "blocks.1.k", "blocks.1.v"]


def test_outliers_that_weights_take_back_cost_little(tmp_path):
    model, x = net(), inputs()
    want = model(x)
    recipe = tahf4.recipe_from_weights(model)
    recipe.save(tmp_path / "recipe.safetensors")
    errors = {}
    for name, said in (("none", None), ("weights", tahf4.Recipe.load(tmp_path / "recipe.safetensors"))):
        packed = copy.deepcopy(model)
        tahf4.quantize_(packed, said)
        errors[name] = relative(packed(x), want)
    assert errors["weights"] < 0.4 * errors["none"], errors
    tahf4.apply_recipe(model, recipe)
    assert relative(compiled(model, whole=True)(x), packed(x)) < 1e-6, "compiled or packed, it is the same"


def test_a_pipeline_has_a_part_for_each_of_its_experts():
    first, second = wan(num_layers=2)[0], wan(num_layers=2)[0]
    pipe = SimpleNamespace(transformer=first, transformer_2=second)
    recipe = tahf4.recipe_from_weights(pipe)
    assert list(recipe.experts) == ["transformer", "transformer_2"]
    assert recipe.linears("transformer").keys() == masked_recipe(first).linears("").keys()
    tahf4.apply_recipe(pipe, recipe)


def test_in_proj_weights_and_tied_weights_have_one_entry():
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 256, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    model.layers[1].linear1.weight = model.layers[0].linear1.weight
    linears = tahf4.recipe_from_weights(model).linears("")
    assert linears["layers.0.self_attn.in_proj_weight"].shape == (3 * WIDTH, WIDTH)
    assert {"layers.0.self_attn.out_proj", "layers.0.linear1", "layers.1.linear2"} < set(linears)
    assert "layers.1.linear1" not in linears


def test_adapters_have_no_masks():
    from peft import LoraConfig, inject_adapter_in_model

    model = inject_adapter_in_model(LoraConfig(r=64, target_modules=["q"]), net())
    linears = tahf4.recipe_from_weights(model).linears("")
    assert "blocks.0.q.base_layer" in linears
    assert not [path for path in linears if "lora" in path]


def test_what_no_weight_reads_may_be_large():
    model, x = net(), inputs()
    for block in model.blocks:
        block.norm.weight[7] = 500
        for linear in (block.q, block.k, block.v):
            linear.weight[:, 7] = 0
    packed = copy.deepcopy(model)
    tahf4.quantize_(packed, tahf4.recipe_from_weights(model))
    assert relative(packed(x), model(x)) < 0.4


def test_weights_of_other_types_are_left_out():
    model = net()
    model.blocks[0].q.weight.data = model.blocks[0].q.weight.data.to(torch.float8_e4m3fn)
    assert "blocks.0.q" not in tahf4.recipe_from_weights(model).linears("")


def offloaded(model):
    from accelerate import cpu_offload

    cpu_offload(model)


def test_a_recipe_comes_before_weights_go_to_disk(tmp_path):
    from diffusers.hooks import apply_group_offloading

    model = net()
    recipe = tahf4.recipe_from_weights(model)
    here = torch.device("cpu")
    away = {"onload_device": here, "offload_device": here, "offload_to_disk_path": str(tmp_path)}
    apply_group_offloading(model, **away, offload_type="block_level", num_blocks_per_group=1)
    model.blocks[0].q.weight.data.zero_()  # what an empty tensor may hold
    with pytest.raises(RecipeError, match="blocks.0.q is offloaded by .*. Make and apply"):
        tahf4.recipe_from_weights(model)
    with pytest.raises(RecipeError, match="blocks.0.q: other weights .*it is offloaded: apply the recipe before"):
        tahf4.apply_recipe(model, recipe)


def enlarged(model):
    model.blocks[0].out.weight[:, 3] = 1e20


@pytest.mark.parametrize(
    ("change", "choices", "error", "words"),
    [
        (None, {"weight_exponent": 1.5}, OptionError, "from 0 to 1"),
        (None, {"weight_exponent": "0.5"}, OptionError, "from 0 to 1"),
        (None, {"weight_exponent": True}, OptionError, "from 0 to 1"),
        (None, {"block": 48}, OptionError, "power of two"),
        (offloaded, {}, RecipeError, "is offloaded by"),
        (enlarged, {}, RecipeError, "blocks.0.out are too large"),
        (lambda model: model.to("meta"), {}, RecipeError, "meta device"),
        (lambda model: model.blocks[1].k.weight[3].fill_(float("nan")), {}, RecipeError, "blocks.1.k holds NaN"),
        (tahf4.quantize_, {}, RecipeError, "Packed linears are none"),
    ],
)
def test_refusals(change, choices, error, words):
    model = net()
    if change is not None:
        change(model)
    with pytest.raises(error, match=words):
        tahf4.recipe_from_weights(model, **choices)
