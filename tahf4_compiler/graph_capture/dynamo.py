"""From the graph that Dynamo hands to a backend to ATen operators."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from ..errors import CaptureError, GradientError
from ..graph.inputs import INPUT, GraphInput
from ..graph.nodes import module_path, root_expression
from ..model.tree import Surroundings
from ..torch_private.dynamo import (
    changing_floats,
    compilation,
    compile_for_values,
    constant_weights,
    dynamo_scope,
    dynamo_source,
    fake_input,
    keep_number,
)
from .captured import Capture
from .decompositions import DECOMPOSITIONS
from .functions import Tracing
from .regions import inline_regions

__all__ = ["capture_dynamo"]

aten = torch.ops.aten


def capture_dynamo(graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> Capture:
    """Bring the graph that Dynamo hands to a backend into ATen operators.

    Args:
        graph_module: Dynamo's graph.
        example_inputs: the real inputs, in the order of the graph's placeholders.

    Returns:
        The captured graph. Tensors that the graph holds as attributes become inputs at its end.

    Raises:
        GradientError: the graph needs gradients.
        CaptureError: called outside of a compilation, or tracing failed.
    """
    refuse_gradients(graph_module, example_inputs)
    context = compilation()
    if context is None or context.fake_mode is None:
        raise CaptureError(
            "backend 'tahf4' was called outside of a compilation. Use torch.compile(model, backend=\"tahf4\"), or "
            "tahf4.capture(model, args) and tahf4.lower(capture)."
        )
    inputs = tuple(example_inputs)
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    sources = [dynamo_source(node) for node in placeholders]
    fakes = [fake_input(context, value) for value in inputs]
    graph_module = inline_regions(graph_module)
    _write_data_as_detach(graph_module)
    run = Tracing(graph_module, context.fake_mode).run
    try:
        with torch.fx.traceback.preserve_node_meta(), context.fake_mode:
            # Inputs are fake already; another tracing mode would copy them and lose their symbolic values.
            trace = make_fx(run, DECOMPOSITIONS, tracing_mode="real", pre_dispatch=True, _allow_non_fake_inputs=True)
            traced = trace(*fakes)
    except Exception as error:
        if any(hasattr(value, "full_tensor") for value in inputs):
            raise CaptureError(
                "the graph reads DTensors, which tahf4 does not compile: pack the model, then divide it into plain "
                "tensors with tahf4_compiler.distributed.tensor_parallel, or HiF4ColwiseParallel(local=True) and "
                "HiF4RowwiseParallel(local=True). FSDP2 and context parallelism need nothing of the kind."
            ) from error
        if setting := constant_weights():
            raise CaptureError(
                f"{setting} is on: Dynamo gives the graph its weights as constants, but tahf4 "
                "looks weights up at each call. Switch it off; tahf4 packs the weights once without it."
            ) from error
        raise CaptureError(
            f"tracing the graph to ATen operators failed: {type(error).__name__}: {error}. The same graph runs with "
            'backend="inductor"; please report it with the output of TORCH_LOGS="graph_code".'
        ) from error
    for node in reversed(list(traced.graph.nodes)):
        if node.target in _READS and not node.users:  # a Python number that tracing found to be constant
            traced.graph.erase_node(node)
    _fix_numbers(traced)
    roots = {_parameter_root(value, source) for value, source in zip(inputs, sources, strict=True)} - {""}
    for index, (node, value, source, fake) in enumerate(
        zip([n for n in traced.graph.nodes if n.op == "placeholder"], inputs, sources, fakes, strict=True)
    ):
        keep_number(fake, node.meta["val"])
        kind, path = _kind(value, source), _path(source, roots)
        node.meta[INPUT] = GraphInput(kind, path or placeholders[index].name, index)
        _rename(node, f"{kind[0]}_{path}" if kind in ("parameter", "buffer") else placeholders[index].name)
    _name_modules(traced, roots)
    inputs += _lift_attributes(traced, context.fake_mode)
    traced.recompile()
    values = _root_values(roots)
    surroundings = Surroundings.find(values)
    modules = [value for value in values if isinstance(value, nn.Module)]
    for module in modules:
        surroundings.watch(module)
    name = type(modules[0]).__name__ if len(roots) == len(modules) == 1 else "function"
    return Capture(traced, inputs, context.fake_mode, surroundings, name)


def _write_data_as_detach(graph_module: fx.GraphModule) -> None:
    """Replace ``tensor.data``, which tracing cannot follow, by ``detach``: both share the tensor's memory."""
    for node in graph_module.graph.nodes:
        if getattr(node.target, "__name__", "") == "_get_data_attr":
            node.op, node.target = "call_function", torch.ops.aten.detach.default
    graph_module.recompile()


def _fix_numbers(graph_module: fx.GraphModule) -> None:
    """Compile again for the value of each Python number whose changes Inductor would not see.

    Dynamo makes a float that changes between calls a tensor, which the graph reads. Inductor computes with that tensor
    where it is an operand of arithmetic; elsewhere it takes the value of the first call, and can lose the guard on it.
    """
    arithmetic = (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor)
    lost: set[str] = set()
    for node in graph_module.graph.nodes:
        if floats := changing_floats(node.meta.get("val")):
            for user in node.users:
                operand = user.target in arithmetic and node not in user.kwargs.values()
                if not operand and not changing_floats(user.meta.get("val")):
                    lost |= floats
    if lost:
        compile_for_values(lost)


_READS = (torch.ops.aten.item.default, torch.ops.aten._local_scalar_dense.default)


def refuse_gradients(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> None:
    """Raise :class:`GradientError` if running the graph would record gradients."""
    tensors = [value for value in inputs if isinstance(value, torch.Tensor)]
    tensors += list(graph_module.parameters())
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise GradientError(
            "this graph needs gradients: gradient mode is on and an input or parameter requires them, but 4-bit "
            "codes have none. Call the model under torch.no_grad() or torch.inference_mode(), or freeze it with "
            "model.requires_grad_(False)."
        )


def _kind(value: Any, source: str) -> Any:
    if isinstance(value, nn.Parameter):
        return "parameter"
    return "buffer" if isinstance(value, torch.Tensor) and "_buffers[" in source else "user"


def _parameter_root(value: Any, source: str) -> str:
    """Return the expression of the module that a parameter was reached from."""
    if not isinstance(value, nn.Parameter):
        return ""
    return source.partition("._modules")[0].partition(".__dict__")[0].partition("._parameters")[0]


def _path(source: str, roots: set[str]) -> str:
    """Return a dotted name; with several root modules in one graph it starts with the root's own name."""
    path = module_path(source)
    if len(roots) > 1 and (root := root_expression(source)):
        return f"{root[3:-2]}.{path}"
    return path


def _name_modules(graph_module: fx.GraphModule, roots: set[str]) -> None:
    """Write module paths relative to their root, as torch.export does.

    With several roots (a function that calls two models) each path begins with its root, so that one
    model's blocks are not taken for another's. A module in a plain list (``self.blocks[0]``) is a root, but has its
    place in the list as well, so that it can be a block.
    """

    def relative(path: str) -> str:
        root = max((r for r in roots if path.startswith(r)), key=len, default="")
        inner = module_path(path[len(root) :])
        if not inner and re.search(r"\.\w+\[\d+\]$", root):
            return module_path(root)
        return f"{module_path(root) or root_expression(root)[3:-2]}.{inner}" if len(roots) > 1 and inner else inner

    for node in graph_module.graph.nodes:
        if stack := node.meta.get("nn_module_stack"):
            node.meta["nn_module_stack"] = {key: (relative(path), cls) for key, (path, cls) in stack.items()}


def _rename(node: fx.Node, name: str) -> None:
    """Name a placeholder after what it stands for, as torch.export does (``p_blocks_0_attn1_to_q_weight``)."""
    node._rename(re.sub(r"\W", "_", name))
    node.target = node.name


def _root_values(roots: set[str]) -> list[Any]:
    """Return what the graph's parameters were reached from: modules, one or several, and parameters by themselves."""
    found = []
    for expression in roots:
        try:
            found.append(_value(ast.parse(expression, mode="eval").body, dynamo_scope()))
        except (SyntaxError, LookupError, AttributeError, TypeError):  # the graph's own names serve then
            continue
    return found


def _value(node: ast.expr, scope: Mapping[str, Any]) -> Any:
    """Return what a source of Dynamo stands for: a variable, its items and attributes (``L['self'].inner``)."""
    if isinstance(node, ast.Name):
        return scope[node.id]
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
        return _value(node.value, scope)[node.slice.value]
    if isinstance(node, ast.Attribute):
        return getattr(_value(node.value, scope), node.attr)
    raise TypeError(f"a source of Dynamo holds {ast.unparse(node)!r}, which is no variable, item or attribute")


def _lift_attributes(graph_module: fx.GraphModule, fake_mode: Any) -> tuple[torch.Tensor, ...]:
    """Turn tensors that the graph holds as attributes into inputs at its end; return their values."""
    graph = graph_module.graph
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    by_target: dict[str, fx.Node] = {}
    values: list[torch.Tensor] = []
    for node in [n for n in graph.nodes if n.op == "get_attr"]:
        value = _attribute(graph_module, node.target)
        if not isinstance(value, torch.Tensor):
            continue
        if isinstance(value, torch._subclasses.FakeTensor):
            raise CaptureError(
                f"the graph reads {node.target!r}, a tensor that tracing lost track of (of shape "
                f"{tuple(value.shape)}). Writes through .data or other ways around autograd do that; use an in-place "
                "operator under torch.no_grad() instead."
            )
        if node.target not in by_target:
            anchor = [n for n in graph.nodes if n.op == "placeholder"]
            with graph.inserting_after(anchor[-1]) if anchor else graph.inserting_before(next(iter(graph.nodes))):
                lifted = graph.placeholder(str(node.target).replace(".", "_"))
            kind: Any = "parameter" if isinstance(value, nn.Parameter) else "constant"
            lifted.meta[INPUT] = GraphInput(kind, str(node.target), len(placeholders) + len(values))
            lifted.meta["tahf4_lifted"] = True
            lifted.meta["val"] = fake_mode.from_tensor(value, static_shapes=True)
            by_target[node.target] = lifted
            values.append(value)
        node.replace_all_uses_with(by_target[node.target])
        graph.erase_node(node)
    graph_module.recompile()
    return tuple(values)


def _attribute(module: Any, target: str) -> Any:
    for part in target.split("."):
        module = getattr(module, part)
    return module
