"""What `tahf4 inspect` and `tahf4 explain` show."""
