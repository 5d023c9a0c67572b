"""Samples of models and their figures, drawn and measured once and kept."""
