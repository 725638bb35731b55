"""uint8 batch → augmented views in [0, 1], batched on the device.

Every image of the batch has its own crop, flip and colours, with the distributions of torchvision's transforms, but no
loop runs over images. A crop is separable: two matrices of antialiased weights per image resample it, and a gaussian
blur is two more. Every parameter is drawn on the CPU, so the host knows which images an operation concerns and never
waits for the device. Views are float32, under autocast too.

Photos of varied size are cropped where they are decoded, by `crop_photos` in the workers; `finish` does the rest here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import permutations
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as per_sample

from ssl_vit import randaugment
from ssl_vit.devices import full_precision, upload
from ssl_vit.errors import require
from ssl_vit.randomness import Draw
from ssl_vit.settings import pair

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int, UInt8

Interpolation = Literal["bilinear", "bicubic"]  # both antialiased
CROP_MODES = ("center", "squash")  # timm's


@dataclass(frozen=True)
class View:
    """What one image becomes. Sizes in pixels; flip, jitter, grey, blur and solarize are probabilities.

    Applied in the order of the fields, as in DINO's official augmentation (main_dino.py); with three_augment the
    jitter comes last, as in DeiT III's (deit/augment.py).
    """

    size: tuple[int, int]  # (H, W) of the view
    count: int | None = None  # None: one view, (B, C, H, W); k: k views, (B, k, C, H, W)
    crop: bool = True  # random resized crop; False: the whole image, short side to size, centre crop
    scale: tuple[float, float] = (0.2, 1.0)  # of the image's area
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height
    clip: bool = False  # a box that is larger than the image is cut, as in MAE's linear probe, not drawn again
    flip: float = 0.5
    jitter: float = 0.0
    brightness: float = 0.4  # factors are uniform in [max(0, 1 - strength), 1 + strength]
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1  # shifts are uniform in ± hue, in turns of the colour circle
    grey: float = 0.0
    blur: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # pixels of the view
    solarize: float = 0.0
    three_augment: bool = False  # instead of these three: exactly one of them (DeiT III, section 3.2; arXiv 2204.07118)
    rand_augment: float | None = None  # magnitude of timm's RandAugment, 0 to 10; None: without it
    interpolation: Interpolation = "bilinear"  # of the crop
    same_as: str | None = None  # has the box, flip and colours of the view of that name, at a size of its own

    def __post_init__(self) -> None:
        """Raises ValueError for values that no view can have."""
        for name in ("flip", "jitter", "grey", "blur", "solarize"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"{name} is a probability, from 0 to 1, not {value}.")
        low, high = self.scale
        require(0 < low <= high <= 1, f"scale must be (low, high) with 0 < low ≤ high ≤ 1, not {self.scale}.")
        for name in ("ratio", "blur_sigma"):
            low, high = getattr(self, name)
            require(0 < low <= high, f"{name} must be (low, high) with 0 < low ≤ high, not {getattr(self, name)}.")
        _check_choice("interpolation", self.interpolation, KERNELS)


@dataclass(frozen=True)
class Evaluation:
    """The view of evaluation: what a backbone is shown of a whole image, as timm's create_transform makes it."""

    size: tuple[int, int]  # (H, W) in pixels
    crop_pct: float = 1.0  # how much of the resized image's sides the centre crop keeps; above 1, with a black border
    interpolation: Interpolation = "bilinear"
    crop_mode: str = "center"  # or "squash": the whole image takes the shape of the view, whatever its own

    def __post_init__(self) -> None:
        """Raises ValueError for values that no view can have."""
        require(0 < self.crop_pct < 2, f"crop_pct is a part of the sides, such as 0.875, not {self.crop_pct}.")
        _check_choice("interpolation", self.interpolation, KERNELS)
        _check_choice("crop_mode", self.crop_mode, CROP_MODES)

    def __call__(self, images: UInt8[Tensor, "B C H W"]) -> Float[Tensor, "B C {self.size[0]} {self.size[1]}"]:
        """uint8 (B, C, H, W) → float32 (B, C, *size) in [0, 1]."""
        return whole(images, self.size, self.crop_pct, self.interpolation, self.crop_mode)


def evaluation(size: Sequence[int], interpolation: Interpolation = "bilinear") -> Evaluation:
    """The evaluation view of our own runs: crop_pct is 0.875, and 1 up to 64 px."""
    return Evaluation(pair(size), 1.0 if max(size) <= 64 else 0.875, interpolation)


def _check_choice(name: str, value: str, known: Collection[str]) -> None:
    require(value in known, f"{name} must be {' or '.join(map(repr, known))}, not {value!r}.")


def _check_images(images: Tensor) -> None:
    shape = tuple(images.shape)
    require(
        images.dtype == torch.uint8 and images.ndim == 4,
        f"images must be uint8 (B, C, H, W), not {str(images.dtype).removeprefix('torch.')} {shape}"
        + (": multiply by 255 and convert." if images.is_floating_point() else "."),
    )
    require(
        shape[1] <= 4 or shape[3] not in (1, 3, 4),
        f"{shape[1]} channels: are these (B, H, W, C)? Use permute(0, 3, 1, 2).",
    )


ViewSpec = dict[str, View]  # by name; the name is part of the address of the view's random numbers


# --- the views of one batch -------------------------------------------------------------------------------------------


def make(spec: ViewSpec, images: UInt8[Tensor, "B C H W"], draw: Draw) -> dict[str, Float[Tensor, "B ... C _ _"]]:
    """All views of decoded images of one size. images: uint8 (B, C, H, W) on the device → float32 in [0, 1] there:
    (B, C, h, w), or (B, count, C, h, w) where the view has a count.

    Raises ValueError for other images, for a draw of other rows than theirs, and if a view is to have the crop of one
    that the spec lacks."""
    _check_images(images)
    require(len(draw.rows) == len(images), f"{len(images)} images need as many rows in draw, not {len(draw.rows)}.")
    views = {}
    with full_precision(images):
        for name, view in spec.items():
            if view.same_as is not None and view.same_as not in spec:
                raise ValueError(f"there is no view {view.same_as!r} that {name!r} could be like")
            u = _numbers(name, view, draw)
            flip = u[..., 0] < view.flip
            if view.crop:
                crops = crop(images, boxes(name, view, draw, *images.shape[-2:]), flip, view.size, view.interpolation)
            else:
                once = whole(images, view.size, interpolation=view.interpolation)
                crops = _flip(once[:, None].expand(-1, flip.shape[1], -1, -1, -1), flip)
            views[name] = _coloured(name, view, crops, u, draw)
    return views


def augment(
    spec: ViewSpec, images: UInt8[Tensor, "B C H W"], *, step: int, seed: int = 0
) -> dict[str, Float[Tensor, "B ... C _ _"]]:
    """`make` for a batch of its own: row r of step s of a seed always gets the same views, so count the step up from
    batch to batch.

    >>> images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    >>> {name: tuple(x.shape) for name, x in augment(dino((32, 32), (16, 16), 4, flip=0.5), images, step=0).items()}
    {'global1': (2, 3, 32, 32), 'global2': (2, 3, 32, 32), 'local': (2, 4, 3, 16, 16)}
    """
    return make(spec, images, Draw(seed, step, torch.arange(len(images)), images.device))


@dataclass(frozen=True)
class Photo:
    """A photo that is not decoded yet. size: its (H, W), upright; decode: n of REDUCTIONS → uint8 (C, h, w), its sides
    at least those of the photo divided by n."""

    size: tuple[int, int]
    decode: Callable[[int], UInt8[Tensor, "C _ _"]]

    @classmethod
    def of(cls, photo: UInt8[Tensor, "C H W"] | Photo) -> Photo:
        """The same, or a decoded photo as one that has no other size."""
        return photo if isinstance(photo, Photo) else cls((photo.shape[-2], photo.shape[-1]), lambda _: photo)


REDUCTIONS = (8, 4, 2, 1)  # what libjpeg can divide the sides of a photo by while it decodes


def reduction(parts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> int:
    """The most of REDUCTIONS after which none of the parts is smaller than it is shown. parts: (height, width) in
    pixels of the whole photo, and those at which it is shown. 1 if there are none."""
    ratios = [side / shown for part, size in parts for side, shown in zip(part, size, strict=True)]
    return next((n for n in REDUCTIONS if n <= min(ratios, default=1)), 1)


def _in_pixels(box: Sequence[int], size: tuple[int, int], pixels: Tensor) -> tuple[int, int, int, int]:
    """(top, left, height, width) of the box of a photo of `size` in its pixels, (C, h, w), which may be fewer. Edges go
    to the nearest pixel and halves up: then no side is less than the whole number that it was reduced to or beyond."""
    (top, left), (bottom, right) = (
        [(2 * edge * n + side) // (2 * side) for edge, side, n in zip(corner, size, pixels.shape[-2:], strict=True)]
        for corner in (box[:2], (box[0] + box[2], box[1] + box[3]))
    )
    return top, left, bottom - top, right - left


def crop_photos(
    spec: ViewSpec, draw: Draw
) -> Callable[[int, UInt8[Tensor, "C H W"] | Photo], dict[str, UInt8[Tensor, "_ C _ _"]]]:
    """What crops photos at their original sizes, in a DataLoader worker: a function of a place among the rows of the
    draw and its photo, uint8 (C, H, W), that gives uint8 (V, C, h, w) by view, with V = count or 1, from the boxes
    `make` would take, not yet flipped. The numbers of all rows are drawn at once: that takes little longer than one.
    A `Photo` is decoded once for all views, as small as the one that needs most of it allows."""
    drawn = {name: _proportions(name, view, draw) for name, view in spec.items() if view.crop}

    def crop_photo(at: int, photo: Tensor | Photo) -> dict[str, Tensor]:
        photo, crops = Photo.of(photo), {}
        places, needed = {}, []
        for name, view in spec.items():
            if view.crop:
                area, aspect, place = drawn[name]
                places[name] = _placed(view, (area[at], aspect[at], place[at]), *photo.size).tolist()
                needed += [(box[2:], view.size) for box in places[name]]
            else:
                needed.append((photo.size, _covering(*photo.size, view.size)))
        pixels = photo.decode(reduction(needed))
        for name, view in spec.items():
            if view.crop:
                mode, size = InterpolationMode(view.interpolation), list(view.size)
                found = [_in_pixels(box, photo.size, pixels) for box in places[name]]
                parts = [per_sample.resized_crop(pixels, *box, size, mode) for box in found]
            else:
                seen = _centre(Evaluation(view.size, interpolation=view.interpolation), pixels, photo.size)
                parts = [seen] * (view.count or 1)
            crops[name] = torch.stack(parts).contiguous()
        return crops

    return crop_photo


def whole_photo(view: Evaluation, photo: UInt8[Tensor, "C H W"] | Photo) -> UInt8[Tensor, "C _ _"]:
    """The evaluation view of one photo in whole grey levels, uint8 (C, H, W) → uint8 (C, *size): those of `whole` or
    the next ones, and those of timm's transform by PIL but for a few values in a hundred, a level or two off.
    A `Photo` is decoded as small as the view allows."""
    photo = Photo.of(photo)
    shown = _resized(*photo.size, view.size, view.crop_pct, view.crop_mode)
    return _centre(view, photo.decode(reduction([(photo.size, shown)])), photo.size)


def _centre(view: Evaluation, pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """The evaluation view of a photo of `size`, from its pixels, uint8 (C, h, w), of which it may have fewer."""
    shown = _resized(*size, view.size, view.crop_pct, view.crop_mode)
    pixels = per_sample.resize(pixels, list(shown), InterpolationMode(view.interpolation))
    cropped: Tensor = per_sample.center_crop(pixels, list(view.size))
    return cropped.contiguous()


def finish(
    spec: ViewSpec, crops: dict[str, UInt8[Tensor, "B _ C _ _"]], draw: Draw
) -> dict[str, Float[Tensor, "B ... C _ _"]]:
    """Flips and colours of the crops of `crop_photos`. crops: uint8 (B, V, C, h, w) on the device → as `make`."""
    views = {}
    for name, view in spec.items():
        u = _numbers(name, view, draw)
        with full_precision(crops[name]):
            views[name] = _coloured(name, view, _flip(crops[name].float() / 255, u[..., 0] < view.flip), u, draw)
    return views


def _numbers(name: str, view: View, draw: Draw) -> Tensor:
    """The uniform numbers of all that follows the box, (B, V, 12) on the CPU: the flip's, then `colour`'s eleven."""
    return draw.uniform(f"view.{view.same_as or name}.colour", view.count or 1, 12, device="cpu")


def _coloured(name: str, view: View, crops: Tensor, u: Tensor, draw: Draw) -> Tensor:
    """crops: (B, V, C, h, w), u: (B, V, 12) → the view in its final shape."""
    images = colour(view, crops.flatten(0, 1), u[..., 1:].flatten(0, 1))
    if view.rand_augment is not None:
        shape = view.count or 1, randaugment.LAYERS, randaugment.NUMBERS
        numbers = draw.uniform(f"view.{view.same_as or name}.randaugment", *shape, device="cpu")
        images = randaugment.rand_augment(images, numbers.flatten(0, 1), view.rand_augment)
    return images if view.count is None else images.view_as(crops)


# --- where to crop, and how -------------------------------------------------------------------------------------------


def boxes(name: str, view: View, draw: Draw, height: int, width: int) -> Int[Tensor, "B V 4"]:
    """Random boxes in images of height × width pixels: int64 (B, V, 4) of top, left, height, width, on the CPU.

    As in torchvision's RandomResizedCrop: the first of ten tries that lies in the image, else the largest central box
    whose aspect is allowed.
    """
    return torch.from_numpy(_placed(view, _proportions(name, view, draw), height, width))


Proportions = tuple[np.ndarray, np.ndarray, np.ndarray]  # of boxes, float64: area (…, 10), aspect (…, 10), place (…, 2)


def _proportions(name: str, view: View, draw: Draw) -> Proportions:
    """What is drawn of the boxes (B, V), whatever the size of the image: ten areas, as fractions of the image's, ten
    ratios of width to height, and where the box is put in the spare height and width."""
    u = draw.uniform(f"view.{view.same_as or name}.box", view.count or 1, 22, device="cpu").double()
    low, high = math.log(view.ratio[0]), math.log(view.ratio[1])
    area = view.scale[0] + (view.scale[1] - view.scale[0]) * u[..., :10]
    aspect = torch.exp(low + (high - low) * u[..., 10:20])
    return area.numpy(), aspect.numpy(), u[..., 20:].numpy()


def _placed(view: View, drawn: Proportions, height: int, width: int) -> np.ndarray:
    """The boxes, int64 (…, 4). In NumPy, which is several times faster than torch on the few numbers of one photo."""
    area, aspect, place = drawn
    area = height * width * area
    tries = np.stack([np.sqrt(area / aspect).round(), np.sqrt(area * aspect).round()], -1)  # (…, 10, 2)
    limit = np.array([height, width])
    if view.clip:
        tries = tries[..., :1, :].clip(1, limit)
    inside = np.all((tries > 0) & (tries <= limit), -1)
    first = inside.argmax(-1)[..., None, None]
    central = np.array([min(height, round(width / view.ratio[0])), min(width, round(height * view.ratio[1]))])
    found = np.any(inside, -1, keepdims=True)
    size = np.where(found, np.take_along_axis(tries, first, -2)[..., 0, :].astype(np.int64), central)
    spare = limit - size
    start = np.where(found, (place * (spare + 1)).astype(np.int64), spare // 2)
    return np.concatenate([start, size], -1)


def crop(
    images: UInt8[Tensor, "B C H W"],
    boxes: Int[Tensor, "B *V 4"],
    flip: Bool[Tensor, " B *V"],
    size: tuple[int, int],
    interpolation: Interpolation = "bilinear",
) -> Float[Tensor, "B *V C {size[0]} {size[1]}"]:
    """Crop, resize with antialiasing and mirror, as torchvision's resized_crop(antialias=True) of the float image.

    images: uint8 (B, C, H, W); boxes: int64 (B, 4) of top, left, height, width, and flip: bool (B,)
    → float32 (B, C, *size) in [0, 1]. Boxes (B, V, 4) and flip (B, V) give V crops of every image, (B, V, C, *size).
    """
    n, channels, height, width = images.shape
    numbers = torch.cat([boxes, flip[..., None]], -1).reshape(n, -1, 5).float()
    top, left, tall, wide, mirror = upload(numbers, images.device).unbind(-1)
    rows = _weights(height, top, tall, size[0], size[0], interpolation) / 255
    columns = _weights(width, left, wide, size[1], size[1], interpolation)
    columns = torch.where(mirror[..., None, None] > 0, columns.flip(-2), columns)
    return _separable(images, rows, columns).view(*boxes.shape[:-1], channels, *size)


def whole(
    images: UInt8[Tensor, "B C H W"],
    size: tuple[int, int],
    crop_pct: float = 1.0,
    interpolation: Interpolation = "bilinear",
    crop_mode: str = "center",
) -> Float[Tensor, "B C {size[0]} {size[1]}"]:
    """The evaluation view: antialiased resize until the image just covers size / crop_pct (for squares: its short side
    gets that long), or by "squash" to that shape, then the centre of that size.

    images: uint8 (B, C, H, W) → float32 (B, C, *size) in [0, 1]. The sizes are those of timm's eval transform, and so
    are the values to within a grey level: PIL rounds between its passes. (Where a squashed image shrinks more in height
    than in width, Pillow 13 may take the passes in the other order, and pixels that overshoot differ by some levels.)
    Raises ValueError for other images, and for values that `Evaluation` refuses.
    """
    _check_images(images)
    Evaluation(size, crop_pct, interpolation, crop_mode)
    height, width = images.shape[-2:]
    tall, wide = _resized(height, width, size, crop_pct, crop_mode)
    zero = torch.zeros((), device=images.device)
    rows = _weights(height, zero, zero + height, tall, size[0], interpolation) / 255
    columns = _weights(width, zero, zero + width, wide, size[1], interpolation)
    with full_precision(images):
        x = images.float() @ columns.T
        if interpolation == "bicubic":
            x = x.clamp_(0, 255)  # what overshoots is cut between the passes, as by PIL
        return (rows @ x).clamp_(0, 1)


def _resized(height: int, width: int, size: tuple[int, int], crop_pct: float, crop_mode: str) -> tuple[int, int]:
    """(H, W) to which an image of height × width is resized, before the centre of `size` is cropped."""
    return _scaled(size, crop_pct) if crop_mode == "squash" else _covering(height, width, size, crop_pct)


def _scaled(size: tuple[int, int], crop_pct: float) -> tuple[int, int]:
    return math.floor(size[0] / crop_pct), math.floor(size[1] / crop_pct)


def _covering(height: int, width: int, size: tuple[int, int], crop_pct: float = 1.0) -> tuple[int, int]:
    """The smallest (H, W) that covers size / crop_pct and keeps the image's shape, rounded as by timm: down for squares
    (torchvision's Resize), else to the nearest (timm's ResizeKeepRatio)."""
    tall, wide = _scaled(size, crop_pct)
    if tall == wide:
        return (tall, tall * width // height) if width >= height else (wide * height // width, wide)
    ratio = min(height / tall, width / wide)
    return round(height / ratio), round(width / ratio)


def _weights(n: int, start: Tensor, length: Tensor, resized: int, out: int, interpolation: Interpolation) -> Tensor:
    """Antialiased resampling of the interval [start, start + length) of n pixels to `resized` pixels, of which the
    middle `out` are kept. start, length: (...) → weights (..., out, n), summing to 1 over n, or to 0 in a border."""
    scale = (length / resized)[..., None]
    first = round((resized - out) / 2) if resized >= out else -((out - resized) // 2)
    kept = torch.arange(out, device=start.device) + (first + 0.5)
    pixel = torch.arange(n, device=start.device) - start[..., None]  # counted from the start of the interval
    distance = (pixel[..., None, :] + 0.5 - (kept * scale)[..., :, None]).abs()
    weights = KERNELS[interpolation](distance / scale.clamp(min=1)[..., None])
    weights = weights * ((pixel >= 0) & (pixel < length[..., None]))[..., None, :]
    weights = weights / weights.sum(-1, keepdim=True)
    if resized < out:  # with a border, as torchvision's center_crop
        weights = weights.masked_fill(((kept < 0) | (kept > resized))[:, None], 0.0)
    return weights


def _triangle(distance: Tensor) -> Tensor:
    return (1 - distance).clamp_(min=0)


def _cubic(distance: Tensor, a: float = -0.5) -> Tensor:
    """Keys' cubic convolution (1981, equation 4), with PIL's a, which torch takes too where it antialiases."""
    near = ((a + 2) * distance - (a + 3)) * distance.square() + 1
    far = a * (((distance - 5) * distance + 8) * distance - 4)
    return torch.where(distance < 1, near, far) * (distance < 2)


KERNELS: dict[Interpolation, Callable[[Tensor], Tensor]] = {"bilinear": _triangle, "bicubic": _cubic}


def _separable(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """rows · image · columnsᵀ, in [0, 1]. images: (B, C, H, W); rows: (B, V, h, H); columns: (B, V, w, W)
    → (B, V, C, h, w)."""
    n, channels, height, width = images.shape
    count, h, w = rows.shape[1], rows.shape[2], columns.shape[2]
    # the image's rows first, for all V views in one product; the shapes keep bmm from copying its operands per channel
    x = images.transpose(1, 2).reshape(n, height, channels * width).float()
    with full_precision(images):
        x = torch.bmm(rows.reshape(n, count * h, height), x).view(n, count, h, channels, width)
        x = x.transpose(2, 3).reshape(n * count, channels * h, width)
        x = torch.bmm(x, columns.flatten(0, 1).mT).view(n, count, channels, h, w)
    return x.clamp_(0, 1)  # weights sum to 1 up to rounding, and bicubic ones overshoot at edges


def _flip(images: Tensor, flip: Tensor) -> Tensor:
    """Mirrors images (*shape, C, H, W) where flip (*shape), on the CPU, says so."""
    return torch.where(upload(flip, images.device)[..., None, None, None], images.flip(-1), images)


# --- colours: float images (N, C, H, W) in [0, 1] → the same, never in place ------------------------------------------


_ORDERS = torch.tensor(list(permutations(range(4))))  # (24, 4)
_LUMA = (0.2989, 0.587, 0.114)  # torchvision's weights of red, green and blue


def colour(view: View, images: Float[Tensor, "N C H W"], u: Float[Tensor, "N 11"]) -> Float[Tensor, "N C H W"]:
    """The colour operations of a view, each on the images that drew it.

    images: (N, C, H, W); u: uniform numbers (N, 11) on the CPU: whether to jitter, brightness, contrast, saturation,
    hue, their order, whether to grey, to blur, to solarize, the blur's sigma, which of three. Other than three channels
    are not RGB: they keep their hue and saturation.
    """
    if not (view.three_augment or view.jitter or view.grey or view.blur or view.solarize):
        return images
    strength = torch.tensor([view.brightness, view.contrast, view.saturation, view.hue])
    centre = torch.tensor([1.0, 1.0, 1.0, 0.0])
    low, high = torch.maximum(centre - strength, centre - 1), centre + strength
    factors = low + (high - low) * u[:, 1:5]
    order = _ORDERS[(u[:, 5] * 24).long()]
    sigma = view.blur_sigma[0] + (view.blur_sigma[1] - view.blur_sigma[0]) * u[:, 9]

    chances = torch.tensor([view.jitter, view.grey, view.blur, view.solarize])
    jittered, greyed, blurred, solarized = (u[:, [0, 6, 7, 8]] < chances).unbind(1)
    if view.three_augment:
        greyed, blurred, solarized = ((u[:, 10] * 3).long() == k for k in range(3))
    if images.shape[1] != 3:
        greyed = torch.zeros_like(greyed)

    radius = math.ceil(3 * view.blur_sigma[1])
    steps: list[tuple[Tensor, Callable[[Tensor], Tensor]]] = [
        (jittered, partial(jitter, factors=factors[jittered], order=order[jittered])),
        (greyed, grey),
        (blurred, partial(blur, sigma=sigma[blurred], radius=radius)),
        (solarized, solarize),
    ]
    if view.three_augment:
        steps = steps[1:] + steps[:1]
    indices = _places([chosen for chosen, _ in steps], images.device)
    for index, (_, operation) in zip(indices, steps, strict=True):
        images = _on(images, index, operation)
    return images


def jitter(
    images: Float[Tensor, "N C H W"], factors: Float[Tensor, "N 4"], order: Int[Tensor, "N 4"]
) -> Float[Tensor, "N C H W"]:
    """torchvision's ColorJitter, with a separate order for every image.

    images: (N, C, H, W); on the CPU, factors: (N, 4) of brightness, contrast, saturation and hue (the shift, in turns);
    order: int64 (N, 4), those four operations by number, the first first.
    """
    n, channels = images.shape[:2]
    if channels != 3:  # not RGB: saturation × 1, hue + 0
        factors = factors * torch.tensor([1.0, 1.0, 0.0, 0.0]) + torch.tensor([0.0, 0.0, 1.0, 0.0])
    # Each of the first three is a blend f·x + (1 - f)·reference, clamped; the reference is black, the mean grey of the
    # image or the grey of the pixel. So it is a matrix on the channels and an offset linear in the channels' means.
    luma = torch.tensor(_LUMA) if channels == 3 else torch.full((channels,), 1 / channels)
    blends = order[order != 3].view(n, 3)
    f = factors.gather(1, blends)[..., None, None]  # (N, 3, 1, 1): the three blends of every image in its order
    to_mean, to_grey = ((blends == k)[..., None, None] * (1 - f) * luma for k in (1, 2))  # (N, 3, 1, C)
    matrices = upload(torch.cat([f * torch.eye(channels) + to_grey, to_mean], 2), images.device)

    turn = (factors[:, 3:] != 0) & (order == 3)  # (N, 4): the hue comes before the k-th blend, and after the last
    masks = list(turn.unbind(1))
    for k, index in enumerate(_places(masks, images.device)):
        images = _on(images, index, partial(hue, shift=factors[masks[k], 3]))
        if k < 3:
            pixels = images.flatten(2)
            offset = (matrices[:, k, -1] * pixels.mean(2)).sum(1)[:, None, None]
            images = torch.baddbmm(offset, matrices[:, k, :-1], pixels).clamp_(0, 1).view_as(images)
    return images


def hue(images: Float[Tensor, "N 3 H W"], shift: Float[Tensor, " N"]) -> Float[Tensor, "N 3 H W"]:
    """Turns the hue in HSV space, as torchvision's adjust_hue. images: RGB (N, 3, H, W); shift: (N,) in turns."""
    red, green, blue = images.unbind(1)
    high = images.amax(1)
    chroma = high - images.amin(1)
    divisor = chroma.clamp(min=1e-12)  # a grey pixel has hue 0
    sector = torch.where(
        high == red,
        (green - blue) / divisor,
        torch.where(high == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    turned = (sector + 6 * upload(shift, images.device)[:, None, None])[:, None]
    # back: around the six sectors a channel is low for two, rises in one, is high for two and falls in one
    k = (turned + torch.arange(5, 0, -2, device=images.device)[:, None, None]) % 6
    return high[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp_(0, 1)


def grey(images: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "N 3 H W"]:
    """The luma in all three channels. images: RGB (N, 3, H, W)."""
    red, green, blue = images.unbind(1)
    return (_LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue)[:, None].expand_as(images)


def blur(images: Float[Tensor, "N C H W"], sigma: Float[Tensor, " N"], radius: int) -> Float[Tensor, "N C H W"]:
    """Gaussian blur with reflected borders, as torchvision's with kernel 2·radius + 1, at most 2·side - 1.

    images: (N, C, H, W); sigma: (N,) in pixels.
    """
    sigma = upload(sigma, images.device)
    rows, columns = (_gaussian(side, sigma, min(radius, side - 1))[:, None] for side in images.shape[-2:])
    return _separable(images, rows, columns).squeeze(1)


def _gaussian(n: int, sigma: Tensor, radius: int) -> Tensor:
    """Weights (N, n, n) of a gaussian blur of n pixels cut at radius < n, with reflected borders. sigma: (N,)."""
    place = torch.arange(radius + 2, device=sigma.device)
    kernel = torch.exp(-0.5 * (place / sigma[:, None]) ** 2) * (place <= radius)
    kernel = kernel / (2 * kernel.sum(1, keepdim=True) - kernel[:, :1])
    i = torch.arange(n, device=sigma.device)[:, None]
    j = i.T
    # pixel j lies at j, and mirrored in the first and in the last pixel; those two have no mirror image of themselves
    distances = torch.stack([(j - i).abs(), i + j + n * (j == 0), 2 * (n - 1) - i - j + n * (j == n - 1)])
    return kernel[:, distances.clamp(max=radius + 1)].sum(1)


def solarize(images: Float[Tensor, "N C H W"]) -> Float[Tensor, "N C H W"]:
    """Inverts the values from 0.5 up."""
    return torch.minimum(images, 1 - images)


def _places(masks: list[Tensor], device: torch.device) -> list[Tensor]:
    """The indices where each mask, on the CPU, is true; moved in one copy."""
    places = [mask.nonzero().flatten() for mask in masks]
    return list(upload(torch.cat(places), device).split([len(p) for p in places]))


def _on(images: Tensor, index: Tensor, operation: Callable[[Tensor], Tensor]) -> Tensor:
    """The images, with the operation applied to those at index, which increases and has no duplicates."""
    if len(index) == 0:
        return images
    if len(index) == len(images):
        return operation(images)
    return images.index_copy(0, index, operation(images.index_select(0, index)))


# --- two images in one ------------------------------------------------------------------------------------------------


def mix(
    images: Float[Tensor, "B C H W"],
    targets: Float[Tensor, "B K"],
    draw: Draw,
    mixup: float,
    cutmix: float,
    prob: float = 1.0,
    mode: str = "elem",
) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B K"]]:
    """Mixup (arXiv 1710.09412) or CutMix (arXiv 1905.04899, section 3.1), each of half the images if both alphas > 0.

    images: float (B, C, H, W); targets: float (B, K); mixup, cutmix: alpha of λ ~ Beta(alpha, alpha), 0 for never;
    prob: of mixing an image at all; mode: "elem" if every image has its own λ and box, "batch" if a step has one.
    Row r is mixed with row r xor 1 of the global batch, which must lie beside it here; its own weight is λ.

    Raises ValueError for rows without their partner, for targets or a draw of other rows than the images', and for
    another mode.
    """
    _check_choice("mode", mode, ("elem", "batch"))
    require(
        len(images) == len(targets) == len(draw.rows),
        f"{len(images)} images need as many targets and rows in draw, not {len(targets)} and {len(draw.rows)}.",
    )
    if mixup == cutmix == 0:
        return images, targets
    height, width = images.shape[-2:]
    if len(draw.rows) % 2 or not torch.equal(draw.rows[1::2], draw.rows[::2] ^ 1):
        raise ValueError(
            "mixup needs an even batch: it pairs row r with row r xor 1, so a micro-batch must hold an even number of "
            f"rows and start at an even one; this one holds {len(draw.rows)} and starts at {int(draw.rows[0])}."
        )
    if mode == "batch":
        draw = draw.for_rows(torch.zeros_like(draw.rows))
    u = draw.uniform("mix", 4, device="cpu").double()
    mixed = u[:, 0] < prob
    cut = u[:, 1] < (cutmix > 0) / ((cutmix > 0) + (mixup > 0))
    own = beta("mix.share", torch.where(cut, cutmix, mixup).double(), draw)

    # CutMix: a box of area 1 - λ around a uniform point; what lies outside the image is lost, so λ is counted again
    size = torch.tensor([height, width])
    sides = ((1 - own).sqrt()[:, None] * size).long()
    start = (u[:, 2:] * size).long() - sides // 2
    start, end = start.clamp(min=0), torch.minimum(start + sides, size)
    own = torch.where(cut, 1 - (end - start).prod(1) / (height * width), own)
    own = torch.where(mixed, own, 1.0)
    cut = cut & mixed
    end = end * cut[:, None]  # an empty box where nothing is pasted
    numbers = torch.cat([start, end, torch.where(cut, 1.0, own)[:, None], own[:, None]], 1).to(images.dtype)
    top, left, bottom, right, outside, own = upload(numbers, images.device)[..., None, None].unbind(1)

    y = torch.arange(height, device=images.device)[:, None]
    x = torch.arange(width, device=images.device)
    inside = (y >= top) & (y < bottom) & (x >= left) & (x < right)  # (B, H, W)
    weight = torch.where(inside, 0.0, outside)[:, None]
    return torch.lerp(_partners(images), images, weight), torch.lerp(_partners(targets), targets, own[:, 0])


def _partners(rows: Tensor) -> Tensor:
    pairs: Tensor = rows.unflatten(0, (-1, 2))
    return pairs.flip(1).flatten(0, 1)


def beta(name: str, alpha: Float[Tensor, " B"], draw: Draw) -> Float[Tensor, " B"]:
    """Beta(alpha, alpha) numbers, float64 (B,), for alpha > 0, (B,). Jöhnk's rejection: of pairs x = u^(1/alpha),
    y = v^(1/alpha) the first with x + y ≤ 1 gives x / (x + y). Half of the pairs pass at alpha 1, few far above it."""
    values = torch.full((len(alpha),), torch.nan, dtype=torch.float64)
    tries = 0
    while values.isnan().any():
        u = 1 - draw.uniform(f"{name}.{tries}", 8, 2, device="cpu").double()
        log_x, log_y = (u.log() / alpha[:, None, None]).unbind(-1)
        passed = log_x.exp() + log_y.exp() <= 1
        first = passed.int().argmax(1, keepdim=True)
        found = (log_x - log_y).sigmoid().gather(1, first).squeeze(1)
        values = torch.where(values.isnan() & passed.any(1), found, values)
        tries += 1
    return values


# --- what the recipes use ---------------------------------------------------------------------------------------------
# flip is a probability: 0 where a mirrored image would have another label


def none(size: tuple[int, int]) -> ViewSpec:
    """The whole image."""
    return {"image": View(size, crop=False, flip=0.0)}


def crop_flip(size: tuple[int, int], flip: float, scale: tuple[float, float] = (0.2, 1.0)) -> ViewSpec:
    """Random resized crop and flip (MAE, arXiv 2111.06377, appendix A.1: scale (0.2, 1))."""
    return {"image": View(size, scale=scale, flip=flip)}


def rand_augment(
    size: tuple[int, int], flip: float, scale: tuple[float, float] = (0.08, 1.0), magnitude: float = 9.0
) -> ViewSpec:
    """Crop, flip and RandAugment, as DeiT (arXiv 2012.12877, table 9; randaugment.py)."""
    return {"image": View(size, scale=scale, flip=flip, rand_augment=magnitude)}


def three_augment(size: tuple[int, int], flip: float, scale: tuple[float, float] = (0.08, 1.0)) -> ViewSpec:
    """3-Augment (DeiT III, arXiv 2204.07118, section 3.2; deit/augment.py): grey, blur or solarize, then jitter."""
    view = View(size, scale=scale, flip=flip, jitter=1.0, three_augment=True)
    return {"image": replace(view, brightness=0.3, contrast=0.3, saturation=0.3, hue=0.0)}


def dino(
    size: tuple[int, int],
    local_size: tuple[int, int],
    local_count: int,
    flip: float,
    global_scale: tuple[float, float] = (0.4, 1.0),
    local_scale: tuple[float, float] = (0.05, 0.4),
    colour: bool = True,
    blur: bool = True,
) -> ViewSpec:
    """DINO's two global and local_count local views (DataAugmentationDINO in the official main_dino.py; it resizes
    bicubically: see `resampled`). colour=False: crops and flips only. blur=False: a sigma of up to 2 px suits 224."""
    base = View(size, scale=global_scale, flip=flip, jitter=0.8 if colour else 0.0, grey=0.2 if colour else 0.0)
    p = 1.0 if colour and blur else 0.0
    spec = {
        "global1": replace(base, blur=p),
        "global2": replace(base, blur=0.1 * p, solarize=0.2 if colour else 0.0),
    }
    if local_count:
        spec["local"] = replace(base, size=local_size, count=local_count, scale=local_scale, blur=0.5 * p)
    return spec


def resampled(spec: ViewSpec, interpolation: Interpolation, clip: bool = False) -> ViewSpec:
    """The same views, cropped with this interpolation, and as `View.clip` says."""
    return {name: replace(view, interpolation=interpolation, clip=clip) for name, view in spec.items()}
