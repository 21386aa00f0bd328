"""Wan under diffusers' context parallelism (Ulysses): the same results and the same recipe as on one rank."""

from __future__ import annotations

import pytest
import torch
from helpers import plans
from models import output, wan
from ranks import run

import tahf4_compiler as tahf4

GRAPH = {"inductor": False}


def ulysses(rank, size, tmp, monkeypatch):
    import torch.distributed as dist
    from diffusers import ContextParallelConfig

    # diffusers takes its device from the number of accelerators, which is 0 on a CPU.
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    torch.manual_seed(0)
    first, inputs = wan(num_attention_heads=size)
    inputs["return_dict"] = False  # its gathering hook takes a tuple

    def model(parallel):
        found = wan(num_attention_heads=size)[0].requires_grad_(False)
        found.load_state_dict(first.state_dict())
        if parallel:
            found.enable_parallelism(config=ContextParallelConfig(ulysses_degree=size))
        return found

    found = []
    for parallel in (False, True) if rank == 0 else (True,):  # one rank alone is enough to compare with
        torch._dynamo.reset()
        each = model(parallel)
        each.compile_repeated_blocks(backend="tahf4", options={**GRAPH, "dump_dir": str(tmp / f"dump{parallel}")})
        found.append(output(each(**inputs)))
    if rank == 0:
        assert torch.equal(*found)
        decisions = [d["decision"] for plan in plans(tmp / "dumpTrue") for d in plan]
        assert len(decisions) >= 10 and set(decisions) == {"hif4"}

    recipes = []
    for parallel in (False, True) if rank == 0 else (True,):
        torch._dynamo.reset()
        each = model(parallel)
        group = dist.group.WORLD if parallel else None
        with tahf4.calibrate(each, options=GRAPH, sequence_group=group) as calibration:
            each(**inputs)
        if parallel:
            calibration.all_reduce(over="sequence")
        calibration.recipe(mask="percentile").save(tmp / f"recipe{rank}")
        recipes.append((tmp / f"recipe{rank}").read_bytes())
    assert recipes[0] == recipes[-1]


def work(rank, size, tmp):
    with pytest.MonkeyPatch.context() as monkeypatch:
        ulysses(rank, size, tmp, monkeypatch)


@pytest.mark.slow
def test_ulysses_gives_the_results_and_the_recipe_of_one_rank(tmp_path):
    run(2, work, tmp_path)
