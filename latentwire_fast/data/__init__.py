"""Examples from any source in one form; `sets/` has a file for each data set."""
