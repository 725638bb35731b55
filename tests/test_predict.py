"""A class and its probability for every image: by a fine-tuned run, and by the probe that was kept."""

import csv
import dataclasses
import io
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import torch
from conftest import SMALL
from PIL import Image
from several import Several
from test_embed import call
from test_loop import ROOT, TINY

from eval import embed, linear_probe, predict
from eval.measure import everything, features, linear_heads, probing, results
from ssl_vit import data, objectives, pretrain, system, weights
from ssl_vit import recipe as recipes
from ssl_vit.errors import UserError


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A backbone and a fine-tuned run, on digits."""
    folder = tmp_path_factory.mktemp("runs")
    assert (
        pretrain.pretrain(objectives.read_recipe("mae", [*TINY, *SMALL["mae"], "train.steps=1"], None), folder / "mae")
        == 0
    )
    settings = [*TINY, "train.steps=4", f"backbone.init_from={folder / 'mae'}", "backbone.drop_path_rate=0"]
    assert pretrain.pretrain(objectives.read_recipe("finetune", settings, None), folder / "tuned") == 0
    return folder


def both():
    config = recipes.Data(name="digits")
    return [data.load(config, role) for role in ("train", "report")]


def test_a_fine_tuned_run_predicts_every_image(runs, tmp_path, monkeypatch, capsys):
    target = tmp_path / "p.csv"
    call(predict, monkeypatch, "--backbone", runs / "tuned", "--data", "digits", "--output", target)
    rows = list(csv.DictReader(target.open()))
    backbone = weights.load(str(runs / "tuned")).eval()
    with torch.no_grad():
        parts = [backbone.classify(part.images.float() / 255).softmax(1) for part in both()]
    found, truth = torch.cat(parts).numpy(), np.concatenate([part.labels for part in both()])
    assert len(rows) == 1797 and [row["predicted"] for row in rows] == [str(c) for c in found.argmax(1)]
    np.testing.assert_allclose([float(row["probability"]) for row in rows], found.max(1), atol=2e-6)
    assert [row["label"] for row in rows] == [str(c) for c in truth]
    said = capsys.readouterr().out
    right = found.argmax(1) == truth
    for part, split in zip((right[:1437], right[1437:]), dict.fromkeys(row["split"] for row in rows), strict=True):
        assert f"{split}: {len(part):,} labelled images: {100 * part.mean():.1f} ± " in said
    assert said.count("a classifier of this data set was trained on them") == 1
    worst = int(np.argmax(np.where(right, 0, found.max(1))))
    first = said.split("The most confident mistakes:")[1].strip().splitlines()[2].split("|")
    assert [cell.strip() for cell in first[1:2]] == ["train" if worst < 1437 else "the fixed 360"]
    assert [cell.strip() for cell in first[3:6]] == [
        str(truth[worst]),
        str(found[worst].argmax()),
        f"{found[worst].max():.2f}",
    ]


@pytest.mark.parametrize("which", ["tuned", "mae"])
def test_two_processes_predict_what_one_does(which, runs, tmp_path, monkeypatch, alone):
    """And a probe the same of a few images at a time."""
    run, chunks = shutil.copytree(runs / which, tmp_path / which), linear_heads.FeatureMatrix.chunks
    if which == "mae":
        call(linear_probe, monkeypatch, "--backbone", run, "--labels", "100")
        monkeypatch.setattr(linear_heads.FeatureMatrix, "chunks", lambda self: chunks(self, 100))
    words = ["--backbone", str(run), "--data", "digits", "--output"]
    call(predict, monkeypatch, *words, tmp_path / "one.csv")
    monkeypatch.setattr(linear_heads.FeatureMatrix, "chunks", chunks)
    several = Several(predict.main, tmp_path, *words, str(tmp_path / "two.csv"))
    assert several.wait() == [0, 0], several.said
    one, two = (list(csv.DictReader((tmp_path / f"{name}.csv").open())) for name in ("one", "two"))
    assert len(one) == len(two) == 1797
    for a, b in zip(one, two, strict=True):
        assert a | dict(probability=0) == b | dict(probability=0)
        assert float(a["probability"]) == pytest.approx(float(b["probability"]), abs=2e-6)


def test_the_probe_of_the_sweep_is_kept_and_predicts_the_same(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="has no classifier: fine-tune it .*or run eval/linear_probe.py"):
        call(predict, monkeypatch, "--backbone", runs / "mae", "--data", "digits")
    monkeypatch.setattr(probing, "STEPS", 40)
    monkeypatch.setattr(probing, "EPOCHS", 1)
    call(linear_probe, monkeypatch, "--backbone", runs / "mae")
    target = tmp_path / "p.parquet"
    call(predict, monkeypatch, "--backbone", runs / "mae", "--data", "digits", "--output", target)
    rows = pyarrow.parquet.read_table(target).to_pylist()
    [row] = [row for row in results.read(runs / "mae") if row["pooling"] == "chosen"]
    stored = np.load(runs / "mae" / row["predictions"])
    tested = [int(r["predicted"]) for r in rows if r["split"] == "the fixed 360"]
    assert tested == stored["predicted"].tolist()
    found = [r["probability"] for r in rows if r["split"] == "the fixed 360"]
    np.testing.assert_allclose(found, stored["p_predicted"], atol=1e-3)  # float16
    assert "The most confident mistakes" in capsys.readouterr().out

    [kept] = (runs / "mae" / "probes").iterdir()
    asked: list[str] = []
    monkeypatch.setattr(system, "precision", lambda precision, cuda: asked.append(precision) or "fp32")
    for words in ([], ["--precision", "auto"], ["--precision", "bf16"]):
        call(predict, monkeypatch, "--backbone", runs / "mae", "--data", "digits", *words)
    assert asked == ["fp32", "fp32", "bf16"]  # of the probe, unless another is asked for
    (runs / "mae" / "probes" / "digits-99.npz").write_bytes(kept.read_bytes())
    with pytest.raises(UserError, match="has several probes .*choose one by --probe"):
        call(predict, monkeypatch, "--backbone", runs / "mae", "--data", "digits")
    (runs / "mae" / "probes" / "digits-99.npz").write_bytes(kept.read_bytes()[:100])
    with pytest.raises(UserError, match="is no probe of eval/linear_probe.py"):
        call(predict, monkeypatch, "--backbone", runs / "mae", "--data", "digits", "--probe",
             runs / "mae" / "probes" / "digits-99.npz")  # fmt: skip
    with pytest.raises(UserError, match="was trained on features of other weights"):
        call(predict, monkeypatch, "--backbone", runs / "tuned", "--data", "digits", "--probe", kept)


def test_names_of_another_number_are_refused(runs, tmp_path, monkeypatch):
    settings = recipes.read_settings(runs / "tuned" / "recipe.yaml")
    settings["images"]["classes"] = ["a", "b"]
    monkeypatch.setattr(recipes, "read_settings", lambda path: settings)
    with pytest.raises(UserError, match="classifies into 10 classes and names 2"):
        call(predict, monkeypatch, "--backbone", runs / "tuned", "--data", "digits")
    with pytest.raises(UserError, match="must end in .csv or .parquet"):
        call(predict, monkeypatch, "--backbone", runs / "tuned", "--data", "digits", "--output", "p.txt")
    with pytest.raises(UserError, match="pixels has no classifier"):
        call(predict, monkeypatch, "--backbone", "pixels", "--data", "digits")


def test_deep_images_are_read_in_the_range_of_the_training(tmp_path):
    """A dimmer folder of 16-bit images is dim to the model, too."""
    for name, top in (("train", 4095), ("new", 1023)):
        (tmp_path / name).mkdir()
        values = np.linspace(0, top, 64).astype(np.uint16).reshape(8, 8)
        for i in range(3):
            Image.fromarray(np.roll(values, i)).save(tmp_path / name / f"{i}.png")
    trained = data.load(recipes.Data(name=str(tmp_path / "train")), "train")
    settings = dict(data=dict(name="train", range=list(trained.range), background="white", layout=None))
    config = features.read_as(settings, recipes.Data(name=str(tmp_path / "new")))
    images = everything.load(config, 1, torch.device("cpu")).splits[0]
    assert trained.range == images.range and trained.images.max() == 255 and 60 < images.images.max() < 68
    assert features.read_as({}, recipes.Data(name="digits")) == recipes.Data(name="digits")
    own = dict(data=dict(name="a", range=[0, 9], pages="first", label_column="y", background="black"))
    other, same = (features.read_as(own, recipes.Data(name=name, range=[0, 5])) for name in ("b", "a"))
    assert other == recipes.Data(name="b", range=[0, 5], pages="first", background="black")  # what is open is filled
    assert same == dataclasses.replace(other, name="a", label_column="y")


def picture(folder, value):
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8), value).save(folder / f"{value}.png")


def test_every_split_has_its_classes_by_name_where_training_has_none(tmp_path):
    """Each split numbers its own then, and c is the second of val's."""
    for i, (split, names) in enumerate({"train": [""], "test": ["a", "b", "c"], "val": ["a", "c"]}.items()):
        for j, name in enumerate(names):
            for k in range(2):
                picture(tmp_path / "photos" / split / name, 60 * i + 10 * j + k)
    images = everything.load(recipes.Data(name=str(tmp_path / "photos")), 1, torch.device("cpu"))
    named = [images.classes[label] if label >= 0 else "" for label in images.labels]
    assert list(zip(images.split_names, named, strict=True)) == [
        *[("train", "")] * 2,
        *(("test", name) for name in "aabbcc"),
        *(("val", name) for name in "aacc"),
    ]


def test_images_of_a_table_keep_their_place_in_their_split(tmp_path, monkeypatch):
    """Also where a tenth of it is held out, an image is in another split too, and a broken one is left out."""
    kinds = datasets.Features(image=datasets.Image(), label=datasets.Value("int64"))
    pictures = np.random.default_rng(0).integers(0, 256, (60, 8, 8), dtype=np.uint8)

    def cell(image):
        stream = io.BytesIO()
        Image.fromarray(image).save(stream, "PNG")
        return dict(bytes=stream.getvalue(), path=None)

    def loaded(name, **rules):
        found = everything.load(recipes.Data(name=str(tmp_path / name), **rules), 1, torch.device("cpu"))
        pixels = torch.cat([part.images for part in found.splits])[:, 0].numpy()
        return found, list(zip(found.split_names, map(int, found.files), strict=True)), pixels

    cells = [cell(image) for image in pictures]
    table = datasets.Dataset.from_dict(dict(image=cells, label=[i % 3 for i in range(60)]), features=kinds)
    table.to_parquet(tmp_path / "one.parquet")
    _, named, pixels = loaded("one.parquet")
    assert sorted(named) == [("train", i) for i in range(60)] and named != sorted(named)
    assert all((pixels[k] == pictures[i]).all() for k, (_, i) in enumerate(named))

    (tmp_path / "two").mkdir()
    broken = [*cells[:20], dict(bytes=b"broken", path=None), *cells[20:40]]
    for split, chosen in {"train": broken, "test": [cells[3], *cells[40:60]]}.items():
        table = datasets.Dataset.from_dict(
            dict(image=chosen, label=[i % 3 for i in range(len(chosen))]), features=kinds
        )
        table.to_parquet(tmp_path / "two" / f"{split}.parquet")
    found, named, pixels = loaded("two", skip_broken=True)
    stays = [i for i in range(41) if i != 20]
    assert named == [*(("train", i) for i in stays), *(("test", i) for i in range(21))]
    shown = [pictures[i - (i > 20)] for i in stays] + [pictures[3], *pictures[40:60]]
    assert (pixels == np.stack(shown)).all()
    assert found.titles[0] == "train: image 0" and found.titles[-1] == "test: image 20"
    train = data.load(recipes.Data(name=str(tmp_path / "two"), skip_broken=True), "train")
    assert train.numbers.tolist() == [i for i in stays if i != 3]  # which judges by test
    part = train.part(torch.tensor([2, 5]))
    assert part.numbers.tolist() == [2, 6] and part.ledger["used"] == 2 and part.ledger["used_of_split"] == 39
    assert part.ledger["labels_per_class"] == {"0": 1, "1": 0, "2": 1}


@pytest.mark.parametrize(
    ("kind", "paths", "names"),
    [
        ("bytes", lambda i, _: f"p{i % 7}_{i}.png", lambda i: f"p{i % 7}_{i}.png"),
        ("plain struct", lambda i, _: f"p{i % 7}_{i}.png", lambda i: f"p{i % 7}_{i}.png"),
        ("bytes", lambda i, _: f"{i}.png" if i != 50 else None, str),  # not even in the part whose images all have one
        ("bytes", lambda i, _: f"{i // 2}.png", str),  # two of one name cannot be told apart
        ("file", lambda i, _: f"{i % 2}/{i}.png", lambda i: f"{i % 2}/{i}.png"),
        ("file", lambda i, folder: f"{folder}/{i % 2}/{i}.png", lambda i: f"{i % 2}/{i}.png"),
        ("array", None, str),
    ],
)
def test_images_of_a_table_have_the_names_of_their_files(kind, paths, names, tmp_path):
    """Of the cells' paths, if these tell all rows of the split apart; else their places in the split."""
    pictures = np.random.default_rng(0).integers(0, 256, (60, 8, 8), dtype=np.uint8)
    cells = []
    for i, image in enumerate(pictures):
        stream = io.BytesIO()
        Image.fromarray(image).save(stream, "PNG")
        path = paths and paths(i, tmp_path)
        if kind == "file":
            (tmp_path / path).parent.mkdir(exist_ok=True)
            (tmp_path / path).write_bytes(stream.getvalue())
        cells.append(dict(array=image, file=path).get(kind, dict(bytes=stream.getvalue(), path=path)))
    own = dict(bytes=datasets.Value("binary"), path=datasets.Value("string"))
    feature = {"bytes": datasets.Image(), "plain struct": own, "file": datasets.Value("string")}.get(kind)
    kinds = datasets.Features(image=feature or datasets.Array2D((8, 8), "uint8"), label=datasets.Value("int64"))
    table = datasets.Dataset.from_dict(dict(image=cells, label=[i % 3 for i in range(60)]), features=kinds)
    table.to_parquet(tmp_path / "images.parquet")
    found = everything.load(recipes.Data(name=str(tmp_path / "images.parquet")), 1, torch.device("cpu"))
    assert len(found.splits) == 2  # a tenth is held out
    expected = {names(i): image for i, image in enumerate(pictures)}
    shown = torch.cat([part.images for part in found.splits])[:, 0].numpy()
    assert sorted(found.files) == sorted(expected)
    assert all((image == expected[name]).all() for name, image in zip(found.files, shown, strict=True))
    part = found.splits[0].part(torch.tensor([2, 5]))
    assert part.names() == (None if names is str else [found.files[2], found.files[5]])


def test_every_file_of_every_split_has_its_row_in_one_order(tmp_path):
    """Also copies that training leaves out. Words are hashed with another seed by every process, as by the two of a
    launcher, and a set of them has another order."""
    for i, split in enumerate(("train", "val", "test", "extra")):
        for k in range(4):
            picture(tmp_path / "photos" / split / "ab"[k % 2], 40 * i + k)
    for split in ("val", "test"):
        shutil.copy(tmp_path / "photos/train/a/0.png", tmp_path / "photos" / split / "b" / "copy.png")
    found = []
    for seed in range(4):
        code = "import sys, torch; from eval.measure import everything; from ssl_vit import recipe as recipes; "
        code += f"images = everything.load(recipes.Data(name={str(tmp_path / 'photos')!r}), 1, torch.device('cpu')); "
        code += "print('rows', list(zip(images.split_names, images.files)))"
        environment = dict(os.environ, PYTHONHASHSEED=str(seed))
        said = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
        found.append(said.stdout.splitlines()[-1])
    assert found[0].startswith("rows") and len(set(found)) == 1
    rows = eval(found[0].removeprefix("rows"))
    there = [str(file.relative_to(tmp_path / "photos")) for file in (tmp_path / "photos").rglob("*.png")]
    assert sorted(f"{split}/{name}" for split, name in rows if split != "extra") == sorted(
        name for name in there if not name.startswith("extra")
    )


def test_a_run_names_its_images_and_is_no_folder_of_them(runs, tmp_path, monkeypatch):
    words = ["--backbone", runs / "tuned", "--data", runs / "mae", "--output"]
    call(predict, monkeypatch, *words, tmp_path / "x.csv")
    rows = list(csv.DictReader((tmp_path / "x.csv").open()))
    with pytest.raises(UserError, match="Cannot write .*x.csv"):
        call(embed, monkeypatch, *words, tmp_path / "x.csv")
    call(embed, monkeypatch, *words, tmp_path)
    assert pyarrow.parquet.read_metadata(tmp_path / "features.parquet").num_rows == 1797
    assert len(rows) == 1797 and {row["split"] for row in rows} == {"train", "the fixed 360"}
    with pytest.raises(UserError, match="mae is a run, and its images lie elsewhere"):
        data.load(recipes.Data(name=str(runs / "mae")), "train")


def test_a_trained_run_without_its_log_is_not_taken_for_untrained(runs, tmp_path, monkeypatch):
    copy = shutil.copytree(runs / "mae", tmp_path / "copy", ignore=shutil.ignore_patterns("log.jsonl"))
    with pytest.raises(UserError, match="copy was trained, and its log.jsonl, .* or pass .*copy/backbone"):
        call(linear_probe, monkeypatch, "--backbone", copy, "--labels", "100")


def test_so_few_images_that_none_is_held_out_are_all_predicted(tmp_path):
    names = ("0.png", "1.png", "2.png", "3.png")  # none of which is in the tenth
    for i, _ in enumerate(names):
        picture(tmp_path / "few" / "ab"[i % 2], i)
    images = everything.load(recipes.Data(name=str(tmp_path / "few")), 1, torch.device("cpu"))
    assert len(images) == 4 and images.classes == ["a", "b"]


def test_the_part_that_a_classifier_was_trained_on_is_told_apart():
    """Also where the set has one split, of which a tenth is held out."""
    rows = [dict(name=str(i), split="train", predicted="a", probability=0.5, label="ab"[i > 29]) for i in range(40)]
    parts = ["train (the other nine tenths)"] * 30 + ["train (hashed tenth)"] * 10
    said = predict.judged(rows, ["a", "b"], parts).splitlines()
    assert said[0] == (
        "train (the other nine tenths): 30 labelled images: 100.0 (88.6 to 100.0) % are correct; a classifier of this "
        "data set was trained on them."
    )
    assert said[1] == "train (hashed tenth): 10 labelled images: 0.0 (0.0 to 27.8) % are correct."


@pytest.mark.parametrize("command", [predict, embed])
def test_a_run_on_permuted_pixels_is_shown_permuted_images(command, runs, tmp_path, monkeypatch):
    asked = []

    def load(config, channels, device):
        asked.append(config)
        raise UserError("seen")

    monkeypatch.setattr(everything, "load", load)
    monkeypatch.setattr(features.Source, "permuted", True)
    with pytest.raises(UserError, match="seen"):
        call(command, monkeypatch, "--backbone", runs / "tuned", "--data", "digits")
    assert asked[0].permute_pixels and asked[0].img_size == [8, 8]


def test_deep_images_are_read_in_the_range_of_the_probe(runs, tmp_path, monkeypatch):
    """Published weights have none of their own."""
    asked, kept = [], SimpleNamespace(range=[0.0, 4095.0], precision="fp32")
    monkeypatch.setattr(predict.kept_probes, "read", lambda source, file: kept)
    monkeypatch.setattr(
        everything, "load", lambda config, *rest: asked.append(config) or (_ for _ in ()).throw(UserError("seen"))
    )
    with pytest.raises(UserError, match="seen"):
        call(predict, monkeypatch, "--backbone", runs / "mae" / "backbone", "--data", "digits")
    assert asked[0].range == [0.0, 4095.0]
