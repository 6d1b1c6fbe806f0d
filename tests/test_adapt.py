"""Test-time training: scored first, every token once, documents apart, time kept."""

import contextlib
import gc
import os
import signal
import sys
import time
import weakref
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))

import adapt_toy as toy
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train_gpt as tg

PROTOCOLS = {
    "published": dict(TTT_MICRO_TOKENS=100),
    "published, two steps a chunk, SGD": dict(TTT_GRAD_STEPS=2, TTT_OPTIMIZER="sgd", TTT_BETA1=0.5, TTT_LORA_LR=1),
    "published, A anew, no K": dict(TTT_WARM_START_A=0, TTT_K_LORA=0, ASYM_LOGIT_RESCALE=1),
    "cached": dict(TTT_PROTOCOL="cached"),
    "cached, nothing read again": dict(TTT_PROTOCOL="cached", TTT_LIVE_TOKENS=0),
    "cached, chunks by length": dict(TTT_PROTOCOL="cached", TTT_LIVE_TOKENS=5, TTT_CHUNK_BY_LENGTH="10:2,40:7", TTT_GRAD_STEPS=2),
    "batches dealt out, Muon": dict(TTT_PROTOCOL="cached", **toy.DEALT),
    "batches dealt out, Muon on everything again": dict(TTT_PROTOCOL="cached", **{**toy.DEALT, "GLOBAL_TTT_AGAIN": 1, "ASYM_LOGIT_RESCALE": 1}),
    "no phases": dict(PHASED_TTT_ENABLED=0, TTT_PROTOCOL="cached"),
}
DATA = toy.documents()
DOCUMENTS = tg.find_documents(DATA.tokens)
BASE = {}


def base(name):
    if name not in BASE:
        BASE[name] = toy.adapt(DATA, **PROTOCOLS[name])
    return BASE[name]


def batch_order(name) -> dict[int, tuple[int, int]]:
    """Document's start -> (phase, batch) in which it is read."""
    config = toy.setting(**PROTOCOLS[name])[0].config
    batches, phases = tg.plan_phases(tg.document_batches(DOCUMENTS, config), config)
    return {int(start): (next(i for i, p in enumerate(phases) if p.first <= number < p.last), number)
            for number, batch in enumerate(batches) for start in batch.documents[:, 0]}


@pytest.mark.parametrize("name", PROTOCOLS)
@settings(max_examples=3, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_token_changes_no_loss_banked_before_it(name, data):
    """The legality proof: change a token; what its own document banked before it, and what others banked before they
    could know of it, stays to the last bit but for rounding."""
    score, banked, _ = base(name)
    start, size = DOCUMENTS[data.draw(st.integers(0, len(DOCUMENTS) - 1))]
    at = int(start + data.draw(st.integers(1, max(int(size) - 1, 1))))
    if at >= len(DATA.tokens) or DATA.tokens[at] == tg.BOS:
        return
    tokens = DATA.tokens.copy()
    tokens[at] = 2 + (tokens[at] - 2 + data.draw(st.integers(1, 61))) % 62
    _, changed, _ = toy.adapt(DATA._replace(tokens=tokens), **PROTOCOLS[name])
    order = batch_order(name)
    warm = "A anew" not in name
    for other, count in DOCUMENTS:
        span = slice(other, at - 1 if other == start else other + count)
        later_phase, later_batch = order[other][0] > order[start][0], order[other][1] > order[start][1]
        if other != start and (later_phase or warm and later_batch):
            continue                                    # may have learnt from the changed document, after it was scored
        np.testing.assert_allclose(changed[span], banked[span], rtol=0, atol=2e-5)
    own = slice(at - 1, start + size)
    assert not np.allclose(changed[own], banked[own], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_adapting_changes_later_losses(name):
    """The proof above is not of something that does nothing."""
    frozen = toy.adapt(DATA, **{**PROTOCOLS[name], "TTT_LORA_LR": 0, "GLOBAL_TTT_LR": 0, "GLOBAL_TTT_LR_MUL": 0})[1]
    moved = np.abs(base(name)[1] - frozen)
    for start, size in DOCUMENTS[DOCUMENTS[:, 1] > 40]:
        assert moved[start: start + size].max() > 1e-3


@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_target_once_and_all_bytes(name):
    score, banked, lines = base(name)
    assert not np.isnan(banked).any() and score.tokens == len(DATA.tokens) - 1
    assert score.loss == pytest.approx(banked.mean(), abs=1e-6)
    assert score.bpb == pytest.approx(banked.sum() / np.log(2) / DATA.byte_counts[1:].sum(), abs=1e-6)
    assert f"val_tokens scored:{score.tokens} total:{score.tokens} stage:quantized_ttt_phased" in lines


def test_without_learning_it_is_plain_evaluation_with_the_same_windows():
    still = dict(TTT_LORA_LR=0, GLOBAL_TTT_LR=0, TTT_WEIGHT_DECAY=0.5, NGRAM_TILT_ENABLED=0)
    run, model = toy.setting(**still)
    chunk, longest = run.config.ttt_chunk_size, run.config.ttt_eval_seq_len
    ids, expected = torch.from_numpy(DATA.tokens.astype(np.int64))[None], []
    for start, size in DOCUMENTS:
        for first in range(0, size, chunk):
            end = min(first + chunk, size)
            a, b = start + max(end - longest, 0), start + end
            with torch.no_grad():
                expected += model.losses(ids[:, a: b], ids[:, a + 1: b + 1])[0, first - end:].tolist()
    np.testing.assert_allclose(toy.adapt(DATA, **still)[1], expected, atol=2e-5)
    only_short = toy.documents([size for size in toy.SIZES if size <= longest])
    plain = tg.evaluate(run, model, only_short, "plain")
    for protocol in ("published", "cached"):
        score = toy.adapt(only_short, TTT_PROTOCOL=protocol, **still)[0]
        assert score.loss == pytest.approx(plain.loss, abs=2e-6) and score.bpb == pytest.approx(plain.bpb, abs=2e-6)
    expected = tg.evaluate(run, model, DATA, "windowed", windowed=True)
    for live in (0, 5, 16, 30, 90):         # 90: more than the window
        score = toy.adapt(DATA, TTT_PROTOCOL="cached", TTT_LIVE_TOKENS=live, **still)[0]
        assert score.loss == pytest.approx(expected.loss, abs=2e-6)


def test_cache_goes_round_without_change():
    """Documents much longer than the cache's rings, with a window that does not divide anything."""
    data = toy.documents((700, 650, 3))
    still = dict(TTT_LORA_LR=0, PHASED_TTT_ENABLED=0, EVAL_SEQ_LEN=37, TTT_EVAL_SEQ_LEN=37, TTT_PROTOCOL="cached")
    run, model = toy.setting(**still)
    expected = tg.evaluate(run, model, data, "windowed", windowed=True)
    assert toy.adapt(data, **still)[0].loss == pytest.approx(expected.loss, abs=2e-6)


def test_windowed_attention_is_a_mask():
    """Every backend's window: position i sees [i - window + 1, i]."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 50, heads, 8, generator=g) for heads in (4, 2, 2))
    for window in (0, 1, 7, 49, 50, 80):
        i, j = torch.arange(50)[:, None], torch.arange(50)
        mask = (j <= i) & (j > i - (window or 50))
        expected = torch.nn.functional.scaled_dot_product_attention(
            *(t.transpose(1, 2) for t in (q, k.repeat_interleave(2, 2), v.repeat_interleave(2, 2))), attn_mask=mask).transpose(1, 2)
        torch.testing.assert_close(tg.attend_sdpa(q, k, v, None, window), expected, rtol=1e-5, atol=1e-5)


def test_score_first_banks_before_it_adapts():
    events = []
    score, adapt = lambda c: events.append(f"score {c}") or c, lambda c: events.append(f"adapt {c}")
    for chunk, value in enumerate(tg.score_first(range(3), score, adapt)):
        events.append(f"bank {chunk}")
        assert value == chunk
    assert events == [f"{what} {c}" for c in range(3) for what in ("score", "bank", "adapt")]


@pytest.mark.parametrize("sizes", [(1, 2), (5,), (1, 1, 1, 1, 40), (20,) * 7, (200, 3), (64, 64, 64, 64)])
@pytest.mark.parametrize("protocol", ["published", "cached"])
def test_odd_document_sets(sizes, protocol):
    data = toy.documents(sizes)
    score, banked, _ = toy.adapt(data, TTT_PROTOCOL=protocol, PHASED_TTT_PREFIX_DOCS=1000, PHASED_TTT_NUM_PHASES=4)
    assert score.tokens == len(data.tokens) - 1 and not np.isnan(banked).any()


def test_text_before_the_first_bos_is_a_document():
    data = toy.documents((60, 30))
    data = tg.Validation(data.tokens[7:], data.byte_counts[7:])
    for protocol in ("published", "cached"):
        assert not np.isnan(toy.adapt(data, TTT_PROTOCOL=protocol)[1]).any()


def test_phases_end_with_whole_batches():
    config = toy.setting(TTT_BATCH_SIZE=64, PHASED_TTT_PREFIX_DOCS=2500, PHASED_TTT_NUM_PHASES=3)[0].config
    sizes = np.stack((np.zeros(50000, int), np.sort(np.random.default_rng(0).integers(1, 9999, 50000))), 1)
    batches = tg.document_batches(sizes, config)
    ordered, phases = tg.plan_phases(batches, config)
    assert [p.documents for p in phases] == [833, 1666, 2500, 0] and ordered == batches
    assert [p.last for p in phases] == [14, 27, 40, 782]


@given(st.integers(1, 30), st.integers(0, 8))
def test_batches_are_dealt_out_to_phases(count, number):
    """Every batch once; each phase has every (number + 1)th of them, longest first, the last one the longest of all; a phase trains on
    what was read until its end."""
    config = toy.setting(**{**toy.DEALT, "PHASED_TTT_NUM_PHASES": number})[0].config
    batches = [tg.DocumentBatch(np.array([(1000 * i + j, 100 - i) for j in range(2)]), 16) for i in range(count)]
    ordered, phases = tg.plan_phases(batches, config)
    rank = [int(b.documents[0, 0]) // 1000 for b in ordered]
    assert sorted(rank) == list(range(count)) and phases[0].first == 0 and phases[-1].last == count
    assert len(phases) == min(number + 1, count) and [p.first for p in phases[1:]] == [p.last for p in phases[:-1]]
    for i, phase in enumerate(reversed(phases)):
        assert rank[phase.first: phase.last] == list(range(i, count, number + 1))
        assert phase.documents == (2 * phase.last if phase.last < count else 0)


def test_a_document_that_goes_wrong_is_scored_without_adapters():
    """Non-finite losses of one document: it alone falls back, and its row's A is not kept."""
    run, model = toy.setting(PHASED_TTT_ENABLED=0)
    victim = DOCUMENTS[6]
    original = tg.DocumentAdapters.step

    def step(self):
        """The second update spoils the longest document's adapter."""
        original(self)
        self.count = getattr(self, "count", 0) + 1
        if self.count == 2:
            self.weights[0, -1] = float("nan")
    try:
        tg.DocumentAdapters.step = step
        score, banked, lines = toy.adapt(DATA, run, model)
    finally:
        tg.DocumentAdapters.step = original
    assert any(line.startswith(f"ttt_non_finite: document at token {victim[0]}") for line in lines)
    assert np.isfinite(score.loss) and score.tokens == len(DATA.tokens) - 1
    expected = toy.adapt(DATA, PHASED_TTT_ENABLED=0)[1]
    rest = np.ones(len(banked), bool)
    rest[victim[0]: victim.sum()] = False
    same_batch = np.isin(np.arange(len(banked)), np.concatenate([np.arange(a, a + n) for a, n in DOCUMENTS[[1, 5]]]))
    np.testing.assert_allclose(banked[rest & same_batch], expected[rest & same_batch], atol=2e-5)


def test_time_limit_stops_adapting_not_scoring():
    """A slow machine: adapting stops, everything is scored, the limit is not overshot."""
    for phased in (0, 1):
        run, model = toy.setting(EVAL_TIME_LIMIT=1.5, PHASED_TTT_ENABLED=phased)
        original = tg.Reader.adapt

        def slow(self, chunk):
            time.sleep(0.2)
            original(self, chunk)  # noqa: B023
        try:
            tg.Reader.adapt, began = slow, time.perf_counter()
            score, banked, lines = toy.adapt(DATA, run, model, plain_rate=5000, began=began)
        finally:
            tg.Reader.adapt = original
        assert time.perf_counter() - began < 1.5
        assert sum("ttt_time_limit" in line for line in lines) == 1 and score.tokens == len(DATA.tokens) - 1
        assert np.isnan(banked).any() and not np.isnan(banked).all()


def test_out_of_time_scores_batch_by_batch(monkeypatch):
    """A rank that takes no time to adapt must not empty the queue: it scores what it took before it takes more."""
    seen = []
    take, score = tg.Crew.take, tg.Adaptation.score_plain
    monkeypatch.setattr(tg.Crew, "take", lambda *a: seen.append("take") or take(*a))
    run, model = toy.setting(EVAL_TIME_LIMIT=1, PHASED_TTT_ENABLED=0)
    monkeypatch.setattr(tg.Adaptation, "score_plain", lambda self: (seen.append("score" if self.plain else "-"), score(self)))
    result = toy.adapt(DATA, run, model, began=time.perf_counter() - 2)[0]
    batches = len(tg.document_batches(DOCUMENTS, run.config))
    assert batches > 2 and seen == ["take", "score"] * batches + ["take", "-"] and result.tokens == len(DATA.tokens) - 1


@pytest.mark.parametrize("settings", [{}, {"TTT_PROTOCOL": "published"}, {"ASYM_LOGIT_RESCALE": 1}, {"PHASED_TTT_NUM_PHASES": 0},
                                      toy.DEALT])
def test_rehearsal_leaves_everything_as_it_was(settings, monkeypatch):
    steps, step = [], tg.GlobalTrainer.step
    monkeypatch.setattr(tg.GlobalTrainer, "step", lambda self, stream, a, *rest: steps.append(a) or step(self, stream, a, *rest))
    run, model = toy.setting(GLOBAL_TTT_CHUNK_TOKENS=32, **settings)
    list(model.parameters())[0].requires_grad_(False)
    before, flags = [p.detach().clone() for p in model.parameters()], [p.requires_grad for p in model.parameters()]
    kept, init = [], tg.DocumentAdapters.__init__
    monkeypatch.setattr(tg.DocumentAdapters, "__init__", lambda self, *rest: (init(self, *rest), kept.append(weakref.ref(self)))[0])
    tg.rehearse_adaptation(run, model, DATA)
    assert [ref() for ref in kept] == [None]            # gigabytes that training needs
    assert not run.log.lines and (settings == {"PHASED_TTT_NUM_PHASES": 0} and not steps        # no phase: nothing to rehearse
                                  or steps[0] == 0 and len(set(steps)) >= 2)                    # the first step has no token before it
    assert all(torch.equal(p, q) and p.grad is None for p, q in zip(model.parameters(), before))
    assert [p.requires_grad for p in model.parameters()] == flags
    again = toy.adapt(DATA, run, model)[0]
    assert again.loss == toy.adapt(DATA, GLOBAL_TTT_CHUNK_TOKENS=32, **settings)[0].loss


def test_sigterm_prints_a_partial_result():
    run, model = toy.setting()
    original = tg.Reader.adapt

    def interrupted(self, chunk):
        original(self, chunk)
        if chunk == 1:
            os.kill(os.getpid(), signal.SIGTERM)
    before = signal.getsignal(signal.SIGTERM)
    try:
        tg.Reader.adapt = interrupted
        with pytest.raises(tg.UserError, match="partial") as e:
            toy.adapt(DATA, run, model)
    finally:
        tg.Reader.adapt = original
    assert e.value.code == 130 and signal.getsignal(signal.SIGTERM) == before
    assert any(line.startswith("partial quantized_ttt_phased val_loss:") and "tokens:144 of" in line for line in run.log.lines)


def test_log_lines_of_the_challenge():
    lines = base("published")[2]
    assert "ttt_phased: total_docs:10 prefix_docs:6 suffix_docs:4 num_phases:2 boundaries:[3, 6]" in lines
    assert any(line.startswith("ttp: b4/4 bl:") and line.endswith("dl:49-100 gd:0") for line in lines)
    assert any(line.startswith("ttpp: phase:1/2 pd:3 gd:3 t:") for line in lines)
    assert any(line.startswith("tttg: c1/4 lr:0.100000 t:") for line in lines)


def test_micro_batches_of_rows_change_nothing():
    whole = toy.adapt(DATA)[1]
    for tokens in (1, 70, 100):
        np.testing.assert_allclose(toy.adapt(DATA, TTT_MICRO_TOKENS=tokens)[1], whole, atol=1e-4)


def test_global_pass_follows_the_formula():
    """One step against SGD by hand: mean loss of the chunk in document segments, clipped, cosine from the full rate."""
    run, model = toy.setting(GLOBAL_TTT_CHUNK_TOKENS=96, GLOBAL_TTT_LR=0.3, GLOBAL_TTT_GRAD_CLIP=0.5, GLOBAL_TTT_BATCH_SEQS=8)
    _, twin = toy.setting()
    tg.GlobalTrainer(run, model, None)(DATA.tokens, DOCUMENTS[[1, 6]], lambda: False)       # 170 tokens: two chunks, one trained
    stream = np.concatenate([DATA.tokens[a: a + n] for a, n in DOCUMENTS[[1, 6]]])
    batch = tg.to_batch(stream[:97], 48)
    twin.losses(batch.ids, batch.targets, batch.segments).mean().backward()
    torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
    for p, q in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(p, q if q.grad is None else q - 0.3 * q.grad, rtol=1e-5, atol=1e-6)


def test_global_passes_by_muon_go_on_where_they_stopped():
    """Two passes against training's optimizers by hand: chunks that were left over come first, momentum lasts, each pass falls anew."""
    run, model = toy.setting(**{**toy.DEALT, "GLOBAL_TTT_CHUNK_TOKENS": 32, "GLOBAL_TTT_BATCH_SEQS": 8})
    _, twin = toy.setting()
    trainer, by_hand = tg.GlobalTrainer(run, model, None), tg.Optimizers(twin, run.config, run.world)
    documents = DOCUMENTS[[1, 6, 4, 5]]         # 70, 100, 48 and 49 tokens
    for more in (1, 2, 4):                      # 69 targets: chunks 0, 1; 169: 2 to 4; 266: 5 to 7
        trainer(DATA.tokens, documents[:more], lambda: False)
    stream = np.concatenate([DATA.tokens[a: a + n] for a, n in documents])
    for chunks in ((0, 1), (2, 3, 4), (5, 6, 7)):
        for i in chunks:
            lead = min(32 * i, 16)
            row = stream[32 * i - lead: 32 * i + 33]
            starts = np.union1d(np.unique([0, lead]), np.flatnonzero(row[:-1] == tg.BOS))
            new = tg.Segments(torch.from_numpy(tg.pad_cu_seqlens(starts, len(row) - 1)), 48)
            ids = torch.from_numpy(row.astype(np.int64))[None]
            twin.losses(ids[:, :-1], ids[:, 1:], new)[:, lead:].mean().backward()
            by_hand.start_reduce()
            by_hand.step(0.1 * 0.5 * (1 + np.cos(np.pi * (i - chunks[0]) / len(chunks))), 0)
    for p, q in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert sum(line.startswith("tttg: ") for line in run.log.lines) == 8


@pytest.mark.parametrize("how", [{"GLOBAL_TTT_MOMENTUM": 0}, toy.DEALT])
def test_a_global_gradient_that_is_not_finite_counts_as_zero(how, monkeypatch):
    """Once, in the middle: a line, and finite weights without that step's gradient (Muon's momentum moves them on)."""
    moved = {}
    for which in (None, 1, 99):
        run, model = toy.setting(GLOBAL_TTT_CHUNK_TOKENS=32, **how)
        trainer, calls = tg.GlobalTrainer(run, model, None), []
        gradient = trainer.gradient

        def spoilt(*rest):
            calls.append(rest)
            return [g if len(calls) - 1 != which or g is None else g * float("nan") for g in gradient(*rest)]      # noqa: B023
        monkeypatch.setattr(trainer, "gradient", spoilt)
        trainer(DATA.tokens, DOCUMENTS[[1, 6]], lambda: False)
        assert len(calls) > 3
        lines = [line for line in run.log.lines if line.startswith("ttt_non_finite")]
        assert lines == ["ttt_non_finite: the gradient of a global step was left out"] * (which == 1)
        moved[which] = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert all(t.isfinite().all() for t in moved.values())
    assert torch.equal(moved[None], moved[99]) and not torch.equal(moved[None], moved[1])


def test_the_submission_is_scored_in_the_eval_budget(monkeypatch, tmp_path):
    """The hook: artifact, plain evaluation, windowed attention, test-time training, each with its line in the ledger."""
    run, model = toy.setting(WINDOWED_EVAL_ENABLED=1, TTT_PROTOCOL="cached")
    weights = {name: tg.HalfTensor(t.detach().clone()) for name, t in tg.export_weights(dict(model.named_parameters()), 5).items()}
    monkeypatch.setattr(tg, "read_artifact", lambda path, config: weights)
    tg.score_artifact(run, model, tmp_path / "model", DATA)
    text = "\n".join(run.log.lines)
    for stage in ("unpack", "eval_quantized", "eval_windowed", "eval_ttt"):
        assert f"ledger stage:{stage} seconds:" in text
    assert "\nquantized_ttt_phased val_loss:" in text and "\nquantized_windowed val_loss:" in text and "\nbudget eval " in text
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("text", ["256", "256:", "a:b", "100:99", "100:0", "3:4:5"])
def test_bad_chunk_rules(text):
    with pytest.raises(tg.UserError, match="TTT_CHUNK_BY_LENGTH"):
        tg.chunk_rules(toy.setting(TTT_CHUNK_BY_LENGTH=text)[0].config)


def test_adapted_batch_equals_packed_row():
    """The same tokens, packed, as rows, and through the cache in uneven steps, with untouched adapters: one forward."""
    run, model = toy.setting(TTT_EVAL_SEQ_LEN=64)
    ids = torch.from_numpy(DATA.tokens[DOCUMENTS[6, 0]:][:61].astype(np.int64))[None]
    batch = tg.to_batch(ids[0].numpy().astype(np.uint16), 64)
    with torch.no_grad():
        packed = model.losses(batch.ids, batch.targets, batch.segments)
        adapters = tg.DocumentAdapters(model, 1, 0)
        adapters.begin(1)
        rows = model.losses(ids[:, :-1], ids[:, 1:], adapters=adapters.build(slice(None), None))
        cache, parts, led = tg.KeyValueCache(model, 1, 64, 32, 60), [], torch.nn.functional.pad(ids, (1, 0), value=9)
        for a, b in ((0, 7), (7, 8), (8, 40), (40, 60)):
            untouched = adapters.build(slice(None), None)
            parts.append(model.losses(led[:, a: b + 1], ids[:, a + 1: b + 1], adapters=untouched, cache=cache))
            cache.advance(b - a)
    torch.testing.assert_close(rows, packed, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat(parts, 1), packed, rtol=1e-5, atol=1e-5)


def read(reader, documents, tokens=DATA.tokens):
    """Losses of every document of one batch, as the reader banks them."""
    batch, out = tg.DocumentBatch(documents, 16), [[] for _ in documents]
    reader.begin(batch, tokens)
    for chunk, losses in enumerate(tg.score_first(reader.chunks(), reader.score, reader.adapt)):
        for (_, size), row, values in zip(documents, out, losses[0].tolist()):
            row += values[: max(size - chunk * 16, 0)]
    reader.adapters.keep(len(documents))
    return out


@pytest.mark.parametrize("settings", [dict(TTT_PROTOCOL="cached"), dict(TTT_OPTIMIZER="sgd", TTT_BETA1=0.5, TTT_LORA_LR=0.01)])
def test_a_document_is_read_alike_on_every_rung(settings):
    """Rows that documents left, and rows that never had one, change nothing: neither losses nor the A that is kept."""
    run, model = toy.setting(**settings)
    model.requires_grad_(False)
    ordered = DOCUMENTS[np.argsort(-DOCUMENTS[:, 1])][[0, 1, 4, 8, 9]]              # 100, 70, 33, 5 and 1 tokens: rows leave
    reader = tg.Reader(model, 5, 100, None, run.log)
    assert reader.ladder == [5, 3, 2, 1]
    whole, a = read(reader, ordered), reader.adapters.kept.clone()
    assert (reader.adapters.rows, [len(row) for row in whole]) == (1, ordered[:, 1].tolist())
    for count in (1, 2, 3, 4):                                                      # 4: a row stays empty
        reader.adapters.restart(run.config.seed)
        fresh = reader.adapters.kept.clone()
        for got, expected in zip(read(reader, ordered[:count]), whole):
            np.testing.assert_allclose(got, expected, atol=2e-5)
        torch.testing.assert_close(reader.adapters.kept[:count], a[:count], rtol=0, atol=2e-5)
        assert torch.equal(reader.adapters.kept[count:], fresh[count:]) and not torch.equal(a[0], fresh[0])


def test_a_failed_capture_is_one_line_and_eager_reading(monkeypatch):
    """Where CUDA graphs do not work: every call's result is that of an eager call."""
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda: "default")
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: streams.append(stream))

    def refuse(*_, **__):
        raise RuntimeError("operation not permitted\nwhen stream is capturing")
    monkeypatch.setattr(torch.cuda, "graph", refuse)
    lines, streams, calls = [], [], iter(range(9))
    graphs = tg.Graphs(True, lines.append)
    assert [graphs("key", lambda: next(calls)) for _ in range(4)] == [0, 1, 2, 3]
    assert lines == ["cuda_graphs: none (operation not permitted): eager from here on"] and streams == ["default"]


def test_graphs_make_room_for_a_shape_that_does_not_fit_beside_them():
    """Once, with one line; without graphs to give up the error is the caller's."""
    lines, attempts = [], []
    graphs = tg.Graphs(False, lines.append)
    graphs.wanted = True

    def hungry():
        attempts.append(len(graphs.graphs))
        if graphs.graphs or lines == []:
            raise torch.OutOfMemoryError("out of memory\nTried to allocate")
        return "done"
    with pytest.raises(torch.OutOfMemoryError):
        graphs("alone", hungry)
    graphs.graphs["other"] = None, None
    assert graphs("new", hungry) == "done" and graphs("newer", hungry) == "done"
    assert attempts == [0, 1, 0, 0] and lines == ["cuda_graphs: none (out of memory): eager from here on"]


class Recorder(TorchDispatchMode):
    """A CUDA graph for the CPU: replay repeats every operation on the very tensors of the recording, results included."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default, "the host waits for the device"
        out = function(*args, **(kwargs or {}))
        self.record = [*getattr(self, "record", ()), (function, args, kwargs or {}, out)]
        return out

    @torch.no_grad()
    def replay(self):
        for function, args, kwargs, out in self.record:
            again = function(*args, **kwargs)
            if all(r.alias_info is None for r in function._schema.returns):         # neither a view nor in place
                for old, new in zip(tree_leaves(out), tree_leaves(again)):
                    old.detach().copy_(new)


def attend_to_the_whole_ring(q, k, v, keys, values, position, window):
    """past_attention without the host knowing the position."""
    P, live = keys.shape[1], position + torch.arange(q.shape[1])
    p = live[-1] - (live[-1] - torch.arange(P)) % P                 # the last position at each place
    held = (p >= 0) & (p > position - window)
    fill = lambda ring, new: torch.where(held[None, :, None, None], ring.index_copy(1, live % P, new), 0)
    seen = held & (p <= live[:, None]) & (p > live[:, None] - window)
    k, v = (t.repeat_interleave(q.shape[2] // k.shape[2], 2).transpose(1, 2) for t in (fill(keys, k), fill(values, v)))
    return torch.nn.functional.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=seen).transpose(1, 2)


def attend_by_mask(q, k, v, segments, window=0):
    """attend_sdpa without the host knowing where segments begin."""
    i, groups = torch.arange(q.shape[1], device=q.device), q.shape[2] // k.shape[2]
    seen = i[:, None] >= i
    if segments:
        which = torch.bucketize(i, segments.cu_seqlens.long(), right=True)
        seen = seen & (which[:, None] == which) & (i[:, None] - i < (window or len(i)))
    scores = torch.einsum("bikgd,bjkd->bkgij", q.float().unflatten(2, (-1, groups)), k.float()) * q.shape[3] ** -0.5
    shares = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("bkgij,bjkd->bikgd", shares, v.float()).flatten(2, 3).to(q.dtype)


@pytest.mark.parametrize("name", [name for name in PROTOCOLS if PROTOCOLS[name].get("TTT_PROTOCOL") == "cached"])
def test_recorded_reading_changes_nothing(monkeypatch, name):
    """What CUDA graphs would do, on the CPU, in reading and in global steps: every input at its address, nothing that the host
    decides, gradients in place."""
    plain = base(name)[1]
    monkeypatch.setattr(tg, "past_attention", attend_to_the_whole_ring)
    monkeypatch.setitem(tg.ATTENTION, "sdpa", attend_by_mask)
    used, original, expected = [], tg.Graphs.__init__, toy.adapt(DATA, **PROTOCOLS[name])[1]
    if PROTOCOLS[name].get("TTT_GRAD_STEPS", 1) == 1:               # more: AdamW enlarges roundings
        np.testing.assert_allclose(expected, plain, rtol=0, atol=1e-4)

    @contextlib.contextmanager
    def record(graph, **_):
        used.append(graph)
        with graph:
            yield
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorder)
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(tg.Graphs, "__init__", lambda self, wanted, log: original(self, True, log))
    _, banked, lines = toy.adapt(DATA, **PROTOCOLS[name])
    assert len(used) > 2 and any(line.startswith("ttt_warm_up: captured") for line in lines)
    np.testing.assert_allclose(banked, expected, rtol=0, atol=1e-6)


class OnGpu(NamedTuple):
    banked: np.ndarray
    reading: dict           # CUDA graphs of chunks, by key
    steps: dict             # and of global steps
    memory: list[int]       # allocated at every banked chunk
    refused: list[str]      # log lines on captures that failed


def adapt_on_gpu(monkeypatch, data=DATA, **changes) -> OnGpu:
    """toy.adapt on the GPU. attend_sdpa asks the device where segments begin, which a capture of a global step cannot."""
    made, memory, bank = {}, [], tg.Reader.adapt
    monkeypatch.setitem(tg.ATTENTION, "sdpa", attend_by_mask)
    monkeypatch.setattr(tg.Reader, "adapt", lambda self, chunk: (bank(self, chunk), memory.append(torch.cuda.memory_allocated())))
    for owner in (tg.Reader, tg.GlobalTrainer):
        def begin(self, *rest, owner=owner, original=owner.__init__):
            original(self, *rest)
            made[owner] = self.graphs.graphs
        monkeypatch.setattr(owner, "__init__", begin)
    _, banked, lines = toy.adapt(data, *toy.setting("cuda", **{"TTT_PROTOCOL": "cached", **changes}))
    monkeypatch.undo()
    return OnGpu(banked, made[tg.Reader], made[tg.GlobalTrainer], memory, [line for line in lines if line.startswith("cuda_graphs: none")])


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [{}, dict(TTT_GRAD_STEPS=2), dict(TTT_LIVE_TOKENS=5, ASYM_LOGIT_RESCALE=1),
                                      dict(TTT_OPTIMIZER="sgd", TTT_BETA1=0.5, TTT_LORA_LR=1), dict(TTT_WARM_START_A=0)])
def test_graphs_change_nothing(monkeypatch, settings):
    """The same kernels on the same numbers: losses differ by no more than a rounding of a bfloat16 logit (2^-8 of up to 4) that
    two choices of a library's algorithm may make, and adapting carries on; through phases that change the weights in place, by
    steps that are graphs too."""
    data = toy.documents(toy.SIZES * 3)
    eager = adapt_on_gpu(monkeypatch, data, TTT_GRAPHS=0, **settings)
    replayed = adapt_on_gpu(monkeypatch, data, **settings)
    assert not eager.reading and not eager.steps
    assert len(replayed.reading) > 2 and replayed.steps, replayed.refused
    np.testing.assert_allclose(replayed.banked, eager.banked, rtol=0, atol=0.05)
    assert abs(replayed.banked - eager.banked).mean() < 2e-3


@pytest.mark.gpu
def test_a_token_changes_no_loss_banked_before_it_with_graphs(monkeypatch):
    settings = dict(PHASED_TTT_ENABLED=0, TTT_BATCH_SIZE=10)
    before = adapt_on_gpu(monkeypatch, **settings)
    assert len(before.reading) > 2 and not before.steps, before.refused
    start, size = DOCUMENTS[6]
    for at in (start + 20, start + 77):
        tokens = DATA.tokens.copy()
        tokens[at] = 2 + (tokens[at] - 1) % 62
        after = adapt_on_gpu(monkeypatch, DATA._replace(tokens=tokens), **settings)
        changed = abs(after.banked - before.banked) > 2e-5
        assert not changed[: at - 1].any() and not changed[start + size:].any() and changed[at - 1: start + size].any()


@pytest.mark.gpu
def test_memory_does_not_grow_with_the_batches(monkeypatch):
    memory = adapt_on_gpu(monkeypatch, toy.documents((100, 90, 80) * 20), PHASED_TTT_ENABLED=0).memory
    assert max(memory[len(memory) // 2:]) <= max(memory[: len(memory) // 2])


@pytest.mark.parametrize("protocol", ["published", "cached"])
def test_what_reading_held_is_given_back(monkeypatch, protocol):
    """At once, without the garbage collector: it is gigabytes."""
    readers, original = [], tg.Reader.__init__
    monkeypatch.setattr(tg.Reader, "__init__", lambda self, *rest: (original(self, *rest), readers.append(weakref.ref(self)))[0])
    torch.optim.SGD([torch.zeros(1)])       # the first of a process imports much of torch, whose frames then stay
    gc.disable()
    try:
        toy.adapt(DATA, TTT_PROTOCOL=protocol)
        assert len(readers) == 1 and readers[0]() is None
    finally:
        gc.enable()
