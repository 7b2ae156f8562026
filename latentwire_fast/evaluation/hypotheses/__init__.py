"""Hypotheses: claims that every evaluation tests. `base.py` says how to write one."""

PARTS = {
    "H1": "latentwire_fast.evaluation.hypotheses.h1:AccuracyOfText",
    "H2": "latentwire_fast.evaluation.hypotheses.h2:AccuracyAboveBudgets",
    "H3": "latentwire_fast.evaluation.hypotheses.h3:LikelihoodOfText",
    "H4": "latentwire_fast.evaluation.hypotheses.h4:GainOfJointRescoring",
    "H5": "latentwire_fast.evaluation.hypotheses.h5:PrefillTime",
    "H6": "latentwire_fast.evaluation.hypotheses.h6:BytesBelowBrotli",
    "H7": "latentwire_fast.evaluation.hypotheses.h7:AddedReader",
    "H8": "latentwire_fast.evaluation.hypotheses.h8:BytesBelowCodedText",
}
