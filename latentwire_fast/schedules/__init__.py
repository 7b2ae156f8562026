"""Numbers that change with the step: learning rates, weights, the testbed's curriculum.

PARTS names each schedule's class; it is imported when a run asks for it.
"""

PARTS: dict[str, str] = {
    "constant": "latentwire_fast.schedules.constant:Constant",
    "warmup_cosine": "latentwire_fast.schedules.warmup_cosine:WarmupCosine",
    "steps": "latentwire_fast.schedules.steps:Steps",
    "linear": "latentwire_fast.schedules.linear:Linear",
    "cosine": "latentwire_fast.schedules.cosine:Cosine",
    "gated": "latentwire_fast.schedules.gated:Gated",
}
