"""The demo compares a pipeline with itself in W4A4, counts what is there, and leaves no half results."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from PIL import Image
from tahf4_compiler.tools import comparison, demo
from tahf4_compiler.tools.cli import app
from tahf4_compiler.tools.comparison import as_asked, compare
from tahf4_compiler.tools.errors import CommandError
from tahf4_compiler.tools.generation import Run, StepTime, experts, load_pipeline
from tahf4_compiler.tools.plans import count_graphs, expert_plan, read_plans
from tahf4_compiler.tools.staging import staged
from tahf4_compiler.tools.tiny_wan import data, model
from torch import nn
from typer.testing import CliRunner

PROMPT = "a large red circle moving right"
SMALL = {
    "height": 16,
    "width": 16,
    "num_frames": 5,
    "num_inference_steps": 3,
    "max_sequence_length": 8,
    "guidance_scale": 2.0,
}
"""Three steps: two of the high-noise expert, one of the low-noise expert."""

runner = CliRunner(env={"COLUMNS": "200", "TERM": "dumb", "TAHF4_DEBUG": ""})


def expert() -> WanTransformer3DModel:
    return WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=2,
        attention_head_dim=64,
        in_channels=model.LATENT_CHANNELS,
        out_channels=model.LATENT_CHANNELS,
        text_dim=model.TEXT_DIM,
        freq_dim=64,
        ffn_dim=256,
        num_layers=2,
        rope_max_seq_len=32,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A saved pipeline with random weights, other ones in each expert."""
    torch.manual_seed(0)
    tokenizer = model.build_tokenizer()
    pipe = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=model.build_text_encoder(len(tokenizer)),
        vae=model.build_vae(),
        scheduler=model.build_scheduler(),
        transformer=expert(),
        transformer_2=expert(),
        boundary_ratio=model.BOUNDARY_RATIO,
    )
    path = tmp_path_factory.mktemp("pipeline")
    pipe.save_pretrained(path)
    return path


def arguments(folder: Path, out: Path, *more: str) -> list[str]:
    size = ["--height", "16", "--width", "16", "--frames", "5", "--steps", "3"]
    return ["demo", str(folder), "-o", str(out), "--prompt", PROMPT, *size, "--no-inductor", *more]


@pytest.fixture(scope="module")
def ran(folder, tmp_path_factory):
    """What the command printed, and the folder that it wrote to."""
    out = tmp_path_factory.mktemp("demo") / "out"
    result = runner.invoke(app, arguments(folder, out, "--dtype", "float32", "--keep", r"blocks\.0\.ffn"))
    assert result.exit_code == 0, result.output
    return result.output, out, json.loads((out / "results.json").read_text())


def test_the_demo_writes_a_video_a_contact_sheet_the_numbers_and_the_dumps(ran):
    _, out, results = ran
    assert sorted(path.name for path in out.iterdir()) == [
        "01_a_large_red_circle_moving_right.gif",
        "contact_sheet.png",
        "dumps",
        "results.json",
    ]
    with Image.open(out / results["prompts"][0]["video"]) as gif:
        assert gif.n_frames == 5
    with Image.open(out / results["contact_sheet"]) as sheet:
        assert sheet.format == "PNG"
    assert read_plans(out / "dumps")


def test_every_linear_of_both_experts_is_counted_once(ran, folder):
    _, _, results = ran
    weights = results["weights"]
    parts = [expert(), expert()]
    linears = [m for part in parts for m in part.modules() if isinstance(m, nn.Linear)]
    assert weights["linears"] == len(linears)
    assert weights["bytes_before"] == sum(m.weight.numel() * 4 for m in linears)
    assert [part["name"] for part in weights["experts"]] == ["transformer", "transformer_2"]


def test_bytes_after_are_36_for_each_64_weights_in_4_bits(ran):
    _, _, results = ran
    # Each of two blocks has ten linears; two of the first block are kept.
    assert [part["quantized"] for part in results["weights"]["experts"]] == [18, 18]
    shapes = {name: m.weight.shape for name, m in expert().named_modules() if isinstance(m, nn.Linear)}
    part = results["weights"]["experts"][0]
    expected = sum(
        n * k * 4 if name in part["high_precision"] else n * (k // 64) * 36 for name, (n, k) in shapes.items()
    )
    assert part["bytes_after"] == expected


def test_kept_linears_carry_their_reason(ran):
    _, _, results = ran
    kept = results["weights"]["experts"][1]["high_precision"]
    assert "matches" in kept["blocks.0.ffn.net.2"]
    assert "boundary" in kept["proj_out"]


def test_results_hold_all_numbers(ran):
    _, _, results = ran
    entry = results["prompts"][0]
    assert (entry["prompt"], entry["seed"], entry["identical"]) == (PROMPT, 0, False)
    assert entry["psnr_db"] > 20
    assert entry["original_as_asked"] is None  # not the size of the tiny pipeline's clips
    seconds = results["seconds"]
    assert seconds["per_step_original"] > 0
    assert seconds["per_step_w4a4"] > 0
    assert seconds["compile"] > 0
    assert seconds["model_calls_per_step"] == 2
    assert results["dtype"] == "float32"
    assert results["options"] == {"keep": [r"blocks\.0\.ffn"], "inductor": False}
    assert results["arguments"]["num_inference_steps"] == 3
    assert results["kernels"]


def test_the_table_says_that_reference_kernels_are_slower(ran):
    output, _, results = ran
    assert ("slower than the original" in output) == ("reference" in results["kernels"])
    assert f"{results['prompts'][0]['psnr_db']:.1f} dB" in output
    assert f"{results['weights']['bytes_after']:,}" in output


@pytest.mark.slow
def test_each_expert_runs_with_its_own_weights(folder, tmp_path):
    pipe = load_pipeline(folder, torch.float32, "cpu")
    dump_dir = str(tmp_path / "dumps")
    options = {"dump_dir": dump_dir, "inductor": False}
    together = compare(pipe, [PROMPT], SMALL, seed=3, options=options).w4a4
    assert {step.expert for step in together.steps} == {"transformer", "transformer_2"}

    def generate(second: str) -> np.ndarray:
        torch._dynamo.reset()
        pipe = load_pipeline(folder, torch.float32, "cpu")
        pipe.transformer_2 = getattr(pipe, second)
        for i, module in enumerate({id(m): m for m in experts(pipe).values()}.values()):
            own = {"inductor": False, "dump_dir": str(tmp_path / f"{second}{i}")}  # so no code is shared
            module.compile(backend="tahf4", options=own)
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(3)
        return pipe(PROMPT, generator=generator, output_type="np", **SMALL).frames[0]

    assert np.array_equal(together.videos[0], generate("transformer_2"))
    assert np.abs(together.videos[0] - generate("transformer")).max() > 0.01


@pytest.mark.slow
def test_an_expert_that_did_not_run_is_not_counted(folder, tmp_path):
    pipe = load_pipeline(folder, torch.bfloat16, "cpu")
    options = {"dump_dir": str(tmp_path), "inductor": False}
    outcome = compare(pipe, [PROMPT], {**SMALL, "num_inference_steps": 1}, seed=0, options=options)
    assert [plan.name for plan in outcome.plans] == ["transformer"]
    assert outcome.original.seconds_per_step() is None
    assert outcome.as_json()["seconds"]["per_step_w4a4"] is None


@pytest.mark.slow
def test_a_pipeline_with_one_transformer_runs(folder, tmp_path):
    pipe = load_pipeline(folder, torch.float32, "cpu")
    pipe.register_to_config(boundary_ratio=None)
    pipe.transformer_2 = None
    options = {"dump_dir": str(tmp_path), "inductor": False}
    outcome = compare(pipe, [PROMPT], {**SMALL, "guidance_scale": 1.0}, seed=0, options=options)
    assert [plan.name for plan in outcome.plans] == ["transformer"]
    assert outcome.w4a4.calls_per_step == 1
    assert [step.expert for step in outcome.w4a4.steps] == ["transformer"] * 3


@pytest.mark.parametrize("pattern, message", [("nothing", "matches none"), ("(", "not a regular expression")])
def test_a_wrong_keep_pattern_is_refused_before_anything_is_generated(folder, tmp_path, monkeypatch, pattern, message):
    monkeypatch.setattr(comparison, "generate", lambda *args, **kwargs: pytest.fail("generated"))
    result = runner.invoke(app, arguments(folder, tmp_path / "out", "--keep", pattern))
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "index, message",
    [
        (None, "no model_index.json"),
        ('{"_class_name": "FluxPipeline"}', "is a FluxPipeline; expected a WanPipeline"),
        ("[1", "names no pipeline class"),
        ("{}", "names no pipeline class"),
        ('{"_class_name": "WanPipeline", "vae": ["diffusers", "AutoencoderKLWan"]}', "does not load"),
    ],
)
def test_a_folder_that_is_no_pipeline_is_refused(tmp_path, index, message):
    path = tmp_path / "model"
    path.mkdir()
    if index is not None:
        (path / "model_index.json").write_text(index)
    result = runner.invoke(app, ["demo", str(path), "-o", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert message in result.output


def test_an_out_that_is_a_file_is_refused(folder, tmp_path):
    (tmp_path / "out").write_text("mine")
    result = runner.invoke(app, arguments(folder, tmp_path / "out"))
    assert result.exit_code == 2
    assert "cannot write to the folder" in result.output
    assert (tmp_path / "out").read_text() == "mine"


def test_an_interrupted_demo_leaves_the_former_results_as_they_were(folder, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    (tmp_path / "dumps").mkdir()
    (tmp_path / "dumps" / "former").write_text("former")
    monkeypatch.setattr(demo, "_write", interrupted)
    monkeypatch.setattr(comparison, "compare", lambda *args, **kwargs: None)
    result = runner.invoke(app, arguments(folder, tmp_path))
    assert result.exit_code != 0
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == ["dumps", "dumps/former"]


def test_staged_results_replace_former_ones_and_leave_the_rest(tmp_path):
    for name in ("dumps/old", "notes.txt", "results.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("former")
    with staged(tmp_path) as stage:
        (stage / "dumps").mkdir()
        (stage / "dumps" / "new").touch()
        (stage / "results.json").write_text("now")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dumps", "notes.txt", "results.json"]
    assert [path.name for path in (tmp_path / "dumps").iterdir()] == ["new"]
    assert (tmp_path / "results.json").read_text() == "now"


def entry(module: str, n: int, k: int, decision: str = "hif4") -> dict:
    after = n * k * 36 // 64 if decision == "hif4" else 2 * n * k
    return {"module": module, "n": n, "k": k, "decision": decision, "reason": "", "kernel": "reference"} | {
        "bytes_before": 2 * n * k,
        "bytes_after": after,
    }


def test_a_weight_in_several_graphs_counts_once_and_of_another_model_not_at_all():
    module = nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 64))
    plans = [entry("0", 128, 64), entry("1", 64, 128), entry("0", 128, 64), entry("0", 256, 64), entry("2", 1, 1)]
    counted = expert_plan("transformer", module, plans).as_json()
    assert (counted["linears"], counted["quantized"]) == (2, 2)
    assert counted["bytes_before"] == 2 * 2 * 64 * 128


def test_a_run_without_compiled_graphs_is_an_error(tmp_path):
    assert count_graphs(tmp_path) == 0
    with pytest.raises(CommandError, match="TORCH_COMPILE_DISABLE"):
        read_plans(tmp_path)


def test_first_steps_are_not_measured_and_their_excess_is_compile_time():
    run = Run(
        steps=[
            StepTime(9.0, "transformer", first_of_clip=True, first_call=True),
            StepTime(1.0, "transformer", first_of_clip=False, first_call=False),
            StepTime(4.0, "transformer_2", first_of_clip=False, first_call=True),
            StepTime(2.0, "transformer_2", first_of_clip=False, first_call=False),
            StepTime(7.0, "transformer", first_of_clip=True, first_call=False),
            StepTime(1.0, "transformer_2", first_of_clip=False, first_call=False),
        ]
    )
    assert run.measured() == [1.0, 2.0, 1.0]
    assert run.seconds_per_step() == 1.0
    assert run.first_call_seconds() == 8.0 + 3.0


def test_clips_of_the_tiny_pipeline_are_judged_against_their_caption():
    caption = data.Caption("large", "red", "circle", "right")
    clip, _ = data.render(caption, np.random.default_rng(0))
    video = clip.permute(1, 2, 3, 0).numpy()
    verdict = as_asked(str(caption), video)
    assert verdict is not None
    assert all(verdict.values())
    wrong = as_asked("a large blue circle moving left", video)
    assert wrong is not None
    assert (wrong["colour"], wrong["shape"], wrong["direction"]) == (False, True, False)


def test_other_prompts_and_sizes_are_not_judged():
    assert as_asked("a cat", np.zeros((9, 64, 64, 3))) is None
    assert as_asked(PROMPT, np.zeros((9, 32, 32, 3))) is None


def test_the_example_prompts_are_captions_of_the_tiny_pipeline():
    assert set(demo.PROMPTS) <= {str(caption) for caption in data.all_captions()}


def test_a_size_that_the_pipeline_refuses_is_one_message(tmp_path):
    from tahf4_compiler.tools.cli import app
    from typer.testing import CliRunner

    arguments = ["demo", "--height", "33", "--steps", "1", "--no-inductor", "--prompt", "x", "-o", str(tmp_path / "o")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "the pipeline refuses these arguments" in result.output
    assert not (tmp_path / "o").exists()
