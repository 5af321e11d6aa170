"""`posttrain plot`: reward against KL, a curve for each run and a point for each evaluation, as a PNG."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .evaluate import FILE
from .records import METRICS, read_metrics
from .replacing import replacing
from .schema import UserError, suggest

KLS = ("kl/analytic", "kl/sampled", "rollouts/kl", "kl")
"""What stands on the horizontal axis where nothing is asked for: the first of these that all have."""

HELDOUT = "reward/heldout"


def points(folder: str | Path) -> list[dict[str, float]]:
    """The numbers of a folder: of its evaluation, else of each log of its training run.

    Raises:
        UserError: it has neither.
    """
    path = Path(folder) / FILE
    if path.is_file():
        return [json.loads(path.read_text(encoding="utf-8"))["metrics"]]
    logs = read_metrics(folder)
    if not logs:
        raise UserError(f"plot: {folder} has neither {FILE} (posttrain eval) nor {METRICS} (a training run)")
    return logs


def plot(
    folders: Sequence[str | Path], output: str | Path, x: str | None = None, y: str = "reward", smooth: int | None = None
) -> dict[str, int]:
    """Draw `y` against `x` of several folders, logs as points and their running means as a line; of a reward with a dashed line
    what a held-out scorer says.

    Args:
        folders: of training runs and evaluations.
        output: the file to write; its ending is the format.
        x, y: names of metrics.
        smooth: logs that a point of the line is the mean of, in both directions; a tenth of them when absent.

    Returns:
        How many points each folder has.

    Raises:
        UserError: matplotlib is not installed; a folder lacks a metric; or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("plot: matplotlib is not installed; pip install 'posttrain[plots]'") from None
    found = {str(folder): points(folder) for folder in folders}
    x = x or next((name for name in KLS if all(_with(logs, name) for logs in found.values())), KLS[0])
    figure = Figure(figsize=(6.4, 4.4), dpi=150, layout="constrained")
    axes, right, drawn = figure.add_subplot(), None, {}
    for number, (folder, logs) in enumerate(found.items()):
        kept = _with(logs, x, y)
        if not kept:
            raise UserError(_lacking(folder, logs, x if not _with(logs, x) else y))
        drawn[folder], color = len(kept), f"C{number}"
        _draw(axes, kept, x, y, smooth, color, "-", label=Path(folder).name)
        more = _with(kept, HELDOUT) if y == "reward" else []
        if more:  # on an axis of its own: another scorer has another scale
            right = right or axes.twinx()
            _draw(right, more, x, HELDOUT, smooth, color, "--")
            right.set_ylabel("held-out reward (dashed)")
    axes.set(xlabel=f"{x} (nats)" if x in KLS else x, ylabel=y)
    axes.grid(alpha=0.3)
    axes.legend()
    path = Path(output) if Path(output).suffix else Path(f"{output}.png")
    try:
        with replacing(path) as partial:
            figure.savefig(partial, format=path.suffix[1:])
    except (OSError, ValueError) as error:  # the latter: a format that it cannot draw
        raise UserError(f"plot: {path} cannot be written: {error}") from None
    return drawn


def running(points: np.ndarray, window: int | None = None) -> np.ndarray:
    """[n, 2] -> [n - window + 1, 2] means of so many neighbours; a tenth of all when absent, all where there are fewer."""
    window = min(window or max(1, len(points) // 10), len(points))
    return np.lib.stride_tricks.sliding_window_view(points, window, axis=0).mean(-1)


def _draw(
    axes: Any, logs: Sequence[dict[str, float]], x: str, y: str, smooth: int | None, color: str, style: str, **more: str
) -> None:
    points = np.array([[log[x], log[y]] for log in logs])
    line = running(points, smooth)
    axes.plot(*line.T, style if len(line) > 1 else "o", color=color, **more)
    if len(line) < len(points):
        axes.plot(*points.T, ".", color=color, alpha=0.25, markersize=4)


def _with(logs: Sequence[dict[str, Any]], *names: str) -> list[dict[str, float]]:
    """The logs that have these metrics, as numbers."""
    return [log for log in logs if all(isinstance(log.get(name), int | float) for name in names)]


def _lacking(folder: str, logs: Sequence[dict[str, Any]], name: str) -> str:
    possible = sorted({key for log in logs for key, value in log.items() if isinstance(value, int | float)})
    return f"plot: {folder} has no {name}{suggest(name, possible)} Possible: {', '.join(possible)}"
