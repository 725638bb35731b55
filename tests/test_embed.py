"""Findings in features made by hand; the file and the page of features, of files of several sizes."""

import json

import numpy as np
import pyarrow.parquet
import pytest
import torch
from conftest import BACKBONE, SMALL
from PIL import Image
from test_loop import TINY

from eval import embed, knn
from eval.measure import embedding, everything
from ssl_vit import objectives, pretrain, weights
from ssl_vit import recipe as recipes
from ssl_vit.errors import UserError


def pictures(folder, count=12, labels=False, seed=0):
    """Files of several sizes: red ones, then blue ones, noisy; the last a copy of the first, a little brighter."""
    generator = np.random.default_rng(seed)
    for i in range(count):
        height, width = ((40, 40), (48, 36), (32, 50))[i % 3]
        pixels = generator.normal(0, 20, (height, width, 3)) + ((200, 30, 30) if i < count // 2 else (30, 30, 200))
        place = folder / (("red" if i < count // 2 else "blue") if labels else "")
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(place / f"{i:02d}.png")
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return pictures(tmp_path_factory.mktemp("set") / "photos")


@pytest.fixture(scope="module")
def run(tmp_path_factory, photos):
    """A run on these unlabelled files."""
    folder = tmp_path_factory.mktemp("runs") / "plain"
    settings = [*TINY, "data.img_size=32", "backbone.patch_size=8", "train.steps=1", *SMALL["mae"]]
    assert pretrain.pretrain(objectives.read_recipe("mae", settings, str(photos)), folder) == 0
    return folder


def call(module, monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", [f"{module.__name__}.py", *map(str, arguments)])
    module.main()


def test_neighbours_duplicates_outliers_and_groups_of_known_features():
    """Two bundles of directions far apart, an image between them, and a copy."""
    generator = np.random.default_rng(1)
    a, b = np.zeros(16), np.zeros(16)
    a[0], b[1] = 10, 10
    features = np.concatenate([a + generator.normal(0, 0.3, (12, 16)), b + generator.normal(0, 0.3, (8, 16))])
    strange = np.zeros(16)
    strange[5] = 9
    features = np.concatenate([features, strange[None], features[3:4] * 1.001]).astype(np.float32)
    found = embedding.examine(features, groups=3)
    assert found.outlier.argmax() == 20
    assert found.nearest[3, 0] == 21 and found.nearest[21, 0] == 3
    assert all(i not in others for i, others in enumerate(found.nearest))
    [(i, j, s)] = found.duplicates(0.9999)
    assert (i, j) == (3, 21) and s > 0.9999
    assert found.group[:12].tolist() == [0] * 12 and found.group[12:20].tolist() == [1] * 8 and found.group[20] == 2
    unit = features - features.mean(0)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    cosines = unit @ unit.T - 2 * np.eye(22)
    np.testing.assert_allclose(found.similarity, -np.sort(-cosines, 1)[:, :6], atol=1e-5)
    np.testing.assert_allclose(found.outlier, 1 - found.similarity.mean(1), atol=1e-6)
    for group in range(3):
        centre = unit[found.group == group].mean(0)
        own = unit[found.group == group] @ centre / np.linalg.norm(centre)
        np.testing.assert_allclose(found.to_centre[found.group == group], own, atol=1e-5)
    near = np.linalg.norm(found.places[:12] - found.places[:12].mean(0), axis=1).max()
    assert np.linalg.norm(found.places[:12].mean(0) - found.places[12:20].mean(0)) > near  # the map keeps them apart


def test_copies_and_few_images():
    same = embedding.examine(np.ones((10, 4), np.float32) * np.array([1, 2, 3, 4], np.float32))
    assert all(i not in others for i, others in enumerate(same.nearest)) and np.isfinite(same.places).all()
    two = embedding.examine(np.array([[1.0, 0], [0, 1]], np.float32))
    assert two.nearest.tolist() == [[1], [0]] and two.places.shape == (2, 2)


def test_without_labels_nothing_is_held_out_and_the_run_points_here(run, photos, capsys):
    settings = recipes.read_settings(run / "recipe.yaml")
    assert settings["images"]["count"] == 12 and settings["images"]["split"] == "train"
    config = recipes.Data(name=str(photos))
    with pytest.raises(UserError, match="have no labels to evaluate with.*eval/embed.py"):
        pretrain.data.load(config, "report")


def test_the_end_of_a_run_without_labels_points_to_embed(photos, tmp_path, capsys):
    settings = [*TINY, *BACKBONE, *SMALL["mae"], "data.img_size=32", "backbone.patch_size=8", "train.steps=0"]
    pretrain.pretrain(objectives.read_recipe("mae", settings, str(photos)), tmp_path / "run")
    said = capsys.readouterr().out
    assert (
        "look at what it sees: python" in said
        and "embed.py --backbone" in said
        and "knn.py" not in said.split("Finished")[1]
    )
    assert "held out" not in said and "The pictures show" not in said


@pytest.mark.parametrize("kind", ["parquet", "npz"])
def test_the_file_holds_names_and_features(kind, run, photos, tmp_path, monkeypatch):
    of_all = embed.patches_of  # as of a larger set: a few at a time
    monkeypatch.setattr(embed, "patches_of", lambda *of: (part for all in of_all(*of) for part in (all[:5], all[5:])))
    call(embed, monkeypatch, "--backbone", run, "--output", tmp_path, "--format", kind, "--patches", "--groups", 2)
    backbone = weights.load(str(run)).eval()
    if kind == "npz":
        stored = dict(np.load(tmp_path / "features.npz", allow_pickle=False))
        shape = stored["patches"].shape[1:]
    else:
        table = pyarrow.parquet.read_table(tmp_path / "features.parquet")
        stored = {name: np.array(table[name].to_pylist()) for name in table.column_names}
        shape = tuple(json.loads(table.schema.metadata[b"patches_shape"]))
    assert shape == (4, 4, 16) and stored["name"].tolist() == [f"{i:02d}.png" for i in range(12)]
    assert set(stored["split"]) == {"train"} and "label" not in stored
    images = everything.load(recipes.Data(name=str(photos)), 3, torch.device("cpu"))
    for i in (0, 7):
        view = images.views(backbone.evaluation_view, [i], torch.device("cpu"))
        with torch.no_grad():
            [(prefix, patches)] = backbone.features(view)
        np.testing.assert_allclose(stored["cls"][i], prefix[0, 0], atol=1e-4)
        np.testing.assert_allclose(stored["mean"][i], patches.flatten(1, 2).mean(1)[0], atol=1e-4)
        np.testing.assert_allclose(stored["patches"][i].reshape(shape), patches[0], atol=5e-3)
    group = stored["group"].tolist()
    assert group[:6] == [group[0]] * 6 and group[6:] == [1 - group[0]] * 6  # red and blue
    assert np.isfinite(stored["map"]).all() and stored["map"].shape == (12, 2)

    page = (tmp_path / "embedding.html").read_text()
    for heading in ("Map", "Groups", "Nearest neighbours", "Near-duplicates", "Outliers", "What the patches see"):
        assert f">{heading}</h2>" in page
    assert page.count("<img") > 40 and "07.png" in page and "<script" not in page
    dots = page.partition("<svg")[2].partition("</svg>")[0].count("<circle")
    assert dots == 12


def test_all_splits_of_a_labelled_set_are_embedded(run, tmp_path, monkeypatch):
    for seed, (split, count) in enumerate((("train", 6), ("val", 4), ("test", 8))):
        pictures(tmp_path / "set" / split, count, labels=True, seed=seed)
    images = everything.load(recipes.Data(name=str(tmp_path / "set")), 3, torch.device("cpu"))
    counted = {name: images.split_names.count(name) for name in set(images.split_names)}
    assert counted == dict(train=6, val=4, test=8) and images.classes == ["blue", "red"]
    assert (images.labels >= 0).all() and len(images.files) == len(images) == len(images.labels)
    one = pictures(tmp_path / "one", 30, labels=True)  # divided for reports, and here whole
    whole = everything.load(recipes.Data(name=str(one)), 3, torch.device("cpu"))
    assert len(whole) == 30 and set(whole.split_names) == {"train"}
    call(embed, monkeypatch, "--backbone", run, "--data", one, "--output", tmp_path / "out")
    table = pyarrow.parquet.read_table(tmp_path / "out" / "features.parquet").to_pydict()
    assert {(f[:3], label) for f, label in zip(table["name"], table["label"], strict=True)} == {
        ("red", "red"),
        ("blu", "blue"),
    }
    assert "most frequent label" in (tmp_path / "out" / "embedding.html").read_text()


def test_bad_input_is_one_sentence(run, photos, tmp_path, monkeypatch):
    empty, single = tmp_path / "empty", tmp_path / "single"
    empty.mkdir()
    pictures(single, 1)
    for match, *arguments in (
        ("No images found under", "--backbone", run, "--data", empty),
        ("a single image, which there is nothing to compare with", "--backbone", run, "--data", single),
        ("pixels is no backbone", "--backbone", "pixels", "--data", photos),
        ("No images are named: pass --data", "--backbone", run / "backbone"),
    ):
        with pytest.raises(UserError, match=match):
            call(embed, monkeypatch, *arguments)
    with pytest.raises(UserError, match="have no labels to evaluate with.*eval/embed.py"):
        call(knn, monkeypatch, "--backbone", run)


def test_more_copies_than_neighbours_are_looked_at_are_told(tmp_path):
    rng = np.random.default_rng(0)
    copies = rng.normal(size=16) + 1e-3 * rng.normal(size=(20, 16))
    found = embedding.examine(np.concatenate([copies, rng.normal(size=(40, 16))]).astype(np.float32))
    assert len(found.duplicates(0.95)) < 190 and found.has_more(0.95)
    few = embedding.examine(np.concatenate([copies[:3], rng.normal(size=(40, 16))]).astype(np.float32))
    assert len(few.duplicates(0.95)) == 3 and not few.has_more(0.95)
