"""Where images come from: a name, a path or owner/name on the hub → uint8 images on the device.

Sets whose images share one size and fit `data.cache_gb` are decoded once into a uint8 tensor that is kept on disk,
lives on the device and is indexed there. Others are decoded, and cropped from the original, by worker processes.

    pixels ← decoding ← masks ← copies ← folders ← sources ← image_set ← batches

pixels defines how a stored image becomes uint8. folders and copies make sure that every image counts once and in one
split. masks finds the classes of pixels, for segmentation. ledger keeps what was found, used and left out, and why.
"""

from ssl_vit.data.batches import Chunk, chunks, evaluation_views, steps_ahead
from ssl_vit.data.image_set import ImageSet, load
from ssl_vit.data.sources import HUB, NAMES

__all__ = ["HUB", "NAMES", "Chunk", "ImageSet", "chunks", "evaluation_views", "load", "steps_ahead"]
