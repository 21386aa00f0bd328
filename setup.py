"""Built with TAHF4_BUILD_KERNELS=1, the wheel brings the C++ kernels for the CPU: ``make wheel``.

They know no version of Python or PyTorch: numbers and addresses go in, and the OpenMP runtime is that of the process,
PyTorch's. So one wheel serves all. Without the variable nothing is compiled before the first use.
"""

import os
import platform
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

FOLDER = Path("backends/cpu")
# The last flags keep every bit, as those of backends/cpu/build.py do.
FLAGS = [
    *("-std=c++17", "-O3", "-DNDEBUG", "-fopenmp", "-march=x86-64-v3", "-ftree-loop-vectorize"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"),
]


class Kernels(build_ext):
    """A library of C functions under one name, for whatever Python imports the package."""

    def get_ext_filename(self, fullname: str) -> str:
        """Leave out the version of Python."""
        return fullname.replace(".", "/") + ".so"


class AnyPython(bdist_wheel):
    """A wheel for a platform and any version of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        """Leave it out here, too."""
        return "py3", "none", super().get_tag()[2]


def kernels() -> dict:
    """Return what setup() needs to build the kernels, if it shall."""
    if os.environ.get("TAHF4_BUILD_KERNELS", "") in ("", "0"):
        return {}
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise SystemExit(
            f"TAHF4_BUILD_KERNELS is set on {platform.system()} {platform.machine()}; the kernels of a wheel are for "
            "Linux on x86_64. Unset it: the kernels are then compiled on their first use."
        )
    extension = Extension(
        "tahf4_compiler.backends.cpu.kernels",
        sources=sorted(str(path) for path in FOLDER.glob("*.cpp") if path.name != "operators.cpp"),
        depends=sorted(str(path) for path in FOLDER.glob("*.[hi]*")),
        extra_compile_args=FLAGS,
        # libgomp.so.1 is in the process already, with PyTorch.
        extra_link_args=["-fopenmp"],
        language="c++",
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": Kernels, "bdist_wheel": AnyPython}}


def packages() -> list[str]:
    """Return all of them: those in the folder of that name, and those in folders beside it."""
    roots = {"tahf4_compiler": "tahf4_compiler"}
    roots |= {f"tahf4_compiler.{folder}": folder for folder in ("passes", "backends", "tools")}
    return [name for root, folder in roots.items() for name in (root, *(f"{root}.{p}" for p in find_packages(folder)))]


setup(packages=packages(), **kernels())
