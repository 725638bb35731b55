"""Weights in (loading.py) and out (saving.py)."""

from ssl_vit.weights.loading import initialise, load, shape
from ssl_vit.weights.saving import digest, save

__all__ = ["digest", "initialise", "load", "save", "shape"]
