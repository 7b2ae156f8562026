"""Multiple-choice questions with all of their options: MMLU's and TruthfulQA's official files.

As `Example`s these sets keep the correct option's text alone. Who compares options needs them all.
"""

from __future__ import annotations

import csv
import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from latentwire_fast.data.sets.rows import digest
from latentwire_fast.errors import DataError
from latentwire_fast.files.text import decode_text, read_unpacked

LETTERS = "ABCD"
_ARCHIVES = (".tar", ".tgz", ".txz")
_TRUTHFUL_COLUMNS = ("Question", "Best Answer", "Correct Answers", "Incorrect Answers")


@dataclass(frozen=True)
class ChoiceQuestion:
    """One question with its options.

    Attributes:
        id: unique within its file.
        options: their texts.
        correct: the indices of the correct ones; the first is the best of them.
        subject: what it is about; empty where the file does not say.
        split: `dev` or `test`, as the file has it.
    """

    id: str
    question: str
    options: tuple[str, ...]
    correct: tuple[int, ...]
    subject: str = ""
    split: str = "test"


def load_mmlu(path: Path) -> list[ChoiceQuestion]:
    """The questions of MMLU's CSV files `SUBJECT_dev.csv` and `SUBJECT_test.csv`.

    Args:
        path: a folder with these files somewhere in it, a tar archive of one (.tar.xz and .tar.gz
            too), or one such file. Rows are question, four options, and the answer as A-D or 0-3;
            a header row is passed over.

    Raises:
        DataError: nothing readable there, or a row of another form.
    """
    questions = [
        question for name, content in _csv_files(path) for question in _mmlu_rows(name, content)
    ]
    if not questions:
        raise DataError(
            f"{path}: no file named SUBJECT_dev.csv or SUBJECT_test.csv with a row; give MMLU's "
            "folder, an archive of it, or one of its files"
        )
    return questions


def load_truthful_qa(path: Path) -> list[ChoiceQuestion]:
    """The questions of TruthfulQA.csv: the best answer first, then the other correct ones, then the
    incorrect ones. Each ends in a full stop, as in the official scores.

    Raises:
        DataError: unreadable, a column that is missing, or a row without answers of both kinds.
    """
    text = decode_text(_read(path), name=str(path))
    rows = csv.DictReader(io.StringIO(text))
    missing = [name for name in _TRUTHFUL_COLUMNS if name not in (rows.fieldnames or ())]
    if missing:
        raise DataError(
            f"{path}: no column {missing[0]!r} (found: {', '.join(rows.fieldnames or ())}); give "
            "the official TruthfulQA.csv"
        )
    questions = []
    for number, row in enumerate(rows, start=1):
        question, best, right, wrong = ((row[name] or "").strip() for name in _TRUTHFUL_COLUMNS)
        true = list(dict.fromkeys([*_answers(best), *_answers(right)]))
        false = [answer for answer in _answers(wrong) if answer not in true]
        if not (question and true and false):
            raise DataError(
                f"{path}: row {number} needs a question, correct and incorrect answers; found "
                f"{question[:40]!r} with {len(true)} and {len(false)}"
            )
        questions.append(
            ChoiceQuestion(
                id=digest(question),
                question=question,
                options=(*true, *false),
                correct=tuple(range(len(true))),
                subject=(row.get("Category") or "").strip(),
            )
        )
    if not questions:
        raise DataError(f"{path}: no rows")
    return questions


def _answers(field: str) -> list[str]:
    """The answers of a field, which semicolons part."""
    found = (answer.strip() for answer in field.split(";"))
    return [answer if answer.endswith(".") else f"{answer}." for answer in found if answer]


def _read(path: Path) -> bytes:
    try:
        return read_unpacked(path)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None


def _csv_files(path: Path) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the CSV files at a place, in the order of their names."""
    if path.is_dir():
        for file in sorted(path.rglob("*_*.csv")):
            yield str(file.relative_to(path)), _read(file)
        return
    if ".tar" not in path.suffixes and path.suffix not in _ARCHIVES:
        yield path.name, _read(path)
        return
    try:
        with tarfile.open(path) as archive:
            for member in sorted(archive.getmembers(), key=lambda member: member.name):
                content = archive.extractfile(member) if member.name.endswith(".csv") else None
                if content is not None:
                    yield member.name, content.read()
    except (OSError, tarfile.TarError, EOFError) as error:
        raise DataError(f"{path}: cannot be read as a tar archive ({error})") from None


def _mmlu_rows(name: str, content: bytes) -> Iterator[ChoiceQuestion]:
    subject, _, split = Path(name).stem.rpartition("_")
    if split not in ("dev", "test"):
        return
    rows = csv.reader(io.StringIO(decode_text(content, name=name)))
    for number, row in enumerate(rows, start=1):
        if number == 1 and row[0].strip().lower() == "question":
            continue
        where = f"{name}: row {number}"
        if len(row) != 2 + len(LETTERS):
            raise DataError(
                f"{where} has {len(row)} fields, expected question, four options and the answer"
            )
        question, *options, answer = (field.strip() for field in row)
        names = [*LETTERS, *map(str, range(len(LETTERS)))]
        if answer.upper() not in names:
            raise DataError(f"{where}: the answer is {answer!r}, expected A to D, or 0 to 3")
        gold = names.index(answer.upper()) % len(LETTERS)
        # A few questions stand twice in a file: the row's number tells them apart.
        identifier = f"{subject}/{split}/{number}"
        yield ChoiceQuestion(identifier, question, (*options,), (gold,), subject, split)
