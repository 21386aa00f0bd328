"""Statistics of a model's activations, and the recipe that follows from them."""
