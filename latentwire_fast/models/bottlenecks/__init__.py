"""Latents to payloads and back. One line per bottleneck: its name, and where it is."""

PARTS = {"uniform": "latentwire_fast.models.bottlenecks.uniform:UniformQuantizer"}
