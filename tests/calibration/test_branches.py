"""Low-rank branches: from a recipe to every way of running."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from helpers import plans, relative
from models import Stack, branched, masked_recipe
from tahf4_compiler.tools.cli import app
from typer.testing import CliRunner

import tahf4_compiler as tahf4
from tahf4_compiler.calibration.sensitivity import QuantizedWeight
from tahf4_compiler.errors import OptionError, RecipeError
from tahf4_compiler.files.tensors import load_tensors
from tahf4_compiler.format import hif4
from tahf4_compiler.format.low_rank import LowRank, leading, remainder
from tahf4_compiler.format.transforms import multipliers, transform
from tahf4_compiler.graph.inputs import PackedWeight
from tahf4_compiler.packed.convert import packed_linears
from tahf4_compiler.recipe.recipe import FORMAT, Recipe
from tahf4_compiler.weights.store import store

GRAPH = {"inductor": False}
CHOICES = {"mask": "percentile", "weight_exponent": 0.7, "sensitivity": False, "low_rank": 12.5}


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def rows(seed, count=96):
    return torch.randn(count, 64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Stack(3).eval().requires_grad_(False)


def calibrated(model):
    with tahf4.calibrate(model, options=GRAPH) as calibration:
        for seed in range(4):
            model(rows(seed))
    return calibration


def packed_with(model, recipe, **arguments):
    packed = copy.deepcopy(model)
    tahf4.quantize_(packed, recipe, **arguments)
    return packed


def defined(linear, x):
    """Return what a packed linear computes, in float64."""
    codes, scales = linear.weight_codes.detach(), linear.weight_scales.detach()
    weight = hif4.dequantize(hif4.Packed(codes, scales, linear.in_features), torch.float64)
    moved = transform(x, linear.multiplier, linear.hadamard_block)
    left = hif4.dequantize(hif4.quantize(moved, rounding=linear.rounding), torch.float64)
    branch = x.double() @ linear.low_rank_a.double() @ linear.low_rank_b.double()
    return left @ weight.t() + branch + linear.bias.double()


def test_a_packed_linear_computes_product_and_branch(model):
    packed = packed_with(model, calibrated(model).recipe(**CHOICES))
    linears = packed_linears(packed)
    assert len(linears) == 6 and {linear.rank for linear in linears.values()} == {8}
    for path, linear in linears.items():
        x = torch.randn(32, linear.in_features)
        assert relative(linear(x), defined(linear, x)) < 1e-6, path


def test_branches_bring_the_network_closer_to_itself(model):
    calibration, x = calibrated(model), rows(50, 256)
    want, errors = model(x), {}
    for percent in (None, 12.5, 50):
        packed = packed_with(model, calibration.recipe(**{**CHOICES, "low_rank": percent}))
        errors[percent] = relative(packed(x), want)
    assert errors[50] < 0.8 * errors[None] and errors[50] < errors[12.5] < errors[None]


@pytest.mark.parametrize("search", ["reconstruct", pytest.param("squared", marks=pytest.mark.slow)])
def test_every_way_of_running_has_the_branches_of_the_recipe(model, tmp_path, search):
    calibrated(model).recipe(**CHOICES, scale_search=search).save(tmp_path / "r.safetensors")
    recipe = Recipe.load(tmp_path / "r.safetensors")
    recipe.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "r.safetensors").read_bytes()
    branches = {path: branch for entry in recipe.experts[""].values() for path, branch in entry.low_rank.items()}
    packed, x = packed_with(model, recipe), rows(7)
    for path, linear in packed_linears(packed).items():
        assert torch.equal(linear.low_rank_a, branches[path].a.float())
        assert torch.equal(linear.low_rank_b, branches[path].b.float())
    compiled = copy.deepcopy(model)
    tahf4.apply_recipe(compiled, recipe)
    want = packed(x)
    assert relative(torch.compile(compiled, backend="tahf4", options=GRAPH)(x), want) < 1e-6
    assert relative(tahf4.lower(tahf4.capture(compiled, (x,)), options=GRAPH)(x), want) < 1e-6
    assert relative(torch.compile(packed, backend="tahf4", options=GRAPH)(x), want) < 1e-6


def test_inductor_runs_the_branches_too():
    torch.manual_seed(0)
    model = Stack(2).eval().requires_grad_(False)
    recipe, x = calibrated(model).recipe(**CHOICES), rows(7)
    compiled = copy.deepcopy(model)
    tahf4.apply_recipe(compiled, recipe)
    assert relative(torch.compile(compiled, backend="tahf4")(x), packed_with(model, recipe)(x)) < 1e-5


def test_linears_of_one_activation_have_branches_of_their_own(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(Shared() for _ in range(2))).eval().requires_grad_(False)
    recipe, x = calibrated(model).recipe(**CHOICES), rows(7)
    entry = next(entry for entry in recipe.experts[""].values() if len(entry.linears) == 3)
    (narrow,) = [path for path in entry.linears if path.endswith("v")]
    entry.low_rank.pop(narrow)  # as of one that it does not help
    entry.packed[narrow] = calibrated(model).recipe(**{**CHOICES, "low_rank": None}).experts[""][
        next(name for name, other in recipe.experts[""].items() if other is entry)
    ].packed[narrow]  # fmt: skip
    packed, compiled = packed_with(model, recipe), copy.deepcopy(model)
    assert {linear.rank for linear in packed_linears(packed).values()} == {0, 8}
    tahf4.apply_recipe(compiled, recipe)
    run = torch.compile(compiled, backend="tahf4", options={**GRAPH, "dump_dir": str(tmp_path)})
    assert relative(run(x), packed(x)) < 1e-6
    ranks = {row["module"]: row["rank"] for row in plans(tmp_path)[0]}
    assert ranks == {path: linear.rank for path, linear in packed_linears(packed).items()}
    # A branch that was added, or not subtracted, for the wrong linear would be far off.
    assert relative(packed(x), model(x)) < 0.2


class Shared(torch.nn.Module):
    """Three linears that read one activation."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (torch.nn.Linear(64, 64) for _ in range(3))

    def forward(self, x):
        return x + self.q(x) * torch.sigmoid(self.k(x)) + self.v(x)


def test_plan_and_report_count_the_bytes_of_branches(model, tmp_path):
    recipe = calibrated(model).recipe(**CHOICES)
    packed, compiled = packed_with(model, recipe), copy.deepcopy(model)
    tahf4.apply_recipe(compiled, recipe)
    expected = {"blocks.0.up": (128 * 36 + 8 * (64 + 128) * 4, 8), "blocks.0.down": (64 * 72 + 8 * 192 * 4, 8)}
    listed = {}
    for name, run in {"plain": compiled, "packed": packed}.items():
        torch.compile(run, backend="tahf4", options={**GRAPH, "dump_dir": str(tmp_path / name)})(rows(0))
        (listed[name],) = plans(tmp_path / name)
    listed["modules"] = [vars(decision) for decision in tahf4.quantize_(copy.deepcopy(model), recipe)]
    listed["packed modules"] = [vars(decision) for decision in tahf4.quantize_(packed)]
    for name, found in listed.items():
        table = {row["module"]: (row["bytes_after"], row["rank"]) for row in found}
        assert {path: table[path] for path in expected} == expected, name
        assert len(table) == 8 or name == "packed", name
    (report,) = (tmp_path / "plain").rglob("report.txt")
    assert "hif4, rank 8" in report.read_text()
    said = CliRunner().invoke(app, ["explain", str(report.parent), r"blocks\.0\.up"]).output
    assert "HiF4 W4A4, 32,768 -> 10,752 bytes" in said and "branch      rank 8" in said


def test_a_linear_that_a_branch_does_not_help_has_none_and_says_so(model, monkeypatch, tmp_path):
    from tahf4_compiler.calibration import branches

    monkeypatch.setattr(branches, "SAVED", 0.999)
    recipe = calibrated(model).recipe(**CHOICES)
    plain = calibrated(model).recipe(**{**CHOICES, "low_rank": None})
    for name, entry in recipe.experts[""].items():
        assert not entry.low_rank
        for path, packed in entry.packed.items():
            assert torch.equal(packed.codes, plain.experts[""][name].packed[path].codes)
            assert "no low-rank branch: it leaves 0." in entry.linears[path].no_branch
    # A measured effect and a plan write the reason anew.
    calibrated(model).recipe(**{**CHOICES, "sensitivity": True}, max_high_precision_linears=1).save(tmp_path / "r")
    reasons = [str(d.reason) for d in tahf4.plan_modules(model, Recipe.load(tmp_path / "r")) if "blocks" in d.module]
    assert len(reasons) == 6 and all("effect on the output" in r and "no low-rank branch: it" in r for r in reasons)


def test_dequantize_gives_the_weight_with_its_branch(model):
    packed = packed_with(model, calibrated(model).recipe(**CHOICES, scale_search="squared"))
    linear, weight = packed.blocks[1].up, model.blocks[1].up.weight
    held = hif4.dequantize(hif4.Packed(linear.weight_codes, linear.weight_scales, 64), torch.float64)
    x = torch.randn(16, 64)
    moved = transform(x, linear.multiplier, linear.hadamard_block).double()
    want = moved @ held.t() + x.double() @ linear.low_rank_a.double() @ linear.low_rank_b.double()
    tahf4.dequantize_(packed)
    assert relative(packed.blocks[1].up.weight @ x.t(), want.t()) < 1e-5
    assert relative(packed.blocks[1].up.weight, weight) < 0.12


def test_a_weight_that_changed_is_searched_with_its_branch(model):
    recipe = calibrated(model).recipe(**CHOICES)
    model.blocks[0].up.weight.mul_(1.01)  # as a merged adapter does
    packed, compiled = packed_with(model, recipe, check_weights=False), copy.deepcopy(model)
    tahf4.apply_recipe(compiled, recipe, check_weights=False)
    assert relative(packed.blocks[0].up.dequantized(), model.blocks[0].up.weight) < 0.12
    run = torch.compile(compiled, backend="tahf4", options=GRAPH)
    assert relative(run(rows(3)), packed(rows(3))) < 1e-6


@pytest.mark.parametrize("bits", [8, 16])
def test_activations_of_more_bits_have_the_branch_too(model, bits):
    calibration, x = calibrated(model), rows(50)
    packed = packed_with(model, calibration.recipe(**CHOICES))
    before = relative(packed(x), model(x))
    tahf4.set_activation_bits(packed, bits)
    assert relative(packed(x), model(x)) < 0.8 * before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_branches_have_16_bits(model, dtype):
    model = model.to(dtype)
    with tahf4.calibrate(model, options=GRAPH) as calibration:
        model(rows(0).to(dtype))
    packed = packed_with(model, calibration.recipe(**CHOICES))
    linear = packed.blocks[0].up
    assert linear.low_rank_a.dtype == linear.low_rank_b.dtype == dtype
    x = rows(1).to(dtype)
    assert linear(x).dtype == dtype
    assert relative(packed(x), model(x)) < 0.2
    assert relative(linear(x), defined(linear, x)) < 0.01
    packed.float()
    assert packed.blocks[0].up.low_rank_a.dtype == torch.float32
    assert relative(packed(x.float()), model(x)) < 0.2


def test_a_state_dict_goes_into_a_linear_of_equal_rank_alone(model):
    calibration = calibrated(model)
    packed = packed_with(model, calibration.recipe(**CHOICES))
    again = packed_with(model, calibration.recipe(**CHOICES))
    for parameter in again.parameters():
        parameter.zero_()
    again.load_state_dict(packed.state_dict())
    assert torch.equal(again(rows(2)), packed(rows(2)))
    other = packed_with(model, calibration.recipe(**{**CHOICES, "low_rank": None}))
    with pytest.raises(RuntimeError, match=r"blocks\.0\.up\.low_rank_a"):
        other.load_state_dict(packed.state_dict())


@pytest.mark.parametrize("percent", [0, -1, 100, "12", True, float("nan")])
def test_a_width_that_is_none_is_refused(model, percent):
    with pytest.raises(OptionError, match="low_rank is"):
        calibrated(model).recipe(**{**CHOICES, "low_rank": percent})


def test_damaged_branches_are_refused(model, tmp_path):
    recipe = calibrated(model).recipe(**CHOICES)
    entry = next(iter(recipe.experts[""].values()))
    path, branch = next(iter(entry.low_rank.items()))
    for wrong in (branch._replace(a=branch.a[:-1]), branch._replace(b=branch.b * torch.nan)):
        entry.low_rank[path] = wrong
        recipe.save(tmp_path / "r.safetensors")
        with pytest.raises(RecipeError, match="low-rank branch of .* does not fit"):
            Recipe.load(tmp_path / "r.safetensors")


def test_only_a_recipe_with_branches_is_a_file_that_earlier_versions_refuse(model, tmp_path):
    listed = {}
    for percent in (None, 12.5):
        calibrated(model).recipe(**{**CHOICES, "low_rank": percent}).save(tmp_path / "r.safetensors")
        _, header = load_tensors(tmp_path / "r.safetensors", FORMAT, RecipeError)
        listed[percent] = {name for entry in header["entries"] for name in entry}
    assert listed[12.5] - listed[None] == {"low_rank"}


def test_effects_and_errors_are_measured_with_branches(model):
    calibration = calibrated(model)
    found = {p: calibration.recipe(**{**CHOICES, "low_rank": p, "sensitivity": True}) for p in (None, 50)}
    assert found[50].errors[""][0].error < 0.8 * found[None].errors[""][0].error
    plain, branched = (found[p].linears("") for p in (None, 50))
    assert all(branched[path].sqnr_db > plain[path].sqnr_db for path in plain)


def test_a_graph_that_runs_no_branch_packs_the_whole_weight(model):
    recipe = calibrated(model).recipe(**CHOICES)
    tahf4.apply_recipe(model, recipe)
    weight, entry = model.blocks[0].up.weight, recipe.experts[""]["blocks.0.up"]
    for rank, want in ((0, weight), (8, remainder(weight, entry.low_rank["blocks.0.up"]))):
        how = PackedWeight((0,), True, entry.seed, entry.hadamard_block, "reconstruct", rank=rank)
        (packed,) = store.get([((weight,), how)])
        moved = transform(want, multipliers(64, entry.mask, entry.seed)[1], entry.hadamard_block)
        assert relative(hif4.dequantize(packed), moved) < 0.13, rank


def test_a_compiled_model_follows_a_recipe_with_other_branches(model):
    """Without mask and rotation nothing else of the packed weight depends on the recipe."""
    choices = {**CHOICES, "mask": None, "weight_exponent": None, "rotate": False, "scale_search": "squared"}
    first = calibrated(model).recipe(**choices)
    halved = {
        name: dataclasses.replace(entry, low_rank={p: LowRank(a, b / 2) for p, (a, b) in entry.low_rank.items()})
        for name, entry in first.experts[""].items()
    }
    second, compiled, x = Recipe({"": halved}), copy.deepcopy(model), rows(3)
    run = torch.compile(compiled, backend="tahf4", options={**GRAPH, "rotate.block": 0})
    for recipe in (first, second, first):
        tahf4.apply_recipe(compiled, recipe)
        assert relative(run(x), packed_with(model, recipe)(x)) < 1e-6


class Casting(Stack):
    """Its blocks compute in bfloat16, and their weights are of float32."""

    def forward(self, x):
        for block in self.blocks:
            h = torch.nn.functional.linear(x.bfloat16(), block.up.weight.bfloat16(), block.up.bias.bfloat16())
            x = x + h.float()[:, :64]
        return x


def test_a_weight_that_the_model_casts_has_a_branch_of_that_type():
    torch.manual_seed(0)
    model, x = Casting(2).eval().requires_grad_(False), rows(3)
    recipe = branched(masked_recipe(model, widest=64), model)
    packed = packed_with(model, recipe)
    tahf4.apply_recipe(model, recipe)
    want = x
    for block in packed.blocks:
        want = want + defined(block.up, want.bfloat16().float()).bfloat16().float()[:, :64]
    assert relative(torch.compile(model, backend="tahf4", options=GRAPH)(x), want) < 0.02  # roundings to bfloat16


def test_a_symbolic_trace_has_the_branch(model):
    packed, x = packed_with(model, calibrated(model).recipe(**CHOICES)), rows(3)
    assert torch.equal(torch.fx.symbolic_trace(packed)(x), packed(x))


def test_under_autocast_the_branch_has_the_type_of_the_product(model):
    recipe, compiled, x = calibrated(model).recipe(**CHOICES), copy.deepcopy(model), rows(3)
    packed, want = packed_with(model, recipe), model(x)
    tahf4.apply_recipe(compiled, recipe)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = [packed(x), torch.compile(compiled, backend="tahf4", options=GRAPH)(x)]
        outputs.append(torch.compile(packed, backend="tahf4", options=GRAPH)(x))
    for out in outputs:
        assert out.dtype == torch.bfloat16
        assert relative(out, want) < 1.2 * relative(packed(x), want)


def test_a_graph_holds_branches_of_several_ranks(model):
    plain = calibrated(model).recipe(**{**CHOICES, "low_rank": None, "scale_search": "squared"})
    entries = {}
    for name, entry in plain.experts[""].items():
        rank = 16 if name.startswith("blocks.1.") else 8
        branches = {path: leading(model.get_submodule(path).weight, entry.mask, rank) for path in entry.linears}
        entries[name] = dataclasses.replace(entry, low_rank=branches)
    recipe, x = Recipe({"": entries}), rows(3)
    packed = packed_with(model, recipe)
    tahf4.apply_recipe(model, recipe)
    lowered = tahf4.lower(tahf4.capture(model, (x,)), options=GRAPH)
    assert relative(lowered(x), packed(x)) < 1e-6
    inputs = lowered.graph_module.graph.find_nodes(op="placeholder")
    shapes = {node.name: tuple(node.meta["val"].shape) for node in inputs if "low_rank_a" in node.name}
    assert sorted(shapes.values()) == [(64, 8), (64, 8), (64, 16), (128, 8), (128, 8), (128, 16)]


def test_some_rows_of_a_product_have_those_of_its_branch():
    torch.manual_seed(0)
    weight, x = torch.randn(96, 64), torch.randn(5, 64)
    product = QuantizedWeight(weight, None, None, 0, low_rank=leading(weight, None, 8))
    assert torch.equal(product(x, 16, 32), product(x)[:, 16:48])
    assert relative(product(x), x @ weight.t()) < 0.15
