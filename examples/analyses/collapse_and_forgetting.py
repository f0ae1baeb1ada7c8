# /// script
# requires-python = ">=3.11"
# dependencies = ["matplotlib", "mmesid", "numpy", "safetensors", "torch", "transformers"]
#
# [tool.uv.sources]
# mmesid = { path = "../..", editable = true }
# ///
"""
The two claims of the paper on a run of one's own: which directions of the decoder's input the items use (collapse),
and what is left in the code vectors of the distances between items (forgetting), before and after fine-tuning.

    python examples/analyses/collapse_and_forgetting.py --run_dir runs/beauty --recommenders paper all_modalities
    python examples/analyses/collapse_and_forgetting.py --run_dir runs/beauty --recommenders gemma=runs/gemma/paper
    python examples/analyses/collapse_and_forgetting.py --run_dir runs/beauty --hidden_size 4096    # before, any width

Written to `--output_dir` are `results.md`, `results.json` (the same figures, with all singular values) and the
pictures `collapse`, `fine_tuning` and `forgetting` as PNG and SVG. The decoder itself is not loaded: only its width
decides what items can be. What an item was before fine-tuning is drawn anew from the recommender's settings.

The recommenders must have been trained on the run's embeddings and quantizer, in one width. They are given by the name
of their directory in the run, or as name=directory; one that was saved in Python, without a record, counts as started
from trained code vectors.
"""

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors import safe_open
from transformers.utils import CONFIG_NAME, logging

import drawing
import mmesid
from mmesid.trainer.data.prepared import PreparedDataset
from mmesid.trainer.data.tables import EmbeddingTable, load_table, table_path
from mmesid.trainer.metrics.collapse.collapse import collapse_metrics, singular_values
from mmesid.trainer.metrics.forgetting.forgetting import group_taus
from mmesid.trainer.quantizer.evaluation import history_pairs, quantized_rows
from mmesid.trainer.quantizer.items import READ_ITEMS
from mmesid.trainer.quantizer.semantic_ids import SEMANTIC_IDS_NAME, read_semantic_ids
from mmesid.trainer.running.records import RECORD_NAME, StageRecord, require_exists, write_text_atomic
from modeling_mmesid import MMESIDConfig, MMRQVAEModel
from modeling_mmesid.checkpoints import require_fit, weight_files
from modeling_mmesid.items_mmesid import MMESIDItems


logging.set_verbosity_error()

PAPER_FORM = {"share_item_table": False, "use_item_ids": False}
# What decides, beside width, modalities and codes, from where item tokens start.
TOKEN_SETTINGS = ("share_item_table", "use_item_ids", "initializer_range")
ITEMS_PREFIX = "model.items."
COLLAPSE_COLUMNS = ("information_abundance", "effective_rank", "collapsed_dimensions")
# Users of a split are sampled with the seed that `mmesid quantize` samples them with.
SEED = 42


@dataclass
class Catalogue:
    """What recommenders are built from: users and items, and for each modality of the quantizer its table and codes
    `(items + 1, levels)`."""

    data: PreparedDataset
    quantizer: MMRQVAEModel
    tables: dict[str, EmbeddingTable]
    codes: dict[str, torch.Tensor]

    @classmethod
    def load(cls, prepared_dir: Path, embeddings_dir: Path, quantizer_dir: Path) -> "Catalogue":
        data = PreparedDataset.load(prepared_dir)
        require_exists(quantizer_dir)
        quantizer = MMRQVAEModel.from_pretrained(quantizer_dir)
        modalities = quantizer.config.modalities
        tables = {name: load_table(table_path(embeddings_dir, name), name, data.num_items) for name in modalities}
        return cls(
            data, quantizer, tables, read_semantic_ids(quantizer_dir / SEMANTIC_IDS_NAME, data.item_ids, modalities)
        )

    def start(
        self,
        hidden_size: int,
        modalities: list[str] | None = None,
        has_codes: bool = True,
        code_initialization: Literal["trained", "random"] = "trained",
        **settings,
    ) -> MMESIDItems:
        """Items as fine-tuning finds them, of a decoder of this width: any will do, so one layer is made."""
        tables = self.tables if modalities is None else {name: self.tables[name] for name in modalities}
        model, _ = mmesid.build_recommender(
            self.data,
            tables,
            self.quantizer if has_codes else None,
            {name: self.codes[name] for name in tables} if has_codes else None,
            code_initialization=code_initialization,
            hidden_size=hidden_size,
            num_hidden_layers=1,
            user_prompt="{items}",
            **settings,
        )
        return model.eval().model.items


@dataclass
class Recommender:
    """The items of a checkpoint, and from which code vectors its training started: trained ones, as by default, where
    `mmesid finetune` left no record of it."""

    items: MMESIDItems
    code_initialization: Literal["trained", "random"]

    @classmethod
    def load(cls, directory: Path, catalogue: Catalogue) -> "Recommender":
        require_exists(directory / CONFIG_NAME)
        initialization = "trained"
        if (directory / RECORD_NAME).is_file():
            record = StageRecord.load(directory)
            if record.stage != "finetune":
                raise ValueError(f"'{directory}' was written by the stage '{record.stage}'; name recommenders.")
            initialization = record.arguments.get("code_initialization", "trained")
        config = MMESIDConfig.from_pretrained(directory)
        items = MMESIDItems(config).eval()
        weights = {}
        for path in weight_files(directory):
            with safe_open(path, framework="pt") as file:
                names = [name for name in file.keys() if name.startswith(ITEMS_PREFIX)]
                weights |= {name.removeprefix(ITEMS_PREFIX): file.get_tensor(name) for name in names}
        keys = items.load_state_dict(weights, strict=False)
        require_fit(directory, keys.missing_keys, keys.unexpected_keys)
        recommender = cls(items, initialization)
        recommender._check(directory, catalogue)
        return recommender

    def _check(self, directory: Path, catalogue: Catalogue) -> None:
        """Raises `ValueError` unless the checkpoint was made from the catalogue."""
        config = self.items.config
        if config.num_items != catalogue.data.num_items:
            raise ValueError(
                f"'{directory}' knows {config.num_items} items, the run {catalogue.data.num_items}; give the run "
                "that it was trained in."
            )
        for name, modality in self.items.modalities.items():
            if name not in catalogue.tables:
                raise ValueError(
                    f"'{directory}' has the modality '{name}', the run's quantizer only "
                    f"{', '.join(catalogue.tables)}; give the run that it was trained in."
                )
            present = modality.present
            same = torch.equal(present, catalogue.tables[name].present)
            if same and config.num_quantizers:
                same = torch.equal(modality.codes[present], catalogue.codes[name][present])
            if not same:
                raise ValueError(
                    f"'{directory}' has other codes of '{name}' than the run's quantizer gave; give the run that it "
                    "was trained in."
                )

    def start(self, catalogue: Catalogue) -> MMESIDItems:
        config = self.items.config
        return catalogue.start(
            config.hidden_size,
            config.modalities,
            config.num_quantizers > 0,
            self.code_initialization,
            **{name: getattr(config, name) for name in TOKEN_SETTINGS},
        )


@dataclass
class Spectrum:
    """Singular values of one kind of item tokens, before fine-tuning and after it where that is known."""

    items: str
    tokens: str
    before: np.ndarray
    after: np.ndarray | None = None

    def as_json(self) -> dict:
        entry: dict = {"items": self.items, "tokens": self.tokens}
        for state, values in (("before", self.before), ("after", self.after)):
            if values is not None:
                entry[state] = collapse_metrics(values) | {"singular_values": values.tolist()}
        return entry


@dataclass
class Taus:
    """Kendall's tau of every user, `(users,)`, by modality, between distances of the embeddings and of the code
    vectors of one state."""

    state: str
    by_modality: dict[str, np.ndarray] = field(default_factory=dict)

    def as_json(self) -> dict:
        return {
            "state": self.state,
            "modalities": {
                name: {"tau": float(taus.mean()), "half_width_95": half_width(taus), "users": len(taus)}
                for name, taus in self.by_modality.items()
            },
        }


def half_width(taus: np.ndarray) -> float:
    """Half of the 95% interval of the mean over users."""
    return float(1.96 * taus.std() / np.sqrt(len(taus)))


@torch.no_grad()
def spectra_of(items: MMESIDItems) -> dict[str, np.ndarray]:
    """Singular values `(hidden,)` of what a decoder could be given for all items: each embedding, linearly projected;
    their concatenation, projected; and the recommender's own item tokens."""
    rows = torch.arange(1, items.config.num_items + 1)
    projected = {name: modality.project(rows) for name, modality in items.modalities.items()}
    tokens = {f"{name}, projected": vectors for name, vectors in projected.items()}
    if len(projected) > 1:
        # A linear map of a concatenation is the sum of a map for each part.
        tokens["concatenation, projected"] = torch.stack(list(projected.values())).sum(0)
    tokens["item tokens"] = items.tokens(rows)
    return {name: singular_values(vectors.numpy()) for name, vectors in tokens.items()}


def measure_collapse(
    catalogue: Catalogue, recommenders: dict[str, Recommender], hidden_size: int
) -> tuple[list[Spectrum], list[Spectrum]]:
    """The spectra at the start, by kind of token, and those of the recommenders."""
    starts = [
        Spectrum("at the start", f"MME-SID, {name}" if tokens == "item tokens" else tokens, values)
        for name, settings in (("paper's form", PAPER_FORM), ("default form", {}))
        for tokens, values in spectra_of(catalogue.start(hidden_size, **settings)).items()
        # Projections start alike in either form.
        if tokens == "item tokens" or settings
    ]
    trained = []
    for name, recommender in recommenders.items():
        before, after = spectra_of(recommender.start(catalogue)), spectra_of(recommender.items)
        trained += [Spectrum(name, tokens, before[tokens], after[tokens]) for tokens in after]
    return starts, trained


@torch.no_grad()
def measure_forgetting(catalogue: Catalogue, recommenders: dict[str, Recommender], hidden_size: int) -> list[Taus]:
    """Taus between the distances from targets to histories, on validation: of embeddings and of the vectors that
    stand for the codes."""
    sequences = catalogue.data.sequences("validation")
    quantized, starts = Taus("after quantization"), {}
    for initialization in ("trained", "random"):
        items = catalogue.start(hidden_size, code_initialization=initialization, **PAPER_FORM)
        starts[initialization] = items, Taus(f"{initialization} code vectors, before fine-tuning")
    tuned = {
        name: Taus(f"{name}, fine-tuned from {recommender.code_initialization} code vectors")
        for name, recommender in recommenders.items()
        if recommender.items.config.num_quantizers
    }
    for modality, (embeddings, present) in catalogue.tables.items():
        groups, targets, histories = history_pairs(present, sequences, SEED)
        before = distances(embeddings, targets, histories)

        def taus(vectors: torch.Tensor, groups=groups, before=before, pairs=(targets, histories)) -> np.ndarray:
            return group_taus(groups.numpy(), before, distances(vectors, *pairs))

        vectors = quantized_rows(catalogue.quantizer, modality, catalogue.codes[modality])
        quantized.by_modality[modality] = taus(vectors)
        rows = torch.arange(len(present))
        for items, measured in starts.values():
            measured.by_modality[modality] = taus(items.modalities[modality].embed_codes(rows))
        for name, measured in tuned.items():
            if modality in recommenders[name].items.modalities:
                vectors = recommenders[name].items.modalities[modality].embed_codes(rows)
                measured.by_modality[modality] = taus(vectors)
    return [quantized, *(measured for _, measured in starts.values()), *tuned.values()]


def distances(vectors: torch.Tensor, targets: torch.Tensor, histories: torch.Tensor) -> np.ndarray:
    """Distances `(pairs,)` between rows of `vectors` `(items + 1, width)`."""
    pairs = zip(targets.split(READ_ITEMS), histories.split(READ_ITEMS))
    return torch.cat([(vectors[left] - vectors[right]).norm(dim=1) for left, right in pairs]).numpy()


def results_page(spectra: list[Spectrum], taus: list[Taus], hidden_size: int, data: PreparedDataset) -> str:
    """The tables in Markdown; labelled where the data are synthetic."""
    label = " (synthetic data: the figures say nothing about real items)" if data.statistics["synthetic"] else ""
    lines = [
        f"### Collapse: item tokens {hidden_size} wide{label}",
        "",
        "| items | tokens | information abundance | effective rank | collapsed dimensions | after fine-tuning: "
        "information abundance | effective rank | collapsed dimensions |",
        "| --- | --- |" + " ---: |" * 6,
    ]
    for spectrum in spectra:
        states = (spectrum.before, spectrum.after)
        cells = [cell for values in states for cell in _collapse_cells(values)]
        lines.append(f"| {spectrum.items} | {spectrum.tokens} | " + " | ".join(cells) + " |")
    modalities = list(taus[0].by_modality)
    lines += [
        "",
        f"A dimension counts as collapsed below 1% of the largest singular value. {data.num_items:,} items.",
        "",
        f"### Forgetting: Kendall's tau of distances from targets to histories{label}",
        "",
        "| code vectors | " + " | ".join(modalities) + " |",
        "| --- |" + " ---: |" * len(modalities),
    ]
    for measured in taus:
        cells = [
            f"{one.mean():.3f} ± {half_width(one):.3f}" if (one := measured.by_modality.get(name)) is not None else "–"
            for name in modalities
        ]
        lines.append(f"| {measured.state} | " + " | ".join(cells) + " |")
    users = max(len(one) for one in taus[0].by_modality.values())
    lines += [
        "",
        f"Against the distances of the embeddings; mean over {users:,} users of validation and its 95% interval.",
        "",
    ]
    return "\n".join(lines)


def _collapse_cells(values: np.ndarray | None) -> list[str]:
    if values is None:
        return ["–"] * 3
    abundance, rank, collapsed = (collapse_metrics(values)[column] for column in COLLAPSE_COLUMNS)
    return [f"{abundance:.1f}", f"{rank:.1f}", f"{collapsed:.1%}"]


def named_directories(entries: list[str], run_dir: Path) -> dict[str, Path]:
    """Directories of recommenders by name, from names in the run or name=directory."""
    directories: dict[str, Path] = {}
    for entry in entries:
        name, separator, path = entry.partition("=")
        if name in directories:
            raise ValueError(f"Two recommenders are called '{name}'; give one another name, as name=directory.")
        directories[name] = Path(path) if separator else run_dir / name
    return directories


def common_width(recommenders: dict[str, Recommender], hidden_size: int | None) -> int:
    """The width of all recommenders, which `hidden_size` may not contradict, or `hidden_size` where there are none."""
    widths = {name: recommender.items.config.hidden_size for name, recommender in recommenders.items()}
    if hidden_size is not None:
        widths["--hidden_size"] = hidden_size
    if not widths:
        raise ValueError("Neither --recommenders nor --hidden_size is given; give one, for the width of item tokens.")
    if len(set(widths.values())) > 1:
        raise ValueError(f"Widths differ ({widths}), and so would all figures; analyse each width by itself.")
    return next(iter(widths.values()))


def analyse(arguments: argparse.Namespace) -> None:
    run_dir = arguments.run_dir
    directories = named_directories(arguments.recommenders, run_dir)
    catalogue = Catalogue.load(
        *(
            getattr(arguments, f"{name}_dir") or run_dir / name
            for name in ("prepared", "embeddings", "quantizer")
        )
    )  # fmt: skip
    recommenders = {name: Recommender.load(path, catalogue) for name, path in directories.items()}
    hidden_size = common_width(recommenders, arguments.hidden_size)
    starts, trained = measure_collapse(catalogue, recommenders, hidden_size)
    taus = measure_forgetting(catalogue, recommenders, hidden_size)
    output_dir = arguments.output_dir or run_dir / "analyses"
    output_dir.mkdir(parents=True, exist_ok=True)
    drawing.draw_spectra(output_dir / "collapse", {one.tokens: one.before for one in starts})
    tokens = {one.items: (one.before, one.after) for one in trained if one.tokens == "item tokens"}
    if tokens:
        drawing.draw_fine_tuning(output_dir / "fine_tuning", tokens)
    drawing.draw_taus(
        output_dir / "forgetting",
        {
            one.state: {name: (values.mean(), half_width(values)) for name, values in one.by_modality.items()}
            for one in taus
        },
    )
    results = {
        "hidden_size": hidden_size,
        "num_items": catalogue.data.num_items,
        "synthetic": catalogue.data.statistics["synthetic"],
        "collapse": [one.as_json() for one in starts + trained],
        "forgetting": [one.as_json() for one in taus],
    }
    write_text_atomic(output_dir / "results.json", json.dumps(results, indent=2) + "\n")
    page = results_page(starts + trained, taus, hidden_size, catalogue.data)
    write_text_atomic(output_dir / "results.md", page)
    print(page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run_dir", type=Path, required=True, help="The output_dir of a recipe.")
    parser.add_argument(
        "--recommenders", nargs="*", default=[], help="Names in the run, or name=directory, of trained recommenders."
    )
    parser.add_argument("--hidden_size", type=int, help="Width of a decoder, for what holds before any fine-tuning.")
    for name in ("prepared", "embeddings", "quantizer"):
        parser.add_argument(f"--{name}_dir", type=Path, help=f"Instead of {name}/ in the run.")
    parser.add_argument("--output_dir", type=Path, help="Instead of analyses/ in the run.")
    try:
        analyse(parser.parse_args())
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
