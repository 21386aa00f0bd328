"""The structure of the package: imports go down, no circle, no private name of another module.

``pytest tests/test_architecture.py -s`` prints the floors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import networkx as nx
import pytest
from sources import PACKAGE, Source, imports, private_reads

ROOT = Path(__file__).parents[1]
FOLDERS = {"tahf4_compiler": PACKAGE, **{name: f"{PACKAGE}.{name}" for name in ("passes", "backends", "tools")}}

FLOORS = (
    ("errors", "graph", "import_hook", "torch_private"),
    ("files", "options", "plugins"),
    ("format",),
    ("model", "ops"),
    ("graph_capture", "weights"),
    ("pipeline", "recipe"),
    ("packed", "reporting"),
    ("diffusers_integration", "distributed", "lowering", "rewriting", "transformers_integration"),
    ("calibration", "checkpoint", "debugging"),
    ("",),  # the public face, tahf4_compiler/__init__.py
    ("backends", "passes"),  # they join through entry points: nothing above imports them
    ("tools",),
)
"""From the ground up: a room imports from floors below its own, and from itself."""


@cache
def product() -> dict[str, Source]:
    found = {}
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            name = ".".join([package, *parts]).removesuffix(".__init__")
            found[name] = Source(path.read_text(), path.name == "__init__.py")
    return found


def room(module: str) -> str:
    return f"{module}.".split(".")[1]


def up(sources: Mapping[str, Source]) -> list[str]:
    """Return the imports that do not go down."""
    floor = {name: i for i, names in enumerate(FLOORS) for name in names}
    return [
        f"{i.source}:{i.line} imports {i.target}"
        for i in imports(sources)
        if room(i.source) != room(i.target) and floor[room(i.target)] >= floor[room(i.source)]
    ]


def circles(sources: Mapping[str, Source]) -> list[list[str]]:
    graph = nx.DiGraph((i.source, i.target) for i in imports(sources) if i.source != i.target)
    return [sorted(found) for found in nx.strongly_connected_components(graph) if len(found) > 1]


def test_imports_go_down():
    assert {room(module) for module in product()} == {name for names in FLOORS for name in names}, "each has a floor"
    for i, names in enumerate(FLOORS):
        print(f"{i + 1:2}  {', '.join(name or PACKAGE for name in names)}")
    assert not up(product())


def test_the_documentation_shows_the_floors():
    rows = re.findall(r"^\| (\d+) \| (.+?) \|", (ROOT / "docs" / "architecture.md").read_text(), re.MULTILINE)
    shown: list[set[str]] = [set() for _ in FLOORS]
    for floor, names in rows:
        shown[int(floor) - 1] |= {name.replace("__init__", "") for name in re.findall(r"`(\w+)/?`", names)}
    assert shown == [set(names) for names in FLOORS]


def test_no_modules_import_each_other():
    assert not circles(product())


def test_no_module_reaches_a_private_name_of_another():
    assert not list(private_reads(product()))


# The checks see what they are there to see.

SAMPLE = {
    "tahf4_compiler.format.hif4": Source("_UNIT = 64"),
    "tahf4_compiler.weights": Source("", True),
    "tahf4_compiler.weights.store": Source("_key = 1\nclass Store:\n    _entries = 2\nstore = Store()"),
}


def sample(name: str, text: str, package: bool = False) -> dict[str, Source]:
    return {**SAMPLE, f"tahf4_compiler.{name}": Source(text, package)}


IMPORTS = [
    "import tahf4_compiler.weights.store",
    "import tahf4_compiler.weights.store as s",
    "from ..weights import store",
    "from ..weights.store import store",
    "from tahf4_compiler.weights.store import store",
    "def late():\n    from ..weights import store",
    "import importlib\nimportlib.import_module('tahf4_compiler.weights.store')",
    "import importlib as i\ni.import_module('..weights.store', package=__package__)",
    "from importlib import import_module\nimport_module('..store', 'tahf4_compiler.weights.other')",
    "from importlib import import_module as load\nload('.weights.store', 'tahf4_compiler')",
    "__import__('tahf4_compiler.weights.store')",
]


@pytest.mark.parametrize("text", IMPORTS)
def test_an_import_is_seen_however_it_is_written(text):
    assert [(i.source, i.target) for i in imports(sample("files.reading", text))] == [
        ("tahf4_compiler.files.reading", "tahf4_compiler.weights.store")
    ]
    assert up(sample("files.reading", text)) and not up(sample("recipe.recipe", text))


def test_a_package_is_the_place_that_its_own_imports_start_at():
    text = "from importlib import import_module\nfrom .store import store\nimport_module('.store', __name__)"
    found = {i.target for i in imports(sample("weights", text, package=True))}
    assert found == {"tahf4_compiler.weights.store"}


@pytest.mark.parametrize("text", ["import_module(name)", "__import__(f'{ROOT}.weights')", "importlib.import_module()"])
def test_an_import_of_a_computed_name_is_refused(text):
    with pytest.raises(AssertionError, match=re.escape("tahf4_compiler.files.reading:2 imports a computed name")):
        list(imports(sample("files.reading", f"\n{text}")))


def test_other_packages_do_not_count():
    text = "import torch\nimport tahf4_compilers\nfrom . import memo\nimport_module('torch')\n__import__('os')"
    assert {i.target for i in imports(sample("files.reading", text))} == {"tahf4_compiler.files"}


def test_a_circle_is_seen():
    text = "def late():\n    __import__('tahf4_compiler.format.spans')"
    both = {**sample("format.hif4", text), "tahf4_compiler.format.spans": Source("from . import hif4")}
    assert circles(both) == [["tahf4_compiler.format.hif4", "tahf4_compiler.format.spans"]]


READS = [
    "from ..weights.store import _key",
    "from ..weights.store import _key as key",
    "from ..weights import store\nstore._key",
    "from ..weights import store as s\ns._key",
    "import tahf4_compiler.weights.store as s\ns._key = 2",
    "import tahf4_compiler.weights.store\ntahf4_compiler.weights.store._key",
    "import tahf4_compiler\ntahf4_compiler.weights.store._key",
    "from .. import weights\nweights.store._key",
    "import importlib\nimportlib.import_module('tahf4_compiler.weights.store')._key",
    "import importlib\ns = importlib.import_module('tahf4_compiler.weights.store')\ns._key",
    "from ..weights import store\ns = store\ns._key",
    "from ..weights import store\ngetattr(store, '_key')",
    "from ..weights.store import store\nstore._entries",
    "from ..weights.store import Store as S\nS._entries",
]


@pytest.mark.parametrize("text", READS)
def test_a_private_name_is_seen_however_it_is_reached(text):
    assert len(list(private_reads(sample("recipe.recipe", text)))) == 1


@pytest.mark.parametrize(
    "text",
    [
        "_key = 1\n_key + 1",
        "from ..weights import store\nstore.key\nstore.__name__\nself._key",
        "from ..weights.store import store\nclass A:\n    def f(self): return self._entries",
        "from ..weights.store import Pair\nPair._make([1, 2])",
        "import torch\ntorch._key",
    ],
)
def test_what_is_public_or_ones_own_is_no_private_name(text):
    assert not list(private_reads(sample("recipe.recipe", text)))
