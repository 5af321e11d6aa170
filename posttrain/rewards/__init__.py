"""Rewards: what a completion is worth, by a rule, a function, a reward model or a preference model."""
