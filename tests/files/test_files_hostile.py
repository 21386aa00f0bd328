"""Damaged and hostile files: an error of our own for each, at once, with nothing allocated, run or written.

``make fuzz`` (``python tests/files/test_files_hostile.py 10000``) runs the last test for longer.
"""

from __future__ import annotations

import json
import os
import pickle
import struct
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import tahf4_compiler as tahf4
from tahf4_compiler.checkpoint.convert import quantize_checkpoint
from tahf4_compiler.checkpoint.manifest import manifest_sum, verify
from tahf4_compiler.checkpoint.source import open_source
from tahf4_compiler.files.reading import read_header, read_index, read_json
from tahf4_compiler.recipe.entries import LinearEntry, RecipeEntry
from tahf4_compiler.recipe.recipe import Recipe

INDEX = "diffusion_pytorch_model.safetensors.index.json"
SHORT = 300
"""Mutated files in a run of the test suite."""


def write(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(shape=(2,), offsets=(0, 8), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("header", "data", "length", "message"),
    [
        ({"a": entry()}, b"x" * 7, None, "truncated"),
        ({"a": entry()}, b"x" * 9, None, "longer than it should be"),
        ({"a": entry()}, b"x" * 8, 1 << 62, "header of"),
        ({"a": entry()}, b"x" * 8, 1000, "truncated"),
        (b'{"a": {"dtype":"F32","shape":[2],"data_offsets":[0,8]}, "a": 1}', b"x" * 8, None, "'a' stands twice"),
        (b'{"a": {"dtype":"F32","dtype":"I8","shape":[2],"data_offsets":[0,8]}}', b"x" * 8, None, "stands twice"),
        ({"a": entry((1 << 62, 1 << 62))}, b"x" * 8, None, "needs"),
        ({"a": entry((3,))}, b"x" * 8, None, "needs 12"),
        ({"a": entry((-2,))}, b"x" * 8, None, "shape"),
        ({"a": entry((2.0,))}, b"x" * 8, None, "shape"),
        ({"a": entry((True, 2))}, b"x" * 8, None, "shape"),
        ({"a": entry(offsets=(8, 16))}, b"x" * 16, None, "gap"),
        ({"a": entry(), "b": entry()}, b"x" * 8, None, "overlaps"),
        ({"a": entry(offsets=(0,))}, b"x" * 8, None, "offsets"),
        ({"a": entry(dtype="OBJECT")}, b"x" * 8, None, "dtype"),
        ({"a": [1]}, b"", None, "lacks"),
        ({"__metadata__": {"x": 1}}, b"", None, "metadata"),
        (b"[" * 100_000, b"", None, "damaged"),
        (b'{"a": NaN}', b"", None, "NaN"),
        (b'{"a": ' + b"9" * 100_000 + b"}", b"", None, "damaged"),
        (b"\xff\xfe{}", b"", None, "damaged"),
        (b"[]", b"", None, "JSON object"),
    ],
)
def test_a_damaged_header_says_what_is_wrong(tmp_path, header, data, length, message):
    path = write(tmp_path / "file.safetensors", header, data, length)
    with pytest.raises(tahf4.CheckpointError, match=message):
        read_header(path)
    with pytest.raises(tahf4.RecipeError, match=message):
        Recipe.load(path)


def test_good_headers_are_read(tmp_path):
    values = {"b": torch.zeros(3, 0), "a": torch.arange(5, dtype=torch.bfloat16), "c": torch.tensor(True)}
    save_file(values, tmp_path / "file", metadata={"format": "pt"})
    header = read_header(tmp_path / "file")
    assert {name: info.shape for name, info in header.tensors.items()} == {"a": (5,), "b": (3, 0), "c": ()}
    assert header.metadata == {"format": "pt"}


def test_a_pipe_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(tahf4.CheckpointError, match="no regular file"):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "../other.safetensors"}, "plain name"),
        ({"a": "/etc/passwd"}, "plain name"),
        ({"a": "..\\x.safetensors"}, "plain name"),
        ({"a": "x\0.safetensors"}, "plain name"),
        ({"a": ".."}, "plain name"),
        ({"a": 3}, "plain name"),
        ({"a": "model.bin"}, "pickles are never read"),
        ({"a": "missing.safetensors"}, "is missing"),
        ({"a": "one.safetensors", "b": "one.safetensors"}, "does not hold it"),
        ({}, None),
        ({"b": "one.safetensors"}, "does not place there"),
        ([], "no 'weight_map'"),
    ],
)
def test_an_index_names_files_beside_it_that_hold_what_it_says(tmp_path, weight_map, message):
    save_file({"a": torch.zeros(2)}, tmp_path / "one.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    if message is None:
        assert read_index(tmp_path / INDEX) == {}
        return
    with pytest.raises(tahf4.CheckpointError, match=message):
        read_index(tmp_path / INDEX)


CONFIG = {
    "_class_name": "WanTransformer3DModel",
    "num_layers": 2,
    "ffn_dim": 64,
    "num_attention_heads": 1,
    "attention_head_dim": 64,
    "text_dim": 64,
    "freq_dim": 64,
    "in_channels": 4,
    "out_channels": 4,
    "rope_max_seq_len": 32,
}


def tiny(folder: Path) -> Path:
    """A sharded checkpoint of 150 kB."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    settings = {key: value for key, value in CONFIG.items() if key != "_class_name"}
    WanTransformer3DModel(**settings).bfloat16().save_pretrained(folder, max_shard_size="100KB")
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return tiny(tmp_path_factory.mktemp("hostile") / "model")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "os.system"}, "names the class 'os.system'"),
        ({"_class_name": "DiffusionPipeline"}, "names the class"),
        ({"_class_name": None}, "names the class"),
        ({"num_layers": 10**9}, "num_layers = 1000000000"),
        ({"num_layers": 3}, r"does not hold a WanTransformer3DModel.*blocks\.2.*missing"),
        ({"ffn_dim": 128}, r"has the shape \(64, 64\), expected \(128, 64\)"),
        ({"rope_max_seq_len": 10**11}, "rope_max_seq_len"),
        ({"attention_head_dim": "x"}, "makes no WanTransformer3DModel"),
        ({"quantization_config": {"quant_method": "tahf4"}}, "quantized already"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(checkpoint, tmp_path, change, message):
    folder = tmp_path / "model"
    folder.mkdir()
    for path in checkpoint.iterdir():
        os.link(path, folder / path.name)
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps({**CONFIG, **change}))
    with pytest.raises(tahf4.CheckpointError, match=message):
        quantize_checkpoint(folder, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


class Evil:
    def __reduce__(self):
        return (sys.exit, ("unpickled",))


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "model.pt", "weights.pth"])
def test_pickles_are_never_read(tmp_path, name):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / name).write_bytes(pickle.dumps(Evil()))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(tahf4.CheckpointError, match="pickle, which can run code"):
        quantize_checkpoint(folder, tmp_path / "out")
    os.rename(folder / name, folder / "diffusion_pytorch_model.safetensors")
    with pytest.raises(tahf4.CheckpointError, match="truncated|more than"):
        quantize_checkpoint(folder, tmp_path / "out")
    (tmp_path / "recipe").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(tahf4.RecipeError):
        Recipe.load(tmp_path / "recipe")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format="tahf4-manifest-9"), "format 'tahf4-manifest-9'"),
        (lambda m: m["files"].update({"../x": {"bytes": 1, "sha256": "0" * 64}}), "inside the folder"),
        (lambda m: m["files"].update({"/etc/passwd": {"bytes": 1, "sha256": "0" * 64}}), "inside the folder"),
        (lambda m: m["files"].update({"x": {"bytes": 1, "sha256": "0" * 64}}), "x is missing"),
        (lambda m: m["files"].update({"x": 3}), "no size and hash"),
        (lambda m: m["files"].pop("diffusion_pytorch_model.safetensors"), "not in the manifest"),
    ],
)
def test_a_manifest_that_is_not_ours(checkpoint, tmp_path, change, message):
    quantize_checkpoint(checkpoint, tmp_path / "out")
    assert verify(tmp_path / "out") == 2
    path = tmp_path / "out" / "tahf4_manifest.json"
    content = json.loads(path.read_text())
    change(content)
    content["sha256"] = manifest_sum(content)
    path.write_text(json.dumps(content))
    with pytest.raises(tahf4.CheckpointError, match=message):
        verify(tmp_path / "out")


def recipe(path: Path) -> Path:
    linears = {"blocks.0.ffn.net.2": LinearEntry((64, 64), 5, reason="x")}
    made = RecipeEntry(linears, 64, 7, "weighted", 99.9, 0.5, torch.ones(64), torch.ones(64, dtype=torch.bfloat16))
    Recipe({"": {"a": made}}).save(path)
    return path


_EDIT = st.tuples(
    st.sampled_from(["flip", "cut", "insert", "copy", "digit"]),
    st.floats(0, 1, exclude_max=True),
    st.booleans(),  # near the front, where headers are
    st.binary(min_size=1, max_size=9),
)


def mutate(data: bytes, edits) -> bytes:
    out = bytearray(data)
    for kind, where, front, values in edits:
        at = int(where * min(len(out), 4096 if front else len(out)))
        if kind == "cut":
            del out[at : at + (values[0] if front else len(out))]
        elif kind == "insert":
            out[at:at] = values
        elif kind == "copy":
            out[at:at] = out[at : at + 8 * values[0]]
        elif kind == "digit" and (found := [i for i in range(at, min(at + 99, len(out))) if 48 <= out[i] < 58]):
            out[found[0]] = 48 + values[0] % 10
        elif kind == "flip":
            out[at : at + len(values)] = bytes(a ^ b for a, b in zip(out[at : at + len(values)], values))
    return bytes(out)


def fuzz(count: int) -> tuple[int, int]:
    """Load mutated recipes and checkpoints; return how many, and how many were refused. Other errors get out."""
    refused = total = 0
    with tempfile.TemporaryDirectory() as home:
        folder, recipe_file = tiny(Path(home) / "model"), recipe(Path(home) / "recipe")
        files = [*sorted(folder.iterdir()), recipe_file]
        originals = {path: path.read_bytes() for path in files}

        quiet = list(HealthCheck)
        @settings(max_examples=count, deadline=20_000, database=None, derandomize=True, suppress_health_check=quiet)
        @given(st.sampled_from(files), st.lists(_EDIT, min_size=1, max_size=4))
        def run(path: Path, edits) -> None:
            nonlocal refused, total
            total += 1
            path.write_bytes(mutate(originals[path], edits))
            try:
                if path == recipe_file:
                    Recipe.load(path)
                else:
                    open_source(folder)
            except tahf4.Tahf4Error:
                refused += 1
            finally:
                path.write_bytes(originals[path])

        run()
    return total, refused


def test_mutated_files_are_read_or_refused():
    total, refused = fuzz(SHORT)
    assert total >= SHORT and refused > SHORT // 2


if __name__ == "__main__":
    total, refused = fuzz(int(sys.argv[1]))
    print(f"{total} mutated files: {refused} refused, the others read; no other error, no hang")
