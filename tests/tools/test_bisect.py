"""``bisect`` names the pass and the linear that are wrong, and writes a script that shows it alone."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from models import Stack
from typer.testing import CliRunner

import tahf4_compiler as tahf4


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


@pytest.mark.parametrize(("wrong", "module"), [(WrongScale(), "blocks.1.down"), (WrongNumbers(), "blocks.1.up")])
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
