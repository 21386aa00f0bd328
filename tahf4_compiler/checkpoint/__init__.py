"""Checkpoints on disk: read without trust, converted as a stream, written whole, listed with their hashes."""
