"""SQuAD v2.0 (Rajpurkar et al. 2018)."""

from __future__ import annotations

from dataclasses import dataclass

from latentwire_fast.data.sets.squad import Squad


class SquadV2(Squad):
    """SQuAD with questions that have no answer."""

    @dataclass(frozen=True)
    class Config(Squad.Config):
        """Where the rows are."""

        path: str = "rajpurkar/squad_v2"
