"""The built-in task and its two small frozen readers: a positive control that runs anywhere."""
