"""launch.sh and its tools: the preconditions one by one, what happens to seeds that fail or are done, the table."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import toy

import train_gpt as tg

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import preconditions as pre  # noqa: E402
import seed_table  # noqa: E402
from parse_log import parse_all  # noqa: E402
from tools_logs import ours  # noqa: E402


def launch(*arguments, **settings):
    environment = {**toy.clean_environment(), "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
                   **{name: str(value) for name, value in settings.items()}}
    for name in ("SEEDS", "RECIPE", "FORCE"):
        if name not in settings:
            environment.pop(name, None)
    return subprocess.run([str(ROOT / "launch.sh"), *arguments], env=environment, capture_output=True, text=True, timeout=120)


def test_check_without_gpus_names_all_that_is_missing(toy_data, tmp_path):
    """The full recipe on this data, with smaller steps: no GPU, no FlashAttention; what is there is said to be there."""
    done = launch("--check", NPROC=3, CUDA_VISIBLE_DEVICES="", PATH=f"{tmp_path}:/usr/bin:/bin", DATA_PATH=toy_data, RUNS=tmp_path / "runs",
                  TOKENIZER_PATH=tmp_path / "no.model", VOCAB_SIZE=toy.VOCAB, ATTENTION_BACKEND="fa3", TRAIN_BATCH_TOKENS=3072)
    assert done.returncode == 2 and not (tmp_path / "runs").exists()
    state = {line[6:].split(":")[0]: line for line in done.stdout.splitlines()[1:]}
    assert state["gpus"].startswith("FAIL  gpus: 0 visible, 3 needed")
    assert state["tokenizer"].startswith("FAIL") and "no.model" in state["tokenizer"]
    assert state["training data"].startswith("warn") and "epochs" in state["training data"]
    assert all(state[name].startswith("ok") for name in ("torch", "settings", "batch", "validation data", "coder", "disk"))
    failed = [name for name, line in state.items() if line.startswith("FAIL")]
    assert done.stderr.splitlines() == [f"error: {len(failed)} preconditions failed: {', '.join(failed)}"]


@pytest.mark.parametrize("arguments, settings, words", [
    (["--chek"], {}, "--chek is unknown"), ([], {"RECIPE": "recipes/none.env"}, "RECIPE=recipes/none.env is missing"),
    ([], {"SEEDS": "1 x"}, "'x' in SEEDS or NPROC"), (["--check"], {"NPROC": "eight"}, "'eight' in SEEDS or NPROC"),
    (["--check"], {"PYTHON": "/no/python"}, "PYTHON=/no/python is not a program")])
def test_bad_input_gets_one_line(arguments, settings, words):
    done = launch(*arguments, **settings)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and words in done.stderr


@pytest.mark.parametrize("line", ["export A=1", "  A=1", "A", "1A=1"])
def test_a_line_that_is_no_setting_is_named(tmp_path, line):
    recipe = tmp_path / "x.env"
    recipe.write_text(f"# a comment\n\n{line}\n")
    done = launch("--check", RECIPE=recipe)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {recipe}, line 3: '{line}': expected NAME=value") and not done.stdout
    assert len(done.stderr.splitlines()) == 1


def test_a_recipe_without_its_last_newline(tmp_path):
    (tmp_path / "x.env").write_text("# a comment\nA=1\nB=2\nC=3")
    script = f'. {ROOT}/tools/recipe.sh; read_recipe {tmp_path}/x.env; python3 -c "import os; print(*map(os.environ.get, \'ABC\'))"'
    assert subprocess.run(["bash", "-c", script], env={**os.environ, "B": "9"}, capture_output=True, text=True).stdout == "1 9 3\n"


def test_rehearsing_without_packages_is_a_failed_check(tmp_path):
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    bare.chmod(0o755)
    (tmp_path / "data").mkdir()
    for name in ("launch.sh", "tools", "recipes", "train_gpt.py", "data/sample.py", "data/shards.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copy(ROOT / "launch.sh", tmp_path / "here.sh")
    done = subprocess.run([str(tmp_path / "here.sh"), "--rehearse"], env={**toy.clean_environment(), "PYTHON": str(bare)},
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "FAIL  packages: numpy is missing" in done.stdout
    assert done.stderr == "error: 1 preconditions failed: packages\n"


def check(monkeypatch, data, out, name, nproc=1, finished=(), **settings):
    """What the check of this name finds for these settings."""
    for key, value in toy.data_env(data, out, **settings).items():
        monkeypatch.setenv(key, str(value))
    return pre.run_check(dict(pre.checks(nproc, out, True, finished))[name])


@pytest.mark.parametrize("name, settings, words", [
    ("kernels", {"KERNELS_OFF": "none"}, "KERNELS_OFF='none'"), ("chunks", {"TTT_CHUNK_BY_LENGTH": "8"}, "TTT_CHUNK_BY_LENGTH='8'"),
    ("training data", {"TRAIN_SEQ_SCHEDULE": "8"}, "TRAIN_SEQ_SCHEDULE='8'"),
    ("training data", {"TRAIN_BATCH_TOKENS": 2 ** 20}, "one step needs"), ("validation data", {"CASEOPS_ENABLED": 1}, "byte sidecar"),
    ("checkpoint", {"RESUME": 1}, "checkpoint.safetensors is missing")])
def test_what_the_trainer_refuses_is_a_failed_check(monkeypatch, toy_data, tmp_path, name, settings, words):
    found = check(monkeypatch, toy_data, tmp_path, name, **settings)
    assert found.state == "FAIL" and words in found.text


def test_finished_runs_must_have_the_settings_of_now(monkeypatch, toy_data, tmp_path):
    config = toy.config(SEED=7, RUN_ID="x", DATA_PATH="/elsewhere")
    log = "Hyperparameters:\n" + tg.config_table(config) + "\ndevice count:2 name:x86_64\n"
    (tmp_path / "log.txt").write_text(log)
    finished = parse_all([tmp_path / "log.txt"])
    look = lambda nproc=2, **settings: check(monkeypatch, toy_data, tmp_path, "finished runs", nproc, finished, **settings)
    assert look().state == "ok"
    assert f"{tmp_path}/log.txt ran with NPROC=2, now 8: FORCE=1" in look(8).text
    found = look(TTT_ENABLED=1, MATRIX_LR=0.5)
    assert found.state == "FAIL" and f"{tmp_path}/log.txt ran with MATRIX_LR=0.026, now 0.5: FORCE=1" in found.text


def test_wrong_settings_are_a_failed_check(tmp_path):
    done = launch("--check", NPROC=2, RUNS=tmp_path, MODEL_DIM="abc")
    assert done.returncode == 2 and "FAIL  settings: MODEL_DIM='abc'" in done.stdout


def rows(reasons="0x0000000000000001"):
    return lambda query: [["0", "345", "1980", "30", reasons], ["1", "1980", "1980", "31", "0x0"]]


@pytest.mark.parametrize("reasons, state, words", [
    ("0x0000000000000001", "ok", "345 of 1980 MHz"),                   # idle
    ("0x0000000000000004", "warn", "GPU 0: power cap"), ("0x0000000000000040", "FAIL", "GPU 0: hardware thermal slowdown"),
    ("0x0000000000000024", "FAIL", "power cap, software thermal slowdown"), ("[N/A]", "ok", "1980 MHz")])
def test_throttled_gpus(reasons, state, words):
    found = pre.check_clocks(rows(reasons))
    assert found.state == state and words in found.text


def test_only_the_gpus_that_the_run_may_see_are_asked(monkeypatch, tmp_path):
    (tmp_path / "nvidia-smi").write_text('#!/bin/sh\necho "$*"\n')
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert pre.nvidia_smi("--query-x=a")[0][0].startswith("-i 2") and pre.nvidia_smi("--query-x=a")[0][1].startswith("3 --query-x=a ")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert pre.nvidia_smi("--query-x=a")[0][0].startswith("--query-x=a ")


def test_other_processes_on_the_gpus():
    assert pre.check_others(lambda query: []).state == "ok"
    found = pre.check_others(lambda query: [["123", "python", "4000"]])
    assert found.state == "FAIL" and "123 python" in found.text


@pytest.mark.parametrize("names, nproc, state", [
    (["NVIDIA H100 80GB HBM3"] * 8, 8, "ok"), (["NVIDIA H100 80GB HBM3"] * 8, 9, "FAIL"), (["NVIDIA A100"] * 2, 2, "warn"),
    (["NVIDIA H100 80GB HBM3", "NVIDIA A100"], 2, "FAIL"), (["NVIDIA H100 80GB HBM3", "NVIDIA A100"], 1, "ok")])
def test_gpus(monkeypatch, names, nproc, state):
    import torch
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(name=names[i], total_memory=80 * 2**30))
    assert pre.check_gpus(nproc).state == state


@pytest.mark.parametrize("version, state", [("2.9.0+cu130", "ok"), ("2.13.1", "ok"), ("2.8.1+cu128", "FAIL"), ("3.0.0", "ok")])
def test_torch_version(monkeypatch, version, state):
    import torch
    monkeypatch.setattr(torch, "__version__", version)
    assert pre.check_torch().state == state


def test_a_full_disk(monkeypatch, tmp_path):
    monkeypatch.setattr(pre.shutil, "disk_usage", lambda path: SimpleNamespace(free=4.9e9))
    found = pre.check_free(tmp_path / "not" / "yet", 5.0)
    assert found.state == "FAIL" and "4.9 GB free" in found.text


def test_lrzip_is_missed_only_by_pergroup(toy_data, tmp_path):
    found = {}
    for compressor in ("pergroup", "brotli"):
        done = launch("--check", "--rehearse", NPROC=2, RUNS=tmp_path, PATH=f"{tmp_path}:/usr/bin:/bin", COMPRESSOR=compressor,
                      **{name: value for name, value in toy.data_env(toy_data, tmp_path).items() if name != "COMPRESSOR"})
        found[compressor] = next(line for line in done.stdout.splitlines() if " coder: " in line)
    assert found["brotli"].startswith("ok")
    assert found["pergroup"].startswith("ok") if os.access("/usr/bin/lrzip", os.X_OK) else "lrzip" in found["pergroup"]


def test_the_table(tmp_path, capsys):
    paths = []
    for seed, steps in ((42, 4800), (0, 5000)):
        paths.append(tmp_path / f"seed{seed}.txt")
        paths[-1].write_text(ours(seed, steps=steps, bpb=1.05 + seed / 1000))
    assert seed_table.main(list(map(str, paths))) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[1].split()[:2] == ["42", "4,800"] and out[2].split()[:2] == ["0", "5,000"]
    assert out[3].split()[:2] == ["mean", "4,900"] and "1.07100" in out[3]
    assert out[4].split()[:3] == ["published", "–", "121.7"] and "0.02970 (n=2)" in out[5]


def test_the_mean_is_over_finished_runs_with_one_kind_of_result(tmp_path, capsys):
    logs = {1: ours(1, bpb=1.01), 2: ours(2, bpb=1.03), 3: ours(3, bpb=9, complete=False), 4: ours(4, bpb=9)}
    logs[3] = "".join(x for x in logs[3].splitlines(True) if not x.startswith("quantized_ttt"))
    logs[4] = logs[4].replace("\nquantized_ttt_phased", "\nunknown") + "Hyperparameters:\n  seed: 4\n"
    for seed, text in logs.items():
        (tmp_path / f"seed{seed}.txt").write_text(text)
    assert seed_table.main([str(tmp_path / f"seed{seed}.txt") for seed in logs]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[5].split()[0] == "mean" and out[5].split()[-1] == "1.02000"
    assert out[7:] == ["left out of the mean: seed 3, unfinished", "left out of the mean: seed 4, its result is quantized, not ttt",
                       "standard deviation of bpb: 0.01414 (n=2)", "seed 4: problem: the file holds 2 runs; the figures mix them"]


def test_seeds_fail_alone_and_finished_ones_stay(toy_data, tmp_path):
    """A seed that fails does not stop the rest; one that has finished is not run again; the rest of an unfinished run moves aside."""
    settings = toy.data_env(toy_data, tmp_path, COMPRESSOR="brotli", TTT_ENABLED=0, ITERATIONS=2)
    for name in ("ARTIFACT_DIR", "RUN_ID"):
        del settings[name]
    runs = tmp_path / "runs"
    options = dict(settings, NPROC=1, SEEDS="1 2", RUNS=runs, AUTHOR="a", GITHUB_ID="b")
    (runs / "seed2").mkdir(parents=True)
    (runs / "seed2" / "seed2.txt").write_text("1/2 train_loss: 1.0\n")
    done = launch("--rehearse", **{**options, "SEEDS": "99999999999999999999 1"})
    assert done.returncode == 1 and "error: seed 99999999999999999999 failed: error: SEED=" in done.stderr, done.stdout[-2000:] + done.stderr
    assert "seeds failed: 99999999999999999999 of" in done.stderr
    log = (runs / "seed1" / "seed1.txt").read_bytes()
    assert b"run_complete" in log and list((runs / "record").rglob("submission.json"))
    readme = next((runs / "record").rglob("README.md")).read_text()
    assert ". ./config.env" in readme and "ITERATIONS=2\n" in next((runs / "record").rglob("config.env")).read_text()
    other = launch("--rehearse", **{**options, "ITERATIONS": 3})
    assert other.returncode == 2 and "seed1.txt ran with ITERATIONS=2, now 3: FORCE=1" in other.stdout
    assert "finished runs" in other.stderr and (runs / "seed2" / "seed2.txt").read_text().startswith("1/2")
    kept = next((runs / "seed1").glob("final_model.train_gpt.py")).read_bytes()
    (runs / "seed1" / "final_model.train_gpt.py").write_bytes(b"changed")
    refused = launch("--rehearse", **{**options, "SEEDS": "1"})
    assert refused.returncode == 1 and "refused" in refused.stdout and list((runs / "record").rglob("submission.json"))
    assert "no new record" in refused.stderr and not (runs / "record.new").exists()
    (runs / "seed1" / "final_model.train_gpt.py").write_bytes(kept)
    done = launch("--rehearse", **options)
    assert f"\n{runs}/record/track_non_record_16mb/" in done.stdout and not (runs / "record.new").exists()
    assert done.returncode == 0 and "seed 1 has finished before" in done.stdout, done.stdout[-2000:] + done.stderr
    assert (runs / "seed1" / "seed1.txt").read_bytes() == log and "run_complete" in (runs / "seed2" / "seed2.txt").read_text()
    assert len(list(runs.glob("seed2.before-*"))) == 1


@pytest.mark.parametrize("text, words", [("quantized val_loss:1", "no loss in this run"), ("| 1/2 train_loss: 1", "no loss in this run"),
                                         ("1/2 train_loss: 1", "tools/parse_log.py"), (None, "train_gpt.py")])
def test_the_demo_ends_without_a_plot_where_nothing_was_trained(tmp_path, text, words):
    """With a python that only says what it is asked to run, and writes this log."""
    for folder in ("tools", "recipes", ".venv/bin"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("demo.sh", "tools/recipe.sh", "recipes/demo.env"):
        shutil.copy(ROOT / name, tmp_path / name)
    python, install = tmp_path / ".venv/bin/python", tmp_path / "tools/install.sh"
    install.write_text("#!/bin/sh\n")
    write = f"mkdir -p $ARTIFACT_DIR; echo '{text}' > $ARTIFACT_DIR/$RUN_ID.txt; touch $ARTIFACT_DIR/final_model.int6" if text else ":"
    python.write_text(f"#!/bin/bash\necho $1\nif [ $1 = train_gpt.py ]; then {write}; fi\n")
    for path in (python, install):
        path.chmod(0o755)
    done = subprocess.run([str(tmp_path / "demo.sh")], env=toy.clean_environment(), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and words in done.stdout
    assert ("tools/parse_log.py" in done.stdout) == (words == "tools/parse_log.py")
