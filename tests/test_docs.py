"""The Python blocks of the documentation run, page by page, in order; pages and reference are complete.

A block that cannot run here begins with ``# skip: REASON``.
"""

from __future__ import annotations

import dataclasses
import re
import sys
import types
from pathlib import Path

import pytest

import tahf4_compiler as tahf4

DOCS = Path(__file__).parents[1] / "docs"
_BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
PAGES = tuple(page.name for page in sorted(DOCS.glob("*.md")) if _BLOCK.search(page.read_text()))
ELSEWHERE = {
    "packed.md": "tests/diffusers_integration/test_packed_docs.py runs it, on the tiny pipeline",
    "inspect.md": "tests/tools/test_inspect.py runs it",
}
NOTHING_RUNS = {"calibration.md", "distributed.md"}
"""Pages whose every block needs more than a test has, each with its reason."""


@pytest.mark.parametrize("name", PAGES)
def test_the_code_of_a_page_runs(name, tmp_path, monkeypatch, capsys):
    from tahf4_compiler.pipeline import base as pass_base

    if name in ELSEWHERE:
        pytest.skip(ELSEWHERE[name])
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
            compile(code, name, "exec")
            continue
        line = text.count("\n", 0, match.start()) + 1
        exec(compile("\n" * line + code, str(DOCS / name), "exec"), page.__dict__)
        ran += 1
    assert ran or name in NOTHING_RUNS


def test_the_index_lists_every_page_once():
    trees = re.findall(r"```\{toctree\}\n(.*?)```", (DOCS / "index.md").read_text(), re.DOTALL)
    listed = [line for tree in trees for line in tree.splitlines() if line and not line.startswith(":")]
    assert sorted(listed) == sorted(page.stem for page in DOCS.glob("*.md") if page.stem != "index")


def test_every_table_has_a_head():
    root = DOCS.parent
    for page in (root / "README.md", *DOCS.glob("*.md")):
        for table in re.findall(r"(?:^\|.*\n)+", page.read_text(), re.MULTILINE):
            rows = table.splitlines()
            assert len(rows) > 2 and re.fullmatch(r"[|: -]+", rows[1]), f"{page.name}: {rows[0]}"


def test_pass_authors_read_of_every_field_of_a_packed_weight():
    from tahf4_compiler.graph.inputs import PackedWeight

    table = (DOCS / "writing_passes.md").read_text().partition("It says which parameters")[2].partition("`part` is")[0]
    named = re.findall(r"^\| `(\w+)` \|.*\| `?(.*?)`? ?\|$", table, re.MULTILINE)
    fields = {f.name: f.default for f in dataclasses.fields(PackedWeight)}
    shown = {dataclasses.MISSING: "", "": '""'}
    assert dict(named) == {name: shown.get(default, str(default)) for name, default in fields.items()}


def test_the_reference_has_every_public_name():
    text = (DOCS / "api.md").read_text()
    errors = {name for name in tahf4.__all__ if name.endswith("Error")}  # one automodule
    assert ".. automodule:: tahf4_compiler.errors" in text
    for name in set(tahf4.__all__) - errors - {"PassResult"}:
        value = getattr(tahf4, name)
        path = value.__name__ if isinstance(value, types.ModuleType) else f"tahf4_compiler.{name}"
        assert re.search(rf"^\.\. auto\w+:: {re.escape(path)}$", text, re.MULTILINE), name


def test_pages_show_pass_authors_public_names_and_the_reference_explains_them():
    text = (DOCS / "api.md").read_text()
    assert all(f":: tahf4_compiler.rewriting.{name}\n" in text for name in tahf4.rewriting.__all__)
    page = (DOCS / "writing_passes.md").read_text()
    shown = re.findall(r"^(?:from|import) (tahf4_compiler[\w.]*)", page, re.MULTILINE)
    assert set(shown) == {"tahf4_compiler", "tahf4_compiler.rewriting"}


def test_the_reference_has_every_default_pass_and_option_with_its_default():
    text = (DOCS / "api.md").read_text()
    row = "| `{}` | `{}` |".format
    for field in dataclasses.fields(tahf4.Options):
        if field.name != "pass_options":
            assert row(field.name, repr(field.default).replace("'", '"')) in text, field.name
    for item in tahf4.default_passes():
        assert f".. autoclass:: {type(item).__module__}.{type(item).__qualname__}\n" in text, item.name
        for option, value in item.options().items():
            assert row(f"{item.name}.{option}", repr(value).replace("'", '"')) in text, (item.name, option)
