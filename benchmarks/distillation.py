"""Distillation objectives side by side on a real model: what a student with fewer layers learns from its teacher.

    python -m benchmarks.distillation --teacher <folder> --data <instructions.jsonl> [--objectives kd:forward_kl akl ...]
        [--layers 10] [--steps 100] [--seeds 1] [--cpu]

Rows have columns instruction and output (or others that the data layouts know). The student starts as the teacher with only
`--layers` of its layers, evenly spaced, the first and the last among them; or, with `--student`, as that model. Each objective
trains it in a process of its own on the same rows for the same number of steps. Afterwards, on held-out rows: the divergences
between teacher and student per token of the given answers, the teacher's mean negative log-prob per token of answers that the
student samples, and Rouge-L of its greedy answers against the given ones.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .isolated import Results, sweep
from .material import fewer_layers
from .step import clock

OBJECTIVES: dict[str, dict[str, Any]] = {
    "none (the student as it starts)": {"name": "kd", "untrained": True},
    "forward KL": {"name": "kd", "divergence": "forward_kl"},
    "reverse KL": {"name": "kd", "divergence": "reverse_kl"},
    "JSD 0.5": {"name": "kd", "divergence": "jsd:0.5"},
    "AKL": {"name": "akl"},
    "DAC-KL": {"name": "dackl"},
    "SinKD": {"name": "sinkd"},
    "forward KL, half on-policy": {"name": "kd", "divergence": "forward_kl", "on_policy": 0.5},
    "reverse KL, half on-policy": {"name": "kd", "divergence": "reverse_kl", "on_policy": 0.5},
}
"""Row of the table -> settings of the objective; `on_policy` is the share of steps whose completions the student samples."""


def shallow(teacher: str, layers: int, folder: Path) -> str:
    """The teacher with some of its layers, as a folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = fewer_layers(AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32), layers)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(teacher).save_pretrained(folder)
    return str(folder)


def one(job: dict[str, Any]) -> dict[str, Any]:
    """Train one student; seconds of every step, losses, and where it is."""
    from posttrain.recipe import load_run
    from posttrain.run import prepare, quiet_libraries

    settings, options = dict(job["settings"]), argparse.Namespace(**job["options"])
    fraction, untrained = settings.pop("on_policy", None), settings.pop("untrained", False)
    with tempfile.TemporaryDirectory() as folder:
        values = {
            "objective": settings,
            "model": {"name": job["student"]},
            "teacher": {"model": options.teacher},
            "data": {"name": options.data, "max_length": options.max_length, "eval_size": options.held_out},
            "train": {
                "output_dir": folder,
                "max_steps": options.steps,
                "per_device_train_batch_size": options.batch,
                "learning_rate": options.learning_rate,
                "warmup_steps": options.steps // 20,
                "logging_steps": 10,
                "save_strategy": "no",
                "eval_strategy": "no",
                "use_cpu": options.cpu,
                "seed": job["seed"],
            },
        }
        if fraction is not None:
            values |= {"rollouts": {"student": fraction}, "sampling": {"max_new_tokens": options.new_tokens}}
        recipe = Path(folder, "recipe.yaml")
        recipe.write_text(json.dumps(values))  # JSON is YAML
        quiet_libraries()
        prepared = prepare(load_run(recipe=recipe))
        timer = clock()
        prepared.trainer.add_callback(timer)
        if not untrained:
            prepared.trainer.train()
        losses = [log["loss"] for log in prepared.trainer.state.log_history if "loss" in log]
        quality = evaluate(prepared.model, prepared.tokenizer, prepared.data.eval, options)
    return {"seconds": timer.seconds, "losses": losses, **quality}


def evaluate(student: Any, tokenizer: Any, rows: Any, options: argparse.Namespace) -> dict[str, float]:
    """Held-out quality of a student, on the tokenised rows: divergences and nll in nats a token, Rouge-L in [0, 1]."""
    import torch
    from rouge_score.rouge_scorer import RougeScorer
    from transformers import AutoModelForCausalLM

    teacher = AutoModelForCausalLM.from_pretrained(options.teacher, dtype=torch.float32).eval().to(student.device)
    student.eval()

    def logps(model: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
        ids = torch.tensor([[*prompt, *answer]], device=student.device)
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
        return logits.log_softmax(-1)  # [T, V]

    def answers(prompts: list[list[int]], **how: Any) -> list[list[int]]:
        out = []
        for prompt in prompts:
            ids = torch.tensor([prompt], device=student.device)
            made = student.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=options.new_tokens, use_cache=True,
                pad_token_id=tokenizer.pad_token_id, **how,
            )  # fmt: skip
            out.append(made[0, len(prompt) :].tolist())
        return out

    rows = [rows[i] for i in range(len(rows))]
    forward, reverse, nll = [], [], []
    scorer, rouge = RougeScorer(["rougeL"], use_stemmer=True), []
    with torch.no_grad():
        for row in rows:
            lp, lq = logps(student, row["prompt"], row["completion"][0]), logps(teacher, row["prompt"], row["completion"][0])
            forward.append((lq.exp() * (lq - lp)).sum(-1))
            reverse.append((lp.exp() * (lp - lq)).sum(-1))
        sampled = rows[: options.sampled]
        prompts = [row["prompt"] for row in sampled]
        torch.manual_seed(0)
        for prompt, answer in zip(prompts, answers(prompts, do_sample=True, temperature=1.0, top_k=0, top_p=1.0), strict=True):
            nll.append(-logps(teacher, prompt, answer).gather(1, torch.tensor(answer, device=student.device)[:, None])[:, 0])
        for row, answer in zip(sampled, answers(prompts, do_sample=False), strict=True):
            texts = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (row["completion"][0], answer))
            rouge.append(scorer.score(*texts)["rougeL"].fmeasure)
    return {
        "forward_kl": torch.cat(forward).mean().item(),
        "reverse_kl": torch.cat(reverse).mean().item(),
        "teacher_nll": torch.cat(nll).mean().item(),
        "rouge_l": statistics.mean(rouge),
    }


def table(results: Results) -> str:
    """The results as Markdown: means over the seeds."""
    names = ("forward_kl", "reverse_kl", "teacher_nll", "rouge_l")
    lines = [
        "| objective | KL(teacher‖student) | KL(student‖teacher) | teacher NLL of samples | Rouge-L | s/step |",
        "|---|---|---|---|---|---|",
    ]
    for name, runs in results.items():
        numbers = " | ".join(f"{statistics.mean(run[key] for run in runs):.3f}" for key in names)
        seconds = [second for run in runs for second in run["seconds"]]
        lines.append(f"| {name} | {numbers} | {statistics.median(seconds):.2f} |" if seconds else f"| {name} | {numbers} | |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--student", help="a model of its own instead of some of the teacher's layers")
    parser.add_argument("--data", required=True)
    parser.add_argument("--objectives", nargs="+", default=list(OBJECTIVES), choices=list(OBJECTIVES))
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--held-out", type=int, default=64)
    parser.add_argument("--sampled", type=int, default=24)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--max-length", type=int, default=192)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--output", default="runs/benchmark-distillation.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        student = options.student or shallow(options.teacher, options.layers, Path(folder, "student"))

        def jobs() -> Iterator[tuple[str, dict[str, Any]]]:
            for name in options.objectives:
                for seed in options.seeds:
                    told = {"settings": OBJECTIVES[name], "student": student, "seed": seed, "options": vars(options)}
                    yield name, told

        sweep("benchmarks.distillation", jobs(), table, options.output)


if __name__ == "__main__":
    main()
