"""Weights in 4 bits: packed, checked, stored, and bound to the inputs of a graph."""
