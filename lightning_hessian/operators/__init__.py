"""Symmetric linear operators on a parameter space."""
