"""What becomes of stored values: upright, any depth, alpha, axes and pages, alike on every route."""

import io
import shutil
import struct
import weakref
import zlib
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image, ImageOps
from test_data import as_array, on_white, parquet, photos, pixels, save
from test_data import load as load_split

from eval.measure import cli
from ssl_vit import errors, objectives
from ssl_vit import recipe as recipes
from ssl_vit.data import decoding
from ssl_vit.errors import UserError

ROUTES = (dict(), dict(cache_gb=0.0))  # decoded once, and by workers


@pytest.fixture(autouse=True)
def _nothing_said_yet():
    errors.say_once.cache_clear()


def deep_png(array: np.ndarray) -> bytes:
    """A PNG file of 16 bits, uint16 (H, W, C), by the format's own chunks: Pillow cannot write colour so deep."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    height, width, channels = array.shape
    head = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def values(seed: int, *shape: int, below: int = 2**16, dtype="uint16") -> np.ndarray:
    return np.random.default_rng(seed).integers(0, below, shape).astype(dtype)


def load(path: Path, role: str = "train", **settings):
    """A split of images, with another beside the training split, so that nothing of it is held out."""
    if (path / "train.parquet").exists():
        if not (path / "test.parquet").exists():
            shutil.copy(path / "train.parquet", path / "test.parquet")
    elif not (path / "test").exists():
        save(path / "test" / "0.png", 999)
    return load_split(path, role, **settings)


def both(path: Path, **settings) -> np.ndarray:
    """The images of a training set as uint8 (N, H, W, C), which all routes must agree on."""
    found = [np.stack([as_array(i) for i in photos(load(path, **settings, **route))]) for route in ROUTES]
    assert np.array_equal(*found)
    return found[0]


def scaled(array: np.ndarray, low: float, high: float) -> np.ndarray:
    return ((array.astype(float) - low) / (high - low) * 255).round().clip(0, 255).astype(np.uint8)


# -- upright ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tif", "16.tif", "16.png"])
def test_images_stand_upright_as_exif_says(tmp_path, kind):
    suffix = kind.split(".")[-1]
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        file = tmp_path / "set" / "train" / f"{orientation}.{suffix}"
        file.parent.mkdir(parents=True, exist_ok=True)
        stored = pixels(orientation, 8, 6)
        image = Image.fromarray(stored)
        if kind == "16.tif":
            tags = [(0x0112, 3, 1, orientation, True)]
            tifffile.imwrite(file, stored.astype(np.uint16) * 257, photometric="rgb", extratags=tags)
        elif kind == "16.png":
            body = deep_png(stored.astype(np.uint16) * 257)
            block = exif.tobytes().removeprefix(b"Exif\0\0")
            chunk = struct.pack(">I", len(block)) + b"eXIf" + block + struct.pack(">I", zlib.crc32(b"eXIf" + block))
            file.write_bytes(body[:33] + chunk + body[33:])
        else:
            image.save(file, exif=exif, quality=100, lossless=True)
    for orientation in range(1, 9):
        upright = ImageOps.exif_transpose(Image.open(tmp_path / "set" / "train" / f"{orientation}.{suffix}"))
        if kind.startswith("16"):
            image = Image.fromarray(pixels(orientation, 8, 6))
            image.getexif()[0x0112] = orientation
            upright = ImageOps.exif_transpose(image)
        for route in ROUTES:
            images = load(tmp_path / "set", **route)
            assert images.size is None and images.ledger["turned_upright"] == 7  # two shapes
            found = as_array(images.photo(orientation - 1))
            assert np.array_equal(found, np.asarray(upright.convert("RGB"))), (kind, orientation)


def test_files_and_tables_stand_upright_as_datasets_reads_them(tmp_path, capsys):
    exif = Image.Exif()
    exif[0x0112] = 6
    stream = io.BytesIO()
    for i in range(2):
        (tmp_path / "files" / "train").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(i)).save(tmp_path / "files" / "train" / f"{i}.png", exif=exif)
    Image.fromarray(pixels(9)).save(stream, "png", exif=exif)
    cells = [dict(bytes=(tmp_path / "files" / "train" / f"{i}.png").read_bytes(), path=None) for i in range(2)]
    kinds = datasets.Features(image=datasets.Image())
    parquet(tmp_path / "table" / "train.parquet", kinds, image=cells)
    parquet(tmp_path / "table" / "test.parquet", kinds, image=[dict(bytes=stream.getvalue(), path=None)])
    [theirs, _] = datasets.Dataset.from_dict(dict(image=cells), features=kinds)["image"]
    for place in ("files", "table"):
        images = load(tmp_path / place)
        assert images.info()["img_size"] == [10, 12] and np.array_equal(as_array(images.images[0]), np.asarray(theirs))
    assert "2 turned upright by EXIF" in capsys.readouterr().out


def test_what_another_law_decoded_is_not_used(tmp_path, monkeypatch):
    for i in range(2):
        save(tmp_path / "train" / f"{i}.png", i)
    assert load(tmp_path).images is not None
    monkeypatch.setattr(decoding, "LAW", 0)
    monkeypatch.setattr(decoding, "decode_all", lambda *_: (_ for _ in ()).throw(UserError("decoded again")))
    with pytest.raises(UserError, match="decoded again"):
        load(tmp_path)


# -- depth ------------------------------------------------------------------------------------------------------------

DEEP = {  # file, values, and the range that their set must get
    "12 bits": ("tif", values(0, 4, 6, 5, below=4096), (0, 4095)),
    "dim": ("png", values(1, 4, 6, 5, below=251), (0, 255)),
    "16 bits": ("png", values(2, 4, 6, 5), (0, 65535)),
    "rgb png": ("png", values(3, 4, 6, 5, 3), (0, 65535)),
    "rgb tiff": ("tif", values(4, 4, 6, 5, 3, below=1024), (0, 1023)),
    "int32": ("tif", values(5, 4, 6, 5, below=256, dtype="int32"), (0, 255)),
    "int16": ("npy", values(6, 4, 6, 5, below=999, dtype="int16") - 400, None),
    "fractions": ("tif", np.random.default_rng(7).random((4, 6, 5)).astype(np.float32), (0, 1)),
    "to 255": ("tif", 250 * np.random.default_rng(8).random((4, 6, 5)).astype(np.float32), (0, 255)),
    "signed": ("npy", np.random.default_rng(9).normal(size=(4, 6, 5, 3)), None),
    "five bands": ("tif", values(10, 4, 6, 7, 5, below=5000), (0, 8191)),
    "planes": ("npy", values(11, 4, 3, 6, 5, below=4096), (0, 4095)),
}


def write(folder: Path, suffix: str, arrays: np.ndarray) -> None:
    folder.mkdir(parents=True)
    for i, array in enumerate(arrays):
        file = folder / f"{i}.{suffix}"
        if suffix == "npy":
            np.save(file, array)
        elif suffix == "png":
            file.write_bytes(deep_png(array if array.ndim == 3 else array[..., None]))
        elif array.ndim == 3:
            kind = "rgb" if array.shape[2] == 3 else "minisblack"
            tifffile.imwrite(file, array, photometric=kind, planarconfig="contig")
        else:
            Image.fromarray(array).save(file)


@pytest.mark.parametrize("kind", DEEP)
def test_deep_values_keep_their_contrast_by_one_range_of_the_set(tmp_path, kind, capsys):
    suffix, arrays, limits = DEEP[kind]
    limits = limits or (arrays.min(), arrays.max())
    # the extremes lie in different images: stretching each for itself would show
    arrays.reshape(-1)[[0, -1]] = limits[0], arrays.max()
    write(tmp_path / "set" / "train", suffix, arrays)
    expected = scaled(arrays, *limits)
    expected = expected.transpose(0, 2, 3, 1) if kind == "planes" else expected
    expected = expected[..., None] if expected.ndim == 3 else expected
    assert np.array_equal(both(tmp_path / "set"), expected)
    assert load(tmp_path / "set").info()["range"] == pytest.approx(list(limits))
    assert "(data.range), since the values of 4 images lie from" in capsys.readouterr().out
    grey = both(tmp_path / "set", in_chans=1) if expected.shape[-1] == 3 else None
    assert grey is None or grey.shape[-1] == 1


def test_the_report_split_has_the_range_of_the_training_split(tmp_path):
    write(tmp_path / "set" / "train", "tif", values(0, 3, 6, 5, below=4096))
    dim = values(1, 3, 6, 5, below=300)
    dim[0, 0, 0] = 5000  # beyond what was trained on
    write(tmp_path / "set" / "test", "tif", dim)
    train = load(tmp_path / "set")
    for route in ROUTES:
        report = load(tmp_path / "set", "report", range=list(train.range), **route)
        for image, array in zip(photos(report), dim, strict=True):
            assert np.array_equal(image[0].numpy(), scaled(array, 0, 4095))
    assert load(tmp_path / "set", "report", range=list(train.range)).ledger["clipped"] == dict(images=1, values=1)
    assert load(tmp_path / "set", "report").range == (0, 8191)  # alone it would have another
    for split in ("train", "test"):
        for i in range(3):
            (tmp_path / "set" / split / "ab"[i % 2]).mkdir(exist_ok=True)
            (tmp_path / "set" / split / f"{i}.tif").rename(tmp_path / "set" / split / "ab"[i % 2] / f"{i}.tif")
    asked = cli.EvalRequest(cli.parser("").parse_args(["--backbone", "pixels", "--data", str(tmp_path / "set")]))
    train, test = asked.images(asked.sources[0])
    assert train.range == test.range == (0, 4095)


def test_the_range_is_the_users_to_set(tmp_path, capsys):
    arrays = values(0, 3, 6, 5, below=4096)
    write(tmp_path / "set" / "train", "tif", arrays)
    assert np.array_equal(both(tmp_path / "set", range=[1000.0, 2000.0])[..., 0], scaled(arrays, 1000, 2000))
    outside = int(((arrays < 1000) | (arrays > 2000)).sum())
    assert f"; {outside:,} values in 3 images lie outside" in capsys.readouterr().out
    save(tmp_path / "plain" / "train" / "0.png", 0)
    assert load(tmp_path / "plain", range=[0.0, 9.0]).ledger["range"] is None
    assert "data.range is not used" in capsys.readouterr().out
    np.save(tmp_path / "set" / "train" / "9.npy", np.random.default_rng(0).random((6, 5)))
    with pytest.raises(UserError, match=r"fractions and whole numbers: set data.range=\[LOW, HIGH\]"):
        load(tmp_path / "set")


def test_a_deep_image_that_was_not_looked_at_is_not_guessed(tmp_path, monkeypatch):
    for i in range(8):
        save(tmp_path / "set" / "train" / f"{i}.png", pixels(i)[..., 0])
    save(tmp_path / "set" / "train" / "5.png", values(0, 12, 10))
    monkeypatch.setattr(decoding, "PROBE", 2)
    with pytest.raises(UserError, match=r"Image 5\.png holds uint16 values, unlike .* data.range"):
        load(tmp_path / "set")
    image = load(tmp_path / "set", cache_gb=0).photo
    with pytest.raises(UserError, match=r"Image 5\.png holds uint16"):
        image(5)


def pattern(rng: np.random.Generator, label: int) -> np.ndarray:
    """8 x 8 in [0, 1]: the left or the upper half is bright."""
    array = 0.2 + 0.1 * rng.random((8, 8))
    array[np.s_[:4] if label else np.s_[:, :4]] += 0.5
    return array


SIGNAL = {
    "8 bits": ("png", lambda a: Image.fromarray((a * 255).astype(np.uint8))),
    "float": ("tif", lambda a: Image.fromarray(a.astype(np.float32))),
    "int32": ("tif", lambda a: Image.fromarray((a * 255).astype(np.int32))),
    "dim": ("tif", lambda a: Image.fromarray((a * 250).astype(np.uint16))),
    "16 bits": ("tif", lambda a: Image.fromarray((a * 65535).astype(np.uint16))),
    "alpha": ("png", lambda a: Image.fromarray(np.dstack([np.zeros((8, 8, 3)), a * 255]).astype(np.uint8))),
}


@pytest.mark.parametrize("kind", SIGNAL)
def test_what_pixels_tell_apart_is_told_apart_in_any_storage(tmp_path, kind):
    suffix, make = SIGNAL[kind]
    rng = np.random.default_rng(0)
    for split, n in (("train", 30), ("test", 20)):
        for i in range(n):
            file = tmp_path / "set" / split / "ab"[i % 2] / f"{i}.{suffix}"
            file.parent.mkdir(parents=True, exist_ok=True)
            make(pattern(rng, i % 2)).save(file)
    asked = cli.EvalRequest(cli.parser("").parse_args(["--backbone", "pixels", "--data", str(tmp_path / "set")]))
    train, test = asked.images(asked.sources[0])
    near, far = (images.images.flatten(1).double() for images in (train, test))
    nearest = torch.cdist(far - near.mean(0), near - near.mean(0)).argmin(1)
    assert (train.labels[nearest] == test.labels).all()


# -- alpha and modes --------------------------------------------------------------------------------------------------


def test_alpha_is_laid_on_a_ground_or_kept(tmp_path):
    drawing = np.zeros((12, 10, 4), np.uint8)
    drawing[3:6, 2:7, 3] = 255
    drawing[7, :, 3] = 128
    white = Image.fromarray(np.full((12, 10, 4), 255, np.uint8))
    save(tmp_path / "set" / "train" / "0.png", drawing)
    save(tmp_path / "set" / "train" / "1.png", pixels(0, channels=4))
    colours = pixels(0, channels=4)
    theirs = Image.alpha_composite(white, Image.fromarray(drawing)).convert("RGB")
    assert np.abs(both(tmp_path / "set")[0].astype(int) - np.asarray(theirs)).max() <= 1
    assert np.array_equal(both(tmp_path / "set")[1], on_white(colours))
    dark = both(tmp_path / "set", background="black")
    assert dark[0].max() == 0 and np.array_equal(dark[1], (colours[..., :3] / 255 * colours[..., 3:]).round())
    assert np.array_equal(both(tmp_path / "set", in_chans=4)[1], colours)
    deep = np.concatenate([colours.astype(np.uint16) * 257, colours.astype(np.uint16)[..., :0]], 2)
    write(tmp_path / "deep" / "train", "png", np.stack([deep, deep[::-1]]))
    assert np.array_equal(both(tmp_path / "deep")[0], on_white(colours))


def test_modes_of_all_kinds(tmp_path):
    grey, colours = pixels(1)[..., 0], pixels(2)
    palette = Image.fromarray(colours).quantize(8)
    palette.info["transparency"] = 0
    clear = np.asarray(palette) == 0
    over = np.where(clear[..., None], 255, np.asarray(palette.convert("RGB")))
    faint = np.dstack([np.zeros_like(grey), grey])
    cmyk = Image.fromarray(colours).convert("CMYK")
    for name, image, suffix, settings, expected in (
        ("palette", palette, "png", dict(transparency=0), over),
        ("la", Image.fromarray(faint), "png", {}, 255 - grey[..., None]),
        ("cmyk", cmyk, "tif", {}, np.asarray(cmyk.convert("RGB"))),
        ("bits", Image.fromarray(grey > 127), "png", {}, ((grey > 127) * np.uint8(255))[..., None]),
    ):
        (tmp_path / name / "train").mkdir(parents=True)
        image.save(tmp_path / name / "train" / f"0.{suffix}", **settings)
        assert np.array_equal(both(tmp_path / name)[0], expected), name


def test_files_whose_first_picture_is_the_photo_are_no_pages(tmp_path):
    first, second = (Image.fromarray(pixels(i, 16, 16)) for i in range(2))
    (tmp_path / "train").mkdir()
    first.save(tmp_path / "train" / "0.jpg", "mpo", save_all=True, append_images=[second], quality=95)
    expected = np.asarray(Image.open(tmp_path / "train" / "0.jpg").convert("RGB"))
    assert np.array_equal(both(tmp_path)[0], expected)


def test_white_that_is_0_is_white_or_refused(tmp_path):
    """TIFF's WhiteIsZero, which some scanners of X-rays write."""
    stored = pixels(0, 8, 6)[..., 0]
    for name, values in {"8": stored, "16": stored.astype(np.uint16) * 257, "4x8": np.stack([stored] * 4, -1)}.items():
        folder = tmp_path / name / "train"
        folder.mkdir(parents=True)
        how = dict(photometric="miniswhite", planarconfig="contig" if values.ndim == 3 else None)
        tifffile.imwrite(folder / "a.tif", values, **how)
        tifffile.imwrite(folder / "b.tif", values[::-1], **how)
        if name == "8":
            found = sorted(photo[0].numpy().tolist() for photo in photos(load(tmp_path / name)))
            assert found == sorted((255 - image).tolist() for image in (values, values[::-1]))
        else:
            with pytest.raises(
                UserError, match=r"a.tif stores white as 0 .* in more than 8 bits or .*: store it with black"
            ):
                load(tmp_path / name)


def test_pages_are_refused_or_what_the_user_says(tmp_path):
    pages = values(0, 3, 6, 5, below=256, dtype="uint8")
    for kind, suffix in (("tiff", "tif"), ("gif", "gif")):
        folder = tmp_path / kind / "train"
        folder.mkdir(parents=True)
        for i in range(2):
            frames = [Image.fromarray(page // (i + 1)) for page in pages]
            frames[0].save(folder / f"{i}.{suffix}", save_all=True, append_images=frames[1:])
        for route in ROUTES:
            with pytest.raises(UserError, match=rf"Image 0\.{suffix} has 3 pages or frames: set data.pages=channels"):
                load(tmp_path / kind, **route)
    assert np.array_equal(both(tmp_path / "tiff", pages="channels")[0], pages.transpose(1, 2, 0))
    assert np.array_equal(both(tmp_path / "tiff", pages="first")[0][..., 0], pages[0])
    assert both(tmp_path / "gif", pages="first").shape[0] == 2
    stack = values(1, 2, 6, 5, below=4096)
    (tmp_path / "deep" / "train").mkdir(parents=True)
    tifffile.imwrite(tmp_path / "deep" / "train" / "0.tif", stack, photometric="minisblack")
    assert np.array_equal(both(tmp_path / "deep", pages="channels")[0], scaled(stack, 0, 4095).transpose(1, 2, 0))


# -- arrays -----------------------------------------------------------------------------------------------------------


def test_the_axes_of_arrays_are_told_apart_or_asked_for(tmp_path):
    def table(name: str, *shape: int, dtype: str = "uint8") -> tuple[Path, np.ndarray]:
        arrays = values(0, 3, *shape, below=256, dtype=dtype)
        return parquet(tmp_path / name / "train.parquet", image=[a.tolist() for a in arrays]).parent, arrays

    path, arrays = table("chw", 3, 12, 12)
    assert load(path).channels == 3 and np.array_equal(both(path), arrays.transpose(0, 2, 3, 1))
    path, arrays = table("hwc", 12, 12, 4)
    assert np.array_equal(both(path), arrays)
    path, arrays = table("bands", 5, 12, 11)
    assert np.array_equal(both(path), arrays.transpose(0, 2, 3, 1))
    path, arrays = table("either", 3, 12, 3)
    with pytest.raises(UserError, match="row 0 is 3 x 12 x 3, .* data.layout=hwc or data.layout=chw"):
        load(path)
    assert np.array_equal(both(path, layout="chw"), arrays.transpose(0, 2, 3, 1))
    assert np.array_equal(both(path, layout="hwc"), arrays)


def test_the_same_values_are_the_same_pixels_on_every_route(tmp_path):
    *arrays, other = values(0, 5, 3, 12, 10, below=4096)
    files, cells, lists = (tmp_path / name for name in ("files", "cells", "lists"))
    write(files / "train", "npy", arrays)
    kinds = datasets.Features(image=datasets.Array3D((3, 12, 10), "uint16"))
    parquet(lists / "train.parquet", kinds, image=list(arrays))
    stored = [dict(bytes=deep_png(a.transpose(1, 2, 0)), path=None) for a in (*arrays, other)]
    parquet(cells / "train.parquet", datasets.Features(image=datasets.Image()), image=stored[:4])
    parquet(cells / "test.parquet", datasets.Features(image=datasets.Image()), image=stored[4:])
    one, two, three = map(both, (files, cells, lists))
    assert np.array_equal(one, two) and np.array_equal(one, three)


def test_values_that_are_no_numbers_are_named(tmp_path):
    array = np.random.default_rng(0).random((6, 5))
    array[2, 2] = np.nan
    write(tmp_path / "set" / "train", "npy", np.stack([array, array]))
    with pytest.raises(UserError, match=r"Image 0\.npy holds values that are not finite numbers"):
        load(tmp_path / "set")


def test_a_set_that_shows_one_image_only_is_refused(tmp_path):
    for i in range(3):
        array = pixels(i, channels=4)
        array[..., 3] = 0
        save(tmp_path / "set" / "train" / f"{i}.png", array)
    for route in ROUTES:
        with pytest.raises(UserError, match=r"All 3 inspected images of set/train have the same pixels.*background"):
            load(tmp_path / "set", **route)
    save(tmp_path / "set" / "train" / "9.png", pixels(9))
    for route in ROUTES:
        assert len(load(tmp_path / "set", **route)) == 4


def test_the_range_is_checked():
    with pytest.raises(UserError, match=r"data.range must be two increasing numbers"):
        recipes.read("mae", ["data.range=[5, 5]"], "digits", lambda name: objectives.find(name).Config)


def test_fractions_that_are_no_bytes_keep_their_contrast():
    ranges = {1.0: 1.0, 1.02: 1.02, 30.0: 30.0, 65.0: 255.0, 255.0: 255.0, 300.0: 300.0}
    assert {high: decoding.choose_range("fractions", 0.0, high)[1] for high in ranges} == ranges
    assert decoding.choose_range("fractions", -0.5, 1.02) == (-0.5, 1.02)


def test_looking_at_a_set_keeps_no_file_open():
    """Of folders, more are looked at than some systems let a process open."""
    alive = weakref.WeakSet()

    class Header(SimpleNamespace):
        __hash__ = object.__hash__

    def read(i):
        alive.add(
            found := Header(channels=3, size=(8, 8), deep=None, form="PNG", mode="RGB", alpha=False, turned=False)
        )
        assert len(alive) < 4
        return found

    look = decoding.probe(read, 40, False, "photos")
    assert len(look.indices) == 40 and look.size == (8, 8) and look.channels == 3 and look.deep == []
    assert look.seen == {("PNG", "RGB", False, False): 40}
