"""A model as a tree of modules: its linears, its denoisers, its steps, what is attached to its weights."""
