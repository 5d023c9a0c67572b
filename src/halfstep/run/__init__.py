"""Runs a plan in a folder: specification, loop over the stages, cost."""
