"""Write the payload of a context.

    python -m latentwire_fast.encode --run runs/context --context note.txt --out note.lwire
    python -m latentwire_fast.encode --run runs/demo --context note.txt --question "Who?" \\
        --out question.lwire
    python -m latentwire_fast.encode --run runs/context --context book.txt --out book.lwire \\
        --chunk-length 1024
    python -m latentwire_fast.encode --run runs/context --context - --out - | ...
"""

from __future__ import annotations

import contextlib
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import tyro

from latentwire_fast.cli import (
    STANDARD,
    Dtype,
    Imports,
    check_question,
    choose_device,
    import_modules,
    program,
    quiet_libraries,
    run_entry_point,
    standard_input,
    standard_output,
)

if TYPE_CHECKING:  # `--help` does without torch
    import torch


@dataclass(frozen=True)
class EncodeArguments:
    """Write the payload of a context.

    Args:
        run: the run folder of a trained model.
        context: a UTF-8 text file, or - for standard input.
        out: the payload file to write, or - for standard output; the sizes and times are then
            printed on standard error.
        question: only for a model of pure mode, whose latent holds the question too.
        chunk_length: cut a longer text at sentence ends into chunks of at most so many of the
            encoder's tokens, and write a payload for each, one behind the other. Without it, a
            text that is longer than the encoder reads is refused.
        bits: per value, 16, 8, 6 or 4; the model's own number if not given.
        reader: leave out the slots that are other readers' own, where the model has such slots: the
            payload is then for this reader alone.
        device: cpu, cuda or cuda:NUMBER; an accelerator, if torch sees one, unless given.
        dtype: that the encoder computes in; float32, as it was trained, unless given.
        imports: a Python module to import first, repeatable: it registers parts of your own
            (docs/extending.md).
    """

    run: Path
    context: Path
    out: Path
    question: str | None = None
    chunk_length: int | None = None
    bits: int | None = None
    reader: str | None = None
    device: str | None = None
    dtype: Dtype | None = None
    imports: Imports = ()


def main() -> None:
    """Encode one text and print its sizes and times."""
    args = tyro.cli(EncodeArguments, prog=program("latentwire_fast.encode"))
    if args.out != STANDARD:
        _encode(args, None)
        return
    out = standard_output("--out")
    # Whatever else is printed, by a module of `--import` too, is not part of the payload.
    with contextlib.redirect_stdout(sys.stderr):
        _encode(args, out)


def _encode(args: EncodeArguments, stream: BinaryIO | None) -> None:
    """Encode to the stream, or else to the file of the arguments, and print sizes and times."""
    quiet_libraries()
    import_modules(args.imports)
    from latentwire_fast import wire
    from latentwire_fast.files.run_folder import RunFolder
    from latentwire_fast.files.text import decode_text, read_text
    from latentwire_fast.models.interlingua import Interlingua
    from latentwire_fast.prompts.builder import replaced_text
    from latentwire_fast.wire.files import joined

    device = choose_device(args.device)
    if stream is None:
        _check_out(args)
    if args.question is not None:
        check_question(args.question)
    if args.context == STANDARD:
        content = standard_input("--context", binary=False).read()
        text = decode_text(content, name="standard input")
    else:
        text = read_text(args.context)
    start = time.perf_counter()
    model = Interlingua.from_pretrained(RunFolder(args.run).model).to(device)
    loaded = time.perf_counter()
    questions = None if args.question is None else [args.question]
    with _computing_in(args.dtype, device):
        if args.chunk_length is None:
            payloads = model.encode_payloads([text], questions, bits=args.bits, reader=args.reader)
        else:
            (message,) = model.encode_chunks(
                [text],
                questions,
                length=args.chunk_length,
                bits=args.bits,
                reader=args.reader,
            )
            payloads = [*message]
    encoded = time.perf_counter()
    if stream is None:
        wire.write_payloads(args.out, payloads)
    else:
        stream.write(joined(payloads))
        stream.flush()
    replaced = replaced_text(text, args.question or "", mode=model.mode)
    print(
        f"{args.out}: {wire.payload_bytes(payloads)} bytes for {wire.utf8_bytes(replaced)} bytes "
        f"of text ({wire.brotli_bytes(replaced)} with brotli)"
        + ("" if args.chunk_length is None else f", in {len(payloads)} payloads")
    )
    print(f"load {(loaded - start) * 1e3:.0f} ms, encode {(encoded - loaded) * 1e3:.1f} ms")


def _check_out(args: EncodeArguments) -> None:
    """Raise now, rather than after the work, unless a payload can be written to the file.

    Raises:
        ConfigError, OSError: it cannot.
    """
    from latentwire_fast.errors import ConfigError
    from latentwire_fast.files.atomic import check_replaceable
    from latentwire_fast.files.run_folder import RunFolder

    check_replaceable(args.out)
    if RunFolder(args.run).owns(args.out):
        raise ConfigError(f"--out {args.out} belongs to the run; give another")
    if not args.out.parent.is_dir():
        raise ConfigError(f"--out {args.out}: there is no folder {args.out.parent}; make it")
    is_context = args.context != STANDARD and args.context.exists()
    if is_context and args.out.exists() and args.out.samefile(args.context):
        raise ConfigError(f"--out {args.out} is the context's own file; give another")


def _computing_in(
    dtype: Dtype | None, device: torch.device
) -> contextlib.AbstractContextManager[object]:
    """Inside the block, matrix products are computed in this dtype; the weights, by which payloads
    are recognised, stay as they are."""
    import torch

    if dtype is None or dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, dtype))


if __name__ == "__main__":
    run_entry_point(main)
