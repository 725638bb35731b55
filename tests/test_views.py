"""Every operation against torchvision's on single images, every law against torchvision's by Kolmogorov-Smirnov."""

import dataclasses

import numpy as np
import pytest
import timm
import torch
from packaging.version import Version
from PIL import Image
from scipy.stats import beta as beta_law
from scipy.stats import chisquare, ks_2samp, kstest
from timm.data import create_transform
from torchvision.transforms import ColorJitter, InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2 import functional as tv

from ssl_vit import views
from ssl_vit.randomness import Draw
from ssl_vit.views import View


def rows(n, start=0, step=0):
    return Draw(7, step, torch.arange(start, start + n))


def photos(n, channels=3, height=32, width=32, seed=0):
    """Smooth colours under noise, so that neither the blur nor the hue has an easy time."""
    g = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, channels, 5, 5, generator=g)
    images = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")
    return ((images + 0.1 * torch.randn(images.shape, generator=g)) * 255).clamp(0, 255).to(torch.uint8)


def close(a, b, atol):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


EVERYTHING = {
    "a": View((16, 24), jitter=0.8, grey=0.2, blur=0.5, solarize=0.3),
    "b": View((8, 8), count=3, jitter=0.8, grey=0.2, blur=0.5, solarize=0.3),
    "c": View((20, 20), crop=False, three_augment=True, jitter=1.0),
}


# --- the crop ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale, ratio, height, width", [
    ((0.2, 1.0), (3 / 4, 4 / 3), 64, 64),
    ((0.05, 0.4), (3 / 4, 4 / 3), 48, 90),
    ((0.5, 1.0), (0.3, 2.0), 200, 100),  # many tries fail
])  # fmt: skip
def test_boxes_follow_torchvisions_law(scale, ratio, height, width):
    n = 6000
    ours = views.boxes("v", View((8, 8), scale=scale, ratio=ratio), rows(5 * n), height, width)[:, 0].numpy()
    image = torch.empty(1, height, width)
    torch.manual_seed(0)
    theirs = np.array([RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(n)])
    for name, statistic in {
        "area": lambda top, left, h, w: h * w,
        "aspect": lambda top, left, h, w: w / h,
        "top": lambda top, left, h, w: top / (height - h + 1),
        "left": lambda top, left, h, w: left / (width - w + 1),
        "bottom": lambda top, left, h, w: height - h - top,
        "right": lambda top, left, h, w: width - w - left,
    }.items():
        p = ks_2samp(statistic(*ours.T), statistic(*theirs.T)).pvalue
        assert p > 0.001, (name, p)
    assert ours[:, :2].min() >= 0 and (ours[:, 0] + ours[:, 2]).max() <= height
    assert (ours[:, 1] + ours[:, 3]).max() <= width


@pytest.mark.parametrize("height, width", [(10, 100), (100, 10), (31, 57), (50, 50)])
def test_the_fallback_is_torchvisions(height, width):
    ratio = (3 / 4, 4 / 3) if height != width else (0.01, 0.02)
    view = View((8, 8), scale=(0.98, 1.0), ratio=ratio)
    ours = views.boxes("v", view, rows(20), height, width)[:, 0]
    theirs = RandomResizedCrop.get_params(torch.empty(1, height, width), list(view.scale), list(ratio))
    assert (ours == torch.tensor(theirs)).all()


@pytest.mark.parametrize("height, width", [(64, 64), (60, 90)])
def test_clipped_boxes_follow_the_law_of_mae_s_linear_probe(height, width):
    """util/crop.py of the official code: one draw, its sides cut to the image's."""
    n, rng = 20_000, np.random.default_rng(0)
    ours = views.boxes("v", View((8, 8), scale=(0.08, 1.0), clip=True), rows(n), height, width)[:, 0].numpy()
    area = height * width * rng.uniform(0.08, 1, n)
    aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3), n))
    h, w = np.minimum(np.sqrt(area / aspect).round(), height), np.minimum(np.sqrt(area * aspect).round(), width)
    top = rng.integers(0, height - h + 1)
    for mine, theirs in ((ours[:, 2] * ours[:, 3], h * w), (ours[:, 3] / ours[:, 2], w / h), (ours[:, 0], top)):
        assert ks_2samp(mine, theirs).pvalue > 0.001
    assert (ours[:, :2] + ours[:, 2:] <= [height, width]).all()
    assert (ours[:, 2:] == [height, width]).any(1).mean() > 0.05
    usual = views.boxes("v", View((8, 8), scale=(0.08, 1.0)), rows(n), height, width)[:, 0].numpy()
    assert ks_2samp(usual[:, 2] * usual[:, 3], h * w).pvalue < 1e-6  # else nothing was tested


def test_views_of_one_image_are_independent():
    view = View((8, 8), count=2)
    one, two = views.boxes("v", view, rows(2000), 64, 64).double().unbind(1)
    other = views.boxes("w", view, rows(2000), 64, 64)[:, 0].double()
    for a, b in ((one, two), (one, other)):
        for k in range(4):
            assert abs(np.corrcoef(a[:, k], b[:, k])[0, 1]) < 0.06


@pytest.mark.parametrize("channels, height, width, size", [
    (3, 32, 32, (32, 32)), (3, 32, 32, (16, 16)), (3, 40, 72, (16, 56)), (1, 28, 20, (33, 64)), (5, 64, 48, (24, 24)),
])  # fmt: skip
def test_crop_equals_torchvisions(channels, height, width, size):
    n = 24
    images = photos(n, channels, height, width)
    places = views.boxes("v", View(size, scale=(0.02, 1.0)), rows(n), height, width)[:, 0]
    places[0] = torch.tensor([0, 0, height, width])
    places[1] = torch.tensor([height - 1, width - 3, 1, 3])
    flip = torch.arange(n) % 3 == 0
    ours = views.crop(images, places, flip, size)
    assert ours.shape == (n, channels, *size) and ours.dtype == torch.float32
    assert ours.min() >= 0 and ours.max() <= 1
    for image, box, mirror, result in zip(images, places.tolist(), flip, ours, strict=True):
        expected = tv.resized_crop(image.float() / 255, *box, list(size), antialias=True)
        close(result, tv.horizontal_flip(expected) if mirror else expected, 2e-6)


@pytest.mark.parametrize("channels, height, width, size", [
    (3, 32, 32, (32, 32)), (3, 40, 72, (16, 56)), (1, 28, 20, (33, 64)), (3, 200, 150, (96, 96)),
])  # fmt: skip
def test_bicubic_crop_equals_torchvisions(channels, height, width, size):
    n = 12
    images = (photos(n, channels, height, width).int() * 3 - 255).clamp(0, 255).to(torch.uint8)  # so that it overshoots
    places = views.boxes("v", View(size, scale=(0.02, 1.0)), rows(n), height, width)[:, 0]
    places[0] = torch.tensor([0, 0, height, width])
    places[1] = torch.tensor([height - 4, width - 5, 4, 5])
    ours = views.crop(images, places, torch.zeros(n, dtype=torch.bool), size, "bicubic")
    assert ours.min() == 0 and ours.max() == 1
    overshot = 0
    for image, box, result in zip(images, places.tolist(), ours, strict=True):
        expected = tv.resized_crop(image.float() / 255, *box, list(size), InterpolationMode.BICUBIC, antialias=True)
        overshot += ((expected < -0.01) | (expected > 1.01)).sum().item()
        close(result, expected.clamp(0, 1), 1e-5)
    assert overshot > 100


def test_the_interpolation_of_a_recipe_is_that_of_its_crops():
    images = photos(4, 3, 40, 40) // 2 + 60  # nothing overshoots: the workers cut that between the two passes
    for spec in (views.crop_flip((24, 24), 0.0), views.none((24, 24))):
        cubic = views.resampled(spec, "bicubic")
        for draw in (rows(4), rows(4, step=1)):
            made, plain = (views.make(s, images, draw)["image"] for s in (cubic, spec))
            assert (made - plain).abs().max() > 0.02
            crops = [*map(views.crop_photos(cubic, draw), range(4), images)]
            finished = views.finish(cubic, {"image": torch.stack([c["image"] for c in crops])}, draw)["image"]
            close(finished, made, 1.1 / 255)


# of a square crop of any share, of other shapes, and of squashed images
EVALUATIONS = [
    views.Evaluation((224, 224), 0.9), views.Evaluation((96, 96), 0.875), views.Evaluation((64, 64)),
    views.Evaluation((32, 48), 0.95), views.Evaluation((33, 56), 0.875, crop_mode="squash"),
]  # fmt: skip


@pytest.mark.parametrize("view", EVALUATIONS, ids=str)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_evaluation_views_are_those_of_timm(view, interpolation):
    """On PIL images, portrait and landscape, larger and smaller than the view, to within a grey level."""
    if Version(timm.__version__) < Version("1.0.31") and interpolation == "bicubic" and view.size == (32, 48):
        pytest.skip("timm took bilinear for crops that are not square before 1.0.31")
    view = dataclasses.replace(view, interpolation=interpolation)
    transform = create_transform(
        (3, *view.size), interpolation=interpolation, crop_pct=view.crop_pct, crop_mode=view.crop_mode, normalize=False
    )
    for height, width in ((375, 500), (501, 333), (21, 33), (19, 150), (96, 96)):
        [image] = photos(1, 3, height, width)
        expected = transform(Image.fromarray(image.permute(1, 2, 0).numpy()))
        found = (view(image[None])[0] * 255).round()
        assert found.shape == expected.shape
        close(found, expected.float(), 1.0)
        assert (found != expected).float().mean() < 0.25, (height, width)
        photo = views.whole_photo(view, image)
        off = (photo.int() - expected.int()).abs()
        assert off.max() <= 2 and (off > 1).float().mean() < 1e-4 and (off > 0).float().mean() < 0.05, (height, width)
        close(photo.float(), found, 2.0 if interpolation == "bicubic" else 1.0)


def test_crop_of_several_boxes_is_one_crop_each():
    images = photos(6, 3, 24, 40)
    places = views.boxes("v", View((12, 10), count=4), rows(6), 24, 40)
    flip = torch.arange(24).view(6, 4) % 2 == 0
    together = views.crop(images, places, flip, (12, 10))
    for k in range(4):
        close(together[:, k], views.crop(images, places[:, k], flip[:, k], (12, 10)), 1e-6)


@pytest.mark.parametrize("height, width, size, crop_pct", [
    (32, 32, (32, 32), 1.0), (48, 80, (32, 32), 0.875), (81, 47, (28, 28), 0.9), (20, 33, (64, 64), 0.875),
    (256, 341, (224, 224), 0.875), (60, 60, (33, 33), 1.15), (40, 66, (22, 22), 1.15),
])  # fmt: skip
def test_whole_equals_torchvisions(height, width, size, crop_pct):
    images = photos(3, 3, height, width)
    resized = tv.resize(images.float() / 255, int(size[0] / crop_pct), antialias=True)
    close(views.whole(images, size, crop_pct), tv.center_crop(resized, list(size)), 1e-5)


def test_whole_of_another_shape_covers_it():
    images = photos(2, 1, 50, 40)
    expected = tv.center_crop(tv.resize(images.float() / 255, [30, 24]), [12, 24])  # the width decides
    close(views.whole(images, (12, 24)), expected, 1e-5)
    expected = tv.center_crop(tv.resize(images.float() / 255, [30, 24]), [30, 8])  # the height decides
    close(views.whole(images, (30, 8)), expected, 1e-5)
    close(views.whole(images, (50, 40)), images.float() / 255, 1e-6)


# --- colours ----------------------------------------------------------------------------------------------------------


THEIRS = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)


@pytest.mark.parametrize("k", range(4))
def test_each_part_of_jitter_equals_torchvisions(k):
    n = 16
    images = photos(n).float() / 255
    images[0] = 0.5  # a grey image has no hue
    factors = torch.tensor([1.0, 1.0, 1.0, 0.0]).repeat(n, 1)
    factors[:, k] = torch.linspace(0, 2, n) if k < 3 else torch.linspace(-0.5, 0.5, n)
    ours = views.jitter(images, factors, torch.tensor([0, 1, 2, 3]).expand(n, -1))
    for image, factor, result in zip(images, factors[:, k].tolist(), ours, strict=True):
        close(result, THEIRS[k](image, factor), 1e-5)


def test_jitter_takes_every_order():
    images = photos(24, seed=1).float() / 255
    before = images.clone()
    g = torch.Generator().manual_seed(0)
    factors = torch.rand(24, 4, generator=g) * torch.tensor([1.2, 1.2, 2.0, 1.0]) + torch.tensor([0.4, 0.4, 0.0, -0.5])
    order = torch.cartesian_prod(*[torch.arange(4)] * 4)
    order = order[order.sort(1).values.eq(torch.arange(4)).all(1)]
    assert len(order) == 24
    ours = views.jitter(images, factors, order)
    for image, factor, sequence, result in zip(images, factors.tolist(), order.tolist(), ours, strict=True):
        for k in sequence:
            image = THEIRS[k](image, factor[k])
        close(result, image, 1e-5)
    assert images.equal(before)


@pytest.mark.parametrize("channels", [1, 5])
def test_jitter_without_rgb_is_brightness_and_contrast(channels):
    images = photos(8, channels).float() / 255
    factors = torch.tensor([1.3, 0.6, 0.1, 0.3]).expand(8, 4)
    ours = views.jitter(images, factors, torch.tensor([2, 0, 3, 1]).expand(8, 4))
    brighter = (images * 1.3).clamp(0, 1)
    mean = brighter.mean((1, 2, 3), keepdim=True)
    close(ours, (0.6 * brighter + 0.4 * mean).clamp(0, 1), 1e-5)


def test_grey_and_solarize_equal_torchvisions():
    images = photos(8).float() / 255
    close(views.grey(images), tv.rgb_to_grayscale(images, 3), 1e-6)
    images[0, 0, 0, :3] = torch.tensor([0.5, 0.0, 1.0])
    assert views.solarize(images).equal(tv.solarize(images, 0.5))


@pytest.mark.parametrize(
    "channels, size, radius", [(3, (32, 32), 6), (1, (20, 9), 6), (5, (7, 40), 10), (3, (3, 1), 6)]
)
def test_blur_equals_torchvisions(channels, size, radius):
    images = photos(10, channels, *size).float() / 255
    sigma = torch.linspace(0.1, radius / 3, 10)
    kernel = [2 * min(radius, side - 1) + 1 for side in reversed(size)]  # width first
    ours = views.blur(images, sigma, radius)
    for image, s, result in zip(images, sigma.tolist(), ours, strict=True):
        close(result, tv.gaussian_blur(image, kernel, [s, s]), 1e-5)


def numbers_of(monkeypatch, view, n):
    """What colour() hands to jitter and blur for n images, and who gets which operation."""
    seen = {}
    monkeypatch.setattr(views, "jitter", lambda x, factors, order: seen.update(factors=factors, order=order) or x)
    monkeypatch.setattr(views, "blur", lambda x, sigma, radius: seen.update(sigma=sigma, radius=radius) or x)
    views.make({"v": view}, torch.zeros(n, 3, 1, 1, dtype=torch.uint8), rows(n))
    return seen


def test_jitter_and_blur_follow_torchvisions_law(monkeypatch):
    view = View((1, 1), jitter=0.8, brightness=0.4, contrast=1.5, saturation=0.2, hue=0.1, blur=0.25)
    n = 6000
    seen = numbers_of(monkeypatch, view, n)
    torch.manual_seed(0)
    reference = ColorJitter(view.brightness, view.contrast, view.saturation, view.hue)
    theirs = [
        reference.get_params(reference.brightness, reference.contrast, reference.saturation, reference.hue)
        for _ in range(3000)
    ]
    for k in range(4):
        p = ks_2samp(seen["factors"][:, k].numpy(), [values[1 + k] for values in theirs]).pvalue
        assert p > 0.001, (k, p)
    orders = (seen["order"] * torch.tensor([64, 16, 4, 1])).sum(1).unique(return_counts=True)[1]
    assert len(orders) == 24 and chisquare(orders.numpy()).pvalue > 0.001
    assert abs(len(seen["order"]) / n - 0.8) < 0.02
    assert abs(len(seen["sigma"]) / n - 0.25) < 0.02
    assert kstest(seen["sigma"].numpy(), "uniform", (0.1, 1.9)).pvalue > 0.001
    assert seen["radius"] == 6


# A picture that tells its operations apart: flipped, greyed, solarized and blurred ones all differ.
def marked(n):
    image = torch.zeros(3, 6, 6, dtype=torch.uint8)
    image[0, :, :2], image[1, :, 2:4] = 200, 100
    return image.expand(n, -1, -1, -1)


def share(results, expected):
    return (results - expected).abs().amax((1, 2, 3)).lt(1e-5).float().mean().item()


@pytest.mark.parametrize("field, operation", [
    ("flip", lambda x: x.flip(-1)), ("grey", lambda x: views.grey(x)), ("solarize", lambda x: views.solarize(x)),
])  # fmt: skip
@pytest.mark.parametrize("whole_image", [True, False])
def test_probabilities_are_kept(field, operation, whole_image):
    n = 4000
    spec = {"v": View((6, 6), **{"flip": 0.0, "crop": not whole_image, "scale": (1, 1), "ratio": (1, 1), field: 0.3})}
    results = views.make(spec, marked(n), rows(n))["v"]
    plain = marked(1).float() / 255
    assert abs(share(results, operation(plain)) - 0.3) < 0.03
    assert share(results, operation(plain)) + share(results, plain) == pytest.approx(1)


def test_flip_colour_and_names_are_independent():
    view = View((6, 6), crop=False, jitter=0.5, contrast=0.0, saturation=0.0, hue=0.0)
    made = views.make({"v": view, "w": view}, marked(3000), rows(3000))
    flipped = [made[name][:, 0, 0, 0] == 0 for name in "vw"]  # the red bars lie on the left
    jittered = [made[name][:, 0].amax((1, 2)).sub(200 / 255).abs() > 1e-5 for name in "vw"]
    correlations = np.corrcoef(torch.stack(flipped + jittered).numpy()) - np.eye(4)
    assert np.abs(correlations).max() < 0.06


def test_three_augment_is_exactly_one_of_three_then_jitter():
    n = 3000
    spec = {"v": View((6, 6), crop=False, flip=0.0, blur_sigma=(1.0, 1.0), three_augment=True)}
    results = views.make(spec, marked(n), rows(n))["v"]
    plain = marked(1).float() / 255
    options = [views.grey(plain), views.solarize(plain), views.blur(plain, torch.ones(1), 3)]
    shares = [share(results, option) for option in options]
    assert sum(shares) == pytest.approx(1) and all(abs(s - 1 / 3) < 0.03 for s in shares)

    # the brightness comes last: a light grey, solarized, is 0.2 · factor; the other way round it is 1 - 0.8 · factor
    light = torch.full((n, 3, 6, 6), 204, dtype=torch.uint8)  # 0.8: solarized 0.2
    double = View((6, 6), crop=False, flip=0.0, three_augment=True, jitter=1.0, brightness=0.3, contrast=0.0,
                  saturation=0.0, hue=0.0)  # fmt: skip
    results = views.make({"v": double}, light, rows(n))["v"][:, 0, 0, 0]
    factors = views.make({"v": double}, light // 4, rows(n))["v"][:, 0, 0, 0] / 0.2  # 0.2 is never solarized
    solarized = results < 0.5
    assert abs(solarized.float().mean() - 1 / 3) < 0.03
    close(results[solarized], 0.2 * factors[solarized], 1e-5)


def test_the_order_is_jitter_grey_blur_solarize(monkeypatch):
    called = []
    for name in ("jitter", "grey", "blur", "solarize"):
        monkeypatch.setattr(views, name, lambda x, name=name, **_: called.append(name) or x)
    view = View((4, 4), jitter=1.0, grey=1.0, blur=1.0, solarize=1.0)
    views.make({"v": view}, photos(4, 3, 4, 4), rows(4))
    assert called == ["jitter", "grey", "blur", "solarize"]


# --- batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_views_have_their_shape_and_range(channels):
    made = views.make(EVERYTHING, photos(10, channels, 30, 26), rows(10))
    assert made["a"].shape == (10, channels, 16, 24)
    assert made["b"].shape == (10, 3, channels, 8, 8)
    assert made["c"].shape == (10, channels, 20, 20)
    for view in made.values():
        assert view.dtype == torch.float32 and view.min() >= 0 and view.max() <= 1 and view.std() > 0.05
        assert len(view.flatten(1).unique(dim=0)) == 10


@pytest.mark.parametrize("parts", [[16, 16, 16, 16], [1, 63], [40, 2, 22]])
def test_cutting_the_batch_changes_nothing(parts):
    images = photos(64, 3, 24, 30)
    together = views.make(EVERYTHING, images, rows(64))
    starts = np.cumsum([0, *parts])
    pieces = [views.make(EVERYTHING, images[s : s + n], rows(n, s)) for s, n in zip(starts[:-1], parts, strict=True)]
    for name in EVERYTHING:
        close(torch.cat([piece[name] for piece in pieces]), together[name], 1e-6)


def test_nothing_waits_for_the_device():
    """Tensors on "meta" have no values: asking for one, or meeting a tensor left on the CPU, is an error."""
    images = torch.empty(10, 3, 30, 26, dtype=torch.uint8, device="meta")
    made = views.make(EVERYTHING, images, rows(10))
    crops = {name: torch.empty(10, 2, 3, 8, 8, dtype=torch.uint8, device="meta") for name in ("x",)}
    made |= views.finish({"x": View((8, 8), count=2, jitter=0.8, grey=0.2, blur=0.5, solarize=0.3)}, crops, rows(10))
    made["mixed"], made["targets"] = views.mix(made["a"], torch.empty(10, 4, device="meta"), rows(10), 0.8, 1.0)
    assert all(view.is_meta and view.shape[0] == 10 for view in made.values())


def test_another_step_gives_other_views_and_the_input_stays():
    images = photos(8)
    before = images.clone()
    one, again, other = (views.make(EVERYTHING, images, rows(8, step=s)) for s in (0, 0, 1))
    assert images.equal(before)
    for name in EVERYTHING:
        assert one[name].equal(again[name]) and not one[name].isclose(other[name], atol=1e-3).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_photos_cropped_one_by_one_give_the_same_views(channels):
    n, images = 12, photos(12, channels, 60, 44)
    plain = {"a": View((16, 24)), "b": View((8, 8), count=3), "c": View((20, 20), crop=False)}
    for spec, tolerance in ((plain, 1.1 / 255), (EVERYTHING, 6 / 255)):  # contrast, hue and saturation magnify rounding
        crops = [*map(views.crop_photos(spec, rows(n)), range(n), images)]
        layout = torch.channels_last  # that of decoded photos
        again = map(views.crop_photos(spec, rows(n)), range(n), images.contiguous(memory_format=layout))
        assert all(a[name].equal(b[name]) for a, b in zip(crops, again, strict=True) for name in spec)
        crops = {name: torch.stack([c[name] for c in crops]) for name in spec}
        assert crops["a"].shape == (n, 1, channels, 16, 24) and crops["a"].dtype == torch.uint8
        assert crops["b"].shape == (n, 3, channels, 8, 8)
        made = views.make(spec, images, rows(n))
        for name, view in views.finish(spec, crops, rows(n)).items():
            assert view.shape == made[name].shape
            close(view, made[name], tolerance)


def test_the_presets():
    images = photos(6, 3, 32, 40)
    spec = views.dino((32, 32), (16, 16), 4, flip=0.5)
    made = views.make(spec, images, rows(6))
    assert {name: tuple(view.shape[1:]) for name, view in made.items()} == {
        "global1": (3, 32, 32), "global2": (3, 32, 32), "local": (4, 3, 16, 16)
    }  # fmt: skip
    assert [view.blur for view in spec.values()] == [1.0, 0.1, 0.5]
    assert [view.solarize for view in spec.values()] == [0.0, 0.2, 0.0]
    assert spec["local"].scale == (0.05, 0.4) and spec["global1"].scale == (0.4, 1.0)
    sharp = views.dino((32, 32), (16, 16), 4, flip=0.5, blur=False)
    assert all(view.blur == 0 and view.jitter == 0.8 for view in sharp.values())
    bare = views.dino((32, 32), (16, 16), 0, flip=0.0, colour=False)
    assert list(bare) == ["global1", "global2"]
    assert all(v.flip == v.jitter == v.grey == v.blur == v.solarize == 0 for v in bare.values())
    assert views.make(views.none((32, 40)), images, rows(6))["image"].sub(images / 255).abs().max() < 1e-6
    assert views.crop_flip((16, 16), 0.0, (0.5, 1.0))["image"] == View((16, 16), scale=(0.5, 1.0), flip=0.0)
    deit = views.three_augment((16, 16), 0.5)["image"]
    assert deit.three_augment and deit.jitter == 1 and (deit.brightness, deit.hue) == (0.3, 0.0)


# --- mix --------------------------------------------------------------------------------------------------------------


def mixed(n, mixup, cutmix, prob=1.0, size=(24, 16)):
    """Image r is everywhere r and class r: what came from where can be read off."""
    images = torch.arange(n).float()[:, None, None, None].expand(-1, 2, *size)
    return views.mix(images, torch.eye(n), rows(n), mixup, cutmix, prob)


@pytest.mark.parametrize("mixup, cutmix", [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_mix_keeps_lambda_and_takes_the_rest_from_the_neighbour(mixup, cutmix):
    n = 200
    images, targets = mixed(n, mixup, cutmix)
    r = torch.arange(n)
    own, other = targets[r, r], targets[r, r ^ 1]
    close(targets.sum(1), torch.ones(n), 1e-6)
    close(own + other, torch.ones(n), 1e-6)  # so no third row takes part
    expected = own * r + other * (r ^ 1)  # the mean of the mixed image says the same as its target
    close(images.double().mean((1, 2, 3)).float(), expected, 1e-3)


def test_cutmix_counts_the_pasted_area_and_pastes_one_box():
    n, (height, width) = 400, (24, 16)
    images, targets = mixed(n, 0.0, 1.0)
    r = torch.arange(n)
    pasted = images[:, 0] == (r ^ 1)[:, None, None]
    assert (pasted | (images[:, 0] == r[:, None, None])).all()  # nothing in between
    assert images[:, 0].equal(images[:, 1])
    close(targets[r, r ^ 1], pasted.sum((1, 2)) / (height * width), 1e-6)
    assert pasted.sum((1, 2)).eq(pasted.any(1).sum(1) * pasted.any(2).sum(1)).all()  # a full rectangle
    holes = pasted.any(1).int().diff(dim=1).abs().sum(1)
    assert holes.max() <= 2


def test_cutmix_boxes_follow_the_papers_law():
    n, height, width = 6000, 24, 16
    parity = (torch.arange(n) % 2).float()[:, None, None, None]
    pasted = (
        views.mix(parity.expand(-1, 1, height, width), torch.eye(2).repeat(n // 2, 1), rows(n), 0.0, 1.0)[0] != parity
    )
    ours = {"area": pasted.sum((1, 2, 3)), "height": pasted.any(3).sum((1, 2)), "width": pasted.any(2).sum((1, 2))}
    ours["top half"] = pasted[:, :, : height // 2].sum((1, 2, 3))
    ours["right half"] = pasted[..., width // 2 :].sum((1, 2, 3))
    rng = np.random.default_rng(0)
    theirs = {name: [] for name in ours}
    for share, y, x in zip(rng.beta(1, 1, n), rng.integers(height, size=n), rng.integers(width, size=n), strict=True):
        box = np.zeros((height, width))
        h, w = int(height * (1 - share) ** 0.5), int(width * (1 - share) ** 0.5)
        box[max(0, y - h // 2) : y - h // 2 + h, max(0, x - w // 2) : x - w // 2 + w] = 1
        theirs["area"].append(box.sum())
        theirs["height"].append(box.any(1).sum())
        theirs["width"].append(box.any(0).sum())
        theirs["top half"].append(box[: height // 2].sum())
        theirs["right half"].append(box[:, width // 2 :].sum())
    for name in ours:
        p = ks_2samp(ours[name].numpy(), theirs[name]).pvalue
        assert p > 0.001, (name, p)


@pytest.mark.parametrize("alpha", [0.2, 0.8, 1.0, 2.0])
def test_lambda_follows_beta(alpha):
    r = torch.arange(3000)
    values = views.beta("x", torch.full((30000,), alpha).double(), rows(30000)).numpy()
    assert kstest(values, beta_law(alpha, alpha).cdf).pvalue > 0.001
    targets = views.mix(torch.zeros(3000, 1, 1, 1), torch.eye(2).repeat(1500, 1), rows(3000), alpha, 0.0)[1]
    if alpha > 0.5:  # below, float32 targets round much of the law to 1
        assert kstest(targets[r, r % 2].double().numpy(), beta_law(alpha, alpha).cdf).pvalue > 0.001
    assert abs(np.corrcoef(targets[::2, 0], targets[1::2, 1])[0, 1]) < 0.08  # each of a pair has its own


def test_mix_chooses_by_half_and_by_prob():
    n = 2000
    images, targets = mixed(n, 0.8, 1.0, prob=0.6, size=(16, 16))
    r = torch.arange(n)
    values = images[:, 0].flatten(1)
    whole = ((values == values[:, :1]).all(1)) & (values[:, 0] == r)  # left alone, or an empty box
    between = ((values != r[:, None]) & (values != (r ^ 1)[:, None])).all(1)
    assert abs(between.float().mean() - 0.3) < 0.04
    assert 0.38 < whole.float().mean() < 0.46
    assert targets[r, r][whole].eq(1).all()
    assert views.mix(images, targets, rows(n), 0.0, 0.0)[0] is images


def test_mix_does_not_depend_on_the_cut():
    images, targets = torch.rand(32, 3, 8, 8), torch.eye(32)
    together = views.mix(images, targets, rows(32), 0.8, 1.0)
    pieces = [views.mix(images[s : s + 4], targets[s : s + 4], rows(4, s), 0.8, 1.0) for s in range(0, 32, 4)]
    for k in range(2):
        assert torch.cat([piece[k] for piece in pieces]).equal(together[k])


@pytest.mark.parametrize("n, start", [(5, 0), (4, 1), (3, 1)])
def test_mix_refuses_rows_without_their_partner(n, start):
    with pytest.raises(ValueError, match="even number of rows and start at an even one"):
        views.mix(torch.zeros(n, 1, 2, 2), torch.zeros(n, 2), rows(n, start), 0.8, 0.0)


# --- at the door ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("images, said", [
    (torch.rand(4, 3, 8, 8), r"images must be uint8 \(B, C, H, W\), not float32 \(4, 3, 8, 8\): multiply by 255"),
    (torch.zeros(3, 8, 8, dtype=torch.uint8), r"images must be uint8 \(B, C, H, W\), not uint8 \(3, 8, 8\)\."),
    (torch.zeros(4, 64, 64, 3, dtype=torch.uint8), r"64 channels: are these \(B, H, W, C\)\? Use permute"),
])  # fmt: skip
def test_images_of_another_type_or_shape_are_refused(images, said):
    spec = views.crop_flip((8, 8), 0.5)
    for call in (lambda: views.augment(spec, images, step=0), lambda: views.whole(images, (8, 8))):
        with pytest.raises(ValueError, match=said):
            call()


@pytest.mark.parametrize("make, said", [
    (lambda: views.crop_flip((8, 8), flip=50), "flip is a probability, from 0 to 1, not 50"),
    (lambda: views.crop_flip((8, 8), 0.5, (1.0, 0.2)), r"scale must be \(low, high\) with 0 < low ≤ high ≤ 1"),
    (lambda: views.crop_flip((8, 8), 0.5, (0, 2)), r"scale must be \(low, high\)"),
    (lambda: views.Evaluation((8, 8), 87.5), "crop_pct is a part of the sides, such as 0.875, not 87.5"),
    (lambda: views.whole(photos(2), (8, 8), crop_mode="centre"), "crop_mode must be 'center'"),
    (lambda: views.make(views.none((8, 8)), photos(4), rows(8)), "4 images need as many rows in draw, not 8"),
    (lambda: views.mix(torch.zeros(4, 3, 8, 8), torch.eye(4), rows(4), 1.0, 0.0, mode="pair"),
     "mode must be 'elem' or 'batch', not 'pair'"),
    (lambda: views.mix(torch.zeros(4, 3, 8, 8), torch.eye(4), rows(8), 1.0, 0.0), "4 images need as many targets and"),
])  # fmt: skip
def test_values_that_no_view_can_have_are_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_views_are_float32_under_autocast():
    images, spec = photos(6), EVERYTHING | {"whole": View((20, 20), crop=False)}
    plain = views.augment(spec, images, step=3)
    with torch.autocast("cpu", torch.bfloat16):
        made, seen = views.augment(spec, images, step=3), views.whole(images, (20, 20), 0.9)
        sharp = views.crop(images, torch.tensor([[0, 0, 9, 9]]).expand(6, -1), torch.zeros(6, dtype=torch.bool), (7, 7))
    assert {x.dtype for x in (*made.values(), seen, sharp)} == {torch.float32}
    assert all(torch.equal(made[name], plain[name]) for name in plain)
    with pytest.raises(TypeError, match="step"):
        views.augment(spec, images)
