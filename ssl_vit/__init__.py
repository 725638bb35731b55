"""ssl_vit: one Vision Transformer, many ways to pre-train it, one honest way to compare them."""

__version__ = "0.1.0"
