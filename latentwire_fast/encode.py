"""Write the payload of a context.

    python -m latentwire_fast.encode --run runs/context --context note.txt --out note.lwire
    python -m latentwire_fast.encode --run runs/demo --context note.txt --question "Who?" \\
        --out question.lwire
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from latentwire_fast.cli import check_question, quiet_libraries, run_entry_point


@dataclass(frozen=True)
class EncodeArguments:
    """Write the payload of a context.

    Args:
        run: the run folder of a trained model.
        context: a UTF-8 text file.
        out: the payload file to write.
        question: for a model of pure mode, whose latent holds the question too.
        bits: 16, 8, 6 or 4; the model's own if not given.
    """

    run: Path
    context: Path
    out: Path
    question: str | None = None
    bits: int | None = None


def main() -> None:
    """Encode one file and print its sizes and times."""
    args = tyro.cli(EncodeArguments, prog="latentwire_fast.encode")
    quiet_libraries()
    from latentwire_fast import wire
    from latentwire_fast.errors import ConfigError
    from latentwire_fast.files.atomic import check_replaceable
    from latentwire_fast.files.run_folder import RunFolder
    from latentwire_fast.files.text import read_text
    from latentwire_fast.models.interlingua import Interlingua
    from latentwire_fast.prompts.builder import replaced_text

    text = read_text(args.context)
    check_replaceable(args.out)
    if args.out.exists() and args.out.samefile(args.context):
        raise ConfigError(f"--out {args.out} is the context's own file; give another")
    if args.question is not None:
        check_question(args.question)
    start = time.perf_counter()
    model = Interlingua.from_pretrained(RunFolder(args.run).model)
    loaded = time.perf_counter()
    questions = None if args.question is None else [args.question]
    payload = model.encode_payloads([text], questions, bits=args.bits)[0]
    encoded = time.perf_counter()
    wire.write_payloads(args.out, [payload])
    replaced = replaced_text(text, args.question or "", mode=model.mode)
    print(
        f"{args.out}: {len(payload)} bytes for {wire.utf8_bytes(replaced)} bytes of text "
        f"({wire.brotli_bytes(replaced)} with brotli)"
    )
    print(f"load {(loaded - start) * 1e3:.0f} ms, encode {(encoded - loaded) * 1e3:.1f} ms")


if __name__ == "__main__":
    run_entry_point(main)
