"""The shared ViT: patch_embed → add_positions → encode, and the features of any timm model.

A backbone is a plain timm model behind one seam: plain timm weights in, plain timm weights out. Images arrive in
[0, 1]; the backbone applies its own mean and std, which travel with its weights.
"""

import dataclasses
import inspect
import math
from collections.abc import Iterator, Sequence

import timm
import torch
from timm.data import resolve_data_config
from timm.layers import DropPath, PatchEmbed, resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ssl_vit import recipe as recipes
from ssl_vit import views
from ssl_vit.errors import UserError
from ssl_vit.randomness import Draw

SIZES = {"tiny": 16, "small": 16, "base": 16, "large": 16, "huge": 14}


class Unsupported(Exception):
    """Why a timm model does not fit behind the seam."""


# what timm's models raise on images, or with settings, that they were not made for
FAULTS = (Unsupported, AssertionError, AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError)
FAULTS += (TypeError, ValueError, ZeroDivisionError)


def reason(error: Exception) -> str:
    """A fault of timm's in one line."""
    return " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__


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

    @property
    def has_class_token(self) -> bool:
        """Whether the first prefix token is a class token."""
        m = self.model
        return bool(getattr(m, "has_class_token", getattr(m, "cls_token", None) is not None))

    def features(self, images: Tensor, blocks: Sequence[int] = (-1,)) -> list[tuple[Tensor, Tensor]]:
        """[(prefix tokens (B, P, D), patch tokens (B, H, W, D))] after each of these blocks.

        Of the last block they are the model's own `forward_features`, its final norm included, if it has one there.
        Those of an earlier block pass the final norm too where all blocks have the model's width; in models whose
        width grows with depth they are as the block leaves them, and prefix tokens are given where timm gives them.
        Deterministic and never masked: call in eval mode. P is 0 for models without prefix tokens.
        """
        x, last = self.normalise(images), self.depth - 1
        wanted = [b % self.depth for b in blocks]
        found = dict(self._earlier(x, sorted({*wanted} - {last})))
        if last in wanted:
            found[last] = self._split(self.model.forward_features(x), images)
        return [found[b] for b in wanted]

    def _earlier(self, x: Tensor, blocks: list[int]) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
        """(block, (prefix, patches)) of blocks before the last, in their order."""
        if not blocks:
            return
        call = self.model.forward_intermediates
        takes = inspect.signature(call).parameters
        options = dict(norm=len({info["num_chs"] for info in self.model.feature_info}) == 1, stop_early=True)
        options |= dict(return_prefix_tokens=bool(getattr(self.model, "num_prefix_tokens", 0)))
        options = {key: value for key, value in options.items() if key in takes}
        found = call(x, indices=blocks, intermediates_only=True, **options)  # in the order of the blocks
        for block, feature in zip(blocks, found, strict=True):
            patches, prefix = feature if isinstance(feature, tuple) else (feature, None)
            prefix = patches.new_zeros(len(patches), 0, patches.shape[1]) if prefix is None else prefix
            yield block, (prefix, patches.permute(0, 2, 3, 1))

    def _split(self, tokens: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """What `forward_features` gave for images (B, C, H, W) → (prefix tokens, patch tokens)."""
        m = self.model
        if isinstance(tokens, Tensor) and tokens.ndim == 4:
            patches = tokens if getattr(m, "output_fmt", "NCHW") == "NHWC" else tokens.permute(0, 2, 3, 1)
            return patches.new_zeros(len(patches), 0, patches.shape[-1]), patches
        if isinstance(tokens, Tensor) and tokens.ndim == 3:
            grid = self._grid(images)
            declared = getattr(m, "num_prefix_tokens", int(self.has_class_token))
            if tokens.shape[1] == declared + math.prod(grid):
                return tokens[:, :declared], tokens[:, declared:].unflatten(1, grid)
        raise Unsupported("its features are no map of patches")

    def _grid(self, images: Tensor) -> tuple[int, int]:
        """(H, W) in patches of the last block."""
        size, embed = tuple(images.shape[-2:]), getattr(self.model, "patch_embed", None)
        stride = self.model.feature_info[-1]["reduction"]
        if hasattr(embed, "dynamic_feat_size") and len({i["reduction"] for i in self.model.feature_info}) == 1:
            return tuple(embed.dynamic_feat_size(size))
        return -(-size[0] // stride), -(-size[1] // stride)

    @torch.no_grad()
    def check(self) -> None:
        """Compute the features of one black image. Raises UserError naming the model if it has none that we can use."""
        training = self.training
        self.eval()
        try:
            self.features(self.mean.new_zeros(1, len(self.mean), *self.input_size), range(self.depth))
        except FAULTS as error:
            (height, width), own = self.input_size, timm.get_pretrained_cfg(self.name).input_size[1:]
            where, remedy = "", "use"
            if (height, width) != tuple(own):
                where, remedy = f" on images of {height}x{width}", f"set data.size={own[0]}, or use"
            raise UserError(
                f"{self.name} cannot be used{where} ({reason(error)}): {remedy} another model, such as vit_small, "
                "swin_tiny_patch4_window7_224 or resnet50."
            ) from None
        finally:
            self.train(training)

    @property
    def name(self) -> str:
        """The model's name in timm."""
        return self.model.pretrained_cfg["architecture"]

    def add_classifier(self, classes: int) -> None:
        """Give the model a linear head for so many classes, zero-initialised, so that training starts at ln K.

        Raises UserError if the model takes none.
        """
        self._give_head(classes)

    def classify(self, images: Tensor, draw: Draw | None = None) -> Tensor:
        """Logits (B, K) of the model's own head."""
        return self.model(self.normalise(images))

    @torch.no_grad()
    def _give_head(self, classes: int, **pool) -> None:
        """Reset the classifier, with the timm arguments that say what it reads, and try it."""
        training = self.training
        self.eval()
        try:
            self.model.reset_classifier(classes, *([pool["global_pool"]] if pool else []))
            found = self.model.get_classifier()  # of distilled models two
            for head in found if isinstance(found, tuple | list | nn.ModuleList) else [found]:
                for weight in head.parameters():
                    nn.init.zeros_(weight)
            logits = self.classify(self.mean.new_zeros(1, len(self.mean), *self.input_size))
            if not isinstance(logits, Tensor) or logits.shape != (1, classes):
                raise Unsupported("its head gives no logits, one per class")
        except FAULTS as error:
            raise UserError(
                f"{self.name} takes no linear classifier ({reason(error)}): use another model, such as vit_small, "
                "swin_tiny_patch4_window7_224 or resnet50."
            ) from None
        finally:
            self.train(training)
        self.args |= dict(num_classes=classes, **pool)


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
        tokens = self.model.patch_embed(self.normalise(images))
        return tokens.flatten(1, 2) if tokens.ndim == 4 else tokens  # a map where timm resamples positions by itself

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
        # in timm's order; a distilled DeiT's second token is learnt from its teacher's labels there
        prefix = [t for t in (m.cls_token, getattr(m, "dist_token", None), m.reg_token) if t is not None]
        if not prefix:
            return tokens
        prefix = torch.cat(prefix, 1)
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
        if pool == "avg" and hasattr(self.model, "dist_token"):
            raise UserError(
                f"{self.name} reads its class and distillation tokens, each by a head of its own: use "
                "objective.pool=token, or name a deit_* without distillation."
            )
        self._give_head(classes, global_pool=pool, fc_norm=False)

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
        if "distilled" in name and config.registers:
            raise UserError(f"{name} has a distillation token and takes no registers: set backbone.registers=null.")
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
    model, args = _create(name, {key: value for key, value in args.items() if value is not None}, size, seed)
    if not is_vit:  # whose published rates are no setting of the recipe, and draw from the global generator
        for part in model.modules():
            if isinstance(part, DropPath):
                part.drop_prob = 0.0
            elif isinstance(part, nn.modules.dropout._DropoutNd):
                part.p = 0.0
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


def _create(name: str, args: dict, size: tuple[int, int], seed: int) -> tuple[nn.Module, dict]:
    """(timm's model for images of this size, its weights drawn from the seed; what it was built with)."""
    own = timm.get_pretrained_cfg(name)
    # models with a grid or windows must be told the size; convolutions do not take it
    tries = [args] if "img_size" in args or own.input_size[1:] == size else [args | dict(img_size=size), args]
    for given in tries:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            try:
                return timm.create_model(name, **given), given
            except FAULTS as error:
                if "img_size" in str(error) and isinstance(error, TypeError) and given is not tries[-1]:
                    continue
                raise UserError(f"timm cannot build {name} with {given}: {reason(error)}.") from None
    raise AssertionError


def wrap(model: nn.Module, mean: Sequence[float], std: Sequence[float], args: dict) -> Backbone:
    """The backbone around a timm model built with `args`: a TokenBackbone for a plain ViT.

    Raises UserError for a model whose features cannot be used.
    """
    is_plain = isinstance(model, VisionTransformer) and isinstance(model.patch_embed, PatchEmbed)
    if not is_plain or model.pos_embed is None:  # a hybrid's patches see each other before they are tokens
        backbone = Backbone(model, mean, std, args)
        backbone.check()
        return backbone
    for block in model.blocks:
        for part in [*block.modules()]:
            for name, child in part.named_children():
                if isinstance(child, DropPath):
                    setattr(part, name, AddressedDropPath(child.drop_prob))
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
