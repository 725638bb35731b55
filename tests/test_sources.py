"""Every file once, no image on both sides, splits found where they lie, labels with gaps, and the ledger of it all."""

import errno
import hashlib
import itertools
import json
import os
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from test_data import as_array, load, parquet, photos, pixels, png, save

from ssl_vit import data, errors, monitor, objectives, pretrain
from ssl_vit.data import copies, folders, sources
from ssl_vit.errors import UserError


@pytest.fixture(autouse=True)
def _nothing_said_yet():
    errors.say_once.cache_clear()


def fill(folder: Path, count: int, start: int = 0) -> Path:
    for i in range(start, start + count):
        save(folder / f"{i}.png", i)
    return folder


def seen(images: data.ImageSet) -> list[bytes]:
    return sorted(image.numpy().tobytes() for image in photos(images))


# -- every file once --------------------------------------------------------------------------------------------------


def test_links_to_folders_above_change_nothing(tmp_path, capsys):
    for label in "ab":
        fill(tmp_path / "plain" / label, 40, 100 * ord(label))
    shutil.copytree(tmp_path / "plain", tmp_path / "linked", copy_function=shutil.copy2)
    os.symlink("..", tmp_path / "linked" / "a" / "back", target_is_directory=True)
    os.symlink("../..", tmp_path / "linked" / "a" / "far", target_is_directory=True)  # holds plain too
    os.symlink(tmp_path / "linked" / "b", tmp_path / "linked" / "a" / "again", target_is_directory=True)
    for role in ("train", "report"):
        plain, linked = load(tmp_path / "plain", role), load(tmp_path / "linked", role)
        assert plain.fingerprint == linked.fingerprint and len(plain) == len(linked) > 0
        assert plain.names() == linked.names()
    said = capsys.readouterr().out
    assert said.count("Left out: 3 links to folders already read; every file counts once.") == 1
    assert len(linked.ledger["found"]["links_to_folders_that_count_already"]) == 3


def test_a_folder_of_links_to_elsewhere_is_read(tmp_path):
    fill(tmp_path / "store" / "x", 6)
    fill(tmp_path / "store" / "y", 6, 50)
    for split, place in (("train", "x"), ("test", "y")):
        (tmp_path / "set").mkdir(exist_ok=True)
        os.symlink(tmp_path / "store" / place, tmp_path / "set" / split, target_is_directory=True)
    assert (len(load(tmp_path / "set")), len(load(tmp_path / "set", "report"))) == (6, 6)


def test_links_and_hard_links_to_files_count_once(tmp_path, capsys):
    fill(tmp_path / "train" / "b", 3)
    fill(tmp_path / "train" / "a", 3, 50)
    fill(tmp_path / "test" / "a", 2, 80)
    before = load(tmp_path)
    os.link(tmp_path / "train" / "b" / "0.png", tmp_path / "train" / "b" / "9.png")
    os.symlink(tmp_path / "train" / "b" / "1.png", tmp_path / "train" / "a" / "0.png")  # the real one is b's
    after = load(tmp_path)
    assert after.fingerprint == before.fingerprint and after.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert after.ledger["found"]["left_out"] == dict(links=2)
    assert "Left out: 2 links to images already read" in capsys.readouterr().out


def test_images_of_the_report_split_are_not_trained_on(tmp_path, capsys):
    fill(tmp_path / "train", 8)
    fill(tmp_path / "test", 3, 50)
    shutil.copy(tmp_path / "train" / "2.png", tmp_path / "test" / "copy.png")
    os.link(tmp_path / "train" / "3.png", tmp_path / "test" / "hard.png")
    os.symlink(tmp_path / "test" / "50.png", tmp_path / "train" / "soft.png")
    shutil.copy(tmp_path / "train" / "5.png", tmp_path / "train" / "twice.png")  # stays, as in published sets
    train, report = load(tmp_path), load(tmp_path, "report")
    assert not set(seen(train)) & set(seen(report))
    assert (len(train), len(report)) == (7, 5)
    assert train.ledger["found"]["left_out"] == dict(also_in_another_split=3)
    assert train.ledger["found"]["copies_within_a_split"] == 1
    said = capsys.readouterr().out
    assert said.count("Left out of train: 3 images that are also in test, byte for byte; the first: ") == 1
    shutil.copytree(tmp_path / "train", tmp_path / "all" / "train")
    shutil.copytree(tmp_path / "train", tmp_path / "all" / "val")
    with pytest.raises(UserError, match="All images of train are also in val"):
        load(tmp_path / "all")


def test_only_what_is_reported_on_is_kept_out_of_training(tmp_path, capsys):
    """trainval is train and val together, in VOC, Flowers-102 and DTD: its images are all for training."""
    fill(tmp_path / "set" / "test", 4, 50)
    fill(tmp_path / "set" / "val", 3, 30)
    fill(tmp_path / "set" / "train", 6)
    for split in ("train", "val"):
        shutil.copytree(tmp_path / "set" / split, tmp_path / "set" / "trainval", dirs_exist_ok=True)
    shutil.copy(tmp_path / "set" / "test" / "50.png", tmp_path / "set" / "trainval" / "leak.png")
    folder, both = tmp_path / "set", dict(train_split="trainval", report_split="test")
    assert len(load(folder, **both)) == 9
    assert "Left out of trainval: 1 images that are also in test, byte" in capsys.readouterr().out
    assert len(load(folder, train_split="train", report_split="test")) == len(load(folder)) == 6
    assert "also in" not in capsys.readouterr().out
    tables = {
        split: datasets.Dataset.from_dict(
            dict(image=[file.read_bytes() for file in sorted((folder / split).iterdir())])
        )
        for split in ("train", "val", "test", "trainval")
    }
    for train, report, left in (("trainval", "test", 9), ("train", "test", 6), (None, None, 6)):
        parts, _, _ = sources._once(tables, train, report, "image", True)
        assert len(parts[train or "train"]) == left


def test_copies_are_held_out_together(tmp_path):
    fill(tmp_path / "a", 60)
    fill(tmp_path / "b", 1, 60)
    held = set(load(tmp_path, "report").names()) - {"b/60.png"}
    for i in range(60):
        shutil.copy(tmp_path / "a" / f"{i}.png", tmp_path / "a" / f"zz-{i}.png")
    report = load(tmp_path, "report")
    assert held and set(report.names()) - {"b/60.png"} == held | {name.replace("a/", "a/zz-") for name in held}
    assert not set(seen(report)) & set(seen(load(tmp_path)))


def test_equal_sizes_are_not_equal_files(tmp_path, monkeypatch):
    for i, content in enumerate((b"a" * 9000, b"b" + b"a" * 8999, b"a" * 9000, b"a" * 5)):
        (tmp_path / f"{i}.png").write_bytes(content)
    files = folders.walk(tmp_path).images
    paths, status = [file.path for file in files], [(file.size, file.time) for file in files]
    assert copies.of_files(paths, status) == {2: 0}
    monkeypatch.setattr(copies, "MANY", 2)
    assert copies.of_files(paths, status) == {2: 0}
    monkeypatch.setattr(copies, "_end", pytest.fail)  # it is remembered
    assert copies.of_files(paths, status) == {2: 0}


def test_rows_of_tables_are_kept_apart_too(tmp_path, capsys):
    kinds = datasets.Features(image=datasets.Image(), label=datasets.Value("int64"))

    def table(file: Path, *seeds: int) -> None:
        cells = [dict(bytes=png(pixels(seed)), path=None) for seed in seeds]
        parquet(file, kinds, image=cells, label=[seed % 2 for seed in seeds])

    table(tmp_path / "set" / "train.parquet", 0, 1, 2, 3, 4, 2)
    table(tmp_path / "set" / "test.parquet", 10, 2, 11)
    train, test = load(tmp_path / "set"), load(tmp_path / "set", "report")
    assert (len(train), len(test), train.labels.tolist()) == (4, 3, [0, 1, 1, 0])
    assert not set(seen(train)) & set(seen(test))
    assert (
        "Left out of train: 2 images that are also in test, byte for byte; the first: row 2." in capsys.readouterr().out
    )
    assert train.ledger["found"]["left_out"] == dict(also_in_another_split=2)
    table(tmp_path / "one.parquet", *range(60), *range(60))
    train, test = load(tmp_path / "one.parquet"), load(tmp_path / "one.parquet", "report")
    assert (len(train) + len(test), len(test)) == (120, 2 * len(set(seen(test))))
    assert not set(seen(train)) & set(seen(test))


# -- splits -----------------------------------------------------------------------------------------------------------


def test_splits_one_level_deeper_are_found(tmp_path, capsys):
    for split, start in (("train", 0), ("test", 50)):
        for k, label in enumerate("ab"):
            fill(tmp_path / "set" / "pictures" / split / label, 4, start + 10 * k)
    (tmp_path / "set" / "README.txt").write_text("Unpacked.")
    train, test = load(tmp_path / "set"), load(tmp_path / "set", "report", ["a", "b"])
    assert (len(train), train.split, train.classes, len(test), test.split) == (8, "train", ["a", "b"], 8, "test")
    assert train.names()[0] == os.path.join("a", "0.png")
    assert "its splits (train and test) lie in" in capsys.readouterr().out
    fill(tmp_path / "set" / "masks", 3, 90)
    with pytest.raises(UserError, match="set/pictures has .test and train.: they would be mixed. Pass the folder"):
        load(tmp_path / "set")
    for label in "ab":
        fill(tmp_path / "turned" / label / "train", 3, ord(label))
        fill(tmp_path / "turned" / label / "test", 3, 200 + ord(label))
    with pytest.raises(UserError, match=r"turned/a has .test and train.*move them up \(train/CLASS, test/CLASS\)"):
        load(tmp_path / "turned")


def test_names_that_are_not_utf8_are_named(tmp_path):
    fill(tmp_path, 3)
    os.rename(tmp_path / "0.png", os.fsencode(tmp_path) + b"/caf\xe9.png")
    with pytest.raises(UserError, match=r"caf\\xe9\.png' is not in UTF-8: rename it"):
        load(tmp_path)


def test_other_files_are_counted(tmp_path, capsys):
    fill(tmp_path / "train", 3)
    fill(tmp_path / "test", 2, 50)
    for name in ("a.heic", "b.HEIC", "c.pt", "notes"):
        (tmp_path / "train" / name).write_text("")
    (tmp_path / "train" / "._0.png").write_text("")
    train = load(tmp_path)
    assert train.ledger["found"]["other_files"] == {".heic": 2, ".pt": 1, "without a suffix": 1}
    assert train.ledger["found"]["hidden"] == 1
    assert "Other files: .heic 2, .pt 1, without a suffix 1." in capsys.readouterr().out
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "a.heic").write_text("")
    with pytest.raises(UserError, match=r"No images found .*; there are \.heic 1\."):
        load(tmp_path / "none")


@pytest.mark.parametrize("suffix", ["jfif", "jp2", "avif", "npy"])
def test_files_of_less_frequent_formats_are_read(tmp_path, suffix):
    for split, start in (("train", 0), ("test", 50)):
        (tmp_path / split).mkdir()
        for i in range(start, start + 3):
            if suffix == "npy":
                np.save(tmp_path / split / f"{i}.npy", pixels(i, 16, 16))
            else:
                options = dict(quality=100, format="jpeg") if suffix == "jfif" else {}
                Image.fromarray(pixels(i, 16, 16)).save(tmp_path / split / f"{i}.{suffix}", **options)
    images = load(tmp_path)
    assert (len(images), images.size, images.channels) == (3, (16, 16), 3)


# -- tables -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["dicts", "strings"])
def test_paths_in_cells_are_looked_up_beside_the_table(tmp_path, monkeypatch, form):
    fill(tmp_path / "set" / "pics", 6)
    for split, rows in (("train", range(4)), ("test", (4, 5))):
        cells = [f"pics/{i}.png" for i in rows]
        cells = cells if form == "strings" else [dict(bytes=None, path=cell) for cell in cells]
        parquet(tmp_path / "set" / f"{split}.parquet", image=cells, label=[i % 2 for i in rows])
    monkeypatch.chdir("/")
    for route in (dict(), dict(cache_gb=0)):
        for role, first in (("train", 0), ("report", 4)):
            images = load(tmp_path / "set", role, **route)
            assert np.array_equal(as_array(photos(images)[0]), pixels(first))
    os.remove(tmp_path / "set" / "pics" / "0.png")
    with pytest.raises(UserError, match="names the image file .pics/0.png., which is not in .*: put it there"):
        load(tmp_path / "set", cache_gb=0)


def test_a_cache_that_cannot_be_written_is_not_blamed_on_the_tables(tmp_path, monkeypatch):
    fill(tmp_path / "set" / "pics", 2)
    parquet(tmp_path / "set" / "train.parquet", image=["pics/0.png", "pics/1.png"], label=[0, 1])
    cache = tmp_path / "set" / "pics" / "0.png" / "cache"  # beneath a file
    monkeypatch.setattr(sources.datasets.config, "HF_DATASETS_CACHE", cache)
    with pytest.raises(
        UserError, match=rf"{cache}, cannot be written \(Not a directory\): name another one in HF_HOME"
    ):
        load(tmp_path / "set")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_too_full_for_the_copy_is_not_blamed_on_the_tables(number, tmp_path, monkeypatch):
    """`datasets` writes all images again in its own format."""
    fill(tmp_path / "set" / "pics", 2)
    parquet(tmp_path / "set" / "train.parquet", image=["pics/0.png", "pics/1.png"], label=[0, 1])

    def full(*arguments, **options):
        try:
            raise OSError(number, os.strerror(number))
        except OSError as error:
            raise datasets.exceptions.DatasetGenerationError("An error occurred while generating it") from error

    monkeypatch.setattr(sources.datasets, "load_dataset", full)
    with pytest.raises(UserError, match=r"There is no room in .*copies all images.*: make room, or name another place"):
        load(tmp_path / "set")


def test_a_long_listing_says_so_once(tmp_path, monkeypatch, capsys):
    for name in "abc":
        fill(tmp_path / "set" / name, 2)
    monkeypatch.setattr(folders, "QUIET", 0)
    load(tmp_path / "set")
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Listing the files under")]
    assert said == [f"Listing the files under {tmp_path / 'set'}: 0 images so far."]


def test_tables_that_changed_are_read_anew(tmp_path):
    kinds = datasets.Features(image=datasets.Image(), label=datasets.Value("int64"))
    readme = "---\nconfigs:\n- config_name: one\n  data_files: [{split: train, path: t.parquet}]\n---\n"
    for place, start in (("a", 0), ("b", 200), ("a", 400)):  # a folder of the same name, and new files in the first
        folder = tmp_path / place / "set"
        cells = [dict(bytes=png(pixels(start + i)), path=None) for i in range(40)]
        parquet(folder / "t.parquet", kinds, image=cells, label=[0, 1] * 20)
        (folder / "README.md").write_text(readme)
        images = [*load(folder).images, *load(folder, "report").images]
        own = {pixels(start + i).tobytes() for i in range(40)}
        assert {as_array(image).tobytes() for image in images} == own


def test_lists_of_images_are_refused(tmp_path):
    cells = [[dict(bytes=png(pixels(i)), path=None)] * 2 for i in range(4)]
    for split in ("train", "test"):
        parquet(tmp_path / f"{split}.parquet", images=cells)
    with pytest.raises(UserError, match="row 0 is a list of 2 images: store one in each row"):
        load(tmp_path)


def test_home_and_folders_called_as_known_sets(tmp_path, monkeypatch, capsys):
    fill(tmp_path / "photos" / "train", 3)
    fill(tmp_path / "photos" / "test", 3, 50)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert (load("~/photos").name, len(load("~/photos"))) == ("photos", 3)
    with pytest.raises(UserError, match="There is no folder or file '~/nothing'"):
        load("~/nothing")
    (tmp_path / "photos").rename(tmp_path / "cifar10")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sources, "_hub", lambda *_: (_ for _ in ()).throw(UserError("the hub was asked")))
    with pytest.raises(UserError, match="the hub was asked"):
        load("cifar10")
    assert "for the folder of that name here, pass --data ./cifar10." in capsys.readouterr().out
    assert len(load("./cifar10")) == 3


def test_a_user_without_a_home_folder(tmp_path, monkeypatch):
    fill(tmp_path / "photos", 20)
    monkeypatch.delenv("SSL_VIT_CACHE", raising=False)

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(UserError, match="There is no home folder .*: name a folder in SSL_VIT_CACHE"):
        load(tmp_path / "photos")
    monkeypatch.setenv("SSL_VIT_CACHE", str(tmp_path / "cache"))
    assert len(load(tmp_path / "photos")) == 20


def test_words_that_yaml_reads_as_numbers():
    with pytest.raises(UserError, match=r"must be a word or null, not 2017. Quote it: data.train_split='\"2017\"'"):
        objectives.read_recipe("mae", ["data.train_split=2017"], "digits")
    assert objectives.read_recipe("mae", ['data.train_split="2017"'], "digits").data.train_split == "2017"


# -- labels -----------------------------------------------------------------------------------------------------------

NONE = {  # the type of a column, and labels of which every third is none
    "null": (datasets.Value("int64"), None, [0, 1]),
    "-1": (datasets.Value("int64"), -1, [0, 1]),
    "named": (datasets.ClassLabel(names=["0", "1"]), -1, [0, 1]),
    "NaN": (datasets.Value("float64"), float("nan"), [0.0, 1.0]),
    "null word": (datasets.Value("string"), None, ["0", "1"]),
}


@pytest.mark.parametrize("kind", NONE)
def test_no_label_has_one_meaning(tmp_path, kind, capsys):
    feature, none, (a, b) = NONE[kind]
    kinds = datasets.Features(image=datasets.Image(), label=feature)
    cells = [dict(bytes=png(pixels(i)), path=None) for i in range(15)]
    parquet(tmp_path / "train.parquet", kinds, image=cells[:12], label=[none, a, b] * 4)
    parquet(tmp_path / "test.parquet", kinds, image=cells[12:], label=[a, b, none])
    train = load(tmp_path)
    assert (train.classes, train.labels.tolist()) == (["0", "1"], [-1, 0, 1] * 4)
    assert load(tmp_path, "report", train.classes).labels.tolist() == [0, 1, -1]
    some = train.labelled()
    assert some.labels.tolist() == [0, 1] * 4 and np.array_equal(as_array(some.images[0]), pixels(1))
    assert train.ledger["labels_per_class"] == {"0": 4, "1": 4} and train.ledger["without_label"] == 4
    assert "2 classes of 4 images; 4 without a label" in capsys.readouterr().out
    half = load(tmp_path, subset=0.5)  # of the unlabelled too
    assert sorted(half.labels.tolist()) == [-1, -1, 0, 0, 1, 1]


def test_what_holds_no_class_is_said_with_the_reason(tmp_path, capsys):
    for name, labels, reason in (
        ("real", [0.5, 1.0] * 3, "numbers such as 0.5"),
        ("lists", [[0, 1]] * 6, "lists (several labels per image are not supported)"),
    ):
        for split, start in (("train", 0), ("test", 50)):
            cells = [png(pixels(start + i)) for i in range(6)]
            parquet(tmp_path / name / f"{split}.parquet", image=cells, label=labels)
        assert load(tmp_path / name).labels is None
        assert f"is not read as labels: it holds {reason}" in capsys.readouterr().out
        with pytest.raises(UserError) as error:
            load(tmp_path / name, label_column="label")
        assert f"holds no class per image but {reason}" in str(error.value)


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_labels_of_a_metadata_file(tmp_path, form):
    for split, start in (("train", 0), ("test", 50)):
        fill(tmp_path / split / "deep", 6, start)
        rows = [(f"deep/{i}.png", ["cat", "dog", None][i % 3], i % 2) for i in range(start, start + 6)]
        if form == "csv":
            text = "file_name,label,side\n" + "".join(f"{n},{a or ''},{b}\n" for n, a, b in rows)
        else:
            text = "".join(json.dumps(dict(file_name=n, label=a, side=b)) + "\n" for n, a, b in rows)
        (tmp_path / split / f"metadata.{form}").write_text(text)
    train = load(tmp_path)
    assert (train.classes, train.labels.tolist()) == (["cat", "dog"], [0, 1, -1, 0, 1, -1])
    assert load(tmp_path, "report", train.classes).labels.tolist() == [-1, 0, 1, -1, 0, 1]
    assert load(tmp_path, label_column="side").labels.tolist() == [0, 1] * 3


def test_tables_of_labels_win_over_folders_and_tell_what_they_miss(tmp_path, capsys):
    """As in `datasets`; those of several folders are one."""
    for split, start in (("train", 0), ("test", 50)):
        for i in range(start, start + 6):
            save(tmp_path / split / ("2021", "2022")[i % 2] / f"{i}.png", i)
        for year in range(2):
            lines = [f"{i}.png,{'cat' if i % 3 else 'dog'}" for i in range(start, start + 6) if i % 2 == year]
            lines += ["gone.png,cat"] if (split, year) == ("train", 1) else []
            (tmp_path / split / ("2021", "2022")[year] / "metadata.csv").write_text(
                "\n".join(["file_name,label", *lines])
            )
    train = load(tmp_path)
    names = [Path(name).stem for name in train.names()]
    assert [train.classes[label] for label in train.labels] == ["cat" if int(n) % 3 else "dog" for n in names]
    said = capsys.readouterr().out
    assert "labels are those of metadata.csv" in said and "not the names of folders" in said
    assert "1 of 13 images named in metadata.csv are not there." in said
    for file in tmp_path.rglob("metadata.csv"):
        file.unlink()
    assert load(tmp_path).classes == ["2021", "2022"]


class _Same(torch.nn.Module):
    """Features that are an image's mean colour."""

    has_class_token = False

    def features(self, batch: torch.Tensor):
        return [(batch.new_zeros(len(batch), 0, 3), batch.mean((2, 3))[:, None, None, :])]


def test_online_knn_leaves_out_images_without_a_label():
    colour = torch.tensor([[250, 5, 5], [5, 250, 5]], dtype=torch.uint8)
    labels = torch.arange(200) % 2
    images = colour[labels][:, :, None, None].repeat(1, 1, 4, 4)
    labels[::3] = -1
    facts = dict(name="two", split="train", classes=["0", "1"], fingerprint="", channels=3, count=200, size=(4, 4))
    knn = monitor.OnlineKnn(
        data.ImageSet(labels=labels, images=images, **facts),
        objectives.read_recipe("mae", ["data.img_size=[4, 4]"], "digits"),
        torch.device("cpu"),
    )
    assert knn(_Same())["knn"] == 1.0


# -- the run ----------------------------------------------------------------------------------------------------------


def test_a_run_keeps_its_ledger_and_trains_on_what_has_labels(tmp_path):
    kinds = datasets.Features(image=datasets.Image(), label=datasets.Value("int64"))
    cells = [dict(bytes=png(pixels(i, 8, 8)), path=None) for i in range(14)]
    parquet(tmp_path / "set" / "train.parquet", kinds, image=cells[:12], label=[-1, 0, 1] * 4)
    parquet(tmp_path / "set" / "test.parquet", kinds, image=cells[12:], label=[0, 1])
    small = ["backbone.embed_dim=16", "backbone.depth=1", "backbone.num_heads=2", "train.steps=1", "train.batch_size=8"]
    small += ["monitor.trackers=none"]
    for name in ("supervised", "masked-patch"):
        recipe = objectives.read_recipe(name, small, str(tmp_path / "set"))
        assert pretrain.pretrain(recipe, tmp_path / name) == 0
        ledger = json.loads((tmp_path / name / "images.json").read_text())
        used = (8, 0, 12) if name == "supervised" else (12, 4, 12)
        assert (ledger["used"], ledger["without_label"], ledger.get("used_of_split", 12)) == used
        assert ledger["formats"] == {"PNG": 12} and ledger["labels_per_class"] == {"0": 4, "1": 4}
        text = (tmp_path / name / "recipe.yaml").read_text()
        assert f"count: {8 if name == 'supervised' else 12}" in text
        assert (
            pretrain.pretrain(objectives.read_recipe(name, small, str(tmp_path / "set")), tmp_path / name) == 0
        )  # goes on


def test_files_that_a_table_names_are_read_again_once_they_change(tmp_path):
    cell = dict(bytes=datasets.Value("binary"), path=datasets.Value("string"))
    for way, kind in (("words", datasets.Value("string")), ("cells", cell)):
        folder = tmp_path / way
        for split, start in (("train", 0), ("test", 50)):
            fill(folder / "files", 4, start)
            names = [f"files/{i}.png" for i in range(start, start + 4)]
            cells = names if way == "words" else [dict(bytes=None, path=name) for name in names]
            parquet(folder / f"{split}.parquet", datasets.Features(image=kind), image=cells)
        before = load(folder)
        assert torch.equal(load(folder).images, before.images) and load(folder).fingerprint == before.fingerprint
        for i in range(4):
            save(folder / "files" / f"{i}.png", 200 + i)
        after = load(folder)
        assert after.fingerprint != before.fingerprint and as_array(after.images[2]).tolist() == pixels(202).tolist()
        assert load(folder, cache_gb=0).fingerprint != before.fingerprint


def test_the_range_of_deep_images_is_that_of_their_folder(tmp_path):
    for name, high in (("dim", 4000), ("bright", 60000)):
        for i in range(3):
            array = np.full((8, 8), high, np.uint16)
            array[0, : i + 1] = 0
            file = tmp_path / name / f"{i}.tif"
            file.parent.mkdir(exist_ok=True)
            Image.fromarray(array).save(file)
            os.utime(file, (1, 1))
    for way in (dict(), dict(cache_gb=0)):
        assert load(tmp_path / "dim", **way).range == (0, 4095)
        assert load(tmp_path / "bright", **way).range == (0, 65535)


def test_folders_that_may_not_be_read_are_told(tmp_path, monkeypatch, capsys):
    fill(tmp_path / "train", 3)
    (tmp_path / "lost+found").mkdir()
    scan, closed = os.scandir, [str(tmp_path / "lost+found")]

    def scandir(at):
        if str(at) in closed:
            raise PermissionError(errno.EACCES, "Permission denied", str(at))
        return scan(at)

    monkeypatch.setattr(folders.os, "scandir", scandir)
    images = load(tmp_path)
    assert len(images) == 3 and images.ledger["found"]["folders_that_may_not_be_read"] == closed
    assert f"Left out: 1 folder(s) that may not be read; the first: {closed[0]}." in capsys.readouterr().out
    closed.append(str(tmp_path))
    with pytest.raises(UserError, match=r"may not be read \(Permission denied\): check --data"):
        load(tmp_path)


def test_what_is_wrong_with_tables_is_told(tmp_path):
    (tmp_path / "set").mkdir()
    kinds = datasets.Features(image=datasets.Image(), label=datasets.Value("int64"))
    cell = dict(bytes=png(pixels(0)), path=None)
    parquet(tmp_path / "set" / "train-00000-of-00002.parquet", kinds, image=[cell], label=[0])
    other = datasets.Features(image=datasets.Image(), label=datasets.Value("string"), more=datasets.Value("string"))
    parquet(tmp_path / "set" / "train-00001-of-00002.parquet", other, image=[cell], label=["a"], more=["b"])
    with pytest.raises(UserError) as error:
        load(tmp_path / "set")
    assert "An error occurred" not in str(error.value) and "more" in str(error.value)


@pytest.mark.parametrize(
    "labels", [["0.5", "1.5", "control"], ["control", "0.5", "1.5"], ["nan", "cat", "dog"], ["1", "2.0", "cat"]]
)
def test_words_are_classes_whatever_their_order(labels):
    """One that is no number says that none of them stands for one."""
    sources._refuse_fractions(labels, "label")
    with pytest.raises(UserError, match="numbers with fractions, such as 1.5"):
        sources._refuse_fractions(["1", "nan", "1.5"], "label")


def test_a_metadata_file_of_lists_is_one_sentence(tmp_path):
    for split in ("train", "test"):
        save(tmp_path / split / "a.png", np.full((8, 8, 3), len(split), np.uint8))
        (tmp_path / split / "metadata.jsonl").write_text('["a.png", "x"]\n')
    with pytest.raises(UserError, match=r"metadata.jsonl cannot be read \(a line is no object.*: mend or remove"):
        load(tmp_path, "train")


def test_a_row_of_a_metadata_file_without_a_name_is_one_sentence(tmp_path):
    for split in ("train", "test"):
        for i, name in enumerate("ab"):
            save(tmp_path / split / f"{name}.png", np.full((8, 8, 3), 10 * i + len(split), np.uint8))
        lines = [dict(file_name="a.png", label="x"), dict(label="y")]
        (tmp_path / split / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match=r"metadata.jsonl names no file_name in its row 2: mend or remove"):
        load(tmp_path, "train")


def test_folders_whose_files_look_alike_keep_their_own_images(tmp_path):
    """Names, sizes and times are equal, as in archives that were made by code."""
    for name, start in (("one", 0), ("other", 100)):
        for split in ("train", "test"):
            for i in range(3):
                value = start + 10 * i + len(split)
                file = save(tmp_path / name / split / "a" / f"{i}.bmp", np.full((8, 8, 3), value, np.uint8))
                os.utime(file, (1e9, 1e9))
    one, other = (load(tmp_path / name, "train") for name in ("one", "other"))
    assert one.images[:, 0, 0, 0].tolist() == [5, 15, 25] and other.images[:, 0, 0, 0].tolist() == [105, 115, 125]
    assert one.fingerprint != other.fingerprint


def test_a_column_that_is_named_holds_images_beside_however_many_others(tmp_path):
    fill(tmp_path / "set" / "pics", 6)
    for split, names in (("train", [0, 1]), ("test", [2])):
        columns = dict(photo=[f"pics/{i}.png" for i in names], label=[i % 2 for i in names])
        parquet(tmp_path / "set" / f"{split}.parquet", **columns)
    found = load(tmp_path / "set", "train", image_column="photo")
    assert len(found) == 2 and found.labels.tolist() == [0, 1]


LAYOUTS = {  # of twelve images in folders, and what a table is called and holds
    "by split": ("images/{split}", "{split}.parquet", "images/{split}"),
    "by camera": ("camera{n}", "labels-{split}.parquet", "camera{n}"),
    "previews": ("{split}", "{split}/data.parquet", "../{split}"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tables_beside_more_images_are_what_is_read(layout, tmp_path):
    """Labels are those of the tables, not the names of folders; only images that a row names count."""
    images, table, _ = LAYOUTS[layout]
    root, n = tmp_path / "set", 0
    for split in ("train", "test"):
        paths = []
        for i in range(6):
            n += 1
            paths.append(save(root / images.format(split=split, n=1 + i % 2) / f"{split}{i}.png", n))
        cells = [os.path.relpath(path, root) for path in paths[:4]]
        parquet(root / table.format(split=split), image=cells, label=["dog", "cat", "dog", "cat"])
    for role in ("train", "report"):
        found = load(root, role)
        assert found.classes == ["cat", "dog"] and found.labels.tolist() == [1, 0, 1, 0], found.split


def test_a_class_that_is_in_the_tenth_alone_is_a_class(tmp_path):
    """Of a table without a test split; the only image of a class lies there as often as any other."""
    part = [int(hashlib.sha256(str(i).encode()).hexdigest()[:8], 16) % 10 == 0 for i in range(40)]
    rare = part.index(True)
    fill(tmp_path / "set" / "pics", 40)
    words = ["rare" if i == rare else "ab"[i % 2] for i in range(40)]
    parquet(tmp_path / "set" / "train.parquet", image=[f"pics/{i}.png" for i in range(40)], label=words)
    train = load(tmp_path / "set", "train")
    test = load(tmp_path / "set", "report", train.classes)
    assert train.classes == test.classes == ["a", "b", "rare"] and 2 in test.labels and 2 not in train.labels


def test_a_split_that_only_a_table_tells_is_refused(tmp_path):
    fill(tmp_path, 6)
    rows = [f"{i}.png,{'ab'[i % 2]},{'test' if i > 3 else 'train'}" for i in range(6)]
    (tmp_path / "metadata.csv").write_text("\n".join(["file_name,label,split", *rows]))
    with pytest.raises(
        UserError, match=r"metadata.csv has a column split \(test, train\), which is not read.*: move the"
    ):
        load(tmp_path)
    (tmp_path / "metadata.csv").write_text("\n".join(["file_name,label,split", *rows[:4]]))
    assert load(tmp_path).classes == ["a", "b"]


def test_tables_that_are_not_read_are_told(tmp_path, capsys):
    fill(tmp_path / "images", 6)
    for name in ("train", "test"):
        (tmp_path / f"{name}.csv").write_text("image,label\n0.png,cat\n")
    load(tmp_path)
    assert "Not read: test.csv and train.csv. Splits are folders (train/, test/), and labels" in capsys.readouterr().out


@pytest.mark.parametrize("values, refused", [
    (["0.5", "1", "2.25"], "0.5"), (["1", "2.0", "1"], None), (["v1.5", "1.5", "2"], None),
])  # fmt: skip
def test_numbers_with_fractions_are_no_classes(values, refused, tmp_path):
    fill(tmp_path, 6)
    rows = [f"{i}.png,{values[i % 3]}" for i in range(6)]
    (tmp_path / "metadata.csv").write_text("\n".join(["file_name,label", *rows]))
    if refused is None:
        assert load(tmp_path).classes == sorted(set(values))
        return
    with pytest.raises(
        UserError, match="labels in 'label' are numbers with fractions, such as 0.5, and not classes: name"
    ):
        load(tmp_path)


def test_a_set_saved_by_datasets_is_refused_with_the_remedy(tmp_path):
    rows = datasets.Dataset.from_dict(dict(label=[0, 1]))
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=rows).save_to_disk(tmp_path / "several")
    photos = tmp_path / "photos"
    for split, name in itertools.product(("train", "test"), "ab"):
        save(photos / split / name / "1.png", np.full((8, 8, 3), 2 * ord(name) + len(split) % 2, np.uint8))
    (photos / "state.json").write_text("{}")  # of an editor, say
    assert len(load(photos)) == 2
    for name in ("one", "several"):
        with pytest.raises(
            UserError, match=f"{name} was written by save_to_disk of the library datasets.*: write parquet"
        ):
            load(tmp_path / name)
