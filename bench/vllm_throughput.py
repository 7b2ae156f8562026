"""Prompts per second of vLLM: a context as text, and as a payload.

    python bench/vllm_throughput.py --reader llama-160m --text-tokens 512 --latents 32   # CPU build
    python bench/vllm_throughput.py --reader FOLDER --dtype bfloat16 --batches 1 8 32    # a GPU

A reader is a folder, or a shape with random weights (`bench/prefill/shapes.py`), which vLLM makes
itself. Adapters are untrained: what they say takes as long. Both kinds of prompt ask the same
questions, and answer with as many tokens. Their runs interleave; the prefix cache is off, or every
run but the first would read nothing. Time begins at the text or the payload's bytes: `prepare` is
tokenising, or decoding and projecting. Run it with the Python that has vLLM (`make test-vllm` makes
one for the CPU in `.venv-vllm`).
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# This folder, which Python put there, holds others named like packages (`kernels`).
sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench.command_line import add_json, parser_of, write_json  # noqa: E402

BESIDE = 96  # positions beside the context: template, question, anchor


@dataclass(frozen=True)
class Row:
    """Medians over the runs of one kind of prompt.

    Attributes:
        positions: of a prompt, on average.
        sent_bytes: of a context or a payload, on average.
        prepare_ms, generate_ms: of the whole batch.
        first, third: quartiles of both together, ms.
    """

    kind: str
    batch: int
    new_tokens: int
    positions: float
    sent_bytes: float
    prepare_ms: float
    generate_ms: float
    first: float
    third: float

    @property
    def prompts_per_second(self) -> float:
        return 1e3 * self.batch / (self.prepare_ms + self.generate_ms)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = parser_of("vllm_throughput")
    add = parser.add_argument
    add("--reader", default="llama-160m", help="shape, folder or hub id")
    add("--text-tokens", type=int, default=512, help="of a context")
    add("--latents", type=int, default=32, help="M")
    add("--d-z", type=int, default=32, help="width of a latent")
    add("--batches", nargs="+", type=int, default=[1, 8])
    add("--new-tokens", nargs="+", type=int, default=[1, 16], help="1: the time to the first")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    add("--warm-ups", type=int, default=1)
    add("--repeats", type=int, default=7)
    add("--compiled", action="store_true", help="let vLLM compile the reader; it takes minutes")
    add_json(parser)
    args = parser.parse_args(arguments)
    for name in ("text_tokens", "latents", "d_z", "repeats"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected a number of at least 1")
    return args


def client_of(args: argparse.Namespace, scratch: Path) -> tuple[str, str, Any]:
    """The folder that vLLM loads, how it does, and a reader with the same embeddings.

    Of a shape, vLLM draws the weights; here one layer is enough to make prompts.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from bench.prefill.shapes import SHAPES, tokenizer_for
    from latentwire_fast.readers.loading import resolve_source
    from latentwire_fast.readers.reader import Reader

    source, dtype = args.reader, getattr(torch, args.dtype)
    if source not in SHAPES:
        return resolve_source(source), "auto", Reader.load(source, name="reader", dtype=dtype)
    config, tokenizer = SHAPES[source], tokenizer_for(source)
    one_layer = {**config.to_dict(), "num_hidden_layers": 1, "layer_types": None}
    model = AutoModelForCausalLM.from_config(type(config)(**one_layer), dtype=dtype)
    served = type(config)(**config.to_dict())
    served.architectures = [type(model).__name__]
    served.save_pretrained(scratch)
    tokenizer.save_pretrained(scratch)
    return str(scratch), "dummy", Reader(model, tokenizer, name="reader")


def model_of(args: argparse.Namespace, reader: Any) -> Any:
    """An untrained model with soft tokens for this reader."""
    from latentwire_fast.models.encoders.base import build_encoder
    from latentwire_fast.models.interlingua import Interlingua
    from latentwire_fast.readers.card import ReaderCard
    from latentwire_fast.registry import ATTACHMENTS, BOTTLENECKS, ENCODERS

    encoder = ENCODERS.config("byte", latents=args.latents, d_z=args.d_z)
    return Interlingua(
        build_encoder(encoder, {}),
        {reader.name: ReaderCard.of(reader)},
        bottleneck=BOTTLENECKS.config("uniform", bits=6, group_size=32),
        attachments=[ATTACHMENTS.config("soft")],
        mode="context",
    ).eval()


@dataclass
class Contest:
    """One engine, and the same questions on contexts as text and as payloads."""

    llm: Any
    asking: Any
    work: Any
    payloads: list[bytes]

    def text(self, batch: int) -> list[Any]:
        asked = self.asking.prompts.build_many(
            self._turns(batch), contexts=self.work.contexts[:batch]
        )
        return self.asking.tokens(asked)

    def payload(self, batch: int) -> list[Any]:
        asked = self.asking.prompts.build_many(self._turns(batch), latent="context")
        return self.asking.embeds(asked, self.payloads[:batch])

    def _turns(self, batch: int) -> list[Any]:
        from latentwire_fast.prompts.builder import Turn

        return [Turn(question) for question in self.work.questions[:batch]]

    def rows(self, batch: int, new_tokens: int, *, warm_ups: int, repeats: int) -> list[Row]:
        """Both kinds, whose runs interleave."""
        makers = {"text": self.text, "payload": self.payload}
        times: dict[str, list[tuple[float, float]]] = {kind: [] for kind in makers}
        positions = {}
        for number in range(warm_ups + repeats):
            for kind, make in makers.items():
                seconds, positions[kind] = self._run(make, batch, new_tokens)
                if number >= warm_ups:
                    times[kind].append(seconds)
        sizes = {"text": self.work.text_bytes, "payload": float(len(self.payloads[0]))}
        return [
            row_of(kind, batch, new_tokens, positions[kind], sizes[kind], found)
            for kind, found in times.items()
        ]

    def _run(
        self, make: Callable[[int], list[Any]], batch: int, new_tokens: int
    ) -> tuple[tuple[float, float], float]:
        """Seconds to make the prompts and to answer them, and the prompts' mean length."""
        from vllm import SamplingParams

        sampling = SamplingParams(
            temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False
        )
        start = time.perf_counter()
        prompts = make(batch)
        made = time.perf_counter()
        outputs = self.llm.generate(prompts, sampling, use_tqdm=False)
        done = time.perf_counter()
        assert all(len(output.outputs[0].token_ids) == new_tokens for output in outputs)
        length = statistics.mean(len(next(iter(prompt.values()))) for prompt in prompts)
        return (made - start, done - made), length


def contest_of(args: argparse.Namespace, scratch: Path) -> Contest:
    """The engine and what it is asked."""
    import torch
    from vllm import LLM

    from bench.prefill.shapes import synthetic_workload
    from latentwire_fast.serving.vllm import VllmPrompts

    torch.manual_seed(0)
    folder, load_format, reader = client_of(args, scratch)
    model, most = model_of(args, reader), max(args.batches)
    llm = LLM(
        folder,
        load_format=load_format,
        dtype=args.dtype,
        enable_prompt_embeds=True,
        enable_prefix_caching=False,
        enforce_eager=not args.compiled,
        max_model_len=args.text_tokens + args.latents + BESIDE + max(args.new_tokens),
        max_num_seqs=most,
        skip_tokenizer_init=True,
    )
    work = synthetic_workload(reader.prompts, rows=most, tokens=args.text_tokens, seed=0)
    payloads = model.payloads(torch.randn(most, args.latents, args.d_z))
    return Contest(llm, VllmPrompts(model, reader), work, payloads)


def measure(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """All rows, and what they were measured on."""
    import torch
    import vllm

    contest = contest_of(args, scratch)
    rows: list[Row] = []
    for batch in args.batches:
        for new_tokens in args.new_tokens:
            found = contest.rows(batch, new_tokens, warm_ups=args.warm_ups, repeats=args.repeats)
            rows += found
            print(table(found), file=sys.stderr, flush=True)
    has_gpu = torch.cuda.is_available()
    return {
        "reader": args.reader,
        "dtype": args.dtype,
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if has_gpu else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "compiled": args.compiled,
        "repeats": args.repeats,
        "rows": rows,
    }


def row_of(
    kind: str,
    batch: int,
    new_tokens: int,
    positions: float,
    sent_bytes: float,
    found: list[tuple[float, float]],
) -> Row:
    totals = sorted(1e3 * sum(seconds) for seconds in found)
    quartiles = statistics.quantiles(totals, n=4) if len(totals) > 1 else [totals[0]] * 3
    prepare, generate = (1e3 * statistics.median(part) for part in zip(*found, strict=True))
    return Row(
        *(kind, batch, new_tokens, positions, sent_bytes, prepare, generate),
        first=quartiles[0],
        third=quartiles[2],
    )


def table(rows: Sequence[Row]) -> str:
    """The rows for people."""
    heads = (
        *("batch", "new tokens", "context as", "positions", "bytes", "prepare ms", "vLLM ms"),
        *("quartiles of both", "prompts/s", "times text's"),
    )
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for text, payload in zip(rows[::2], rows[1::2], strict=True):
        for row in (text, payload):
            factor = payload.prompts_per_second / text.prompts_per_second
            lines.append(
                f"| {row.batch} | {row.new_tokens} | {row.kind} | {row.positions:.0f} | "
                f"{row.sent_bytes:.0f} | {row.prepare_ms:.1f} | {row.generate_ms:.1f} | "
                f"{row.first:.1f}-{row.third:.1f} | {row.prompts_per_second:.2f} | "
                f"{f'{factor:.2f}' if row is payload else ''} |"
            )
    return "\n".join(lines)


def main() -> None:
    args = parse()
    with tempfile.TemporaryDirectory() as scratch:
        found = measure(args, Path(scratch))
    rows = found.pop("rows")
    print(" ".join(f"{name}={value}" for name, value in found.items()))
    print(table(rows))
    write_json({**found, "rows": [asdict(row) for row in rows]}, args.json)


if __name__ == "__main__":
    main()
