"""Peak memory of a training step's losses with their gradient, through logits and through the op.

    python -m bench.loss_memory --rows 2400 --vocabulary 128256 --width 256      # 10 GB, minutes

On the CPU, in fp32, each in a process of its own: the resident set at its peak, beyond the inputs.
`counted` is what the op allows itself: a chunk's logits and gradients, and the hidden states'. The
reference, which a CPU runs, needs less: its gradients take the place of the logits.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.command_line import parser_of
from bench.processes import ROOT
from latentwire_fast import ops
from latentwire_fast.ops.linear_losses import default_chunk_rows

LOSSES, FORMS = ("cross-entropy", "cross-entropy and KL"), ("eager", "op")


def loss_of(
    hidden: Tensor, teacher: Tensor | None, head: Tensor, labels: Tensor, *, form: str
) -> Tensor:
    """The sum of the losses; without a teacher, of the cross-entropy alone."""
    if form == "op":
        losses = ops.linear_cross_entropy_kd(hidden, labels, head, teacher_hidden=teacher)
        return losses.cross_entropy + losses.kd
    logits = hidden @ head.T
    loss = F.cross_entropy(logits, labels, reduction="sum")
    if teacher is not None:
        log_q, log_p = (torch.log_softmax(x, -1) for x in (logits, teacher @ head.T))
        loss = loss + F.kl_div(log_q, log_p, reduction="sum", log_target=True)
    return loss


def kilobytes(field: str) -> int:
    found = re.search(field + r":\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1])


def measure(args: argparse.Namespace) -> None:
    """In a process of its own: megabytes at the peak, and the loss."""
    torch.manual_seed(0)
    hidden, teacher = torch.randn(2, args.rows, args.width).mul_(args.width**-0.5)
    head, labels = torch.randn(args.vocabulary, args.width), torch.arange(args.rows)
    source = teacher if args.loss == LOSSES[1] else None

    def run(rows: int, tokens: int) -> float:
        some = hidden[:rows].clone().requires_grad_()
        taught = None if source is None else source[:rows]
        loss = loss_of(some, taught, head[:tokens], labels[:rows] % tokens, form=args.form)
        loss.backward()
        return float(loss)

    run(2, 2000)  # what libraries set up once
    before = kilobytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what is there now
    loss = run(args.rows, args.vocabulary)
    print(1.024e-3 * (kilobytes("VmHWM") - before), loss)


def counted(rows: int, vocabulary: int, width: int, *, distils: bool) -> float:
    """Megabytes that the op allows itself at a time."""
    terms = 1 + distils
    chunk = default_chunk_rows(rows, vocabulary, terms=terms, distils=distils)
    return 4e-6 * (chunk * vocabulary * (1 + distils + terms) + terms * rows * width)


def main() -> None:
    """Print the table."""
    parser = parser_of("loss_memory")
    for name, value in (("rows", 2400), ("vocabulary", 128_256), ("width", 256)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--loss", choices=LOSSES, help=argparse.SUPPRESS)
    parser.add_argument("--form", choices=FORMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.loss:
        measure(args)
        return
    sizes = (args.rows, args.vocabulary, args.width)
    print("| losses | form | peak, MB | counted, MB | loss |\n|---|---|---|---|---|")
    for loss in LOSSES:
        for form in FORMS:
            command = [sys.executable, "-m", "bench.loss_memory", "--loss", loss, "--form", form]
            for name, size in zip(("rows", "vocabulary", "width"), sizes, strict=True):
                command += [f"--{name}", str(size)]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
            peak, value = map(float, done.stdout.split())
            held = f"{counted(*sizes, distils=loss == LOSSES[1]):.0f}" if form == "op" else "-"
            print(f"| {loss} | {form} | {peak:.0f} | {held} | {value:.7g} |", flush=True)


if __name__ == "__main__":
    main()
