"""mistral.rs's Python API in front of our engine: its names and arguments, our answers; see docs/python.md."""
