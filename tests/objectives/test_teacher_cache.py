"""The teacher cache: what is read is what was computed, whatever happened to its files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from latentwire_fast.data.examples import Example
from latentwire_fast.objectives.teacher_cache import TeacherCache, prompt_key
from latentwire_fast.prompts.builder import Prompt, Turn
from latentwire_fast.readers.reader import Reader
from readers import tiny_model


@pytest.fixture
def prompts(reader: Reader, examples: list[Example]) -> list[Prompt]:
    """Six text prompts with their answers, of ragged length."""
    return [
        reader.prompts.build([Turn(e.question, e.answers[0])], context=e.context)
        for e in examples[::3]
    ]


@torch.no_grad()
def computed(reader: Reader, prompts: list[Prompt]) -> Tensor:
    return reader.target_hidden(reader.collate(prompts))


def the_files(folder: Path) -> tuple[Path, Path]:
    (data,), (index,) = folder.glob("*.bin"), folder.glob("*.jsonl")
    return data, index


def test_the_second_time_is_read_from_disk(
    reader: Reader, prompts: list[Prompt], tmp_path: Path
) -> None:
    first = TeacherCache(tmp_path)
    states_ND = first.hidden(reader, prompts)
    assert (first.hits, first.misses) == (0, len(prompts))
    assert states_ND.dtype == torch.float32
    assert len(states_ND) == sum(sum(p.is_target) for p in prompts)
    torch.testing.assert_close(states_ND, computed(reader, prompts), rtol=1e-3, atol=1e-4)
    assert torch.equal(first.hidden(reader, prompts), states_ND)
    assert (first.hits, first.misses) == (len(prompts), len(prompts))
    second = TeacherCache(tmp_path)
    assert torch.equal(second.hidden(reader, prompts), states_ND)
    assert (second.hits, second.misses) == (len(prompts), 0)


def test_any_order_and_any_mixture(reader: Reader, prompts: list[Prompt], tmp_path: Path) -> None:
    cache = TeacherCache(tmp_path)
    alone = [cache.hidden(reader, [p]) for p in prompts[:3]]
    order = [4, 2, 0, 5, 1, 2]
    mixed = TeacherCache(tmp_path).hidden(reader, [prompts[i] for i in order])
    parts = mixed.split([sum(prompts[i].is_target) for i in order])
    for i, part in zip(order, parts, strict=True):
        if i < 3:
            assert torch.equal(part, alone[i])
        else:
            expected = computed(reader, [prompts[i]])
            torch.testing.assert_close(part, expected, rtol=1e-3, atol=1e-3)


def test_the_key_is_ids_and_targets(prompts: list[Prompt]) -> None:
    assert len({prompt_key(p) for p in prompts}) == len(prompts)
    base = prompts[0]
    same = Prompt(ids=list(base.ids), is_target=list(base.is_target), content=999)
    assert prompt_key(same) == prompt_key(base)
    fewer = Prompt(ids=list(base.ids), is_target=[False, *base.is_target[1:-1], False])
    assert prompt_key(fewer) != prompt_key(base)


def test_other_weights_have_other_files(
    reader: Reader, prompts: list[Prompt], tmp_path: Path
) -> None:
    cache = TeacherCache(tmp_path)
    before = cache.hidden(reader, prompts)
    kind = "llama" if reader.name == "llama" else "qwen2"
    other = Reader(tiny_model(kind, reader.tokenizer, seed=1), reader.tokenizer, name=reader.name)
    fresh = TeacherCache(tmp_path)
    after = fresh.hidden(other, prompts)
    assert fresh.hits == 0
    assert not torch.allclose(after, before, atol=1e-2)
    assert len(list(tmp_path.glob("*.bin"))) == 2


def test_each_process_has_its_own_files(
    reader: Reader, prompts: list[Prompt], tmp_path: Path
) -> None:
    for rank in (0, 1):
        TeacherCache(tmp_path, rank=rank).hidden(reader, prompts)
    assert len(list(tmp_path.glob("*.bin"))) == 2


# --- damage -------------------------------------------------------------------------------------


def cut(path: Path, count: int) -> None:
    path.write_bytes(path.read_bytes()[:-count])


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x20
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Path, Path], object]] = {
    "torn index line": lambda data, index: cut(index, 7),
    "no end of line": lambda data, index: cut(index, 1),
    "index cut to nothing": lambda data, index: index.write_bytes(b""),
    "index lost": lambda data, index: index.unlink(),
    "torn rows": lambda data, index: cut(data, 3),
    "rows lost": lambda data, index: data.unlink(),
    "rows without their line": lambda data, index: data.write_bytes(data.read_bytes() + b"orphan!"),
    "damaged rows": lambda data, index: flip(data, 11),
    "damaged key": lambda data, index: flip(index, 4),
    "damaged number": lambda data, index: flip(index, len(index.read_bytes()) - 5),
    "not text": lambda data, index: index.write_bytes(b"\xff\xfe" + index.read_bytes()),
    "other JSON": lambda data, index: index.write_bytes(b'7\nnull\n["k"]\n["k",1.5,"x",null]\n'),
    "an offset beyond all files": lambda data, index: index.write_text(
        index.read_text().replace(", 0, ", f", {2**62}, ", 1)
    ),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damage_costs_time_not_truth(
    reader: Reader, prompts: list[Prompt], tmp_path: Path, damage: Callable[[Path, Path], object]
) -> None:
    """What cannot be trusted is computed again; from then on all is read from disk again."""
    cache = TeacherCache(tmp_path)
    for prompt in prompts:
        cache.hidden(reader, [prompt])  # alone, so that computing again gives the same bits
    expected = cache.hidden(reader, prompts)
    damage(*the_files(tmp_path))
    again = TeacherCache(tmp_path)
    found = [again.hidden(reader, [prompt]) for prompt in prompts]
    assert torch.equal(torch.cat(found), expected)
    healed = TeacherCache(tmp_path)
    assert torch.equal(healed.hidden(reader, prompts), expected)
    assert (healed.hits, healed.misses) == (len(prompts), 0)
