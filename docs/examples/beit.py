"""BEiT: put mask tokens in place of blocks of 40 % of the patches, predict the discrete tokens of what was there.

    python docs/examples/beit.py --steps 100

Bao et al. 2021, arXiv 2106.08254. A tokenizer gives each patch one of V tokens, and the ViT classifies the masked
patches. BEiT's tokenizer is a published dVAE; here it is k-means on patches of the training images, fitted in seconds.
Recipe: recipes/beit.yaml.
"""

import argparse

import timm
import torch
from sklearn.datasets import load_digits
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

from ssl_vit import corruption, neighbours, views
from ssl_vit.backbones import check_tokens, xavier
from ssl_vit.decoders import LinearHead
from ssl_vit.losses import masked_mean, token_loss
from ssl_vit.schedules import cosine
from ssl_vit.targets import KMeans

VIT = dict(img_size=8, patch_size=2, in_chans=1, embed_dim=96, depth=4, num_heads=3, num_classes=0)
SIZE, BATCH_SIZE, LR, BETAS, WEIGHT_DECAY = (8, 8), 64, 1.5e-3, (0.9, 0.98), 0.05
TEST = 360  # the last digits are never trained on
MASK_RATIO = 0.4


class BEiT(nn.Module):
    """A timm ViT, a tokenizer, and a linear classifier. Shapes: B images, N patches in a grid, V tokens.

    The ViT has a class token, no registers, no norm_pre, and images of one size: `check_tokens`.
    """

    def __init__(self, vit: VisionTransformer, vocab_size: int = 128):
        super().__init__()
        check_tokens(vit)
        self.vit = vit
        self.patch_size, self.grid = vit.patch_embed.patch_size, vit.patch_embed.grid_size
        self.num_patches = vit.patch_embed.num_patches
        self.tokenizer = KMeans(self.patch_size, vit.patch_embed.proj.in_channels, vocab_size)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, vit.embed_dim))
        nn.init.normal_(self.mask_token, std=0.02)
        self.head = LinearHead(vit.embed_dim, 1, vocab_size)

    def forward(self, images: Tensor, mask: Tensor) -> Tensor:
        """Standardised images (B, C, H, W), mask bool (B, N) → logits (B, N, V)."""
        vit = self.vit
        tokens = torch.where(mask[..., None], self.mask_token, vit.patch_embed(images))
        tokens = torch.cat([vit.cls_token.expand(len(images), -1, -1), tokens], 1) + vit.pos_embed
        return self.head(vit.norm(vit.blocks(tokens)))

    def loss(self, images: Tensor, blocks: Tensor, noise: Tensor) -> Tensor:
        """Of standardised images (B, C, H, W). blocks and noise: uniform (B, 16, 4, 4), (B, N): to lay the blocks."""
        _, mask = corruption.block_masking(blocks, noise, self.grid, MASK_RATIO)
        per_patch = token_loss(self(images, mask), self.tokenizer(images))
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
    model = BEiT(vit).to(device)
    model.tokenizer.fit(whole[:-TEST], seed=0)
    optimizer = torch.optim.AdamW(param_groups_weight_decay(model, WEIGHT_DECAY), lr=LR, betas=BETAS)
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, cosine(step, steps, 1.0, 0.0))
    )

    print(f"k-NN with random weights: {knn(vit, whole, labels):.1%}")
    model.train()
    for step in range(steps):
        batch = train[torch.randint(len(train), (BATCH_SIZE,))]
        view = (views.augment(crops, batch, seed=0, step=step)["image"] - mean) / std
        blocks = torch.rand(BATCH_SIZE, 16, 4, 4, device=device)
        loss = model.loss(view, blocks, torch.rand(BATCH_SIZE, model.num_patches, device=device))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 3.0)
        optimizer.step()
        schedule.step()
        if step % 10 == 9 or step == steps - 1:
            print(f"step {step + 1}: loss {loss.item():.4f}")
    print(f"k-NN after {steps} steps: {knn(vit, whole, labels):.1%}")


if __name__ == "__main__":
    main()
