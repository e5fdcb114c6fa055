"""The model generations, a folder each."""
