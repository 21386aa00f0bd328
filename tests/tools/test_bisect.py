"""``bisect`` names the pass and the linear that are wrong, and writes a script that shows it alone."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

import pytest
import torch
from models import Stack, wan
from tahf4_compiler.tools.bisect_model import captures
from tahf4_compiler.tools.tiny_wan import settings
from tahf4_compiler.tools.tiny_wan.model import load_pipeline
from typer.testing import CliRunner

import tahf4_compiler as tahf4
from tahf4_compiler.recipe.entries import LinearEntry, RecipeEntry
from tahf4_compiler.weights.checksum import checksum


class WrongScale(tahf4.Pass):
    """Multiply what one linear in 4 bits gives by 1.5."""

    after, before = ("rotate", "scale_search"), ("fuse",)

    def __call__(self, graph_module, context):
        nodes = list(graph_module.graph.find_nodes(op="call_function", target=torch.ops.tahf4.linear.default))
        node = nodes[3]
        with graph_module.graph.inserting_after(node):
            wrong = graph_module.graph.call_function(torch.ops.aten.mul.Tensor, (node, 1.5))
        node.replace_all_uses_with(wrong, delete_user_cb=lambda user: user is not wrong)
        return tahf4.PassResult(graph_module, modified=True)


class WrongNumbers(tahf4.Pass):
    """Break one linear in place: it loses its bias."""

    after, before = ("scale_search",), ("fuse",)

    def __call__(self, graph_module, context):
        nodes = list(graph_module.graph.find_nodes(op="call_function", target=torch.ops.tahf4.linear.default))
        nodes[2].update_arg(4, None)
        return tahf4.PassResult(graph_module, modified=True)


def stack():
    model = Stack().eval()
    model.blocks[1].up.bias.data.add_(5.0)
    return model


@pytest.mark.parametrize(
    ("wrong", "module"),
    [(WrongScale(), "blocks.1.down"), pytest.param(WrongNumbers(), "blocks.1.up", marks=pytest.mark.slow)],
)
def test_a_broken_plug_in_is_named_with_its_linear_and_the_script_shows_it(wrong, module, tmp_path):
    found = tahf4.bisect(stack(), (torch.randn(4, 64),), options={"passes": [wrong]}, rounds=1)
    assert found.blamed == wrong.name
    assert found.suspects[0].module == module
    assert found.suspects[0].error_without == pytest.approx(found.error_before, rel=1e-3)
    script = found.write_reproducer(tmp_path / "reproducer.py")
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    printed = float(run.stdout.split()[2])
    assert printed == pytest.approx(found.suspects[0].local_error, rel=1e-4) and printed > 0.1


class Held(tahf4.Pass):
    """Multiply one GELU by a tensor that the pass holds."""

    after, before = ("plan",), ("quantize",)

    def __call__(self, graph_module, context):
        node = list(graph_module.graph.find_nodes(op="call_function", target=torch.ops.aten.gelu.default))[1]
        graph_module.register_buffer("three", torch.full((128,), 3.0))
        with graph_module.graph.inserting_before(node.next):
            three = graph_module.graph.get_attr("three")
            wrong = graph_module.graph.call_function(torch.ops.aten.mul.Tensor, (node, three))
        node.replace_all_uses_with(wrong, delete_user_cb=lambda user: user is not wrong)
        return tahf4.PassResult(graph_module, modified=True)


class Swapped(tahf4.Pass):
    """Swap the weights of two linears."""

    after, before = ("plan",), ("quantize",)

    def __call__(self, graph_module, context):
        found = graph_module.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
        first, _, second = (n for n in found if n.args[1].meta["val"].shape == (128, 64))
        one, other = first.args[1], second.args[1]
        first.update_arg(1, other)
        second.update_arg(1, one)
        return tahf4.PassResult(graph_module, modified=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrong", "nodes", "modules"),
    [
        pytest.param(Held(), {"mul_tensor"}, {"blocks.1"}, marks=pytest.mark.slow),
        (Swapped(), None, {"blocks.0.up", "blocks.2.up"}),
    ],
)
def test_suspects_are_what_the_blamed_pass_changed_alone(wrong, nodes, modules, tmp_path):
    """The next passes quantize every linear, which counts for them."""
    torch.manual_seed(0)
    model = Stack().eval()
    for block in model.blocks:
        block.norm = torch.nn.Identity()
    found = tahf4.bisect(model, (torch.randn(256, 64),), options={"passes": [wrong]})
    assert found.blamed == wrong.name != found.until
    assert {s.module for s in found.suspects} == modules
    assert nodes is None or {s.node for s in found.suspects} == nodes
    script = found.write_reproducer(tmp_path / "reproducer.py")
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout.split()[2]) == pytest.approx(found.suspects[0].local_error, rel=1e-4)


def test_without_a_wrong_pass_quantization_and_its_worst_linear_are_named():
    found = tahf4.bisect(Stack().eval(), (torch.randn(4, 64),), rounds=2)
    assert found.blamed == "quantize"
    assert all(s.linear and s.module.startswith("blocks.") for s in found.suspects)
    assert found.error_after > found.suspects[0].error_without > found.suspects[1].error_without


def test_a_graph_without_error_and_nan(tmp_path):
    x = torch.randn(4, 64)
    clean = tahf4.bisect(Stack().eval(), (x,), options={"disable_passes": ["quantize"]})
    assert clean.blamed is None and "no pass adds an error" in clean.text()
    with pytest.raises(tahf4.OptionError, match="nothing failed"):
        clean.write_reproducer(tmp_path / "x.py")
    with pytest.raises(tahf4.OptionError, match="no pass 'rotat' ran"):
        tahf4.bisect(Stack().eval(), (x,), blame="rotat")


def test_the_command_takes_an_exported_program(tmp_path):
    from tahf4_compiler.tools.cli import app

    path = tmp_path / "stack.pt2"
    torch.export.save(torch.export.export(Stack().eval(), (torch.randn(4, 64),)), path)
    result = CliRunner().invoke(app, ["bisect", str(path), "--rounds", "1", "-o", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "pass 'quantize' adds most" in result.output
    assert (tmp_path / "out" / "stack.py").is_file()
    assert (tmp_path / "out" / "stack.safetensors").is_file()
    assert CliRunner().invoke(app, ["bisect", str(tmp_path)]).exit_code == 2


@pytest.fixture(scope="module")
def transformer(tmp_path_factory):
    """A folder of one transformer, and a recipe in which one linear of it stays in high precision."""
    folder = tmp_path_factory.mktemp("bisect")
    model, _ = wan()
    model.save_pretrained(folder / "transformer")
    path = "blocks.0.ffn.net.2"
    weight = model.get_submodule(path).weight
    linear = LinearEntry(tuple(weight.shape), int(checksum(weight)), "high_precision", "by hand")
    recipe = tahf4.Recipe({"transformer": {path: RecipeEntry({path: linear})}})
    recipe.save(folder / "recipe.safetensors")
    tahf4.Recipe({**recipe.experts, "other": recipe.experts["transformer"]}).save(folder / "two.safetensors")
    return folder


def bisected(*arguments):
    from tahf4_compiler.tools.cli import app

    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["bisect", *map(str, arguments)])


@pytest.mark.slow
def test_the_command_takes_a_transformer_alone_with_a_recipe(transformer, tmp_path):
    folder = transformer / "transformer"
    common = ("--shape", "2x8x8", "--rounds", "1", "-o", tmp_path / "out")
    plain = bisected(folder, *common)
    assert plain.exit_code == 0, plain.output
    assert "transformer\npass" in plain.output
    assert "pass 'quantize' adds most" in plain.output
    assert (tmp_path / "out" / "transformer.py").is_file()
    with_recipe = bisected(folder, *common, "--recipe", transformer / "recipe.safetensors")
    assert with_recipe.exit_code == 0, with_recipe.output
    errors = [re.search(r"adds most: (?:\S+) -> (\S+)", r.output).group(1) for r in (plain, with_recipe)]
    assert errors[0] != errors[1]
    again = bisected(folder, *common)
    assert again.stdout == plain.stdout  # the noise is seeded


@pytest.mark.slow
def test_a_recipe_decides_what_is_bisected(transformer):
    for recipe, expert in (("recipe.safetensors", None), ("two.safetensors", None), ("two.safetensors", "other")):
        found = captures(transformer / "transformer", "", 0, {}, transformer / recipe, expert, "2x8x8")
        plan = {d.module: d for d in tahf4.lower(found["transformer"]).plan}
        assert plan["blocks.0.ffn.net.2"].decision == "high_precision"
        assert plan["blocks.1.ffn.net.2"].decision == "hif4"


@pytest.mark.slow
def test_a_recipe_decides_what_of_a_pipeline_is_bisected(tmp_path):
    model, path = load_pipeline(settings.PIPELINE_DIR).transformer_2.float(), "blocks.0.ffn.net.2"
    weight = model.get_submodule(path).weight
    linear = LinearEntry(tuple(weight.shape), int(checksum(weight)), "high_precision", "by hand")
    tahf4.Recipe({"transformer_2": {path: RecipeEntry({path: linear})}}).save(tmp_path / "recipe.safetensors")
    overrides = {"num_inference_steps": 4, "num_frames": 5}
    found = captures(settings.PIPELINE_DIR, "a", 0, overrides, tmp_path / "recipe.safetensors", "transformer_2")
    assert list(found) == ["transformer_2"]
    plan = {d.module: d.decision for d in tahf4.lower(found["transformer_2"]).plan}
    assert plan[path] == "high_precision"
    assert plan["blocks.1.ffn.net.2"] == "hif4"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{folder}"], "has no model_index.json and no config.json"),
        (["{folder}/transformer", "--expert", "transformer_2"], "--expert says which part of a --recipe"),
        (["{folder}/renamed", "--recipe", "{folder}/two.safetensors"], "has parts for other, transformer"),
        (["{folder}/transformer", "--shape", "2x7x8"], "multiple of the patch"),
        (["{folder}/none.pt2", "--shape", "2x8x8"], "--shape is for the folder of a transformer"),
    ],
)
def test_what_does_not_fit_a_transformer_alone_is_said(transformer, arguments, message):
    shutil.copytree(transformer / "transformer", transformer / "renamed", dirs_exist_ok=True)
    filled = [a.format(folder=transformer) for a in arguments]
    result = bisected(*filled)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.split())
