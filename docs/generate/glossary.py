"""Our settings beside the names of the official MAE, DINO and BEiT code and of timm.

    python docs/generate/glossary.py > docs/glossary.md

Where a cell is empty, that code has no such setting, or none that was compared. Names are those of command-line
options and constructor arguments: MAE's main_pretrain.py, main_finetune.py and models_mae.py; DINO's main_dino.py,
DINOHead and DINOLoss; BEiT's run_beit_pretraining.py and modeling_pretrain.py; timm's train.py, VisionTransformer and
create_transform.
"""

THEIRS = {  # our key: (MAE, DINO, BEiT, timm)
    "train.epochs": ("epochs", "epochs", "epochs", "epochs"),
    "train.batch_size": (
        "batch_size × accum_iter × GPUs",
        "batch_size_per_gpu × GPUs",
        "batch_size × GPUs",
        "batch_size × grad_accum_steps × GPUs",
    ),
    "train.seed": ("seed", "seed", "seed", "seed"),
    "train.precision": ("(AMP, always)", "use_fp16", "(AMP, always)", "amp, amp_dtype"),
    "optim.name": ("(AdamW)", "optimizer", "opt", "opt"),
    "optim.momentum": ("", "(0.9)", "momentum", "momentum"),
    "optim.lr": ("lr, or blr with lr_rule B/256", "lr (lr_rule B/256)", "lr", "lr, or lr_base"),
    "optim.lr_rule": ("blr: B/256", "B/256", "", "lr_base_size, lr_base_scale"),
    "optim.min_lr": ("min_lr", "min_lr", "min_lr", "min_lr"),
    "optim.warmup_fraction": ("warmup_epochs / epochs",) * 4,
    "optim.betas": ("(0.9, 0.95)", "", "opt_betas", "opt_betas"),
    "optim.weight_decay": ("weight_decay",) * 4,
    "optim.weight_decay_end": ("", "weight_decay_end", "weight_decay_end", ""),
    "optim.no_weight_decay": ("no_weight_decay_list", "get_params_groups", "no_weight_decay()", "no_weight_decay()"),
    "optim.layer_decay": ("layer_decay", "", "layer_decay", "layer_decay"),
    "optim.clip_grad": ("clip_grad", "clip_grad", "clip_grad", "clip_grad"),
    "optim.clip_mode": ("", "(per parameter)", "", "clip_mode"),
    "data.image_column": ("", "", "", "input_key"),
    "data.label_column": ("", "", "", "target_key"),
    "data.train_split": ("", "", "", "train_split"),
    "data.report_split": ("", "", "", "val_split"),
    "data.img_size": ("input_size", "", "input_size", "img_size"),
    "data.in_chans": ("in_chans", "in_chans", "in_chans", "in_chans"),
    "data.mean": ("", "", "imagenet_default_mean_and_std", "mean"),
    "data.std": ("", "", "imagenet_default_mean_and_std", "std"),
    "data.hflip": ("", "", "", "hflip"),
    "views.magnitude": ("aa: rand-m9-mstd0.5-inc1", "", "aa (fine-tuning)", "aa"),
    "views.repeats": ("", "", "", "aug_repeats"),
    "views.scale": ("([0.2, 1])", "global_crops_scale", "", "scale"),
    "views.interpolation": ("(bicubic)", "(bicubic)", "train_interpolation", "train_interpolation"),
    "backbone.name": ("model", "arch", "model", "model"),
    "backbone.embed_dim": ("embed_dim",) * 4,
    "backbone.depth": ("depth",) * 4,
    "backbone.num_heads": ("num_heads",) * 4,
    "backbone.patch_size": ("patch_size",) * 4,
    "backbone.pos_embed": ("(sincos)", "(learned)", "abs_pos_emb", "pos_embed"),
    "backbone.weight_init": ("", "", "", "weight_init"),
    "backbone.reg_tokens": ("", "", "", "reg_tokens"),
    "backbone.init_values": ("", "", "layer_scale_init_value", "init_values"),
    "backbone.drop_path_rate": ("drop_path", "drop_path_rate", "drop_path", "drop_path_rate"),
    "backbone.init_from": ("finetune", "pretrained_weights", "finetune", "pretrained, pretrained_path"),
    "monitor.log_every": ("", "", "", "log_interval"),
    "runtime.per_device_batch_size": ("batch_size", "batch_size_per_gpu", "batch_size", "batch_size"),
    "runtime.num_workers": ("num_workers", "num_workers", "num_workers", "workers"),
    "runtime.save_every": ("(20 epochs)", "saveckp_freq", "save_ckpt_freq", "recovery_interval"),
    "runtime.compile": ("", "", "", "torchcompile"),
    "runtime.channels_last": ("", "", "", "channels_last"),
    "objective.mask_ratio": ("mask_ratio", "", "num_mask_patches / patches", ""),
    "objective.norm_pix_loss": ("norm_pix_loss", "", "", ""),
    "objective.vocab_size": ("", "", "vocab_size", ""),
    "objective.decoder_depth": ("decoder_depth", "", "", ""),
    "objective.decoder_embed_dim": ("decoder_embed_dim", "", "", ""),
    "objective.decoder_num_heads": ("decoder_num_heads", "", "", ""),
    "objective.out_dim": ("", "out_dim", "", ""),
    "objective.hidden_dim": ("", "hidden_dim", "", ""),
    "objective.bottleneck_dim": ("", "bottleneck_dim", "", ""),
    "objective.norm_last_layer": ("", "norm_last_layer", "", ""),
    "objective.use_bn_in_head": ("", "use_bn_in_head", "", ""),
    "objective.student_temp": ("", "student_temp", "", ""),
    "objective.teacher_temp": ("", "teacher_temp", "", ""),
    "objective.warmup_teacher_temp": ("", "warmup_teacher_temp", "", ""),
    "objective.warmup_teacher_temp_fraction": ("", "warmup_teacher_temp_epochs / epochs", "", ""),
    "objective.momentum_teacher": ("", "momentum_teacher", "", ""),
    "objective.center_momentum": ("", "center_momentum", "", ""),
    "objective.freeze_last_layer_fraction": ("", "freeze_last_layer / epochs", "", ""),
    "objective.local_crops_number": ("", "local_crops_number", "", ""),
    "objective.local_crops_scale": ("", "local_crops_scale", "", ""),
    "objective.smoothing": ("smoothing", "", "smoothing", "smoothing"),
    "objective.mixup": ("mixup", "", "mixup", "mixup"),
    "objective.cutmix": ("cutmix", "", "cutmix", "cutmix"),
    "objective.mixup_mode": ("mixup_mode", "", "mixup_mode", "mixup_mode"),
    "objective.reprob": ("reprob", "", "reprob", "reprob"),
    "objective.teacher": ("", "", "", "kd_model_name"),
    "objective.mixup_prob": ("mixup_prob", "", "mixup_prob", "mixup_prob"),
    "objective.global_pool": ("global_pool", "", "use_mean_pooling", "global_pool"),
    "objective.model_ema_decay": ("", "", "model_ema_decay", "model_ema_decay"),
    "objective.patch_drop_rate": ("", "", "", "patch_drop_rate"),
}

WORDS = {  # of the code and the docs
    "arm": "one way to pre-train in a study: a recipe with settings, and its seeds",
    "backbone": "the network that is pre-trained, exported and evaluated: any timm model with a map of patches",
    "control": "what every result is compared with: random initialisation, raw pixels, training from scratch",
    "corruption": "what is done to an image before it is recovered: noise, blur, shuffled patches; masking is one more",
    "draw": "random numbers as a function of seed, step, stream and row (`ssl_vit/randomness.py`)",
    "held out": "a tenth of the training images that a pre-training did not see, on which settings are chosen",
    "ledger": "a run's images.json: how many images were found and used, and what was left out and why",
    "metric": "a protocol, a pooling, a layer and a fraction of the labels; only equal metrics are compared",
    "objective": "a way to pre-train: heads, targets and loss (`ssl_vit/objectives/`)",
    "plan": "a file in `recipes/study/`: the arms, seeds, budgets and evaluators of a study",
    "pooling": "cls: the class token; mean: the mean of the patches; concat: both; chosen: which is best on train",
    "prefix tokens": "the tokens before those of the patches: class, distillation and register tokens",
    "recipe": "all settings of a run, in one YAML file",
    "report split": "the images whose accuracy is reported; nothing is chosen on them",
    "role": "what an arm is to a verdict, such as masking, noise or scratch",
    "row": "in results.jsonl, one line, which is one measurement; in training, one image of the global batch",
    "run": "a directory with one training and everything measured on it",
    "small build": "an architecture for small images: `backbone.name=swin`, `hybrid`, `cvt`, `resnet18`, `resnet50`",
    "study": "what `eval/study.py` runs: every arm of a plan at every seed, tuned and evaluated",
    "trial": "a short pre-training with one of the settings to choose from, judged on held-out images",
    "verdict": "the answer of a plan with `decides: true`, computed from its rows by a rule that was written before",
    "view": "what one image becomes by augmentation",
}


def markdown() -> str:
    """The text of docs/glossary.md."""
    lines = [
        "# Glossary",
        "",
        "Settings have the names of the papers' code and of timm. In parentheses: values fixed in that code; empty: no",
        "such setting, or none that was compared. Written from the code by",
        "`python docs/generate/glossary.py > docs/glossary.md`.",
        "",
    ]
    lines += ["| ours | MAE | DINO | BEiT | timm |", "|---|---|---|---|---|"]
    lines += [f"| `{ours}` | {' | '.join(theirs)} |" for ours, theirs in THEIRS.items()]
    lines += ["", "## Words", "", "| word | meaning |", "|---|---|"]
    return "\n".join(lines + [f"| {word} | {meaning} |" for word, meaning in WORDS.items()]) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
