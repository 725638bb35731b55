"""Run a plan: pre-train its arms with several seeds, evaluate them all alike, write the report.

    python eval/study.py PLAN [--data NAME|PATH|owner/name] [--seeds N] [key=value …]

On a laptop, in about half an hour, on scikit-learn's handwritten digits:

    python eval/study.py compare

PLAN is a file in recipes/study/ or the path of your own. Each part is a command of its own, printed to its log; several
run at a time. A part that is done is never done again: the same command goes on where it was stopped. A key=value goes
to the pre-training of every arm; an arm's own settings win over it.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml

from eval import features
from ssl_vit import data, errors, pretrain
from ssl_vit import recipe as recipes
from ssl_vit.errors import UserError, nearest, say

ROOT = Path(__file__).resolve().parent.parent
PLANS = recipes.RECIPES / "study"
EVALUATORS = ("linear_probe", "knn", "finetune")


@dataclass
class Plan:
    """What is run. arms: by name, the recipe and its settings; evaluators: each its name, then its arguments."""

    name: str
    arms: dict[str, dict]
    evaluators: list[list[str]]
    controls: list[str] = field(default_factory=list)
    seeds: int = 1
    settings: list[str] = field(default_factory=list)  # of all arms


@dataclass
class Part:
    """One command. It may start when `after` is done; it is done when `mark` exists."""

    name: str
    kind: str  # parts of one kind take about as long
    command: list[str]
    mark: Path
    after: "Part | None" = None
    started: float = 0.0
    process: subprocess.Popen | None = None
    failed: bool = False

    @property
    def done(self) -> bool:
        return self.mark.exists()


def read(name: str) -> Plan:
    """The plan of that name or file. Raises UserError for what is wrong in it."""
    known = sorted(p.stem for p in PLANS.glob("*.yaml"))
    path = next((p for p in (PLANS / f"{name}.yaml", Path(name)) if p.is_file()), None)
    if path is None:
        raise UserError(f"There is no plan {name!r}.{nearest(name, known)} Plans: {', '.join(known)}.")
    try:
        tree = yaml.safe_load(path.read_text())
        plan = Plan(name=path.stem, **tree)
    except (yaml.YAMLError, TypeError) as error:
        keys = ", ".join(f.name for f in dataclasses.fields(Plan) if f.name != "name")
        raise UserError(f"{path} is no plan ({' '.join(str(error).split())}): it has the keys {keys}.") from None
    for arm, what in plan.arms.items():
        if not isinstance(what, dict) or "recipe" not in what or what.keys() - {"recipe", "settings"}:
            raise UserError(f"Arm {arm!r} of {path} must name a recipe, and may have settings: {{recipe: mae}}.")
    for line in plan.evaluators:
        if not isinstance(line, list) or not line or line[0] not in EVALUATORS:
            raise UserError(f"{line} in {path} is no evaluator: write [NAME, ARGUMENT, …], of {', '.join(EVALUATORS)}.")
    return plan


def parts(plan: Plan, images: str | None, settings: list[str], threads: int, folder: Path) -> tuple[list[Part], list]:
    """(all commands, the folders of all runs). Raises UserError if a recipe refuses its settings."""
    found, runs = [], []
    limit = [f"runtime.threads={threads}"]

    def evaluations(where: str, rows: Path, after: Part | None, images: list[str]) -> None:
        for i, (name, *arguments) in enumerate(plan.evaluators):
            if where in plan.controls and name == "finetune":
                continue
            command = [_script("eval", name), *images, "--threads", str(threads), "--backbone", where, *arguments]
            mark = folder / "done" / f"{_hash([name, where, images, arguments])}.json"
            after = Part(f"{rows.name} {name}-{i}", f"{name}-{i}", [sys.executable, *command], mark, after)
            found.append(after)

    given = [] if images is None else ["--data", images]
    for seed in range(plan.seeds):
        for arm, what in plan.arms.items():
            own = [*plan.settings, *settings, *what.get("settings", []), f"train.seed={seed}"]
            recipe = pretrain.read(what["recipe"], own, images)
            run = Path("runs") / recipe.run_name()
            command = [_script("ssl_vit", "pretrain"), "--recipe", what["recipe"], *given, *limit, *own]
            part = Part(
                f"{run.name} pre-training",
                f"pre-training {arm}",
                [sys.executable, *command],
                run / "backbone" / "config.json",
            )
            found.append(part)
            runs.append(run)
            evaluations(str(run), run, part, given)
    named = images or recipe.data.name
    for control in plan.controls:
        run = features.folder_of(control, named)
        runs.append(run)
        evaluations(control, run, None, ["--data", named])
    return found, runs


def work(everything: list[Part], jobs: int, folder: Path) -> list[Part]:
    """Run all parts, so many at a time; returns those that failed. On SIGTERM or Ctrl-C the running ones are told."""
    took: dict[str, list[float]] = {}
    for part in everything:
        if part.done and part.mark.suffix == ".json" and part.mark.parent.name == "done":
            took.setdefault(part.kind, []).append(json.loads(part.mark.read_text())["seconds"])
    running: list[Part] = []
    devices = max(1, torch.cuda.device_count())
    begun, count = time.monotonic(), 0

    def stop(number, frame) -> None:
        for part in running:
            part.process.terminate()
        for part in running:
            part.process.wait()
        say("\nStopped. The same command goes on from there.")
        sys.exit(128 + number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    while True:
        waiting = [p for p in everything if not p.done and not p.failed and p.process is None]
        for part in waiting:  # what cannot come any more
            part.failed = part.after is not None and part.after.failed
        ready = [p for p in waiting if not p.failed and (p.after is None or p.after.done)]
        for part in ready[: jobs - len(running)]:
            log = folder / "logs" / f"{part.name.replace(' ', '-')}.txt"
            environment = os.environ | dict(PYTHONPATH=f"{ROOT}:{os.environ.get('PYTHONPATH', '')}")
            if devices > 1:
                environment["CUDA_VISIBLE_DEVICES"] = str(count % devices)
            with open(log, "w") as stream:
                stream.write(f"$ {shlex.join(part.command)}\n")
                stream.flush()
                part.process = subprocess.Popen(
                    part.command, stdout=stream, stderr=subprocess.STDOUT, env=environment, start_new_session=True
                )
            part.started = time.monotonic()
            running.append(part)
            count += 1
            say(f"{_clock(begun)}  started  {part.name}   {_left(everything, running, took, jobs)}")
        if not running:
            break
        time.sleep(0.2)
        for part in [p for p in running if p.process.poll() is not None]:
            running.remove(part)
            seconds = time.monotonic() - part.started
            took.setdefault(part.kind, []).append(seconds)
            code, part.process = part.process.returncode, None
            if code == 0 and part.mark.parent.name == "done":
                part.mark.write_text(json.dumps(dict(command=part.command, seconds=round(seconds, 1))))
            part.failed = not part.done
            if part.failed:
                log = folder / "logs" / f"{part.name.replace(' ', '-')}.txt"
                last = (log.read_text().strip().splitlines() or [""])[-1]
                say(f"{_clock(begun)}  FAILED   {part.name}: {last} (all of it: {log})")
            else:
                say(f"{_clock(begun)}  done     {part.name}, {seconds:.0f} s")
    for number, handler in before.items():
        signal.signal(number, handler)
    return [part for part in everything if part.failed]


def _left(everything: list[Part], running: list[Part], took: dict[str, list[float]], jobs: int) -> str:
    """How much is done and left, and the time that needs, from how long like parts took."""
    finished = sum(p.done for p in everything)
    left = [p for p in everything if not p.done and not p.failed and p.process is None]
    text = f"({finished} done, {len(running)} running, {len(left)} left"
    means = {kind: sum(values) / len(values) for kind, values in took.items()}
    if left and all(p.kind in means for p in left):
        seconds = sum(means[p.kind] for p in left) / jobs
        text += f", about {seconds / 60:.0f} min"
    return text + ")"


def _clock(begun: float) -> str:
    minutes, seconds = divmod(int(time.monotonic() - begun), 60)
    return f"{minutes:3d}:{seconds:02d}"


def _script(folder: str, name: str) -> str:
    return str(ROOT / folder / f"{name}.py")


def _hash(thing) -> str:
    return hashlib.sha256(json.dumps(thing).encode()).hexdigest()[:12]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", help="a name in recipes/study/, or a YAML file")
    parser.add_argument("--data", help="digits, cifar10, …; a folder of images or parquet files; owner/name on the hub")
    parser.add_argument("--seeds", type=int, help="pre-trainings of every arm; default: the plan's")
    parser.add_argument("--jobs", type=int, help="commands at a time; default: one per GPU, or per CPU core")
    parser.add_argument(
        "--evaluators", nargs="+", choices=EVALUATORS, help="only these of the plan's, as fine-tuning costs most"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands that are left, and run none")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings of every pre-training")
    args = parser.parse_intermixed_args()
    plan = read(args.plan)
    plan.seeds = args.seeds or plan.seeds
    if plan.seeds < 1 or (args.jobs is not None and args.jobs < 1):
        raise UserError("--seeds and --jobs are 1 or more.")
    if args.evaluators:
        plan.evaluators = [line for line in plan.evaluators if line[0] in args.evaluators]
    jobs = args.jobs or torch.cuda.device_count() or data.cores()
    threads = max(1, data.cores() // jobs)
    named = args.data or "digits"
    folder = Path("runs") / f"{plan.name}-{recipes.short(named)}"
    everything, runs = parts(plan, args.data, args.settings, threads, folder)
    if args.dry_run:
        for part in everything:
            if not part.done:
                print(shlex.join(part.command))
        return 0
    for sub in ("logs", "done"):
        (folder / sub).mkdir(parents=True, exist_ok=True)
    failed = work(everything, jobs, folder)
    if failed:
        say(f"{len(failed)} of {len(everything)} parts failed. Mend what is said above, then start it again.")
        return 1
    report = [_script("eval", "report"), *map(str, runs), "--output", str(folder / "report")]
    return subprocess.run([sys.executable, *report], check=False).returncode


if __name__ == "__main__":
    errors.run(main)
