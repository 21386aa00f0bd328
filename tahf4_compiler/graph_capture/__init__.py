"""Dynamo and torch.export, ending in one kind of graph."""
