"""The explorer, a local page that samples the models of a run."""
