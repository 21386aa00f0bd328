"""What joins from outside of the core: entry points, and faster functions of backends."""
