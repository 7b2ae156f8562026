"""What MkDocs does not find in docs/: the pages of the root, and headings' anchors as on GitHub.

MkDocs reads this file (`hooks` in mkdocs.yml) and calls the functions that begin with `on_`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changes.md",
}
FILES = ("examples/quickstart.ipynb",)  # what these pages link to besides


def page(name: str) -> str:
    """A file of the root with its links as they are from docs/."""

    def moved(link: re.Match[str]) -> str:
        path, _, anchor = link[1].partition("#")
        target = PAGES.get(path, path.removeprefix("docs/"))
        return f"]({target}{'#' if anchor else ''}{anchor})"

    return re.sub(r"\]\(([^)\s]+)\)", moved, (ROOT / name).read_text(encoding="utf-8"))


def slug(heading: str, separator: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", separator)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Give headings their anchors."""
    config.mdx_configs["toc"]["slugify"] = slug
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the root, and what they link to."""
    from mkdocs.structure.files import File

    for name, target in PAGES.items():
        files.append(File.generated(config, target, content=page(name)))
    for name in FILES:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files
