#!/usr/bin/env python3
"""Break runs of the trainer on purpose, at toy size on the CPU, and count what comes of it.

    python tools/fault_campaign.py                                  # everything, about ten minutes on one core
    python tools/fault_campaign.py --only kill_ttt,clock --tries 3  # two faults, three tries each
    python tools/fault_campaign.py --seed 7 --json campaign.json    # other random moments; every detail

Each try ends as one of three: `same` (the result of an undisturbed run, after a restart where one is needed), `refused`
(one line `error: ...`, exit code 2, files as before; a later restart then gives the same result) or `broken` (anything
else). Exit code 1 if anything is broken. Runs are real processes, forked after the imports and killed by real signals.
As root, full disks and read-only folders are real mounts in a mount namespace that ends with this program.
"""
from __future__ import annotations

import argparse
import ast
import contextlib
import ctypes
import functools
import io
import json
import os
import platform
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import types
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import brotli  # noqa: E402, F401  (this and the next four: what a run imports late, once for all children)
import constriction  # noqa: E402, F401
import safetensors.torch  # noqa: E402, F401
import sentencepiece  # noqa: E402, F401
import torch  # noqa: E402
import torch._dynamo  # noqa: E402
import toy  # noqa: E402

import train_gpt as t  # noqa: E402

# Small, but with everything that a run can be killed in: loops, lanes, two matrices a layer for GPTQ, checkpoints, phases.
SETTINGS = dict(MODEL_DIM=96, NUM_LAYERS=4, XSA_LAST_N=4, ROPE_DIMS=8, MLP_MULT=8, LOOP_END=1, NUM_LOOPS=1, PARALLEL_START_LAYER=3,
                ITERATIONS=8, TRAIN_BATCH_TOKENS=256, TRAIN_SEQ_LEN=64, CHECKPOINT_EVERY=2, EVAL_SEQ_LEN=64, TTT_ENABLED=1,
                TTT_EVAL_SEQ_LEN=64, TTT_CHUNK_SIZE=32, TTT_BATCH_SIZE=8, TTT_LORA_RANK=4, PHASED_TTT_PREFIX_DOCS=10,
                PHASED_TTT_NUM_PHASES=1, GLOBAL_TTT_CHUNK_TOKENS=256, GLOBAL_TTT_BATCH_SEQS=4, EVAL_TIME_LIMIT=0,
                QUANTIZER="scalar")        # the trellis takes seconds on a CPU
ARTIFACT, CHECKPOINT, SCRIPT = "final_model.int6.pglf", "checkpoint.safetensors", "final_model.train_gpt.py"
HANGS = 120.0               # seconds after which a run counts as hanging
CRASHED = 70                # exit code of a child whose main() raised


# ------------------------------------------------------------------------------------------------------------- processes


class Outcome(NamedTuple):
    """code: exit code, or minus the signal."""
    code: int
    out: str
    err: str

    @property
    def refused(self) -> bool:
        """One clear line and exit code 2."""
        lines = self.err.splitlines()
        return self.code == 2 and len(lines) == 1 and bool(re.match(r"error: \S.{10,}", lines[0])) and "Traceback" not in self.out

    @property
    def scores(self) -> dict[str, tuple[str, str]]:
        """Label -> the digits of loss and bits per byte."""
        return {m[1]: (m[2], m[3]) for m in re.finditer(r"^(\S.*) val_loss:(\S+) val_bpb:(\S+) eval_time", self.out, re.M)}

    def __str__(self):
        return f"exit code {self.code}: {(self.err or self.out).strip()[-300:]}"


# What a child announces when it enters it: (owner, attribute). The last is entered for every file.
STAGES = {"training": (t.Trainer, "take_step"), "checkpoint": (t.Trainer, "save"), "hessians": (t, "collect_hessians"),
          "gptq": (t.Quantizer, "__call__"), "packing": (t, "write_artifact"), "evaluation": (t, "sum_windows"),
          "ttt": (t.Adaptation, "read_batch"), "files": (t, "write_atomically")}


def announcing(name: str, function, pipe: int):
    @functools.wraps(function)
    def wrapped(*args, **options):
        os.write(pipe, f"{name} {time.perf_counter()}\n".encode())
        try:
            return function(*args, **options)
        finally:
            os.write(pipe, f"/{name} {time.perf_counter()}\n".encode())
    return wrapped


class Child:
    """main() of the trainer under these settings in a forked process; `prepare` runs there before it."""

    def __init__(self, settings: dict, prepare=None):
        self.files = [tempfile.TemporaryFile(), tempfile.TemporaryFile()]       # noqa: SIM115
        self.pipe, write = os.pipe()
        self.buffer, self.code = b"", None
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                for number, file in zip((1, 2), self.files):
                    os.dup2(file.fileno(), number)
                sys.stdout, sys.stderr = (open(n, "w", buffering=1, closefd=False) for n in (1, 2))     # noqa: SIM115
                for number in t.STOP_SIGNALS:
                    signal.signal(number, signal.SIG_DFL)
                for name in set(os.environ) - set(toy.clean_environment()):
                    del os.environ[name]
                os.environ.update({"CUDA_VISIBLE_DEVICES": "", **{k: str(v) for k, v in settings.items()}})
                for name, (owner, attribute) in STAGES.items():
                    setattr(owner, attribute, announcing(name, getattr(owner, attribute), write))
                t.shipped_script = shipped_script           # minifying takes longer than the rest of a run
                if prepare:
                    prepare()
                code = t.main()
            except BaseException:
                import traceback
                traceback.print_exc()
                code = CRASHED
            sys.stdout.flush()
            os._exit(code)
        os.close(write)

    def announcements(self):
        """(name, seconds) as they come, until the child ends."""
        deadline = time.monotonic() + HANGS
        while True:
            while b"\n" in self.buffer:
                line, self.buffer = self.buffer.split(b"\n", 1)
                name, seconds = line.decode().split()
                yield name, float(seconds)
            if not select.select([self.pipe], [], [], max(deadline - time.monotonic(), 0))[0]:
                os.kill(self.pid, signal.SIGKILL)
                return
            data = os.read(self.pipe, 65536)
            if not data:
                return
            self.buffer += data

    def wait_for(self, stage: str, entry: int):
        """Return when the child enters the stage for the entry-th time (from 0), or has ended."""
        for name, _ in self.announcements():
            if name == stage:
                entry -= 1
                if entry < 0:
                    return

    @contextlib.contextmanager
    def stopped(self):
        """A with-block during which the child stands still, unless it has ended."""
        os.kill(self.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        yield
        os.kill(self.pid, signal.SIGCONT)

    def end(self) -> Outcome:
        for _ in self.announcements():
            pass
        self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        os.close(self.pipe)
        texts = []
        for file in self.files:
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
            file.close()
        return Outcome(self.code, *texts)


@functools.cache
def shipped_script() -> bytes:
    return t.pack_script(t.script_source())


# ------------------------------------------------------------------------------------------------------------ the campaign


@dataclass
class Tally:
    fault: str
    tries: int = 0
    refused: int = 0
    same: int = 0
    broken: list[str] = field(default_factory=list)
    note: str = ""
    seconds: float = 0.0

    def count(self, verdict: str, what: str = ""):
        """verdict: "refused", "same", or what is broken."""
        self.tries += 1
        if verdict in ("refused", "same"):
            setattr(self, verdict, getattr(self, verdict) + 1)
        else:
            self.broken.append(f"{what}: {verdict}" if what else verdict)


class Lab:
    """Toy data, one undisturbed run to compare with, and fresh folders. Close it to remove everything."""

    def __init__(self, seed: int, tries: int, many: int, mounts: bool = False):
        self.seed, self.tries, self.many, self.mounts, self.made = seed, tries, many, mounts, 0
        self.place = Path(tempfile.mkdtemp(prefix="faults."))
        self.data = self.place / "data"
        self.data.mkdir()
        toy.write_data(self.data)

    def close(self):
        shutil.rmtree(self.place, ignore_errors=True)

    def rng(self, fault: str) -> random.Random:
        """Each fault's own numbers: the same whichever others run."""
        return random.Random(f"{self.seed} {fault}")

    def folder(self) -> Path:
        self.made += 1
        return self.place / f"out{self.made}"

    def settings(self, out: Path, **changes) -> dict:
        return toy.data_env(self.data, out, **{**SETTINGS, **changes})

    @functools.cached_property
    def reference(self) -> Reference:
        out = self.folder()
        child = Child(self.settings(out))
        events = list(child.announcements())
        done = child.end()
        if done.code:
            raise SystemExit(f"error: the undisturbed run failed: {done}")
        spans: dict[str, list[float]] = {name: [] for name in STAGES}
        opened: dict[str, float] = {}
        for name, at in events:
            if name[0] == "/":
                spans[name[1:]].append(at - opened[name[1:]])
            else:
                opened[name] = at
        return Reference(out, (out / ARTIFACT).read_bytes(), done.scores, spans)

    def copy(self) -> Path:
        """A fresh folder with the files of the undisturbed run."""
        return Path(shutil.copytree(self.reference.folder, self.folder()))

    def damage(self, out: Path) -> str:
        """What is wrong with the files in a folder: nothing but whole ones, and temporary ones of a killed process."""
        config = t.load_config(self.settings(out))[0]
        for path in sorted(out.iterdir()) if out.is_dir() else []:
            try:
                if path.suffix == ".safetensors":
                    t.load_tensors(path, config)
                elif path.suffix == ".pglf":
                    t.read_artifact(path, config)
                elif path.name == SCRIPT:
                    ast.parse(path.read_bytes())
                elif path.suffix != ".txt" and not re.fullmatch(r"\..*\.\d+\.tmp", path.name):
                    return f"unexpected file {path.name}"
            except (t.UserError, SyntaxError, OSError) as e:
                return str(e)
        return ""

    def difference(self, done: Outcome, out: Path, **changes) -> str:
        """How a finished run differs from the undisturbed one; every score that it printed must agree."""
        if done.code:
            return str(done)
        wrong = {label: score for label, score in done.scores.items() if self.reference.scores[label] != score}
        if wrong or not done.scores:
            return f"other scores: {wrong}"
        if (out / ARTIFACT).read_bytes() != self.reference.artifact:
            return "another artifact"
        left = [p.name for p in out.iterdir() if p.name.endswith(".tmp")]
        return self.damage(out) or (f"left over: {left}" if left else "")

    def restart(self, out: Path, *modes: str) -> str:
        """Start again in each of the modes ("RESUME", ..., "": from the start) until one is not refused; the verdict."""
        verdict = "same"
        for mode in modes:
            done = Child(self.settings(out, **({mode: 1} if mode else {}))).end()
            if not done.refused:
                return self.difference(done, out) or verdict
            verdict = "refused"
        return f"every restart was refused: {done}"


class Reference(NamedTuple):
    folder: Path
    artifact: bytes
    scores: dict
    spans: dict[str, list[float]]           # seconds of every entry of every stage


FAULTS = {}


def fault(function):
    """Register `function(lab, tally)` under its name."""
    FAULTS[function.__name__] = function
    return function


# --------------------------------------------------------------------------------------------------------------- kill -9

RESTARTS = {"training": ("RESUME", ""), "checkpoint": ("RESUME", ""), "hessians": ("QUANTIZE_ONLY",), "gptq": ("QUANTIZE_ONLY",),
            "packing": ("QUANTIZE_ONLY",), "evaluation": ("EVAL_ONLY", "QUANTIZE_ONLY"), "ttt": ("EVAL_ONLY",),
            "files": ("EVAL_ONLY", "QUANTIZE_ONLY", "RESUME", "")}


def kill_in(stage: str, lab: Lab, tally: Tally):
    """SIGKILL at a random moment of a random entry of the stage; whole files; restarts end where the undisturbed run did."""
    rng, spans = lab.rng(tally.fault), lab.reference.spans[stage]
    for _ in range(lab.tries):
        out, entry = lab.folder(), rng.randrange(len(spans))
        child = Child(lab.settings(out))
        child.wait_for(stage, entry)
        delay = rng.uniform(0, spans[entry])
        time.sleep(delay)
        os.kill(child.pid, signal.SIGKILL)
        done = child.end()
        what = f"entry {entry} after {1000 * delay:.1f} ms"
        if done.code == -signal.SIGKILL:
            tally.count(lab.damage(out) or lab.restart(out, *RESTARTS[stage]), what)
        else:                               # it was over before the signal came
            tally.count(lab.difference(done, out) or "same", what)
        shutil.rmtree(out, ignore_errors=True)
    tally.note = f"{len(spans)} entries of {1000 * sum(spans) / len(spans):.0f} ms"


for _stage in STAGES:
    FAULTS[f"kill_{_stage}"] = functools.partial(kill_in, _stage)


# --------------------------------------------------------------------------------------------------------- disks, folders


def own_mounts() -> bool:
    """A mount namespace of our own, if we may: what is mounted there goes with this process."""
    new_namespace, recursive, private = 0x00020000, 1 << 14, 1 << 18
    libc = ctypes.CDLL(None, use_errno=True)
    return libc.unshare(new_namespace) == 0 and libc.mount(b"none", b"/", None, recursive | private, None) == 0


def mount(*arguments) -> bool:
    return subprocess.run(["mount", *map(str, arguments)], capture_output=True).returncode == 0


@fault
def full_disk(lab: Lab, tally: Tally):
    """The disk is full somewhere between the first line of the log and the last file. Then there is room, and a restart."""
    rng, reference = lab.rng(tally.fault), lab.reference
    total = sum(p.stat().st_size for p in reference.folder.iterdir()) + max(p.stat().st_size for p in reference.folder.iterdir())
    for _ in range(lab.tries):
        out, size = lab.folder(), int(rng.uniform(0.005, 1) * total) // 4096 * 4096
        out.mkdir()
        mounted = lab.mounts and mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", out)
        limit = None if mounted else functools.partial(limit_files, size // 3)
        done = Child(lab.settings(out), limit).end()
        verdict = lab.damage(out)
        if not verdict and not done.refused:
            verdict = lab.difference(done, out) or "same"
        if not verdict:
            if mounted:
                mount("-o", f"remount,size={2 * total}", out)
            verdict = lab.restart(out, "QUANTIZE_ONLY", "RESUME", "")
            verdict = "refused" if verdict == "same" else verdict           # it was, before there was room
        tally.count(verdict, f"{size} bytes")
        tally.note = "a tmpfs that is too small" if mounted else "RLIMIT_FSIZE in place of a full disk: no mounts here"
        if mounted:
            subprocess.run(["umount", out], check=True)
        shutil.rmtree(out)


def limit_files(size: int):
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@fault
def read_only(lab: Lab, tally: Tally):
    """The run's folder cannot be written: from the start, in each mode; or a file takes its place at a random moment."""
    rng = lab.rng(tally.fault)
    for mode in ("", "RESUME", "QUANTIZE_ONLY", "EVAL_ONLY"):
        out = lab.copy()
        before = {p.name: p.read_bytes() for p in out.iterdir()}
        if lab.mounts and mount("--bind", out, out) and mount("-o", "remount,bind,ro", out):
            done = Child(lab.settings(out, **({mode: 1} if mode else {}))).end()
            subprocess.run(["umount", out], check=True)
            tally.note = "a read-only bind mount; then a file in the folder's place"
            changed = before != {p.name: p.read_bytes() for p in out.iterdir()}
            tally.count("files were changed" if changed else "refused" if done.refused else str(done), mode)
        shutil.rmtree(out)
    for _ in range(lab.tries):
        out, stage = lab.folder(), rng.choice(["training", "hessians", "gptq", "packing", "checkpoint"])
        away = out.with_name(out.name + ".away")
        child = Child(lab.settings(out))
        child.wait_for(stage, rng.randrange(len(lab.reference.spans[stage])))
        with child.stopped():
            out.rename(away)
            out.write_bytes(b"in the way")
        done = child.end()
        verdict = lab.damage(away) or ("refused" if done.refused else str(done))
        if verdict == "refused" and out.read_bytes() != b"in the way":
            verdict = "the file in the way was overwritten"
        out.unlink()
        if verdict == "refused":
            away.rename(out)
            again = lab.restart(out, "QUANTIZE_ONLY", "RESUME", "")
            verdict = verdict if again in ("same", "refused") else again
        tally.count(verdict, f"a file in the folder's place in {stage}")
        for path in (away, out):
            shutil.rmtree(path, ignore_errors=True)


# ---------------------------------------------------------------------------------------------------------- data, clocks


@fault
def lost_shards(lab: Lab, tally: Tally):
    """A shard or the tokenizer is deleted, emptied, cut short or replaced, before the start or at a random moment."""
    rng, whole = lab.rng(tally.fault), lab.data
    actions = {"deleted": lambda p: p.unlink(), "emptied": lambda p: os.truncate(p, 0),
               "cut short": lambda p: os.truncate(p, rng.randrange(1, p.stat().st_size)), "replaced": replace_shard}
    for i in range(2 * lab.tries):
        out, stage = lab.folder(), rng.choice(["before", "training", "hessians", "evaluation", "ttt"])
        lab.data = Path(shutil.copytree(whole, lab.place / f"data{i}"))
        try:
            path = rng.choice(sorted(lab.data.iterdir()))
            action = rng.choice(list(actions))
            what = f"{path.name} {action} ({stage})"
            if stage == "before":
                actions[action](path)
            child = Child(lab.settings(out))
            if stage != "before":
                child.wait_for(stage, rng.randrange(len(lab.reference.spans[stage])))
                with child.stopped():
                    actions[action](path)
            done = child.end()
            verdict = lab.damage(out) or ("refused" if done.refused else lab.difference(done, out) or "same")
            tally.count(verdict, what)
        finally:
            shutil.rmtree(lab.data)
            lab.data = whole
        shutil.rmtree(out, ignore_errors=True)


def replace_shard(path: Path):
    """As a download does: another file under the name."""
    other = path.with_name("other")
    other.write_bytes(b"not a shard" * 500)
    other.replace(path)


def jumping_clock(seed: str):
    """In a child: time stands still for no one, but leaps ahead (a suspended machine), and the date leaps both ways."""
    rng, ahead = random.Random(seed), [0.0]

    def elapsed():
        if rng.random() < 0.05:
            ahead[0] += 10 ** rng.uniform(-3, 6)
        return time.perf_counter() + ahead[0]

    t.time = types.SimpleNamespace(perf_counter=elapsed, monotonic=elapsed, sleep=time.sleep,
                                   time=lambda: time.time() + rng.choice([-1, 1]) * 10 ** rng.uniform(0, 10))


@fault
def clock(lab: Lab, tally: Tally):
    """Clocks leap. By steps: the same result. By the clock: a whole submission whose scores EVAL_ONLY gives again."""
    for i in range(lab.tries):
        out, leap = lab.folder(), functools.partial(jumping_clock, f"{lab.seed} clock {i}")
        if i % 2 == 0:
            tally.count(lab.difference(Child(lab.settings(out), leap).end(), out) or "same", "by steps")
        else:
            timed = lab.settings(out, MAX_WALLCLOCK_SECONDS=30, GPTQ_RESERVE_SECONDS=1, ITERATIONS=100)
            done = Child(timed, leap).end()
            again = Child(lab.settings(out, EVAL_ONLY=1)).end()
            ok = done.code == again.code == 0 and again.scores and again.scores.items() <= done.scores.items()
            tally.count(lab.damage(out) or ("same" if ok else f"{done.code} {done.scores} {again}"), "by the clock")
        shutil.rmtree(out, ignore_errors=True)


# ----------------------------------------------------------------------------------------------------- damage, settings


# how -> function(data, a, b, noise) of a file, two places in it in order, and some random bytes
DAMAGES = {
    "a bit flipped": lambda d, a, b, noise: d[:a] + bytes([d[a] ^ 1 << noise[0] % 8]) + d[a + 1:],
    "overwritten": lambda d, a, b, noise: d[:a] + noise + d[a + len(noise):],
    "inserted": lambda d, a, b, noise: d[:a] + noise + d[a:],
    "appended": lambda d, a, b, noise: d + noise,
    "cut off": lambda d, a, b, noise: d[:a],
    "front lost": lambda d, a, b, noise: d[a:],
    "a piece lost": lambda d, a, b, noise: d[:a] + d[b:],
    "a piece repeated": lambda d, a, b, noise: d[:b] + d[a:],
    "zeroed": lambda d, a, b, noise: d[:a] + bytes(b - a) + d[b:],
    "halves swapped": lambda d, a, b, noise: d[a:] + d[:a],
    "all noise": lambda d, a, b, noise: random.Random(noise).randbytes(len(d)),
    "a pickle": lambda d, a, b, noise: b"\x80\x04cos\nsystem\nX\x0a\x00\x00\x00touch gone\x85R." + noise,
    "a script": lambda d, a, b, noise: b"#!/bin/sh\ntouch gone\n" + d,
}


def corrupt(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """How another file than data was made, and it. Half of the places are near the front, where headers are."""
    while True:
        end = len(data) if rng.random() < 0.5 else min(len(data), 2000)
        a, b = sorted(rng.randrange(end) for _ in range(2))
        how, noise = rng.choice(list(DAMAGES)), rng.randbytes(rng.randrange(1, 64))
        damaged = DAMAGES[how](data, a, b, noise)
        if damaged != data:
            return f"{how} at {a}", damaged


WATCHED = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "pickle.find_class", "socket.connect", "compile")
watching: list[str] | None = None


def watch(event: str, _arguments):
    if watching is not None and event.startswith(WATCHED):
        watching.append(event)


@functools.cache
def install_watch():
    sys.addaudithook(watch)         # for good: Python has no way to remove one


@contextlib.contextmanager
def watched():
    """A list of the events in the with-block by which a program runs or fetches something."""
    global watching
    install_watch()
    watching = []
    try:
        yield watching
    finally:
        watching = None


def damaged_file(lab: Lab, tally: Tally, name: str, mode: str, read):
    """Corruptions of one file: read() refuses each with one line and runs nothing; every 20th through the front door."""
    rng, out = lab.rng(tally.fault), lab.copy()
    path, config = out / name, t.load_config(lab.settings(out))[0]
    good = path.read_bytes()
    read(path, config)                      # the imports that reading needs are no events of ours
    for i in range(lab.many):
        how, bad = corrupt(good, rng)
        path.write_bytes(bad)
        verdict = "accepted"
        with watched() as events:
            try:
                read(path, config)
            except t.UserError as e:
                verdict = "refused" if e.code == 2 and str(path) in str(e) and "\n" not in str(e) else str(e)
            except BaseException as e:
                verdict = f"crashed: {e!r}"
        if events:
            verdict = f"it ran something: {events}"
        if verdict == "refused" and i % 20 == 0:
            done = Child(lab.settings(out, **{mode: 1})).end()
            verdict = "refused" if done.refused else str(done)
        tally.count(verdict, how)
    tally.note = f"of {len(good):,} bytes; {-(-lab.many // 20)} also through a whole process"
    shutil.rmtree(out)


@fault
def corrupt_artifact(lab: Lab, tally: Tally):
    damaged_file(lab, tally, ARTIFACT, "EVAL_ONLY", t.read_artifact)


@fault
def corrupt_checkpoint(lab: Lab, tally: Tally):
    damaged_file(lab, tally, CHECKPOINT, "RESUME", t.load_tensors)


JUNK = ["", " ", "x", "nan", "-inf", "-1", "0", "1e999", "9" * 5000, "0x10", "1_0", "1.5", "true", "None", "a\nb", "\udcff", "../../etc",
        "$(touch gone)", "`touch gone`", "%s%n", "{seed}", "\u0661", "\U0001f680", "\x1b[31m", "/dev/null", "[]", "-0", "1" * 30]


def random_value(f, rng: random.Random) -> str:
    """Mostly within the limits of the knob, else junk."""
    m, low = f.metadata, f.metadata.get("at_least", f.metadata.get("above", 0))
    if rng.random() < 0.2:
        return rng.choice(JUNK)
    if f.type == "bool":
        return rng.choice("01")
    if "choices" in m:
        return rng.choice(m["choices"])
    if f.type == "str":
        return rng.choice(["data", "/tmp/x", "a b"])
    high = m.get("at_most", 100 * max(abs(f.default), 1))
    return str(rng.randint(low, int(high)) if f.type == "int" else rng.uniform(low, high))


@fault
def settings(lab: Lab, tally: Tally):
    """Random settings: CONFIG_CHECK prints every knob, or one line names one of those given. No file appears."""
    rng, knobs = lab.rng(tally.fault), {f.name.upper(): f for f in t.fields(t.Config)}
    empty = lab.folder()
    empty.mkdir()
    home = os.getcwd()
    os.chdir(empty)
    try:
        for _ in range(lab.many):
            names = rng.sample(sorted(set(knobs) - {"CONFIG_CHECK"}), rng.randint(1, 5))
            given = {name: random_value(knobs[name], rng) for name in names}
            done = check_settings(given)
            if done.code == 0:
                missing = [name for name in knobs if f"  {name.lower()}: " not in done.out]
                verdict = "same" if not missing and not done.err else f"not printed: {missing} {done.err}"
            else:
                verdict = "refused" if done.refused and any(name in done.err for name in names) else str(done)
            if any(empty.iterdir()):
                verdict = f"it left {list(empty.iterdir())}"
            tally.count(verdict, repr(given)[:200])
    finally:
        os.chdir(home)
    tally.note = "same: CONFIG_CHECK=1 prints the table"


def check_settings(given: dict[str, str]) -> Outcome:
    """CONFIG_CHECK=1 under these settings, in this process."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", errors) for errors in ("strict", "backslashreplace"))
    handlers = {number: signal.getsignal(number) for number in t.STOP_SIGNALS}
    try:
        with mock.patch.dict(os.environ, {**toy.clean_environment(), **given, "CONFIG_CHECK": "1"}, clear=True), \
                contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), watched() as events:
            code = t.main()
        if events:
            err.write(f"it ran something: {events}")
    except BaseException as e:
        code = CRASHED
        err.write(f"crashed: {e!r}")
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    for stream in (out, err):
        stream.flush()
    return Outcome(code, *(stream.buffer.getvalue().decode() for stream in (out, err)))


# ------------------------------------------------------------------------------------------------------------------ main


def run_campaign(lab: Lab, names: list[str], report=print) -> list[Tally]:
    tallies = []
    report(f"{'fault':20} {'tries':>6} {'refused':>8} {'same':>6} {'broken':>7} {'seconds':>8}  note")
    for name in names:
        tally, start = Tally(name), time.perf_counter()
        FAULTS[name](lab, tally)
        tally.seconds = round(time.perf_counter() - start, 1)
        tallies.append(tally)
        report(f"{name:20} {tally.tries:6} {tally.refused:8} {tally.same:6} {len(tally.broken):7} {tally.seconds:8.1f}  {tally.note}")
        for line in tally.broken[:5]:
            report(f"    broken: {line}")
    return tallies


def provenance(a) -> dict:
    git = lambda *args: subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return {"revision": git("rev-parse", "HEAD") + ("+dirty" if git("status", "--porcelain", "-uno") else ""), "seed": a.seed,
            "python": platform.python_version(), "torch": torch.__version__, "machine": platform.platform(), "cores": os.cpu_count(),
            "root": os.geteuid() == 0}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the random moments, damages and settings (default 0)")
    parser.add_argument("--only", default="", metavar="NAMES", help=f"comma list of {', '.join(FAULTS)}")
    parser.add_argument("--tries", type=int, default=10, help="of each fault that needs whole runs (default 10)")
    parser.add_argument("--many", type=int, default=200, help="damages of each kind and random settings (default 200)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every count and detail there")
    a = parser.parse_args()
    names = [name for name in a.only.split(",") if name] or list(FAULTS)
    unknown = [name for name in names if name not in FAULTS]
    if unknown or a.tries < 1 or a.many < 1:
        parser.error(f"--only {unknown[0]}: expected names of {', '.join(FAULTS)}" if unknown else "--tries and --many must be at least 1")
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, signal.default_int_handler)       # so that everything is removed then too
    about = provenance(a)
    print(" ".join(f"{k}:{v}" for k, v in about.items()), flush=True)
    lab = Lab(a.seed, a.tries, a.many, own_mounts())
    try:
        tallies = run_campaign(lab, names, functools.partial(print, flush=True))
    finally:
        lab.close()
    broken = sum(len(tally.broken) for tally in tallies)
    print(f"{sum(tally.tries for tally in tallies)} tries, {broken} broken")
    if a.json:
        a.json.write_text(json.dumps({**about, "faults": [asdict(tally) for tally in tallies]}, indent=1) + "\n")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
