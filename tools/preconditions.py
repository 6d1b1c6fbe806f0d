#!/usr/bin/env python3
"""Check everything that a run on NPROC GPUs needs before money is spent; one line each, then a summary.

    python tools/preconditions.py --nproc 8 --folder runs/h100x8 [--cpu] [--finished LOG ...]

The settings are the environment's, as for train_gpt.py. Nothing is changed, on the GPUs neither: nvidia-smi only reads.
`--cpu` leaves out what only GPUs need; `--finished` logs must be of runs with these settings. Exit codes: 0 (warnings
included), or 2 with every failed check listed.
"""

from __future__ import annotations

import csv
import importlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from parse_log import PATH_KEYS, RUN_KEYS, arguments, config_value, fail, parse_all, run_tool

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

OLDEST_TORCH = (2, 9)
DISK_GB, SHM_GB = 5.0, 0.5                      # of a three-seed launch; NCCL's buffers of 8 ranks
GPU_NAME, GPU_GB = "H100", 79.0
TOKENS_PER_GPU = 1.12e6         # a second, the most that was measured (H200: records/2026-11-30_full_length)
# Bits of clocks_throttle_reasons.active (nvidia-smi --help-query-gpu) and whether a run must not start with them.
REASONS = {0x2: ("application clocks", False), 0x4: ("power cap", False), 0x8: ("hardware slowdown", True), 0x10: ("sync boost", False),
           0x20: ("software thermal slowdown", True), 0x40: ("hardware thermal slowdown", True), 0x80: ("power brake", True),
           0x100: ("display clocks", False)}


class Found(NamedTuple):
    """What a check saw; `state` is ok, warn or FAIL."""
    state: str
    text: str


def ok(text: str) -> Found:
    return Found("ok", text)


def warn(text: str) -> Found:
    return Found("warn", text)


def bad(text: str) -> Found:
    return Found("FAIL", text)


def check_torch() -> Found:
    import torch
    version = tuple(map(int, re.findall(r"\d+", torch.__version__)[:2]))
    return (ok if version >= OLDEST_TORCH else bad)(f"{torch.__version__} (2.9 or later is needed)")


def check_gpus(nproc: int) -> Found:
    import torch
    count = torch.cuda.device_count()
    if count < nproc:
        return bad(f"{count} visible, {nproc} needed: set NPROC, or CUDA_VISIBLE_DEVICES")
    devices = [torch.cuda.get_device_properties(i) for i in range(nproc)]
    text = ", ".join(f"{d.name} {d.total_memory / 2**30:.0f} GiB" for d in devices)
    if len({d.name for d in devices}) > 1:
        return bad(f"{text}: the GPUs must be alike")
    return (ok if GPU_NAME in devices[0].name else warn)(f"{nproc} x {text.split(', ')[0]} (the challenge's: {GPU_NAME})")


def check_fa3(config) -> Found:
    try:
        importlib.import_module("flash_attn_interface")
    except Exception as e:      # an ImportError, or whatever a wheel for another torch raises
        text = f"flash_attn_interface does not import ({type(e).__name__}: {str(e).splitlines()[0][:100]}); README.md names the wheel"
        return bad(text) if config.attention_backend in ("auto", "fa3") else warn(text)
    return ok("flash_attn_interface imports")


def check_clocks(read: Callable) -> Found:
    rows = read("--query-gpu=index,clocks.sm,clocks.max.sm,temperature.gpu,clocks_throttle_reasons.active")
    number = lambda text: int(text, 0) if re.fullmatch(r"0x[0-9a-fA-F]+|\d+", text) else 0
    clocks = ", ".join(f"{r[0]}: {r[1]} of {r[2]} MHz {r[3]} C" for r in rows)
    active = {i: [reason for bit, reason in REASONS.items() if number(r[4]) & bit] for i, r in enumerate(rows)}
    notes = "; ".join(f"GPU {i}: {', '.join(name for name, _ in found)}" for i, found in active.items() if found)
    if any(severe for found in active.values() for _, severe in found):
        return bad(f"{notes} ({clocks})")
    return warn(f"{notes} ({clocks})") if notes else ok(clocks)


def check_others(read: Callable) -> Found:
    rows = read("--query-compute-apps=pid,process_name,used_memory")
    return bad("the GPUs are in use by " + ", ".join(" ".join(r) for r in rows)) if rows else ok("none")


def nvidia_smi(query: str) -> list[list[str]]:
    """Rows of a read-only query; raises OSError or CalledProcessError."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    only = ["-i", visible] if visible else []           # indices or UUIDs, which nvidia-smi knows too
    command = ["nvidia-smi", *only, query, "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return [[cell.strip() for cell in row] for row in csv.reader(done.stdout.splitlines()) if row]


def check_data(tg, config, nproc: int, cpu: bool) -> Found:
    """Enough tokens for a step, and not to see one twice: a warning if there are fewer."""
    tg.seq_schedule(config)         # raises where the trainer would
    shards = [tg.read_shard(p, config.vocab_size) for p in tg.find_shards(config, "train")]
    tg.TokenStream(shards, 0, nproc, tg.micro_batch(config, nproc)[1], config.train_seq_len)
    tokens = sum(map(len, shards))
    wanted = config.iterations * config.train_batch_tokens
    if config.max_wallclock_seconds and not cpu:
        wanted = min(wanted, int(config.max_wallclock_seconds * TOKENS_PER_GPU * nproc))
    text = f"{tokens:,} training tokens in {config.data_path}, the run reads up to about {wanted:,}"
    return ok(text) if tokens >= wanted else warn(text + f": {wanted / tokens:.1f} epochs")


def check_validation(tg, config) -> Found:
    """As the run loads it; the shards alone where the tokenizer, a check of its own, fails."""
    try:
        tg.load_tokenizer(config)
    except tg.UserError:
        return ok(f"{sum(len(tg.read_shard(p, config.vocab_size)) for p in tg.find_shards(config, 'val')):,} tokens")
    data = tg.load_validation(config, lambda line: None)
    return ok(f"{len(data.tokens):,} tokens, {int(data.byte_counts.sum()):,} bytes")


def check_tokenizer(tg, config) -> Found:
    tokenizer = tg.load_tokenizer(config)
    return ok(f"{config.tokenizer_path} ({tokenizer.vocab_size()} pieces)")


def check_batch(tg, config, nproc: int) -> Found:
    count, tokens = tg.micro_batch(config, nproc)
    return ok(f"{config.train_batch_tokens:,} tokens a step = {nproc} ranks x {count} micro-steps x {tokens:,}")


def check_kernels(tg, config) -> Found:
    tg.select_kernels(config)
    return ok(f"all but {config.kernels_off}" if config.kernels_off else "all")


def check_chunks(tg, config) -> Found:
    rules = tg.chunk_rules(config)
    return ok(", ".join(f"{chunk} tokens up to {longest}" for longest, chunk in [*rules, ("any length", config.ttt_chunk_size)]))


def check_resume(config) -> Found:
    """launch.sh starts every seed in a new folder, where there is none."""
    path = Path(config.artifact_dir or ".") / "checkpoint.safetensors"
    return ok(str(path)) if path.is_file() else bad(f"{path} is missing: RESUME=1 needs the checkpoint of a stopped run")


def check_finished(tg, config, nproc: int, runs: list[dict]) -> Found:
    """Runs that will not be run again had the settings of now, but for what names one run."""
    for run in runs:
        pairs = {f.name: (run["config"].get(f.name, f.default), config_value(str(getattr(config, f.name))))
                 for f in sorted(tg.fields(config), key=lambda f: f.name) if f.name not in RUN_KEYS | PATH_KEYS}
        pairs["nproc"] = run["device"] and run["device"]["count"], nproc
        for name, (had, now) in pairs.items():
            if had != now:
                return bad(f"{run['path']} ran with {name.upper()}={had}, now {now}: FORCE=1 runs it again, another RUNS keeps it")
    return ok(", ".join(run["path"] for run in runs))


def check_coder(tg, config) -> Found:
    """The coder's program or package (lrzip for pergroup), and what counts the code's bytes."""
    for name in ("safetensors", "python_minifier"):
        importlib.import_module(name)
    tg.COMPRESSORS[config.compressor].probe()
    return ok(config.compressor)


def check_free(folder: Path, needed: float) -> Found:
    while not folder.exists():
        folder = folder.parent
    if not os.access(folder, os.W_OK):
        return bad(f"cannot write to {folder.resolve()}")
    free = shutil.disk_usage(folder).free / 1e9
    return (ok if free >= needed else bad)(f"{free:.1f} GB free in {folder.resolve()} ({needed} needed)")


def checks(nproc: int, folder: Path, cpu: bool, finished: list[dict]):
    """(name, check) of everything that applies; checks raise for what they find wrong, or return Found."""
    try:
        import train_gpt as tg
    except ImportError as e:
        missing = bad(f"{e.name} is missing: pip install -r requirements.txt")
        yield "packages", lambda: missing
        return
    yield "torch", check_torch
    try:
        (config, unknown), wrong = tg.load_config(dict(os.environ)), ""
    except tg.UserError as e:
        config, unknown, wrong = None, [], str(e)
    yield "settings", lambda: bad(wrong) if wrong else warn("; ".join(unknown)) if unknown else ok(f"{len(tg.fields(config))} knobs")
    if not cpu:
        yield "gpus", lambda: check_gpus(nproc)
        if config:
            yield "flash-attention 3", lambda: check_fa3(config)
        yield "gpu clocks", lambda: check_clocks(nvidia_smi)
        yield "other gpu processes", lambda: check_others(nvidia_smi)
    if config:
        if finished:
            yield "finished runs", lambda: check_finished(tg, config, nproc, finished)
        if config.resume:
            yield "checkpoint", lambda: check_resume(config)
        yield "kernels", lambda: check_kernels(tg, config)
        yield "chunks", lambda: check_chunks(tg, config)
        yield "batch", lambda: check_batch(tg, config, nproc)
        if not config.ttt_eval_only:
            yield "training data", lambda: check_data(tg, config, nproc, cpu)
        yield "validation data", lambda: check_validation(tg, config)
        yield "tokenizer", lambda: check_tokenizer(tg, config)
        yield "coder", lambda: check_coder(tg, config)
    yield "disk", lambda: check_free(folder, DISK_GB)
    if Path("/dev/shm").is_dir():
        yield "shared memory", lambda: check_free(Path("/dev/shm"), SHM_GB)


def run_check(check: Callable) -> Found:
    """A check that raises has failed; its message says why."""
    try:
        return check()
    except ImportError as e:
        return bad(f"the package {e.name} is missing: pip install -r requirements.txt")
    except FileNotFoundError as e:
        return bad(f"{e.filename} is missing")
    except Exception as e:
        if type(e).__name__ not in ("UserError", "OSError", "PermissionError", "CalledProcessError", "TimeoutExpired"):
            raise
        return bad(" ".join(str(e).split()))


def main(argv=None) -> int:
    ap = arguments(__doc__)
    ap.add_argument("--nproc", type=int, default=8, help="ranks, one GPU each")
    ap.add_argument("--folder", type=Path, default=Path("runs"), help="where the runs go")
    ap.add_argument("--finished", nargs="+", default=[], metavar="LOG", help="runs that will not be run again")
    ap.add_argument("--cpu", action="store_true", help="a rehearsal with gloo ranks on the CPU")
    args = ap.parse_args(argv)
    if args.nproc < 1:
        fail(f"--nproc {args.nproc}: at least 1")
    failed = []
    for name, check in checks(args.nproc, args.folder, args.cpu, parse_all(args.finished)):
        found = run_check(check)
        print(f"{found.state:4}  {name}: {found.text}", flush=True)
        failed += [name] if found.state == "FAIL" else []
    if failed:
        print(f"error: {len(failed)} preconditions failed: {', '.join(failed)}", file=sys.stderr)
        return 2
    print("all preconditions hold")
    return 0


if __name__ == "__main__":
    run_tool(main)
