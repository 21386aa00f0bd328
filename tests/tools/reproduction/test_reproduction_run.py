"""The whole command on the tiny Wan2.2: four settings, resume, a student of few steps, image to video."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import WanImageToVideoPipeline, WanTransformer3DModel
from PIL import Image
from safetensors.torch import load_file, save_file
from tahf4_compiler.tools.cli import app
from tahf4_compiler.tools.errors import CommandError
from tahf4_compiler.tools.evaluation.rows import PLAIN, Row
from tahf4_compiler.tools.generation import Run, StepTime, experts, load_pipeline
from tahf4_compiler.tools.reproduction import clips, run
from tahf4_compiler.tools.reproduction.clips import clip_files
from tahf4_compiler.tools.reproduction.model import Prompted, check_fits, open_pipeline, structure
from tahf4_compiler.tools.reproduction.protocol import load_protocol
from tahf4_compiler.tools.tiny_wan import settings
from typer.testing import CliRunner

import tahf4_compiler as tahf4

pytestmark = pytest.mark.slow  # whole commands; their parts have tests of their own

runner = CliRunner(env={"COLUMNS": "200", "TERM": "dumb", "TAHF4_DEBUG": ""})
KEYS = ("original", "naive", "paper", "ours")
CALL = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 4, "max_sequence_length": 16}
NAIVE = run.Setting("naive", Row("naive HiF4", PLAIN))
EXPERTS = ("transformer", "transformer_2")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Iterator[Path]:
    """The shipped pipeline with one block in each expert."""
    pipe, folder = load_pipeline(settings.PIPELINE_DIR, torch.float32, "cpu"), tmp_path_factory.mktemp("pipeline")
    for model in experts(pipe).values():
        model.blocks = model.blocks[:1]
        model.register_to_config(num_layers=1)
    pipe.save_pretrained(folder)
    return folder


def protocol_file(folder: Path, **changes: object) -> Path:
    content = {
        "prompts": ["a large red circle moving right", "a small blue square moving left"],
        "generate": {**CALL, "guidance_scale": 3.0, "guidance_scale_2": 2.0, "negative_prompt": ""},
        "calibration": {"prompts": ["a large yellow circle moving left"], "step_groups": 2},
        "scorer": "judge",
        "dtype": "float32",
        **changes,
    }
    path = folder / "protocol.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def reproduce(pipeline: Path, protocol: Path, out: Path):
    arguments = ["reproduce", str(pipeline), "--protocol", str(protocol), "-o", str(out), "--no-inductor"]
    return runner.invoke(app, arguments)


@pytest.fixture(scope="module")
def ran(pipeline, tmp_path_factory) -> tuple[Path, Path]:
    """The protocol and the folder of a run of all settings."""
    folder = tmp_path_factory.mktemp("run")
    protocol, out = protocol_file(folder), folder / "out"
    result = reproduce(pipeline, protocol, out)
    assert result.exit_code == 0, result.output
    return protocol, out


def test_the_report_has_every_setting_and_the_numbers(ran):
    _, out = ran
    assert not list(out.rglob("*partial*"))
    assert sorted(path.parent.name for path in out.glob("clips/*/*.npz")) == sorted(2 * KEYS)
    report = json.loads((out / "report.json").read_text())
    text, page = (out / "report.md").read_text(), (out / "report.html").read_text()
    names = [row["row"] for row in report["rows"]]
    assert names == ["original", "naive HiF4", "the published recipe", "tahf4, the defaults"]
    original, *others = report["rows"]
    assert original["measures"]["ssim"]["mean"] == 1.0
    for row in others:
        assert 5 < row["measures"]["psnr"]["mean"] < 80 and 0 < row["measures"]["ssim"]["mean"] < 1
        assert {"subject_consistency", "motion_smoothness", "colour", "mean"} <= set(row["measures"])
        assert f"| {row['row']} |" in text and f"<td>{row['row']}</td>" in page
    assert len({row["measures"]["psnr"]["mean"] for row in others}) == 3, "three settings, three results"
    for name, cost in report["costs"].items():
        assert cost["seconds_per_step"] > 0 and cost["calls_per_step"] == 2 and cost["peak_gpu_bytes"] is None
        linears = cost["linears"]
        assert (linears is None) == (name == "original")
        assert linears is None or (linears["in_4_bits"], linears["in_high_precision"]) == (20, 12)
    assert "Memory was not measured" in text and "LPIPS: the package lpips is not installed" in text
    assert "arXiv 2605.26628" in text
    assert "| published:" not in text, "the judge's numbers are not VBench's"
    with Image.open(out / "contact_sheet.png") as sheet:
        assert sheet.height > 2 * 4 * 128  # two prompts, four videos


def test_a_run_goes_on_with_what_is_missing_and_a_finished_one_loads_nothing(ran, pipeline, monkeypatch):
    protocol, out = ran
    (out / "report.md").unlink()
    opened, load = [], run.open_pipeline
    monkeypatch.setattr(run, "open_pipeline", lambda *args: opened.append(args) or load(*args))
    assert reproduce(pipeline, protocol, out).exit_code == 0
    assert not opened and (out / "report.md").exists()
    first, second = clip_files(load_protocol(str(protocol)), out / "clips" / "naive")
    before, written = second.frames(), first.path.stat().st_mtime_ns
    second.path.unlink()
    assert reproduce(pipeline, protocol, out).exit_code == 0
    assert len(opened) == 1 and np.array_equal(second.frames(), before)
    assert first.path.stat().st_mtime_ns == written


def test_a_clip_that_is_stopped_leaves_no_file(tmp_path, monkeypatch):
    protocol = load_protocol(str(protocol_file(tmp_path)))
    files = clip_files(protocol, tmp_path / "clips")
    video = np.linspace(0, 1, 2 * 3 * 3 * 3, dtype=np.float32).reshape(2, 3, 3, 3)

    asked = []

    def generate(pipe, prompts, arguments, *, seed, label, overall):
        asked.extend(prompts)
        if prompts == [files[1].text] and not (tmp_path / "stopped").exists():
            (tmp_path / "stopped").touch()
            raise KeyboardInterrupt
        steps = [StepTime(0.5, "transformer", True, True), StepTime(0.25, "transformer", False, False)]
        return Run([video * np.nan if prompts == [files[1].text] else video], steps, 2)

    monkeypatch.setattr(clips, "generate", generate)
    with pytest.raises(KeyboardInterrupt):
        clips.generate_missing(None, protocol, files, "")
    assert [path.name for path in (tmp_path / "clips").iterdir()] == ["p0000_s0.npz"]
    clips.generate_missing(None, protocol, files, "")
    assert asked == [files[0].text, files[1].text, files[1].text]
    assert np.abs(files[0].frames() - video).max() <= 0.5 / 255 + 1e-7
    assert np.isnan(files[1].frames()).all(), "a clip that was not finite stays a failure"
    run_of_both, peak = clips.run_of(files)
    assert run_of_both.measured() == [0.25, 0.25] and run_of_both.calls_per_step == 2
    assert (peak > 0) == torch.cuda.is_available()


def test_another_protocol_or_model_in_the_same_folder_is_refused(ran, pipeline, tmp_path):
    _, out = ran
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    changed = protocol_file(tmp_path, generate={**CALL, "num_inference_steps": 5, "guidance_scale": 3.0})
    result = reproduce(pipeline, changed, out)
    assert result.exit_code == 2
    assert 'generate was {"guidance_scale_2": 2.0, "negative_prompt": "", "num_inference_steps": 4}' in result.output
    assert 'is {"num_inference_steps": 5}. Name another folder with -o' in " ".join(result.output.split())
    result = reproduce(settings.PIPELINE_DIR, protocol_file(tmp_path), out)
    assert result.exit_code == 2 and "model was" in result.output
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def lora(path: Path, expert: str) -> Path:
    """Write a LoRA of rank 4 for the first queries of an expert, as diffusers writes one."""
    dim = 192
    generator = torch.Generator().manual_seed(len(expert))
    weights = {
        "transformer.blocks.0.attn1.to_q.lora_A.weight": torch.randn(4, dim, generator=generator),
        "transformer.blocks.0.attn1.to_q.lora_B.weight": torch.randn(dim, 4, generator=generator),
    }
    save_file(weights, path)
    return path


@pytest.mark.slow
def test_a_student_of_4_steps_is_calibrated_as_it_runs(pipeline, tmp_path, monkeypatch):
    parts = [{"path": str(lora(tmp_path / f"{e}.safetensors", e)), "expert": e} for e in EXPERTS]
    protocol = load_protocol(
        str(
            protocol_file(
                tmp_path,
                prompts=["a large red circle moving right"],
                generate={**CALL, "guidance_scale": 1.0},
                calibration={"prompts": ["a large yellow circle moving left"], "step_groups": 4},
                scheduler={"class": "FlowMatchEulerDiscreteScheduler", "shift": 5.0},
                lora=[{**part, "scale": 0.5} for part in parts],
            )
        )
    )
    taken = []
    take = run.Device.take
    monkeypatch.setattr(run.Device, "take", lambda self, pipe: taken.append(pipe) or take(self, pipe))
    made = run.generate_all(protocol, pipeline, tmp_path / "out", run.Device("cpu", inductor=False), [NAIVE])
    original, packed = taken
    plain = load_pipeline(pipeline, torch.float32, "cpu")
    for expert, part in zip(EXPERTS, parts, strict=True):
        a, b = (tensor for _, tensor in sorted(load_file(part["path"]).items()))
        before, fused, hif4 = (getattr(p, expert).blocks[0].attn1.to_q for p in (plain, original, packed))
        assert torch.allclose(fused.weight - before.weight, 0.5 * b @ a, atol=1e-4)
        assert type(fused) is torch.nn.Linear, "nothing is beside it"
        assert isinstance(hif4, tahf4.HiF4Linear)
    assert type(original.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
    with tahf4.calibrate(original, step_groups=4, checkpoint=tmp_path / "out" / "calibration.safetensors") as seen:
        pass
    cells = {cell for statistics in seen.activations.values() for cell in statistics.cells}
    assert {branch for _, branch in cells} == {"cond"}, "guidance 1 has one branch"
    assert {group for group, _ in cells} == {0, 1, 2, 3}, "each of the four steps is a group"
    steps, calls, _ = made[NAIVE][0].cost()
    assert (len(steps), calls) == (4, 1) and {step.expert for step in steps} == set(EXPERTS)


def test_a_lora_or_a_setting_of_something_else_is_refused(pipeline, tmp_path):
    for name, message in (("transformer.other", "does not load"), ("unet.to_q", "none of its tensors belongs to this")):
        weights = {f"{name}.lora_{side}.weight": torch.zeros(4, 4) for side in "AB"}
        save_file(weights, tmp_path / "a.safetensors")
        protocol = protocol_file(tmp_path, lora=[{"path": "a.safetensors"}])
        result = reproduce(pipeline, protocol, tmp_path / "out")
        assert result.exit_code == 2 and message in result.output, result.output
        shutil.rmtree(tmp_path / "out")
    protocol = protocol_file(tmp_path, scheduler={"class": "FlowMatchEulerDiscreteScheduler", "flow_shift": 5.0})
    result = reproduce(pipeline, protocol, tmp_path / "other")
    assert result.exit_code == 2 and "scheduler.flow_shift is no setting of FlowMatchEuler" in result.output
    (tmp_path / "file").touch()
    result = reproduce(pipeline, protocol_file(tmp_path), tmp_path / "file")
    assert result.exit_code == 2 and "cannot write" in result.output


@pytest.mark.slow
def test_image_to_video_starts_from_the_image_of_each_prompt(pipeline, tmp_path):
    pipe = load_pipeline(pipeline, torch.float32, "cpu")
    models = {}
    for name, model in experts(pipe).items():
        # Latents, the condition and a mask.
        models[name] = WanTransformer3DModel.from_config({**model.config, "in_channels": 16 + 16 + 2})
    parts = {name: getattr(pipe, name) for name in ("tokenizer", "text_encoder", "vae", "scheduler")}
    WanImageToVideoPipeline(**parts, **models, boundary_ratio=0.75).save_pretrained(tmp_path / "pipe")
    prompts = []
    for name, colour in (("red", (255, 0, 0)), ("blue", (0, 0, 255)), ("green", (0, 255, 0))):
        Image.new("RGB", (32, 32), colour).save(tmp_path / f"{name}.png")
        prompts.append({"prompt": f"a large {name} circle moving right", "image": f"{name}.png"})
    protocol = protocol_file(
        tmp_path, prompts=prompts[:2], calibration={"prompts": prompts[2:], "step_groups": 2},
        generate={**CALL, "guidance_scale": 1.0},
    )  # fmt: skip
    read, folder, device = load_protocol(str(protocol)), tmp_path / "pipe", run.Device("cpu", inductor=False)
    check_fits(read, structure(folder))
    run.check_same_run(read, folder, tmp_path / "out", device)
    red, _ = run.generate_all(read, folder, tmp_path / "out", device, [])[run.ORIGINAL]
    before = red.frames()
    pipe = Prompted(open_pipeline(folder, read), read)
    with tahf4.calibrate(pipe, options={"inductor": False}) as calibration:
        calibration.run([read.calibration_prompts[0].text], **read.generate, output_type="latent")
    assert set(calibration.models) == set(EXPERTS)
    Image.new("RGB", (32, 32)).save(tmp_path / "red.png")
    with pytest.raises(CommandError, match="prompts was"):  # another image is another protocol
        run.check_same_run(read, folder, tmp_path / "out", device)
    red.path.unlink()
    run.generate_all(read, folder, tmp_path / "out", device, [])
    assert not np.array_equal(red.frames(), before)
