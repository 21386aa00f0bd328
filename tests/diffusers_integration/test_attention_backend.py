"""``set_attention_backend("tahf4")`` of diffusers: attention in 8 bits, with a log-sum-exp for ring."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest
import torch
from diffusers.models import attention_dispatch as dispatch
from diffusers.utils import constants
from models import wan

import tahf4_compiler as tahf4
from tahf4_compiler.diffusers_integration import attention as backend
from tahf4_compiler.errors import FormatError, GradientError, OptionError
from tahf4_compiler.torch_private import collectives


def operands():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, tokens, 2, 64, generator=generator) for tokens in (20, 70, 70)]


def test_it_is_the_operator_on_tokens_before_heads():
    given = operands()
    heads_first = [x.transpose(1, 2) for x in given]
    mask = torch.rand(20, 70, generator=torch.Generator().manual_seed(1)) < 0.7
    for theirs, masks in (((), ()), ((mask,), (mask,)), ((mask[:2],), (mask[:2, None, None],))):
        out = dispatch.dispatch_attention_fn(*given, *theirs, backend="tahf4")
        assert torch.equal(out.transpose(1, 2), torch.ops.tahf4.attention(*heads_first, *masks))
    with torch.autocast("cpu", torch.bfloat16):
        out = dispatch.dispatch_attention_fn(given[0], *(x.bfloat16() for x in given[1:]), backend="tahf4")
    halves = [x.bfloat16() for x in heads_first]
    assert torch.equal(out.transpose(1, 2), torch.ops.tahf4.attention(*halves))
    more = {"attention_kwargs": {"return_lse": True}, "scale": 0.3}
    out, lse = dispatch.dispatch_attention_fn(*given, backend="tahf4", **more)
    wanted, wanted_lse = torch.ops.tahf4.attention_lse(*heads_first, scale=0.3)
    assert torch.equal(out.transpose(1, 2), wanted) and torch.equal(lse.transpose(1, 2), wanted_lse)


def test_with_hif4_it_has_queries_and_keys_in_hif4():
    given = operands()
    q, k, v = (x.transpose(1, 2) for x in given)
    out = dispatch.dispatch_attention_fn(*given, backend="tahf4_hif4")
    assert torch.equal(out.transpose(1, 2), torch.ops.tahf4.attention(q, k, v, bits=4))
    out, lse = dispatch.dispatch_attention_fn(*given, backend="tahf4_hif4", attention_kwargs={"return_lse": True})
    wanted, wanted_lse = torch.ops.tahf4.attention_lse(q, k, v, bits=4)
    assert torch.equal(out.transpose(1, 2), wanted) and torch.equal(lse.transpose(1, 2), wanted_lse)


@pytest.mark.parametrize(
    "changes", [{"ulysses_degree": 2}, {"ring_anything": True}, {"is_causal": True}, {"return_lse": True}, {}]
)
def test_ring_exchanges_what_is_quantized_where_nobody_needs_more(changes, monkeypatch):
    degrees = {"ring_degree": 2, "ulysses_degree": 1, "ring_anything": False}
    config = SimpleNamespace(**{name: changes.get(name, degree) for name, degree in degrees.items()})
    given = {name: value for name, value in changes.items() if name not in degrees}
    monkeypatch.setattr(backend, "_gathered", lambda *given: "quantized")
    monkeypatch.setattr(dispatch, "_templated_context_parallel_attention", lambda *given, **more: "by diffusers")
    parallel = SimpleNamespace(context_parallel_config=config)
    found = backend._attention(*operands(), _parallel_config=parallel, bits=8, **given)
    assert found == ("by diffusers" if changes else "quantized")


@pytest.mark.parametrize("name", ["tahf4", "tahf4_hif4", "native"])
def test_the_environment_may_name_it_although_diffusers_looks_first(name, monkeypatch):
    registry = dispatch._AttentionBackendRegistry
    monkeypatch.setattr(registry, "_active_backend", dispatch.AttentionBackendName("native"))
    monkeypatch.setattr(constants, "DIFFUSERS_ATTN_BACKEND", name)
    monkeypatch.setenv("DIFFUSERS_ATTN_BACKEND", name)
    tahf4._before_attention()
    assert constants.DIFFUSERS_ATTN_BACKEND == "native"
    backend.register()
    assert registry._active_backend.value == name
    monkeypatch.setenv("DIFFUSERS_ATTN_BACKEND", "tahf4_hif5")
    with pytest.raises(ValueError, match="'tahf4_hif5' is not a valid AttentionBackendName"):
        backend.register()


@pytest.mark.slow
def test_a_process_may_be_told_by_its_environment():
    code = """
        import tahf4_compiler
        from diffusers.models.attention_dispatch import _AttentionBackendRegistry
        print(_AttentionBackendRegistry._active_backend.value)
    """
    command, environment = [sys.executable, "-c", textwrap.dedent(code)], {"DIFFUSERS_ATTN_BACKEND": "tahf4"}
    ran = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **environment})
    assert ran.stdout.splitlines()[-1] == "tahf4"


def test_a_model_takes_it_and_a_graph_runs_its_kernel(monkeypatch):
    registry = dispatch._AttentionBackendRegistry  # diffusers takes what one model is set to for all in the process
    monkeypatch.setattr(registry, "_active_backend", registry._active_backend)
    model, inputs = wan(num_layers=1)
    model.requires_grad_(False).set_attention_backend("tahf4")
    low = tahf4.lower(tahf4.capture(model, (), inputs))
    assert "tahf4.attention -> cpu" in low.report() and "scaled_dot_product" not in str(low.graph_module.graph)
    said = "2 heads of 64): int8, kept: set_attention_backend('tahf4')"
    assert [said in note for note in low.notes["attention"]] == [True, True]


def test_ring_takes_no_mask_and_nobody_a_derivative():
    config = SimpleNamespace(context_parallel_config=SimpleNamespace(ring_degree=2))
    with pytest.raises(OptionError, match="ulysses_degree"):
        backend._attention(*operands(), torch.ones(20, 70), _parallel_config=config, bits=8)
    with pytest.raises(GradientError, match="no_grad"):
        backend._backward(None, torch.ones(1))


def test_ring_takes_no_shared_heads():
    config = SimpleNamespace(ring_degree=2, ulysses_degree=1, ring_anything=False)
    parallel = SimpleNamespace(context_parallel_config=config)
    query, key, value = operands()
    given = (query, key[:, :, :1], value[:, :, :1])
    with pytest.raises(OptionError, match="2 heads of queries and 1 of keys and values; expected as many: repeat"):
        backend._attention(*given, enable_gqa=True, _parallel_config=parallel, bits=8)


def test_ring_takes_no_other_number_of_tokens_on_another_rank(monkeypatch):
    monkeypatch.setattr(collectives, "largest_of_ranks", lambda part, group: torch.tensor([75, -70]))
    with pytest.raises(OptionError, match="70 tokens on this rank, and 70 to 75 on all; expected as many on each: pad"):
        backend._check_even(operands()[1], None)
    monkeypatch.setattr(collectives, "largest_of_ranks", lambda part, group: part)
    backend._check_even(operands()[1], None)


def test_dropout_is_refused_and_autocast_leaves_float64():
    with pytest.raises(OptionError, match="dropout_p=0.5; expected 0"):
        backend._attention(*operands(), dropout_p=0.5, bits=8)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(FormatError, match="float64"):
        backend._attention(*(x.double() for x in operands()), bits=8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert backend._attention(*operands(), bits=8).dtype == torch.bfloat16


def test_another_diffusers_than_expected_is_left_alone(monkeypatch, caplog):
    before = dispatch._AttentionBackendRegistry._backends[dispatch.AttentionBackendName("tahf4")]
    monkeypatch.delattr(dispatch, "_templated_context_parallel_attention")
    with caplog.at_level(logging.INFO):
        backend.register()
    assert "has no _templated_context_parallel_attention" in caplog.text
    assert dispatch._AttentionBackendRegistry._backends[dispatch.AttentionBackendName("tahf4")] is before
