"""Latent to what one reader takes in."""
