"""Reward models: what scores completions, learned from preferences."""
