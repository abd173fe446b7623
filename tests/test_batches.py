"""The stream, the windows and the packed batches, against a slow and obvious reading of the same documents."""

import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import write_bins
from nanomed import InputError, batches
from nanomed.batches import Shape
from nanomed.bins import Bins
from nanomed.kernels.linear_cross_entropy import IGNORED
from nanomed.stream import Stream, open_sources

VOCAB = 50


class MemoryBins:
    """What Stream needs of Bins, in memory."""

    def __init__(self, lengths: list[int], seed: int = 0):
        rng = np.random.default_rng(seed)
        self.documents = [np.append(rng.integers(1, VOCAB, n - 1), 0).astype(np.uint16) for n in lengths]
        self.lengths = np.array(lengths, np.int64)
        self.n_docs, self.folder = len(lengths), "memory"

    def tokens(self, doc, start, stop):
        return self.documents[doc][start:stop]


lengths_of_documents = st.lists(st.integers(1, 40), min_size=1, max_size=30)


def slow_stream(stream: Stream, n_epochs: int) -> tuple[np.ndarray, np.ndarray]:
    """All tokens of the first epochs and the number of the document occurrence each belongs to."""
    tokens, owner = [], []
    for epoch in range(n_epochs):
        for doc in stream.epoch(epoch).docs:
            text = stream.read(int(doc), 0, 10**6)
            tokens.append(text)
            owner.append(np.full(len(text), len(tokens)))
    return np.concatenate(tokens).astype(np.int64), np.concatenate(owner)


@settings(max_examples=60, deadline=None)
@given(lengths_of_documents, st.integers(1, 24), st.integers(1, 3), st.integers(0, 5))
def test_batches_hold_every_token_once_with_its_next_as_label(lengths, seq_len, micro, seed):
    stream = Stream([(MemoryBins(lengths), 1.0)], seed, VOCAB)
    tokens, owner = slow_stream(stream, 3)
    n_windows = 2 * sum(lengths) // (seq_len * micro) * micro
    shape = Shape(seq_len, micro)
    for first in range(0, n_windows, micro):
        batch = batches.pack(stream, first, shape, n_windows * seq_len)
        span = slice(first * seq_len, (first + micro) * seq_len)
        assert (batch.tokens.numpy() == tokens[span]).all()
        follows = owner[1:] == owner[:-1]
        labels = np.where(follows[span], tokens[1:][span], IGNORED)
        assert (batch.labels.numpy() == labels).all()
        # positions restart with every piece; pieces end with the document or the window
        for i in range(micro * seq_len):
            position = first * seq_len + i
            restarts = position % seq_len == 0 or owner[position] != owner[position - 1]
            assert batch.positions[i] == (0 if restarts else batch.positions[i - 1] + 1)
            assert bool((batch.cu_seqlens == i).any()) == restarts
        assert batch.cu_seqlens[-1] == len(batch.tokens)
        assert len(batch.cu_seqlens) == seq_len * micro + 1
        pieces = np.diff(batch.cu_seqlens.numpy())
        n_pieces, longest = batch.extent.tolist()
        assert (n_pieces, longest) == ((pieces > 0).sum(), pieces.max())
        assert (pieces[:n_pieces] > 0).all()
        assert batch.sum_squared_lens == (pieces.astype(np.int64) ** 2).sum()


@settings(max_examples=60, deadline=None)
@given(lengths_of_documents, st.integers(1, 16), st.integers(1, 4), st.integers(1, 2), st.integers(1, 5))
def test_ranks_share_a_step_and_the_label_count_needs_no_batches(lengths, seq_len, windows, micro, world):
    windows *= micro
    stream = Stream([(MemoryBins(lengths), 1.0)], 3, VOCAB)
    shape = Shape(seq_len, micro)
    for step in range(3):
        alone = list(batches.train_batches(stream, shape, step, windows, 0, 1))
        ranks = [list(batches.train_batches(stream, shape, step, windows, r, world)) for r in range(world)]
        assert len({len(r) for r in ranks}) == 1  # else a collective would hang
        together = [ranks[i % world][i // world] for i in range(len(alone))]
        for a, b in zip(alone, together, strict=True):
            assert torch.equal(a.tokens, b.tokens)
            assert torch.equal(a.labels, b.labels)
        labels = torch.cat([b.labels for r in ranks for b in r])
        assert int((labels != IGNORED).sum()) == batches.n_labels(stream, seq_len, step, windows)


def test_epochs_are_permutations_that_differ():
    stream = Stream([(MemoryBins([3] * 200), 1.0)], 0, VOCAB)
    first, second = stream.epoch(0).docs, stream.epoch(1).docs
    assert sorted(first) == sorted(second) == list(range(200))
    assert (first != second).any()
    assert (first != np.arange(200)).any()
    assert (Stream([(MemoryBins([3] * 200), 1.0)], 0, VOCAB).epoch(1).docs == second).all()
    assert (Stream([(MemoryBins([3] * 200), 1.0)], 1, VOCAB).epoch(1).docs != second).any()


def test_the_order_never_changes():
    """A run resumed under another numpy must go on in the same order: these numbers may not move."""
    assert Stream([(MemoryBins([3] * 8), 1.0)], 0, VOCAB).epoch(0).docs.tolist() == [3, 2, 1, 6, 0, 7, 4, 5]
    half = Stream([(MemoryBins([3] * 8), 0.5)], 0, VOCAB)  # the halves of a permutation, and not of the files
    assert [half.epoch(e).docs.tolist() for e in range(3)] == [[1, 5, 4, 7], [3, 2, 6, 0], [4, 7, 5, 1]]


@pytest.mark.parametrize("share", [0.1, 0.25, 0.3])
def test_replay_takes_another_part_each_epoch(share):
    stream = Stream([(MemoryBins([5] * 10), 1.0), (MemoryBins([7] * 100), share)], 0, VOCAB)
    taken = [set(stream.epoch(e).docs) - set(range(10)) for e in range(12)]
    assert all(set(range(10)) <= set(stream.epoch(e).docs) for e in range(3))
    assert abs(len(taken[0]) - 100 * share) <= 1
    assert not taken[0] & taken[1]  # another part in the next
    assert set().union(*taken) == set(range(10, 110))  # and in the end all of it


@settings(max_examples=40, deadline=None)
@given(lengths_of_documents, st.integers(1, 16), st.integers(1, 3), st.integers(1, 4))
def test_validation_reads_everything_once(lengths, seq_len, micro, world):
    stream = Stream([(MemoryBins(lengths), 1.0)], None, VOCAB)
    shape = Shape(seq_len, micro)
    ranks = [list(batches.val_batches(stream, shape, r, world)) for r in range(world)]
    assert len({len(r) for r in ranks}) == 1
    found = torch.cat([b.tokens for round_ in zip(*ranks, strict=True) for b in round_])
    expected = np.concatenate(stream.bins[0].documents)
    assert (found.numpy()[: len(expected)] == expected).all()
    n_labels = sum(int((b.labels != IGNORED).sum()) for r in ranks for b in r)
    assert n_labels == len(expected) - len(lengths)  # every token but each document's first is predicted once


def test_a_token_outside_the_vocabulary_is_named(tmp_path):
    write_bins(tmp_path / "set", [[1, 2, 3], [4, 49, 5]], vocab_size=50)
    stream = Stream([(Bins(tmp_path / "set"), 1.0)], None, vocab_size=49)
    with pytest.raises(InputError, match=r"document 1 has token id 49.*vocabulary 49"):
        list(batches.val_batches(stream, Shape(4, 1), 0, 1))


@pytest.mark.parametrize("spec", ["@0", "@-1", "@x", "@nan"])
def test_a_share_that_is_none(spec, tmp_path):
    write_bins(tmp_path / "set", [[1, 2]], vocab_size=50)
    with pytest.raises(InputError, match="share"):
        open_sources([f"{tmp_path / 'set'}{spec}"])


def test_steps_count_from_1(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["batches", "show", "--run", "nowhere", "--step", "0"])
    with pytest.raises((SystemExit, InputError), match="steps count from 1"):
        batches.main()


def test_show_wants_a_runs_folder(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(InputError, match="not a run's folder"):
        batches.show(tmp_path, 1)


@given(
    st.lists(st.tuples(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.sampled_from([1.0, 0.3, 0.55, 2.0, 2.5])),
             min_size=1, max_size=3),
    st.integers(0, 40),
)  # fmt: skip
def test_the_start_of_an_epoch_is_the_number_of_tokens_before_it(sets, epoch):
    """The closed formula against epochs made one after the other; and the epoch at a position is the last that starts there."""
    stream = Stream([(MemoryBins(lengths), share) for lengths, share in sets], 3, VOCAB)
    before = sum(int(stream.lengths[stream._docs(e)].sum()) for e in range(epoch))
    assert stream.start_of(epoch) == before
    found = stream.epoch_at(before)
    assert stream.start_of(found) <= before < stream.start_of(found + 1)


def test_a_late_epoch_is_found_as_fast_as_an_early_one(monkeypatch):
    stream = Stream([(MemoryBins([3] * 10), 1.0)], 0, VOCAB)
    calls, real = [], stream.start_of
    monkeypatch.setattr(stream, "start_of", lambda epoch: calls.append(epoch) or real(epoch))
    assert stream.epoch_at(95_000 * 30 + 7) == 95_000
    assert len(calls) < 50


def test_padding_is_no_work():
    """What a rank without a window computes does not count as attention that the model needs."""
    stream = Stream([(MemoryBins([4, 4]), 1.0)], None, VOCAB)
    whole, half, none = (batches.pack(stream, window, Shape(8, 1), stop) for window, stop in ((0, 8), (0, 4), (1, 8)))
    assert [b.sum_squared_lens for b in (whole, half, none)] == [32, 16, 0]
