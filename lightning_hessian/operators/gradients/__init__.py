"""Stochastic gradients: rows, their history, their Gram matrix, over ranks."""
