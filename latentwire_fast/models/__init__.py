"""The trained model: encoder, bottleneck, adapters; saved and loaded as one."""
