"""Run commands that depend on one another, several at a time: the scheduler of eval/study.py.

    from eval.schedule.jobs import Job, work
    failed = work([Job("train", "training", ["python", …], mark=Path("runs/x/done"))], at_once=2, folder=Path("runs/s"))

A job is done when its mark exists. Jobs that are done are never run again, so a stopped study continues where it was.
"""

import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

import torch

from eval.measure import results
from eval.schedule.processes import Command
from ssl_vit import files, system
from ssl_vit.commands import ROOT
from ssl_vit.errors import BUSY, say

SHOWN = 30  # seconds between updates of progress.txt


@dataclass(eq=False)
class Job:
    """One command: the interpreter, a script of ours, its arguments. It is done when `mark` exists, a file in the run
    that it belongs to, with which it is deleted."""

    name: str
    kind: str  # jobs of one kind take about equally long
    command: list[str]
    mark: Path
    needs: list["Job"] = field(default_factory=list)  # must be done first
    after: "Job | None" = None  # must have ended first, done or failed
    marks: bool = False  # whether its command writes the mark itself
    started: float = 0.0
    before: list[dict] = field(default_factory=list)  # the rows of its run then
    device: str = ""
    failed: bool = False
    later: float = 0.0  # not before this time: another process was writing its run

    @property
    def done(self) -> bool:
        return self.mark.exists()

    @property
    def ended(self) -> bool:
        return self.done or self.failed

    @property
    def possible(self) -> bool:
        """Whether nothing that it needs is missing."""
        return not self.failed and all(job.done for job in self.needs) and (self.after is None or self.after.ended)

    @property
    def ready(self) -> bool:
        return self.possible and time.monotonic() >= self.later

    @property
    def run(self) -> Path:
        """The folder that it writes to."""
        return self.mark.parent.parent

    @property
    def script(self) -> Path:
        """Its script, relative to the project."""
        return Path(self.command[1]).relative_to(ROOT)


def _measured(job: Job) -> dict[str, str | None]:
    """The images behind each row that was measured in the job's run since it started, by the row's place."""
    return {results.place_of(row): row.get("images") for row in results.read(job.run) if row not in job.before}


def withdraw(jobs: list[Job]) -> None:
    """Remove the marks of jobs whose rows are no longer there: another study may share the run, and its rows on other
    images of the same name replace these."""
    for job in jobs:
        if job.marks or not job.done:
            continue
        made = json.loads(job.mark.read_text(encoding="utf-8")).get("images", {})
        if not made.items() <= {results.place_of(row): row.get("images") for row in results.read(job.run)}.items():
            say(f"{job.name} is measured again: rows on other images of that name have replaced its own.")
            job.mark.unlink()


def needed(jobs: list[Job]) -> list[Job]:
    """Without the trainings after which everything is done: nobody needs their weights any more.

    A job comes after those that it needs.
    """
    wanted = {id(job) for other in jobs for job in other.needs}
    used: set[int] = set()
    kept: list[Job] = []
    for job in reversed(jobs):
        if job.done or not job.marks or id(job) in used or id(job) not in wanted:
            kept.append(job)
            used |= set() if job.done else set(map(id, job.needs))
    return kept[::-1]


def work(jobs: list[Job], at_once: int, folder: Path, then: Callable[[Path], object] = lambda run: None) -> list[Job]:
    """Run all jobs, this many at once; returns those that failed. When told to stop, it stops the running ones.

    A job whose run another process is writing, as a study beside this one may, is tried again every SHOWN seconds,
    unless it is done by then.

    folder gets logs/, a file for each job, and progress.txt, rewritten whenever something starts or ends, and every
    SHOWN seconds. then: called with a job's run when the job has ended, and every SHOWN seconds while it is running,
    since a machine may not come back. At the start it is called with the runs that are there: an earlier call may have
    been killed before it got to it.
    """
    for run in dict.fromkeys(job.run for job in jobs if job.run.exists()):
        then(run)
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    times = Times(folder / "logs" / "seconds.jsonl")
    running: dict[Job, Command] = {}
    devices = devices_for(at_once)
    begun = shown = time.monotonic()

    def tell(word: str, job: Job, more: str) -> None:
        minutes, seconds = divmod(int(time.monotonic() - begun), 60)
        say(f"{minutes:3d}:{seconds:02d}  {word:7}  {job.name}{more}")
        files.write(folder / "progress.txt", progress(jobs, running, times, at_once))

    asked: list[int] = []  # the signals to stop that have arrived
    before = {number: signal.signal(number, lambda number, frame: asked.append(number)) for number in system.heeded()}
    try:
        while True:
            for job in [job for job in jobs if job.later and job.done]:  # by the other
                job.later = 0.0
                then(job.run)
                tell("done", job, ", by another process")
            waiting = [job for job in jobs if not job.ended and job not in running]
            for job in waiting:
                job.failed = any(other.failed for other in job.needs)
            for job in [job for job in waiting if job.ready][: at_once - len(running)]:
                if devices:
                    job.device = devices.pop(0)
                running[job] = _start(job, _log(folder, job))
                tell("started", job, f"   ({summary(jobs, running, times, at_once)})")
            if asked:
                stop(running)
                for job in running:
                    then(job.run)
                files.write(folder / "progress.txt", progress(jobs, (), times, at_once))
                say("\nStopped. The same command continues from there.")
                sys.exit(128 + asked[0])
            if not running and not any(job.possible for job in waiting):
                break
            time.sleep(0.2)
            if time.monotonic() - shown > SHOWN:
                shown = time.monotonic()
                files.write(folder / "progress.txt", progress(jobs, running, times, at_once))
                for job in running:
                    then(job.run)
            for job, code in [(job, code) for job, c in running.items() if (code := c.poll()) is not None]:
                del running[job]
                if job.device:
                    devices.append(job.device)
                seconds = time.monotonic() - job.started
                if code == 0 and not job.marks:
                    words = shlex.join(["python", str(job.script), *job.command[2:]])
                    about = dict(command=words, seconds=round(seconds, 1), images=_measured(job))
                    files.write(job.mark, json.dumps(about))
                busy, job.failed = code == BUSY, code not in (0, BUSY) or (code == 0 and not job.done)
                then(job.run)
                last = (_log(folder, job).read_text(encoding="utf-8").strip().splitlines() or [""])[-1]
                if busy and not job.later:
                    tell("waits", job, f": {last}")
                job.later = time.monotonic() + SHOWN if busy else 0.0
                if job.failed:
                    tell("FAILED", job, f": {last} (full log: {_log(folder, job)})")
                elif not busy:
                    # a pre-training that went on took longer than this part of it
                    times.add(
                        job.kind, max(seconds, results.spent(job.run)["seconds"]) if job.marks else seconds, at_once
                    )
                    tell("done", job, f", {seconds:.0f} s")
    finally:
        stop(running)
        for number, handler in before.items():
            signal.signal(number, handler)
    return [job for job in jobs if job.failed]


def stop(running: dict[Job, Command]) -> None:
    """Stop these commands, and wait until they have ended."""
    for command in running.values():
        command.stop()
    for command in running.values():
        command.wait()


class Times:
    """How long jobs of each kind took, including earlier calls."""

    def __init__(self, file: Path):
        self.file = file
        text = file.read_text(encoding="utf-8") if file.exists() else ""
        self.lines: list[dict] = [json.loads(line) for line in text.splitlines()]

    def add(self, kind: str, seconds: float, at_once: int) -> None:
        line = dict(kind=kind, seconds=round(seconds, 1), at_once=at_once)
        self.lines.append(line)
        files.append(self.file, json.dumps(line) + "\n")

    def mean(self, kind: str, at_once: int | None = None) -> float | None:
        """The mean in seconds, of those that ran with as many at once if that is given; None if none is done."""
        lines = [line for line in self.lines if line["kind"] == kind and at_once in (None, line.get("at_once"))]
        return sum(line["seconds"] for line in lines) / len(lines) if lines else None


def summary(jobs: list[Job], running: Collection[Job], times: Times, at_once: int) -> str:
    """How many jobs are done, running and left, and the time left, estimated from jobs of the same kinds."""
    left = [job for job in jobs if not job.ended and job not in running]
    text = f"{sum(job.done for job in jobs)} done, {len(running)} running, {len(left)} left"
    means = [seconds for job in left if (seconds := times.mean(job.kind)) is not None]
    if left and len(means) == len(left):
        text += f", about {sum(means) / at_once / 60:.0f} min"
    return text


def progress(jobs: list[Job], running: Collection[Job], times: Times, at_once: int) -> str:
    """The same, with a line for each kind."""
    kinds = dict.fromkeys(job.kind for job in jobs)
    wide = max(map(len, kinds))
    lines = [f"{summary(jobs, running, times, at_once)} ({time.strftime('%H:%M')})", ""]
    lines.append(f"{'':{wide}}    done  failed  running    left  seconds each")
    for kind in kinds:
        alike = [job for job in jobs if job.kind == kind]
        counts = [sum(j.done for j in alike), sum(j.failed for j in alike), sum(j in running for j in alike)]
        counts.append(len(alike) - sum(counts))
        each = times.mean(kind)
        words = [f"{count or '.':>8}" for count in counts] + [f"{'?' if each is None else f'{each:.0f}':>14}"]
        lines.append(f"{kind:{wide}}{''.join(words)}")
    lines += ["", *(f"running: {job.name}{_how_far(job)}" for job in running)]
    return "\n".join(lines) + "\n"


def _how_far(job: Job) -> str:
    """How long a job has been running and, for a pre-training, the last step that it logged."""
    words = f", {(time.monotonic() - job.started) / 60:.0f} min"
    log = files.read_lines(job.run / "log.jsonl") if job.marks else []
    return f"{words}, step {log[-1]['step']:,}" if log else words


def _start(job: Job, log: Path) -> Command:
    files.write(log, f"$ {shlex.join(job.command)}\n")
    module = ".".join(job.script.with_suffix("").parts)
    variables = dict(CUDA_VISIBLE_DEVICES=job.device) if job.device else {}
    job.before = results.read(job.run)
    command = Command(module, job.command[1:], log, variables)
    job.started = time.monotonic()
    return command


def _log(folder: Path, job: Job) -> Path:
    return folder / "logs" / f"{job.name.replace(' ', '-')}.txt"


def devices_for(at_once: int) -> list[str]:
    """A GPU for each of the jobs at once, among those that this process may use; [] if there are none."""
    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",")[:count] if visible else list(map(str, range(count)))
    return [names[i % count] for i in range(at_once)] if count else []
