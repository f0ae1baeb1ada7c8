"""The generative baseline: IDs, the trie, and a beam search against the likelihood of every item."""

import importlib
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import T5ForConditionalGeneration

import mmesid
from mmesid.trainer.metrics.ranking.ranking import metrics


BASELINES = Path(__file__).parents[2] / "examples" / "baselines"


@pytest.fixture(scope="module")
def tiger():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BASELINES))
        yield importlib.import_module("tiger")


# Two modalities, two levels of three codes; items 2 and 4 share all codes, and item 3 lacks the second modality.
CODES = {
    "text": torch.tensor([[-1, -1], [0, 1], [2, 1], [2, 0], [2, 1]]),
    "visual": torch.tensor([[-1, -1], [1, 1], [0, 2], [-1, -1], [0, 2]]),
}
TOKENS = [[1, 6, 10, 14, 17], [3, 6, 9, 15, 17], [3, 5, 12, 16, 17], [3, 6, 9, 15, 18]]


def test_ids_have_tokens_of_their_own_at_each_level_and_a_last_one_that_tells_items_apart(tiger):
    tokens = tiger.item_tokens(CODES, 3)
    assert tokens[0].tolist() == [0] * 5
    assert tokens[1:].tolist() == TOKENS


def test_the_trie_allows_what_an_item_continues_with(tiger):
    trie = tiger.ItemTrie(tiger.item_tokens(CODES, 3))
    root = torch.zeros(3, dtype=torch.long)
    begun = trie.children(root, torch.tensor([3, 1, 2]))
    allowed = torch.isfinite(trie.restrict(torch.cat([begun, root[:1]]), torch.zeros(4, trie.vocab_size)))
    assert [row.nonzero()[:, 0].tolist() for row in allowed] == [[5, 6], [6], [], [1, 3]]
    written = torch.tensor([*TOKENS, [3, 6, 9, 15, 16]])
    nodes = torch.zeros(5, dtype=torch.long)
    for tokens in written.unbind(1):
        nodes = trie.children(nodes, tokens)
    assert trie.item_of_node[nodes].tolist() == [1, 2, 3, 4, 0]


def test_every_prefix_is_an_example_and_only_the_latest_items_are_read(tiger):
    tokens = np.arange(10)[:, None] + np.array([[0, 10]])
    sequences = mmesid.trainer.data.prepared.Sequences(
        ["a", "b"], np.array([1, 2, 3, 4], dtype=np.int32), np.array([0, 3, 4]), np.array([5, 6], dtype=np.int32)
    )
    examples = [
        (one["input_ids"].tolist(), one["labels"].tolist()) for one in tiger.Prefixes(sequences, tokens, 2, every=True)
    ]
    assert examples == [
        ([1, 11], [2, 12]),
        ([1, 11, 2, 12], [3, 13]),
        ([2, 12, 3, 13], [5, 15]),
        ([4, 14], [6, 16]),
    ]
    held_out = tiger.Prefixes(sequences, tokens, 2, every=False)
    assert [one["input_ids"].tolist() for one in held_out] == [[2, 12, 3, 13], [4, 14]]


@pytest.fixture(scope="module")
def flags(run_dir, tmp_path_factory) -> list[str]:
    directory = tmp_path_factory.mktemp("tiger")
    return [
        "--prepared_dir", str(run_dir / "prepared"), "--quantizer_dir", str(run_dir / "quantizer"),
        "--output_dir", str(directory / "small"), "--max_history", "5", "--hidden_size", "16", "--num_layers", "1",
        "--num_heads", "2", "--num_train_epochs", "1", "--num_beams", "80", "--use_cpu", "true",
        "--disable_tqdm", "true", "--learning_rate", "0.01",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def output_dir(tiger, flags) -> Path:
    tiger.main(flags)
    return Path(flags[5])


def test_a_beam_that_holds_all_items_ranks_them_by_their_likelihood(tiger, output_dir, run_dir):
    data = mmesid.PreparedDataset.load(run_dir / "prepared")
    codes = pq.read_table(run_dir / "quantizer" / "semantic_ids.parquet")["text"].to_pylist()
    table = torch.tensor([[-1, -1], *(row or [-1, -1] for row in codes)])
    tokens = torch.from_numpy(tiger.item_tokens({"text": table}, 8))
    model = T5ForConditionalGeneration.from_pretrained(output_dir).eval()
    sequences, expected = data.sequences("test"), []
    for example in sequences:
        history = torch.from_numpy(example["history"].astype(np.int64))
        read = tokens[history[-5:]].reshape(1, -1).expand(data.num_items, -1)
        with torch.no_grad():
            logits = model(input_ids=read, labels=tokens[1:]).logits
        scores = logits.log_softmax(-1).gather(2, tokens[1:, :, None]).sum((1, 2))
        scores[history - 1] = -torch.inf
        expected.append(int((scores >= scores[example["target"] - 1]).sum()))
    ranks = pq.read_table(output_dir / "evaluation" / "ranks" / "test.parquet")
    assert ranks["user_id"].to_pylist() == sequences.user_ids
    assert ranks["target"].to_pylist() == sequences.targets.tolist()
    # Rounding may turn neighbours round.
    found = ranks["small"].to_numpy()
    assert np.abs(found - expected).max() <= 1 and (found == expected).mean() > 0.9
    results = json.loads((output_dir / "evaluation" / "results.json").read_text())["small"]
    assert results["test"] == pytest.approx(metrics(found)) and results["synthetic"]
    assert results["trainings"][0]["parameters"] == model.num_parameters()


def test_a_target_beyond_the_beam_is_the_last_of_the_catalogue(tiger, output_dir, run_dir):
    data = mmesid.PreparedDataset.load(run_dir / "prepared")
    codes = tiger.read_semantic_ids(run_dir / "quantizer" / "semantic_ids.parquet", data.item_ids, ["text"])
    tokens = tiger.item_tokens(codes, 8)
    model = T5ForConditionalGeneration.from_pretrained(output_dir)
    ranks = tiger.beam_ranks(
        model, tiger.ItemTrie(tokens), data.sequences("test"), tokens, 5, num_beams=4, batch_size=7
    )
    assert set(ranks) <= {1, 2, 3, 4, data.num_items} and (ranks == data.num_items).any()


def test_what_is_up_to_date_is_skipped_and_another_search_needs_no_training(tiger, output_dir, flags, capsys):
    tiger.main(flags)
    assert capsys.readouterr().out.count("is up to date, skipped") == 2
    tiger.main([*flags, "--num_beams", "3"])
    said = capsys.readouterr().out
    assert said.count("is up to date, skipped") == 1 and "evaluate: wrote" in said
    ranks = pq.read_table(output_dir / "evaluation" / "ranks" / "test.parquet")["small"].to_numpy()
    assert set(ranks) <= {1, 2, 3, ranks.max()}
    with pytest.raises(ValueError, match="--hidden_size 16 is no multiple of --num_heads 3"):
        tiger.main([*flags, "--num_heads", "3"])
