"""The objectives of a training stage.

PARTS names each objective's class; it is imported when a stage asks for it.
"""

PARTS: dict[str, str] = {
    "answer": "latentwire_fast.objectives.answer:Answer",
    "kd": "latentwire_fast.objectives.kd:KD",
    "autoencode": "latentwire_fast.objectives.autoencode:Autoencode",
    "continuation": "latentwire_fast.objectives.continuation:Continuation",
    "embed": "latentwire_fast.objectives.embed:Embed",
    "select": "latentwire_fast.objectives.select:Select",
    "kv": "latentwire_fast.objectives.kv:KV",
    "attention": "latentwire_fast.objectives.attention:Attention",
    "attention_continued": "latentwire_fast.objectives.attention_continued:AttentionContinued",
    "scales": "latentwire_fast.objectives.scales:Scales",
    "commitment": "latentwire_fast.objectives.commitment:Commitment",
    "rate": "latentwire_fast.objectives.rate:Rate",
    "text": "latentwire_fast.objectives.text:Text",
}
