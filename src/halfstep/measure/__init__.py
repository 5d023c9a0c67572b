"""Samples of models, and metrics of these samples. Each is computed once and then stored."""
