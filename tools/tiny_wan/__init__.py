"""The tiny Wan2.2 pipeline that ships with tahf4, and the script that trains it."""
