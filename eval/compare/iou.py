"""Mean intersection over union with intervals over images and seeds.

The mIoU is no mean over images: its unions are summed over all of them. An image's pseudo-value is n times the mIoU of
all n images, minus n − 1 times that without it (the jackknife; Efron & Tibshirani 1993, chapter 11). The mean of the
pseudo-values is the mIoU, less its bias, and their spread over images is its standard error: they take the place of
right and wrong answers in the intervals of accuracies.
"""

from pathlib import Path

import numpy as np

from eval.measure import dense


def pseudo_values(counts: np.ndarray) -> np.ndarray:
    """Confusion counts (n, K, K) of images → pseudo-values (n,) of the mIoU, shifted so that their mean is the mIoU.

    A class that only one image shows keeps its IoU where that image is left out.
    """
    n, whole = len(counts), counts.sum(0, dtype=np.int64)
    of_all = dense.ious(whole)
    without = dense.ious(whole - counts)
    found = np.nanmean(np.where(np.isnan(without), of_all, without), 1)
    values: np.ndarray = n * np.nanmean(of_all) - (n - 1) * found
    values += np.nanmean(of_all) - values.mean()
    return values


def of_images(file: Path) -> np.ndarray:
    """The pseudo-values (n,) of a row, from the counts stored behind it."""
    with np.load(file) as stored:
        return pseudo_values(stored["confusion"])
