"""The loader of distillation's golden files, on the two divergences everybody agrees about."""

from __future__ import annotations

import pytest
import torch
from golden import close, tensor
from golden_taught import taught_golden

from posttrain.stats import Rowwise, Sum, Top


@pytest.mark.parametrize(("name", "divergence"), [("fkl_masked_mean", "forward_kl"), ("rkl_masked_mean", "reverse_kl")])
def test_definitions_agree_with_the_file(name: str, divergence: str) -> None:
    file = taught_golden(name)
    whole = Rowwise(name="whole", f=lambda lp, lq, _: (lq.exp() * (lq - lp)).sum(-1))
    again = Sum(name="again", summand=lambda lp, lq: lp.exp() * (lp - lq))
    got = file.taught([divergence, whole, again, Top(k=4)]).completion
    close(got[divergence], tensor(file.outputs["per_token"])[file.mask].tolist())
    close(got["whole" if divergence == "forward_kl" else "again"], got[divergence].tolist())
    (gradient,) = torch.autograd.grad(got[divergence].mean(), file.student)
    close(gradient, file.outputs["grad_student_logits"])
    assert got["top_ids"].shape == got["top_logps"].shape == (10, 4)
    assert torch.equal(got["top_reference_logps"], got["top_reference_logps"].sort(descending=True).values)
    assert got.lengths.tolist() == file.mask.sum(1).tolist() and got.logps.shape == (10,)
