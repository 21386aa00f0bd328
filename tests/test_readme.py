"""What the README shows runs, what it links to is there, and it stays short."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tahf4_compiler.tools import tiny_wan

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
LINKS = re.findall(r"\]\(([^)]+)\)", README)


def test_the_pipeline_in_the_readme_compiles(monkeypatch):
    """All but the last line, which generates a video, with the pipeline that ships in the place of the large one."""
    import diffusers

    (code,) = [block for block in BLOCKS if "from_pretrained" in block]
    *lines, last = code.strip().splitlines()
    assert last.startswith("video = pipe(")
    load = diffusers.WanPipeline.from_pretrained

    def small(name, **arguments):
        assert name == "Wan-AI/Wan2.2-T2V-A14B-Diffusers"
        return SimpleNamespace(to=lambda device: load(Path(tiny_wan.__file__).parent / "pipeline", **arguments))

    monkeypatch.setattr(diffusers.WanPipeline, "from_pretrained", small)
    namespace: dict[str, object] = {}
    exec(compile("\n".join(lines), "README.md", "exec"), namespace)
    pipe = namespace["pipe"]
    assert pipe.transformer.dtype == torch.bfloat16
    for expert in (pipe.transformer, pipe.transformer_2):
        assert expert._compiled_call_impl is not None


def test_every_block_of_the_readme_compiles():
    for block in BLOCKS:
        compile(block, "README.md", "exec")


@pytest.mark.parametrize("link", LINKS)
def test_what_the_readme_links_to_is_there(link):
    path, _, anchor = link.partition("#")
    assert (ROOT / path).is_file()
    if anchor:
        headings = re.findall(r"^#+ (.*)$", (ROOT / path).read_text(), re.MULTILINE)
        assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150
