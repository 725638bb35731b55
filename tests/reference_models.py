"""Forward passes of the published models, each written from its paper and from the names in its official files.

They share no code with ssl_vit.weights or timm: tensors by their official names and standardised images (B, C, H, W) →
tokens (B, 1 + R + N, D) after the last norm.
"""

import itertools
import math

import torch
import torch.nn.functional as F

WIDTH, DEPTH, HEADS, PATCH, GRID = 48, 2, 3, 8, 4


SEEDS = itertools.count()


def random(*shape, std=0.2):
    return std * torch.randn(shape, generator=torch.Generator().manual_seed(next(SEEDS)))


def norm(name, width=WIDTH):
    return {f"{name}.weight": 1 + random(width, std=0.3), f"{name}.bias": random(width)}


def linear(name, inside, outside, bias=True):
    found = {f"{name}.weight": random(outside, inside, std=inside**-0.5)}
    return found | ({f"{name}.bias": random(outside)} if bias else {})


def vit(tokens=1, prefix="cls_token", width=WIDTH, bias=True):
    """The tensors of a plain ViT. tokens: how many prefix tokens have a position."""
    found = {prefix: random(1, 1, width), "pos_embed": random(1, tokens + GRID**2, width)}
    found |= {
        "patch_embed.proj.weight": random(width, 3, PATCH, PATCH, std=0.1),
        "patch_embed.proj.bias": random(width),
    }
    for i in range(DEPTH):
        found |= norm(f"blocks.{i}.norm1", width) | norm(f"blocks.{i}.norm2", width)
        found |= linear(f"blocks.{i}.attn.qkv", width, 3 * width, bias) | linear(f"blocks.{i}.attn.proj", width, width)
        found |= linear(f"blocks.{i}.mlp.fc1", width, 4 * width) | linear(f"blocks.{i}.mlp.fc2", 4 * width, width)
    return found | norm("norm", width)


def patches(t, x, weight="patch_embed.proj.weight", bias="patch_embed.proj.bias"):
    """Each patch, flattened, times the kernel as a matrix: (B, N, D)."""
    kernel = t[weight].flatten(1)
    side = t[weight].shape[-1]
    b, c, h, w = x.shape
    flat = x.reshape(b, c, h // side, side, w // side, side).permute(0, 2, 4, 1, 3, 5).reshape(b, -1, c * side * side)
    return flat @ kernel.T + t.get(bias, 0)


def layer_norm(t, name, x, eps):
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
    return (x - mean) / (variance + eps).sqrt() * t[f"{name}.weight"] + t[f"{name}.bias"]


def attend(q, k, v, heads, bias=0.0):
    """(B, L, D) each → (B, L, D)."""
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
    weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + bias).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def gelu(x):
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)


def affine(t, name, x):
    return x @ t[f"{name}.weight"].T + t.get(f"{name}.bias", 0)


def encode(t, x, heads=HEADS, eps=1e-6, scales=None, bias=None, last="norm"):
    """Blocks and last norm of MAE, DINO, DeiT, DINOv2 and BEiT. scales: the names of a block's two layer scales."""
    for i in range(1 + max(int(name.split(".")[1]) for name in t if name.startswith("blocks."))):
        at = f"blocks.{i}"
        h = layer_norm(t, f"{at}.norm1", x, eps)
        qkv = h @ t[f"{at}.attn.qkv.weight"].T
        if f"{at}.attn.q_bias" in t:
            q_bias, v_bias = t[f"{at}.attn.q_bias"], t[f"{at}.attn.v_bias"]
            qkv = qkv + torch.cat([q_bias, torch.zeros_like(q_bias), v_bias])
        qkv = qkv + t.get(f"{at}.attn.qkv.bias", 0)
        h = affine(t, f"{at}.attn.proj", attend(*qkv.chunk(3, -1), heads, 0.0 if bias is None else bias(i)))
        x = x + (t[f"{at}.{scales[0]}"] if scales else 1) * h
        h = layer_norm(t, f"{at}.norm2", x, eps)
        if f"{at}.mlp.w12.weight" in t:  # SwiGLU
            gate, value = affine(t, f"{at}.mlp.w12", h).chunk(2, -1)
            h = affine(t, f"{at}.mlp.w3", gate * torch.sigmoid(gate) * value)
        else:
            h = affine(t, f"{at}.mlp.fc2", gelu(affine(t, f"{at}.mlp.fc1", h)))
        x = x + (t[f"{at}.{scales[1]}"] if scales else 1) * h
    return layer_norm(t, last, x, eps) if last else x


def plain(t, x, **options):
    """ViT, MAE's encoder, DINO, DeiT: class token, all with positions."""
    tokens = torch.cat([t["cls_token"].expand(len(x), -1, -1), patches(t, x)], 1)
    return encode(t, tokens + t["pos_embed"], **options)


def distilled(t, x):
    tokens = [t[name].expand(len(x), -1, -1) for name in ("cls_token", "dist_token")]
    return encode(t, torch.cat([*tokens, patches(t, x)], 1) + t["pos_embed"])


def deit3(t, x):
    """Positions of patches alone (DeiT III, models_v2.py: added before the class token is put in front)."""
    tokens = torch.cat([t["cls_token"].expand(len(x), -1, -1), patches(t, x) + t["pos_embed"]], 1)
    return encode(t, tokens, scales=("gamma_1", "gamma_2"))


def dinov2(t, x):
    """Registers come between class token and patches, after positions (prepare_tokens_with_masks)."""
    tokens = torch.cat([t["cls_token"].expand(len(x), -1, -1), patches(t, x)], 1) + t["pos_embed"]
    if "register_tokens" in t:
        tokens = torch.cat([tokens[:, :1], t["register_tokens"].expand(len(x), -1, -1), tokens[:, 1:]], 1)
    return encode(t, tokens, scales=("ls1.gamma", "ls2.gamma"))


def relative_bias(table, grid=GRID):
    """(heads, 1 + N, 1 + N): the table's last three rows are class to patch, patch to class, class to class."""
    heads, n = table.shape[1], grid * grid
    found = torch.empty(heads, 1 + n, 1 + n)
    for q in range(n):
        for k in range(n):
            down, right = q // grid - k // grid + grid - 1, q % grid - k % grid + grid - 1
            found[:, 1 + q, 1 + k] = table[down * (2 * grid - 1) + right]
    found[:, 0, :], found[:, :, 0], found[:, 0, 0] = table[-3][:, None], table[-2][:, None], table[-1]
    return found


def beit(t, x, last="norm"):
    """Relative positions of each block, or shared by all; absolute ones if the file has them."""
    tokens = torch.cat([t["cls_token"].expand(len(x), -1, -1), patches(t, x)], 1) + t.get("pos_embed", 0)
    shared = t.get("rel_pos_bias.relative_position_bias_table")

    def bias(i):
        own = t.get(f"blocks.{i}.attn.relative_position_bias_table")
        return sum(relative_bias(table) for table in (shared, own) if table is not None)

    scales = ("gamma_1", "gamma_2") if "blocks.0.gamma_1" in t else None
    return encode(t, tokens, scales=scales, bias=bias, last=last)


def clip(t, x, act):
    """CLIP's image tower before its projection; the norm is of all tokens, where CLIP takes that of the class token."""
    tokens = patches(t, x, "visual.conv1.weight")
    tokens = torch.cat([t["visual.class_embedding"].expand(len(x), 1, -1), tokens], 1)
    x = layer_norm(t, "visual.ln_pre", tokens + t["visual.positional_embedding"], 1e-5)
    for i in range(DEPTH):
        at = f"visual.transformer.resblocks.{i}"
        h = layer_norm(t, f"{at}.ln_1", x, 1e-5)
        qkv = h @ t[f"{at}.attn.in_proj_weight"].T + t[f"{at}.attn.in_proj_bias"]
        x = x + affine(t, f"{at}.attn.out_proj", attend(*qkv.chunk(3, -1), HEADS))
        h = affine(t, f"{at}.mlp.c_fc", layer_norm(t, f"{at}.ln_2", x, 1e-5))
        x = x + affine(t, f"{at}.mlp.c_proj", act(h))
    return layer_norm(t, "visual.ln_post", x, 1e-5)


def rotate(x, grid, base=100.0):
    """DINOv3's rotary positions: coordinates in [-1, 1], a quarter of a head's channels each for sine of row, column.

    x: (B, heads, N, d), the patches alone.
    """
    d = x.shape[-1]
    periods = base ** (2 * torch.arange(d // 4) / (d // 2))
    centres = 2 * (torch.arange(grid) + 0.5) / grid - 1
    rows, columns = torch.meshgrid(centres, centres, indexing="ij")
    angle = 2 * math.pi * torch.stack([rows.flatten(), columns.flatten()], 1)[:, :, None] / periods  # (N, 2, d / 4)
    angle = angle.flatten(1).tile(2)
    one, two = x.chunk(2, -1)
    return x * angle.cos() + torch.cat([-two, one], -1) * angle.sin()


def dinov3(t, x, grid=GRID, heads=HEADS):
    """Keys have no bias: the official code multiplies it by bias_mask."""
    extra = [t[name].expand(len(x), -1, -1) for name in ("cls_token", "storage_tokens")]
    count = sum(part.shape[1] for part in extra)
    x = torch.cat([*extra, patches(t, x)], 1)
    for i in range(DEPTH):
        at = f"blocks.{i}"
        h = layer_norm(t, f"{at}.norm1", x, 1e-5)
        qkv = h @ t[f"{at}.attn.qkv.weight"].T + t[f"{at}.attn.qkv.bias"] * t[f"{at}.attn.qkv.bias_mask"]
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, -1))
        q, k = (torch.cat([part[:, :, :count], rotate(part[:, :, count:], grid)], 2) for part in (q, k))
        q, k, v = (part.transpose(1, 2).flatten(2) for part in (q, k, v))
        x = x + t[f"{at}.ls1.gamma"] * affine(t, f"{at}.attn.proj", attend(q, k, v, heads))
        h = layer_norm(t, f"{at}.norm2", x, 1e-5)
        if f"{at}.mlp.w1.weight" in t:
            h = affine(t, f"{at}.mlp.w3", F.silu(affine(t, f"{at}.mlp.w1", h)) * affine(t, f"{at}.mlp.w2", h))
        else:
            h = affine(t, f"{at}.mlp.fc2", gelu(affine(t, f"{at}.mlp.fc1", h)))
        x = x + t[f"{at}.ls2.gamma"] * h
    return layer_norm(t, "norm", x, 1e-5)
