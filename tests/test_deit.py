"""DeiT: the distillation token and its losses, repeated augmentation, erasing, one mixture for a batch."""

import json

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import yaml
from conftest import SMALL, make_batch, small_objective, small_recipe
from scipy import stats
from test_loop import TINY, log_of, run
from test_tokenizer import as_run
from timm.data.random_erasing import RandomErasing

from ssl_vit import corruption, pretrain, randaugment, views, weights
from ssl_vit.errors import UserError
from ssl_vit.objectives.supervised import distillation_loss
from ssl_vit.randomness import Draw, Order
from ssl_vit.views import View

PLAIN = ["objective.smoothing=0", "objective.mixup=0", "objective.reprob=0", "backbone.drop_path_rate=0"]


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Runs of five classes, with heads that are not zero."""
    folder = tmp_path_factory.mktemp("teachers")
    for name, size in (("same", 16), ("larger", 32)):
        as_run(folder / name, "supervised", f"data.img_size={size}", "backbone.patch_size=4")
        fill(folder / name)
    as_run(folder / "label-free", "mae")
    as_run(folder / "grey", "supervised", "data.in_chans=1", "data.mean=[0.5]", "data.std=[0.2]")
    return folder


def fill(run) -> None:
    model = weights.load(str(run))
    torch.nn.init.normal_(model.model.head.weight, generator=torch.Generator().manual_seed(0))
    weights.save(model, run / "backbone")


def student(teacher, *settings: str):
    objective = small_objective("deit", f"objective.teacher={teacher}", *PLAIN, *settings)
    generator = torch.Generator().manual_seed(1)
    for head in (objective.backbone.model.head, objective.backbone.model.head_dist):
        torch.nn.init.normal_(head.weight, generator=generator)
    return objective


@pytest.mark.parametrize("kind", ["hard", "soft"])
@pytest.mark.parametrize("name", ["same", "larger"])
def test_each_token_learns_from_its_own_answers(kind, name, teachers):
    """losses.py of the official code, with its teacher on the same images; a larger one's positions are resampled."""
    settings = [
        f"objective.distillation_type={kind}",
        *["objective.distillation_tau=3"] * (kind == "soft"),
        "objective.distillation_alpha=.3",
    ]
    objective = student(teachers / name, *settings)
    batch = make_batch(objective, torch.arange(12))
    images = batch.views["image"]
    teacher = timm.create_model(f"local-dir:{teachers / name}/backbone", pretrained=True, img_size=16).eval()
    answers = teacher((images - objective.teacher.mean) / objective.teacher.std)
    model = objective.backbone.model
    tokens = model.forward_features(objective.backbone.normalise(images))
    logits, distilled = model.head(tokens[:, 0]), model.head_dist(tokens[:, 1])
    if kind == "hard":
        taught = F.nll_loss(distilled.log_softmax(1), answers.argmax(1))
    else:
        p, q = (answers / 3).softmax(1), (distilled / 3).softmax(1)
        taught = (p * (p / q).log()).sum() * 9 / distilled.numel()
    expected = 0.7 * F.cross_entropy(logits, batch.labels) + 0.3 * taught
    result = objective(batch)
    assert result["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert result["distillation"].item() == pytest.approx(taught.item(), rel=1e-5)
    assert result["agreement"].item() == pytest.approx((distilled.argmax(1) == answers.argmax(1)).float().mean().item())
    result["loss"].backward()
    assert all(weight.grad is None for weight in objective.teacher.parameters()) and not objective.teacher.training
    assert model.head.weight.grad.norm() > 0 < model.head_dist.weight.grad.norm()
    evaluated = objective.backbone.eval().classify(images)
    torch.testing.assert_close(evaluated, (logits + distilled) / 2, atol=1e-5, rtol=1e-5)


def test_the_teacher_sees_what_the_student_sees(teachers):
    objective = student(teachers / "same", "objective.mixup=0.8", "objective.cutmix=1")
    batch, seen = make_batch(objective, torch.arange(8)), []
    objective.teacher.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    objective.backbone.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    objective(batch)
    assert torch.equal(*seen) and not torch.equal(seen[0], batch.views["image"])


def test_dropped_patches_are_dropped_from_both_heads(teachers):
    objective = student(teachers / "same", "objective.patch_drop_rate=0.5")
    lengths = []
    objective.backbone.model.norm.register_forward_hook(lambda *given: lengths.append(given[2].shape[1]))
    objective(make_batch(objective, torch.arange(4)))
    assert lengths == [2 + 32]


def test_soft_distillation_of_equals_is_nothing():
    logits = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    assert distillation_loss(logits, logits, "soft", 2.0).abs() < 1e-7
    assert distillation_loss(logits, logits.flip(1), "soft", 2.0) > 0.01


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["objective.teacher={}/label-free"], "label-free has no classifier: fine-tune it first"),
        (["objective.teacher={}/grey"], r"takes images of 1 channel\(s\), and these have 3"),
        (
            ["objective.teacher={}/same", "backbone.name=vit_tiny"],
            "needs a distillation token, which this backbone lacks",
        ),
        (["objective.teacher={}/none"], "There is no run, file, folder or timm model '.*none'"),
        (["objective.global_pool=avg"], "reads its class and distillation tokens, each by a head of its own"),
    ],
)
def test_what_does_not_fit_is_one_sentence(settings, said, teachers):
    with pytest.raises(UserError, match=said) as error:
        small_objective("deit", *(text.format(teachers) for text in settings))
    assert len(error.value.sentences) == 1


def test_a_teacher_of_other_classes_is_one_sentence(teachers):
    with pytest.raises(UserError, match="classifies into 5 classes, and these images have 7: name one that was"):
        small_objective("deit", f"objective.teacher={teachers / 'same'}", classes=7)
    objective = student(teachers / "same")
    info = type("Info", (), dict(size=(16, 16), class_names=["a", "b", "x", "d", "e"]))
    with pytest.raises(UserError, match="was trained on other classes, such as 'c': name one"):
        objective.load_teacher(str(teachers / "same"), info)
    info.class_names = list("abcde")
    assert objective.load_teacher(str(teachers / "same"), info).model.num_classes == 5


def test_randaugment_of_grey_images_is_one_sentence(tmp_path):
    recipe = small_recipe(
        "supervised", "views.augmentation=rand-augment", "data.in_chans=1", "data.mean=[0]", "data.std=[1]"
    )
    images = type("Images", (), dict(labels=torch.zeros(1), classes=["a", "b"]))
    with pytest.raises(
        UserError, match=r"rand-augment changes the colours of RGB images, and these have 1 channel\(s\)"
    ):
        pretrain.build(recipe, images)


def test_a_distilled_run_pays_for_its_teacher(tmp_path):
    """From a supervised run on the digits, in whole runs; both heads are in its backbone."""
    run(tmp_path, "--recipe", "supervised", *TINY, "train.steps=3", "--output", "teacher")
    run(
        tmp_path,
        "--recipe",
        "deit",
        *TINY,
        *SMALL["deit"],
        "train.steps=4",
        "objective.teacher=teacher",
        "--output",
        "it",
    )
    before, lines = log_of(tmp_path / "teacher")[-1]["flops"], log_of(tmp_path / "it")
    per_step = lines[1]["flops"] - lines[0]["flops"]
    assert (
        lines[-1]["flops"] == pytest.approx(before + 4 * per_step) and {"agreement", "distillation"} <= lines[0].keys()
    )
    found = yaml.safe_load((tmp_path / "it/recipe.yaml").read_text())["resolved"]
    assert found["inherited_flops"] == before and per_step == pytest.approx(32 * found["flops_per_image"])
    assert found["published"] == []
    model = timm.create_model(f"local-dir:{tmp_path}/it/backbone", pretrained=True)
    assert model.head.out_features == model.head_dist.out_features == 10
    assert json.loads((tmp_path / "it/backbone/config.json").read_text())["architecture"].startswith("deit_tiny_dist")


# -- augmentation -----------------------------------------------------------------------------------------------------


def test_a_view_is_augmented_by_its_own_numbers():
    spec = {"image": View((16, 16), rand_augment=9.0)}
    images = (255 * torch.rand(6, 3, 24, 24, generator=torch.Generator().manual_seed(0))).byte()
    plain = views.augment({"image": View((16, 16))}, images, step=0)["image"]
    made = views.augment(spec, images, step=0)["image"]
    numbers = Draw(0, 0, torch.arange(6)).uniform("view.image.randaugment", 1, randaugment.LAYERS, randaugment.NUMBERS)
    assert torch.equal(made, randaugment.rand_augment(plain, numbers[:, 0], 9.0)) and not torch.equal(made, plain)
    part = views.make(spec, images[2:5], Draw(0, 0, torch.arange(2, 5)))["image"]
    torch.testing.assert_close(part, made[2:5], atol=1 / 255 + 1e-6, rtol=0)
    recipe = small_recipe("supervised", "views.augmentation=rand-augment", "views.magnitude=7")
    objective = small_objective("supervised", "views.augmentation=rand-augment", "views.magnitude=7")
    assert recipe.views.magnitude == objective.views["image"].rand_augment == 7


def test_erased_rectangles_are_distributed_as_timm_s():
    n, size = 4000, (24, 20)
    draw = Draw(0, 0, torch.arange(n))
    zeros, ones = torch.zeros(n, 1, *size), torch.ones(n, 1, *size)
    ours = corruption.random_erasing(zeros, ones, draw.uniform("box", 41), 0.7)[:, 0]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = RandomErasing(0.7, mode="pixel", device="cpu")(zeros.clone())[:, 0].ne(0).float()
    for measure in (lambda m: m.mean((1, 2)), lambda m: m.amax(2).sum(1), lambda m: m.amax(1).sum(1), corner):
        a, b = (measure(mask[mask.any(2).any(1)]).numpy() for mask in (ours, theirs))
        assert stats.ks_2samp(a, b).pvalue > 1e-3
    for mask in (ours, theirs):
        assert mask.any(2).any(1).float().mean().item() == pytest.approx(0.7, abs=0.025)
    box = ours.amax(2).sum(1) * ours.amax(1).sum(1)
    assert torch.equal(box, ours.sum((1, 2)))  # one whole rectangle


def corner(mask: torch.Tensor) -> torch.Tensor:
    """The first erased pixel of each."""
    return mask.flatten(1).argmax(1).float()


def test_what_is_erased_becomes_noise_of_the_images():
    objective = small_objective("supervised", "objective.reprob=1")
    batch = make_batch(objective, torch.arange(64))
    images = torch.full_like(batch.views["image"], 7.0)
    made = objective.erase(images, batch.draw)
    erased = objective.backbone.normalise(made)[(made != 7).all(1)[:, None].expand_as(made)]
    assert erased.mean().abs() < 0.03 and erased.std().item() == pytest.approx(1, abs=0.03)
    assert torch.equal(objective.erase(images[5:9], batch.draw.for_rows(torch.arange(5, 9))), made[5:9])
    seen = []
    objective.backbone.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    objective(batch)
    assert not torch.equal(seen[0], batch.views["image"])


def test_repeated_augmentation_shows_an_image_thrice_in_a_step():
    order = Order(seed=4, n=50, batch_size=32, repeats=3)
    steps = [order.indices(step, np.arange(32)) for step in range(5)]
    for chosen in steps:
        counts = np.unique(chosen, return_counts=True)[1]
        assert len(counts) == 11 and sorted(counts) == [2, *[3] * 10]
        assert (chosen[::2] != chosen[1::2]).all()  # the partners of mixup
    plain = Order(seed=4, n=50, batch_size=11)
    for step, chosen in enumerate(steps):
        assert (chosen[:11] == plain.indices(step, np.arange(11))).all()
        parts = [order.indices(step, np.arange(first, first + 8)) for first in range(0, 32, 8)]
        assert (np.concatenate(parts) == chosen).all()
    assert sorted(np.concatenate([s[:11] for s in steps])[:50]) == list(range(50))


def test_a_batch_is_mixed_in_one_proportion():
    images, targets = torch.rand(16, 3, 8, 8), torch.eye(16)
    for step in range(6):
        draw = Draw(0, step, torch.arange(16))
        mixed, soft = views.mix(images, targets, draw, 0.8, 1.0, 1.0, "batch")
        share = soft.diagonal()
        assert torch.allclose(share, share[:1].expand(16)) and 0 <= share[0] <= 1
        part = views.mix(images[4:8], targets[4:8], draw.for_rows(torch.arange(4, 8)), 0.8, 1.0, 1.0, "batch")
        assert torch.equal(part[0], mixed[4:8])
    each = views.mix(images, targets, draw, 0.8, 1.0)[1].diagonal()
    assert len(each.unique()) > 4
    two = images[:2], targets[:2]
    several = [views.mix(*two, Draw(1, step, torch.arange(2)), 1.0, 0.0, mode="batch")[1] for step in range(400)]
    shares = [soft[0, 0].item() for soft in several]
    assert stats.kstest(shares, "uniform").pvalue > 1e-3  # Beta(1, 1)
