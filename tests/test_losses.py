"""The losses as functions of a stranger's tensors: the value, the gradient and the type, and what is refused."""

import math

import pytest
import torch

from ssl_vit import losses

GENERATOR = torch.Generator().manual_seed(0)
STUDENT, TEACHER = (torch.randn(n, 3, 8, generator=GENERATOR) for n in (4, 2))
CENTER = torch.randn(8, generator=GENERATOR)


def dino_by_hand(student, teacher, center):
    """Algorithm 1 in float64, pair by pair."""
    student, teacher, center = student.double(), teacher.double(), center.double()
    q, log_p = ((teacher - center) / 0.04).softmax(-1), (student / 0.1).log_softmax(-1)
    pairs = [-(q[t] * log_p[v]).sum(-1).mean() for t in range(2) for v in range(len(student)) if v != t]
    return sum(pairs) / len(pairs)


def test_dino_s_teacher_and_center_have_no_gradient():
    student, teacher, center = (x.clone().requires_grad_() for x in (STUDENT, TEACHER, CENTER))
    loss, entropy = losses.dino_loss(student, teacher, center)
    loss.backward()
    assert student.grad.abs().max() > 0 and teacher.grad is None and center.grad is None
    assert not entropy.requires_grad
    assert loss.item() == pytest.approx(dino_by_hand(STUDENT, TEACHER, CENTER).item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_are_computed_in_float32_under_autocast(dtype):
    student, teacher = STUDENT.to(dtype), TEACHER.to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        loss, entropy = losses.dino_loss(student, teacher, CENTER)
        per_patch = losses.distance(student, STUDENT.to(dtype) + 1)
        tokens = losses.token_loss(student, torch.zeros(4, 3, dtype=torch.int32))
    assert {x.dtype for x in (loss, entropy, per_patch, tokens)} == {torch.float32}
    assert loss.item() == pytest.approx(dino_by_hand(student, teacher, CENTER).item(), rel=1e-5)
    assert tokens.double().sub(-student.double().log_softmax(-1)[..., 0]).abs().max() < 1e-5


@pytest.mark.parametrize(
    "student, teacher, center, temperature",
    [
        (STUDENT, STUDENT, CENTER, 0.04),
        (STUDENT, TEACHER[:1], CENTER, 0.04),
        (STUDENT.transpose(0, 1), TEACHER.transpose(0, 1), CENTER, 0.04),
        (STUDENT[:1], TEACHER, CENTER, 0.04),
        (STUDENT[0], TEACHER[0], CENTER, 0.04),
        (STUDENT, TEACHER, CENTER[:1], 0.04),
        (STUDENT, TEACHER, CENTER, 0.0),
    ],
)
def test_dino_refuses_what_would_be_another_loss(student, teacher, center, temperature):
    with pytest.raises(ValueError, match="teacher must hold|center must be|must be above 0"):
        losses.dino_loss(student, teacher, center, teacher_temp=temperature)


def test_mae_s_loss_is_the_mean_over_all_masked_patches():
    images = torch.randn(2, 3, 8, 8, generator=GENERATOR)

    def off_by_one(images, mask):
        return losses.pixel_targets(images, (4, 4)) + 1

    uneven = torch.tensor([[True, True, False, False], [True, False, False, False]])
    assert losses.mae_loss(off_by_one, images, uneven, (4, 4)).item() == pytest.approx(1)
    assert losses.mae_loss(off_by_one, images, torch.zeros_like(uneven), (4, 4)).item() == 0
    for mask in (uneven[:1], uneven.float(), uneven[:, :2]):
        with pytest.raises(ValueError, match=r"mask must be bool \(2, 4\), one value for each patch, not"):
            losses.mae_loss(off_by_one, images, mask, (4, 4))


def test_other_kinds_and_shapes_are_refused_not_broadcast():
    one, two = torch.zeros(2, 9, 4), torch.ones(2, 1, 4)
    with pytest.raises(ValueError, match=r"prediction \(2, 9, 4\) and target \(2, 1, 4\) must have the same shape"):
        losses.distance(one, two)
    with pytest.raises(ValueError, match="kind must be 'mse' or 'l1', not 'l2'"):
        losses.distance(one, one, "l2")
    with pytest.raises(ValueError, match="num_masked, of each image, must be above 0"):
        losses.masked_mean(one[..., 0], one[..., 0] == 0, 0)
    for tokens in (torch.zeros(9, dtype=torch.long), torch.zeros(2, 9)):
        with pytest.raises(ValueError, match=r"tokens must be integers \(2, 9\) for logits \(2, 9, 4\)"):
            losses.token_loss(one, tokens)
    same = losses.token_loss(one, torch.ones(2, 9, dtype=torch.int32))
    assert same.sub(math.log(4)).abs().max() < 1e-6
