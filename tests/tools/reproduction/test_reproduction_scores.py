"""Clips get the numbers of the scorer, or the reason why not."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from tahf4_compiler.tools.errors import CommandError
from tahf4_compiler.tools.generation import Run, StepTime
from tahf4_compiler.tools.reproduction import run, scores
from tahf4_compiler.tools.reproduction.clips import ClipFile, clip_files
from tahf4_compiler.tools.reproduction.protocol import Protocol, parse_protocol
from tahf4_compiler.tools.reproduction.report import write_report
from tahf4_compiler.tools.reproduction.scores import Unscored, pair_scores, vbench_scores

DIMENSIONS = ["subject_consistency", "motion_smoothness", "imaging_quality", "aesthetic_quality", "overall_consistency"]

# The calls and the file of VBench 0.1.5 (vbench/__init__.py): constructor, `evaluate`, its mode for own prompts.
VBENCH = '''
import json, os

class VBench(object):
    def __init__(self, device, full_info_dir, output_path):
        assert os.path.isfile(full_info_dir) and type(device).__name__ == "device"
        self.device, self.output_path = device, output_path

    def evaluate(self, videos_path, name, prompt_list=[], dimension_list=None, local=False, read_frame=False,
                 mode="vbench_standard", **kwargs):
        assert mode == "custom_input" and not kwargs and not local and not read_frame
        names = sorted(os.listdir(videos_path))
        assert names == sorted(prompt_list) and all(n.endswith(".mp4") for n in names), names
        if os.environ.get("VBENCH_FAILS"):
            raise RuntimeError("out of memory")
        results = {}
        for i, dimension in enumerate(dimension_list):
            scale = 100 if dimension == "imaging_quality" else 1
            found = [(0.5 + 0.1 * i) if "circle" in prompt_list[n] else 0.25 for n in names]
            each = [{"video_path": os.path.join(videos_path, n), "video_results": scale * v}
                    for n, v in zip(names, found)]
            results[dimension] = [sum(found) / len(found), each]
        with open(os.path.join(self.output_path, name + "_eval_results.json"), "w") as file:
            json.dump(results, file)
'''


@pytest.fixture
def vbench(tmp_path, monkeypatch) -> Path:
    """A stand-in for VBench, and for what writes videos."""
    site, here = tmp_path / "site", tmp_path / "here"
    torch_without_its_start = "class device:\n    def __init__(self, name):\n        self.type = name\n"
    for folder, name, text in (
        (site, "vbench", VBENCH), (site, "torch", torch_without_its_start), (here, "imageio", ""),
        (here, "imageio_ffmpeg", ""),
    ):  # fmt: skip
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(text)
    (site / "vbench" / "VBench_full_info.json").write_text("[]")
    monkeypatch.setenv("PYTHONPATH", str(site))
    monkeypatch.syspath_prepend(str(here))

    def write(frames, path, fps, quality):
        assert len(frames) == 5 and frames[0].size == (32, 32) and fps == 16
        Path(path).write_bytes(b"video")

    monkeypatch.setattr(scores, "export_to_video", write)
    return site


def protocol(**changes: object) -> Protocol:
    content = {
        "prompts": ["a large red circle moving right", "a small blue square moving left"],
        "generate": {
            "height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2, "guidance_scale": 1.0
        },
        "calibration": {"prompts": ["other"], "step_groups": 1},
        "dimensions": DIMENSIONS,
        **changes,
    }
    return parse_protocol(content, Path("mine.yaml"))


def write_clips(protocol: Protocol, folder: Path, noise: float, finite: bool = True) -> list[ClipFile]:
    """Write clips of a moving edge with noise."""
    files, rng = clip_files(protocol, folder), np.random.default_rng(0)
    video = np.broadcast_to(np.linspace(0.2, 0.8, 32)[None, :, None, None], (5, 32, 32, 3))
    for clip in files:
        noisy = (video + noise * rng.standard_normal(video.shape)).clip(0, 1)
        steps = [StepTime(1.0, "transformer", True, True), StepTime(2.0, "transformer", False, False)]
        clip.save(Run([noisy if finite else noisy * np.nan], steps))
    return files


def replace_frames(clip: ClipFile) -> None:
    """Write other frames at the same place, as old as those before."""
    before = clip.path.stat()
    clip.save(Run([1 - clip.frames()], []))
    os.utime(clip.path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_vbench_scores_every_clip_and_is_asked_once(tmp_path, vbench, monkeypatch):
    asked = protocol()
    files = write_clips(asked, tmp_path / "clips", 0.0)
    found = vbench_scores(asked, files, tmp_path, sys.executable)
    assert list(found) == DIMENSIONS
    assert found["subject_consistency"] == [0.5, 0.25]
    assert found["imaging_quality"] == pytest.approx([0.7, 0.25]), "0 to 1, as the mean that VBench gives"
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith((".vbench", ".partial"))]
    assert vbench_scores(asked, files, tmp_path, "/no/python") == found
    fewer = protocol(dimensions=DIMENSIONS[:1])
    assert list(vbench_scores(fewer, files, tmp_path, sys.executable)) == DIMENSIONS[:1], "others are asked for again"
    replace_frames(files[0])
    with pytest.raises(Unscored, match="/no/python"):  # the score was of another clip
        vbench_scores(asked, files, tmp_path, "/no/python")


def test_what_keeps_vbench_from_scoring_is_said(tmp_path, vbench, monkeypatch):
    asked = protocol()
    files = write_clips(asked, tmp_path / "clips", 0.0)
    monkeypatch.setenv("VBENCH_FAILS", "1")
    with pytest.raises(Unscored, match=r"VBench failed \(exit code 1\): RuntimeError: out of memory"):
        vbench_scores(asked, files, tmp_path, sys.executable)
    monkeypatch.setenv("PYTHONPATH", "")
    with pytest.raises(Unscored, match="does not have the package vbench.*--vbench-python"):
        vbench_scores(asked, files, tmp_path, sys.executable)
    with pytest.raises(Unscored, match="/no/python does not run"):
        vbench_scores(asked, files, tmp_path, "/no/python")
    monkeypatch.setenv("PYTHONPATH", str(vbench))
    monkeypatch.delenv("VBENCH_FAILS")
    vbench_scores(asked, files, tmp_path, sys.executable)
    (result,) = tmp_path.glob("vbench_*.json")
    result.write_text('{"subject_consistency": [0.5]}')
    with pytest.raises(Unscored, match="is not what was expected"):
        vbench_scores(asked, files, tmp_path, sys.executable)
    result.unlink()
    with pytest.raises(Unscored, match="take a second seed"):
        vbench_scores(asked, files[:1], tmp_path, sys.executable)
    monkeypatch.setattr(scores.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Unscored, match="imageio is not installed"):
        vbench_scores(asked, files, tmp_path, sys.executable)


def test_the_report_shows_published_figures_beside_those_of_vbench(tmp_path, vbench):
    asked = protocol()
    settings = (run.ORIGINAL, run.SETTINGS[-1])
    made = {s: write_clips(asked, tmp_path / s.key, 0.02 * i) for i, s in enumerate(settings)}
    device = run.Device("cpu")
    files, reasons = run.score_all(asked, made, tmp_path, sys.executable)
    write_report(asked, "some/model", made, files, reasons, tmp_path, device)
    text, page = (tmp_path / "report.md").read_text(), (tmp_path / "report.html").read_text()
    rows = {line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]] for line in text.splitlines()
            if line.count("|") == 10}  # fmt: skip
    head = rows[""]
    assert head == [*(name.replace("_", " ") for name in DIMENSIONS), "mean", "PSNR dB", "SSIM"]
    assert rows["original"][:2] == ["0.3750 ± 0.1250", "0.4250 ± 0.1750"]
    assert rows["original"][5:] == ["0.4750 ± 0.2250", "", ""]
    psnr = rows["tahf4, the defaults"][6].partition(" ")[0]
    assert 33 < float(psnr) < 35  # of noise of 0.02
    assert rows["published: Tail-Aware HiFloat4, BF16"] == ["0.9331", "0.9923", "", "", "", "0.6800", "", ""]
    assert rows["published: Tail-Aware HiFloat4, W4A4"] == ["0.5324", "0.9803", "", "", "", "0.5880", "", ""]
    assert rows["published: HiSQRot4, W4A4"][:3] == ["0.9612", "0.9883", "0.7306"]
    assert "<td>published: Tail-Aware HiFloat4, W4A4</td><td>0.5324</td>" in page
    fewer = protocol(dimensions=DIMENSIONS[:2])
    files, reasons = run.score_all(fewer, made, tmp_path, sys.executable)
    write_report(fewer, "some/model", made, files, reasons, tmp_path, device)
    row = next(line for line in (tmp_path / "report.md").read_text().splitlines() if "HiFloat4, W4A4" in line)
    assert "0.5324" in row and "0.5880" not in row, "a mean of two dimensions is another mean"


def test_the_report_names_the_loras_of_a_student(tmp_path, vbench):
    (tmp_path / "few_steps.safetensors").write_bytes(b"weights")
    parts = [{"path": str(tmp_path / "few_steps.safetensors"), "scale": 0.5}, {"path": "someone/student"}]
    asked = protocol(lora=parts)
    made = {run.ORIGINAL: write_clips(asked, tmp_path / "original", 0.0)}
    files, reasons = run.score_all(asked, made, tmp_path, sys.executable)
    write_report(asked, "some/model", made, files, reasons, tmp_path, run.Device("cpu"))
    text = (tmp_path / "report.md").read_text()
    digest = hashlib.sha256(b"weights").hexdigest()[:16]
    assert f"few_steps.safetensors into transformer, scale 0.5 (sha256 {digest}...); someone/student into" in text
    assert len(json.loads((tmp_path / "report.json").read_text())["lora"]) == 2


def test_a_run_without_vbench_says_so_and_has_the_other_numbers(tmp_path, vbench, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "")
    asked = protocol()
    made = {run.ORIGINAL: write_clips(asked, tmp_path / "original", 0.0)}
    files, reasons = run.score_all(asked, made, tmp_path, sys.executable)
    assert [reason.partition(":")[0] for reason in reasons] == ["LPIPS", "VBench"]
    content = json.loads(files[0].read_text())
    assert {"psnr", "ssim"} <= set(content["clips"][0]) and "subject_consistency" not in content["clips"][0]


@pytest.mark.parametrize("damage", ["{", "[]", "{}", '{"psnr": "x"}', "\x00"])
def test_numbers_are_kept_for_the_clips_that_they_are_of(tmp_path, damage):
    asked = protocol()
    original, other = (write_clips(asked, tmp_path / name, noise)[0] for name, noise in (("a", 0.0), ("b", 0.1)))
    measured, file = pair_scores(asked, original, other, tmp_path), tmp_path / "p0000_s0.json"
    kept = json.loads(file.read_text())
    file.write_text(json.dumps({**kept, "psnr": 1.0}))
    assert pair_scores(asked, original, other, tmp_path) == {**measured, "psnr": 1.0}, "they are kept"
    file.write_text(damage)
    assert pair_scores(asked, original, other, tmp_path) == measured, "what is damaged is made again"
    assert json.loads(file.read_text()) == kept
    for clip in (other, original):
        before = pair_scores(asked, original, other, tmp_path)
        replace_frames(clip)
        assert pair_scores(asked, original, other, tmp_path) != before, "other clips have other numbers"


def test_lpips_is_measured_where_it_is_installed(tmp_path, monkeypatch):
    """The call of lpips 0.1.4: images of [-1, 1], or of [0, 1] with ``normalize``."""
    asked = protocol()
    original, other = (write_clips(asked, tmp_path / name, noise) for name, noise in (("a", 0.0), ("b", 0.1)))
    without = pair_scores(asked, original[0], other[0], tmp_path / "scores")
    assert set(without) == {"psnr", "ssim"}

    class LPIPS(torch.nn.Module):
        def __init__(self, net="alex", verbose=True):
            super().__init__()
            assert net == "alex"

        def forward(self, in0, in1, retPerLayer=False, normalize=False):
            assert normalize and in0.shape == (1, 3, 32, 32) and in0.min() >= 0 and in0.max() <= 1
            return (in0 - in1).abs().mean().reshape(1, 1, 1, 1)

    module = ModuleType("lpips")
    module.LPIPS = LPIPS
    module.__spec__ = object()
    monkeypatch.setitem(sys.modules, "lpips", module)
    monkeypatch.setattr(scores, "_networks", {})
    found = pair_scores(asked, original[0], other[0], tmp_path / "scores")
    distance = np.abs(original[0].frames() - other[0].frames()).mean()
    assert found["lpips"] == pytest.approx(distance, rel=1e-5), "a package that came later is used"
    assert (found["psnr"], found["ssim"]) == (without["psnr"], without["ssim"])


def test_a_clip_that_is_not_finite_is_a_failure_and_an_original_is_an_error(tmp_path):
    asked = protocol()
    good = write_clips(asked, tmp_path / "a", 0.0)
    bad = write_clips(asked, tmp_path / "b", 0.0, finite=False)
    assert pair_scores(asked, good[0], bad[0], tmp_path / "s") == {"psnr": 0.0, "ssim": 0.0}
    with pytest.raises(CommandError, match="values that are not finite"):
        pair_scores(asked, bad[1], good[1], tmp_path / "s")
