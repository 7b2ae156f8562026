"""Evaluate a run with EleutherAI's lm-evaluation-harness (`lm-eval`).

    python -m latentwire_fast.evaluation.harness --model latentwire --tasks TASK \\
        --model_args pretrained=runs/context,reader=llama,mode=payload,bits=6
    python -m latentwire_fast.evaluation.harness --model latentwire --tasks TASK \\
        --model_args pretrained=runs/context,reader=llama,mode=text
"""

from __future__ import annotations

import sys

from latentwire_fast.errors import LatentWireError
from latentwire_fast.evaluation.harness import register

HELP = """\
usage: python -m latentwire_fast.evaluation.harness [run] --model latentwire
           --model_args NAME=VALUE,... --tasks TASK[,TASK] [options of lm-eval]

The command of lm-evaluation-harness (pip install 'latentwire-fast[harness]') with one more model
class, latentwire. Every option is the harness's own; `run --help` prints all of them.

options that are often needed:
  --tasks TASK,TASK         tasks of the harness, or of your own
  --include_path FOLDER     where the YAML files of your own tasks are
  --batch_size N            requests that are read together
  --num_fewshot N           examples before each question; they stay text
  --apply_chat_template     puts the reader's chat template around each request
  --gen_kwargs NAME=VALUE   such as max_gen_toks=32
  --limit N                 only the first N documents of each task
  --device DEVICE           cpu, cuda or cuda:NUMBER
  --output_path FOLDER      where the results are written
  --log_samples             each request and answer, too

--model_args:
  pretrained=RUN            the run folder
  reader=NAME               one of its readers
  mode=payload|text         what the context part is sent as; text is the plain `hf` model class
  bits=16|8|6|4             of a payload's values; the model's own number if not given
  context_field=NAME        the field of a task's documents that holds the context part (context)
  chunk_length=N            cut longer contexts into chunks of so many of the encoder's tokens
  prefix_gain=X, dtype=D    as in latentwire_fast.generate
  imports=MODULE            modules that register parts of your own, with + between them

docs/harness.md says what the context part of a request is.
"""


def main() -> None:
    """Print the help above, or hand over to the harness."""
    if sys.argv[1:] in ([], ["-h"], ["--help"]):
        print(HELP, end="")
        return
    try:
        register()
        from lm_eval.__main__ import cli_evaluate

        cli_evaluate()
    except LatentWireError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
