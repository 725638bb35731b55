"""data.jpeg_draft: JPEGs decoded at 1/2, 1/4 or 1/8 of their sides where that enlarges no view."""

import dataclasses
import io
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from test_data import CPU, load, plan, save
from test_loop import TINY

from eval.measure import cli, features, fine_tuning
from ssl_vit import data, errors, objectives, pretrain, views
from ssl_vit import recipe as recipes
from ssl_vit.data import batches, decoding, pixels
from ssl_vit.data.pixels import Rules
from ssl_vit.errors import UserError
from ssl_vit.randomness import Draw

DRAFT = "data.jpeg_draft=true"
SPECS = {
    "mae": views.crop_flip((64, 64), 0.5),
    "bicubic": views.resampled(views.crop_flip((48, 64), 0.5, (0.3, 1.0)), "bicubic"),
    "dino": views.dino((64, 64), (32, 32), 2, 0.5),
    "none": views.none((64, 48)),
}


@pytest.fixture(autouse=True)
def _nothing_said_yet():
    errors.say_once.cache_clear()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Parts of two photographs, of several sizes, as JPEGs: train/ with two classes of six, test/ with two of each."""
    folder = tmp_path_factory.mktemp("photos") / "set"
    for label, photo in enumerate(load_sample_images().images):
        for i in range(8):
            part = photo[7 * i : 427 - 5 * i, 11 * i : 640 - 3 * i]
            save(folder / ("train" if i < 6 else "test") / f"class{label}" / f"{i}.jpg", part)
    return folder


def opened(file: Path | bytes, channels: int = 3) -> views.Photo:
    """An image as the decoding processes meet it."""
    return decoding.open_photo(lambda _: pixels.look("it", file if isinstance(file, bytes) else str(file), None, None),
                               Rules(channels), 0)  # fmt: skip


def encoded(array: np.ndarray, form: str = "JPEG", mode: str = "RGB", **options) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(array).convert(mode).save(stream, form, **options)
    return stream.getvalue()


def crops(images: data.ImageSet, spec: views.ViewSpec, workers: int = 0) -> dict[str, torch.Tensor]:
    [chunk] = data.chunks(images, spec, plan(len(images), len(images), 1), 3, CPU, workers)
    return {name: torch.cat([piece[name] for piece in chunk.crops]) for name in spec}


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """The mean absolute difference."""
    assert one.shape == other.shape
    return (one.float() - other.float()).abs().mean().item()


# -- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPECS)
def test_views_of_photographs_are_close_to_those_of_whole_decoding(folder, name):
    whole, draft = load(folder), load(folder, jpeg_draft=True)
    assert whole.opened is None and whole.images is draft.images is None
    one, other = (crops(images, SPECS[name]) for images in (whole, draft))
    assert one.keys() == other.keys()
    for view in one:
        assert 0 < apart(one[view], other[view]) < min(4, 0.5 * apart(one[view], one[view].roll(1, -1))), view


@pytest.mark.parametrize("crop_mode", views.CROP_MODES)
def test_evaluation_views_of_photographs_are_close_to_those_of_whole_decoding(folder, crop_mode):
    view = views.Evaluation((64, 64), 0.875, crop_mode=crop_mode)
    one, other = (
        torch.cat(list(data.evaluation_views(load(folder, jpeg_draft=draft), view, CPU))) for draft in (False, True)
    )
    assert 0 < apart(one, other) < min(3 / 255, 0.4 * apart(one, one.roll(1, -1)))


def test_nothing_changes_where_a_photo_is_less_than_twice_as_large(folder):
    spec, view = views.crop_flip((320, 320), 0.5), views.Evaluation((224, 224))
    whole, draft = load(folder), load(folder, jpeg_draft=True)
    assert torch.equal(crops(whole, spec)["image"], crops(draft, spec)["image"])
    one, other = (torch.cat(list(data.evaluation_views(images, view, CPU))) for images in (whole, draft))
    assert torch.equal(one, other)


@pytest.mark.parametrize("mode, channels", [("RGB", 3), ("L", 3), ("L", 1), ("CMYK", 3), ("RGB", 1), ("RGB", 4)])
@pytest.mark.parametrize("options", [dict(), dict(progressive=True), dict(subsampling=0)])
def test_jpegs_of_every_kind_are_decoded_smaller(mode, channels, options):
    """Next to the means of squares of the whole photo."""
    array = load_sample_images().images[0][:424, :636]
    file = encoded(array, mode=mode, quality=95, **options)
    whole = opened(file, channels).decode(1)
    assert whole.shape == (channels, 424, 636) == (channels, *opened(file, channels).size)
    for n in (2, 4, 8):
        found = opened(file, channels).decode(n)
        assert found.shape == (channels, math.ceil(424 / n), math.ceil(636 / n)) and found.dtype == torch.uint8
        height, width = 424 // n, 636 // n
        means = whole[:, : height * n, : width * n].float().unflatten(1, (height, n)).unflatten(3, (width, n))
        assert apart(found[:, :height, :width], means.mean((2, 4))) < 1.5, n


def test_the_photo_of_a_phone_with_previews_is_decoded_smaller():
    array = load_sample_images().images[0]
    file = encoded(array, "MPO", save_all=True, append_images=[Image.fromarray(array[:64, :64])])
    assert Image.open(io.BytesIO(file)).format == "MPO"
    assert opened(file).decode(4).shape == (3, 107, 160)


# -- the same part of the picture -------------------------------------------------------------------------------------


def ramps(height: int, width: int) -> np.ndarray:
    """Red grows with x and green with y, from 0 to 255."""
    y, x = np.mgrid[:height, :width] + 0.5
    return np.stack([x / width * 255, y / height * 255, np.full_like(x, 128)], -1).round().astype(np.uint8)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(800, 1200), (803, 1195)])
def test_a_box_is_the_same_part_of_the_picture_however_it_was_turned(orientation, size):
    """By the middle and the slope of the ramps in each view."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = encoded(ramps(*size), quality=100, subsampling=0, exif=exif)
    whole, draw = opened(file).decode(1), Draw(0, 0, torch.arange(8))
    assert opened(file).size == tuple(whole.shape[-2:]) == (size if orientation < 5 else size[::-1])
    reductions = set()
    for spec in (views.crop_flip((128, 160), 0.5, (0.1, 1.0)), {"small": views.View((32, 32), 2, scale=(0.3, 1.0))}):
        crop, [name] = views.crop_photos(spec, draw), spec
        for row in range(8):
            photo, asked = opened(file), []
            watched = dataclasses.replace(photo, decode=lambda n, of=photo.decode, to=asked: (to.append(n), of(n))[1])
            found, expected = (crop(row, shown)[name].float() for shown in (watched, whole))
            [n] = asked
            reductions.add(n)
            for seen in (lambda v: v.mean((-2, -1)), lambda v: v[..., -1].mean(-1) - v[..., 0].mean(-1)):
                off = ((seen(found) - seen(expected))[:, :2].abs() / 255 * torch.tensor(size[::-1])).max()
                # in pixels of the whole photo: both edges are rounded, and a side that n does not divide is rounded up
                assert off < n * (1 if size == (800, 1200) else 2) + 4, (name, row, n)  # 4: about one level
    assert reductions == {2, 4, 8}


def test_boxes_in_fewer_pixels_are_never_smaller_than_the_view():
    rng = np.random.default_rng(0)
    for _ in range(2000):
        size = tuple(rng.integers(40, 300, 2).tolist())
        box = [int(rng.integers(0, side)) for side in size]
        box += [int(rng.integers(1, side - start + 1)) for start, side in zip(box, size, strict=True)]
        view = tuple(rng.integers(1, 40, 2).tolist())
        n = views.reduction([(box[2:], view)])
        assert n == max(
            k for k in (1, 2, 4, 8) if k == 1 or all(b / k >= v for b, v in zip(box[2:], view, strict=True))
        )
        reduced = torch.empty(1, *(math.ceil(side / n) for side in size))
        found = views._in_pixels(box, size, reduced)
        if n == 1:
            assert [*found] == box
        for start, length, side in zip(found[:2], found[2:], reduced.shape[1:], strict=True):
            assert 0 <= start and start + length <= side
        assert n == 1 or all(length >= v for length, v in zip(found[2:], view, strict=True))
        edges = zip((*found[:2], found[0] + found[2], found[1] + found[3]),
                    (*box[:2], box[0] + box[2], box[1] + box[3]), strict=True)  # fmt: skip
        # half a pixel by rounding, and less than one at a side that n does not divide
        assert all(abs(edge - exact / n) < 1.5 for edge, exact in edges)


# -- what it does not touch -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["png", "webp", "tif", "bmp", "npy"])
def test_other_formats_are_decoded_whole(tmp_path, capsys, form):
    for i in range(5):
        array = load_sample_images().images[i % 2][: 300 - 10 * i]
        file = tmp_path / "set" / ("test" if i > 3 else "train") / f"{i}.{form}"
        file.parent.mkdir(parents=True, exist_ok=True)
        np.save(file, array) if form == "npy" else Image.fromarray(array).save(file)
    whole, draft = load(tmp_path / "set"), load(tmp_path / "set", jpeg_draft=True)
    assert torch.equal(crops(whole, SPECS["mae"])["image"], crops(draft, SPECS["mae"])["image"])
    assert opened(tmp_path / "set" / "train" / f"0.{form}").decode(8).shape == (3, 300, 640)
    assert "data.jpeg_draft is not used: the inspected images of set/train are no JPEGs" in capsys.readouterr().out


def test_the_training_images_are_refused_where_they_are_kept_decoded(tmp_path):
    for i in range(4):
        for split in ("train", "test"):
            save(tmp_path / "set" / split / f"{i}.jpg", 10 * i + (split == "test"))
    refusal = r"decoded once and kept: leave it out, or set data.cache_gb=0"
    with pytest.raises(UserError, match=f"images of set .train. are {refusal}"):
        load(tmp_path / "set", jpeg_draft=True)
    with pytest.raises(UserError, match=f"images of digits .train. are {refusal}"):
        data.load(recipes.Data(jpeg_draft=True), "train")
    assert load(tmp_path / "set", jpeg_draft=True, cache_gb=0).opened is not None
    assert load(tmp_path / "set", "report", jpeg_draft=True).images is not None  # it may have one size alone


# -- what a run is ----------------------------------------------------------------------------------------------------


def test_the_choice_is_part_of_a_run_and_of_its_images(folder):
    plain, draft = (objectives.read_recipe("mae", [*TINY, *more], str(folder)) for more in ([], [DRAFT]))
    assert plain.run_name() != draft.run_name() and not plain.data.jpeg_draft
    assert recipes.differences(plain.as_dict(), draft.as_dict()) == ["data.jpeg_draft"]
    for role in ("train", "report"):
        one, other = load(folder, role), load(folder, role, jpeg_draft=True)
        assert one.fingerprint != other.fingerprint == load(folder, role, jpeg_draft=True).fingerprint
        assert one.info() == other.info()


def test_parts_and_workers_decode_alike(folder):
    images = load(folder, jpeg_draft=True, skip_broken=True)
    alone, helped = (crops(images, SPECS["dino"], workers) for workers in (0, 1))
    assert all(torch.equal(alone[name], helped[name]) for name in alone)
    view, chosen = views.Evaluation((64, 64)), torch.tensor([5, 0, 7])
    [of_part] = data.evaluation_views(images.part(chosen), view, CPU)
    [of_all] = data.evaluation_views(images, view, CPU, chosen)
    assert torch.equal(of_part, of_all)
    pickle.loads(pickle.dumps(batches._Whole(images.opened, view)))  # as the start method spawn does


def test_a_damaged_photo_is_named_with_the_remedy(folder):
    file = folder / "train" / "class0" / "0.jpg"
    half = opened(file.read_bytes()[:5000])  # whose header is intact
    for read in (lambda: half.decode(4), lambda: opened(b"\xff\xd8\xff")):
        with pytest.raises(UserError, match=r"Image it cannot be decoded .* or pass data.skip_broken=true"):
            read()


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "draft"
    settings = [*TINY, DRAFT, "data.img_size=32", "backbone.patch_size=8", "train.steps=1", "runtime.num_workers=0"]
    assert pretrain.pretrain(objectives.read_recipe("mae", settings, str(folder)), path) == 0
    return path


def test_a_run_goes_on_only_as_it_began(run, folder):
    settings = [*TINY, "data.img_size=32", "backbone.patch_size=8", "train.steps=1", "runtime.num_workers=0"]
    with pytest.raises(UserError, match=r"other settings \(data.jpeg_draft, images.fingerprint\)"):
        pretrain.pretrain(objectives.read_recipe("mae", settings, str(folder)), run)


def test_evaluators_decode_in_full(run, folder):
    """Whatever the run did, so that all backbones are judged on the same pixels."""
    request = cli.EvalRequest(cli.parser("").parse_args(["--backbone", str(run), "--threads", "1"]))
    [source] = request.sources
    assert source.settings["data"]["jpeg_draft"] and not features.data_of(source.settings).jpeg_draft
    for role, images in zip(("train", "report"), request.images(source), strict=True):
        whole = load(folder, role)
        assert images.opened is None and images.fingerprint == whole.fingerprint
        assert torch.equal(images.photo(1), whole.photo(1))
    with pytest.raises(UserError, match=r"data.jpeg_draft cannot be set here: evaluators decode photos in full"):
        fine_tuning.parse(["--backbone", str(run), DRAFT])
