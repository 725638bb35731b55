"""DINO: a student matches, from every crop, what an averaged teacher says of the two large ones.

    python docs/examples/dino.py --steps 100

Caron et al. 2021, arXiv 2104.14294, algorithm 1. The teacher is a moving average (EMA) of the student. Its output is
centred and sharpened against collapse: if teacher_entropy goes to 0, or to ln K and stays there, training has failed.
As in recipes/dino.yaml, small images need few prototypes, a fast teacher and BatchNorm in the head.
"""

import argparse
import copy

import timm
import torch
from sklearn.datasets import load_digits
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

from ssl_vit import neighbours, views
from ssl_vit.backbones import xavier
from ssl_vit.losses import dino_loss
from ssl_vit.objectives.base import update_ema
from ssl_vit.objectives.dino import Head
from ssl_vit.schedules import cosine

VIT = dict(
    img_size=8, patch_size=2, in_chans=1, embed_dim=96, depth=4, num_heads=3, num_classes=0, dynamic_img_size=True
)
SIZE, BATCH_SIZE, LR, BETAS, WEIGHT_DECAY = (8, 8), 64, 1e-3, (0.9, 0.999), 0.04
TEST = 360  # the last digits are never trained on
STUDENT_TEMP, TEACHER_TEMP, CENTER_MOMENTUM, MOMENTUM_TEACHER = 0.1, 0.04, 0.9, 0.98


class DINO(nn.Module):
    """Student and teacher, each a timm ViT for images of any size with a head. Shapes: B images, K prototypes."""

    def __init__(self, vit: VisionTransformer, head: Head):
        super().__init__()
        self.vit, self.head = vit, head
        self.teacher = copy.deepcopy(vit).requires_grad_(False)
        self.teacher_head = copy.deepcopy(head).requires_grad_(False)
        self.register_buffer("center", torch.zeros(len(head.last.direction)))

    def loss(self, large: Tensor, small: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(the loss, the teacher's entropy, its logits (2, B, K)) of standardised crops: (2, B, C, H, W) global ones,
        and V local ones (V, B, C, h, w)."""
        batch = large.shape[1]
        with torch.no_grad():
            teacher = self.teacher_head(self.teacher(large.flatten(0, 1))).unflatten(0, (2, batch))
        seen = torch.cat([self.vit(large.flatten(0, 1)), self.vit(small.flatten(0, 1))])
        student = self.head(seen).unflatten(0, (-1, batch))  # (2 + V, B, K)
        loss, entropy = dino_loss(student, teacher, self.center, STUDENT_TEMP, TEACHER_TEMP)
        return loss, entropy, teacher

    @torch.no_grad()
    def update(self, teacher: Tensor, momentum: float) -> None:
        """After the optimizer's step: the teacher follows the student, the center the teacher's logits (2, B, K)."""
        update_ema(self.teacher, self.vit, momentum)
        update_ema(self.teacher_head, self.head, momentum)
        self.center.lerp_(teacher.mean((0, 1)), 1 - CENTER_MOMENTUM)


@torch.no_grad()
def knn(vit: VisionTransformer, images: Tensor, labels: Tensor) -> float:
    """The accuracy of k-NN on the class tokens of the last images, among those of the others."""
    features = vit.eval().forward_features(images)[:, 0].cpu().numpy()
    predicted = neighbours.predict(features[:-TEST], labels[:-TEST].numpy(), features[-TEST:])
    return (torch.from_numpy(predicted) == labels[-TEST:]).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    digits = load_digits()  # in their place: uint8 images (n, C, H, W) and int64 labels (n,)
    images = torch.from_numpy(digits.images * 255 / 16).byte()[:, None].to(device)
    labels = torch.from_numpy(digits.target)
    train = images[:-TEST]
    mean, std = train.float().mean() / 255, train.float().std() / 255
    whole = (views.whole(images, SIZE) - mean) / std
    crops = views.dino(SIZE, (4, 4), 2, 0.0, (0.5, 1.0), (0.3, 0.6), colour=False)  # no flips of digits

    vit = timm.create_model("vit_tiny_patch16_224", **VIT).apply(xavier)
    head = Head(96, out_dim=128, use_bn=True, hidden_dim=256, bottleneck_dim=64)
    model = DINO(vit, head).to(device)
    optimizer = torch.optim.AdamW(param_groups_weight_decay(model, WEIGHT_DECAY), lr=LR, betas=BETAS)
    warmup = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, cosine(step, steps, 1.0, 0.0))
    )

    print(f"k-NN with random weights: {knn(vit, whole, labels):.1%}")
    model.train()
    model.teacher.eval()
    for step in range(steps):
        batch = train[torch.randint(len(train), (BATCH_SIZE,))]
        view = {name: (v - mean) / std for name, v in views.augment(crops, batch, seed=0, step=step).items()}
        large = torch.stack([view["global1"], view["global2"]])
        loss, entropy, teacher = model.loss(large, view["local"].transpose(0, 1))
        optimizer.zero_grad()
        loss.backward()
        for weight in model.parameters():  # each on its own, as in the official code
            nn.utils.clip_grad_norm_(weight, 3.0)
        if step < 0.01 * steps:
            model.head.last.zero_grad()  # the prototypes are frozen at first
        optimizer.step()
        schedule.step()
        model.update(teacher, cosine(step, steps, MOMENTUM_TEACHER, 1.0))
        if step % 10 == 9 or step == steps - 1:
            print(f"step {step + 1}: loss {loss.item():.4f}, teacher_entropy {entropy.item():.3f}")
    print(f"k-NN after {steps} steps: {knn(model.teacher, whole, labels):.1%}")


if __name__ == "__main__":
    main()
