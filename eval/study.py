"""Run a plan: tune its arms if it says so, pre-train them with several seeds, evaluate all in the same way, and report.

    python eval/study.py PLAN [--data NAME|PATH|owner/name] [--seeds N] [key=value …]

On a laptop, in about half an hour, on scikit-learn's handwritten digits:

    python eval/study.py compare

PLAN is a file in recipes/study/ or a path to your own. Each job is a command of its own with a log of its own; several
run at a time. What is done is never run again: the same command continues where it was stopped. The progress is in
runs/PLAN-DATA[-HASH]/progress.txt. A key=value applies to the pre-training of every arm; an arm's own settings win.

--plan says what it would cost on this machine and what differences it could detect; it trains a few timed steps alone.
--results DIR stores in DIR, packed, what a verdict needs. From that folder a study resumes even if its run directories
are lost: finished evaluations are kept, and a pre-training is repeated only if an evaluation of it is missing.
"""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import ssl_vit.own_eval  # noqa: F401  # isort: skip  before torch, and before another package called eval

import torch

from eval.compare.evidence import COPIES, diverged
from eval.schedule import plans
from eval.schedule.cost import estimate
from eval.schedule.jobs import Job, needed, withdraw, work
from eval.schedule.packed import Packed
from eval.schedule.trainings import Study
from ssl_vit import commands, data, errors, files, system
from ssl_vit import recipe as recipes
from ssl_vit.commands import Parser
from ssl_vit.errors import UserError, say


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("plan", help=f"{', '.join(plans.names())}, or a YAML file")
    parser.add_argument("--data", help="digits, cifar10, …; a folder of images or parquet files; owner/name on the hub")
    parser.add_argument("--eval-data", metavar="DATA", help="evaluate on these images instead of those of the training")
    parser.add_argument("--seeds", type=int, help="pre-trainings of every arm; default: the plan's")
    parser.add_argument("--jobs", type=int, help="commands at a time; default: one per GPU, or per CPU core")
    parser.add_argument(
        "--evaluators",
        metavar="NAME[,NAME]",
        help="only these of the plan's, e.g. linear_probe,knn: fine-tuning costs the most",
    )
    parser.add_argument("--arms", metavar="NAME[,NAME]", help="only these of the plan's arms, and the untrained ones")
    parser.add_argument(
        "--no-tuning", action="store_true", help="no trials: the recipes' settings, and the first of each search_space"
    )
    parser.add_argument(
        "--accept-failed", action="store_true", help="continue if trials have failed: they are not chosen"
    )
    parser.add_argument("--results", type=Path, metavar="DIR", help="keep packed results there, and go on from them")
    parser.add_argument(
        "--plan", action="store_true", dest="estimate", help="print runs, FLOPs, hours, disk and power; do nothing"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands that are left, without running them")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings of every pre-training")
    args = parser.parse_intermixed_args()
    plan = plans.read(args.plan)
    if any(number is not None and number < 1 for number in (args.seeds, args.jobs)):
        raise UserError("--seeds and --jobs must be 1 or more.")
    if any(text.startswith("data.name=") for text in [*plan.settings, *args.settings]):
        raise UserError("Name the images with --data.")
    if plan.decides and args.data is None:
        raise UserError(f"{plan.name} is not meant for the digits: name images with --data, such as --data cifar10.")
    decides = plan.decides
    given = plan.narrow(args.seeds, args.arms, args.evaluators, args.no_tuning)
    given += [text for text in args.settings if not plans.may_change(text)]
    settings = plan.spend(args.settings)
    if args.eval_data:
        given += [f"eval_data={args.eval_data}"]
        plan.eval_data, plan.decides = args.eval_data, False
    if decides and not plan.decides and not args.dry_run and not args.estimate:
        say(f"This study does not follow {plan.name} in full, so no verdict will be computed from it.")
    at_once = args.jobs or torch.cuda.device_count() or system.cores()
    packed = Packed(args.results) if args.results else None
    if packed:
        packed.check(plan.name, recipes.short(plan.eval_data or args.data or "digits"), plan.decides)
    if packed and not args.estimate:
        restored = packed.restore(Path("runs"))
        if restored:
            say(f"Going on from {args.results}: {len(restored)} runs that are not here were evaluated before.")
    study = Study(plan, args.data, settings, given, threads=max(1, system.cores() // at_once))
    if args.estimate:
        say(estimate(study, at_once))
        return 0
    if args.dry_run:
        left = needed(study.trial_jobs(study.next_trials())) or needed(study.jobs(study.trainings()))
        for job in left:
            if not job.done:
                print(shlex.join(job.command))
        return 0
    check_images(study)
    study.folder.mkdir(parents=True, exist_ok=True)
    with files.Lock(study.folder / ".lock", wait=False, refusal="wait for it, or stop it."):
        return run(study, at_once, args.accept_failed, packed)


def check_images(study: Study) -> None:
    """Read the images to evaluate on before anything is trained. Raises UserError if needed labels are missing, or if a
    study that decides has runs on other images."""
    plan, config = study.plan, study.evaluated()
    if any(line[0] in plans.OF_LABELS for arm in plan.arms for line in plan.evaluators_of(arm)):
        classes, which = None, ""
        for role in ("train", "report"):
            images = data.load(config, role, classes)
            if images.labels is None:
                raise UserError(
                    f"The images of {config.name}{which} have no labels, which {', '.join(plans.OF_LABELS)} need. If a "
                    "column of another name holds them, set data.label_column=COLUMN; for a look at unlabelled images "
                    "there is eval/embed.py."
                )
            if role == "train" and plan.decides:
                refuse_other_images(study, images)
            classes, which = images.classes, " to report on"
    elif plan.eval_data:
        data.load(config, "report")


def refuse_other_images(study: Study, images: data.ImageSet) -> None:
    """Raises UserError if a run was trained on images with another fingerprint than these, or than those of them that
    have a label, so that no verdict would follow. Permuted pixels have their own."""
    for training in study.trainings():
        file = training.run / "recipe.yaml"
        settings = recipes.read_settings(file) if file.exists() else {}
        if not settings or settings["data"].get("permute_pixels"):
            continue
        there, here = settings["images"]["fingerprint"], images.fingerprint
        if there != (images.labelled().fingerprint if settings["resolved"]["labelled"] else here):
            raise UserError(
                f"{training.run} was trained on other images than those of --data (their fingerprints are {there} and "
                f"{here}){COPIES}, and a verdict needs the same for all runs: name those, or start in an empty folder "
                "with other --results."
            )


def run(study: Study, at_once: int, accept_failed: bool, packed: Packed | None = None) -> int:
    """Do what is left, and write the report. Returns the exit code."""
    keep = packed.add if packed else lambda run: None
    failed: list[Job] = []
    withdraw(study.jobs(study.trainings()))
    while trials := study.next_trials([job.run for job in failed]):
        failed += work(needed(study.trial_jobs(trials)), at_once, study.folder, keep)
        if failed and not accept_failed:
            say(
                f"{len(failed)} jobs of the trials failed. Fix the errors above and run the command again, or pass "
                "--accept-failed to choose among the others."
            )
            return 1
        for trial in trials:
            if trial.run not in [job.run for job in failed] and not study.is_judged(trial):
                raise UserError(
                    f"{trial.run} was judged, and has no accuracy on held-out images: delete its folder done, there "
                    "and in packed results, and run the command again."
                )
    for trial in [trial for tried in study.trials.values() for trial in tried]:
        keep(trial.run)
    for arm, settings in study.chosen.items():
        say(f"Chosen for {arm}: {' '.join(settings)}")
    trainings = study.trainings()
    manifest = study.describe(trainings)
    files.write(study.folder / "study.json", manifest)
    if packed:
        packed.describe(manifest)
    if study.plan.decides and (ended := diverged(json.loads(manifest))):
        say(f"Undecided: {ended}.")
        return 1
    everything = needed(study.jobs(trainings))
    failed = work(everything, at_once, study.folder, keep)
    folders = [training.run for training in trainings] + list(study.controls().values())
    code = 1 if failed else 0
    if failed and study.plan.decides and (ended := diverged(json.loads(manifest))):
        say(f"Undecided: {ended}.")
    elif failed and study.plan.decides:
        say("No report: a study with a verdict shows no contrast before all of its runs are measured.")
    elif any((folder / "results.jsonl").exists() for folder in folders):
        report = [
            str(commands.script("report")),
            "--study",
            str(study.folder),
            "--output",
            str(study.folder / "report"),
        ]
        code = subprocess.run([sys.executable, *report], check=False).returncode or code
    if failed:
        say(f"{len(failed)} of {len(everything)} jobs failed. Fix the errors above, then run the command again.")
    return code


if __name__ == "__main__":
    errors.run(main)
