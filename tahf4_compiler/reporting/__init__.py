"""What a compilation did, as data and text: snapshots, dumps, the report."""
