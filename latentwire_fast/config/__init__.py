"""The configuration of a run: its schema, its JSON form, presets and overrides."""
