"""The features that evaluators see against timm's own `forward_features`, for its families of models.

`python tests/test_conformance.py [MODULE …]` measures one model of each of timm's modules and prints the table of
docs/conformance.md.
"""

import sys

import pytest
import timm
import torch

from eval.measure.features import Source, pool
from ssl_vit import backbones
from ssl_vit import recipe as recipes
from ssl_vit.errors import UserError

SMALL = dict(embed_dim=48, depth=2, num_heads=2)
# model, what makes it small, layout of its forward_features: NCHW, NHWC, or the number of prefix tokens
FAMILIES = [
    ("vit_small_patch14_reg4_dinov2", dict(img_size=56, **SMALL), 5),
    ("vit_so150m2_patch16_reg1_gap_256", dict(img_size=32, **SMALL), 1),
    ("deit_tiny_distilled_patch16_224", dict(img_size=32, **SMALL), 2),
    ("vit_small_patch16_dinov3", dict(img_size=32, **SMALL | dict(embed_dim=64)), 5),
    ("eva02_tiny_patch14_224", dict(img_size=28, **SMALL), 1),
    ("beit_base_patch16_224", dict(img_size=32, **SMALL), 1),
    ("vit_relpos_base_patch16_224", dict(img_size=32, **SMALL), 0),
    ("cait_xxs24_224", dict(img_size=32, **SMALL), 1),
    ("xcit_nano_12_p16_224", dict(img_size=32, **SMALL), 1),
    ("swin_tiny_patch4_window7_224", dict(img_size=64, window_size=4, embed_dim=24, depths=(1, 1, 1, 1)), "NHWC"),
    ("mvitv2_tiny", dict(img_size=64), 0),
    ("twins_svt_small", dict(img_size=64), 0),
    ("maxvit_pico_rw_256", dict(img_size=64), "NCHW"),
    ("resnetv2_50x1_bit", dict(), "NCHW"),
]


def perturb(model: torch.nn.Module) -> None:
    """Make every norm, bias and token matter, so that one which is left out shows."""
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1 or "token" in name or "norm" in name:
                p.add_(0.3 * torch.randn(p.shape, generator=random))


def expected(model: torch.nn.Module, images: torch.Tensor, layout: str | int) -> dict[str, torch.Tensor]:
    """Features by pooling, from forward_features and what is known of the model's layout."""
    found = model.forward_features(images)
    if layout == "NCHW":
        return dict(mean=found.mean((2, 3)))
    if layout == "NHWC":
        return dict(mean=found.mean((1, 2)))
    has_class = layout > 0 and "reg1_gap" not in model.pretrained_cfg["architecture"]
    mean = dict(mean=found[:, layout:].mean(1))
    return mean | dict(cls=found[:, 0]) if has_class else mean


def agree(backbone: backbones.Backbone, layout: str | int, count: int = 2) -> float:
    """The largest difference of the last block's features, pooled as evaluators do, relative to timm's own maximum."""
    size = backbone.input_size
    images = torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(2))
    source = Source("x", None, {}, backbone, size)
    with torch.no_grad():
        want = expected(backbone.model, (images - backbone.mean) / backbone.std, layout)
        found = pool(source, images, [backbone.depth - 1])
        together = pool(source, images, [0, backbone.depth - 1])  # an earlier block asked for beside it
    assert {pooling for _, pooling in found} == want.keys()
    worst = 0.0
    for (block, pooling), value in found.items():
        assert torch.equal(together[block, pooling], value)
        worst = max(worst, ((value - want[pooling]).abs().max() / want[pooling].abs().max()).item())
    return worst


@pytest.mark.parametrize(("name", "args", "layout"), FAMILIES, ids=[name for name, _, _ in FAMILIES])
def test_the_last_block_s_features_are_timm_s_own(name, args, layout):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0, **args)
    perturb(model)
    model.pretrained_cfg = model.pretrained_cfg | dict(input_size=(3, *[args.get("img_size", 64)] * 2))
    backbone = backbones.wrap(model, [0.5, 0.45, 0.4], [0.25, 0.2, 0.3], args).eval()
    assert agree(backbone, layout) < 1e-5


OTHER = 64  # pixels: a size that few of these models were made for
# timm's module, its smallest model, layout of forward_features at the model's own size (as above, or refused), and what
# is expected at 64x64
MODULES = [
    line.split()
    for line in """
beit                       beit_base_patch16_224          1        agrees
byoanet                    eca_botnext26ts_256            NCHW     agrees
byobnet                    test_byobnet                   NCHW     agrees
cait                       cait_xxs24_224                 1        agrees
coat                       coat_tiny                      refused  refused
convit                     convit_tiny                    1        agrees
convmixer                  convmixer_768_32               NCHW     agrees
convnext                   test_convnext                  NCHW     agrees
cpubone                    cpubone_nano                   NCHW     agrees
crossvit                   crossvit_tiny_240              refused  refused
csatv2                     csatv2_21m                     NCHW     agrees
cspnet                     cs3darknet_focus_s             NCHW     agrees
cspnext                    cspnext_tiny                   NCHW     agrees
davit                      davit_tiny                     NCHW     agrees
deepseek_vit               deepseek_vit_412m              NHWC     refused
deit                       deit_tiny_patch16_224          1        agrees
densenet                   densenet121                    NCHW     agrees
dla                        dla102x                        NCHW     agrees
dpn                        dpn107                         NCHW     agrees
edgenext                   edgenext_xx_small              NCHW     agrees
efficientformer            efficientformer_l1             0        refused
efficientformer_v2         efficientformerv2_s0           NCHW     agrees
efficientnet               test_efficientnet              NCHW     agrees
efficientvim               efficientvim_m1                refused  refused
efficientvit_mit           efficientvit_b0                NCHW     agrees
efficientvit_msra          efficientvit_m0                NCHW     agrees
eva                        vit_tiny_patch16_dinov3_qkvb   5        agrees
fasternet                  fasternet_t0                   NCHW     agrees
fastvit                    fastvit_t8                     NCHW     agrees
focalnet                   focalnet_tiny_srf              NCHW     agrees
gcvit                      gcvit_xxtiny                   NCHW     agrees
gemma4_vit                 gemma4_vit_167m                0        agrees
ghostnet                   ghostnet_050                   NCHW     agrees
hardcorenas                hardcorenas_b                  NCHW     agrees
hgnet                      hgnetv2_b0                     NCHW     agrees
hiera                      hiera_tiny_224                 0        agrees
hieradet_sam2              sam2_hiera_tiny                NHWC     agrees
hrnet                      hrnet_w18_small                NCHW     agrees
iformer                    iformer_t                      NCHW     agrees
inception_next             inception_next_atto            NCHW     agrees
inception_resnet_v2        inception_resnet_v2            NCHW     refused
inception_v3               inception_v3                   NCHW     refused
inception_v4               inception_v4                   NCHW     refused
lcnetv2                    lcnetv2_small                  NCHW     agrees
levit                      levit_128s                     0        agrees
lowformer                  lowformer_b0                   NCHW     agrees
mambaout                   test_mambaout                  NHWC     agrees
maxxvit                    test_coatnet                   NCHW     agrees
metaformer                 poolformerv2_s12               NCHW     agrees
mlp_mixer                  gmlp_ti16_224                  0        agrees
mobilenetv3                lcnet_035                      NCHW     agrees
mobilenetv5                mobilenetv5_300m               NCHW     agrees
mobilevit                  mobilevit_xxs                  NCHW     agrees
mvitv2                     mvitv2_tiny                    0        agrees
naflexvit                  naflexvit_base_patch16_siglip  0        agrees
nasnet                     nasnetalarge                   NCHW     agrees
nest                       nest_tiny                      NCHW     agrees
nextvit                    nextvit_small                  NCHW     agrees
nfnet                      test_nfnet                     NCHW     agrees
pit                        pit_ti_224                     refused  refused
pnasnet                    pnasnet5large                  NCHW     agrees
pvt_v2                     pvt_v2_b0                      NCHW     agrees
qwen3_vit                  qwen3_vit_88m_merge            refused        refused
rdnet                      rdnet_tiny                     NCHW     agrees
regnet                     regnetx_002                    NCHW     agrees
repghost                   repghostnet_050                NCHW     agrees
repvit                     repvit_m1                      NCHW     agrees
res2net                    res2net50_14w_8s               NCHW     agrees
resnest                    resnest50d_1s4x24d             NCHW     agrees
resnet                     test_resnet                    NCHW     agrees
resnetv2                   resnetv2_18                    NCHW     agrees
rexnet                     rexnet_100                     NCHW     agrees
selecsls                   selecsls42                     NCHW     agrees
senet                      legacy_seresnet18              NCHW     agrees
sequencer                  sequencer2d_s                  NHWC     agrees
shvit                      shvit_s1                       NCHW     agrees
sknet                      skresnet18                     NCHW     agrees
starnet                    starnet_s050                   NCHW     agrees
swiftformer                swiftformer_xs                 NCHW     agrees
swin_transformer           swin_tiny_patch4_window7_224   NHWC     refused
swin_transformer_v2        swinv2_tiny_window8_256        NHWC     agrees
swin_transformer_v2_cr     swinv2_cr_tiny_224             NCHW     agrees
tiny_vit                   tiny_vit_5m_224                NCHW     agrees
tnt                        tnt_s_legacy_patch16_224       1        agrees
tresnet                    tresnet_m                      NCHW     agrees
twins                      twins_svt_small                0        agrees
vgg                        vgg11                          NCHW     agrees
visformer                  visformer_tiny                 NCHW     agrees
vision_transformer         test_vit                       1        agrees
vision_transformer_hybrid  vit_tiny_r_s16_p8_224          1        agrees
vision_transformer_relpos  test_vit_relpos                0        agrees
vision_transformer_sam     samvit_base_patch16_224        NCHW     agrees
vitamin                    vitamin_small_224              0        agrees
volo                       volo_d1_224                    1        agrees
vovnet                     ese_vovnet19b_slim_dw          NCHW     agrees
xception                   legacy_xception                NCHW     agrees
xception_aligned           xception41p                    NCHW     agrees
xcit                       xcit_nano_12_p8_224            1        agrees
""".strip().splitlines()
]


def measure(name: str, size: int, layout: str) -> float:
    """What `agree` says of a new model for images of this size, every norm and bias of it perturbed.

    Raises UserError if the model is refused.
    """
    config = recipes.Backbone(name=name, patch_size=16)
    data = recipes.Data(img_size=size, in_chans=3, mean=[0.5, 0.45, 0.4], std=[0.25, 0.2, 0.3])
    backbone = backbones.build(config, data, seed=0).eval()
    perturb(backbone.model)
    return agree(backbone, int(layout) if layout.isdigit() else layout, count=1)


def sizes(module: str, name: str) -> list[int]:
    """The model's own size and the other; of models of 100 M parameters on large images the other alone."""
    heavy = module in ("deepseek_vit", "gemma4_vit", "mobilenetv5", "qwen3_vit")
    return [OTHER] if heavy else [timm.get_pretrained_cfg(name).input_size[1], OTHER]


@pytest.mark.matrix
@pytest.mark.parametrize(("module", "name", "own", "other"), MODULES, ids=[name for _, name, _, _ in MODULES])
def test_every_module_of_timm_agrees_or_is_refused(module, name, own, other):
    assert timm.models.is_model_in_modules(name, [module])
    for size in sizes(module, name):
        if (other if size == OTHER else own) == "refused":
            with pytest.raises(
                UserError, match=f"{name} .*: (use|set data.img_size=.*, or use) (another model|backbone.name=swin)"
            ):
                measure(name, size, own)
        else:
            assert measure(name, size, own) < 1e-5


@pytest.mark.matrix
def test_every_module_of_timm_is_in_the_table():
    entrypoints = [timm.model_entrypoint(name).__module__ for name in timm.list_models()]
    timms_own = {module.removeprefix("timm.models.") for module in entrypoints if module.startswith("timm.models.")}
    assert {module for module, _, _, _ in MODULES} == timms_own


def print_table(modules: list[str]) -> None:
    """One row for each of these modules, or of all: the largest relative difference, or that the model is refused."""
    print(f"| timm's module | model | `forward_features` | own size | difference | difference at {OTHER}x{OTHER} |")
    print("|---|---|---|---|---|---|")
    for module, name, own, _ in MODULES:
        if modules and module not in modules:
            continue
        found = {}
        for size in sizes(module, name):
            try:
                found[size] = f"{measure(name, size, own):.1g}"
            except UserError:
                found[size] = "refused"
        size = timm.get_pretrained_cfg(name).input_size[1]
        words = {"refused": "no map of patches", "0": "tokens", "1": "1 prefix token, tokens"}
        layout = words.get(own, f"{own} prefix tokens, tokens" if own.isdigit() else own)
        print(
            f"| {module} | {name} | {layout} | {size} | {found.get(size, 'not measured')} | {found[OTHER]} |",
            flush=True,
        )


if __name__ == "__main__":
    print_table(sys.argv[1:])
