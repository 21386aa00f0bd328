"""``tahf4 doctor``: is everything here that the compiler needs?"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata

import typer

__all__ = ["CHECKS", "Finding", "doctor"]

BROKEN, WARNING, FINE = "broken", "warning", "ok"


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
        text: one line.
        state: ``"ok"``, ``"warning"`` or ``"broken"``.
        remedy: what to do, if it is not ok.
    """

    text: str
    state: str = FINE
    remedy: str = ""


def doctor() -> None:
    """Check the environment and run a self test.

    A check that took a second or more says how long: the first run on a machine compiles.
    Exit code 1 if something essential is broken, with what to do about it.
    """
    marks = {FINE: (" ok ", "green"), WARNING: ("warn", "yellow"), BROKEN: ("FAIL", "red")}
    broken = False
    for name, check in CHECKS.items():
        start = time.perf_counter()
        try:
            finding = check()
        except Exception as error:
            finding = Finding(f"{type(error).__name__}: {error}", BROKEN, "Install tahf4-compiler again.")
        broken |= finding.state == BROKEN
        took = time.perf_counter() - start
        mark, colour = marks[finding.state]
        typer.secho(mark, fg=colour, nl=False)
        typer.echo(f"  {name:<14} {finding.text}" + (f" ({took:.0f} s)" if took >= 1 else ""))
        if finding.remedy:
            typer.echo(f"{'':22}-> {finding.remedy}")
    if broken:
        raise typer.Exit(1)


def _package(name: str, *, essential: bool = True, remedy: str = "") -> Finding:
    try:
        return Finding(metadata.version(name))
    except metadata.PackageNotFoundError:
        return Finding("not installed", BROKEN if essential else WARNING, remedy or f"pip install {name}")


def _triton() -> Finding:
    import torch

    remedy = "GPU kernels need it: pip install triton" if torch.cuda.is_available() else "only GPUs need it"
    return _package("triton", essential=False, remedy=remedy)


def _cpu() -> Finding:
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    threads = torch.get_num_threads()
    return Finding(f"{platform.machine()}, {capability}, {os.cpu_count()} cores, PyTorch uses {threads} threads")


def _gpu() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return Finding("none")
    devices = [
        "{} (capability {}.{})".format(torch.cuda.get_device_name(i), *torch.cuda.get_device_capability(i))
        for i in range(torch.cuda.device_count())
    ]
    return Finding(", ".join(devices))


def _backend() -> Finding:
    import torch

    if "tahf4" in torch._dynamo.list_backends():
        return Finding('torch.compile knows backend="tahf4"')
    remedy = "Its entry point is missing: install tahf4-compiler again."
    return Finding('torch.compile does not know backend="tahf4"', BROKEN, remedy)


def _cpp_compiler() -> Finding:
    import shutil

    from ..torch_private.inductor import cpp_compiler

    remedy = (
        "Install one (g++ or clang++) or name it in CXX: without one, graphs of the CPU run without Inductor, and only "
        "a wheel brings CPU kernels."
    )
    compiler = cpp_compiler()
    if compiler is None:
        return Finding("none that Inductor accepts", WARNING, remedy)
    found = shutil.which(compiler)
    return Finding(found) if found else Finding(f"{compiler} is not on the PATH", WARNING, remedy)


def _cpu_kernels() -> Finding:
    from ..backends.cpu import build

    kernels = build.library()
    if kernels is None:
        return Finding("none: the references run, which are slow", WARNING, "See the line above, and TAHF4_NO_CPP.")
    source = "of the wheel, called from Python" if build.operators() is None else "compiled here"
    return Finding(f"{source}, for {build.instruction_set()}")


def _cache() -> Finding:
    from ..torch_private.inductor import cache_folder

    path = os.path.abspath(cache_folder(made=False))
    nearest = path
    while not os.path.exists(nearest):
        nearest = os.path.dirname(nearest)
    if os.path.isdir(nearest) and os.access(nearest, os.W_OK):
        return Finding(path)
    return Finding(f"{path} cannot be written", BROKEN, "Name another folder in TORCHINDUCTOR_CACHE_DIR.")


def _kernels() -> Finding:
    import torch

    from ..backends import cpu, triton
    from ..ops import registry

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reason = triton.why_not(device)
    by_operator: dict[str, list[str]] = {}
    for kernel in registry.kernels():
        if (kernel.name == "cpu" and not cpu.available()) or (kernel.name == "triton" and reason is not None):
            continue
        by_operator.setdefault(str(kernel.operator).removesuffix(".default"), []).append(kernel.name)
    shown = "; ".join(f"{operator}: {', '.join(names)}" for operator, names in by_operator.items())
    return Finding(shown + (f" (no Triton kernels: {reason})" if reason is not None else ""))


def _expected() -> Finding:
    """Say which path products take here, and what was computed or measured for it."""
    import torch

    from ..backends import cpu

    if torch.cuda.is_available():
        return _expected_on_gpu(0)
    if not cpu.available():
        remedy = "Install a C++ compiler: the reference operators are exact and slow."
        return Finding("reference operators on the CPU", WARNING, remedy)
    found = cpu.instruction_set()
    if found == "none":
        return Finding("CPU, products in float32: W4A4 saves memory and no time (docs/cpu.md)")
    return Finding(f"CPU, products in integers with {found}; measured times: docs/cpu.md")


def _expected_on_gpu(index: int) -> Finding:
    import torch

    from ..backends import triton
    from ..backends.triton.tiling import choose_path
    from .kernels.chips import MANY, chip_of
    from .kernels.roofline import linears_ratio
    from .kernels.wan import A14B

    device, name = torch.device("cuda", index), torch.cuda.get_device_name(index)
    if (reason := triton.why_not(device)) is not None:
        return Finding(f"{name}: reference operators, exact and slow", WARNING, reason)
    path = choose_path(MANY, torch.cuda.get_device_capability(index))
    size = torch.cuda.get_device_properties(index).total_memory / 1e9
    chip = chip_of(name)
    gain = "not in the table of `tahf4 roofline`"
    if chip is not None:
        gain = f"a block of Wan2.2 A14B without self-attention at most {linears_ratio(A14B, chip):.1f} times bfloat16"
    return Finding(
        f"{name}, {size:.0f} GB, products in {path}; computed, not measured: {gain}; `tahf4 memory` says what fits"
    )


def _shipped_pipeline() -> Finding:
    from .tiny_wan import settings

    if (settings.PIPELINE_DIR / "model_index.json").is_file():
        return Finding(str(settings.PIPELINE_DIR))
    return Finding(
        f"nothing at {settings.PIPELINE_DIR}",
        WARNING,
        "`tahf4 demo` needs it or a folder of yours: install the package again, or train it with "
        "`python -m tahf4_compiler.tools.tiny_wan.train`.",
    )


def _format() -> Finding:
    from .selftest import check_format

    wrong = check_format()
    if wrong:
        return Finding(wrong, BROKEN, "4-bit results are wrong here; please report it with this output.")
    return Finding("a known vector converts to HiF4 and back, bit for bit")


def _compile() -> Finding:
    from .selftest import check_compile

    wrong = check_compile()
    if wrong:
        return Finding(wrong, BROKEN, "Run it with `TORCH_LOGS=+tahf4_compiler` for the details.")
    return Finding('torch.compile(nn.Linear, backend="tahf4") gives the product of the 4-bit values')


def _first_compile() -> Finding:
    from .selftest import first_compile
    from .tiny_wan import settings

    if not (folder := settings.PIPELINE_DIR / "transformer").is_dir():
        return Finding("not timed: the tiny Wan2.2 is missing", WARNING, "see the line of the tiny Wan2.2")
    return Finding(f"of the blocks of the tiny Wan2.2, {first_compile(folder)}; kernels have a line of their own")


CHECKS: dict[str, Callable[[], Finding]] = {
    "python": lambda: Finding(platform.python_version()),
    "tahf4-compiler": lambda: _package("tahf4-compiler"),
    "torch": lambda: _package("torch"),
    "triton": _triton,
    "diffusers": lambda: _package("diffusers"),
    "CPU": _cpu,
    "GPU": _gpu,
    "backend": _backend,
    "C++ compiler": _cpp_compiler,
    "CPU kernels": _cpu_kernels,
    "compile cache": _cache,
    "kernels": _kernels,
    "to expect": _expected,
    "tiny Wan2.2": _shipped_pipeline,
    "number format": _format,
    "compilation": _compile,
    "first compile": _first_compile,
}
"""Name and function of each check, in the order in which they run."""
