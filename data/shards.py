"""Token shards and byte sidecars: the one place in data/ that knows the file format.

A shard is 256 little-endian int32 (20240520, 1, number of entries, zeros), then that many little-endian uint16.
`fineweb_{train,val}_NNNNNN.bin` hold token ids, BOS = 1 beginning every document; `fineweb_val_bytes_NNNNNN.bin`
(the sidecar) has the same header and one byte count per token of the validation shard with the same number.
The format is that of llm.c and modded-nanogpt (magic 20240520), which the challenge uses.

Everything is written to a temporary file beside its place, flushed to disk, then renamed: a reader sees the old
file or the whole new one, never a part, and a failed run leaves what was there.
"""

import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

MAGIC = 20240520
VERSION = 1
HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS
BOS_ID = 1
MAX_ENTRIES = 2**31 - 1  # the count is an int32

# "fineweb_val_*.bin" would also match the sidecar, so names are matched by pattern, never by a bare glob.
SHARD_NAME = re.compile(r"fineweb_(train|val)_(\d{6,})\.bin")
SIDECAR_NAME = re.compile(r"fineweb_val_bytes_(\d{6,})\.bin")


class DataError(Exception):
    """Something the user can act on; its message is one line that names the thing and what was expected."""


def shard_name(split: str, index: int) -> str:
    """`fineweb_train_000003.bin` for ("train", 3)."""
    return f"fineweb_{split}_{index:06d}.bin"


def sidecar_name(index: int) -> str:
    """`fineweb_val_bytes_000000.bin` for 0: the byte counts of validation shard 0."""
    return f"fineweb_val_bytes_{index:06d}.bin"


def list_shards(folder: Path, split: str) -> list[Path]:
    """The folder's shards of one split ("train" or "val"; "val_bytes" for sidecars), by number."""
    found = []
    for path in Path(folder).iterdir():
        if split == "val_bytes":
            match = SIDECAR_NAME.fullmatch(path.name)
            if match:
                found.append((int(match[1]), path))
        else:
            match = SHARD_NAME.fullmatch(path.name)
            if match and match[1] == split:
                found.append((int(match[2]), path))
    return [path for _, path in sorted(found)]


def header(entries: int) -> bytes:
    """The 1,024 header bytes of a shard with this many uint16 entries. Raises DataError above 2^31 − 1."""
    if not 0 <= entries <= MAX_ENTRIES:
        raise DataError(f"shard of {entries} entries: the header counts them in an int32, at most {MAX_ENTRIES}")
    ints = np.zeros(HEADER_INTS, dtype="<i4")
    ints[:3] = MAGIC, VERSION, entries
    return ints.tobytes()


def read_header(path: Path) -> int:
    """Number of entries of a shard, after checking magic, version and that the size is 1024 + 2·n bytes.

    Raises DataError naming the file and what was expected.
    """
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as f:
            raw = f.read(HEADER_BYTES)
    except OSError as e:
        raise DataError(f"{path}: cannot be read ({e.strerror or e})") from e
    if len(raw) < HEADER_BYTES:
        raise DataError(f"{path}: {size} bytes, expected at least the {HEADER_BYTES} of a shard's header")
    ints = np.frombuffer(raw, dtype="<i4")
    magic, version, entries = (int(x) for x in ints[:3])
    if magic != MAGIC:
        raise DataError(f"{path}: magic {magic}, expected {MAGIC}: not a token shard")
    if version != VERSION:
        raise DataError(f"{path}: shard version {version}, expected {VERSION}")
    if entries < 0 or size != HEADER_BYTES + 2 * entries:
        raise DataError(
            f"{path}: {size} bytes, expected {HEADER_BYTES} + 2 x {entries} = {HEADER_BYTES + 2 * entries}"
            " (truncated, or written by something else)"
        )
    return entries


def read_shard(path: Path) -> np.ndarray:
    """A shard's entries as a read-only uint16 memory map (nothing is loaded until touched); checks as read_header."""
    entries = read_header(path)
    if entries == 0:  # an empty file region cannot be mapped
        return np.zeros(0, dtype="<u2")
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(entries,))


def documents(tokens: np.ndarray) -> Iterator[np.ndarray]:
    """The documents of a token array, each a slice that begins with its BOS.

    Raises DataError if the array does not begin with BOS: what comes before the first one belongs to no document.
    """
    if len(tokens) == 0:
        return
    starts = np.flatnonzero(tokens == BOS_ID)
    if len(starts) == 0 or starts[0] != 0:
        raise DataError(f"tokens begin with id {int(tokens[0])}, expected every document to begin with BOS = {BOS_ID}")
    for start, end in zip(starts, [*starts[1:], len(tokens)]):
        yield tokens[start:end]


class AtomicFile:
    """A file that appears under its name only when complete: `with AtomicFile(path) as f: f.write(...)`.

    Writes to a hidden temporary file in the same folder, flushes it to disk and renames it; on an exception the
    temporary file goes and what stood under the name stays.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self.temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")

    def __enter__(self):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(self.temporary, "wb")
        return self.file

    def __exit__(self, kind, error, trace):
        complete = False
        try:
            if kind is None:
                self.file.flush()
                os.fsync(self.file.fileno())
                complete = True
        finally:
            try:
                self.file.close()  # on a full disk this fails once more
            finally:
                if not complete:
                    self.temporary.unlink(missing_ok=True)
        if complete:
            os.replace(self.temporary, self.path)
            sync_folder(self.path.parent)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries, so that a rename survives a power cut (skipped where folders cannot be opened)."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def as_entries(values) -> np.ndarray:
    """Token ids or byte counts as little-endian uint16. Raises DataError for anything outside 0..65535."""
    array = np.asarray(values)
    if array.size and (int(array.min()) < 0 or int(array.max()) > 65535):
        raise DataError(f"values from {int(array.min())} to {int(array.max())} do not fit a shard's uint16")
    return array.astype("<u2", copy=False)


def write_shard(path: Path, values) -> None:
    """Write a whole shard (token ids, or byte counts for a sidecar) atomically."""
    entries = as_entries(values)
    with AtomicFile(path) as f:
        f.write(header(len(entries)))
        f.write(entries.tobytes())


def sha256_file(path: Path) -> str:
    """A file's SHA-256, in hexadecimal, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def write_json(path: Path, content) -> None:
    """Write JSON atomically: indented, keys in the order given, a newline at the end."""
    with AtomicFile(path) as f:
        f.write((json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def run(main: Callable[[], int | None]) -> None:
    """Run a script's main: DataError and OSError become one line on stderr and exit code 2, Ctrl-C 130."""
    try:
        code = main() or 0
        sys.stdout.flush()
    except DataError as e:
        fail(str(e))
    except BrokenPipeError:  # `| head` closed the pipe: not an error of ours
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except OSError as e:
        fail(f"{e.filename or 'input/output'}: {e.strerror or e}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(code)


def fail(message: str) -> None:
    """Print one line to stderr and exit with code 2."""
    print("error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(2)
