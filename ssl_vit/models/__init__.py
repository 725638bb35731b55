"""Models that timm lacks, registered with it as `ssl_vit_…` when this package is imported: see ssl_vit/registration.py.

They need torch and timm alone, and nothing else of ours.
"""

from ssl_vit.models import cvt, local_vit, small

__all__ = ["cvt", "local_vit", "small"]
