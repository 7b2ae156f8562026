"""One run in lm-evaluation-harness: plain `hf`, text mode and payload mode on the same tasks.

    python -m bench.real.lm_eval_modes --run runs/context --out runs/harness
    python -m bench.real.lm_eval_modes --run runs/real --data eval.json --questions 100 --out ...

Two tasks are written from held-out questions on passages, as a user of the harness would write
them:

* `squad_like`: `generate_until`, scored by exact match and F1;
* `mmlu_like`: four choices by `loglikelihood`, the three wrong ones are answers to other questions.

Text mode is compared with `hf` request by request: the same texts, the same log-likelihoods to the
last bit. OUT gets the tasks, and `modes.json` with every score.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.command_line import parser_of
from latentwire_fast.cli import quiet_libraries, run_entry_point
from latentwire_fast.config.serialization import read_run_config
from latentwire_fast.data.examples import Example
from latentwire_fast.data.sources import load_examples
from latentwire_fast.data.testbed import make_examples
from latentwire_fast.evaluation.harness import MODEL, register
from latentwire_fast.readers.loading import load_tokenizer, resolve_source

TASKS = ("squad_like", "mmlu_like")
CHOICES = 4
# As this project's own prompts are: with a chat template, the anchor begins the assistant's turn.
_TEXT = r'doc_to_text: "Context: {{context}}\nQuestion: {{question}}\nAnswer:"'
_CHAT = r'''doc_to_text: "Context: {{context}}\nQuestion: {{question}}"
gen_prefix: "Answer:"'''
_DATA = """\
task: {task}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
{prompt}
"""
_SQUAD_LIKE = """\
output_type: generate_until
doc_to_target: "{{answers[0]}}"
process_results: !function scores.answer_scores
generation_kwargs:
  until: ["\\n", "."]
  max_gen_toks: 16
  do_sample: false
metric_list:
  - {metric: em, aggregation: mean, higher_is_better: true}
  - {metric: f1, aggregation: mean, higher_is_better: true}
"""
_MMLU_LIKE = """\
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: "{{correct}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
_SCORES = '''\
"""Exact match and F1 by the rules of SQuAD."""

from latentwire_fast.evaluation import metrics


def answer_scores(doc, results):
    return {
        "em": metrics.exact_match(results[0], doc["answers"]),
        "f1": metrics.f1(results[0], doc["answers"]),
    }
'''


def write_tasks(folder: Path, examples: Sequence[Example], *, chat: bool = False) -> None:
    """The two tasks, and the documents that they ask about.

    Args:
        chat: for `--apply_chat_template`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "documents.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in _documents(examples)))
    for task, rest in zip(TASKS, (_SQUAD_LIKE, _MMLU_LIKE), strict=True):
        head = _DATA.format(task=task, file=file.resolve(), prompt=_CHAT if chat else _TEXT)
        (folder / f"{task}.yaml").write_text(head + rest)
    (folder / "scores.py").write_text(_SCORES)


def _documents(examples: Sequence[Example]) -> list[dict[str, Any]]:
    """Documents of the tasks: each question with its answers, and with choices."""
    rng = random.Random(0)
    answers = sorted({example.answers[0] for example in examples})
    documents = []
    for example in examples:
        wrong = [answer for answer in answers if answer not in example.answers]
        choices = [example.answers[0], *rng.sample(wrong, min(CHOICES - 1, len(wrong)))]
        rng.shuffle(choices)
        documents.append(
            {
                "context": example.context,
                "question": example.question,
                "answers": [*example.answers],
                "choices": choices,
                "correct": choices.index(example.answers[0]),
            }
        )
    return documents


def results_of(
    folder: Path, model: str, model_args: dict[str, Any], **options: Any
) -> dict[str, Any]:
    """Scores, and what was answered to each request, of the tasks of a folder.

    Args:
        model: `hf` or `latentwire`.
        options: of `lm_eval.simple_evaluate`.
    """
    import lm_eval
    from lm_eval.tasks import TaskManager

    register()
    tasks = TaskManager(include_path=str(folder), include_defaults=False)
    found = lm_eval.simple_evaluate(
        model,
        model_args=model_args,
        tasks=[*TASKS],
        task_manager=tasks,
        bootstrap_iters=0,
        **{"device": "cpu", **options},
    )
    scores = {
        f"{task}/{key.partition(',')[0]}": value
        for task in TASKS
        for key, value in found["results"][task].items()
        if key.endswith(",none") and isinstance(value, float)
    }
    answers = {task: [sample["resps"] for sample in found["samples"][task]] for task in TASKS}
    info = {key: v for key, v in found["config"].items() if key.startswith("latentwire")}
    return {"scores": scores, "answers": answers, "info": info}


def compare(
    folder: Path,
    examples: Sequence[Example],
    *,
    run: Path,
    reader: str,
    source: str,
    bits: int | None = None,
    batch_size: int = 8,
) -> dict[str, Any]:
    """`hf`, text mode and payload mode of one reader, with its chat template if it has one.

    Args:
        folder: the tasks are written there.
        source: of the reader.
    """
    tokenizer = load_tokenizer(source)
    chat = bool(tokenizer.chat_template)
    write_tasks(folder, examples, chat=chat)
    # The tokenizer as it was saved: AutoTokenizer puts another one in the place of some.
    plain = {"pretrained": resolve_source(source), "tokenizer": tokenizer, "dtype": "float32"}
    ours = {"pretrained": str(run), "reader": reader}
    options = {"batch_size": batch_size, "apply_chat_template": chat}
    found = {
        "hf": results_of(folder, "hf", plain, **options),
        "text": results_of(folder, MODEL, {**ours, "mode": "text"}, **options),
        "payload": results_of(folder, MODEL, {**ours, "mode": "payload", "bits": bits}, **options),
    }
    return {
        **{mode: {key: part[key] for key in ("scores", "info")} for mode, part in found.items()},
        "text_equals_hf": found["hf"]["answers"] == found["text"]["answers"],
        "documents": len(examples),
    }


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = parser_of("lm_eval_modes")
    add = parser.add_argument
    add("--run", type=Path, required=True, help="a trained run")
    add("--out", type=Path, required=True, help="folder of the tasks and of modes.json")
    add("--data", help="what to ask about, as of --eval-data; the testbed unless given")
    add("--reader", action="append", default=[], help="NAME; all of the run")
    add("--questions", type=int, default=200)
    add("--bits", type=int, help="of the payloads; the model's own unless given")
    add("--batch-size", type=int, default=8)
    return parser.parse_args(arguments)


def main() -> None:
    """Run every mode with every reader, print and write the scores."""
    args = parse()
    quiet_libraries()
    if args.data is None:
        examples = make_examples(args.questions, seed=99)
    else:
        examples = load_examples(
            args.data, split="heldout", count=args.questions, seed=99, whole=True
        )
    modes: dict[str, Any] = {}
    for name, config in read_run_config(args.run).readers.items():
        if args.reader and name not in args.reader:
            continue
        modes[name] = compare(
            args.out / name,
            examples,
            run=args.run,
            reader=name,
            source=config.source,
            bits=args.bits,
            batch_size=args.batch_size,
        )
        _print(name, modes[name])
        (args.out / "modes.json").write_text(json.dumps(modes, indent=1) + "\n")


def _print(name: str, found: dict[str, Any]) -> None:
    """One line per mode."""
    for mode in ("hf", "text", "payload"):
        scores = "  ".join(f"{key} {value:.4f}" for key, value in found[mode]["scores"].items())
        print(f"{name:<8} {mode:<8} {scores}")
    info = found["payload"]["info"]
    print(
        f"{name:<8} text mode {'equals' if found['text_equals_hf'] else 'DIFFERS FROM'} hf on all "
        f"{found['documents']} documents; payloads of "
        f"{info['latentwire_payload_bytes_mean']:.1f} bytes for texts of "
        f"{info['latentwire_text_utf8_bytes_mean']:.1f}"
    )


if __name__ == "__main__":
    run_entry_point(main)
