"""Hidden states `[B, T, D]` to M latents."""
