"""bench/scale.py: what it counts on paper is what a step really hands to the collectives; a rehearsal gives all cases."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import toy

import train_gpt as tg

BENCH = Path(__file__).resolve().parents[1] / "bench"
sys.path.insert(0, str(BENCH))
import scale  # noqa: E402


class Recorder(scale.Alone):
    """Notes the numbers in every collective's larger tensor."""

    def __init__(self, world):
        super().__init__(world)
        self.numbers = []

    def sum(self, tensor, op=None):
        self.numbers.append(("sum", tensor.numel()))
        return tensor

    def reduce_scatter(self, out, tensor):
        self.numbers.append(("scatter", tensor.numel()))
        return super().reduce_scatter(out, tensor)

    def all_gather(self, out, tensor):
        self.numbers.append(("gather", out.numel()))
        return super().all_gather(out, tensor)


@pytest.mark.parametrize("size", [2, 3, 8])
def test_the_bytes_on_paper_are_those_of_a_step(size):
    c = toy.config()
    world, model = Recorder(toy.world(0, size)), toy.model(c)
    optimizers = tg.Optimizers(model, c, world)
    ids = torch.from_numpy(toy.row(33, [0]).astype("int64"))[None]
    model.losses(ids[:, :-1], ids[:, 1:], tg.Segments(torch.tensor([0, 32], dtype=torch.int32), 32), 2).mean().backward()
    optimizers.start_reduce()
    norm = optimizers.step(1.0, 0)
    assert torch.isfinite(norm)
    total = lambda kind: sum(n for k, n in world.numbers if k == kind)
    scatter, gather, *reduced = (held for _, held, _ in scale.wire_bytes(c, size))
    assert (scatter, gather) == (2 * total("scatter"), 2 * total("gather"))         # bfloat16 on GPUs
    assert [4 * n for k, n in world.numbers if k == "sum"] == reduced


def test_the_worst_case_is_on_top():
    case = lambda ranks, accumulation, rate: {"ranks": ranks, "accumulation": accumulation, "loops": 0, "tokens_per_second": rate}
    result = lambda ranks, *rates: {"cases": [case(ranks, a, r) for a, r in zip((1, 8), rates)], "device": "d", "attention": "a", "seconds": 1}
    out = scale.compare({1: result(1, 100.0, 110.0), 2: result(2, 190.0, 198.0)})
    assert out["ratio"] == pytest.approx(1.8) and out["accumulation"] == 8 and out["ttt_ratio"] is None
    assert (out["tokens_per_second_1"], out["tokens_per_second_2"]) == (110.0, 198.0)


def test_bad_input_gets_one_line():
    done = subprocess.run([sys.executable, str(BENCH / "scale.py"), "--ranks", "1"], env=toy.clean_environment(), capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.splitlines() == ["error: --ranks [1]: expected two numbers or more, to compare"]


@pytest.mark.slow
def test_a_rehearsal(tmp_path):
    done = subprocess.run([sys.executable, str(BENCH / "scale.py"), "--cpu", "--steps", "2", "--ttt", "--json", str(tmp_path / "s.json")],
                          env=toy.clean_environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    out = json.loads((tmp_path / "s.json").read_text())
    assert {"tokens_per_second_1", "tokens_per_second_2", "ratio", "accumulation", "ttt_ratio", "device"} <= set(out)
    assert len(out["cases"]) == 8 and all(("exposed_ms" in r) == (r["ranks"] == 2 and r["accumulation"] == 1) for r in out["cases"])
