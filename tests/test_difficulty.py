"""How hard a corruption is: known answers on made-up images, and what the script does with runs of every kind."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL, small_objective
from PIL import Image
from sklearn.linear_model import Ridge
from test_corruption import ALL
from test_loop import TINY

from eval import difficulty
from ssl_vit import corruption, objectives, pretrain
from ssl_vit.errors import UserError
from ssl_vit.patches import patchify
from ssl_vit.randomness import Draw

NOISE = [*ALL, "objective.corruption=gaussian", "objective.noise_sigma=[0.5,0.5]"]


def independent(count, size=16):
    """Images whose standardised values are independent and standard normal (they need not lie in [0, 1])."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ([0.5, 0.45, 0.4], [0.25, 0.2, 0.3]))
    values = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))
    return values * std + mean


def smooth(count, size=16):
    """Images in [0, 1] whose neighbouring pixels are alike."""
    return corruption.blur(independent(count, size), torch.zeros(count), (1.5, 1.5)).clamp(0, 1)


def test_of_independent_values_the_ridge_is_wiener_s_filter():
    found = difficulty.measure(small_objective("mae", *NOISE), independent(400), 0)
    assert found["mean_patch"] == pytest.approx(1, abs=0.01)
    assert found["identity"] == pytest.approx(0.25, rel=0.02)
    assert found["linear"] == pytest.approx(0.25 / 1.25, rel=0.03)
    assert found["images"] == 400 and found["patches"] == 80 * 64 and found["fitted_patches"] == 320 * 64


def test_the_autoencoder_has_nothing_to_do():
    found = difficulty.measure(small_objective("mae", *ALL, "objective.norm_pix_loss=false"), smooth(50), 0)
    assert found["identity"] == 0 and found["linear"] < 1e-6 and found["mean_patch"] > 0.9


@pytest.mark.parametrize("name", ["mae", "simmim", "beit"])
def test_of_hidden_patches_only_neighbours_tell(name):
    objective = small_objective(name)
    alone, alike = (difficulty.measure(objective, images(400), 0) for images in (independent, smooth))
    assert alone["identity"] == alone["mean_patch"] == pytest.approx(1, abs=0.02)
    assert alone["linear"] == pytest.approx(1, abs=0.03)
    assert alike["identity"] == alike["mean_patch"] and alike["linear"] < 0.8
    assert alike["patches"] == 80 * objective.num_masked


def test_the_errors_are_those_of_a_plain_loop():
    """Ridge regression by scikit-learn on neighbourhoods that are looked up patch by patch."""
    objective, images = small_objective("masked-patch"), smooth(40)
    found = difficulty.measure(objective, images, 3)
    seen, absent, counted = objective.encoder_inputs(images, Draw(3, 0, torch.arange(40)))
    clean = patchify(objective.backbone.normalise(images), (2, 2)).double().numpy()
    given = patchify(seen, (2, 2)).double().numpy()
    mean = clean[np.arange(40) % 5 < 4].mean((0, 1))
    x, y, itself = ({part: [] for part in ("fit", "scored")} for _ in range(3))
    for i in range(40):
        part = "scored" if i % 5 == 4 else "fit"
        for n in counted[i].nonzero().flatten().tolist():
            row = []
            for r in (n // 8 - 1, n // 8, n // 8 + 1):
                for c in (n % 8 - 1, n % 8, n % 8 + 1):
                    visible = 0 <= r < 8 and 0 <= c < 8 and not absent[i, 8 * r + c]
                    row += [*(given[i, 8 * r + c] - mean), 1.0] if visible else [0.0] * 13
            x[part].append(row)
            y[part].append(clean[i, n] - mean)
            itself[part].append(np.zeros(12) if absent[i, n] else given[i, n] - mean)
    x, y, itself = ({part: np.array(rows) for part, rows in values.items()} for values in (x, y, itself))
    strength = found["penalty"] * (x["fit"] ** 2).sum(0).mean()
    predicted = Ridge(alpha=strength, solver="cholesky").fit(x["fit"], y["fit"]).predict(x["scored"])
    colour = np.tile(mean.reshape(-1, 3).mean(0), 4) - mean
    variance = ((y["scored"] - colour) ** 2).sum()
    assert found["mean_patch"] == pytest.approx((y["scored"] ** 2).sum() / variance, rel=1e-4)
    assert found["identity"] == pytest.approx(((itself["scored"] - y["scored"]) ** 2).sum() / variance, rel=1e-4)
    assert found["linear"] == pytest.approx(((predicted - y["scored"]) ** 2).sum() / variance, rel=1e-3)


def test_the_penalty_is_chosen_on_images_that_are_not_scored():
    """Noise teaches to trust no neighbour, the more the louder it is: only where it is chosen on does it count."""
    objective, images = small_objective("masked-patch"), smooth(40)
    noise = torch.rand(40, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    fifth = torch.arange(40) % 5
    chosen = {}
    for name, place in (("nowhere", 9), ("choosing", 3), ("scored", 4)):
        mixed = torch.where((fifth == place)[:, None, None, None], noise, images)
        chosen[name] = difficulty.measure(objective, mixed, 3)["penalty"]
    assert chosen["scored"] == chosen["nowhere"] < chosen["choosing"]


def test_harder_corruptions_have_larger_errors():
    def linear(*settings):
        return difficulty.measure(small_objective("mae", *settings), smooth(200), 0)["linear"]

    blurred = [linear(*ALL, "objective.corruption=blur", f"objective.blur_sigma=[{s},{s}]") for s in (0.5, 2)]
    noisy = [linear(*ALL, "objective.corruption=gaussian", f"objective.noise_sigma=[{s},{s}]") for s in (0.2, 1)]
    masked = [linear(f"objective.mask_ratio={ratio}") for ratio in (0.3, 0.9)]
    assert blurred[0] < blurred[1] and noisy[0] < noisy[1] and masked[0] < masked[1] < 1


def test_a_shuffled_patch_says_less_than_none():
    settings = ["objective.encoder_input=corrupted", "objective.mask_ratio=0.3", "objective.corruption=shuffle"]
    found = difficulty.measure(small_objective("mae", *settings), independent(200), 0)
    assert found["identity"] == pytest.approx(2, rel=0.05)  # two independent patches
    assert found["linear"] == pytest.approx(1, abs=0.05)


def test_many_values_are_fitted_on_a_part_of_the_patches(monkeypatch):
    whole = difficulty.measure(small_objective("mae"), smooth(200), 0)
    monkeypatch.setattr(difficulty, "VALUES", 118 * 2000)  # 9·13 + 1 inputs
    part = difficulty.measure(small_objective("mae"), smooth(200), 0)
    assert whole["fitted_patches"] == 160 * 48 and 1800 < part["fitted_patches"] < 2200
    assert part["patches"] == whole["patches"] and part["mean_patch"] == whole["mean_patch"]
    assert part["linear"] == pytest.approx(whole["linear"], rel=0.1)


# -- the script -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Runs of no step: grey digits, and RGB photos of two sizes."""
    folder = tmp_path_factory.mktemp("difficulty")
    photos = folder / "photos"
    for i, image in enumerate((smooth(36, 24) * 255).byte().permute(0, 2, 3, 1).numpy()):
        place = photos / ("val" if i > 30 else "train") / f"class{i % 2}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[:20] if i % 3 else image).save(place / f"{i}.png")
    for name, data, settings in (
        ("gaussian", "digits", ["objective.noise_pca_dim=3"]),
        ("beit", "digits", []),
        ("masked-patch", str(photos), ["data.img_size=[24,16]", "backbone.patch_size=8"]),
        ("causal", "digits", ["objective.mask=causal", "objective.encoder_input=corrupted"]),
        ("dino", "digits", []),
        ("supervised", "digits", []),
    ):
        recipe = "mae" if name == "causal" else name
        recipe = objectives.read_recipe(recipe, [*TINY, *SMALL[recipe], "train.steps=0", *settings], data)
        assert pretrain.pretrain(recipe, folder / "runs" / name) == 0
        shutil.rmtree(folder / "runs" / name / "backbone")  # weights do not matter
    return folder / "runs"


@pytest.fixture
def measure(trained, tmp_path, monkeypatch, capsys):
    """Call the script on these runs, copied; returns (what it said, difficulty.json or None by run)."""
    shutil.copytree(trained, tmp_path / "runs")
    monkeypatch.chdir(tmp_path)

    def call(*runs: str) -> tuple[str, dict[str, dict | None]]:
        monkeypatch.setattr(sys, "argv", ["difficulty.py", *runs, "--threads", "1"])
        difficulty.main()
        files = {run: tmp_path / run / "difficulty.json" for run in runs}
        return capsys.readouterr().out, {r: json.loads(f.read_text()) if f.exists() else None for r, f in files.items()}

    return call


def test_runs_of_several_kinds(measure):
    names = ["runs/gaussian", "runs/beit", "runs/masked-patch"]
    said, first = measure(*names)
    for name, found in measure(*names)[1].items():
        assert found | dict(measured_at="") == first[name] | dict(measured_at="")
    for name, found in first.items():
        [line] = [line for line in said.splitlines() if line.startswith(f"| {name.removeprefix('runs/')} ")]
        figures = [float(cell) for cell in line.strip("|").split("|")[1:4]]
        assert figures == pytest.approx([found[key] for key in ("mean_patch", "identity", "linear")], abs=6e-4)
        most = 1.1 if name == "runs/masked-patch" else 0.8  # 25 photos teach little
        assert 0 < found["linear"] < most and 0.9 < found["mean_patch"] < 1.1
        assert found.keys() >= {"penalty", "versions", "commit", "measured_at"}
    assert first["runs/gaussian"]["images"] == 1437 and first["runs/gaussian"]["patches"] == 287 * 16
    assert first["runs/masked-patch"]["images"] == 31 and first["runs/masked-patch"]["patches"] == 6 * 3


def test_the_patch_space_is_fitted_as_in_training(measure, monkeypatch):
    fitted = []
    fit = corruption.PatchPCA.fit
    monkeypatch.setattr(corruption.PatchPCA, "fit", lambda self, *a: fitted.append(len(a[0])) or fit(self, *a))
    _, found = measure("runs/gaussian")
    assert fitted == [1437] and 0.1 < found["runs/gaussian"]["identity"] < 1


def test_tasks_that_recover_no_spoiled_image_are_left_out(measure):
    for folder, file in (("runs/pixels-digits", "results.jsonl"), ("timm", "config.json")):
        Path(folder).mkdir()
        Path(folder, file).write_text("{}")
    names = ["runs/causal", "runs/dino", "runs/supervised", "pixels", "vit_small_patch16_224.dino"]
    names += ["runs/pixels-digits", "timm"]
    said, found = measure(*names)
    lines = said.splitlines()
    assert len(lines) == len(names) and all(name in line for name, line in zip(names, lines, strict=True))
    assert set(found.values()) == {None}


@pytest.mark.parametrize(
    ("wrong", "instead"),
    [("runs/biet", " Did you mean 'runs/beit'?"), ("photos", ""), ("vit_small_patch16_22", "")],
)
def test_what_is_not_there_is_refused_before_anything_is_measured(wrong, instead, measure, tmp_path):
    (tmp_path / "photos").mkdir()
    with pytest.raises(UserError) as error:
        measure("runs/beit", "pixels", wrong)
    assert str(error.value) == f"There is no run '{wrong}'.{instead}"
    assert not (tmp_path / "runs/beit/difficulty.json").exists()


def test_a_run_of_another_version_is_refused_by_the_setting(measure, tmp_path):
    file = tmp_path / "runs" / "beit" / "recipe.yaml"
    file.write_text(file.read_text().replace("  mask: ", "  hidden: "))
    with pytest.raises(UserError, match="'objective.hidden' in runs/beit/recipe.yaml. Another version of this code"):
        measure("runs/beit")
