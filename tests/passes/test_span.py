"""Units of activations and weights share their level-1 scales, where a mask or a rotation has made them alike."""

from __future__ import annotations

import pytest
import torch
from graphs import Attachment, OptionError, assert_pass
from tahf4_compiler.passes.fuse import Fuse
from tahf4_compiler.passes.rotate import Rotate
from tahf4_compiler.passes.span import Span

import tahf4_compiler as tahf4
from tahf4_compiler.model.parts import Part, remember

ONE = """
    x: f32[4, {k}]
    w: hif4[64, {k}] {how}
    m: multiplier of w {m}
    c, s = tahf4.quantize(x, {args})
    y = tahf4.linear(c, s, w, None, f32{span})
    return y
"""


def one(how="rotated 64", args="m, 64", m="signs", k=256, span=""):
    return ONE.format(how=how, args=args, m=m, k=k, span=span)


@pytest.mark.parametrize(("option", "number"), [("row", 0), (2, 2), (4, 4)])
def test_the_option_gives_one_to_activation_weight_and_product(option, number):
    after = one(f"rotated 64, span {number}", f"m, 64, 4, {number}", span=f", {number}")
    ran = assert_pass(one(), Span(), after, scale_span=option)
    units = "row" if option == "row" else f"{option} units"
    assert ran.notes == [f"1 activations with a level-1 scale for each {units}"]


def test_there_is_none_by_default():
    assert_pass(one(), Span())
    assert_pass(one(), Span(), scale_span=1)


def test_a_recipe_comes_before_the_option_and_the_log_says_so(caplog):
    said = {"hadamard_block": 64, "seed": 0}
    after = one("rotated 64, span 2", "m, 64, 4, 2", span=", 2")
    recipe = {"w": Attachment("hif4", "", span=2, **said)}
    assert_pass(one(), Span(), after, recipe=recipe, scale_span="row")
    assert_pass(one(), Span(), recipe={"w": Attachment("hif4", "", **said)}, scale_span="row")
    assert caplog.text.count("1 activations have span and rounding of their recipe") == 2
    caplog.clear()
    assert_pass(one(), Span(), after, recipe=recipe, scale_span=2)
    assert not caplog.text


def test_a_mask_is_enough():
    recipe = {"w": Attachment("hif4", "", span=0, masked=True, mask=torch.ones(256))}
    after = one("masked, span 0", "m, 0, 4, 0", "masked", span=", 0")
    assert_pass(one("masked", "m, 0", "masked"), Span(), after, recipe=recipe)


def test_products_of_one_activation_have_one():
    text = """
        x: f32[4, 128]
        q+k: hif4[64+32, 128] rotated 64{how}
        v: hif4[64, 128] rotated 64{how}
        m: multiplier of q+k+v signs
        c, s = tahf4.quantize(x, m, 64{bits})
        y = tahf4.linear(c, s, q+k, None, f32{span})
        z = tahf4.linear(c, s, v, None, f32{span})
        return y, z
    """
    assert_pass(
        text.format(how="", bits="", span=""), Span(), text.format(how=", span 0", bits=", 4, 0", span=", 0"),
        scale_span="row",
    )  # fmt: skip


def reasons(model, x, **options):
    lowered = tahf4.lower(tahf4.capture(model, (x,)), options=options)
    return lowered, {d.module: (d.span, d.reason) for d in lowered.plan if d.decision == "hif4"}


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(128, 256), torch.nn.Linear(256, 128)

    def forward(self, x):
        return self.down(torch.nn.functional.gelu(self.up(x)))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval().requires_grad_(False)


def test_where_an_outlier_is_not_spread_it_is_refused_and_the_report_says_so(net):
    x = torch.randn(8, 128)
    lowered, found = reasons(net, x, scale_span="row", inductor=False, **{"rotate.block": 0})
    for span, reason in found.values():
        assert span == 1
        assert "scale_span 'row' is refused: it has no mask and no rotation" in reason
    assert "scale_span 'row' is refused" in lowered.report()
    plain, _ = reasons(net, x, inductor=False, **{"rotate.block": 0})
    assert torch.equal(lowered(x), plain(x))


def test_activations_of_8_bits_have_none(net):
    _, found = reasons(net, torch.randn(8, 128), scale_span=4, inductor=False, activation_bits={"up": 8})
    assert found["up"][0] == 1 and "scale_span 4 is refused: an activation in 8 bits" in found["up"][1]
    assert found["down"][0] == 4 and "refused" not in found["down"][1]


def test_what_ranks_divide_along_k_has_none(net):
    remember(net.down.weight, Part(1, 0, 2, None))
    _, found = reasons(net, torch.randn(8, 128), scale_span="row", inductor=False)
    assert found["up"][0] == 0
    assert found["down"][0] == 1 and "refused: a rank holds a part of the input features" in found["down"][1]


@pytest.mark.parametrize("span", [2, "row"])
def test_the_report_tells_it_and_every_way_to_run_gives_one_result(net, span):
    x = torch.randn(40, 128)
    lowered, _ = reasons(net, x, scale_span=span, inductor=False)
    reference, _ = reasons(net, x, scale_span=span, kernels="reference", inductor=False)
    assert f"hif4, span {span}" in lowered.report()
    torch.testing.assert_close(lowered(x), reference(x), rtol=1e-4, atol=1e-4)
    units, _ = reasons(net, x, inductor=False)
    assert not torch.equal(lowered(x), units(x))
    assert (lowered(x) - net(x)).norm() < 0.3 * net(x).norm()


def test_a_product_whose_result_has_a_span_does_not_write_codes():
    text = """
        x: f32[4, 128]
        w: hif4[256, 128] rotated 64
        m: multiplier of w signs
        u: hif4[64, 256] rotated 64
        n: multiplier of u signs
        c, s = tahf4.quantize(x, m, 64)
        y = tahf4.linear(c, s, w, None, f32)
        h = gelu(y)
        d, t = tahf4.quantize(h, n, 64)
        z = tahf4.linear(d, t, u, None, f32)
        return z
    """
    after = """
        x: f32[4, 128]
        w: hif4[256, 128] rotated 64, span 0
        m: multiplier of w signs
        u: hif4[64, 256] rotated 64, span 0
        n: multiplier of u signs
        c, s = tahf4.quantize(x, m, 64, 4, 0)
        getitem, = tahf4.fused_linear(c, s, w, None, f32, [256], [], "v0: float32 = gelu(y)", f32, 0)
        d, t = tahf4.quantize(getitem, n, 64, 4, 0)
        z = tahf4.linear(d, t, u, None, f32, 0)
        return z
    """
    assert_pass(text, Fuse(always=True), after, first=[Span()], scale_span="row")


@pytest.mark.parametrize("value", [0, 3, "rows", True, None, 1.0])
def test_another_span_is_refused(value):
    with pytest.raises(OptionError, match="option 'scale_span' is .*; expected 1, 2 or 4"):
        tahf4.Options.parse({"scale_span": value})
    with pytest.raises(OptionError, match="scale_span is .*; expected 1, 2 or 4"):
        tahf4.quantize_(Net(), scale_span=value)


def test_it_comes_after_what_spreads_outliers():
    assert "rotate" in Span.after and "smooth" in Span.after and Rotate().name == "rotate"
