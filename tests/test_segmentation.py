"""Segmentation: masks as they are stored, the probes, mIoU and its intervals."""

import csv
import dataclasses
import io
import math
import os
import shutil
import signal
import struct
import sys
import tempfile
import zlib
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import timm
import torch
from conftest import SMALL
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import confusion_matrix, jaccard_score
from test_loop import TINY

from eval import attention_masks as attention_command
from eval import report as reports
from eval import segmentation
from eval.compare import intervals, iou
from eval.compare.metrics import Metric
from eval.compare.runs import group_runs, read_run
from eval.compare.scores import read_eval_sets
from eval.measure import attention_masks, dense, dense_sets, dense_tuning, features, results
from eval.page import segmentation_section
from ssl_vit import data, objectives, pretrain
from ssl_vit import recipe as recipes
from ssl_vit.backbones import EvaBackbone
from ssl_vit.backbones.vit import AddressedDropPath
from ssl_vit.data import masks
from ssl_vit.errors import UserError
from ssl_vit.randomness import Draw

RNG = np.random.default_rng(0)


def png(values, mode=None):
    stream = io.BytesIO()
    image = Image.fromarray(values)
    if mode == "P":
        image = image.convert("L")
        image.putpalette([c for i in range(256) for c in ((37 * i) % 256, (91 * i) % 256, i)])
    image.save(stream, "PNG")
    return stream.getvalue()


def packed_png(values, bits):
    """A grey PNG file with values of 1, 2 or 4 bits, written from the format's description (PNG, section 7.2)."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    spread = np.unpackbits(values[..., None], axis=2)[..., 8 - bits :].reshape(len(values), -1)
    rows = b"".join(b"\0" + np.packbits(row).tobytes() for row in spread)
    head = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], bits, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def scene(size=(12, 16), seed=0):
    """(an image whose left and right part differ in colour, its mask: 0 on the left, 1 on the right)"""
    rng = np.random.default_rng(seed)
    at = rng.integers(4, size[1] - 4)
    mask = np.zeros(size, np.uint8)
    mask[:, at:] = 1
    image = np.where(mask[..., None] == 1, [200, 60, 30], [20, 90, 200]) + rng.integers(-140, 141, (*size, 3))
    return image.clip(0, 255).astype(np.uint8), mask


def parquet(folder, change=lambda split, i, mask: mask, count=(12, 4), mode=None):
    for number, split in enumerate(("train", "test")):
        pairs = [scene(seed=100 * number + i) for i in range(count[number])]
        cells = dict(
            image=[dict(bytes=png(image), path=None) for image, _ in pairs],
            mask=[dict(bytes=png(change(split, i, mask), mode), path=None) for i, (_, mask) in enumerate(pairs)],
        )
        kinds = datasets.Features(image=datasets.Image(), mask=datasets.Image())
        folder.mkdir(exist_ok=True)
        datasets.Dataset.from_dict(cells, features=kinds).to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))
    return folder


def both(folder):
    config = recipes.Data(name=str(folder))
    return data.load(config, "train"), data.load(config, "report")


# -- masks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [None, "P"])
def test_masks_are_read_as_indices_not_as_colours(tmp_path, mode):
    train, test = both(parquet(tmp_path / "set", mode=mode))
    assert len(train) == 12 and train.labels is None
    for i in range(len(test)):
        assert torch.equal(test.masks(i), torch.from_numpy(scene(seed=100 + i)[1]))
    assert torch.equal(train.part(torch.tensor([5, 2])).masks(1), train.masks(2))


@pytest.mark.parametrize("inner", ["{split}/{kind}", "{kind}/{split}"])
def test_a_folder_of_masks_beside_the_images_holds_masks_and_no_images(tmp_path, inner):
    for number, split in enumerate(("train", "test")):
        for i in range(3):
            image, mask = scene(seed=10 * number + i)
            for kind, values, end in (("images", image, ""), ("masks", mask, "_mask")):
                folder = tmp_path / inner.format(split=split, kind=kind)
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(values).save(folder / f"scene{i}{end}.png")
    (tmp_path / "train" / "masks" if inner[1] == "s" else tmp_path / "masks" / "train").joinpath(
        "stray.png"
    ).write_bytes(png(scene(seed=77)[1]))
    train, test = both(tmp_path)
    assert len(train) == len(test) == 3 and train.labels is None
    assert [torch.equal(test.masks(i), torch.from_numpy(scene(seed=10 + i)[1])) for i in range(3)] == [True] * 3
    assert train.ledger["found"]["left_out"]["masks_without_image"] == 1
    (folder / "scene2.png").write_bytes(png(scene(seed=78)[1]))
    with pytest.raises(UserError, match=r"scene2\S*.png and \S*scene2\S*.png would both be the mask of \S*scene2.png"):
        both(tmp_path)


def test_a_class_called_masks_stays_a_class(tmp_path):
    for number, kind in enumerate(("helmets", "masks")):
        for i in range(4):
            (tmp_path / kind).mkdir(exist_ok=True)
            Image.fromarray(scene(seed=10 * number + i)[0]).save(tmp_path / kind / f"{i}.png")
    images = data.load(recipes.Data(name=str(tmp_path)), "train")
    assert images.masks is None and images.classes == ["helmets", "masks"]


def test_masks_that_are_no_classes_are_refused():
    grey, colour = np.full((4, 5), 3, np.uint8), RNG.integers(0, 255, (4, 5, 3)).astype(np.uint8)
    assert masks.of(png(grey), "a.png").tolist() == grey.tolist()
    assert masks.of(png(np.repeat(grey[..., None], 3, 2)), "a.png").tolist() == grey.tolist()
    assert masks.of(np.array([[0, 7]]), "a.png").tolist() == [[0, 7]]
    for bits in (1, 2, 4):
        values = RNG.integers(0, 2**bits, (4, 5)).astype(np.uint8)
        assert masks.of(packed_png(values, bits), "a.png").tolist() == values.tolist()
    jpeg = io.BytesIO()
    Image.fromarray(grey).save(jpeg, "JPEG")
    for wrong, words in (
        (jpeg.getvalue(), "The mask of a.png is a JPEG, which alters the numbers of classes: store a PNG."),
        (png(colour), "The mask of a.png does not hold the class of each pixel but colours"),
        (np.array([[0.5]]), "but float64 of shape"),
        (np.array([[300]]), "classes from 300 to 300: 0 to 255"),
        (b"no image", "The mask of a.png cannot be read"),
    ):
        with pytest.raises(UserError, match=words):
            masks.of(wrong, "a.png")


def test_classes_are_those_of_training_and_the_ignored_do_not_count(tmp_path, capsys):
    def change(split, i, mask):
        mask = mask * 4 + 1  # classes 1 and 5
        mask[0] = 255
        mask[1] = 7
        return mask

    folder = parquet(tmp_path / "set", change)
    train, test = both(folder)
    (found, of_test), names, ignored = dense_sets.masks_of(str(folder), train, test, [7, 9])
    assert (names, ignored) == (["1", "5"], [7])  # no mask has a class 9
    expected = scene(seed=103)[1].copy()
    expected[:2] = dense.IGNORED
    assert np.array_equal(of_test[3], expected) and len(found) == 12
    (folder / "classes.txt").write_text("a\nb\nc\nd\ne\nf\ng\nunlabelled\n")
    assert dense_sets.masks_of(str(folder), train, test, [])[1:] == (["b", "f"], [])
    assert dense_sets.masks_of(str(folder), train, test, [7])[1:] == (["b", "f"], [])  # as classes.txt says
    said = capsys.readouterr().out
    assert "Pixels of 'unlabelled' do not count" in said
    assert said.count("Pixels of 255 do not count: 8.3% of those of set (train).") == 1
    for wrong in (b"\xef\xbb\xbfa\nb\nc\nd\ne\nf\ng\nunlabelled\n", "a\nÄste\n".encode("latin-1")):
        (folder / "classes.txt").write_bytes(wrong)
        if b"unlabelled" in wrong:  # as Notepad writes it
            assert dense_sets.masks_of(str(folder), train, test, [])[1:] == (["b", "f"], [])
        else:
            with pytest.raises(UserError, match="classes.txt cannot be read .*UTF-8"):
                dense_sets.masks_of(str(folder), train, test, [])
    (folder / "classes.txt").write_text("a\nb\n")
    with pytest.raises(UserError, match="have a class 7, and classes.txt names 2"):
        dense_sets.masks_of(str(folder), train, test, [])


def test_images_that_exif_turns_by_180_degrees_are_named_since_their_size_does_not_tell(tmp_path, capsys):
    exif = Image.Exif()
    exif[0x0112] = 3
    for number, split in enumerate(("train", "test")):
        for kind in ("images", "masks"):
            (tmp_path / "set" / split / kind).mkdir(parents=True)
        for i in range(2):
            image, mask = scene(seed=10 * number + i)
            turned = dict(exif=exif) if (split, i) == ("train", 1) else {}
            Image.fromarray(image).save(tmp_path / "set" / split / "images" / f"{i}.png", **turned)
            Image.fromarray(mask).save(tmp_path / "set" / split / "masks" / f"{i}.png")
    dense_sets.masks_of(str(tmp_path / "set"), *both(tmp_path / "set"), [])
    said = capsys.readouterr().out.replace("\n", " ")
    assert said.count("their masks must be those of the upright images") == 1
    assert "Of the images of set (train), 1 is turned upright by EXIF" in said


def test_masks_that_do_not_fit_are_refused(tmp_path):
    stranger = parquet(tmp_path / "stranger", lambda split, i, mask: mask + 9 * (split == "test" and i == 2))
    with pytest.raises(UserError, match="that those of the training images lack: 9, 10.*--ignore 9 10"):
        dense_sets.masks_of(str(stranger), *both(stranger), [])
    size = parquet(tmp_path / "size", lambda split, i, mask: mask[:-1] if i == 2 else mask)
    with pytest.raises(UserError, match="The mask of image row 2 of size .train. is 11x16, and the image 12x16"):
        dense_sets.masks_of(str(size), *both(size), [])
    one = parquet(tmp_path / "one", lambda split, i, mask: mask * 0)
    with pytest.raises(UserError, match="fewer than two classes.*255 marks pixels that do not count"):
        dense_sets.masks_of(str(one), *both(one), [])
    bare = [data.load(recipes.Data(name="digits"), role) for role in ("train", "report")]
    assert dense_sets.masks_of("digits", *bare, [])[1] == ["background", *"0123456789"]
    for images in bare:
        images.name = "others"
    with pytest.raises(UserError, match="others .train. has no masks"):
        dense_sets.masks_of("others", *bare, [])


# -- probes and figures -----------------------------------------------------------------------------------------------


def test_fractions_share_pixels_between_patches():
    mask = np.array([[0, 0, 1], [0, 1, 1], [2, 2, dense.IGNORED]], np.uint8)
    found = dense.fractions(mask, (2, 2), 3).reshape(2, 2, 3)
    # a patch is 1.5 pixels a side: whole, half and quarter pixels, of 2.25 in all
    assert found[0, 0] == pytest.approx(np.array([1 + 0.5 + 0.5, 0.25, 0]) / 2.25)
    assert found[1, 1] == pytest.approx(np.array([0, 0.25 + 0.5, 0.5]) / 2.25)
    whole = dense.fractions(mask, (3, 3), 3)
    assert whole.argmax(1)[:8].tolist() == mask.flatten()[:8].tolist() and whole[8].tolist() == [0, 0, 0]


def test_fractions_are_those_of_pixels_cut_into_pieces():
    """So small that each piece lies in one patch."""
    mask = RNG.integers(0, 21, (13, 11)).astype(np.uint8)  # of 20 classes, and one that counts nowhere
    pieces = mask.repeat(5, 0).repeat(7, 1).reshape(5, 13, 7, 11)
    expected = (pieces[..., None] == np.arange(20)).mean((1, 3)).reshape(35, 20)
    np.testing.assert_allclose(dense.fractions(mask, (5, 7), 20), expected, atol=1e-6)


def test_miou_is_that_of_scikit_learn():
    truth, predicted = (
        RNG.integers(0, 4, (6, 20, 30)).astype(np.uint8),
        RNG.integers(0, 4, (6, 20, 30)).astype(np.uint8),
    )
    predicted[predicted == 3] = truth[predicted == 3]
    truth[0, :5] = dense.IGNORED
    counts = np.stack([dense.confusion(p, t, 4) for p, t in zip(predicted, truth, strict=True)])
    there = truth != dense.IGNORED
    assert np.array_equal(counts.sum(0), confusion_matrix(truth[there], predicted[there]))
    assert dense.miou(counts) == pytest.approx(jaccard_score(truth[there], predicted[there], average="macro"))
    absent = np.zeros((1, 3, 3), int)
    absent[0, 0, 0] = absent[0, 1, 0] = 1
    assert dense.ious(absent[0])[:2].tolist() == [0.5, 0] and np.isnan(dense.ious(absent[0])[2])
    assert dense.miou(absent) == 0.25


def test_scores_are_resized_and_a_pixel_takes_the_highest():
    scores = np.zeros((1, 2, 2))
    scores[0, 0, 0] = scores[0, 1, 1] = 1
    assert dense.segment(scores, (1, 4)).tolist() == [[0, 0, 1, 1]]


def halves(n=60, grid=(2, 3), seed=0):
    """Patches of two classes whose features overlap a little, with masks of whole patches."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 2, (n, *grid))
    features = rng.normal(size=(n, *grid, 4)) + 1.2 * truth[..., None]
    shown = [np.kron(t, np.ones((4, 4))).astype(np.uint8) for t in truth]
    return dense.Patches(features.astype(np.float32), shown, 2)


def test_the_linear_probe_is_logistic_regression_on_patches():
    train, test = halves(), halves(seed=1)
    penalty = 1e-2
    patches, shares = train.labelled
    features = train.of(patches)
    mean, std = features.mean(0), features.std(0)
    # scikit-learn sums the loss, and halves the squared norm of its one difference of weights w1 − w0 = 2·w1
    model = LogisticRegression(C=1 / (penalty * len(features)), tol=1e-8).fit(
        (features - mean) / std, shares[:, 1] > 0.5
    )
    expected = model.decision_function(((test.features - mean) / std).reshape(-1, 4))
    found = dense.linear(train, penalty)(test.features)
    assert (found[..., 1] - found[..., 0]).flatten() == pytest.approx(expected, abs=2e-3)


def test_patches_without_pixels_that_count_are_not_fitted():
    train = halves()
    spoilt = [mask.copy() for mask in train.masks]
    features = train.features.copy()
    for i in range(0, 60, 2):
        spoilt[i][:4, :4] = dense.IGNORED
        features[i, 0, 0] = 1e6
    wise = dense.linear(dense.Patches(features, spoilt, 2), 1e-3)
    assert dense.miou(dense.confusions(halves(seed=1), wise)) > 0.7


def test_nearest_votes_by_the_fractions_of_similar_patches():
    features = np.zeros((1, 1, 4, 2), np.float32)
    features[0, 0] = [[1, 0], [0.9, 0.1], [-1, 0.2], [-0.9, -0.1]]
    mask = np.array([[0, 0, 0, 1, 1, 1, 1, 1]], np.uint8)  # the second patch is half of each
    scores = dense.nearest(dense.Patches(features, [mask], 2), k=2)(features[:, :, :1])
    bank = features[0, 0] - features[0, 0].mean(0)
    bank /= np.linalg.norm(bank, axis=1, keepdims=True)
    weight = np.exp(((bank @ bank[0])[:2] - 1) / dense.TEMPERATURE)
    assert scores[0, 0, 0] == pytest.approx((weight / weight.sum()) @ [[1, 0], [0.5, 0.5]], abs=1e-5)


def test_intervals_by_pseudo_values_cover_as_a_bootstrap_does():
    rng = np.random.default_rng(3)
    sure = rng.beta(6, 3, (80, 1, 1))
    truth = rng.integers(0, 3, (80, 30, 30))
    predicted = np.where(rng.random((80, 30, 30)) < sure, truth, rng.integers(0, 3, (80, 30, 30)))
    counts = np.stack([dense.confusion(p, t, 3) for p, t in zip(predicted, truth, strict=True)])
    counts *= rng.integers(1, 30, (80, 1, 1)) ** 2  # images of many sizes: one by one they would count alike
    values = iou.pseudo_values(counts)
    assert values.mean() == pytest.approx(dense.miou(counts), abs=1e-12)
    drawn = [dense.miou(counts[rng.integers(0, 80, 80)]) for _ in range(2000)]
    assert intervals.interval(values[None]).se_images == pytest.approx(np.std(drawn), rel=0.1)


def test_a_class_of_one_image_keeps_its_iou_when_that_is_left_out():
    counts = np.zeros((3, 2, 2), int)
    counts[:, 0, 0] = 10
    counts[0, 1] = [2, 2]
    assert np.isfinite(iou.pseudo_values(counts)).all()


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A folder with the runs of two seeds and raw pixels, all evaluated on scenes of two parts."""
    folder = tmp_path_factory.mktemp("measured")
    scenes = parquet(folder / "scenes", lambda split, i, mask: np.vstack([mask[:1] * 0 + 9, mask[1:]]), (20, 8))
    (folder / "scenes" / "classes.txt").write_text("left\nright" + "\nunused" * 7 + "\nvoid\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for seed in (0, 1):
            settings = [*TINY, *SMALL["mae"], "data.img_size=[12,16]", "train.steps=2", f"train.seed={seed}"]
            recipe = objectives.read_recipe("mae", settings, str(scenes))
            assert pretrain.pretrain(recipe, folder / "runs" / f"mae-s{seed}") == 0
        words = ["--backbone", "runs/mae-s0", "runs/mae-s1", "pixels", "--data", "./scenes", "--threads", "1"]
        patch.setattr(sys, "argv", ["segmentation.py", *words])
        segmentation.main()
    return folder


def test_rows_hold_what_the_probes_get_right(measured):
    rows = results.read(measured / "runs" / "mae-s0")
    assert [row["protocol"] for row in rows] == ["segmentation-linear", "segmentation-knn-k20"]
    for row in rows:
        assert (row["metric"], row["classes"], row["class_names"]) == ("mIoU", 2, ["left", "right"])
        assert (row["n"], row["train_n"], row["eval_images"], row["split"]) == (8, 20, 28, "test")
        counts = np.load(measured / "runs" / "mae-s0" / row["predictions"])["confusion"]
        assert counts.shape == (8, 2, 2) and counts.sum((1, 2)).tolist() == [11 * 16] * 8  # a row of each is void
        shown = [(scene(seed=100 + i)[1][1:] == 1).sum() for i in range(8)]
        assert counts[:, 1].sum(1).tolist() == shown
        assert row["miou"] == pytest.approx(dense.miou(counts)) == pytest.approx(np.mean(row["iou"]), abs=1e-6)
        assert row["pixel_accuracy"] == pytest.approx(np.trace(counts.sum(0)) / counts.sum())
    pixels = results.read(measured / "runs" / "pixels-scenes")
    assert pixels[0]["recipe"] == "pixels" and pixels[0]["grid"] == [12, 16] and 0.5 < pixels[0]["miou"] < 0.999
    tried = rows[0]["settings"]["tried"]
    assert set(tried) == {f"{p:g}" for p in dense.PENALTIES}
    assert tried[f"{rows[0]['settings']['penalty']:g}"] == max(tried.values())
    assert Image.open(measured / "runs" / "mae-s0" / "pictures" / "scenes-segmentation.png").size[0] > 4 * 160


def test_the_penalty_is_chosen_without_the_images_it_is_chosen_on(measured, monkeypatch):
    train = halves(n=40)
    fitted = []
    real = dense.linear
    monkeypatch.setattr(dense, "linear", lambda part, penalty: fitted.append(len(part)) or real(part, penalty))
    segmentation.linear(train)
    assert fitted == [36] * len(dense.PENALTIES) + [40]


def test_the_report_has_a_section_for_it_and_no_accuracy_of_it(measured, monkeypatch):
    monkeypatch.chdir(measured)
    monkeypatch.setattr(sys, "argv", ["report.py", "runs/mae-s0", "runs/mae-s1", "runs/pixels-scenes"])
    reports.main()
    text = (measured / "runs" / "report" / "report.md").read_text()
    assert "## Segmentation: scenes (test)" in text and "## Accuracy" not in text and "Chance" not in text
    rows = [results.read(measured / "runs" / f"mae-s{seed}")[0] for seed in (0, 1)]
    found = list(csv.DictReader((measured / "runs" / "report" / "report.csv").open()))
    [own] = [r for r in found if r["group"] == "mae" and r["protocol"] == "segmentation-linear" and not r["against"]]
    assert own["quantity"] == "mIoU" and {own[n] for n in ("chance", "balanced_accuracy", "balanced_low")} == {""}
    assert float(own["mean"]) == pytest.approx(np.mean([row["miou"] for row in rows]), abs=1e-5)
    page = (measured / "runs" / "report" / "report.html").read_text()
    nearest = [results.read(measured / "runs" / f"mae-s{seed}")[1] for seed in (0, 1)]  # the first table
    of_left = f"{100 * np.mean([row['iou'][0] for row in nearest]):.1f}"
    assert of_left in page.partition("Intersection over union of each class")[2].partition("right")[0]


def segment(folder, monkeypatch, *words):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["segmentation.py", "--data", "./scenes", "--threads", "1", *words])
    segmentation.main()


def test_other_classes_are_another_measurement(tmp_path, monkeypatch):
    parquet(tmp_path / "scenes", lambda split, i, mask: np.where(np.arange(len(mask))[:, None] == 1, 7, mask))
    segment(tmp_path, monkeypatch, "--backbone", "pixels")
    segment(tmp_path, monkeypatch, "--backbone", "pixels", "--ignore", "7", "9")
    segment(tmp_path, monkeypatch, "--backbone", "pixels", "--ignore", "9")  # which no mask has
    rows = results.read(tmp_path / "runs" / "pixels-scenes")
    assert [(row["protocol"], row["classes"]) for row in rows] == [
        ("segmentation-linear-ignoring-7", 2),
        ("segmentation-knn-k20-ignoring-7", 2),
        ("segmentation-linear", 3),
        ("segmentation-knn-k20", 3),
    ]
    tests = read_eval_sets(group_runs([read_run(tmp_path / "runs/pixels-scenes")]), "mIoU")
    assert [(test.without, row["classes"], len(test.main)) for test, row in zip(tests, rows[::2], strict=True)] == [
        ("without class 7", 2, 2),
        ("", 3, 2),
    ]
    titles = [segmentation_section.blocks(test)[0][0].text for test in tests]
    assert [title.partition(" (")[2] for title in titles] == ["test, without class 7)", "test)"]
    named = [
        Metric(f"segmentation-linear-11x15-ignoring-{left}", "patches", -1, 1.0).evaluator for left in ("7", "0-7")
    ]
    assert named[0] == "linear probe of patches, images of 11x15, without class 7"
    assert named[1].endswith(", without classes 0, 7")


def test_one_image_with_a_mask_is_too_few(tmp_path, monkeypatch):
    parquet(tmp_path / "scenes")
    with pytest.raises(UserError, match="--labels 5% of 12 training images with masks leave one"):
        segment(tmp_path, monkeypatch, "--backbone", "pixels", "--labels", "all", "5%")
    assert not (tmp_path / "runs").exists()


def test_runs_on_other_images_are_shown_these_at_a_size_of_their_own(measured, tmp_path, monkeypatch):
    settings = [*TINY, *SMALL["mae"], "train.steps=2", "data.in_chans=3"]  # on digits of 8x8 pixels
    assert pretrain.pretrain(objectives.read_recipe("mae", settings, None), tmp_path / "runs" / "small") == 0
    shutil.copytree(measured / "scenes", tmp_path / "scenes")
    segment(tmp_path, monkeypatch, "--backbone", "runs/small", "pixels", "--img-size", "11", "15")
    run, pixels = (results.read(tmp_path / "runs" / name) for name in ("small", "pixels-scenes"))
    assert [row["protocol"] for row in run] == ["segmentation-linear-11x15", "segmentation-knn-k20-11x15"]
    assert run[0]["view"] == [12, 16] and run[0]["grid"] == [6, 8]  # in whole patches of 2
    assert (run[0]["recipe"], run[0]["seed"], run[0]["data"]) == ("mae", 0, "digits") and run[0]["train_flops"] > 0
    assert pixels[0]["view"] == [12, 16] and pixels[0]["protocol"] == run[0]["protocol"]
    segment(tmp_path, monkeypatch, "--backbone", "runs/small")
    assert [row["view"] for row in results.read(tmp_path / "runs" / "small")] == [[12, 16]] * 2 + [[8, 8]] * 2
    pixels = features.open_source("pixels", recipes.Data(name="./scenes"), None, (180, 240))
    assert dense_sets.view_of(pixels, None).size == (184, 240)
    small = timm.create_model(f"local-dir:{tmp_path}/runs/small/backbone", pretrained=True, img_size=(12, 16)).eval()
    source = features.open_source("runs/small", None, None, (11, 15))
    images = torch.rand(2, 3, 12, 16)
    [(_, patches)] = source.backbone.features(images)
    theirs = small.forward_features(source.backbone.normalise(images))[:, 1:]
    assert torch.allclose(patches.flatten(1, 2), theirs, atol=1e-5)


def test_a_run_that_divides_the_images_otherwise_is_not_judged_by_the_masks_of_the_first(
    measured, tmp_path, monkeypatch
):
    """Its own test images would be scored against others' masks."""
    shutil.copytree(measured / "scenes", tmp_path / "scenes")
    parquet(tmp_path / "more", count=(6, 8), change=lambda split, i, mask: 1 - mask)
    shutil.copy(tmp_path / "more" / "train-00000-of-00001.parquet", tmp_path / "scenes" / "val.parquet")
    monkeypatch.chdir(tmp_path)
    for name, changes in (("one", []), ("other", ["data.report_split=validation"])):
        settings = [*TINY, *SMALL["mae"], "data.img_size=[12,16]", "train.steps=0", *changes]
        assert pretrain.pretrain(objectives.read_recipe("mae", settings, "./scenes"), tmp_path / name) == 0
    for names in (["other", "one"], ["one", "other"]):
        with pytest.raises(
            UserError, match=f"{names[1]} takes . images of scenes .* where {names[0]} takes . .*of its own"
        ):
            segment(tmp_path, monkeypatch, "--backbone", *names)
    segment(tmp_path, monkeypatch, "--backbone", "other")
    assert {(row["split"], row["n"]) for row in results.read(tmp_path / "other")} == {("validation", 6)}


def test_a_part_of_the_masks_is_used(measured, monkeypatch):
    before = results.read(measured / "runs" / "mae-s0")
    seen = []
    real = dense.nearest
    monkeypatch.setattr(dense, "nearest", lambda train: seen.append(len(train)) or real(train))
    words = ["--labels", "20%", "50%", "all", "--label-seeds", "3"]
    segment(measured, monkeypatch, "--backbone", "runs/mae-s0", *words)
    rows = results.read(measured / "runs" / "mae-s0")
    found = [(row["label_fraction"], row["subset_seed"], row["train_n"], row["eval_images"]) for row in rows[::2]]
    assert found == [(0.2, 3, 4, 12), (0.5, 3, 10, 18), (1.0, None, 20, 28)] and seen == [4, 10, 20]
    assert rows[-2]["miou"] == before[0]["miou"]  # all of them again
    with pytest.raises(UserError, match="no 5 per class: give --labels a fraction"):
        segment(measured, monkeypatch, "--backbone", "runs/mae-s0", "--labels", "5")


def test_a_head_keeps_the_patches_with_most_of_its_attention():
    attention = torch.tensor([[[[0.4, 0.1], [0.3, 0.2]], [[0.7, 0.1], [0.1, 0.1]]]])
    kept = attention_masks.keep(attention)
    assert kept.int().tolist() == [[[[1, 0], [1, 0]], [[1, 0], [0, 0]]]]  # 0.4 alone is too little, 0.7 is enough


def test_the_jaccard_index_is_that_of_the_best_head_for_each_class():
    masks = np.array([[[1, 0]], [[0, 1]]], bool)  # two heads, two patches
    truth = np.array([[0, 0, 2, 2, 2, dense.IGNORED]], np.uint8)
    found = attention_masks.overlaps(masks, truth, 4)
    assert found[:, [0, 2]] == pytest.approx(np.array([[2 / 3, 1 / 5], [0, 2 / 3]]))  # patches of three pixels
    assert np.isnan(found[:, [1, 3]]).all()
    assert attention_masks.jaccard(found, [0, 1, 2, 3]) == pytest.approx((2 / 3 + 2 / 3) / 2)
    assert attention_masks.jaccard(found, [2]) == pytest.approx(2 / 3)
    assert np.isnan(attention_masks.jaccard(found, [1]))


def test_attention_is_measured_and_reported(measured, monkeypatch):
    monkeypatch.chdir(measured)
    words = ["--data", "./scenes", "--threads", "1", "--backbone"]
    drawn = []
    save = attention_command.mask_pictures.save
    monkeypatch.setattr(attention_command.mask_pictures, "save", lambda *a: drawn.append(a[4]) or save(*a))
    monkeypatch.setattr(sys, "argv", ["attention_masks.py", *words, "runs/mae-s0", "runs/mae-s1"])
    attention_command.main()
    for shown in drawn[0][1]:  # in the colour of the class that is fitted, or black
        assert shown.min() in (0, 1) and set(np.unique(shown)) == {shown.min(), dense.IGNORED}
    [row] = [row for row in results.read(measured / "runs" / "mae-s0") if row["metric"] == "Jaccard"]
    stored = np.load(measured / "runs" / "mae-s0" / row["predictions"])
    source = features.open_source("runs/mae-s0", None, None)
    train, test = both(measured / "scenes")
    (_, masks), _, _ = dense_sets.masks_of("./scenes", train, test, [])
    expected = []
    for image, mask in zip(test.images, masks, strict=True):
        [[heads]] = [source.network.attention(image[None].float() / 255).detach()]
        flat = heads.flatten(1).sort(1, descending=True)
        best = dict.fromkeys((0, 1), 0.0)
        for head in range(len(heads)):
            whole = flat.values[head].sum()
            few = next(n for n in range(1, 100) if flat.values[head][:n].sum() >= 0.6 * whole)
            chosen = np.zeros(heads[0].numel(), bool)
            chosen[flat.indices[head][:few]] = True
            pixels = chosen.reshape(heads[0].shape).repeat(2, 0).repeat(2, 1)
            for k in best:
                best[k] = max(best[k], jaccard_score((mask == k)[1:].flatten(), pixels[1:].flatten()))
        expected.append(np.mean(list(best.values())))
    assert stored["jaccard"] == pytest.approx(expected, abs=1e-5) and row["value"] == pytest.approx(np.mean(expected))
    assert stored["pixels"].sum(1).tolist() == [11 * 16] * 8
    assert (measured / "runs" / "mae-s0" / "pictures" / "scenes-masks.png").exists()
    monkeypatch.setattr(sys, "argv", ["report.py", "runs/mae-s0", "runs/mae-s1", "--output", "runs/jaccard"])
    reports.main()
    text = (measured / "runs" / "jaccard" / "report.md").read_text()
    assert "## Attention as masks: scenes (test)" in text and "## Segmentation: scenes (test)" in text
    monkeypatch.setattr(sys, "argv", ["attention_masks.py", *words, "pixels"])
    with pytest.raises(UserError, match="pixels has no class token"):
        attention_command.main()


def test_masks_of_another_evaluation_are_not_compared(measured, tmp_path):
    copies = [tmp_path / name for name in ("a", "b")]
    for seed, folder in enumerate(copies):
        shutil.copytree(measured / "runs" / f"mae-s{seed}", folder)
    file = copies[1] / results.read(copies[1])[0]["predictions"]
    stored = dict(np.load(file))
    stored["confusion"][0, 0, 0] += 1
    np.savez(file, **stored)
    with pytest.raises(UserError, match="were evaluated on different images of scenes"):
        read_eval_sets(group_runs([read_run(folder) for folder in copies]), "mIoU")


def test_permuted_pixels_are_refused(measured):
    source = features.Source("run", measured, dict(data=dict(permute_pixels=True)), None, None)
    with pytest.raises(UserError, match="trained on permuted pixels"):
        dense_sets.load(recipes.Data(name=str(measured / "scenes")), 3, source)


# -- fine-tuning ------------------------------------------------------------------------------------------------------


def task_of(folder, run="mae-s0", **changes):
    train, test = both(folder / "scenes")
    source = features.open_source(str(folder / "runs" / run), None, None)
    (masks_of_train, _), names, _ = dense_sets.masks_of(str(folder / "scenes"), train, test, [])
    view = dense_sets.view_of(source, train)
    states = Path(tempfile.mkdtemp(dir=folder))
    return dense_tuning.Task(source, train, masks_of_train, len(names), view, seed=3, folder=states)


def test_an_image_and_its_mask_are_cropped_and_flipped_alike(measured):
    task = task_of(measured)
    several = np.arange(64) % 20
    images, masks = dense_tuning.batch(task, several, Draw(0, 1, torch.arange(64)))
    assert images.shape == (64, 3, 12, 16) and masks.shape == (64, 12, 16) and 0 <= images.min() < images.max() <= 1
    warm = images[:, 0] > images[:, 2]  # of the right part
    counted = masks != dense.IGNORED
    assert (warm == (masks == 1))[counted].float().mean() > 0.8  # the scenes are noisy
    flipped = (masks[:, -1, 0] == 1) & (masks[:, -1, -1] == 0)
    assert 16 < flipped.sum() < 48 and set(masks.unique().tolist()) == {0, 1, dense.IGNORED}
    whole = torch.stack([torch.from_numpy(task.masks[i]) for i in several])
    assert not torch.equal(masks, whole.long()) and (masks[:, 0] == dense.IGNORED).all(1).float().mean() < 0.9
    task.images.flip = False
    _, kept = dense_tuning.batch(task, several, Draw(0, 1, torch.arange(64)))
    assert torch.equal(torch.where(flipped[:, None, None], kept.flip(2), kept), masks)


def test_a_mask_is_read_at_the_middle_of_each_pixel_of_its_image(monkeypatch):
    monkeypatch.setattr(dense_tuning, "SCALE", (1.0, 1.0))
    monkeypatch.setattr(dense_tuning, "RATIO", (1.0, 1.0))
    ramp = torch.arange(64, dtype=torch.uint8).expand(64, 64)
    images = SimpleNamespace(images=ramp[None, None], photo=None, flip=False)
    view = SimpleNamespace(size=(16, 16), interpolation="bilinear")
    task = SimpleNamespace(images=images, masks=[ramp.numpy()], view=view)
    shown, masks = dense_tuning.batch(task, np.array([0]), Draw(0, 1, torch.arange(1)))
    apart = (masks[0] - 255 * shown[0, 0])[:, 1:-1].abs()
    assert apart.max() <= 1  # half a pixel, and the rounding of the image


def test_fine_tuning_learns_the_masks_and_is_the_same_again(measured):
    task = task_of(measured)
    before = {name: weight.clone() for name, weight in task.source.backbone.state_dict().items()}
    schedule = dense_tuning.Schedule(40, (5e-3,))
    tuned, again = (dense_tuning.fine_tune(each, schedule) for each in (task, task_of(measured)))
    counts = tuned.confusions(task)
    assert counts.sum((1, 2)).tolist() == [11 * 16] * 20 and np.array_equal(counts, again.confusions(task))
    untrained, _ = dense_tuning.train(task, 0, 5e-3)
    assert dense.miou(counts) > 0.7 > dense.miou(dense_tuning.Tuned(untrained).confusions(task))
    assert all(torch.equal(weight, before[name]) for name, weight in task.source.backbone.state_dict().items())
    moved = tuned.model.backbone.state_dict()
    assert not torch.equal(moved["model.blocks.0.mlp.fc1.weight"], before["model.blocks.0.mlp.fc1.weight"])
    scores = next(tuned.scores(task.images, task.view))
    assert scores.shape == (4 * 6, 4 * 8, 2)  # four times the grid
    assert tuned.about == dict(settings=dict(lr=5e-3, changed=dict(steps=40, lr=[5e-3]))) and tuned.cost.images == 640
    forward = tuned.flops_per_image(task)
    assert tuned.cost.flops == pytest.approx(3 * 640 * forward)


def test_fine_tuning_follows_the_recipe_s_schedule(measured, monkeypatch):
    """A warm-up and a cosine down to its end, as of all fine-tuning."""
    rates = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW,
        "step",
        lambda self, *given: rates.append(max(g["lr"] for g in self.param_groups)) or step(self, *given),
    )
    dense_tuning.train(task_of(measured), 10, 1e-3)
    config = objectives.read_recipe("finetune", [], None).optim
    warm = round(config.warmup_fraction * 10)
    down = [math.cos(math.pi * i / (9 - warm)) for i in range(10 - warm)]
    expected = [1e-3 * (i + 1) / warm for i in range(warm)]
    expected += [config.min_lr + (1e-3 - config.min_lr) * (1 + c) / 2 for c in down]
    assert rates == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_the_rate_is_the_best_on_images_that_it_did_not_see(measured, monkeypatch, capsys):
    task, seen = task_of(measured), []
    real = dense_tuning.train
    monkeypatch.setattr(
        dense_tuning, "train", lambda part, *more: seen.append((len(part.images), more[1])) or real(part, *more)
    )
    judged = []
    confusions = dense_tuning.Tuned.confusions
    monkeypatch.setattr(
        dense_tuning.Tuned, "confusions", lambda self, part: judged.append(len(part.masks)) or confusions(self, part)
    )
    tuned = dense_tuning.fine_tune(task, dense_tuning.Schedule(4, (1e-5, 2e-3, 1e30)))
    tried = tuned.about["settings"]["tried"]
    assert tried["1e+30"] is None and "lr 1e+30: diverged" in capsys.readouterr().out
    best = float(max((rate for rate in tried if tried[rate] is not None), key=lambda rate: tried[rate]))
    assert tuned.about["settings"]["lr"] == best and seen[-1] == (20, best)
    assert [count for count, _ in seen[:-1]] == [18] * len(tried) and set(judged) == {2}
    judgements = 2 * sum(found is not None for found in tried.values())
    trained = tuned.cost.images - judgements
    assert trained in [64 * len(tried) + 16 * steps for steps in (1, 2, 3)]  # as the diverged one stops before its end
    assert tuned.cost.flops == pytest.approx(tuned.flops_per_image(task) * (3 * trained + judgements))
    zero = torch.zeros(1, 3, *task.view.size)
    planned = dense_tuning.planned(task.source, zero, task.classes, 20, 8, dense_tuning.Schedule(4, (1e-3, 2e-3)))
    assert planned == tuned.flops_per_image(task) * (3 * 3 * 64 + 2 * 2 + 8)  # two trials and the last, and 8 images
    with pytest.raises(UserError, match="diverged at every learning rate from .* on: pass smaller --lr"):
        dense_tuning.fine_tune(task, dense_tuning.Schedule(4, (1e29, 1e30)))
    with pytest.raises(UserError, match=r"diverged at lr 1e\+30: pass smaller --lr"):
        dense_tuning.fine_tune(task, dense_tuning.Schedule(4, (1e30,)))


def test_layers_learn_more_slowly_the_deeper_they_are_unless_nothing_was_trained(measured, monkeypatch):
    built = []
    real = dense_tuning.optim.build
    monkeypatch.setattr(dense_tuning.optim, "build", lambda *words: built.append(real(*words)) or built[-1])
    task = task_of(measured)
    dense_tuning.train(task, 0, 1e-3)
    task.source.settings["train"]["steps"] = 0
    task.source.settings["backbone"]["init_from"] = "weights.pth"  # they came from elsewhere
    dense_tuning.train(task, 0, 1e-3)
    first, second = ([group["lr_scale"] for group in each.param_groups] for each in built)
    assert first == second
    built.pop()
    task.source.settings["backbone"]["init_from"] = None
    dense_tuning.train(task, 0, 1e-3)
    pretrained, untrained = ({round(group["lr_scale"], 6) for group in each.param_groups} for each in built)
    assert untrained == {1.0} and max(pretrained) == 1.0 and min(pretrained) == pytest.approx(0.75**3)  # two blocks


def test_the_drop_path_of_a_pre_training_does_not_return(measured):
    task = task_of(measured)
    plain, _ = dense_tuning.train(task, 2, 1e-3)
    for number, part in enumerate(task.source.backbone.model.blocks):
        part.drop_path1 = part.drop_path2 = AddressedDropPath(0.1 * (number + 1)).eval()
    dropped, _ = dense_tuning.train(dataclasses.replace(task, folder=task.folder / "again"), 2, 1e-3)
    images = torch.rand(2, 3, 12, 16)
    assert torch.equal(plain(images), dropped(images))


def test_fine_tuning_has_rows_a_column_and_a_picture_of_its_own(measured, tmp_path, monkeypatch, capsys):
    shutil.copytree(measured, tmp_path / "measured")
    folder = tmp_path / "measured"
    words = ["--backbone", "runs/mae-s0", "runs/mae-s1", "pixels", "--finetune", "--steps", "3", "--lr", "2e-3"]
    segment(folder, monkeypatch, *words)
    assert "fine-tuned" in capsys.readouterr().out
    rows = results.read(folder / "runs" / "mae-s0")
    [row] = [row for row in rows if row["protocol"].startswith("segmentation-finetune-")]
    assert row["settings"] == dict(lr=2e-3, changed=dict(steps=3, lr=[2e-3]))
    assert (row["train_n"], row["eval_images"], row["metric"]) == (20, 3 * 16 + 8, "mIoU")
    counts = np.load(folder / "runs" / "mae-s0" / row["predictions"])["confusion"]
    assert row["miou"] == pytest.approx(dense.miou(counts)) and counts.sum((1, 2)).tolist() == [11 * 16] * 8
    assert len(results.read(folder / "runs" / "pixels-scenes")) == 2  # raw pixels have no weights
    monkeypatch.setattr(sys, "argv", ["report.py", "runs/mae-s0", "runs/mae-s1", "runs/pixels-scenes"])
    reports.main()
    text = (folder / "runs" / "report" / "report.md").read_text()
    assert f"fine-tuned with a decoder ({row['protocol'].rpartition('-')[2]})" in text
    assert "The same with steps=3, lr=" in text
    for wrong, words in (
        (["--steps", "3"], "belong to fine-tuning: add --finetune"),
        (["pixels-pca64"], "pixels-pca64 projects whole images"),
    ):
        with pytest.raises(UserError, match=words):
            segment(folder, monkeypatch, "--backbone", "runs/mae-s0", *wrong)


def test_fine_tuning_stops_when_told_and_goes_on_to_the_same_row(measured, tmp_path, monkeypatch, capsys):
    real, steps, stop_at = dense_tuning.batch, [], None

    def batch(task, indices, draw):
        steps.append(draw.step)
        if len(steps) == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(task, indices, draw)

    monkeypatch.setattr(dense_tuning, "batch", batch)
    words = ["--backbone", "runs/mae-s0", "--finetune", "--steps", "6", "--lr", "1e-3", "2e-3"]

    def tuned(folder):
        [row] = [r for r in results.read(folder / "runs/mae-s0") if "finetune" in r["protocol"]]
        with np.load(folder / "runs/mae-s0" / row["predictions"]) as stored:
            return row | dict(seconds=0, measured_at=""), row["seconds"], stored["confusion"]

    for name in ("whole", "stopped"):
        shutil.copytree(measured, tmp_path / name)
    segment(tmp_path / "whole", monkeypatch, *words)
    whole, steps[:] = list(steps), []
    stop_at = 6 + 3  # in the second of several trainings
    with pytest.raises(SystemExit) as stopped:
        segment(tmp_path / "stopped", monkeypatch, *words)
    assert stopped.value.code == 128 + signal.SIGTERM and "Stopped after step 3 of 6, saved." in capsys.readouterr().out
    assert not any("finetune" in row["protocol"] for row in results.read(tmp_path / "stopped/runs/mae-s0"))
    saved = list((tmp_path / "stopped/runs/mae-s0/segmentation").rglob("*.pt"))
    assert sorted(file.name for file in saved) == ["step-00000003.pt", "step-00000006.pt"]
    for file in saved:
        state = torch.load(file, weights_only=True)
        assert 0 < state["seconds"] < 100
        torch.save(state | dict(seconds=1000.0), file)
    segment(tmp_path / "stopped", monkeypatch, *words)
    assert steps == whole  # none was repeated
    expected, (row, seconds, counts) = tuned(tmp_path / "whole"), tuned(tmp_path / "stopped")
    assert row == expected[0] and np.array_equal(counts, expected[2]) and 2000 < seconds < 2100
    segment(tmp_path / "stopped", monkeypatch, *words)
    assert steps == whole and tuned(tmp_path / "stopped")[0] == row


def test_a_training_of_other_weights_or_masks_is_not_gone_on_with(measured):
    task = task_of(measured)
    config = recipes.Optim()
    names = {dense_tuning._name(task, 3, 1e-3, config)}
    flipped = dataclasses.replace(task.images, flip=not task.images.flip)
    others = task_of(measured, "mae-s1").source
    for change in (dict(source=others), dict(masks=task.masks[1:]), dict(seed=4), dict(images=flipped)):
        names.add(dense_tuning._name(dataclasses.replace(task, **change), 3, 1e-3, config))
    names |= {dense_tuning._name(task, 4, 1e-3, config), dense_tuning._name(task, 3, 1e-4, config)}
    assert len(names) == 7


def test_a_folder_called_digits_is_no_known_set(monkeypatch):
    """Its masks are its own."""
    images = SimpleNamespace(name="digits", split="train", masks=None)
    with pytest.raises(UserError, match="digits .train. has no masks"):
        dense_sets.masks_of("./digits", images, images, [])


def test_the_attention_of_rotary_positions_is_refused():
    class Rotary(EvaBackbone):
        has_class_token = True

        def __init__(self):
            pass

    source = SimpleNamespace(name="eva02", backbone=Rotary())
    with pytest.raises(UserError, match="eva02 has rotary positions, and its attention cannot be read here"):
        attention_command.evaluate(source, None)
