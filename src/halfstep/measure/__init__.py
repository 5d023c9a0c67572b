"""Samples and their metrics, which are computed once and then stored."""
