"""The source itself: index, sections, size of functions, recipes, dead settings."""

import ast
import re
import subprocess
import sys

import pytest
import toy

import train_gpt as tg

SOURCE = toy.SCRIPT.read_text()
TREE = ast.parse(SOURCE)
ROOT = toy.SCRIPT.parent
FUNCTIONS = [n for n in ast.walk(TREE) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
LONGEST_FUNCTION = 60


def test_the_index_equals_the_banners():
    rule = "# " + "=" * 118
    lines = SOURCE.splitlines()
    banners = [m[1] for a, b, c in zip(lines, lines[1:], lines[2:]) if a == c == rule and (m := re.match(r"# ([A-Z]+): ", b))]
    assert banners and banners == ast.get_docstring(TREE).splitlines()[-1].split(" · ")
    assert lines.count(rule) == 2 * len(banners)


def test_no_function_is_longer_than_a_screen():
    long = {f.name: f.end_lineno - f.lineno + 1 for f in FUNCTIONS if f.end_lineno - f.lineno + 1 > LONGEST_FUNCTION}
    assert not long


def test_public_functions_and_classes_say_what_they_do():
    """Every top-level function or class of more than 12 lines has a docstring."""
    silent = [n.name for n in TREE.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.end_lineno - n.lineno >= 12
              and not ast.get_docstring(n) and n.name != "main" and not n.name.startswith("_")]
    assert not silent


def test_every_knob_is_used_outside_the_table():
    """As an attribute, or by name through getattr (a string, or an f-string: its constant parts must fit)."""
    table = next(n for n in TREE.body if isinstance(n, ast.ClassDef) and n.name == "Config")
    end_of_rows = max(n.end_lineno for n in table.body if isinstance(n, ast.AnnAssign))
    used = {n.attr for n in ast.walk(TREE) if isinstance(n, ast.Attribute) and n.lineno > end_of_rows}
    used |= {n.value for n in ast.walk(TREE) if isinstance(n, ast.Constant) and isinstance(n.value, str) and n.lineno > end_of_rows}
    computed = [n.args[1] for n in ast.walk(TREE) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id == "getattr"
                and isinstance(n.args[1], ast.JoinedStr)]
    patterns = ["".join(re.escape(part.value) if isinstance(part, ast.Constant) else "[a-z]+" for part in f.values) for f in computed]
    used |= {f.name for f in tg.fields(tg.Config) if any(re.fullmatch(p, f.name) for p in patterns)}
    # no matrix of this network is neither attention nor MLP; the founding documents set its sigma all the same
    used.add("matrix_clip_sigmas")
    dead = [f.name for f in tg.fields(tg.Config) if f.name not in used]
    assert not dead


def test_the_environment_is_read_in_few_places():
    """Settings come from the table: only the launcher's variables are read elsewhere."""
    reads = re.findall(r"environ(?:\.get\(|\[)\s*\"([A-Z_]+)\"", SOURCE) + re.findall(r"\benv\.get\(\"?([A-Z_]+)", SOURCE)
    assert set(reads) <= {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}


def test_no_bare_except_and_no_swallowed_finally():
    for n in ast.walk(TREE):
        if isinstance(n, ast.ExceptHandler):
            assert n.type is not None, n.lineno
        if isinstance(n, ast.Try) and n.finalbody:
            assert not all(isinstance(b, ast.Pass) for b in n.finalbody), n.lineno


def test_ruff_is_content():
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "."], cwd=ROOT, capture_output=True, text=True)
    if "No module named ruff" in done.stderr:
        pytest.skip("ruff is not installed")
    assert done.returncode == 0, done.stdout[-3000:]


# --------------------------------------------------------------------------------------------------------------- recipes

RECIPES = sorted((ROOT / "recipes").glob("*.env"))


def assignments(path):
    out = {}
    for line in path.read_text().splitlines():
        line = line.split("#")[0].strip()
        if line:
            name, _, value = line.partition("=")
            assert re.fullmatch(r"[A-Z0-9_]+", name), line
            assert name not in out, f"{name} twice"
            out[name] = value.strip("\"'")
    return out


def test_there_are_recipes():
    assert "demo" in {p.stem for p in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipes_resolve(path):
    """Known names only, no warnings, and values that the table takes."""
    settings = assignments(path)
    known = {f.name.upper(): f for f in tg.fields(tg.Config)}
    assert set(settings) <= set(known) | set(tg.ALIASES)
    _, warnings = tg.load_config({**settings, "CONFIG_CHECK": "1"})
    assert not warnings
    first = path.read_text().splitlines()[0]
    assert first.startswith("#"), "a recipe begins with a comment naming its source"


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipes_resolve_through_a_shell(path):
    """As users do it: set -a; . recipes/x.env; CONFIG_CHECK=1."""
    command = f"set -a; . ./recipes/{path.name}; set +a; CONFIG_CHECK=1 exec {sys.executable} train_gpt.py"
    done = subprocess.run(["sh", "-c", command], cwd=ROOT, capture_output=True, text=True, env=toy.clean_environment(), timeout=120)
    assert done.returncode == 0, done.stderr
    table = dict(line[2:].split(": ", 1) for line in done.stdout.splitlines())
    for name, text in assignments(path).items():
        f = next(f for f in tg.fields(tg.Config) if f.name.upper() == tg.ALIASES.get(name, name))
        assert table[f.name] == str(tg.parse_knob(f, text))


def expect(recipe, command, **values):
    path = ROOT / "recipes" / f"{recipe}.env"
    if not path.is_file():
        pytest.skip(f"{path} does not exist yet")
    c, _ = tg.load_config({**assignments(path), **command, "CONFIG_CHECK": "1"})
    assert {n: getattr(c, n) for n in values} == values


def test_founding_document_a():
    """PR 1962: hand-set sigmas, XSA on all layers, two lanes from 8, sparse gates, Polar Express."""
    expect("pr1962", dict(SEED="42", CASEOPS_ENABLED="1"), seed=42, caseops_enabled=True, num_layers=11, loop_start=3, loop_end=5,
           parallel_start_layer=8, parallel_residual_start=-1, smear_gate_enabled=True, sparse_attn_gate_enabled=True,
           polar_express=True, min_lr=0.1, muon_momentum=0.97, beta2=0.99, ema_decay=0.9965, matrix_bits=6, embed_bits=7,
           mlp_clip_sigmas=11.5, attn_clip_sigmas=13.0, embed_clip_sigmas=14.0, gptq_calibration_batches=16,
           adaptive_hessian_clip=True, ttt_enabled=True, ttt_lora_rank=56, compressor="pergroup")


def test_founding_document_b():
    """PR 1412's command over its recipe."""
    expect("pr1412", dict(HESSIAN_CLIP_LAMBDA="0.175", LOOP_PHASE2_AT="0.65", PARALLEL_RESIDUAL_START="7", SEED="1337"),
           hessian_clip_lambda=0.175, loop_phase2_at=0.65, parallel_residual_start=7, parallel_start_layer=0, seed=1337,
           loop_start=4, loop_end=5, enable_looping_at=0.5, qk_gain_init=4.0, warmdown_frac=0.667, min_lr=0.0, polar_express=False,
           muon_momentum=0.99, muon_wd=0.085, matrix_lr=0.02, beta2=0.95, ema_decay=0.997, embed_bits=8, embed_clip_sigmas=20.0,
           attn_clip_sigmas=12.85, mlp_clip_sigmas=12.85, smear_gate_enabled=False, sparse_attn_gate_enabled=False,
           fused_ce_enabled=False, gptq_calibration_batches=64, compressor="brotli", sliding_window_enabled=True, ttt_enabled=False,
           val_loss_every=4000, lqer_enabled=False, gated_attn_quant_gate=False)
