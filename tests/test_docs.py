"""The documents name only what exists: links, paths, modules, commands and their options."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from latentwire_fast.config.presets import PRESETS

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "kernels/README.md")),
        *(ROOT / "docs").glob("*.md"),
    ]
)
# Folders whose paths the documents name; what a user makes there is not in a checkout.
FOLDERS = (
    *("latentwire_fast", "kernels", "csrc", "bench", "tests", "tools", "docs", "configs"),
    "examples",
)
MADE_BY_USERS = ("bench/results",)
# A file that docs/extending.md asks its readers to write.
MODULES_TO_WRITE = ("latentwire_fast.models.encoders.letters",)
COMMANDS = (
    "train",
    "train_text_lora",
    "repack",
    "evaluate",
    "encode",
    "generate",
    "sweep",
    "evaluation.harness",
)
SCRIPTS = ("bench/prefill_latency.py", "bench/train_step.py", "bench/vllm_throughput.py")
OPTIONS_OF_OTHERS = {
    "--nproc-per-node",  # torchrun
    "--benchmark-only",  # pytest
    "--predict",
    "--enable-prompt-embeds",  # vllm serve
}
each_document = pytest.mark.parametrize(
    "document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT))
)


# --- what a document holds ----------------------------------------------------------------------


def blocks(text: str) -> list[tuple[str, str]]:
    """Fenced and indented code as (language, code); indented code and plain fences have none."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S)
    rest = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    indented = re.findall(r"(?:^ {4}\S.*\n)+", rest, re.M)
    return [*fenced, *(("", code) for code in indented)]


def spans(text: str) -> list[str]:
    """Code within sentences and tables."""
    outside = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    return re.findall(r"`([^`\n]+)`", outside)


def command_lines(text: str) -> Iterator[list[str]]:
    """Lines of code that are commands of a shell, as words, without their comments."""
    for language, code in blocks(text):
        if language not in ("", "sh", "bash"):
            continue
        for line in code.replace("\\\n", " ").splitlines():
            try:
                words = shlex.split(line, comments=True)
            except ValueError:  # a formula
                continue
            if words and words[0] in ("python", "torchrun", "make", "pytest", "latentwire"):
                yield words


def prose(text: str) -> str:
    """All that is not code in blocks."""
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


def slugs(path: Path) -> set[str]:
    """The anchors that GitHub gives a document's headings."""
    headings = re.findall(r"^#+ (.*)$", prose(path.read_text()), re.M)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.strip().replace(" ", "-") for heading in plain}


@cache
def options_of(command: str) -> frozenset[str]:
    """The options that a module's --help lists, or that a script of `bench/` asks for."""
    if command in SCRIPTS:  # its --help imports torch
        asked_for = re.findall(r'"(--[a-z][a-z0-9-]*)"', (ROOT / command).read_text())
        return frozenset([*asked_for, "--help"])
    done = subprocess.run(
        [sys.executable, "-m", *command.split(), "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return frozenset(re.findall(r"--[a-z][a-z_-]*[a-z]", done.stdout))


def options_in(words: list[str]) -> set[str]:
    return {word.split("=")[0] for word in words if re.match(r"--[a-z]", word)}


# --- tests --------------------------------------------------------------------------------------


@each_document
def test_links_lead_somewhere(document: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(document.read_text())):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), f"{document.name} links to {link}, which is not there"
        if anchor:
            assert anchor in slugs(target), f"{document.name}: no heading for {link}"


@each_document
def test_paths_exist(document: Path) -> None:
    text = document.read_text()
    code = [*spans(text), *(word for words in command_lines(text) for word in words)]
    for word in (word for piece in code for word in piece.split()):
        if not word.startswith(tuple(f"{folder}/" for folder in FOLDERS)):
            continue
        if word.startswith(MADE_BY_USERS):
            continue
        found = list(ROOT.glob(word.rstrip("/").split("::")[0]))
        assert found, f"{document.name} names {word}, which is not there"


@each_document
def test_modules_and_names_exist(document: Path) -> None:
    text = document.read_text()
    for name in re.findall(r"\blatentwire_fast(?:\.\w+)+", text):
        parts = name.split(".")[1:]
        if name in MODULES_TO_WRITE or any(part.isupper() for part in parts):  # NAME: any module
            continue
        module = "latentwire_fast"
        while parts and _is_module(f"{module}.{parts[0]}"):
            module = f"{module}.{parts.pop(0)}"
        found: object = importlib.import_module(module)
        for part in parts:
            assert hasattr(found, part), f"{document.name} names {name}: {module} has no {part}"
            found = getattr(found, part)


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


@each_document
def test_imports_in_examples_work(document: Path) -> None:
    for language, code in blocks(document.read_text()):
        if language != "python":
            continue
        for node in ast.walk(ast.parse(code)):
            if not isinstance(node, ast.ImportFrom) or not node.module:
                continue
            if node.module.split(".")[0] != "latentwire_fast":
                continue
            module = importlib.import_module(node.module)
            for alias in node.names:
                known = hasattr(module, alias.name) or _is_module(f"{node.module}.{alias.name}")
                assert known, f"{document.name}: {node.module} has no {alias.name}"


@each_document
def test_commands_have_the_options_that_are_given(document: Path) -> None:
    for words in command_lines(document.read_text()):
        if words[0] == "latentwire" and words[1].replace("-", "_") in COMMANDS:
            words = ["python", "-m", f"latentwire_fast.{words[1].replace('-', '_')}", *words[2:]]
        line = " ".join(words)
        module = re.search(rf"latentwire_fast\.({'|'.join(COMMANDS)})( score| pattern)?\b", line)
        script = next((word for word in words if word in SCRIPTS), None)
        if module:
            given = options_in(words[words.index(module[0].split()[0]) :])
            command = module[0]
        elif script:
            given, command = options_in(words), script
        else:
            continue
        missing = given - options_of(command)
        assert not missing, f"{document.name}: {line!r} has {missing}, {command} has not"


@each_document
def test_options_in_sentences_exist(document: Path) -> None:
    every = {name for command in COMMANDS for name in options_of(f"latentwire_fast.{command}")}
    every |= options_of("latentwire_fast.evaluate pattern")
    every |= {name for script in SCRIPTS for name in options_of(script)} | OPTIONS_OF_OTHERS
    for span in spans(document.read_text()):
        words = span.split()
        if words[0] in COMMANDS:
            known: set[str] | frozenset[str] = options_of(f"latentwire_fast.{words[0]}")
        elif words[0].startswith("--"):
            known = every
        else:
            continue
        missing = options_in(words) - known
        assert not missing, f"{document.name} names {span!r}: there is no {missing}"


@each_document
def test_presets_and_make_targets_exist(document: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    text = document.read_text()
    lines = [*command_lines(text), *(span.split() for span in spans(text))]
    for words in lines:
        if words[0] == "make":
            named = [word for word in words[1:] if "=" not in word]
            assert set(named) <= targets, f"{document.name}: {' '.join(words)}"
        if "latentwire_fast.train" in words[:-1]:
            preset = words[words.index("latentwire_fast.train") + 1]
            known = preset in PRESETS or preset.endswith(".json") or preset.isupper()
            assert known, f"{document.name}: there is no preset {preset!r}"


# --- the site -----------------------------------------------------------------------------------


def site_pages() -> ModuleType:
    """`tools/site_pages.py`, imported from its place."""
    spec = importlib.util.spec_from_file_location("site_pages", ROOT / "tools" / "site_pages.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_site_has_every_page() -> None:
    """`make docs` fails too where one is left out; this says so without MkDocs."""
    sections = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    entries = [entry for section in sections for entry in section.values()]
    named = [page for entry in entries for page in ([entry] if isinstance(entry, str) else entry)]
    made = site_pages().PAGES.values()
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} | set(made)
    assert len(named) == len(set(named))
    assert set(named) == pages


def test_pages_of_the_root_have_their_links_in_the_site() -> None:
    pages = site_pages()
    for name in pages.PAGES:
        for link in re.findall(r"\]\(([^)\s]+)\)", pages.page(name)):
            target = link.partition("#")[0]
            known = "://" in link or target in ("", *pages.FILES, *pages.PAGES.values())
            assert known or (ROOT / "docs" / target).is_file(), f"{name}: {link}"


@each_document
def test_the_site_has_the_anchors_of_github(document: Path) -> None:
    headings = re.findall(r"^#+ (.*)$", prose(document.read_text()), re.M)
    assert {site_pages().slug(heading, "-") for heading in headings} == slugs(document)
