"""Knowledge distillation: the numbers of GKD's, DistiLLM's and top-k codes, and what the options mean."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from golden import close, tensor
from golden_taught import taught, taught_golden
from posttrain_kernels import Head
from random_statistics import random_statistics

from posttrain.divergences import divergence
from posttrain.objectives.distillation.kd import KDConfig, kd
from posttrain.registry import find
from posttrain.schema import UserError, parse
from posttrain.stats import Taught
from posttrain.vocabulary import statistics

KD = find("kd")
OFFICIAL = 2e-7  # files whose source computes in float32


@pytest.mark.parametrize(
    ("name", "settings", "atol"),
    [
        ("fkl_masked_mean", {}, 1e-9),
        ("rkl_masked_mean", {"divergence": "reverse_kl"}, 1e-9),
        ("gkd_beta0.1", {"divergence": "jsd:0.1"}, 1e-9),
        ("gkd_beta0.5", {"divergence": "jsd:0.5"}, 1e-9),
        ("gkd_beta0.5_T2", {"divergence": "jsd:0.5", "temperature": 2.0}, 1e-9),
        ("jsd_distillm_lam0.9", {"divergence": "jsd:0.1"}, 1e-9),
        ("skew_fkl_lam0.1", {"divergence": "skew_kl:0.1"}, 1e-9),
        ("distillm2_sfkl_alpha0.1", {"divergence": "skew_kl:0.1", "mean": "sequences"}, 1e-9),
        ("distillm2_srkl_alpha0.1", {"divergence": "skew_reverse_kl_detached:0.1", "mean": "sequences"}, 1e-9),
        ("topk4_fkl_truncated", {"top": 4, "tail": "truncated"}, 1e-9),
        ("topk4_fkl_teacher_renorm", {"top": 4, "tail": "teacher_renormalised"}, 1e-9),
        ("topk4_fkl_both_renorm", {"top": 4, "tail": "both_renormalised"}, 1e-9),
    ],
)
def test_golden(name: str, settings: dict[str, object], atol: float) -> None:
    taught_golden(name).agree(KD, KDConfig(**settings), atol=atol)


def test_golden_without_the_entropy_of_the_teacher() -> None:
    """DistiLLM's code leaves it out: another value at each token, the same gradient."""
    file = taught_golden("skew_fkl_lam0.1_official")
    config = KDConfig(divergence="skew_kl:0.1")
    loss = kd(config, file.taught(KD.want(config)))
    teacher = file.teacher[file.mask].log_softmax(-1)
    entropy = -(teacher.exp() * teacher).sum(-1)
    close(loss.values + entropy, tensor(file.outputs["per_token"])[file.mask].tolist())
    (gradient,) = torch.autograd.grad(loss.values.mean(), file.student)
    close(gradient, file.outputs["grad_student_logits"])


def test_the_bucket_by_hand() -> None:
    """Teacher (1/2, 1/4, 1/8, 1/8), student (1/4, 1/4, 1/4, 1/4), k = 2.

    The rest has 1/4 of the teacher and 1/2 of the student: 1/2 log 2 + 0 + 1/4 log(1/2) = log(2) / 4. The student's gradient is
    student - teacher at the first two, and (1 - (1/4) / (1/2)) student at the others: -1/4, 0, 1/8, 1/8.
    """
    student = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[0.5, 0.25, 0.125, 0.125]], dtype=torch.float64).log()
    config = KDConfig(top=2)
    loss = kd(config, taught(student, teacher, torch.tensor([1]), KD.want(config)))
    assert loss.values.item() == pytest.approx(math.log(2) / 4, abs=1e-14)
    (gradient,) = torch.autograd.grad(loss.values.sum(), student)
    close(gradient, [[-0.25, 0.0, 0.125, 0.125]], 1e-14)
    assert {name: round(value.item(), 6) for name, value in loss.metrics.items()} == {
        "top_mass/student": 0.5,
        "top_mass/teacher": 0.75,
        "divergence/forward_kl": round(math.log(2) / 4, 6),
        "nll/student": round(math.log(4), 6),
        "nll/teacher": round(math.log(4), 6),
    }


def test_the_bucket_is_a_lower_bound_that_more_items_raise_to_the_whole() -> None:
    file = taught_golden("fkl_masked_mean")
    found = [kd(KDConfig(top=k), file.taught(KD.want(KDConfig(top=k)))).values for k in (1, 2, 4, 8, 22, 23, 99)]
    for one, more in itertools.pairwise(found):
        assert (more >= one - 1e-12).all()
    close(found[-2], tensor(file.outputs["per_token"])[file.mask].tolist(), 1e-9)
    assert found[0].mean() < 0.8 * found[-1].mean()


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd:0.5", "skew_reverse_kl:0.1"])
def test_the_bucket_where_the_top_has_all_the_mass(divergence: str) -> None:
    """float32, both models certain of one item: 1 - sum rounds to 0, and value and gradient stay finite and small."""
    sure = torch.tensor([[60.0, 0.0, 0.0, 0.0, 0.0, 0.0]]).repeat(2, 1)
    student = sure.clone().requires_grad_()
    config = KDConfig(divergence=divergence, top=2)
    loss = kd(config, taught(student, sure, torch.tensor([0, 1]), KD.want(config)))
    (gradient,) = torch.autograd.grad(loss.values.sum(), student)
    assert loss.values.abs().max() < 1e-5 and gradient.abs().max() < 1e-5
    apart = taught(student, sure.roll(1, -1), torch.tensor([0, 1]), KD.want(config))
    (gradient,) = torch.autograd.grad(kd(config, apart).values.sum(), student)
    assert gradient.isfinite().all()


def test_teacher_renormalised_counts_what_the_student_puts_elsewhere() -> None:
    """It is the KL over the items, both renormalised, plus -log of the student's probability of them."""
    file = taught_golden("topk4_fkl_teacher_renorm")
    values = {}
    for tail in ("teacher_renormalised", "both_renormalised"):
        config = KDConfig(top=4, tail=tail)
        values[tail] = kd(config, file.taught(KD.want(config)))
    kept = values["teacher_renormalised"].metrics["top_mass/student"]
    close(
        values["teacher_renormalised"].values,
        (values["both_renormalised"].values.detach() - kept.double().log()).tolist(),
        1e-6,
    )


def test_cross_entropy_is_added() -> None:
    file = taught_golden("fkl_masked_mean")
    alone, mixed = KDConfig(), KDConfig(ce_weight=0.5)
    statistics = file.taught(KD.want(alone))
    expected = kd(alone, statistics).values - 0.5 * statistics.completion.logps
    close(kd(mixed, statistics).values, expected.tolist(), 1e-12)
    assert KD.start(mixed) is None and KD.start(alone) == 0.0
    assert KD.start(KDConfig(top=4)) == 0.0 and KD.start(KDConfig(top=4, tail="truncated")) is None


def test_temperature_squared() -> None:
    file = taught_golden("gkd_beta0.5_T2")
    plain, squared = (KDConfig(divergence="jsd:0.5", temperature=2.0, temperature_squared=yes) for yes in (False, True))
    statistics = file.taught(KD.want(plain))
    close(kd(squared, statistics).values, (4 * kd(plain, statistics).values).tolist(), 1e-14)
    torch.testing.assert_close(*(kd(one, statistics).metrics["divergence/jsd:0.5"] for one in (plain, squared)))


def test_mean_over_sequences_weighs_each_completion_alike() -> None:
    config = KDConfig(mean="sequences")
    statistics = random_statistics(Taught, want=KD.want(config), rows=3)
    loss = kd(config, statistics)
    tokens = kd(KDConfig(), statistics).values.split(statistics.completion.lengths.tolist())
    assert loss.per == "row"
    close(loss.values, [one.mean().item() for one in tokens], 1e-12)


def test_the_kernel_is_told_which_divergence_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its formula, so that a form of its own for it is used on a GPU; the formula's name means the same function."""
    seen = []

    def stats(head, want, **kwargs):
        seen.extend(want)
        return {}

    monkeypatch.setattr("posttrain.vocabulary.kernels.head_stats", stats)
    want = find("kd").want(KDConfig(divergence="jsd:0.3", temperature=2.0))
    statistics(Head(torch.zeros(1, 2), torch.zeros(3, 2)), want, targets=torch.zeros(1, dtype=torch.int64))
    (entry,) = seen
    assert entry.formula == ("jsd", 0.3)
    lp, lq = torch.randn(2, 5).log_softmax(-1)
    assert torch.equal(entry.f(lp, lq), divergence("jsd:0.3").summand(lp, lq))


def test_the_kernel_takes_the_gradient_early_only_where_all_tokens_weigh_alike() -> None:
    (one,), (other,) = KD.want(KDConfig()), KD.want(KDConfig(mean="sequences"))
    assert one.eager and not other.eager
    assert one.slope is divergence("forward_kl").slope


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tail": "truncated"}, "kd: tail = 'truncated' says what becomes of the items beyond top, which is not given"),
        ({"top": 0}, "kd: top = 0: Input should be greater than 0"),
        (
            {"divergence": "jsd:1"},
            "kd: divergence = 'jsd:1': jsd takes its parameter after a colon, 0 < b < 1, for example jsd:0.5; "
            "reverse_kl, the limit of jsd:<b> / (1 - b), is meant by jsd:1",
        ),
    ],
)
def test_refused_settings(values: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as error:
        parse(KDConfig, values, "kd")
    assert str(error.value) == message
