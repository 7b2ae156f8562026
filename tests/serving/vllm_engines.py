"""Runs vLLM engines on ready prompts, one after the other, in a process of its own.

    python tests/serving/vllm_engines.py FOLDER

`FOLDER/jobs.json` lists engines: the options of `vllm.LLM`, those of its `SamplingParams`, and
rounds of requests. A request is token ids, or the name of a tensor in `FOLDER/NAME.safetensors`.
`FOLDER/found.json` gets, for each request, the new token ids and how many of its positions came
from the prefix cache.

vLLM changes settings of the whole process, and warns of much: not in that of the tests.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import load_file


def run(job: dict[str, Any], folder: Path) -> list[list[dict[str, Any]]]:
    """The answers of one engine to each request of each round."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    tensors = load_file(folder / f"{job['tensors']}.safetensors")
    llm = LLM(**job["engine"])
    sampling = SamplingParams(**job["sampling"])
    rounds = []
    for requests in job["rounds"]:
        prompts: list[Any] = [
            {"prompt_embeds": tensors[request]}
            if isinstance(request, str)
            else {"prompt_token_ids": request}
            for request in requests
        ]
        rounds.append(
            [
                {"ids": list(output.outputs[0].token_ids), "cached": output.num_cached_tokens}
                for output in llm.generate(prompts, sampling, use_tqdm=False)
            ]
        )
    del llm
    cleanup_dist_env_and_memory()
    gc.collect()
    return rounds


def main() -> None:
    folder = Path(sys.argv[1])
    jobs = json.loads((folder / "jobs.json").read_text())
    found = {name: run(job, folder) for name, job in jobs.items()}
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
