"""Pictures show what the network was given and what it says, and nothing else; of the same images for all runs."""

import numpy as np
import pytest
import torch
from conftest import SMALL, make_batch, small, small_objective
from PIL import Image
from test_corruption import VARIANTS
from test_loop import TINY

from ssl_vit import corruption, data, objectives, pictures, pretrain
from ssl_vit import recipe as recipes
from ssl_vit.errors import UserError
from ssl_vit.objectives.base import Batch
from ssl_vit.patches import patchify
from ssl_vit.randomness import Draw

ROWS = torch.arange(4)
KINDS = dict(
    VARIANTS, **{name: None for name in ("mae", "simmim", "beit", "masked-patch", "gaussian", "clean-encoder")}
)


def objective_of(kind):
    return (small_objective("mae", *VARIANTS[kind]) if kind in VARIANTS else small_objective(kind)).eval()


def images_of(objective, seed=0):
    size = (3, *objective.views["image"].size)
    return torch.rand(4, *size, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def shown(objective, images) -> torch.Tensor:
    """The panels as patches (K, B, N, width)."""
    [sheet] = objective.show(images, Draw(0, 0, ROWS)).values()
    assert sheet.panels.shape[:2] == (4, len(sheet.columns))
    assert sheet.panels.min() >= 0 and sheet.panels.max() <= 1
    return torch.stack([patchify(panel, objective.backbone.patch_size) for panel in sheet.panels.unbind(1)])


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_drawn_of_hidden_patches_does_not_depend_on_them(kind, monkeypatch):
    """Other pixels wherever the encoder is given none of them: the same picture, for weights that are as they come."""
    objective = objective_of(kind)
    images, others = images_of(objective), images_of(objective, 1)
    before = shown(objective, images)
    patch, grid = objective.backbone.patch_size, objective.grid
    torch.testing.assert_close(before[0], patchify(images, patch), atol=1e-5, rtol=0)
    if kind.startswith("next"):  # each patch from the true ones before it
        hidden, looked_at = objective.predict(images, Draw(0, 0, ROWS))[1], 0
        for place in (1, 20, 40, 63):
            later = (torch.arange(64) >= place).expand(4, -1)
            changed = torch.where(corruption.mask_pixels(later, grid, patch), others, images)
            after = shown(objective, changed)
            sure = hidden & (torch.arange(64) <= place)
            sure &= hidden[:, place : place + 1]  # the given ones see one another
            looked_at += sure.sum()
            torch.testing.assert_close(after[2][sure], before[2][sure], atol=1e-5, rtol=0)
            assert not torch.allclose(after[0][:, place], before[0][:, place])
        assert looked_at > 60
        return
    if objective.config.encoder_input == "clean":  # which tells of the clean image what its one vector tells
        assert not torch.allclose(shown(objective, others)[2], before[2], atol=0.1)
        torch.nn.init.zeros_(objective.decoder.bottleneck.weight)
        before = shown(objective, images)
    if objective.config.encoder_input in ("corrupted", "clean"):
        # all is given, but spoiled: another image that is spoiled to the same input
        given = objective.corrupt(
            images, objective.mask_order(Draw(0, 0, ROWS)), torch.ones(4, 64).bool(), Draw(0, 0, ROWS)
        )
        monkeypatch.setattr(objective, "corrupt", lambda *_: given)
        before, after = shown(objective, images), shown(objective, others)
        torch.testing.assert_close(after[1:], before[1:], atol=1e-5, rtol=0)
        return
    absent = objective.encoder_inputs(images, Draw(0, 0, ROWS))[1]
    if objective.config.replace_ratio:  # these show another patch: their own pixels are not given either
        absent |= (before[1] != before[0]).any(-1) & (before[1] - before[0]).abs().amax(-1).gt(1e-4)
    changed = torch.where(corruption.mask_pixels(absent, grid, patch), others, images)
    after = shown(objective, changed)
    assert absent.sum() > 40 and not torch.allclose(after[0], before[0])
    torch.testing.assert_close(after[1:], before[1:], atol=1e-5, rtol=0)


def test_an_untrained_network_s_picture_tells_nothing_of_the_patches_it_did_not_see():
    """Brightness of the drawn and of the true hidden patches of one image after another: no correlation. The true
    patches' mean and variance, pasted in, would give one of nearly 1."""
    objective = objective_of("mae")
    smooth = torch.linspace(0, 1, 16).view(16, 1) * torch.linspace(1, 0.2, 16)
    images = smooth.expand(4, 3, 16, 16) + 0.05 * images_of(objective) - 0.02
    hidden = objective.predict(images, Draw(0, 0, ROWS))[1]
    clean, _, made = (panel.mean(-1) for panel in shown(objective, images.clamp(0, 1)))
    for true, drawn, out_of_sight in zip(clean, made, hidden, strict=True):
        assert drawn[out_of_sight].std() < 0.1 * true[out_of_sight].std()


def answer(objective, images, target):
    """Replace the prediction by the right one: classes become certain logits."""
    predict = objective.predict

    def perfect(images, draw, whole=True):
        found = predict(images, draw)
        right = objective.target(found.noise if target == "noise" else objective.backbone.normalise(images))
        if right.dtype == torch.int64:
            right = torch.nn.functional.one_hot(right, objective.target.width).float()
        return found._replace(values=right)

    objective.predict = perfect
    return shown(objective, images)


@pytest.mark.parametrize("kind", ["predict the noise", "autoencoder", "blur", "simmim", "gaussian", "clean-encoder"])
def test_the_picture_of_a_perfect_predictor_is_the_clean_image(kind):
    """Of the predictor whose loss is 0, so that what is drawn is what was trained."""
    objective = objective_of(kind)
    images = images_of(objective)
    clean, seen, made = answer(objective, images, objective.config.target)
    loss = objective(Batch(dict(image=images), None, Draw(0, 0, ROWS), 0, 1))["loss"]
    assert loss.item() == pytest.approx(0, abs=1e-10)
    torch.testing.assert_close(made, clean, atol=1e-4, rtol=0)
    assert kind == "autoencoder" or (seen - clean).abs().max() > 0.05


@pytest.mark.parametrize("kind", ["mae", "noise in patch space"])
def test_normalised_patches_are_drawn_with_the_statistics_of_the_average_input_patch(kind):
    objective = objective_of(kind)
    b, images = objective.backbone, 0.5 + 0.05 * (images_of(objective) - 0.5)  # so that nothing is clipped
    answer(objective, images, "pixels")
    b_mean, b_std = b.mean.flatten().repeat(4), b.std.flatten().repeat(4)
    given = objective.encoder_inputs(images, Draw(0, 0, ROWS))
    _, _, made = shown(objective, images)
    hidden = objective.predict(images, Draw(0, 0, ROWS))[1]
    for i in range(4):
        seen = patchify(given[0], b.patch_size)[i][~given[1][i]].double()
        mean, deviation = seen.mean(), seen.var(1).mean().sqrt()
        for place in hidden[i].nonzero().flatten()[::7]:
            true = patchify(b.normalise(images), b.patch_size)[i, place].double()
            drawn = ((true - true.mean()) / (true.var() + 1e-6).sqrt() * deviation + mean) * b_std + b_mean
            torch.testing.assert_close(made[i, place].double(), drawn.clamp(0, 1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["beit", "masked-patch"])
def test_tokens_are_drawn_as_their_patches(kind):
    objective = objective_of(kind)
    images = images_of(objective)
    _, _, made = answer(objective, images, "tokens")
    hidden = objective.predict(images, Draw(0, 0, ROWS))[1]
    if kind == "beit":
        flat = patchify(objective.backbone.normalise(images), (2, 2))
        nearest = (flat[:, :, None] - objective.target.centroids).square().sum(-1).argmin(-1)
        expected = objective.target.centroids[nearest]
        expected = expected * objective.backbone.std.flatten().repeat(4) + objective.backbone.mean.flatten().repeat(4)
    else:  # the middle of the mean colour's eighth, in the whole patch
        colour = patchify(images, (2, 2)).unflatten(-1, (4, 3)).mean(-2)
        expected = (((colour * 8).floor() + 0.5) / 8).repeat(1, 1, 4)
    torch.testing.assert_close(made[hidden], expected.clamp(0, 1)[hidden], atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_given_stays_as_it_was(kind):
    """Where the loss does not run, the reconstruction shows the input; and the input differs from the original."""
    objective = objective_of(kind)
    images = images_of(objective)
    panels = shown(objective, images)
    if kind == "features":
        assert len(panels) == 2
        return
    hidden = objective.predict(images, Draw(0, 0, ROWS))[1]
    assert torch.equal(panels[2][~hidden], panels[1][~hidden])
    assert (panels[2] - panels[1])[hidden].abs().max() > 0.01
    assert kind == "autoencoder" or kind.startswith("next") or (panels[1] - panels[0]).abs().max() > 0.05


@pytest.mark.parametrize("name", SMALL)
def test_an_objective_says_whether_it_has_pictures(name):
    objective = small_objective(name).eval()
    images = make_batch(objective, ROWS).views[next(iter(objective.views))]
    with torch.no_grad():
        sheets = objective.show(images, Draw(0, 0, ROWS))
    assert objective.shows == bool(sheets) == (name not in ("supervised", "deit"))
    for sheet in sheets.values():
        assert sheet.panels.shape[:2] == (4, len(sheet.columns)) and sheet.columns[0] == "original"
        torch.testing.assert_close(sheet.panels[:, 0], images, atol=1e-5, rtol=0)


def test_the_columns_say_how_a_prediction_is_drawn():
    last = {kind: objective_of(kind).captions()[-1] for kind in KINDS}
    assert "mean and variance of the average patch of the input" in last["mae"]
    assert "mean and variance" not in last["simmim"] and "masked patches" in last["simmim"]
    assert "minus the predicted noise" in last["predict the noise"]
    assert "token" in last["beit"] and "mean colour" in last["masked-patch"]
    assert "before it" in last["next patch"] and last["features"] == "input to the encoder"


# -- which images, which mask -----------------------------------------------------------------------------------------


def test_images_are_spread_over_the_classes():
    labels = torch.tensor([2] * 50 + [0] * 30 + [1] * 20)[torch.randperm(100, generator=torch.manual_seed(0))]
    chosen = pictures.spread(100, labels, 10)
    assert labels[chosen].tolist() == [0] * 3 + [1] * 2 + [2] * 5
    assert pictures.spread(100, None, 4).tolist() == [12, 37, 62, 87] and len(pictures.spread(3, None, 8)) == 3


@pytest.fixture
def drawn(monkeypatch):
    """The sheets that are written, with their titles, instead of writing them."""
    sheets = []
    monkeypatch.setattr(pictures, "save", lambda sheet, file, title: sheets.append((sheet, title)))
    return sheets


def train(path, *settings, name="mae"):
    recipe = objectives.read_recipe(name, [*TINY, *small(name, *settings)], None)
    assert pretrain.pretrain(recipe, path) == 0


def test_runs_of_any_length_and_seed_show_the_same_images_with_the_same_mask(tmp_path, drawn):
    train(tmp_path / "a", "train.steps=0")
    train(tmp_path / "b", "train.steps=3", "train.seed=5")
    (a, title), (b, other) = drawn
    assert title == other and title.startswith("digits, report split (the fixed 360): images ")
    assert torch.equal(a.panels[:, :2], b.panels[:, :2]) and not torch.equal(a.panels[:, 2], b.panels[:, 2])
    report = data.load(recipes.Data(), "report")
    chosen = pictures.spread(360, report.labels, 8)
    assert torch.allclose(a.panels[:, 0], report.images[chosen] / 255, atol=1e-5)
    assert len(report.labels[chosen].unique()) == 8


def test_a_run_to_choose_settings_shows_held_out_images(tmp_path, drawn, monkeypatch):
    roles, load = [], data.load
    monkeypatch.setattr(data, "load", lambda config, role, *rest: roles.append(role) or load(config, role, *rest))
    train(tmp_path / "run", "train.steps=0", "data.hold_out=true")
    assert roles == ["train", "held out"] and "held out of training" in drawn[0][1]


def test_without_a_report_split_that_can_be_read_training_images_are_shown_and_said(
    tmp_path, drawn, monkeypatch, capsys
):
    load = data.load

    def unreadable(config, role, *rest):
        if role == "report":
            raise UserError("There is no split 'test'.")
        return load(config, role, *rest)

    monkeypatch.setattr(data, "load", unreadable)
    train(tmp_path / "run", "train.steps=0")
    [(sheet, title)] = drawn
    assert "training split" in title and (tmp_path / "run/backbone/model.safetensors").exists()
    assert "training images, since no others can be read: There is no split 'test'." in capsys.readouterr().out
    images = load(recipes.Data(), "train")
    assert torch.allclose(sheet.panels[:, 0], images.images[pictures.spread(1437, images.labels, 8)] / 255, atol=1e-5)


def test_who_has_no_pictures_reads_no_report_split(tmp_path, monkeypatch):
    roles, load = [], data.load
    monkeypatch.setattr(data, "load", lambda config, role, *rest: roles.append(role) or load(config, role, *rest))
    train(tmp_path / "run", "train.steps=0", name="supervised")
    assert roles == ["train"] and not (tmp_path / "run/pictures").exists()


# -- the sheet --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_a_sheet_has_its_images_in_rows_under_the_words_of_their_columns(channels, tmp_path):
    panels = torch.rand(2, 3, channels, 8, 6, generator=torch.Generator().manual_seed(0))
    pictures.save(pictures.Sheet(panels, ["original", "", "many words " * 9]), tmp_path / "new/sheet.png", "a title")
    page = np.asarray(Image.open(tmp_path / "new/sheet.png").convert("RGB")).astype(int)
    scale, gap = 27, pictures.GAP  # 6 pixels become 162
    top = pictures.LINES * 19 + gap
    assert page.shape[1] == 3 * (162 + gap) + gap
    for row in range(2):
        for column in range(3):
            y, x = top + row * (8 * scale + gap), gap + column * (162 + gap)
            block = page[y : y + 8 * scale, x : x + 162]
            expected = panels[row, column] if channels in (1, 3) else panels[row, column, :1]
            expected = (expected.expand(3, -1, -1).permute(1, 2, 0) * 255).numpy()
            assert np.abs(block[13::scale, 13::scale] - expected).max() <= 0.5
            assert (block.reshape(8, scale, 6, scale, 3).std((1, 3)) == 0).all()
    words = [(page[: top - gap, gap + c * 168 : gap + c * 168 + 162] < 128).any(-1).sum() for c in range(3)]
    assert words[1] == 0 < words[0] < words[2]
    assert (page[-19 - gap :] < 128).any()  # the title
