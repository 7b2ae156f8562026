"""A latent to what is projected into one reader's input embeddings. One line per adapter: its
name, and where it is."""

PARTS = {
    "linear": "latentwire_fast.models.adapters.linear:LinearAdapter",
    "mlp": "latentwire_fast.models.adapters.mlp:MLPAdapter",
    "film": "latentwire_fast.models.adapters.film:FiLMAdapter",
    "hinted": "latentwire_fast.models.adapters.hinted:HintedAdapter",
}
