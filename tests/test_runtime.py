"""RUNTIME: world, log, ledger, whole files or none, saved tensors, provenance."""

import errno
import json
import os
import re
import resource
import signal
import stat
import subprocess
import sys
import time
import types

import pytest
import torch
import toy
from hypothesis import given
from hypothesis import strategies as st

import train_gpt as tg

# ----------------------------------------------------------------------------------------------------------------- files


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_a_file_is_written_whole_and_makes_its_folder(tmp_path):
    path = tmp_path / "a" / "b"
    tg.write_atomically(path, b"new")
    tg.write_atomically(path, b"newer")
    assert path.read_bytes() == b"newer" and names(tmp_path / "a") == ["b"]


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch, function):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tg.os, function, fail)
    with pytest.raises(tg.UserError, match=r"cannot write .*file \(3 bytes\): No space left on device") as e:
        tg.write_atomically(path, b"new")
    assert e.value.code == 2 and "\n" not in str(e.value) and not e.value.everywhere
    assert path.read_bytes() == b"old" and names(tmp_path) == ["file"]


def test_a_file_limit_is_one_line(tmp_path):
    """A real failing write: the kernel refuses bytes past the limit, as a full disk does."""
    path = tmp_path / "file"
    path.write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(tg.UserError, match="File too large"):
            tg.write_atomically(path, b"x" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == b"old" and names(tmp_path) == ["file"]


def test_the_folder_is_synced_after_the_rename(tmp_path, monkeypatch):
    """Else a power cut can undo the rename, or keep it without the bytes."""
    done, fsync, replace = [], os.fsync, os.replace
    kind = lambda fd: "folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file"
    monkeypatch.setattr(tg.os, "fsync", lambda fd: (done.append(kind(fd)), fsync(fd)))
    monkeypatch.setattr(tg.os, "replace", lambda a, b: (done.append("rename"), replace(a, b)))
    tg.write_atomically(tmp_path / "file", b"x")
    assert done == ["file", "rename", "folder"]


def test_a_signal_while_writing_leaves_no_temporary_file(tmp_path, monkeypatch):
    monkeypatch.setattr(tg.os, "fsync", lambda _: tg.stop_now(15, None))
    with pytest.raises(tg.UserError, match="stopped by signal 15"):
        tg.write_atomically(tmp_path / "file", b"new")
    assert names(tmp_path) == []


def test_leftovers_of_killed_runs_are_removed_and_nothing_else(tmp_path):
    gone = subprocess.Popen(["true"])
    gone.wait()
    mine, other = f".model.{os.getpid()}.tmp", [".x.tmp", ".notes.old.tmp", ".a.1x.tmp", "data.1.tmp", "model"]
    (tmp_path / f".lrzip.abc.{gone.pid}.tmp").mkdir()
    (tmp_path / f".lrzip.abc.{gone.pid}.tmp" / "in").write_bytes(b"x")
    for name in (f".checkpoint.safetensors.{gone.pid}.tmp", mine, *other):
        (tmp_path / name).write_bytes(b"x")
    tg.remove_leftovers(tmp_path)
    assert names(tmp_path) == sorted([mine, *other])


@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_have_the_permissions_of_the_umask(tmp_path, mask, mode):
    """Not 0600, as files of tempfile would, and never writable for everyone."""
    before = os.umask(mask)
    try:
        tg.write_atomically(tmp_path / "new" / "file", b"x")
        tg.save_tensors(tmp_path / "new" / "tensors", {"a": torch.zeros(2)}, {})
        tg.Log(tmp_path / "new" / "log", quiet=False)("x")
    finally:
        os.umask(before)
    assert {p.name: p.stat().st_mode & 0o777 for p in (tmp_path / "new").iterdir()} == dict.fromkeys(("file", "tensors", "log"), mode)
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o777 & ~mask


def test_a_folder_in_the_way_is_one_line(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(tg.UserError, match="cannot write"):
        tg.write_atomically(tmp_path / "file" / "inner", b"x")


# --------------------------------------------------------------------------------------------------------------- tensors

TENSORS = {"b": torch.arange(6.0).view(2, 3), "a": torch.tensor(3.5), "c": torch.arange(4, dtype=torch.int8), "h": torch.ones(2, 2).half(),
           "t": torch.arange(12.0).view(3, 4).T}
STATE = {"step": 7, "cursor": 123456789012, "elapsed": 0.1, "model": {}}


def test_tensors_and_state_read_back(tmp_path):
    tg.save_tensors(tmp_path / "x.safetensors", TENSORS, STATE)
    tensors, state = tg.load_tensors(tmp_path / "x.safetensors", toy.config())
    assert state == STATE
    assert tensors.keys() == TENSORS.keys() and all(torch.equal(t, TENSORS[n]) and t.dtype == TENSORS[n].dtype for n, t in tensors.items())


def test_files_are_safetensors_with_json(tmp_path):
    """Other programs can read them: no pickle anywhere."""
    from safetensors import safe_open
    tg.save_tensors(tmp_path / "x", TENSORS, STATE)
    with safe_open(tmp_path / "x", "pt") as f:
        assert json.loads(f.metadata()["state"])["step"] == 7


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "x.safetensors"
    tg.save_tensors(path, TENSORS, {**STATE, "model": tg.model_knobs(toy.config())})
    return path.read_bytes()


@toy.hypothesis_settings(max_examples=300)
@given(st.data())
def test_every_changed_byte_is_found(saved, tmp_path_factory, data):
    """Flip a byte anywhere, or cut the file anywhere: one line, or the very same content."""
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    if data.draw(st.booleans()):
        at = data.draw(st.integers(0, len(saved) - 1))
        damaged = bytearray(saved)
        damaged[at] ^= data.draw(st.integers(1, 255))
    else:
        damaged = saved[: data.draw(st.integers(0, len(saved) - 1))]
    path.write_bytes(bytes(damaged))
    try:
        tensors, state = tg.load_tensors(path, toy.config())
    except tg.UserError as e:
        assert "\n" not in str(e) and "damaged.safetensors" in str(e)
        return
    # a change that keeps everything is only white space or the order inside the header
    assert state == {**STATE, "model": tg.model_knobs(toy.config())}
    assert tensors.keys() == TENSORS.keys() and all(torch.equal(t, TENSORS[n]) for n, t in tensors.items())


def test_a_file_without_its_checksum_is_damaged(tmp_path):
    """A damaged byte in the name "crc32" must not switch the check off."""
    from safetensors.torch import save
    (tmp_path / "x").write_bytes(save(TENSORS | {"t": torch.zeros(1)}, {"state": json.dumps({**STATE, "crc33": 5})}))
    with pytest.raises(tg.UserError, match="x is damaged: its tensors do not match their checksum"):
        tg.load_tensors(tmp_path / "x", toy.config())


def test_missing_and_foreign_files(tmp_path):
    with pytest.raises(tg.UserError, match="x is missing"):
        tg.load_tensors(tmp_path / "x", toy.config())
    for content in (b"", b"rubbish" * 100, b"\x08\0\0\0\0\0\0\0{}      "):
        (tmp_path / "x").write_bytes(content)
        try:
            tensors, _ = tg.load_tensors(tmp_path / "x", toy.config())
            assert not tensors
        except tg.UserError as e:
            assert "damaged" in str(e) and "\n" not in str(e)


def test_another_configuration_is_named(tmp_path):
    tg.save_tensors(tmp_path / "x", TENSORS, {"model": tg.model_knobs(toy.config())})
    for settings in (dict(NUM_LOOPS=1), dict(LOGIT_SOFTCAP=20), dict(SPARSE_ATTN_GATE_SCALE=1), dict(LN_SCALE=0)):
        name, value = next(iter(settings.items()))
        with pytest.raises(tg.UserError, match=f"was made with {name}=.*this run has {bool(value) if name == 'LN_SCALE' else value}"):
            tg.load_tensors(tmp_path / "x", toy.config(**settings))
    # what does not change the network may differ
    tg.load_tensors(tmp_path / "x", toy.config(MATRIX_LR=0.5, ITERATIONS=7, EVAL_SEQ_LEN=16))


def test_every_knob_that_changes_the_network_is_a_model_knob():
    """A changed knob with the same weights gives other losses if and only if files carry it (or it is a kernel's)."""
    import test_model
    batch = test_model.packed()
    base = toy.model(toy.config())
    weights = {n: p.detach() for n, p in tg.export_weights(dict(base.named_parameters()), 6).items()}

    def losses(c):
        model = tg.GPT(c, torch.device("cpu"))
        tg.import_weights(model, weights)
        with torch.no_grad():
            return model.losses(batch.ids, batch.targets, batch.segments)

    expected = losses(toy.config())
    changes = dict(XSA_LAST_N=2, ROPE_BASE=99, ROPE_DIMS=6, LN_SCALE=0, LOGIT_SOFTCAP=3, PARALLEL_FINAL_LANE="attn",
                   SPARSE_ATTN_GATE_SCALE=3, LOOP_END=1, PARALLEL_START_LAYER=5)
    for name, value in changes.items():
        assert name.lower() in tg.MODEL_KNOBS
        try:
            assert not torch.equal(losses(toy.config(**{name: value})), expected), name
        except tg.UserError:
            pass                # other shapes: refused anyway
    rest = dict(QK_GAIN_INIT=2, SEED=5, TIED_EMBED_INIT_STD=1, ENABLE_LOOPING_AT=0.9, FUSED_CE_ENABLED=0, KERNELS_OFF="all")
    for name, value in rest.items():
        assert name.lower() not in tg.MODEL_KNOBS
        assert torch.equal(losses(toy.config(**{name: value})), expected), name


# ------------------------------------------------------------------------------------------------------------ log, ledger


def test_log_appends_and_keeps_long_text_off_the_console(tmp_path, capsys):
    for text in ("one", "two"):
        log = tg.Log(tmp_path / "deep" / "run.txt", quiet=False)
        log(text)
        log("only in the file \u2581", console=False)
    assert (tmp_path / "deep" / "run.txt").read_text().splitlines() == ["one", "only in the file \u2581", "two", "only in the file \u2581"]
    assert capsys.readouterr().out == "one\ntwo\n"


def test_quiet_logs_are_silent(tmp_path, capsys):
    tg.Log(tmp_path / "run.txt", quiet=True)("x")
    assert not names(tmp_path) and not capsys.readouterr().out


def test_unwritable_log_is_one_line(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(tg.UserError, match="cannot write the log"):
        tg.Log(tmp_path / "file" / "run.txt", quiet=False)


def test_a_full_disk_does_not_end_the_log_with_a_traceback(tmp_path, capsys):
    """/dev/full takes nothing: the console goes on, and says once that the file does not."""
    log = tg.Log(tmp_path / "run.txt", quiet=False)
    log.file = open("/dev/full", "w", buffering=1)
    log("first")
    log("second")
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "first" and out[-1] == "second" and sum("No space left" in line for line in out) == 1


def test_ledger_counts_each_budget(monkeypatch, world):
    now = [0.0]
    monkeypatch.setattr(tg.time, "perf_counter", lambda: now[0])
    log = toy.ListLog()
    ledger = tg.Ledger(log, world, 10.0)
    for name, budget, seconds in (("warmup", "none", 100), ("train", "train", 4), ("gptq", "train", 5), ("eval", "eval", 3)):
        with ledger.stage(name, budget):
            now[0] += seconds
    assert ledger.used == {"train": 9, "eval": 3, "none": 100}
    ledger.close("train")
    assert log.lines[-1] == "budget train 9.00/10" and "ledger stage:gptq seconds:5.000 budget:train" in log.lines
    ledger.charge("late", 1.5, "train")
    ledger.close("train")
    assert log.lines[-2:] == ["budget train 10.50/10", "budget_violation: train used 10.50 s of 10 s"]
    ledger.close("eval")
    assert log.lines[-1] == "budget eval 3.00/600"


def test_progress_is_rare_and_only_for_long_stages(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(tg.time, "perf_counter", lambda: now[0])
    log = toy.ListLog()
    progress = tg.Progress(log, "stage", 20)
    for i in range(20):
        now[0] += 1
        progress(i + 1)
    assert log.lines == ["progress stage 6/20 left: 14 s", "progress stage 12/20 left: 8 s", "progress stage 18/20 left: 2 s"]


# ----------------------------------------------------------------------------------------------------------------- world


def test_one_process_needs_nothing(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    w = tg.World()
    t = torch.tensor([2.0])
    assert (w.rank, w.size) == (0, 1)
    assert w.sum(t) is t and w.mean(t) is t and w.broadcast(t) is t and t.item() == 2
    assert w.together(lambda: 5) == 5
    w.close()


@pytest.mark.parametrize("environment", [dict(RANK="x"), dict(RANK="0", WORLD_SIZE="two"), dict(RANK=""), dict(WORLD_SIZE="2"),
                                         dict(RANK="0", WORLD_SIZE="1"), dict(RANK="3", WORLD_SIZE="2"), dict(RANK="0", WORLD_SIZE="-1")])
def test_a_half_set_rank_environment_is_one_line(monkeypatch, capsys, environment):
    """What a user gets who copied part of a torchrun environment."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert tg.main() == 2
    captured = capsys.readouterr()
    lines = (captured.out + captured.err).splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and "torchrun" in lines[0]


def test_errors_pass_through_together(world):
    def fail():
        raise tg.UserError("x", code=3)
    with pytest.raises(tg.UserError) as e:
        world.together(fail)
    assert (str(e.value), e.value.code) == ("x", 3)


def test_signals_are_noted_once_then_default():
    kept = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        signals = tg.Signals()
        assert not signals.received
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        assert signals.received == signal.SIGTERM and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        for n, handler in kept.items():
            signal.signal(n, handler)


# ----------------------------------------------------------------------------------------------------------- determinism


@pytest.fixture
def algorithms(monkeypatch):
    from torch._inductor import config as inductor
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    if hasattr(inductor, "deterministic"):      # PyTorch 2.10
        monkeypatch.setattr(inductor, "deterministic", False)
    yield
    torch.use_deterministic_algorithms(False)


def test_deterministic_algorithms_are_asked_for_only_when_wanted(algorithms):
    tg.choose_algorithms(False)
    assert not torch.are_deterministic_algorithms_enabled() and "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    tg.choose_algorithms(True)
    assert torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":16:8"         # the user's own stays
    tg.choose_algorithms(True)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    tg.choose_algorithms(False)                             # the next run of this process
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("compiled", [False, True])
def test_flash_attention_3_is_told(algorithms, monkeypatch, compiled):
    """Its backward adds up with atomics unless asked not to; torch.compile must not freeze the answer."""
    asked = []

    def record(q, *_, deterministic, **__):
        asked.append(deterministic)
        return q

    monkeypatch.setitem(sys.modules, "flash_attn_interface", types.SimpleNamespace(
        flash_attn_func=record, flash_attn_varlen_func=record))
    attend = torch.compile(tg.attend_fa3, backend="eager") if compiled else tg.attend_fa3
    q = torch.zeros(1, 4, 2, 8)
    for wanted in (False, True):
        tg.choose_algorithms(wanted)
        for segments in (None, tg.Segments(torch.tensor([0, 4], dtype=torch.int32), 4)):
            attend(q, q, q, segments)
            assert asked.pop() is wanted


# ------------------------------------------------------------------------------------------------------------ provenance


def test_a_copy_without_history_is_told_its_revision(monkeypatch):
    monkeypatch.setenv("GIT_REVISION", "abc123")
    run = toy.run(toy.config())
    tg.log_provenance(run, "sdpa", [])
    assert "git revision:abc123" in run.log.lines


def test_the_log_holds_what_a_repetition_needs(tmp_path, monkeypatch):
    monkeypatch.delenv("GIT_REVISION", raising=False)
    run = toy.run(toy.config())
    shard = toy.write_shard(tmp_path / "fineweb_train_000000.bin", toy.row(77))
    tg.log_provenance(run, "sdpa", [shard])
    text = "\n".join(run.log.lines)
    source = toy.SCRIPT.read_text()
    import hashlib
    assert "Hyperparameters:\n  adam_eps: 1e-08" in text
    assert f"torch:{torch.__version__}" in text and "attention:sdpa" in text and re.search(r"git revision:[0-9a-f]{40}", text)
    assert f"script sha256:{hashlib.sha256(source.encode()).hexdigest()} bytes:{len(source.encode())}" in text
    both = shard.read_bytes()[:65536] + shard.read_bytes()[-65536:]
    assert f"input file:{shard} sha256:{hashlib.sha256(both).hexdigest()} tokens:77" in text
    body = text.split("source_begin lines:", 1)[1].split("\n", 1)[1].rsplit("\nsource_end", 1)[0]
    assert "\n".join(line[2:] for line in body.split("\n")) == source     # to the byte: the checksum above can be verified
