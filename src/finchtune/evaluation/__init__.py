"""How well a model does a task."""
