"""ssl_vit: one Vision Transformer, many ways to pre-train it, one honest way to compare them."""

from ssl_vit.registration import register

__version__ = "0.1.0"

register()
