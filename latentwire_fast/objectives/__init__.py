"""The objectives of a training stage.

PARTS names each objective's class; it is imported when a stage asks for it.
"""

PARTS: dict[str, str] = {
    "answer": "latentwire_fast.objectives.answer:Answer",
    "kd": "latentwire_fast.objectives.kd:KD",
    "first_token": "latentwire_fast.objectives.first_token:FirstToken",
    "sampled": "latentwire_fast.objectives.sampled:Sampled",
    "teachers": "latentwire_fast.objectives.teachers:Teachers",
    "hard_kd": "latentwire_fast.objectives.hard_kd:HardKD",
    "hidden_kd": "latentwire_fast.objectives.hidden_kd:HiddenKD",
    "autoencode": "latentwire_fast.objectives.autoencode:Autoencode",
    "continuation": "latentwire_fast.objectives.continuation:Continuation",
    "embed": "latentwire_fast.objectives.embed:Embed",
    "select": "latentwire_fast.objectives.select:Select",
    "kv": "latentwire_fast.objectives.kv:KV",
    "attention": "latentwire_fast.objectives.attention:Attention",
    "attention_continued": "latentwire_fast.objectives.attention_continued:AttentionContinued",
    "own_kv": "latentwire_fast.objectives.own_kv:OwnKV",
    "contrastive": "latentwire_fast.objectives.contrastive:Contrastive",
    "reconstruct": "latentwire_fast.objectives.reconstruct:Reconstruct",
    "gist": "latentwire_fast.objectives.gist:Gist",
    "window": "latentwire_fast.objectives.window:Window",
    "diversity": "latentwire_fast.objectives.diversity:Diversity",
    "entropy": "latentwire_fast.objectives.entropy:Entropy",
    "scales": "latentwire_fast.objectives.scales:Scales",
    "commitment": "latentwire_fast.objectives.commitment:Commitment",
    "rate": "latentwire_fast.objectives.rate:Rate",
    "text": "latentwire_fast.objectives.text:Text",
    # Controls, which are known to make latents alike.
    "align_readers": "latentwire_fast.objectives.align_readers:AlignReaders",
    "align_mean": "latentwire_fast.objectives.align_mean:AlignMean",
    "semantic_anchor": "latentwire_fast.objectives.semantic_anchor:SemanticAnchor",
}
