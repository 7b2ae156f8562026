"""Where pretrained models come from, besides folders and the hub.

`packages` lists the Python packages (`package:NAME`), `gguf_file` converts GGUF files, `pretrained`
loads weights and sees that they are complete. `readers/loading.py` brings them together.
"""
