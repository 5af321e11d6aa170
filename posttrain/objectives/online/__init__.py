"""Objectives that learn from completions the policy samples."""
