"""Data sets that a run can name. `base.py` says how to write one."""

PARTS = {
    "testbed": "latentwire_fast.data.sets.testbed:Testbed",
    "squad_file": "latentwire_fast.data.sets.squad_file:SquadFile",
    "text": "latentwire_fast.data.sets.text:Text",
    "passages": "latentwire_fast.data.sets.passages:Passages",
    "squad": "latentwire_fast.data.sets.squad:Squad",
    "squad_v2": "latentwire_fast.data.sets.squad_v2:SquadV2",
    "hotpot_qa": "latentwire_fast.data.sets.hotpot_qa:HotpotQA",
    "ms_marco": "latentwire_fast.data.sets.ms_marco:MSMarco",
    "trec": "latentwire_fast.data.sets.trec:Trec",
    "natural_questions": "latentwire_fast.data.sets.natural_questions:NaturalQuestions",
    "nq_open": "latentwire_fast.data.sets.nq_open:NQOpen",
    "mmlu": "latentwire_fast.data.sets.mmlu:MMLU",
    "truthful_qa": "latentwire_fast.data.sets.truthful_qa:TruthfulQA",
    "subj_qa": "latentwire_fast.data.sets.subj_qa:SubjQA",
    "xsum": "latentwire_fast.data.sets.xsum:XSum",
}
