"""Files: read without trust, written beside and renamed."""
