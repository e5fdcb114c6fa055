"""A training run: its model, data, engine, records and files."""
