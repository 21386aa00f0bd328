"""``tahf4 convert``: AMCT's layout, read and written, every bit kept."""

from __future__ import annotations

import dataclasses
import json

import hif4_published as published
import pytest
import torch
from diffusers import WanTransformer3DModel
from models import wan
from safetensors.torch import load_file, save_file
from tahf4_compiler.tools.cli import app
from typer.testing import CliRunner

import tahf4_compiler as tahf4
from tahf4_compiler.checkpoint.amct import from_amct, from_amct_tensors, to_amct, to_amct_tensors
from tahf4_compiler.checkpoint.manifest import verify
from tahf4_compiler.checkpoint.stage import Stage
from tahf4_compiler.errors import CheckpointError, FormatError
from tahf4_compiler.format import hif4
from tahf4_compiler.packed.convert import packed_linears


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


runner = CliRunner(env={"COLUMNS": "200", "TERM": "dumb", "TAHF4_DEBUG": ""})


def tensors(folder):
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


def amct(values):
    """A weight as AMCT writes it, from the published rules: lists of bytes."""
    qweight, scale = [], []
    for row in values:
        metadata, codes = published.row(row, "bfloat16_half_away")
        qweight.append(codes)
        scale.append([])
        for word in metadata:
            bits = [[word >> first + i & 1 for i in range(8)] for first in (8, 16, 24)]
            scale[-1].append([word & 255, *(sum(bit << 7 - i for i, bit in enumerate(field)) for field in bits)])
    return torch.tensor(qweight, dtype=torch.uint8), torch.tensor(scale, dtype=torch.uint8)


@pytest.fixture
def deployed(tmp_path):
    """What AMCT writes: one block, one linear, other tensors."""
    torch.manual_seed(0)
    folder, weight = tmp_path / "deployed", torch.randn(6, 192)
    folder.mkdir()
    qweight, scale = amct(weight.tolist())
    save_file({"model.layers.0.up.weight": qweight, "model.layers.0.up.scale": scale}, folder / "layer_000.safetensors")
    rest = {"model.norm.scale": torch.rand(6), "model.embed.weight": torch.randn(5, 6).bfloat16()}
    save_file(rest, folder / "rest_00000.safetensors")
    weight_map = dict.fromkeys(("model.layers.0.up.weight", "model.layers.0.up.scale"), "layer_000.safetensors")
    weight_map |= dict.fromkeys(rest, "rest_00000.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({"model_type": "some", "torch_dtype": "bfloat16"}))
    (folder / "vocab.txt").write_text("a")
    return folder, weight


def test_a_weight_is_read_as_the_rules_say(deployed, tmp_path):
    folder, weight = deployed
    paths = from_amct(folder, tmp_path / "ours")
    assert paths == ["model.layers.0.up"]
    found = tensors(tmp_path / "ours")
    wanted = hif4.quantize(weight, rounding="bfloat16_half_away")
    assert torch.equal(found["model.layers.0.up.weight_codes"], wanted.codes)
    assert torch.equal(found["model.layers.0.up.weight_scales"], wanted.scales)
    assert found["model.layers.0.up.weight"].shape == (1,)
    assert torch.equal(found["model.embed.weight"], load_file(folder / "rest_00000.safetensors")["model.embed.weight"])
    settings = json.loads((tmp_path / "ours" / "config.json").read_text())["quantization_config"]
    linear = settings["linears"]["model.layers.0.up"]
    assert (linear["k"], linear["n"], linear["rounding"], linear["dtype"]) == (192, 6, "bfloat16_half_away", "bfloat16")
    assert (tmp_path / "ours" / "vocab.txt").read_text() == "a"
    assert verify(tmp_path / "ours") == 5


def test_there_and_back_keeps_every_bit(deployed, tmp_path):
    folder, _ = deployed
    for command in (["--from", "amct", "--to", "tahf4"], ["--from", "tahf4", "--to", "amct"]):
        at = [folder, tmp_path / "ours"] if command[1] == "amct" else [tmp_path / "ours", tmp_path / "again"]
        result = runner.invoke(app, ["convert", str(at[0]), "-o", str(at[1]), *command])
        assert result.exit_code == 0, result.output
        assert "1 linears in HiF4, all bits of weights kept" in result.output
    for name in ("layer_000.safetensors", "rest_00000.safetensors"):
        ours, theirs = load_file(tmp_path / "again" / name), load_file(folder / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in ours)
    index = json.loads((tmp_path / "again" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert "quantization_config" not in json.loads((tmp_path / "again" / "config.json").read_text())


def test_any_bits_come_back():
    generator = torch.Generator().manual_seed(1)
    scales = torch.randint(-(2**31), 2**31, (40, 9), generator=generator, dtype=torch.int64).to(torch.int32)
    codes = torch.randint(0, 256, (40, 288), generator=generator, dtype=torch.uint8)
    again = from_amct_tensors(*to_amct_tensors(hif4.Packed(codes, scales, 576)))
    assert torch.equal(again.codes, codes) and torch.equal(again.scales, scales) and again.k == 576


def test_a_packed_model_goes_there_and_back(tmp_path):
    torch.manual_seed(0)
    model = wan(ffn_dim=192, num_layers=1)[0]
    plain = {"mask": None, "rotate": False, "scale_search": "squared", "sensitivity": False}
    with tahf4.calibrate(model, step_groups=1, options={"inductor": False}) as calibration:
        model(**wan_inputs())
    tahf4.quantize_(model, calibration.recipe(rounding="bfloat16_half_away", **plain))
    model.save_pretrained(tmp_path / "ours")
    to_amct(tmp_path / "ours", tmp_path / "amct")
    names = {path.name for path in (tmp_path / "amct").glob("*.safetensors")}
    assert names >= {"layer_000.safetensors", "rest_00000.safetensors"}
    from_amct(tmp_path / "amct", tmp_path / "again")
    again = WanTransformer3DModel.from_pretrained(tmp_path / "again")
    linears = packed_linears(again)
    assert len(linears) == len(packed_linears(model)) > 0
    for path, linear in packed_linears(model).items():
        assert torch.equal(linears[path].weight_codes, linear.weight_codes)
        assert torch.equal(linears[path].weight_scales, linear.weight_scales)
    torch.testing.assert_close(again(**wan_inputs())[0], model(**wan_inputs())[0])


def wan_inputs():
    torch.manual_seed(1)
    return wan(ffn_dim=192)[1]


def test_what_the_layout_has_no_place_for_is_refused(tmp_path):
    model = wan(ffn_dim=192, num_layers=1)[0]
    tahf4.quantize_(model)
    model.save_pretrained(tmp_path / "rotated")
    with pytest.raises(CheckpointError, match="a rotation, a channel mask or signs .*no place for it"):
        to_amct(tmp_path / "rotated", tmp_path / "out")
    model = wan(ffn_dim=192, num_layers=1)[0]
    with tahf4.calibrate(model, options={"inductor": False}, moments=0) as calibration:
        model(**wan_inputs())
    plain = {"mask": None, "rotate": False, "scale_search": "", "sensitivity": False}
    tahf4.quantize_(model, calibration.recipe(**plain))
    model.save_pretrained(tmp_path / "searched")
    with pytest.raises(CheckpointError, match='the rounding .least_error. .*rounding="bfloat16_half_away"'):
        to_amct(tmp_path / "searched", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(FormatError, match="whole units of 64"):
        to_amct_tensors(hif4.quantize(torch.randn(3, 100)))
    with pytest.raises(FormatError, match="expected uint8"):
        from_amct_tensors(torch.zeros(3, 32, dtype=torch.uint8), torch.zeros(3, 2, 4, dtype=torch.uint8))


def change(folder, name, edit):
    path = folder / name
    content = load_file(path)
    edit(content)
    save_file(content, path)
    index = folder / "model.safetensors.index.json"
    others = {key: file for key, file in json.loads(index.read_text())["weight_map"].items() if file != name}
    index.write_text(json.dumps({"metadata": {}, "weight_map": {**others, **dict.fromkeys(content, name)}}))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.pop("model.layers.0.up.scale"), "and no model.layers.0.up.scale"),
        (lambda c: c.pop("model.layers.0.up.weight"), "and no model.layers.0.up.weight"),
        (lambda c: c.update({"model.layers.0.up.scale": torch.zeros(6, 2, 4, dtype=torch.uint8)}), "expected uint8"),
        (lambda c: c.update({"model.layers.0.up.weight": torch.zeros(6, 95, dtype=torch.uint8)}), "expected uint8"),
        (lambda c: (c.clear(), c.update(a=torch.zeros(1))), "no weight in AMCT's HiF4"),
        (lambda c: c.update({"model.layers.0.up.qweight": torch.zeros(6, 96)}), "up.qweight and .*which weight"),
    ],
)
def test_bad_files_are_refused(deployed, tmp_path, edit, message):
    folder, _ = deployed
    change(folder, "layer_000.safetensors", edit)
    with pytest.raises(CheckpointError, match=message):
        from_amct(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_files_without_their_index_are_refused(deployed, tmp_path):
    (deployed[0] / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match="2 safetensors files and 0 indices"):
        from_amct(deployed[0], tmp_path / "out")


def test_what_says_how_a_model_runs_is_lost_and_said(tmp_path, caplog):
    model = wan(ffn_dim=192, num_layers=1)[0]
    with tahf4.calibrate(model, step_groups=1, options={"inductor": False}) as calibration:
        model(**wan_inputs())
    recipe = calibration.recipe(mask=None, rotate=False, scale_search="", sensitivity=False, rounding="half_away")
    tahf4.quantize_(model, dataclasses.replace(recipe, high_precision_steps=(0,)))
    tahf4.set_activation_bits(model, {"ffn": 8})
    model.save_pretrained(tmp_path / "ours")
    to_amct(tmp_path / "ours", tmp_path / "amct")
    for words in ("rounded as 'half_away' (AMCT: 'bfloat16_half_away')", "activations of 8 bits", "in the steps 0"):
        assert words in caplog.text


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError])
def test_a_run_that_stops_after_any_file_takes_up_behind_it(deployed, tmp_path, monkeypatch, caplog, stop):
    folder, _ = deployed
    from_amct(folder, tmp_path / "whole")
    wanted, finish, taken = contents(tmp_path / "whole"), Stage.finish, []

    def once(self, name, found):
        finish(self, name, found)
        taken.append(len(self.done))
        raise stop("stopped")

    monkeypatch.setattr(Stage, "finish", once)
    for _ in wanted:
        with pytest.raises((KeyboardInterrupt, CheckpointError), match="stopped"):
            from_amct(folder, tmp_path / "out")
    assert taken == list(range(1, len(wanted) + 1)) and not (tmp_path / "out").exists()
    caplog.clear()
    assert from_amct(folder, tmp_path / "out") == ["model.layers.0.up"] and contents(tmp_path / "out") == wanted
    assert f"{len(wanted)} files of an earlier run are there already" in caplog.text


def test_what_was_begun_of_other_files_is_made_again(deployed, tmp_path, monkeypatch, caplog):
    folder, _ = deployed
    with monkeypatch.context() as patch:
        patch.setattr(Stage, "publish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            from_amct(folder, tmp_path / "out")
    weight = torch.zeros(6, 96, dtype=torch.uint8)
    change(folder, "layer_000.safetensors", lambda c: c.update({"model.layers.0.up.weight": weight}))
    from_amct(folder, tmp_path / "out")
    assert torch.equal(tensors(tmp_path / "out")["model.layers.0.up.weight_codes"], weight)
    assert not caplog.text


def test_places_and_directions(deployed, tmp_path):
    folder, _ = deployed
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    for out, message in ((tmp_path / "full", "not empty"), (folder / "inside", "lies in")):
        with pytest.raises(CheckpointError, match=message):
            from_amct(folder, out)
    with pytest.raises(CheckpointError, match="no model that tahf4 packed"):
        to_amct(folder, tmp_path / "out")
    result = runner.invoke(app, ["convert", str(folder), "-o", str(tmp_path / "out"), "--to", "amct"])
    assert result.exit_code == 2 and "both amct" in result.output
