"""Numbers of sampled completions: means with errors, wins, distinct n-grams."""

from __future__ import annotations

import math

import pytest

from posttrain.frontier import distinct, mean_and_error, wins


def test_the_error_is_that_of_the_means_of_prompts() -> None:
    """Prompts of means 1 and 4: their deviation is 3 / sqrt 2, over sqrt 2 prompts 1.5; completions do not add to it."""
    assert mean_and_error([0, 2, 3, 5], 2) == (2.5, pytest.approx(1.5))
    assert mean_and_error([1, 4], 1) == (2.5, pytest.approx(1.5))
    mean, error = mean_and_error([1, 2], 2)
    assert mean == 1.5 and math.isnan(error)


def test_wins_are_within_a_prompt_and_ties_count_half() -> None:
    assert wins([1, 5, 0, 3], [1, 2, 9, 9], 2) == [0.25, 1, 0, 0]
    assert sum(wins([1, 2, 2], [2, 1, 2], 3)) / 3 == 0.5


def test_distinct() -> None:
    texts = ["a b a b", "a b c"]
    assert distinct(texts, 1) == 3 / 7 and distinct(texts, 2) == 3 / 5 and distinct(texts, 3) == 1
    assert distinct(["a", ""], 2) == 0
