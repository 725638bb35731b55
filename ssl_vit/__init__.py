"""ssl_vit: one Vision Transformer, many ways to pre-train it, one honest way to compare them."""

import os

from ssl_vit.registration import register

__version__ = "0.1.0"

# This process and the one that started it, before torch takes seconds to load, in which a launcher may die.
STARTED = os.getpid(), os.getppid()

# How often a thread looks whether the others are done before it sleeps, read by GNU's OpenMP when torch is loaded: at
# its own 300,000, two jobs on the same cores are many times slower than one after the other (docs/performance.md).
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "4000")

register()
