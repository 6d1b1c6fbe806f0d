"""Kill rank 1 of a two-rank run when a line with `pattern` appears; report how the rest ends."""
import os, re, signal, subprocess, sys, time, threading
pattern, name = sys.argv[1], sys.argv[2]
env = {**os.environ, "ARTIFACT_DIR": f"/opt/run/{name}", "RUN_ID": name}
p = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train_gpt.py"], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
def ranks():
    out = {}
    for d in os.listdir("/proc"):
        if d.isdigit():
            try:
                e = open(f"/proc/{d}/environ", "rb").read().split(b"\0"); c = open(f"/proc/{d}/cmdline").read()
            except OSError: continue
            if f"RUN_ID={name}".encode() in e and "train_gpt.py" in c and "distributed.run" not in c and "compile_worker" not in c:
                for x in e:
                    if x.startswith(b"RANK="): out.setdefault(int(x[5:]), []).append(int(d))
    return out
killed, lines = None, []
limit = threading.Timer(200, lambda: subprocess.run(["pkill", "-9", "-f", "train_gpt.py"])); limit.start()
for line in p.stdout:
    if "progress" not in line: lines.append((time.time(), line.rstrip()))
    if killed is None and re.search(pattern, line):
        time.sleep(0.2); r = ranks(); pid = min(r[1]); os.kill(pid, signal.SIGKILL); killed = time.time()
        print(f"{name}: at {line.strip()[:100]!r} killed rank 1 (pid {pid} of {r})", flush=True)
code = p.wait(); limit.cancel()
print(f"{name}: launcher ended with {code}, {time.time() - (killed or 0):.1f} s after the kill; said since then:")
for at, text in lines:
    if killed and at >= killed: print(f"  {at - killed:5.1f} s  {text[:160]}")
