"""Weights in files: base models, adapters, merging, and the forms of other software."""
