"""``tahf4 calibrate`` and ``tahf4 evaluate`` on the shipped pipeline, small."""

from __future__ import annotations

import json

import pytest
import torch
from tahf4_compiler.tools.cli import app
from tahf4_compiler.tools.evaluation.rows import ROWS, Row
from tahf4_compiler.tools.evaluation.run import Plan, evaluate_variant, files_of, home_of
from tahf4_compiler.tools.generation import experts, load_pipeline
from tahf4_compiler.tools.tiny_wan import settings
from typer.testing import CliRunner

import tahf4_compiler as tahf4

runner = CliRunner(env={"COLUMNS": "200", "TERM": "dumb", "TAHF4_DEBUG": ""})
PROMPTS = ["a large red circle moving right", "a small blue square moving left"]


@pytest.fixture(scope="module", autouse=True)
def _one_block(tmp_path_factory):
    """The shipped pipeline with one block of four: tracing and measuring it takes a quarter of the time."""
    pipe, folder = pipeline(), tmp_path_factory.mktemp("pipeline")
    for model in experts(pipe).values():
        model.blocks = model.blocks[:1]
        model.register_to_config(num_layers=1)
    pipe.save_pretrained(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(settings, "PIPELINE_DIR", folder)
        yield


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(["", *PROMPTS, PROMPTS[0], "  "]))
    return path


def pipeline():
    return load_pipeline(settings.PIPELINE_DIR, torch.float32, "cpu")


def test_calibrate_writes_a_recipe_that_applies(tmp_path, prompts, monkeypatch):
    out = tmp_path / "recipe.safetensors"
    arguments = ["calibrate", str(settings.PIPELINE_DIR), "--prompts", str(prompts), "-o", str(out), "--steps", "4"]
    arguments += ["--dtype", "float32", "--no-inductor", "--mask", "percentile", "--keep-linears", "2"]
    more = ["--low-rank", "8", "--scale-span", "auto", "--span-tolerance", "99"]
    more += ["--high-precision-step", "0", "--high-precision-step", "-1", "--step-activation-bits", "8"]
    result = runner.invoke(app, [*arguments, *more])
    assert result.exit_code == 0, result.output
    assert "transformer_2: 8 linears in HiF4, 2 in high precision" in result.output
    recipe = tahf4.Recipe.load(out)
    assert set(recipe.experts) == {"transformer", "transformer_2"}
    assert recipe.provenance["calibration"]["prompts"] == 2
    assert recipe.provenance["budget"] == {"max_high_precision_linears": 2}
    assert recipe.high_precision_steps == (0, -1) and recipe.step_activation_bits == 8
    branches = [branch for entry in recipe.experts["transformer"].values() for branch in entry.low_rank.values()]
    assert {(e.span, e.span_reason[:9]) for e in recipe.experts["transformer"].values()} == {(0, "span row:")}
    assert len(branches) > 7 and {branch.rank for branch in branches} == {16}
    assert {"name": "rotate", "class": "tahf4_compiler.passes.rotate.Rotate", "options": {"block": 64}} in (
        recipe.provenance["passes"]
    )
    assert {e.percentile for e in recipe.experts["transformer"].values()} == {99.9}
    for expert, parts in (("transformer", {0, 1, 2}), ("transformer_2", {3})):  # each runs a part of the schedule
        for linear in recipe.linears(expert).values():
            assert {i for i, db in enumerate(linear.step_sqnr_db) if db is not None} == parts
        seen = recipe.errors[expert]
        assert {(e.step, e.steps) for e in seen} <= {(step, 4) for step in parts}
        assert all(0 < e.error < 0.5 and e.branch in ("cond", "uncond") for e in seen)
        assert [e.step for e in seen] == sorted(e.step for e in seen)
    pipe = pipeline()
    tahf4.apply_recipe(pipe, recipe)

    monkeypatch.setattr(type(pipe), "__call__", lambda *args, **kwargs: pytest.fail("the statistics are in a file"))
    again = runner.invoke(app, arguments[:-2])
    assert again.exit_code == 0, again.output
    other = tahf4.Recipe.load(out)
    assert other.provenance["calibration"] == recipe.provenance["calibration"]
    for expert, entries in recipe.experts.items():
        assert all(torch.equal(other.experts[expert][name].mask, entry.mask) for name, entry in entries.items())


def test_a_run_that_is_stopped_takes_up_with_the_same_statistics(tmp_path):
    arguments = {**settings.GENERATION, "num_inference_steps": 3, "output_type": "latent"}
    options = {"step_groups": 3, "options": {"inductor": False}}

    def run(checkpoint, prompts):
        with tahf4.calibrate(pipeline(), checkpoint=checkpoint, **options) as calibration:
            calibration.run(prompts, **arguments)
        return calibration

    class Stop(Exception):
        pass

    whole = run(tmp_path / "whole", PROMPTS)
    pipe = pipeline()
    with pytest.raises(Stop), tahf4.calibrate(pipe, checkpoint=tmp_path / "part", **options) as calibration:
        calibration.run(PROMPTS[:1], **arguments)

        def stop(*args, **kwargs):
            raise Stop

        calibration.run(PROMPTS, **arguments, callback_on_step_end=stop)
    resumed = run(tmp_path / "part", PROMPTS)
    assert resumed.prompts == whole.prompts == PROMPTS
    assert (tmp_path / "part").read_bytes() == (tmp_path / "whole").read_bytes()
    cells = whole.activations[("transformer", "blocks.0.attn1.to_q")].cells
    # Two of the three steps are those of the first expert, at both guidance branches.
    assert set(cells) == {(group, side) for group in (0, 1) for side in ("cond", "uncond")}
    assert {sketch.rows for sketch, _ in cells.values()} == {2 * 320}


@pytest.mark.parametrize(
    ("content", "message"), [(None, "there is no file"), ("\n \n", "holds no prompt")]
)
def test_calibrate_says_what_is_wrong(tmp_path, content, message):
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_text(content)
    result = runner.invoke(app, ["calibrate", str(settings.PIPELINE_DIR), "--prompts", str(path)])
    assert result.exit_code == 2
    assert message in result.output


@pytest.mark.slow
def test_a_pipeline_of_another_class(tmp_path):
    from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel

    wan = pipeline()
    sizes = {"num_layers": 2, "attention_head_dim": 64, "num_attention_heads": 2, "cross_attention_dim": 128}
    transformer = PixArtTransformer2DModel(
        **sizes, in_channels=4, out_channels=8, sample_size=8, caption_channels=wan.text_encoder.config.d_model,
        use_additional_conditions=False,
    )  # fmt: skip
    vae = AutoencoderKL(block_out_channels=(32,), latent_channels=4, norm_num_groups=8)
    pipe = PixArtSigmaPipeline(wan.tokenizer, wan.text_encoder, vae, transformer, DPMSolverMultistepScheduler())
    pipe.save_pretrained(tmp_path / "pipe")
    prompts, out = tmp_path / "p.txt", tmp_path / "r.safetensors"
    prompts.write_text("a circle\n")
    arguments = ["calibrate", str(tmp_path / "pipe"), "--prompts", str(prompts), "-o", str(out), "--mask", "max"]
    arguments += ["--steps", "2", "--height", "16", "--width", "16", "--no-inductor", "--dtype", "float32"]
    result = runner.invoke(app, [*arguments, "--set", "use_resolution_binning=false"])
    assert result.exit_code == 0, result.output
    assert len(tahf4.Recipe.load(out).linears("transformer")) == 20


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--percentile", "0"], "percentile is 0"),
        (["--percentile", "95", "--mask", "max"], "mask='max' does not read percentile=95.0"),
        (["--weight-exponent", "0.2"], "mask='network_search' does not read weight_exponent=0.2"),
        (["--activation-bits", "32"], "activation_bits is 32"),
        (["--keep-linears", "2", "--protect-bits", "4"], "protect_bits is 4"),
        (["--step-activation-bits", "4"], "step_activation_bits is 4"),
        (["--keep-linears", "2", "--keep-blocks", "1"], "got 2 of them"),
        (["--set", "guidance"], "expected NAME=VALUE"),
        (["-o", "."], "cannot write"),
    ],
)
def test_choices_are_checked_before_anything_is_generated(tmp_path, more, message, monkeypatch):
    from tahf4_compiler.tools import generation

    monkeypatch.setattr(generation, "load_any_pipeline", lambda *a: pytest.fail("loaded"))
    prompts = tmp_path / "p.txt"
    prompts.write_text("a\n")
    out = [] if "-o" in more else ["-o", str(tmp_path / "r")]
    result = runner.invoke(app, ["calibrate", str(settings.PIPELINE_DIR), "--prompts", str(prompts), *out, *more])
    assert result.exit_code == 2 and message in result.output
    assert not (tmp_path / "r").exists()


@pytest.mark.slow
def test_evaluate_writes_tables_and_takes_up(tmp_path):
    arguments = ["evaluate", "--prompts", "2", "--seeds", "1", "--steps", "3", "-o", str(tmp_path)]
    arguments += ["--variant", "stress", "--row", "+ max mask", "--row", "HiF4 naive"]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    (variant,) = json.loads((tmp_path / "results.json").read_text())["variants"].values()
    names = [row["row"] for row in variant]
    assert names == ["high precision", "HiF4 naive", "+ max mask"]
    by_name = {row["row"]: row["measures"] for row in variant}
    assert by_name["+ max mask"]["psnr"]["mean"] > by_name["HiF4 naive"]["psnr"]["mean"] + 3
    assert by_name["high precision"]["latent_error"]["mean"] == 0
    assert "| + max mask |" in (tmp_path / "results.md").read_text()
    assert (tmp_path / "results.png").stat().st_size > 10_000
    again = runner.invoke(app, arguments)
    assert "clip" not in again.stderr
    assert again.exit_code == 0


def test_an_unknown_row_is_refused(tmp_path):
    result = runner.invoke(app, ["evaluate", "--row", "nothing", "-o", str(tmp_path)])
    assert result.exit_code == 2
    assert "there are: HiF4 naive" in result.output


def test_masks_of_the_weights_alone_need_no_prompt(tmp_path, prompts):
    out = tmp_path / "recipe.safetensors"
    arguments = ["calibrate", str(settings.PIPELINE_DIR), "--mask", "weights", "-o", str(out), "--dtype", "float32"]
    result = runner.invoke(app, [*arguments, "--weight-exponent", "0.25", "--no-rotation"])
    assert result.exit_code == 0, result.output
    assert "transformer_2: 10 linears in HiF4" in result.output
    pipe, recipe = pipeline(), tahf4.Recipe.load(out)
    assert {e.hadamard_block for entries in recipe.experts.values() for e in entries.values()} == {0}
    assert recipe.provenance["choices"]["weight_exponent"] == 0.25
    tahf4.apply_recipe(pipe, recipe)
    assert runner.invoke(app, arguments).exit_code == 0
    assert tahf4.Recipe.load(out).provenance["choices"]["weight_exponent"] == 0.5

    result = runner.invoke(app, [*arguments, "--prompts", str(prompts), "--set", "guidance_scale=3"])
    assert result.exit_code == 2
    assert "takes no --prompts, --set" in result.output
    result = runner.invoke(app, ["calibrate", str(settings.PIPELINE_DIR)])
    assert result.exit_code == 2
    assert "give --prompts FILE" in result.output


def test_prompts_of_an_evaluation_are_not_those_of_its_calibration():
    plan = Plan()
    assert len(set(map(str, plan.captions()))) == 64
    assert len(plan.clips()) == 192
    assert not set(plan.captions()) & set(plan.calibration_captions())
    assert len({seed for *_, seed in plan.clips()}) == 192


@pytest.mark.slow
def test_a_row_leaves_the_pipeline_as_it_was(tmp_path):
    plan = Plan(prompts=2, seeds=1, steps=2)
    rows = [ROWS[0], Row("the same again", options={"rotate.block": 0})]
    evaluate_variant("plain", plan, tmp_path, rows=rows, model_dir=settings.PIPELINE_DIR)
    home = home_of("plain", plan, tmp_path, settings.PIPELINE_DIR)
    reference, first, second = (json.loads(p.read_text()) for p in files_of(home, rows))
    assert first["clips"] == second["clips"]
    assert first["clips"][0]["psnr"] is not None, "the compiled model differs from the original"
    assert reference["clips"][0]["psnr"] is None, "the reference is equal to itself"
    assert len(experts(pipeline())) == 2
