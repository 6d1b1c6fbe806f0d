"""Test-time training on several ranks (gloo): the same total, no hangs, clear ends."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import adapt_toy as toy
import pytest

HERE = Path(__file__).resolve().parent


def start(size: int, *tasks: dict) -> list[subprocess.Popen]:
    """Ranks that do these tasks one after another."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    tasks = [{"sizes": toy.SIZES, **task} for task in tasks]
    env = {**os.environ, "WORKER": json.dumps(tasks), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
           "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return [subprocess.Popen([sys.executable, str(HERE / "adapt_toy.py")], env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for rank in range(size)]


def finish(processes, timeout=120) -> list[tuple[int, str]]:
    """Exit code and output of every rank; a rank that hangs is a failure."""
    end, out = time.monotonic() + timeout, []
    try:
        for p in processes:
            out.append("\n".join(p.communicate(timeout=max(end - time.monotonic(), 1))))
    finally:
        for p in processes:
            if p.poll() is None:
                p.kill()
    return [(p.returncode, text) for p, text in zip(processes, out)]


def scores(results) -> list[list[list[float]]]:
    """For each rank the scores of its tasks."""
    assert all(code == 0 for code, _ in results), results
    return [[json.loads(line.removeprefix("SCORE ")) for line in text.splitlines() if line.startswith("SCORE ")] for _, text in results]


# What is the same for any number of ranks: the documents of every phase and the global gradient. What is not: a row's A
# carries over from the rank's own last batch (TTT_WARM_START_A). Hence adapters stand still here, or start from nothing.
STILL = [{"settings": {"TTT_PROTOCOL": "published", "TTT_LORA_LR": 0}}, {"settings": {"TTT_PROTOCOL": "cached", "TTT_LORA_LR": 0}},
         {"settings": {"TTT_PROTOCOL": "cached", "TTT_LORA_LR": 0, **toy.DEALT}}]
ONE_BATCH = {"settings": {"TTT_BATCH_SIZE": 16}, "rehearse": True}
FEW = [{"sizes": sizes, "settings": {"PHASED_TTT_PREFIX_DOCS": 1000, "PHASED_TTT_NUM_PHASES": 3, "TTT_BATCH_SIZE": 1}}
       for sizes in ((20,), (1, 2), (30, 20), (16,) * 5)]
ALONE = {}


@pytest.mark.parametrize("size", [2, 3, 4])
def test_ranks_agree_with_one(size):
    tasks = [*STILL, ONE_BATCH, *FEW]
    got = scores(finish(start(size, *tasks)))
    assert all(rank == got[0] for rank in got)
    for i, task in enumerate([*STILL, ONE_BATCH]):
        if i not in ALONE:
            run, model = toy.setting(**task["settings"])
            ALONE[i] = toy.adapt(toy.documents(), run, model)[0], float(sum(p.detach().double().sum() for p in model.parameters()))
        expected, weights = ALONE[i]
        assert got[0][i][:3] == pytest.approx([expected.loss, expected.bpb, expected.tokens], abs=1e-5)
        assert got[0][i][3] == pytest.approx(weights, abs=1e-3)
    assert [score[2] for score in got[0][len(STILL) + 1:]] == [sum(task["sizes"]) - 1 for task in FEW]


def end_of_the_other(victim: int, how: str) -> str:
    """The one line of the rank that is left when the victim is killed or stopped in its second chunk."""
    processes = start(2, {"settings": {"TTT_BATCH_SIZE": 2}, "kill": victim, "how": how, "pause": 0.2})
    out = processes[1 - victim].communicate(timeout=60)
    assert processes[1 - victim].returncode == 1, out
    processes[victim].kill()
    processes[victim].communicate()
    assert not any("Traceback" in text for text in out), out
    lines = [line for line in "\n".join(out).splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, out
    return lines[0]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_other(victim):
    """No launcher here that would stop it."""
    assert f"rank {victim} is gone" in end_of_the_other(victim, "kill")


def test_a_rank_that_hangs_ends_the_other():
    """Its process is there and says nothing."""
    assert "rank 1 has not answered for" in end_of_the_other(1, "stop")


def test_sigterm_prints_the_partial_score():
    processes = start(2, {"settings": {"TTT_BATCH_SIZE": 2, "PHASED_TTT_NUM_PHASES": 0}, "pause": 0.3})
    for p in processes:
        while "BANKED" not in p.stdout.readline():
            assert p.poll() is None
    processes[1].send_signal(signal.SIGTERM)            # one rank is told; it tells the others
    results = finish(processes)
    assert all(code == 130 for code, _ in results), results
    assert "partial quantized_ttt_phased val_loss:" in results[0][1]
