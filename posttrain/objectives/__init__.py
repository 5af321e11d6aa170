"""The objectives: one method, one file, found by name."""
