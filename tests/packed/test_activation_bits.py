"""How many bits the activations of packed and compiled models have."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import WanTransformer3DModel
from models import wan
from torch import nn

import tahf4_compiler as tahf4


class Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self, dim: int = 128) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim) for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().requires_grad_(False)


@pytest.fixture
def x():
    return torch.randn(2, 24, 128, generator=torch.Generator().manual_seed(1))


def error(got, wanted):
    return float((got - wanted).norm() / wanted.norm())


def lowered(model, x, **options):
    return tahf4.lower(tahf4.capture(model, (x,)), options=options)


def test_the_option_of_a_compilation_is_what_runs(net, x):
    wanted = net(x)
    four, eight, some = (lowered(net, x, **o) for o in ({}, {"activation_bits": 8}, {"activation_bits": {"down$": 8}}))
    assert error(eight(x), wanted) < error(some(x), wanted) < error(four(x), wanted)
    assert [d.activation_bits for d in some.plan] == [4, 8, 4, 8]
    assert "hif4, int8 activation" in some.report() and "% with activations in 8 bits" in some.report()
    assert "int8" not in four.report()
    reference = lowered(net, x, activation_bits=8, kernels="reference")
    assert error(eight(x), reference(x)) < 1e-4
    quantizations = [n for n in reference.graph_module.graph.nodes if n.target is torch.ops.tahf4.quantize.default]
    assert [n.args[3] for n in quantizations] == [8] * 4


def test_the_weights_do_not_depend_on_it(net, x):
    packed = copy.deepcopy(net)
    tahf4.quantize_(packed)
    state = {k: v.clone() for k, v in packed.state_dict().items()}
    four = packed(x)
    assert set(tahf4.set_activation_bits(packed, 8).values()) == {8}
    eight = packed(x)
    assert error(eight, net(x)) < error(four, net(x))
    assert all(torch.equal(v, state[k]) for k, v in packed.state_dict().items())
    assert error(lowered(net, x, activation_bits=8)(x), eight) < 1e-4
    tahf4.set_activation_bits(packed, 4)
    assert torch.equal(packed(x), four)


def test_a_compiled_packed_model_follows_and_compiles_each_choice_once(net, x):
    tahf4.quantize_(net)
    four = net(x)
    tahf4.set_activation_bits(net, 8)
    eight = net(x)
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="tahf4", options={"inductor": False})
    assert error(compiled(x), eight) < 1e-4
    tahf4.set_activation_bits(net, 4)
    assert error(compiled(x), four) < 1e-4
    frames = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for bits, wanted in ((8, eight), (4, four), (8, eight)):
        tahf4.set_activation_bits(net, bits)
        assert error(compiled(x), wanted) < 1e-4
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == frames


def test_the_option_comes_before_what_a_packed_model_says(net, x):
    tahf4.quantize_(net)
    four = net(x)
    tahf4.set_activation_bits(net, 8)
    eight = net(x)
    assert [d.activation_bits for d in tahf4.plan_modules(net)] == [8] * 4
    assert error(lowered(net, x)(x), eight) < 1e-4
    assert error(lowered(net, x, activation_bits=4)(x), four) < 1e-4
    mixed = lowered(net, x, activation_bits={r"blocks\.0": 4})
    assert [d.activation_bits for d in mixed.plan] == [4, 4, 8, 8]


def test_products_of_one_activation_with_other_bits_stay_apart(x):
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(128, 128) for _ in range(3))

        def forward(self, x):
            return self.q(x), self.k(x), self.v(x)

    model = Attention().requires_grad_(False)
    got = lowered(model, x, activation_bits={"^q$": 8})
    only = [lowered(model, x, activation_bits=bits)(x) for bits in (8, 4)]
    q, k, v = got(x)
    assert torch.equal(q, only[0][0]) and torch.equal(k, only[1][1]) and torch.equal(v, only[1][2])


def test_a_folder_keeps_it(tmp_path):
    model = wan()[0].eval().requires_grad_(False)
    tahf4.quantize_(model)
    tahf4.set_activation_bits(model, {"ffn": 8})
    model.save_pretrained(tmp_path)
    loaded = WanTransformer3DModel.from_pretrained(tmp_path)
    found = {path: m.activation_bits for path, m in loaded.named_modules() if isinstance(m, tahf4.HiF4Linear)}
    assert {path for path, bits in found.items() if bits == 8} == {path for path in found if ".ffn." in path} != set()


def test_a_linear_that_an_earlier_version_pickled_has_4(net, x):
    tahf4.quantize_(net)
    wanted = net(x)
    for module in net.modules():
        module.__dict__.pop("activation_bits", None)
    assert torch.equal(net(x), wanted)


def test_copies_keep_it_and_plain_linears_have_none(net):
    tahf4.quantize_(net)
    tahf4.set_activation_bits(net, 8)
    assert copy.deepcopy(net).blocks[0].up.activation_bits == 8
    tahf4.dequantize_(net)
    assert not hasattr(net.blocks[0].up, "activation_bits")


def test_a_program_holds_what_the_model_had_when_it_was_exported(net, x, tmp_path):
    tahf4.quantize_(net)
    tahf4.set_activation_bits(net, 8)
    eight = net(x)
    torch.export.save(torch.export.export(net, (x,)), tmp_path / "net.pt2")
    tahf4.set_activation_bits(net, 4)
    assert error(torch.export.load(tmp_path / "net.pt2").module()(x), eight) < 1e-4


@pytest.mark.parametrize("bits", [3, 8.0, True, "8", {"up": 32}, {1: 8}, None])
def test_other_values_are_refused(net, x, bits):
    with pytest.raises(tahf4.OptionError, match="expected 4"):
        lowered(net, x, activation_bits=bits)
    tahf4.quantize_(net)
    with pytest.raises(tahf4.OptionError, match="expected 4"):
        tahf4.set_activation_bits(net, bits)


def test_what_is_named_must_be_there(net, x):
    with pytest.raises(tahf4.PackedError, match="holds no packed linear"):
        tahf4.set_activation_bits(net, 8)
    with pytest.raises(tahf4.PatternError, match="activation_bits pattern 'ffn' matches none"):
        lowered(net, x, activation_bits={"ffn": 8})
    with pytest.raises(tahf4.PatternError, match="regular expression"):
        lowered(net, x, activation_bits={"(": 8})
    tahf4.quantize_(net)
    with pytest.raises(tahf4.PatternError, match="matches none of the 4 linears"):
        tahf4.set_activation_bits(net, {"ffn": 8})
