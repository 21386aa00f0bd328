"""A protocol is read whole, or refused with what is wrong and what to do."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
import yaml
from PIL import Image
from tahf4_compiler.tools.cli import app
from tahf4_compiler.tools.errors import CommandError
from tahf4_compiler.tools.reproduction import model as pipelines
from tahf4_compiler.tools.reproduction.estimate import estimate
from tahf4_compiler.tools.reproduction.model import check_fits, local_folder, structure
from tahf4_compiler.tools.reproduction.protocol import SHIPPED, Prompt, load_protocol, parse_protocol
from tahf4_compiler.tools.reproduction.report import published
from tahf4_compiler.tools.tiny_wan import settings
from typer.testing import CliRunner

runner = CliRunner(env={"COLUMNS": "200", "TERM": "dumb", "TAHF4_DEBUG": ""})
DOCS = Path(__file__).parents[3] / "docs"
GENERATE = {"height": 480, "width": 832, "num_frames": 81, "num_inference_steps": 40, "guidance_scale": 4.0}
GOOD = {"prompts": ["a cat"], "generate": GENERATE, "calibration": {"prompts": ["a dog"]}}


def config(folder: Path, part: str, **values: object) -> None:
    (folder / part).mkdir(parents=True, exist_ok=True)
    (folder / part / "config.json").write_text(json.dumps(values))


@pytest.fixture
def a14b(tmp_path: Path) -> Path:
    """The configuration of Wan2.2 A14B without its weights, as text to video."""
    index = {"_class_name": "WanPipeline", "boundary_ratio": 0.875, "expand_timesteps": False}
    index["scheduler"] = ["diffusers", "UniPCMultistepScheduler"]
    for part in ("transformer", "transformer_2"):
        config(
            tmp_path, part, _class_name="WanTransformer3DModel", num_layers=40, num_attention_heads=40,
            attention_head_dim=128, ffn_dim=13824, in_channels=16, out_channels=16, patch_size=[1, 2, 2],
        )  # fmt: skip
    text = {"d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_heads": 64, "num_layers": 24, "vocab_size": 256384}
    config(tmp_path, "text_encoder", **text)
    config(tmp_path, "vae", _class_name="AutoencoderKLWan", scale_factor_spatial=8, scale_factor_temporal=4)
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    return tmp_path


def test_the_protocols_that_ship_are_valid(a14b):
    assert {path.stem for path in SHIPPED.glob("*.yaml")} == {"tiny", "wan2.2-t2v-a14b", "wan2.2-ti2v-5b"}
    for path in SHIPPED.glob("*.yaml"):
        assert len(load_protocol(path.stem).prompts) >= 4
    protocol = load_protocol("wan2.2-t2v-a14b")
    found = structure(a14b)
    check_fits(protocol, found)
    assert found.tokens(protocol) == 32760  # of 81 frames at 480p, as in the roofline
    assert (protocol.steps, protocol.calls, protocol.scorer, len(protocol.clips())) == (40, 2, "vbench", 8)
    check_fits(load_protocol("tiny"), structure(settings.PIPELINE_DIR))


def test_the_examples_of_the_page_are_valid(tmp_path):
    blocks = re.findall(r"```yaml\n(.*?)```", (DOCS / "reproduce.md").read_text(), re.DOTALL)
    assert len(blocks) >= 3
    Image.new("RGB", (16, 16)).save(tmp_path / "first.png")
    (tmp_path / "student").mkdir()
    for name in ("high", "low"):
        (tmp_path / "student" / f"{name}_noise_model.safetensors").touch()
    base = yaml.safe_load((SHIPPED / "wan2.2-t2v-a14b.yaml").read_text())
    for block in blocks:
        parse_protocol({**base, **yaml.safe_load(block)}, tmp_path / "example.yaml")


def test_a_student_is_an_option(tmp_path):
    (tmp_path / "lora.safetensors").write_bytes(b"x")
    student = {
        "generate": {**GENERATE, "num_inference_steps": 4, "guidance_scale": 1},
        "lora": [{"path": "lora.safetensors"}, {"path": "someone/student", "expert": "transformer_2", "scale": 0.5}],
        "scheduler": {"class": "FlowMatchEulerDiscreteScheduler", "shift": 5.0},
    }
    protocol = parse_protocol({**GOOD, **student}, tmp_path / "a.yaml")
    assert (protocol.steps, protocol.calls) == (4, 1)
    first, second = protocol.lora
    assert first.local() == tmp_path / "lora.safetensors" and second.local() is None
    before = protocol.fingerprint()
    (tmp_path / "lora.safetensors").write_bytes(b"y")
    assert protocol.fingerprint() != before, "other weights under the same name are another protocol"
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "lora.safetensors").rename(tmp_path / "elsewhere" / "lora.safetensors")
    elsewhere = parse_protocol({**GOOD, **student}, tmp_path / "elsewhere" / "a.yaml")
    moved = dataclasses.replace(protocol, lora=elsewhere.lora)
    (tmp_path / "elsewhere" / "lora.safetensors").write_bytes(b"x")
    assert moved.fingerprint() == before, "the same weights elsewhere are the same protocol"


def test_prompts_come_from_a_text_file_too(tmp_path):
    (tmp_path / "list.txt").write_text("a cat\n\n a bird \n")
    protocol = parse_protocol({**GOOD, "prompts": "list.txt"}, tmp_path / "a.yaml")
    assert protocol.prompts == (Prompt("a cat"), Prompt("a bird"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": None}, "prompts is missing; expected a list"),
        ({"prompts": []}, "expected a list of at least one"),
        ({"prompts": "none.txt"}, "none.txt, which is not there"),
        ({"prompts": ["a", "a"]}, "holds 'a' twice"),
        ({"prompts": [3]}, "prompts holds 3; expected a text"),
        ({"prompts": [{"prompt": "a", "image": "no.png"}]}, "no.png, which does not open"),
        ({"prompts": [{"prompt": "a", "image": "latin.txt"}]}, "latin.txt, which does not open"),
        ({"prompts": "latin.txt"}, "which is no text in UTF-8"),
        ({"lora": [{"path": "no/lora.safetensors"}]}, "no/lora.safetensors, which is not there"),
        ({"lora": [{"path": "folder", "weight_name": "a"}]}, "folder/a, which is not there"),
        ({"prompts": [{"prompt": "a", "picture": "b"}]}, "prompts.picture is unknown; expected prompt, image"),
        ({"prompts": ["a dog"]}, "'a dog' is scored and calibrated with"),
        ({"calibration": {}}, "calibration.prompts is missing"),
        ({"calibration": {"prompts": ["a dog"], "step_groups": 41}}, "expected at most 40"),
        ({"dimensions": ["beauty"]}, "dimensions has 'beauty'; expected one of subject_consistency"),
        ({"scorer": "me"}, "scorer has 'me'; expected one of vbench, judge"),
        ({"scorer": "judge"}, "knows only captions of the tiny pipeline, not 'a cat'"),
        ({"seeds": [1, 1]}, "expected distinct numbers"),
        ({"seeds": [-1]}, "seeds is -1; expected a whole number, at least 0"),
        ({"generate": {"height": 480}}, "generate has no width"),
        ({"generate": {**GENERATE, "height": 480.5}}, "generate.height is 480.5; expected a whole number"),
        ({"generate": {**GENERATE, "guidance_scale": "high"}}, "guidance_scale is 'high'"),
        ({"generate": {**GENERATE, "prompt": "x"}}, "generate.prompt is set by the command"),
        ({"lora": [{"scale": 1}]}, "lora has the path None"),
        ({"lora": [{"path": "a/b", "expert": "third"}]}, "lora.expert has 'third'"),
        ({"scheduler": "Euler"}, "scheduler is 'Euler'; expected settings"),
        ({"generate": {**GENERATE, "guidance_scale": math.nan}}, "guidance_scale is nan; expected a finite number, at"),
        ({"generate": {**GENERATE, "guidance_scale_2": -3.0}}, "guidance_scale_2 is -3.0; expected a finite number"),
        ({"generate": {**GENERATE, "other": [math.inf]}}, "generate.other is [inf]; expected texts, finite numbers"),
        ({"scheduler": {"shift": math.nan}}, "scheduler.shift is nan; expected texts, finite numbers"),
        ({"lora": [{"path": "a/b", "scale": math.inf}]}, "lora.scale is inf; expected a finite number"),
        ({"lora": "a.safetensors"}, "lora is 'a.safetensors'; expected a list"),
        ({"dtype": "fp8"}, "dtype has 'fp8'"),
        ({"steps": 4}, "steps is unknown; expected about, prompts"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, change, message):
    (tmp_path / "latin.txt").write_bytes("a café".encode("latin-1"))
    (tmp_path / "folder").mkdir()
    with pytest.raises(CommandError, match=re.escape(message)) as raised:
        parse_protocol({**GOOD, **change}, tmp_path / "mine.yaml")
    assert "mine.yaml" in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "is no YAML"),
        ("- a", "the file is ['a']; expected keys"),
        ("seeds: [0]\nseeds: [1]", "the key 'seeds' stands twice"),
        ("generate: {height: 1, <<: {height: 2}, height: 3}", "the key 'height' stands twice"),
    ],
)
def test_a_file_that_is_no_protocol_is_refused(tmp_path, text, message):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(CommandError, match=re.escape(message)):
        load_protocol(str(tmp_path / "a.yaml"))
    with pytest.raises(CommandError, match="those that ship: tiny, wan2.2-t2v-a14b, wan2.2-ti2v-5b"):
        load_protocol("wan")


def test_a_key_may_stand_beside_one_that_it_is_merged_over(tmp_path):
    sizes = "height: 480, num_frames: 81, num_inference_steps: 40, guidance_scale: 1"
    text = f"generate: {{<<: {{{sizes}, width: 16}}, width: 832}}\nprompts: [a]\ncalibration: {{prompts: [b]}}"
    (tmp_path / "a.yaml").write_text(text)
    assert load_protocol(str(tmp_path / "a.yaml")).generate["width"] == 832


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"height": 481}, "generate.height is 481; expected a multiple of 16, such as 480"),
        ({"num_frames": 80}, "num_frames is 80; expected one more than a multiple of 4, such as 77"),
        ({"speed": 2}, "generate.speed is no argument of WanPipeline"),
    ],
)
def test_sizes_that_the_model_does_not_have_are_refused(tmp_path, a14b, sizes, message):
    protocol = parse_protocol({**GOOD, "generate": {**GENERATE, **sizes}}, tmp_path / "a.yaml")
    with pytest.raises(CommandError, match=re.escape(message)):
        check_fits(protocol, structure(a14b))


def test_a_protocol_of_another_kind_of_model_is_refused(tmp_path, a14b):
    found = structure(a14b)
    protocol = parse_protocol(GOOD, tmp_path / "a.yaml")
    one = dataclasses.replace(found, index={**found.index, "boundary_ratio": None})
    two_scales = dataclasses.replace(protocol, generate={**GENERATE, "guidance_scale_2": 3.0})
    with pytest.raises(CommandError, match="for a second expert, and this pipeline has one"):
        check_fits(two_scales, one)
    with pytest.raises(CommandError, match="the prompt 'a cat' has none; write it as {prompt: TEXT, image: FILE}"):
        check_fits(protocol, dataclasses.replace(found, pipeline="WanImageToVideoPipeline"))
    with_image = dataclasses.replace(protocol, prompts=(Prompt("a cat", tmp_path / "a.png"),))
    with pytest.raises(CommandError, match="takes no image"):
        check_fits(with_image, found)
    with pytest.raises(CommandError, match="expected a scheduler of diffusers"):
        check_fits(dataclasses.replace(protocol, scheduler={"class": "WanPipeline"}), found)
    check_fits(dataclasses.replace(protocol, scheduler={"flow_shift": 3.0}), found)
    with pytest.raises(CommandError, match="scheduler.shift is no setting of UniPCMultistepScheduler; expected .*flow"):
        check_fits(dataclasses.replace(protocol, scheduler={"shift": 3.0}), found)
    euler = {"class": "FlowMatchEulerDiscreteScheduler", "shft": 3.0}
    with pytest.raises(CommandError, match="scheduler.shft is no setting of FlowMatchEuler"):
        check_fits(dataclasses.replace(protocol, scheduler=euler), found)


def test_a_folder_that_is_no_wan_pipeline_is_refused(tmp_path, monkeypatch):
    with pytest.raises(CommandError, match="there is no folder"):
        local_folder(str(tmp_path / "none"), weights=True)
    with pytest.raises(CommandError, match="it has no model_index.json"):
        structure(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(CommandError, match="is a FluxPipeline; expected WanPipeline or WanImageToVideoPipeline"):
        structure(tmp_path)

    def offline(name: str) -> str:
        raise OSError("no network")

    monkeypatch.setattr(pipelines.diffusers.DiffusionPipeline, "download", offline)
    with pytest.raises(CommandError, match="the hub does not give it: no network"):
        local_folder("Wan-AI/Wan2.2-T2V-A14B-Diffusers", weights=True)
    monkeypatch.setattr(pipelines.diffusers.DiffusionPipeline, "download", lambda name: str(tmp_path / name[:3]))
    assert local_folder("Wan-AI/Wan2.2-T2V-A14B-Diffusers", weights=True) == tmp_path / "Wan"


def test_a_dry_run_computes_from_shapes_and_loads_nothing(a14b, monkeypatch):
    from tahf4_compiler.tools.reproduction import run

    monkeypatch.setattr(run, "open_pipeline", lambda *args: pytest.fail("loaded"))
    result = runner.invoke(app, ["reproduce", str(a14b), "--dry-run", "-o", str(a14b / "out")])
    assert result.exit_code == 0, result.output
    text = result.output
    assert "**Computed, not measured**" in text and not (a14b / "out").exists()
    assert "800 of 812 linears are in 4 bits, 12 stay" in text
    # 57.2 GB of experts, 11.4 of the text encoder, 0.5 of the autoencoder: docs/tutorial_wan.md has the same.
    assert "the original in bfloat16, text encoder and autoencoder | 69 |" in text
    assert "recipes: the packed weights that reconstruction makes | 15.8 |" in text
    # 8 clips of 40 steps of 3.61 s, then 24 of 3.17 s, after 4 clips of calibration: docs/roofline.md.
    row = next(line for line in text.splitlines() if line.startswith("| H100"))
    assert [cell.strip() for cell in row.split("|")[2:-1]] == ["3.61", "3.17", "0.16", "0.32", "0.84", "1.3"]
    half = dataclasses.replace(
        load_protocol("wan2.2-t2v-a14b"), generate={**load_protocol("wan2.2-t2v-a14b").generate, "guidance_scale": 1.0}
    )
    assert "| H100 SXM | 1.8 | 1.58 |" in estimate(half, structure(a14b), 3), "one call a step"


def test_published_figures_have_a_source():
    figures = published()
    assert all(entry["source"] and entry["model"] for entry in figures)
    paper = next(entry for entry in figures if "2605.26628" in entry["source"])
    assert paper["rows"]["BF16"] == {"mean": 0.68, "subject_consistency": 0.9331, "motion_smoothness": 0.9923}
    assert paper["rows"]["W4A4"]["subject_consistency"] == 0.5324
