"""What the passes of one compilation share: options, inputs, the plan, notes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from ..errors import PassError
from ..graph.inputs import DECISION, INPUT, NUMBERS
from ..graph.nodes import linear_path, node_words
from ..model.reasons import Cause, cause_of
from ..model.tree import Surroundings
from ..options import Options

__all__ = ["Context", "Decision", "branch_bytes", "decisions_of"]


@dataclass
class Decision:
    """What the plan decided for one linear.

    Attributes:
        module: path of the module, as in ``model.get_submodule``; for a weight that is no module's
            ``weight`` the parameter's full name.
        k: input features.
        n: output features.
        decision: ``"hif4"``, ``"high_precision"``, or the name of another number format that a plug-in brings.
        reason: why, in words; a :class:`~tahf4_compiler.model.reasons.Reason` also knows its kind.
        bytes_before: of the weight as it is.
        bytes_after: of the weight as the plan leaves it.
        flops: of one call with the example inputs, 2 * rows * k * n, summed over its calls.
        kernel: what runs it, filled in by ``lower``.
        node: name of the ``aten.linear`` node it was made for.
        weight_index: the weight's position among the captured graph's arguments, -1 if it is computed.
        numbers: what passes attached (:meth:`Context.attach`), by name.
        activation_bits: of the activation, 4, 8 or 16, where the decision is ``"hif4"``.
        rank: of the branch beside the 4-bit product, 0 for none. ``bytes_after`` has its bytes, ``flops`` lack its
            FLOPs.
        span: units of a row that share a level-1 scale, in the activation and the weight; 0 for all.
        rounding: of their elements, see :func:`tahf4_compiler.format.hif4.quantize`.
    """

    module: str
    k: int
    n: int
    decision: str
    reason: str
    bytes_before: int
    bytes_after: int
    flops: int = 0
    kernel: str = ""
    node: str = ""
    weight_index: int = -1
    numbers: dict[str, float | int | str] = field(default_factory=dict)
    activation_bits: int = 4
    rank: int = 0
    span: int = 1
    rounding: str = "half_away"

    @property
    def cause(self) -> Cause:
        """The kind of the reason."""
        return cause_of(self.reason)


def branch_bytes(n: int, k: int, rank: int, size: int) -> int:
    """Return the bytes of a low-rank branch whose values have so many bytes."""
    return rank * (n + k) * size


def decisions_of(node: fx.Node) -> tuple[Decision, ...]:
    """Return the decisions about the linears that a node stands for: several where products were merged."""
    found: tuple[Decision, ...] = node.meta.get(DECISION, ())
    return found


@dataclass
class Context:
    """What passes of one compilation share.

    Attributes:
        options: the validated options.
        inputs: example inputs, one for each placeholder of the captured graph.
        surroundings: the module that was compiled, as far as it is known.
        fake_mode: mode of the graph's ``meta["val"]``.
        plan: decisions in execution order; written by ``plan``, read by everything after it.
        notes: what passes have to say, by pass name, printed in the report.
        paths: the parameters' paths in the captured graph, by position.
        tied: for the multipliers of packed linears, by position: that of the first one that is equal.
        sizes: of results, by what they depend on: :mod:`~tahf4_compiler.pipeline.shapes` asks once for all passes.
    """

    options: Options
    inputs: tuple[Any, ...]
    surroundings: Surroundings
    fake_mode: Any
    plan: list[Decision] = field(default_factory=list)
    notes: dict[str, list[str]] = field(default_factory=dict)
    matches: int = 0
    current: str = ""
    node: fx.Node | None = field(default=None, repr=False)
    paths: dict[int, str] = field(default_factory=dict, repr=False)
    tied: dict[int, int] = field(default_factory=dict, repr=False)
    sizes: dict[Any, Any] = field(default_factory=dict, repr=False)

    def matched(self, node: fx.Node | None = None, count: int = 1) -> None:
        """Count a match of the running pass; ``node`` may name what matched, for an error message."""
        self.matches += count
        self.node = node if node is not None else self.node

    @contextlib.contextmanager
    def at(self, node: fx.Node) -> Iterator[None]:
        """Work on a node: an error that is raised inside names it."""
        self.node = node
        yield
        self.node = None

    def attach(self, node: fx.Node, **numbers: float | int | str) -> None:
        """Attach numbers to a node, for the report and ``plan.json``.

        They are merged into ``node.meta["tahf4_numbers"]`` and, where the node stands for linears of the plan, into
        their :class:`Decision`. For another node the report has a line under the running pass's name.

        Args:
            node: of the graph at hand.
            numbers: by name; a later one of a name takes the place of an earlier one. NaN and infinities become
                strings.

        Raises:
            PassError: a value is no ``float``, ``int`` or ``str`` (take ``.item()`` of a tensor).
        """
        for name, value in numbers.items():
            if isinstance(value, bool) or not isinstance(value, float | int | str):
                raise PassError(
                    f"pass {self.current!r} attached {name}={value!r} ({type(value).__name__}) to node "
                    f"{node_words(node)}; expected a float, an int or a string"
                )
        # JSON has no numbers for these.
        words = {n: str(v) for n, v in numbers.items() if isinstance(v, float) and not math.isfinite(v)}
        numbers = {**numbers, **words}
        node.meta[NUMBERS] = {**node.meta.get(NUMBERS, {}), **numbers}
        found = decisions_of(node)
        for decision in found:
            decision.numbers.update(numbers)
        if not found:
            self.note(f"{node_words(node)}: " + ", ".join(f"{name} {value}" for name, value in numbers.items()))

    def module_of(self, weight: fx.Node) -> str:
        """Return the module path of a parameter's placeholder, in the module that was compiled."""
        source = weight.meta[INPUT]
        return self.surroundings.path(self.inputs[source.index]) or linear_path(source.path)

    def path_of(self, index: int) -> str:
        """Return the module path of the parameter at a position among the captured graph's arguments."""
        return self.surroundings.path(self.inputs[index]) or self.paths.get(index, "")

    def note(self, text: str) -> None:
        """Add a line to the report under the running pass's name."""
        self.notes.setdefault(self.current, []).append(text)
