"""What a former run left is taken up where it is what it should be; else an error says what to do."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tahf4_compiler.tools.errors import CommandError
from tahf4_compiler.tools.generation import Run, StepTime
from tahf4_compiler.tools.reproduction import model, run
from tahf4_compiler.tools.reproduction.clips import ClipFile, clip_files
from tahf4_compiler.tools.reproduction.protocol import Protocol, load_protocol

CPU = run.Device("cpu")


def clip_of(protocol: Protocol, folder: Path) -> ClipFile:
    """Write the first clip of a setting."""
    clip = clip_files(protocol, folder)[0]
    video = np.random.default_rng(0).random((2, 8, 8, 3), dtype=np.float32)
    clip.save(Run([video], [StepTime(0.5, "transformer", True, True)]), linears={"in_4_bits": 20})
    return clip


@pytest.fixture
def pipeline(tmp_path) -> Path:
    """Files as a pipeline has them, with weights of 4 MB."""
    folder = tmp_path / "pipeline"
    (folder / "transformer").mkdir(parents=True)
    (folder / "model_index.json").write_text('{"transformer": ["diffusers", "WanTransformer3DModel"]}')
    (folder / "transformer" / "model.safetensors").write_bytes(bytes(4 << 20))
    os.utime(folder / "transformer" / "model.safetensors", (0, 0))
    return folder


def test_a_change_in_the_middle_of_a_weight_is_another_model(pipeline, tmp_path):
    protocol, out = load_protocol("tiny"), tmp_path / "out"
    run.check_same_run(protocol, pipeline, out, CPU)
    with (pipeline / "transformer" / "model.safetensors").open("r+b") as file:
        file.seek(2 << 20)
        file.write(b"x")
    with pytest.raises(CommandError, match=r'model was \{"transformer/model.safetensors": .*Name another folder'):
        run.check_same_run(protocol, pipeline, out, CPU)


def test_a_file_of_the_model_is_read_once_and_again_when_it_changes(pipeline, tmp_path, monkeypatch):
    protocol, out, read = load_protocol("tiny"), tmp_path / "out", []
    digest = model.file_digest
    monkeypatch.setattr(model, "file_digest", lambda path: read.append(path.name) or digest(path))
    run.check_same_run(protocol, pipeline, out, CPU)
    assert read == ["model_index.json", "model.safetensors"]
    run.check_same_run(protocol, pipeline, out, CPU)
    assert len(read) == 2
    weights = pipeline / "transformer" / "model.safetensors"
    before = weights.stat()
    weights.write_bytes(b"x" + bytes((4 << 20) - 1))
    time.sleep(0.02)  # a clock of files may tick every 10 ms
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))  # as a copy that keeps the time
    with pytest.raises(CommandError, match="model was"):
        run.check_same_run(protocol, pipeline, out, CPU)
    weights.write_bytes(bytes(4 << 20))
    run.check_same_run(protocol, pipeline, out, CPU)
    run.check_same_run(protocol, pipeline, out, CPU)
    assert read[2:] == ["model.safetensors"] * 2, "what was read last is remembered"
    (pipeline / "clips.json").write_text("{}")  # no part of the pipeline
    run.check_same_run(protocol, pipeline, out, CPU)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"files": []}', None])
def test_a_folder_that_does_not_say_what_made_its_clips_is_refused(pipeline, tmp_path, text):
    out = tmp_path / "out"
    run.check_same_run(load_protocol("tiny"), pipeline, out, CPU)
    (out / "clips").mkdir()
    (out / "run.json").unlink() if text is None else (out / "run.json").write_text(text)
    with pytest.raises(CommandError, match="Only this file says what made the others. Delete the folder"):
        run.check_same_run(load_protocol("tiny"), pipeline, out, CPU)


def test_a_clip_in_the_place_of_another_is_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "open_pipeline", lambda *args: pytest.fail("loaded"))
    protocol = load_protocol("tiny")
    naive = clip_of(protocol, tmp_path / "clips" / "naive")
    ours = clip_files(protocol, tmp_path / "clips" / "ours")
    ours[0].path.parent.mkdir()
    shutil.copy(naive.path, ours[0].path)
    with pytest.raises(CommandError, match="is of {'setting': 'naive'.*expected {'setting': 'ours'.*Delete it"):
        run.generate_all(protocol, tmp_path, tmp_path, CPU)
    ours[0].path.unlink()
    same = clip_of(protocol, tmp_path / "clips" / "ours")
    shutil.copy(same.path, ours[1].path)
    with pytest.raises(CommandError, match="is of .*expected .*Delete it; it is generated again"):
        run.generate_all(protocol, tmp_path, tmp_path, CPU)


def test_a_damaged_clip_is_told_of_or_reads_as_it_was(tmp_path):
    clip = clip_of(load_protocol("tiny"), tmp_path / "ours")
    good, frames = clip.path.read_bytes(), clip.frames()
    assert clip.linears() == {"in_4_bits": 20} and clip.cost()[0] == [StepTime(0.5, "transformer", True, True)]
    refused = 0
    for at in range(0, len(good), 7):
        clip.path.write_bytes(good[:at] + bytes([good[at] ^ 0xFF]) + good[at + 1 :])
        try:
            assert np.array_equal(clip.frames(), frames)  # the byte is of another array, or of a date
        except CommandError as error:
            refused += 1
            assert "Delete it; it is generated again" in str(error)
    assert refused > 50
    for damaged in (good[:100], b"", b"x"):
        clip.path.write_bytes(damaged)
        with pytest.raises(CommandError, match="is no clip: .*Delete it; it is generated again"):
            clip.check()


def test_a_damaged_recipe_or_calibration_is_made_again_once_it_is_deleted(tmp_path):
    protocol = load_protocol("tiny")
    for setting in (run.ORIGINAL, *run.SETTINGS[:-1]):
        for clip in clip_files(protocol, tmp_path / "clips" / setting.key):
            clip.save(Run([np.zeros((1, 8, 8, 3), np.float32)], []))
    recipe = tmp_path / "recipes" / "ours.safetensors"
    recipe.parent.mkdir()
    save_file({"a": torch.zeros(100)}, recipe)
    recipe.write_bytes(recipe.read_bytes()[:-100])
    with pytest.raises(CommandError, match=f"truncated.* If you delete {recipe}, this command makes it again"):
        run.generate_all(protocol, tmp_path, tmp_path, CPU)
    checkpoint = tmp_path / "calibration.safetensors"
    recipe.rename(checkpoint)
    with pytest.raises(CommandError, match=f"truncated.* If you delete {checkpoint}, this command makes it again"):
        run._make_recipes(torch.nn.Linear(64, 64), protocol, {}, tmp_path, CPU)


def test_run_json_holds_what_decides_the_clips(pipeline, tmp_path):
    run.check_same_run(load_protocol("tiny"), pipeline, tmp_path / "out", CPU)
    stored = json.loads((tmp_path / "out" / "run.json").read_text())
    assert set(stored["model"]) == {"model_index.json", "transformer/model.safetensors"}
    assert {"prompts", "seeds", "generate", "settings", "device", "versions"} <= set(stored)
