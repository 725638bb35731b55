"""Denoising: add Gaussian noise to every pixel, predict the clean pixels. No patch is masked.

    python docs/examples/gaussian.py --steps 100

Chen et al. 2024, arXiv 2401.14404 (l-DAE). One noise level per image, uniform in [0, √2] standard deviations of the
data. The paper adds the noise to principal components of the patches; here it is added to the pixels. Recipe:
recipes/gaussian.yaml.
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
from ssl_vit.decoders import Decoder
from ssl_vit.losses import distance, pixel_targets
from ssl_vit.schedules import cosine

VIT = dict(img_size=8, patch_size=2, in_chans=1, embed_dim=96, depth=4, num_heads=3, num_classes=0)
SIZE, BATCH_SIZE, LR, BETAS, WEIGHT_DECAY = (8, 8), 64, 1.5e-3, (0.9, 0.95), 0.05
TEST = 360  # the last digits are never trained on
SIGMA = (0.0, 1.4142)  # the range of the noise level


class Denoiser(nn.Module):
    """A timm ViT as the encoder, and MAE's decoder on all patches. Shapes: B images, N patches.

    The ViT has a class token, no registers, no norm_pre, and images of one size: `check_tokens`.
    """

    def __init__(self, vit: VisionTransformer, decoder_dim: int = 64, decoder_depth: int = 2, decoder_heads: int = 4):
        super().__init__()
        check_tokens(vit)
        self.vit = vit
        self.patch_size = vit.patch_embed.patch_size
        pixels = vit.patch_embed.proj.weight[0].numel()  # ph·pw·C
        grid = vit.patch_embed.grid_size
        self.decoder = Decoder(vit.embed_dim, 1, grid, pixels, decoder_dim, decoder_depth, decoder_heads)

    def forward(self, images: Tensor) -> Tensor:
        """Noisy standardised images (B, C, H, W) → the clean pixels of every patch (B, N, ph·pw·C)."""
        return self.decoder(self.vit.forward_features(images))

    def loss(self, images: Tensor, normal: Tensor, u: Tensor) -> Tensor:
        """Of standardised images (B, C, H, W). normal: standard normal, of the same shape; u: uniform (B, 1, 1, 1)."""
        noise, _ = corruption.noise(normal, u, SIGMA)
        target = pixel_targets(images, self.patch_size, norm_pix_loss=False)
        return distance(self(images + noise), target).mean()


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
    model = Denoiser(vit).to(device)
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
        loss = model.loss(view, torch.randn_like(view), torch.rand(BATCH_SIZE, 1, 1, 1, device=device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 10 == 9 or step == steps - 1:
            print(f"step {step + 1}: loss {loss.item():.4f}")
    print(f"k-NN after {steps} steps: {knn(vit, whole, labels):.1%}")


if __name__ == "__main__":
    main()
