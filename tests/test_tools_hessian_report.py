"""tools/hessian_report: correlations against their definition, groups, pictures, files that are none."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import test_quantize_rules as rules
import toy

import train_gpt as tg

TOOL = Path(__file__).resolve().parents[1] / "tools" / "hessian_report.py"


def report(folder, monkeypatch, seed, **settings):
    calibration, _ = rules.known(seed, layers=4)
    q = rules.quantizer(calibration, monkeypatch, SEED=seed, **settings)
    path = folder / f"{seed}.safetensors"
    tg.save_tensors(path, *tg.hessian_report(q, q(1.0)))
    return path, q


def tool(*arguments):
    return subprocess.run([sys.executable, TOOL, *map(str, arguments)], capture_output=True, text=True)


def test_tables_correlations_and_a_picture(monkeypatch, tmp_path):
    paths, quantizers = zip(*(report(tmp_path, monkeypatch, seed, CLIP_RULE="fisher") for seed in (1, 2)))
    done = tool(*paths, "-o", tmp_path / "sigma.png")
    assert done.returncode == 0, done.stderr
    traces = [np.array([q.hessian[n].diagonal().sum().item() for n in q.bits]) for q in quantizers]
    assert f"matrix traces r = {np.corrcoef(*traces)[0, 1]:.3f}" in done.stdout
    assert "rule fisher, seed 1, 12 matrices" in done.stdout
    assert (tmp_path / "sigma.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name, words", [("none/x.png", "No such file"), ("x.foo", "not supported")])
def test_a_picture_that_cannot_be_written_is_one_line(monkeypatch, tmp_path, name, words):
    path, _ = report(tmp_path, monkeypatch, 1, CLIP_RULE="hand")
    done = tool(path, "-o", tmp_path / name)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: -o {tmp_path / name}: ") and words in done.stderr


def test_a_run_agrees_with_itself(monkeypatch, tmp_path):
    path, _ = report(tmp_path, monkeypatch, 1, CLIP_RULE="hand")
    done = tool(path, path)
    assert "group traces r = 1.000, matrix traces r = 1.000, row importance r = 1.000" in done.stdout


@pytest.mark.parametrize("content", [None, b"", b"not safetensors"])
def test_what_is_no_report_is_one_line(tmp_path, content):
    path = tmp_path / "x.safetensors"
    if content is not None:
        path.write_bytes(content)
    done = tool(path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and str(path) in done.stderr


def test_groups_are_pr_1412s():
    sys.path.insert(0, str(TOOL.parent))
    import hessian_report
    state = {"num_loops": 2, "loop_start": 3, "loop_end": 5}
    named = [hessian_report.group_of(f"blocks.{i}.mlp.fc.weight", state) for i in range(11)] + [hessian_report.group_of("tok_emb.weight", state)]
    assert named == ["early"] * 3 + ["loop"] * 3 + ["mid"] * 2 + ["late"] * 3 + ["head"]
    c = toy.config(NUM_LAYERS=11, LOOP_START=3, LOOP_END=5, PARALLEL_START_LAYER=8)
    assert [tg.layer_group(f"blocks.{i}.mlp.fc.weight", c) for i in range(11)] == named[:11]
