"""Capture and lower by hand, share, dumps."""

from __future__ import annotations

import copy
import json
import os
import pickle
import re
import subprocess
import sys

import pytest
import torch
from helpers import GRAPH, block_linears, expected, plans, relative
from models import Stack, output, wan
from torch import Tensor, nn

import tahf4_compiler as tahf4

QUANTIZE = torch.ops.tahf4.quantize.default
LINEAR = torch.ops.tahf4.linear.default


def count(lowered, target):
    return len(lowered.graph_module.graph.find_nodes(op="call_function", target=target))


def test_a_lowered_model_runs_with_the_models_own_weights():
    model, x = Stack().eval(), torch.randn(4, 64)
    lowered = tahf4.lower(tahf4.capture(model, (x,)), options=GRAPH)
    assert relative(lowered(x), expected(model, block_linears(model))(x)) < 1e-5
    with torch.no_grad():
        model.blocks[0].up.weight.mul_(2)
    assert relative(lowered(x), expected(model, block_linears(model))(x)) < 1e-5


def test_dynamic_shapes_go_through_export():
    model = Stack().eval()
    captured = tahf4.capture(model, (torch.randn(4, 64),), dynamic_shapes=({0: torch.export.Dim("rows")},))
    lowered, x = tahf4.lower(captured, options=GRAPH), torch.randn(9, 64)
    assert relative(lowered(x), expected(model, block_linears(model))(x)) < 1e-5


def test_a_lowered_model_is_bound_to_the_model_that_was_captured():
    lowered = tahf4.lower(tahf4.capture(Stack().eval(), (torch.randn(4, 64),)))
    assert copy.copy(lowered) is lowered
    for attempt in (copy.deepcopy, pickle.dumps):
        with pytest.raises(tahf4.CaptureError, match="Copy or save that model"):
            attempt(lowered)


def test_capture_and_lower_refuse_what_they_cannot_do():
    with pytest.raises(tahf4.CaptureError, match="expected an nn.Module"):
        tahf4.capture(lambda x: x, (torch.ones(1),))
    with pytest.raises(tahf4.CaptureError, match="torch.export cannot capture Stack"):
        tahf4.capture(Stack(), (torch.randn(4, 63),))
    with pytest.raises(tahf4.OptionError, match="expected what tahf4.capture"):
        tahf4.lower(Stack())
    lowered = tahf4.lower(tahf4.capture(Stack().eval(), (torch.randn(4, 64),)))
    with pytest.raises(tahf4.CaptureError, match="the model was captured with"):
        lowered(torch.randn(4, 64), torch.randn(4, 64))
    with pytest.raises(tahf4.OptionError, match="no pass 'nothing' ran"):
        lowered.print_readable(after="nothing")


PLAIN = {**GRAPH, "disable_passes": ["fuse", "lower"]}
"""Options that leave the reference operators in the graph."""


def test_wan_shares_quantizations_and_merges_products():
    model, inputs = wan()
    captured = tahf4.capture(model, (), inputs)
    apart = tahf4.lower(captured, options={**PLAIN, "disable_passes": ["share", "fuse", "lower"]})
    shared = tahf4.lower(captured, options={**PLAIN, "share.merge": False})
    merged = tahf4.lower(captured, options=PLAIN)
    # A block: q, k, v of self-attention read one activation, k and v of cross-attention another.
    assert (count(apart, QUANTIZE), count(apart, LINEAR)) == (20, 20)
    assert (count(shared, QUANTIZE), count(shared, LINEAR)) == (14, 20)
    assert (count(merged, QUANTIZE), count(merged, LINEAR)) == (14, 14)
    results = [output(lowered(**inputs)) for lowered in (apart, shared, merged)]
    assert torch.equal(results[0], results[1])
    assert relative(results[2], results[0]) < 1e-5


class Written(nn.Module):
    """Writes to the activation between two linears that read it."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.0
        first = self.one(x)
        x.mul_(2.0)
        return first + self.two(x)


@pytest.mark.parametrize("inductor", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_activation_that_is_written_to_is_not_shared(inductor):
    model, x = Written().eval(), torch.randn(4, 64)
    with torch.no_grad():
        want = expected(model, ["one", "two"])(x)
        got = torch.compile(model, backend="tahf4", options={**GRAPH, "inductor": inductor})(x)
    assert relative(got, want) < 1e-5


class Transposed(nn.Module):
    """Linears written as products with a transposed parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(64, 64) for _ in range(3))
        self.square = nn.Parameter(torch.randn(64, 64))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.matmul(x, self.a.weight.t())
        x = torch.addmm(self.b.bias, x, self.b.weight.T)
        x = torch.mm(x, self.c.weight.transpose(-1, 0))
        return torch.mm(x, self.square)


def test_products_with_a_transposed_parameter_are_linears():
    model, x = Transposed().eval(), torch.randn(4, 64)
    lowered = tahf4.lower(tahf4.capture(model, (x,)), options=GRAPH)
    assert [d.module for d in lowered.plan] == ["a", "b", "c"]
    kept = tahf4.lower(tahf4.capture(model, (x,)), options={"keep": ["."]})
    assert relative(kept(x), model(x)) < 1e-6


def test_autocast_keeps_its_output_type(tmp_path):
    model, x = Stack().eval(), torch.randn(4, 64)
    options = {**GRAPH, "dump_dir": str(tmp_path)}
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        want = model(x)
        got = torch.compile(model, backend="tahf4", options=options)(x)
    assert got.dtype == want.dtype == torch.bfloat16
    assert sum(d["decision"] == "hif4" for d in plans(tmp_path)[0]) == 6
    assert relative(got, want) < 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_run_in_four_bits(dtype):
    model, x = Stack().eval().to(dtype), torch.randn(4, 64, dtype=dtype)
    with torch.no_grad():
        got = torch.compile(model, backend="tahf4", options=GRAPH)(x)
        want = expected(model, block_linears(model))(x)
    assert got.dtype == dtype
    assert relative(got, want) < (1e-5 if dtype == torch.float64 else 2e-2)


def test_a_dump_holds_every_graph_the_plan_and_the_report(tmp_path, monkeypatch):
    monkeypatch.setenv("TAHF4_DUMP_DIR", str(tmp_path))
    model, x = Stack().eval(), torch.randn(4, 64)
    with torch.no_grad():
        torch.compile(model, backend="tahf4", options=GRAPH)(x)
        torch.compile(model, backend="tahf4", options=GRAPH)(torch.randn(2, 3, 64))
    first, second = sorted(tmp_path.iterdir())
    assert (first.name, second.name) == ("graph_000_Stack", "graph_001_Stack")
    stages = ["captured", *(p.name for p in tahf4.default_passes())]
    files = [f"{i:02d}_{stage}.py" for i, stage in enumerate(stages)]
    assert sorted(p.name for p in first.iterdir()) == [*files, "graph.json", "passes.json", "plan.json", "report.txt"]
    assert "torch.ops.aten.linear.default" in (first / files[0]).read_text()
    assert "p_blocks_0_up_weight_codes" in (first / files[-1]).read_text()
    compile((first / files[-1]).read_text(), files[-1], "exec")
    report = (first / "report.txt").read_text()
    assert re.search(r"linears in HiF4 +6 of 8", report)
    assert re.search(r"blocks\.0\.up +64 +128 +hif4 +32,768 +4,608 +in repeated block blocks\.0 \(Block\)", report)
    assert "compile time: capture" in report
    plan = json.loads((first / "plan.json").read_text())
    assert len(plan) == 8


def test_nobody_listens_to_a_graph_that_was_dumped(tmp_path):
    """Inductor's cache has no key for such a graph."""
    model, x = Stack().eval(), torch.randn(4, 64)
    lowered = tahf4.lower(tahf4.capture(model, (x,)), options={**GRAPH, "dump_dir": str(tmp_path)})
    assert lowered.snapshots and not lowered.graph_module._replace_hooks


@pytest.mark.slow
def test_structured_trace_gets_an_artifact_for_each_pass(tmp_path):
    import os
    import subprocess
    import sys
    from pathlib import Path

    code = (
        "import torch\nfrom models import Stack\n"
        "with torch.no_grad(): torch.compile(Stack().eval(), backend='tahf4', options={'inductor': False})"
        "(torch.randn(4, 64))"
    )
    environment = {**os.environ, "TORCH_TRACE": str(tmp_path), "PYTHONPATH": str(Path(__file__).parent)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True)
    text = "".join(path.read_text() for path in tmp_path.iterdir())
    assert '"name": "tahf4_04_quantize"' in text
    assert "tahf4.quantize" in text


def test_a_kernel_of_a_plug_in_takes_the_place_of_the_reference():
    @torch.library.custom_op("tahf4_test::linear", mutates_args=())
    def fast(
        codes: Tensor,
        scales: Tensor,
        weight_codes: Tensor,
        weight_scales: Tensor,
        bias: Tensor | None,
        out_dtype: torch.dtype,
        span: int = 1,
    ) -> Tensor:
        return torch.ops.tahf4.linear(codes, scales, weight_codes, weight_scales, bias, out_dtype, span)

    @fast.register_fake
    def _(codes, scales, weight_codes, weight_scales, bias, out_dtype, span=1):
        return codes.new_empty((*codes.shape[:-1], weight_codes.shape[0]), dtype=out_dtype)

    from tahf4_compiler.ops.registry import unregister_kernel

    kernel = tahf4.register_kernel(
        "fast", LINEAR, torch.ops.tahf4_test.linear.default, lambda node: node.meta["val"].shape[-1] == 128
    )
    try:
        model, x = Stack().eval(), torch.randn(4, 64)
        lowered = tahf4.lower(tahf4.capture(model, (x,)), options=GRAPH)
        (usual,) = {d.kernel for d in lowered.plan if d.module.startswith("blocks") and d.module.endswith("down")}
        assert usual in ("cpu", "reference")
        assert {d.module: d.kernel for d in lowered.plan if d.kernel} == {
            path: "fast" if path.endswith("up") else usual for path in block_linears(model)
        }
        assert relative(lowered(x), expected(model, block_linears(model))(x)) < 1e-5
    finally:
        unregister_kernel(kernel)


@pytest.mark.slow
@pytest.mark.parametrize("dump_dir", [None, "dump"])
def test_a_dump_lies_beside_inductors_files_unless_it_has_a_folder_of_its_own(dump_dir, tmp_path):
    options = {} if dump_dir is None else {"dump_dir": dump_dir}
    code = (
        "import torch, tahf4_compiler\n"
        "model = torch.nn.Linear(64, 64).eval()\n"
        f"with torch.no_grad(): torch.compile(model, backend='tahf4', options={options!r})(torch.randn(2, 64))\n"
    )
    environment = {**os.environ, "TORCH_COMPILE_DEBUG": "1"}
    environment.pop("TAHF4_DUMP_DIR", None)
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=environment, capture_output=True)
    (run,) = (tmp_path / "torch_compile_debug").glob("run_*")
    assert (run / "torchinductor").is_dir()
    folder = run / "tahf4" if dump_dir is None else tmp_path / dump_dir
    assert (folder / "graph_000_Linear" / "report.txt").is_file()
    assert (run / "tahf4").exists() == (dump_dir is None)
