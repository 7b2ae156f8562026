"""Answer from a payload with one reader.

    python -m latentwire_fast.generate --run runs/context --reader llama --payload note.lwire \\
        --question "Where does Nulnak live?"
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from latentwire_fast.cli import check_question, quiet_libraries, run_entry_point


@dataclass(frozen=True)
class GenerateArguments:
    """Answer from a payload with one reader.

    Args:
        run: the run folder whose model wrote the payload.
        reader: name of a reader that the model has an adapter for.
        payload: a file written by `latentwire_fast.encode`; each payload in it is answered.
        question: the question, as text in context mode; in pure mode it is in the payload.
        max_new_tokens: longest answer.
        prefix_gain: factor on the calibrated size of the prefix.
        temperature: above 0, the first token is sampled.
        top_p: nucleus of that sample.
        eos_ban_steps: forbid the end of the answer for so many tokens.
        seed: of the sample.
    """

    run: Path
    reader: str
    payload: Path
    question: str | None = None
    max_new_tokens: int = 32
    prefix_gain: float = 1.0
    temperature: float = 0.0
    top_p: float = 1.0
    eos_ban_steps: int = 0
    seed: int = 0


def main() -> None:
    """Decode the payloads and print each answer, its bytes and times."""
    args = tyro.cli(GenerateArguments, prog="latentwire_fast.generate")
    quiet_libraries()
    import torch

    from latentwire_fast import wire
    from latentwire_fast.config import read_run_config
    from latentwire_fast.decoding import DecodeOptions
    from latentwire_fast.errors import ConfigError
    from latentwire_fast.interlingua import Interlingua
    from latentwire_fast.prompts import Turn
    from latentwire_fast.reader import Reader

    start = time.perf_counter()
    config = read_run_config(args.run)
    model = Interlingua.from_pretrained(args.run / "model")
    if args.reader not in config.readers:
        raise ConfigError(
            f"no reader {args.reader!r} in this run; there are {sorted(config.readers)}"
        )
    if model.mode == "context":
        if args.question is None:
            raise ConfigError("this model's latent holds the context only; give --question")
        check_question(args.question)
    if not 0 < args.prefix_gain < math.inf:
        raise ConfigError(f"prefix_gain={args.prefix_gain}, expected above 0")
    reader = Reader.from_config(args.reader, config.readers[args.reader])
    model.check_reader(reader)
    print(f"load {(time.perf_counter() - start) * 1e3:.0f} ms")
    options = DecodeOptions(
        max_new_tokens=args.max_new_tokens,
        first_token_temperature=args.temperature,
        first_token_top_p=args.top_p,
        eos_ban_steps=args.eos_ban_steps,
        seed=args.seed,
    )
    prompt = reader.prompts.build([Turn(args.question or "")], context="", latent=model.mode)
    for number, payload in enumerate(wire.read_payloads(args.payload)):
        start = time.perf_counter()
        with torch.no_grad():
            latent = model.decode_payloads([payload])
            given = model.received(reader.name, latent, gain=args.prefix_gain)
        received = time.perf_counter()
        ids = reader.generate([prompt], **given, options=options, numbers=[number])[0]
        done = time.perf_counter()
        print(f"answer: {reader.decode(ids)}")
        print(
            f"{len(payload)} bytes, payload to prefix {(received - start) * 1e3:.1f} ms, "
            f"{len(ids)} tokens in {(done - received) * 1e3:.1f} ms"
        )


if __name__ == "__main__":
    run_entry_point(main)
