"""Kill rank 1 of a two-rank run when a line with a pattern appears, and report how the rest ends: kill.py PATTERN NAME.

Settings come from the environment; the run's folder is /opt/run/NAME.
"""
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

pattern, name = sys.argv[1:]
command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train_gpt.py"]
process = subprocess.Popen(command, env={**os.environ, "ARTIFACT_DIR": f"/opt/run/{name}", "RUN_ID": name}, stdout=subprocess.PIPE,
                           stderr=subprocess.STDOUT, text=True)


def ranks() -> dict[int, list[int]]:
    """Rank -> processes of this run."""
    out = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            settings, line = (folder / "environ").read_bytes().split(b"\0"), (folder / "cmdline").read_text()
        except OSError:
            continue
        if f"RUN_ID={name}".encode() in settings and "train_gpt.py" in line and not re.search("distributed.run|compile_worker", line):
            for s in settings:
                if s.startswith(b"RANK="):
                    out.setdefault(int(s[5:]), []).append(int(folder.name))
    return out


killed, lines = None, []
limit = threading.Timer(200, lambda: subprocess.run(["pkill", "-9", "-f", "train_gpt.py"]))
limit.start()
for text in process.stdout:
    if "progress" not in text:
        lines.append((time.time(), text.rstrip()))
    if killed is None and re.search(pattern, text):
        time.sleep(0.2)
        found = ranks()
        os.kill(min(found[1]), signal.SIGKILL)
        killed = time.time()
        print(f"{name}: at {text.strip()[:100]!r} killed rank 1 (pid {min(found[1])} of {found})", flush=True)
code = process.wait()
limit.cancel()
print(f"{name}: launcher ended with {code}, {time.time() - (killed or 0):.1f} s after the kill; said since then:")
for at, text in lines:
    if killed and at >= killed:
        print(f"  {at - killed:5.1f} s  {text[:160]}")
