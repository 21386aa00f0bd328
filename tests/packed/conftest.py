"""What tests of packed models share."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def x():
    """The input of a block: see ``packed_block``."""
    return torch.randn(2, 24, 256, generator=torch.Generator().manual_seed(1))
