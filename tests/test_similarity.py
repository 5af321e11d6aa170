"""METEOR similarity: values by hand, and that synonyms are asked for, not found."""

from __future__ import annotations

import pytest

from posttrain.schema import UserError
from posttrain.similarity import meteor_similarity

pytest.importorskip("nltk")


def test_by_hand() -> None:
    """`a b c d` and `a b`: 2 matches in 1 chunk, penalty 1/2 * (1/2)^3; precision 1 and recall 1/2, or the other way round."""
    penalty = 0.5 * 0.5**3
    one, other = (p * r / (0.9 * p + 0.1 * r) for p, r in ((1, 0.5), (0.5, 1)))
    assert meteor_similarity(["a b c d", "a b"]) == pytest.approx((one + other) / 2 * (1 - penalty), abs=1e-12)


def test_stems_match_and_nothing_is_like_nothing() -> None:
    """One word of one: a match is 1/2, as METEOR counts it for a single chunk of a single match."""
    assert meteor_similarity(["running", "runs"]) == meteor_similarity(["runs", "Runs"]) == 0.5
    assert meteor_similarity(["large", "big"]) == meteor_similarity(["", "a"]) == meteor_similarity(["alone"]) == 0


def test_synonyms_need_wordnet(monkeypatch: pytest.MonkeyPatch) -> None:
    import nltk

    monkeypatch.setattr(nltk.data, "path", [])
    with pytest.raises(UserError, match="nltk has no WordNet"):
        meteor_similarity(["a", "b"], synonyms=True)
