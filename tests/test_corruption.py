"""What is hidden and spoiled, one corruption at a time, against what others compute."""

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as F
from conftest import make_batch, small_objective
from sklearn.decomposition import PCA

from ssl_vit import corruption, targets
from ssl_vit.errors import UserError
from ssl_vit.patches import patchify
from ssl_vit.randomness import Draw

ALL = ["objective.encoder_input=corrupted", "objective.mask=none"]
CLEAN = ["objective.encoder_input=clean", "objective.corruption=gaussian", "objective.noise_sigma=[0.5,1]"]
VARIANTS = {
    "noise on half": [
        "objective.encoder_input=corrupted",
        "objective.mask=random",
        "objective.mask_ratio=0.5",
        "objective.corruption=gaussian",
    ],
    "noise in patch space": [
        *ALL,
        "objective.corruption=gaussian",
        "objective.noise_pca_dim=5",
        "objective.loss_weighting=noise_level",
    ],
    "predict the noise": [
        *ALL,
        "objective.corruption=gaussian",
        "objective.target=noise",
        "objective.noise_sigma=[0.5,0.5]",
    ],
    "noise and masking": ["objective.corruption=gaussian", "objective.noise_sigma=[0.25,0.25]"],
    "blur": [*ALL, "objective.corruption=blur", "objective.blur_sigma=[0.5,2]", "objective.norm_pix_loss=false"],
    "shuffle": ["objective.encoder_input=corrupted", "objective.mask_ratio=0.3", "objective.corruption=shuffle"],
    "next patch": ["objective.encoder_input=corrupted", "objective.mask=causal"],
    "next patch after a prefix": [
        "objective.encoder_input=corrupted",
        "objective.mask=prefix",
        "objective.decoder_depth=0",
    ],
    "features": ["objective.encoder_input=mask_token", "objective.mask_ratio=0.5", "objective.target=features"],
    "autoencoder": [*ALL, "objective.norm_pix_loss=false"],
    "clean encoder": [*CLEAN, "objective.mask=none", "objective.norm_pix_loss=false"],
    "clean encoder, noise on half": [*CLEAN, "objective.mask_ratio=0.5"],
    "masked patch prediction": [
        "objective.encoder_input=mask_token",
        "objective.mask_ratio=0.5",
        "objective.replace_ratio=0.25",
        "objective.keep_ratio=0.125",
        "objective.target=colour",
    ],
}


def small(variant):
    return small_objective("mae", *VARIANTS[variant])


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_loss_depends_on_the_cut_of_the_batch(variant):
    objective = small(variant)
    whole = objective(make_batch(objective, torch.arange(8)))["loss"]
    parts = [objective(make_batch(objective, torch.arange(i, i + 2)))["loss"] for i in range(0, 8, 2)]
    assert torch.isfinite(whole)
    torch.testing.assert_close(torch.stack(parts).mean(), whole, rtol=1e-5, atol=0)
    whole.backward()
    assert all(p.grad is not None for p in objective.backbone.model.blocks.parameters())


def test_the_loss_of_an_image_is_divided_by_its_noise():
    """l-DAE: by 1 + sigma squared, sigma in standard deviations of the pixels."""
    settings = [*ALL, "objective.corruption=gaussian", "objective.noise_sigma=[0.5,2]", "objective.norm_pix_loss=false"]
    plain = small_objective("mae", *settings)
    batch = make_batch(plain, torch.arange(6))
    prediction, _, noise, level, _ = plain.predict(batch.views["image"], batch.draw)
    clean = patchify(plain.backbone.normalise(batch.views["image"]), (2, 2))
    each = (prediction - clean).square().mean((1, 2))
    sigma = level.flatten()
    assert sigma.max() - sigma.min() > 0.5 and torch.allclose(noise.std((1, 2, 3)), sigma, rtol=0.3)
    weighted = small_objective("mae", *settings, "objective.loss_weighting=noise_level")
    torch.testing.assert_close(plain(batch)["loss"], each.mean())
    torch.testing.assert_close(weighted(batch)["loss"], (each / (1 + sigma**2)).mean())


def spoiled(objective, images):
    draw = Draw(0, 0, torch.arange(len(images)))
    order = objective.mask_order(draw)
    hidden = corruption.split(order, objective.num_masked)[1]
    return objective.corrupt(images, order, hidden, draw)[0], hidden


@pytest.mark.parametrize("variant", ["noise on half", "shuffle", "clean encoder, noise on half"])
def test_only_the_hidden_patches_are_spoiled(variant):
    objective = small(variant)
    images = make_batch(objective, torch.arange(6)).views["image"]
    seen, hidden = spoiled(objective, images)
    changed = (patchify(seen, objective.backbone.patch_size) != patchify(images, objective.backbone.patch_size)).any(-1)
    assert torch.equal(changed, hidden) and (hidden.sum(1) == objective.num_masked).all()


@pytest.mark.parametrize("encoder_input", ["visible", "mask_token"])
@pytest.mark.parametrize("name", ["shuffle", "gaussian"])
def test_where_masked_patches_are_not_seen_the_others_are_spoiled(name, encoder_input):
    """Their corruption depends on no hidden pixel, and changes what the network sees."""
    settings = [f"objective.corruption={name}", f"objective.encoder_input={encoder_input}", "objective.mask_ratio=0.5"]
    objective = small_objective("mae", *settings)
    batch = make_batch(objective, torch.arange(6))
    images, size = batch.views["image"], objective.backbone.patch_size
    seen, hidden = spoiled(objective, images)
    changed = (patchify(seen, size) != patchify(images, size)).any(-1)
    assert changed[~hidden].all() and (name == "gaussian" or not changed[hidden].any())
    prediction, hidden, *_ = objective.predict(images, batch.draw)
    mask = corruption.mask_pixels(hidden, objective.grid, objective.backbone.stride)
    other = torch.where(mask, torch.rand_like(images), images)
    assert torch.equal(objective.predict(other, batch.draw)[0], prediction)
    clean = small_objective("mae", *settings[1:])
    assert not torch.equal(clean.predict(images, batch.draw)[0], prediction)


def test_corruptions_that_show_or_ask_for_what_is_hidden_are_refused():
    for encoder_input in ("visible", "mask_token"):
        own = f"objective.encoder_input={encoder_input}"
        with pytest.raises(UserError, match="blur carries the pixels of masked patches"):
            small_objective("mae", own, "objective.corruption=blur")
        with pytest.raises(UserError, match="the noise in masked patches, which the encoder does not see"):
            small_objective("mae", own, "objective.corruption=gaussian", "objective.target=noise")


@pytest.mark.parametrize("variant", ["blur", "noise in patch space"])
def test_images_are_spoiled_in_float32_whatever_the_network_computes_in(variant):
    objective = small(variant)
    images = make_batch(objective, torch.arange(6)).views["image"]
    expected = spoiled(objective, images)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(spoiled(objective, images)[0], expected)


def test_shuffling_moves_every_chosen_patch_and_loses_none():
    objective = small("shuffle")
    images = make_batch(objective, torch.arange(4)).views["image"]
    seen, _ = spoiled(objective, images)
    for before, after in zip(patchify(images, (2, 2)), patchify(seen, (2, 2)), strict=True):
        assert sorted(map(tuple, before.tolist())) == sorted(map(tuple, after.tolist()))


def test_blur_is_torchvision_s():
    images = torch.rand(5, 3, 16, 12, generator=torch.Generator().manual_seed(0))
    u = torch.rand(5, generator=torch.Generator().manual_seed(1))
    found, widths = corruption.blur(images, u, (0.5, 1.5)), 0.5 + u
    assert widths.max() - widths.min() > 0.2
    for one, image, width in zip(found, images, widths, strict=True):
        assert torch.allclose(one, F.gaussian_blur(image, [11, 11], [width.item()] * 2), atol=1e-5)


def test_the_patch_space_is_that_of_principal_component_analysis():
    images = torch.randn(200, 3, 8, 8, generator=torch.Generator().manual_seed(0)).cumsum(-1) / 3
    space = corruption.PatchPCA((4, 4), 3, 7)
    space.fit(images, 0)
    patches = patchify(images, (4, 4)).flatten(0, 1).double().numpy()
    expected = PCA(7, svd_solver="full").fit(patches)
    inside = expected.inverse_transform(expected.transform(patches))
    assert np.allclose(patchify(space.project(images), (4, 4)).flatten(0, 1), inside, atol=1e-4)
    assert space.scale.item() ** 2 == pytest.approx(expected.explained_variance_.mean(), rel=1e-2)

    unit = space.noise(Draw(0, 0, torch.arange(400)).normal("noise", 4, 7), (2, 2))
    noise, level = corruption.noise(unit, torch.rand(400, 1, 1, 1), (0.5, 0.5))
    noise = patchify(noise, (4, 4)).flatten(0, 1).numpy()
    along = noise @ expected.components_.T
    assert np.allclose(along @ expected.components_, noise, atol=1e-4)  # none outside
    assert along.std(0) == pytest.approx(0.5 * space.scale.item(), rel=0.1) and (level == 0.5).all()


def test_of_the_hidden_patches_some_show_others_and_some_stay(monkeypatch):
    objective = small("masked patch prediction")
    images = make_batch(objective, torch.arange(6)).views["image"]
    clean = objective.backbone.patch_embed(images)
    given = []
    add = type(objective.backbone).add_positions
    monkeypatch.setattr(
        type(objective.backbone), "add_positions", lambda self, t, *more: given.append(t) or add(self, t, *more)
    )
    _, hidden, *_ = objective.predict(images, Draw(0, 0, torch.arange(6)))
    masked = (given[0] == objective.mask_token).all(-1)
    same = (given[0] == clean).all(-1)
    others = ~masked & ~same
    assert objective.num_masked == 32 and (masked.sum(1) == 20).all() and (others.sum(1) == 8).all()
    assert (hidden & same).sum(1).tolist() == [4] * 6 and not (masked | others)[~hidden].any()
    for shown, tokens, out_of_sight in zip(given[0][others].split(8), clean, hidden, strict=True):
        assert all((token == tokens[~out_of_sight]).all(-1).any() for token in shown)


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_given_is_what_the_encoder_embeds(monkeypatch, variant):
    """The pixels of `given`, embedded, are the tokens of `predict`, wherever these are not mask tokens or left out.
    With a clean encoder they are what the decoder embeds."""
    objective = small(variant)
    images = make_batch(objective, torch.arange(6)).views["image"]
    embedded = []
    add = type(objective.backbone).add_positions
    monkeypatch.setattr(
        type(objective.backbone), "add_positions", lambda self, t, *more: embedded.append(t) or add(self, t, *more)
    )
    _, hidden, *_ = objective.predict(images, Draw(0, 0, torch.arange(6)))
    given = objective.encoder_inputs(images, Draw(0, 0, torch.arange(6)))
    if variant.startswith("next"):
        assert given is None
        return
    seen, absent, counted = given
    if objective.config.encoder_input == "clean":
        assert torch.allclose(embedded[0], objective.backbone.patch_embed(images), atol=1e-5) and not absent.any()
        noisy = []
        objective.decoder.embed.register_forward_pre_hook(lambda module, inputs: noisy.append(inputs[0]))
        objective.predict(images, Draw(0, 0, torch.arange(6)))
        assert torch.equal(noisy[0], patchify(seen, (2, 2))) and torch.equal(counted, hidden)
        return
    tokens = objective.backbone.patch_embed(seen * objective.backbone.std + objective.backbone.mean)
    assert torch.allclose(tokens[~absent], embedded[0][~absent], atol=1e-5)
    assert torch.equal(counted, hidden) and not absent[~hidden].any()
    assert (patchify(seen, (2, 2))[absent] == 0).all()
    if objective.config.encoder_input == "mask_token":
        assert torch.equal(absent, (embedded[0] == objective.mask_token).all(-1))
    else:
        assert torch.equal(absent, hidden & (objective.config.encoder_input == "visible"))


def test_replaced_patches_lie_anywhere_in_a_mask_of_blocks():
    """They are a random part of the masked ones, not the block that was laid last: as often neighbours as any are."""
    block = ["objective.mask=blocks", *VARIANTS["masked patch prediction"]]
    objective = small_objective("mae", *block)
    order = objective.mask_order(Draw(0, 0, torch.arange(400)))
    mask = corruption.split(order, objective.num_masked)[1]
    replaced = objective.num_masked // 4
    place = order[:, -objective.num_masked :][:, :replaced]
    there = torch.zeros_like(mask).scatter(1, place, True)
    assert (there & ~mask).sum() == 0 and (order.sort(1).values == torch.arange(64)).all()

    def pairs(chosen):
        grid = chosen.view(-1, 8, 8)
        return (grid[:, 1:] & grid[:, :-1]).sum() + (grid[:, :, 1:] & grid[:, :, :-1]).sum()

    noise = torch.rand(mask.shape, generator=torch.Generator().manual_seed(0)).masked_fill(~mask, 2.0)
    random = torch.zeros_like(mask).scatter(1, noise.argsort(1)[:, :replaced], True)
    assert pairs(there).item() == pytest.approx(pairs(random).item(), rel=0.1)
    plain = small_objective("mae", "objective.mask=blocks", *VARIANTS["features"]).mask_order
    last = plain(Draw(0, 0, torch.arange(400)))[:, -objective.num_masked :][:, :replaced]
    assert pairs(torch.zeros_like(mask).scatter(1, last, True)) > 2 * pairs(random)  # else nothing was tested


def test_the_next_patch_is_predicted_from_those_before_it():
    objective = small("next patch").eval()
    images = make_batch(objective, torch.arange(2)).views["image"]
    before, hidden, *_ = objective.predict(images, Draw(0, 0, torch.arange(2)))
    assert hidden.sum(1).tolist() == [63, 63] and objective.num_masked == 63 and not hidden[:, 0].any()
    for j in (1, 20, 63):
        later = corruption.mask_pixels(torch.arange(64).expand(2, -1) >= j, (8, 8), (2, 2))
        after, *_ = objective.predict(torch.where(later, 1 - images, images), Draw(0, 0, torch.arange(2)))
        assert torch.allclose(after[:, 1 : j + 1], before[:, 1 : j + 1], atol=1e-6)
        assert j == 63 or not torch.allclose(after[:, j + 1], before[:, j + 1], atol=1e-3)


def test_who_sees_whom_as_a_plain_loop():
    start = torch.tensor([[0.0], [0.34], [0.99]])
    hidden, attend = corruption.next_patch(start, (2, 3), 1)
    for image, given in enumerate((1, 2, 5)):
        assert hidden[image].tolist() == [False] * given + [True] * (6 - given)
        for i in range(7):
            for j in range(7):
                expected = i == 0 or (j > 0 and (j <= i or j <= given))
                assert attend[image, 0, i, j] == expected, (image, i, j)


def test_a_prefix_leaves_the_expected_number_to_predict():
    objective = small("next patch after a prefix")
    start = Draw(0, 0, torch.arange(4000)).uniform("prefix", 1)
    hidden, _ = corruption.next_patch(start, (8, 8), 1)
    assert hidden.sum(1).float().mean().item() == pytest.approx(objective.expected_masked, rel=0.03)


def test_the_noise_is_what_was_added():
    objective = small("predict the noise")
    batch = make_batch(objective, torch.arange(4))
    images = batch.views["image"]
    seen, _ = spoiled(objective, images)
    _, _, noise, level, _ = objective.predict(images, Draw(0, 0, torch.arange(4)))
    assert torch.allclose(noise, (seen - images) / objective.backbone.std, atol=1e-4) and (level == 0.5).all()


def test_the_teacher_of_features_follows_and_is_not_trained():
    objective = small("features")
    batch = make_batch(objective, torch.arange(4))
    clean = objective.teacher(batch.views["image"])[:, 1:]
    prediction, hidden, *_ = objective.predict(batch.views["image"], batch.draw)
    target = (clean - clean.mean(-1, keepdim=True)) / (clean.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    expected = ((prediction - target) ** 2).mean(-1)[hidden].mean()
    loss = objective(batch)["loss"]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    loss.backward()
    assert all(p.grad is None for p in objective.teacher.parameters()) and not objective.teacher.training
    before = [p.clone() for p in objective.teacher.parameters()]
    with torch.no_grad():
        for p in objective.backbone.parameters():
            p += 1.0
    objective.on_optimizer_step(0, 10, lambda t: t)
    for old, new, student in zip(before, objective.teacher.parameters(), objective.backbone.parameters(), strict=True):
        assert torch.allclose(new, 0.996 * old + 0.004 * student, atol=1e-6)


def test_loud_noise_weighs_less():
    objective = small("noise in patch space")
    batch = make_batch(objective, torch.arange(4))
    prediction, _, _, level, _ = objective.predict(batch.views["image"], batch.draw)
    each = objective.target.loss(prediction, objective.target(objective.backbone.normalise(batch.views["image"])))
    expected = (each.mean(1) / (1 + level.flatten() ** 2)).mean()
    assert objective(batch)["loss"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_corruption_as_augmentation_of_supervised_training():
    """The control of denoising: the same noise and the same dropped patches, with labels as the target."""
    plain, noisy, dropping = (
        small_objective("supervised", "backbone.drop_path_rate=0", *more)
        for more in ([], ["objective.noise_sigma=[0.5,0.5]"], ["objective.patch_drop_rate=0.75"])
    )
    batch = make_batch(plain, torch.arange(6))
    with torch.no_grad():
        for objective in (plain, noisy, dropping):
            objective.backbone.model.head.weight.normal_(generator=torch.Generator().manual_seed(1))
    images = batch.views["image"]
    noise, _ = corruption.noise(batch.draw.normal("noise", 3, 16, 16), torch.zeros(6, 1, 1, 1), (0.5, 0.5))
    batch.views["image"] = images + plain.backbone.std * noise
    expected = plain(batch)["loss"]
    batch.views["image"] = images
    assert torch.allclose(noisy(batch)["loss"], expected, atol=1e-6) and expected != plain(batch)["loss"]

    _, hidden = corruption.random_masking(batch.draw.uniform("mask", 64), 0.75)
    logits = dropping.classify(images, batch.draw)
    place = corruption.mask_pixels(hidden, (8, 8), (2, 2))
    assert torch.equal(dropping.classify(torch.where(place, 0.0, images), batch.draw), logits)
    assert not torch.equal(dropping.classify(torch.where(place, images, 0.0), batch.draw), logits)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["objective.mask=none"], "objective.mask=none hides no patch"),
        (["objective.encoder_input=corrupted"], "objective.corruption"),
        (["objective.mask=causal"], "hides no patch"),
        (
            ["objective.mask=causal", "objective.encoder_input=corrupted", "objective.corruption=shuffle"],
            "clean patches",
        ),
        (["objective.keep_ratio=0.5"], "objective.keep_ratio"),
        (["objective.decoder_depth=0"], "decoder_depth=0 is a linear head .*: set objective.decoder_depth of 1"),
        (["objective.decoder_embed_dim=25"], "objective.decoder_embed_dim=25 is not divisible by decoder_num_heads=2"),
        (["objective.decoder_embed_dim=6"], "objective.decoder_embed_dim=6 is not divisible by 4"),
        (["objective.encoder_input=clean"], "gives the decoder the corrupted image: set objective.corruption"),
        ([*CLEAN, "objective.mask=none", "objective.decoder_depth=0"], "objective.decoder_depth of 1 or more"),
        ([*CLEAN, "objective.mask=causal"], "objective.encoder_input must be corrupted, not clean"),
        (["objective.target=noise"], "objective.corruption=gaussian"),
        ([*ALL, "objective.corruption=blur", "objective.blur_sigma=[0,1]"], "above 0"),
        ([*ALL, "objective.corruption=gaussian", "objective.noise_pca_dim=13"], "more than the 12 values"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, said):
    with pytest.raises(UserError, match=said):
        small_objective("mae", *settings)


@pytest.mark.parametrize("ratio", [75, 0.0, -0.5])
def test_a_ratio_is_a_fraction(ratio):
    for mask in (
        lambda: corruption.random_masking(torch.rand(2, 16), ratio),
        lambda: corruption.block_masking(torch.rand(2, 16, 4, 4), torch.rand(2, 16), (4, 4), ratio),
    ):
        with pytest.raises(ValueError, match=f"mask_ratio is a fraction, above 0 and up to 1, not {ratio}"):
            mask()


def test_a_level_is_drawn_for_each_image():
    unit = torch.ones(8, 3, 8, 8)
    with pytest.raises(ValueError, match=r"u must be \(8, 1, 1, 1\), one number for each image, not \(8,\)"):
        corruption.noise(unit, torch.rand(8), (0.0, 1.0))
    with pytest.raises(ValueError, match=r"u must be \(8,\), one number for each image, not \(8, 1, 1, 1\)"):
        corruption.blur(unit, torch.rand(8, 1, 1, 1), (0.1, 1.0))


def test_what_has_not_been_fitted_is_refused():
    images = torch.randn(16, 3, 8, 8)
    for made, use in (
        (targets.KMeans((4, 4), 3, 5), lambda it: it(images)),
        (corruption.PatchPCA((4, 4), 3, 5), lambda it: it.project(images)),
        (corruption.PatchPCA((4, 4), 3, 5), lambda it: it.noise(torch.randn(16, 4, 5), (2, 2))),
    ):
        with pytest.raises(ValueError, match=r"has not been fitted: call fit\(images, seed\) first, or load its state"):
            use(made)
        made.fit(images, 0)
        use(made)
        again = type(made)((4, 4), 3, 5)
        again.load_state_dict(made.state_dict())
        assert torch.equal(use(again), use(made)) if isinstance(made, targets.KMeans) else use(again) is not None


def test_colours_are_of_pixels_up_to_1():
    images = torch.zeros(1, 3, 4, 4)
    colours = targets.Colours((4, 4), torch.full((3, 1, 1), 0.5), torch.full((3, 1, 1), 0.25))
    assert colours(images).item() == 4 + 4 * 8 + 4 * 64
    with pytest.raises(ValueError, match=r"those of pixels in \[0, 1\]: divide them by 255"):
        targets.Colours((4, 4), torch.full((3, 1, 1), 127.0), torch.full((3, 1, 1), 60.0))
    with pytest.raises(ValueError, match=r"images must be standardised, not torch.uint8"):
        colours(images.byte())
