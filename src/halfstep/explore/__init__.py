"""The explorer: a local page for sampling the models of a run."""
