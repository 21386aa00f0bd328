"""Which pass, then which linear, adds the error; and a program that shows it."""
