"""Files that are complete or absent: atomic writes, locks, JSON, text, tensors."""
