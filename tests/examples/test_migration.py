"""The files that were published with MME-SID become files of this project; written here as they were there."""

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mmesid.trainer.data.prepared import PreparedDataset
from mmesid.trainer.data.tables import import_table
from mmesid.trainer.quantizer.semantic_ids import read_semantic_ids
from mmesid.trainer.stages import prepare


ROOT = Path(__file__).parents[2]
ITEMS = 5


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "examples" / "migration"))
        import published_files

        yield published_files


@pytest.fixture
def published(tmp_path) -> Path:
    """Three users and five items, a table of embeddings in a pickle, semantic IDs as an index and as an array."""
    (tmp_path / "new.txt").write_text("1 1 2 3 4\n2 2 4 5\n3 5 1 3\n")
    (tmp_path / "text_img.csv").write_text(
        'asin,title,imUrl,id\nA1,"Soap, green",http://x/1.jpg,1\nA2,Comb,http://x/2.jpg,2\nA3,,,3\nA4,Oil,,4\n'
    )
    with open(tmp_path / "sasrec.pkl", "wb") as file:
        # As published: one more dimension, and numbers that do not lie in order.
        pickle.dump(torch.arange(24.0).reshape(1, 4, ITEMS + 1).transpose(1, 2), file)
    torch.save(torch.ones(ITEMS + 1, 3, dtype=torch.bfloat16), tmp_path / "text.pt")
    index = {item: ["<a_1>", f"<b_{item}>"] for item in range(ITEMS)}
    (tmp_path / "codes.json").write_text(json.dumps(index))
    torch.save(np.stack([[9, 9], *[[1, item] for item in range(ITEMS)]]), tmp_path / "codes.pt")
    return tmp_path


def test_published_files_become_a_source_and_tables(script, published):
    source = published / "source"
    script.main(
        ["--output_dir", str(source), "--sequences", str(published / "new.txt")]
        + ["--items", str(published / "text_img.csv")]
        + ["--tables", f"collaborative={published / 'sasrec.pkl'}", f"text={published / 'text.pt'}"]
        + ["--codes", f"collaborative={published / 'codes.json'}", f"text={published / 'codes.pt'}"]
    )
    prepare.main(["--source", "sequences", "--source_dir", str(source), "--output_dir", str(published / "prepared")])

    data = PreparedDataset.load(published / "prepared")
    assert data.num_items == ITEMS and data.titles[1] == "Soap, green"
    table = import_table(source / "collaborative.safetensors", "collaborative", ITEMS)
    assert table.embeddings[2].tolist() == [2.0, 8.0, 14.0, 20.0] and not table.present[0]
    assert load_file(source / "text.safetensors")["text"].dtype == torch.float32
    codes = read_semantic_ids(source / "semantic_ids.parquet", data.item_ids, ["collaborative", "text"])
    assert codes["collaborative"][1:].tolist() == [[1, item] for item in range(ITEMS)] == codes["text"][1:].tolist()


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harm",)


@pytest.mark.parametrize("content", [Harmful(), {"a": 1}, [torch.zeros(2, 2)], "text"])
def test_a_pickle_of_anything_but_a_tensor_is_refused_and_not_run(script, tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    Path("table.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=r"table\.pkl' is no pickle of one tensor"):
        script.read_table("table.pkl")
    assert not Path("harm").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tables", "collaborative=short.pkl"], "'short.pkl' has 3 rows, not 6"),
        (["--codes", "text=short.json"], "'short.json' has no codes of item 3"),
        (["--items", "none.csv"], "none.csv"),
        (["--tables", "text.pt"], "'text.pt' names no file"),
    ],
)
def test_files_that_do_not_fit_end_in_a_sentence(script, published, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(published)
    Path("short.pkl").write_bytes(pickle.dumps(torch.ones(3, 2)))
    Path("short.json").write_text('{"1": [1], "2": [2]}')
    with pytest.raises(SystemExit) as ended:
        script.main(["--output_dir", "out", "--sequences", "new.txt", *flags])
    assert ended.value.code == 2 and message in capsys.readouterr().err
