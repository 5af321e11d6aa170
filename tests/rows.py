"""Any statistic an objective may want, by its definition, from the whole logits of both models."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from posttrain.costs import scattered, some
from posttrain.divergences import divergence
from posttrain.stats import Activations, Costs, Inside, Ranked, Rowwise, Spans, States, Sum, Top, Want

LAYERS = 2
"""Of the reference, as far as statistics of its inside are made up."""


def by_definition(policy: Tensor, reference: Tensor, targets: Tensor, want: Sequence[Want]) -> dict[str, Tensor]:
    """Statistics of N tokens by name, differentiable to the logits of the policy.

    Those of the reference's inside are made up from its log-probs: states as wide as the vocabulary.

    Args:
        policy, reference: [N, V] logits.
        targets: [N] the tokens.
    """
    out: dict[str, Tensor] = {}
    for entry in want:
        temperature = 1.0 if isinstance(entry, (str, Inside)) else entry.temperature
        lp, lq = ((logits / temperature).log_softmax(-1) for logits in (policy, reference))  # [N, V]
        out |= _entry(entry, lp, lq, targets)
    return out


def _entry(entry: Want, lp: Tensor, lq: Tensor, targets: Tensor) -> dict[str, Tensor]:
    match entry:
        case Sum():
            return {entry.name: entry.summand(lp, lq).sum(-1)}
        case Rowwise():
            values, *others = entry.f(lp, lq, targets) if entry.also else (entry.f(lp, lq, targets),)
            return {entry.name: values, **dict(zip(entry.also, others, strict=True))}
        case States():
            return {"reference_states": torch.stack([(layer + 1) * lq + lq.sin() for layer in range(LAYERS)], 1)}
        case Activations():
            return {f"reference_{entry.of}": lq[:, :LAYERS] if entry.of != "logits" else lq.mean(-1, keepdim=True)}
        case Top():
            reference_logps, ids = lq.topk(min(entry.k, lq.shape[-1]))
            return {"top_ids": ids, "top_reference_logps": reference_logps, "top_logps": lp.gather(-1, ids)}
        case Ranked():
            sides = [logps.sort(-1, descending=True).values[:, : entry.k] for logps in (lp, lq)]
            return dict(zip(("ranked_logps", "ranked_reference_logps"), sides, strict=True))
        case Costs():
            chosen = some(targets, entry.rows)
            cost = (lp.exp()[chosen, None] - lq.exp()[None, chosen]).abs().sum(-1)
            return scattered(cost, chosen, len(targets))
        case Spans():
            products = [logps[1:].exp() * logps[:-1].exp() for logps in (lp, lq)]
            return {"span_cost": torch.nn.functional.pad((products[0] - products[1]).square().sum(-1), (1, 0))}
        case "logp":
            return {entry: lp.gather(-1, targets[:, None]).squeeze(-1)}
        case "ref_logp":
            return {entry: lq.gather(-1, targets[:, None]).squeeze(-1)}
        case "entropy":
            return {entry: -(lp.exp() * lp).sum(-1)}
        case "log_sum_p2":
            return {entry: (2 * lp).logsumexp(-1)}
        case "max_logp":
            return {entry: lp.max(-1).values}
        case "argmax":
            return {entry: lp.argmax(-1)}
    return {entry: divergence(entry).summand(lp, lq).sum(-1)}
