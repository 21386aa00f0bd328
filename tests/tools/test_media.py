"""Videos become pictures that show what they hold, and files appear whole."""

from __future__ import annotations

import math

import numpy as np
import pytest
from PIL import Image
from tahf4_compiler.tools.media import GAP, Comparison, comparison_gif, contact_sheet, psnr

RED, BLUE = (1.0, 0.0, 0.0), (0.0, 0.0, 1.0)


def video(colour: tuple[float, float, float], frames: int = 4, size: int = 16) -> np.ndarray:
    return np.broadcast_to(np.array(colour, dtype=np.float32), (frames, size, size, 3)).copy()


def pair(caption: str, original: np.ndarray, w4a4: np.ndarray) -> Comparison:
    return Comparison(caption, {"original": original, "W4A4": w4a4})


def colours(picture: Image.Image) -> set[tuple[int, ...]]:
    found = picture.convert("RGB").getcolors(picture.width * picture.height)
    assert found is not None
    return {colour for _, colour in found}


def test_psnr_is_minus_ten_times_the_logarithm_of_the_mean_squared_error():
    reference = np.zeros((2, 4, 4, 3))
    assert psnr(reference, reference + 0.1) == pytest.approx(20.0)
    assert psnr(reference, reference + 1.0) == pytest.approx(0.0)


def test_psnr_of_equal_videos_is_infinite_and_with_nan_is_nan():
    assert psnr(video(RED), video(RED)) == math.inf
    assert math.isnan(psnr(video(RED), np.full_like(video(RED), np.nan)))


def test_psnr_refuses_videos_of_different_shapes():
    with pytest.raises(ValueError, match=r"\(4, 16, 16, 3\).*\(3, 16, 16, 3\)"):
        psnr(video(RED), video(RED, frames=3))


def test_a_gif_shows_every_frame_with_the_original_on_the_left(tmp_path):
    still = np.stack([video(RED, 1)[0] * shade for shade in (1.0, 0.8, 0.6, 0.4)])
    comparison_gif(pair("a red square", still, video(BLUE)), tmp_path / "a.gif", frames_per_second=8)
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 4
        assert gif.info["loop"] == 0
        assert gif.info["duration"] in (120, 125, 130)  # hundredths of a second
        frame = gif.convert("RGB")
    left, right = (frame.getpixel((frame.width * share // 8, frame.height * 3 // 4)) for share in (2, 6))
    assert (left, right) == ((255, 0, 0), (0, 0, 255))


def test_small_frames_grow_by_whole_factors(tmp_path):
    checks = np.indices((16, 16)).sum(0) % 2
    frames = np.repeat(checks[None, :, :, None], 3, -1).astype(np.float32)
    comparison_gif(pair("", frames, frames), tmp_path / "a.gif", frames_per_second=8)
    with Image.open(tmp_path / "a.gif") as gif:
        left = np.asarray(gif.convert("L").crop((GAP, gif.height - GAP - 256, GAP + 256, gif.height - GAP)))
    blocks = left.reshape(16, 16, 16, 16).swapaxes(1, 2)
    assert np.array_equal(blocks.min((2, 3)), 255 * checks)
    assert np.array_equal(blocks.max((2, 3)), 255 * checks)


def test_large_frames_shrink(tmp_path):
    big = video(RED, frames=2, size=600)
    contact_sheet([pair("big", big, big)], tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.height < 400


def test_a_contact_sheet_has_both_videos_of_every_prompt(tmp_path):
    pairs = [pair("first", video(RED), video(BLUE)), pair("second", video(BLUE), video(RED))]
    contact_sheet(pairs[:1], tmp_path / "one.png")
    contact_sheet(pairs, tmp_path / "two.png")
    with Image.open(tmp_path / "one.png") as one, Image.open(tmp_path / "two.png") as two:
        assert {(255, 0, 0), (0, 0, 255)} <= colours(one)
        assert two.height > 1.9 * one.height
        assert two.width == one.width


def test_a_contact_sheet_has_a_row_for_every_video_and_room_for_its_name(tmp_path):
    names = ("a name of the length of a sentence", "b", "c")
    contact_sheet([Comparison("", dict.fromkeys(names, video(RED)))], tmp_path / "three.png")
    contact_sheet([pair("", video(RED), video(RED))], tmp_path / "two.png")
    with Image.open(tmp_path / "three.png") as three, Image.open(tmp_path / "two.png") as two:
        assert three.height - two.height == 128 + GAP
        assert three.width > two.width + 100


def test_captions_of_any_length_and_alphabet_are_drawn(tmp_path):
    for i, caption in enumerate(("", "a very long caption " * 40, "一个红色的圆 🔴\nnew line")):
        path = tmp_path / f"{i}.gif"
        comparison_gif(pair(caption, video(RED), video(BLUE)), path, frames_per_second=8)
        assert path.stat().st_size > 0


def test_a_video_with_nan_is_drawn(tmp_path):
    contact_sheet([pair("nan", np.full_like(video(RED), np.nan), video(BLUE))], tmp_path / "a.png")
    assert (tmp_path / "a.png").exists()


def test_an_interrupted_save_leaves_the_former_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "sheet.png"
    path.write_bytes(b"former")

    def interrupted(self, beside, *args, **kwargs):
        beside.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        contact_sheet([pair("a", video(RED), video(BLUE))], path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["sheet.png"]
    assert path.read_bytes() == b"former"
