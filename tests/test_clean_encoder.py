"""The clean encoder: its loss by hand, the bottleneck as the only way to it, and what it costs."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import make_batch, small_objective

from ssl_vit import flops

DIM, HEADS = 16, 2  # of the small decoder, which has one block


@pytest.fixture
def objective():
    """With random weights in every part of the decoder, as training leaves them."""
    objective = small_objective("clean-encoder")
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weight in objective.decoder.parameters():
            weight.normal_(0, 0.3, generator=generator)
    return objective


def normed(x):
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()


def as_patches(images):
    """(B, 3, 16, 16) → (B, 64, 12), patch by patch: rows, columns, channels."""
    cut = [images[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2] for i in range(8) for j in range(8)]
    return torch.stack([patch.permute(0, 2, 3, 1).flatten(1) for patch in cut], 1)


def by_hand(objective, images, draw):
    """SODA's decoder as plain arithmetic, token mixing included."""
    w = {name: value.detach() for name, value in objective.decoder.named_parameters()}
    b = objective.backbone
    standard = (images - b.mean) / b.std
    level = draw.uniform("noise level", 1, 1, 1) * 1.4142
    noisy = as_patches(standard + level * draw.normal("noise", 3, 16, 16))
    [(_, patches)] = b.features(images)
    vector = patches.flatten(1, 2).mean(1)
    scales = (vector @ w["bottleneck.weight"].T + w["bottleneck.bias"]).view(len(images), 3, 2, 1, DIM)

    x = noisy @ w["embed.weight"].T + w["embed.bias"] + objective.decoder.positions
    h = normed(x) * (1 + scales[:, 0, 0]) + scales[:, 0, 1]
    q, k, v = (h @ w["blocks.0.attn.qkv.weight"].T + w["blocks.0.attn.qkv.bias"]).split(DIM, -1)
    heads = []
    for part in (slice(0, 8), slice(8, 16)):
        attention = (q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(DIM // HEADS)).softmax(-1)
        heads.append(attention @ v[..., part])
    x = x + torch.cat(heads, -1) @ w["blocks.0.attn.proj.weight"].T + w["blocks.0.attn.proj.bias"]
    h = normed(x) * (1 + scales[:, 1, 0]) + scales[:, 1, 1]
    h = F.gelu(h @ w["blocks.0.mlp.fc1.weight"].T + w["blocks.0.mlp.fc1.bias"])
    x = x + h @ w["blocks.0.mlp.fc2.weight"].T + w["blocks.0.mlp.fc2.bias"]
    h = normed(x) * (1 + scales[:, 2, 0]) + scales[:, 2, 1]
    return ((h @ w["head.weight"].T + w["head.bias"] - as_patches(standard)) ** 2).mean()


def test_the_loss_is_that_of_the_same_arithmetic_by_hand(objective):
    batch = make_batch(objective, torch.arange(6))
    with torch.no_grad():
        expected = by_hand(objective, batch.views["image"], batch.draw)
        found = objective(batch)["loss"]
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_encoder_gets_every_clean_token_and_the_noise_goes_to_the_decoder(objective, monkeypatch):
    given = []
    encode = type(objective.backbone).encode
    monkeypatch.setattr(
        type(objective.backbone), "encode", lambda self, tokens, *more: given.append(tokens) or encode(self, tokens)
    )
    batch, other = make_batch(objective, torch.arange(4)), make_batch(objective, torch.arange(4, 8))
    images = batch.views["image"]
    with torch.no_grad():
        first, counted, *_ = objective.predict(images, batch.draw)
        second, *_ = objective.predict(images, other.draw)
        clean = objective.backbone.add_positions(objective.backbone.patch_embed(images), (8, 8))
    assert torch.equal(given[0], clean) and torch.equal(given[1], clean) and clean.shape[1] == 65
    assert counted.all() and (first - second).abs().max() > 0.1


def test_the_gradient_reaches_the_encoder_through_the_bottleneck_alone(objective):
    def gradients():
        objective.zero_grad()
        objective(make_batch(objective, torch.arange(4)))["loss"].backward()
        parts = (objective.backbone.model.patch_embed, *objective.backbone.model.blocks, objective.decoder.blocks[0])
        return [sum(p.grad.abs().sum().item() for p in part.parameters()) for part in parts]

    assert min(gradients()) > 1e-3
    torch.nn.init.zeros_(objective.decoder.bottleneck.weight)
    *encoder, decoder = gradients()
    assert encoder == [0, 0, 0] and decoder > 1e-3


def test_the_bottleneck_is_the_mean_of_the_patches(objective):
    """The decoder cannot tell encoders apart by anything else: not by the class token, not by where patches are."""
    latent = torch.randn(2, 65, 16, generator=torch.Generator().manual_seed(3))
    noisy = torch.randn(2, 64, 12, generator=torch.Generator().manual_seed(4))
    others = torch.cat([latent[:, :1] + 1, latent[:, 1:].flip(1)], 1)
    with torch.no_grad():
        expected = objective.decoder(latent, noisy)
        assert torch.allclose(objective.decoder(others, noisy), expected, atol=1e-5)
        assert (objective.decoder(latent + 0.1, noisy) - expected).abs().max() > 0.01


def test_before_training_it_is_nearly_a_denoiser_without_an_encoder():
    objective = small_objective("clean-encoder")
    batch = make_batch(objective, torch.arange(8))
    with torch.no_grad():
        first, *_ = objective.predict(batch.views["image"], batch.draw)
        torch.nn.init.zeros_(objective.decoder.bottleneck.weight)
        second, *_ = objective.predict(batch.views["image"], batch.draw)
    assert 0 < (first - second).std() < 0.2 * second.std()


def test_its_cost_is_counted():
    """Multiplications and additions of the decoder, block by block, beside those of the encoder of all tokens."""
    objective = small_objective("clean-encoder")
    images = torch.rand(1, 3, 16, 16)
    encoder = flops.count(objective.backbone, lambda twin: twin(images))
    draw = make_batch(objective, torch.arange(1)).draw
    found = flops.count(objective, lambda twin: twin.predict(images, draw)) - encoder
    block = 64 * 12 * DIM**2 + 2 * 64**2 * DIM  # qkv, proj and the mlp; attention
    assert found == 2 * (64 * 12 * DIM + 16 * 6 * DIM + block + 64 * DIM * 12)
