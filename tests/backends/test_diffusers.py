"""What users of diffusers do with a compiled transformer."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import GRAPH, block_linears, expected, plans, relative
from models import output, wan

pytestmark = pytest.mark.usefixtures("no_grad")


def test_the_two_experts_keep_their_own_weights():
    experts = [wan(num_layers=1)[0] for _ in range(2)]
    _, inputs = wan()
    for expert in experts:
        expert.compile(backend="tahf4", options=GRAPH)
    for _ in range(2):
        for expert in experts:
            want = output(expected(expert, block_linears(expert))(**inputs))
            assert relative(output(expert(**inputs)), want) < 1e-5


def test_two_guidance_branches_of_different_length_are_right():
    model, inputs = wan(num_layers=1)
    want = expected(model, block_linears(model))
    model.compile(backend="tahf4", options=GRAPH)
    for tokens in (12, 7, 12, 9):
        inputs["encoder_hidden_states"] = torch.randn(1, tokens, 64)
        assert relative(output(model(**inputs)), output(want(**inputs))) < 1e-5


@pytest.mark.slow
def test_a_lora_runs_beside_the_four_bit_product_and_is_packed_when_fused(tmp_path):
    peft = pytest.importorskip("peft")
    model, inputs = wan()
    model.add_adapter(peft.LoraConfig(r=16, target_modules=["to_q", "to_v"], init_lora_weights=False))
    plain = output(model(**inputs))
    model.compile(backend="tahf4", options={**GRAPH, "dump_dir": str(tmp_path)})
    assert 1e-3 < relative(output(model(**inputs)), plain) < 0.1
    assert sum(d["decision"] == "hif4" for d in plans(tmp_path)[0]) == 20
    model.fuse_lora()
    fused = output(model(**inputs))
    merged = copy.deepcopy(model)
    merged.unload_lora()
    assert relative(fused, output(expected(merged, block_linears(merged))(**inputs))) < 1e-5


@pytest.mark.slow
def test_group_offload_breaks_the_graph_but_not_the_plan(tmp_path):
    from diffusers.hooks import apply_group_offloading

    model, inputs = wan()
    whole = output(torch.compile(model, backend="tahf4", options=GRAPH)(**inputs))
    torch._dynamo.reset()
    cpu = torch.device("cpu")
    apply_group_offloading(model, cpu, cpu, offload_type="block_level", num_blocks_per_group=1)
    model.compile(backend="tahf4", options={**GRAPH, "dump_dir": str(tmp_path)})
    assert relative(output(model(**inputs)), whole) < 1e-5
    planned = [d for plan in plans(tmp_path) for d in plan]
    assert {d["module"] for d in planned if d["decision"] == "high_precision"} >= {
        "condition_embedder.time_proj",
        "condition_embedder.text_embedder.linear_1",
    }
    assert all(d["module"].startswith("blocks.") for d in planned if d["decision"] == "hif4")
