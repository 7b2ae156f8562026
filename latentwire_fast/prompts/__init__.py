"""Prompts: one builder for training and evaluation, and their batches."""
