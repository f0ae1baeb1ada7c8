"""The paper's two claims on a tiny run: figures against spectra and taus counted independently."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import kendalltau
from transformers.utils import logging

import mmesid

from .conftest import HIDDEN_SIZE


ANALYSES = Path(__file__).parents[2] / "examples" / "analyses"


@pytest.fixture(scope="module")
def script():
    verbosity = logging.get_verbosity()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ANALYSES))
        yield importlib.import_module("collapse_and_forgetting")
    logging.set_verbosity(verbosity)


def run(script, *flags) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script.__file__, *map(str, flags)])
        script.main()


@pytest.fixture(scope="module")
def results(script, run_dir) -> dict:
    run(script, "--run_dir", run_dir, "--recommenders", "tuned", f"other={run_dir / 'text_random'}")
    return json.loads((run_dir / "analyses" / "results.json").read_text())


@pytest.fixture(scope="module")
def tuned(run_dir):
    return mmesid.MMESIDForSequentialRecommendation.from_pretrained(run_dir / "tuned").model.items


def test_projections_have_the_rank_of_their_embeddings_and_tokens_more(results):
    ranks = {
        one["tokens"]: np.count_nonzero(np.array(one["before"]["singular_values"]) > 1e-4)
        for one in results["collapse"]
        if one["items"] == "at the start"
    }
    # One item lacks the text: the vector in its place is a direction of its own.
    assert ranks["collaborative, projected"] == 6 and ranks["text, projected"] == 10 + 1
    assert ranks["concatenation, projected"] == 6 + 10 + 1
    assert ranks["MME-SID, default form"] == ranks["MME-SID, paper's form"] == HIDDEN_SIZE


def test_spectra_after_fine_tuning_are_those_of_the_loaded_checkpoint(results, tuned):
    found = {one["tokens"]: one for one in results["collapse"] if one["items"] == "tuned"}
    rows = tuned.rows()[1:]
    with torch.no_grad():
        expected = np.linalg.svd(tuned.tokens(rows).double(), compute_uv=False)
        projected = sum(modality.project(rows) for modality in tuned.modalities.values())
    after = found["item tokens"]["after"]
    np.testing.assert_allclose(after["singular_values"], expected, rtol=1e-4)
    assert after["information_abundance"] == pytest.approx(expected.sum() / expected[0], rel=1e-4)
    assert after["collapsed_dimensions"] == (expected < 0.01 * expected[0]).mean()
    largest = found["concatenation, projected"]["after"]["singular_values"][0]
    assert largest == pytest.approx(np.linalg.norm(projected.double(), ord=2), rel=1e-4)
    # Drawn anew: alike, not the same.
    assert found["item tokens"]["before"]["effective_rank"] == pytest.approx(after["effective_rank"], rel=0.2)
    assert found["item tokens"]["before"]["singular_values"] != after["singular_values"]
    assert [one["tokens"] for one in results["collapse"] if one["items"] == "other"] == [
        "text, projected", "item tokens",
    ]  # fmt: skip


def test_taus_are_the_means_over_users(results, tuned, run_dir):
    states = {one["state"]: one["modalities"] for one in results["forgetting"]}
    assert list(states) == [
        "after quantization",
        "trained code vectors, before fine-tuning",
        "random code vectors, before fine-tuning",
        "tuned, fine-tuned from trained code vectors",
        "other, fine-tuned from random code vectors",
    ]
    data = mmesid.PreparedDataset.load(run_dir / "prepared")
    modality = tuned.modalities["text"]
    with torch.no_grad():
        vectors = modality.embed_codes(torch.arange(len(modality.present)))
    taus = []
    for example in data.sequences("validation"):
        items = [item for item in example["history"].tolist() if modality.present[item]]
        if len(items) > 1 and modality.present[example["target"]]:
            before, after = (
                (table[example["target"]] - table[items]).norm(dim=1) for table in (modality.embeddings, vectors)
            )
            taus.append(np.nan_to_num(kendalltau(before, after).statistic))
    found = states["tuned, fine-tuned from trained code vectors"]["text"]
    assert found["tau"] == pytest.approx(np.mean(taus), abs=1e-6) and found["users"] == len(taus)
    assert found["half_width_95"] == pytest.approx(1.96 * np.std(taus) / len(taus) ** 0.5)
    # Where widths agree, distances start as the quantizer left them.
    start = states["trained code vectors, before fine-tuning"]["text"]["tau"]
    assert start == pytest.approx(states["after quantization"]["text"]["tau"], abs=0.02)
    assert start > states["random code vectors, before fine-tuning"]["text"]["tau"] + 0.1
    assert list(states["other, fine-tuned from random code vectors"]) == ["text"]


def test_tables_and_pictures_are_written(results, run_dir):
    page = (run_dir / "analyses" / "results.md").read_text()
    assert f"item tokens {HIDDEN_SIZE} wide (synthetic data" in page and "| tuned | item tokens |" in page
    for name in ("collapse", "fine_tuning", "forgetting"):
        with Image.open(run_dir / "analyses" / f"{name}.png") as picture:
            assert len(picture.convert("RGB").getcolors(2**20)) > 10
        assert "<svg" in (run_dir / "analyses" / f"{name}.svg").read_text()[:500]
    assert not list((run_dir / "analyses").glob(".*"))


def test_a_width_alone_shows_what_holds_before_fine_tuning(script, run_dir, tmp_path):
    run(script, "--run_dir", run_dir, "--hidden_size", 64, "--output_dir", tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert {one["items"] for one in results["collapse"]} == {"at the start"}
    collaborative = results["collapse"][0]["before"]
    assert collaborative["collapsed_dimensions"] == 1 - 6 / 64 and collaborative["effective_rank"] <= 6
    assert not (tmp_path / "fine_tuning.png").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "Neither --recommenders nor --hidden_size is given"),
        (["--recommenders", "tuned", "tuned=elsewhere"], "Two recommenders are called 'tuned'"),
        (["--recommenders", "prepared"], "prepared/config.json' does not exist"),
        (["--recommenders", "tuned", "--hidden_size", "64"], "Widths differ"),
    ],
)
def test_what_cannot_be_analysed_is_one_sentence(script, run_dir, capsys, flags, message):
    with pytest.raises(SystemExit):
        run(script, "--run_dir", run_dir, *flags)
    assert message in capsys.readouterr().err


def test_what_another_stage_wrote_is_refused(script, run_dir, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    record = json.loads((run_dir / "text_random" / "record.json").read_text()) | {"stage": "sasrec"}
    (tmp_path / "record.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="was written by the stage 'sasrec'; name recommenders"):
        script.Recommender.load(tmp_path, None)


def test_a_recommender_of_another_quantizer_is_refused(script, run_dir):
    catalogue = script.Catalogue.load(run_dir / "prepared", run_dir / "embeddings", run_dir / "quantizer")
    catalogue.codes["text"] = (catalogue.codes["text"] + 1) % 8
    with pytest.raises(ValueError, match="other codes of 'text' than the run's quantizer gave"):
        script.Recommender.load(run_dir / "tuned", catalogue)
