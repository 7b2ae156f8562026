"""Keys and values of what prompts have before their latents: the same from request to request.

Shapes: L layers, H key/value heads, P positions, D head width.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from latentwire_fast.prompts.builder import Prompt
from latentwire_fast.readers.own_kv import keys_values
from latentwire_fast.readers.reader import Reader

# Of several templates, so many stay: each is some megabytes.
_KEPT = 8


@dataclass(frozen=True)
class Head:
    """The first tokens of some prompts, read.

    Attributes:
        ids: of the P tokens.
        deep_L21HPD: their keys and values.
    """

    ids: tuple[int, ...]
    deep_L21HPD: Tensor = field(compare=False)


class PromptHeads:
    """The heads that one reader has read, the last used ones.

    Args:
        reader: takes deep prefixes, and computes the same at all times: it has no low-rank updates
            (LoRA) that can be switched off.
    """

    def __init__(self, reader: Reader) -> None:
        reader.require("deep")
        self._reader = reader
        self._heads: OrderedDict[tuple[int, ...], Head] = OrderedDict()

    def of(self, prompts: Sequence[Prompt]) -> Head | None:
        """What stands before the latent in all of these prompts; None where that differs, where
        nothing does, or where the prompts are faulty, which others report."""
        found = {tuple(prompt.ids[: prompt.latent_at or 0]) for prompt in prompts}
        ids = found.pop() if len(found) == 1 else ()
        vocabulary = self._reader.embedding.num_embeddings
        if {prompt.latent_at for prompt in prompts} != {len(ids)} or not ids:
            return None
        if max(ids) >= vocabulary:
            return None
        head = self._heads.pop(ids, None) or Head(ids, keys_values(self._reader, ids))
        self._heads[ids] = head
        if len(self._heads) > _KEPT:
            self._heads.popitem(last=False)
        return head
