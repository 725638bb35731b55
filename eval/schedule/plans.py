"""The plan of a study: its arms, their settings, budgets and seeds, and how they are tuned and evaluated.

    from eval.schedule import plans
    plan = plans.read("denoising")          # a file in recipes/study/, or a path
    plan.arms["mae"].settings

A plan names recipes and settings; recipes/study/compare.yaml is a short example, denoising-full.yaml a full one.
"""

import dataclasses
import itertools
import re
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from ssl_vit import recipe as recipes
from ssl_vit.errors import UserError, nearest

PLANS = recipes.RECIPES / "study"
EVALUATORS = ("linear_probe", "knn", "finetune", "segmentation", "attention_masks", "robustness", "difficulty")
OF_LABELS = ("linear_probe", "knn", "finetune", "robustness")  # evaluators that need a class for each image
JUDGES = ("linear_probe", "knn")  # evaluators of trials: those that can use held-out images
# An arm's role in the verdict (eval/verdict.py). A plan that decides has one arm of each of CLAIMED, and at most one of
# each of the others but control, which is only shown among the controls; "" is compared with all of them.
CLAIMED = ("masking", "noise", "autoencoder", "scratch")
CHECKS = ("equal-images", "positive-check", "negative-check")
ROLES = ("", *CLAIMED, *CHECKS, "control")
FIRST_SEED = 100  # of tuning: below are the seeds that decide
SPENT = ("budget", "rest")  # words of an evaluator that stand for FLOPs
LEARNS_FROM = re.compile(r"(?P<key>[^=]+)=\{(?P<arm>[^{}]+)\}")  # a setting whose value is the run of another arm


@dataclass
class Arm:
    """One way to pre-train: a recipe with settings, or like another arm.

    search_space: settings of which tuning chooses one; budget: the fraction of the plan's budgets that it is trained
    for; seeds, evaluators: its own, instead of the plan's. like: an arm whose recipe, settings and tuned choice it
    takes; its own settings come last, and it is not tuned itself. curve: a name that it shares with other arms, through
    whose accuracies at all budgets one curve is laid (eval/compare/equal_accuracy.py).

    A setting such as objective.tokenizer={ARM} names the run of an arm above, of the same seed and budget; a budget in
    FLOPs includes what was spent on that run.
    """

    recipe: str = ""
    settings: list[str] = field(default_factory=list)
    role: str = ""
    search_space: list[str] = field(default_factory=list)
    budget: float = 1.0
    like: str | None = None
    curve: str | None = None
    seeds: int | None = None
    evaluators: list[list[str]] | None = None


@dataclass
class Tuning:
    """The trials of every trained arm, a walk (eval/schedule/walk.py) at one seed and one budget in FLOPs.

    They train on nine tenths of the images. `judge`, an evaluator with its arguments, scores them on the last tenth.
    """

    flops: float
    seed: int
    judge: list[str]


@dataclass
class Plan:
    """evaluators: each a name and its arguments, where `budget` stands for the largest of the budgets, and `rest` for
    what an arm that gets a part of it leaves.

    budgets: training FLOPs; every arm is trained at each of them, with a full schedule of its own. seeds: the arms are
    trained with the seeds below this number. decides: whether the verdict's rule (docs/denoising-study.md) is meant to
    be applied. eval_data: the images that all arms are evaluated on, if they are others than those of the training.
    """

    name: str
    arms: dict[str, Arm]
    evaluators: list[list[str]]
    controls: list[str] = field(default_factory=list)
    seeds: int = 1
    settings: list[str] = field(default_factory=list)  # of all arms
    budgets: list[float] = field(default_factory=list)
    tuning: Tuning | None = None
    decides: bool = False
    eval_data: str | None = None

    def seeds_of(self, arm: str) -> int:
        return self.arms[arm].seeds or self.seeds

    def recipe_of(self, arm: str) -> str:
        return self.arms[self.arms[arm].like or arm].recipe

    def learns_from(self, arm: str) -> list[str]:
        """The arms whose runs its settings name, or those of the arm that it is like."""
        settings = [*self.arms[self.arms[arm].like or arm].settings, *self.arms[arm].settings]
        last = {text.partition("=")[0]: text for text in settings}
        return [match["arm"] for text in last.values() if (match := LEARNS_FROM.fullmatch(text))]

    def evaluators_of(self, arm: str) -> list[list[str]]:
        lines = self._lines(arm)
        if not any(map(_spends, lines)):
            return lines
        whole = max(self.budgets)
        flops = dict(budget=f"{whole:g}", rest=f"{whole * (1 - self.arms[arm].budget):g}")
        return [[flops.get(word, word) for word in line] for line in lines]

    def narrow(self, seeds: int | None, arms: str | None, evaluators: str | None, untuned: bool) -> list[str]:
        """Keep a part of the plan, by comma-separated names, or change its number of seeds; returns what was changed.

        Untrained arms are always kept, and those that a kept one is like. With fewer arms or evaluators, another number
        of seeds, or without tuning, the plan decides nothing. Raises UserError for an unknown name.
        """
        changed = []
        if arms is not None:
            for name in arms.split(","):
                if name not in self.arms:
                    known = ", ".join(self.arms)
                    raise UserError(f"{self.name} has no arm {name!r}.{nearest(name, self.arms)} Arms: {known}.")
            wanted = set(arms.split(","))
            wanted |= {like for name in wanted if (like := self.arms[name].like)}
            for name in reversed(self.arms):  # each names arms above it
                wanted |= set(self.learns_from(name)) if name in wanted else set()
            kept = {n: arm for n, arm in self.arms.items() if n in wanted or "train.steps=0" in arm.settings}
            if len(kept) < len(self.arms):
                changed.append(f"arms={','.join(kept)}")
            self.arms = kept
        if untuned and self.tuning:
            self.tuning = None
            changed.append("untuned")
        self.decides &= not changed
        if evaluators is not None:
            asked = evaluators.split(",")
            there = {line[0] for arm in self.arms for line in self._lines(arm)}
            for name in asked:
                if name not in there:
                    known = ", ".join(name for name in EVALUATORS if name in there)
                    raise UserError(f"{self.name} has no evaluator {name!r}. Evaluators: {known}.")
            self.decides &= there <= set(asked)
            self.evaluators = [line for line in self.evaluators if line[0] in asked]
            for own in self.arms.values():
                if own.evaluators is not None:
                    own.evaluators = [line for line in own.evaluators if line[0] in asked]
            changed.append(f"evaluators={','.join(sorted(asked))}")
        if seeds is not None and seeds != self.seeds:
            if self.decides or any(self.seeds_of(arm) > seeds for arm in self.arms):
                changed.append(f"seeds={seeds}")  # more of them extend a study, but not one that decides
            self.decides = False
            self.seeds = seeds
            for arm in self.arms.values():
                arm.seeds = None
        return changed

    def spend(self, settings: list[str]) -> list[str]:
        """Replace the budgets by a training length from the command line; returns the other settings.

        Trials keep their fraction of the largest budget. With a budget that is not its own, or with settings that
        change the training, the plan decides nothing. Raises UserError if it needs a budget in FLOPs.
        """
        lengths = [text for text in settings if text.startswith(("train.flops=", "train.steps=", "train.epochs="))]
        others = [text for text in settings if text not in lengths and not may_change(text)]
        self.decides &= not others and (not lengths or bool(self.budgets))
        if not lengths or not self.budgets:
            return settings
        key, _, value = lengths[-1].partition("=")
        if key == "train.flops":
            flops = _number(value, "train.flops", Path("the command line"))
            self.decides &= flops == max(self.budgets)
            if self.tuning:
                self.tuning.flops *= flops / max(self.budgets)
            self.budgets = [flops]
            return [text for text in settings if text not in lengths]
        lines = [line for arm in self.arms for line in self._lines(arm)]
        if self.tuning or any(map(_spends, lines)) or any(map(self.learns_from, self.arms)):
            raise UserError(f"{self.name} compares at equal compute: give train.flops instead of {key}.")
        self.budgets, self.decides = [], False
        return settings

    def _lines(self, arm: str) -> list[list[str]]:
        own = self.arms[arm].evaluators
        return self.evaluators if own is None else own


def names() -> list[str]:
    """The names of the plans that come with the project."""
    return sorted(p.stem for p in PLANS.glob("*.yaml"))


def read(name: str) -> Plan:
    """The plan of that name or file. Raises UserError for a mistake in it."""
    known = names()
    path = next((p for p in (PLANS / f"{name}.yaml", Path(name)) if p.is_file()), None)
    if path is None:
        raise UserError(f"There is no plan {name!r}.{nearest(name, known)} Plans: {', '.join(known)}.")
    try:
        stated = yaml.safe_load(path.read_text(encoding="utf-8"))
        plan = Plan(name=path.stem, **stated)
    except (yaml.YAMLError, TypeError) as error:
        keys = ", ".join(f.name for f in dataclasses.fields(Plan) if f.name != "name")
        raise UserError(f"{path} is not a plan ({' '.join(str(error).split())}): a plan has the keys {keys}.") from None
    kinds = dict(arms=dict, evaluators=list, controls=list, seeds=int, settings=list, budgets=list, decides=bool)
    _check(plan, kinds, str(path))
    if plan.eval_data is not None:
        _check(plan, dict(eval_data=str), str(path))
    plan.arms = {name: _arm(name, what, path) for name, what in stated["arms"].items()}
    plan.evaluators = _evaluators(plan.evaluators, path)
    plan.budgets = [_number(value, "budgets", path) for value in plan.budgets]
    plan.tuning = None if plan.tuning is None else _tuning(stated["tuning"], path)
    _check_likes(plan, path)
    _check_sources(plan, path)
    if plan.decides:
        _check_roles(plan, path)
    _check_spent(plan, path)
    return plan


def may_change(setting: str) -> bool:
    """Whether a key=value changes only how a run is carried out, not its result."""
    return setting.split(".")[0] in recipes.MAY_CHANGE


def _arm(name: str, what: dict, path: Path) -> Arm:
    try:
        arm = Arm(**what)
    except TypeError:
        keys = ", ".join(f.name for f in dataclasses.fields(Arm) if f.name not in ("recipe", "like"))
        raise UserError(
            f"Arm {name!r} of {path} must name a recipe, or an arm that it is like, and may have {keys}: "
            "{recipe: mae, settings: […]}."
        ) from None
    where = f"arm {name!r} of {path}"
    _check(arm, dict(recipe=str, settings=list, role=str, search_space=list), where)
    if bool(arm.recipe) == bool(arm.like) or (arm.like and arm.search_space):
        raise UserError(f"The {where} must name a recipe, or an arm that it is like, and then no search_space.")
    arm.budget = _number(arm.budget, f"budget of arm {name!r}", path)
    if arm.curve is not None:
        _check(arm, dict(curve=str), where)
    if arm.seeds is not None:
        _check(arm, dict(seeds=int), where)
    if arm.role not in ROLES:
        raise UserError(f"The role of arm {name!r} of {path} must be one of {', '.join(filter(None, ROLES))}.")
    if arm.evaluators is not None:
        _check(arm, dict(evaluators=list), where)
        arm.evaluators = _evaluators(arm.evaluators, path)
    return arm


def _check_likes(plan: Plan, path: Path) -> None:
    """Raises UserError if an arm is like one that does not exist, or that is like another itself."""
    own = [name for name, arm in plan.arms.items() if not arm.like]
    for name, arm in plan.arms.items():
        if arm.like and arm.like not in own:
            raise UserError(f"Arm {name!r} of {path} cannot be like {arm.like!r}: name one of {', '.join(own)}.")


def _check_spent(plan: Plan, path: Path) -> None:
    """Raises UserError if an evaluator is to spend of budgets that the plan does not have."""
    for name, arm in plan.arms.items():
        for word in (word for line in plan._lines(name) for word in line if word in SPENT):
            where = f"An evaluator of arm {name!r} of {path} uses the word {word}"
            if not plan.budgets:
                raise UserError(f"{where}, but the plan has no budgets: add them.")
            if word == "rest" and (arm.budget >= 1 or len(plan.budgets) > 1):
                raise UserError(f"{where}: give the plan one budget, and the arm a part of it (budget: 0.5).")


def _check_sources(plan: Plan, path: Path) -> None:
    """Raises UserError if an arm names the run of another that is not there in time, or whose cost nobody charges."""
    above: list[str] = []
    for name in plan.arms:
        for source in plan.learns_from(name):
            where = f"Arm {name!r} of {path} learns from the run of {source!r}"
            if source not in above:
                raise UserError(f"{where}, which is no arm above it: name one of {', '.join(above) or 'those above'}.")
            if plan.seeds_of(source) < plan.seeds_of(name):
                raise UserError(f"{where}, which has fewer seeds: give it as many.")
            if not plan.budgets or plan.tuning:
                raise UserError(f"{where}, which needs budgets, so that its cost is charged, and no tuning.")
            if any(text.startswith("backbone.init_from={") for text in plan.arms[name].settings):
                raise UserError(
                    f"{where}, from whose weights it starts (backbone.init_from), and nobody charges what they cost: "
                    "an arm can learn from another by settings of its objective, such as objective.teacher={ARM}."
                )
        above.append(name)


def _check_roles(plan: Plan, path: Path) -> None:
    """Raises UserError if a plan that decides lacks an arm that its claims are about, or has two, or if one lacks the
    linear probe by which all of them are compared."""
    roles = [arm.role for arm in plan.arms.values()]
    for role in CLAIMED:
        if roles.count(role) != 1:
            raise UserError(f"{path} decides, so exactly one arm must have the role {role}, not {roles.count(role)}.")
    for name, arm in plan.arms.items():
        if arm.role in (*CLAIMED, *CHECKS) and arm.seeds is not None and not arm.role.endswith("-check"):
            raise UserError(f"{path} decides, so {name}, with the role {arm.role}, has all its seeds: leave seeds out.")
    for role in CHECKS:
        if roles.count(role) > 1:
            raise UserError(f"{path} decides, so at most one arm may have the role {role}, not {roles.count(role)}.")
    for name, arm in plan.arms.items():
        if arm.role in (*CLAIMED, *CHECKS) and not any(map(_is_probe, plan._lines(name))):
            raise UserError(
                f"{path} decides, so {name}, with the role {arm.role}, needs a linear probe with 10 % of the labels: "
                "add [linear_probe, --labels, 10%] to its evaluators."
            )
        tunes = [line for line in plan._lines(name) if line[0] == "finetune" and "10%" in line]
        if plan.tuning and not all(map(_searches, tunes)):
            raise UserError(
                f"{path} decides by rates that trials choose, so the fine-tuning of {name} needs several: add --lr and "
                "two rates or more to it."
            )


def _spends(line: list[str]) -> bool:
    """Whether an evaluator's arguments depend on the plan's budgets."""
    return not set(SPENT).isdisjoint(line)


def _searches(line: list[str]) -> bool:
    """Whether a fine-tuning chooses among learning rates."""
    after = line[line.index("--lr") + 1 :] if "--lr" in line else []
    return len([*itertools.takewhile(lambda word: not word.startswith("-") and "=" not in word, after)]) > 1


def _is_probe(line: list[str]) -> bool:
    """Whether an evaluator is the linear probe that the rule reads (LP10)."""
    return line[0] == "linear_probe" and "10%" in line and not {"logistic", "mae", "dino", "--per-block"} & set(line)


def _check(what: Plan | Arm | Tuning, kinds: dict[str, type], where: str) -> None:
    """Raises UserError if a field has the wrong type, is an empty dict or below 1, or lists anything but words."""
    for key, kind in kinds.items():
        value = getattr(what, key)
        empty, below_1 = kind is dict and not value, kind is int and isinstance(value, int) and value < 1
        wrong = not isinstance(value, kind) or empty or below_1
        words = key in ("settings", "controls", "search_space")
        if wrong or (words and not all(isinstance(word, str) for word in value)):
            kinds_in_words = {dict: "names with settings", list: "a list", int: "a whole number from 1", str: "a word"}
            expected = "a list of words, such as [key=value]" if words else kinds_in_words.get(kind, "true or false")
            raise UserError(f"{key} of {where} must be {expected}, not {value!r}: see recipes/study/compare.yaml.")


def _evaluators(lines: list, path: Path) -> list[list[str]]:
    for line in lines:
        if not isinstance(line, list) or not line or line[0] not in EVALUATORS:
            raise UserError(
                f"{line} in {path} is not an evaluator: write [NAME, ARGUMENT, …], of {', '.join(EVALUATORS)}."
            )
        if joined := [word for word in map(str, line) if re.match(r"--[a-z-]+=", word)]:
            raise UserError(f"Write the option and its value as two words in {path}, not as {joined[0]}.")
    return [list(map(str, line)) for line in lines]


def _tuning(what: dict, path: Path) -> Tuning:
    try:
        tuning = Tuning(**what)
    except TypeError:
        keys = ", ".join(f.name for f in dataclasses.fields(Tuning))
        raise UserError(f"tuning of {path} must have the keys {keys}, and no others.") from None
    _check(tuning, dict(seed=int), f"tuning of {path}")
    if tuning.seed < FIRST_SEED:
        raise UserError(f"tuning.seed of {path} must be {FIRST_SEED} or more: smaller seeds are for what is compared.")
    tuning.flops = _number(tuning.flops, "tuning.flops", path)
    [tuning.judge] = _evaluators([tuning.judge], path)
    if tuning.judge[0] not in JUDGES:
        raise UserError(f"tuning.judge of {path} must be {' or '.join(JUDGES)}: those can judge on held-out images.")
    return tuning


def _number(value: str | float, key: str, path: Path) -> float:
    """A positive number, also from a string: YAML 1.1 reads 1e13 as one. It has the six digits that commands print."""
    try:
        number = float(f"{float(value):g}")
    except (TypeError, ValueError):
        number = 0.0
    if not number > 0:
        raise UserError(f"{key} of {path} must hold numbers above 0, not {value!r}.")
    return number
