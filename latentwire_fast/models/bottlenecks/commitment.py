"""The check of runs whose bottleneck has a loss of its own."""

from __future__ import annotations

from latentwire_fast.config.base import require
from latentwire_fast.config.schema import BottleneckConfig, RunConfig

OBJECTIVE = "commitment"


def check_commitment(config: BottleneckConfig, run: RunConfig) -> None:
    """Raise unless every stage that sends latents trains the bottleneck's own loss too.

    Raises:
        ConfigError: one does not; or none sends latents, so that no code would be learned.
    """
    sending = [stage for stage in run.stages if stage.quantize is not None]
    require(
        bool(sending) or run.base is not None,
        f"bottleneck {config.kind!r} learns its codes in stages with `quantize`, and no stage has "
        f"it; set quantize={config.bits} in one",
    )
    for stage in sending:
        kinds = {objective.kind for objective in stage.objectives if objective.weight}
        require(
            OBJECTIVE in kinds or run.base is not None,
            f"stage {stage.name!r}: bottleneck {config.kind!r} needs the objective {OBJECTIVE!r}; "
            f'add {{"kind": "{OBJECTIVE}"}} to its objectives',
        )
