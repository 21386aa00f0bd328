"""``tahf4 quantize`` and ``tahf4 verify``: the same bits as in memory, after kills, full disks and damage."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from models import branched, wan
from safetensors.torch import load_file, save_file
from tahf4_compiler.tools.cli import app
from tahf4_compiler.tools.tiny_wan import settings
from typer.testing import CliRunner

import tahf4_compiler as tahf4
from tahf4_compiler.checkpoint import stream
from tahf4_compiler.checkpoint.convert import quantize_checkpoint
from tahf4_compiler.checkpoint.manifest import verify
from tahf4_compiler.recipe.entries import LinearEntry, RecipeEntry
from tahf4_compiler.recipe.recipe import Recipe
from tahf4_compiler.weights.checksum import checksum

runner = CliRunner(env={"COLUMNS": "200", "TERM": "dumb", "TAHF4_DEBUG": ""})
NAME = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return wan(ffn_dim=192)[0].bfloat16()


@pytest.fixture
def saved(model, tmp_path) -> Path:
    folder = tmp_path / "model"
    model.save_pretrained(folder, max_shard_size="300KB")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


def recipe_of(model, search: str = "weighted") -> Recipe:
    """Masks, a rotation and a search for the first block; its queries, keys and values share one activation."""
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n.startswith("blocks.0.")}
    groups: dict[str, list[str]] = {}
    for name in linears:
        joined = re.sub(r"attn1\.to_[kv]$", "attn1.to_q", re.sub(r"attn2\.to_v$", "attn2.to_k", name))
        groups.setdefault(joined, []).append(name)
    entries = {}
    for i, (name, members) in enumerate(groups.items()):
        k = linears[name].in_features
        decision = "high_precision" if name.endswith("ffn.net.2") else "hif4"
        listed = {
            m: LinearEntry(tuple(linears[m].weight.shape), int(checksum(linears[m].weight)), decision) for m in members
        }
        generator = torch.Generator().manual_seed(i)
        mask, moment = (torch.rand(k, generator=generator) + 0.5 for _ in range(2))
        entries[name] = RecipeEntry(listed, 64, i, search, mask=mask, second_moment=moment.bfloat16())
    return Recipe({"": entries})


@pytest.mark.parametrize("with_recipe", ["no recipe", "recipe", "branches"])
def test_the_bits_are_those_of_quantize_in_memory(model, saved, tmp_path, monkeypatch, with_recipe):
    recipe = recipe_of(model) if with_recipe != "no recipe" else None
    if recipe is not None and with_recipe == "branches":
        recipe = branched(recipe, model)
    monkeypatch.setattr(stream, "_ROWS", 1 << 12)  # a weight is packed some rows at a time
    unchecked = with_recipe == "branches"  # a checksum would read the whole weight anyway
    quantize_checkpoint(saved, tmp_path / "out", recipe, shard_size=100_000, check_weights=not unchecked)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    packed = type(model).from_pretrained(saved, torch_dtype=torch.bfloat16)
    tahf4.quantize_(packed, recipe)
    packed.save_pretrained(tmp_path / "memory")
    found, wanted, original = (tensors(tmp_path / part) for part in ("out", "memory", "model"))
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        assert torch.equal(value.double(), found[name].double()), name
        stored = value if f"{name}_codes" in wanted else original.get(name, value)  # loading casts norms to float32
        assert found[name].dtype == stored.dtype, name
    configs = [json.loads((tmp_path / f / "config.json").read_text()) for f in ("out", "memory")]
    assert any(name.endswith("low_rank_a") for name in found) == (with_recipe == "branches")
    assert configs[0]["quantization_config"]["linears"] == configs[1]["quantization_config"]["linears"]
    loaded = type(model).from_pretrained(tmp_path / "out", torch_dtype=torch.bfloat16)
    _, inputs = wan(ffn_dim=192)
    inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs.items()}
    with torch.no_grad():
        assert torch.equal(loaded(**inputs)[0], packed(**inputs)[0])


@torch.no_grad()
def test_the_steps_of_a_recipe_go_into_the_folder(model, saved, tmp_path):
    recipe = dataclasses.replace(recipe_of(model, "squared"), high_precision_steps=(0,), step_activation_bits=8)
    quantize_checkpoint(saved, tmp_path / "out", recipe)
    loaded = type(model).from_pretrained(tmp_path / "out", torch_dtype=torch.bfloat16)
    _, inputs = wan(ffn_dim=192)
    inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs.items()}
    with pytest.raises(tahf4.RecipeError, match=r"steps \[0\] run in high precision.*cannot be counted"):
        loaded(**inputs)
    scheduler = FlowMatchEulerDiscreteScheduler()
    tahf4.set_high_precision_steps(loaded, scheduler=scheduler)
    scheduler.set_timesteps(2)
    first = loaded(**inputs)[0]
    scheduler.step(torch.zeros(1), scheduler.timesteps[0], torch.zeros(1))
    second = loaded(**inputs)[0]
    tahf4.set_high_precision_steps(loaded, ())
    assert torch.equal(second, loaded(**inputs)[0]) and not torch.equal(first, second)
    tahf4.set_activation_bits(loaded, 8)
    assert torch.equal(first, loaded(**inputs)[0])


def test_the_shipped_pipeline(tmp_path):
    out = tmp_path / "out"
    result = runner.invoke(app, ["quantize", str(settings.PIPELINE_DIR), "-o", str(out), "--hard-link"])
    assert result.exit_code == 0, result.output
    assert "transformer_2: 40 of 46 linears in HiF4" in result.output
    for part in ("vae/config.json", f"vae/{NAME}", "model_index.json", "tokenizer/tokenizer.json"):
        assert (out / part).read_bytes() == (settings.PIPELINE_DIR / part).read_bytes()
    assert (out / f"vae/{NAME}").stat().st_nlink > 1
    before, after = ((f / f"transformer/{NAME}").stat().st_size for f in (settings.PIPELINE_DIR, out))
    packed, plain = (load_file(f / f"transformer/{NAME}") for f in (out, settings.PIPELINE_DIR))
    small = sum(v.nbytes for k, v in packed.items() if k.endswith(("_codes", "_scales", "multiplier")))
    linears = {k.removesuffix("_codes") for k in packed if k.endswith("_codes")}
    assert small / sum(2 * plain[k].numel() for k in linears) <= 0.30 and after < before
    again = runner.invoke(app, ["quantize", str(settings.PIPELINE_DIR), "-o", str(out)])
    assert "complete already" in again.output
    assert "all 12 files" in runner.invoke(app, ["verify", str(out)]).output
    path = out / f"transformer/{NAME}"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    broken = runner.invoke(app, ["verify", str(out)])
    assert broken.exit_code == 2 and "other contents" in broken.output


ORIGINAL = [
    ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    ("condition_embedder.time_proj", "time_projection.1"),
    ("attn1", "self_attn"),
    ("attn2", "cross_attn"),
    (".to_out.0.", ".o."),
    *((f".to_{x}.", f".{x}.") for x in "qkv"),
    ("ffn.net.0.proj", "ffn.0"),
    ("ffn.net.2", "ffn.2"),
    ("norm2", "norm_"),
    ("norm3", "norm2"),
    ("norm_.", "norm3."),
    ("proj_out", "head.head"),
]


def original_names(model) -> dict[str, torch.Tensor]:
    found = {}
    for name, value in model.state_dict().items():
        new = "head.modulation" if name == "scale_shift_table" else name.replace("scale_shift_table", "modulation")
        for ours, theirs in ORIGINAL:
            new = new.replace(ours, theirs)
        found[new] = value.contiguous()
    return found


def test_the_original_wan_names_give_the_same_files(model, saved, tmp_path):
    folder = tmp_path / "original"
    folder.mkdir()
    save_file(original_names(model), folder / NAME)
    assert "blocks.0.self_attn.q.weight" in load_file(folder / NAME)
    config = {"_class_name": "WanModel", "dim": 128, "num_heads": 2, "eps": 1e-6, "model_type": "t2v"}
    (folder / "config.json").write_text(json.dumps(config))
    quantize_checkpoint(folder, tmp_path / "a")
    quantize_checkpoint(saved, tmp_path / "b")
    left, right = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert set(left) == set(right) and all(torch.equal(left[name], right[name]) for name in left)
    assert dict(type(model).from_pretrained(tmp_path / "a").config)["num_attention_heads"] == 2


KILLING = """
import json, os, random, signal, sys, time
from pathlib import Path
from tahf4_compiler.checkpoint import convert, layout, manifest, source, stage, stream
import diffusers.models.transformers.transformer_wan, tahf4_compiler.packed.config

def slow(holder, name):
    old = getattr(holder, name)
    def call(*args, **kwargs):
        time.sleep(0.01)
        found = old(*args, **kwargs)
        time.sleep(0.01)
        return found
    setattr(holder, name, call)

for name in ("finish", "_write_list", "publish", "partial"):
    slow(stage.Stage, name)
slow(convert, "drop_list")
out, chance, kills = Path(sys.argv[2]), random.Random(int(sys.argv[3])), 0
place = out.parent / f".{out.name}.tahf4-partial"

def finished():
    listed = place / manifest.PROGRESS  # begins empty
    return listed.exists() and bool(json.loads(listed.read_text())["files"])

for i in range(int(sys.argv[4])):  # a child at a time: importing takes longer than converting
    if not (child := os.fork()):
        convert.quantize_checkpoint(sys.argv[1], out, shard_size=60_000)
        os._exit(0)
    end = time.monotonic() + 60
    # The first has finished a file, however slow the machine is.
    while not (finished() if i == 0 else place.exists()) and not out.exists() and time.monotonic() < end:
        time.sleep(0.002)
    time.sleep(chance.uniform(0, 0.25) if i else 0)
    os.kill(child, signal.SIGKILL)
    kills += os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert not out.exists() or (out / manifest.NAME).exists()
print(kills)
"""


@pytest.mark.slow
def test_a_run_that_is_killed_anywhere_goes_on_to_the_same_bytes(saved, tmp_path):
    quantize_checkpoint(saved, tmp_path / "whole", shard_size=60_000)
    wanted, out = contents(tmp_path / "whole"), tmp_path / "out"
    arguments = [sys.executable, "-c", KILLING, str(saved), str(out), "0", "3"]
    done = subprocess.run(arguments, stdout=subprocess.PIPE, timeout=120, check=True)
    assert int(done.stdout) >= 1
    # Whether a shard was finished before the last kill is a matter of time; tests/checkpoint shows that it is kept.
    quantize_checkpoint(saved, out, shard_size=60_000)
    assert contents(out) == wanted
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out", "whole"]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, tahf4.CheckpointError, OSError])
def test_a_run_that_stops_after_any_file_takes_up_behind_it(saved, tmp_path, monkeypatch, stop):
    from tahf4_compiler.checkpoint.stage import Stage

    quantize_checkpoint(saved, tmp_path / "whole", shard_size=120_000)
    wanted, finish, resumed = contents(tmp_path / "whole"), Stage.finish, []

    def once(self, name, found):
        finish(self, name, found)
        resumed.append(len(self.done))
        raise stop("stopped")

    monkeypatch.setattr(Stage, "finish", once)
    for _ in wanted:
        with pytest.raises((KeyboardInterrupt, tahf4.CheckpointError), match="stopped"):
            quantize_checkpoint(saved, tmp_path / "out", shard_size=120_000)
    assert resumed == list(range(1, len(wanted) + 1)) and not (tmp_path / "out").exists()
    done = quantize_checkpoint(saved, tmp_path / "out", shard_size=120_000)
    assert done.resumed == len(wanted) > 5 and not done.bytes_written and contents(tmp_path / "out") == wanted


def test_a_weight_that_cannot_be_read_costs_no_finished_file(saved, tmp_path, monkeypatch):
    from tahf4_compiler.checkpoint import stream

    read, fails = stream.read_into, [True]

    def sometimes(file, offset, buffer):
        if fails and len(list(tmp_path.glob(".out.*/*.safetensors"))) == 2:
            raise tahf4.CheckpointError("cannot read the checkpoint: Input/output error")
        read(file, offset, buffer)

    monkeypatch.setattr(stream, "read_into", sometimes)
    with pytest.raises(tahf4.CheckpointError, match=r"output error\. What is finished waits in .*: mend this and"):
        quantize_checkpoint(saved, tmp_path / "out", shard_size=120_000)
    fails.clear()
    assert quantize_checkpoint(saved, tmp_path / "out", shard_size=120_000).resumed == 2


def test_what_an_interrupted_run_left_damaged_is_made_again(saved, tmp_path, monkeypatch):
    from tahf4_compiler.checkpoint.stage import Stage

    quantize_checkpoint(saved, tmp_path / "whole", shard_size=100_000)
    monkeypatch.setattr(Stage, "publish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(saved, tmp_path / "out", shard_size=100_000)
    monkeypatch.undo()
    (left,) = tmp_path.glob(".out.*")
    shard = next(left.glob("*.safetensors"))
    shard.write_bytes(bytes(len(shard.read_bytes())))
    (left / "stray.safetensors").write_bytes(b"")
    done = quantize_checkpoint(saved, tmp_path / "out", shard_size=100_000)
    assert done.resumed and contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_full_disk_is_an_error_and_the_next_run_goes_on(saved, tmp_path):
    out = tmp_path / "out"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (90_000, before[1]))
    try:
        with pytest.raises(tahf4.CheckpointError, match=r"cannot write .*run the same command again"):
            quantize_checkpoint(saved, out, shard_size=120_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert not out.exists() and not list(tmp_path.rglob("*.part"))
    quantize_checkpoint(saved, out, shard_size=120_000)
    assert verify(out)


def test_too_little_room_is_told_before_anything_is_written(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("U", (), {"free": 1000}))
    with pytest.raises(tahf4.CheckpointError, match="bytes are needed and 1,000 free"):
        quantize_checkpoint(saved, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_places_that_cannot_be_written_are_refused(saved, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    with pytest.raises(tahf4.CheckpointError, match="cannot write beside"):
        quantize_checkpoint(saved, tmp_path / "file" / "out")
    with pytest.raises(tahf4.CheckpointError, match="there already"):
        quantize_checkpoint(saved, tmp_path / "file")
    with pytest.raises(tahf4.CheckpointError, match="lies in"):
        quantize_checkpoint(saved, saved / "out")
    with pytest.raises(tahf4.CheckpointError, match="cannot write beside"):
        quantize_checkpoint(saved, "/proc/out")  # read-only, whoever asks
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "model"]


def test_a_recipe_of_another_model_leaves_nothing(model, saved, tmp_path):
    torch.manual_seed(1)
    other = wan(ffn_dim=192)[0].bfloat16()
    with pytest.raises(tahf4.RecipeError, match="other weights than those that were calibrated"):
        quantize_checkpoint(saved, tmp_path / "out", recipe_of(other, ""))
    with pytest.raises(tahf4.RecipeError, match="shape"):
        quantize_checkpoint(saved, tmp_path / "out", recipe_of(wan(ffn_dim=256)[0]))
    with pytest.raises(tahf4.RecipeError, match="transformer"):
        quantize_checkpoint(settings.PIPELINE_DIR, tmp_path / "out", recipe_of(other))
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    quantize_checkpoint(saved, tmp_path / "out", recipe_of(other, ""), check_weights=False)


def test_keep_and_dtype(model, saved, tmp_path):
    plain = model.to(torch.float32)
    try:
        plain.save_pretrained(tmp_path / "float32")
    finally:
        model.to(torch.bfloat16)
    quantize_checkpoint(tmp_path / "float32", tmp_path / "a", keep=[r"blocks\.0\."], dtype=torch.bfloat16)
    found = tensors(tmp_path / "a")
    assert found["blocks.0.ffn.net.2.weight"].dtype == torch.bfloat16
    assert found["blocks.1.ffn.net.2.weight"].shape == (1,), "it is packed"
    assert found["scale_shift_table"].dtype == torch.float32, "diffusers keeps it so"
    quantize_checkpoint(saved, tmp_path / "b", keep=[r"blocks\.0\."])
    same = tensors(tmp_path / "b")
    assert all(torch.equal(found[n], same[n]) for n in found if "weight_" in n) and set(found) == set(same)
    with pytest.raises(tahf4.PatternError):
        quantize_checkpoint(saved, tmp_path / "c", keep=["nothing"])


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_a_finished_folder_that_was_damaged_is_not_called_complete(saved, tmp_path):
    out = tmp_path / "out"
    quantize_checkpoint(saved, out)
    command = ["quantize", str(saved), "-o", str(out)]
    for name, change, words in (
        (NAME, damage, f"{NAME} has other contents"),
        (NAME, Path.unlink, f"{NAME} is missing"),
        ("config.json", lambda path: path.write_text("{}"), "config.json has 2 bytes"),
        ("tahf4_manifest.json", lambda path: path.write_text(path.read_text()[:-9]), "tahf4_manifest.json is damaged"),
        ("own.py", lambda path: path.write_text("x"), "own.py is not in the manifest"),
    ):
        old = (out / name).read_bytes() if (out / name).exists() else None
        change(out / name)
        result = runner.invoke(app, command)
        assert result.exit_code == 2 and words in result.output and "nothing was written" in result.output
        assert "Remove it or name another folder" in result.output and "complete already" not in result.output
        (out / name).unlink(missing_ok=True)
        if old is not None:
            (out / name).write_bytes(old)
    (out / ".tahf4_progress.json").write_text("{}")  # of a run that was killed in its last moment
    assert verify(out) == 2
    assert "complete already" in runner.invoke(app, command).output
    with pytest.raises(tahf4.CheckpointError, match="other options"):
        quantize_checkpoint(saved, out, keep=[r"blocks\.0\."])
    # What verify advises mends it.
    damage(out / NAME)
    with pytest.raises(tahf4.CheckpointError, match="or remove it and run tahf4 quantize again"):
        verify(out)
    shutil.rmtree(out)
    quantize_checkpoint(saved, out)
    assert verify(out) == 2


def test_every_change_of_the_manifest_and_every_other_file_is_seen(saved, tmp_path):
    out = tmp_path / "out"
    quantize_checkpoint(saved, out)
    path = out / "tahf4_manifest.json"
    text = path.read_bytes()
    for i in range(len(text)):
        path.write_bytes(text[:i] + bytes([text[i] ^ 1]) + text[i + 1 :])
        with pytest.raises(tahf4.CheckpointError):
            verify(out)
    path.write_bytes(text)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "code.py").write_text("x")
    (out / "linked").symlink_to(tmp_path / "elsewhere")
    (out / "vae").mkdir()
    (out / "vae" / "model.bin").write_text("x")
    with pytest.raises(tahf4.CheckpointError, match=r"linked/code.py is not .*vae/model.bin is not .*Move away"):
        verify(out)
    (out / "linked").unlink()
    (out / "vae" / "model.bin").rename(out / "model.safetensors.index.json")
    with pytest.raises(tahf4.CheckpointError, match=r"in 1 files: model.safetensors.index.json is not in"):
        verify(out)
    (out / "model.safetensors.index.json").rename(out / "...")
    (out / "vae" / "loop").symlink_to(out)
    with pytest.raises(tahf4.CheckpointError, match=r"in 2 files: \.\.\. is not .*vae/loop is not in"):
        verify(out)


def test_what_cannot_be_renamed_at_the_end_is_kept(saved, tmp_path, monkeypatch):
    from tahf4_compiler.checkpoint import convert

    quantize_checkpoint(saved, tmp_path / "whole")
    out, old = tmp_path / "out", convert.manifest_text

    def somebody_takes_the_place(*arguments):
        out.mkdir()
        (out / "own").write_text("x")
        return old(*arguments)

    monkeypatch.setattr(convert, "manifest_text", somebody_takes_the_place)
    with pytest.raises(tahf4.CheckpointError, match=r"cannot rename .*whole and waits there: make way"):
        quantize_checkpoint(saved, out)
    monkeypatch.undo()
    assert verify(tmp_path / ".out.tahf4-partial") == 2
    shutil.rmtree(out)
    done = quantize_checkpoint(saved, out)
    assert done.resumed == 3 and not done.bytes_written and contents(out) == contents(tmp_path / "whole")


def test_a_link_to_an_empty_folder_is_filled(saved, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    quantize_checkpoint(saved, tmp_path / "out")
    assert (tmp_path / "out").is_symlink() and verify(tmp_path / "disk") == 2
    assert quantize_checkpoint(saved, tmp_path / "out").complete
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    with pytest.raises(tahf4.CheckpointError, match="is a link to .*nowhere, which is not there"):
        quantize_checkpoint(saved, tmp_path / "broken")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken", "disk", "model", "out"]


def test_weights_that_are_not_finite_are_told(saved, tmp_path, caplog):
    for path in saved.glob("*.safetensors"):
        values = load_file(path)
        for name in values.keys() & {"blocks.0.ffn.net.2.weight", "blocks.1.attn1.to_q.weight"}:
            values[name][1, 2] = float("nan") if "ffn" in name else float("inf")
        save_file(values, path)
    quantize_checkpoint(saved, tmp_path / "out")
    (message,) = [r.getMessage() for r in caplog.records if "NaN" in r.getMessage()]
    assert message.startswith("the weights of 2 linears") and "blocks.0.ffn.net.2, blocks.1.attn1.to_q." in message


def test_two_runs_at_once_are_refused(saved, tmp_path):
    from tahf4_compiler.checkpoint.stage import Stage

    stage = Stage(tmp_path / "out", "job")
    try:
        with pytest.raises(tahf4.CheckpointError, match="another command of tahf4 is writing"):
            quantize_checkpoint(saved, tmp_path / "out")
    finally:
        stage.close()
    assert os.path.isdir(stage.folder)
