"""Runs passes one after the other, and does between them what every pass needs.

After each pass the graph is linted, shapes and dtypes of changed nodes are propagated again, the outputs are
compared with what they were, matches and time are recorded, and the readable graph is kept for the dump.
With ``verify=True`` the graph also runs before and after on the example inputs.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from torch import fx

from ..errors import PassError, Tahf4Error
from ..graph.nodes import node_words
from .activations import spell_out
from .base import Pass, PassResult
from .context import Context
from .contract import check, check_conditions, interface_of
from .records import PassRecord, readable, same_shown, shown_nodes
from .running import all_finite, relative_error, run_graph

__all__ = ["PassManager"]

log = logging.getLogger("tahf4_compiler.passes")


class PassManager:
    """Runs an ordered list of passes over a graph.

    Attributes:
        passes: in execution order.
        keep_text: whether records hold the readable graphs.
    """

    def __init__(self, passes: Sequence[Pass], *, keep_text: bool = False) -> None:
        """Take passes in their final order."""
        self.passes = list(passes)
        self.keep_text = keep_text

    def run(
        self,
        graph_module: fx.GraphModule,
        context: Context,
        each: Callable[[PassRecord, fx.GraphModule], None] | None = None,
    ) -> tuple[fx.GraphModule, list[PassRecord]]:
        """Run every pass.

        Args:
            graph_module: the captured graph; it is changed in place.
            context: shared by the passes.
            each: called with the record and the graph after each pass, and for the captured graph. The graph goes on
                to change: keep a copy.

        Returns:
            The last graph and one record for the captured graph and each pass.

        Raises:
            PassError: a pass raised, broke a condition of its own, or left a graph that breaks the contract
                (dangling use, lost input, outputs of another shape or dtype), or changed results although it claims
                not to (``verify_tolerance``). The message names the pass.
        """
        text = readable(graph_module) if self.keep_text else ""
        records = [self._record("captured", graph_module, text)]
        reference = previous = run_graph(graph_module, context) if context.options.verify else None
        if reference is not None and not all_finite(reference):
            records[0].error = float("nan")  # nothing can be compared with it
        if each is not None:
            each(records[0], graph_module)
        for item in self.passes:
            start = time.perf_counter()
            context.matches, context.current, context.node = 0, item.name, None
            shown = shown_nodes(graph_module) if self.keep_text else []
            before = interface_of(graph_module)
            result = self._call(item, graph_module, context)
            graph_module = result.graph_module
            spell_out(graph_module.graph)
            check(item, graph_module, context, before)
            if self.keep_text and not same_shown(shown, shown_nodes(graph_module)):
                text = readable(graph_module)
            record = self._record(item.name, graph_module, text)
            record.matches, record.modified = context.matches, result.modified
            record.seconds = time.perf_counter() - start
            if reference is not None:
                try:
                    outputs = run_graph(graph_module, context)
                except Exception as error:
                    raise PassError(
                        f"the graph does not run after pass {item.name!r}: {type(error).__name__}: {error}"
                    ) from error
                record.error = relative_error(previous, outputs)
                record.total_error = relative_error(reference, outputs)
                if records[0].error is None:
                    _check_error(item, record, context.options.verify_tolerance)
                previous = outputs
            records.append(record)
            if each is not None:
                each(record, graph_module)
            logging.getLogger(f"{log.name}.{item.name}").info(
                "%s: %d matches, %d nodes, %.3f s", item.name, record.matches, record.nodes, record.seconds
            )
        graph_module.recompile()
        return graph_module, records

    def _record(self, name: str, graph_module: fx.GraphModule, text: str) -> PassRecord:
        return PassRecord(name, nodes=len(graph_module.graph.nodes), readable=text)

    def _call(self, item: Pass, graph_module: fx.GraphModule, context: Context) -> PassResult:
        try:
            check_conditions(item, "requires", graph_module, context)
            result = item(graph_module, context)
            if isinstance(result, PassResult) and isinstance(result.graph_module, fx.GraphModule):
                check_conditions(item, "ensures", result.graph_module, context)
        except Tahf4Error as error:
            if type(item).__module__.startswith("tahf4_compiler.") or repr(item.name) in str(error):
                raise
            raise type(error)(f"pass {item.name!r}{_where(context)}: {error}") from error
        except Exception as error:
            raise PassError(
                f"pass {item.name!r} ({type(item).__module__}.{type(item).__qualname__}) failed"
                f"{_where(context)}: {type(error).__name__}: {error}. Leave it out with "
                f"options={{'disable_passes': [{item.name!r}]}}."
            ) from error
        if not isinstance(result, PassResult) or not isinstance(result.graph_module, fx.GraphModule):
            found = type(result).__name__
            found += f"({type(result.graph_module).__name__}, ...)" if isinstance(result, PassResult) else ""
            raise PassError(
                f"pass {item.name!r} returned {found}; expected PassResult(graph_module, modified)"
            )
        return result


def _check_error(item: Pass, record: PassRecord, tolerance: float | None) -> None:
    """Raise :class:`PassError` if a pass that claims to keep results changed them."""
    if tolerance is None or (record.modified and not item.exact) or (record.error or 0.0) <= tolerance:
        return
    claim = "only how something is computed (exact)" if record.modified else "nothing (modified=False)"
    raise PassError(
        f"pass {item.name!r} says that it changed {claim}, but the outputs' relative error grew by {record.error:.3e}; "
        f"verify_tolerance is {tolerance:g}. Look for swapped operands, or for results of one shape in another order."
    )


def _where(context: Context) -> str:
    """Say which node a pass was at (:meth:`Context.at`), or else what it matched last."""
    return f" at node {node_words(context.node)}" if context.node is not None else ""
