"""Where images come from: layouts, formats, splits, the cache, and the same views from memory and from workers."""

import gc
import io
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from test_loop import environment

from eval.measure import cli
from ssl_vit import data, errors, hub, objectives, views
from ssl_vit import recipe as recipes
from ssl_vit.data import batches, copies, decoding, image_set, sources
from ssl_vit.data import pixels as pixels_of
from ssl_vit.errors import UserError
from ssl_vit.randomness import Order

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _nothing_said_yet():
    errors.say_once.cache_clear()


def pixels(seed: int, height: int = 12, width: int = 10, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def save(path: Path, array: np.ndarray | int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(array) if isinstance(array, int) else array).save(path)
    return path


def png(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "png")
    return stream.getvalue()


@pytest.fixture
def folder(tmp_path):
    """train: two classes of eight images, 12 x 10; test: three of each."""
    for label, animal in enumerate(("cat", "dog")):
        for i in range(8):
            save(tmp_path / "pets" / "train" / animal / f"{i}.png", 100 * label + i)
        for i in range(3):
            save(tmp_path / "pets" / "test" / animal / f"{i}.png", 1000 + 100 * label + i)
    return tmp_path / "pets"


def parquet(file: Path, features: datasets.Features | None = None, **columns) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(columns, features=features).to_parquet(str(file))
    return file


def load(path, role: str = "train", classes=None, **settings) -> data.ImageSet:
    return data.load(recipes.Data(name=str(path), **settings), role, classes)


def photos(images: data.ImageSet) -> list[torch.Tensor]:
    return [images.photo(i) for i in range(len(images))] if images.images is None else list(images.images)


def on_white(array: np.ndarray) -> np.ndarray:
    """RGBA laid on white, in fractions."""
    colours, alpha = array[..., :3] / 255, array[..., 3:] / 255
    return ((colours * alpha + 1 - alpha) * 255).round().astype(np.uint8)


def as_array(image: torch.Tensor) -> np.ndarray:
    return image.permute(1, 2, 0).numpy()


# -- names and layouts ------------------------------------------------------------------------------------------------


def test_digits_hold_out_a_fixed_stratified_360():
    train, report = (data.load(recipes.Data(), role) for role in ("train", "report"))
    assert (len(train), len(report), report.split) == (1437, 360, "the fixed 360")
    assert report.labels.bincount().tolist() == [36, 36, 35, 37, 36, 37, 36, 36, 35, 36]
    both = torch.cat([train.images, report.images]).flatten(1)
    assert len(both.unique(dim=0)) == 1797
    assert train.info() | dict(mean=0, std=0) == dict(img_size=8, in_chans=1, mean=0, std=0, hflip=False)
    assert torch.equal(data.load(recipes.Data(in_chans=3), "train").images, train.images.expand(-1, 3, -1, -1))


@pytest.mark.parametrize(
    "files, classes, report",
    [
        (["train/cat/{i}.png", "train/dog/{i}.png", "test/cat/{i}.png", "test/dog/{i}.png"], ["cat", "dog"], "test"),
        (["train/{i}.png", "val/{i}.png"], None, "val"),
        (["train/cat/a/{i}.png", "train/dog/b/c/{i}.png", "validation/{i}.png"], ["cat", "dog"], "validation"),
        (["cat/{i}.png", "dog/deep/{i}.png"], ["cat", "dog"], None),
        (["test/{i}.png", "dog/{i}.png", "cat/{i}.png"], ["cat", "dog", "test"], None),  # a class called test
        (["{i}.png"], None, None),
        (["a/b/c/{i}.png"], None, None),
        (["{i}.png", "cat/{i}.png", "dog/{i}.png"], None, None),  # not every image has a label
        (["train/cat/{i}.png", "train/dog/{i}.png", "test/cat/{i}.png"], ["cat", "dog"], "test"),
    ],
)
def test_folder_layouts(tmp_path, files, classes, report):
    for k, file in enumerate(files):
        for i in range(20):
            save(tmp_path / "set" / file.format(i=i), 100 * k + i)
    save(tmp_path / "set" / ".thumbnails" / "0.png", 0)
    (tmp_path / "set" / "README.md").write_text("Not an image.")
    train = load(tmp_path / "set")
    assert (train.classes, train.labels is None) == (classes, classes is None)
    if classes is None and report is None:  # nothing could be reported on a tenth of them
        assert len(train) == 20 * len(files) and train.split == "train"
        return
    test = load(tmp_path / "set", "report", train.classes)
    assert test.split == (report or "train (hashed tenth)") and train.name == "set"
    assert len(train) + len(test) == 20 * len(files)
    assert len(torch.cat([train.images, test.images]).flatten(1).unique(dim=0)) == 20 * len(files)


def test_split_folders_in_any_case(tmp_path):
    for split in ("Train", "VAL"):
        for animal in ("Cat", "dog"):
            save(tmp_path / "set" / split / animal / "0.png", len(split + animal) + (animal == "dog") * 50)
    train = load(tmp_path / "set")
    assert (train.split, len(train), train.classes) == ("Train", 2, ["Cat", "dog"])
    assert load(tmp_path / "set", "report", train.classes).split == "VAL"


def test_what_lies_beside_the_splits_is_left_out_aloud(folder, capsys):
    before = load(folder)
    for i in range(3):
        save(folder / "unlabeled" / f"{i}.png", 500 + i)
    after = load(folder)
    load(folder, "report", after.classes)
    assert after.fingerprint == before.fingerprint
    assert capsys.readouterr().out.count("Left out: 3 images in unlabeled/, beside train/ and test/.\n") == 1
    save(folder / "cover.png", 9)
    load(folder)
    assert "Left out: 4 images in unlabeled/ and pets/ itself, beside train/ and test/.\n" in capsys.readouterr().out
    for i in range(9):
        save(folder / f"more{i}" / "deep" / "0.png", i)
    load(folder)
    said = "Left out: 13 images in more0/, more1/, more2/, more3/, more4/ and others, beside train/ and test/.\n"
    assert said in capsys.readouterr().out


def test_any_top_folder_may_be_a_split_that_is_named(folder, capsys):
    for i in range(3):
        save(folder / "unlabeled" / f"{i}.png", 500 + i)
    with pytest.raises(UserError, match="no split 'unlabelled'; its splits are .*unlabeled"):
        load(folder, train_split="unlabelled")
    capsys.readouterr()
    train = load(folder, train_split="unlabeled")
    assert (train.split, len(train), train.labels) == ("unlabeled", 3, None)
    assert np.array_equal(as_array(train.images[2]), pixels(502))
    report = load(folder, "report", train_split="unlabeled")
    assert (report.split, report.classes) == ("test", ["cat", "dog"])
    assert load(folder, "report", report_split="unlabeled").split == "unlabeled"
    assert "Left out" not in capsys.readouterr().out
    (folder / "train").rename(folder / "labelled")  # then it is the one named that makes splits of folders
    assert load(folder, train_split="labelled").classes == ["cat", "dog"]
    assert load(folder, "report", train_split="labelled").split == "test"


def test_labels_belong_to_their_images(folder):
    for settings in (dict(), dict(cache_gb=0)):
        train = load(folder, **settings)
        expected = [pixels(100 * label + i) for label in (0, 1) for i in range(8)]
        assert train.labels.tolist() == [0] * 8 + [1] * 8
        for image, wanted in zip(photos(train), expected, strict=True):
            assert np.array_equal(as_array(image), wanted)


def test_the_hashed_tenth_stays_when_files_are_added_and_is_said_once(tmp_path, capsys):
    for i in range(60):
        save(tmp_path / "ab"[i % 2] / f"{i}.png", i)
    before = {image.numpy().tobytes() for image in load(tmp_path, "report").images}
    for i in range(60, 120):
        save(tmp_path / "ab"[i % 2] / f"{i}.png", i)
    train, report = load(tmp_path), load(tmp_path, "report")
    load(tmp_path)
    after = {image.numpy().tobytes() for image in report.images}
    assert before and before < after and not after & {image.numpy().tobytes() for image in train.images}
    said = capsys.readouterr().out
    assert said.count("a hashed tenth (") == 1 and f"({len(report)} images)" in said


def test_parquet_file_and_folder(tmp_path):
    class_label = datasets.Features(img=datasets.Image(), label=datasets.ClassLabel(names=["cat", "dog"]))
    for split, count in (("train", 6), ("test", 4)):
        parquet(
            tmp_path / "set" / f"{split}-00000-of-00001.parquet",
            class_label,
            img=[dict(bytes=png(pixels(i + 50 * (split == "test"))), path=None) for i in range(count)],
            label=[i % 2 for i in range(count)],
        )
    train = load(tmp_path / "set")
    test = load(tmp_path / "set", "report", train.classes)
    assert (len(train), len(test), test.split, train.classes) == (6, 4, "test", ["cat", "dog"])
    assert train.labels.tolist() == [0, 1, 0, 1, 0, 1] and np.array_equal(as_array(train.images[5]), pixels(5))
    # a column of bytes; a column called key; labels that are words; one file
    words = dict(picture=[png(pixels(i)) for i in range(30)], key=["x"] * 30, label=["b", "a", "c"] * 10)
    alone = load(parquet(tmp_path / "one.parquet", **words), image_column="picture")
    assert len(alone) + len(load(tmp_path / "one.parquet", "report", image_column="picture")) == 30
    assert alone.classes == ["a", "b", "c"]


def test_other_numbers_of_channels_are_arrays(tmp_path):
    features = datasets.Features(image=datasets.Array3D((6, 6, 5), "uint8"))
    arrays = [pixels(i, 6, 6, 5) for i in range(30)]
    file = parquet(tmp_path / "train.parquet", features, image=arrays)
    for settings in (dict(), dict(cache_gb=0)):
        train = load(file, **settings)
        assert train.channels == 5 and train.info()["img_size"] == 6 and len(train.info()["mean"]) == 5
        assert {image.permute(1, 2, 0).numpy().tobytes() for image in photos(train)} == {a.tobytes() for a in arrays}


def test_known_names_are_fetched_from_the_hub(monkeypatch):
    features = datasets.Features(img=datasets.Image(), fine_label=datasets.ClassLabel(names=["a", "b"]))
    images = [dict(bytes=png(pixels(i)), path=None) for i in range(6)]
    split = datasets.Dataset.from_dict(dict(img=images[:4], fine_label=[0, 1, 0, 1]), features=features)
    unlabelled = datasets.Dataset.from_dict(dict(img=images[4:], fine_label=[-1, -1]), features=features)
    asked = []
    splits = dict(train=split, test=unlabelled)
    monkeypatch.setattr(sources.datasets, "load_dataset", lambda hub_id, name: asked.append(hub_id) or splits)
    train, test = load("cifar100"), load("cifar100", "report")
    assert asked == ["uoft-cs/cifar100"] * 2 and train.labels.tolist() == [0, 1, 0, 1] and test.labels is None
    assert train.info()["hflip"] is True
    reports = {name: hub[3] for name, hub in data.HUB.items()}
    assert reports["cifar10"] == "test" and reports["tiny-imagenet"] == "valid"
    assert reports["imagenet-1k"] == "validation"


def test_a_hub_id_is_known_as_its_short_name_is(monkeypatch, capsys):
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["a", "b"]))

    def rows(labels: list[int]) -> datasets.Dataset:
        images = [dict(bytes=png(pixels(10 * len(labels) + i)), path=None) for i in range(len(labels))]
        return datasets.Dataset.from_dict(dict(image=images, label=labels), features=features)

    # of its two labelled splits, the one that the name is known for
    splits = dict(train=rows([0, 1]), test=rows([0, 1, 1]), validation=rows([0, 1, 1, 0]))
    monkeypatch.setattr(sources.datasets, "load_dataset", lambda hub_id, name: splits)
    for name in ("imagenet-1k", "ILSVRC/imagenet-1k"):
        assert (load(name, "report").split, len(load(name, "report"))) == ("validation", 4)
    assert load("somebody/imagenet-1k", "report").split == "test" and "no labels" not in capsys.readouterr().out


CONFIGURATIONS = """---
configs:
- config_name: large
  data_files:
  - {split: train, path: large/train.parquet}
  - {split: test, path: large/test.parquet}
- config_name: small
  data_files:
  - {split: train, path: small/train.parquet}
  - {split: test, path: small/test.parquet}
---
"""


def test_one_of_several_configurations(tmp_path):
    for folder, count, side in (("large", 4, 12), ("small", 6, 8)):
        for split in ("train", "test"):
            start = 50 * (split == "test")
            images = [dict(bytes=png(pixels(start + i, side, side)), path=None) for i in range(count)]
            features = datasets.Features(image=datasets.Image(), label=datasets.Value("int64"))
            parquet(tmp_path / "set" / folder / f"{split}.parquet", features, image=images, label=[0, 1] * (count // 2))
    (tmp_path / "set" / "README.md").write_text(CONFIGURATIONS)
    for asked, said in (({}, "several configurations"), (dict(config="tiny"), "no configuration 'tiny'")):
        with pytest.raises(UserError, match=f"{said}; there are large, small: .*data.config=NAME"):
            load(tmp_path / "set", **asked)
    small, large = (load(tmp_path / "set", config=name) for name in ("small", "large"))
    assert (len(small), small.size, len(large), large.size) == (6, (8, 8), 4, (12, 12))
    assert (small.name, large.name) == ("set-small", "set-large")  # their rows are of different tests
    assert small.fingerprint != large.fingerprint
    save(tmp_path / "photos" / "0.png", 0)
    with pytest.raises(UserError, match="photos has no configurations: leave data.config out"):
        load(tmp_path / "photos", config="small")


@pytest.mark.parametrize(
    "reason",
    [
        "Config name is missing.\nPlease pick one among the available configs: ['a', 'b c']\nExample of usage:\n\t`x`",
        "There are multiple 'o/n' configurations in the cache: a, b c\nPlease specify which configuration to reload",
        "Couldn't find cache for o/n for config 'x'\nAvailable configs in the cache: ['a', 'b c']",
    ],
)
def test_a_hub_set_with_several_configurations(monkeypatch, reason):
    asked = []

    def refuse(*arguments):
        asked.append(arguments)
        raise ValueError(reason)

    monkeypatch.setattr(sources.datasets, "load_dataset", refuse)
    for config, said in ((None, "has several configurations"), ("x", "has no configuration 'x'")):
        with pytest.raises(UserError) as error:
            load("owner/name", config=config)
        assert str(error.value) == f"owner/name {said}; there are a, b c: choose one with data.config=NAME."
    assert asked == [("owner/name", None), ("owner/name", "x")]


def test_the_configuration_is_a_setting_of_the_run():
    def read(*settings: str, recipe: str = "mae") -> recipes.Recipe:
        return recipes.read(recipe, list(settings), "owner/name", lambda name: objectives.find(name).Config)

    plain, other = read(), read("data.config=small")
    assert plain.run_name() != other.run_name()
    assert recipes.differences(plain.as_dict(), other.as_dict()) == ["data.config"]
    older = plain.as_dict()
    del older["data"]["config"]  # a run's recipe.yaml from before there was such a setting
    assert recipes.differences(older, plain.as_dict()) == []
    assert recipes.differences(older, other.as_dict()) == ["data.config"]
    assert recipes.Data(**older["data"]) == plain.data


def test_an_unreachable_hub_is_not_waited_for(monkeypatch):
    asked = []

    def refuse(*address, **__):
        asked.append(address)
        raise OSError

    monkeypatch.setattr(hub.huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(sources.datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub.urllib.request, "getproxies", dict)
    monkeypatch.setattr(hub.socket, "create_connection", refuse)
    with pytest.raises(UserError, match="--data PATH"):
        load("nobody/nothing")
    assert len(asked) == 1 and sources.datasets.config.HF_HUB_OFFLINE  # its client does not try again and again


def test_twenty_thousand_files_are_listed_without_opening_them(tmp_path, monkeypatch):
    """And the file system is asked for the size and time of each once, as the folders are read."""
    images = [png(pixels(i)) for i in range(7)]
    for c in range(20):
        (tmp_path / "set" / "train" / f"class{c:02d}").mkdir(parents=True)
        for i in range(1000):  # what follows an image's end is not read
            content = images[i % 7] + b"%06d" % (1000 * c + i)
            (tmp_path / "set" / "train" / f"class{c:02d}" / f"{i}.png").write_bytes(content)
    opened = []
    real = Image.open
    monkeypatch.setattr(pixels_of.Image, "open", lambda file: opened.append(file) or real(file))
    looked, real_stat = [], os.stat
    monkeypatch.setattr(os, "stat", lambda path, **options: looked.append(str(path)) or real_stat(path, **options))
    images = load(tmp_path / "set", cache_gb=0)
    assert len(images) > 17_500 and len(images.classes) == 20 and len(opened) < 270
    assert sum(path.endswith(".png") for path in looked) < 600  # those that are opened
    monkeypatch.setattr(copies, "_end", pytest.fail)  # which of them are copies is remembered
    load(tmp_path / "set", cache_gb=0)


# -- pixels -----------------------------------------------------------------------------------------------------------


def test_image_formats(tmp_path):
    colours, grey = pixels(0), pixels(1)[..., 0]
    deep = np.random.default_rng(2).integers(0, 2**16, (12, 10)).astype(np.uint16)
    turned = Image.Exif()
    turned[0x0112] = 6  # asks viewers to turn the image clockwise
    files = {
        "rgb": (Image.fromarray(colours), None, colours),
        "rgba as rgb": (Image.fromarray(pixels(3, channels=4)), None, on_white(pixels(3, channels=4))),
        "rgba": (Image.fromarray(pixels(3, channels=4)), 4, pixels(3, channels=4)),
        "grey": (Image.fromarray(grey), None, grey[..., None]),
        "grey as rgb": (Image.fromarray(grey), 3, np.stack([grey] * 3, -1)),
        "16 bit": (Image.fromarray(deep), None, (deep / 257).round().astype(np.uint8)[..., None]),
        "16 bit as rgb": (Image.fromarray(deep), 3, np.stack([(deep / 257).round().astype(np.uint8)] * 3, -1)),
        "black and white": (Image.fromarray(grey > 127), None, ((grey > 127) * 255).astype(np.uint8)[..., None]),
    }
    palette = Image.fromarray(colours).quantize(16)
    files["palette"] = (palette, None, np.asarray(palette.convert("RGB")))
    for name, (image, channels, expected) in files.items():
        (tmp_path / name / "train").mkdir(parents=True)
        image.save(tmp_path / name / "train" / "0.png", exif=turned)
        for settings in (dict(), dict(cache_gb=0)):
            found = load(tmp_path / name, in_chans=channels, **settings)
            assert np.array_equal(as_array(photos(found)[0]), np.rot90(expected, -1)), name
            assert found.info()["img_size"] == [10, 12]
    (tmp_path / "cmyk" / "train").mkdir(parents=True)
    Image.fromarray(colours).convert("CMYK").save(tmp_path / "cmyk" / "train" / "0.jpg", quality=100)
    assert load(tmp_path / "cmyk").images.shape == (1, 3, 12, 10)


def test_grey_images_among_colours_become_colours(tmp_path):
    save(tmp_path / "0.png", pixels(0)[..., 0])
    save(tmp_path / "1.png", pixels(1)[..., 0].astype(np.uint16) * 257)
    for i in range(2, 5):
        save(tmp_path / f"{i}.png", i)
    images = load(tmp_path)
    assert images.channels == 3 and torch.equal(images.images[0, 0], images.images[0, 2])
    assert np.array_equal(images.images[1, 1].numpy(), pixels(1)[..., 0])


def test_facts_are_exact(tmp_path):
    arrays = np.stack([pixels(i) // (i + 1) for i in range(9)])
    for i, array in enumerate(arrays):
        save(tmp_path / "train" / f"{i}.png", array)
    facts = load(tmp_path).info()
    exact = arrays.astype(np.float64) / 255
    assert facts["mean"] == [round(m, 4) for m in exact.mean((0, 1, 2))]
    assert facts["std"] == [round(s, 4) for s in exact.std((0, 1, 2))]
    assert (facts["img_size"], facts["in_chans"], facts["hflip"]) == ([12, 10], 3, True)
    many = torch.from_numpy(pixels(0, 3000, 1500)).permute(2, 0, 1)[None].repeat(3, 1, 1, 1)  # more than one part
    mean, std = image_set._mean_std(many)
    exact = many[0].double() / 255
    assert mean == [round(m, 4) for m in exact.mean((1, 2)).tolist()]
    assert std == [round(s, 4) for s in exact.std((1, 2), correction=0).tolist()]


# -- from memory and from workers -------------------------------------------------------------------------------------


def plan(count: int, batch: int, steps: int = 3):
    order = Order(0, count, batch)
    for step in range(steps):
        yield step, np.arange(batch), order.indices(step, np.arange(batch))


SPECS = {
    "crop+flip": views.crop_flip((8, 8), 0.5),
    "dino": views.dino((8, 8), (6, 6), 2, 0.5, blur=False),
    "none": views.none((8, 6)),
}


@pytest.mark.parametrize("name", SPECS)
def test_streamed_views_are_the_cached_ones_up_to_rounding(folder, name):
    spec = SPECS[name]
    cached, streamed = load(folder), load(folder, cache_gb=0)
    assert cached.images is not None and streamed.images is None
    one, other = (list(data.chunks(s, spec, plan(16, 12), 5, CPU, 0)) for s in (cached, streamed))
    assert len(one) == len(other) == 3
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a.indices, b.indices) and torch.equal(a.draw.rows, b.draw.rows)
        assert a.draw.step == b.draw.step
        for key, view in a.views(cached, spec).items():
            found = b.views(streamed, spec)[key]
            assert found.shape == view.shape
            # the workers round to 1/255 in both directions of the resize; colours stretch that
            assert (found - view).abs().max() < (0.04 if name == "dino" else 1.01 / 255)


@pytest.mark.parametrize("piece", [batches.PIECE, 5, 4])
def test_parts_of_a_chunk_have_its_views(folder, monkeypatch, piece):
    """Also where they begin and end inside of the pieces that decoding processes hand over."""
    monkeypatch.setattr(batches, "PIECE", piece)
    spec = SPECS["dino"]
    for images in (load(folder), load(folder, cache_gb=0)):
        [chunk] = data.chunks(images, spec, plan(16, 12, 1), 5, CPU, 0)
        whole = chunk.views(images, spec)
        parts = [chunk.part(a, b) for a, b in ((0, 5), (5, 6), (6, 12))]
        assert [len(p) for p in parts] == [5, 1, 6]
        assert torch.equal(torch.cat([p.indices for p in parts]), chunk.indices)
        for key, view in whole.items():
            found = torch.cat([part.views(images, spec)[key] for part in parts])
            assert torch.allclose(found, view, atol=1e-6)


def test_workers_and_pieces_change_nothing(folder, monkeypatch):
    spec, images = SPECS["crop+flip"], load(folder, cache_gb=0)
    alone, helped = (list(data.chunks(images, spec, plan(16, 12), 5, CPU, workers)) for workers in (0, 2))
    monkeypatch.setattr(batches, "PIECE", 5)
    cut = list(data.chunks(images, spec, plan(16, 12), 5, CPU, 2))
    for a, b, c in zip(alone, helped, cut, strict=True):
        assert [len(each.crops) for each in (a, b, c)] == [1, 1, 3] and torch.equal(a.indices, c.indices)
        assert a.draw.step == b.draw.step == c.draw.step and torch.equal(a.draw.rows, c.draw.rows)
        assert torch.equal(a.crops[0]["image"], b.crops[0]["image"])
        assert torch.equal(a.crops[0]["image"], torch.cat([piece["image"] for piece in c.crops]))
    # more images than a batch are decoded by workers, fewer in this process
    whole = [
        list(data.evaluation_views(images, views.Evaluation((8, 8), 0.875), CPU, None, batch))
        for batch in (len(images), 5)
    ]
    assert torch.equal(torch.cat(whole[0]), torch.cat(whole[1]))
    for dataset in (batches._Crops(images.photo, spec, 0), batches._Whole(images.photo, views.Evaluation((8, 8)))):
        pickle.loads(pickle.dumps(dataset))  # as the start method spawn does


def test_evaluation_views_are_the_same_from_both(folder):
    cached, streamed = load(folder), load(folder, cache_gb=0)
    chosen = torch.tensor([3, 15, 0, 7, 7])
    view = views.Evaluation((8, 8), 0.875)
    one, other = (torch.cat(list(data.evaluation_views(s, view, CPU, chosen, 2))) for s in (cached, streamed))
    # those of photos are rounded after each of the two passes, as by PIL
    assert (
        one.shape == (5, 3, 8, 8) and (one - other).abs().max() < 1.01 / 255 and (one - other).abs().mean() < 0.4 / 255
    )
    everything = torch.cat(list(data.evaluation_views(cached, views.Evaluation((12, 10)), CPU)))
    assert torch.allclose(everything * 255, cached.images.float(), atol=1e-3)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_breaks_later_is_one_sentence(folder, workers):
    images = load(folder, cache_gb=0)
    (folder / "train" / "dog" / "2.png").write_bytes(b"junk")
    with pytest.raises(UserError, match=r"dog/2\.png cannot be decoded") as error:
        list(data.chunks(images, SPECS["none"], plan(16, 16, 1), 0, CPU, workers))
    assert "\n" not in str(error.value) and "Traceback" not in str(error.value)


def test_decoding_processes_leave_no_open_files(folder):
    """Online k-NN starts some at every evaluation, and a process may have a thousand files."""
    images = load(folder, cache_gb=0)

    def decode():
        list(data.chunks(images, SPECS["none"], plan(16, 16, 1), 0, CPU, 2))
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    decode()
    before = decode()
    assert min(decode() for _ in range(4)) < before + 4  # one may not be closed yet; four starts left sixteen open
    assert decode() < before + 8


class _WhoDecodes:
    def __call__(self, i: int):
        return torch.tensor(list(os.getpid().to_bytes(3, "big")), dtype=torch.uint8).view(3, 1, 1).expand(3, 8, 8)


def test_all_workers_decode_for_one_step(folder, monkeypatch):
    """The first step waits for a share of its photos, not for one process that decodes them all."""
    monkeypatch.setattr(batches, "PIECE", 4)
    images = load(folder, cache_gb=0)
    images.photo = images.opened = _WhoDecodes()
    [chunk] = data.chunks(images, SPECS["none"], plan(16, 16, 1), 0, CPU, 2)
    colours = [piece["image"].float().mean((1, 3, 4)) for piece in chunk.crops]
    assert len(colours) == 4 and all((own == own[0]).all() for own in colours)
    assert colours[0].ne(colours[1]).any() and torch.equal(colours[0], colours[2])
    assert data.steps_ahead(16, 2) == 1 and data.steps_ahead(4, 2) == data.steps_ahead(3, 2) == 4


class _Kill:
    def __call__(self, i: int):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_one_sentence(folder):
    images = load(folder, cache_gb=0)
    images.photo = _Kill()
    with pytest.raises(UserError, match="decoding process died"):
        list(data.chunks(images, SPECS["none"], plan(16, 16, 1), 0, CPU, 1))


def test_images_that_differ_in_size_are_streamed(folder, monkeypatch, capsys):
    save(folder / "train" / "cat" / "3.png", pixels(7, 20, 30))
    images = load(folder)
    assert images.images is None and images.info()["img_size"] is None and len(images) == 16  # the probe saw it
    assert "differ" not in capsys.readouterr().out
    monkeypatch.setattr(decoding, "PROBE", 2)
    images = load(folder)
    assert images.images is None and images.info()["img_size"] is None
    said = capsys.readouterr().out
    assert said.count("differ in size") == 1 and said.count("\n") == 2 and "Decoding 16 images" in said
    monkeypatch.setattr(decoding, "decode_all", pytest.fail)  # what was found is remembered
    assert load(folder).images is None
    [chunk] = data.chunks(images, SPECS["crop+flip"], plan(16, 16, 1), 0, CPU, 0)
    assert chunk.views(images, SPECS["crop+flip"])["image"].shape == (16, 3, 8, 8)


@pytest.mark.parametrize("cache_gb", [4.0, 0.0])
def test_broken_images_are_named_or_left_out(folder, capsys, cache_gb):
    whole = (folder / "train" / "cat" / "5.png").read_bytes()
    (folder / "train" / "cat" / "5.png").write_bytes(whole[:150])  # the header is good
    (folder / "train" / "cat" / "6.png").write_bytes(b"junk")
    with pytest.raises(UserError, match=r"cat/6\.png cannot be decoded .*data.skip_broken=true"):
        load(folder, cache_gb=cache_gb)
    os.remove(folder / "train" / "cat" / "6.png")
    (folder / "train" / "cat" / "6.png").symlink_to("nowhere")
    capsys.readouterr()
    images = load(folder, skip_broken=True, cache_gb=cache_gb)
    assert len(images) == 14 and images.labels.tolist() == [0] * 6 + [1] * 8
    assert "Left out 2 broken image(s) of pets/train; the first: Image cat/5.png" in capsys.readouterr().out
    for image, i in zip(photos(images), [0, 1, 2, 3, 4, 7], strict=False):
        assert np.array_equal(as_array(image), pixels(i))
    [chunk] = data.chunks(images, SPECS["none"], plan(14, 14, 1), 0, CPU, 0)
    assert sorted(chunk.indices.tolist()) == list(range(14))


# -- the cache --------------------------------------------------------------------------------------------------------


def test_a_second_load_decodes_nothing(folder, monkeypatch):
    first = load(folder)
    monkeypatch.setattr(decoding, "decode_all", pytest.fail)
    again = load(folder)
    assert torch.equal(first.images, again.images) and first.fingerprint == again.fingerprint


def test_two_processes_at_once_decode_once_and_later_ones_never(tmp_path, monkeypatch):
    columns = dict(image=[dict(bytes=png(pixels(i)), path=None) for i in range(300)], label=[0, 1] * 150)
    features = datasets.Features(image=datasets.Image(), label=datasets.Value("int64"))
    parquet(tmp_path / "set" / "train-00000-of-00001.parquet", features, **columns)
    code = (
        "import sys; from ssl_vit import data, recipe; "
        "print(data.load(recipe.Data(name=sys.argv[1]), 'train').fingerprint)"
    )
    env = environment() | dict(SSL_VIT_CACHE=str(tmp_path / "cache"))
    command = [sys.executable, "-c", code, str(tmp_path / "set")]
    both = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=300)[0] for process in both]
    monkeypatch.setenv("SSL_VIT_CACHE", str(tmp_path / "cache"))
    later = load(tmp_path / "set")
    assert [process.returncode for process in both] == [0, 0]
    assert sum(text.count("Decoding") for text in said) == 1
    assert {text.splitlines()[-1] for text in said} == {later.fingerprint}
    assert len(list((tmp_path / "cache").glob("*.pt"))) == 1 and not list((tmp_path / "cache").glob("*.partial"))


def test_labels_are_not_those_of_an_older_training_set(folder):
    """The report split's files stay, but the numbers of its classes change with a new training class."""
    assert load(folder, "report", load(folder).classes).labels.tolist() == [0, 0, 0, 1, 1, 1]
    save(folder / "train" / "bee" / "0.png", 50)
    train = load(folder)
    assert train.classes == ["bee", "cat", "dog"]
    assert load(folder, "report", train.classes).labels.tolist() == [1, 1, 1, 2, 2, 2]


def test_the_fingerprint_is_of_pixels_and_labels(folder, tmp_path):
    first = load(folder)
    shutil.copytree(folder, tmp_path / "copy")
    assert load(tmp_path / "copy").fingerprint == first.fingerprint
    os.rename(tmp_path / "copy" / "train" / "cat" / "0.png", tmp_path / "copy" / "train" / "cat" / "9.png")
    moved = load(tmp_path / "copy")
    save(tmp_path / "copy" / "train" / "cat" / "9.png", 77)
    changed = load(tmp_path / "copy")
    assert len({first.fingerprint, moved.fingerprint, changed.fingerprint, load(folder, cache_gb=0).fingerprint}) == 4


def test_a_cache_that_cannot_be_used(folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SSL_VIT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="SSL_VIT_CACHE"):
        load(folder)
    monkeypatch.setenv("SSL_VIT_CACHE", str(tmp_path / "good"))
    load(folder)
    [file] = (tmp_path / "good").glob("*.pt")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match="delete the file"):
        load(folder)

    def full(*_):
        raise RuntimeError("PytorchStreamWriter failed writing file")

    file.unlink()
    monkeypatch.setattr(decoding.torch, "save", full)
    with pytest.raises(UserError, match="failed writing file.*SSL_VIT_CACHE"):
        load(folder)
    assert not list((tmp_path / "good").glob("*.p*t*"))


# -- labels -----------------------------------------------------------------------------------------------------------


def test_labels_that_are_missing_or_no_classes(tmp_path, capsys):
    images = [png(pixels(i)) for i in range(20)]
    half = load(parquet(tmp_path / "half.parquet", image=images, label=[0, None] * 10))
    assert half.classes == ["0"] and sorted(set(half.labels.tolist())) == [-1, 0]
    assert "9 without a label" in capsys.readouterr().out
    lists = parquet(tmp_path / "lists.parquet", image=images, label=[[0, 1]] * 20)
    assert load(lists).labels is None
    with pytest.raises(UserError, match="'label'"):
        load(lists, label_column="label")
    boxes = parquet(tmp_path / "real.parquet", image=images, label=[0.5] * 20)
    assert load(boxes).labels is None


def test_numbered_classes_keep_their_order(tmp_path):
    images = [png(pixels(i)) for i in range(40)]
    train = load(parquet(tmp_path / "train.parquet", image=images, label=[10, 9, 2, 1] * 10))
    assert train.classes == ["1", "2", "9", "10"]


def labelled_splits(folder: Path, kind, **labels: list) -> Path:
    """A parquet file for each split, with these labels."""
    features = datasets.Features(image=datasets.Image(), label=kind)
    for number, (split, values) in enumerate(labels.items()):
        images = [dict(bytes=png(pixels(100 * number + i)), path=None) for i in range(len(values))]
        parquet(folder / f"{split}-00000-of-00001.parquet", features, image=images, label=values)
    return folder


@pytest.mark.parametrize(
    ("kind", "missing"),
    [(datasets.ClassLabel(names=["a", "b"]), -1), (datasets.Value("int64"), -1), (datasets.Value("string"), None)],
)
def test_figures_are_of_validation_where_test_has_no_labels(tmp_path, capsys, kind, missing):
    a, b = ("0", "1") if kind.dtype == "string" else (0, 1)
    some = [a, b] * 3
    path = labelled_splits(tmp_path / "set", kind, train=some, test=[missing] * 5, validation=some[:4])
    for _ in range(2):
        train = load(path)
        report = load(path, "report", train.classes)
        assert (train.split, len(train), report.split, len(report)) == ("train", 6, "validation", 4)
        assert report.labels.tolist() == [0, 1, 0, 1]
    assert capsys.readouterr().out.count("The test split of ") == 1
    assert load(path, "report", report_split="test").labels is None  # who names it gets it
    # trained on validation, it is not what figures are of
    assert load(path, "report", train_split="validation").split == "test"
    none = labelled_splits(tmp_path / "none", kind, train=some, test=[missing] * 5, validation=[missing] * 4)
    assert load(none, "report").split == "test"
    partly = labelled_splits(tmp_path / "partly", kind, train=some, test=[a, missing], validation=some[:4])
    assert load(partly, "report").split == "test"


def test_folders_of_test_images_without_classes_leave_figures_to_val(folder, capsys):
    shutil.copytree(folder / "test", folder / "val")
    shutil.rmtree(folder / "test")
    save(folder / "test" / "0.png", 0)
    report = load(folder, "report", load(folder).classes)
    assert (report.split, report.labels.tolist()) == ("val", [0, 0, 0, 1, 1, 1])
    assert "The test split of " in capsys.readouterr().out


def test_what_is_lacking_to_evaluate_is_named_with_its_remedy(folder, tmp_path):
    def refusal(path: Path, **settings) -> str:
        asked = cli.EvalRequest(cli.parser("").parse_args(["--backbone", "pixels", "--data", str(path)]))
        asked.config = recipes.Data(name=str(path), **settings)
        with pytest.raises(UserError) as error:
            asked.images(asked.sources[0])
        return str(error.value)

    save(folder / "unlabeled" / "0.png", 0)
    said = refusal(folder, train_split="unlabeled")
    assert "The unlabeled split of" in said and "data.train_split=SPLIT train.steps=0" in said
    shutil.rmtree(folder / "test")
    save(folder / "test" / "0.png", 0)
    said = refusal(folder)
    assert "The test split of" in said and "data.report_split=SPLIT train.steps=0" in said and "--data RUN" in said
    assert "data.label_column" not in said and "--data of labelled images" in said
    for i in range(30):
        save(tmp_path / "plain" / f"{i}.png", i)
    said = refusal(tmp_path / "plain")
    assert f"The images of {tmp_path / 'plain'} have no labels" in said
    assert "data.label_column=COLUMN train.steps=0" in said and "split" not in said
