"""Give a trained model smaller payloads: wire version 2, with a prior learned from its data.

    python -m latentwire_fast.repack --run runs/context --out runs/context_v2 --bits 4
    python -m latentwire_fast.evaluate --run runs/context_v2

Encoder, readers' parts and values stay as they are, so at equal bits answers do too. The new run
folder is a run of its own, with a fingerprint of its own; it also reads what the old one sent in
version 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from latentwire_fast.cli import (
    Imports,
    choose_device,
    import_modules,
    program,
    quiet_libraries,
    run_entry_point,
)


@dataclass(frozen=True)
class RepackArguments:
    """Give a trained model smaller payloads.

    Args:
        run: the run folder of a trained model whose bottleneck is uniform or soft_codebook.
        out: the run folder to make.
        bits: that are sent: 16, 8, 6, 4, 3 or 2; as before unless given.
        prior: static learns how often each code comes; autoregressive also, how that goes by the
            codes before (the shortest payloads, which take longer to code); flat learns nothing.
        texts: training texts that a prior learns from.
        device: cpu, cuda or cuda:NUMBER; an accelerator, if torch sees one, unless given.
        imports: a Python module to import first, repeatable: it registers parts of your own
            (docs/extending.md).
    """

    run: Path
    out: Path
    bits: int | None = None
    prior: Literal["static", "autoregressive", "flat"] = "static"
    texts: int = 2000
    device: str | None = None
    imports: Imports = ()


def main() -> None:
    """Repack a run."""
    args = tyro.cli(RepackArguments, prog=program("latentwire_fast.repack"))
    quiet_libraries()
    import_modules(args.imports)
    from latentwire_fast.training.repacking import repack

    device = choose_device(args.device)
    changes = {"prior": args.prior, "prior_texts": args.texts}
    if args.bits is not None:
        changes["bits"] = args.bits
    model = repack(args.run, args.out, device=device, **changes)
    print(f"{args.out}: model {model.fingerprint:#06x}, {model.bottleneck_config.bits} bits")


if __name__ == "__main__":
    run_entry_point(main)
