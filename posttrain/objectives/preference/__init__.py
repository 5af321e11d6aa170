"""Objectives on pairs of completions (and, later, on labelled ones)."""
