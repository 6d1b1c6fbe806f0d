"""EVALUATE: every token scored once, contexts as specified, bytes exact, independent of batching."""

import math

import numpy as np
import pytest
import reference
import torch
import toy
from hypothesis import given
from hypothesis import strategies as st

import train_gpt as tg


def documents(lengths, seed=0, first=True):
    """Tokens of documents of these lengths; first=False: the first one has lost its BOS."""
    starts = np.cumsum([0, *lengths[:-1]])
    return toy.row(sum(lengths), starts if first else starts[1:], seed)


def slow_sliding(tokens, longest, stride):
    """position -> first position of its context, by simulating each document's window."""
    n = len(tokens) - 1
    starts = [0] + [i for i in range(1, n) if tokens[i] == tg.BOS] + [n]
    context = {}
    for a, b in zip(starts, starts[1:]):
        end, scored = min(a + longest, b), a
        while True:
            for t in range(scored, end):
                context[t] = max(a, end - longest)
            scored = end
            if end == b:
                break
            end = min(end + stride, b)
    return context


LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=6)


@toy.hypothesis_settings(max_examples=150)
@given(LENGTHS, st.booleans(), st.integers(1, 5), st.integers(2, 12))
def test_plain_windows_score_every_position_once(lengths, first, rows, longest):
    tokens = documents(lengths, first=first)
    if len(tokens) < 2:
        return
    row = rows * longest
    windows = tg.plain_windows(tokens, row, longest)
    assert [t for a, b, s in windows for t in range(s, b)] == list(range(len(tokens) - 1))
    starts, start = set(), 0
    for t in range(len(tokens) - 1):            # cut at BOS, at the row's start, and every `longest` from there
        if t % row == 0 or tokens[t] == tg.BOS or t - start == longest:
            start = t
        starts.add(start)
    assert {int(a) for a, _, _ in windows} == starts


@toy.hypothesis_settings(max_examples=300)
@given(LENGTHS, st.booleans(), st.integers(2, 12), st.data())
def test_sliding_windows_score_once_in_the_right_context(lengths, first, longest, data):
    stride = data.draw(st.integers(1, longest), label="stride")
    tokens = documents(lengths, first=first)
    if len(tokens) < 2:
        return
    windows = tg.sliding_windows(tokens, longest, stride)
    actual = [(t, a) for a, b, s in windows.tolist() for t in range(s, b)]
    assert actual == sorted(slow_sliding(tokens, longest, stride).items())
    assert all(b - a <= longest for a, b, _ in windows)


@pytest.mark.parametrize("longest, stride", [(8, 1), (8, 8), (8, 7), (32, 8)])
def test_sliding_contexts_are_long_enough(longest, stride):
    """Every position sees at least min(its place in the document, longest - stride) tokens before it."""
    tokens = documents([5, 100, 1, 8, 33])
    at = 0
    for t, a in slow_sliding(tokens, longest, stride).items():
        at = t if tokens[t] == tg.BOS else at
        assert t - a >= min(t - at, longest - stride)


@toy.hypothesis_settings(max_examples=100)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=30), st.integers(12, 40))
def test_packing_keeps_order_and_fits(sizes, row):
    ends = np.cumsum(sizes)
    windows = np.stack((ends - sizes, ends, ends - sizes), 1)
    rows = tg.pack_windows(windows, row)
    assert np.concatenate(rows).tolist() == windows.tolist()
    assert all(0 < (w[:, 1] - w[:, 0]).sum() <= row for w in rows)
    for a, b in zip(rows, rows[1:]):
        assert (a[:, 1] - a[:, 0]).sum() + b[0, 1] - b[0, 0] > row       # as many as fit


# ------------------------------------------------------------------------------------------------------------- losses


def score(tokens, sliding=False, world=None, **settings):
    c = toy.config(**settings)
    run = toy.run(c, on=world)
    data = tg.Validation(tokens, np.arange(len(tokens)) % 5)
    return tg.evaluate(run, toy.model(c), data, "test", sliding), run.log.lines


def losses_of(c, tokens, windows):
    """Each window alone through the float64 reference: positions -> nats."""
    weights = {n: p.detach() for n, p in tg.export_weights(dict(toy.model(c).named_parameters()), c.num_layers).items()}
    network = reference.Reference(weights, c)
    out = {}
    for a, b, first in windows:
        losses = network.losses(tokens[a:b].tolist(), tokens[a + 1: b + 1].tolist(), limit=10 ** 9)
        out.update({t: losses[t - a] for t in range(first, b)})
    return out


# Losses of about 10 nats, float32 against float64: see test_model.
TOLERANCE = 1e-4


@pytest.mark.parametrize("lengths", [[40], [9, 1, 30], [3, 70, 20]])
@pytest.mark.parametrize("sliding", [False, True])
def test_scores_equal_windows_run_alone(lengths, sliding):
    """Mean and bits per byte from windows one by one; SmearGate is off (it crosses cuts inside a document, by design)."""
    settings = dict(EVAL_SEQ_LEN=16, EVAL_STRIDE=4, VAL_BATCH_TOKENS=8 * 48, SMEAR_GATE_ENABLED=0)
    tokens, c = documents(lengths), toy.config(**settings)
    if sliding:
        context = slow_sliding(tokens, 16, 4)
        windows = [(a, t + 1, t) for t, a in context.items()]
    else:
        cuts = [t for t, s in enumerate(reference.segment_starts(tokens[:48], 16)) if s == t]
        cuts += [48 + t for t, s in enumerate(reference.segment_starts(tokens[48:-1], 16)) if s == t]
        cuts = [t for t in cuts if t < len(tokens) - 1]
        windows = [(a, b, a) for a, b in zip(cuts, [*cuts[1:], len(tokens) - 1])]
    losses = losses_of(c, tokens, windows)
    assert sorted(losses) == list(range(len(tokens) - 1))
    result, _ = score(tokens, sliding, **settings)
    assert abs(result.loss - np.mean(list(losses.values()))) < TOLERANCE
    size = (np.arange(len(tokens)) % 5)[1:].sum()
    assert result.bpb == pytest.approx(sum(losses.values()) / math.log(2) / size, abs=TOLERANCE)
    assert result.tokens == len(tokens) - 1


def test_sliding_windows_do_not_depend_on_their_neighbours_in_a_row():
    """With SmearGate: a window that begins inside a document must not smear the end of another window into its start."""
    tokens = documents([3, 70, 20])
    settings = dict(EVAL_SEQ_LEN=16, EVAL_STRIDE=4)
    scores = [score(tokens, True, VAL_BATCH_TOKENS=8 * row, **settings)[0].loss for row in (16, 32, 80)]
    assert max(scores) - min(scores) < 1e-6     # float64 sums of float32 losses in another order


def test_plain_scores_do_not_depend_on_the_row_when_documents_are_short():
    """Rows are cut at other places, but every document fits in one segment of each: only the last partial row differs."""
    tokens = documents([16] * 12 + [9])
    scores = [score(tokens, EVAL_SEQ_LEN=16, VAL_BATCH_TOKENS=8 * row)[0].loss for row in (16, 32, 64, 1024)]
    assert max(scores) - min(scores) < 1e-5     # positions differ: rotary tables round differently


@pytest.mark.parametrize("length", [2, 3, 16, 17, 18, 33, 63, 64, 65, 66, 200])
@pytest.mark.parametrize("sliding", [False, True])
def test_the_last_partial_row_is_scored(length, sliding):
    tokens = documents([length])
    result, lines = score(tokens, sliding, EVAL_SEQ_LEN=16, EVAL_STRIDE=4, VAL_BATCH_TOKENS=8 * 64)
    assert result.tokens == length - 1
    assert f"val_tokens scored:{length - 1} total:{length - 1} stage:test" in lines


@pytest.mark.parametrize("stride", [1, 15, 16])
def test_stride_edges(stride):
    tokens = documents([50, 3, 16, 17])
    assert score(tokens, True, EVAL_SEQ_LEN=16, EVAL_STRIDE=stride)[0].tokens == len(tokens) - 1


def test_more_context_is_used():
    """The same tokens with a finer stride get more context: the numbers differ (the window is not ignored)."""
    tokens = documents([64])
    a, b = (score(tokens, True, EVAL_SEQ_LEN=16, EVAL_STRIDE=s)[0].loss for s in (1, 16))
    assert abs(a - b) > 1e-3


def test_a_missed_token_stops_the_run(monkeypatch):
    tokens = documents([64])
    kept = tg.plain_windows
    monkeypatch.setattr(tg, "plain_windows", lambda *a: kept(*a)[:-1])
    with pytest.raises(RuntimeError, match="of 63 validation tokens scored"):
        score(tokens)


def test_evaluation_uses_all_loops_and_leaves_no_gradients():
    c = toy.config()
    model, run = toy.model(c), toy.run(c)
    seen = []
    forward = model.losses
    model.losses = lambda *args, **kw: seen.append((args[3:], kw)) or forward(*args, **kw)
    tg.evaluate(run, model, tg.Validation(documents([64]), np.ones(64, int)), "x")
    assert seen == [((), {"adapters": None})]
    assert all(p.grad is None for p in model.parameters()) and torch.is_grad_enabled()


def test_score_line_is_the_published_form():
    run = toy.run(toy.config())
    tg.log_score(run, "diagnostic quantized", tg.Score(2.5, 1.25, 10, 1.5))
    assert run.log.lines == ["diagnostic quantized val_loss:2.50000000 val_bpb:1.25000000 eval_time:1500ms"]
