"""Contests of our code with others', measured in turns: round after round, each once, so that a noisy machine disturbs
all alike."""

import gc
import multiprocessing
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

import torch


@dataclass
class Contest:
    """The same work done by several. ours, peers: what is timed, called without arguments; work: how many `unit`s one
    call does; goal: the cost of the cheapest peer over ours; cost: its unit. A call that returns a float tells its cost
    itself."""

    name: str
    ours: Callable[[], object]
    peers: dict[str, Callable[[], object]]
    work: float = 1
    unit: str = "call"
    goal: float | None = None
    cost: str = "s"
    about: dict[str, object] = field(default_factory=dict)


def run(contest: Contest, rounds: int, device: torch.device) -> dict:
    """A row: the median cost of each, and the ratio of that of the cheapest peer to ours, the median over rounds."""
    entrants = {"ours": contest.ours, **contest.peers}
    for call in entrants.values():  # warm-up: kernels are chosen, memory is allocated
        call()
    costs: dict[str, list[float]] = {name: [] for name in entrants}
    for _ in range(rounds):
        for name, call in entrants.items():
            gc.collect()
            costs[name].append(cost(call, device))
    median = {name: statistics.median(taken) for name, taken in costs.items()}
    cheapest = min(contest.peers, key=median.__getitem__)
    pairs = zip(costs["ours"], costs[cheapest], strict=True)
    return dict(
        contest=contest.name,
        ratio=statistics.median(theirs / own for own, theirs in pairs),
        against=cheapest,
        goal=contest.goal,
        unit=contest.unit,
        work=contest.work,
        costs=median,
        cost=contest.cost,
        rounds=rounds,
        **contest.about,
    )


def cost(call: Callable[[], object], device: torch.device) -> float:
    """What the call says that it cost, else its seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    told = call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return told if isinstance(told, float) else time.perf_counter() - began


class Apart:
    """An entrant in a process of its own, so that what the others do to threads and memory does not reach it.

    make: makes the call there, of these arguments; both must be picklable.
    """

    def __init__(self, make: Callable[..., Callable[[], object]], *arguments: object):
        context = multiprocessing.get_context("spawn")
        self.pipe, end = context.Pipe()
        self.process = context.Process(target=_serve, args=(end, make, arguments))
        self.process.start()
        end.close()

    def ask(self, question: Callable[..., float], *more: object) -> float:
        """question(call, *more), asked there."""
        self.pipe.send((question, more))
        answer: float = self.pipe.recv()
        return answer

    def __enter__(self) -> "Apart":
        return self

    def __exit__(self, *error: object) -> None:
        self.pipe.close()
        self.process.join()


def _serve(pipe: Connection, make: Callable[..., Callable[[], object]], arguments: tuple) -> None:
    call = make(*arguments)
    try:
        while True:
            question, more = pipe.recv()
            pipe.send(question(call, *more))
    except EOFError:
        pass


def table(rows: list[dict]) -> str:
    """The rows as Markdown: what each cost, ratios to our cost, and the goals."""
    lines = ["| work | ours | peers | theirs over ours | goal |", "|---|---:|---|---:|---:|"]
    for row in rows:
        own, *others = row["costs"].items()
        peers = ", ".join(f"{name} {cost:.3g}" for name, cost in others)
        goal = "" if row["goal"] is None else f"≥ {row['goal']:g}"
        ours, ratio = f"{own[1]:.3g} {row['cost']}", f"{row['ratio']:.2f} ({row['against']})"
        lines.append(f"| {row['contest']} | {ours} | {peers} | {ratio} | {goal} |")
    return "\n".join(lines)
