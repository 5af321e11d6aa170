"""How alike completions are: METEOR over all ordered pairs, which rises when a policy collapses onto a few phrases.

METEOR aligns the words of two texts by equality, then by stem, then by synonym, and is the harmonic mean of precision and
recall, recall weighing 9 times as much, less a penalty for words out of order. It is not symmetric, hence ordered pairs.
Synonyms come from WordNet, which is data that nltk downloads; without them words are matched by equality and stem. So the
two give different numbers, and which one is meant is said, not found out.

Source: Banerjee & Lavie 2005 (METEOR), as nltk has it; of the completions of a step: Mukobi et al. 2023 (SuperHF),
arXiv:2310.16763, with synonyms.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from .schema import UserError


class _NoSynonyms:
    """A WordNet that knows no word."""

    def synsets(self, word: str) -> list[Any]:
        """None."""
        del word
        return []


def meteor_similarity(texts: Sequence[str], *, synonyms: bool = False) -> float:
    """The mean METEOR score of each text against each other one, in [0, 1]; 0 for fewer than two texts.

    Args:
        texts: words separated by blanks, prompts left out.
        synonyms: match synonyms of WordNet, too.

    Raises:
        UserError: nltk is not installed, or synonyms are asked for and it has no WordNet.
    """
    try:
        from nltk.corpus import wordnet
        from nltk.translate.meteor_score import single_meteor_score
    except ImportError:
        raise UserError("similarity: nltk is not installed; pip install 'posttrain[similarity]'") from None
    known: Any = _NoSynonyms()
    if synonyms:
        try:
            wordnet.ensure_loaded()
        except LookupError:
            raise UserError("similarity: nltk has no WordNet; python -m nltk.downloader wordnet, or synonyms = false") from None
        known = wordnet
    words = [text.split() for text in texts]
    scores = [single_meteor_score(one, other, wordnet=known) for one, other in itertools.permutations(words, 2)]
    return sum(scores) / len(scores) if scores else 0.0
