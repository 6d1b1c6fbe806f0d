"""CONFIG: the table, its limits, contradictions, typo warnings, and the derived quantities."""

import dataclasses
import random

import pytest
import toy
from hypothesis import given
from hypothesis import strategies as st

import train_gpt as tg

FIELDS = {f.name.upper(): f for f in dataclasses.fields(tg.Config)}


def refused(settings: dict, *words):
    """The settings are refused with one line that holds all words; returns it."""
    with pytest.raises(tg.UserError) as e:
        tg.load_config({k: str(v) for k, v in settings.items()})
    line = str(e.value)
    assert e.value.code == 2 and "\n" not in line
    for word in words:
        assert str(word) in line, line
    return line


def test_defaults_resolve_without_warnings():
    c, warnings = tg.load_config({})
    assert not warnings
    assert (c.num_layers, c.model_dim, c.train_batch_tokens, c.mlp_dim, c.head_dim) == (11, 512, 786432, 2048, 128)
    assert c.data_path == "./data/datasets/fineweb10B_sp8192" and c.tokenizer_path.endswith("fineweb_8192_bpe.model")
    assert len(c.run_id) == 36 and tg.load_config({})[0].run_id != c.run_id


def test_caseops_changes_the_default_paths():
    c, _ = tg.load_config({"CASEOPS_ENABLED": "1"})
    assert "caps" in c.data_path and "caps" in c.tokenizer_path
    c, _ = tg.load_config({"CASEOPS_ENABLED": "1", "DATA_PATH": "/d", "TOKENIZER_PATH": "/t"})
    assert (c.data_path, c.tokenizer_path) == ("/d", "/t")


@pytest.mark.parametrize("name", sorted(FIELDS))
def test_every_knob_refuses_what_its_limits_exclude(name):
    """One value of the wrong kind and one past each limit; the line names variable, value and what is allowed."""
    f = FIELDS[name]
    m = f.metadata
    wrong = {"int": ["x", "1.5", ""], "float": ["x", "nan", "inf", "-inf", ""], "bool": ["2", "yes", ""], "str": []}[f.type]
    if "choices" in m:
        wrong.append("no such choice")
    step = 1 if f.type == "int" else 1e-3
    if "at_least" in m:
        wrong.append(str(m["at_least"] - step))
    if "above" in m:
        wrong += [str(m["above"]), str(m["above"] - step)]
    if "at_most" in m:
        wrong.append(str(m["at_most"] + step))
    if "below" in m:
        wrong += [str(m["below"]), str(m["below"] + step)]
    for text in wrong:
        line = refused({name: text}, name, repr(text), tg.allowed_values(f))
        assert "expected" in line


@pytest.mark.parametrize("name", ["BETA1", "BETA2", "TTT_BETA1", "TTT_BETA2"])
def test_betas_that_adamw_would_refuse_are_refused_here(name):
    refused({name: 1}, f"{name}='1'", ">= 0 and < 1")
    tg.load_config({name: "0.9999"})


def test_text_that_is_not_utf8_is_refused():
    """os.environ holds such bytes as surrogates, which no log or console can print."""
    refused({"DATA_PATH": b"/data/\xff".decode(errors="surrogateescape")}, "DATA_PATH='/data/\\udcff'", "UTF-8 text")


@pytest.mark.parametrize("name", sorted(n for n, f in FIELDS.items() if f.type == "bool"))
def test_bools(name):
    for text, value in (("0", False), ("1", True), ("False", False), (" true ", True)):
        assert tg.parse_knob(FIELDS[name], text) is value


@pytest.mark.parametrize("name", sorted(n for n, f in FIELDS.items() if "choices" in f.metadata))
def test_choices(name):
    for choice in FIELDS[name].metadata["choices"]:
        assert tg.parse_knob(FIELDS[name], choice) == choice


def test_defaults_are_within_their_own_limits():
    for f in FIELDS.values():
        text = str(int(f.default)) if f.type == "bool" else str(f.default)
        assert tg.parse_knob(f, text) == f.default


@pytest.mark.parametrize("settings, words", [
    (dict(MODEL_DIM=501), ["MODEL_DIM=501", "NUM_HEADS=4"]),
    (dict(NUM_KV_HEADS=3), ["NUM_HEADS=4", "NUM_KV_HEADS=3"]),
    (dict(ROPE_DIMS=15), ["ROPE_DIMS=15"]),
    (dict(ROPE_DIMS=130), ["ROPE_DIMS=130"]),
    (dict(MLP_MULT=0.001), ["MLP_MULT"]),
    (dict(GATE_WINDOW=513), ["GATE_WINDOW=513", "MODEL_DIM=512"]),
    (dict(XSA_LAST_N=12), ["XSA_LAST_N=12", "NUM_LAYERS=11"]),
    (dict(LOOP_START=6, LOOP_END=5), ["LOOP_START=6", "LOOP_END=5"]),
    (dict(LOOP_END=11), ["LOOP_END=11", "NUM_LAYERS=11"]),
    (dict(LOOP_PHASE2_AT=0.1), ["LOOP_PHASE2_AT=0.1", "ENABLE_LOOPING_AT=0.35"]),
    (dict(GATED_ATTN_ENABLED=1), ["SPARSE_ATTN_GATE_ENABLED", "GATED_ATTN_ENABLED"]),
    (dict(ATTN_OUT_GATE_ENABLED=1), ["SPARSE_ATTN_GATE_ENABLED", "ATTN_OUT_GATE_ENABLED"]),
    (dict(PARALLEL_RESIDUAL_START=7), ["PARALLEL_START_LAYER=7", "PARALLEL_RESIDUAL_START=7"]),
    (dict(PARALLEL_START_LAYER=11), ["PARALLEL_START_LAYER=11"]),
    (dict(PARALLEL_START_LAYER=2, NUM_LOOPS=0), ["PARALLEL_START_LAYER=2", "decoder"]),
    (dict(PARALLEL_START_LAYER=5), ["PARALLEL_START_LAYER=5", "LOOP_END=5"]),
    (dict(MIXED_PRECISION_LOW_FRAC=0.6, MIXED_PRECISION_HIGH_FRAC=0.6), ["MIXED_PRECISION_LOW_FRAC"]),
    (dict(PREQUANT_ONLY=1, QUANTIZE_ONLY=1), ["PREQUANT_ONLY"]),
    (dict(RESUME=1, EVAL_ONLY=1), ["RESUME=1"]),
    (dict(VAL_BATCH_TOKENS=8192), ["VAL_BATCH_TOKENS=8192", "EVAL_SEQ_LEN=2048"]),
    (dict(GPTQ_RESERVE_SECONDS=600), ["GPTQ_RESERVE_SECONDS=600", "MAX_WALLCLOCK_SECONDS=600"]),
    (dict(EVAL_ONLY=1, TTT_EVAL_ONLY=0), ["EVAL_ONLY", "TTT_EVAL_ONLY"]),
    (dict(EVAL_STRIDE=2049, SLIDING_WINDOW_ENABLED=1), ["EVAL_STRIDE=2049", "EVAL_SEQ_LEN=2048"]),
])
def test_contradictions_name_their_knobs(settings, words):
    refused(settings, *words)


@pytest.mark.parametrize("settings", [dict(MLP_MULT=1e308), dict(MODEL_DIM=10 ** 30), dict(NUM_LAYERS=10 ** 9), dict(SEED=2 ** 70),
                                      dict(NUM_LOOPS=10 ** 12), dict(TRAIN_BATCH_TOKENS=10 ** 40)])
def test_absurd_sizes_are_refused_in_a_line(settings):
    """What no machine can do must not end in a traceback, an overflow or a full memory."""
    refused(settings, *settings)


def test_near_misses_get_a_warning_with_the_nearest_name():
    _, warnings = tg.load_config({"TTT_LORA_RANKS": "8", "MODEL_DIMS": "1", "PATH": "/bin", "HOME": "/", "LANG": "C", "HOSTNAME": "h"})
    assert len(warnings) == 2
    assert "MODEL_DIMS" in warnings[0] and "MODEL_DIM?" in warnings[0]
    assert "TTT_LORA_RANKS" in warnings[1] and "TTT_LORA_RANK?" in warnings[1]


def test_founding_document_b_resolves():
    """Its command after its recipe differs in four variables (recipes/pr1412.env is tested in test_source)."""
    c, warnings = tg.load_config(dict(HESSIAN_CLIP_LAMBDA="0.175", LOOP_PHASE2_AT="0.65", PARALLEL_RESIDUAL_START="7", SEED="1337",
                                      PARALLEL_START_LAYER="0", CONFIG_CHECK="1"))
    assert not warnings and (c.hessian_clip_lambda, c.loop_phase2_at, c.parallel_residual_start) == (0.175, 0.65, 7)


def test_table_has_every_setting_once():
    lines = tg.config_table(toy.config()).splitlines()
    assert [line.split(":")[0].strip() for line in lines] == sorted(f.name for f in FIELDS.values())


def test_layer_order_of_the_default_recipe():
    c, _ = tg.load_config({})
    order, encoder = c.pass_order(2)
    assert (order[:encoder], order[encoder:]) == ([0, 1, 2, 3, 4, 5, 3, 4], [5, 3, 4, 5, 6, 7, 8, 9, 10])
    assert c.pass_order(0) == (list(range(11)), 5)


def test_looping_phases():
    c, _ = tg.load_config(dict(LOOP_PHASE2_AT="0.65"))
    assert [c.loops_at(f) for f in (0, 0.349, 0.35, 0.649, 0.65, 1)] == [0, 0, 1, 1, 2, 2]
    c, _ = tg.load_config({})
    assert [c.loops_at(f) for f in (0, 0.349, 0.35, 1)] == [0, 0, 2, 2]
    assert {tg.load_config({"NUM_LOOPS": "0"})[0].loops_at(f) for f in (0, 0.5, 1)} == {0}


def test_learning_rate_schedule():
    c, _ = tg.load_config(dict(WARMDOWN_FRAC="0.8", MIN_LR="0.1"))
    for frac, expected in ((0, 1), (0.2, 1), (0.6, 0.5), (0.92, 0.1), (1, 0.1), (1.2, 0.1)):
        assert c.lr_mul(frac) == pytest.approx(expected)
    c, _ = tg.load_config(dict(WARMDOWN_FRAC="0", MIN_LR="0"))
    assert c.lr_mul(0.999) == 1


def knob_values(f):
    """Mostly sensible values, some at and past the limits, some rubbish."""
    m = f.metadata
    if f.type == "bool":
        return st.sampled_from(["0", "1", "0", "1", "true", "maybe"])
    if "choices" in m:
        return st.sampled_from([*m["choices"], "other"])
    if f.type == "str":
        return st.sampled_from(["", "x", "/tmp", "a\nb", "\u2603"])
    low, high = m.get("at_least", m.get("above", -3)), m.get("at_most", m.get("below", 4096))
    number = st.integers(int(low) - 1, int(min(high, 64)) + 1) if f.type == "int" else st.floats(low - 0.1, min(high, 64) + 0.1)
    extreme = st.sampled_from(["1e999", "-1", "nan", "9" * 40, "", "0x10", "1e308", "\n", "1_0"])
    return st.one_of(*[number.map(str)] * 5, extreme)


@toy.hypothesis_settings(max_examples=300)
@given(st.integers(0, 2 ** 32), st.data())
def test_random_settings_pass_or_get_one_line(seed, data):
    """Up to eight random knobs: either a configuration whose derived values exist, or UserError in one line."""
    names = random.Random(seed).sample(sorted(FIELDS), 1 + seed % 8)
    settings = {name: data.draw(knob_values(FIELDS[name]), label=name) for name in names}
    try:
        c, _ = tg.load_config(settings)
    except tg.UserError as e:
        assert "\n" not in str(e) and any(name in str(e) for name in names)
        return
    order, encoder = c.pass_order(c.num_loops)
    assert set(order) == set(range(c.num_layers)) and 0 <= encoder <= len(order) // 2
    assert c.head_dim * c.num_heads == c.model_dim and c.mlp_dim >= 1
    assert tg.config_table(c)
    assert 0 <= c.lr_mul(0.5) <= 1 and 0 <= c.loops_at(0.5) <= c.num_loops


@pytest.mark.parametrize("name, meant", [("NGRAM_TILT", "NGRAM_TILT_ENABLED"), ("SMEAR_GATE", "SMEAR_GATE_ENABLED"), ("INQ_STEP", "INQ_STEPS")])
def test_a_name_that_lacks_its_end_is_asked_about(name, meant):
    assert tg.load_config({name: "0"})[1] == [f"warning: {name} is not a setting; did you mean {meant}?"]
