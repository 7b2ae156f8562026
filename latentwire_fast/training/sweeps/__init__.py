"""Sweeps: many runs of `python -m latentwire_fast.train`, side by side, and the table of them."""
