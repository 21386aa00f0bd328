"""Passes: what one is, their order, what each must keep, and what it may use."""
