"""LatentWire Fast: one prompt as a payload of a few hundred bytes, read by many frozen LLMs.

Importing the package imports neither torch nor transformers; import the module that you need.
"""

from __future__ import annotations

from pathlib import Path

__version__ = "0.1.0"

# The Triton kernels lie in `kernels/` at the repository root and are installed as
# `latentwire_fast.kernels`. In a wheel they are beside this file. In a checkout, installed or not,
# they are not, and the root joins the places where submodules are looked for. The folder has no
# __init__.py: a regular top-level package `kernels` would shadow the Hugging Face package of that
# name, which transformers imports.
_here = Path(__file__).parent
if not (_here / "kernels").is_dir() and (_here.parent / "kernels").is_dir():
    __path__.append(str(_here.parent))
