"""The quantize stage from its flags to its files, and what it refuses."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from mmesid.trainer.data.prepared import PreparedDataset
from mmesid.trainer.data.tables import EmbeddingTable, load_table, save_table
from mmesid.trainer.quantizer import training
from mmesid.trainer.quantizer.trainer import MMRQVAETrainingArguments
from mmesid.trainer.running.records import StageRecord
from mmesid.trainer.stages.quantize import main
from modeling_mmesid import MMRQVAEConfig, MMRQVAEModel
from modeling_mmesid.checkpoints import file_digest


ITEMS = 80


def quantize(tiny_run, output, *flags):
    main(
        ["--prepared_dir", str(tiny_run / "prepared"), "--embeddings_dir", str(tiny_run / "embeddings")]
        + ["--output_dir", str(output), "--codebook_size", "8", "--num_quantizers", "3", "--codebook_dim", "8"]
        + ["--num_train_epochs", "2", "--disable_tqdm", "true", *flags]
    )


@pytest.mark.parametrize("flags", [[], ["--objective", "paper", "--encoder_hidden_dims", "16"]])
def test_quantize_writes_checkpoint_codes_card_and_record_and_skips_when_current(tiny_run, tmp_path, capsys, flags):
    output = tmp_path / "quantizer"
    quantize(tiny_run, output, *flags)
    printed = capsys.readouterr().out
    assert "items that share their ID" in printed and "np.float64" not in printed
    model = MMRQVAEModel.from_pretrained(output)
    assert model.config.modalities == ["collaborative", "text"]
    table = pq.read_table(output / "semantic_ids.parquet")
    data = PreparedDataset.load(tiny_run / "prepared")
    assert table["item_id"].to_pylist() == data.item_ids[1:]
    assert table.schema.field("text").type == pa.list_(pa.int16())
    assert table["text"][4].as_py() is None and table["collaborative"][4].as_py() is not None
    for modality in model.config.modalities:
        embeddings = load_file(tiny_run / f"embeddings/{modality}.safetensors")[modality]
        expected = model.encode({modality: embeddings}).codes[modality].tolist()
        assert all(codes in (None, own) for codes, own in zip(table[modality].to_pylist(), expected[1:], strict=True))
    record = StageRecord.load(output)
    assert {"tau", "tau_text", "recall@1_text", "reconstruction_collaborative"} <= set(record.metrics["held_out"])
    assert {"use@1_text", "perplexity@3_collaborative", "collisions", "collisions_text"} <= {*record.metrics["items"]}
    assert set(record.metrics["histories"]["text"]) == {"tau", "tau_pooled"}
    assert {"figures/code_use.png", "figures/distances.png"} <= set(record.outputs)
    assert "synthetic" in (output / "README.md").read_text(encoding="utf-8")

    # The Python call makes the same of the same settings.
    paths = {name: tiny_run / f"embeddings/{name}.safetensors" for name in model.config.modalities}
    tables = {name: load_table(path, name, ITEMS) for name, path in paths.items()}
    args = MMRQVAETrainingArguments(str(tmp_path / "checkpoints"), num_train_epochs=2, disable_tqdm=True)
    quantizer, codes = training.quantize(data, tables, MMRQVAEConfig.from_pretrained(output), args)
    assert all(map(torch.equal, quantizer.state_dict().values(), model.state_dict().values()))
    for modality, values in codes.items():
        assert [None if -1 in row else row for row in values[1:].tolist()] == table[modality].to_pylist()

    digest = file_digest(output / "model.safetensors")
    capsys.readouterr()
    quantize(tiny_run, output, *flags)
    assert "is up to date, skipped" in capsys.readouterr().out
    assert file_digest(output / "model.safetensors") == digest


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--codebook_size", "128"], "76 items .*'collaborative'.*128 codes.*codebook_size to 16"),
        (["--modalities", "collaborative", "visual"], "visual.safetensors"),
        (["--validation_fraction", "0"], "validation_fraction"),
    ],
)
def test_what_cannot_work_is_refused_and_leaves_nothing(tiny_run, tmp_path, flags, named):
    with pytest.raises((ValueError, FileNotFoundError), match=named):
        quantize(tiny_run, tmp_path / "quantizer", *flags)
    assert not list((tmp_path / "quantizer").glob("*.safetensors"))


def test_tables_that_do_not_fit_the_data_are_refused(tiny_run):
    data = PreparedDataset.load(tiny_run / "prepared")
    table = load_table(tiny_run / "embeddings/text.safetensors", "text", ITEMS)
    shorter = EmbeddingTable(table.embeddings[:-1], table.present[:-1])
    broken = EmbeddingTable(table.embeddings.clone().fill_(torch.nan), table.present)
    for tables, named in [
        ({"text": shorter}, "'text' has 80 rows where the catalogue of 80 items needs 81"),
        ({"text": EmbeddingTable(table.embeddings[:-1], table.present)}, "'text' has 80 rows where the catalogue"),
        ({"text": EmbeddingTable(table.embeddings, table.present.long())}, "'present' is torch.int64 .* torch.bool"),
        ({"text": broken}, "of 'text' holds NaN or infinity"),
        ({}, "one row per item"),
    ]:
        with pytest.raises(ValueError, match=named):
            training.quantize(data, tables, MMRQVAEConfig(codebook_size=8))


def test_tables_of_another_catalogue_are_refused(tiny_run, tmp_path):
    present = torch.ones(ITEMS, dtype=torch.bool)
    present[0] = False
    save_table(tmp_path / "text.safetensors", "text", torch.randn(ITEMS, 4), present)
    with pytest.raises(ValueError, match="text.safetensors"):
        quantize(tiny_run, tmp_path / "quantizer", "--embeddings_dir", str(tmp_path), "--modalities", "text")
