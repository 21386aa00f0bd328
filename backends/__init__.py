"""How a lowered graph runs."""
