"""Supervised training, the control that every method without labels is measured against.

    python docs/examples/supervised.py --steps 100

Touvron et al. 2020, arXiv 2012.12877 (DeiT): cross-entropy with label smoothing. The head starts at zero, so the loss
starts at ln K. Mixup and cutmix are off, as in recipes/supervised.yaml.
"""

import argparse

import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

from ssl_vit import neighbours, views
from ssl_vit.backbones import xavier
from ssl_vit.schedules import cosine

VIT = dict(img_size=8, patch_size=2, in_chans=1, embed_dim=96, depth=4, num_heads=3, num_classes=10)
SIZE, BATCH_SIZE, LR, BETAS, WEIGHT_DECAY = (8, 8), 64, 1e-3, (0.9, 0.999), 0.05
TEST = 360  # the last digits are never trained on
SMOOTHING = 0.1


class Supervised(nn.Module):
    """Any timm ViT with a classifier. Shapes: B images, K classes."""

    def __init__(self, vit: VisionTransformer):
        super().__init__()
        self.vit = vit
        nn.init.zeros_(vit.head.weight)

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Of standardised images (B, C, H, W) and labels, int64 (B,)."""
        return F.cross_entropy(self.vit(images), labels, label_smoothing=SMOOTHING)


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
    crops = views.crop_flip(SIZE, flip=0.0, scale=(0.5, 1.0))  # a mirrored digit is none

    vit = timm.create_model("vit_tiny_patch16_224", **VIT).apply(xavier)
    model = Supervised(vit).to(device)
    optimizer = torch.optim.AdamW(param_groups_weight_decay(model, WEIGHT_DECAY), lr=LR, betas=BETAS)
    warmup = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, cosine(step, steps, 1.0, 0.0))
    )

    print(f"k-NN with random weights: {knn(vit, whole, labels):.1%}")
    model.train()
    for step in range(steps):
        rows = torch.randint(len(train), (BATCH_SIZE,))
        view = (views.augment(crops, train[rows], seed=0, step=step)["image"] - mean) / std
        loss = model.loss(view, labels[rows].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 10 == 9 or step == steps - 1:
            print(f"step {step + 1}: loss {loss.item():.4f}")
    print(f"k-NN after {steps} steps: {knn(vit, whole, labels):.1%}")


if __name__ == "__main__":
    main()
