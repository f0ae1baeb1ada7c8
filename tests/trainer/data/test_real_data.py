"""The reader on real data, where they lie beside the checkout."""

import io
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from mmesid.trainer.data.images import read_image
from mmesid.trainer.data.preparation import prepare_source
from mmesid.trainer.data.prepared import PreparedDataset
from mmesid.trainer.data.sources.sequence_files import read_sequence_files


REAL_DATA = Path(__file__).resolve().parents[3].parent / "shared/data"
requires_real_data = pytest.mark.skipif(
    not REAL_DATA.is_dir(), reason=f"no real data in '{REAL_DATA}': Amazon Beauty and ML-1M are not checked"
)


@requires_real_data
def test_amazon_beauty_keeps_its_rows(tmp_path):
    folder = REAL_DATA / "beauty"
    source = read_sequence_files(folder)
    prepare_source(source).save(tmp_path)
    data = PreparedDataset.load(tmp_path)
    assert {name: data.statistics[name] for name in ("users", "items", "interactions", "dropped_short_users")} == {
        "users": 22332, "items": 12086, "interactions": 198215, "dropped_short_users": 0,
    }  # fmt: skip
    # Precomputed tables are aligned with items.jsonl, whose items are numbered 1 to N.
    assert data.item_ids[1:] == [str(row) for row in range(1, 12087)]
    assert data.texts[1] == "OPI Nail Lacquer, Simmer and Shimmer, 0.5-Fluid Ounce. OPI, Makeup, Nails, Nail Polish"
    lines = [line.split() for line in (folder / "sequences.txt").read_text().splitlines()]
    recount = Counter(int(item) for _, *items in lines for item in items[:-2])
    assert data.frequencies.tolist() == [recount[row] for row in range(12087)]
    test = data.sequences("test")
    assert [[*example["history"], example["target"]] for example in (test[0], test[22331])] == [
        [int(item) for item in lines[index][1:]] for index in (0, 22331)
    ]


@requires_real_data
def test_movielens_has_posters_and_descriptions():
    source = read_sequence_files(REAL_DATA / "ml1m")
    catalogue = source.catalogue
    assert len(catalogue) == 3416 and len(source.interactions) == 998449
    assert catalogue.images.count(None) == 4
    assert catalogue.texts()[1].startswith("Caddyshack (1980). Comedy. Caddyshack II is")
    with Image.open(io.BytesIO(read_image(catalogue.images[0], catalogue.item_ids[0]))) as poster:
        assert poster.size == (185, 278)
