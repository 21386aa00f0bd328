"""`tahf4 explain` says why a linear runs as it does, and what would change that."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from models import Stack, wan
from tahf4_compiler.tools.cli import app
from tahf4_compiler.tools.inspection import explaining
from tahf4_compiler.tools.inspection.explaining import explanations, what_would_change
from tahf4_compiler.tools.inspection.report import Report
from tahf4_compiler.tools.inspection.statistics import Evidence
from typer.testing import CliRunner

import tahf4_compiler as tahf4
from tahf4_compiler.model.linears import linear_weights
from tahf4_compiler.recipe.entries import LinearEntry, RecipeEntry

runner = CliRunner(env={"COLUMNS": "200", "TERM": "dumb", "TAHF4_DEBUG": ""})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("wan")
    wan()[0].save_config(path)
    return path


def run(*arguments):
    return runner.invoke(app, ["explain", *map(str, arguments)])


def test_a_linear_is_explained_without_weights(folder):
    result = run(folder, r"blocks\.1\.(attn1\.to_k|ffn\.net\.0)|proj_out", "--set", "fuse.always=true")
    assert result.exit_code == 0, result.output
    key, up, last = (part.splitlines() for part in result.output[result.output.index("blocks.1") :].split("\n\n")[:3])
    assert key[0].startswith("blocks.1.attn1.to_k  (128 -> 128")
    text = "\n".join(key)
    assert "in repeated block blocks.1 (WanTransformerBlock)" in text
    assert "in the place of 3 x linear" in text
    assert "merged with blocks.1.attn1.to_q" in text
    assert "fused_quantize" in text
    assert "layer_norm" in text
    assert any(line.startswith("  kernel") and line.split()[1] for line in key)
    assert r'"keep": [r"^blocks\.1\.attn1\.to_k$"]' in text
    assert "gelu" in "\n".join(up)
    assert "boundary" in "\n".join(last)
    assert "a recipe that names it" in "\n".join(last)


def test_a_kept_linear_says_how_to_undo_it(folder):
    result = run(folder, "blocks.0.ffn.net.2", "--keep", r"blocks\.0\.")
    assert "kept: 'blocks\\\\.0\\\\.' matches" in result.output
    assert "leave the pattern out of keep" in result.output


@pytest.mark.slow
def test_a_recipes_numbers_are_part_of_the_explanation(folder, tmp_path):
    model, _ = wan()
    entries = {}
    for path, weight in linear_weights(model):
        if path == "blocks.0.ffn.net.2":
            linear = LinearEntry(
                tuple(weight.shape), 0, "high_precision", "sensitivity: effect 3.00e-03 (rank 1 of 1)", 17.5, 3e-3
            )
            entries[path] = RecipeEntry({path: linear}, 64, 5, "squared", 99.9, 0.5)
    tahf4.Recipe({"": entries}).save(tmp_path / "recipe.safetensors")
    result = run(folder, "blocks.0.ffn.net", "--recipe", tmp_path / "recipe.safetensors")
    assert result.exit_code == 0, result.output
    other, mine = result.output[result.output.index("blocks.0") :].split("\n\n")[:2]
    assert "the recipe has nothing on this linear" in other
    assert "SQNR 17.5 dB of its own output, effect 3.00e-03" in mine
    assert "mask of the percentile 99.9, weight exponent 0.5" in mine
    assert "high precision" in mine
    assert "recipe.plan(...) with fewer" in mine


@pytest.mark.parametrize(
    ("mask", "percentile", "words"),
    [("weights", None, "weights alone"), ("rms", None, "root mean square"), ("max", 100.0, "percentile 100")],
)
def test_what_a_mask_was_made_with_is_said(mask, percentile, words):
    report = SimpleNamespace(evidence=Evidence(provenance={"choices": {"mask": mask}}))
    assert explaining._statistic(report, {"percentile": percentile}) == words


def test_what_matches_nothing_or_is_no_pattern_is_an_error(folder):
    nothing = run(folder, "blocks.9")
    assert nothing.exit_code == 2
    assert "matches none of the 26 linears" in nothing.output
    for place in (folder, folder.parent):  # said before the model is read, which may be long, or none
        wrong = run(place, "blocks.(")
        assert wrong.exit_code == 2
        assert "is no regular expression" in wrong.output


def test_a_missing_model_or_pattern_is_said_with_the_right_form(folder):
    model = run("blocks.3.ffn")
    assert model.exit_code == 2
    assert "MODEL is missing: a model comes first" in model.output
    assert 'tahf4 explain MODEL "blocks.3.ffn"' in model.output
    pattern = run(folder)
    assert pattern.exit_code == 2
    assert "PATTERN is missing" in pattern.output
    assert f'tahf4 explain {folder} "blocks.3.ffn"' in pattern.output


def test_a_linear_of_high_precision_is_named_as_what_it_became():
    class Other(tahf4.Pass):
        """Let another operator compute a linear, and have another one say nothing about what it is."""

        after, before = ("plan",), ("quantize",)

        def __call__(self, graph_module, context):
            for node in graph_module.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default):
                if node.meta["tahf4_decision"][0].module == "first":
                    node.target = own
                elif node.meta["tahf4_decision"][0].module == "blocks.1.up":
                    del node.meta["tahf4_decision"]
            return tahf4.PassResult(graph_module, True)

    with torch.library._scoped_library("test_explain", "FRAGMENT") as library:
        library.define("product(Tensor x, Tensor w, Tensor b) -> Tensor")
        library.impl("product", torch.nn.functional.linear, "CompositeExplicitAutograd")
        own = torch.ops.test_explain.product.default
        captured = tahf4.capture(Stack().eval(), (torch.randn(4, 64),))
        lowered = tahf4.lower(captured, options={"passes": [Other], "keep": [r"blocks\.1\.up"]})
        report = Report.of(lowered, Evidence())
    first, last, silent = (
        next(line for line in next(explanations(report, re.compile(f"^{name}$"))).splitlines() if "runs as" in line)
        for name in ("first", "last", "blocks.1.up")
    )
    assert first.endswith(" = test_explain.product")
    assert last.endswith(" = aten.linear, by PyTorch")
    assert "no node of the last graph says that it computes" in silent


@pytest.mark.parametrize(
    "cause, words",
    [
        ("small", "plan.min_features"),
        ("dtype", "only the model"),
        ("step", "high_precision_steps"),
        ("not rewritten", "disable_passes"),
        ("other", "the pass that gave this reason"),
    ],
)
def test_each_reason_has_its_remedy(cause, words):
    row = {"module": "a.b", "decision": "high_precision", "reason": "in words", "cause": cause, "k": 32, "n": 64}
    assert words in " ".join(what_would_change(row))


def test_the_bits_of_an_activation_are_named_and_how_to_get_8():
    model = Stack(2).eval().requires_grad_(False)
    captured = tahf4.capture(model, (torch.randn(4, 64),))
    lowered = tahf4.lower(captured, options={"activation_bits": {r"down$": 8}})
    up, down = (
        next(explanations(Report.of(lowered, Evidence()), re.compile(rf"blocks\.0\.{name}$")))
        for name in ("up", "down")
    )
    assert "activation  8 bits: int8" in down and "gives its activation 8 bits" not in down
    assert "activation  8 bits" not in up and r'{"activation_bits": {r"^blocks\.0\.up$": 8}}' in up
    rows = {row["module"]: row["activation_bits"] for row in Report.of(lowered, Evidence()).linears()}
    assert rows["blocks.0.up"] == 4 and rows["blocks.0.down"] == 8
    assert all(bits is None for path, bits in rows.items() if not path.startswith("blocks."))
