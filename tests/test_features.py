"""Frozen features: those of plain timm, kept on disk, the same on one process and two."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import timm
import torch
from accelerate import PartialState
from conftest import SMALL, small_recipe
from PIL import Image
from test_loop import ROOT, TINY, TORCHRUN, environment

import eval as eval_package
import ssl_vit
from eval.measure import cli, features
from ssl_vit import backbones, data, devices, engine, imports, system, views, weights
from ssl_vit import recipe as recipes
from ssl_vit.errors import UserError

DIGITS = ["data.img_size=8", "data.in_chans=1", "data.mean=[0.3]", "data.std=[0.3]"]


def small_source(folder, name="mae"):
    recipe = small_recipe(name, *DIGITS)
    backbone = backbones.build(recipe.backbone, recipe.data, 0).eval()
    return features.Source("small", folder, {}, backbone, (8, 8))


@pytest.fixture
def products():
    """How products are rounded is as before when the test ends."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.fixture
def state():
    return PartialState(cpu=True)


@pytest.fixture
def images():
    return data.load(recipes.Data(), "report")


def test_they_are_those_of_plain_timm_before_and_after_a_file(tmp_path, state, images):
    source = small_source(tmp_path)
    weights.save(source.backbone, tmp_path / "saved")
    plain = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True).eval()
    loaded = features.open_source(str(tmp_path / "saved"), recipes.Data(), None)
    loaded.folder = tmp_path / "other"
    with torch.no_grad():
        batch = views.whole(images.images, (8, 8), 1.0)
        mean, std = (torch.tensor(plain.pretrained_cfg[k]).view(-1, 1, 1) for k in ("mean", "std"))
        tokens = plain.forward_features((batch - mean) / std)
        each = plain.forward_intermediates((batch - mean) / std, indices=[0], norm=True, intermediates_only=True)
    for found in (features.extract(s, images, state, [0, -1]) for s in (source, loaded)):
        last = found.poolings(-1)
        assert np.allclose(last["cls"], tokens[:, 0], atol=1e-5)
        assert np.allclose(last["mean"], tokens[:, 1:].mean(1), atol=1e-5)
        assert np.allclose(found.poolings(0)["mean"], each[0].mean((2, 3)), atol=1e-5)
        assert found.flops_per_image > 0


def test_in_bf16_they_are_near_those_in_fp32_and_stored_apart(tmp_path, state, images):
    source = small_source(tmp_path)
    full = features.extract(source, images, state).poolings(-1)["cls"].copy()
    source.precision = "bf16"
    rounded = features.extract(source, images, state).poolings(-1)["cls"]
    batch = views.whole(images.images, (8, 8), 1.0)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        [(prefix, _)] = source.backbone.features(batch)
    assert np.array_equal(rounded, prefix[:, 0].float())
    assert 1e-4 < np.abs(rounded - full).max() < 0.1 and rounded.dtype == np.float32
    assert torch.equal(source.features(batch[:5])[0][0], source.features(batch)[0][0][:5])
    logits = source.logits(batch)  # no head: those of the pooled features
    assert logits.dtype == torch.float32 and np.allclose(logits.detach(), prefix[:, 0].float(), atol=0.1)
    source.precision = "fp32"
    assert np.array_equal(features.extract(source, images, state).poolings(-1)["cls"], full)


@pytest.mark.parametrize(
    ("asked", "cuda", "capability", "found"),
    [
        ("auto", True, (8, 0), "bf16"),
        ("auto", True, (9, 0), "bf16"),
        ("auto", True, (7, 5), "fp32"),
        ("auto", False, (9, 0), "fp32"),
        ("fp32", True, (9, 0), "fp32"),
        ("bf16", False, (7, 5), "bf16"),
        ("tf32", True, (8, 0), "tf32"),
    ],
)
def test_the_precision_is_that_of_the_device_unless_asked_for(monkeypatch, products, asked, cuda, capability, found):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    for flag in (True, False):  # which it leaves alone
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = flag
        assert system.precision(asked, cuda) == found
        assert torch.backends.cudnn.allow_tf32 is torch.backends.cuda.matmul.allow_tf32 is flag


@pytest.mark.parametrize("precision", ["fp32", "bf16", "tf32"])
def test_products_are_rounded_for_tf32_alone(products, precision):
    """In convolutions too, where torch's own default is tf32."""
    for flag in (True, False):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = flag
        system.set_products(precision)
        assert torch.backends.cudnn.allow_tf32 is torch.backends.cuda.matmul.allow_tf32 is (precision == "tf32")


def test_full_precision_is_without_autocast_and_without_tf32(products):
    """And how products are rounded is as before, after an error too."""
    matrix = torch.full((2, 2), 1 + 2**-12)
    for flag in (True, False):
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = flag, True
        with pytest.raises(ZeroDivisionError), torch.autocast("cpu", torch.bfloat16):
            with devices.full_precision(matrix):
                assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32
                assert (matrix @ matrix).dtype == torch.float32
                raise ZeroDivisionError
        assert torch.backends.cuda.matmul.allow_tf32 is flag and torch.backends.cudnn.allow_tf32
    with devices.full_precision(torch.empty(1, device="meta")):
        pass


def test_copies_that_nobody_waits_for_are_made_in_one_place():
    """Where it is decided from what and to what: another than from pinned memory may read what was freed since."""
    folders = (Path(module.__file__).parent for module in (ssl_vit, eval_package))
    found = [p.name for folder in folders for p in folder.rglob("*.py") if "non_blocking" in p.read_text()]
    assert found == ["devices.py"]
    seen = []
    tensor = SimpleNamespace(
        device=torch.device("cpu"), numel=lambda: 1, to=lambda place, non_blocking: seen.append(non_blocking)
    )
    tensor.pin_memory = lambda: tensor
    for device in ("cuda", "mps", "cpu"):
        devices.upload(tensor, torch.device(device))
    assert seen == [True, False, False]


def test_stored_features_depend_on_the_code_of_one_s_own_modules(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv(imports.VARIABLE, "")
    mine = tmp_path / "mine_of_features.py"
    mine.write_text("x = 1")
    features._code.cache_clear()
    plain = features._code()
    imports.load(["--import", str(mine)])
    assert imports.sources() == [mine]
    found = [plain]
    for text in ("x = 1", "x = 2"):
        mine.write_text(text)
        features._code.cache_clear()
        found.append(features._code())
    assert len(set(found)) == 3
    (package := tmp_path / "package_of_features").mkdir()  # without a file of its own
    (package / "part.py").write_text("y = 1")
    monkeypatch.chdir(tmp_path)
    imports.load(["--import", "package_of_features"])
    assert imports.sources() == [mine, package / "part.py"]
    features._code.cache_clear()


def test_training_and_evaluating_set_it(monkeypatch, products, tmp_path):
    monkeypatch.setattr(sys, "argv", ["knn.py"])
    for begin in (
        lambda: engine.start(small_recipe("mae", "train.precision=fp32", "monitor.trackers=none"), tmp_path),
        lambda: cli.EvalRequest(cli.parser("").parse_args(["--backbone", "pixels", "--data", "digits"])),
    ):
        torch.backends.cudnn.allow_tf32 = True
        begin()
        assert not torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize(("cuda", "capability"), [(False, (9, 0)), (True, (7, 5))])
def test_tf32_needs_a_gpu_that_has_it(monkeypatch, cuda, capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    with pytest.raises(UserError, match="tf32 needs an NVIDIA GPU of compute capability 8.0 or more: take fp32"):
        system.precision("tf32", cuda)


def test_they_are_computed_once_and_again_when_the_weights_differ(tmp_path, state, images, monkeypatch):
    source = small_source(tmp_path)
    first = features.extract(source, images, state).poolings(-1)["cls"].copy()
    calls = []
    forward = type(source.backbone).features
    monkeypatch.setattr(
        type(source.backbone),
        "features",
        lambda self, x, blocks=(-1,): calls.append(len(x)) or forward(self, x, blocks),
    )
    again = features.extract(source, images, state).poolings(-1)["cls"]
    assert np.array_equal(first, again) and max(calls) == 1  # one made-up image, to know shapes and FLOPs
    with torch.no_grad():
        source.backbone.model.norm.bias += 1
    moved = features.extract(source, images, state).poolings(-1)["cls"]
    assert np.allclose(moved, first + 1, atol=1e-5) and max(calls) > 1


def test_they_are_those_of_the_backbone_s_own_view(tmp_path, state, images):
    """A model of the same weights that is shown the middle of the images, or bicubic ones, has features of its own."""
    source = small_source(tmp_path)
    images.images = images.images // 2 + 60  # so that bicubic ones do not overshoot
    first = features.extract(source, images, state).poolings(-1)["cls"].copy()
    published = source.backbone.model.pretrained_cfg
    # of 8 px shown at 16, and then their middle half
    views_of = {"half": dict(crop_pct=0.5), "cubic": dict(crop_pct=0.5, interpolation="bicubic")}
    for name, view in views_of.items():
        source.backbone.model.pretrained_cfg = {**published, **view}
        mode = "bicubic" if name == "cubic" else "bilinear"
        shown = torch.nn.functional.interpolate(images.images.float() / 255, (16, 16), mode=mode, antialias=True)
        with torch.no_grad():
            expected = source.backbone(shown[:, :, 4:12, 4:12])[:, 0]
        found = features.extract(source, images, state).poolings(-1)["cls"]
        assert np.allclose(found, expected, atol=1e-4) and not np.allclose(found, first, atol=0.1), name
    assert len(list((tmp_path / "features").glob("*-cls.npy"))) == 3
    source.backbone.model.pretrained_cfg = published
    assert np.array_equal(features.extract(source, images, state).poolings(-1)["cls"], first)


def test_features_that_are_not_finite_are_refused_with_the_image(tmp_path, state, images, monkeypatch):
    source = small_source(tmp_path)
    forward = type(source.backbone).features

    def broken(self, batch, blocks=(-1,)):
        [(prefix, patches)] = forward(self, batch, blocks)
        prefix = prefix.clone()
        if len(batch) > 1:
            prefix[3] = torch.nan
        return [(prefix, patches)]

    monkeypatch.setattr(type(source.backbone), "features", broken)
    for _ in range(2):  # and nothing of it is kept
        with pytest.raises(UserError, match="image 3"):
            features.extract(source, images, state)


def test_a_batch_that_does_not_fit_is_computed_in_parts(tmp_path, state, images, monkeypatch):
    source, pool, seen = small_source(tmp_path), features.pool, []
    whole = features.extract(source, images, state)

    def small_memory(source, view, blocks):
        if view.any() and len(view) > room:  # a zero image tells the shapes
            raise torch.OutOfMemoryError
        seen.append(len(view))
        return pool(source, view, blocks)

    room = 100
    monkeypatch.setattr(features, "pool", small_memory)
    source.folder = tmp_path / "again"
    parts = features.extract(source, images, state)
    assert seen[1:] == [64] * 5 + [40]  # of 256 and 104: the size that fitted is kept
    for key, values in whole.arrays.items():
        assert np.allclose(values, parts.arrays[key], atol=1e-6)
    room, source.folder = 0, tmp_path / "never"
    with pytest.raises(UserError, match="Not even one image at a time"):
        features.extract(source, images, state)


def test_images_that_are_decoded_when_needed_give_the_same(tmp_path, state):
    pixels = np.random.default_rng(0).integers(0, 256, (30, 16, 16, 3), dtype=np.uint8)
    table = dict(image=list(map(Image.fromarray, pixels)), label=[i % 3 for i in range(30)])
    file = tmp_path / "own.parquet"
    datasets.Dataset.from_dict(table).to_parquet(file)
    recipe = small_recipe("mae")
    backbone = backbones.build(recipe.backbone, recipe.data, 0).eval()
    found = []
    for gigabytes in (4.0, 0.0):
        config = recipes.Data(name=str(file), cache_gb=gigabytes, subset=5)
        images = data.load(config, "train")
        assert (images.images is None) == (gigabytes == 0) and len(images) == 15
        source = features.Source("small", tmp_path / str(gigabytes), {}, backbone, (16, 16))
        found.append((images.labels, features.extract(source, images, state).poolings(-1)))
        first = images.images[3] if gigabytes else images.photo(3)
        assert any(np.array_equal(first.permute(1, 2, 0), p) for p in pixels)
    assert torch.equal(found[0][0], found[1][0])
    for pooling, values in found[0][1].items():
        assert np.allclose(values, found[1][1][pooling], atol=1e-5)


@pytest.mark.matrix
def test_two_processes_give_what_one_gives(tmp_path, alone):
    """k-NN and MAE's linear probe through the scripts, by torchrun: the same rows, every test image once."""
    settings = ["--recipe", "mae", *TINY, *SMALL["mae"], "train.steps=0", "--output", "run"]
    subprocess.run(
        [sys.executable, str(ROOT / "ssl_vit/pretrain.py"), *settings], check=True, env=environment(), cwd=tmp_path
    )
    evaluators = [["knn.py"], ["linear_probe.py", "--preset", "mae", "--epochs", "2"]]
    found = []
    for launcher in ([sys.executable], TORCHRUN):
        for script, *arguments in evaluators:
            command = [*launcher, str(ROOT / "eval" / script), "--backbone", "run", *arguments]
            subprocess.run(command, check=True, env=environment(), cwd=tmp_path, capture_output=True, timeout=300)
        lines = (tmp_path / "run/results.jsonl").read_text().splitlines()
        found.append({(r["protocol"], r["pooling"]): r for r in map(json.loads, lines)})
        (tmp_path / "run/results.jsonl").unlink()
        for file in (tmp_path / "run/features").iterdir():
            file.unlink()
    one, two = found
    assert one.keys() == two.keys() and ("linear-mae-2ep", "cls") in one
    for key, row in one.items():
        assert row["n"] == two[key]["n"] == 360
        assert row["value"] == pytest.approx(two[key]["value"], abs=2 / 360), key  # a near tie may fall otherwise
        assert row["predictions"] == two[key]["predictions"]
