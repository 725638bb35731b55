"""Contests of our code with others', measured in turns: round after round, each once, so that a noisy machine disturbs
all alike."""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch


@dataclass
class Contest:
    """The same work done by several. ours, peers: what is timed, called without arguments; work: how many `unit`s one
    call does; goal: ours over the fastest peer, as a ratio of speeds."""

    name: str
    ours: Callable[[], object]
    peers: dict[str, Callable[[], object]]
    work: float = 1
    unit: str = "call"
    goal: float | None = None
    about: dict[str, object] = field(default_factory=dict)


def run(contest: Contest, rounds: int, device: torch.device) -> dict:
    """A row: median seconds of each, and the ratio of our speed to that of the fastest peer, the median over rounds."""
    entrants = {"ours": contest.ours, **contest.peers}
    for call in entrants.values():  # warm-up: kernels are chosen, memory is allocated
        call()
    seconds: dict[str, list[float]] = {name: [] for name in entrants}
    for _ in range(rounds):
        for name, call in entrants.items():
            gc.collect()
            seconds[name].append(_time(call, device))
    median = {name: statistics.median(taken) for name, taken in seconds.items()}
    fastest = min(contest.peers, key=median.__getitem__)
    pairs = zip(seconds["ours"], seconds[fastest], strict=True)
    return dict(
        contest=contest.name,
        ratio=statistics.median(theirs / own for own, theirs in pairs),
        against=fastest,
        goal=contest.goal,
        unit=contest.unit,
        work=contest.work,
        seconds=median,
        rounds=rounds,
        **contest.about,
    )


def _time(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def table(rows: list[dict]) -> str:
    """The rows as Markdown: speeds relative to our own, and the goals."""
    lines = ["| work | ours, s | peers, s | our speed over the fastest peer | goal |", "|---|---:|---|---:|---:|"]
    for row in rows:
        own, *others = row["seconds"].items()
        peers = ", ".join(f"{name} {seconds:.3g}" for name, seconds in others)
        goal = "" if row["goal"] is None else f"≥ {row['goal']:g}"
        lines.append(f"| {row['contest']} | {own[1]:.3g} | {peers} | {row['ratio']:.2f} ({row['against']}) | {goal} |")
    return "\n".join(lines)
