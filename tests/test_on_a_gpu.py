"""The measurements that wait for a GPU, in miniature: the command itself must not fail when one is at hand."""

import json
import math
import subprocess
import sys

import pytest
from test_loop import ROOT, environment

pytestmark = pytest.mark.matrix  # two minutes


def test_every_stage_runs_and_is_not_repeated(tmp_path):
    command = [sys.executable, str(ROOT / "tests/benchmark/on_a_gpu.py"), "--miniature", "--output", "out"]
    command += ["--stages", "check", "runs", "profile", "repeat"]
    for _ in range(2):
        subprocess.run(command, cwd=tmp_path, env=environment(), check=True, capture_output=True)
    rows = {
        stage: [json.loads(line) for line in (tmp_path / "out" / f"{stage}.jsonl").read_text().splitlines()]
        for stage in ("check", "runs", "profile", "repeat")
    }
    assert all(len({row["what"] for row in found}) == len(found) for found in rows.values())
    words, views, *losses = rows["check"]
    assert words["equal"] and views["difference"] == 0 and len(losses) == 9
    assert all(row["fp32"] == 0 and row["bf16"] < 0.02 for row in losses)
    assert len(rows["runs"]) == 10 and all(row["steps"] == 4 and row["utilisation"] > 0 for row in rows["runs"])
    assert all(row["equal"] for row in rows["repeat"]) and all(row["kernels"] for row in rows["profile"])
    late = subprocess.run([*command, "--minutes", "0", "--output", "late"], cwd=tmp_path, env=environment(),
                          capture_output=True, text=True)  # fmt: skip
    assert late.returncode == 1 and "0 minutes are over: the same command goes on." in late.stdout


def test_what_a_gpu_computes_otherwise_is_told():
    sys.path.insert(0, str(ROOT / "tests/benchmark"))
    import on_a_gpu

    fine = dict(equal=True, difference=1e-6, fp32=1e-6, bf16=0.01, waits=None, loss=3.0)
    assert on_a_gpu.wrong(fine) == []
    bad = dict(equal=False, difference=0.1, fp32=0.01, bf16=math.nan, waits="cudaStreamSynchronize")
    for key, value in bad.items():
        assert on_a_gpu.wrong(fine | {key: value}) == [key]
