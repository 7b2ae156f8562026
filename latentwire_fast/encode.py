"""Write the payload of a context, or those of many passages.

    python -m latentwire_fast.encode --run runs/context --context note.txt --out note.lwire
    python -m latentwire_fast.encode --run runs/demo --context note.txt --question "Who?" \\
        --out question.lwire
    python -m latentwire_fast.encode --run runs/context --context book.txt --out book.lwire \\
        --chunk-length 1024
    python -m latentwire_fast.encode --run runs/context --context - --out - | ...

    python -m latentwire_fast.encode --run runs/context --data passages=corpus.jsonl --out corpus
    torchrun --nproc-per-node 4 -m -- latentwire_fast.encode --run runs/context --data ... --out ...
    python -m latentwire_fast.encode --run runs/context --data ... --out corpus --ray 8
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
    check_one_of,
    check_question,
    choose_device,
    import_modules,
    process_of_torchrun,
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
    """Write the payload of a context, or those of many passages.

    Args:
        run: the run folder of a trained model.
        out: the payload file to write, or - for standard output; the sizes and times are then
            printed on standard error. With --data, the folder of the store; one that was begun is
            gone on with.
        context: a UTF-8 text file, or - for standard input.
        data: the passages of a source into a store (docs/stores.md): passages=FILE (JSON lines or
            .tsv, with ids), or any source that `train --data` takes.
        question: only for a model of pure mode, whose latent holds the question too.
        chunk_length: cut a longer text at sentence ends into chunks of at most so many of the
            encoder's tokens, and write a payload for each, one behind the other. Without it, a
            text that is longer than the encoder reads is refused.
        bits: per value, 16, 8, 6 or 4; the model's own number if not given.
        reader: leave out the slots that are other readers' own, where the model has such slots: the
            payload is then for this reader alone.
        device: cpu, cuda or cuda:NUMBER; an accelerator, if torch sees one, unless given. The
            processes of torchrun take one each.
        dtype: that the encoder computes in; float32, as it was trained, unless given.
        passages: with --data, at most so many.
        shard_size: with --data, passages in a file of the store.
        batch_size: with --data, passages that are encoded together.
        threads: with --data, threads of each process on a CPU.
        ray: with --data, encode with so many workers of Ray Data.
        imports: a Python module to import first, repeatable: it registers parts of your own
            (docs/extending.md).
    """

    run: Path
    out: Path
    context: Path | None = None
    data: str | None = None
    question: str | None = None
    chunk_length: int | None = None
    bits: int | None = None
    reader: str | None = None
    device: str | None = None
    dtype: Dtype | None = None
    passages: int | None = None
    shard_size: int = 1000
    batch_size: int = 32
    threads: int = 1
    ray: int | None = None
    imports: Imports = ()


def main() -> None:
    """Encode one text, or many, and print sizes and times."""
    args = tyro.cli(EncodeArguments, prog=program("latentwire_fast.encode"))
    check_one_of({"--context FILE": args.context, "--data SOURCE": args.data})
    if args.data is not None:
        _encode_data(args, args.data)
        return
    if args.out != STANDARD:
        _encode(args, None)
        return
    out = standard_output("--out")
    # Whatever else is printed, by a module of `--import` too, is not part of the payload.
    with contextlib.redirect_stdout(sys.stderr):
        _encode(args, out)


def _encode_data(args: EncodeArguments, source: str) -> None:
    """Encode a source's passages into a store, or this process's share of them."""
    quiet_libraries()
    import_modules(args.imports)
    from latentwire_fast.data.passages import load_passages
    from latentwire_fast.files.run_folder import RunFolder
    from latentwire_fast.models.interlingua import Interlingua
    from latentwire_fast.models.store_writer import check_plan, write_store
    from latentwire_fast.wire.store.plan import StorePlan, data_digest

    check_one_of({"--data SOURCE": source, "--question TEXT": args.question})
    rank, processes, local = process_of_torchrun()
    if args.ray is not None:
        check_one_of({"--ray WORKERS": args.ray, "torchrun": None if processes == 1 else processes})
    folder = RunFolder(args.run)
    folder.check_output(args.out)
    device = choose_device(args.device, number=local)
    texts = load_passages(source, count=args.passages)
    model = Interlingua.from_pretrained(folder.model).to(device)
    plan = StorePlan(
        model=model.digest,
        data=data_digest(texts),
        passages=len(texts),
        shard_size=args.shard_size,
        batch_size=args.batch_size,
        threads=args.threads,
        dtype=args.dtype or "float32",
        bits=args.bits,
        reader=args.reader,
        chunk_length=args.chunk_length,
    )
    check_plan(model, plan)
    start = time.perf_counter()
    if args.ray is None:
        done = write_store(model, args.out, plan, texts, rank=rank, processes=processes)
    else:
        from latentwire_fast.models.store_on_ray import write_store_on_ray

        done = write_store_on_ray(
            folder.model,
            args.out,
            plan,
            texts,
            workers=args.ray,
            device=device.type,
            imports=args.imports,
        )
    seconds = time.perf_counter() - start
    rate = f", {done / seconds:,.0f} a second" if done else ""
    where = "" if processes == 1 else f" by process {rank + 1} of {processes}"
    print(f"{args.out}: {done:,} of {len(texts):,} passages encoded{where}{rate}")


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
        context = None if args.context == STANDARD else args.context
        RunFolder(args.run).check_output_file(args.out, context=context)
    if args.question is not None:
        check_question(args.question)
    assert args.context is not None
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
        written = wire.write_payloads(args.out, payloads)
    else:
        written = stream.write(joined(payloads))
        stream.flush()
    replaced = replaced_text(text, args.question or "", mode=model.mode)
    print(
        f"{args.out}: {wire.payload_bytes(payloads)} bytes for {wire.utf8_bytes(replaced)} bytes "
        f"of text ({wire.brotli_bytes(replaced)} with brotli)"
        + ("" if args.chunk_length is None else f", in {len(payloads)} payloads")
        + ("" if written == wire.payload_bytes(payloads) else f"; {written} bytes were written")
    )
    print(f"load {(loaded - start) * 1e3:.0f} ms, encode {(encoded - loaded) * 1e3:.1f} ms")


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
