"""Weights out: what timm, transformers, onnxruntime and torch.export load gives the outputs of the model, to 1e-5."""

import json
import re
import shutil
import subprocess
import sys

import huggingface_hub
import numpy as np
import onnxruntime
import pytest
import timm
import torch
import transformers
import yaml
from conftest import SMALL
from PIL import Image
from test_loop import TINY, environment

from ssl_vit import backbones, commands, export, model_card, objectives, pretrain, weights
from ssl_vit.checkout import COMMIT
from ssl_vit.errors import UserError
from ssl_vit.weights import graphs

FACTS = ["data.in_chans=3", "data.mean=[0.4, 0.5, 0.6]", "data.std=[0.2, 0.25, 0.3]"]
NAMES = ["cat", "dog", "ant", "é, \"quoted\"", "bee"]  # fmt: skip


def build(*settings, classes=0, pool="token"):
    """A ViT whose every tensor is random, so that none can be exchanged for another unseen."""
    shape = ["backbone.embed_dim=48", "backbone.depth=2", "backbone.num_heads=3", "backbone.patch_size=8"]
    recipe = objectives.read_recipe(
        "mae", [*shape, *FACTS, "data.img_size=32", "backbone.pos_embed=learned", *settings], None
    )
    backbone = backbones.build(recipe.backbone, recipe.data, seed=0)
    if classes:
        backbone.add_classifier(classes, pool)
    generator = torch.Generator().manual_seed(1)
    for name, weight in backbone.model.named_parameters():
        scale = 0.3 if weight.ndim > 1 else 0.5
        weight.data = scale * torch.randn(weight.shape, generator=generator) + ("norm" in name and "weight" in name)
    return backbone.eval()


def images_for(backbone, count=2):
    shape = (count, 3, *backbone.input_size)
    return torch.rand(shape, generator=torch.Generator().manual_seed(2))


def written(backbone, to, tmp_path, **options):
    weights.save(backbone, tmp_path / "weights")
    return export.export(str(tmp_path / "weights"), to, tmp_path / "out", **options)


def names_file(folder):
    (folder / "names.txt").write_text("\n".join(NAMES))
    return folder / "names.txt"


def close(found, expected, tolerance=1e-5):
    found, expected = torch.as_tensor(found), torch.as_tensor(expected)
    assert found.shape == expected.shape
    assert float((found - expected).abs().max() / expected.abs().max()) < tolerance


KINDS = {
    "ViT": ([], 0, "token", "ViTModel"),
    "no class position": (["backbone.name=deit3_small_patch16_224", "backbone.init_values=0.5"], 0, "", "Dinov2Model"),
    "layer scale": (["backbone.init_values=0.5"], 0, "token", "Dinov2Model"),
    "registers": (["backbone.reg_tokens=3", "backbone.init_values=0.5"], 0, "token", "Dinov2WithRegistersModel"),
    "not square": (["data.img_size=[32, 48]"], 0, "token", "ViTModel"),
    "classifier": ([], 5, "token", "ViTForImageClassification"),
    "classifier of means": ([], 5, "avg", "Dinov2ForImageClassification"),
    "registers, means": (["backbone.reg_tokens=3"], 5, "avg", "Dinov2WithRegistersForImageClassification"),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_transformers_gives_the_same_outputs(kind, tmp_path):
    settings, classes, pool, name = KINDS[kind]
    backbone = build(*settings, classes=classes, pool=pool)
    images = images_for(backbone)
    folder = written(backbone, "hf", tmp_path, classes=names_file(tmp_path) if classes else None)
    model, told = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    assert not {k for k in told["missing_keys"] if "pooler" not in k} and not told["unexpected_keys"]
    found = model.eval()(pixel_values=backbone.normalise(images))
    if classes:
        close(found.logits, backbone.model(backbone.normalise(images)))
        assert [model.config.id2label[i] for i in range(classes)] == NAMES
        assert model.config.label2id["dog"] == 1
    else:
        close(found.last_hidden_state, backbone.model.forward_features(backbone.normalise(images)))
    # and back again, by the reader of foreign weights
    again = weights.load(str(folder)).eval()
    close(again.features(images)[0][1], backbone.features(images)[0][1])


def test_the_processor_shows_images_as_our_evaluation_does(tmp_path):
    backbone = build("data.img_size=96")
    assert backbone.evaluation_view.crop_pct == 0.875
    folder = written(backbone, "hf", tmp_path)
    rows, columns = np.mgrid[:120, :150]
    image = np.stack([rows * 2, columns, 255 - rows], 2).clip(0, 255).astype(np.uint8)
    found = transformers.AutoImageProcessor.from_pretrained(folder)(image, return_tensors="pt")["pixel_values"]
    view = backbone.evaluation_view(torch.from_numpy(image).permute(2, 0, 1)[None])
    assert float((found - backbone.normalise(view)).abs().max()) < 0.05  # a level of 8 bits


@pytest.mark.parametrize("kind", ["ViT", "registers", "classifier"])
@torch.no_grad()
def test_the_code_on_a_card_gives_the_features(kind, tmp_path):
    settings, classes, pool, _ = KINDS[kind]
    backbone = build(*settings, "data.img_size=64", classes=classes, pool=pool)
    folder = written(backbone, "hf", tmp_path, classes=names_file(tmp_path) if classes else None)
    code = re.search("```python\n(.*?)\n```", (folder / "README.md").read_text(), re.DOTALL)[1]
    *lines, last = code.replace('"FOLDER"', repr(str(folder))).splitlines()
    rows, columns = np.mgrid[:64, :64]
    names = dict(image=np.stack([rows * 2, columns, 255 - rows], 2).clip(0, 255).astype(np.uint8))
    exec("\n".join(lines), names)
    images = backbone.evaluation_view(torch.from_numpy(names["image"]).permute(2, 0, 1)[None])
    pooled = backbone.pool(backbone(images))
    close(eval(last, names), backbone.model(backbone.normalise(images)) if classes else pooled)
    if not classes:
        mean = eval(last.split(": ")[1], names)
        close(mean, backbone.features(images)[0][1].mean((1, 2)))


@pytest.mark.parametrize("name", ["vit_tiny", "swin"])
def test_the_code_on_a_card_for_timm_opens_the_folder(name, tmp_path):
    """In a process that has not imported this package, of which timm alone knows nothing."""
    shape = [] if name == "vit_tiny" else [f"backbone.{key}=null" for key in ("depth", "num_heads")]
    backbone = build(f"backbone.name={name}", "backbone.embed_dim=48", *shape, "data.img_size=32")
    folder = written(backbone, "timm", tmp_path)
    code = re.search("```python\n(.*?)\n```", (folder / "README.md").read_text(), re.DOTALL)[1]
    lines = [line.replace("local-dir:FOLDER", f"local-dir:{folder}") for line in code.splitlines()]
    told = subprocess.run(
        [sys.executable, "-c", "\n".join([*lines, "print(model.num_features)"])],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert told.stdout.strip() == str(backbone.embed_dim), told.stderr
    assert ("import ssl_vit" in code) == (name == "swin")


@pytest.fixture(scope="module")
def mae(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mae") / "run"
    made = objectives.read_recipe("mae", [*TINY, *SMALL["mae"], "train.steps=2", "data.img_size=8"], None)
    assert pretrain.pretrain(made, folder) == 0
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory, mae):
    folder = tmp_path_factory.mktemp("tuned") / "run" / "finetune" / "one"
    settings = [*TINY, "train.steps=2", f"backbone.init_from={mae}", "backbone.drop_path_rate=0"]
    assert pretrain.pretrain(objectives.read_recipe("finetune", settings, None), folder) == 0
    return folder


@torch.no_grad()
def test_mae_goes_out_with_its_decoder(mae, tmp_path):
    folder = export.export(str(mae), "hf", tmp_path / "out", decoder=True)
    model = transformers.ViTMAEForPreTraining.from_pretrained(folder).eval()
    settings = yaml.safe_load((mae / "recipe.yaml").read_text())
    recipe = objectives.read_recipe(str(mae / "recipe.yaml"), [], None)
    images = pretrain.data.load(recipe.data, "report")
    objective = pretrain.build(recipe, images)
    state = torch.load(next((mae / "checkpoints").glob("*.pt")), weights_only=True)
    objective.load_state_dict(state["objective"])
    objective.eval()
    batch = images.images[:3].float() / 255
    noise = torch.rand(3, 16, generator=torch.Generator().manual_seed(0))
    found = model(pixel_values=objective.backbone.normalise(batch), noise=noise)
    keep = noise.argsort(1)[:, :4]
    close(found.logits, objective.decoder(objective.backbone(batch, keep=keep), keep))
    hidden = torch.ones(3, 16).scatter(1, keep, 0)
    assert torch.equal(found.mask, hidden)
    target = objective.target(objective.backbone.normalise(batch))
    loss = (objective.target.loss(found.logits, target) * hidden).sum() / hidden.sum()
    assert float(found.loss) == pytest.approx(float(loss), rel=1e-5)
    assert model.config.mask_ratio == settings["objective"]["mask_ratio"] and model.config.norm_pix_loss
    # the same file is a ViTMAEModel, which our reader takes too
    close(weights.load(str(folder)).eval().features(batch)[0][0], objective.backbone.features(batch)[0][0])


@torch.no_grad()
def test_timm_and_the_graphs_give_the_logits_of_a_fine_tuned_run(classifier, tmp_path):
    backbone = weights.load(str(classifier)).eval()
    digits = [str(i) for i in range(10)]
    images = pretrain.data.load(objectives.read_recipe("mae", [], None).data, "report").images[:3].float() / 255
    expected = backbone.classify(images)
    [(prefix, patches)] = backbone.features(images)
    assert backbone.model.num_classes == 10 and float(expected.std()) > 0

    folder = export.export(str(classifier), "timm", tmp_path / "timm")
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    close(model(backbone.normalise(images)), expected)
    assert json.loads((folder / "config.json").read_text())["label_names"] == digits
    assert json.loads((classifier / "backbone" / "config.json").read_text())["label_names"] == digits

    session = onnxruntime.InferenceSession(export.export(str(classifier), "onnx", tmp_path / "onnx") / "model.onnx")
    told = session.get_modelmeta().custom_metadata_map
    assert json.loads(told["classes"]) == digits and json.loads(told["img_size"]) == [8, 8]
    assert [i.name for i in session.get_inputs()] == ["images"]
    for count in (1, 3):
        pooled, spatial, logits = session.run(["pooled", "patches", "logits"], {"images": images[:count].numpy()})
        close(logits, expected[:count])
        close(pooled, prefix[:count, 0])
        close(spatial, patches[:count])

    extra = {"about": ""}
    file = export.export(str(classifier), "torch", tmp_path / "torch") / "model.pt2"
    program = torch.export.load(file, extra_files=extra).module()
    assert json.loads(json.loads(extra["about"])["classes"]) == digits
    for count in (1, 3):
        pooled, spatial, logits = program(images[:count])
        close(logits, expected[:count])
        close(spatial, patches[:count])


def test_the_card_says_what_is_known(classifier, tmp_path, monkeypatch):
    common = dict(eval_data="digits", split="test", pooling="mean", layer=-1, n=300, metric="accuracy")
    common |= dict(train_n=1437, subset_seed=None)
    rows = [
        common | dict(protocol="finetune-1", value=0.75, settings=dict(lr=2e-3, training=classifier.name)),
        common | dict(protocol="finetune-2", value=0.5, settings=dict(lr=2e-3, training="another")),
    ]
    (classifier.parent.parent / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(sys, "argv", ["export", str(classifier), "--to", "hf", "--output", str(tmp_path / "out"),
                                      "--license", "apache-2.0"])  # fmt: skip
    export.main()
    text = (tmp_path / "out" / "README.md").read_text()
    _, head, body = text.split("---\n", 2)
    head = yaml.safe_load(head)
    assert head["library_name"] == "transformers" and head["license"] == "apache-2.0"
    assert head["pipeline_tag"] == "image-classification"
    assert "Dinov2ForImageClassification.from_pretrained" in body
    assert (
        "| digits, test | finetune-1 | mean | 1,437 | 75.0 (69.8 to 79.6) | 300 |" in body and "finetune-2" not in body
    )
    for words in (
        "0, 1, 2, 3",
        "1,437 images used",
        "optim:",
        "--to hf",
        "started from",
        f"Commit of ssl_vit: {COMMIT}.",
    ):
        assert words in body
    export.export(str(classifier), "timm", tmp_path / "unstated")
    assert model_card.UNSTATED in (tmp_path / "unstated" / "README.md").read_text()


def test_the_card_of_a_classifier_without_names_and_the_command_that_repeats_it(tmp_path, monkeypatch):
    out, again = tmp_path / "out", tmp_path / "again"
    weights.save(build(classes=5), tmp_path / "weights")
    names = names_file(tmp_path)
    for more, arguments in (("", {}), (f" --classes {names} --license mit", dict(classes=names, licence="mit"))):
        shutil.rmtree(out, ignore_errors=True)
        export.export(str(tmp_path / "weights"), "hf", out, **arguments)
        text = (out / "README.md").read_text()
        assert "pipeline_tag: image-classification" in text and ": a classifier of 5 classes." in text
        command = text.rpartition("```bash\n")[2].partition("\n```")[0]
        assert command.endswith(f"{tmp_path / 'weights'} --to hf --output {out}{more}")
    shutil.move(out, again)
    monkeypatch.setattr(sys, "argv", ["export", *command[command.index(str(tmp_path / "weights")) :].split()])
    export.main()
    assert all(
        (out / file.name).read_text("latin1") == file.read_text("latin1")
        for file in again.iterdir()
        if file.name != "README.md"
    )


def test_scores_that_are_no_accuracies_are_not_on_the_card(mae, tmp_path):
    """Those of segmentation, which have no value, and of attention masks."""
    common = dict(eval_data="digits", split="test", pooling="mean", layer=-1, train_n=9, subset_seed=None, n=300)
    rows = [
        common | dict(protocol="knn-k20", value=1.0, metric="accuracy"),
        common | dict(protocol="linear-block", value=0.25, metric="accuracy", layer=2, subset_seed=1),
        common | dict(protocol="segmentation-linear", miou=0.5, metric="mIoU"),
        common | dict(protocol="attention-masks", value=0.5, metric="Jaccard"),
    ]
    run = tmp_path / "run"
    shutil.copytree(mae, run)
    (run / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    export.export(str(run), "timm", tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "| knn-k20 | mean | 9 | 100.0 (98.7 to 100.0) | 300 |" in text
    assert "| linear-block | mean, block 3 | 9, draw 1 | 25.0 (20.4 to 30.2) | 300 |" in text
    assert "segmentation" not in text and "attention" not in text


def test_an_upload_to_a_stand_in_for_the_hub(classifier, tmp_path, monkeypatch, capsys):
    """The hub is a class that remembers; no real upload was tried."""
    seen = []

    class Hub:
        def create_repo(self, name, **options):
            seen.append(("create", name, options))
            return f"https://hub/{name}"

        def upload_folder(self, repo_id, folder_path, **options):
            seen.append(("upload", repo_id, folder_path))

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    out = str(tmp_path / "out")
    arguments = ["export", str(classifier), "--to", "timm", "--output", out, "--push", "me/digits"]
    monkeypatch.setattr(sys, "argv", arguments)
    export.main()
    assert seen == [("create", "me/digits", dict(repo_type="model", exist_ok=True)), ("upload", "me/digits", out)]
    assert "Uploaded: https://hub/me/digits" in capsys.readouterr().out

    class Refusing(Hub):
        def upload_folder(self, **options):
            raise PermissionError

    monkeypatch.setattr(huggingface_hub, "HfApi", Refusing)
    with pytest.raises(UserError, match="did not take me/digits .*hf auth login.*the export itself is in"):
        export.push(tmp_path / "out", "me/digits")


def test_what_cannot_be_exported_is_one_sentence(mae, classifier, tmp_path, monkeypatch):
    def refused(match, *arguments, **options):
        with pytest.raises(UserError, match=match) as error:
            export.export(*arguments, **options)
        assert len(error.value.sentences) == 1 and "\n" not in str(error.value)

    out = tmp_path / "out"
    refused(
        "classifies into 10 classes, and there are 5 names", str(classifier), "timm", out, classes=names_file(tmp_path)
    )
    refused("has no classifier", str(mae), "timm", out, classes=names_file(tmp_path))
    refused("--decoder is for --to hf", str(mae), "onnx", out, decoder=True)
    refused("--decoder is for runs that mask as MAE does.*objective.name=supervised", str(classifier), "hf", out,
            decoder=True)  # fmt: skip
    weights.save(build(), tmp_path / "w")
    refused("is no run that could hold the export: name a folder with --output", str(tmp_path / "w"), "hf")
    swin = build("backbone.name=test_convnext", *[f"backbone.{k}=null" for k in ("embed_dim", "depth", "num_heads")])
    weights.save(swin, tmp_path / "swin")
    refused("test_convnext is no plain ViT, and --to hf knows no other: --to timm", str(tmp_path / "swin"), "hf", out)
    (tmp_path / "w" / "model.safetensors").write_bytes((tmp_path / "w" / "model.safetensors").read_bytes()[:-99])
    refused("cannot be read", str(tmp_path / "w"), "hf", out)
    out.mkdir()
    (out / "mine").touch()
    refused("is there already", str(mae), "timm", out)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "onnxruntime", None)
        refused(r"--to onnx needs the packages onnx.*pip install 'ssl_vit\[export\]'", str(mae), "onnx", tmp_path / "o")

    def fails(*_, **__):
        raise RuntimeError("first line\nNo ONNX function found for aten.fancy: Unsupported operator\nmore")

    monkeypatch.setattr(torch.onnx, "export", fails)
    refused(
        r"cannot be written as ONNX \(No ONNX function.*operator\): use --to torch", str(mae), "onnx", tmp_path / "o"
    )
    assert not (tmp_path / "o").exists()


def test_a_graph_with_other_outputs_is_refused(tmp_path):
    backbone = build()
    graph, images = graphs.Graph(backbone).eval(), images_for(backbone)
    with torch.no_grad():
        pooled, patches = graph(images)
    with pytest.raises(UserError, match="other patches"):
        graphs._same(graph, images, (pooled, patches + 1e-2 * patches.abs().max()), "ONNX")


def test_the_command_is_known():
    assert commands.COMMANDS["export"] == "ssl_vit.export" and commands.script("export").is_file()


FAMILIES = ["resnet18", "convnext_atto", "swin_tiny_patch4_window7_224", "vit_small_patch16_dinov3",
            "beit_base_patch16_224", "deit_tiny_distilled_patch16_224", "mvitv2_tiny",
            "eva02_tiny_patch14_224"]  # fmt: skip


@pytest.mark.matrix
@pytest.mark.leaves_threads
@pytest.mark.parametrize("to", ["onnx", "torch"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_becomes_a_graph(name, to, tmp_path):
    """What is written is compared with the model by the command itself; here that another batch runs too."""
    model = timm.create_model(name, num_classes=3).eval()
    backbone = backbones.wrap(
        model, model.pretrained_cfg["mean"], model.pretrained_cfg["std"], dict(num_classes=3)
    ).eval()
    (tmp_path / "out").mkdir()
    images = images_for(backbone, 3)
    with torch.no_grad():
        expected = model(backbone.normalise(images))
    if to == "onnx":
        graphs.to_onnx(backbone, tmp_path / "out" / "m.onnx", None)
        session = onnxruntime.InferenceSession(tmp_path / "out" / "m.onnx")
        found = session.run(["logits"], {"images": images.numpy()})[0]
    else:
        graphs.to_torch(backbone, tmp_path / "out" / "m.pt2", None)
        found = torch.export.load(tmp_path / "out" / "m.pt2").module()(images)[-1]
    close(found, expected, 1e-4)


def test_a_rectangle_has_no_black_bars(tmp_path, capsys):
    """Which a crop by transformers would add to images of another shape; those of its own shape are as here."""
    backbone = build("data.img_size=[32, 48]")
    written(backbone, "hf", tmp_path)
    assert "squashes images of another shape to 32x48" in capsys.readouterr().out
    show = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    white = show(Image.new("RGB", (40, 40), "white"), return_tensors="pt")["pixel_values"]
    assert white.shape == (1, 3, 32, 48) and bool((white == white[:, :, :1, :1]).all())
    values = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    shown = show(Image.fromarray(values), return_tensors="pt")["pixel_values"]
    close(shown, backbone.normalise(torch.from_numpy(values).permute(2, 0, 1)[None].float() / 255))
