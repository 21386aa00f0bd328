"""Settings of the whole process change nothing: what is computed depends on the model and the options alone."""

from __future__ import annotations

import ast
import contextlib
import copy
from pathlib import Path

import pytest
import torch
import torch._inductor.config as inductor
from models import Stack

import tahf4_compiler as tahf4

GRAPH = {"inductor": False}
ROOT = Path(tahf4.__file__).parents[1]


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def careful():
    """Other ways of computing that change no product. ``set_float32_matmul_precision`` changes those of the model."""
    torch.use_deterministic_algorithms(True)
    try:
        with torch.autograd.detect_anomaly(check_nan=True):
            yield
    finally:
        torch.use_deterministic_algorithms(False)


SETTINGS = {
    "device": lambda: torch.device("meta"),  # stands for "cuda"; a context is torch.set_default_device with an end
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "careful": careful,
}


def everything(model, x, folder: Path) -> dict[str, torch.Tensor | bytes]:
    """Calibrate, make a recipe, save and load it, compile, lower, pack and unpack."""
    folder.mkdir()
    plain, model, packed = (copy.deepcopy(model) for _ in range(3))
    with tahf4.calibrate(model, options=GRAPH) as calibration:
        model(x)
    calibration.save(folder / "calibration.safetensors")
    calibration.recipe(mask="layer_search").save(folder / "recipe.safetensors")
    recipe = tahf4.Recipe.load(folder / "recipe.safetensors")
    tahf4.apply_recipe(model, recipe)
    tahf4.quantize_(packed, recipe)
    found = {
        "recipe": (folder / "recipe.safetensors").read_bytes(),
        "rotated": torch.compile(plain, backend="tahf4", options=GRAPH)(x),
        "compiled": torch.compile(model, backend="tahf4", options=GRAPH)(x),
        "lowered": tahf4.lower(tahf4.capture(model, (x,)))(x),
        "packed": packed(x),
        "packed and compiled": torch.compile(packed, backend="tahf4", options=GRAPH)(x),
        "moved": packed.to(torch.float16).to(torch.float32)(x),
        **{name: value.clone() for name, value in packed.state_dict().items()},
    }
    tahf4.dequantize_(packed)
    return {**found, **{f"dequantized {name}": value for name, value in packed.state_dict().items()}}


@pytest.fixture(scope="module")
def given():
    torch.manual_seed(0)
    return Stack(depth=2).eval().requires_grad_(False), torch.randn(16, 64)


@pytest.fixture(scope="module")
def wanted(request, given, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setenv("TAHF4_KERNELS", request.param)
        yield everything(*given, tmp_path_factory.mktemp("wanted") / "run")


@pytest.mark.parametrize(
    ("wanted", "setting"),
    [
        *(("reference", setting) for setting in ("device", "bfloat16")),
        *(pytest.param("reference", setting, marks=pytest.mark.slow) for setting in ("float64", "careful")),
        *(pytest.param("best", setting, marks=pytest.mark.slow) for setting in SETTINGS),
    ],
    indirect=["wanted"],
)
def test_a_setting_of_the_process_changes_no_bit(setting, given, wanted, tmp_path):
    with SETTINGS[setting]():
        found = everything(*given, tmp_path / "run")
    for name, value in wanted.items():
        if isinstance(value, bytes):
            assert found[name] == value, name
        else:
            assert found[name].dtype == value.dtype and torch.equal(found[name], value), name


@pytest.mark.slow
def test_inductor_without_its_cpp_wrapper(given, caplog):
    model, x = given
    want = torch.compile(model, backend="tahf4")(x)
    torch._dynamo.reset()
    with inductor.patch(cpp_wrapper=True):
        torch.testing.assert_close(torch.compile(model, backend="tahf4")(x), want)
    assert any("cpp_wrapper" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (inductor, "freezing"),
        (torch._dynamo.config, "install_free_tensors"),
        (torch._dynamo.config, "prepare_freezing"),
    ],
)
def test_constant_weights_are_refused_by_the_name_of_their_setting(config, name, given):
    model, x = given
    with config.patch(**{name: True}), pytest.raises(Exception, match=f"config.{name} is on"):
        torch.compile(model, backend="tahf4", options=GRAPH)(x)


_FACTORIES = {
    "arange", "asarray", "as_tensor", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "ones", "rand",
    "randint", "randn", "randperm", "range", "scalar_tensor", "tensor", "zeros",
}  # fmt: skip


def test_every_new_tensor_names_its_dtype_and_device():
    found = []
    for folder in ("tahf4_compiler", "passes", "backends"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                    continue
                if not isinstance(node.func.value, ast.Name) or node.func.value.id != "torch":
                    continue
                named = {keyword.arg for keyword in node.keywords}
                missing = {"dtype", "device"} - named if node.func.attr in _FACTORIES else set()
                if node.func.attr == "Generator" and not node.args and "device" not in named:
                    missing = {"device"}
                if missing:
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno} torch.{node.func.attr} without {missing}")
    assert not found, "\n".join(found)
