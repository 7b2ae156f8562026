"""Text to latent `[B, M, d_z]`. One line per encoder: its name, and where it is."""

PARTS = {
    "lm": "latentwire_fast.models.encoders.lm:LMEncoder",
    "byte": "latentwire_fast.models.encoders.byte:ByteEncoder",
    "pca": "latentwire_fast.models.encoders.pca:PCAEncoder",
    "token_query": "latentwire_fast.models.encoders.token_query:TokenQueryEncoder",
    "sentence": "latentwire_fast.models.encoders.sentence:SentenceEncoder",
    "anchor_guided": "latentwire_fast.models.encoders.anchor_guided:AnchorGuidedEncoder",
    "hinted": "latentwire_fast.models.encoders.hinted:HintedEncoder",
}
