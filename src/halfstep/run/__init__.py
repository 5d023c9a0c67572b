"""Runs a plan in a folder: specifies the run, trains its stages and estimates its cost."""
