"""SimMIM: put mask tokens in place of 60 % of the patches, regress the masked pixels with one linear layer.

    python docs/examples/simmim.py --steps 100

Xie et al. 2021, arXiv 2111.09886. Unlike MAE's, the encoder sees the mask tokens, and there is no decoder. The loss is
the mean absolute difference from the standardised pixels. Recipe: recipes/simmim.yaml.
"""

import argparse

import timm
import torch
from sklearn.datasets import load_digits
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

from ssl_vit import corruption, neighbours, views
from ssl_vit.backbones import check_tokens, fix_sincos_positions, xavier
from ssl_vit.decoders import LinearHead
from ssl_vit.losses import distance, masked_mean
from ssl_vit.patches import patchify
from ssl_vit.schedules import cosine

VIT = dict(img_size=8, patch_size=2, in_chans=1, embed_dim=96, depth=4, num_heads=3, num_classes=0)
SIZE, BATCH_SIZE, LR, BETAS, WEIGHT_DECAY = (8, 8), 64, 1e-3, (0.9, 0.999), 0.05
TEST = 360  # the last digits are never trained on
MASK_RATIO = 0.6


class SimMIM(nn.Module):
    """A timm ViT, and a linear head. Shapes: B images, N patches.

    The ViT has a class token, no registers, no norm_pre, and images of one size: `check_tokens`.
    """

    def __init__(self, vit: VisionTransformer):
        super().__init__()
        check_tokens(vit)
        self.vit = vit
        self.patch_size, self.grid = vit.patch_embed.patch_size, vit.patch_embed.grid_size
        self.num_patches = vit.patch_embed.num_patches
        self.mask_token = nn.Parameter(torch.zeros(1, 1, vit.embed_dim))
        nn.init.normal_(self.mask_token, std=0.02)
        self.head = LinearHead(vit.embed_dim, 1, vit.patch_embed.proj.weight[0].numel())

    def forward(self, images: Tensor, mask: Tensor) -> Tensor:
        """Standardised images (B, C, H, W), mask bool (B, N) → the pixels of every patch (B, N, ph·pw·C)."""
        vit = self.vit
        tokens = torch.where(mask[..., None], self.mask_token, vit.patch_embed(images))
        tokens = torch.cat([vit.cls_token.expand(len(images), -1, -1), tokens], 1) + vit.pos_embed
        return self.head(vit.norm(vit.blocks(tokens)))

    def loss(self, images: Tensor, noise: Tensor) -> Tensor:
        """Of standardised images (B, C, H, W). noise: uniform (B, N); the patches with the largest are masked."""
        _, mask = corruption.random_masking(noise, MASK_RATIO)
        per_patch = distance(self(images, mask), patchify(images, self.patch_size), "l1")
        return masked_mean(per_patch, mask, corruption.num_masked(self.num_patches, MASK_RATIO))


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
    fix_sincos_positions(vit)  # not of a ViT that has been trained: it would lose its own
    model = SimMIM(vit).to(device)
    optimizer = torch.optim.AdamW(param_groups_weight_decay(model, WEIGHT_DECAY), lr=LR, betas=BETAS)
    warmup = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, cosine(step, steps, 1.0, 0.0))
    )

    print(f"k-NN with random weights: {knn(vit, whole, labels):.1%}")
    model.train()
    for step in range(steps):
        batch = train[torch.randint(len(train), (BATCH_SIZE,))]
        view = (views.augment(crops, batch, seed=0, step=step)["image"] - mean) / std
        loss = model.loss(view, torch.rand(BATCH_SIZE, model.num_patches, device=device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 10 == 9 or step == steps - 1:
            print(f"step {step + 1}: loss {loss.item():.4f}")
    print(f"k-NN after {steps} steps: {knn(vit, whole, labels):.1%}")


if __name__ == "__main__":
    main()
