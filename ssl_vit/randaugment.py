"""RandAugment on a batch: timm's rand-m9-mstd0.5-inc1, which DeiT trains with, without a loop over images.

Cubuk et al. 2019, arXiv 1909.13719; the operations, their order and magnitudes are those of timm/data/auto_augment.py.
Two operations are drawn for each image, and each is applied with probability 0.5. They work on grey levels, 0 to 255,
and round as PIL does, on which timm's are built: images agree to the level, but for a few where weights are rounded.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from ssl_vit.devices import upload

if TYPE_CHECKING:
    from jaxtyping import Float

LAYERS = 2  # operations for an image
NUMBERS = 5  # uniform ones for each: which, whether, two of the magnitude's normal, and the sign
SPREAD = 0.5  # standard deviation of the magnitude
FILL = (124, 116, 104)  # timm's, ImageNet's mean colour, where a moved image leaves nothing

Levels = Tensor  # (N, 3, H, W), float, whole numbers from 0 to 255


def rand_augment(images: Float[Tensor, "N 3 H W"], u: Float[Tensor, "N L 5"], magnitude: float) -> Tensor:
    """RGB images (N, 3, H, W) in [0, 1] → the same, augmented. u: uniform numbers (N, LAYERS, NUMBERS) on the CPU;
    magnitude: 0 to 10, the mean of a normal that is cut to that range."""
    device = torch.device("cpu") if images.device.type == "mps" else images.device  # Apple's GPUs have no float64
    levels = (images.to(device) * 255).round()
    normal = (-2 * torch.log(1 - u[..., 2])).sqrt() * torch.cos(2 * math.pi * u[..., 3])
    strength = (magnitude + SPREAD * normal).clamp(0, 10) / 10  # (N, L)
    sign = torch.where(u[..., 4] < 0.5, -1.0, 1.0)
    which = (u[..., 0] * len(OPERATIONS)).long()
    applied = u[..., 1] < 0.5
    turns, places, numbers = [], [], []  # which operation comes when, on which images, how strong
    for layer in range(LAYERS):
        for number, operation in enumerate(OPERATIONS.values()):
            chosen = ((which[:, layer] == number) & applied[:, layer]).nonzero().flatten()
            turns.append(operation)
            places.append(chosen)
            numbers.append(torch.stack([strength[chosen, layer], sign[chosen, layer]]))
    lengths = [len(place) for place in places]
    here = upload(torch.cat(places), levels.device).split(lengths)  # in one copy, which nothing waits for
    by = upload(torch.cat(numbers, 1).to(levels.dtype), levels.device).split(lengths, 1)
    for operation, rows, (amount, side) in zip(turns, here, by, strict=True):
        if len(rows):
            changed = operation(levels.index_select(0, rows), amount.view(-1, 1, 1, 1), side.view(-1, 1, 1, 1))
            levels = levels.index_copy(0, rows, changed)
    return (levels / 255).to(images.device)


# -- operations: levels, strength in [0, 1] and sign ±1, both (N, 1, 1, 1) → levels ------------------------------------


def auto_contrast(x: Levels, strength: Tensor, sign: Tensor) -> Levels:
    """Each channel stretched to the whole range (PIL's ImageOps.autocontrast)."""
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    span = (high - low).clamp(min=1).double()
    scale = torch.full_like(span, 255) / span  # 255 / span would be 255 · (1 / span), which rounds otherwise
    return torch.where(high > low, (x * scale - low * scale).trunc().clamp(0, 255).to(x.dtype), x)


def equalize(x: Levels, strength: Tensor, sign: Tensor) -> Levels:
    """A level histogram of each channel; torchvision's, which equals PIL's."""
    return tv.equalize(x.byte()).to(x.dtype)


def invert(x: Levels, strength: Tensor, sign: Tensor) -> Levels:
    return 255 - x


def rotate(x: Levels, strength: Tensor, sign: Tensor) -> Levels:
    """By up to 30 degrees, around the centre."""
    angle = -torch.deg2rad(30 * strength * sign)
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    height, width = x.shape[-2:]
    a = torch.cat([cos, sin, zero, -sin, cos, zero], 1).flatten(1)
    a[:, 2] = width / 2 - a[:, 0] * (width / 2) - a[:, 1] * (height / 2)
    a[:, 5] = height / 2 - a[:, 3] * (width / 2) - a[:, 4] * (height / 2)
    return affine(x, a)


def posterize(x: Levels, strength: Tensor, sign: Tensor) -> Levels:
    """Keep 4 bits at strength 0 and 1 at 1, where timm asks PIL for none, which newer versions refuse."""
    step = 2 ** (8 - (4 - (4 * strength).trunc()).clamp(min=1))
    return (x / step).trunc() * step


def solarize(x: Levels, strength: Tensor, sign: Tensor) -> Levels:
    """Invert the levels above a threshold, 256 at strength 0 and 0 at 1."""
    return torch.where(x < 256 - (256 * strength).trunc(), x, 255 - x)


def solarize_add(x: Levels, strength: Tensor, sign: Tensor) -> Levels:
    """Add up to 110 to the levels below 128."""
    return torch.where(x < 128, (x + (110 * strength).trunc()).clamp(max=255), x)


def color(x: Levels, strength: Tensor, sign: Tensor) -> Levels:
    return blend(grey(x), x, strength, sign)


def contrast(x: Levels, strength: Tensor, sign: Tensor) -> Levels:
    return blend((grey(x).mean((2, 3), keepdim=True) + 0.5).trunc(), x, strength, sign)


def brightness(x: Levels, strength: Tensor, sign: Tensor) -> Levels:
    return blend(torch.zeros_like(x), x, strength, sign)


def sharpness(x: Levels, strength: Tensor, sign: Tensor) -> Levels:
    """Away from, or towards, PIL's ImageFilter.SMOOTH, which leaves the edge as it is."""
    if min(x.shape[2:]) < 3:  # all edge
        return x
    kernel = constant((1, 1, 1, 1, 5, 1, 1, 1, 1), x.device, x.dtype).view(3, 3) / 13
    inner = F.conv2d(x, kernel.expand(3, 1, 3, 3), groups=3)
    smooth = x.clone()
    smooth[..., 1:-1, 1:-1] = (inner + 0.5).trunc().clamp(0, 255)
    return blend(smooth, x, strength, sign)


def shear_x(x: Levels, strength: Tensor, sign: Tensor) -> Levels:
    return affine(x, _matrix(1, 0.3 * strength * sign))


def shear_y(x: Levels, strength: Tensor, sign: Tensor) -> Levels:
    return affine(x, _matrix(3, 0.3 * strength * sign))


def translate_x(x: Levels, strength: Tensor, sign: Tensor) -> Levels:
    return affine(x, _matrix(2, 0.45 * strength * sign * x.shape[-1]))


def translate_y(x: Levels, strength: Tensor, sign: Tensor) -> Levels:
    return affine(x, _matrix(5, 0.45 * strength * sign * x.shape[-2]))


# timm's "increasing" ones, in its order: a larger magnitude always changes an image more
OPERATIONS: dict[str, Callable[[Levels, Tensor, Tensor], Levels]] = {
    "AutoContrast": auto_contrast,
    "Equalize": equalize,
    "Invert": invert,
    "Rotate": rotate,
    "PosterizeIncreasing": posterize,
    "SolarizeIncreasing": solarize,
    "SolarizeAdd": solarize_add,
    "ColorIncreasing": color,
    "ContrastIncreasing": contrast,
    "BrightnessIncreasing": brightness,
    "SharpnessIncreasing": sharpness,
    "ShearX": shear_x,
    "ShearY": shear_y,
    "TranslateXRel": translate_x,
    "TranslateYRel": translate_y,
}


# -- what they are made of --------------------------------------------------------------------------------------------


@functools.cache
def constant(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """These values on a device, copied there once."""
    return torch.tensor(values, device=device, dtype=dtype)


def blend(without: Levels, x: Levels, strength: Tensor, sign: Tensor) -> Levels:
    """The image at factor 1, `without` at 0, more of it above (PIL's ImageEnhance). It is 1 ± 0.9 · strength."""
    factor = (1 + 0.9 * strength * sign).clamp(min=0.1)
    return (without + factor * (x - without)).clamp(0, 255).trunc()


def grey(x: Levels) -> Levels:
    """PIL's luma in whole levels, (N, 1, H, W)."""
    red, green, blue = x.split(1, 1)
    return ((19595 * red.double() + 38470 * green + 7471 * blue + 0x8000) / 0x10000).floor().to(x.dtype)


def _matrix(place: int, value: Tensor) -> Tensor:
    """The identity, (N, 6) of its two rows, with `value` (N, 1, 1, 1) in one place."""
    matrix = constant((1, 0, 0, 0, 1, 0), value.device, value.dtype).repeat(len(value), 1)
    matrix[:, place] = value.flatten()
    return matrix


def affine(x: Levels, matrix: Float[Tensor, "N 6"]) -> Levels:
    """PIL's Image.transform(AFFINE, BICUBIC): the pixel at (x, y) comes from (a·x + b·y + c, d·x + e·y + f), both
    counted at the centres of pixels, and is FILL where that lies outside. matrix: a to f of every image."""
    n, channels, height, width = x.shape
    a, b, c, d, e, f = matrix.double().view(n, 6, 1, 1).unbind(1)
    column = torch.arange(width, device=x.device) + 0.5
    row = (torch.arange(height, device=x.device) + 0.5)[:, None]
    from_x, from_y = a * column + b * row + c, d * column + e * row + f  # (N, H, W)
    inside = (from_x >= 0) & (from_x < width) & (from_y >= 0) & (from_y < height)
    near_x, near_y = (from_x - 0.5).floor(), (from_y - 0.5).floor()
    weights_x, weights_y = _cubic(from_x - 0.5 - near_x), _cubic(from_y - 0.5 - near_y)
    flat = x.flatten(2).double()
    total = torch.zeros_like(x, dtype=torch.float64)
    for i in range(4):
        line = (near_y.long() + i - 1).clamp(0, height - 1) * width
        for j in range(4):
            place = line + (near_x.long() + j - 1).clamp(0, width - 1)
            values = flat.gather(2, place.flatten(1)[:, None].expand(-1, channels, -1)).view_as(x)
            total += (weights_y[i] * weights_x[j])[:, None] * values
    fill = constant(FILL, x.device, x.dtype).view(1, 3, 1, 1)
    return torch.where(inside[:, None], total.clamp(0, 255).trunc().to(x.dtype), fill)


def _cubic(t: Tensor) -> list[Tensor]:
    """Weights of the four pixels around a place that is t ∈ [0, 1) behind the second; Keys' cubic, whose a is -1
    where PIL transforms, and -0.5 where it resizes."""
    a = -1.0
    return [
        a * (((t - 2) * t + 1) * t),
        ((a + 2) * t - (a + 3)) * t * t + 1,
        -t * ((a + 2) * t * t - (2 * a + 3) * t + a),
        a * t * t * (1 - t),
    ]
