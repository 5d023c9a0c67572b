"""Models in stage folders: saving, loading and sampling, without the trainer."""
