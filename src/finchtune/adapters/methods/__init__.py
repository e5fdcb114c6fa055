"""The adapter methods, a file each."""
