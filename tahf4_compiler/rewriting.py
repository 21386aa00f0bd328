"""What a pass needs to read linears in a graph and to put packed weights in their place."""

from .graph.inputs import DECISION, INPUT, PackedWeight
from .graph.nodes import linears, mutates, node_arg, weight_input
from .pipeline.activations import call, drop_unused_weights, packed_input
from .pipeline.context import decisions_of

__all__ = [
    "DECISION",
    "INPUT",
    "PackedWeight",
    "call",
    "decisions_of",
    "drop_unused_weights",
    "linears",
    "mutates",
    "node_arg",
    "packed_input",
    "weight_input",
]
