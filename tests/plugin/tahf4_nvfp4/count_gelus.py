"""The smallest pass: it looks, and says what it saw."""

import torch

import tahf4_compiler as tahf4


@tahf4.register_pass(after="plan", before="quantize")
class CountGelus(tahf4.Pass):
    """Count the GELUs of a graph, and attach to each linear how many channels it reads."""

    per: int = 64  # channels are counted in units of so many

    def __call__(self, graph_module, context):
        """Look; the graph stays as it is."""
        for node in graph_module.graph.find_nodes(op="call_function", target=torch.ops.aten.gelu.default):
            context.matched(node)
        for node in graph_module.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default):
            context.attach(node, channel_units=node.args[1].meta["val"].shape[1] / self.per)
        context.note(f"{context.matches} GELUs")
        return tahf4.PassResult(graph_module, modified=False)
