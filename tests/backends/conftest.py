"""What tests of backends share."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
