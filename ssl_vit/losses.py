"""The losses as functions of tensors: no recipe, batch or run is needed to use them.

The objectives compute theirs with these functions; docs/examples/ shows each in a training loop of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_vit.devices import full_precision
from ssl_vit.errors import require
from ssl_vit.patches import patchify

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


def at_least_float32(*tensors: Tensor) -> list[Tensor]:
    """The tensors in one type: float32, or float64 if one of them has it."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return [tensor.to(dtype) for tensor in tensors]


def pixel_targets(
    images: Float[Tensor, "B C H W"], patch_size: tuple[int, int], norm_pix_loss: bool = True
) -> Float[Tensor, "B N D"]:
    """The pixels of each patch, (B, N, ph·pw·C), of images (B, C, H, W).

    norm_pix_loss: normalise each patch by its own mean and unbiased variance, plus 1e-6 (MAE, arXiv 2111.06377, section
    3, "Reconstruction target"; `forward_loss` of models_mae.py).

    >>> targets = pixel_targets(torch.randn(2, 3, 8, 8), (4, 4))
    >>> targets.shape, bool((targets.mean(-1).abs() < 1e-5).all())
    (torch.Size([2, 4, 48]), True)
    """
    patches = patchify(images, patch_size)
    if not norm_pix_loss:
        return patches
    return (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()


def distance(
    prediction: Float[Tensor, "*batch D"], target: Float[Tensor, "*batch D"], kind: str = "mse"
) -> Float[Tensor, "*batch"]:
    """The mean squared ("mse") or absolute ("l1") difference over the last dimension: (…, D) twice → (…).

    Raises ValueError for other kinds, and for tensors of different shapes.

    >>> distance(torch.tensor([[3.0, 1.0]]), torch.zeros(1, 2))
    tensor([5.])
    """
    require(kind in ("mse", "l1"), f"kind must be 'mse' or 'l1', not {kind!r}.")
    require(
        prediction.shape == target.shape,
        f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} must have the same shape.",
    )
    each = F.mse_loss if kind == "mse" else F.l1_loss
    with full_precision(prediction):
        prediction, target = at_least_float32(prediction, target)
        return each(prediction, target, reduction="none").mean(-1)


def _check_mask(mask: Tensor, per_patch: Tensor) -> None:
    require(
        mask.shape == per_patch.shape and mask.dtype == torch.bool,
        f"mask must be bool {tuple(per_patch.shape)}, one value for each patch, not {mask.dtype} {tuple(mask.shape)}.",
    )


def masked_mean(per_patch: Float[Tensor, "B N"], mask: Bool[Tensor, "B N"], num_masked: float) -> Float[Tensor, ""]:
    """The mean of per_patch (B, N) over the masked patches, mask bool (B, N). Raises ValueError for other shapes.

    num_masked: how many an image has, expected rather than counted, so that the mean over a batch is the mean over its
    parts however it is cut into micro-batches or over processes.

    >>> masked_mean(torch.tensor([[1.0, 2.0, 6.0]]), torch.tensor([[False, True, True]]), num_masked=2)
    tensor(4.)
    """
    _check_mask(mask, per_patch)
    require(num_masked > 0, f"num_masked, of each image, must be above 0, not {num_masked}.")
    return (per_patch * mask).sum() / (len(per_patch) * num_masked)


def mae_loss(
    model: Callable[[Float[Tensor, "B C H W"], Bool[Tensor, "B N"]], Float[Tensor, "B N D"]],
    images: Float[Tensor, "B C H W"],
    mask: Bool[Tensor, "B N"],
    patch_size: tuple[int, int],
    norm_pix_loss: bool = True,
) -> Float[Tensor, ""]:
    """MAE's loss: the mean squared error of the masked patches (He et al. 2021, arXiv 2111.06377, section 3).

        prediction = decoder(encoder(visible patches), mask tokens)
        target     = patches of the image, each normalised by its mean and variance
        loss       = mean over masked patches of mean((prediction - target)²)

    model: (images, mask) → predictions (B, N, ph·pw·C). images: standardised, (B, C, H, W). mask: bool (B, N), True for
    the masked patches. If no patch is masked, the loss is 0.

    >>> images, mask = torch.randn(2, 3, 8, 8), torch.tensor([[True, True, True, False]]).expand(2, -1)
    >>> perfect = lambda images, mask: pixel_targets(images, (4, 4))
    >>> float(mae_loss(perfect, images, mask, (4, 4)))
    0.0
    """
    per_patch = distance(model(images, mask), pixel_targets(images, patch_size, norm_pix_loss))
    _check_mask(mask, per_patch)
    return (per_patch * mask).sum() / mask.sum().clamp(min=1)


def token_loss(logits: Float[Tensor, "*batch V"], tokens: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """Cross-entropy of each patch: logits (B, N, V) and tokens, integers (B, N) → (B, N). BEiT (Bao et al. 2021, arXiv
    2106.08254, equation 1) averages it over the masked patches: see `masked_mean`. Raises ValueError for other shapes.

    >>> token_loss(torch.zeros(1, 2, 8), torch.tensor([[3, 5]])).exp().round().tolist()
    [[8.0, 8.0]]
    """
    require(
        logits.shape[:-1] == tokens.shape and not tokens.is_floating_point(),
        f"tokens must be integers {tuple(logits.shape[:-1])} for logits {tuple(logits.shape)}, not {tokens.dtype} "
        f"{tuple(tokens.shape)}.",
    )
    with full_precision(logits):
        [logits] = at_least_float32(logits.flatten(0, -2))
        return F.cross_entropy(logits, tokens.flatten().long(), reduction="none").view(tokens.shape)


def dino_loss(
    student: Float[Tensor, "V B K"],
    teacher: Float[Tensor, "2 B K"],
    center: Float[Tensor, " K"],
    student_temp: float = 0.1,
    teacher_temp: float = 0.04,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """(DINO's loss, the teacher's entropy): Caron et al. 2021, arXiv 2104.14294, equation 3 and algorithm 1.

        q    = softmax((teacher - center) / teacher_temp)       no gradient
        p    = softmax(student / student_temp)
        loss = mean over pairs of a teacher's view and another view of the student of -sum(q · log p)

    student: logits (V, B, K) of V views, the first two of which are the global ones; teacher: (2, B, K) of these.
    center: (K,), a moving average of the teacher's logits. Computed in float32 at least, under autocast too. Raises
    ValueError for other shapes, and for temperatures that are not above 0.

    >>> views = torch.zeros(4, 3, 16)
    >>> loss, entropy = dino_loss(views, views[:2], torch.zeros(16))
    >>> round(loss.exp().item(), 3), round(entropy.exp().item(), 3)
    (16.0, 16.0)
    """
    views, rows, prototypes = student.shape if student.ndim == 3 else (0, 0, 0)
    require(
        views >= 2 and teacher.shape == (2, rows, prototypes),
        "teacher must hold the logits of the two global views, (2, B, K), and student those of V ≥ 2 views, (V, B, K); "
        f"got {tuple(teacher.shape)} and {tuple(student.shape)}.",
    )
    require(center.shape == (prototypes,), f"center must be ({prototypes},), not {tuple(center.shape)}.")
    require(
        student_temp > 0 and teacher_temp > 0,
        f"student_temp={student_temp} and teacher_temp={teacher_temp} must be above 0.",
    )
    with full_precision(student):
        student, teacher, center = at_least_float32(student, teacher.detach(), center.detach())
        log_p = F.log_softmax(student / student_temp, -1)
        log_q = F.log_softmax((teacher - center) / teacher_temp, -1)
        q = log_q.exp()
        pairs = -torch.einsum("tbk,vbk->tv", q, log_p) / rows
        loss = (pairs.sum() - pairs.diagonal().sum()) / (pairs.numel() - 2)
        return loss, -(q * log_q).sum(-1).mean()
