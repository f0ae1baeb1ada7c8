# /// script
# requires-python = ">=3.11"
# dependencies = ["mmesid", "numpy", "pyarrow", "torch", "tqdm", "transformers"]
#
# [tool.uv.sources]
# mmesid = { path = "../..", editable = true }
# ///
"""
A generative baseline in the style of TIGER ([Rajput et al., 2023](https://arxiv.org/abs/2305.05065)): a small T5 reads
the semantic IDs of a history, code by code, and writes that of the next item. A beam search that can only write IDs of
items ranks the catalogue.

    python examples/baselines/tiger.py --prepared_dir runs/beauty/prepared --quantizer_dir runs/beauty/quantizer \
        --output_dir runs/beauty/tiger --modalities text
    python examples/baselines/tiger.py --help

The IDs are those of `mmesid quantize`; a last token tells items apart that share all codes. Every prefix of a training
sequence is an example. The epoch with the least loss on validation is kept. Unlike the original there is no token for
the user, and the optimizer is that of `transformers`.

Ranks follow the protocol of `mmesid evaluate`: whole catalogue, history masked, ties against the target. Nothing is
known beyond the beam, and a target there counts as the last of the catalogue: metrics at a k that the beam, less the
history's items in it, reaches are those of this search; the MRR is a lower bound. The T5 goes to the output directory,
its ranks and results to `evaluation/` in it, as `mmesid evaluate` writes them, so that `mmesid compare` reads them
beside others. An interrupted training resumes, and what is up to date is skipped.
"""

import dataclasses
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm.auto import tqdm
from transformers import T5Config, T5ForConditionalGeneration, Trainer, set_seed
from transformers.modeling_outputs import BaseModelOutput

from mmesid.trainer.data.prepared import PreparedDataset, Sequences
from mmesid.trainer.quantizer.semantic_ids import SEMANTIC_IDS_NAME, read_semantic_ids
from mmesid.trainer.recommender.evaluation import SPLITS, results_page, summarize
from mmesid.trainer.running.arguments import (
    BestEpochTrainingArguments,
    ReaderArguments,
    check_ranges,
    parse,
)
from mmesid.trainer.running.errors import one_sentence
from mmesid.trainer.running.help import HELP_FLAGS
from mmesid.trainer.running.records import StageRun
from mmesid.trainer.running.training import early_stopping, fit, trainer_arguments
from mmesid.trainer.stages.evaluate import training_of
from modeling_mmesid import MMRQVAEConfig
from modeling_mmesid.modeling_mmesid import CACHE_NAME
from modeling_mmesid.recommendation import evaluating, pad_histories


PAD = 0  # Pads inputs, and starts what the decoder writes.
BOOTSTRAP_RESAMPLES = 1000
# Settings of the search, which the training does not depend on.
SEARCH_ARGUMENTS = ("num_beams", "beam_batch_size")


@dataclass(kw_only=True)
class TigerTrainingArguments(BestEpochTrainingArguments):
    """Arguments of the training."""

    metric_names: ClassVar[tuple[str, ...]] = ("loss",)

    metric_for_best_model: str | None = "loss"
    per_device_train_batch_size: int = 256
    num_train_epochs: float = 30
    train_sampling_strategy: str = "group_by_length"
    remove_unused_columns: bool | None = False


@dataclass(kw_only=True)
class TigerArguments(ReaderArguments):
    """
    --prepared_dir, --quantizer_dir, --output_dir: directories of the stages `prepare` and `quantize`, and the new one.
    --modalities (text): whose codes an ID has, one after the other.
    --max_history (20): latest items of a history that are read.
    --hidden_size (128), --num_layers (2, of encoder and decoder each), --num_heads (4): the T5's sizes.
    --num_beams (50), --beam_batch_size (16): how wide the search is, and users at a time.
    --num_train_epochs (30), --learning_rate (0.001), --seed ...: all flags of transformers.TrainingArguments.
    --force true: run even if the output directory is up to date.
    """

    training_class = TigerTrainingArguments

    quantizer_dir: str
    modalities: list[str] = field(default_factory=lambda: ["text"])
    max_history: int = 20
    hidden_size: int = 128
    num_layers: int = 2
    num_heads: int = 4
    num_beams: int = 50
    beam_batch_size: int = 16

    def __post_init__(self):
        super().__post_init__()
        sizes = "max_history", "hidden_size", "num_layers", "num_heads", "num_beams", "beam_batch_size"
        check_ranges(self, positive=sizes)
        if self.hidden_size % self.num_heads:
            raise ValueError(f"--hidden_size {self.hidden_size} is no multiple of --num_heads {self.num_heads}.")
        if not self.modalities:
            raise ValueError("--modalities names none, and an ID would be empty; name one.")


def item_tokens(codes: dict[str, torch.Tensor], codebook_size: int) -> np.ndarray:
    """
    What an item is to the T5, `(items + 1, levels of all modalities + 1)`; each level has tokens of its own, from 1.
    The last token counts the items before that have the same codes. A modality that an item lacks has a code of its
    own. Row 0 is 0.
    """
    joined = torch.cat(list(codes.values()), dim=1).numpy()[1:]
    joined = np.where(joined < 0, codebook_size, joined)
    _, owners = np.unique(joined, axis=0, return_inverse=True)
    order = np.argsort(owners, kind="stable")
    counts = np.bincount(owners)
    place = np.empty(len(owners), dtype=np.int64)
    place[order] = np.arange(len(owners)) - np.repeat(np.cumsum(counts) - counts, counts)
    tokens = np.concatenate([joined, place[:, None]], axis=1)
    tokens += 1 + (codebook_size + 1) * np.arange(tokens.shape[1])
    return np.pad(tokens, ((1, 0), (0, 0)))


class Prefixes(torch.utils.data.Dataset):
    """
    Histories and what follows them, as tokens: of training sequences every prefix, of held-out ones the whole history.

    Args:
        sequences (`Sequences`): A split.
        tokens (`np.ndarray`): What [`item_tokens`] returns.
        max_history (`int`): Latest items that are read.
        every (`bool`): Whether every item but a user's first is a target, or only the split's own.
    """

    def __init__(self, sequences: Sequences, tokens: np.ndarray, max_history: int, every: bool):
        self.tokens = tokens
        # A user's items are the history with the target behind it.
        self.items = np.insert(sequences.histories, sequences.offsets[1:], sequences.targets)
        first = sequences.offsets[:-1] + np.arange(len(sequences))
        last = sequences.offsets[1:] + np.arange(len(sequences))
        if every:
            first, last = np.repeat(first, last - first), np.delete(np.arange(len(self.items)), first)
        self.targets = last
        self.starts = np.maximum(first, last - max_history)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        target = self.targets[index]
        history = self.items[self.starts[index] : target]
        return {"input_ids": self.tokens[history].reshape(-1), "labels": self.tokens[self.items[target]]}


def collate(examples: list[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
    input_ids = pad_histories([example["input_ids"] for example in examples])
    labels = torch.from_numpy(np.stack([example["labels"] for example in examples]))
    return {"input_ids": input_ids, "attention_mask": (input_ids != PAD).long(), "labels": labels}


class ItemTrie:
    """
    The IDs of all items, as compressed rows: which tokens continue a beginning of an ID, for many of them at once.
    Beginnings are nodes; 0 is the empty one, and -1 stands for what begins no ID.

    Args:
        tokens (`np.ndarray`): What [`item_tokens`] returns.
    """

    def __init__(self, tokens: np.ndarray):
        self.depth, self.vocab_size = tokens.shape[1], int(tokens.max()) + 1
        parents, edges, nodes = np.zeros(len(tokens) - 1, dtype=np.int64), [], 1
        for level in range(self.depth):
            keys, children = np.unique(parents * self.vocab_size + tokens[1:, level], return_inverse=True)
            # Nodes of a level come behind all earlier ones, and so do their edges: the keys stay in order.
            edges.append(keys)
            parents = nodes + children
            nodes += len(keys)
        # The edge to node n stands at place n - 1.
        self.edges = torch.from_numpy(np.concatenate(edges))
        self.first_edge = torch.searchsorted(self.edges, torch.arange(nodes + 1) * self.vocab_size)
        # The item whose ID ends at a node, 0 elsewhere; -1 is the last of them, which no item must have.
        self.item_of_node = torch.zeros(nodes + 1, dtype=torch.long)
        self.item_of_node[parents] = torch.arange(1, len(tokens))

    def children(self, nodes: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """The nodes that `tokens` lead to from `nodes`, `(beams,)` each."""
        keys = nodes * self.vocab_size + tokens
        places = torch.searchsorted(self.edges, keys).clamp_(max=len(self.edges) - 1)
        return torch.where((nodes >= 0) & (self.edges[places] == keys), places + 1, -1)

    def restrict(self, nodes: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores `(beams, tokens)` with minus infinity where a token does not continue the node `(beams,)`."""
        first = self.first_edge[nodes]
        counts = torch.where(nodes >= 0, self.first_edge[nodes + 1] - first, 0)
        rows = torch.arange(len(nodes)).repeat_interleave(counts)
        edges = torch.arange(len(rows)) + (first - counts.cumsum(0) + counts)[rows]
        allowed = torch.zeros(scores.shape, dtype=torch.bool)
        allowed[rows, self.edges[edges] % self.vocab_size] = True
        return scores.masked_fill(~allowed.to(scores.device), -torch.inf)


@torch.no_grad()
def beam_search(
    model: T5ForConditionalGeneration,
    trie: ItemTrie,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    num_beams: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Items `(batch, beams)`, best first, and the logarithm of their likelihood; 0 and minus infinity where there are
    fewer items than beams. Does what `generate` does with `prefix_allowed_tokens_fn`, but what the decoder reads of
    the encoder is computed once for a user and not for every beam, nor moved when beams are.
    """
    batch, beams, device = len(input_ids), 1, input_ids.device
    states = model.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
    nodes, scores, cache = torch.zeros(batch, dtype=torch.long), torch.zeros(batch, 1), None
    last = torch.full((batch, 1), PAD, device=device)
    for _ in range(trie.depth):
        output = model(
            encoder_outputs=BaseModelOutput(states),
            attention_mask=attention_mask,
            decoder_input_ids=last,
            use_cache=True,
            **{CACHE_NAME: cache},
        )
        continued = trie.restrict(nodes, output.logits[:, -1].float().log_softmax(-1).cpu())
        candidates = (scores.view(-1, 1) + continued).view(batch, -1)
        scores, best = candidates.topk(min(num_beams, candidates.shape[1]))
        tokens = best % trie.vocab_size
        rows = (torch.arange(batch)[:, None] * beams + best // trie.vocab_size).flatten()
        nodes = trie.children(nodes[rows], tokens.flatten())
        cache = output[CACHE_NAME]
        cache.self_attention_cache.reorder_cache(rows)
        if best.shape[1] != beams:
            cache.cross_attention_cache.reorder_cache(rows)
            states, attention_mask = states[rows.to(device)], attention_mask[rows.to(device)]
            beams = best.shape[1]
        last = tokens.view(-1, 1).to(device)
    return trie.item_of_node[nodes].view(batch, beams), scores


def beam_ranks(
    model: T5ForConditionalGeneration,
    trie: ItemTrie,
    sequences: Sequences,
    tokens: np.ndarray,
    max_history: int,
    num_beams: int,
    batch_size: int,
) -> np.ndarray:
    """
    Rank `(users,)` of each user's target among the items of the beam that are not in the history, ties against it; the
    number of items where the beam does not hold it.
    """
    prefixes = Prefixes(sequences, tokens, max_history, every=False)
    ranks = np.full(len(sequences), len(tokens) - 1, dtype=np.int64)
    # Histories of like length share a batch.
    order = np.argsort(np.diff(sequences.offsets), kind="stable")
    with evaluating(model):
        for start in tqdm(range(0, len(order), batch_size), desc="Beam search", leave=False, delay=2):
            users = order[start : start + batch_size]
            batch = collate([prefixes[user] for user in users])
            read = (batch[name].to(model.device) for name in ("input_ids", "attention_mask"))
            items, scores = beam_search(model, trie, *read, num_beams)
            seen = pad_histories([sequences[user]["history"] for user in users])
            counts = (items > 0) & ~(items[:, :, None] == seen[:, None, :]).any(-1)
            hit = counts & (items == torch.from_numpy(sequences.targets[users].astype(np.int64))[:, None])
            target_score = scores.masked_fill(~hit, torch.inf).amin(1, keepdim=True)
            found = hit.any(1).numpy()
            ranks[users[found]] = (counts & (scores >= target_score)).sum(1).numpy()[found]
    return ranks


def new_t5(vocab_size: int, arguments: TigerArguments) -> T5ForConditionalGeneration:
    config = T5Config(
        vocab_size=vocab_size,
        d_model=arguments.hidden_size,
        d_kv=arguments.hidden_size // arguments.num_heads,
        d_ff=4 * arguments.hidden_size,
        num_layers=arguments.num_layers,
        num_heads=arguments.num_heads,
        pad_token_id=PAD,
        decoder_start_token_id=PAD,
        # All IDs are equally long: nothing has to say where they end.
        eos_token_id=None,
    )
    return T5ForConditionalGeneration(config)


def main(argv: list[str] | None = None) -> None:
    arguments = parse(TigerArguments, argv)
    inputs = {"prepared_dir": arguments.prepared_dir, "quantizer_dir": arguments.quantizer_dir}
    changed = {name: value for name, value in arguments.changed.items() if name not in SEARCH_ARGUMENTS}
    directory, force = Path(arguments.output_dir), arguments.force
    settings = dataclasses.asdict(arguments)
    training = StageRun(
        "tiger", SimpleNamespace(output_dir=directory, force=force, changed=changed, settings=settings), inputs
    )
    if not training.is_up_to_date():
        train(arguments, training)
    searched = {name: value for name, value in arguments.changed.items() if name == "num_beams"}
    evaluation = StageRun(
        "evaluate",
        SimpleNamespace(output_dir=directory / "evaluation", force=force, changed=searched, settings=settings),
        inputs | {"model_dir": directory},
    )
    if not evaluation.is_up_to_date():
        evaluate(arguments, evaluation)


def read_tokens(arguments: TigerArguments, data: PreparedDataset) -> np.ndarray:
    """What [`item_tokens`] returns for the quantizer's IDs."""
    codebook_size = MMRQVAEConfig.from_pretrained(arguments.quantizer_dir).codebook_size
    path = Path(arguments.quantizer_dir) / SEMANTIC_IDS_NAME
    return item_tokens(read_semantic_ids(path, data.item_ids, arguments.modalities), codebook_size)


def train(arguments: TigerArguments, run: StageRun) -> None:
    """Trains the T5 and writes the epoch that has the least loss on validation."""
    data = PreparedDataset.load(arguments.prepared_dir)
    tokens = read_tokens(arguments, data)
    with run as staging:
        training = trainer_arguments(arguments, run)
        set_seed(training.seed)
        model = new_t5(int(tokens.max()) + 1, arguments)
        trainer = Trainer(
            model,
            training,
            data_collator=collate,
            train_dataset=Prefixes(data.sequences("train"), tokens, arguments.max_history, every=True),
            eval_dataset=Prefixes(data.sequences("validation"), tokens, arguments.max_history, every=False),
            callbacks=early_stopping(training),
        )
        fit(trainer)
        run.metrics["validation"] = {"loss": trainer.evaluate()["eval_loss"]}
        run.details.update(data=data.statistics, modalities=arguments.modalities, parameters=model.num_parameters())
        model.save_pretrained(staging)


def evaluate(arguments: TigerArguments, run: StageRun) -> None:
    """Ranks by beam search and writes what `mmesid evaluate` writes."""
    data = PreparedDataset.load(arguments.prepared_dir)
    tokens, directory = read_tokens(arguments, data), Path(arguments.output_dir)
    name, trie = directory.absolute().name, ItemTrie(tokens)
    model = T5ForConditionalGeneration.from_pretrained(directory).to(arguments.training.device)
    settings = arguments.max_history, arguments.num_beams, arguments.beam_batch_size
    with run as staging:
        ranks = {split: beam_ranks(model, trie, data.sequences(split), tokens, *settings) for split in SPLITS}
        result = summarize(ranks, data, 0, BOOTSTRAP_RESAMPLES)
        run.metrics[name] = result
        run.details.update(data=data.statistics)
        marked = {"synthetic": data.statistics["synthetic"], "trainings": [training_of(directory)]} | result
        (staging / "results.json").write_text(json.dumps({name: marked}, indent=2) + "\n", encoding="utf-8")
        page = results_page({name: result}, data.statistics)
        (staging / "results.md").write_text(page, encoding="utf-8")
        (staging / "ranks").mkdir()
        for split, values in ranks.items():
            sequences = data.sequences(split)
            columns = {"user_id": sequences.user_ids, "target": sequences.targets, name: values.astype(np.int32)}
            pq.write_table(pa.table(columns), staging / "ranks" / f"{split}.parquet")
    print(page)


if __name__ == "__main__":
    if not HELP_FLAGS.isdisjoint(sys.argv[1:]):
        print(__doc__, TigerArguments.__doc__, sep="\n")
    else:
        with one_sentence("tiger", sys.argv[1:]):
            main()
