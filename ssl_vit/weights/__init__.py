"""Weights in (loading.py, and foreign.py for other codes') and out (saving.py, to_hugging_face.py, graphs.py)."""

from ssl_vit.weights.loading import initialise, load, shape
from ssl_vit.weights.saving import digest, digest_of, save
from ssl_vit.weights.source import parse, resolved

__all__ = ["digest", "digest_of", "initialise", "load", "parse", "resolved", "save", "shape"]
