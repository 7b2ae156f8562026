"""Answer from a payload, or from those of a store, with one reader.

    python -m latentwire_fast.generate --run runs/context --reader llama --payload note.lwire \\
        --question "Where does Nulnak live?"
    python -m latentwire_fast.generate --run runs/context --reader llama --payload book.lwire \\
        --together --question "Where does Nulnak live?"
    python -m latentwire_fast.generate --run runs/context --reader llama --store corpus \\
        --ids passage-7 passage-12 --together --question "Where does Nulnak live?"
    ... | python -m latentwire_fast.generate --run runs/demo --reader llama --payload -
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import tyro

from latentwire_fast.cli import (
    STANDARD,
    Dtype,
    Imports,
    ReaderOptions,
    check_one_of,
    check_question,
    choose_device,
    parse_arguments,
    run_entry_point,
    standard_input,
)

if TYPE_CHECKING:  # imported for real where they are used: `--help` does without torch
    from latentwire_fast.models.interlingua import Interlingua
    from latentwire_fast.readers.decoding import DecodeOptions
    from latentwire_fast.readers.reader import Reader
    from latentwire_fast.serving import ReceiverOptions
    from latentwire_fast.serving.payload_batch import Message

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GenerateArguments:
    """Answer from a payload with one reader.

    Args:
        run: the run folder whose model wrote the payload.
        reader: name of a reader that the model has an adapter for.
        payload: a file written by `latentwire_fast.encode`, or - for standard input; each payload
            in it is answered.
        store: a folder written by `encode --data`, in the place of a file.
        ids: of the passages of the store; there is an answer for each.
        together: there is one answer, from all payloads of the file, such as the chunks of one text
            (`encode --chunk-length`), or from all these passages of the store.
        question: the question, as text in context mode; in pure mode it is in the payload
            already, and a question given here is not used.
        max_new_tokens: longest answer.
        prefix_gain: factor on the strength of what the reader is given, at most 1000; 1 is what was
            trained.
        temperature: above 0, the first token is sampled; at 0 it is the most probable one.
        top_p: the first token is sampled among the most probable ones that have this probability
            together.
        eos_ban_steps: the answer has at least so many tokens.
        seed: of the sampling.
        merge_lora: add the reader's low-rank updates (LoRA), if it has any, to its weights: it then
            reads as fast as without them.
        device: cpu, cuda or cuda:NUMBER; an accelerator, if torch sees one, unless given.
        dtype: that the reader computes in; the run's own unless given.
        reader_options: NAME.FIELD=VALUE, repeatable: how the reader is loaded. FIELD is dtype (to
            compute in), device_map, max_memory or attn_implementation.
        imports: a Python module to import first, repeatable: it registers parts of your own
            (docs/extending.md).
    """

    run: Path
    reader: str
    payload: Path | None = None
    store: Path | None = None
    ids: tuple[str, ...] = ()
    question: str | None = None
    together: tyro.conf.FlagCreatePairsOff[bool] = False
    max_new_tokens: int = 32
    prefix_gain: float = 1.0
    temperature: float = 0.0
    top_p: float = 1.0
    eos_ban_steps: int = 0
    seed: int = 0
    merge_lora: tyro.conf.FlagCreatePairsOff[bool] = False
    device: str | None = None
    dtype: Dtype | None = None
    reader_options: ReaderOptions = ()
    imports: Imports = ()


class Answer(NamedTuple):
    """The answer to one payload, or to several together, and the seconds that it took."""

    text: str
    tokens: int
    payload_bytes: int
    prefill_seconds: float
    decode_seconds: float


def decode_options(args: GenerateArguments) -> DecodeOptions:
    """Options of decoding, from the command line.

    Raises:
        ConfigError: an option outside its range.
    """
    from latentwire_fast.readers.decoding import DecodeOptions

    return DecodeOptions(
        max_new_tokens=args.max_new_tokens,
        first_token_temperature=args.temperature,
        first_token_top_p=args.top_p,
        eos_ban_steps=args.eos_ban_steps,
        seed=args.seed,
    )


def receiver_options(args: GenerateArguments) -> ReceiverOptions:
    """Options of the receiver, from the command line.

    Raises:
        ConfigError: a gain outside its range.
    """
    from latentwire_fast.serving import ReceiverOptions

    return ReceiverOptions(
        new_tokens=max(1, args.max_new_tokens),
        prefix_gain=args.prefix_gain,
        merge_lora=args.merge_lora,
    )


def load(args: GenerateArguments) -> tuple[Interlingua, Reader]:
    """The run's model, and the reader that is to answer.

    Raises:
        ConfigError: no such reader or device, or no question where the model's latent holds none.
        CheckpointError: no trained model, or a reader with other weights.
    """
    from latentwire_fast.config.assignments import with_assignments
    from latentwire_fast.config.serialization import read_run_config
    from latentwire_fast.errors import ConfigError
    from latentwire_fast.files.run_folder import RunFolder
    from latentwire_fast.models.interlingua import Interlingua
    from latentwire_fast.readers.reader import Reader

    device = choose_device(args.device)
    config = with_assignments(
        read_run_config(args.run), reader_options=args.reader_options, trained=True
    )
    model = Interlingua.from_pretrained(RunFolder(args.run).model).to(device)
    if args.reader not in config.readers:
        raise ConfigError(
            f"no reader {args.reader!r} in this run; there are {sorted(config.readers)}"
        )
    if model.mode == "pure" and args.question is not None:
        logger.warning("this model's latent holds its question: --question is not used")
    if model.mode == "context":
        if args.question is None:
            raise ConfigError("this model's latent holds the context only; give --question")
        check_question(args.question)
    reader = Reader.from_config(args.reader, config.readers[args.reader], device, dtype=args.dtype)
    return model, reader


def answers(
    model: Interlingua,
    reader: Reader,
    args: GenerateArguments,
    *,
    receiving: ReceiverOptions,
    decoding: DecodeOptions,
) -> Iterator[Answer]:
    """The answers to the payloads of a file, of standard input or of a store, in their order; one
    to all of them with `--together`. A file is read whole before the first answer, so that one that
    was cut short gives none; what comes through standard input is answered as it comes.

    Raises:
        PayloadError: a payload that is damaged, or of another model.
        DataError: no complete store, or a passage that it has not.
        CheckpointError: the reader has other weights than the model was trained for.
    """
    import torch

    from latentwire_fast import wire
    from latentwire_fast.prompts.builder import Turn
    from latentwire_fast.serving import Receiver
    from latentwire_fast.serving.payload_batch import payloads_of

    receiver = Receiver.of(model, reader, options=receiving)
    prompt = reader.prompts.build([Turn(args.question or "")], context=None, latent=model.mode)
    messages = _messages(model, args)
    if args.together:
        messages = [[payload for message in messages for payload in payloads_of(message)]]
    for number, payload in enumerate(messages):
        start = time.perf_counter()
        first = receiver.prefill([prompt], payloads=[payload])
        if reader.device.type == "cuda":
            torch.cuda.synchronize(reader.device)
        prefilled = time.perf_counter()
        (ids,) = first.generate(decoding, numbers=[number])
        done = time.perf_counter()
        seconds = prefilled - start, done - prefilled
        yield Answer(reader.decode(ids), len(ids), wire.payload_bytes(payload), *seconds)


def _messages(model: Interlingua, args: GenerateArguments) -> Iterable[Message]:
    """What each answer is about."""
    from latentwire_fast import wire
    from latentwire_fast.wire.store import PayloadStore

    if args.store is not None:
        store = PayloadStore(args.store)
        store.check_model(model.digest)
        return store.messages(args.ids)
    assert args.payload is not None
    if args.payload == STANDARD:
        stream = standard_input("--payload", binary=True)
        return wire.read_payload_stream(stream, name="standard input")
    return [*wire.read_payloads(args.payload)]


def main() -> None:
    """Decode the payloads and print each answer, its bytes and times."""
    args = parse_arguments(GenerateArguments, prog="latentwire_fast.generate")
    check_one_of({"--payload FILE": args.payload, "--store STORE": args.store})
    check_one_of({"--payload FILE": args.payload, "--ids ID ...": args.ids or None})
    decoding, receiving = decode_options(args), receiver_options(args)
    start = time.perf_counter()
    model, reader = load(args)
    print(f"load {(time.perf_counter() - start) * 1e3:.0f} ms")
    for answer in answers(model, reader, args, receiving=receiving, decoding=decoding):
        print(f"answer: {answer.text}")
        if not answer.tokens:
            logger.warning(
                "the reader ended its answer at once; --eos-ban-steps makes it say something"
            )
        print(
            f"{answer.payload_bytes} bytes, payload to logits {answer.prefill_seconds * 1e3:.1f} "
            f"ms, {answer.tokens} tokens in {answer.decode_seconds * 1e3:.1f} ms"
        )


if __name__ == "__main__":
    run_entry_point(main)
