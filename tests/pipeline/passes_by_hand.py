"""What tests of the pipeline share: a small model that is lowered, and a pass that does nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from models import Stack

import tahf4_compiler as tahf4


def lowered(**options):
    return tahf4.lower(tahf4.capture(Stack().eval(), (torch.randn(4, 64),)), options=options)


@dataclass(frozen=True)
class Nothing(tahf4.Pass):
    """Do nothing."""

    def __call__(self, graph_module, context):
        return tahf4.PassResult(graph_module, modified=False)
