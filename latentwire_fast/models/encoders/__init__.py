"""Text to latent `[B, M, d_z]`."""
