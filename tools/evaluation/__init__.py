"""How well quantized models do: a stress variant of a model, formats to compare with, measures."""
