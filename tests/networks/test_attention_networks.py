"""Attention in 8 bits in whole models: compiled, lowered, packed, by blocks."""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.models.attention_dispatch import attention_backend
from helpers import relative
from models import output, pixart, sd3, wan
from tahf4_compiler.backends import cpu
from torch import nn

import tahf4_compiler as tahf4
from tahf4_compiler.ops import attention as operator

needs_cpp = pytest.mark.skipif(not cpu.available(), reason="needs a C++ compiler")
ASKED = {"attention": "int8", "attention.min_tokens": 8}
INT8 = torch.ops.tahf4.attention.default


class Calls:
    """How often the operators of attention ran."""

    def __init__(self, monkeypatch):
        self.count = 0
        check = operator.check_attention

        def counted(*args):
            self.count += not isinstance(args[0], torch._subclasses.FakeTensor)
            check(*args)

        monkeypatch.setenv("TAHF4_NO_CPP", "1")
        monkeypatch.setattr(operator, "check_attention", counted)

    def during(self, run):
        before = self.count
        with torch.no_grad():
            result = output(run())
        return result, self.count - before


@pytest.fixture
def calls(monkeypatch):
    return Calls(monkeypatch)


def lowered(made, **options):
    model, args = made
    return tahf4.lower(tahf4.capture(model, (), args), options={**ASKED, **options})


def attentions(low):
    return [n for n in low.graph_module.graph.nodes if "attention" in str(n.target)]


@needs_cpp
@pytest.mark.parametrize("make", [wan, *(pytest.param(other, marks=pytest.mark.slow) for other in (sd3, pixart))])
def test_real_networks_run_their_attention_in_8_bits(make):
    torch.manual_seed(0)
    made = make(num_layers=1) if make is wan else make()
    ours = lowered(made, **{"attention.min_tokens": 1})
    plain = tahf4.lower(tahf4.capture(made[0], (), made[1]))
    assert len(attentions(ours)) == len(attentions(plain)) > 0
    assert all(n.target is torch.ops.tahf4_cpu.attention.default for n in attentions(ours))
    got, wanted = (output(low(**made[1])) for low in (ours, plain))
    assert 0 < relative(got, wanted) < 0.05


@needs_cpp
def test_the_report_has_a_line_for_each_attention():
    low = lowered(wan(num_layers=1), **{"attention.min_tokens": 16})
    assert low.notes["attention"] == [
        f"blocks.{i}.attn{j} ({said}"
        for i in (0,)
        for j, said in (
            (1, "32 x 32 tokens, 2 heads of 64): int8"),
            (2, "32 x 12 tokens, 2 heads of 64): high precision, short: 12 tokens, less than 16"),
        )
    ]
    assert "attention: blocks.0.attn1 (32 x 32 tokens, 2 heads of 64): int8" in low.report()
    assert "lower: 1 x tahf4.attention -> cpu" in low.report()
    low = lowered(wan(num_layers=1), **{"attention.min_tokens": 16, "attention.value_bits": 16})
    assert low.notes["attention"][0].endswith("kernel: there is none for cpu here with values in 16 bits")


def test_compiled_whole_by_blocks_and_packed_it_is_the_same(calls):
    torch.manual_seed(0)
    model, args = wan(num_layers=1)
    options = {**ASKED, "kernels": "reference", "inductor": False}

    def run():
        return model(**args)

    compiled = torch.compile(model, backend="tahf4", options=options)
    wanted, count = calls.during(lambda: compiled(**args))
    assert count == 2
    torch._dynamo.reset()
    tahf4.quantize_(model)
    assert calls.during(run)[1] == 0
    compiled = torch.compile(model, backend="tahf4", options=options)
    packed, count = calls.during(lambda: compiled(**args))
    assert count == 2 and relative(packed, wanted) < 1e-5
    torch._dynamo.reset()
    model.compile_repeated_blocks(backend="tahf4", options=options)
    blocks, count = calls.during(run)
    assert count == 2 and relative(blocks, wanted) < 1e-5


@pytest.mark.slow
@needs_cpp
def test_inductor_compiles_the_rest():
    torch.manual_seed(0)
    model, args = wan(num_layers=1)
    with torch.no_grad():
        wanted = output(lowered((model, args))(**args))
        got = output(torch.compile(model, backend="tahf4", options=ASKED)(**args))
    assert relative(got, wanted) < 1e-2


def test_what_is_kept_keeps_its_attention(calls):
    model, args = wan()
    options = {**ASKED, "kernels": "reference", "inductor": False}
    low = tahf4.lower(tahf4.capture(model, (), args), options={**options, "keep": [r"blocks\.0\.attn1"]})
    assert "its linears stay: kept" in low.notes["attention"][0]
    assert [n.target is INT8 for n in attentions(low)] == [False, True, True, True]
    tahf4.keep(model, ["attn2"])
    compiled = torch.compile(model, backend="tahf4", options=options)
    assert calls.during(lambda: compiled(**args))[1] == 2
    model.compile_repeated_blocks(backend="tahf4", options=options)
    assert calls.during(lambda: model(**args))[1] == 2


def test_a_backend_that_a_user_set_through_diffusers_stays(calls):
    model, args = wan(num_layers=1)
    options = {**ASKED, "kernels": "reference", "inductor": False}
    model.compile_repeated_blocks(backend="tahf4", options=options)
    assert calls.during(lambda: model(**args))[1] == 2
    model.set_attention_backend("native")
    assert calls.during(lambda: model(**args))[1] == 0
    low = tahf4.lower(tahf4.capture(model, (), args), options=options)
    assert all("kept: set_attention_backend('native')" in note for note in low.notes["attention"])
    model.reset_attention_backend()
    assert calls.during(lambda: model(**args))[1] == 2
    with attention_backend("_native_math"):
        if torch.__version__ >= "2.12":  # Dynamo of 2.11 does not see that the active backend changed
            assert calls.during(lambda: model(**args))[1] == 0
        low = tahf4.lower(tahf4.capture(model, (), args), options=options)
    assert all("kept: attention_backend('_native_math')" in note for note in low.notes["attention"])
    assert calls.during(lambda: model(**args))[1] == 2


def test_one_attention_that_a_user_set_stays_and_the_others_run_in_8_bits(calls):
    model, args = wan(num_layers=2)
    options = {**ASKED, "kernels": "reference", "inductor": False}
    model.blocks[0].attn1.set_attention_backend("native")
    low = tahf4.lower(tahf4.capture(model, (), args), options=options)
    assert ["kept: set_attention_backend" in note for note in low.notes["attention"]] == [True, False, False, False]
    model.compile_repeated_blocks(backend="tahf4", options=options)
    assert calls.during(lambda: model(**args))[1] == 3


def test_an_attention_whose_linears_are_in_another_graph_stays(calls, tmp_path):
    """Nothing tells whether the user keeps them, or what a recipe says."""
    model, args = wan(num_layers=1)
    tahf4.keep(model, ["attn1"])
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.forward = torch.compiler.disable(module.forward)
    options = {**ASKED, "kernels": "reference", "inductor": False, "dump_dir": str(tmp_path)}
    model.compile_repeated_blocks(backend="tahf4", options=options)
    assert calls.during(lambda: model(**args))[1] == 0
    reports = "".join(path.read_text() for path in tmp_path.rglob("report.txt"))
    assert "its linears are in another graph" in reports


def test_a_step_in_high_precision_has_its_attention_so(calls):
    class Pipe:
        scheduler = FlowMatchEulerDiscreteScheduler()
        transformer, args = wan(num_layers=1)

    pipe, args = Pipe(), Pipe.args
    with tahf4.calibrate(pipe, options={"inductor": False}) as calibration:
        calls.during(lambda: pipe.transformer(**args))
    choices = {"mask": "max", "scale_search": "", "sensitivity": False}
    tahf4.apply_recipe(pipe, calibration.recipe(**choices, high_precision_steps=(0,)))
    options = {**ASKED, "kernels": "reference", "inductor": False}
    compiled, found = torch.compile(pipe.transformer, backend="tahf4", options=options), []
    pipe.scheduler.set_timesteps(2)
    for t in pipe.scheduler.timesteps:
        found.append(calls.during(lambda: compiled(**args))[1])
        pipe.scheduler.step(torch.zeros(1), t, torch.zeros(1))
    assert found == [0, 2]


@pytest.mark.parametrize(
    "bits, of_all, wanted",
    [(None, 4, [0, 2]), (8, 4, [2, 2]), pytest.param(None, 16, [0, 2], marks=pytest.mark.slow)],
)
def test_a_step_of_a_packed_model_in_high_precision_has_its_attention_so(calls, bits, of_all, wanted):
    class Pipe:
        scheduler = FlowMatchEulerDiscreteScheduler()
        transformer, args = wan(num_layers=1)

    pipe, args = Pipe(), Pipe.args
    tahf4.quantize_(pipe)
    tahf4.set_activation_bits(pipe.transformer, of_all)
    tahf4.set_high_precision_steps(pipe, [0], bits=bits)
    options = {**ASKED, "kernels": "reference", "inductor": False}
    compiled, found = torch.compile(pipe.transformer, backend="tahf4", options=options), []
    pipe.scheduler.set_timesteps(2)
    for t in pipe.scheduler.timesteps:
        found.append(calls.during(lambda: compiled(**args))[1])
        pipe.scheduler.step(torch.zeros(1), t, torch.zeros(1))
    assert found == wanted


@needs_cpp
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_an_attention_that_autocast_casts_stays(given):
    class Attention(nn.Module):
        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return nn.functional.scaled_dot_product_attention(x, x, x)

    x = torch.randn(1, 2, 130, 64).to(given)
    low = tahf4.lower(tahf4.capture(Attention(), (x,)), options={"attention": "int8"})
    stays = given == torch.float32
    assert ("autocast makes torch.float32 torch.bfloat16" in low.notes["attention"][0]) == stays
    got = low(x)
    assert got.dtype == torch.bfloat16 and torch.equal(got, Attention()(x)) == stays


def test_an_encoder_layer_with_a_mask(calls):
    layer = nn.TransformerEncoderLayer(128, 2, 256, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x, padding = torch.randn(2, 20, 128), torch.zeros(2, 20, dtype=torch.bool)
    padding[0, 15:] = True
    options = {**ASKED, "kernels": "reference", "inductor": False}
    compiled = torch.compile(model, backend="tahf4", options=options)
    plain = torch.compile(model, backend="tahf4", options={"inductor": False, "kernels": "reference"})
    got, count = calls.during(lambda: compiled(x, src_key_padding_mask=padding))
    wanted, none = calls.during(lambda: plain(x, src_key_padding_mask=padding))
    assert (count, none) == (2, 0) and relative(got, wanted) < 0.05
