"""The Python blocks of the documentation run, page by page, in order.

A block that cannot run here begins with ``# skip: REASON``.
"""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
PAGES = ("debugging.md", "writing_passes.md")
_BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("name", PAGES)
def test_the_code_of_a_page_runs(name, tmp_path, monkeypatch, capsys):
    from tahf4_compiler import pass_base

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pass_base, "_registry", {})
    text = (DOCS / name).read_text()
    page = types.ModuleType("page")  # dataclasses look their module up
    monkeypatch.setitem(sys.modules, "page", page)
    ran = 0
    for match in _BLOCK.finditer(text):
        code = match.group(1)
        if code.startswith("# skip:"):
            assert code.partition("\n")[0].removeprefix("# skip:").strip(), "a skipped block gives no reason"
            continue
        line = text.count("\n", 0, match.start()) + 1
        exec(compile("\n" * line + code, str(DOCS / name), "exec"), page.__dict__)
        ran += 1
    assert ran
