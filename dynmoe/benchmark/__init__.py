"""``dynmoe-bench``: measurements of speed and memory, their files and their comparison."""
