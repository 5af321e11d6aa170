"""`posttrain iterate`: training in iterations, each on the policy's own responses: INPO, iterative DPO, best-of-n, and others.

An iteration samples responses to prompts of its own, has them judged, selects what is learned from, computes what does not
change while it is learned, trains an ordinary run from the last iterate, and compares the new one with it. What a phase makes
is a file (or the run's folder), added to line by line or written beside and renamed, so that the same command goes on wherever
the last one was interrupted, and ends with the same weights. The output folder holds, for each iteration,

    prompts.jsonl  responses.jsonl  verdicts.jsonl  rows.jsonl  anchors/  model/  evaluation.jsonl  iteration.json

and beside these `iterations.jsonl`, a line of metrics for each.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from . import console, data
from .anchors import logp_sums
from .checkpoints import occupy
from .engines.rollout import derived
from .faults import writing
from .iterations import PREVIOUS, IterateRun, judges
from .mismatch import early_roles
from .models import load_tokenizer
from .precompute import precompute
from .records import first_difference
from .run import execute, quiet_libraries, require_extras
from .sample import SampleRun, sample
from .schema import UserError
from .settings import DataConfig, EngineConfig
from .stats import roles_of
from .verdicts import Judge, asked_of, judge_file, lines, read_verdicts, write_lines

SETTINGS, METRICS = "iterate.json", "iterations.jsonl"

COLUMNS = ("prompts", "kept", "preference", "reward", "win/previous", "win/start", "kl/previous", "kl/start", "length")
"""Metrics in the closing table."""


def iterate(run: IterateRun, launch: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Train all iterations, from wherever an earlier call was interrupted.

    Args:
        run: the settings.
        launch: words of a command that start the processes of each training, `--launch NAME --processes N`; none: it is here.

    Returns:
        The metrics of each iteration.

    Raises:
        UserError: a setting, the data, a model or a judge; or an output folder that is another run's.
        Stopped: a training was told to stop, and left a checkpoint.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("iterate starts the processes of its trainings itself: posttrain iterate RECIPE --launch NAME")
    quiet_libraries()
    require_extras(run.run)
    lock = occupy(run.output)
    with writing(run.output):
        claim(run)
        tokenizer = load_tokenizer(run.run.model)
        counts = deal(run, tokenizer)
        console.listen()
        console.show(header(run, counts), title=f"posttrain iterate: {run.run.objective.name}")
        for iteration in range(1, run.iterations.count + 1):
            if not (run.folder(iteration) / "iteration.json").is_file():
                _iteration(run, iteration, tokenizer, launch)
        found = [json.loads((run.folder(t) / "iteration.json").read_text()) for t in range(1, run.iterations.count + 1)]
        write_lines(run.output / METRICS, iter(found))
    console.show(table(found), title="iterations")
    last = str(run.folder(run.iterations.count) / "model")
    console.show({"model": last, "metrics": str(run.output / METRICS)}, title="saved")
    lock.release()
    return found


def check(run: IterateRun) -> None:
    """Resolve a training in iterations and print what it would do; nothing is sampled or written.

    Raises:
        UserError: what `iterate` would refuse before it reads weights.
    """
    quiet_libraries()
    require_extras(run.run)
    tokenizer, out = load_tokenizer(run.run.model), console.console()
    dealt, report = parts(run, tokenizer)
    for title, section in run.resolved().items():
        if isinstance(section, dict):
            console.show({key: str(value) for key, value in section.items() if value not in (None, {}, [])}, title, out)
    console.show({"prompts": report}, "data as read", out)
    console.show({"prompt": tokenizer.decode(dealt[1][0]["prompt"])}, "first prompt as the model sees it", out)
    console.show(header(run, [len(part) for part in dealt]), "plan", out)


def claim(run: IterateRun) -> None:
    """Write whose the output folder is.

    Raises:
        UserError: it is another run's.
    """
    path, ours = run.output / SETTINGS, run.resolved()
    if path.is_file():
        if other := first_difference(json.loads(path.read_text(encoding="utf-8")), ours, ""):
            raise UserError(f"train.output_dir: {run.output} is another run's: {other.lstrip('.')}; choose another folder")
        return
    if (run.output / "run.json").is_file():
        raise UserError(f"train.output_dir: {run.output} holds a run of posttrain train; choose another folder")
    write_lines(path, iter([ours]))


def header(run: IterateRun, counts: Sequence[int]) -> dict[str, str]:
    """What a training in iterations says of itself."""
    of, scorers = run.iterations, ", ".join(one.get("name", "") for one in run.reward.scorers)
    judge = f"preference {run.preference.get('name')}" if run.preference else f"reward {scorers}"
    sampled = f"{of.responses} of {run.sampling.max_new_tokens} tokens, temperature {run.sampling.temperature:g}"
    held, *parts = counts
    return {
        "objective": f"{run.run.objective.name}: {', '.join(f'{key} {value}' for key, value in vars(run.run.config).items())}",
        "start": run.run.model.name,
        "reference": f"the {of.reference} model" if run.run.objective.reads_reference(run.run.config) else "none",
        "prompts": f"{', '.join(map(str, parts))} in {of.count} iterations; {held} to compare iterates on",
        "responses": f"{sampled}, by {run.engine.kind}",
        "judged": f"{run.select}, by {judge}",
        "output": str(run.output),
    }


def deal(run: IterateRun, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Write the prompts of each iteration and those to evaluate on; returns how many each has, the latter first.

    Raises:
        UserError: there are not enough.
    """
    paths = [run.folder(t) / "prompts.jsonl" for t in range(run.iterations.count + 1)]
    if not all(path.is_file() for path in paths):
        dealt, report = parts(run, tokenizer)
        console.show({"prompts": report}, title="data")
        for path, part in zip(paths, dealt, strict=True):
            write_lines(path, ({"prompt": row["prompt"], "source": row["source"]} for row in part))
    return [sum(1 for _ in lines(path)) for path in paths]


def parts(run: IterateRun, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Any], str]:
    """The prompts to evaluate on, then those of each iteration, none in two of them; and what was read, cut and left out.

    Raises:
        UserError: the data cannot be read, or are not enough.
    """
    of, unpaired = run.iterations, dataclasses.replace(run.run.data, unpair=False)
    loaded = data.load(unpaired, tokenizer, (), source=True)
    order = np.arange(len(loaded.train))
    if of.shuffle:
        order = np.random.default_rng(run.run.data.seed).permutation(order)
    if loaded.eval is not None:
        held, evaluated = 0, loaded.eval.select(range(min(of.evaluate, len(loaded.eval))))
    else:
        held = min(of.evaluate, len(order) // 10)
        evaluated = loaded.train.select(order[len(order) - held :])
    size = of.prompts or (len(order) - held) // of.count
    if not size or size * of.count + held > len(order):
        raise UserError(
            f"iterations: {of.count} iterations of {size or 1} prompts and {held} to evaluate on are more than {len(order)}: "
            "give fewer iterations or iterations.prompts"
        )
    return [evaluated, *(loaded.train.select(order[t * size : (t + 1) * size]) for t in range(of.count))], str(loaded.report)


def _iteration(run: IterateRun, iteration: int, tokenizer: PreTrainedTokenizerBase, launch: Sequence[str]) -> None:
    """One iteration, from where it was interrupted."""
    folder = run.folder(iteration)
    prompts, responses, verdicts = (folder / f"{name}.jsonl" for name in ("prompts", "responses", "verdicts"))
    of = run.iterations
    _sampled(run, iteration - 1, responses, prompts, of.responses)
    judging = judge_file(Judge(*judges(run)), prompts, responses, verdicts, run.select)
    console.track(judging, _count(prompts), "judging")
    del judging  # with the models that judge
    release()
    if not (folder / "rows.jsonl").is_file():
        select(run, iteration, tokenizer)
    if not (folder / "trained").is_file():
        _train(run, iteration, launch)
        (folder / "trained").touch()
    metrics = {"iteration": iteration, **judged(prompts, responses, verdicts), **evaluated(run, iteration)}
    write_lines(folder / "iteration.json", iter([metrics]))
    console.show(table([metrics]), title=f"iteration {iteration}")


def _sampled(run: IterateRun, iterate: int, output: Path, prompts: Path, n: int, evaluation: bool = False) -> None:
    """Have responses to a file of prompts written by an iterate, or what is missing of them."""
    engine, sampling = run.engine, dataclasses.replace(run.sampling, seed=derived(run.sampling.seed, iterate, int(evaluation)))
    if evaluation:  # of the policy as it is, so that log-probs of it make a KL
        sampling = dataclasses.replace(sampling, temperature=1.0, top_p=1.0, top_k=0, min_p=0.0)
        engine = EngineConfig() if engine.kind == "file" else engine
    if engine.kind == "file":
        engine = dataclasses.replace(engine, path=str(engine.path).replace("{iteration}", str(iterate + 1)))
    asked = DataConfig(name=str(prompts), max_length=run.run.data.max_length)
    model = dataclasses.replace(run.model(iterate), peft=None)
    sample(SampleRun(model=model, data=asked, engine=engine, sampling=sampling, n=n, output=str(output)), version=iterate)
    release()


def select(run: IterateRun, iteration: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the rows that an iteration learns from, with the numbers that the objective reads of each.

    Raises:
        UserError: none is left.
    """
    folder, trained = run.folder(iteration), run.trained(iteration)
    rows, columns = folder / "rows.jsonl", run.columns
    own = [name for name in columns if name in PREVIOUS]
    selected = folder / "selected.jsonl" if own else rows
    write_lines(selected, _selected(run, folder))
    if not _count(selected):
        selected.unlink()
        raise UserError(
            f"iteration {iteration}: there is nothing to learn from: of no prompt is the best response preferred to the worst, "
            f"or good enough; {folder / 'verdicts.jsonl'} has the verdicts"
        )
    if not own:
        return
    config = dataclasses.replace(trained.data, name=str(selected))
    loaded = data.load(config, tokenizer, run.roles, [name for name in columns if name not in own])
    sums = logp_sums(trained, trained.model, loaded.train, run.roles, folder / "anchors")
    last = [{name: one[PREVIOUS[name]] for name in own} for one in sums]
    ids = ({"prompt": row["prompt"], **{role: row[role][0] for role in run.roles}} for row in loaded.train)
    numbers = ({name: row[name] for name in columns if name not in own} for row in loaded.train)
    write_lines(rows, ({**one, **known, **more} for one, known, more in zip(ids, numbers, last, strict=True)))
    release()


def _selected(run: IterateRun, folder: Path) -> Iterator[dict[str, Any]]:
    """The pairs of an iteration, or the best responses, as token ids with what the verdict says of them."""
    single, least = len(run.roles) == 1, run.iterations.at_least
    for response, verdict in zip(lines(folder / "responses.jsonl"), read_verdicts(folder / "verdicts.jsonl"), strict=True):
        prompt, best, worst = response["prompt_ids"], verdict.best, verdict.worst
        if verdict.scores is not None and least is not None and verdict.scores[best] < least:
            continue
        if single:
            yield {"prompt": prompt, run.roles[0]: response["completion_ids"][best]}
        elif verdict.decided:
            row = {"prompt": prompt, "chosen": response["completion_ids"][best], "rejected": response["completion_ids"][worst]}
            row |= {"preference": verdict.preference}
            if verdict.scores is not None:
                row |= {"score_chosen": verdict.scores[best], "score_rejected": verdict.scores[worst]}
            if verdict.wins is not None:
                row |= {"chosen_win": verdict.wins[best], "rejected_win": verdict.wins[worst]}
            yield row


def _train(run: IterateRun, iteration: int, launch: Sequence[str]) -> None:
    """Train an iteration, here or in processes of its own."""
    trained = run.trained(iteration)
    if not launch:
        execute(trained)
        release()
        return
    if trained.reference.kind == "cached":
        precompute(trained)  # sharded trainings only read them
        release()
    recipe = run.folder(iteration) / "train.json"
    write_lines(recipe, iter([{key: value for key, value in trained.resolved().items() if value is not None}]))
    process = subprocess.Popen([sys.executable, "-m", "posttrain", "train", str(recipe), *launch])
    before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    try:
        status = process.wait()
    finally:
        signal.signal(signal.SIGTERM, before)
    if status:
        sys.exit(status if status > 0 else 128 - status)


def judged(prompts: Path, responses: Path, verdicts: Path) -> dict[str, Any]:
    """What the responses and verdicts of an iteration say of it."""
    found = list(read_verdicts(verdicts))
    kept = [one.preference for one in found if one.decided]
    scores = [score for one in found if one.scores is not None for score in one.scores]
    sizes = [len(ids) for line in lines(responses) for ids in line["completion_ids"]]
    finished = [done for line in lines(responses) for done in line["finished"]]
    return {
        "prompts": _count(prompts),
        "kept": len(kept) / len(found),
        "preference": float(np.mean(kept)) if kept else None,
        "reward": float(np.mean(scores)) if scores else None,
        "length": float(np.mean(sizes)),
        "finished": float(np.mean(finished)),
    }


def evaluated(run: IterateRun, iteration: int) -> dict[str, float]:
    """The new iterate beside the last one and the start, on prompts that none is trained on: who wins, how far they are apart.

    `kl/*` is the mean over its responses of log new - log other, in nats a response.
    """
    prompts = run.folder(0) / "prompts.jsonl"
    asked = [asked_of(line) for line in lines(prompts)]
    if not asked:
        return {}
    said: dict[int, list[str]] = {}
    for iterate in sorted({0, iteration - 1, iteration}):
        path = run.folder(iterate) / "evaluation.jsonl"
        if iterate == iteration or iteration == 1:  # else the iteration before has them
            _sampled(run, iterate, path, prompts, 1, evaluation=True)
        said[iterate] = [line["completions"][0] for line in lines(path)]
    role, *others = [*roles_of(run.run.objective.family), *early_roles(run.run.objective)]
    rows = [
        {"prompt": line["prompt_ids"], role: line["completion_ids"], **{other: [] for other in others}}
        for line in lines(run.folder(iteration) / "evaluation.jsonl")
    ]
    folder, trained = run.folder(iteration) / "anchors", run.trained(iteration)
    logps = {
        iterate: np.array([one[role] for one in logp_sums(trained, run.model(iterate), rows, [role], folder)])
        for iterate in said
    }
    release()
    judge, metrics = Judge(*judges(run)), {}
    for name, other in (("previous", iteration - 1), ("start", 0)):
        metrics[f"win/{name}"] = float(np.mean(judge.wins(asked, said[iteration], said[other])))
        metrics[f"kl/{name}"] = float(np.mean(logps[iteration] - logps[other]))
    scored = judge.scores(asked, said[iteration])
    if scored is not None:
        metrics["reward/after"] = float(np.mean(scored.total))
        metrics |= {} if scored.heldout is None else {"heldout/after": float(np.mean(scored.heldout))}
    return metrics


def table(found: Sequence[dict[str, Any]]) -> dict[str, str]:
    """The metrics of iterations, a line each."""
    rows = {}
    for one in found:
        cells = [(name, one[name]) for name in COLUMNS if one.get(name) is not None]
        rows[str(one["iteration"])] = "  ".join(f"{name} {value:.4g}" for name, value in cells)
    return rows


def release() -> None:
    """Give back what models that are no longer needed hold on the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _count(path: Path) -> int:
    return sum(1 for _ in lines(path))
