"""Operators: a checked torch form and compiled kernels of each."""
