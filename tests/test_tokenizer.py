"""The tokenizer: its codebook moves as published and however a step is cut, and its tokens are BEiT's targets."""

import json
import math
from dataclasses import replace

import pytest
import timm
import torch
import torch.nn.functional as F
import yaml
from conftest import BACKBONE, FACTS, make_batch, small_objective, small_recipe
from safetensors.torch import load_file, save_file
from several import Several
from test_engine import compare
from test_loop import arguments, killed, log_of, run

from ssl_vit import backbones, flops, objectives, pretrain, quantizer, teachers, views, weights
from ssl_vit import recipe as recipes
from ssl_vit.errors import UserError
from ssl_vit.objectives import tokenizer
from ssl_vit.objectives.base import DatasetInfo
from ssl_vit.objectives.multitask import Multitask
from ssl_vit.quantizer import Codebook
from ssl_vit.randomness import Draw
from ssl_vit.views import View

GATHERED = ("sums", "counts", "spare")
ROWS = torch.arange(32)


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(values, dim=-1)


def codebook(size: int = 6, dim: int = 4, **settings) -> Codebook:
    book = Codebook(size, dim, **settings).double()
    book.codes.copy_(unit(size, dim, seed=99))
    return book


def step(book: Codebook, parts: list[torch.Tensor], vectors: torch.Tensor, number: int = 0) -> None:
    """A step on unit vectors (B, N, D) of all rows, cut into these parts of the rows."""
    book.begin_step()
    for rows in parts:
        mine = vectors[rows]
        book.gather(mine, book(mine), Draw(0, number, rows), len(vectors))
    book.move(lambda tensor: tensor)


# -- the codebook -----------------------------------------------------------------------------------------------------


def test_codes_move_as_beit_v2_s():
    """norm_ema_quantizer.py: the mean of what a code got, unit; then the moving average, unit; others stay."""
    book = codebook(size=12, decay=0.9, revive_after=None)
    expected, unused = book.codes.clone(), 0
    for number in range(5):
        vectors = unit(8, 3, 4, seed=number)
        flat = vectors.flatten(0, 1)
        one_hot = F.one_hot((flat @ expected.T).argmax(1), 12).double()
        bins = one_hot.sum(0)
        mean = F.normalize((one_hot.T @ flat) / bins.clamp(min=1)[:, None], dim=-1)
        mean = torch.where(bins[:, None] == 0, expected, mean)
        expected = F.normalize(0.9 * expected + 0.1 * mean, dim=-1)
        step(book, [ROWS[:8]], vectors, number)
        torch.testing.assert_close(book.codes, expected, rtol=0, atol=1e-12)
        unused += int((bins == 0).sum())
    assert unused  # or the rule for them was not tried


def test_codes_of_equal_vectors_move_as_vector_quantize_pytorch_s():
    """Its CosineSimCodebook averages sums and counts instead: the same where each code gets as many equal vectors."""
    book = codebook(decay=0.8, revive_after=None)
    vectors = F.normalize(book.codes + 0.1 * unit(6, 4, seed=1), dim=-1)[None].repeat(5, 1, 1)
    assert book(vectors[0]).tolist() == list(range(6))
    embed_avg, cluster_size = 5 * book.codes, torch.full((6, 1), 5.0).double()
    embed_avg.lerp_(vectors.sum(0), 0.2)
    cluster_size.lerp_(torch.full((6, 1), 5.0).double(), 0.2)
    step(book, [ROWS[:5]], vectors)
    torch.testing.assert_close(book.codes, F.normalize(embed_avg / cluster_size, dim=-1), rtol=0, atol=1e-12)


def test_tokens_are_chosen_in_full_precision():
    """Under autocast too, where BEiT asks a trained tokenizer for its tokens."""
    book = Codebook(512, 16)
    book.codes.copy_(F.normalize(torch.randn(512, 16, generator=torch.Generator().manual_seed(0)), dim=-1))
    vectors = F.normalize(torch.randn(4000, 16, generator=torch.Generator().manual_seed(1)), dim=-1)
    with torch.autocast("cpu", torch.bfloat16):
        tokens = book(vectors)
    assert torch.equal(tokens, (vectors @ book.codes.T).argmax(-1))


def test_a_dead_code_becomes_a_vector_of_the_batch_however_it_is_cut():
    whole, cut, pair = (codebook(size=64, revive_after=3) for _ in range(3))
    for number in range(4):
        vectors = unit(32, 2, 4, seed=number)
        before = whole.codes.clone()
        dead = whole.idle >= 2
        step(whole, [ROWS], vectors, number)
        step(cut, list(ROWS.split(5)), vectors, number)
        halves = [pair, codebook(size=64, revive_after=3)]  # two processes, each with its own sums
        halves[1].load_state_dict(pair.state_dict())
        for book, rows in zip(halves, ROWS.chunk(2), strict=True):
            book.begin_step()
            book.gather(vectors[rows], book(vectors[rows]), Draw(0, number, rows), 32)
        totals = {id(getattr(pair, name)): getattr(pair, name) + getattr(halves[1], name) for name in GATHERED}
        pair.move(lambda tensor, totals=totals: totals[id(tensor)])
        for name in ("codes", "share", "idle"):
            for other in (cut, pair):
                torch.testing.assert_close(getattr(other, name), getattr(whole, name), rtol=0, atol=1e-12)
        if number == 2:
            revived = dead & (whole.idle == 0) & (whole.counts == 0)
            assert revived.sum() > 5
            nearest = (whole.codes[revived] @ vectors.flatten(0, 1).T).amax(1)
            torch.testing.assert_close(nearest, torch.ones_like(nearest))
            assert len(whole.codes[revived].unique(dim=0)) > 5  # not all the same vector
            assert (whole.codes[revived] != before[revived]).any(1).all()


def test_a_code_without_a_spare_vector_waits():
    """Where a task has some rows of the batch only, a code's row may be another's."""
    book = codebook(size=64, revive_after=1)
    vectors = unit(4, 2, 4)
    book.gather(vectors, book(vectors), Draw(0, 0, torch.arange(4)), 4000)
    spare = book.spare.any(1)
    assert spare.sum() < 3
    before = book.codes.clone()
    book.move(lambda tensor: tensor)
    still = (book.counts == 0) & ~spare
    assert torch.equal(book.codes[still], before[still]) and (book.codes.norm(dim=1) > 0.99).all()


def test_perplexity_and_usage():
    book = codebook(size=4)
    assert book.perplexity().item() == pytest.approx(4) and book.usage() == 1
    book.share.copy_(torch.tensor([0.5, 0.5, 0.0, 0.0]))
    assert book.perplexity().item() == pytest.approx(2)
    vectors = book.codes[:1].expand(8, 3, 4)
    for number in range(3):
        step(book, [ROWS[:8]], vectors, number)
    assert book.usage() == 0.25
    assert book.perplexity().item() == pytest.approx(1)
    vectors = book.codes[[0, 0, 0, 2]].expand(8, 4, 4)
    step(book, list(ROWS[:8].split(3)), vectors)
    assert book.usage() == 0.5 and book.perplexity().item() == pytest.approx(4 / 3**0.75)


def test_the_codes_start_at_the_centres_of_clusters(monkeypatch):
    monkeypatch.setattr(quantizer, "PART", 7)  # vectors at a time
    centres = unit(2, 4, seed=3)
    vectors = F.normalize(centres[[0, 0, 0, 1]].repeat(50, 1) + 0.02 * unit(200, 4), dim=-1).float()
    book = Codebook(2, 4)
    book.fit(vectors, 0)
    assert ((centres.float() @ book.codes.T).amax(1) > 0.999).all()
    assert sorted(book.share.tolist()) == [0.25, 0.75]
    with pytest.raises(UserError, match="gives 1 different vectors for 2 codes"):
        book.fit(vectors[:1].expand(9, -1), 0)


# -- the objective ----------------------------------------------------------------------------------------------------


def test_the_gradient_passes_the_codes_by():
    """The encoder gets the gradient of the decoder's input as if there were no codes, and that of the commitment."""
    objective = small_objective("tokenizer", "objective.commitment=0.25").double()
    encoded = torch.randn(3, 64, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    q = objective.quantizer
    vectors = q.vectors(encoded).detach().requires_grad_()
    tokens = q.codebook(vectors)
    codes = q.codebook.codes[tokens].requires_grad_()
    target = torch.randn(3, 64, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    [expected] = torch.autograd.grad((q.decoder(codes) - target).square().mean(), codes)
    expected = expected + 0.25 * 2 * (vectors - codes).detach() / vectors.numel()

    made, found, same = q(encoded.requires_grad_())
    assert torch.equal(same, tokens)
    loss = (made - target).square().mean() + 0.25 * F.mse_loss(found, q.codebook.codes[same])
    [gradient] = torch.autograd.grad(loss, found)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-14)


def test_the_loss_is_that_of_the_pixels_and_the_commitment():
    objective = small_objective("tokenizer", "objective.commitment=0.25")
    batch = make_batch(objective, torch.arange(8))
    result = objective(batch)
    images = objective.backbone.normalise(batch.views["image"])
    q = objective.quantizer
    vectors = q.vectors(objective.backbone(batch.views["image"])[:, 1:])
    tokens = (vectors @ q.codebook.codes.T).argmax(-1)
    made = q.decoder(q.codebook.codes[tokens])  # (8, 64, 12) of 2x2 patches
    pixels = F.unfold(images, 2, stride=2).view(8, 3, 4, 64).permute(0, 3, 2, 1).flatten(2)
    error, away = (made - pixels).square().mean(), (vectors - q.codebook.codes[tokens]).square().mean()
    assert result["reconstruction"].item() == pytest.approx(error.item(), rel=1e-5)
    assert result["commitment"].item() == pytest.approx(away.item(), rel=1e-5)
    assert result["loss"].item() == pytest.approx((error + 0.25 * away).item(), rel=1e-5)


def test_the_commitment_draws_the_encoder_towards_its_codes():
    """Its gradient is 2 (vector - code) over all values, times its weight, and passes the layer before the codes."""
    gradients = []
    for weight in (0, 1):
        objective = small_objective("tokenizer", f"objective.commitment={weight}").double()
        batch = make_batch(objective, torch.arange(8), dtype=torch.float64)
        q = objective.quantizer
        first = next(q.project.parameters())
        gradients.append(torch.autograd.grad(objective(batch)["loss"], first)[0])
    vectors = q.vectors(objective.encode(batch.views["image"]))
    codes = q.codebook.codes[q.codebook(vectors)]
    [expected] = torch.autograd.grad((vectors - codes.detach()).square().mean(), first)
    torch.testing.assert_close(gradients[1] - gradients[0], expected, rtol=1e-8, atol=1e-12)
    assert expected.abs().max() > 1e-6


def test_the_codebook_moves_at_the_rate_of_the_recipe():
    moved = []
    for decay in (0.5, 0.9):
        objective = small_objective("tokenizer", f"objective.code_decay={decay}")
        assert objective.quantizer.codebook.decay == decay
        before = objective.quantizer.codebook.codes.clone()
        objective(make_batch(objective, torch.arange(8)))
        objective.on_optimizer_step(3, 10, lambda t: t)
        moved.append(float((objective.quantizer.codebook.codes - before).norm()))
    assert moved[0] > 1.5 * moved[1] > 0


def test_a_collapsed_codebook_alarms():
    objective = small_objective("tokenizer")
    assert objective.alarm(dict(perplexity=6.0)) is None
    assert "as varied as 1.5 equally frequent ones, of 8 codes" in objective.alarm(dict(perplexity=1.5))
    objective.config.vocab_size = 2
    assert objective.alarm(dict(perplexity=1.9)) is None and objective.alarm(dict(perplexity=1.4))
    with torch.no_grad():
        objective.quantizer.project[2].weight.zero_()
        objective.quantizer.project[2].bias.fill_(1)  # every patch has the same vector
    for number in range(5):
        objective.begin_step()
        with torch.no_grad():
            result = objective(make_batch(objective, torch.arange(2), step=number, total=5))
        objective.on_optimizer_step(number, 5, lambda tensor: tensor)
    assert objective.alarm({key: value.item() for key, value in result.items()})


def test_a_second_view_is_the_same_crop():
    spec = {"image": View((16, 16), jitter=1.0, grey=0.3)}
    spec["tokens"] = View((16, 16), jitter=1.0, grey=0.3, same_as="image")
    images = (255 * torch.rand(6, 3, 40, 48, generator=torch.Generator().manual_seed(0))).byte()
    made = views.augment(spec, images, step=0)
    assert torch.equal(made["image"], made["tokens"])
    photo = views.crop_photos(spec, Draw(0, 0, torch.tensor([0])))(0, images[0])
    assert torch.equal(photo["image"], photo["tokens"])
    smooth = F.avg_pool2d(F.avg_pool2d(images.float(), 9, 1, 4), 9, 1, 4).byte()
    spec = {"image": View((32, 32)), "tokens": View((16, 16), same_as="image"), "other": View((16, 16))}
    made = views.augment(spec, smooth, step=0)
    small = F.avg_pool2d(made["image"], 2)
    assert (small - made["tokens"]).abs().mean() < 0.1 * (small - made["other"]).abs().mean()


def test_a_second_view_of_another_size_is_as_blurred():
    """Its sigma is in pixels of its own."""
    recipe = small_recipe("beit", "views.augmentation=dino", "views.scale=[1,1]")
    info = DatasetInfo((64, 64), 0.0, 5, recipe.views, 32)
    half = type("Backbone", (), dict(input_size=(32, 32), evaluation_view=View((32, 32))))
    spec = info.single_view() | info.second_view("tokens", half)
    assert spec["image"].blur_sigma == (0.1, 2.0) and spec["tokens"].blur_sigma == (0.05, 1.0)
    spec = {name: replace(view, blur=1.0, jitter=0, grey=0, solarize=0) for name, view in spec.items()}
    images = (255 * torch.rand(6, 3, 64, 64, generator=torch.Generator().manual_seed(0))).byte()
    smooth = F.avg_pool2d(images.float(), 3, 1, 1).byte()
    made = views.augment(spec | dict(wrong=replace(spec["tokens"], blur_sigma=(0.1, 2.0))), smooth, step=0)
    away = {name: (F.avg_pool2d(made["image"], 2) - made[name]).abs().mean() for name in ("tokens", "wrong")}
    assert away["tokens"] < 0.5 * away["wrong"]


# -- the tokens of a run as targets -----------------------------------------------------------------------------------


def as_run(folder, name: str, *settings: str):
    """A finished run with the weights of a small objective. Returns the objective."""
    objective, recipe = small_objective(name, *settings), small_recipe(name, *settings)
    recipe.data.img_size = list(recipe.data.size)
    folder.mkdir()
    (folder / "recipe.yaml").write_text(
        yaml.safe_dump(recipe.as_dict() | dict(images=dict(count=9, classes=list("abcde"))))
    )
    (folder / "log.jsonl").write_text('{"step": 1, "flops": 1e9}\n{"step": 2, "flops": 3e9}\n{"step": 2, "knn": 0.5}\n')
    for file, tensors in objective.parts().items():
        save_file({key: value.contiguous() for key, value in tensors.items()}, folder / f"{file}.safetensors")
    weights.save(objective.exported, folder / "backbone")
    return objective.eval()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    as_run(folder / "same", "tokenizer")
    as_run(folder / "finer", "tokenizer", "data.img_size=8", "backbone.patch_size=1")
    as_run(folder / "grey", "tokenizer", "data.in_chans=1", "data.mean=[0.5]", "data.std=[0.2]")
    as_run(folder / "coarse", "tokenizer", "backbone.patch_size=4")
    as_run(folder / "dino", "dino", "backbone.patch_size=4")
    return folder


@pytest.mark.parametrize("name", ["same", "finer"])
def test_the_tokens_of_a_run_are_the_targets(name, trained):
    objective = small_objective("beit", f"objective.tokenizer={trained / name}")
    assert objective.config.target == "tokenizer" and objective.views.keys() - {"image"} <= {"tokens"}
    batch = make_batch(objective, torch.arange(6))
    seen = batch.views["image"]
    if name == "finer":  # 8x8 patches too, of an image half as large
        assert objective.views["tokens"].size == (8, 8) and objective.views["tokens"].same_as == "image"
        seen = batch.views["tokens"]
    encoder = timm.create_model(f"local-dir:{trained / name}/backbone", pretrained=True).eval()
    state = load_file(trained / name / "tokenizer.safetensors")
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ([0.5, 0.45, 0.4], [0.25, 0.2, 0.3]))
    encoded = encoder.forward_features((seen - mean) / std)[:, 1:]
    hidden = torch.tanh(encoded @ state["project.0.weight"].T + state["project.0.bias"])
    vectors = F.normalize(hidden @ state["project.2.weight"].T + state["project.2.bias"], dim=-1)
    tokens = (vectors @ state["codebook.codes"].T).argmax(-1)
    assert torch.equal(objective.target(seen), tokens) and len(tokens.unique()) > 2
    logits, mask, *_ = objective.predict(batch.views["image"], batch.draw)
    expected = F.cross_entropy(logits[mask], tokens[mask])
    assert objective(batch)["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    frozen = [key for key, weight in objective.named_parameters() if key.startswith("target.")]
    assert frozen and not any(dict(objective.named_parameters())[key].requires_grad for key in frozen)
    assert not objective.target.training and not objective.target.encoder.training


def test_the_tokenizer_is_paid_for(trained):
    """Its forward pass in every image, and its training before the first one."""
    plain, given = small_objective("beit"), small_objective("beit", f"objective.tokenizer={trained / 'same'}")
    assert given.inherited == {str((trained / "same").resolve()): 3e9} and plain.inherited == {}
    free, paid = (flops.per_image(objective, 3, False) for objective in (plain, given))
    encoder = flops.count(given.target.encoder, lambda twin: twin(torch.zeros(1, 3, 16, 16)))
    assert encoder < paid - free < 1.3 * encoder  # and its projection

    recipe = small_recipe("beit", "train.flops=5e9", f"objective.tokenizer={trained / 'same'}")
    assert flops.budget(recipe, given, 0) == (math.ceil(2e9 / (256 * paid)), paid)
    recipe.train.flops = 3e9
    with pytest.raises(UserError, match=r"train.flops=3e\+09 is spent already: .*same took 3e\+09"):
        flops.budget(recipe, given, 0)
    task = f"beit objective.tokenizer={trained / 'same'}"
    read = objectives.read_recipe(
        "multitask", [f"objective.tasks={json.dumps([task, 'mae'])}", *BACKBONE, *FACTS], None
    )
    info = DatasetInfo((16, 16), 0.5, 5, read.views, 256)
    several = Multitask(read.objective, backbones.build(read.backbone, read.data, 0), info)
    assert several.inherited == given.inherited


def test_the_tokenizer_of_a_task_sees_the_crop_of_the_task(trained):
    task = f"beit objective.tokenizer={trained / 'finer'}"
    read = objectives.read_recipe(
        "multitask", [f"objective.tasks={json.dumps([task, 'mae'])}", *BACKBONE, *FACTS], None
    )
    info = DatasetInfo((16, 16), 0.5, 5, read.views, 256)
    objective = Multitask(read.objective, backbones.build(read.backbone, read.data, 0), info)
    images = (255 * torch.rand(6, 3, 40, 48, generator=torch.Generator().manual_seed(0))).byte()
    smooth = F.avg_pool2d(F.avg_pool2d(images.float(), 9, 1, 4), 9, 1, 4).byte()
    made = views.make(objective.views, smooth, Draw(0, 1, torch.arange(6)))
    small = F.avg_pool2d(made["beit/image"], 2)
    assert (small - made["beit/tokens"]).abs().mean() < 0.1 * (small - small.roll(1, 0)).abs().mean()
    with pytest.raises(ValueError, match="no view 'image'"):
        views.make({"tokens": View((8, 8), same_as="image")}, smooth, Draw(0, 1, torch.arange(6)))


def test_pictures_show_what_the_tokens_stand_for(trained):
    objective = small_objective("beit", f"objective.tokenizer={trained / 'same'}").eval()
    images = make_batch(objective, torch.arange(3)).views["image"]
    draw = Draw(0, 0, torch.arange(3))
    with torch.no_grad():
        [sheet] = objective.show(images, draw).values()
        logits, mask, *_ = objective.predict(images, draw)
        tokens = torch.where(mask, logits.argmax(-1), objective.target(images))
        made = objective.target.quantizer.decode(tokens)
    assert sheet.columns[2].endswith("decoded from the most likely tokens")
    tile = sheet.panels[:, 2].unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 4, 5, 1).reshape(3, 64, 12)
    std, mean = (v.flatten().repeat(4) for v in (objective.backbone.std, objective.backbone.mean))
    torch.testing.assert_close(tile[mask], (made * std + mean).clamp(0, 1)[mask], atol=1e-5, rtol=0)
    own = small_objective("tokenizer").eval()
    [sheet] = own.show(images, draw).values()
    assert sheet.panels.shape == (3, 2, 3, 16, 16) and torch.equal(sheet.panels[:, 0], images)


@pytest.mark.parametrize(
    ("recipe", "settings", "said"),
    [
        ("beit", ["objective.tokenizer={}/coarse"], "gives 4x4 tokens, and this backbone has 8x8 patches: train"),
        ("beit", ["objective.tokenizer={}/grey"], r"takes images of 1 channel\(s\), and these have 3: train"),
        ("beit", ["objective.tokenizer={}/dino"], "is a run of the objective dino: name one of the recipe tokenizer"),
        ("beit", ["objective.tokenizer={}/none"], "There is no run '.*none': objective.tokenizer names a finished run"),
        ("beit", ["objective.target=tokenizer"], "objective.target=tokenizer needs one: set objective.tokenizer=RUN"),
        ("tokenizer", ["objective.teacher={}/grey"], r"takes images of 1 channel\(s\), and these have 3"),
        ("tokenizer", ["objective.teacher={}/resnet"], "is no plain ViT, and has no features of patches"),
        ("tokenizer", ["objective.decoder_embed_dim=15"], "decoder_embed_dim=15 is not divisible by decoder_num"),
    ],
)
def test_what_does_not_fit_is_one_sentence(recipe, settings, said, trained):
    if "resnet" in settings[0] and not (trained / "resnet").exists():
        none = [f"backbone.{key}=null" for key in ("embed_dim", "depth", "num_heads")]
        as_run(trained / "resnet", "supervised", "backbone.name=resnet10t", "backbone.drop_path_rate=0", *none)
    with pytest.raises(UserError, match=said) as error:
        small_objective(recipe, *(text.format(trained) for text in settings))
    assert len(error.value.sentences) == 1 and "\n" not in str(error.value)


# -- a teacher's features instead of pixels ---------------------------------------------------------------------------


def test_a_teacher_s_features_are_recovered(trained, tmp_path):
    """VQ-KD: one minus the cosine between the features of the teacher, and what the decoder makes of the codes."""
    objective = small_objective("tokenizer", f"objective.teacher={trained / 'dino'}")
    assert objective.views["teacher"].size == (32, 32)  # 8x8 patches of 4 px
    assert objective.inherited == teachers.cost(str(trained / "dino")) and not objective.shows
    batch = make_batch(objective, torch.arange(4))
    model = timm.create_model(f"local-dir:{trained / 'dino'}/backbone", pretrained=True, img_size=32).eval()
    features = model.forward_features(objective.backbone.normalise(batch.views["teacher"]))[:, 1:]
    made, vectors, tokens = objective.quantizer(objective.backbone(batch.views["image"])[:, 1:])
    away = (vectors - objective.quantizer.codebook.codes[tokens]).square().mean()
    error = (1 - (F.normalize(made, dim=-1) * F.normalize(features, dim=-1)).sum(-1)).mean()
    result = objective(batch)
    assert result["reconstruction"].item() == pytest.approx(error.item(), rel=1e-4)
    assert result["loss"].item() == pytest.approx((error + away).item(), rel=1e-4)
    result["loss"].backward()
    assert all(weight.grad is None for weight in objective.teacher.parameters())
    assert objective.train().teacher.training is False
    assert teachers.cost("vit_tiny_patch16_224") == {}
    as_run(tmp_path / "continued", "mae")
    assert sum(teachers.cost(str(tmp_path / "continued")).values()) == 3e9
    tree = yaml.safe_load((tmp_path / "continued" / "recipe.yaml").read_text())
    tree["runtime"]["started_from"] = {"/moved/since": 5e9}  # as it was counted when the run began
    (tmp_path / "continued" / "recipe.yaml").write_text(yaml.safe_dump(tree))
    assert sum(teachers.cost(str(tmp_path / "continued")).values()) == 3e9 + 5e9
    tree["runtime"]["learnt_from"] = {"/elsewhere": 1e9}  # which its log includes
    tree["train"]["steps"] = 2
    (tmp_path / "continued" / "recipe.yaml").write_text(yaml.safe_dump(tree))
    found = {str((tmp_path / "continued").resolve()): 2e9, "/elsewhere": 1e9, "/moved/since": 5e9}
    assert teachers.cost(str(tmp_path / "continued")) == found
    (tmp_path / "continued" / "log.jsonl").unlink()
    with pytest.raises(UserError, match="continued was trained, and its log.jsonl, which tells how many FLOPs"):
        teachers.cost(str(tmp_path / "continued"))
    tree["train"]["steps"] = 0
    (tmp_path / "continued" / "recipe.yaml").write_text(yaml.safe_dump(tree | dict(runtime={})))
    assert sum(teachers.cost(str(tmp_path / "continued")).values()) == 0.0


def test_published_weights_are_known_through_all_that_learnt_from_them(trained, tmp_path):
    """Nobody counted their FLOPs, and their licence goes with what learnt from them."""
    assert teachers.published("vit_tiny_patch16_224.x") == ["vit_tiny_patch16_224.x"]
    assert teachers.published(str(trained / "dino")) == []
    as_run(tmp_path / "taught", "mae")
    tree = yaml.safe_load((tmp_path / "taught" / "recipe.yaml").read_text())
    tree["resolved"] = dict(published=["vit_tiny_patch16_224.x"])
    (tmp_path / "taught" / "recipe.yaml").write_text(yaml.safe_dump(tree))
    assert teachers.published(str(tmp_path / "taught")) == ["vit_tiny_patch16_224.x"]


def test_tokens_that_stand_for_features_have_no_picture(trained):
    if not (trained / "kd").exists():
        as_run(trained / "kd", "tokenizer", f"objective.teacher={trained / 'dino'}")
    objective = small_objective("beit", f"objective.tokenizer={trained / 'kd'}").eval()
    batch = make_batch(objective, torch.arange(2))
    assert objective(batch)["loss"].isfinite()
    with torch.no_grad():
        [sheet] = objective.show(batch.views["image"], Draw(0, 0, torch.arange(2))).values()
    assert len(sheet.columns) == sheet.panels.shape[1] == 2


# -- whole runs -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("alone")
def test_runs_that_learn_from_runs(tmp_path):
    """DINO → VQ-KD in two processes → BEiT killed and started again: the same as one process, uninterrupted."""
    run(tmp_path, *arguments("dino", "train.steps=2", "--output", "dino"))
    settings = ["train.steps=6", "objective.teacher=dino"]
    run(tmp_path, *arguments("tokenizer", *settings, "--output", "one-tokenizer-supervised", "runtime.keep_every=3"))
    words = arguments("tokenizer", *settings, "runtime.keep_every=3", "runtime.per_device_batch_size=6")
    several = Several(pretrain.main, tmp_path, *words, "--output", "several-tokenizer-supervised")
    assert several.wait() == [0, 0], several.said
    compare(tmp_path / "one-tokenizer-supervised", tmp_path / "several-tokenizer-supervised")
    one, other = (load_file(tmp_path / f"{n}-tokenizer-supervised/tokenizer.safetensors") for n in ("one", "several"))
    for key, value in one.items():
        torch.testing.assert_close(other[key], value, rtol=0, atol=2e-4)

    before = log_of(tmp_path / "dino")[-1]["flops"]
    last = log_of(tmp_path / "one-tokenizer-supervised")[-1]
    found = yaml.safe_load((tmp_path / "one-tokenizer-supervised/recipe.yaml").read_text())["resolved"]
    assert found["inherited_flops"] == before and last["perplexity"] > 1 and 0 < last["usage"] <= 1
    assert sum(teachers.cost(str(tmp_path / "one-tokenizer-supervised")).values()) == pytest.approx(last["flops"])
    assert teachers.cost(str(tmp_path / "one-tokenizer-supervised"))[str((tmp_path / "dino").resolve())] == before
    assert last["flops"] == pytest.approx(before + 6 * 32 * found["flops_per_image"])

    beit = arguments("beit", "objective.tokenizer=one-tokenizer-supervised")
    run(tmp_path, *beit, "--output", "whole")
    killed(tmp_path, 6, *beit, "--output", "killed")
    run(tmp_path, *beit, "--output", "killed")
    first, second = ((tmp_path / name / "backbone/model.safetensors").read_bytes() for name in ("whole", "killed"))
    assert first == second
    assert log_of(tmp_path / "whole")[0]["flops"] > last["flops"]


def test_a_run_s_settings_are_read_with_its_file(tmp_path):
    """All that `load` gives is of the run: settings of a later version's default do not creep in."""
    objective = as_run(tmp_path / "run", "tokenizer", "objective.code_decay=0.5", "objective.revive_after=null")
    encoder, quantizer, config = tokenizer.load(str(tmp_path / "run"))
    assert (config.code_decay, config.revive_after, config.vocab_size) == (0.5, None, 8)
    assert weights.digest(encoder) == weights.digest(objective.exported)
    for key, value in objective.quantizer.state_dict().items():
        assert torch.equal(quantizer.state_dict()[key], value)
    assert recipes.read_settings(tmp_path / "run/recipe.yaml")["objective"]["name"] == "tokenizer"
