"""MAIN: whole runs of the script at toy size, stages alone, bad input, signals, the packed script, torchrun.

Runs that must be real processes are (signals, the packed script, torchrun, one of each kind of error); the rest calls
main() in this process, which is the same code without the seconds that importing torch takes.
"""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import toy

import train_gpt as tg

# The embedding (384 x 192) and the MLPs (384 x 192) of this network are large enough for GPTQ.
DEMO = dict(MODEL_DIM=192, NUM_HEADS=6, NUM_KV_HEADS=2, NUM_LAYERS=4, XSA_LAST_N=4, ROPE_DIMS=16, PARALLEL_START_LAYER=3, MLP_MULT=2,
            ITERATIONS=16, TRAIN_BATCH_TOKENS=1024, TRAIN_SEQ_LEN=128, WARMDOWN_FRAC=0.5, EMA_DECAY=0.9, EVAL_SEQ_LEN=128,
            EVAL_STRIDE=64, VAL_BATCH_TOKENS=8192, SLIDING_WINDOW_ENABLED=1, GPTQ_CALIBRATION_BATCHES=4, COMPRESSOR="brotli",
            WARMUP_STEPS=1, MAX_WALLCLOCK_SECONDS=600, ENABLE_LOOPING_AT=0, MATRIX_CLIP_SIGMAS=12.85)
ARTIFACT = "final_model.int6.pglf"


def main(monkeypatch, capsys, settings):
    """main() under these settings: exit code and lines of output."""
    kept = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    environment = {**toy.clean_environment(), **settings}
    monkeypatch.setattr(tg.os, "environ", environment)
    monkeypatch.setattr(tg.torch.cuda, "is_available", lambda: False)
    try:
        code = tg.main()
    finally:
        for n, handler in kept.items():
            signal.signal(n, handler)
    captured = capsys.readouterr()
    return code, (captured.out + captured.err).splitlines()


def bpb(lines, label):
    found = [line for line in lines if line.startswith(label + " ")]
    assert len(found) == 1, label
    return float(re.search(r"val_bpb:(\d+\.\d+)", found[0])[1])


def files(folder):
    """Every file below the folder: path -> content."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ------------------------------------------------------------------------------------------------------------ end to end


@pytest.fixture(scope="module")
def demo(toy_data, tmp_path_factory):
    """(settings, folder, output lines) of one whole run in a process of its own."""
    out = tmp_path_factory.mktemp("demo")
    settings = toy.data_env(toy_data, out, **DEMO)
    done = toy.script(settings, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return settings, out, done.stdout.splitlines()


def test_the_whole_run_learns(demo, toy_data):
    """An untrained model of 384 pieces needs log2(384) = 8.58 bits a token, about 3.5 a byte on this text."""
    _, _, lines = demo
    counts = tg.load_validation(toy.config(DATA_PATH=toy_data, TOKENIZER_PATH=toy_data / "tokenizer.model"), toy.ListLog()).byte_counts
    untrained = np.log2(384) * (len(counts) - 1) / counts[1:].sum()
    before, after, sliding = (bpb(lines, label) for label in (
        "diagnostic pre-quantization post-ema", "diagnostic quantized", "quantized_sliding_window"))
    assert untrained > 2.5 and before < 0.7 * untrained, (untrained, before)
    assert before < after + 0.01 < before + 0.06, (before, after)           # quantising costs something, not much
    assert sliding < after + 0.01                                           # more context does not hurt


def test_the_log_tells_the_whole_run(demo):
    settings, out, lines = demo
    log = (out / "run.txt").read_text().splitlines()
    assert [line for line in log if line in set(lines)] == lines              # the console is a part of the file
    position = [next(i for i, line in enumerate(log) if line.startswith(start)) for start in (
        "Hyperparameters:", "version python:", "script sha256:", "input file:", "source_begin", "model_params:", "ledger stage:warmup",
        "gptq:reserving", "1/16 train_loss:", "ledger stage:train ", "diagnostic pre-quantization", "GPTQ:collecting", "ledger stage:hessians",
        "ledger stage:gptq", "budget train ", "Serialized model quantized+brotli: ", "Total submission size quantized+brotli: ",
        "ledger stage:unpack", "diagnostic quantized ", "quantized_sliding_window ", "budget eval ", "run_complete")]
    assert position == sorted(position)
    assert not [line for line in log if line.startswith("budget_violation")]
    scored = [re.match(r"val_tokens scored:(\d+) total:(\d+)", line) for line in log if line.startswith("val_tokens")]
    assert len(scored) == 3 and all(m[1] == m[2] for m in scored)
    assert {"    tok_emb.weight: ", "    blocks.3.mlp.fc.weight: "} <= {line.rstrip(".0123456789") for line in log}     # the sigma table


def test_the_sizes_are_those_of_the_files(demo):
    _, out, lines = demo
    number = lambda start: int(next(line for line in lines if line.startswith(start)).split(": ")[1].split()[0])
    artifact, code = (out / ARTIFACT).stat().st_size, (out / "final_model.train_gpt.py").stat().st_size
    assert number("Serialized model quantized+brotli") == artifact and number("Code size") == code
    assert number("Total submission size") == artifact + code


def test_the_artifact_is_read_back_from_disk(demo, monkeypatch, capsys):
    """EVAL_ONLY on the files alone, without training shards, gives the same numbers; with another artifact it does not."""
    settings, out, lines = demo
    alone = out.parent / "alone"
    alone.mkdir(exist_ok=True)
    shutil.copy(out / ARTIFACT, alone)
    code, again = main(monkeypatch, capsys, {**settings, "ARTIFACT_DIR": str(alone), "EVAL_ONLY": "1"})
    assert code == 0
    for label in ("diagnostic quantized", "quantized_sliding_window"):
        assert bpb(again, label) == bpb(lines, label)
    assert not any("train_loss" in line for line in again)


def test_the_packed_script_runs_and_gives_the_same(demo):
    """The shipped file is the program: the same run from it alone, in an empty folder, to the last digit; it packs itself."""
    settings, out, lines = demo
    place = out.parent / "packed"
    place.mkdir()
    shutil.copy(out / "final_model.train_gpt.py", place / "train_gpt.py")
    # without a budget the schedule goes by steps: compare with the readable script under the same settings
    short = {**settings, "MAX_WALLCLOCK_SECONDS": "0", "WARMUP_STEPS": "0", "ITERATIONS": "3"}
    done = toy.script({**short, "ARTIFACT_DIR": str(place / "out")}, place / "train_gpt.py", timeout=300, cwd=place)
    assert done.returncode == 0, done.stderr[-3000:]
    readable = toy.script({**short, "ARTIFACT_DIR": str(place / "out2")}, timeout=300)
    assert readable.returncode == 0
    labels = ("diagnostic pre-quantization post-ema", "diagnostic quantized", "quantized_sliding_window")
    for label in labels:
        assert bpb(done.stdout.splitlines(), label) == bpb(readable.stdout.splitlines(), label)
    assert (place / "out" / ARTIFACT).read_bytes() == (place / "out2" / ARTIFACT).read_bytes()
    assert (place / "out" / "final_model.train_gpt.py").read_bytes() == (place / "train_gpt.py").read_bytes()


def test_quantize_only_gives_the_same_artifact(demo, monkeypatch, capsys):
    settings, out, lines = demo
    alone = out.parent / "quantize_only"
    alone.mkdir()
    shutil.copy(out / "final_model.safetensors", alone)
    code, again = main(monkeypatch, capsys, {**settings, "ARTIFACT_DIR": str(alone), "QUANTIZE_ONLY": "1"})
    assert code == 0
    assert (alone / ARTIFACT).read_bytes() == (out / ARTIFACT).read_bytes()
    assert bpb(again, "diagnostic quantized") == bpb(lines, "diagnostic quantized")
    assert bpb(again, "diagnostic pre-quantization post-ema") == bpb(lines, "diagnostic pre-quantization post-ema")


def test_quantize_only_trains_in_turn_on_the_same_data(toy_data, tmp_path, monkeypatch, capsys):
    """INQ goes on in the data where training stopped, in this process or in another."""
    monkeypatch.setattr(tg, "SMALLEST_QUANTISED", 500)
    settings = toy.data_env(toy_data, tmp_path, INQ_STEPS=2, INQ_GROUPS=3, INQ_LR=0.3, TTT_ENABLED=0)
    artifacts = []
    for only in ("0", "1"):
        code, lines = main(monkeypatch, capsys, {**settings, "QUANTIZE_ONLY": only})
        assert code == 0 and len([line for line in lines if line.startswith("inq: ")]) == 2
        artifacts.append((tmp_path / ARTIFACT).read_bytes())
    assert artifacts[0] == artifacts[1]


# ----------------------------------------------------------------------------------------------------------- quick runs


@pytest.fixture
def settings(toy_data, tmp_path):
    """A five-step run of the smallest network into an empty folder; nothing is large enough for GPTQ."""
    return toy.data_env(toy_data, tmp_path / "out", COMPRESSOR="brotli")


def test_prequant_only_stops_before_quantisation(settings, monkeypatch, capsys, tmp_path):
    code, lines = main(monkeypatch, capsys, {**settings, "PREQUANT_ONLY": "1"})
    assert code == 0 and bpb(lines, "diagnostic pre-quantization post-ema") > 0
    assert set(files(tmp_path / "out")) == {"run.txt", "final_model.safetensors"}
    assert not any("GPTQ" in line or "quantized val" in line for line in lines)


def test_warm_up_changes_no_number(settings, monkeypatch, capsys, tmp_path):
    results = []
    for steps in (0, 3):                # (and so a run repeats exactly)
        code, lines = main(monkeypatch, capsys, {**settings, "WARMUP_STEPS": str(steps)})
        assert code == 0
        results.append(((tmp_path / "out" / "final_model.safetensors").read_bytes()[-20000:], (tmp_path / "out" / ARTIFACT).read_bytes(),
                        bpb(lines, "diagnostic quantized")))
    assert results[0] == results[1]


def test_the_wall_clock_stops_training_and_is_kept(settings, monkeypatch, capsys):
    code, lines = main(monkeypatch, capsys, {**settings, "ITERATIONS": "1000000", "MAX_WALLCLOCK_SECONDS": "4", "WARMUP_STEPS": "1",
                                             "TRAIN_LOG_EVERY": "0"})
    assert code == 0
    stopped = next(line for line in lines if line.startswith("stopping_early: wallclock_cap train_time: "))
    used = float(re.search(r"budget train ([\d.]+)/4", "\n".join(lines))[1])
    assert "step: " in stopped and 1.0 < used <= 4.0 and not any("budget_violation" in line for line in lines)
    assert any(line.startswith("layer_loop:enabled") for line in lines)


def test_validation_in_training_is_logged(settings, monkeypatch, capsys):
    code, lines = main(monkeypatch, capsys, {**settings, "VAL_LOSS_EVERY": "2", "PREQUANT_ONLY": "1"})
    assert code == 0
    assert [line.split(" val_loss")[0] for line in lines if re.match(r"\d+/5 val_loss: [\d.]+ val_bpb: [\d.]+$", line)] == ["2/5", "4/5"]


def test_config_check_touches_nothing(settings, monkeypatch, capsys, tmp_path):
    code, lines = main(monkeypatch, capsys, {**settings, "CONFIG_CHECK": "1", "DATA_PATH": "/nowhere", "MODEL_DIMS": "3"})
    assert code == 0 and not (tmp_path / "out").exists()
    assert lines[0].startswith("warning: MODEL_DIMS") and "  data_path: /nowhere" in lines


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_config_check_into_a_closed_pipe_is_silent(unbuffered):
    """As with `| head`."""
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run([sys.executable, str(toy.SCRIPT)], stdout=write, stderr=subprocess.PIPE,
                              env={**toy.clean_environment(), "CONFIG_CHECK": "1", "PYTHONUNBUFFERED": unbuffered}, timeout=60)
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")


def test_warnings_reach_the_log(settings, monkeypatch, capsys, tmp_path):
    assert main(monkeypatch, capsys, {**settings, "ITERATION": "7", "PREQUANT_ONLY": "1"})[0] == 0
    assert "warning: ITERATION is not a setting; did you mean ITERATIONS?" in (tmp_path / "out" / "run.txt").read_text()


def test_one_seed_gives_the_same_bytes(settings, monkeypatch, capsys, tmp_path):
    """Weights, artifact (GPTQ along a trellis, Fisher steps) and script; DETERMINISTIC=1 changes nothing on a CPU; another seed does."""
    network = {k: str(v) for k, v in {**DEMO, "ITERATIONS": 2, "MAX_WALLCLOCK_SECONDS": 0, "WARMUP_STEPS": 0, "COMPRESSOR": "entropy",
                                      "CLIP_RULE": "fisher", "SLIDING_WINDOW_ENABLED": 0, "LQER_ENABLED": 1, "TARGET_BYTES": 0, "QUANTIZER": "trellis4", "EVAL_SEQ_LEN": 1024}.items()}
    made = []
    for change in ({}, {"DETERMINISTIC": "1"}, {"SEED": "7", "PREQUANT_ONLY": "1"}):
        out = tmp_path / f"out{len(made)}"
        assert main(monkeypatch, capsys, {**settings, **network, "ARTIFACT_DIR": str(out), **change})[0] == 0
        tg.choose_algorithms(False)
        made.append(without_log(out))
    assert set(made[0]) == {"final_model.safetensors", ARTIFACT, "final_model.train_gpt.py", "hessian_report.safetensors"}
    # train_seconds stands in the header of the weights
    same = [n for n in made[0] if n != "final_model.safetensors"]
    assert all(made[0][n] == made[1][n] for n in same)
    weights = [tg.load_tensors(tmp_path / f"out{i}" / "final_model.safetensors", toy.config(**network))[0] for i in range(3)]
    assert all(torch.equal(t, weights[1][n]) for n, t in weights[0].items())
    assert not torch.equal(weights[0]["tok_emb.weight"], weights[2]["tok_emb.weight"])


# --------------------------------------------------------------------------------------------------------------- hygiene


def test_the_environment_stays_out_of_what_a_run_writes(settings, monkeypatch, capsys, tmp_path):
    """Tokens, the home folder, where the script lies: nowhere in log, console, artifact, weights or script; of a misspelt name only the name."""
    hidden = {"SECRET_TOKEN": "hunter2-secret", "HF_TOKEN": "hf_0123456789secret", "HOME": "/home/some-private-person",
              "AWS_SECRET_ACCESS_KEY": "aws+secret/0123456789", "MODEL_DIMS": "secret-in-a-misspelt-name", "USER": "some-private-person"}
    secrets = [*hidden.values(), str(toy.SCRIPT.parent)]
    written = []
    for change in ({"TTT_ENABLED": "1"}, {"RESUME": "1"}):          # a whole run, and one that is refused
        code, lines = main(monkeypatch, capsys, {**settings, **hidden, **change})
        assert code == (2 if "RESUME" in change else 0)
        written += [line.encode() for line in lines]
    assert any(b"MODEL_DIMS is not a setting" in line for line in written)
    for name, content in {**files(tmp_path / "out"), "console": b"\n".join(written)}.items():
        for secret in secrets:
            assert secret.encode() not in content, (name, secret)


AUDIT = """
import json, os, runpy, sys
seen = []
def hook(event, args):
    if event == "open" and isinstance(args[0], (str, bytes)) and (args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
        seen.append(("write", os.path.abspath(os.fsdecode(args[0]))))
    elif event in ("os.mkdir", "tempfile.mkstemp", "tempfile.mkdtemp"):
        seen.append(("write", os.path.abspath(args[0])))
    elif event == "subprocess.Popen":
        seen.append(("run", [str(a) for a in args[1]]))
    elif event.startswith(("socket.connect", "socket.getaddrinfo", "urllib", "http", "ftplib", "os.system", "os.exec", "os.posix_spawn")):
        seen.append((event, str(args)))
script, report = sys.argv[1:3]
sys.argv = [script]
sys.path.insert(0, os.path.dirname(script))
sys.addaudithook(hook)
try:
    runpy.run_path(script, run_name="__main__")
finally:
    text = json.dumps(seen)
    open(report, "w").write(text)
"""


def test_a_run_reaches_for_nothing_outside_its_folder(settings, tmp_path):
    """From first step to test-time training: no network, no program but git and uname (provenance) and, of Triton, ldconfig
    (where is CUDA), no file written elsewhere, none left over. PyTorch touches the folder of its compilation cache and what tempfile tries out."""
    place, cache = tmp_path / "place", tmp_path / "cache"
    place.mkdir()
    cache.mkdir()
    (tmp_path / "audit.py").write_text(AUDIT)
    environment = {**toy.clean_environment(), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1",
                   "TMPDIR": str(cache), "TORCHINDUCTOR_CACHE_DIR": str(cache), **settings,
                   "SLIDING_WINDOW_ENABLED": "1", "TTT_ENABLED": "1", "CHECKPOINT_EVERY": "2", "COMPRESSOR": "entropy"}
    done = subprocess.run([sys.executable, tmp_path / "audit.py", toy.SCRIPT, tmp_path / "seen.json"], env=environment, cwd=place,
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert {event for event, _ in seen} <= {"write", "run"}, seen
    assert {" ".join(command[:2]) for event, command in seen if event == "run"} <= {"git rev-parse", "git status", "uname -p", "/sbin/ldconfig -p"}
    outside = {p for event, p in seen if event == "write" and not p.startswith((str(tmp_path / "out"), str(cache)))} - {os.devnull}
    assert not outside and not list(place.iterdir()) and not list(cache.iterdir())
    assert set(files(tmp_path / "out")) == {"run.txt", "checkpoint.safetensors", "final_model.safetensors", ARTIFACT,
                                           "final_model.train_gpt.py", "hessian_report.safetensors"}
    assert all(p.stat().st_mode & 0o133 == 0 for p in (tmp_path / "out").iterdir())     # not executable, not writable for others


# ------------------------------------------------------------------------------------------------------------- bad input


def without_log(folder):
    return {n: d for n, d in files(folder).items() if n != "run.txt"} if folder.exists() else {}


def expect_error(monkeypatch, capsys, settings, *words, code=2):
    """One line `error: ...` holding all words, the exit code, and no file but the log made or changed."""
    out = tg.Path(settings["ARTIFACT_DIR"])
    before = without_log(out)
    actual, lines = main(monkeypatch, capsys, settings)
    errors = [line for line in lines if line.startswith("error: ")]
    assert actual == code, lines[-3:]
    assert len(errors) == 1 and lines[-1] == errors[0], lines
    for word in words:
        assert re.search(word, errors[0]), errors[0]
    assert without_log(out) == before
    assert not any("Traceback" in line for line in lines)
    return errors[0]


@pytest.fixture
def data(toy_data, tmp_path):
    """A copy of the data set that a test may break."""
    return tg.Path(shutil.copytree(toy_data, tmp_path / "data"))


def broken_data(data, settings):
    return {**settings, "DATA_PATH": str(data), "TOKENIZER_PATH": str(data / "tokenizer.model")}


TRAIN0, VAL0, VAL1 = "fineweb_train_000000.bin", "fineweb_val_000000.bin", "fineweb_val_000001.bin"
BAD_DATA = {
    "no folder": (lambda d: shutil.rmtree(d), ["data is missing", "data/sample.py", "data/download.py"]),
    "no train shards": (lambda d: [p.unlink() for p in d.glob("fineweb_train*")], ["no fineweb_train_", "data/sample.py"]),
    "no val shards": (lambda d: [p.unlink() for p in d.glob("fineweb_val*")], ["no fineweb_val_"]),
    "empty shard": (lambda d: (d / TRAIN0).write_bytes(b""), [TRAIN0, "0 bytes", "1024"]),
    "truncated shard": (lambda d: os.truncate(d / TRAIN0, 3000), [TRAIN0, "3000 bytes", "truncated"]),
    "truncated val": (lambda d: os.truncate(d / VAL1, 1300), [VAL1, "1300 bytes"]),
    "foreign shard": (lambda d: (d / TRAIN0).write_bytes(b"\x7fELF" * 5000), [TRAIN0, "magic 20240520"]),
    "wrong version": (lambda d: toy.write_shard(d / TRAIN0, toy.row(5000), version=7), [TRAIN0, "version 1"]),
    "token over vocabulary": (lambda d: toy.write_shard(d / VAL0, [1, 5, 384]), [VAL0, "token id 384", "VOCAB_SIZE=384"]),
    "no BOS in validation": (lambda d: [toy.write_shard(d / v, toy.row(50, ())) for v in (VAL0, VAL1)], ["no BOS"]),
    "no tokenizer": (lambda d: (d / "tokenizer.model").unlink(), ["tokenizer.model is missing", "TOKENIZER_PATH"]),
    "foreign tokenizer": (lambda d: (d / "tokenizer.model").write_bytes(b"x" * 99), ["not a SentencePiece model"]),
    "other tokenizer": (lambda d: (d / "tokenizer.model").write_bytes(toy.train_tokenizer(toy.sentences(50, 1), 300)),
                        ["300 pieces", "VOCAB_SIZE=384"]),
    "data shorter than a batch": (lambda d: [toy.write_shard(p, toy.row(30)) for p in d.glob("fineweb_train*")],
                                  ["hold 60 tokens", "needs 129"]),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data(case, data, settings, monkeypatch, capsys):
    spoil, words = BAD_DATA[case]
    spoil(data)
    expect_error(monkeypatch, capsys, broken_data(data, settings), *words)


BAD_SETTINGS = {
    "batch that does not divide": (dict(TRAIN_BATCH_TOKENS=128, GRAD_ACCUM_STEPS=5), ["TRAIN_BATCH_TOKENS=128", "GRAD_ACCUM_STEPS"]),
    "batch longer than the data": (dict(TRAIN_BATCH_TOKENS=10 ** 6), ["training shards hold", "TRAIN_BATCH_TOKENS"]),
    "sequence longer than the row": (dict(EVAL_SEQ_LEN=4096), ["VAL_BATCH_TOKENS", "EVAL_SEQ_LEN=4096"]),
    "unknown kernel": (dict(KERNELS_OFF="nothing"), ["KERNELS_OFF='nothing'"]),
    "backend": (dict(ATTENTION_BACKEND="fa3"), ["ATTENTION_BACKEND=fa3"]),
    "nothing to resume": (dict(RESUME=1), ["checkpoint.safetensors is missing"]),
    "nothing to quantise": (dict(QUANTIZE_ONLY=1), ["final_model.safetensors is missing"]),
    "nothing to evaluate": (dict(EVAL_ONLY=1), ["pglf cannot be read"]),
}


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_bad_settings(case, settings, monkeypatch, capsys):
    change, words = BAD_SETTINGS[case]
    expect_error(monkeypatch, capsys, {**settings, **{k: str(v) for k, v in change.items()}}, *words)


def test_a_missing_checkpoint_is_found_before_time_is_spent(settings, monkeypatch, capsys):
    """RESUME without a checkpoint must not wait for the warm-up."""
    monkeypatch.setattr(tg.Trainer, "warm_up", lambda *_: pytest.fail("warmed up first"))
    expect_error(monkeypatch, capsys, {**settings, "RESUME": "1", "WARMUP_STEPS": "3"}, "checkpoint.safetensors is missing")


def test_an_unwritable_folder(settings, monkeypatch, capsys, tmp_path):
    """We may be root, who can write anywhere: a file stands where a folder must be."""
    (tmp_path / "file").write_bytes(b"x")
    for out in (tmp_path / "file", tmp_path / "file" / "deeper"):
        code, lines = main(monkeypatch, capsys, {**settings, "ARTIFACT_DIR": str(out)})
        assert code == 2 and len(lines) == 1 and lines[0].startswith("error: cannot write"), lines
    assert (tmp_path / "file").read_bytes() == b"x"


def test_a_name_with_a_line_break_is_still_one_line(settings, monkeypatch, capsys):
    code, lines = main(monkeypatch, capsys, {**settings, "TOKENIZER_PATH": "/no\nwhere"})
    assert code == 2 and len([line for line in lines if line.startswith("error")]) == 1 and lines[-1].startswith("error: ")


def test_a_missing_package_is_named(settings, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "brotli", None)
    expect_error(monkeypatch, capsys, settings, "brotli", "requirements.txt")


def test_bad_artifacts(settings, monkeypatch, capsys, tmp_path):
    """Truncated, corrupted, of another configuration, and a folder in its place: nothing is touched."""
    assert main(monkeypatch, capsys, settings)[0] == 0
    path = tmp_path / "out" / ARTIFACT
    good = path.read_bytes()
    only = {**settings, "EVAL_ONLY": "1"}
    for damaged, words in ((good[:-1], "cut off"), (good[:5], "5 bytes"), (b"", "0 bytes"), (good + b"x", "total length"),
                           (good[:100] + bytes([good[100] ^ 4]) + good[101:], "checksum"), (b"\x80\x04pickle" + good, "magic")):
        path.write_bytes(damaged)
        expect_error(monkeypatch, capsys, only, f"{ARTIFACT} is damaged", words)
    path.write_bytes(good)
    expect_error(monkeypatch, capsys, {**only, "NUM_LOOPS": "1"}, "was made with NUM_LOOPS=2, this run has 1")
    expect_error(monkeypatch, capsys, {**settings, "QUANTIZE_ONLY": "1", "ROPE_BASE": "50"}, "final_model.safetensors was made with ROPE_BASE=10000")
    weights = tmp_path / "out" / "final_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-3])
    expect_error(monkeypatch, capsys, {**settings, "QUANTIZE_ONLY": "1"}, "final_model.safetensors is damaged")


def test_over_the_cap(settings, monkeypatch, capsys, tmp_path):
    """Exit code 3, by how many bytes, and an earlier submission stays."""
    assert main(monkeypatch, capsys, settings)[0] == 0
    before = without_log(tmp_path / "out")
    total = len(before[ARTIFACT]) + len(before["final_model.train_gpt.py"])
    monkeypatch.setattr(tg, "CAP_BYTES", total - 7)
    code, lines = main(monkeypatch, capsys, {**settings, "QUANTIZE_ONLY": "1"})
    assert code == 3 and lines[-1].startswith("error: ") and "7 bytes over the cap" in lines[-1]
    assert without_log(tmp_path / "out") == before
    monkeypatch.setattr(tg, "CAP_BYTES", total)
    assert main(monkeypatch, capsys, {**settings, "QUANTIZE_ONLY": "1"})[0] == 0


def test_a_full_disk_while_writing_a_checkpoint(settings, monkeypatch, capsys, tmp_path):
    """The limit on file size stands for the disk's end: the earlier checkpoint stays, the run goes on to its end."""
    assert main(monkeypatch, capsys, {**settings, "CHECKPOINT_EVERY": "2", "PREQUANT_ONLY": "1"})[0] == 0
    before = without_log(tmp_path / "out")
    assert "checkpoint.safetensors" in before
    size = (tmp_path / "out" / "run.txt").stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 300_000, limits[1]))       # the log grows, a checkpoint does not fit
    assert len(before["checkpoint.safetensors"]) > size + 300_000
    try:
        code, lines = main(monkeypatch, capsys, {**settings, "CHECKPOINT_EVERY": "2", "PREQUANT_ONLY": "1"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    warnings = [line for line in lines if re.match("warning: cannot write .*checkpoint.safetensors .*File too large; training goes on", line)]
    assert code == 0 and len(warnings) == int(settings["ITERATIONS"]) // 2 and lines[-1].startswith("run_complete")
    assert without_log(tmp_path / "out")["checkpoint.safetensors"] == before["checkpoint.safetensors"]


def test_a_disk_too_full_for_the_log(settings, monkeypatch, capsys, tmp_path):
    """Nothing at all can be written: still no traceback."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        code, lines = main(monkeypatch, capsys, {**settings, "PREQUANT_ONLY": "1"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2 and lines[-1].startswith("error: cannot write") and sum("the log file ends here" in line for line in lines) == 1


def test_a_training_token_over_the_vocabulary_between_the_samples(data, settings, monkeypatch, capsys):
    """Only some training tokens are looked at before the start; the rest must not end in an index error."""
    tokens = toy.row(200_000, range(0, 200_000, 100))
    tokens[3:200:4] = 60000             # every fourth, never one of the sampled (every third)
    tokens[::3] = 5
    toy.write_shard(data / TRAIN0, tokens)
    expect_error(monkeypatch, capsys, broken_data(data, settings), "token id 60000", "VOCAB_SIZE=384")


# ------------------------------------------------------------------------------------------- processes: errors, signals


@pytest.mark.parametrize("change, code, words", [
    (dict(MODEL_DIM="abc"), 2, "MODEL_DIM='abc': expected a whole number"), (dict(DATA_PATH="/proc/nowhere"), 2, "data folder /proc/nowhere is missing")])
def test_errors_of_the_real_process(settings, change, code, words):
    done = toy.script({**settings, **change})
    lines = done.stderr.splitlines()
    assert done.returncode == code and len(lines) == 1 and lines[0].startswith("error: ") and words in lines[0]
    assert "error: " not in done.stdout


def test_an_error_is_said_once_on_stderr_and_in_the_log(settings, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(tg, "preflight", lambda run: run.log("seen") or tg.stop_now(15, None))
    monkeypatch.setattr(tg.os, "environ", {**toy.clean_environment(), **settings})
    kept = {n: signal.getsignal(n) for n in tg.STOP_SIGNALS}
    assert tg.main() == 130
    for n, handler in kept.items():
        signal.signal(n, handler)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("seen\n", "error: stopped by signal 15\n")
    assert (tmp_path / "out" / "run.txt").read_text() == "seen\nerror: stopped by signal 15\n"


def start(settings, until, **options):
    """Start the script, read its output up to a line that begins with `until`."""
    environment = {**toy.clean_environment(), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **settings}
    process = subprocess.Popen([sys.executable, str(toy.SCRIPT)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = []
    for line in process.stdout:
        lines.append(line.rstrip("\n"))
        if line.startswith(until):
            return process, lines
    process.wait()
    raise AssertionError("\n".join(lines[-20:]))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_stops_with_130_and_resumes_to_the_same_numbers(settings, monkeypatch, capsys, tmp_path, name):
    long = {**settings, "ITERATIONS": "60", "TRAIN_LOG_EVERY": "1", "PREQUANT_ONLY": "1"}
    process, _ = start(long, "7/60 train_loss")
    process.send_signal(getattr(signal, name))
    rest = process.communicate(timeout=60)[0].splitlines()
    assert process.returncode == 130, rest[-5:]
    assert rest[-1].startswith("error: stopped by signal") and "RESUME=1" in rest[-1]
    assert int(re.search(r"after step (\d+)", rest[-1])[1]) < 60, "the run was over before the signal came"
    code, lines = main(monkeypatch, capsys, {**long, "RESUME": "1"})
    assert code == 0 and any(line.startswith("resumed step:") for line in lines)
    whole = {**long, "ARTIFACT_DIR": str(tmp_path / "whole")}
    assert main(monkeypatch, capsys, whole)[0] == 0
    a, b = (tg.load_tensors(tmp_path / folder / "final_model.safetensors", toy.config())[0] for folder in ("out", "whole"))
    assert all(torch.equal(t, b[n]) for n, t in a.items())


def test_a_signal_after_training_ends_the_run(settings):
    """Once the steps are over there is nothing to save: a signal ends the process at once, not after all evaluations."""
    process, _ = start({**settings, "EVAL_STRIDE": "1", "SLIDING_WINDOW_ENABLED": "1", "EVAL_SEQ_LEN": "128"}, "ledger stage:train ")
    process.send_signal(signal.SIGTERM)
    rest = process.communicate(timeout=60)[0].splitlines()
    assert process.returncode in (130, -signal.SIGTERM), rest[-3:]
    assert not any(line.startswith("run_complete") for line in rest)


def test_a_kill_leaves_whole_files(settings, monkeypatch, capsys, tmp_path):
    """SIGKILL in the middle of writing checkpoints all the time: the last whole one loads."""
    process, _ = start({**settings, "ITERATIONS": "100000", "TRAIN_LOG_EVERY": "1", "CHECKPOINT_EVERY": "1"}, "9/100000 train_loss")
    time.sleep(0.05)
    process.kill()
    process.communicate()
    tensors, state = tg.load_tensors(tmp_path / "out" / "checkpoint.safetensors", toy.config())
    assert state["step"] >= 8 and tensors
    code, lines = main(monkeypatch, capsys, {**settings, "ITERATIONS": str(state["step"] + 2), "RESUME": "1", "PREQUANT_ONLY": "1"})
    assert code == 0 and any(line.startswith(f"resumed step:{state['step']} ") for line in lines)


def test_torchrun_on_two_processes(demo, toy_data, tmp_path):
    """The launcher's own command; one log, one artifact, the same score as on one process within float noise."""
    settings = toy.data_env(toy_data, tmp_path / "out", **{**DEMO, "ITERATIONS": 3, "MAX_WALLCLOCK_SECONDS": 0, "WARMUP_STEPS": 0,
                                                          "SLIDING_WINDOW_ENABLED": 0, "TRAIN_LOG_EVERY": 1, "GRAD_ACCUM_STEPS": 1})
    environment = {**toy.clean_environment(), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **settings}
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(toy.SCRIPT)],
                          env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    two = done.stdout.splitlines()
    assert len([line for line in two if line.startswith("run_complete")]) == 1 and "device count:2" in done.stdout
    one = toy.script({**settings, "ARTIFACT_DIR": str(tmp_path / "one"), "GRAD_ACCUM_STEPS": "2"}, timeout=300)
    assert one.returncode == 0
    for label in ("diagnostic pre-quantization post-ema", "diagnostic quantized"):
        assert bpb(two, label) == pytest.approx(bpb(one.stdout.splitlines(), label), abs=2e-3)     # float32 sums in another order
    assert set(files(tmp_path / "out")) == set(files(tmp_path / "one"))


def torchrun(settings, ranks=2) -> subprocess.Popen:
    environment = {**toy.clean_environment(), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **settings}
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", str(toy.SCRIPT)],
                            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def rank_process(launcher: subprocess.Popen, rank: int) -> int:
    """The process id of one of the launcher's ranks."""
    for pid in map(int, Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()):
        if f"RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            return pid
    raise AssertionError(f"no rank {rank}")


KILLED = {"MAX_WALLCLOCK_SECONDS": "0", "WARMUP_STEPS": "0", "GRAD_ACCUM_STEPS": "1", "TRAIN_LOG_EVERY": "1"}


@pytest.mark.parametrize("until, victim, change", [
    ("9/100000 train_loss", 1, {"ITERATIONS": "100000", "CHECKPOINT_EVERY": "4", "PREQUANT_ONLY": "1"}),
    ("9/100000 train_loss", 0, {"ITERATIONS": "100000"}),
    ("GPTQ:collecting", 1, {"GPTQ_CALIBRATION_BATCHES": "400"}),
    ("ttp: ", 1, {"TTT_ENABLED": "1", "TTT_BATCH_SIZE": "1", "TTT_EVAL_SEQ_LEN": "48", "TTT_LORA_RANK": "4"})])
def test_a_killed_rank_ends_the_run_with_one_line(settings, monkeypatch, capsys, until, victim, change):
    """In training, in GPTQ, in test-time training, under the launcher, which stops the others as soon as one has died."""
    launcher = torchrun({**settings, **KILLED, **change})
    lines = []
    for line in launcher.stdout:
        lines.append(line)
        if line.startswith(until):
            break
    assert launcher.poll() is None, lines[-20:]
    os.kill(rank_process(launcher, victim), signal.SIGKILL)
    killed = time.monotonic()
    rest = launcher.communicate(timeout=60)[0].splitlines()
    assert launcher.returncode != 0 and time.monotonic() - killed < 60
    said = [line for line in rest if line.startswith("error: ")]
    assert said == [f"error: rank {victim} is gone: no rank can go on without it"], rest
    log = (Path(settings["ARTIFACT_DIR"]) / "run.txt").read_text().splitlines()
    assert (said[0] in log) == (victim != 0) and not any(line.startswith("run_complete") for line in rest + log)
    if "CHECKPOINT_EVERY" in change:            # one rank goes on from the checkpoint of the two
        code, lines = main(monkeypatch, capsys, {**settings, **KILLED, **change, "GRAD_ACCUM_STEPS": "2", "RESUME": "1", "ITERATIONS": "150"})
        resumed = re.search(r"resumed step:(\d+)", "\n".join(lines))
        assert code == 0 and 8 <= int(resumed[1]) < 150 and lines[-1].startswith("run_complete")


def test_an_error_of_one_rank_ends_the_run(data, settings):
    """A bad token that only rank 1 reads: it says so, and rank 0 does not wait for it."""
    tokens, micro = toy.row(200_000, range(0, 200_000, 100)), int(settings["TRAIN_BATCH_TOKENS"]) // 2
    at = micro + 10
    tokens[at + (at % 3 == 0)] = 60000          # read_shard looks at every third
    toy.write_shard(data / TRAIN0, tokens)
    launcher, began = torchrun({**broken_data(data, settings), **KILLED}), time.monotonic()
    lines = launcher.communicate(timeout=60)[0].splitlines()
    assert launcher.returncode != 0 and time.monotonic() - began < 30
    said = {line for line in lines if line.startswith("error: ")}
    assert any(line.startswith("error: rank 1: the training shards have token id 60000") for line in said), lines
    assert "error: rank 1 is gone: no rank can go on without it" in said and len(said) == 2


def test_torchrun_with_bad_settings_says_so_once(settings):
    environment = {**toy.clean_environment(), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **settings, "GRAD_ACCUM_STEPS": "3"}
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(toy.SCRIPT)],
                          env=environment, capture_output=True, text=True, timeout=120)
    lines = (done.stdout + done.stderr).splitlines()
    assert done.returncode != 0 and len([line for line in lines if line.startswith("error: ")]) == 1


# ------------------------------------------------------------------------------------------------------------------- GPU


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [0, 1])
def test_five_steps_on_the_gpu(toy_data, tmp_path, compiled):
    """The whole pipeline on one GPU with every fast part; then the losses against the CPU's."""
    network = dict(MODEL_DIM=256, NUM_HEADS=4, NUM_KV_HEADS=2, ROPE_DIMS=16, ITERATIONS=5, TRAIN_LOG_EVERY=1, WARMUP_STEPS=1,
                   TRAIN_BATCH_TOKENS=2048, TRAIN_SEQ_LEN=128, EVAL_SEQ_LEN=128, VAL_BATCH_TOKENS=8192)
    results = {}
    for device, visible in (("cpu", ""), ("cuda", os.environ.get("CUDA_VISIBLE_DEVICES", "0"))):
        settings = toy.data_env(toy_data, tmp_path / device, COMPILE_ENABLED=compiled, COMPRESSOR="brotli", **network)
        done = toy.script({**settings, "CUDA_VISIBLE_DEVICES": visible}, timeout=500)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        lines = done.stdout.splitlines()
        losses = [float(m[1]) for m in (re.match(r"\d/5 train_loss: ([\d.]+)", line) for line in lines) if m]
        results[device] = losses, bpb(lines, "diagnostic quantized")
    (a, x), (b, y) = results.values()
    assert len(a) == len(b) == 5
    # bfloat16 forward, Muon in bfloat16: steps drift apart slowly
    assert abs(a[0] - b[0]) < 0.01 and max(abs(p - q) for p, q in zip(a, b)) < 0.1 and abs(x - y) < 0.05
