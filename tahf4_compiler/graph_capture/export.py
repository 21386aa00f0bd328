"""Both captures, ending in one language: pre-dispatch ATen operators, weights as inputs.

``torch.export`` gives that language itself. A Dynamo graph is traced once more with ``make_fx`` under the fake
mode of the current ``TracingContext``, so that symbolic shapes stay the ones Dynamo guards on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from ..errors import CaptureError
from ..graph.inputs import INPUT, GraphInput
from ..model.tree import Surroundings
from .captured import Capture
from .regions import inline_regions

__all__ = ["capture", "from_program"]


def capture(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
) -> Capture:
    """Capture a module with ``torch.export``.

    Args:
        model: any module that exports. Its parameters stay its own: a later change is seen by later calls.
        args: example arguments.
        kwargs: example keyword arguments.
        dynamic_shapes: as for ``torch.export.export``.

    Returns:
        The captured graph.

    Raises:
        CaptureError: ``torch.export`` cannot capture the model; its own error is the cause.
    """
    if not isinstance(model, nn.Module):
        raise CaptureError(f"capture got a {type(model).__name__}; expected an nn.Module")
    keywords = dict(kwargs or {})
    try:
        with torch.no_grad():
            program = torch.export.export(model, tuple(args), keywords, dynamic_shapes=dynamic_shapes, strict=False)
    except Exception as error:
        raise CaptureError(
            f"torch.export cannot capture {type(model).__name__}: {error}. Check the example arguments with "
            "model(*args, **kwargs) first; a model that torch.compile must break into several graphs runs "
            'through torch.compile(model, backend="tahf4") instead.'
        ) from error
    return from_program(program, model, tuple(args), keywords)


def capture_program(program: Any) -> Capture:
    """Take an exported program (``torch.export.ExportedProgram``) with the example inputs that it holds.

    Raises:
        CaptureError: it gives back what it writes, or has inputs of a kind that tahf4 does not run.
    """
    args, kwargs = program.example_inputs
    return from_program(program, program.module(), tuple(args), dict(kwargs))


def from_program(program: Any, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Capture:
    """Take an exported program, with the module that holds its parameters and the arguments it was exported with.

    Raises:
        CaptureError: it gives back what it writes, or has inputs of a kind that tahf4 does not run.
    """
    from torch.export.graph_signature import InputKind

    kinds = {
        InputKind.PARAMETER: "parameter",
        InputKind.BUFFER: "buffer",
        InputKind.CONSTANT_TENSOR: "constant",
        InputKind.USER_INPUT: "user",
    }
    if program.graph_signature.buffers_to_mutate or program.graph_signature.user_inputs_to_mutate:
        raise CaptureError(
            f"the program of {type(model).__name__} was decomposed: what it writes to its buffers or inputs it gives "
            "back instead, and nobody would copy it. Take the program that torch.export.export returned, "
            "without run_decompositions(), or model.eval() if a normalization layer is the reason."
        )
    graph_module = inline_regions(program.graph_module)
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    lifted: list[tuple[str, str]] = []
    for index, (node, spec) in enumerate(zip(placeholders, program.graph_signature.input_specs, strict=True)):
        if spec.kind not in kinds:
            raise CaptureError(f"the exported graph has an input of kind {spec.kind}, which tahf4 does not run")
        kind = kinds[spec.kind]
        node.meta[INPUT] = GraphInput(kind, spec.target or node.name, index)  # type: ignore[arg-type]
        if kind != "user":
            lifted.append((kind, spec.target))
    in_spec, out_spec = program.call_spec.in_spec, program.call_spec.out_spec
    constants = dict(program.constants)
    users = [node for node in placeholders if node.meta[INPUT].kind == "user"]
    captured_values = torch.utils._pytree.tree_leaves((args, kwargs))
    for node, value in zip(users, captured_values, strict=True):
        node.meta.setdefault("val", value)
    ranges = dict(program.range_constraints)

    def fetch(kind: str, target: str) -> torch.Tensor:
        if kind == "parameter":
            return model.get_parameter(target)
        return model.get_buffer(target) if kind == "buffer" else constants[target]

    def bind(call_args: tuple[Any, ...], call_kwargs: dict[str, Any]) -> tuple[Any, ...]:
        ordered = {name: call_kwargs[name] for name in kwargs if name in call_kwargs}
        ordered.update(call_kwargs)
        flat, spec = torch.utils._pytree.tree_flatten((call_args, ordered))
        if spec != in_spec or len(flat) != len(users):
            raise CaptureError(
                f"called with arguments of structure {spec}; the model was captured with {in_spec}. "
                "Pass the same positional and keyword arguments as at capture."
            )
        _check_arguments(flat, users, captured_values, ranges)
        return (*(fetch(kind, target) for kind, target in lifted), *flat)

    def unflatten(flat: Any) -> Any:
        return torch.utils._pytree.tree_unflatten(flat, out_spec)

    fake_mode = next(
        (n.meta["val"].fake_mode for n in placeholders if hasattr(n.meta.get("val"), "fake_mode")),
        None,
    )
    return Capture(
        graph_module,
        bind(args, kwargs),
        fake_mode,
        Surroundings(model),
        type(model).__name__,
        bind=bind,
        unflatten=unflatten,
    )


def _check_arguments(
    values: Sequence[Any], placeholders: Sequence[fx.Node], captured: Sequence[Any], ranges: Mapping[Any, Any]
) -> None:
    """Raise :class:`CaptureError` for an argument that the captured graph was not made for."""
    sizes: dict[Any, int] = {}
    for value, node, example in zip(values, placeholders, captured, strict=True):
        expected = node.meta["val"]
        if not isinstance(example, torch.Tensor):
            symbolic = isinstance(expected, torch.SymInt | torch.SymFloat | torch.SymBool)
            # repr tells -0.0 from 0.0, and NaN is itself
            if type(value) is not type(example) or (repr(value) != repr(example) and not symbolic):
                raise CaptureError(
                    f"argument {node.name!r} is {value!r}; it was {example!r} at capture, a constant of the graph. "
                    "Capture the model again with this value."
                )
            continue
        if not isinstance(value, torch.Tensor):
            raise CaptureError(f"argument {node.name!r} is a {type(value).__name__}; expected a tensor")
        found = (tuple(value.shape), value.dtype, value.device)
        wrong = value.dtype != expected.dtype or value.device != expected.device or value.dim() != expected.dim()
        for size, wanted in zip(value.shape, expected.shape, strict=False):
            if not isinstance(wanted, torch.SymInt):
                wrong |= size != wanted
                continue
            symbol = wanted.node.expr
            wrong |= sizes.setdefault(symbol, size) != size
            if (interval := ranges.get(symbol)) is not None:
                wrong |= not interval.lower <= size <= interval.upper
        if wrong:
            raise CaptureError(
                f"argument {node.name!r} is {found}; the graph was captured for "
                f"{(tuple(expected.shape), expected.dtype, expected.device)}. Capture the model again, or name the "
                "axis in dynamic_shapes."
            )
