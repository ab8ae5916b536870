"""Algorithms that know an operator and nothing of models or data."""
