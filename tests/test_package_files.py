"""What an installation copies: all modules, and all files that they read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {
    "tahf4_compiler": "tahf4_compiler",
    "passes": "tahf4_compiler/passes",
    "backends": "tahf4_compiler/backends",
    "tools": "tahf4_compiler/tools",
}


@pytest.mark.skipif(not (ROOT / "pyproject.toml").exists(), reason="needs the checkout")
def test_an_installation_has_every_file_of_the_packages(tmp_path):
    library = tmp_path / "lib"
    build = ["egg_info", "--egg-base", str(tmp_path), "build_py", "--build-lib", str(library)]
    subprocess.run([sys.executable, "setup.py", "-q", *build], cwd=ROOT, check=True, capture_output=True, timeout=300)
    installed = {str(path.relative_to(library)) for path in library.rglob("*") if path.is_file()}
    wanted = {
        f"{place}/{path.relative_to(ROOT / folder)}"
        for folder, place in FOLDERS.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".so"
    }
    assert len(wanted) > 300
    assert sorted(wanted - installed) == []
