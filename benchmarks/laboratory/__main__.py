"""The tables of the laboratory.

    python -m benchmarks.laboratory [--json laboratory.json]

Prints Markdown, and with `--json` writes the same numbers to a file. Less than a minute on one core.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .cases import CASES, UNKNOWN
from .claims import claims, divergence, entropy, reward
from .game import rows
from .theory import tilted
from .world import World, world


def fixed_points(there: World) -> list[dict[str, Any]]:
    """Every case: how far its optimum is from the reference, and how far from the optimum training came to rest."""
    rows = []
    for case in CASES:
        optimum, learned = case.optimum(there), case.learn(there)
        rows.append(
            {
                "method": case.name,
                "fixed point": f"`{case.fixed_point}`",
                "KL(fixed point, reference)": divergence(optimum, there.reference_logp),
                "KL(learned, fixed point)": divergence(learned.logp, optimum),
            }
        )
    return rows


def measured(there: World) -> list[dict[str, Any]]:
    """The methods without a fixed point in closed form: where they come to rest."""
    dpo, rows = tilted(there.reference_logp, there.reward), []
    for case in UNKNOWN:
        learned = case.learn(there)
        rows.append(
            {
                "method": case.name,
                "KL(learned, reference)": divergence(learned.logp, there.reference_logp),
                "KL(learned, DPO's optimum)": divergence(learned.logp, dpo),
                "reward": reward(there, learned.logp),
                "entropy": entropy(learned.logp),
                "gradient left": learned.slope,
                "why": case.reason,
            }
        )
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of equal keys as a Markdown table."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    if not isinstance(value, float) or value == 0:
        return f"{value:.0f}" if isinstance(value, float) else str(value)
    return f"{abs(value):.0e}" if abs(value) < 1e-3 else f"{value:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.laboratory")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the numbers go as well")
    options = parser.parse_args()
    there = world()
    results = {"fixed points": fixed_points(there), "measured": measured(there), "game": rows(), "claims": claims(there)}
    print(f"### Fixed points\n\n{table(results['fixed points'])}\n")
    print(f"### Where theory names none\n\n{table(results['measured'])}\n")
    print(f"### INPO in a game\n\n{table(results['game'])}")
    for claim in results["claims"]:
        print(f"\n### {claim.statement}\n\n{claim.source}. Here: {claim.verdict}.\n\n{table(claim.rows)}")
    if options.json is not None:
        results["claims"] = [dataclasses.asdict(claim) for claim in results["claims"]]
        options.json.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
