"""The model class `latentwire` for EleutherAI's lm-evaluation-harness (`lm-eval`).

    python -m latentwire_fast.evaluation.harness --model latentwire --tasks TASK \\
        --model_args pretrained=RUN,reader=NAME

A module of this folder that imports the harness is imported by the harness alone: the package does
without it.
"""

from __future__ import annotations

from latentwire_fast.errors import ConfigError

MODEL = "latentwire"  # the value of --model
_CLASS = "latentwire_fast.evaluation.harness.model:LatentWireLM"


def register() -> None:
    """Let the harness know the model class. It is imported when a task asks for it.

    Raises:
        ConfigError: the harness is not installed.
    """
    try:
        import lm_eval.models  # noqa: F401 (it registers its own models first)
        from lm_eval.api.registry import model_registry
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"lm-evaluation-harness cannot be imported ({error}); install it with "
            "pip install 'latentwire-fast[harness]'"
        ) from None
    if MODEL not in model_registry:
        model_registry.register(MODEL, target=_CLASS)
