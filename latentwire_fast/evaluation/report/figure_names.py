"""Readers' names in figures: in fonts that have their letters, short, and not too many.

A picture holds only letters that a font of this machine has. A reader whose name has others is
drawn as "reader 2", and the caption, which the page's own fonts print, says which one that is.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from matplotlib import font_manager

# More readers than this are drawn as one curve: there are fewer colours that differ.
MANY = 6
LONGEST = 28  # characters of a name in a legend
_WANTED = (
    "DejaVu Sans",
    "Noto Sans",
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Noto Sans SC",
    "Noto Sans JP",
    "Noto Sans Arabic",
    "Noto Sans Devanagari",
    "WenQuanYi Micro Hei",
    "PingFang SC",
    "Hiragino Sans",
    "Microsoft YaHei",
)
_THERE = {font.name for font in font_manager.fontManager.ttflist}
# Those of them that this machine has: matplotlib takes each letter from the first that has it.
FONTS = [name for name in _WANTED if name in _THERE]


def shown_names(names: Sequence[str]) -> dict[str, str]:
    """What each name is drawn as; different names stay different."""
    shown: dict[str, str] = {}
    for number, name in enumerate(names, start=1):
        short = name if len(name) <= LONGEST else name[: LONGEST - 1] + "\N{HORIZONTAL ELLIPSIS}"
        drawn = short if all(ord(letter) in _letters() for letter in short) else f"reader {number}"
        shown[name] = f"{drawn} ({number})" if drawn in shown.values() else drawn
    return shown


def figure_note(readers: Sequence[str]) -> str:
    """What the caption of a figure adds about its readers; empty where they are drawn by name."""
    if len(readers) > MANY:
        return (
            f"The curves are the median of the {len(readers)} readers; the bars go from the lowest "
            "reader to the highest."
        )
    renamed = [f"{drawn}: {name}" for name, drawn in shown_names(readers).items() if drawn != name]
    return f"In the picture, {'; '.join(renamed)}." if renamed else ""


@cache
def _letters() -> frozenset[int]:
    """The code points that the fonts have."""
    paths = (font_manager.findfont(name) for name in FONTS)
    return frozenset(point for path in paths for point in font_manager.get_font(path).get_charmap())
