"""Scores of a trained model: methods, metrics, hypotheses, timings and the report."""
