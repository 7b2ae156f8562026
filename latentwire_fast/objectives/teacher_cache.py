"""What frozen readers compute of a finite data set, kept on disk: it never changes, so it is done
once.

One pair of files per kind, reader and process, `KIND-NAME-FINGERPRINT-RANK` (see `TensorCache`):
the text-prompted teacher's hidden states, those of other layers, the targets of `attention`, and a
reader's keys and values at chosen positions. An encoder keeps its frozen LM's states in the same
folder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from latentwire_fast.files.tensor_cache import TensorCache, digest_of, find_all
from latentwire_fast.prompts.builder import Prompt
from latentwire_fast.readers.attention_targets import AttentionQuestion, attention_targets
from latentwire_fast.readers.reader import Reader


def prompt_key(prompt: Prompt, *rest: object) -> str:
    """A name for exactly these ids and targets, and what else it depends on."""
    return digest_of([prompt.ids, [i for i, t in enumerate(prompt.is_target) if t], *rest])


class TeacherCache:
    """What readers compute of prompts without a latent (fp16 on disk).

    Args:
        folder: made when there is something to keep; `rank` keeps the files of processes apart.
    """

    def __init__(self, folder: Path, *, rank: int = 0) -> None:
        self.folder = folder
        self.rank = rank
        self._caches: dict[tuple[str, str], TensorCache] = {}

    @property
    def hits(self) -> int:
        """How many results were found on disk."""
        return sum(cache.hits for cache in self._caches.values())

    @property
    def misses(self) -> int:
        """How many were not, and were computed."""
        return sum(cache.misses for cache in self._caches.values())

    def hidden(self, reader: Reader, prompts: Sequence[Prompt]) -> Tensor:
        """Hidden states `[N, D]` fp32 of the prompts' scored positions, in order."""

        def compute(missing: list[int]) -> list[Tensor]:
            with reader.base():
                states_ND = reader.target_hidden(reader.collate([prompts[i] for i in missing]))
            return list(states_ND.split([sum(prompts[i].is_target) for i in missing]))

        keys = [prompt_key(prompt) for prompt in prompts]
        return torch.cat(self._all("hidden", reader, keys, compute)).to(reader.device)

    def layers(self, reader: Reader, prompts: Sequence[Prompt], numbers: Sequence[int]) -> Tensor:
        """Hidden states `[K, N, D]` there in the layers of these numbers."""

        def compute(missing: list[int]) -> list[Tensor]:
            with reader.base():
                read = reader.collate([prompts[i] for i in missing])
                _, states_KND = reader.target_layers(read, numbers)
            return list(states_KND.split([sum(prompts[i].is_target) for i in missing], 1))

        keys = [prompt_key(prompt, *numbers) for prompt in prompts]
        return torch.cat(self._all("layers", reader, keys, compute), 1).to(reader.device)

    def attention(self, reader: Reader, questions: Sequence[AttentionQuestion]) -> Tensor:
        """`attention_targets` of the questions, fp32."""

        def compute(missing: list[int]) -> list[Tensor]:
            with reader.base():
                return list(attention_targets(reader, [questions[i] for i in missing]))

        keys = [prompt_key(q.prompt, q.start, q.stop, q.places, q.slots) for q in questions]
        found = self._all("attention", reader, keys, compute)
        return torch.stack(found).to(reader.device)

    def keys_values(
        self,
        reader: Reader,
        prompts: Sequence[Prompt],
        places_BM: Tensor,
        *,
        first: int,
        compute: Callable[[], Tensor],
    ) -> Tensor:
        """Keys and values `[L, 2, B, H, M, D]`, fp32, of prompts at these positions.

        Args:
            first: the slot that the first position is turned to.
            compute: for all of them.
        """
        keys = [
            prompt_key(prompt, places, first)
            for prompt, places in zip(prompts, places_BM.tolist(), strict=True)
        ]

        def missing_ones(missing: list[int]) -> list[Tensor]:
            rows = compute().unbind(2)
            return [rows[i] for i in missing]

        found = self._all("keys_values", reader, keys, missing_ones)
        return torch.stack(found, 2).to(reader.device)

    def _all(
        self,
        kind: str,
        reader: Reader,
        keys: Sequence[str],
        compute: Callable[[list[int]], Sequence[Tensor]],
    ) -> list[Tensor]:
        """The tensors of all keys; those that are not there are computed and kept."""
        if (kind, reader.name) not in self._caches:
            stem = f"{kind}-{reader.name}-{reader.fingerprint[:16]}-{self.rank}"
            self._caches[kind, reader.name] = TensorCache(self.folder / stem)
        return find_all(self._caches[kind, reader.name], keys, compute)
