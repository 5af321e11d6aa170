"""Objectives on completions that a teacher reads, too."""
