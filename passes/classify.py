"""Find the repeated blocks of a model by structure."""

from __future__ import annotations

import functools
import itertools
import logging
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import networkx as nx
import torch
from torch import fx

from ..graph.inputs import INPUT, ROLE, GraphInput, HeldWeight, PackedInput
from ..graph.nodes import LINEAR, is_view, module_classes, node_arg, size_hint, weight_input
from ..model.blocks import MIN_LINEARS, MIN_LINEARS_ALONE, Member, in_container, repeated_blocks
from ..model.linears import named_linears
from ..pipeline.activations import quantization_of
from ..pipeline.base import Pass, PassResult
from ..pipeline.context import Context
from ..pipeline.rules import Role, role_of

log = logging.getLogger(__name__)
aten = torch.ops.aten
PACKED_LINEAR = torch.ops.tahf4.linear.default


@dataclass(frozen=True)
class Classify(Pass):
    """Mark each linear as body (inside a repeated block) or boundary. The graph stays as it is.

    Members of one container (``blocks.0``, ``blocks.1``, ...) of one class are repeated blocks if each holds at
    least ``min_linears`` linears and reads what the one before it wrote. Modules that hold nearly all weights are
    blocks in whatever order they run: members of a container, or attributes of one parent whose graphs are the same
    (Weisfeiler-Lehman hash). The only member of a container is a block if it holds ``min_linears_alone`` linears.
    Embedders that only stand side by side are no blocks. A tree of modules cannot tell them from blocks if they have
    the width of blocks (:func:`tahf4_compiler.plan_modules`).

    All linears of a graph are body if the graph is one block by itself: if a model called it that has the compiled
    module among its repeated blocks, as with ``compile_repeated_blocks``; if neither the graph nor the module has any
    repetition; or if it returns its input and what it adds to that, in the width of the parts that repeat, and these
    are neither members of a container that follow each other nor the only one of theirs.

    None is body in a part that a model calls which has its repeated blocks elsewhere, as where embedders, blocks and
    head are compiled one by one.

    A linear belongs to the modules around its weight's name, however the forward came to it. Where no module is known,
    it belongs to those that were called.
    """

    min_linears: int = field(default=MIN_LINEARS, metadata={"least": 1})
    min_linears_alone: int = field(default=MIN_LINEARS_ALONE, metadata={"least": 1})

    def __call__(self, graph_module: fx.GraphModule, context: Context) -> PassResult:
        """Annotate ``node.meta["tahf4_role"]``."""
        graph = graph_module.graph
        model = context.surroundings.within
        blocks, order = self.repeated_blocks(graph, context)
        one_block = ""
        if context.surroundings.is_boundary and order != "listed":
            blocks, order = {}, ""
        elif model and order != "listed":
            blocks, one_block = {}, f"in a repeated block of {model}"
        elif not blocks and not context.surroundings.blocks:
            one_block = "the graph has no repeated blocks and counts as one block"
        elif order != "listed" and _adds_to_its_input(graph, context, blocks):
            one_block = "the graph adds to its input and counts as one block"
        partial = self.partial_containers(graph, context) if not model or blocks else set()
        bodies: dict[fx.Node, Role] = {}
        for node in all_linears(graph):
            context.matched(node)
            block = next(((path, blocks[path]) for path in _modules_around(node, context) if path in blocks), None)
            if block is None and (path := _path(node, context)) is not None:
                known = context.surroundings.block_of(path)
                block = known if known is not None and known[0].rpartition(".")[0] in partial else None
            node.meta[ROLE] = role_of(block, one_block)
            if node.meta[ROLE].body:
                bodies.setdefault(_source(node), node.meta[ROLE])
        for node in all_linears(graph):  # one weight has one place, also where it is called outside of its block
            if not node.meta[ROLE].body:
                node.meta[ROLE] = bodies.get(_source(node), node.meta[ROLE])
        if blocks:
            context.note(f"{len(blocks)} repeated blocks: {_ranges(blocks)}")
        outside = [node for node in all_linears(graph) if not node.meta[ROLE].body and not _is_adapter(node, context)]
        if order == "apart" and outside:
            names = [_path(node, context) or node.name for node in outside]
            log.warning(
                "%d linears stay in high precision because they stand beside %s, which repeat and do not read each "
                "other: %s. If a larger model repeats all of this, call that model: they run in 4 bits then",
                len(names), _ranges(blocks), ", ".join(names[:3]) + (", ..." if len(names) > 3 else ""),
            )  # fmt: skip
        return PassResult(graph_module, modified=False)

    def repeated_blocks(self, graph: fx.Graph, context: Context) -> tuple[dict[str, str], str]:
        """Return ``module path -> class name`` of the outermost repeated blocks of a graph.

        Returns:
            The blocks, and how they stand. ``"listed"``: there is an only member of a container among them, or members
            that read what another wrote, as in a network. ``"apart"``: several of which none reads what another wrote.
            ``""``: otherwise. Where they are not listed, they may be parts of a block.
        """
        modules, flow = _modules(graph, context), _dataflow(graph)
        members = {}
        for path, module in modules.items():
            shapes = _shapes(module.linears)
            structure = None if in_container(path, context.surroundings.containers) else ""
            if structure is not None and len(shapes) >= self.min_linears:
                structure = _structure(module)
            members[path] = Member(module.cls, shapes, structure)

        @functools.cache
        def reached(path: str) -> set[fx.Node]:
            found: set[fx.Node] = nx.descendants(flow, modules[path].linears[0])
            return found

        def follows(first: str, second: str) -> bool:
            return any(node in reached(first) for node in modules[second].linears)

        total = sum(n * k for n, k in _shapes(n for n in all_linears(graph) if not _is_adapter(n, context)))
        found = repeated_blocks(
            members, follows, total, min_linears=self.min_linears, min_linears_alone=self.min_linears_alone
        )
        pairs = [pair for pair in itertools.permutations(found, 2) if follows(*pair)]
        beside = Counter(path.rpartition(".")[0] for path in found)
        listed = {path for path in found if members[path].structure is None}
        if any(listed.issuperset(p) for p in pairs) or any(beside[path.rpartition(".")[0]] == 1 for path in listed):
            return found, "listed"
        return found, "apart" if len(found) > 1 and not pairs else ""

    def partial_containers(self, graph: fx.Graph, context: Context) -> set[str]:
        """Return the compiled module's block containers that a graph after a graph break holds only partly.

        Where all members are in the graph, each with enough linears, the flow between them has already decided.
        """
        held: dict[str, set[fx.Node]] = defaultdict(set)
        for node in all_linears(graph):
            path = _path(node, context)
            block = context.surroundings.block_of(path) if path is not None else None
            if block is not None:
                held[block[0]].add(_source(node))
        paths = context.surroundings.linear_paths
        whole = {block: sum(path.startswith(f"{block}.") for path in paths) for block in context.surroundings.blocks}
        return {
            block.rpartition(".")[0]
            for block, size in whole.items()
            if len(held[block]) < min(self.min_linears, max(size, MIN_LINEARS))
        }


def all_linears(graph: fx.Graph) -> Iterator[fx.Node]:
    """Yield the linears in execution order, those whose weights the model holds in HiF4 among them."""
    yield from (node for node in graph.nodes if weight_of(node) is not None)


def weight_of(node: fx.Node) -> fx.Node | None:
    """Return the weight that a linear reads (the codes, where the model holds it in HiF4); None for other nodes."""
    if node.target is LINEAR:
        return node_arg(node, 1)
    if node.target is not PACKED_LINEAR or not isinstance(node.args[2], fx.Node):
        return None
    source = node.args[2].meta.get(INPUT)
    return node.args[2] if isinstance(source, PackedInput) and isinstance(source.weight, HeldWeight) else None


def _path(node: fx.Node, context: Context) -> str | None:
    weight = weight_of(node)
    assert weight is not None
    if isinstance(held := weight.meta.get(INPUT), PackedInput):
        return context.surroundings.place(context.inputs[held.positions[0]]) or context.path_of(held.positions[0])
    source = weight_input(weight)
    if source is None:
        return None
    return context.surroundings.place(context.inputs[source.meta[INPUT].index]) or context.module_of(source)


def _modules_around(node: fx.Node, context: Context) -> dict[str, str]:
    """Return ``path -> class name`` of the modules that a node belongs to, outermost first."""
    path = _path(node, context) if weight_of(node) is not None else None
    called = module_classes(node)
    if path is None:
        return called
    # The tree of modules does not show a module in a plain list.
    unseen = {p: cls for p, cls in called.items() if f"{path}.".startswith(f"{p}.")}
    found = {**unseen, **context.surroundings.around(path)}
    return {p: found[p] for p in sorted(found, key=len)} or called


@dataclass
class _Module:
    cls: str
    nodes: list[fx.Node] = field(default_factory=list)
    linears: list[fx.Node] = field(default_factory=list)


def _source(node: fx.Node) -> fx.Node:
    """Return the input that holds a linear's weight, or what computes it."""
    weight = weight_of(node)
    assert weight is not None
    return weight_input(weight) or weight


def _is_adapter(node: fx.Node, context: Context) -> bool:
    weight = weight_of(node)
    source = weight_input(weight) if weight is not None else None
    return source is not None and context.surroundings.adapts(context.inputs[source.meta[INPUT].index]) is not None


def _modules(graph: fx.Graph, context: Context) -> dict[str, _Module]:
    modules: dict[str, _Module] = {}
    for node in graph.nodes:
        for path, cls in _modules_around(node, context).items():
            module = modules.setdefault(path, _Module(cls))
            module.nodes.append(node)
            if weight_of(node) is not None and not _is_adapter(node, context):
                module.linears.append(node)
    return modules


def _adds_to_its_input(graph: fx.Graph, context: Context, blocks: Iterable[str]) -> bool:
    """Whether a whole module returns its input and what it adds to that, in the width that its blocks read.

    A network does not: it has to bring its input to that width, and its output from there.
    """
    root = context.surroundings.root
    paths = {_path(node, context) for node in all_linears(graph)}
    if root is None or any(path not in paths for path, _ in named_linears(root)):
        return False  # a piece of the module
    modules = _modules(graph, context)
    widths = {_features(modules[path].linears[0]) for path in blocks}
    todo = [(node, False) for node in graph.output_node().all_input_nodes]
    for node, added in todo:  # grows
        if node.op == "placeholder" and added and isinstance(node.meta[INPUT], GraphInput):
            shape = getattr(node.meta["val"], "shape", ())
            if node.meta[INPUT].kind == "user" and widths == {size_hint(size) for size in shape[-1:]}:
                return True
        elif node.target in (aten.add.Tensor, aten.add_.Tensor):
            todo += [(source, True) for source in node.all_input_nodes if (source, True) not in todo]
        elif is_view(node):
            todo.append((node_arg(node, 0), added))
    return False


def _dataflow(graph: fx.Graph) -> nx.DiGraph:
    flow = nx.DiGraph()
    flow.add_nodes_from(graph.nodes)
    flow.add_edges_from((source, node) for node in graph.nodes for source in node.all_input_nodes)
    return flow


def _structure(module: _Module) -> str:
    """Hash a module's graph: operators and weight shapes, whatever the names."""
    graph = nx.DiGraph()
    inside = set(module.nodes)
    for node in module.nodes:
        label = f"{node.target}{_weight_shape(node)}"
        graph.add_node(node, label=label)
    graph.add_edges_from((source, node) for node in inside for source in node.all_input_nodes if source in inside)
    with warnings.catch_warnings():  # networkx says that its hashes changed in 3.5; ours are never stored
        warnings.simplefilter("ignore", UserWarning)
        return nx.weisfeiler_lehman_graph_hash(graph, node_attr="label")


def _weight_shape(node: fx.Node) -> tuple[int, ...]:
    weight = weight_of(node)
    return tuple(weight.meta["val"].shape) if weight is not None else ()


def _features(node: fx.Node) -> int:
    quantization = quantization_of(node)
    return size_hint(node_arg(quantization or node, 0).meta["val"].shape[-1])


def _shapes(nodes: Iterable[fx.Node]) -> list[tuple[int, int]]:
    """Return ``[N, K]`` of the weights that linears read: of each weight once, however often it is called."""
    weights = {_source(node): ((1, *_weight_shape(node)[:-1])[-1], _features(node)) for node in nodes}
    return [shape for shape in weights.values() if 0 not in shape]  # an empty one computes nothing


def _ranges(paths: Iterable[str]) -> str:
    """Write ``blocks.0, blocks.1, blocks.2`` as ``blocks.0-2``."""
    by_parent: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        parent, _, leaf = path.rpartition(".")
        by_parent[parent].append(leaf)
    parts = []
    for parent, leaves in by_parent.items():
        prefix = f"{parent}." if parent else ""
        numbers = sorted(int(leaf) for leaf in leaves) if all(leaf.isdigit() for leaf in leaves) else []
        if len(numbers) > 1 and numbers == list(range(numbers[0], numbers[-1] + 1)):
            parts.append(f"{prefix}{numbers[0]}-{numbers[-1]}")
        else:
            parts += [f"{prefix}{leaf}" for leaf in leaves]
    return ", ".join(parts)
