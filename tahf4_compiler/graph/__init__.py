"""What the nodes of a captured graph stand for, and questions about them."""
