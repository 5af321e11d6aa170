"""The optimum that the theory of a method promises, computed from the reward or the preferences alone: no loss, no training.

All take and return [P, n] tensors over prompts x and responses y; q is the reference.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .world import World

Generator = Callable[[Tensor], Tensor]

_BISECTIONS, _BOUND = 45, 40.0
"""Roots are looked for between -40 and 40, to 1e-12."""

_ITERATIONS = 2000
"""At most."""


def tilted(log_base: Tensor, score: Tensor) -> Tensor:
    """[P, n] log of the distribution proportional to base * exp(score)."""
    return (log_base + score).log_softmax(-1)


GENERATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "reverse_kl": lambda u: u * u.log(),
    "forward_kl": lambda u: -u.log(),
    "js": lambda u: u * u.log() - (u + 1) * ((u + 1) / 2).log(),
    "jeffreys": lambda u: (u - 1) * u.log(),
    "squared_hellinger": lambda u: (u.sqrt() - 1).square(),
    "chi2_kl": lambda u: (u - 1).square() / 2 + u * u.log(),
}
"""f of D_f(policy || q) = E_q f(policy / q), as the papers define it."""


def generator(name: str) -> Generator:
    """The f of a divergence; `alpha:a` is (u^(1-a) - (1-a) u - a) / (a (a-1))."""
    if not name.startswith("alpha:"):
        return GENERATORS[name]
    a = float(name.partition(":")[2])
    return lambda u: (u ** (1 - a) - (1 - a) * u - a) / (a * (a - 1))


def constrained(world: World, f: Generator, beta: float) -> Tensor:
    """log of argmax_policy E r - beta * D_f(policy || q), which is q * (f')^-1((r - lambda) / beta) with the lambda at which it
    sums to 1."""

    def log_ratio(multiplier: Tensor) -> Tensor:
        return _root(lambda h: _derivative(f, h.exp()) - (world.reward - multiplier) / beta, world.reward)

    return world.reference_logp + _normalised(world, log_ratio)


def _derivative(f: Generator, u: Tensor) -> Tensor:
    with torch.enable_grad():
        u = u.detach().requires_grad_()
        return torch.autograd.grad(f(u).sum(), u)[0]


def balanced(world: World, slope: Callable[[Tensor], Tensor]) -> Tensor:
    """log of argmin_policy E_q l(h), for a loss with a term l of each response's own h = log policy / q alone.

    Since policies sum to 1, the optimum has l'(h) + nu * e^h = 0 rather than l'(h) = 0, with one nu a prompt.

    Args:
        slope: [P, n] h -> l'(h), increasing.
    """

    def log_ratio(nu: Tensor) -> Tensor:
        return _root(lambda h: slope(h) + nu * h.exp(), world.reward)

    return world.reference_logp + _normalised(world, log_ratio)


def _normalised(world: World, log_ratio: Callable[[Tensor], Tensor]) -> Tensor:
    """[P, n] the h(multiplier), falling in the multiplier, at the [P, 1] multiplier where q * e^h sums to 1."""

    def excess(multiplier: Tensor) -> Tensor:
        return -(world.reference_logp + log_ratio(multiplier)).logsumexp(-1, keepdim=True)

    return log_ratio(_root(excess, world.reward[:, :1]))


def _root(increasing: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    """Where an elementwise increasing function is 0, by bisection."""
    low, high = torch.full_like(like, -_BOUND), torch.full_like(like, _BOUND)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        below = increasing(middle) < 0
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


def per_token(world: World, log_base: Tensor, score: Tensor, factor: Callable[[Tensor], Tensor] = lambda n: n) -> Tensor:
    """log of the distribution base * exp(factor(|y|) * (score + c)), c such that it sums to 1: the optimum of rewards per
    token."""
    factors = factor(world.language.lengths.to(score))

    def excess(c: Tensor) -> Tensor:
        return (log_base + factors * (score + c)).logsumexp(-1, keepdim=True)

    return log_base + factors * (score + _root(excess, score[:, :1]))


def token_values(world: World, values: Tensor, risk: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """log of the policy that at every prefix s tilts the reference by the value of where a token leads: q(v | s) * exp(V(sv)).

    V of a whole response is its value, V(s) = risk of V(sv) over v ~ q(. | s).

    Args:
        values: [P, n] of whole responses.
        risk: (values [P, V], q [P, V]) -> [P]; the mean, for the value of following the reference.
    """
    language = world.language
    q = world.reference.softmax(-1).view(world.prompts, len(language.prefixes), language.size)
    known = dict(zip(language.responses, values.unbind(1), strict=True))
    table = torch.empty_like(q)
    for k in reversed(range(len(language.prefixes))):
        prefix = language.prefixes[k]
        ahead = torch.stack([known[(*prefix, token)] for token in range(language.size)], dim=-1)  # [P, V]
        known[prefix] = risk(ahead, q[:, k])
        table[:, k] = q[:, k].log() + ahead
    return world.logp(table.view_as(world.reference))


def step_by_step(world: World, best: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """log of the policy that at every prefix weighs the mean reward it comes to against its distance from the reference there,
    and leaves out how far later tokens will be from it.

    Args:
        best: (mean reward after each token [P, V], log q [P, V]) -> log-probs [P, V] of the token.
    """
    language = world.language
    q = world.reference.log_softmax(-1).view(world.prompts, len(language.prefixes), language.size)
    known = dict(zip(language.responses, world.reward.unbind(1), strict=True))
    table = torch.empty_like(q)
    for k in reversed(range(len(language.prefixes))):
        prefix = language.prefixes[k]
        ahead = torch.stack([known[(*prefix, token)] for token in range(language.size)], dim=-1)  # [P, V]
        table[:, k] = best(ahead, q[:, k])
        known[prefix] = (table[:, k].exp() * ahead).sum(-1)
    return world.logp(table.view_as(world.reference))


def forward_step(values: Tensor, log_q: Tensor) -> Tensor:
    """[P, V], [P, V] -> [P, V] log of argmax_p E_p values - KL(q || p), which is q / (c - values)."""
    top = values.amax(-1, keepdim=True)

    def excess(log_gap: Tensor) -> Tensor:
        return -(log_q - (top + log_gap.exp() - values).log()).logsumexp(-1, keepdim=True)

    return log_q - (top + _root(excess, top).exp() - values).log()


def best_of_two(world: World, beta: float) -> Tensor:
    """log of the policy that is, after every prefix, the mean of the reference (weight beta) and of its own best of two
    responses (weight 1); by iteration.

    Where all rewards differ the best of two has the probability F(y)^2 - F(below y)^2, F being the policy's distribution
    function of the reward.
    """
    language, order = world.language, world.reward.argsort(-1)
    q = world.reference.softmax(-1)
    table = world.reference
    for _ in range(_ITERATIONS):
        before, p = table, world.logp(table).exp()
        upto = p.gather(1, order).cumsum(-1)
        best = torch.zeros_like(p).scatter(1, order, upto.square() - (upto - p.gather(1, order)).square())
        rows = torch.arange(world.prompts)[:, None] * len(language.prefixes) + language.prefix  # [P, T]
        places = (rows * language.size + language.token).reshape(-1)
        reached = torch.zeros(q.numel(), dtype=q.dtype)
        reached = reached.index_add(0, places, best.repeat_interleave(language.lengths, 1).reshape(-1)).view_as(q)
        own = reached / reached.sum(-1, keepdim=True)
        table = ((own + beta * q) / (1 + beta)).log()
        if torch.allclose(table, before, rtol=0, atol=1e-10):
            break
    return world.logp(table)


def mean(values: Tensor, q: Tensor) -> Tensor:
    """[P, V], [P, V] -> [P] the mean under q."""
    return (values * q).sum(-1)


def lower_mean(values: Tensor, q: Tensor, share: float) -> Tensor:
    """[P, V], [P, V] -> [P] the mean of the smallest values that together have probability `share` under q (CVaR)."""
    ordered, order = values.sort(-1)
    mass = q.gather(-1, order)
    taken = torch.minimum(mass, (share - (mass.cumsum(-1) - mass)).clamp(min=0))
    return (ordered * taken).sum(-1) / share


def exponential_mean(values: Tensor, q: Tensor, mu: float) -> Tensor:
    """[P, V], [P, V] -> [P] log E_q exp(mu * values) / mu."""
    return (q.log() + mu * values).logsumexp(-1) / mu


def scores(world: World, pair: Callable[[Tensor], Tensor]) -> Tensor:
    """[P, n] the scores whose differences m minimise the mean of P(i > j) * pair(m) over pairs drawn from q.

    What a loss on margins comes to where no scores meet the optimum of every pair at once; no model is involved.

    Args:
        pair: margins -> losses, elementwise.
    """
    q = world.reference_logp.exp()
    weight = q[:, :, None] * q[:, None, :] * world.preference  # [P, n, n]
    score = torch.zeros_like(world.reward, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [score], max_iter=500, history_size=40, tolerance_grad=1e-10, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        scaled = score * q.rsqrt()
        value = (weight * pair(scaled[:, :, None] - scaled[:, None, :])).sum()
        value.backward()
        return value

    optimizer.step(loss)
    return (score * q.rsqrt()).detach()


def winners(world: World, beta: float) -> Tensor:
    """log of the policy to which KTO moves when its point of comparison is 0.

    In the mean over labels its loss of a response is linear in sigmoid(beta * h) with slope 1 - 2 p, p the probability to win:
    what loses more often than not goes to probability 0, the rest has (2p - 1) beta sigmoid'(beta h) = nu * e^h.
    """
    gain = (2 * world.win - 1).clamp(min=0)

    def log_ratio(nu: Tensor) -> Tensor:
        def slope(h: Tensor) -> Tensor:
            return nu * h.exp() - gain * beta * (beta * h).sigmoid() * (-beta * h).sigmoid()

        return torch.where(gain > 0, _root(slope, world.reward), -_BOUND)

    return world.reference_logp + _normalised(world, log_ratio)


def centred(world: World, beta: float) -> Tensor:
    """log of BCO's policy: beta * h + const fits the log-odds of p, as near as a policy that sums to 1 can come.

    With delta = E_q beta * h over all prompts, beta / 2 * (sigmoid(beta * h - delta) - p) + nu * e^h = 0; by Newton's method.
    """
    prompts, n = world.reward.shape
    q = world.reference_logp.exp()

    def equations(x: Tensor) -> Tensor:
        h, nu, delta = x[: prompts * n].view(prompts, n), x[prompts * n : -1, None], x[-1]
        rest = beta / 2 * ((beta * h - delta).sigmoid() - world.win) + nu * h.exp()
        mass, centre = (world.reference_logp + h).logsumexp(-1), (q * beta * h).sum(-1).mean() - delta
        return torch.cat([rest.reshape(-1), mass, centre[None]])

    x = torch.zeros(prompts * n + prompts + 1, dtype=torch.float64)
    for _ in range(20):
        x = x - torch.linalg.solve(torch.func.jacrev(equations)(x), equations(x))
    return world.reference_logp + x[: prompts * n].view(prompts, n)
