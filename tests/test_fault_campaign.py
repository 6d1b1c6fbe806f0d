"""The fault campaign: its quick faults in full, one real kill, and that it would notice what it looks for."""

import json
import random
import subprocess
import sys

import fault_campaign as fc
import pytest
import test_coder
import torch
import toy

import train_gpt as tg

TOOL = toy.SCRIPT.parent / "tools" / "fault_campaign.py"
CLEAR = "error: artifact x is damaged: it has 3 bytes\n"


@pytest.fixture(scope="module")
def lab():
    """A lab whose undisturbed run is made by hand: an artifact and a checkpoint."""
    lab = fc.Lab(seed=1, tries=1, many=200)
    out = lab.folder()
    config = tg.load_config(lab.settings(out))[0]
    out.mkdir()
    artifact = tg.write_artifact(test_coder.codes(), config)
    (out / fc.ARTIFACT).write_bytes(artifact)
    tg.save_tensors(out / fc.CHECKPOINT, {"weights.a": torch.arange(500.0), "ema.a": torch.ones(7)}, {"model": tg.model_knobs(config), "step": 3})
    lab.reference = fc.Reference(out, artifact, {"diagnostic quantized": ("1.5", "0.5")}, {})
    yield lab
    lab.close()


def tally_of(lab, name):
    tally = fc.Tally(name)
    fc.FAULTS[name](lab, tally)
    return tally


# ---------------------------------------------------------------------------------------------------------- quick faults


@pytest.mark.parametrize("name", ["corrupt_artifact", "corrupt_checkpoint"])
def test_200_damages_are_all_refused_in_one_line(lab, name):
    tally = tally_of(lab, name)
    assert (tally.tries, tally.refused, tally.broken) == (200, 200, [])


def test_200_random_settings_pass_or_get_one_line(lab):
    tally = tally_of(lab, "settings")
    assert tally.tries == 200 and not tally.broken
    assert min(tally.refused, tally.same) >= 40         # both kinds are tried


# ------------------------------------------------------------------------------------------------- it notices what it should


@pytest.mark.parametrize("reader, words", [
    (lambda path, config: {}, "accepted"), (lambda path, config: path.read_bytes()[1 << 40], "crashed: IndexError"),
    (lambda path, config: subprocess.run(["true"]), "it ran something: ['subprocess.Popen'"),
    (lambda path, config: (_ for _ in ()).throw(tg.UserError(f"{path}\nis damaged")), "is damaged")])
def test_a_careless_reader_is_found_out(lab, monkeypatch, reader, words):
    good = lab.reference.artifact
    monkeypatch.setattr(tg, "read_artifact", lambda path, config: None if path.read_bytes() == good else reader(path, config))
    monkeypatch.setattr(lab, "many", 20)
    tally = tally_of(lab, "corrupt_artifact")
    assert len(tally.broken) == 20 and all(words in line for line in tally.broken)


def test_careless_settings_are_found_out(lab, monkeypatch):
    monkeypatch.setattr(lab, "many", 50)
    parse = tg.parse_knob
    monkeypatch.setattr(tg, "parse_knob", lambda f, text: int(text) if f.type == "int" else parse(f, text))
    tally = tally_of(lab, "settings")
    assert tally.broken and any("crashed: ValueError" in line for line in tally.broken)


@pytest.mark.parametrize("code, out, err, refused", [
    (2, "log\n", CLEAR, True), (1, "", CLEAR, False), (0, "", "", False), (-9, "", "", False), (-11, "", CLEAR, False), (2, "", "", False),
    (2, "", CLEAR * 2, False), (2, "", "Traceback (most recent call last):\n" + CLEAR, False), (2, "", "error: \n", False),
    (2, "Traceback (most recent call last):\n", CLEAR, False), (fc.CRASHED, "", "ValueError: x\n", False)])
def test_what_counts_as_a_clear_refusal(code, out, err, refused):
    assert fc.Outcome(code, out, err).refused is refused


def test_damaged_and_foreign_files_are_seen(lab):
    assert lab.damage(lab.copy()) == ""
    for name, content, words in ((fc.ARTIFACT, lab.reference.artifact[:-1], "cut off"), (fc.CHECKPOINT, b"", "damaged"),
                                 (fc.SCRIPT, b"def", "invalid syntax"), ("core", b"", "unexpected file core")):
        out = lab.copy()
        (out / name).write_bytes(content)
        assert words in lab.damage(out)
    out = lab.copy()
    (out / f".{fc.ARTIFACT}.12.tmp").write_bytes(b"half")           # a killed process may leave it, a finished one not
    assert lab.damage(out) == ""
    done = fc.Outcome(0, "diagnostic quantized val_loss:1.5 val_bpb:0.5 eval_time:1ms\n", "")
    assert "left over" in lab.difference(done, out)


def test_other_results_are_seen(lab):
    out = lab.copy()
    line = "diagnostic quantized val_loss:1.5 val_bpb:0.5 eval_time:1ms\n"
    assert lab.difference(fc.Outcome(0, line, ""), out) == ""
    assert "other scores" in lab.difference(fc.Outcome(0, line.replace("0.5", "0.6"), ""), out)
    assert "other scores" in lab.difference(fc.Outcome(0, "", ""), out)
    assert "exit code 3" in lab.difference(fc.Outcome(3, line, ""), out)
    (out / fc.ARTIFACT).write_bytes(b"x")
    assert lab.difference(fc.Outcome(0, line, ""), out) == "another artifact"


def test_damages_differ_from_the_file_and_repeat_with_the_seed():
    data = random.Random(0).randbytes(3000)
    made = [fc.corrupt(data, rng) for rng in [random.Random(5)] for _ in range(400)]
    assert all(damaged != data for _, damaged in made)
    assert {how.rsplit(" at ", 1)[0] for how, _ in made} == set(fc.DAMAGES)
    assert made[:50] == [fc.corrupt(data, rng) for rng in [random.Random(5)] for _ in range(50)]


# --------------------------------------------------------------------------------------------------------- whole processes


def campaign(*options, sabotage=""):
    code = f"import sys; sys.path.insert(0, {str(TOOL.parent)!r}); import fault_campaign as fc; {sabotage}\nsys.exit(fc.main())"
    return subprocess.run([sys.executable, "-c", code, *map(str, options)], capture_output=True, text=True, timeout=600)


def test_a_killed_run_and_its_restart(tmp_path):
    done = campaign("--only", "kill_ttt", "--tries", 1, "--json", tmp_path / "x.json", sabotage="fc.shipped_script = lambda: b'pass'")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "x.json").read_text())
    assert [(f["fault"], f["tries"], f["same"], f["broken"]) for f in report["faults"]] == [("kill_ttt", 1, 1, [])]
    assert done.stdout.splitlines()[-1] == "1 tries, 0 broken"


@pytest.mark.parametrize("options", [("--only", "earthquake"), ("--tries", "0"), ("--seed", "x")])
def test_wrong_options(options, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fault_campaign.py", *options])
    with pytest.raises(SystemExit) as e:
        fc.main()
    assert e.value.code == 2 and "error: " in capsys.readouterr().err


@pytest.mark.slow
def test_every_fault_once():
    done = campaign("--tries", 1, "--many", 20)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_writing_in_place_is_found_out():
    """A program that writes its files in place, slowly, loses them when it is killed."""
    sabotage = """
def in_place(path, data):
    import time
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as f:
        for part in (data[:len(data) // 2], data[len(data) // 2:]):
            f.write(part)
            f.flush()
            time.sleep(0.05)
fc.t.write_atomically = in_place"""
    done = campaign("--tries", 4, "--only", "kill_files", sabotage=sabotage)
    assert done.returncode == 1 and "damaged" in done.stdout, done.stdout + done.stderr
