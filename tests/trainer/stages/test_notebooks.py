"""The notebooks run from top to bottom on small data, and are kept without outputs."""

import contextlib
import io
import json
from pathlib import Path

import matplotlib
import pytest
import torch


NOTEBOOKS = Path(__file__).parents[3] / "examples" / "notebooks"


def run(name: str, **settings) -> dict:
    """The names of a notebook after its cells, of which the first has the settings, ran one after the other."""
    cells = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    first, *others = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    names: dict = {}
    exec(first, names)
    assert settings.keys() <= names.keys()
    names |= settings
    with contextlib.redirect_stdout(io.StringIO()):
        for source in others:
            exec(compile(source, f"{name}.ipynb", "exec"), names)
    return names


@pytest.fixture(autouse=True)
def figures_stay_in_memory():
    backend = matplotlib.get_backend()
    matplotlib.use("agg")
    yield
    matplotlib.pyplot.close("all")
    matplotlib.use(backend)


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_outputs_are_stripped(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    assert not [cell for cell in cells if cell.get("outputs") or cell.get("execution_count")]


def test_quickstart(tiny_run):
    names = run("quickstart", RUN=str(tiny_run))
    parts = torch.tensor(names["reasons"].to_numpy().sum(1))
    assert torch.allclose(parts.float(), names["best"].scores[0], atol=1e-4)
    assert names["processor"].item_ids[-1] == "newcomer"


def test_your_own_catalogue():
    names = run("your_own_catalogue", ITEMS=64, USERS=150, EPOCHS=1)
    assert {"popularity", "sasrec", "mme-sid"} <= set(names["results"]) and names["data"].num_items == 64


def test_semantic_ids(tiny_run):
    names = run("semantic_ids", RUN=str(tiny_run))
    assert len(names["taus"]) == 3 and all(-1 <= tau <= 1 for tau in names["taus"])
    assert 1 <= names["figures"]["effective_rank"] <= 16
