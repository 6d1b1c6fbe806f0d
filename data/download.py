"""Fetch the challenge's published shards and tokenizers from the Hugging Face hub.

    python data/download.py --variant sp8192 --train-shards 10
    python data/download.py --variant caseops --dry-run

Files go to OUT/datasets/<data set>/*.bin and OUT/tokenizers/*.model, OUT being ./data. Validation is always whole,
training the first --train-shards shards (all, if not given). Each file is fetched to OUT/.download/ under its
checksum's name, resumed from there after an interruption, compared with the hub's checksum (SHA-256, or git's for small
files), its header checked, and only then given its name; what is there already and right is not fetched again. Rate
limits (429, with Retry-After), server errors and lost connections are tried again; what is wrong for good is one line.

Sources: willdepueoai/parameter-golf (the challenge's own data, root datasets/, listed by its manifest.json) and
romeerp/parameter-golf-caseops-v1 (CaseOps text, with byte sidecars). HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE are
honoured.
"""

import argparse
import concurrent.futures
import hashlib
import io
import json
import os
import re
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

from shards import (
    HEADER_BYTES,
    SHARD_NAME,
    SIDECAR_NAME,
    DataError,
    read_header,
    run,
    shard_name,
    sidecar_name,
    sync_folder,
)

CHALLENGE_REPO = "willdepueoai/parameter-golf"
CASEOPS_REPO = "romeerp/parameter-golf-caseops-v1"
SPARE_BYTES = 64 << 20  # left free on the disk beyond what is fetched


class Variant(NamedTuple):
    repo: str
    dataset: str  # folder of the shards
    tokenizer: str  # file name, where the hub's manifest says nothing else
    sidecar: bool = False


VARIANTS = {
    "sp1024": Variant(CHALLENGE_REPO, "fineweb10B_sp1024", "fineweb_1024_bpe.model"),
    "sp4096": Variant(CHALLENGE_REPO, "fineweb10B_sp4096", "fineweb_4096_bpe.model"),
    "sp8192": Variant(CHALLENGE_REPO, "fineweb10B_sp8192", "fineweb_8192_bpe.model"),
    "caseops": Variant(
        CASEOPS_REPO,
        "fineweb10B_sp8192_lossless_caps_caseops_v1_reserved",
        "fineweb_8192_bpe_lossless_caps_caseops_v1_reserved.model",
        sidecar=True,
    ),
}


class RemoteFile(NamedTuple):
    """A file on the hub and where it goes; checksum is the hub's, of the whole file ("sha256" or "git-sha1")."""

    path: str
    size: int
    kind: str
    checksum: str
    place: Path = Path()


class Interrupted(Exception):
    """Another download failed, or Ctrl-C: this one stops."""


# --- hub ------------------------------------------------------------------------------------------------------------
class Hub:
    """One data set repository at one commit. Raises DataError, in one line, for whatever the hub answers."""

    def __init__(self, repo: str, tries: int, wait: float):
        from huggingface_hub import HfApi, constants, utils  # here, so that --help does without it

        self.repo, self.tries, self.wait, self.endpoint = repo, tries, wait, constants.ENDPOINT
        utils.logging.set_verbosity_error()  # its warnings on each retry; ours is one line
        utils.disable_progress_bars()
        if constants.HF_HUB_OFFLINE:
            raise DataError(f"HF_HUB_OFFLINE is set, and {repo} has to be fetched: unset it where there is a network")
        try:
            info = self.again(repo, lambda: HfApi().dataset_info(repo, files_metadata=True))
        except (ValueError, KeyError, TypeError) as e:
            raise DataError(f"{repo} at {self.endpoint}: answered, but not with a listing (a proxy's page?)") from e
        self.commit = info.sha
        self.files = {}
        for entry in info.siblings or []:
            if entry.lfs is not None:
                found = RemoteFile(entry.rfilename, entry.lfs.size, "sha256", entry.lfs.sha256)
            elif entry.size is not None and entry.blob_id:
                found = RemoteFile(entry.rfilename, entry.size, "git-sha1", entry.blob_id)
            else:
                continue
            self.files[entry.rfilename] = found

    def again(self, what: str, action):
        """action(), tried again after failures that may pass: lost connections, 408, 429 and 5xx.

        The wait doubles each time; a 429's or 503's Retry-After is obeyed where it is longer.
        """
        from huggingface_hub.errors import HfHubHTTPError

        try:
            import httpx2 as httpx  # huggingface_hub 2
        except ImportError:
            import httpx  # huggingface_hub 1

        wait = self.wait
        for attempt in range(1, self.tries + 1):
            try:
                return action()
            except HfHubHTTPError as e:
                status = e.response.status_code
                if status not in (408, 429) and status < 500:
                    raise DataError(self.refusal(what, status)) from None
                reason, asked = self.refusal(what, status), e.response.headers.get("Retry-After", "")
                wait = max(wait, float(asked)) if asked.isdigit() else wait
            except (httpx.RequestError, httpx.StreamError) as e:
                reason = f"{what}: {self.endpoint} cannot be reached or broke off ({e or type(e).__name__})"
            except OSError as e:
                # The hub's library reports a body that ended early as an OSError without a number; the disk's have one.
                if e.errno is not None:
                    raise
                reason = f"{what}: broke off before its end"
            if attempt < self.tries:
                print(f"{reason}; again in {wait:.0f} s", file=sys.stderr)
                time.sleep(wait)
                wait *= 2
        raise DataError(f"{reason}, {self.tries} tries")

    def refusal(self, what: str, status: int) -> str:
        meaning = {
            401: "not found or not public (401): check the name, or set HF_TOKEN",
            403: "access refused (403): its owner must admit the account of HF_TOKEN",
            404: "not found (404)",
            429: "rate limit (429): try later, or set HF_TOKEN for a higher one",
        }
        return f"{what} at {self.endpoint}: " + meaning.get(status, f"the hub answered {status}")

    def get(self, file: RemoteFile, stream, have: int = 0) -> None:
        """Append a file's bytes from `have` on to the stream. Raises what huggingface_hub does."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers

        url = hf_hub_url(self.repo, file.path, repo_type="dataset", revision=self.commit)
        http_get(url, stream, resume_size=have, headers=build_hf_headers(), expected_size=file.size)

    def read_json(self, path: str) -> dict:
        """A JSON object of the repository. Raises DataError if it is none."""

        def fetch() -> bytes:
            stream = io.BytesIO()
            self.get(self.files[path], stream)
            return stream.getvalue()

        try:
            content = json.loads(self.again(path, fetch))
        except ValueError as e:
            raise DataError(f"{path} in {self.repo}: not JSON ({e})") from None
        if not isinstance(content, dict):
            raise DataError(f"{path} in {self.repo}: expected a JSON object")
        return content


# --- what to fetch --------------------------------------------------------------------------------------------------
def manifest_entry(manifest: dict, key: str, name: str | None) -> dict:
    """The entry called `name` of a manifest's list ("datasets" or "tokenizers"), {} if it has none."""
    entries = manifest.get(key)
    return next((e for e in entries if isinstance(e, dict) and e.get("name") == name), {}) if entries else {}


def plan(hub: Hub, variant: Variant, train_shards: int | None, out: Path) -> list[RemoteFile]:
    """The files of a variant, with their places under `out`.

    The manifest, where the repository has one, says which tokenizer belongs to the data set and how many shards there
    must be; sizes and checksums come from the repository's listing. Raises DataError naming what is missing and what
    there is instead.
    """
    manifests = [path for path in hub.files if re.fullmatch(r"(datasets/)?manifest\.json", path)]
    manifest = hub.read_json(max(manifests, key=len)) if manifests else {}
    named = manifest_entry(manifest, "datasets", variant.dataset)

    found: dict[str, RemoteFile] = {}
    folders = set()
    for path, file in hub.files.items():
        folder, _, name = path.rpartition("/")
        if SHARD_NAME.fullmatch(name) or SIDECAR_NAME.fullmatch(name):
            folders.add(folder.rpartition("/")[2])
            if folder.rpartition("/")[2] == variant.dataset:
                found[name] = file._replace(place=out / "datasets" / variant.dataset / name)
    listed = {e.get("name") for e in manifest.get("datasets") or [] if isinstance(e, dict)}
    if not found:
        where = f"is in the manifest of {hub.repo} but has no files" if named else f"is not in {hub.repo}"
        there = ", ".join(sorted(folders | {name for name in listed - {variant.dataset} if name})) or "none"
        raise DataError(f"data set {variant.dataset} {where}; data sets there: {there}")

    def series(name_of, expected: int | None, what: str) -> list[RemoteFile]:
        """Files 0, 1, 2, ... without gaps, `expected` of them where the manifest says so."""
        numbered = []
        while name_of(len(numbered)) in found:
            numbered.append(found[name_of(len(numbered))])
        if expected is not None and len(numbered) < expected:
            missing = name_of(len(numbered))
            raise DataError(
                f"{missing} of {variant.dataset} is missing in {hub.repo}: its manifest counts {expected} {what}"
            )
        return numbered

    stats = named.get("stats") if isinstance(named.get("stats"), dict) else {}
    count = lambda key: stats.get(key) if isinstance(stats.get(key), int) else None
    val = series(lambda i: shard_name("val", i), count("files_val"), "validation shards")
    train = series(lambda i: shard_name("train", i), None, "training shards")
    beyond = [n for n in found if (m := SHARD_NAME.fullmatch(n)) and m[1] == "val" and int(m[2]) >= len(val)]
    if not val or beyond:
        raise DataError(f"{shard_name('val', len(val))} of {variant.dataset} is missing in {hub.repo}")
    if train_shards is None:
        train_shards = max(len(train), count("files_train") or 0)
    if train_shards > len(train):
        raise DataError(
            f"{shard_name('train', len(train))} of {variant.dataset} is missing in {hub.repo}:"
            f" {train_shards} training shards wanted, {len(train)} there"
        )
    sidecars = []
    for i in range(len(val) if variant.sidecar else 0):
        if sidecar_name(i) not in found:
            raise DataError(f"{sidecar_name(i)} of {variant.dataset} is missing in {hub.repo}")
        sidecars.append(found[sidecar_name(i)])

    entry = manifest_entry(manifest, "tokenizers", named.get("tokenizer_name"))
    wanted = Path(str(entry.get("model_path") or entry.get("path") or variant.tokenizer)).name
    models = {path.rpartition("/")[2]: file for path, file in hub.files.items() if path.endswith(".model")}
    if wanted not in models:
        there = ", ".join(sorted(models)) or "none"
        raise DataError(f"tokenizer {wanted} is not in {hub.repo}; tokenizers there: {there}")
    tokenizer = models[wanted]._replace(place=out / "tokenizers" / wanted)
    return [tokenizer, *val, *sidecars, *train[:train_shards]]


# --- fetching -------------------------------------------------------------------------------------------------------
def checksum(path: Path, kind: str) -> str:
    """The file's SHA-256, or git's SHA-1 of it as a blob."""
    digest = hashlib.sha256() if kind == "sha256" else hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with open(path, "rb") as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def is_there(file: RemoteFile) -> bool:
    """Whether the file is at its place, whole and right."""
    place = file.place
    return place.is_file() and place.stat().st_size == file.size and checksum(place, file.kind) == file.checksum


class Stream:
    """A part file for huggingface_hub to append to: moves the progress bar, and stops when `stop` is set."""

    def __init__(self, file, bar, stop: threading.Event):
        self.file, self.bar, self.stop = file, bar, stop
        self.tell, self.seek = file.tell, file.seek

    def write(self, data: bytes) -> int:
        if self.stop.is_set():
            raise Interrupted
        self.bar.update(len(data))
        return self.file.write(data)

    def truncate(self) -> int:
        """Drop what follows the position: the server ignored the range it was asked for and starts over."""
        position = self.file.tell()
        self.bar.update(position - self.file.seek(0, io.SEEK_END))
        self.file.seek(position)
        return self.file.truncate()


class Share:
    """One file's share of the progress bar, so that a part that is dropped can be taken back."""

    def __init__(self, bar):
        self.bar, self.have = bar, 0

    def update(self, size: int) -> None:
        self.have += size
        self.bar.update(size)


def fetch(hub: Hub, file: RemoteFile, parts: Path, bar, stop: threading.Event) -> None:
    """Fetch one file to its place. Raises DataError.

    What has arrived stays in `parts` to be resumed by the next try or the next run, unless it is wrong.
    """
    part = parts / f"{file.checksum}.part"
    name = file.place.name
    share = Share(bar)

    def download() -> None:
        with open(part, "ab") as raw:
            have = raw.tell()
            if have > file.size:
                have = raw.truncate(0)
            share.update(have - share.have)
            if have < file.size:
                hub.get(file, Stream(raw, share, stop), have)
            raw.flush()
            os.fsync(raw.fileno())

    for last in (False, True):
        try:
            hub.again(name, download)
        except OSError as e:
            raise DataError(f"{part}: cannot be written ({e.strerror or e}); it is resumed next time") from e
        found = checksum(part, file.kind)
        if found == file.checksum:
            break
        part.unlink()
        if last:
            raise DataError(f"{name}: {file.kind} {found}, expected the hub's {file.checksum}, fetched twice")
    if name.endswith(".bin"):
        try:
            read_header(part)
        except DataError as e:
            part.unlink()
            raise DataError(f"{name} as published: {str(e).partition(': ')[2]}") from None
    file.place.parent.mkdir(parents=True, exist_ok=True)
    os.replace(part, file.place)
    sync_folder(file.place.parent)


def fetch_all(hub: Hub, files: list[RemoteFile], out: Path, jobs: int) -> None:
    """Fetch the files, `jobs` at a time; the first failure stops the others. Raises DataError or OSError."""
    from tqdm import tqdm

    parts = out / ".download"
    parts.mkdir(parents=True, exist_ok=True)
    stop = threading.Event()
    total = sum(file.size for file in files)
    with tqdm(total=total, unit="B", unit_scale=True, desc="downloading", disable=None) as bar:
        with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
            futures = [pool.submit(fetch, hub, file, parts, bar, stop) for file in files]
            try:
                for future in concurrent.futures.as_completed(futures):
                    future.result()
            except BaseException:
                stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
                raise
    if not any(parts.iterdir()):
        parts.rmdir()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", choices=VARIANTS, required=True, help="which published data")
    parser.add_argument("--train-shards", type=int, metavar="N", help="training shards of 10^8 tokens (default: all)")
    parser.add_argument("--out", type=Path, default=Path("data"), help="default: ./data")
    parser.add_argument("--dry-run", action="store_true", help="list files and sizes, fetch nothing")
    parser.add_argument("--jobs", type=int, default=4, help="files at a time (4)")
    parser.add_argument("--tries", type=int, default=5, help="per file and request (5)")
    parser.add_argument("--retry-wait", type=float, default=2, help="seconds before the second try; doubles (2)")
    args = parser.parse_args()
    for name, least in (("train_shards", 0), ("jobs", 1), ("tries", 1), ("retry_wait", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise DataError(f"--{name.replace('_', '-')} {value}: expected at least {least}")

    variant = VARIANTS[args.variant]
    hub = Hub(variant.repo, args.tries, args.retry_wait)
    files = plan(hub, variant, args.train_shards, args.out)
    wanted = [file for file in files if not is_there(file)]
    if args.dry_run:
        for file in files:
            note = "" if file in wanted else "  (there already)"
            print(f"{file.size:>14,}  {file.place}{note}")
    need = sum(file.size for file in wanted)
    parts = args.out / ".download"
    resumed = sum(min(p.stat().st_size, f.size) for f in wanted if (p := parts / f"{f.checksum}.part").exists())
    free = shutil.disk_usage(next(p for p in (args.out, *args.out.resolve().parents) if p.exists())).free
    summary = f"{len(files)} files, {len(wanted)} to fetch: {need / 1e9:.2f} GB, {free / 1e9:.2f} GB free"
    if args.dry_run:
        print(f"{variant.repo} at {hub.commit}: {summary}")
        return 0
    if need - resumed + SPARE_BYTES > free:
        raise DataError(
            f"{args.out}: {(need - resumed) / 1e9:.2f} GB to fetch, {free / 1e9:.2f} GB free:"
            " make room, or ask for fewer --train-shards"
        )
    print(f"{variant.repo}: {summary}", file=sys.stderr)
    if wanted:
        fetch_all(hub, wanted, args.out, args.jobs)
    for file in files:
        if SIDECAR_NAME.fullmatch(file.place.name):
            shard = file.place.with_name(file.place.name.replace("_bytes", ""))
            entries, expected = read_header(file.place), read_header(shard)
            if entries != expected:
                raise DataError(f"{file.place}: {entries} entries, expected {expected}, one per token of {shard.name}")
    tokens = sum(file.size - HEADER_BYTES for file in files if SHARD_NAME.fullmatch(file.place.name)) // 2
    print(f"{args.out / 'datasets' / variant.dataset}: {len(files)} files, {tokens:,} tokens, checksums right")
    return 0


if __name__ == "__main__":
    run(main)
