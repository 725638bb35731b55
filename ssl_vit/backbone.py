"""The shared ViT: patch_embed → add_positions → encode, and the features of any timm model.

A backbone is a plain timm model behind one seam: plain timm weights in, plain timm weights out. Images arrive in
[0, 1]; the backbone applies its own mean and std, which travel with its weights.
"""

import dataclasses
from collections.abc import Sequence

import timm
import torch
from timm.data import resolve_data_config
from timm.layers import DropPath, resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ssl_vit import recipe as recipes
from ssl_vit import views
from ssl_vit.errors import UserError
from ssl_vit.randomness import Draw

SIZES = {"tiny": 16, "small": 16, "base": 16, "large": 16, "huge": 14}


class Backbone(nn.Module):
    """Any timm model. Images: float (B, C, H, W) in [0, 1]."""

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float], args: dict):
        super().__init__()
        self.model = model
        self.args = dict(args)  # what timm built the model with, and needs to build it again
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    @property
    def width(self) -> int:
        return self.model.num_features

    @property
    def depth(self) -> int:
        return len(self.model.feature_info)

    @property
    def input_size(self) -> tuple[int, int]:
        """(H, W) in pixels that the weights are meant for."""
        return tuple(self.model.pretrained_cfg["input_size"][1:])

    @property
    def evaluation_view(self) -> views.Evaluation:
        """What the model is shown of a whole image when it is evaluated, as published with its weights.

        Raises UserError for a view that is not known here.
        """
        published = resolve_data_config(pretrained_cfg=self.model.pretrained_cfg)
        view = {key: published[key] for key in ("crop_pct", "interpolation", "crop_mode")}
        for key, known in dict(interpolation=views.KERNELS, crop_mode=views.CROP_MODES).items():
            if view[key] not in known:
                name = self.model.pretrained_cfg.get("architecture", type(self.model).__name__)
                raise UserError(
                    f"{name} is evaluated with {key}={view[key]}, and only {' and '.join(known)} are known here: take "
                    f"another model, or set {key} in the config.json of a copy of its folder."
                )
        return views.Evaluation(self.input_size, **view)

    def normalise(self, images: Tensor) -> Tensor:
        """Images in [0, 1] → standardised per channel."""
        return (images - self.mean) / self.std

    def features(self, images: Tensor, blocks: Sequence[int] = (-1,)) -> list[tuple[Tensor, Tensor]]:
        """[(prefix tokens (B, P, D), patch tokens (B, H, W, D))] after each of these blocks, normed where the model
        has a final norm. Deterministic and never masked: call in eval mode. P is 0 for models without prefix tokens.
        """
        found = self.model.forward_intermediates(
            self.normalise(images),
            indices=[b % self.depth for b in blocks],
            norm=isinstance(self.model, VisionTransformer),
            intermediates_only=True,
            **(dict(return_prefix_tokens=True) if getattr(self.model, "num_prefix_tokens", 0) else {}),
        )
        pairs = [f if isinstance(f, tuple) else (f, f.new_zeros(len(f), 0, f.shape[1])) for f in found]
        pairs = [(prefix, patches.permute(0, 2, 3, 1)) for patches, prefix in pairs]
        # timm returns them in the order of the blocks
        place = {b: i for i, b in enumerate(sorted({b % self.depth for b in blocks}))}
        return [pairs[place[b % self.depth]] for b in blocks]

    def add_classifier(self, classes: int) -> None:
        """Give the model a linear head for so many classes, zero-initialised, so that training starts at ln K."""
        self.model.reset_classifier(classes)
        self._remember_classifier(num_classes=classes)

    def classify(self, images: Tensor, draw: Draw | None = None) -> Tensor:
        """Logits (B, K) of the model's own head."""
        return self.model(self.normalise(images))

    def _remember_classifier(self, **args) -> None:
        self.args |= args
        for weight in self.model.get_classifier().parameters():
            nn.init.zeros_(weight)


class TokenBackbone(Backbone):
    """A plain ViT, whose tokens an objective may replace (before positions) or drop (with them)."""

    model: VisionTransformer

    @property
    def input_size(self) -> tuple[int, int]:
        return tuple(self.model.patch_embed.img_size)

    @property
    def patch(self) -> tuple[int, int]:
        """(height, width) of a patch in pixels."""
        return self.model.patch_embed.patch_size

    @property
    def prefix_tokens(self) -> int:
        return self.model.num_prefix_tokens

    def grid(self, images: Tensor) -> tuple[int, int]:
        """(H, W) in patches."""
        return images.shape[-2] // self.patch[0], images.shape[-1] // self.patch[1]

    def patch_embed(self, images: Tensor) -> Tensor:
        """Images in [0, 1] → patch tokens (B, N, D) without positions."""
        return self.model.patch_embed(self.normalise(images)).flatten(1, 2)

    def add_positions(self, tokens: Tensor, grid: tuple[int, int], keep: Tensor | None = None) -> Tensor:
        """Patch tokens (B, N, D) → prefix and positioned tokens (B, P + N, D); with keep, int64 (B, K), only those."""
        m = self.model
        own_prefix = 0 if m.no_embed_class else m.num_prefix_tokens
        at = m.pos_embed
        if grid != tuple(m.patch_embed.grid_size):
            at = resample_abs_pos_embed(at, grid, m.patch_embed.grid_size, num_prefix_tokens=own_prefix)
        tokens = tokens + at[:, own_prefix:]
        if keep is not None:
            tokens = tokens.gather(1, keep[..., None].expand(-1, -1, tokens.shape[-1]))
        prefix = torch.cat([t for t in (m.cls_token, m.reg_token) if t is not None], 1) if m.num_prefix_tokens else None
        if prefix is None:
            return tokens
        if own_prefix:
            prefix = prefix + at[:, :own_prefix]
        return torch.cat([prefix.to(tokens.dtype).expand(len(tokens), -1, -1), tokens], 1)

    def encode(self, tokens: Tensor, attn_mask: Tensor | None = None, draw: Draw | None = None) -> Tensor:
        """Positioned tokens → normed output tokens, both (B, L, D).

        draw: addresses stochastic depth while training. Where it has R rows, B may be V·R: V views, one after another.
        """
        m = self.model
        self._draw_depth(draw, len(tokens))
        x = m.norm_pre(tokens)
        for block in m.blocks:
            x = block(x) if attn_mask is None else block(x, attn_mask=attn_mask)
        return m.norm(x)

    def tokens(self, images: Tensor, draw: Draw | None = None) -> Tensor:
        """The whole way: images in [0, 1] → normed output tokens (B, P + N, D)."""
        return self.encode(self.add_positions(self.patch_embed(images), self.grid(images)), draw=draw)

    def add_classifier(self, classes: int, pool: str = "token") -> None:
        """As above. pool: "token" (class token) or "avg" (mean of the patches); the final norm stays before it."""
        self.model.reset_classifier(classes, pool)
        self._remember_classifier(num_classes=classes, global_pool=pool, fc_norm=False)

    def classify(self, images: Tensor, draw: Draw | None = None) -> Tensor:
        return self.model.forward_head(self.tokens(images, draw))

    def attention(self, images: Tensor) -> Tensor:
        """The last block's attention of the class token to the patches, for each head: (B, heads, H, W)."""
        m = self.model
        x = m.norm_pre(self.add_positions(self.patch_embed(images), self.grid(images)))
        for block in m.blocks[:-1]:
            x = block(x)
        a = m.blocks[-1].attn
        q, k, _ = a.qkv(m.blocks[-1].norm1(x)).unflatten(-1, (3, a.num_heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (a.q_norm(q)[:, :, :1] * a.scale @ a.k_norm(k).transpose(-2, -1)).softmax(-1)
        return weights[:, :, 0, self.prefix_tokens :].unflatten(-1, self.grid(images))

    def _draw_depth(self, draw: Draw | None, batch: int) -> None:
        paths = [m for m in self.model.modules() if isinstance(m, AddressedDropPath)]
        if not paths or not self.training:
            return
        uniform = draw.uniform("drop path", batch // len(draw.rows), len(paths)).transpose(0, 1).flatten(0, 1)
        for i, path in enumerate(paths):
            path.scale = ((uniform[:, i] >= path.rate) / (1 - path.rate)).view(-1, 1, 1)


class AddressedDropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016) whose draws are handed in: timm's come from the global generator."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate
        self.scale: Tensor | None = None  # (B, 1, 1), set before each training pass

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale.to(x.dtype) if self.training else x


def build(
    config: recipes.Backbone, data: recipes.Data, seed: int, interpolation: views.Interpolation = "bilinear"
) -> Backbone:
    """A new backbone for these images, its weights drawn from the seed. interpolation: of the views it is trained on.

    Raises UserError for what cannot be built.
    """
    size = (data.size, data.size) if isinstance(data.size, int) else tuple(data.size)
    name, args = config.name, dict(in_chans=data.channels, num_classes=0)
    if name.removeprefix("vit_") in SIZES:
        name = f"{name}_patch{SIZES[name.removeprefix('vit_')]}_224"
    if name not in timm.list_models():
        known = [f"vit_{s}" for s in SIZES]
        raise UserError(f"Unknown backbone {config.name!r}: give one of {', '.join(known)}, or a model timm knows.")
    is_vit = timm.models.is_model_in_modules(name, ["vision_transformer", "deit"])
    if not is_vit:
        of_vit = ("width", "depth", "heads", "layer_scale", "registers", "drop_path")
        unset = {f.name: f.default for f in dataclasses.fields(config) if f.name in of_vit and getattr(config, f.name)}
        if unset:  # by the command line, or by the recipe alone
            settings = " ".join(f"backbone.{k}={'null' if v is None else v}" for k, v in unset.items())
            raise UserError(f"{name} is no plain ViT and has no {', '.join(unset)}: set {settings}, or name a vit_*.")
    else:
        patch = resolve_patch(config.patch, size)
        args |= dict(
            img_size=size,
            patch_size=patch,
            dynamic_img_size=True,
            drop_path_rate=config.drop_path,
            reg_tokens=config.registers,
            init_values=config.layer_scale,
        )
        shape = dict(embed_dim=config.width, depth=config.depth, num_heads=config.heads)
        args |= {key: value for key, value in shape.items() if value is not None}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            args = {key: value for key, value in args.items() if value is not None}
            model = timm.create_model(name, **args)
        except (AssertionError, TypeError, RuntimeError, ValueError) as error:
            raise UserError(f"timm cannot build {name} with {args}: {error or type(error).__name__}.") from None
    if isinstance(model, VisionTransformer) and config.positions == "sincos":
        fix_sincos_positions(model)
    if config.init == "xavier":
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model.apply(xavier)
            if is_vit:  # as the linear layer that it is
                nn.init.xavier_uniform_(model.patch_embed.proj.weight.view(len(model.patch_embed.proj.weight), -1))
    if isinstance(model, VisionTransformer):
        draw_class_token(model, seed)
    view = views.evaluation(size, interpolation)
    own = dict(crop_pct=view.crop_pct, interpolation=view.interpolation, crop_mode=view.crop_mode)
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (data.channels, *size), **own}
    return wrap(model, data.mean, data.std, args)


def wrap(model: nn.Module, mean: Sequence[float], std: Sequence[float], args: dict) -> Backbone:
    """The backbone around a timm model built with `args`: a TokenBackbone for a plain ViT."""
    if not isinstance(model, VisionTransformer) or model.pos_embed is None:
        return Backbone(model, mean, std, args)
    for block in model.blocks:
        for name in ("drop_path1", "drop_path2"):
            if isinstance(getattr(block, name, None), DropPath):
                setattr(block, name, AddressedDropPath(getattr(block, name).drop_prob))
    return TokenBackbone(model, mean, std, args)


def resolve_patch(patch: int | str | None, size: tuple[int, int]) -> int:
    """The patch side for images of this size (H, W); "auto" is the divisor nearest to size/8, from 2, up to 64 px."""
    if patch == "auto":
        if max(size) > 64:
            raise UserError(
                f"backbone.patch=auto is meant for images of up to 64 px, and these have {max(size)}: use a photo "
                "recipe (--recipe mae-photos or dino-photos), or set backbone.patch=16."
            )
        sides = [p for p in range(2, min(size) + 1) if size[0] % p == 0 and size[1] % p == 0]
        if not sides:
            raise UserError(f"Images of {size[0]}x{size[1]} have no common patch side: set data.size.")
        return min(sides, key=lambda p: (abs(p - max(size) / 8), p))
    if patch is None:
        raise UserError("backbone.patch must be set for a ViT.")
    if size[0] % patch or size[1] % patch:
        raise UserError(
            f"Images of {size[0]}x{size[1]} do not divide into patches of {patch}: set data.size or backbone.patch."
        )
    return patch


def sincos_positions(width: int, grid: tuple[int, int]) -> Tensor:
    """Fixed 2-D sine-cosine positions, (H·W, D): the first half of the channels encodes the column, the second the
    row, each half sines then cosines of geometric frequencies (MAE's and moco-v3's order). D divides by 4.
    """
    if width % 4:
        raise UserError(f"sincos positions need a width divisible by 4, not {width}: use backbone.positions=learned.")
    rows, columns = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    frequency = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    halves = [at.reshape(-1, 1) * frequency for at in (columns, rows)]
    return torch.cat([f(angle) for angle in halves for f in (torch.sin, torch.cos)], 1).float()


def fix_sincos_positions(model: VisionTransformer) -> None:
    """Give a timm ViT sine-cosine positions, zero for prefix tokens, and keep them fixed."""
    prefix = 0 if model.no_embed_class else model.num_prefix_tokens
    with torch.no_grad():
        model.pos_embed.zero_()
        model.pos_embed[0, prefix:] = sincos_positions(model.embed_dim, model.patch_embed.grid_size)
    model.pos_embed.requires_grad = False


def draw_class_token(model: VisionTransformer, seed: int) -> None:
    """Normal of std 0.02, as in the official MAE, DINO and DeiT (BEiT's is cut at one deviation), where timm has 1e-6;
    so is DeiT's distillation token. Drawn at addresses of their own: no other weight of a seed depends on them."""
    draw = Draw(seed, 0, torch.tensor([0]))
    for name in ("cls_token", "dist_token"):
        token = getattr(model, name, None)
        if token is not None:
            with torch.no_grad():
                token.copy_(0.02 * draw.normal(f"initial {name}", *token.shape[1:]))


def xavier(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases for a linear layer: MAE's initialisation. For `Module.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
