"""A model as a stage's folder holds it: written, read and sampled from, without the trainer."""
