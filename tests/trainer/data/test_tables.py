"""What is written is what is read, and a table that does not fit the catalogue is refused in one sentence."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from mmesid.trainer.data.tables import (
    EmbeddingTable,
    check_table,
    import_table,
    load_table,
    save_table,
    table_encoders,
)
from mmesid.trainer.running.records import StageRecord
from modeling_mmesid import MMESIDConfig
from modeling_mmesid.items_mmesid import MMESIDItems


@pytest.fixture
def table():
    embeddings = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    present = torch.tensor([False, True, True, False, True, True])
    return embeddings, present


def test_saved_table_reads_back_with_missing_rows_zero(tmp_path, table):
    embeddings, present = table
    embeddings[3] = torch.nan
    save_table(tmp_path / "text.safetensors", "text", embeddings, present)
    loaded, loaded_present = load_table(tmp_path / "text.safetensors", "text", num_items=5)
    assert loaded.dtype == torch.float32 and torch.equal(loaded_present, present)
    assert torch.equal(loaded[present], embeddings[present]) and not loaded[~present].any()
    assert set(load_file(tmp_path / "text.safetensors")) == {"text", "present"}
    assert [file.name for file in tmp_path.iterdir()] == ["text.safetensors"], "a temporary file was left behind"


def test_save_refuses_nan_and_keeps_the_earlier_table(tmp_path, table):
    embeddings, present = table
    path = tmp_path / "text.safetensors"
    save_table(path, "text", embeddings, present)
    before = path.read_bytes()
    embeddings[4, 2] = torch.nan
    with pytest.raises(ValueError, match="row 4 of 'text' holds NaN or infinity"):
        save_table(path, "text", embeddings, present)
    assert path.read_bytes() == before
    with pytest.raises(ValueError, match="true for row 0, which is padding"):
        save_table(path, "text", torch.ones(6, 4), torch.ones(6, dtype=torch.bool))


@pytest.mark.parametrize("read", [load_table, import_table])
@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.ones(5, 4), r"'text' has 5 rows where the catalogue of 5 items needs 6"),
        (torch.ones(6, 4).index_fill(0, torch.tensor([2, 5]), torch.inf), r"row 2 .* NaN or infinity \(2 such rows"),
        (torch.ones(6), r"floating-point numbers of shape \(items \+ 1, width\)"),
        (torch.ones(6, 4, dtype=torch.int64), r"torch.int64 of shape \(6, 4\)"),
    ],
)
def test_unfit_tables_are_refused(tmp_path, read, tensor, message):
    path = tmp_path / "text.safetensors"
    present = torch.tensor([False, True, True, True, True, True])
    save_file({"text": tensor, "present": present}, path)
    with pytest.raises(ValueError, match=message) as error:
        read(path, "text", num_items=5)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("read", [load_table, import_table])
def test_missing_and_broken_files_are_named(tmp_path, read):
    with pytest.raises(FileNotFoundError, match="nowhere.safetensors' does not exist"):
        read(tmp_path / "nowhere.safetensors", "text", num_items=5)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"\x00" * 40)
    with pytest.raises(ValueError, match="broken.safetensors' is not a safetensors file"):
        read(broken, "text", num_items=5)


def test_load_needs_both_keys(tmp_path):
    path = tmp_path / "visual.safetensors"
    save_file({"visual": torch.zeros(3, 2)}, path)
    with pytest.raises(ValueError, match="no key 'present' but only 'visual'; .*--from_file"):
        load_table(path, "visual", num_items=2)
    save_file({"text": torch.zeros(3, 2), "present": torch.tensor([False, True, True])}, path)
    with pytest.raises(ValueError, match="no key 'visual' but only 'present', 'text'"):
        load_table(path, "visual", num_items=2)


@pytest.mark.parametrize(
    ("embeddings", "present", "message"),
    [
        (torch.zeros(3, 2), [True, True], r"'present' is torch.bool of shape \(2,\) where torch.bool of shape \(3,\)"),
        (torch.zeros(3, 2), [0, 1, 2], r"'present' is torch.int64 of shape \(3,\) where torch.bool of shape \(3,\)"),
        (torch.zeros(3, 2), [[False], [True], [True]], r"'present' is torch.bool of shape \(3, 1\)"),
        (torch.ones(3, 2), [False, True, False], "row 0 of 'visual' is not zero though 'present' is false for it"),
        (torch.zeros(3, 2), [True, True, True], "'present' is true for row 0"),
    ],
)
def test_nothing_is_broadcast_or_taken_for_a_mask(tmp_path, embeddings, present, message):
    path = tmp_path / "visual.safetensors"
    save_file({"visual": embeddings, "present": torch.tensor(present)}, path)
    with pytest.raises(ValueError, match=f"'{path}': {message}"):
        load_table(path, "visual", num_items=2)
    with pytest.raises(ValueError, match=f"The table: {message}"):
        check_table(EmbeddingTable(embeddings, torch.tensor(present)), "visual", num_items=2)


@pytest.mark.parametrize(("dtype", "key"), [(torch.bfloat16, "text"), (torch.float64, "embeddings")])
def test_import_takes_any_precision_and_the_only_key(tmp_path, table, dtype, key):
    embeddings = table[0].to(dtype)
    embeddings[3] = 0
    save_file({key: embeddings}, tmp_path / "foreign.safetensors")
    imported, present = import_table(tmp_path / "foreign.safetensors", "text", num_items=5)
    assert imported.dtype == torch.float32
    assert present.tolist() == [False, True, True, False, True, True]
    assert torch.equal(imported[1:], embeddings[1:].float()) and not imported[0].any()


def test_import_prefers_the_modality_and_refuses_a_guess(tmp_path):
    path = tmp_path / "foreign.safetensors"
    save_file({"text": torch.ones(3, 2), "visual": torch.full((3, 2), 2.0)}, path)
    assert import_table(path, "visual", num_items=2)[0][1].tolist() == [2.0, 2.0]
    with pytest.raises(ValueError, match="no key 'collaborative' but 'text', 'visual'"):
        import_table(path, "collaborative", num_items=2)
    save_file({}, path)
    with pytest.raises(ValueError, match="no key 'text' but no table at all"):
        import_table(path, "text", num_items=2)


def test_import_honours_a_mask_over_zero_rows(tmp_path):
    path = tmp_path / "foreign.safetensors"
    save_file({"text": torch.tensor([[1.0], [0.0], [3.0]]), "present": torch.tensor([True, True, False])}, path)
    embeddings, present = import_table(path, "text", num_items=2)
    assert present.tolist() == [False, True, False] and embeddings.flatten().tolist() == [0.0, 0.0, 0.0]


def test_encoders_are_told_where_they_are_on_record(tmp_path):
    record = dataclasses.asdict(StageRecord(stage="embed", fingerprint="1", arguments={}, seconds=0.1))
    for modality, details in {
        "text": {"kind": "sentence", "encoder": "me/bert", "revision": "a1", "column": "title", "normalised": True},
        "visual": {"encoder": "a table", "revision": None},
    }.items():
        (tmp_path / f"{modality}.json").write_text(json.dumps(record | {"details": details}))
    encoders = table_encoders(tmp_path, ["collaborative", "text", "visual"])
    text = {"kind": "sentence", "name": "me/bert", "revision": "a1", "column": "title", "normalised": True}
    assert encoders["text"] == text and set(encoders) == {"text", "visual"}
    assert encoders["visual"] == dict.fromkeys(text) | {"name": "a table"}


def test_a_parquet_table_is_joined_by_item_id(tmp_path):
    ids = ["", "b", "7", "a", "c"]
    vectors = {"a": [1.0, 0.0], "7": [0.5, 2.0], "b": [3.0, 4.0], "gone": [9.0, 9.0]}
    columns = {"item_id": list(vectors), "embedding": list(vectors.values()), "title": ["x"] * 4}
    for kind in (pa.list_(pa.float64()), pa.list_(pa.float32(), 2), pa.large_list(pa.float16())):
        cast = (
            pa.array(columns["embedding"], pa.list_(pa.float64())).cast(kind)
            if kind.value_type != pa.float16()
            else (pa.array([np.float16(vector).tolist() for vector in columns["embedding"]], kind))
        )
        pq.write_table(pa.table(columns | {"embedding": cast}), tmp_path / "table.parquet")
        embeddings, present = import_table(tmp_path / "table.parquet", "text", 4, ids)
        assert present.tolist() == [False, True, True, True, False]
        assert embeddings.tolist() == [[0, 0], [3, 4], [0.5, 2], [1, 0], [0, 0]]
    for change, message in (
        ({"item_id": ["a", "b", "a", "7"]}, "repeats item 'a'; keep one row"),
        (
            {"item_id": ["w", "x", "y", "z"]},
            "has a vector for no item of the catalogue, where ids look like 'c' and th",
        ),
        (
            {"embedding": [[1.0], [1.0, 2.0], [1.0], [1.0]]},
            "has vectors of 1, 2 numbers in 'embedding'; give all as many",
        ),
        ({"embedding": [[1.0], [float("nan")], [1.0], [1.0]]}, "row 2 of 'text' holds NaN or infinity"),
        ({"embedding": [[1], [2], [3], [4]]}, "has the columns item_id, embedding, title, where 'item_id' and one of"),
        ({"other": columns["embedding"]}, "where 'item_id' and one of lists of numbers, or 'text', are expected"),
        ({"item_id": ["a", None, "b", "7"]}, "has item_id=None; an id is an integer or a string"),
    ):
        pq.write_table(pa.table(columns | change), tmp_path / "table.parquet")
        with pytest.raises(ValueError, match=f"table.parquet'.* {message}"):
            import_table(tmp_path / "table.parquet", "text", 4, ids)


def test_an_array_fits_by_its_count(tmp_path):
    items = np.arange(8, dtype=np.float16).reshape(4, 2) + 1
    for array in (items, np.concatenate([[[7, 7]], items]).astype(">f8")):
        np.save(tmp_path / "table.npy", array)
        embeddings, present = import_table(tmp_path / "table.npy", "text", 4)
        assert embeddings[1:].tolist() == items.tolist() and not embeddings[0].any()
        assert present.tolist() == [False, True, True, True, True]
    for array, message in (
        (items[:3], "has 3 rows where the catalogue of 4 items needs 5"),
        (items.astype(int), "is not an array of floating-point numbers, of shape"),
        (np.array([{}] * 4), r"is no array of numbers \(.*Python objects in dtype"),
    ):
        np.save(tmp_path / "table.npy", array)
        with pytest.raises(ValueError, match=f"table.npy'.* {message}"):
            import_table(tmp_path / "table.npy", "text", 4)
    np.save(tmp_path / "table.npy", items)
    whole = (tmp_path / "table.npy").read_bytes()
    for damaged in (whole[:40], whole[:-4], b"", whole.replace(b"'shape': (4, 2), }", b"'shape': (9**9,), ")):
        (tmp_path / "table.npy").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"table.npy' is no array of numbers \("):
            import_table(tmp_path / "table.npy", "text", 4)


def test_a_pickle_is_refused_with_how_to_convert_it(tmp_path):
    torch.save(torch.ones(5, 2), tmp_path / "table.pt")
    with pytest.raises(
        ValueError, match=r"pickle, .* convert it with .*save_file\(\{'text': torch.load\('table.pt', we"
    ):
        import_table(tmp_path / "table.pt", "text", 4)


def mapped_file(tensor: torch.Tensor) -> str:
    """The file that a tensor's memory is mapped from, empty if none."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, *_, name = line.split(maxsplit=5) if line.count("/") else [*line.split(maxsplit=4), ""]
        start, end = (int(one, 16) for one in addresses.split("-"))
        if start <= tensor.data_ptr() < end:
            return name
    return ""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/maps")
def test_a_model_has_its_tables_where_the_file_is_mapped(tmp_path):
    """So that processes of a machine share them: a copy would be each one's own."""
    path, present = tmp_path / "text.safetensors", torch.ones(1001, dtype=torch.bool)
    present[0] = False
    save_table(path, "text", torch.randn(1001, 64), present)
    table = load_table(path, "text", num_items=1000)
    config = MMESIDConfig(
        backbone_config=LlamaConfig(vocab_size=10, hidden_size=16, num_hidden_layers=1, num_attention_heads=1),
        num_items=1000, modalities=["text"], embedding_dims=[64], num_quantizers=0,
    )  # fmt: skip
    items = MMESIDItems(config)
    frequencies = torch.ones(1001, dtype=torch.long)
    items.initialize(frequencies, {"text": table.embeddings}, {"text": table.present}, None, None)
    assert mapped_file(items.modalities["text"].embeddings) == str(path)
    assert mapped_file(items.modalities["text"].projection.weight) == ""
