"""Calls what has shapes for types, with every one of them checked. Prints {call: the parameter or return value that was
refused, or null} as JSON. A script of its own, since modules are checked only if they are imported so.
"""

import builtins
import json
import re

import jaxtyping
import numpy as np
import torch

CHECKED = [
    *("ssl_vit.losses", "ssl_vit.patches", "ssl_vit.views", "ssl_vit.neighbours", "ssl_vit.corruption"),
    *("ssl_vit.targets", "ssl_vit.backbones.base", "ssl_vit.backbones.vit"),
]
for kind in ("Bool", "Float", "Int", "Shaped", "UInt8"):  # which those modules import for type checkers alone
    setattr(builtins, kind, getattr(jaxtyping, kind))
# an int will do for a float, as Python's typing has it
with jaxtyping.install_import_hook(CHECKED, "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"):
    from conftest import SMALL, make_batch, small_objective

    from ssl_vit import backbones, corruption, losses, neighbours, patches, targets, views
    from ssl_vit import recipe as recipes
    from ssl_vit.randomness import Draw

MORE = {
    "causal": ["mae", "objective.mask=causal", "objective.encoder_input=corrupted"],
    "prefix": ["mae", "objective.mask=prefix", "objective.encoder_input=corrupted"],
    "features": ["mae", "objective.target=features"],
    "shuffle": ["gaussian", "objective.corruption=shuffle", "objective.mask=random"],
    "blur": ["gaussian", "objective.corruption=blur"],
    "l-DAE": ["gaussian", "objective.noise_pca_dim=4", "objective.loss_weighting=noise_level"],
    "mixed": ["supervised", "objective.mixup=0.8", "objective.cutmix=1", "objective.patch_drop_rate=0.5"],
}
ROWS = torch.arange(4)
draw, photo = Draw(0, 0, ROWS), torch.zeros(3, 40, 30, dtype=torch.uint8)


def train(name, *settings):
    objective = small_objective(name, *settings)
    objective(make_batch(objective, ROWS))["loss"].backward()
    objective.eval().show(torch.rand(4, 3, 16, 16), draw)
    objective.encoder_inputs(torch.rand(4, 3, 16, 16), draw)


def read(name):
    config = recipes.Backbone(name=name, patch_size=8)
    data = recipes.Data(img_size=[64, 32], in_chans=3, mean=[0.5] * 3, std=[0.5] * 3)
    backbone = backbones.build(config, data, seed=0).eval()
    backbone.features(torch.rand(2, 3, 64, 32), range(backbone.depth))
    backbone.add_classifier(5)
    backbone.classify(torch.rand(2, 3, 64, 32))


def see(spec):
    views.augment(spec, torch.zeros(4, 3, 40, 30, dtype=torch.uint8), step=0)
    crop = views.crop_photos(spec, draw)
    crops = [crop(i, photo) for i in range(len(ROWS))]
    views.finish(spec, {name: torch.stack([crop[name] for crop in crops]) for name in spec}, draw)


size = (16, 24)
features, labels = np.random.default_rng(0).normal(size=(30, 8)), np.arange(30) % 3
order, tokens, logits = torch.arange(9).expand(2, -1), torch.zeros(2, 9, dtype=torch.long), torch.zeros(2, 9, 5)
student, images = torch.zeros(4, 3, 6), torch.zeros(2, 3, 16, 16)
RIGHT = {
    **{name: lambda name=name: train(name) for name in SMALL},
    **{name: lambda settings=settings: train(*settings) for name, settings in MORE.items()},
    **{name: lambda name=name: read(name) for name in ("vit_tiny", "resnet10t", "convnext_atto")},
    "none": lambda: see(views.none(size)),
    "three-augment": lambda: see(views.three_augment(size, 0.5)),
    "dino's views": lambda: see(views.dino(size, (8, 8), 3, 0.5)),
    "evaluation": lambda: views.evaluation(size)(torch.zeros(2, 1, 30, 40, dtype=torch.uint8)),
    "k-NN": lambda: neighbours.predict(features, labels, features[:4], k=2),
    "nearest": lambda: neighbours.nearest(*neighbours.prepare(features, features[:4]), 2),
    "MAE's loss": lambda: losses.mae_loss(
        lambda images, mask: losses.pixel_targets(images, (4, 4)), images, torch.ones(2, 16, dtype=torch.bool), (4, 4)
    ),
}
WRONG = {  # call: (what must be refused, the call)
    "an image alone": ("images", lambda: patches.patchify(torch.zeros(3, 8, 8), (4, 4))),
    "patches of another grid": ("patches", lambda: patches.unpatchify(torch.zeros(2, 4, 48), (4, 4), (2, 3))),
    "targets of other patches": ("target", lambda: losses.distance(torch.zeros(2, 9, 4), torch.zeros(2, 8, 4))),
    "a mask of numbers": ("mask", lambda: losses.masked_mean(torch.zeros(2, 9), torch.ones(2, 9), 9)),
    "tokens of fewer patches": ("tokens", lambda: losses.token_loss(logits, tokens[:, :8])),
    "soft tokens": ("tokens", lambda: losses.token_loss(logits, logits.argmax(-1).float())),
    "a teacher of all views": ("teacher", lambda: losses.dino_loss(student, student, torch.zeros(6))),
    "a centre of other prototypes": ("center", lambda: losses.dino_loss(student, student[:2], torch.zeros(5))),
    "views of floats": ("images", lambda: views.augment(views.none(size), torch.zeros(2, 3, 8, 8), step=0)),
    "a view of one image": ("images", lambda: views.evaluation(size)(photo)),
    "labels of fewer images": ("targets", lambda: views.mix(images, torch.zeros(1, 5), draw, 1.0, 0.0)),
    "features of another width": ("queries", lambda: neighbours.predict(features, labels, features[:, :4])),
    "labels of other features": ("labels", lambda: neighbours.predict(features, labels[:9], features)),
    "an order of one image": ("order", lambda: corruption.split(order[0], 3)),
    "a mask of another grid": ("mask", lambda: corruption.mask_pixels(order > 3, (2, 4), (2, 2))),
    "places of fewer images": ("places", lambda: corruption.shuffle(images, (4, 4), order[:1, :3])),
    "an image without channels": ("images", lambda: targets.Pixels((4, 4), 3, False, "mse")(images[:, 0])),
    "an answer of another width": (
        "prediction",
        lambda: targets.Pixels((4, 4), 3, False, "mse").loss(torch.zeros(2, 16, 47), torch.zeros(2, 16, 48)),
    ),
    "features of one image": ("images", lambda: small_objective("mae").backbone.features(images[0])),
    "features of bytes": ("images", lambda: small_objective("mae").backbone.features(images.byte())),
}


def refused(call):
    try:
        call()
    except jaxtyping.TypeCheckError as error:
        parameter = re.search(r"typechecking parameter '(\w+)'", str(error))
        return parameter[1] if parameter else str(error)
    except Exception as error:  # from within: the shape was let through
        return repr(error)
    return None


if __name__ == "__main__":
    torch.manual_seed(0)
    right = {name: refused(call) for name, call in RIGHT.items()}
    print(json.dumps(dict(right=right, wrong={name: [is_, refused(call)] for name, (is_, call) in WRONG.items()})))
