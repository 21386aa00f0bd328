"""The judge names what rendered clips show, through noise and blur, and refuses what they do not show."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tahf4_compiler.tools.tiny_wan import data
from tahf4_compiler.tools.tiny_wan.judge import NOTHING, judge


def as_video(clip: torch.Tensor) -> np.ndarray:
    return clip.permute(1, 2, 3, 0).numpy()


def rendered(caption: data.Caption, seed: int = 0) -> torch.Tensor:
    return data.render(caption, np.random.default_rng(seed))[0]


def clean(clip: torch.Tensor) -> torch.Tensor:
    return clip


def blurred(clip: torch.Tensor) -> torch.Tensor:
    return F.avg_pool2d(F.pad(clip, (1, 1, 1, 1), mode="replicate"), 3, stride=1)


def noisy(clip: torch.Tensor) -> torch.Tensor:
    noise = torch.randn(clip.shape, generator=torch.Generator().manual_seed(1))
    return (clip + 0.03 * noise).clamp(0, 1)


@pytest.mark.parametrize(
    ("damage", "step"),
    [*((damage, 5) for damage in (clean, blurred, noisy)), pytest.param(clean, 1, marks=pytest.mark.slow)],
)
def test_every_caption_is_read_back_from_its_clip(damage, step):
    wrong = []
    # every fifth: each shape, colour, size and direction
    for seed, caption in list(enumerate(data.all_captions()))[::step]:
        verdict = judge(as_video(damage(rendered(caption, seed))))
        if not all(verdict.matches(caption).values()):
            wrong.append((str(caption), verdict))
    assert wrong == []


def test_a_clean_clip_is_consistent_smooth_and_close_to_its_template():
    verdict = judge(as_video(rendered(data.Caption("large", "red", "triangle", "left"))))
    assert verdict.shape_overlap > 0.95
    assert verdict.subject_consistency > 0.95
    assert verdict.motion_smoothness > 0.95


def test_an_empty_clip_shows_nothing():
    assert judge(np.full((9, 64, 64, 3), 0.9)) == NOTHING


def test_an_object_that_vanishes_in_one_frame_is_nothing():
    video = as_video(rendered(data.Caption("large", "blue", "square", "up"))).copy()
    video[4] = 0.9
    assert judge(video) == NOTHING


def test_a_still_object_has_no_direction():
    video = as_video(rendered(data.Caption("large", "blue", "square", "up")))
    assert judge(np.repeat(video[:1], 9, axis=0)).direction is None


def test_a_clip_played_backwards_moves_the_other_way():
    video = as_video(rendered(data.Caption("small", "green", "cross", "right")))
    assert judge(video[::-1]).direction == "left"


def test_smeared_paint_is_no_shape():
    rng = np.random.default_rng(0)
    video = np.full((9, 64, 64, 3), 0.9)
    video[rng.random((9, 64, 64)) < 0.1] = data.COLOURS["red"]
    verdict = judge(video)
    assert verdict.colour == "red"
    assert verdict.shape is None


def test_changing_colour_or_jumping_lowers_the_scores():
    caption = data.Caption("large", "red", "circle", "right")
    calm = judge(as_video(rendered(caption)))
    flicker = as_video(rendered(caption)).copy()
    flicker[::2] = as_video(rendered(data.Caption("large", "blue", "circle", "right")))[::2]
    assert judge(flicker).subject_consistency < calm.subject_consistency - 0.3
    shuffled = as_video(rendered(caption))[[0, 5, 1, 6, 2, 7, 3, 8, 4]]
    assert judge(shuffled).motion_smoothness < calm.motion_smoothness - 0.3


def test_other_arrays_are_refused():
    with pytest.raises(ValueError, match="expected"):
        judge(np.zeros((3, 9, 64, 64)))
