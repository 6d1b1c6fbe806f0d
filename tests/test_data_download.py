"""download.py against a server on loopback that speaks the part of the hub's API that huggingface_hub uses."""

import collections
import hashlib
import http.server
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import urllib.parse
from pathlib import Path

import download
import numpy as np
import pytest
from shards import header

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CHUNK = 10 << 20  # huggingface_hub writes what it receives in pieces of 10 MiB
SP8192, CASEOPS = download.VARIANTS["sp8192"], download.VARIANTS["caseops"]


class FakeHub(http.server.ThreadingHTTPServer):
    """Repositories of {path: bytes}; faults are answers that a path gives before it gives the right one.

    faults[path] is a list, used up from the front (its last one stays if `forever`): an HTTP status, ("cut", n) to
    break off after n bytes, ("stall", n) to send no more after n bytes, ("bytes", b) to send other content,
    ("retry", status, seconds) for a status with Retry-After, ("whole",) to ignore a range.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos = {}
        self.reset()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def reset(self):
        self.repos, self.listed_sizes = {}, {}
        self.faults, self.forever = collections.defaultdict(list), set()
        self.requests = []  # (path, Range header)
        self.released = threading.Event()

    def fault(self, path):
        queue = self.faults[path]
        if not queue:
            return None
        return queue[0] if len(queue) == 1 and path in self.forever else queue.pop(0)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        url = urllib.parse.urlsplit(self.path)
        path = urllib.parse.unquote(url.path)
        api, resolve = "/api/datasets/", f"/resolve/{COMMIT}/"
        if path.startswith(api):
            return self.listing(path[len(api) :])
        if path.startswith("/datasets/") and resolve in path:  # as the hub: the content is on another path
            return self.answer(302, Location=f"/cdn/{urllib.parse.quote(path.removeprefix('/datasets/'))}")
        repo, _, name = path.removeprefix("/cdn/").partition(resolve)
        return self.content(repo, name)

    def refuse(self, fault):
        if isinstance(fault, int):
            codes = {404: "EntryNotFound"}
            extra = {"X_Error_Code": codes[fault]} if fault in codes else {}
            self.answer(fault, b"{}", **extra)
        elif fault[0] == "retry":
            self.answer(fault[1], b"{}", Retry_After=fault[2])
        else:
            return False
        return True

    def listing(self, repo):
        hub = self.server
        hub.requests.append(("api", None))
        fault = hub.fault("api")
        if fault is not None and self.refuse(fault):
            return None
        if fault:
            return self.answer(200, fault[1])
        if repo not in hub.repos:
            return self.answer(404, b"{}", X_Error_Code="RepoNotFound")
        siblings = []
        for path, content in hub.repos[repo].items():
            size = hub.listed_sizes.get(path, len(content))
            blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            entry = {"rfilename": path, "size": size, "blobId": blob}
            if path.endswith((".bin", ".model")):
                entry["lfs"] = {"size": size, "sha256": hashlib.sha256(content).hexdigest(), "pointerSize": 130}
            siblings.append(entry)
        body = json.dumps({"id": repo, "_id": "x", "sha": COMMIT, "siblings": siblings}).encode()
        return self.answer(200, body, Content_Type="application/json")

    def content(self, repo, path):
        hub = self.server
        asked = self.headers.get("Range")
        hub.requests.append((path, asked))
        content = hub.repos[repo][path]
        fault = hub.fault(path)
        if fault is not None and self.refuse(fault):
            return
        if fault and fault[0] == "bytes":
            content = fault[1]
        start = 0
        if asked and fault != ("whole",):
            start = int(asked.removeprefix("bytes=").partition("-")[0])
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        end = fault[1] if fault and fault[0] in ("cut", "stall") else len(content)
        try:
            self.wfile.write(content[start:end])
            self.wfile.flush()
            if fault and fault[0] == "stall":
                hub.released.wait(30)
            if end < len(content):
                self.close_connection = True
                self.connection.close()
        except OSError:
            self.close_connection = True  # the client was killed


def shard(tokens, seed):
    values = np.random.default_rng(seed).integers(2, 8192, tokens, dtype=np.uint16)
    values[0] = 1
    return header(tokens) + values.tobytes()


BIG = shard(12 << 20, 5)  # 24 MiB, so that pieces of 10 MiB arrive before a cut


@pytest.fixture(scope="module")
def server():
    hub = FakeHub()
    yield hub
    hub.shutdown()


@pytest.fixture
def hub(server):
    """The hub with a challenge repository of three data sets, all in order."""
    server.reset()
    root = "datasets/datasets"
    files = {
        f"{root}/fineweb10B_sp8192/fineweb_val_000000.bin": shard(5000, 1),
        f"{root}/fineweb10B_sp8192/fineweb_train_000000.bin": shard(6000, 2),
        f"{root}/fineweb10B_sp8192/fineweb_train_000001.bin": shard(6000, 3),
        f"{root}/fineweb10B_sp8192/fineweb_train_000002.bin": shard(6000, 4),
        f"{root}/fineweb10B_sp1024/fineweb_val_000000.bin": shard(5000, 1),
        f"{root}/fineweb10B_byte260/fineweb_val_000000.bin": shard(5000, 1),
        "datasets/tokenizers/fineweb_8192_bpe.model": b"model " * 1000,
        "datasets/tokenizers/fineweb_1024_bpe.model": b"small " * 1000,
        "README.md": b"# data",
    }
    manifest = {
        "datasets": [
            {"name": f"fineweb10B_sp{n}", "tokenizer_name": f"sp{n}", "stats": {"files_train": k, "files_val": 1}}
            for n, k in ((8192, 3), (1024, 0))
        ],
        "tokenizers": [{"name": f"sp{n}", "model_path": f"tokenizers/fineweb_{n}_bpe.model"} for n in (8192, 1024)],
    }
    files["datasets/manifest.json"] = json.dumps(manifest).encode()
    server.repos[SP8192.repo] = files
    yield server
    server.released.set()


VAL = "datasets/datasets/fineweb10B_sp8192/fineweb_val_000000.bin"
TRAIN = "datasets/datasets/fineweb10B_sp8192/fineweb_train_000000.bin"


def environment(hub, **extra):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "http", "HTTP"))}
    return {**kept, "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1", **extra}


@pytest.fixture
def fetch(hub, data_run, tmp_path):
    def run(*options, variant="sp8192", **more):
        env = environment(hub, HF_HOME=str(tmp_path / "home"))
        result = data_run("download.py", "--variant", variant, "--out", tmp_path / "out", "--retry-wait", 0.1,
                          *options, env=env, **more)  # fmt: skip
        assert "Traceback" not in result.stderr, result.stderr
        return result

    run.out = tmp_path / "out"
    return run


def fetched(out):
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}


def expected(hub, shards=3):
    repo = hub.repos[SP8192.repo]
    names = ["datasets/fineweb10B_sp8192/fineweb_val_000000.bin", "tokenizers/fineweb_8192_bpe.model"]
    names += [f"datasets/fineweb10B_sp8192/fineweb_train_{i:06d}.bin" for i in range(shards)]
    return {name: repo["datasets/" + name] for name in names}


def failed(result, message):
    """One line, exit code 2."""
    assert result.returncode == 2, result.stdout
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: ") and message in last, result.stderr
    assert sum(line.startswith("error: ") for line in result.stderr.splitlines()) == 1


def test_success_dry_run_and_nothing_twice(hub, fetch):
    result = fetch("--dry-run", "--train-shards", 2)
    assert result.returncode == 0, result.stderr
    assert f"{2 * 6000 + 1024:,}" in result.stdout
    assert "4 files, 4 to fetch" in result.stdout
    assert not fetch.out.exists()

    result = fetch("--train-shards", 2)
    assert result.returncode == 0, result.stderr
    assert fetched(fetch.out) == expected(hub, 2)
    assert "17,000 tokens" in result.stdout
    hub.requests.clear()
    assert fetch("--train-shards", 3).returncode == 0  # one more; the others are there
    assert [path for path, _ in hub.requests] == ["api", "datasets/manifest.json", TRAIN.replace("000000", "000002")]
    assert fetched(fetch.out) == expected(hub, 3)
    assert "0 to fetch" in fetch("--dry-run").stdout  # all, by default
    # A file that rotted on the disk is fetched again.
    place = fetch.out / "datasets/fineweb10B_sp8192/fineweb_val_000000.bin"
    place.write_bytes(place.read_bytes()[:-1] + b"x")
    assert fetch().returncode == 0
    assert fetched(fetch.out) == expected(hub, 3)


def caseops_repo(entries=5000):
    root = f"data/datasets/{CASEOPS.dataset}"
    return {
        f"{root}/fineweb_val_000000.bin": shard(5000, 1),
        f"{root}/fineweb_val_bytes_000000.bin": header(entries) + bytes(2 * entries),
        f"{root}/fineweb_train_000000.bin": shard(6000, 2),
        f"data/tokenizers/{CASEOPS.tokenizer}": b"model",
    }


def test_caseops_without_a_manifest(hub, fetch):
    hub.repos[CASEOPS.repo] = caseops_repo()
    result = fetch(variant="caseops")
    assert result.returncode == 0, result.stderr
    assert fetched(fetch.out) == {k.removeprefix("data/"): v for k, v in hub.repos[CASEOPS.repo].items()}


def test_sidecar_must_fit(hub, fetch):
    hub.repos[CASEOPS.repo] = caseops_repo(entries=4999)
    failed(fetch(variant="caseops"), "4999 entries, expected 5000, one per token of fineweb_val_000000.bin")
    del hub.repos[CASEOPS.repo][f"data/datasets/{CASEOPS.dataset}/fineweb_val_bytes_000000.bin"]
    failed(fetch(variant="caseops"), "fineweb_val_bytes_000000.bin of")


def test_what_is_missing_is_named(hub, fetch):
    repo = hub.repos[SP8192.repo]
    there = "fineweb10B_byte260, fineweb10B_sp1024, fineweb10B_sp8192"
    failed(fetch(variant="sp4096"), f"data set fineweb10B_sp4096 is not in {SP8192.repo}; data sets there: {there}")
    failed(fetch(variant="caseops"), f"{CASEOPS.repo} at {hub.url}: not found")
    failed(fetch("--train-shards", 4), "fineweb_train_000003.bin of fineweb10B_sp8192 is missing")
    model = repo.pop("datasets/tokenizers/fineweb_8192_bpe.model")
    failed(fetch(), "tokenizer fineweb_8192_bpe.model is not in")
    repo["datasets/tokenizers/fineweb_8192_bpe.model"] = model
    del repo[TRAIN.replace("000000", "000001")]
    failed(fetch(), f"fineweb_train_000001.bin of fineweb10B_sp8192 is missing in {SP8192.repo}: 3 training shards")
    assert fetch("--train-shards", 1).returncode == 0
    del repo[VAL]
    failed(fetch(), "fineweb_val_000000.bin of fineweb10B_sp8192 is missing")
    repo["datasets/manifest.json"] = b"[oops"
    failed(fetch(), "datasets/manifest.json in willdepueoai/parameter-golf: not JSON")


def test_interrupted_by_the_server_and_resumed_at_once(hub, fetch):
    hub.repos[SP8192.repo][VAL] = BIG
    hub.faults[VAL] = [("cut", CHUNK + 5000)]
    assert fetch("--train-shards", 0).returncode == 0
    assert [asked for path, asked in hub.requests if path == VAL] == [None, f"bytes={CHUNK}-"]
    assert fetched(fetch.out) == expected(hub, 0)


def test_interrupted_by_kill_and_resumed_by_the_next_run(hub, fetch, tmp_path):
    hub.repos[SP8192.repo][VAL] = BIG
    hub.faults[VAL] = [("stall", CHUNK + 5000)]
    command = [sys.executable, download.__file__, "--variant", "sp8192", "--out", str(fetch.out), "--train-shards", "0"]
    process = subprocess.Popen(command, env=environment(hub, HF_HOME=str(tmp_path / "home")), stderr=subprocess.DEVNULL)
    part = fetch.out / ".download" / f"{hashlib.sha256(BIG).hexdigest()}.part"
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and not (part.exists() and part.stat().st_size == CHUNK):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert part.stat().st_size == CHUNK
    assert not (fetch.out / "datasets/fineweb10B_sp8192/fineweb_val_000000.bin").exists()
    hub.requests.clear()
    assert fetch("--train-shards", 0).returncode == 0
    assert [asked for path, asked in hub.requests if path == VAL] == [f"bytes={CHUNK}-"]
    assert fetched(fetch.out) == expected(hub, 0)


def test_server_that_ignores_ranges(hub, fetch):
    part = fetch.out / ".download" / f"{hashlib.sha256(hub.repos[SP8192.repo][VAL]).hexdigest()}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"the beginning")
    hub.faults[VAL] = [("whole",)]
    assert fetch().returncode == 0
    assert fetched(fetch.out) == expected(hub)


@pytest.mark.parametrize("path", [VAL, "datasets/tokenizers/fineweb_8192_bpe.model"])
def test_wrong_checksum(path, hub, fetch):
    content = hub.repos[SP8192.repo][path]
    hub.faults[path] = [("bytes", content[:-1] + b"?")]
    hub.forever.add(path)
    place = fetch.out / path.removeprefix("datasets/")
    place.parent.mkdir(parents=True)
    place.write_bytes(b"what was there")
    failed(fetch("--jobs", 1), f"{place.name}: sha256 {hashlib.sha256(content[:-1] + b'?').hexdigest()}, expected")
    assert place.read_bytes() == b"what was there"
    assert not (fetch.out / ".download" / f"{hashlib.sha256(content).hexdigest()}.part").exists()
    hub.forever.clear()  # now wrong once only
    hub.faults[path] = [("bytes", content[:-1] + b"?")]
    assert fetch().returncode == 0
    assert fetched(fetch.out) == expected(hub)


def test_part_of_something_else_is_noticed(hub, fetch):
    part = fetch.out / ".download" / f"{hashlib.sha256(hub.repos[SP8192.repo][VAL]).hexdigest()}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(bytes(100))
    assert fetch().returncode == 0
    assert fetched(fetch.out) == expected(hub)


def test_published_file_that_is_no_shard(hub, fetch):
    hub.repos[SP8192.repo][VAL] = b"x" * 5000
    failed(fetch(), "fineweb_val_000000.bin as published: magic")
    assert not (fetch.out / "datasets/fineweb10B_sp8192/fineweb_val_000000.bin").exists()


@pytest.mark.parametrize("status, message", [(401, "public (401)"), (403, "(403)"), (404, "found (404)"), (500, "500")])
@pytest.mark.parametrize("where", ["api", VAL])
def test_refused_for_good(status, message, where, hub, fetch):
    hub.faults[where] = [status]
    hub.forever.add(where)
    failed(fetch("--tries", 2), message)
    tries = [path for path, _ in hub.requests].count(where)
    assert tries == (2 if status == 500 else 1)
    assert not list(fetch.out.rglob("fineweb_val*"))


@pytest.mark.parametrize("where", ["api", VAL, "datasets/manifest.json"])
def test_server_errors_that_pass(where, hub, fetch):
    hub.faults[where] = [500, 502, 503]
    assert fetch().returncode == 0
    assert fetched(fetch.out) == expected(hub)


@pytest.mark.parametrize("where", ["api", VAL])
def test_rate_limit_is_waited_for(where, hub, fetch):
    hub.faults[where] = [("retry", 429, 2)]
    start = time.perf_counter()
    assert fetch().returncode == 0
    assert time.perf_counter() - start > 2
    assert fetched(fetch.out) == expected(hub)


def test_rate_limit_that_stays(hub, fetch):
    hub.faults["api"] = [("retry", 429, 0)]
    hub.forever.add("api")
    failed(fetch("--tries", 3), "rate limit (429)")
    assert len(hub.requests) == 3


def test_answer_of_somebody_else(hub, fetch):
    hub.faults["api"] = [("bytes", b"<html>Please log in to the hotel's network</html>")]
    failed(fetch(), f"at {hub.url}: answered, but not with a listing")


def test_no_space_is_seen_before(hub, fetch):
    hub.listed_sizes[VAL] = 10**16
    failed(fetch(), "10000000.00 GB to fetch")
    assert not fetch.out.exists()
    assert [path for path, _ in hub.requests] == ["api", "datasets/manifest.json"]


def test_no_space_in_the_middle(hub, fetch):
    hub.repos[SP8192.repo][VAL] = BIG
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (15 << 20, 15 << 20))
    failed(fetch("--train-shards", 0, preexec_fn=limit), ".part: cannot be written (File too large)")
    assert not list(fetch.out.rglob("fineweb_val*"))
    assert fetch("--train-shards", 0).returncode == 0  # goes on where it stopped
    assert hub.requests[-1][0] == VAL and hub.requests[-1][1] is not None
    assert fetched(fetch.out) == expected(hub, 0)


def test_no_network(data_run, tmp_path):
    closed = FakeHub()
    closed.shutdown()
    closed.server_close()
    common = ["--variant", "sp8192", "--out", tmp_path / "out", "--tries", 2, "--retry-wait", 0.1]
    failed(data_run("download.py", *common, env=environment(closed)), f"{closed.url} cannot be reached")
    failed(data_run("download.py", *common, env=environment(closed, HF_HUB_OFFLINE="1")), "HF_HUB_OFFLINE is set")
    assert not (tmp_path / "out").exists()


def test_git_checksum(tmp_path):
    path = Path(tmp_path / "a")
    path.write_bytes(b"hello\n")
    assert download.checksum(path, "git-sha1") == "ce013625030ba8dba906f756967f9e9ca394464a"  # git hash-object
