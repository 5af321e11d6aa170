"""What does not change while an iterate is trained, computed before: what models say of completions, summed over tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import references
from .data import Loaded
from .models import load_policy
from .recipe import Run
from .run import settle
from .settings import ModelConfig, ReferenceConfig


def logp_sums(run: Run, model: ModelConfig, rows: Any, roles: Sequence[str], folder: Path) -> list[dict[str, float]]:
    """Per row and role log model(completion | prompt), summed over tokens, by the numbers that training computes with.

    Args:
        run: what is trained; its settings say how.
        model: whose log-probs.
        rows: `prompt` and per role a list of one completion, token ids; may be iterated over more than once.
        roles: those of the rows, all of them roles of the objective.
        folder: keeps the log-probs of each token, so that none is computed twice.
    """
    own = dataclasses.replace(run, model=model, reference=ReferenceConfig(kind="cached", cache=str(folder)))
    own, args = settle(own)
    cache = references.cached(own, args, load_policy(model, args.seed), Loaded(rows, None, None))
    return [
        {role: float(cache.lookup(row["prompt"], row[role][0])["reference_logps"].sum(dtype="float64")) for role in roles}
        for row in rows
    ]
