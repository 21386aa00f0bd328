"""The texts that show graphs tell apart what is not the same."""

from __future__ import annotations

import pytest
from graphs import Text

WORDS = [
    "masked", "signs", "signs, seed 7", "rotated 64", "rotated 64, seed 7", "rotated 64, no signs",
    "searched by squared", "rank 8", "span 0", "span 8",
    "masked, rotated 64, seed 7, searched by squared, rank 8, span 2",
]  # fmt: skip


@pytest.mark.parametrize("how", WORDS)
def test_how_a_weight_is_packed_is_read_and_printed(how):
    text = f"x: f32[4, 64]\nw: hif4[64, 64] {how}\nreturn x"
    assert Text.parse(text).shown() == text
