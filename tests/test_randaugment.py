"""RandAugment: every operation is timm's, every magnitude and probability too, for a batch at once."""

import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from timm.data import auto_augment

from ssl_vit import randaugment

STRENGTHS = [0.0, 0.13, 0.5, 0.87, 1.0]


def photos(count: int, size: tuple[int, int] = (24, 20)) -> torch.Tensor:
    """Smooth RGB images with some noise, whole levels."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(count, 3, 5, 5, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size, mode="bicubic")
    return ((smooth + 0.05 * torch.randn(count, 3, *size, generator=generator)) * 255).clamp(0, 255).round()


def timm_s(name: str, image: torch.Tensor, strength: float, sign: int, monkeypatch) -> torch.Tensor:
    # its sign is the outcome of a coin: `-v if random.random() > 0.5 else v`
    monkeypatch.setattr(random, "random", lambda: 0.9 if sign < 0 else 0.1)
    if name == "PosterizeIncreasing":
        strength = min(strength, 0.99)  # PIL refuses 0 bits
    hparams = dict(img_mean=randaugment.FILL, interpolation=Image.Resampling.BICUBIC, magnitude_std=0)
    operation = auto_augment.AugmentOp(name, 1.0, 10 * strength, hparams)
    pil = Image.fromarray(image.byte().permute(1, 2, 0).numpy())
    return torch.from_numpy(np.array(operation(pil))).permute(2, 0, 1).float()


@pytest.mark.parametrize("name", randaugment.OPERATIONS)
def test_an_operation_is_timm_s(name, monkeypatch):
    """A batch of images, each with its own strength and sign; levels are equal but where weights are rounded."""
    settings = [(strength, sign) for strength in STRENGTHS for sign in (-1, 1)]
    images = photos(len(settings))
    values = torch.tensor(settings, dtype=torch.float64).view(-1, 2, 1, 1, 1)
    made = randaugment.OPERATIONS[name](images, values[:, 0], values[:, 1])
    for image, found, setting in zip(images, made, settings, strict=True):
        expected = timm_s(name, image, *setting, monkeypatch)
        away = (found - expected).abs()
        assert away.max() <= 1 and (away > 0).float().mean() < 0.01, setting
    if name not in ("AutoContrast", "Equalize", "Invert"):
        assert (made[-1] - images[-1]).abs().mean() > 3


def test_every_span_of_levels_is_stretched_as_by_pil():
    """Of 255 spans, 37 had a level that was one too low: 255 · (1 / span) is not 255 / span."""
    levels = torch.arange(256.0)
    for span in range(1, 256):
        image = levels.clamp(max=span).view(1, 1, 1, -1).expand(1, 3, 1, 256)
        expected = ImageOps.autocontrast(Image.fromarray(image[0].byte().permute(1, 2, 0).contiguous().numpy()))
        found = randaugment.auto_contrast(image, levels, levels)
        assert torch.equal(found[0, 0, 0], torch.from_numpy(np.array(expected))[0, :, 0].float()), span


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (5, 2)])
def test_images_that_are_all_edge_are_as_sharp_as_they_were(size, monkeypatch):
    image, amount = photos(1, size), torch.ones(1, 1, 1, 1, dtype=torch.float64)
    expected = timm_s("SharpnessIncreasing", image[0], 1.0, 1, monkeypatch)
    assert torch.equal(expected, image[0]) and torch.equal(randaugment.sharpness(image, amount, amount), image)


def test_the_operations_are_timm_s_in_its_order():
    transform = auto_augment.rand_augment_transform("rand-m9-mstd0.5-inc1", dict(img_mean=randaugment.FILL))
    assert [op.name for op in transform.ops] == list(randaugment.OPERATIONS)
    assert {op.prob for op in transform.ops} == {0.5} and transform.num_layers == randaugment.LAYERS
    assert {op.magnitude_std for op in transform.ops} == {randaugment.SPREAD}


def test_what_is_drawn(monkeypatch):
    """Two operations for an image, evenly among all, each applied to half of the images with timm's magnitudes."""
    seen = {name: [] for name in randaugment.OPERATIONS}

    def spy(name):
        def operation(x, strength, sign):
            assert len(x) == len(strength) == len(sign)
            seen[name] += (strength * sign).flatten().tolist()
            return x + 1  # so that the operations of an image can be counted

        return operation

    monkeypatch.setattr(randaugment, "OPERATIONS", {name: spy(name) for name in seen})
    u = torch.rand(30_000, 2, 5, generator=torch.Generator().manual_seed(0))
    images = torch.full((30_000, 3, 1, 1), 0.2)
    made = randaugment.rand_augment(images, u, 9)
    times = ((made - images) * 255).round()[:, 0, 0, 0]
    for count, share in {0: 0.25, 1: 0.5, 2: 0.25}.items():
        assert (times == count).float().mean().item() == pytest.approx(share, abs=0.01)
    counts = np.array([len(values) for values in seen.values()])
    assert np.abs(counts - 2000).max() < 200  # 4.4 standard deviations
    values = np.concatenate([np.array(v) for v in seen.values()])
    expected = np.clip(np.random.default_rng(0).normal(9, 0.5, 100_000), 0, 10) / 10
    assert np.abs(values).mean() == pytest.approx(expected.mean(), abs=2e-3)
    assert np.abs(values).std() == pytest.approx(expected.std(), rel=0.03)
    assert (values > 0).mean() == pytest.approx(0.5, abs=0.01)
    few = randaugment.rand_augment(images[:7], u[:7], 9)
    assert torch.equal(few, made[:7])  # an image's own numbers alone decide
