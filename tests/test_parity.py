"""The objectives against implementations that are not ours."""

import math

import numpy as np
import pytest
import torch
from conftest import make_batch, small_objective
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from ssl_vit.backbones import sincos_positions
from ssl_vit.randomness import Draw
from ssl_vit.schedules import cosine


class GivenDraw(Draw):
    """A draw whose mask noise is given."""

    def __init__(self, noise):
        super().__init__(0, 0, torch.arange(len(noise)))
        self.noise = noise

    def uniform(self, stream, *shape, device=None):
        assert stream == "mask"
        return self.noise.view(len(self.noise), *shape)


def translate(theirs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers' ViTMAE names → ours; works on weights and on gradients alike."""
    ours = {}
    for name, tensor in theirs.items():
        for old, new in (
            ("vit.embeddings.cls_token", "backbone.model.cls_token"),
            ("vit.embeddings.patch_embeddings.projection", "backbone.model.patch_embed.proj"),
            ("vit.embeddings.position_embeddings", "backbone.model.pos_embed"),
            ("vit.layernorm.", "backbone.model.norm."),
            ("vit.layers.", "backbone.model.blocks."),
            ("decoder.decoder_layers.", "decoder.blocks."),
            ("decoder.decoder_embed.", "decoder.embed."),
            ("decoder.decoder_norm.", "decoder.norm."),
            ("decoder.decoder_pred.", "decoder.head."),
            ("layernorm_before", "norm1"),
            ("layernorm_after", "norm2"),
            ("attention.o_proj", "attn.proj"),
            ("attention.", "attn."),
        ):
            name = name.replace(old, new)
        ours[name] = tensor
    for name in [n for n in ours if ".q_proj." in n]:
        qkv = [ours.pop(name.replace(".q_proj.", f".{c}_proj.")) for c in "qkv"]
        ours[name.replace(".q_proj.", ".qkv.")] = torch.cat(qkv)
    ours.pop("decoder.decoder_pos_embed", None)  # fixed, and a buffer of ours
    return ours


@pytest.mark.parametrize("normalise", [True, False])
def test_mae_loss_and_gradients_equal_transformers(normalise):
    ours = small_objective("mae", f"objective.norm_pix_loss={str(normalise).lower()}")
    config = ViTMAEConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=16, patch_size=2,
        decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
        decoder_intermediate_size=64,
        mask_ratio=0.75, norm_pix_loss=normalise, layer_norm_eps=1e-6,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = ViTMAEForPreTraining(config)
    theirs.vit.embeddings.initialize_weights()  # their sine-cosine positions, which construction leaves at zero
    theirs.decoder.initialize_weights(64)
    for weight in theirs.parameters():
        if weight.requires_grad:
            weight.data.normal_(std=0.1)  # so that no bias, norm or token is trivially equal
    missing, unexpected = ours.load_state_dict(translate(dict(theirs.named_parameters())), strict=False)
    assert not missing and not unexpected

    batch = make_batch(ours, torch.arange(6))
    noise = torch.rand(6, 64, generator=torch.Generator().manual_seed(5))
    batch.draw = GivenDraw(noise)
    loss = ours(batch)["loss"]
    expected = theirs(ours.backbone.normalise(batch.views["image"]), noise=noise).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)

    loss.backward()
    expected.backward()
    gradients = translate({n: p.grad for n, p in theirs.named_parameters() if p.grad is not None})
    mine = {n: p.grad for n, p in ours.named_parameters() if p.grad is not None}
    assert gradients.keys() == mine.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(mine[name], gradient, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_sincos_positions_equal_transformers():
    from transformers.models.vit_mae.modeling_vit_mae import ViTMAEDecoder

    config = ViTMAEConfig(decoder_hidden_size=24, decoder_num_hidden_layers=1, decoder_num_attention_heads=2)
    theirs = ViTMAEDecoder(config, 25)
    theirs.initialize_weights(25)
    torch.testing.assert_close(sincos_positions(24, (5, 5)), theirs.decoder_pos_embed[0, 1:], rtol=0, atol=1e-6)


class PlainDINO:
    """Loss, centre and teacher of DINO in float64 NumPy, a pair at a time, on given head outputs (arXiv 2104.14294)."""

    def __init__(self, prototypes, centre_momentum, student_temperature):
        self.centre = np.zeros(prototypes)
        self.centre_momentum, self.student_temperature = centre_momentum, student_temperature

    def loss(self, student, teacher, teacher_temperature):
        total = terms = 0
        for t in range(len(teacher)):
            for v in range(len(student)):
                if t == v:
                    continue
                for row in range(student.shape[1]):
                    q = (teacher[t, row] - self.centre) / teacher_temperature
                    q = np.exp(q - q.max()) / np.exp(q - q.max()).sum()
                    s = student[v, row] / self.student_temperature
                    total -= (q * (s - s.max() - np.log(np.exp(s - s.max()).sum()))).sum() / student.shape[1]
                terms += 1
        return total / terms

    def update(self, teacher):
        mean = teacher.reshape(-1, teacher.shape[-1]).mean(0)
        self.centre = self.centre_momentum * self.centre + (1 - self.centre_momentum) * mean


def test_dino_loss_centre_and_teacher_equal_a_plain_reference():
    settings = [
        "objective.warmup_teacher_temp=0.03",
        "objective.teacher_temp=0.07",
        "objective.momentum_teacher=0.7",
        "objective.student_temp=0.2",
        "objective.center_momentum=0.6",
    ]
    ours = small_objective("dino", *settings).double()
    optimizer = torch.optim.SGD([p for p in ours.parameters() if p.requires_grad], lr=0.5)
    reference = PlainDINO(32, centre_momentum=0.6, student_temperature=0.2)
    teacher_weights = {n: p.detach().numpy().copy() for n, p in ours.teacher.named_parameters()}
    total = 10
    for step in range(5):
        batch = make_batch(ours, torch.arange(8), step, total, torch.float64)
        with torch.no_grad():
            two = torch.stack([batch.views["global1"], batch.views["global2"]])
            views = [*two, *batch.views["local"].unbind(1)]
            student = np.stack([ours.head(ours.backbone(v, draw=batch.draw)[:, 0]).numpy() for v in views])
            teacher = np.stack([ours.teacher_head(ours.teacher(v)[:, 0]).numpy() for v in two])
        temperature = 0.03 + 0.04 * min(step / (0.3 * total), 1)  # of the recipe: a warm-up over 30 % of the steps
        expected = reference.loss(student, teacher, temperature)
        ours.begin_step()
        optimizer.zero_grad()
        result = ours(batch)
        assert result["loss"].item() == pytest.approx(expected, rel=1e-9)
        result["loss"].backward()
        optimizer.step()
        ours.on_optimizer_step(step, total, lambda t: t)

        reference.update(teacher)
        np.testing.assert_allclose(ours.center.numpy(), reference.centre, rtol=1e-9, atol=1e-12)
        momentum = 1 - (1 - 0.7) * (math.cos(math.pi * step / (total - 1)) + 1) / 2
        for name, weight in ours.backbone.named_parameters():
            teacher_weights[name] = momentum * teacher_weights[name] + (1 - momentum) * weight.detach().numpy()
            np.testing.assert_allclose(
                ours.teacher.get_parameter(name).numpy(), teacher_weights[name], rtol=1e-9, atol=1e-12
            )


def test_cosine_ends_where_it_should():
    assert cosine(0, 11, 2.0, 1.0) == 2.0
    assert cosine(5, 11, 2.0, 1.0) == pytest.approx(1.5)
    assert cosine(10, 11, 2.0, 1.0) == pytest.approx(1.0)
