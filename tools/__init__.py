"""The tahf4 command line: one command a file."""
