"""Shards: what is encoded once is never encoded again, whoever encoded it and however the run ended."""

import pickle

import pytest
import torch
from torch.utils.data import DataLoader

from mmesid.trainer.encoders import encoding
from mmesid.trainer.encoders.encoding import encode


TEXTS = [f"{'word ' * (number % 7)}{number}" for number in range(50)]


class Counting:
    """Embeds a text as its length and a number that depends on the batch it stands in, which must not change."""

    pooling = "none"

    def __init__(self, fail_after: int | None = None):
        self.batches = []
        self.fail_after = fail_after

    def prepare(self, texts):
        return texts

    def embed(self, batch):
        if len(self.batches) == self.fail_after:
            raise RuntimeError("out of memory")
        self.batches.append(batch)
        widest = max(len(text) for text in batch)
        return torch.tensor([[float(len(text)), widest + hash_of(text)] for text in batch])


def hash_of(text: str) -> float:
    return sum(ord(letter) * (position + 1) for position, letter in enumerate(text)) / 7


def run(encoder, directory, **settings):
    settings = {"batch_size": 4, "shard_size": 12, "disable_tqdm": True} | settings
    return encode(encoder, directory, texts=TEXTS, **settings)


def test_embeddings_come_in_the_order_of_the_texts_and_batches_in_that_of_their_lengths(tmp_path):
    encoder = Counting()
    embeddings = run(encoder, tmp_path)
    assert embeddings[:, 0].tolist() == [len(text) for text in TEXTS] and embeddings.dtype == torch.float32
    lengths = [len(text) for batch in encoder.batches for text in batch]
    assert lengths == sorted(lengths, reverse=True) and [len(batch) for batch in encoder.batches] == [4] * 12 + [2]
    assert len(list(tmp_path.iterdir())) == 5, "13 batches, 3 per shard"
    assert not list(tmp_path.glob(".*")), "a partial shard was left behind"


def test_an_interrupted_run_goes_on_where_it_stood(tmp_path):
    whole = run(Counting(), tmp_path / "whole")
    with pytest.raises(RuntimeError, match="out of memory"):
        run(Counting(fail_after=8), tmp_path / "resumed")
    assert len(list((tmp_path / "resumed").iterdir())) == 2, "two shards were done, the third was not"
    (tmp_path / "resumed" / ".000002.safetensors.partial").write_bytes(b"what a kill in the middle of writing leaves")
    encoder = Counting()
    assert torch.equal(run(encoder, tmp_path / "resumed"), whole)
    assert len(encoder.batches) == 13 - 6
    encoder = Counting()
    assert torch.equal(run(encoder, tmp_path / "resumed"), whole) and not encoder.batches


def test_workers_of_the_data_loader_change_nothing(tmp_path):
    alone = run(Counting(), tmp_path / "alone")
    assert torch.equal(run(Counting(), tmp_path / "workers", num_workers=2), alone)


def test_workers_that_start_from_nothing_get_all_they_need(tmp_path, monkeypatch):
    """From Python 3.14 on workers are not forked any more: what they run reaches them pickled."""
    monkeypatch.setattr(encoding, "DataLoader", lambda *args, **kwargs: DataLoader(*copied(args), **copied(kwargs)))
    assert run(Counting(), tmp_path)[:, 0].tolist() == [len(text) for text in TEXTS]


def copied(value):
    return pickle.loads(pickle.dumps(value))


def test_fewer_inputs_than_a_batch(tmp_path):
    assert encode(Counting(), tmp_path, texts=["a"], disable_tqdm=True).shape == (1, 2)
