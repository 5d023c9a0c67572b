"""Samples of models, and metrics of these samples. Both are computed once and then stored."""
