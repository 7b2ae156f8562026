"""A latent to what one reader takes in. One line per attachment: its name, and where it is."""

PARTS = {
    "soft": "latentwire_fast.models.attachments.soft:SoftPrompt",
    "deep": "latentwire_fast.models.attachments.deep:DeepPrefix",
    "coprocessor": "latentwire_fast.models.attachments.coprocessor:KVCoprocessor",
    "cross_attention": "latentwire_fast.models.attachments.cross_attention:CrossAttention",
    "soft_matched": "latentwire_fast.models.attachments.matched:MatchedSoftPrompt",
}
