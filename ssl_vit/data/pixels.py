"""One stored image → its values as they are stored, upright, (H, W, C) of any depth; and those → uint8 (C, H, W).

The one place that reads images, with the same rules for files, bytes and arrays, in training and evaluation.

- Upright: the EXIF orientation is applied, as `datasets`, browsers and phones do.
- Depth: 8-bit values stay as they are. Deeper ones keep their depth until the set's range maps them to 0..255; none is
  clipped, shifted or truncated on the way by a reader's defaults (Pillow's convert clips, and reads colour in 16 bits
  as 8).
- Alpha: composited on `background`, or kept where data.in_chans asks for one channel more than the colours. White by
  default, since drawings, icons and cut-outs are made for white pages; on black, black drawings vanish.
- Pages: a file of several is refused unless data.pages says what they are.
"""

import io
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO, Literal

import numpy as np
import tifffile
import torch
import torchvision
from PIL import ExifTags, Image, TiffImagePlugin, UnidentifiedImageError
from tifffile import EXTRASAMPLE, PHOTOMETRIC
from torch import Tensor

from ssl_vit.errors import UserError
from ssl_vit.settings import known

SUFFIXES = {
    *(".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2", ".avif"),
    ".npy",
}
# its decoders are to move to another package one day; no other dependency reads colour of 16 bits from PNG
warnings.filterwarnings("ignore", message="The image decoding and encoding capabilities of TorchVision")

TURNS = {  # EXIF orientation → what makes stored values (H, W, C) upright
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}
JPEG = ("JPEG", "MPO")  # Pillow's formats that libjpeg decodes, at a fraction of their sides too
GREY, DEEP = ("1", "L", "LA", "La"), ("I", "F")  # Pillow's modes; for the deep ones, their first letter


@dataclass(frozen=True)
class Rules:
    """How stored values become uint8. channels: wanted; range: (black, white) of values deeper than 8 bits."""

    channels: int
    range: tuple[float, float] | None = None
    background: Literal["white", "black"] = "white"


@dataclass(frozen=True)
class Stored:
    """An image of which only the header is read so far. channels: of colour; alpha: one more, the last in values()."""

    where: str
    form: str  # PNG, TIFF, array, …
    mode: str
    size: tuple[int, int]  # (height, width), upright
    channels: int
    alpha: bool
    turned: bool
    dtype: np.dtype
    read: Callable[[], np.ndarray]
    draft: Callable[[int], object] | None = None  # of a JPEG: n → from now on it is read at 1/n of its sides

    @property
    def deep(self) -> str | None:
        """None for values of 8 bits, else "whole numbers" or "fractions"."""
        if self.dtype in (np.uint8, np.bool_):
            return None
        return "fractions" if self.dtype.kind == "f" else "whole numbers"

    def values(self) -> np.ndarray:
        """(H, W, channels [+ alpha]), as stored, upright. Raises UserError, naming the image."""
        with naming(self.where):
            values = self.read()
        if self.dtype.kind == "f" and not np.isfinite(values).all():
            raise UserError(f"Image {self.where} holds values that are not finite numbers.")
        return values

    def shrink(self, n: int) -> None:
        """Have a JPEG read at 1/n of its sides, rounded up, for n = 1, 2, 4 or 8, once; other images stay whole."""
        if self.draft is not None and n > 1:
            with naming(self.where):
                self.draft(n)

    def colours(self) -> np.ndarray:
        """values() without alpha."""
        return self.values()[..., : self.channels]


@contextmanager
def naming(where: str) -> Iterator[None]:
    """What a decoder raises becomes a UserError that names the image."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # decoders raise a dozen types for a broken file
        raise broken(where, error) from None


def broken(where: str, error: Exception) -> UserError:
    """The error of an image that cannot be read."""
    reason = "it is in no known format" if isinstance(error, UnidentifiedImageError) else one_line(error)
    return UserError(f"Image {where} cannot be decoded ({reason}).")


def one_line(error: BaseException) -> str:
    """An exception's message, short, without its full stop."""
    return " ".join(str(error).split())[:200].rstrip(".")


def look(where: str, source: str | bytes | np.ndarray, layout: str | None, pages: str | None) -> Stored:
    """An image by its file, its bytes or its array. Raises UserError, naming it, where it cannot be read."""
    with naming(where):
        if isinstance(source, np.ndarray):
            return _array(where, source, layout)
        if isinstance(source, str) and source.lower().endswith(".npy"):
            return _array(where, np.load(source, mmap_mode="r"), layout, "npy")
        return _picture(where, source, pages)


def convert(stored: Stored, rules: Rules) -> tuple[Tensor, int]:
    """(uint8 (C, H, W), how many values lay outside of the range). Raises UserError, naming the image."""
    values = stored.values()
    colours, clipped = _to_bytes(stored, values[..., : stored.channels], rules.range)
    alpha = None
    if stored.alpha:
        kind = stored.dtype.kind
        full = (0, 1) if kind == "f" else (0, np.iinfo(stored.dtype).max)
        alpha = _to_bytes(stored, values[..., stored.channels :], full)[0]
    # in memory the channels of a pixel stay together, as torch's resampling of uint8 reads them fastest
    return torch.from_numpy(_channels(stored, colours, alpha, rules).copy()).permute(2, 0, 1), clipped


def _to_bytes(stored: Stored, values: np.ndarray, limits: tuple[float, float] | None) -> tuple[np.ndarray, int]:
    if values.dtype == np.uint8:
        return values, 0
    if values.dtype == np.bool_:
        return values * np.uint8(255), 0
    if limits is None:
        raise UserError(
            f"Image {stored.where} holds {stored.dtype} values, unlike the images that were inspected first: set "
            "data.range=[LOW, HIGH], the values of black and white."
        )
    low, high = limits
    clipped = int(((values < low) | (values > high)).sum())
    return ((values.astype(np.float64) - low) * (255 / (high - low))).round().clip(0, 255).astype(np.uint8), clipped


def _channels(stored: Stored, colours: np.ndarray, alpha: np.ndarray | None, rules: Rules) -> np.ndarray:
    """uint8 (H, W, wanted): grey is repeated, colour made grey, alpha kept, added (opaque) or composited."""
    wanted, has = rules.channels, stored.channels
    keep = wanted == 4 and has in (1, 3) or wanted == 2 and has in (1, 3)
    if alpha is not None and not keep:
        ground = 255 if rules.background == "white" else 0
        weight = alpha.astype(np.uint32)
        colours = ((colours * weight + ground * (255 - weight) + 127) // 255).astype(np.uint8)
    shown = wanted - keep
    if has == 1 and shown == 3:
        colours = colours.repeat(3, 2)
    elif has == 3 and shown == 1:
        colours = np.asarray(Image.fromarray(np.ascontiguousarray(colours)).convert("L"))[..., None]
    elif has != shown:
        raise UserError(f"Image {stored.where} has {has} channels, not {wanted}: set data.in_chans.")
    if keep:
        opaque = np.full_like(colours[..., :1], 255) if alpha is None else alpha
        colours = np.concatenate([colours, opaque], 2)
    return colours


# -- readers ----------------------------------------------------------------------------------------------------------


def _array(where: str, array: np.ndarray, layout: str | None, form: str = "array") -> Stored:
    if array.dtype.kind not in "buif" or array.ndim not in (2, 3) or 0 in array.shape:
        raise UserError(f"Image {where} is neither an image nor an array of numbers (H, W), (H, W, C) or (C, H, W).")
    if array.dtype.byteorder == ">":
        array = array.astype(array.dtype.newbyteorder("="))
    if array.ndim == 2:
        array = array[..., None]
    elif _channels_first(where, array.shape, layout):
        array = array.transpose(1, 2, 0)
    height, width, channels = array.shape
    mode = f"{channels} x {array.dtype}"
    return Stored(where, form, mode, (height, width), channels, False, False, array.dtype, lambda: np.asarray(array))


def _channels_first(where: str, shape: tuple[int, ...], layout: str | None) -> bool:
    """Whether an array is (C, H, W): by `layout`, or else by the axis that has 1, 3 or 4 entries or is the shortest."""
    if layout is not None:
        return layout == "chw"
    first, last = shape[0] in (1, 3, 4), shape[2] in (1, 3, 4)
    if first == last and not first:
        first, last = shape[0] < min(shape[1:]), shape[2] < min(shape[:2])
    if first == last:
        raise UserError(
            f"The array of image {where} is {' x '.join(map(str, shape))}, which does not tell its channels from its "
            "sides: set data.layout=hwc or data.layout=chw."
        )
    return first


def _picture(where: str, source: str | bytes, pages: str | None) -> Stored:
    try:
        image = Image.open(source if isinstance(source, str) else io.BytesIO(source))
    except UnidentifiedImageError:
        if _head(source)[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):  # bands or depths that Pillow lacks
            return _tiff(where, source, pages)
        raise
    # of the pictures in a phone's MPO file the first is the photo, the others are previews or depth
    count = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    if count > 1 and pages is None:
        raise _several(where, count)
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        bits = image.tag_v2.get(258, (1,))
        if len(bits) > 1 and (max(bits) > 8 or len(bits) != len(image.getbands())):
            return _tiff(where, source, pages)
        if image.tag_v2.get(262) == PHOTOMETRIC.MINISWHITE and image.mode[0] in DEEP:
            raise _inverted(where)
    if image.format == "PNG":
        orientation, bits, colour_type = _png(source)
        if bits == 16 and colour_type != 0:
            return _deep_png(where, source, image.size, colour_type, orientation)
    else:
        orientation = _orientation(image)
    turned = orientation in TURNS
    # Pillow turns TIFF itself, when it loads one; its size is upright before
    turn = (lambda a: a) if image.format == "TIFF" or not turned else TURNS[orientation]
    width, height = image.size
    if orientation >= 5 and image.format != "TIFF":
        width, height = height, width
    alpha = image.has_transparency_data and image.mode[0] not in DEEP
    colours = 1 if image.mode in GREY or image.mode[0] in DEEP else 3
    dtype = np.asarray(Image.new(image.mode, (1, 1))).dtype if image.mode[0] in DEEP else np.dtype(np.uint8)
    frames = list(range(count)) if pages == "channels" else [0]
    if len(frames) > 1 and alpha:
        raise UserError(f"Image {where} has pages with alpha, which are no channels: set data.pages=first.")

    def read() -> np.ndarray:
        found = []
        for frame in frames:
            if count > 1:
                image.seek(frame)
            found.append(_values(image, colours, alpha))
        return turn(np.concatenate(found, 2) if len(found) > 1 else found[0])

    def draft(n: int) -> None:
        # of the scales of libjpeg Pillow takes the smallest that keeps this size, which is 1/n
        image.draft(None, (image.width // n, image.height // n))

    return Stored(
        where,
        known(image.format),
        image.mode,
        (height, width),
        colours * len(frames),
        alpha,
        turned,
        dtype.newbyteorder("="),
        read,
        draft if image.format in JPEG else None,
    )


def _values(image: Image.Image, channels: int, alpha: bool) -> np.ndarray:
    """(H, W, C) of a frame, as stored."""
    if image.mode[0] in DEEP:
        values = np.array(image)
        return values.astype(values.dtype.newbyteorder("="))[..., None]
    mode = ("L" if channels == 1 else "RGB") + ("A" if alpha else "")
    values = np.array(image if image.mode == mode else image.convert(mode))
    return values[..., None] if values.ndim == 2 else values


def _orientation(image: Image.Image) -> int:
    try:
        return _known(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # damaged EXIF of a good image: viewers show it as it is stored
        return 1


def _known(orientation: int | None) -> int:
    """An EXIF orientation; 1, as it is stored, for what is none."""
    return orientation if orientation in TURNS else 1


@contextmanager
def _opened(source: str | bytes) -> Iterator[BinaryIO]:
    with open(source, "rb") if isinstance(source, str) else io.BytesIO(source) as stream:
        yield stream


def _head(source: str | bytes) -> bytes:
    with _opened(source) as stream:
        return stream.read(8)


def png_bits(source: str | bytes) -> int:
    """The bits of a value in a PNG file."""
    return _png(source)[1]


def _png(source: str | bytes) -> tuple[int, int, int]:
    """(EXIF orientation, bits, colour type) by a PNG file's chunks: Pillow would decode the image to find its EXIF."""
    orientation, bits, colour_type = 1, 8, 2
    with _opened(source) as stream:
        stream.seek(8)
        while len(head := stream.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if kind == b"IHDR":
                body = stream.read(length)
                bits, colour_type = body[8], body[9]
            elif kind == b"eXIf":
                exif = Image.Exif()
                try:
                    exif.load(stream.read(length))
                    orientation = _known(exif.get(ExifTags.Base.Orientation))
                except Exception:
                    orientation = 1
            else:
                stream.seek(length, io.SEEK_CUR)
            stream.seek(4, io.SEEK_CUR)
    return orientation, bits, colour_type


def _deep_png(where: str, source: str | bytes, size: tuple[int, int], colour_type: int, orientation: int) -> Stored:
    """A PNG file of 16 bits and several channels, by torchvision, which keeps them."""

    def read() -> np.ndarray:
        with _opened(source) as stream:
            data = torch.frombuffer(bytearray(stream.read()), dtype=torch.uint8)
        values = torchvision.io.decode_png(data, mode=torchvision.io.ImageReadMode.UNCHANGED)
        return turn(values.permute(1, 2, 0).numpy())

    turn = TURNS.get(orientation, lambda a: a)
    channels, mode = (1, "LA;16") if colour_type == 4 else (3, "RGBA;16" if colour_type == 6 else "RGB;16")
    shape = size if orientation >= 5 else size[::-1]
    alpha = colour_type in (4, 6)
    return Stored(where, "PNG", mode, shape, channels, alpha, orientation in TURNS, np.dtype(np.uint16), read)


def _tiff(where: str, source: str | bytes, pages: str | None) -> Stored:
    """A TIFF file of more bands or deeper colour than Pillow reads, by tifffile."""

    with _opened(source) as stream, tifffile.TiffFile(stream) as file:
        count, page = len(file.pages), file.pages.first
        if count > 1 and pages is None:
            raise _several(where, count)
        if not set(page.axes) <= set("YXS"):
            raise UserError(f"Image {where} has the axes {page.axes}: store one plane of rows, columns and bands.")
        colour = PHOTOMETRIC(page.photometric)
        if colour == PHOTOMETRIC.MINISWHITE:
            raise _inverted(where)
        if colour not in (PHOTOMETRIC.MINISBLACK, PHOTOMETRIC.RGB):
            raise UserError(f"Image {where} holds {colour.name} of {page.dtype}: store it as RGB.")
        bands = page.samplesperpixel
        alpha = bool(page.extrasamples) and page.extrasamples[-1] != EXTRASAMPLE.UNSPECIFIED
        tag = page.tags.get("Orientation")
        orientation = _known(tag and int(tag.value))
        size, dtype = (page.imagelength, page.imagewidth), np.dtype(page.dtype)
    turn = TURNS.get(orientation, lambda a: a)
    frames = count if pages == "channels" else 1
    if frames > 1 and alpha:
        raise UserError(f"Image {where} has pages with alpha, which are no channels: set data.pages=first.")

    def read() -> np.ndarray:
        with _opened(source) as stream, tifffile.TiffFile(stream) as file:
            planes = []
            for page in file.pages[:frames]:
                plane = page.asarray()
                if "S" not in page.axes:
                    plane = plane[..., None]
                planes.append(np.moveaxis(plane, page.axes.index("S"), -1) if "S" in page.axes else plane)
        return turn(np.concatenate(planes, 2))

    return Stored(
        where,
        "TIFF",
        f"{bands * frames} x {dtype}",
        size[::-1] if orientation >= 5 else size,
        bands * frames - alpha,
        alpha,
        orientation in TURNS,
        dtype.newbyteorder("="),
        read,
    )


def _inverted(where: str) -> UserError:
    """Pillow inverts 8 bits alone, and tifffile nothing."""
    return UserError(
        f"Image {where} stores white as 0 (TIFF's WhiteIsZero) in more than 8 bits or in several bands, which would be "
        "read as a negative: store it with black as 0."
    )


def _several(where: str, count: int) -> UserError:
    return UserError(
        f"Image {where} has {count} pages or frames: set data.pages=channels if they are channels of one image, "
        "data.pages=first to take the first of each file, or store one image per file."
    )
