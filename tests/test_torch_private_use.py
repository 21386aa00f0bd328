"""What is private to PyTorch stays in ``torch_private``, and only ``torch_private.frames`` reads frames."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest
from test_architecture import product

PRIVATE = "tahf4_compiler.torch_private"

PUBLIC = (
    "torch._dynamo.config",  # the documentation of torch.compile names these
    "torch._dynamo.list_backends",
    "torch._dynamo.mark_static",
    "torch._dynamo.maybe_mark_dynamic",
    "torch._dynamo.reset",
    "torch._inductor.config",
    "torch._inductor.list_mode_options",
    "torch._inductor.list_options",
    "torch._ops.HigherOrderOperator",  # what a node's target may be; both have no other name
    "torch._ops.OpOverload",
    "torch._scaled_mm",  # measured, beside ours
    "torch._subclasses.FakeTensor",  # the documentation of fake tensors
    "torch._subclasses.FakeTensorMode",
    "torch._subclasses.fake_tensor.FakeTensor",
    "torch._subclasses.fake_tensor.FakeTensorMode",
    "torch.ops.aten",  # the operators of captured graphs, whatever they are called
    "torch.utils._pytree",  # each release of torch has it, and only the latest ones another name
    "torch.utils._python_dispatch.TorchDispatchMode",  # the notes on extending PyTorch
)
"""What PyTorch documents, or has no public name for, and does not change."""

FRAMES = {
    *("_getframe", "currentframe", "setprofile", "settrace", "get_referrers"),
    *("tb_frame", "gi_frame", "f_back", "f_code", "f_globals", "f_locals"),
}


def dotted(node: ast.expr) -> str:
    """Return ``a.b.c`` as it is written, or an empty string for what is no plain name."""
    if isinstance(node, ast.Name):
        return node.id
    base = dotted(node.value) if isinstance(node, ast.Attribute) else ""
    return f"{base}.{node.attr}" if base else ""  # type: ignore[attr-defined]


def names(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield what a module imports and reads by its full name, with the line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.Attribute):
            yield dotted(node), node.lineno


def private_uses(text: str) -> dict[str, int]:
    """Return the private names of PyTorch that a text uses, with the line of each."""
    found = {}
    for name, line in names(ast.parse(text)):
        parts = name.split(".")
        private = parts[0] == "torch" and any(part.startswith("_") and not part.startswith("__") for part in parts)
        # Of "torch._inductor.config" it reads "torch._inductor" on the way.
        listed = any(f"{name}.".startswith(f"{known}.") or known.startswith(f"{name}.") for known in PUBLIC)
        if private and not listed:
            found[name] = line
    return found


def frame_uses(text: str) -> dict[str, int]:
    tree = ast.parse(text)
    return {n.attr: n.lineno for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr in FRAMES}


@pytest.mark.parametrize(
    ("find", "allowed"), [(private_uses, PRIVATE), (frame_uses, f"{PRIVATE}.frames")], ids=["private names", "frames"]
)
def test_torch_private_alone_uses(find, allowed):
    elsewhere = {name: source for name, source in product().items() if not f"{name}.".startswith(f"{allowed}.")}
    found = {f"{name}:{line}": use for name, source in elsewhere.items() for use, line in find(source.text).items()}
    assert found == {}, "put it into tahf4_compiler/torch_private, with a test of what it promises"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("from torch._inductor import compile_fx", {"torch._inductor.compile_fx"}),
        ("import torch._inductor.lowering", {"torch._inductor.lowering"}),
        ("torch._C._get_tracing_state()", {"torch._C._get_tracing_state", "torch._C"}),
        ("from torch.fx.graph_module import _format_import_block", {"torch.fx.graph_module._format_import_block"}),
        ("import torch._dynamo\ntorch._dynamo.reset()\nfrom torch._subclasses import FakeTensor", set()),
        ("torch.utils._pytree.tree_map", set()),
        ("torch.__version__", set()),
    ],
)
def test_a_private_name_is_found(text, found):
    assert set(private_uses(text)) == found


def test_every_listed_name_is_used():
    used = {name for source in product().values() for name, _ in names(ast.parse(source.text))}
    assert [known for known in PUBLIC if not any(f"{name}.".startswith(f"{known}.") for name in used)] == []
