"""The measurements of this record that are no command of their own. Run from the repository's root:

    python records/2026-11-21_data_caseops/measure.py text DATA OUT.jsonl SHARD...   shards (.bin.xz) back to JSON lines
    python records/2026-11-21_data_caseops/measure.py caseops DOCS...                CaseOps statistics and speed
    python records/2026-11-21_data_caseops/measure.py memory -- COMMAND...           peak memory, CPU time
    python records/2026-11-21_data_caseops/measure.py bytes DOCS DIR                 sidecar sums against the raw text

DATA is a folder with tokenizers/ and fineweb_*.bin.xz, DOCS JSON lines, DIR a folder that tokenize_docs.py made.
"""

import json
import lzma
import re
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "data"))

import numpy as np
from caseops import ALLCAPS, CAPNEXT, ESC, TITLE, decode, encode, without_markers
from shards import BOS_ID, HEADER_BYTES, documents, read_shard
from tokenize_docs import batches, parse


def back_to_text(data: Path, out: Path, names: list[str]) -> None:
    import sentencepiece as spm

    sp = spm.SentencePieceProcessor(model_file=str(data / "tokenizers/fineweb_8192_bpe.model"))
    tokens = np.concatenate([np.frombuffer(lzma.open(data / n).read()[HEADER_BYTES:], "<u2") for n in names])
    starts = np.flatnonzero(tokens == BOS_ID)
    count = size = 0
    with open(out, "w") as f:
        for start, end in zip(starts, [*starts[1:], len(tokens)]):
            text = sp.decode(tokens[start:end].tolist())
            f.write(json.dumps(text, ensure_ascii=False) + "\n")
            count, size = count + 1, size + len(text.encode())
    print(f"{out.name}: {count:,} documents, {size:,} bytes, from {' '.join(names)}")


def caseops_statistics(paths: list[Path]) -> None:
    seconds = {"encode": 0.0, "decode": 0.0}
    counts = dict.fromkeys(("documents", "bytes", "words", TITLE, ALLCAPS, CAPNEXT, ESC), 0)
    words = re.compile("[A-Za-z]+")
    for batch in batches(paths):
        texts = [text for text, _ in parse(batch)]
        start = time.process_time()
        encoded = [encode(text) for text in texts]
        middle = time.process_time()
        decoded = [decode(text) for text in encoded]
        end = time.process_time()
        assert decoded == texts, "round trip"
        seconds["encode"] += middle - start
        seconds["decode"] += end - middle
        counts["documents"] += len(texts)
        for text, marked in zip(texts, encoded):
            size = len(text.encode())
            assert len(without_markers(marked).encode()) == size
            counts["bytes"] += size
            counts["words"] += sum(1 for _ in words.finditer(text))
            for marker in (TITLE, ALLCAPS, CAPNEXT, ESC):
                counts[marker] += marked.count(marker)
    size = counts["bytes"]
    print(f"documents {counts['documents']:,}, bytes {size:,}, words {counts['words']:,}; every document round-tripped")
    for name, marker in (("TITLE", TITLE), ("ALLCAPS", ALLCAPS), ("CAPNEXT", CAPNEXT), ("ESC", ESC)):
        n = counts[marker]
        print(f"{name:8} {n:>10,}  {n / counts['words']:8.4%} of words  {1000 * n / size:7.3f} per 1000 bytes")
    for name, value in seconds.items():
        print(f"{name} {size / value / 1e6:.1f} MB/s (CPU time, one core, Python {sys.version.split()[0]})")


def peak_memory(command: list[str]) -> None:
    """Peak of the summed private-and-shared-once memory (Pss) of a command and its children, sampled; and VmHWM."""
    process = subprocess.Popen(command)
    peak = largest = 0

    def tree(pid: int) -> list[int]:
        children = Path(f"/proc/{pid}/task/{pid}/children")
        return [pid] + [d for c in children.read_text().split() for d in tree(int(c))]

    def sample():
        nonlocal peak, largest
        while process.poll() is None:
            total = 0
            try:
                for pid in tree(process.pid):
                    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
                    total += int(re.search(r"^Pss:\s+(\d+)", text, re.M)[1])
                status = Path(f"/proc/{process.pid}/status").read_text()
                largest = max(largest, int(re.search(r"VmHWM:\s+(\d+)", status)[1]))
            except (OSError, TypeError):
                pass
            peak = max(peak, total)
            time.sleep(0.05)

    thread = threading.Thread(target=sample)
    thread.start()
    code = process.wait()
    thread.join()
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"{usage.ru_utime + usage.ru_stime:.1f} s of CPU time")
    print(f"exit {code}; peak of all processes {peak / 1024:.0f} MiB (Pss), main {largest / 1024:.0f} MiB (VmHWM)")


def sidecar_sums(docs: Path, folder: Path) -> None:
    tokens = read_shard(folder / "fineweb_val_000000.bin")
    counts = read_shard(folder / "fineweb_val_bytes_000000.bin")
    raw = [len(text.encode()) for batch in batches([docs]) for text, _ in parse(batch)]
    at, differing, examples = 0, 0, []
    for i, document in enumerate(documents(tokens)):
        size = int(counts[at : at + len(document)].sum())
        if size != raw[i]:
            differing += 1
            examples.append((i, raw[i], size))
        at += len(document)
    print(f"{i + 1} documents, {differing} whose sidecar sum is not the raw text's length")
    print(f"raw {sum(raw[: i + 1]):,}, sidecar {int(counts.sum()):,}; (document, raw, sidecar): {examples[:6]}")


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    if what == "text":
        back_to_text(Path(rest[0]), Path(rest[1]), rest[2:])
    elif what == "caseops":
        caseops_statistics([Path(p) for p in rest])
    elif what == "memory":
        peak_memory(rest[1:])
    elif what == "bytes":
        sidecar_sums(Path(rest[0]), Path(rest[1]))
    else:
        sys.exit(f"{what}: expected text, caseops, memory or bytes")
