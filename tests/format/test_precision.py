"""Products of what a recipe is made of do not depend on how the process lets float32 matrices be multiplied."""

from __future__ import annotations

import threading

import pytest
import torch
from models import Stack
from torch.overrides import TorchFunctionMode

import tahf4_compiler as tahf4
from tahf4_compiler.calibration.moments import Moments
from tahf4_compiler.format.low_rank import LowRank, remainder
from tahf4_compiler.format.precision import full_precision

MATMULS = (torch.backends.mkldnn.matmul, torch.backends.cuda.matmul)


def settings() -> list[str]:
    return [matmul.fp32_precision for matmul in MATMULS]


@pytest.fixture(autouse=True)
def _as_before():
    before = torch.get_float32_matmul_precision(), settings()
    with torch.no_grad():
        yield
    torch.set_float32_matmul_precision(before[0])
    for matmul, precision in zip(MATMULS, before[1], strict=True):
        matmul.fp32_precision = precision


class Products(TorchFunctionMode):
    """Collects how float32 matrices are multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in ("matmul", "__matmul__", "addmm_", "mm", "qr", "svd", "linear"):
            self.found.add(torch.get_float32_matmul_precision())
        return func(*args, **(kwargs or {}))


def test_moments_and_branches_are_multiplied_in_full_precision():
    torch.manual_seed(0)
    x, weight = torch.randn(256, 128), torch.randn(64, 128)
    branch = LowRank(torch.randn(128, 64), torch.randn(64, 64))

    def products():
        moments = Moments(128, 128)
        moments.update(x)
        return moments.blocks[0], remainder(weight, branch)

    want = products()
    torch.set_float32_matmul_precision("medium")
    with Products() as seen:
        found = products()
    assert seen.found == {"highest"} and all(map(torch.equal, found, want))
    assert torch.get_float32_matmul_precision() == "medium"


def test_a_recipe_of_one_calibration_is_made_in_full_precision(tmp_path):
    torch.manual_seed(0)
    model, x = Stack(depth=2).eval(), torch.randn(64, 64)
    with tahf4.calibrate(model, options={"inductor": False}) as calibration:
        model(x)
    choices = {"mask": "max", "low_rank": 12.5, "sensitivity": False}
    calibration.recipe(**choices).save(tmp_path / "want")
    torch.set_float32_matmul_precision("medium")
    with Products() as seen:
        calibration.recipe(**choices).save(tmp_path / "found")
    assert seen.found == {"highest"}
    assert (tmp_path / "found").read_bytes() == (tmp_path / "want").read_bytes()


@pytest.mark.parametrize("setting", ["legacy", "matmul", "above", "nothing"])
def test_the_settings_are_what_they_were(setting):
    if setting == "legacy":
        torch.set_float32_matmul_precision("high")
    elif setting == "matmul":
        MATMULS[0].fp32_precision = "bf16"
    elif setting == "above":
        torch.backends.mkldnn.fp32_precision = "bf16"
    before = settings()
    try:
        with pytest.raises(ValueError, match="stop"), full_precision(), full_precision():
            assert settings() == ["ieee", "ieee"] and torch.get_float32_matmul_precision() == "highest"
            raise ValueError("stop")
        assert settings() == before
    finally:
        torch.backends.mkldnn.fp32_precision = "none"
    assert settings()[0] == (before[0] if setting in ("legacy", "matmul") else "none"), "it follows what is above it"


def test_threads_that_overlap_leave_the_setting_as_it_was():
    torch.set_float32_matmul_precision("medium")
    entered, leave = threading.Event(), threading.Event()

    def other():
        with full_precision():
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with full_precision():
        thread.start()
        entered.wait(10)
    assert torch.get_float32_matmul_precision() == "highest", "the other one still multiplies"
    leave.set()
    thread.join()
    assert torch.get_float32_matmul_precision() == "medium"


def test_autocast_changes_no_branch_and_no_weight():
    weight, branch = torch.randn(64, 128), LowRank(torch.randn(128, 8), torch.randn(8, 64))
    want = remainder(weight, branch)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(remainder(weight, branch), want)


def test_a_setting_of_tf32_can_be_read_afterwards():
    torch.set_float32_matmul_precision("medium")
    torch.backends.cuda.matmul.allow_tf32 = True
    with full_precision():
        pass
    assert torch.backends.cuda.matmul.allow_tf32
    assert settings() == ["bf16", "tf32"]
