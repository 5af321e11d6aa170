"""Objectives on completions to be imitated as they are."""
