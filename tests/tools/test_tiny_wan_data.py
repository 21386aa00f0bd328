"""Rendered clips are a function of caption and seed, and show what the caption says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tahf4_compiler.tools.tiny_wan import data


def test_captions_are_distinct_sentences():
    prompts = [str(caption) for caption in data.all_captions()]
    assert len(set(prompts)) == len(prompts) == 192
    assert "a small red circle moving left" in prompts


def test_the_same_seed_gives_the_same_clips_and_another_seed_others():
    def batch(seed: int) -> torch.Tensor:
        rng = np.random.default_rng(seed)
        return data.render_batch(data.random_captions(4, rng), rng)[0]

    assert torch.equal(batch(3), batch(3))
    assert not torch.equal(batch(3), batch(4))


def test_clips_have_the_documented_shape_and_range():
    clips, masks = data.render_batch(data.all_captions()[:2], np.random.default_rng(0), frames=5)
    assert clips.shape == (2, 3, 5, 64, 64)
    assert masks.shape == (2, 5, 64, 64)
    assert clips.dtype == torch.float32
    assert clips.min() >= 0
    assert clips.max() <= 1


@pytest.mark.parametrize("direction", data.DIRECTIONS)
def test_the_object_moves_the_way_the_caption_says_and_stays_in_the_picture(direction):
    caption = data.Caption("large", "red", "cross", direction)
    for seed in range(10):
        _, masks = data.render(caption, np.random.default_rng(seed))
        y, x = ((masks.sum(dim) * torch.arange(64)).sum(-1) / masks.sum((1, 2)) for dim in (2, 1))
        travel = torch.stack([x[-1] - x[0], y[-1] - y[0]])
        assert travel @ torch.tensor(data.DIRECTIONS[direction]) == pytest.approx(21.6, abs=2.5)
        assert travel.abs().min() < 0.1
        assert masks[:, [0, -1]].sum() + masks[:, :, [0, -1]].sum() == 0


def test_shapes_of_one_radius_have_about_the_same_area():
    middle = torch.tensor([[32.0, 32.0]])
    areas = torch.tensor([data.coverage(shape, 10.0, middle).sum() for shape in data.SHAPES])
    assert (areas / areas.mean() - 1).abs().max() < 0.15


def test_an_unknown_shape_is_refused():
    with pytest.raises(ValueError, match="hexagon"):
        data.signed_distance("hexagon", torch.zeros(1), torch.zeros(1))
