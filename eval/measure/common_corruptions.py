"""Common corruptions of test images, as in CIFAR-10-C and ImageNet-C: noise, blur and others, at three severities.

Hendrycks and Dietterich 2019, arXiv 1903.12261. Definitions and parameters are theirs: those of CIFAR-10-C for images
up to 64 px, those of ImageNet-C above (make_cifar_c.py and make_imagenet_c.py of github.com/hendrycks/robustness). Ten
of their nineteen kinds are implemented. Speckle noise, glass, motion and zoom blur, the weather and the elastic
transform are not. Their images differ slightly: values are truncated to 8 bits, not rounded; pixelate rounds along each
axis; the widest disk is cropped at its rim; and the files of ImageNet-C are compressed once more.
"""

import functools
import io
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ssl_vit.randomness import Draw

SEED = 0
SEVERITIES = (1, 3, 5)
SMALL = 64  # pixels
FAMILIES = dict(
    noise=("gaussian-noise", "shot-noise", "impulse-noise"),
    blur=("gaussian-blur", "defocus-blur"),
    other=("brightness", "contrast", "saturate", "pixelate", "jpeg"),
)
# by severity, for CIFAR-10-C and for ImageNet-C
PARAMETERS = {
    "gaussian-noise": ((0.04, 0.08, 0.1), (0.08, 0.18, 0.38)),  # standard deviation
    "shot-noise": ((500, 100, 50), (60, 12, 3)),  # photons of a white pixel
    "impulse-noise": ((0.01, 0.03, 0.07), (0.03, 0.09, 0.27)),  # fraction of the values
    "gaussian-blur": ((0.4, 0.7, 1.0), (1.0, 3.0, 6.0)),  # standard deviation in pixels
    "defocus-blur": (((0.3, 0.4), (0.5, 0.6), (1.5, 0.1)), ((3, 0.1), (6, 0.5), (10, 0.5))),  # radius, softness
    "brightness": ((0.05, 0.15, 0.3), (0.1, 0.3, 0.5)),  # added to the value of HSV
    "contrast": ((0.75, 0.4, 0.15), (0.4, 0.2, 0.05)),  # factor of the distance from the mean
    "saturate": (((0.3, 0.0), (1.5, 0.0), (2.5, 0.2)), ((0.3, 0.0), (2.0, 0.0), (20.0, 0.2))),  # factor, added
    "pixelate": ((0.95, 0.85, 0.65), (0.6, 0.4, 0.25)),  # factor of the sides
    "jpeg": ((80, 58, 40), (25, 15, 7)),  # quality
}


def kinds(channels: int) -> list[tuple[str, str]]:
    """(family, kind) of all corruptions of images with this many channels. Only RGB has saturation."""
    return [(f, kind) for f, kinds in FAMILIES.items() for kind in kinds if kind != "saturate" or channels == 3]


def benchmark(size: Sequence[int]) -> str:
    """The benchmark whose parameters apply to images of this size (H, W)."""
    return "CIFAR-10-C" if max(size) <= SMALL else "ImageNet-C"


def protocol(kind: str, severity: int, size: Sequence[int]) -> str:
    """The name of a measurement on images of this size (H, W): radii are in pixels, so that each size is a test of its
    own."""
    return f"robust-{kind}-{severity}-{size[0]}x{size[1]}"


def corrupt(images: Tensor, kind: str, severity: int, index: Tensor) -> Tensor:
    """Images (B, C, H, W) in [0, 1], corrupted, in 8 bits before and after.

    index: int64 (B,) on the CPU, the index of each image in its split. Random numbers depend on it, the kind and the
    severity alone.
    """
    place = ("CIFAR-10-C", "ImageNet-C").index(benchmark(images.shape[-2:]))
    parameter = PARAMETERS[kind][place][SEVERITIES.index(severity)]
    draw = Draw(SEED, severity, index, images.device)
    return _eight_bits(_OPERATIONS[kind](_eight_bits(images), parameter, draw))


def _eight_bits(images: Tensor) -> Tensor:
    return (images.clamp(0, 1) * 255).round() / 255


def _levels(images: Tensor) -> Tensor:
    """The levels from 0 to 255 of images in 8 bits, int64, so that sums are exact."""
    return (images * 255).round().long()


# --- noise: images (B, C, H, W) in 8 bits, parameter, draw → images, not yet in [0, 1] --------------------------------


def _gaussian_noise(images: Tensor, sigma: float, draw: Draw) -> Tensor:
    return images + sigma * draw.normal("gaussian-noise", *images.shape[1:])


def _shot_noise(images: Tensor, photons: int, draw: Draw) -> Tensor:
    levels = _levels(images)
    limits = _poisson_limits(photons).to(images.device)
    words = draw.bits("shot-noise", *images.shape[1:])
    counts = torch.searchsorted(limits.flatten(), words + (levels << 32), right=True) - levels * photons
    return counts / photons


@functools.cache
def _poisson_limits(photons: int) -> Tensor:
    """The 32-bit words from which on a Poisson count exceeds 0, 1, …, photons - 1, by level: int64 (256, photons).

    The level is in the bits above, so that the flattened table is sorted. Counts above `photons` are white anyway."""
    level = torch.arange(256)[:, None]
    counts = torch.arange(1, photons + 1).double()
    at_most: Tensor = torch.special.gammaincc(counts, level.double() * photons / 255)
    return (at_most * 2.0**32).long() + (level << 32)


def _impulse_noise(images: Tensor, fraction: float, draw: Draw) -> Tensor:
    u = draw.uniform("impulse-noise", *images.shape[1:])
    return torch.where(u < fraction / 2, 0.0, torch.where(u < fraction, 1.0, images))


# --- blur -------------------------------------------------------------------------------------------------------------


def _gaussian_blur(images: Tensor, sigma: float, draw: Draw) -> Tensor:
    """Borders repeat the last pixel; the kernel is truncated at four sigma, as in scikit-image."""
    kernel = _gaussian(sigma, int(4 * sigma + 0.5))
    return _filter(_filter(images, kernel[:, None], "replicate"), kernel[None], "replicate")


def _defocus_blur(images: Tensor, disk: tuple[float, float], draw: Draw) -> Tensor:
    """Borders are reflected, as in OpenCV."""
    return _filter(images, _disk(*disk), "reflect")


def _disk(radius: float, softness: float) -> Tensor:
    """A disk, float64 (2r + 1, 2r + 1), whose rim is blurred by a Gaussian of that sigma; it sums to 1."""
    soft = _gaussian(softness, 1 if radius <= 8 else 2)
    reach = math.floor(radius) + len(soft) // 2
    place = torch.arange(-reach, reach + 1)
    disk = (place[:, None] ** 2 + place**2 <= radius**2).double()
    return _filter((disk / disk.sum())[None, None], soft[:, None] * soft, "constant")[0, 0]


def _gaussian(sigma: float, radius: int) -> Tensor:
    """float64 (2 · radius + 1,), summing to 1."""
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1).double() / sigma) ** 2)
    return kernel / kernel.sum()


def _filter(images: Tensor, kernel: Tensor, border: str) -> Tensor:
    """Images filtered by a symmetric kernel (h, w) of odd sides. border: the mode of torch's pad.

    The kernel's entries are added one by one, because the rounding of a convolution depends on the batch.
    """
    height, width = images.shape[-2:]
    down, right = (side // 2 for side in kernel.shape)
    padded = F.pad(images, (right, right, down, down), mode=border)
    found = torch.zeros_like(images)
    for i, j in kernel.nonzero().tolist():
        found += padded[..., i : i + height, j : j + width] * kernel[i, j].item()
    return found


# --- others -----------------------------------------------------------------------------------------------------------


def _brightness(images: Tensor, amount: float, draw: Draw) -> Tensor:
    """Adds to the value of HSV, the highest channel; the others keep their ratio to it."""
    value = images.amax(1, keepdim=True)
    raised = (value + amount).clamp(max=1)
    return torch.where(value > 0, images * (raised / value.clamp(min=1 / 255)), raised)


def _contrast(images: Tensor, factor: float, draw: Draw) -> Tensor:
    mean = _levels(images).sum((2, 3), keepdim=True) / (255 * math.prod(images.shape[-2:]))
    return mean + factor * (images - mean)


def _saturate(images: Tensor, change: tuple[float, float], draw: Draw) -> Tensor:
    """Changes the saturation of HSV. images: RGB. Adding saturation turns a grey pixel red, as in scikit-image."""
    factor, plus = change
    value = images.amax(1, keepdim=True)
    chroma = value - images.amin(1, keepdim=True)
    saturation = (factor * chroma / value.clamp(min=1 / 255) + plus).clamp(max=1)
    red = torch.tensor([0.0, 1.0, 1.0], device=images.device)[:, None, None]
    below = torch.where(chroma > 0, (value - images) / chroma.clamp(min=1 / 255), red)  # the value, in chromas
    return value * (1 - saturation * below)


def _pixelate(images: Tensor, factor: float, draw: Draw) -> Tensor:
    height, width = images.shape[-2:]
    rows, columns = (_boxes(side, int(side * factor)).to(images.device) for side in (height, width))
    total = rows @ _levels(images).float() @ columns.T  # integers: exact
    small = _eight_bits(total / (255 * rows.sum(1)[:, None] * columns.sum(1)))
    return F.interpolate(small, (height, width), mode="nearest-exact")


def _boxes(n: int, out: int) -> Tensor:
    """Pillow's box filter: which of n pixels have their centre in which of `out` parts, 0 or 1, float32 (out, n)."""
    distance = (2 * torch.arange(n) + 1) * out - (2 * torch.arange(out)[:, None] + 1) * n
    return ((distance > -n) & (distance <= n)).float()


def _jpeg(images: Tensor, quality: int, draw: Draw) -> Tensor:
    """Images of other than one or three channels are compressed channel by channel."""
    levels = _levels(images).byte().cpu()
    colours = images.shape[1] if images.shape[1] in (1, 3) else 1
    pixels = levels.reshape(-1, colours, *images.shape[-2:]).permute(0, 2, 3, 1).numpy()
    found = torch.from_numpy(np.stack([_compressed(image, quality) for image in pixels])).permute(0, 3, 1, 2)
    return found.reshape(images.shape).to(images.device) / 255


def _compressed(pixels: np.ndarray, quality: int) -> np.ndarray:
    """uint8 (H, W, 1 or 3), written as JPEG and read back."""
    file = io.BytesIO()
    Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file)).reshape(pixels.shape)


_OPERATIONS: dict[str, Callable[..., Tensor]] = {  # each takes a parameter of its own kind
    "gaussian-noise": _gaussian_noise,
    "shot-noise": _shot_noise,
    "impulse-noise": _impulse_noise,
    "gaussian-blur": _gaussian_blur,
    "defocus-blur": _defocus_blur,
    "brightness": _brightness,
    "contrast": _contrast,
    "saturate": _saturate,
    "pixelate": _pixelate,
    "jpeg": _jpeg,
}
