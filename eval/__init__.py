"""Evaluators: they read a run directory or any timm checkpoint, and know no objective."""
