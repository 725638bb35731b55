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
    """One command. It is done when `mark` exists, which lies in the run it belongs to and goes with it."""

    name: str
    kind: str  # parts of one kind take about as long
    command: list[str]
    mark: Path
    needs: "Part | None" = None  # must be done
    after: "Part | None" = None  # must have ended
    started: float = 0.0
    device: str = ""
    process: subprocess.Popen | None = None
    failed: bool = False

    @property
    def done(self) -> bool:
        return self.mark.exists()

    @property
    def ended(self) -> bool:
        return self.done or self.failed

    @property
    def evaluates(self) -> bool:
        return self.needs is not None


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
    kinds = dict(arms=dict, evaluators=list, controls=list, seeds=int, settings=list)
    for key, kind in kinds.items():
        if not isinstance(getattr(plan, key), kind) or (key == "arms" and not plan.arms):
            raise UserError(
                f"{key} of {path} is no {kind.__name__}, or empty: recipes/study/compare.yaml shows how it is."
            )
    for arm, what in plan.arms.items():
        if not isinstance(what, dict) or "recipe" not in what or what.keys() - {"recipe", "settings"}:
            raise UserError(f"Arm {arm!r} of {path} must name a recipe, and may have settings: {{recipe: mae}}.")
    for line in plan.evaluators:
        if not isinstance(line, list) or not line or line[0] not in EVALUATORS:
            raise UserError(f"{line} in {path} is no evaluator: write [NAME, ARGUMENT, …], of {', '.join(EVALUATORS)}.")
    plan.evaluators = [list(map(str, line)) for line in plan.evaluators]
    return plan


def parts(plan: Plan, images: str | None, settings: list[str], threads: int) -> tuple[list[Part], list[Path]]:
    """(all commands, the folders of all runs). Raises UserError if a recipe refuses its settings, or if a run of that
    name is of other settings."""
    found: list[Part] = []
    runs: list[Path] = []
    given = [] if images is None else ["--data", images]

    def evaluations(backbone: str, rows: Path, needs: Part, more: list[str]) -> None:
        after = needs
        for i, (name, *arguments) in enumerate(plan.evaluators):
            if backbone in plan.controls and name == "finetune":
                continue
            command = [_script("eval", name), *more, "--threads", str(threads), "--backbone", backbone, *arguments]
            mark = rows / "done" / f"{_hash([name, *more, *arguments])}.json"
            after = Part(f"{rows.name} {name}-{i}", f"{name}-{i}", [sys.executable, *command], mark, needs, after)
            found.append(after)

    for seed in range(plan.seeds):
        for arm, what in plan.arms.items():
            own = [*plan.settings, *settings, *what.get("settings", []), f"train.seed={seed}"]
            recipe = pretrain.read(what["recipe"], own, images)
            run = Path("runs") / recipe.run_name()
            if run in runs:
                raise UserError(f"Arm {arm!r} is the same as another: both would be {run}.")
            _refuse_other(run, recipe)
            command = [_script("ssl_vit", "pretrain"), "--recipe", what["recipe"], *given]
            command += [f"runtime.threads={threads}", *own]
            mark = run / "backbone" / "config.json"
            part = Part(f"{run.name} pre-training", f"pre-training {arm}", [sys.executable, *command], mark)
            found.append(part)
            runs.append(run)
            evaluations(str(run), run, part, [])  # on the images that its recipe names
    for control in plan.controls:
        rows = features.folder_of(control, recipe.data.name)
        evaluations(control, rows, found[0], ["--data", str(runs[0])])
        runs.append(rows)
    return found, runs


def _refuse_other(run: Path, recipe: recipes.Recipe) -> None:
    """Raises UserError if there is a run of that name whose recipe says otherwise."""
    if not (run / "recipe.yaml").exists():
        return
    old, new = yaml.safe_load((run / "recipe.yaml").read_text()), recipe.as_dict()
    for section, values in new.items():  # what is open was resolved there, from the images
        if isinstance(values, dict):
            new[section] = old.get(section, {}) | {k: v for k, v in values.items() if v not in (None, "auto")}
    if isinstance(new["data"]["size"], int):
        new["data"]["size"] = [new["data"]["size"]] * 2
    keys = recipes.differences(old, old | new)
    if keys:
        raise UserError(
            f"{run} is a run with other settings ({', '.join(keys)}): remove it, or work in another folder."
        )


def work(everything: list[Part], jobs: int, folder: Path) -> list[Part]:
    """Run all parts, so many at a time; returns those that failed. When told to stop, it tells the running ones."""
    took: dict[str, list[float]] = {}
    for part in everything:
        if part.done and part.evaluates:
            took.setdefault(part.kind, []).append(json.loads(part.mark.read_text())["seconds"])
    running: list[Part] = []
    devices = _devices(jobs)
    begun = time.monotonic()

    def stop(number, frame) -> None:
        for part in running:
            part.process.terminate()
        for part in running:
            part.process.wait()
        say("\nStopped. The same command goes on from there.")
        sys.exit(128 + number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    while True:
        waiting = [p for p in everything if not p.ended and p.process is None]
        for part in waiting:
            part.failed = part.needs is not None and part.needs.failed
        ready = [p for p in waiting if all(q is None or q.ended for q in (p.needs, p.after)) and not p.failed]
        for part in ready[: jobs - len(running)]:
            log = folder / "logs" / f"{part.name.replace(' ', '-')}.txt"
            environment = os.environ | dict(PYTHONPATH=f"{ROOT}:{os.environ.get('PYTHONPATH', '')}")
            if devices:
                part.device = environment["CUDA_VISIBLE_DEVICES"] = devices.pop(0)
            with open(log, "w") as stream:
                stream.write(f"$ {shlex.join(part.command)}\n")
                stream.flush()
                part.process = subprocess.Popen(
                    part.command, stdout=stream, stderr=subprocess.STDOUT, env=environment, start_new_session=True
                )
            part.started = time.monotonic()
            running.append(part)
            say(f"{_clock(begun)}  started  {part.name}   {_left(everything, running, took, jobs)}")
        if not running:
            break
        time.sleep(0.2)
        for part in [p for p in running if p.process.poll() is not None]:
            running.remove(part)
            if part.device:
                devices.append(part.device)
            seconds = time.monotonic() - part.started
            took.setdefault(part.kind, []).append(seconds)
            code, part.process = part.process.returncode, None
            if code == 0 and part.evaluates:
                part.mark.parent.mkdir(exist_ok=True)
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


def _devices(jobs: int) -> list[str]:
    """A GPU for each of so many jobs, of those that this process may use; [] without any."""
    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",")[:count] if visible else list(map(str, range(count)))
    return [names[i % count] for i in range(jobs)] if count else []


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
        "--evaluators",
        metavar="NAME[,NAME]",
        help="only these of the plan's, e.g. linear_probe,knn: fine-tuning costs most",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands that are left, and run none")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings of every pre-training")
    args = parser.parse_intermixed_args()
    plan = read(args.plan)
    plan.seeds = plan.seeds if args.seeds is None else args.seeds
    if plan.seeds < 1 or (args.jobs is not None and args.jobs < 1):
        raise UserError("--seeds and --jobs are 1 or more.")
    if args.evaluators:
        wanted = args.evaluators.split(",")
        if set(wanted) - set(EVALUATORS):
            raise UserError(
                f"--evaluators {args.evaluators}: write some of {','.join(EVALUATORS)}, with commas between."
            )
        plan.evaluators = [line for line in plan.evaluators if line[0] in wanted]
    jobs = args.jobs or torch.cuda.device_count() or data.cores()
    threads = max(1, data.cores() // jobs)
    if any(text.startswith("data.name=") for text in [*plan.settings, *args.settings]):
        raise UserError("Name the images with --data.")
    folder = Path("runs") / f"{plan.name}-{recipes.short(args.data or 'digits')}"
    everything, runs = parts(plan, args.data, args.settings, threads)
    if args.dry_run:
        for part in everything:
            if not part.done:
                print(shlex.join(part.command))
        return 0
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    failed = work(everything, jobs, folder)
    there = [str(run) for run in runs if (run / "results.jsonl").exists()]
    if there:
        report = [_script("eval", "report"), *there, "--output", str(folder / "report")]
        subprocess.run([sys.executable, *report], check=not failed)
    if failed:
        say(f"{len(failed)} of {len(everything)} parts failed. Mend what is said above, then start it again.")
    return 1 if failed else 0


if __name__ == "__main__":
    errors.run(main)
