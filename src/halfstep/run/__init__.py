"""A plan in a folder: its specification, the loop over its stages, its cost."""
