"""The settings of the published code beside those of our recipes, and why they differ where they do.

    python docs/generate/fidelity.py > docs/fidelity.md

The stored values are those of the papers and their official code, in our units: a warm-up as a fraction of the steps,
`optim.lr` before `lr_rule`. A test fails when a recipe departs from one without a reason here, and when a reason is
given for what does not depart. Values that the papers leave out or the code's defaults contradict have their source
beside them.
"""

import math
from typing import Any, NamedTuple

from ssl_vit import objectives
from ssl_vit.errors import listed
from ssl_vit.settings import write

Values = dict[str, Any]
SMALL = {  # why the recipes for the digits differ
    "train.epochs": "for 1,437 images of 8x8",
    "train.batch_size": "for 1,437 images of 8x8",
    "backbone.name": "0.45 M parameters, for 8x8 images",
    "views.scale": "below half, little of an 8x8 digit is left",
    "views.interpolation": "bilinear in all small recipes",
    "optim.warmup_fraction": "for a run of 340 to 1,120 steps",
    "backbone.weight_init": "0.02-normal weights are too small a start at width 96",
}


class Entry(NamedTuple):
    """official: the published values by our keys. reasons: why the recipe departs, by key. absent: what has no setting
    here, as (what, there, here)."""

    official: Values
    reasons: dict[str, str] = {}
    absent: tuple[tuple[str, str, str], ...] = ()


def small(reasons: dict[str, str], *without: str) -> dict[str, str]:
    """The reasons of a recipe for the digits: its own and the common ones but for these."""
    return {key: reason for key, reason in SMALL.items() if key not in without} | reasons


MAE: Values = {
    "train.epochs": 1600,
    "train.batch_size": 4096,
    "optim.lr": 1.5e-4,
    "optim.lr_rule": "B/256",
    "optim.min_lr": 0.0,
    "optim.warmup_fraction": 40 / 1600,
    "optim.betas": [0.9, 0.95],
    "optim.weight_decay": 0.05,
    "optim.no_weight_decay": "1d",
    "optim.clip_grad": None,
    "views.augmentation": "crop+flip",
    "views.scale": [0.2, 1.0],
    "views.interpolation": "bicubic",
    "backbone.name": "vit_base_patch16_224",
    "backbone.pos_embed": "sincos",
    "backbone.weight_init": "xavier",
    "backbone.drop_path_rate": 0.0,
    "objective.mask": "random",
    "objective.mask_ratio": 0.75,
    "objective.encoder_input": "visible",
    "objective.target": "pixels",
    "objective.norm_pix_loss": True,
    "objective.decoder_depth": 8,
    "objective.decoder_embed_dim": 512,
    "objective.decoder_num_heads": 16,
}
FINETUNE: Values = {
    "train.epochs": 100,
    "train.batch_size": 1024,
    "optim.lr": 5e-4,
    "optim.lr_rule": "B/256",
    "optim.min_lr": 1e-6,
    "optim.warmup_fraction": 5 / 100,
    "optim.betas": [0.9, 0.999],
    "optim.weight_decay": 0.05,
    "optim.no_weight_decay": "1d+tokens",
    "optim.layer_decay": 0.65,
    "views.augmentation": "rand-augment",
    "views.magnitude": 9.0,
    "views.scale": [0.08, 1.0],
    "views.interpolation": "bicubic",
    "backbone.name": "vit_base_patch16_224",
    "backbone.drop_path_rate": 0.1,
    "objective.smoothing": 0.1,
    "objective.mixup": 0.8,
    "objective.cutmix": 1.0,
    "objective.mixup_mode": "batch",
    "objective.reprob": 0.25,
    "objective.global_pool": "avg",
}
MIXED_IN_REVERSE = ("mixing partner", "the batch in reverse", "row r with row r xor 1")
# tf.image.sample_distorted_bounding_box, and tf.image.resize as big_vision and vit_jax call it
TENSORFLOW_CROP = (
    ("random crop", "height uniform between its limits, aspect uniform", "area uniform, aspect log-uniform"),
    ("resampling", "without antialiasing", "antialiased"),
)
CUT_NORMAL = (
    "initial weights",
    "normal of std 0.02, cut at one deviation (std 0.011), patch embedding too",
    "normal of std 0.02, patch embedding as torch's",
)
XAVIER = (*CUT_NORMAL[:2], "Xavier's uniform distribution: 0.02-normal weights are too small a start at width 96")
FINETUNE_ABSENT = (
    ("order of mean and norm", "mean of the patches, then a norm of its own", "the final norm, then the mean"),
    ("head at the start", "normal, of std 2e-5", "0"),
    MIXED_IN_REVERSE,
)
# the files args.txt that the README links beside the weights of ViT-B/16 and ViT-S/16, as two other repositories quote
# them alike
DINO: Values = {
    "train.epochs": 400,
    "train.batch_size": 1024,
    "optim.no_weight_decay": "1d",  # get_params_groups in utils.py: biases and norms
    "optim.lr": 7.5e-4,
    "optim.lr_rule": "B/256",
    "optim.min_lr": 2e-6,
    "optim.warmup_fraction": 10 / 400,
    "optim.betas": [0.9, 0.999],
    "optim.weight_decay": 0.04,
    "optim.weight_decay_end": 0.4,
    "optim.clip_grad": 0.3,
    "optim.clip_mode": "parameter",
    "views.augmentation": "dino",
    "views.scale": [0.25, 1.0],
    "views.interpolation": "bicubic",
    "backbone.name": "vit_base_patch16_224",
    "backbone.weight_init": "trunc_normal",
    "backbone.drop_path_rate": 0.1,
    "objective.out_dim": 65536,
    "objective.hidden_dim": 2048,
    "objective.bottleneck_dim": 256,
    "objective.norm_last_layer": True,
    "objective.use_bn_in_head": False,
    "objective.student_temp": 0.1,
    "objective.teacher_temp": 0.07,
    "objective.warmup_teacher_temp": 0.04,
    "objective.warmup_teacher_temp_fraction": 50 / 400,
    "objective.momentum_teacher": 0.996,
    "objective.center_momentum": 0.9,
    "objective.freeze_last_layer_fraction": 3 / 400,
    "objective.local_crops_number": 10,
    "objective.local_crops_size": 96,
    "objective.local_crops_scale": [0.05, 0.25],
}
DINO_S = {key: value for key, value in DINO.items() if key != "optim.clip_mode"} | {
    "train.epochs": 800,
    "optim.lr": 5e-4,
    "optim.min_lr": 1e-5,
    "optim.warmup_fraction": 10 / 800,
    "optim.clip_grad": None,  # the code's default is 3; 0 also in the author's run without crops (dino issue 122)
    "backbone.name": "vit_small_patch16_224",
    "objective.norm_last_layer": False,
    "objective.warmup_teacher_temp_fraction": 30 / 800,
    "objective.freeze_last_layer_fraction": 1 / 800,
}
DINO_ABSENT = (
    ("positions of local crops", "bicubic without antialias, scale + 0.1", "bicubic, antialiased (timm's)"),
    ("precision", "fp32 or fp16, by model", "bf16"),
)
BEIT: Values = {
    "train.epochs": 800,
    "train.batch_size": 2048,
    "optim.lr": 1.5e-3,
    "optim.lr_rule": "absolute",
    "optim.min_lr": 1e-5,
    "optim.warmup_fraction": 10 / 800,
    "optim.betas": [0.9, 0.999],  # the paper and the code; 0.98 in another version of the code
    "optim.weight_decay": 0.05,
    "optim.no_weight_decay": "1d+tokens",
    "optim.clip_grad": 3.0,
    "data.mean": [0.485, 0.456, 0.406],  # --imagenet_default_mean_and_std in the command for ImageNet-1k (unilm/beit)
    "views.augmentation": "crop+flip",
    "views.scale": [0.08, 1.0],
    "views.interpolation": "bicubic",
    "backbone.name": "vit_base_patch16_224",
    "backbone.init_values": 0.1,
    "backbone.drop_path_rate": 0.1,
    "backbone.rescale_residual": True,
    "objective.mask": "blocks",
    "objective.mask_ratio": 75 / 196,
    "objective.encoder_input": "mask_token",
    "objective.target": "tokenizer",
    "objective.vocab_size": 8192,
    "objective.decoder_depth": 0,
}
MASK_TOKEN = ("mask token", "has weight decay", "has none")
BEIT_ABSENT = (
    ("tokenizer", "DALL-E's discrete VAE", "k-means, or a run of the recipe tokenizer (objective.tokenizer)"),
    ("masks", "may stop short of the stated number of patches", "always the stated number"),
    ("colour jitter", "0.4", "none"),
    MASK_TOKEN,
    ("positions", "relative, shared by all blocks (a plain timm ViT holds none), without absolute ones", "learned"),
    CUT_NORMAL,
)
SIMMIM: Values = {
    "train.epochs": 800,
    "train.batch_size": 2048,
    "optim.lr": 1e-4,
    "optim.lr_rule": "B/512",
    "optim.warmup_fraction": 10 / 800,
    "optim.betas": [0.9, 0.999],
    "optim.weight_decay": 0.05,
    "optim.no_weight_decay": "1d+tokens",
    "optim.clip_grad": 5.0,
    "views.augmentation": "crop+flip",
    "views.scale": [0.67, 1.0],
    "views.interpolation": "bilinear",
    "backbone.name": "vit_base_patch16_224",
    "backbone.init_values": 0.1,
    "backbone.drop_path_rate": 0.1,
    "backbone.rescale_residual": True,
    "objective.mask": "random",
    "objective.mask_ratio": 0.6,
    "objective.encoder_input": "mask_token",
    "objective.target": "pixels",
    "objective.norm_pix_loss": False,
    "objective.loss": "l1",
    "objective.decoder_depth": 0,
}
SIMMIM_ABSENT = (
    ("masked unit", "32 px, 2x2 patches", "single patches"),
    MASK_TOKEN,
    ("schedule", "a tenth of the rate from epoch 700 on", "a cosine to that tenth"),
    ("positions", "relative, shared by all blocks (a plain timm ViT holds none), without absolute ones", "absolute"),
    CUT_NORMAL,
)
DEIT: Values = {
    "train.epochs": 300,
    "train.batch_size": 1024,
    "optim.lr": 5e-4,
    "optim.lr_rule": "B/512",
    "optim.min_lr": 1e-5,
    "optim.warmup_fraction": 5 / 300,
    "optim.betas": [0.9, 0.999],
    "optim.weight_decay": 0.05,
    "optim.no_weight_decay": "1d+tokens",
    "optim.clip_grad": None,
    "views.augmentation": "rand-augment",
    "views.magnitude": 9.0,
    "views.repeats": 3,
    "views.scale": [0.08, 1.0],
    "views.interpolation": "bicubic",
    "backbone.weight_init": "trunc_normal",
    "backbone.drop_path_rate": 0.1,
    "objective.loss": "ce",
    "objective.smoothing": 0.1,
    "objective.mixup": 0.8,
    "objective.cutmix": 1.0,
    "objective.mixup_mode": "batch",
    "objective.mixup_prob": 1.0,
    "objective.reprob": 0.25,
    "objective.global_pool": "token",
}
DISTILLED: Values = {"objective.distillation_type": "hard", "objective.distillation_alpha": 0.5}
BY_REGNET = DISTILLED | {"objective.teacher": "regnety_160.deit_in1k"}
DEIT_ABSENT = (
    ("head at the start", "normal, of std 0.02", "0"),
    MIXED_IN_REVERSE,
    ("average of the weights", "of decay 0.99996, evaluated too", "off; objective.model_ema_decay exports it instead"),
)
BASELINE: Values = {
    "train.epochs": 90,
    "train.batch_size": 1024,
    "optim.lr": 1e-3,
    "optim.lr_rule": "absolute",
    "optim.warmup_fraction": 10_000 / 112_603,
    "optim.weight_decay": 0.1,
    "optim.clip_grad": 1.0,
    "views.augmentation": "rand-augment",
    "views.magnitude": 10.0,
    "views.scale": [0.05, 1.0],  # inception_crop's default in big_vision's pp/ops_image.py
    "views.interpolation": "bilinear",
    "backbone.name": "vit_small_patch16_224",
    "backbone.pos_embed": "sincos",
    "objective.mixup": 0.2,
    "objective.mixup_mode": "batch",
    "objective.smoothing": 0.0,
    "objective.global_pool": "avg",
    "objective.representation_size": 384,  # rep_size=True: the model's width
    "backbone.weight_init": "xavier",
}
BASELINE_ABSENT = (
    ("RandAugment", "big_vision's (2, 10)", "timm's, each operation with probability 0.5"),
    ("positions", "frequencies divided by n - 1, other order of channels", "MAE's"),
    ("class token", "none", "one that is not read"),
    ("patch embedding at the start", "LeCun's normal distribution", "Xavier's uniform one"),
    ("mixing partner", "the row before", "row r with row r xor 1"),
    *TENSORFLOW_CROP,
)
VIT: Values = {
    "train.epochs": 300,
    "train.batch_size": 4096,
    "optim.lr": 3e-3,
    "optim.lr_rule": "absolute",
    "optim.warmup_fraction": 10_000 / 93_836,
    "optim.betas": [0.9, 0.999],
    "optim.weight_decay": 0.3,
    "optim.clip_grad": 1.0,
    "views.augmentation": "crop+flip",
    "backbone.drop_path_rate": 0.0,
    "objective.smoothing": 0.0,
    "objective.mixup": 0.0,
    "objective.global_pool": "token",
    "backbone.weight_init": "xavier",
}
DROPOUT = ("dropout", "0.1", "none: its draws would come from the global generator")
VIT_ABSENT = (
    DROPOUT,
    ("patch embedding at the start", "LeCun's normal distribution", "Xavier's uniform one"),
    ("class token at the start", "0", "normal, of std 0.02"),
    *TENSORFLOW_CROP,
)
# table 4 and appendix B.1.1; the rate (one of four in the paper), warm-up, crops and dropout are those of vit_jax
VIT_FINETUNE: Values = {
    "train.steps": 20_000,
    "train.batch_size": 512,
    "optim.name": "sgd",
    "optim.momentum": 0.9,
    "optim.lr": 0.03,
    "optim.lr_rule": "absolute",
    "optim.min_lr": 0.0,
    "optim.warmup_fraction": 500 / 20_000,
    "optim.weight_decay": 0.0,
    "optim.layer_decay": 1.0,
    "optim.clip_grad": 1.0,
    "optim.clip_mode": "global",
    "data.img_size": 384,
    "data.mean": [0.5, 0.5, 0.5],
    "data.std": [0.5, 0.5, 0.5],
    "views.augmentation": "crop+flip",
    "views.scale": [0.05, 1.0],
    "views.interpolation": "bilinear",
    "backbone.name": "vit_base_patch16_224",
    "backbone.drop_path_rate": 0.0,
    "objective.loss": "ce",
    "objective.smoothing": 0.0,
    "objective.mixup": 0.0,
    "objective.global_pool": "token",
    "objective.representation_size": None,
    "objective.model_ema_decay": None,  # 0.9999 in table 2, at 512 px; none in table 5, whose number the recipe states
}
VIT_FINETUNE_ABSENT = (
    ("positions at another resolution", "interpolated linearly", "bicubic, antialiased (timm's)"),
    ("momentum", "stored in bf16", "stored in fp32"),
    ("evaluation view", "the whole image, made square", "the centre, after the short side is resized"),
    *TENSORFLOW_CROP,
)
TOKENIZER: Values = {
    "train.epochs": 100,
    "train.batch_size": 512,
    "optim.lr": 2e-4,  # the default of run_vqkd_training.py, 5e-5, times the batch of 8·64 / 128
    "optim.lr_rule": "absolute",
    "optim.min_lr": 1e-5,
    "optim.warmup_fraction": 0.1,
    "optim.betas": [0.9, 0.99],  # the command of beit2/TOKENIZER.md
    "optim.weight_decay": 1e-4,
    "optim.no_weight_decay": "1d+tokens",
    "optim.clip_grad": None,
    "views.augmentation": "crop+flip",
    "views.scale": [0.08, 1.0],
    "views.interpolation": "bicubic",
    "backbone.name": "vit_base_patch16_224",
    "backbone.rescale_residual": True,
    "objective.vocab_size": 8192,
    "objective.code_dim": 32,
    "objective.code_decay": 0.99,
    "objective.commitment": 1.0,
    "objective.revive_after": None,
    # beit2/TOKENIZER.md has two: DINO and one block, CLIP and three
    "objective.teacher": "vit_base_patch16_224.dino",
    "objective.decoder_depth": 1,
    "objective.decoder_embed_dim": 768,
    "objective.decoder_num_heads": 12,
}
LDAE: Values = {  # what the paper says of its noise and loss (sections 3 and 4, table 2); it has no official code
    "objective.mask": "none",
    "objective.corruption": "gaussian",
    "objective.noise_sigma": [0.0, math.sqrt(2)],
    "objective.noise_pca_dim": 32,
    "objective.target": "pixels",
    "objective.norm_pix_loss": False,
    "objective.loss": "mse",
    "objective.loss_weighting": "noise_level",
}
OFF = "for photos of 224 px; on the digits it hurt (docs/log.md)"
OF_RGB = "for photos of 224 px; not tried on the digits"
RATE = "a small model bears a larger rate, and a short run needs it"
CONTROL = small(
    {
        "optim.lr": RATE,
        "optim.lr_rule": RATE,
        "optim.min_lr": "0 at the end of a short run",
        **{f"views.{key}": OF_RGB for key in ("augmentation", "repeats")},
        **{f"objective.{key}": OF_RGB for key in ("mixup_mode", "reprob")},
        **{f"objective.{key}": OFF for key in ("mixup", "cutmix")},
        "backbone.drop_path_rate": OFF,
    },
    "backbone.name",
)


def models(values: Values, *names: str) -> list[Values]:
    """The same values for several models."""
    return [values | {"backbone.name": name} for name in names]


MAE_B, MAE_L, MAE_H = models(MAE, "vit_base_patch16_224", "vit_large_patch16_224", "vit_huge_patch14_224")
RECIPES: dict[str, Entry] = {
    "imagenet/mae-vit-b": Entry(MAE_B),
    "imagenet/mae-vit-l": Entry(MAE_L),
    "imagenet/mae-vit-h": Entry(MAE_H),
    "imagenet/mae-finetune-vit-b": Entry(FINETUNE, absent=FINETUNE_ABSENT),
    **{
        f"imagenet/mae-finetune-vit-{size}": Entry(
            FINETUNE
            | {
                "train.epochs": 50,
                "optim.lr": 1e-3,
                "optim.warmup_fraction": 5 / 50,
                "optim.layer_decay": 0.75,
                "backbone.name": name,
                "backbone.drop_path_rate": rate,
            },
            absent=FINETUNE_ABSENT,
        )
        for size, name, rate in (("l", "vit_large_patch16_224", 0.2), ("h", "vit_huge_patch14_224", 0.3))
    },
    "imagenet/dino-vit-s16": Entry(DINO_S, absent=DINO_ABSENT),
    "imagenet/dino-vit-b16": Entry(DINO, absent=DINO_ABSENT),
    "imagenet/beit-vit-b": Entry(BEIT, {"objective.target": "until objective.tokenizer=RUN is given"}, BEIT_ABSENT),
    "imagenet/tokenizer-vqkd-vit-b": Entry(
        TOKENIZER,
        absent=(
            ("decoder", "class token, learned positions, two layers of head", "sine-cosine, one layer"),
            ("decoder at the start", "normal of std 0.02, residuals rescaled", "Xavier's uniform distribution"),
            ("projection to codes", "normal of std 0.02, in fp32", "torch's start, in the precision of training"),
            ("targets of CLIP", "its tokens, projected to 512 values", "its tokens of 768 values"),
        ),
    ),
    "imagenet/simmim-vit-b": Entry(SIMMIM, absent=SIMMIM_ABSENT),
    **{
        f"imagenet/deit-{size}": Entry(values, absent=DEIT_ABSENT)
        for size, values in zip(
            ("ti", "s", "b"), models(DEIT, *(f"vit_{n}_patch16_224" for n in ("tiny", "small", "base"))), strict=True
        )
    },
    **{
        f"imagenet/deit-{size}-distilled": Entry(values, absent=DEIT_ABSENT)
        for size, values in zip(
            ("ti", "s", "b"),
            models(DEIT | BY_REGNET, *(f"deit_{n}_distilled_patch16_224" for n in ("tiny", "small", "base"))),
            strict=True,
        )
    },
    "imagenet/vit-s16-baseline": Entry(
        BASELINE,
        {"objective.representation_size": "so that the exported model keeps its classifier, which is what is reported"},
        BASELINE_ABSENT,
    ),
    **{
        f"imagenet/vit-{size}": Entry(values, absent=VIT_ABSENT)
        for size, values in zip(
            ("b16", "l16", "h14"),
            (
                VIT | {"backbone.name": f"vit_{name}_224", "objective.representation_size": width}
                for name, width in (("base_patch16", 768), ("large_patch16", 1024), ("huge_patch14", 1280))
            ),
            strict=True,
        )
    },
    "imagenet/vit-finetune-b16": Entry(VIT_FINETUNE, absent=VIT_FINETUNE_ABSENT),
    "imagenet/vit-finetune-l16": Entry(
        VIT_FINETUNE | {"backbone.name": "vit_large_patch16_224"}, absent=(DROPOUT, *VIT_FINETUNE_ABSENT)
    ),
    "mae": Entry(
        MAE,
        small(
            {
                "optim.lr": RATE,
                **{f"objective.decoder_{key}": "for a small encoder" for key in ("depth", "embed_dim", "num_heads")},
            },
            "backbone.weight_init",
        ),
    ),
    "simmim": Entry(
        SIMMIM,
        small(
            {
                "optim.lr": RATE,
                "optim.lr_rule": RATE,
                "optim.clip_grad": "gradients stay small here",
                "backbone.init_values": "for deeper models",
                "backbone.drop_path_rate": "for larger models",
                "backbone.rescale_residual": "for deeper models",
            },
            "views.interpolation",
            "backbone.weight_init",
        ),
        (*SIMMIM_ABSENT[:-1], XAVIER),
    ),
    "beit": Entry(
        BEIT,
        small(
            {
                "optim.min_lr": "0 at the end of a short run",
                "optim.betas": "those of another version of the code",
                "data.mean": "the images' own",
                "backbone.init_values": "for deeper models",
                "backbone.drop_path_rate": "for larger models",
                "backbone.rescale_residual": "for deeper models",
                "objective.mask_ratio": "the paper's round number",
                "objective.target": "unless objective.tokenizer=RUN is given",
                "objective.vocab_size": "for small patches",
            },
            "backbone.weight_init",
        ),
        (*BEIT_ABSENT[:-1], XAVIER),
    ),
    "dino": Entry(
        DINO_S,
        small(
            {
                "optim.lr": RATE,
                "optim.min_lr": "the code's default",
                "optim.clip_grad": "the code's default",
                "views.augmentation": "the digits are grey",
                "backbone.drop_path_rate": "for larger models",
                "objective.out_dim": "1,437 images do not fill 65,536 prototypes",
                "objective.hidden_dim": "for a small encoder",
                "objective.bottleneck_dim": "for a small encoder",
                "objective.norm_last_layer": "steadier",
                "objective.use_bn_in_head": "without it no run learnt (docs/log.md)",
                "objective.teacher_temp": "constant: steadier",
                "objective.warmup_teacher_temp_fraction": "there is no warm-up",
                "objective.momentum_teacher": "a short run needs a faster teacher",
                "objective.freeze_last_layer_fraction": "one epoch of 100",
                "objective.local_crops_number": "of 8x8 images",
                "objective.local_crops_size": "3/7 of the image",
                "objective.local_crops_scale": "of 8x8 images",
            }
        ),
        DINO_ABSENT[:1],
    ),
    "gaussian": Entry(
        LDAE,
        {
            "objective.noise_pca_dim": "noise on every pixel is the plain case; 16 is an arm of the studies",
            "objective.loss_weighting": "all noise levels count alike, as in the studies; noise_level is a setting",
        },
        (
            ("error outside of the noisy components", "counts 0.1 (equation 4)", "counts 1"),
            ("noise level", "conditions the network (appendix A)", "is not told"),
        ),
    ),
    "supervised": Entry(DEIT, CONTROL, DEIT_ABSENT),
    "deit": Entry(DEIT | DISTILLED, CONTROL, DEIT_ABSENT),
}


def departures(name: str) -> dict[str, tuple[Any, Any]]:
    """{key: (value here, value there)} of the settings in which a recipe differs from its official values."""
    recipe = objectives.read_recipe(name, [], None)
    here = {key: getattr(getattr(recipe, key.split(".")[0]), key.split(".")[1]) for key in RECIPES[name].official}
    return {key: (here[key], there) for key, there in RECIPES[name].official.items() if not same(here[key], there)}


def same(here: Any, there: Any) -> bool:
    """Whether two values are equal; numbers to one part in 200."""
    if isinstance(here, list) and isinstance(there, list):
        return len(here) == len(there) and all(map(same, here, there))
    if isinstance(here, int | float) and isinstance(there, int | float) and not isinstance(here, bool):
        return math.isclose(here, there, rel_tol=5e-3)
    return bool(here == there)


def page() -> str:
    """The page docs/fidelity.md."""
    lines = [
        "# Fidelity: the recipes and the published code",
        "",
        "Written from the code by `python docs/generate/fidelity.py > docs/fidelity.md`. For the recipes of",
        "`imagenet/` and for mae, simmim, beit, dino, gaussian, supervised and deit: what differs from the values of",
        "the paper and its official code, and why; how many settings were compared; and what else differs. The other",
        "recipes state their departures in their files. Recipes with the same table share it. A test fails when a",
        "recipe departs from a stored value and its table does not say so. All recipes compute in bf16 on GPUs made",
        "for it (`train.precision=auto`), whatever precision the published code used.",
    ]
    alike: dict[tuple[str, ...], list[str]] = {}  # recipes by their table
    for name in RECIPES:
        alike.setdefault(tuple(table(name)), []).append(name)
    for rows, names in alike.items():
        lines += ["", f"## {', '.join(names)}", "", f"{counted(names)}."]
        if rows:
            lines += ["", "| setting | here | published | reason |", "|---|---|---|---|", *rows]
    return "\n".join(lines) + "\n"


def table(name: str) -> list[str]:
    """The rows of a recipe: its departures, and what else differs."""
    entry, rows = RECIPES[name], []
    for key, (here, there) in departures(name).items():
        there = float(f"{there:.4g}") if isinstance(there, float) else there
        rows.append(f"| `{key}` | {write(here)} | {write(there)} | {entry.reasons.get(key, '**unsaid**')} |")
    return rows + [f"| {what} | {here} | {there} | not compared as a setting |" for what, there, here in entry.absent]


def counted(names: list[str]) -> str:
    """How many settings of these recipes are as published; with the recipes' names where that differs."""
    found: dict[str, list[str]] = {}
    for name in names:
        compared = len(RECIPES[name].official)
        found.setdefault(f"{compared - len(departures(name))} of {compared}", []).append(name)
    (first, some), *others = found.items()
    said = f"{first} compared settings are as published"
    return "; ".join([f"{said} in {listed(some)}", *(f"{n} in {listed(of)}" for n, of in others)]) if others else said


if __name__ == "__main__":
    print(page(), end="")
