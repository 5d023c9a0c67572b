"""The explorer: a local page on which the models of a run are sampled."""
