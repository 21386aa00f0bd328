"""A plug-in as a package: installed into a fresh environment, and a second number format without touching the core."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from helpers import GRAPH, block_linears, relative
from models import Stack
from tahf4_compiler.tools.evaluation.formats import nvfp4
from torch import nn

import tahf4_compiler as tahf4
from tahf4_compiler.ops.registry import unregister_kernel

PLUGIN = Path(__file__).parents[1] / "plugin"
sys.path.insert(0, str(PLUGIN))


@pytest.fixture
def quantize():
    from tahf4_nvfp4.quantize import Nvfp4Quantize

    yield Nvfp4Quantize()


@pytest.mark.slow
def test_a_package_installed_into_a_fresh_environment_is_seen(tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "env")], check=True)
    (site,) = (tmp_path / "env").glob("lib/python*/site-packages")
    (site / "parent.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    source = tmp_path / "source"
    subprocess.run(["cp", "-r", str(PLUGIN), str(source)], check=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", str(site), str(source)], check=True, capture_output=True)
    code = "from tahf4_compiler.tools.cli import app; app(['passes', '--json'])"
    python = tmp_path / "env" / "bin" / "python"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    run = subprocess.run([str(python), "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    (entry,) = [p for p in json.loads(run.stdout) if p["name"] == "count_gelus"]
    assert entry["options"] == {"per": 64}
    assert entry["module"] == "tahf4_nvfp4.count_gelus"


class Independent(nn.Module):
    """A W4A4 linear in NVFP4, from the fake quantization of the evaluation: a row is a tensor with its own scale."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, x):
        def rows(value):
            flat = value.reshape(-1, value.shape[-1])
            return torch.stack([nvfp4(row) for row in flat]).reshape(value.shape)

        return nn.functional.linear(rows(x), rows(self.linear.weight.detach()), self.linear.bias)


def independent(model):
    for path in block_linears(model):
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, Independent(model.get_submodule(path)))
    return model


@pytest.mark.parametrize("dim", [64, 72])
def test_nvfp4_runs_through_torch_compile_and_is_what_an_independent_definition_says(quantize, dim, tmp_path):
    model, x = Stack(dim=dim).eval(), torch.randn(4, dim)
    options = {**GRAPH, "passes": [quantize], "dump_dir": str(tmp_path)}
    with torch.no_grad():
        got = torch.compile(model, backend="tahf4", options=options)(x)
        want = independent(model)(x)
    assert relative(got, want) < 1e-5
    (folder,) = tmp_path.iterdir()
    plan = json.loads((folder / "plan.json").read_text())
    assert sum(d["decision"] == "nvfp4" for d in plan) == 6
    assert all("bits_a_value" in d["numbers"] for d in plan if d["decision"] == "nvfp4")
    report = (folder / "report.txt").read_text()
    assert "linears in nvfp4" in report and "bits_a_value" in report


def test_two_models_of_one_class_and_changed_weights_keep_their_own_in_nvfp4(quantize):
    first, second, x = Stack().eval(), Stack().eval(), torch.randn(4, 64)
    compiled = [torch.compile(m, backend="tahf4", options={**GRAPH, "passes": [quantize]}) for m in (first, second)]
    with torch.no_grad():
        results = [c(x) for c in compiled]
        first.blocks[0].up.weight.data.mul_(2)
        results.append(compiled[0](x))
        wanted = [independent(second)(x), independent(first)(x)]
    assert relative(results[1], wanted[0]) < 1e-5
    assert relative(results[2], wanted[1]) < 1e-5


def test_a_plug_in_s_own_operator_gets_its_kernel(quantize):
    @torch.library.custom_op("nvfp4_fast::quantize", mutates_args=())
    def fast(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return torch.ops.nvfp4.quantize(x)

    fast.register_fake(lambda x: torch.ops.nvfp4.quantize(x))
    operator = torch.ops.nvfp4.quantize.default
    kernel = tahf4.register_kernel("fast", operator, torch.ops.nvfp4_fast.quantize.default, lambda node: True)
    try:
        model, x = Stack().eval(), torch.randn(4, 64)
        lowered = tahf4.lower(tahf4.capture(model, (x,)), options={"passes": [quantize]})
        assert "nvfp4.quantize -> fast" in lowered.report()
        assert relative(lowered(x), independent(model)(x)) < 1e-5
        forced = tahf4.lower(tahf4.capture(Stack(), (x,)), options={"passes": [quantize], "kernels": "reference"})
        assert "nvfp4.quantize -> reference" in forced.report()
    finally:
        unregister_kernel(kernel)


@pytest.mark.parametrize(
    ("operator", "target", "message"),
    [
        (torch.ops.aten.gelu.default, torch.ops.aten.gelu.default, "PyTorch's own"),
        (torch.ops.tahf4.linear.default, torch.ops.tahf4.quantize.default, "takes and gives"),
        (torch.ops.tahf4.linear, torch.ops.tahf4.linear.default, "expected an operator overload"),
    ],
)
def test_a_kernel_that_cannot_serve_is_refused(operator, target, message):
    with pytest.raises(tahf4.OptionError, match=message):
        tahf4.register_kernel("bad", operator, target, lambda node: True)
