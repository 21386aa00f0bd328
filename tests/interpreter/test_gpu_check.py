"""The script for GPUs, run whole at small sizes: its checks must pass and must notice a wrong kernel."""

import json
import time
from pathlib import Path

import pytest
import torch
from tahf4_compiler.backends.triton import attention, attention_kernels, functions, linear_source, source
from tahf4_compiler.tools import gpu_check
from tahf4_compiler.tools.kernels import measure
from tahf4_compiler.tools.kernels.attention import check_attention
from tahf4_compiler.tools.kernels.spans import check_spans, time_spans
from tahf4_compiler.tools.kernels.wan import Model

CPU = torch.device("cpu")
SMALL = Model("small", 64, 128, 1, 1, text=8)


def once(function):
    start = time.perf_counter()
    function()
    return (time.perf_counter() - start) * 1e3


def test_every_check_passes():
    found = list(measure.check(CPU, k=128, rows=(17,)))
    assert len(found) > 40
    assert [r for r in found if not r["ok"]] == []


@pytest.mark.parametrize(
    "old, new",
    [
        ("quotient + 0.5", "quotient + 0.4"),
        (">= 4.0", "> 4.5"),
        ("low - high", "high - low"),
        ("(code >> 2) + 77", "(code >> 2) + 78"),
    ],
)
def test_a_wrong_kernel_is_noticed(old, new, monkeypatch):
    original = source.functions_text

    def changed(names):
        return original(names).replace(old, new)

    assert old in Path(functions.__file__).read_text()
    monkeypatch.setattr(source, "functions_text", changed)
    from tahf4_compiler.backends.triton import expand, linear_source, quantize

    caches = [quantize.kernel_for, linear_source.kernel_for, expand.text]
    for cache in caches:
        cache.cache_clear()
    try:
        assert not all(r["ok"] for r in measure.check(CPU, k=128, rows=(3,)))
    finally:
        for cache in caches:
            cache.cache_clear()


@pytest.mark.slow
def test_measurements_have_every_figure_and_a_page(tmp_path, monkeypatch):
    """What Inductor makes of a block is not the matter here, and would take a minute."""
    lines, compiled = [], torch.compile

    def without_inductor(model, backend, options):
        return compiled(model, backend="tahf4", options={**(options or {}), "inductor": False})

    monkeypatch.setattr(torch, "compile", without_inductor)
    with torch.no_grad():
        found = measure.measure(
            CPU, model=SMALL, tokens=16, few=(1,), square=64, copied=1 << 16, timer=once, show=lines.append
        )
    assert {"ceilings", "quantize", "linear", "attention", "block"} <= set(found)
    whole = found["block"]["block"]
    assert whole["relative_error"] < 0.3 and whole["tahf4_ms"] > 0
    assert found["block"]["weights"]["smaller"] == pytest.approx(16 / 4.5)
    found |= {"facts": measure.facts(CPU), "checks": [{"name": "x", "ok": True, "detail": ""}]}
    page = gpu_check.markdown(json.loads(json.dumps(found)))
    assert "TFLOP/s" in page and "| block |" in page and page.count("|---") == 26
    assert any("linear 16 x 64 x 192" in line for line in lines)
    assert any(line.startswith("quantize 16 x 128 x 64 by its span: 1 ") for line in lines) and "| quantize |" in page
    assert any(line.startswith("attention: SDPA ") for line in lines) and "Self-attention with its" in page


def test_the_script_writes_what_it_found(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure, "check", lambda device: [{"name": "linear", "ok": False, "detail": "9 of 9 differ"}])
    monkeypatch.setattr(measure, "measure", lambda *a, **k: pytest.fail("timed a wrong kernel"))
    assert gpu_check.main(["-o", str(tmp_path)]) == 1
    assert "WRONG linear: 9 of 9 differ" in capsys.readouterr().out
    assert json.loads((tmp_path / "gpu_cpu.json").read_text())["checks"][0]["ok"] is False


@pytest.mark.slow
def test_a_wrong_activation_in_a_product_is_found(monkeypatch):
    real = measure.own_on_path

    def wrong(path, *args, **kwargs):
        args = [a.replace("gelu_tanh", "silu") if isinstance(a, str) else a for a in args]
        return real(path, *args, **kwargs)

    monkeypatch.setattr(measure, "own_on_path", wrong)
    found = {r["name"]: r["ok"] for r in measure.check_products(CPU, 64, (1,))}
    assert not any(ok for name, ok in found.items() if name.endswith("gelu_tanh"))
    assert all(ok for name, ok in found.items() if "gelu_tanh" not in name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loop", "old", "new", "wrong"),
    [
        ("_SPAN", "| (u == U - 1)", "", {"2", "4"}),
        ("_ROW", "tl.fma(dot.to(tl.float32) * b_scale, a_scale, total)", "dot.to(tl.float32) * a_scale", {"row"}),
    ],
)
def test_a_wrong_loop_over_spans_is_noticed(loop, old, new, wrong, monkeypatch):
    assert old in getattr(linear_source, loop)
    monkeypatch.setattr(linear_source, loop, getattr(linear_source, loop).replace(old, new))
    linear_source.kernel_for.cache_clear()
    try:
        found = {r["name"].split()[3].strip(",") for r in check_spans(CPU, 192, (1,)) if not r["ok"]}
    finally:
        linear_source.kernel_for.cache_clear()
    assert found == wrong


@pytest.mark.parametrize(
    ("old", "new", "wrong"),
    [
        ("key[None, :] <= row[:, None]", "key[None, :] < row[:, None]", "causal"),
        pytest.param(
            *("power_of_2(scores, False), 255.0", "power_of_2(scores, False), 254.0", ""), marks=pytest.mark.slow
        ),
        pytest.param(*("found * rest + 0.69312419", "found * rest + 0.69312", "roundings"), marks=pytest.mark.slow),
    ],
)
def test_a_wrong_kernel_of_attention_is_noticed(old, new, wrong, monkeypatch):
    original = source.functions_text
    assert old in Path(attention_kernels.__file__).read_text()
    monkeypatch.setattr(source, "functions_text", lambda names: original(names).replace(old, new))
    attention.text.cache_clear()
    try:
        found = [r["name"] for r in check_attention(CPU) if not r["ok"]]
    finally:
        attention.text.cache_clear()
    assert found and all(wrong in name for name in found)


@pytest.mark.slow
def test_products_with_a_row_are_checked_and_timed_on_each_path():
    names = [r["name"].split(", ")[:3] for r in check_spans(CPU, 64, (16, 17))]
    paths = ["linear int8", "span row", "16 rows"], ["linear int8", "span row", "17 rows"]
    assert names[-5:] == [["quantize", "span row", "16 rows"], paths[0], ["quantize", "span row", "17 rows"], paths[1],
                          ["linear library", "span row", "17 rows"]]  # fmt: skip
    (first, *_) = time_spans(CPU, SMALL, 17, once, lambda line: None)
    assert [*first["linear_ms"]] == ["1", "2", "4", "row", "row, int8", "row, library"]


def test_whole_blocks_are_judged():
    rows = {"a": 0.05, "nothing replaced": 0.0, "no number": float("nan"), "wrong": 0.65}
    found = measure.judged({name: {"relative_error": error} for name, error in rows.items()} | {"weights": {}})
    assert [r["ok"] for r in found] == [True, False, False, False]
