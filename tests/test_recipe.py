"""A recipe: what wins over what, what is refused, what a run is called."""

import math
import re
from pathlib import Path

import pytest
import yaml

from ssl_vit import objectives
from ssl_vit import recipe as recipes
from ssl_vit.errors import UserError

SHIPPED = sorted(str(p.relative_to(recipes.RECIPES).with_suffix("")) for p in recipes.RECIPES.rglob("*.yaml"))


def schema(name: str) -> type:
    return objectives.find(name).Config


def read(*settings: str, recipe: str = "mae", data: str | None = None) -> recipes.Recipe:
    return recipes.read(str(recipe), list(settings), data, schema)


@pytest.fixture
def file(tmp_path):
    def write(**sections) -> str:
        tree = dict(objective=dict(name="reconstruct"), train=dict(steps=1)) | sections
        (tmp_path / "own.yaml").write_text(yaml.safe_dump(tree))
        return str(tmp_path / "own.yaml")

    return write


@pytest.mark.parametrize("name", [n for n in SHIPPED if not n.startswith("study/")])
def test_every_shipped_recipe_is_valid(name):
    recipe = read(recipe=name)
    assert recipe.learning_rate()[0] > 0
    assert yaml.safe_load(yaml.safe_dump(recipe.as_dict())) == recipe.as_dict()  # what recipe.yaml will hold


def test_command_line_wins_over_recipe_over_facts_over_defaults(file):
    facts = dict(img_size=8, in_chans=1, mean=[0.3], std=[0.4], hflip=False)
    own = file(data=dict(mean=[0.1], std=[0.2]))
    recipe = read("data.std=[0.9]", recipe=own)
    assert (recipe.data.img_size, recipe.data.hflip) == (None, None)
    recipe.add_dataset_info(facts)
    assert (recipe.data.img_size, recipe.data.in_chans, recipe.data.hflip) == (8, 1, False)
    assert recipe.data.mean == [0.1] and recipe.data.std == [0.9]
    assert recipe.optim.weight_decay == 0.05  # nobody speaks of it: the default


def test_facts_fill_in_what_is_null():
    recipe = read("data.img_size=null")
    recipe.add_dataset_info(dict(img_size=8))
    assert recipe.data.img_size == 8


def test_numbers_may_be_written_in_any_way(file):
    recipe = read("optim.weight_decay=1e-5", "train.batch_size=1e2", recipe=file(optim=dict(lr="1e-4", clip_grad="3")))
    assert recipe.optim.lr == 1e-4 and recipe.optim.weight_decay == 1e-5 and recipe.optim.clip_grad == 3.0
    assert recipe.train.batch_size == 100 and isinstance(recipe.train.batch_size, int)
    assert isinstance(recipe.optim.lr, float)


@pytest.mark.parametrize(
    "rule, factor", [("absolute", 1), ("B/256", 2), ("B/512", 1), ("sqrt(B/1024)", math.sqrt(0.5))]
)
def test_learning_rate_says_how_it_was_made(rule, factor):
    recipe = read("optim.lr=1e-3", f"optim.lr_rule={rule}", "train.batch_size=512")
    lr, arithmetic = recipe.learning_rate()
    assert lr == pytest.approx(1e-3 * factor, rel=1e-12)
    assert arithmetic == ("absolute" if rule == "absolute" else f"0.001 · {rule} with B = 512")


def test_run_name_hashes_what_changes_the_result_and_only_that(tmp_path):
    (tmp_path / "photos").mkdir()
    assert read().run_name() == "mae-digits-s0"
    assert read("train.seed=3").run_name() == "mae-digits-s3"
    assert read("runtime.num_threads=1", "monitor.log_every=3").run_name() == "mae-digits-s0"
    assert read(data=str(tmp_path / "photos")).run_name() == "mae-photos-s0"
    assert read(data="owner/name").run_name() == "mae-owner-name-s0"
    names = {read(*s).run_name() for s in ([], ["train.steps=9"], ["data.img_size=16"], ["objective.mask_ratio=0.5"])}
    assert len(names) == 4
    name = read("optim.lr=1e-3", "objective.mask_ratio=0.5", "train.seed=2").run_name()
    assert name == read("train.seed=2", "objective.mask_ratio=0.50", "optim.lr=0.001").run_name()
    prefix, tag, seed = name.rsplit("-", 2)
    assert (prefix, len(tag), seed) == ("mae-digits", 6, "s2")


def test_names_and_hashes_are_those_of_versions_with_one_optimizer(of_run):
    """What was trained before there was a choice is found again, under these names."""
    assert read("optim.lr=1e-3", "train.epochs=20").run_name() == "mae-digits-92078d-s0"
    assert read("optim.betas=[0.9,0.98]").run_name() == "mae-digits-bd84d5-s0"
    recipe = read("train.steps=3")
    older = recipe.as_dict()["optim"]
    del older["name"], older["momentum"]
    assert recipe.identity()["optim"] == older and recipe.identity().keys() == recipe.as_dict().keys() - {
        "runtime",
        "monitor",
    }
    assert "jpeg_draft" not in recipe.identity()["data"]
    changed = [[], ["optim.name=sgd"], ["optim.name=sgd", "optim.momentum=0.8"], ["data.jpeg_draft=true"]]
    assert len({str(read(*asked).identity()) for asked in changed}) == 4
    assert len({read(*asked).run_name() for asked in changed}) == 4

    run = Path(of_run(recipe))
    name = read(recipe=run).run_name()
    tree = yaml.safe_load(run.read_text())
    run.write_text(yaml.safe_dump(tree | dict(optim=older)))
    assert read(recipe=run).run_name() == name
    assert read(recipe=of_run(read("train.steps=3", "optim.name=sgd"))).run_name() != name


def test_what_an_optimizer_does_not_read_is_refused_where_it_was_asked_for(file, of_run):
    """Not where a recipe was written for the other one, nor in a run, which records all settings."""
    said = "^optim.{} in {} is read only where optim.name={}: leave it out.$"
    own = file(optim=dict(name="sgd", momentum=0.8))
    cases = (
        (("optim.momentum=0.8",), "mae", ("momentum", "the command line", "sgd")),
        (("optim.betas=[0.9,0.9]", "optim.name=sgd"), "mae", ("betas", "the command line", "adamw")),
        (("optim.betas=[0.9,0.9]",), own, ("betas", "the command line", "adamw")),
    )
    for asked, recipe, words in cases:
        with pytest.raises(UserError, match=said.format(*words)):
            read(*asked, recipe=recipe)
    assert read("optim.momentum=0.9").optim.name == "adamw"  # a default that is typed back asks for nothing
    assert read("optim.name=adamw", recipe=own).optim.betas == [0.9, 0.95]
    assert read("optim.name=sgd", recipe="finetune").optim.momentum == 0.9
    run = of_run(read("optim.name=sgd"))
    assert read(recipe=run).optim.name == "sgd" and read("optim.momentum=0.5", recipe=run).optim.momentum == 0.5
    with pytest.raises(UserError, match="optim.betas in the command line"):
        read("optim.betas=[0.9,0.9]", recipe=run)
    for optim in (dict(momentum=0.8), dict(name="sgd", betas=[0.9, 0.9])):
        with pytest.raises(UserError, match="optim.* in .*own.yaml is read only where optim.name="):
            read(recipe=file(optim=optim))


@pytest.mark.parametrize(
    ("recipe", "setting", "where"),
    [
        ("gaussian", "objective.mask_ratio=0.25", "objective.mask=random or blocks"),
        ("mae", "objective.noise_sigma=[0,1]", "objective.corruption=gaussian"),
        ("mae", "objective.momentum_teacher=0.9", "objective.target=features"),
        ("mae", "objective.vocab_size=64", "objective.target=kmeans"),
        ("beit", "objective.norm_pix_loss=false", "objective.target=pixels"),
        ("simmim", "objective.decoder_num_heads=2", "objective.decoder_depth is above 0"),
        ("supervised", "objective.distillation_tau=3", "objective.teacher is set and objective.distillation_type=soft"),
        ("supervised", "objective.mixup_prob=0.5", "objective.mixup or objective.cutmix is above 0"),
        ("supervised", "views.magnitude=5", "views.augmentation=rand-augment"),
        ("mae", "views.blur=false", "views.augmentation=dino"),
        ("mae", "backbone.window_size=2", "backbone.attn=window"),
        ("mae", "optim.clip_mode=parameter", "optim.clip_grad is set"),
    ],
)
def test_a_setting_that_nothing_reads_is_refused(recipe, setting, where):
    """Else a sweep of it is one run under several names."""
    key = setting.partition("=")[0]
    with pytest.raises(UserError, match=f"^{key} in the command line is read only where {re.escape(where)}: leave it"):
        read(setting, recipe=recipe)
    with pytest.raises(UserError, match=f"^{key} in the command line is read only where {re.escape(where)}: leave it"):
        read(setting, f"objective.name={read(recipe=recipe).objective_name}", recipe=recipe)


def test_what_a_recipe_s_file_states_for_its_own_task_may_stay_when_the_task_is_changed():
    assert read("objective.mask=none", "objective.encoder_input=corrupted", recipe="mae").objective.mask_ratio == 0.75


def test_a_backbone_s_name_on_the_command_line_replaces_the_recipe_s_shape(file):
    def shape(*settings: str, recipe: str = "mae") -> tuple:
        b = read(*settings, recipe=recipe).backbone
        return b.embed_dim, b.depth, b.num_heads, b.patch_size

    assert shape() == (96, 4, 3, "auto")
    assert shape("backbone.name=vit_small") == (None, None, None, "auto")
    assert shape("backbone.depth=3", "backbone.name=vit_small", "backbone.patch_size=16") == (None, 3, None, 16)
    assert shape("backbone.name=vit_small_patch16_224") == (None, None, None, 16)
    assert shape("backbone.name=vit_small_patch16_224", "backbone.patch_size=auto") == (None, None, None, "auto")
    assert shape("backbone.name=vit_base", recipe="mae-photos") == (None, None, None, 16)
    assert shape("backbone.name=vit_base_patch8_224", recipe="mae-photos") == (None, None, None, 8)
    assert shape(recipe=file(backbone=dict(name="vit_small", embed_dim=96))) == (96, None, None, "auto")
    named = file(backbone=dict(name="vit_base_patch16_224"))
    assert shape(recipe=named) == (None, None, None, 16)
    assert shape("backbone.name=vit_base_patch8_224", recipe=named)[-1] == 8
    assert shape("backbone.name=vit_base", recipe=named)[-1] == "auto"
    assert shape(recipe=file(backbone=dict(name="vit_base_patch16_224", patch_size=4)))[-1] == 4


@pytest.fixture
def of_run(tmp_path):
    def write(recipe: recipes.Recipe, **data) -> str:
        """The recipe.yaml that pretrain.py leaves of a run of this recipe, with these facts of its images."""
        tree = recipe.as_dict() | dict(resolved=dict(lr=0.1, labelled=False), images=dict(fingerprint="x", count=9))
        tree["runtime"] |= dict(threads_used=1, processes=1, device="cpu", torch="2")
        tree["data"] |= data
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / "recipe.yaml").write_text(yaml.safe_dump(tree))
        return str(tmp_path / "run" / "recipe.yaml")

    return write


def test_a_run_s_recipe_is_a_recipe(of_run):
    before = read("objective.mask_ratio=0.5", "runtime.save_every=7", "backbone.patch_size=4", "train.steps=3")
    after = read(recipe=of_run(before, img_size=[8, 8], mean=[0.3]))
    assert after.as_dict() == before.as_dict() | dict(data=before.as_dict()["data"] | dict(img_size=[8, 8], mean=[0.3]))
    other = read(recipe=of_run(read("objective.mask_ratio=0.6", "train.steps=3")))
    assert after.run_name().startswith("mae-digits-")
    assert len({recipe.run_name() for recipe in (read(), before, after, other)}) == 4
    assert read("train.seed=4", recipe=of_run(before)).run_name() == read(recipe=of_run(before)).run_name()[:-1] + "4"


def test_of_a_run_s_recipe_other_images_have_their_own_facts(of_run):
    run = of_run(
        read("data.subset=10", "backbone.patch_size=2"), img_size=[8, 8], in_chans=1, mean=[0.3], std=[0.3], hflip=False
    )
    assert (
        read(recipe=run, data="digits").data.mean == [0.3] and read(recipe=run, data="digits").backbone.patch_size == 2
    )
    assert read(recipe=run, data="cifar10").backbone.patch_size == "auto"
    data = read(recipe=run, data="cifar10").data
    assert (data.img_size, data.in_chans, data.mean, data.std, data.hflip, data.subset) == (
        None,
        None,
        None,
        None,
        None,
        10,
    )
    assert read("data.img_size=16", recipe=run, data="cifar10").data.img_size == 16


def test_a_part_of_an_epoch_is_not_rounded_up_by_its_binary_fraction():
    """1.1 times 100 is a little above 110 there."""
    assert [recipes.steps_in(1.1, n, b) for n, b in ((100, 10), (50_000, 500), (101, 10))] == [11, 110, 12]
    assert recipes.steps_in(2.2, 100, 10) == 22 and recipes.steps_in(0.001, 100, 10) == 1


def test_the_steps_of_a_run_s_epochs_are_counted_anew_where_an_epoch_is_another(of_run):
    run = of_run(read("train.epochs=4", "train.steps=8", "train.batch_size=5"))  # 4 passes over 9 images
    assert read(recipe=run).train.steps == read("optim.lr=0.1", recipe=run, data="digits").train.steps == 8
    for changed, data in (((), "cifar10"), (("train.batch_size=3",), None), (("data.subset=4",), None)):
        train = read(*changed, recipe=run, data=data).train
        assert (train.epochs, train.steps, train.flops) == (4, None, None)
    asked = of_run(read("train.epochs=4", "train.steps=7", "train.batch_size=5"))  # the steps won over the epochs
    assert read(recipe=asked, data="cifar10").train.steps == 7


def test_a_key_that_is_written_twice_is_refused(tmp_path):
    (tmp_path / "own.yaml").write_text("objective:\n  name: dino\noptim:\n  lr: 1e-4\ntrain:\n  steps: 1\noptim: {}\n")
    with pytest.raises(UserError, match="own.yaml is not valid YAML: optim is written twice, in lines 3 and 7"):
        read(recipe=tmp_path / "own.yaml")
    (tmp_path / "own.yaml").write_text("{[a]: 1}\n")
    with pytest.raises(UserError, match="own.yaml is not valid YAML: .*unhashable"):
        read(recipe=tmp_path / "own.yaml")


def test_a_rate_that_would_rise_is_refused():
    with pytest.raises(UserError, match=r"optim.min_lr=1e-05, .* is above its peak, 7.81e-06 \(.*B = 8\): lower it"):
        read("train.batch_size=8", recipe="imagenet/deit-s").learning_rate()


@pytest.mark.parametrize("setting", ["data.mean=[123.7]", "data.std=[58.4]", "data.std=[0]", "train.seed=1e20"])
def test_values_on_another_scale_are_refused(setting):
    with pytest.raises(UserError, match=f"{setting.partition('=')[0]} in the command line must be a"):
        read(setting)


def test_a_length_on_the_command_line_replaces_that_of_a_run(of_run):
    run = of_run(read("train.steps=1123"))  # resolved from the recipe's epochs
    train = read("train.epochs=5", recipe=run).train
    assert (train.epochs, train.steps, train.flops) == (5, None, None)
    assert read(recipe=run).train.steps == 1123


def test_a_run_of_another_version_is_refused_by_the_setting(of_run):
    run = of_run(read(), colours=3)
    with pytest.raises(UserError, match=r"'data.colours' in .*run/recipe.yaml. Another version of this code"):
        read(recipe=run)
    with pytest.raises(UserError, match="'data.colors' in the command line"):
        read("data.colors=3", recipe=of_run(read()))


def test_a_part_written_with_a_point_is_refused_but_in_a_run(file, of_run):
    for text in ("data.subset=1.0", "data.subset=25.0", "data.subset=2.5"):
        with pytest.raises(UserError, match=f"^{text} in the command line .* null for all images"):
            read(text)
    with pytest.raises(UserError, match="data.subset=1.0 in .*own.yaml"):
        read(recipe=file(data=dict(subset=1.0)))
    assert [read(f"data.subset={n}").data.subset for n in (1, 25, 0.5)] == [1, 25, 0.5]
    assert read(recipe=of_run(read("data.subset=1"))).data.subset == 1


def test_another_objective_is_another_recipe(file):
    with pytest.raises(
        UserError, match=r"mae.yaml is a recipe for the objective reconstruct, not dino: .*\(dino, dino-photos\)"
    ):
        read("objective.name=dino")
    assert read("objective.name=reconstruct").objective_name == "reconstruct"
    assert read("objective.name=dino", recipe=file(objective={})).objective_name == "dino"


def test_differences_name_the_keys_that_matter():
    old = yaml.safe_load(yaml.safe_dump(read().as_dict()))
    new = read("runtime.num_threads=1", "monitor.log_every=7", "optim.lr=1", "data.img_size=[8, 9]").as_dict()
    assert recipes.differences(old, read().as_dict()) == []
    assert recipes.differences(old, new) == ["data.img_size", "optim.lr"]
    assert recipes.differences(old, old | dict(images=dict(fingerprint="x"))) == ["images.fingerprint"]


def test_what_an_older_version_did_not_know_had_its_default():
    recipe = read("objective.mask_ratio=0.6")
    new, old = recipe.as_dict(), recipe.as_dict()
    del old["objective"]["keep_ratio"], old["optim"]["clip_grad"]
    assert recipes.differences(old, new, type(recipe.objective)) == []
    new["objective"]["keep_ratio"] = 0.1
    assert recipes.differences(old, new, type(recipe.objective)) == ["objective.keep_ratio"]


def test_where_the_same_images_lie_is_no_difference():
    here, there = (read(f"data.name={name}").as_dict() for name in ("a/photos", "b/photos"))
    same, other = dict(images=dict(fingerprint="x")), dict(images=dict(fingerprint="y"))
    assert recipes.differences(here | same, there | same) == []
    assert recipes.differences(here | same, there | other) == ["data.name", "images.fingerprint"]
    assert recipes.differences(here, there) == ["data.name"]


def test_what_an_older_version_did_not_resolve_is_no_difference():
    tree = read().as_dict()
    old, new = (tree | dict(resolved=found) for found in (dict(lr=1), dict(lr=1, labelled=False)))
    assert recipes.differences(old, new) == []
    assert recipes.differences(new, new | dict(resolved=dict(lr=2, labelled=True))) == [
        "resolved.labelled",
        "resolved.lr",
    ]


@pytest.mark.parametrize(
    "setting, words",
    [
        ("train.stepz=3", ["'train.stepz'", "the command line", "'train.steps'"]),
        ("lr=3", ["'lr'", "'optim.lr'"]),
        ("train.lr=3", ["'train.lr'", "'optim.lr'"]),
        ("objective.rato=0.5", ["'objective.rato'", "'objective.mask_ratio'"]),
        ("train.steps=abc", ["train.steps", "whole number", "'abc'"]),
        ("train.steps=1.5", ["train.steps", "whole number", "1.5"]),
        ("train.steps=-1", ["train.steps", "at least 0", "-1"]),
        ("train.batch_size=0", ["train.batch_size", "at least 1"]),
        ("optim.lr=nan", ["optim.lr", "finite"]),
        ("optim.lr=-1e-3", ["optim.lr", "above 0"]),
        ("optim.lr=1e999", ["optim.lr", "finite"]),
        ("optim.lr=" + "9" * 400, ["optim.lr", "a number"]),
        ("optim.lr=true", ["optim.lr", "a number"]),
        ("optim.lr_rule=B/128", ["optim.lr_rule", "B/256"]),
        ("optim.betas=[0.9, 1.5]", ["optim.betas"]),
        ("optim.name=adam", ["optim.name", "adamw or sgd", "'adam'"]),
        ("views.scale=[0.9, 0.1]", ["views.scale"]),
        ("data.img_size=0", ["data.img_size"]),
        ("data.img_size=[8, 8, 8]", ["data.img_size"]),
        ("data.hflip=1", ["data.hflip", "true or false"]),
        ("data.report_split=2024-13-45", ["data.report_split"]),
        ("data.img_size=[8", ["data.img_size", "cannot be read"]),
        ("objective.name=mea", ["'mea'", "reconstruct"]),
        ("objective.name=", ["objective.name", "missing"]),
        ("train.epochs=null", ["budget"]),
        ("steps", ["'steps'", "key=value"]),
    ],
)
def test_a_bad_setting_is_named(setting, words):
    with pytest.raises(UserError) as error:
        read(setting)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_a_bad_key_names_its_file(file):
    own = file(optim=dict(lrr=1))
    with pytest.raises(UserError, match="'optim.lrr' in .*own.yaml.* 'optim.lr'"):
        read(recipe=own)


def several(*settings: str, recipe: str = "mae") -> list[str]:
    """The sentences of all mistakes, which the message lists."""
    with pytest.raises(UserError) as error:
        read(*settings, recipe=recipe)
    first, *listed = str(error.value).splitlines()
    assert first == f"{len(listed)} mistakes:" and listed == [f"- {sentence}" for sentence in error.value.sentences]
    return list(error.value.sentences)


def test_all_mistakes_are_named_at_once(file):
    """Of file and command line; what rests on a mistaken value, such as the budget on a mistyped length, is not one."""
    own = file(
        train=dict(epocs=3, seed=-1),
        optim=dict(lr="fast", betas=[0.9, 2]),
        views=dict(scale=[0.9, 0.1]),
        objective=dict(name="reconstruct", decoder_depth=-2, decoder_dept=2),
    )
    said = several("steps", "data.img_size=[8", "optim.clip_grad=-1", "train.batch_size=8", "colours=3", recipe=own)
    command_line, path = "the command line", own
    expected = [
        ("'steps' is not a setting",),
        ("data.img_size=[8 cannot be read",),
        (f"Unknown key 'train.epocs' in {path}. Did you mean 'train.epochs'?",),
        (f"train.seed in {path} must be at least 0, not -1.",),
        (f"optim.lr in {path} must be a number, not 'fast'.",),
        (f"objective.decoder_depth in {path} must be at least 0, not -2.",),
        (f"Unknown key 'objective.decoder_dept' in {path}. Did you mean 'objective.decoder_depth'?",),
        (f"optim.clip_grad in {command_line} must be above 0, not -1.0.",),
        (f"Unknown key 'colours' in {command_line}.",),
        ("views.scale must be two increasing fractions such as [0.2, 1], not [0.9, 0.1].",),
    ]
    assert len(said) == len(expected)
    for (words,) in expected:
        assert sum(words in sentence for sentence in said) == 1, (words, said)


def test_mistakes_beside_one_that_hides_others(file, tmp_path):
    """An unknown recipe, or one that is no YAML, has no settings to judge; an unknown objective, none of its own."""
    assert several("ratio", recipe="maee")[1].startswith("There is no recipe 'maee'. Did you mean 'mae'?")
    (tmp_path / "own.yaml").write_text("train: [")
    assert "is not valid YAML" in several("ratio", recipe=str(tmp_path / "own.yaml"))[1]
    said = several("optim.lr=0", recipe=file(objective=dict(name="mea", rato=1)))
    assert said[0].startswith("Unknown objective 'mea'.") and said[1].startswith("optim.lr") and len(said) == 2
    said = several("optim.lr=0", "objective.name=dino")
    assert "not dino" in said[0] and said[1].startswith("optim.lr") and len(said) == 2


def test_a_length_that_cannot_be_read_is_not_missing_too(tmp_path):
    (tmp_path / "own.yaml").write_text("objective: {name: reconstruct}\n")
    with pytest.raises(UserError, match=r"^The value of train.steps=\[8 cannot be read"):
        read("train.steps=[8", recipe=tmp_path / "own.yaml")


def test_an_empty_recipe_lacks_objective_and_budget(tmp_path):
    (tmp_path / "own.yaml").write_text("")
    said = several(recipe=str(tmp_path / "own.yaml"))
    assert (
        said[0] == f"objective.name is missing in {tmp_path / 'own.yaml'}." and "budget" in said[1] and len(said) == 2
    )


def test_the_mistakes_of_all_tasks_are_named_at_once():
    said = several(
        "objective.tasks=[mae objective.rato=1, maee, gaussian objective.mask_ratio=2 objective.replace_ratio=-1]",
        recipe="multitask",
    )
    assert all(sentence.startswith("objective.tasks: ") for sentence in said)
    keys = (
        "'objective.rato' in the task 'mae objective.rato=1'",
        "'maee'",
        "objective.mask_ratio in",
        "objective.replace_ratio in",
    )
    assert len(said) == 4 and all(key in sentence for key, sentence in zip(keys, said, strict=True))


def test_a_setting_without_a_default_must_be_given(file):
    with pytest.raises(UserError, match="^objective.tasks is missing: recipes whose objectives are the tasks"):
        read(recipe=file(objective=dict(name="multitask")))


@pytest.mark.parametrize(
    "content", [b"train: [", b"\x89PNG\r\n\x1a\n", b"- 1\n- 2\n", b"train: 3", b"data:\n  name: 2024-13-45\n"]
)
def test_a_file_that_is_no_recipe(tmp_path, content):
    (tmp_path / "own.yaml").write_bytes(content)
    with pytest.raises(UserError, match="own.yaml") as error:
        read(recipe=tmp_path / "own.yaml")
    assert "\n" not in str(error.value)


def test_an_unknown_recipe_names_the_nearest(tmp_path):
    with pytest.raises(UserError, match="'maee'.*Did you mean 'mae'"):
        read(recipe="maee")
    with pytest.raises(UserError, match="There is no recipe"):
        read(recipe=tmp_path)


def test_the_command_line_s_length_wins_over_the_file_s(tmp_path):
    (tmp_path / "own.yaml").write_text("objective: {name: reconstruct}\ntrain: {epochs: 5, steps: 20}\n")

    def lengths(*settings):
        train = objectives.read_recipe(str(tmp_path / "own.yaml"), list(settings), "digits").train
        return train.epochs, train.steps, train.flops

    assert lengths() == (5, 20, None)
    assert lengths("train.epochs=2") == (2, None, None)
    assert lengths("train.steps=3") == (5, 3, None)
    assert lengths("train.flops=1e9") == (5, 20, 1e9)  # which wins
    assert lengths("train.epochs=2", "train.steps=4") == (2, 4, None)
    assert lengths("train.steps=null") == (5, None, None)
