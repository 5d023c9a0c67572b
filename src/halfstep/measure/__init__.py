"""Samples of models and their metrics, each computed once and stored."""
