"""The losses as functions of tensors: no recipe, batch or run is needed to use them.

The objectives compute theirs with these functions; docs/examples/ shows each in a training loop of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_vit.patches import patchify

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


def full_precision(tensor: Tensor) -> AbstractContextManager[object]:
    """No autocast inside, on the tensor's device. (A tensor without memory, of `pretrain.py --plan`, has none.)"""
    return nullcontext() if tensor.is_meta else torch.autocast(tensor.device.type, enabled=False)


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

    >>> distance(torch.tensor([[3.0, 1.0]]), torch.zeros(1, 2))
    tensor([5.])
    """
    each = F.mse_loss if kind == "mse" else F.l1_loss
    return each(prediction, target, reduction="none").mean(-1)


def masked_mean(per_patch: Float[Tensor, "B N"], mask: Bool[Tensor, "B N"], num_masked: float) -> Float[Tensor, ""]:
    """The mean of per_patch (B, N) over the masked patches, mask bool (B, N).

    num_masked: how many an image has, expected rather than counted, so that the mean over a batch is the mean over its
    parts however it is cut into micro-batches or over processes.

    >>> masked_mean(torch.tensor([[1.0, 2.0, 6.0]]), torch.tensor([[False, True, True]]), num_masked=2)
    tensor(4.)
    """
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

    model: (images, mask) → predictions (B, N, ph·pw·C). images: standardised, (B, C, H, W). mask: bool (B, N),
    with the same number of True in every row.

    >>> images, mask = torch.randn(2, 3, 8, 8), torch.tensor([[True, True, True, False]]).expand(2, -1)
    >>> perfect = lambda images, mask: pixel_targets(images, (4, 4))
    >>> float(mae_loss(perfect, images, mask, (4, 4)))
    0.0
    """
    target = pixel_targets(images, patch_size, norm_pix_loss)
    return masked_mean(distance(model(images, mask), target), mask, int(mask[0].sum()))


def token_loss(logits: Float[Tensor, "*batch V"], tokens: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """Cross-entropy of each patch: logits (B, N, V) and tokens, int64 (B, N) → (B, N). BEiT (Bao et al. 2021, arXiv
    2106.08254, equation 1) averages it over the masked patches: see `masked_mean`.

    >>> token_loss(torch.zeros(1, 2, 8), torch.tensor([[3, 5]])).exp().round().tolist()
    [[8.0, 8.0]]
    """
    return F.cross_entropy(logits.flatten(0, -2), tokens.flatten(), reduction="none").view(tokens.shape)


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
    center: (K,), a moving average of the teacher's logits.

    >>> views = torch.zeros(4, 3, 16)
    >>> loss, entropy = dino_loss(views, views[:2], torch.zeros(16))
    >>> round(loss.exp().item(), 3), round(entropy.exp().item(), 3)
    (16.0, 16.0)
    """
    log_p = F.log_softmax(student / student_temp, -1)
    log_q = F.log_softmax((teacher - center) / teacher_temp, -1)
    q = log_q.exp()
    pairs = -torch.einsum("tbk,vbk->tv", q, log_p) / student.shape[1]
    loss = (pairs.sum() - pairs.diagonal().sum()) / (pairs.numel() - 2)
    return loss, -(q * log_q).sum(-1).mean()
