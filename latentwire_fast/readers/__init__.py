"""Frozen LLMs: loading, checks, prompts to logits, decoding, caches, what they attend to."""
