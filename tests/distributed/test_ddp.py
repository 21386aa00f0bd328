"""DistributedDataParallel around a compiled model: whole graphs run in 4 bits, split ones are refused."""

from __future__ import annotations

import copy

import pytest
import torch
from models import Stack
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

import tahf4_compiler as tahf4


@pytest.fixture(autouse=True)
def one_rank():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    with torch.no_grad():
        yield
    distributed.destroy_process_group()


def test_a_model_that_dynamo_splits_into_buckets_is_refused_with_what_to_do():
    model, x = Stack(depth=8, dim=256, hidden=1024).eval(), torch.randn(4, 256)
    packed = copy.deepcopy(model)
    tahf4.quantize_(packed)
    compiled = torch.compile(DistributedDataParallel(model), backend="tahf4", options={"inductor": False})
    with pytest.raises(Exception, match=r"CaptureError: the graph came without its weights.*optimize_ddp = False"):
        compiled(x)
    with torch._dynamo.config.patch(optimize_ddp=False):
        torch._dynamo.reset()
        assert torch.equal(compiled(x), packed(x))
