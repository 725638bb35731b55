"""data.permute_pixels: one fixed permutation for every image, split, seed and run, in training and in evaluation."""

import dataclasses

import numpy as np
import pytest
import torch
import yaml
from accelerate import PartialState
from PIL import Image
from test_loop import STEPS, TINY, Started, arguments, killed, log_of, run

from eval import finetune
from eval.measure import cli, features, fine_tuning
from ssl_vit import data, monitor, neighbours, objectives, pretrain, views, weights
from ssl_vit import recipe as recipes
from ssl_vit.errors import UserError
from ssl_vit.randomness import Order, permutation

PERMUTED = "data.permute_pixels=true"
P = permutation(0, 0, 64, "pixels")


def by_hand(images: torch.Tensor, order=P) -> torch.Tensor:
    """Place by place: place i of the result, in raster order, shows what was at place order[i]."""
    made, width = torch.empty_like(images), images.shape[-1]
    for to, at in enumerate(order.tolist()):
        made[..., to // width, to % width] = images[..., at // width, at % width]
    return made


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three runs of two steps: on images as they are stored, and on permuted ones with two seeds."""
    folder = tmp_path_factory.mktemp("permuted")
    for name, settings in (("plain", []), ("permuted", [PERMUTED]), ("other", [PERMUTED, "train.seed=5"])):
        recipe = objectives.read_recipe("mae", [*TINY, "train.steps=2", "monitor.knn_every=2", *settings], None)
        assert pretrain.pretrain(recipe, folder / name) == 0
    return folder


def request(*backbones, extra=()):
    return cli.EvalRequest(cli.parser("").parse_args(["--backbone", *map(str, backbones), "--threads", "1", *extra]))


def test_the_law_is_one_bijection_that_leaves_hardly_a_pixel_in_its_place():
    assert sorted(P.tolist()) == list(range(64)) and (np.arange(64) == P).sum() <= 3
    assert P[:8].tolist() == [11, 37, 45, 25, 7, 34, 32, 1]  # as it was when runs were made by it
    large = permutation(0, 0, 1024, "pixels")
    assert sorted(large.tolist()) == list(range(1024))
    neighbours_left = np.abs(np.diff(large.reshape(32, 32), axis=1)) == 1
    assert neighbours_left.mean() < 0.01


def test_all_channels_images_and_splits_go_through_the_same(tmp_path):
    stored = np.random.default_rng(0).integers(0, 256, (12, 6, 10, 3), dtype=np.uint8)
    for i, array in enumerate(stored):
        place = tmp_path / ("test" if i > 7 else "train") / f"{i:02}.png"
        place.parent.mkdir(exist_ok=True)
        Image.fromarray(array).save(place)
    order = permutation(0, 0, 60, "pixels")
    for role, chosen in (("train", slice(8)), ("report", slice(8, 12))):
        plain, found = (
            data.load(recipes.Data(name=str(tmp_path), permute_pixels=permute), role) for permute in (False, True)
        )
        images = torch.from_numpy(stored[chosen]).permute(0, 3, 1, 2)
        assert torch.equal(plain.images, images) and torch.equal(found.images, by_hand(images, order))
        assert plain.fingerprint != found.fingerprint and plain.info() == found.info()


def test_the_stored_image_is_permuted_and_crops_are_cut_from_that():
    plain, found = (data.load(recipes.Data(permute_pixels=permute), "train") for permute in (False, True))
    spec, rows = views.crop_flip((8, 8), 0.5, (0.5, 1.0)), np.arange(16)
    plan = (0, rows, Order(3, len(plain), 16).indices(0, rows))
    [chunk] = data.chunks(found, spec, iter([plan]), 3, torch.device("cpu"), 0)
    expected = views.make(spec, by_hand(plain.images[chunk.indices]), chunk.draw)["image"]
    assert torch.equal(chunk.views(found, spec)["image"], expected)
    [view] = data.evaluation_views(found, views.evaluation((8, 8)), torch.device("cpu"), torch.arange(5))
    assert torch.allclose(view * 255, by_hand(plain.images[:5]).float(), atol=1e-3)


def test_every_run_is_shown_the_images_of_its_own_training(runs):
    """In one command, whichever is named first; --data does not change it, for the permutation is the backbone's."""
    stored = [data.load(recipes.Data(), role).images for role in ("train", "report")]
    names = ["plain", "permuted", "other"]
    for order, extra in ((names, ()), (names[::-1], ()), (names, ("--data", str(runs / "permuted")))):
        asked = request(*(runs / name for name in order), "pixels", extra=extra)
        for source in asked.sources:
            permuted = source.folder.name in ("permuted", "other")
            expected = map(by_hand, stored) if permuted else stored
            for images, wanted in zip(asked.images(source), expected, strict=True):
                assert torch.equal(images.images, wanted), source.name


def test_features_are_those_of_the_network_on_images_permuted_by_hand(runs):
    state = PartialState(cpu=True)
    plain = data.load(recipes.Data(), "report")
    asked = request(runs / "permuted")
    [source] = asked.sources
    _, test = asked.images(source)
    found = features.extract(source, test, state).poolings(-1)
    with torch.no_grad():
        [(prefix, patches)] = source.backbone.features(by_hand(plain.images).float() / 255)
    assert np.allclose(found["cls"], prefix[:, 0], atol=1e-5)
    assert np.allclose(found["mean"], patches.flatten(1, 2).mean(1), atol=1e-5)
    others = features.extract(source, plain, state).poolings(-1)  # in files of their own
    assert np.abs(others["mean"] - found["mean"]).max() > 0.01
    assert len(list((source.folder / "features").glob("*mean.npy"))) == 2


def test_pixels_have_the_same_neighbours(tmp_path):
    """Distances do not change: k-NN cannot tell that pixels were permuted."""
    source = features.Source("pixels", tmp_path, {}, None, None)
    said = []
    for permute in (False, True):
        train, test = (data.load(recipes.Data(permute_pixels=permute), role) for role in ("train", "report"))
        bank, queries = features.extract_both(source, train, test, PartialState(cpu=True))
        pair = bank.arrays[0, "raw 8x8"], queries.arrays[0, "raw 8x8"]
        said.append(neighbours.predict(pair[0], train.labels.numpy(), pair[1], k=20))
    assert len(list((tmp_path / "features").glob("*.npy"))) == 4
    assert np.array_equal(*said) and (said[0] == test.labels.numpy()).mean() > 0.95


def test_the_monitor_and_the_pictures_see_permuted_images(runs):
    recipe = objectives.read_recipe("mae", [*TINY, PERMUTED], None)
    images = data.load(recipe.data, "train")
    recipe.add_dataset_info(images.info())
    shown, _ = pretrain.to_show(recipe, images, torch.device("cpu"))
    report = data.load(recipes.Data(), "report")
    assert any(torch.allclose(shown[0], by_hand(image) / 255, atol=1e-5) for image in report.images)
    plain = data.load(recipes.Data(), "train")
    watched = monitor.OnlineKnn(dataclasses.replace(plain, images=by_hand(plain.images)), recipe, torch.device("cpu"))
    [logged] = [line for line in log_of(runs / "permuted") if "knn" in line]
    found = watched(weights.load(str(runs / "permuted")).eval())
    assert logged["step"] == 2 and {key: logged[key] for key in found} == pytest.approx(found, rel=1e-4)
    assert (runs / "permuted" / "pictures" / "reconstruction.png").exists()


def test_fine_tuning_takes_it_from_the_run(runs):
    asked = request(runs / "plain", runs / "permuted")
    for source in asked.sources:
        recipe = finetune.make_recipe(source, asked.config, ["train.steps=2"])
        assert recipe.data.permute_pixels == source.permuted == (source.folder.name == "permuted")
        own = data.load(recipe.data, "train")
        assert own.fingerprint == asked.images(source)[0].fingerprint
    with pytest.raises(UserError, match="data.permute_pixels cannot be set here"):
        fine_tuning.parse(["--backbone", "x", PERMUTED])


def test_a_run_from_before_the_setting_is_one_without(runs, tmp_path):
    settings = yaml.safe_load((runs / "plain" / "recipe.yaml").read_text())
    del settings["data"]["permute_pixels"]
    assert not features.Source("old", tmp_path, settings, None, None).permuted
    assert features.data_of(settings) == dataclasses.replace(recipes.Data(), hflip=False)
    part = settings["data"] | dict(subset=10, subset_seed=3)
    assert features.data_of(settings | dict(data=part)).subset is None  # an evaluator has all labels


def test_killed_it_ends_with_the_same_bytes_and_goes_on_with_no_other_images(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(tmp_path, *arguments("mae", PERMUTED, "--output", str(whole)))
    killed(tmp_path, 5, *arguments("mae", PERMUTED, "--output", str(parts)))
    refused = Started(tmp_path, *arguments("mae", "--output", str(parts)))
    assert refused.wait() == 2 and "data.permute_pixels, images.fingerprint" in refused.said
    run(tmp_path, *arguments("mae", PERMUTED, "--output", str(parts)))
    first, second = ((r / "backbone" / "model.safetensors").read_bytes() for r in (whole, parts))
    assert first == second and log_of(parts)[-1]["step"] == STEPS
    other = tmp_path / "other"
    run(tmp_path, *arguments("mae", "--output", str(other)))
    assert (other / "backbone" / "model.safetensors").read_bytes() != first


def test_images_of_other_sizes_are_refused(tmp_path):
    for i, size in enumerate(((8, 8), (8, 12))):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (*size, 3), dtype=np.uint8)).save(
            tmp_path / f"{i}.png"
        )
    for asked, said in (
        (recipes.Data(name=str(tmp_path), permute_pixels=True, img_size=8), "differ in size or do not fit"),
        (recipes.Data(permute_pixels=True, img_size=16), r"digits \(train\) are 8x8, not 16x16"),
    ):
        with pytest.raises(UserError, match=said) as error:
            data.load(asked, "train")
        assert len(error.value.sentences) == 1 and "data.permute_pixels=true needs" in str(error.value)
