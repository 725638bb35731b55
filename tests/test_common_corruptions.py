"""Corruptions against numpy, SciPy, Pillow and colorsys; what they leave alone; their random numbers."""

import colorsys
import io

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from eval.measure import common_corruptions
from eval.measure.common_corruptions import FAMILIES, PARAMETERS, SEVERITIES, corrupt
from ssl_vit.randomness import Draw

SIZES = ((32, 20), (66, 80))  # of CIFAR-10-C's parameters, and of ImageNet-C's
HALF = 0.5 / 255 + 1e-5  # what rounding to 8 bits may change
CASES = [(place, severity) for place in range(2) for severity in SEVERITIES]
KINDS = [kind for of in FAMILIES.values() for kind in of]


def photos(count, channels, size, seed=0):
    """Smooth made-up images with some grain, in 8 bits."""
    rng = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(rng.normal(size=(count, channels, *size)), (0, 0.5, 3, 3))
    images = 0.45 + 0.2 * smooth / smooth.std() + 0.03 * rng.normal(size=smooth.shape)
    return torch.from_numpy((np.clip(images, 0, 1) * 255).round() / 255).float()


def parameter(kind, place, severity):
    return PARAMETERS[kind][place][SEVERITIES.index(severity)]


def plain_noise(kind, x, amount, rng):
    """As the paper's authors define it, by numpy's generator."""
    if kind == "gaussian-noise":
        return np.clip(x + rng.normal(scale=amount, size=x.shape), 0, 1)
    if kind == "shot-noise":
        return np.clip(rng.poisson(x * amount) / amount, 0, 1)
    hit, white = rng.random(x.shape) < amount, rng.random(x.shape) < 0.5
    return np.where(hit, white, x)


@pytest.mark.parametrize(("place", "severity"), CASES)
@pytest.mark.parametrize("kind", FAMILIES["noise"])
def test_noise_has_the_law_of_its_definition(kind, place, severity):
    amount = parameter(kind, place, severity)
    count = 40 if place == 0 else 5
    for level in (0, 13, 128, 200, 255):
        images = torch.full((count, 3, *SIZES[place]), level / 255)
        found = corrupt(images, kind, severity, torch.arange(count) + level).numpy()
        expected = plain_noise(kind, images.numpy().astype(np.float64), amount, np.random.default_rng(level))
        levels = [(255 * values).round().astype(int).ravel() for values in (found, expected)]
        shares = [np.bincount(values, minlength=256).cumsum() / found.size for values in levels]
        # Kolmogorov and Smirnov: exceeded by chance in one case of a thousand
        assert np.abs(shares[0] - shares[1]).max() < 1.95 * np.sqrt(2 / found.size), level


@pytest.mark.parametrize("kind", FAMILIES["noise"])
def test_noise_is_independent_of_place_channel_kind_and_severity(kind):
    grey = torch.full((64, 3, 32, 32), 0.5)
    noise = corrupt(grey, kind, 3, torch.arange(64)) - 0.5
    others = [corrupt(grey, kind, 5, torch.arange(64)), corrupt(grey, kind, 3, torch.arange(64, 128))]
    others += [corrupt(grey, other, 3, torch.arange(64)) for other in FAMILIES["noise"] if other != kind]
    others += [noise.roll(1, dim) for dim in range(4)]
    for other in others:
        assert abs(np.corrcoef(noise.flatten(), other.flatten())[0, 1]) < 0.015


def test_gaussian_noise_before_it_is_clamped():
    noise = common_corruptions._gaussian_noise(torch.full((20, 3, 40, 40), 0.5), 0.38, Draw(0, 5, torch.arange(20)))
    assert noise.mean() == pytest.approx(0.5, abs=0.005) and noise.std() == pytest.approx(0.38, rel=0.01)
    assert noise.min() < -0.5 and noise.max() > 1.5


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("place", "severity"), CASES)
def test_gaussian_blur_is_scipys(place, severity, channels):
    images = photos(3, channels, SIZES[place])
    sigma = parameter("gaussian-blur", place, severity)
    expected = ndimage.gaussian_filter(images.double().numpy(), (0, 0, sigma, sigma), mode="nearest", truncate=4.0)
    found = corrupt(images, "gaussian-blur", severity, torch.arange(3)).numpy()
    assert np.abs(found - expected).max() < HALF


@pytest.mark.parametrize(("place", "severity"), CASES)
def test_defocus_blur_is_a_convolution_with_a_soft_disk(place, severity):
    images = photos(2, 3, SIZES[place])
    radius, softness = parameter("defocus-blur", place, severity)
    disk = np.array([[float(i * i + j * j <= radius**2) for i in range(-14, 15)] for j in range(-14, 15)])
    kernel = ndimage.gaussian_filter(disk / disk.sum(), softness, radius=1 if radius <= 8 else 2)
    expected = [[ndimage.convolve(c, kernel, mode="mirror") for c in image] for image in images.double().numpy()]
    found = corrupt(images, "defocus-blur", severity, torch.arange(2)).numpy()
    assert np.abs(found - np.array(expected)).max() < HALF


@pytest.mark.parametrize(("place", "severity"), CASES)
def test_colours_are_those_of_hsv(place, severity):
    images = photos(1, 3, (12, 9) if place == 0 else (8, 66))
    images[..., :3, :] = images[:, :1, :3]  # some grey pixels
    images[..., 0, :4] = 0.0
    amount, (factor, plus) = (parameter(kind, place, severity) for kind in ("brightness", "saturate"))
    pixels = images[0].permute(1, 2, 0).double().numpy().reshape(-1, 3)
    hsv = [colorsys.rgb_to_hsv(*pixel) for pixel in pixels]
    brighter = [colorsys.hsv_to_rgb(h, s, min(v + amount, 1)) for h, s, v in hsv]
    richer = [colorsys.hsv_to_rgb(h, min(factor * s + plus, 1), v) for h, s, v in hsv]
    for kind, expected in (("brightness", brighter), ("saturate", richer)):
        found = corrupt(images, kind, severity, torch.arange(1))[0].permute(1, 2, 0).reshape(-1, 3)
        assert np.abs(found.numpy() - np.array(expected)).max() < HALF, kind


@pytest.mark.parametrize(("place", "severity"), CASES)
def test_contrast_pulls_each_channel_to_its_mean(place, severity):
    images = photos(3, 2, SIZES[place])
    factor = parameter("contrast", place, severity)
    mean = images.double().mean((2, 3), keepdim=True)
    expected = (mean + factor * (images - mean)).clamp(0, 1)
    assert (corrupt(images, "contrast", severity, torch.arange(3)) - expected).abs().max() < HALF


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("place", "severity"), CASES)
def test_pixelate_and_jpeg_are_pillows(place, severity, channels):
    images = photos(3, channels, SIZES[place])
    height, width = SIZES[place]
    factor, quality = (parameter(kind, place, severity) for kind in ("pixelate", "jpeg"))
    for i, pixels in enumerate((images * 255).round().byte().permute(0, 2, 3, 1).numpy()):
        original = Image.fromarray(pixels.squeeze())
        small = original.resize((int(width * factor), int(height * factor)), Image.BOX)
        file = io.BytesIO()
        original.save(file, "JPEG", quality=quality)
        for kind, expected in (("pixelate", small.resize((width, height), Image.BOX)), ("jpeg", Image.open(file))):
            found = corrupt(images[i : i + 1], kind, severity, torch.tensor([i]))[0].permute(1, 2, 0).squeeze()
            assert np.abs(255 * found.numpy() - np.asarray(expected)).max() < 1.01, (
                kind
            )  # pixelate rounds once more there


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_severity_is_severity(kind, size):
    images = photos(6, 3, size)
    changes = [(corrupt(images, kind, s, torch.arange(6)) - images).square().mean().item() for s in SEVERITIES]
    # the published factors of saturation are 0.3, then 1.5 or 2, then 2.5 or 20: the first takes colour away
    rising = changes[1:] if kind == "saturate" else changes
    assert 0 < rising[0] and rising == sorted(rising) and len(set(rising)) == len(rising)


@pytest.mark.parametrize("size", [(8, 8), *SIZES])
@pytest.mark.parametrize("kind", [*FAMILIES["blur"], "contrast", "pixelate"])
def test_an_image_of_one_colour_stays_as_it_is(kind, size):
    images = (torch.arange(256) / 255).view(-1, 1, 1, 1).repeat(1, 1, *size)
    for severity in SEVERITIES:
        assert torch.equal(corrupt(images, kind, severity, torch.arange(256)), images)


@pytest.mark.parametrize("kind", KINDS)
def test_the_batch_changes_nothing(kind):
    for size in SIZES:
        images = photos(23, 3, size)
        index = torch.arange(100, 123)
        whole = corrupt(images, kind, 3, index)
        parts = [corrupt(x, kind, 3, i) for x, i in zip(images.split(5), index.split(5), strict=True)]
        assert torch.equal(torch.cat(parts), whole)
        assert torch.equal(corrupt(images.flip(0), kind, 3, index.flip(0)).flip(0), whole)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_any_channels_in_eight_bits(channels):
    kinds = common_corruptions.kinds(channels)
    assert [kind for _, kind in kinds] == [kind for kind in KINDS if kind != "saturate" or channels == 3]
    for size in ((8, 8), (8, 12), (70, 65)):
        images = torch.rand(4, channels, *size, generator=torch.Generator().manual_seed(0))
        for _, kind in kinds:
            for severity in SEVERITIES:
                found = corrupt(images, kind, severity, torch.arange(4))
                assert found.shape == images.shape and found.dtype == torch.float32
                assert 0 <= found.min() and found.max() <= 1
                assert (found * 255 - (found * 255).round()).abs().max() < 1e-4
