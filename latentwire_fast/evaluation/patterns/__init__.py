"""Patterns in which two readers work on one task. `base.py` says how to write one."""

PARTS = {
    "joint_rescoring": "latentwire_fast.evaluation.patterns.joint_rescoring:JointRescoring",
    "routing": "latentwire_fast.evaluation.patterns.routing:Routing",
    "two_stage": "latentwire_fast.evaluation.patterns.two_stage:TwoStage",
    "truthful": "latentwire_fast.evaluation.patterns.truthful:Truthful",
}
