"""The two forms whose memory is compared are the same losses; what the op counts is little."""

from __future__ import annotations

import pytest
import torch

from bench import loss_memory


@pytest.mark.parametrize("distils", [False, True])
def test_both_forms_are_one_loss(distils: bool) -> None:
    hidden, teacher = torch.randn(2, 6, 16)
    head, labels = torch.randn(50, 16), torch.arange(6)
    eager, op = (
        loss_memory.loss_of(hidden, teacher if distils else None, head, labels, form=form)
        for form in loss_memory.FORMS
    )
    torch.testing.assert_close(eager, op)


def test_the_op_counts_less_than_half_of_the_logits() -> None:
    rows, vocabulary = 2400, 128_256
    logits = 4e-6 * rows * vocabulary  # megabytes
    for distils in (False, True):
        counted = loss_memory.counted(rows, vocabulary, 256, distils=distils)
        assert 0.1 * logits < counted < 0.5 * logits


def test_the_resident_set_is_read() -> None:
    assert 0 < loss_memory.kilobytes("VmRSS") <= loss_memory.kilobytes("VmHWM")
