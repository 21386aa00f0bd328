"""Wan under diffusers' context parallelism: the same results as on one rank, and with Ulysses the same recipe."""

from __future__ import annotations

import functools

import pytest
import torch
from helpers import plans, relative
from models import output, wan
from ranks import run

import tahf4_compiler as tahf4
from tahf4_compiler.errors import OptionError
from tahf4_compiler.torch_private import collectives

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
        recipes.append(calibration.recipe(mask="percentile"))
    entries, others = (recipe.experts[""] for recipe in (recipes[0], recipes[-1]))
    assert list(entries) == list(others)
    for entry, other in zip(entries.values(), others.values()):
        assert torch.equal(entry.mask, other.mask)
        for linear, same in zip(entry.linears.values(), other.linears.values(), strict=True):
            assert linear.decision == same.decision and linear.weight_sum == same.weight_sum
            # The sums of MKL depend on the number of rows, on AMD's processors.
            assert linear.effect == pytest.approx(same.effect, rel=1e-3)


def work(rank, size, tmp):
    with pytest.MonkeyPatch.context() as monkeypatch:
        ulysses(rank, size, tmp, monkeypatch)


@pytest.mark.slow
def test_ulysses_gives_the_results_and_the_recipe_of_one_rank(tmp_path):
    run(2, work, tmp_path)


def counted(monkeypatch):
    """Return the bytes that a rank gives to each exchange of attention, by the function that exchanges them."""
    sent = {}

    def send(function, part, group):
        sent.setdefault(function.__name__, []).append(part.numel() * part.element_size())
        return function(part, group)

    for function in (collectives.gathered_of_ranks, collectives.largest_of_ranks):
        monkeypatch.setattr(collectives, function.__name__, functools.partial(send, function))
    return sent


def ring(rank, size, tmp, monkeypatch, backend, of_unit):
    from diffusers import ContextParallelConfig

    from tahf4_compiler.diffusers_integration import attention as ours

    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    torch.manual_seed(0)
    first, inputs = wan(num_layers=1)
    inputs["return_dict"] = False
    found, sent = [], counted(monkeypatch)
    alone, ulysses, anything = {}, {"ulysses_degree": size}, {"ring_degree": size, "ring_anything": True}
    for division in (alone, ulysses, anything, {"ring_degree": size}):
        model = wan(num_layers=1)[0].requires_grad_(False)
        model.load_state_dict(first.state_dict())
        model.set_attention_backend(backend)
        if division:
            model.enable_parallelism(config=ContextParallelConfig(**division))
        assert not sent
        found.append(output(model(**inputs)))
    heads, tokens = model.config.num_attention_heads, 16  # of each rank: 64 tokens of a scale of values lie on both
    # Codes and scales of keys, codes of values; numbers of tokens, and the largest of values of 64 tokens, in float32.
    assert sent == {
        "gathered_of_ranks": [tokens * heads * (of_unit + 64)], "largest_of_ranks": [16, heads * 64 * 4],
    }  # fmt: skip
    given = [torch.randn(2, 150, 3, 64, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    config, mine = model._parallel_config.context_parallel_config, slice(rank * 75, rank * 75 + 75)
    got = ours._gathered(*(x[:, mine] for x in given), None, ours.NAMES[backend], config)
    whole = torch.ops.tahf4.attention(*(x.transpose(1, 2) for x in given), bits=ours.NAMES[backend])
    assert torch.equal(got, whole.transpose(1, 2)[:, mine])
    with pytest.raises(OptionError, match=f"{75 - rank} tokens on this rank, and 74 to 75 on all.*ring_anything=True"):
        ours._gathered(*(x[:, : 75 - rank] for x in given), None, ours.NAMES[backend], config)
    # Blocks of 64 keys begin elsewhere where diffusers merges the attentions of ranks.
    assert torch.equal(found[1], found[0]) and 0 < relative(found[2], found[0]) < 5e-3
    assert torch.equal(found[3], found[0])
    options = {**GRAPH, "dump_dir": str(tmp / "ring")}
    model.compile_repeated_blocks(backend="tahf4", fullgraph=True, options=options)
    assert relative(output(model(**inputs)), found[0]) < 0.1  # and linears in 4 bits
    if rank == 0:  # the only one that dumps
        reports = [path.read_text() for path in (tmp / "ring").rglob("report.txt")]
        assert reports and all("1 x tahf4.attention_of_codes -> cpu" in text for text in reports)


def work_ring(rank, size, tmp, *given):
    with pytest.MonkeyPatch.context() as monkeypatch:
        ring(rank, size, tmp, monkeypatch, *given)


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "of_unit"), [("tahf4", 68), ("tahf4_hif4", 36)])
def test_ulysses_and_ring_with_attention_in_8_bits_give_the_results_of_one_rank(tmp_path, backend, of_unit):
    run(2, work_ring, tmp_path, backend, of_unit)
