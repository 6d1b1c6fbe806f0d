"""The n-gram tilt: hints against a plain search, probabilities that add up, what is learnt and when."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import adapt_toy as toy
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt as tg

CPU = torch.device("cpu")


def search(tokens, documents, parts):
    """Every target's hint and kind, by looking through everything that may be known when it is scored."""
    hints, kinds = np.zeros(len(tokens), np.int64), np.full(len(tokens), -1)
    places = [(part, document, i) for document, ((start, size), part) in enumerate(zip(documents, parts)) for i in range(start, start + size)]

    def last(order, part, document, i):
        """The place after which the last `order` tokens up to i stood last: in the own document, else in earlier parts."""
        start = documents[document][0]
        if i - start < order - 1:
            return None
        context = tokens[i - order + 1: i + 1].tolist()
        known = [q for q in places if (q[1] == document and q[2] < i or q[0] < part) and q[2] - documents[q[1]][0] >= order - 1
                 and tokens[q[2] - order + 1: q[2] + 1].tolist() == context]
        own = [q for q in known if q[1] == document]
        return max(own or known, key=lambda q: (q[0], q[1], q[2]), default=None)
    for place in places:
        for level, order in enumerate(tg.HINT_ORDERS):
            if source := last(order, *place):
                again = last(order, *source)
                came_true = 0 if again is None else 1 + int(tokens[again[2] + 1] == tokens[source[2] + 1])
                hints[place[2] + 1] = tokens[source[2] + 1]
                kinds[place[2] + 1] = 6 * level + 3 * (source[1] == place[1]) + came_true
    return hints, kinds


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 24), min_size=1, max_size=7), st.integers(2, 5), st.integers(0, 2 ** 32 - 1))
def test_hints_are_the_longest_last_matches(sizes, letters, seed):
    r = np.random.default_rng(seed)
    tokens = np.concatenate([np.r_[tg.BOS, r.integers(2, 2 + letters, size)] for size in sizes]).astype(np.uint16)
    documents = tg.find_documents(tokens)[r.permutation(len(sizes))]
    parts = np.sort(r.integers(0, 3, len(documents)))
    found = tg.find_hints(tokens, documents, parts, CPU)
    hints, kinds = search(tokens, documents, parts)
    np.testing.assert_array_equal(found.kinds, kinds)
    np.testing.assert_array_equal(found.tokens, hints)


def test_a_document_of_another_part_is_not_looked_at_before_its_time():
    text = np.array([tg.BOS, 5, 6, 7, 8], np.uint16)
    tokens = np.concatenate([text, text])
    documents = tg.find_documents(tokens)
    for parts, expected in (([0, 0], [0] * 3), ([0, 1], [6, 7, 8])):
        assert tg.find_hints(tokens, documents, np.array(parts), CPU).tokens[7:].tolist() == expected


def learnt(seed=0, count=4000) -> tuple[tg.Tilt, tuple]:
    """A tilt that has seen `count` hints, which come true more often than the network thinks; and these."""
    g = torch.Generator().manual_seed(seed)
    tilt = tg.Tilt(toy.one_world("cpu"), CPU)
    z = torch.randn(count, generator=g, dtype=torch.float64) * 3
    kinds = torch.randint(-1, tg.HINT_KINDS, (count,), generator=g)
    hits = torch.rand(count, generator=g) < torch.sigmoid(0.6 * z + 0.05 * kinds)
    p = z.sigmoid()
    losses = torch.where(hits, -p.log(), -((1 - p) * 0.3).log())
    case = losses, -p.log(), kinds, hits
    return tilt, case


def regression(z, hits):
    """Weights of one kind by torch's L-BFGS on the hints themselves (the tilt keeps counts in bins of z)."""
    x, w = tg.Tilt.features(z), torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([w], max_iter=100, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = torch.nn.functional.binary_cross_entropy_with_logits(z + x @ w, hits.double(), reduction="sum") + w.square().sum() / 2
        value.backward()
        return value
    optimizer.step(loss)
    return w.detach()


def test_probabilities_add_up_whatever_was_learnt():
    """Every token in turn as the target: the sum of all probabilities is 1, in bfloat16-sized logits and at the extremes."""
    tilt, case = learnt()
    tilt(*case)
    tilt.learn()
    assert tilt.weights.abs().max() > 0.5
    g, vocabulary = torch.Generator().manual_seed(1), 50
    for scale in (0.1, 1, 10, 60):
        logits = torch.randn(200, vocabulary, generator=g, dtype=torch.float64) * scale
        losses = -logits.log_softmax(1)
        hints = torch.randint(vocabulary, (200,), generator=g)
        kinds = torch.randint(-1, tg.HINT_KINDS, (200,), generator=g)
        hint_losses = losses.gather(1, hints[:, None])[:, 0]
        total = torch.stack([torch.exp(-tilt(losses[:, t], hint_losses, kinds, hints == t)) for t in range(vocabulary)]).sum(0)
        sure = hint_losses < 1e-7
        torch.testing.assert_close(total[~sure], torch.ones_like(total[~sure]), rtol=0, atol=1e-9)
        assert (total[sure] <= 1 + 1e-9).all()


def test_nothing_changes_before_something_was_learnt_or_where_there_is_no_hint():
    tilt, case = learnt()
    losses, _, kinds, _ = case
    torch.testing.assert_close(tilt(*case), losses, rtol=0, atol=1e-9)
    tilt.learn()
    after = tilt(*case)
    assert torch.equal(after[kinds < 0], losses[kinds < 0]) and (after - losses)[kinds >= 0].abs().max() > 0.1


def test_learning_is_ridge_logistic_regression():
    tilt, case = learnt(count=20_000)
    tilt(*case)
    tilt.learn()
    _, hint_losses, kinds, hits = case
    z = -torch.expm1(hint_losses).log()
    for kind in (0, 17, tg.HINT_KINDS - 1):
        torch.testing.assert_close(tilt.weights[kind], regression(z[kinds == kind], hits[kinds == kind]), rtol=0.03, atol=0.01)


def test_what_was_learnt_saves_nats_on_other_hints():
    tilt, case = learnt()
    tilt(*case)
    tilt.learn()
    _, other = learnt(seed=1)
    assert tilt(*other).sum() < other[0].sum() - 50


@pytest.mark.parametrize("protocol", ["published", "cached"])
def test_hint_losses_are_the_networks(protocol):
    """The second row of what the reader banks: the loss of another token at the same place, from the same logits."""
    run, model = toy.setting(TTT_PROTOCOL=protocol, TTT_LORA_LR=0)
    model.requires_grad_(False)
    data = toy.documents((40, 23))
    documents = tg.find_documents(data.tokens)
    reader = tg.Reader(model, 2, 40, None, run.log, hinted=True)
    other = np.where(data.tokens == tg.BOS, 9, (data.tokens + 3) % 64)
    batch = tg.DocumentBatch(documents, 16)
    reader.begin(batch, data.tokens, torch.from_numpy(other.astype(np.int64)))
    banked = torch.zeros(2, 2, 48)
    for chunk, losses in enumerate(tg.score_first(reader.chunks(), reader.score, reader.adapt)):
        banked[:, : losses.shape[1], 16 * chunk: 16 * chunk + 16] = losses
    ids = torch.from_numpy(data.tokens.astype(np.int64))[None]
    for row, (start, size) in enumerate(documents):
        for which, targets in enumerate((ids, torch.from_numpy(other.astype(np.int64))[None])):
            expected = model.losses(ids[:, start: start + size], targets[:, start + 1: start + 1 + size])[0]
            torch.testing.assert_close(banked[which, row, :size], expected, rtol=0, atol=2e-5)


def test_what_is_banked_is_the_tilted_network():
    """A network that does not learn, in four phases: every banked loss from plain losses, searched hints and weights that were
    fitted to the phases before by another program."""
    still = dict(TTT_PROTOCOL="published", TTT_LORA_LR=0, TTT_WEIGHT_DECAY=0, **{**toy.DEALT, "GLOBAL_TTT_LR_MUL": 0})
    data = toy.documents((40,) * 16)
    run, model = toy.setting(**still)
    batches, phases = tg.plan_phases(tg.document_batches(tg.find_documents(data.tokens), run.config), run.config)
    documents = np.concatenate([b.documents for b in batches])
    parts = np.repeat(np.arange(len(phases)), [sum(len(b.documents) for b in batches[p.first: p.last]) for p in phases])
    hints, kinds = (torch.from_numpy(t)[1:] for t in search(data.tokens, documents, parts))
    part = torch.zeros(len(data.tokens) - 1, dtype=torch.int64)
    for (start, size), number in zip(documents, parts):
        part[start: start + size] = number
    ids, losses = torch.from_numpy(data.tokens.astype(np.int64))[None], torch.zeros(2, len(data.tokens) - 1, dtype=torch.float64)
    with torch.no_grad():
        for start, size in documents:
            for row, targets in zip(losses, (ids[0, 1:], hints)):
                row[start: start + size] = model.losses(ids[:, start: start + size], targets[None, start: start + size])[0]
    z, hits, expected = -torch.expm1(losses[1]).log(), hints == ids[0, 1:], losses[0].clone()
    for number in range(1, len(phases)):
        for kind in kinds[kinds >= 0].unique():
            w = regression(*(t[(kinds == kind) & (part < number)] for t in (z, hits)))
            now = (kinds == kind) & (part == number)
            tilted = z[now] + tg.Tilt.features(z[now]) @ w
            others = losses[0][now] + torch.log1p(-torch.exp(-losses[1][now])) + torch.nn.functional.softplus(tilted)
            expected[now] = torch.where(hits[now], torch.nn.functional.softplus(-tilted), others)
    assert len(phases) == 4 and (expected - losses[0]).abs().max() > 1
    _, banked, _ = toy.adapt(data, run, model)
    np.testing.assert_allclose(banked, expected, rtol=0, atol=0.02)
    assert (expected - losses[0])[part == 0].abs().max() == 0


def test_learning_recovers_from_hints_that_are_all_wrong_about_themselves():
    """Sure hints that fail and hopeless ones that come true: Newton's first steps overshoot."""
    tilt = tg.Tilt(toy.one_world("cpu"), CPU)
    z = torch.tensor([-11.9, 11.9], dtype=torch.float64).repeat_interleave(1000)
    surprise, hits = torch.nn.functional.softplus(-z), z < 0
    tilt(torch.where(hits, surprise, 12.0), surprise, torch.zeros(2000, dtype=torch.int64), hits)
    tilt.fresh *= 10_000
    tilt.learn()
    assert tilt.weights[0, 1] == pytest.approx(-9.2, abs=0.5)


def test_a_hint_without_any_chance_leaves_losses_finite():
    tilt, case = learnt()
    tilt(*case)
    tilt.learn()
    for hit in (True, False):
        far = torch.tensor([800.0 if hit else 0.1], dtype=torch.float64)
        assert tilt(far, torch.tensor([800.0], dtype=torch.float64), torch.tensor([5]), torch.tensor([hit])).isfinite().all()


def test_text_of_no_bytes_is_scored():
    data = tg.Validation(np.full(40, tg.BOS, np.uint16), np.zeros(40, np.int64))
    assert toy.adapt(data, TTT_PROTOCOL="cached", **toy.DEALT)[0].tokens == 39


def test_repeated_text_is_cheaper_with_the_tilt_and_the_log_says_by_how_much():
    settings = dict(TTT_PROTOCOL="cached", **toy.DEALT)
    data = toy.documents((60,) * 16)
    without = toy.adapt(data, NGRAM_TILT_ENABLED=0, **settings)[0]
    score, _, lines = toy.adapt(data, **settings)
    assert score.loss < without.loss - 0.1 and score.tokens == without.tokens
    saved = next(line for line in lines if line.startswith("ngram_tilt: saved:"))
    said, plain = (float(part.rpartition(":")[2]) for part in saved.split()[1::2])
    assert score.bpb + said == pytest.approx(plain, abs=2e-8) and plain == pytest.approx(without.bpb, abs=1e-6)


@pytest.mark.gpu
def test_hints_on_a_gpu_are_those_of_the_cpu():
    r = np.random.default_rng(0)
    tokens = np.where(np.arange(200_000) % 700 == 0, tg.BOS, r.integers(2, 40, 200_000)).astype(np.uint16)
    documents = tg.find_documents(tokens)
    parts = np.arange(len(documents)) * 5 // len(documents)
    for a, b in zip(tg.find_hints(tokens, documents, parts, CPU), tg.find_hints(tokens, documents, parts, torch.device("cuda"))):
        assert torch.equal(a, b.cpu())
