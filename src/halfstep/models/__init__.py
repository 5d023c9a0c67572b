"""Models in stage folders, which can be saved, loaded and sampled without the trainer."""
