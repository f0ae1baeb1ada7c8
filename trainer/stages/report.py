"""
Writes one page about a run, `report.html`: its results, how the trainings went, and what example users are recommended
and why. `mmesid run` ends with it.

    mmesid report --run_dir runs/quickstart
"""

import io
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from accelerate import PartialState
from PIL import Image

from mmesid.hub_cards.cards import first_training
from mmesid.hub_cards.names import printable
from mmesid.hub_cards.report import inline, inline_file, most_of_its_score, render_report, source_label
from modeling_mmesid import MMESIDForSequentialRecommendation

from ..data.prepared import ITEMS_FILE, PreparedDataset
from ..recommender.description import most_alike, semantic_ids, similarity_vectors
from ..running.arguments import CommandArguments, DeviceArguments, check_ranges, parse
from ..running.errors import run_as_script
from ..running.files import read_json
from ..running.records import (
    RECORD_NAME,
    StageRecord,
    installed_versions,
    json_digest,
    require_exists,
    to_json,
    write_text_atomic,
)


PAGE_NAME = "report.html"
# What the page was made of, and its example users, for the next run that finds it up to date.
STATE_NAME = "report.json"
# Items that are shown of a user; users and items that are printed; pixels of a picture.
NUM_HISTORY, NUM_RECOMMENDED = 5, 5
NUM_PRINTED_USERS, NUM_PRINTED_ITEMS = 3, 3
THUMBNAIL = 96
# What a stage's directory shows on the page, in this order.
ORDER = ("sasrec", "encoder", "quantize", "finetune")


@dataclass(kw_only=True)
class ReportArguments(CommandArguments, DeviceArguments):
    """
    Write one page about the run of a recipe: results, curves, and what example users are recommended and why.

    Args:
        > Run

        run_dir (`str`): Directory of the run, the `output_dir` of its recipe.
        prepared_dir (`str`, *optional*): Directory written by `mmesid prepare`; by default the folder `prepared` of
            the run.
        num_users (`int`, *optional*, defaults to `10`): Example users, spread evenly over the test split.
    """

    run_dir: str
    prepared_dir: str | None = None
    num_users: int = 10

    def __post_init__(self):
        super().__post_init__()
        check_ranges(self, positive=("num_users",))


def main(argv: list[str] | None = None) -> None:
    arguments = parse(ReportArguments, argv)
    state = PartialState(cpu=arguments.use_cpu)
    if not state.is_main_process:
        return
    run_dir = Path(arguments.run_dir)
    prepared_dir = Path(arguments.prepared_dir or run_dir / "prepared")
    require_exists(prepared_dir)
    paths = sorted(run_dir.glob(f"*/{RECORD_NAME}"))
    records = {path.parent.name: StageRecord.load(path) for path in paths}
    identities = [[name, record.fingerprint, record.finished_at] for name, record in records.items()]
    made_of = json_digest([identities, arguments.num_users])
    page, state_file = run_dir / PAGE_NAME, run_dir / STATE_NAME
    known: dict = read_state(state_file) if page.is_file() else {}
    if known.get("made_of") != made_of:
        content = report_of(run_dir, records, PreparedDataset.load(prepared_dir), arguments.num_users, state.device)
        write_text_atomic(page, render_report(content))
        users = without_pictures(content["users"])
        known = {"made_of": made_of, "users": users, "digest": json_digest(users)}
        write_text_atomic(state_file, to_json(known))
    print_users(known["users"])
    print(f"report: wrote '{page}' with results, curves and what {len(known['users'])} users are recommended")


def read_state(path: Path) -> dict:
    """What an earlier run noted; nothing where there is no such file, or it is not as it was written."""
    try:
        known = read_json(path)
    except (OSError, ValueError):
        return {}
    return known if known.get("digest") == json_digest(known.get("users")) else {}


def report_of(
    run_dir: Path, records: dict[str, StageRecord], data: PreparedDataset, num_users: int, device: torch.device
) -> dict:
    """What [`~mmesid.hub_cards.report.render_report`] makes a page of, from the records of the run's stages by the
    name of their directory."""
    by_stage: dict[str, list[str]] = {}
    for name, record in records.items():
        by_stage.setdefault(record.stage, []).append(name)
    results = {name: figures for one in by_stage.get("evaluate", []) for name, figures in records[one].metrics.items()}
    shown = [name for stage in ORDER for name in by_stage.get(stage, [])]
    page = {
        "source": data.statistics["source"],
        "synthetic": data.statistics["synthetic"],
        "statistics": {name: value for name, value in data.statistics.items() if value not in (None, 0)},
        "results": {split: {name: one[split] for name, one in results.items()} for split in ("test", "validation")}
        if results
        else {},
        "intervals": {name: one["test_confidence"]["ndcg@10"] for name, one in results.items()},
        "differences": {},
        "pictures": [
            inline_file(path) for one in by_stage.get("evaluate", []) for path in (run_dir / one / "figures").glob("*")
        ],
        "stages": [
            {
                "name": name,
                "record": asdict(records[name]),
                "pictures": {
                    path.stem: inline_file(path)
                    for path in sorted(
                        (run_dir / name / "figures").glob("*.png"), key=lambda one: first_training(one.name)
                    )
                },
            }
            for name in shown
        ],
        "versions": installed_versions(),
        "users": [],
        "recommender": None,
        "sources": [],
        "has_pictures": "image" in data.features,
    }
    # Without targets nothing was held out, and there is nobody to show.
    if data.has_targets and (recommenders := by_stage.get("finetune")):
        # A baseline of ID vectors alone has no reasons to give.
        reasoned = [name for name in recommenders if records[name].details.get("modalities")]
        best = max(
            reasoned or recommenders, key=lambda name: records[name].metrics.get("validation", {}).get("ndcg@10", 0)
        )
        model = MMESIDForSequentialRecommendation.from_pretrained(run_dir / best).to(device)
        users = example_users(model, data, num_users)
        page |= {"recommender": best, "users": users}
        page["sources"] = list(users[0]["recommended"][0]["contributions"]) if users else []
        differences = results.get(best, {}).get("test_differences", {})
        page["differences"] = {name: one["ndcg@10"] for name, one in differences.items()}
    return page


def example_users(model: MMESIDForSequentialRecommendation, data: PreparedDataset, num_users: int) -> list[dict]:
    """Users spread evenly over the test split, with what they chose, what they are recommended and why. Who has chosen
    as often as there are items is left out: nothing may be left to recommend."""
    test = data.sequences("test")
    counts = np.diff(test.offsets)
    candidates = np.flatnonzero((counts > 0) & (counts < data.num_items))
    if not len(candidates):
        return []
    places = np.unique(np.linspace(0, len(candidates) - 1, min(num_users, len(candidates))).astype(int))
    chosen = candidates[places]
    histories = [test[int(user)]["history"].tolist() for user in chosen]
    count = min(NUM_RECOMMENDED, data.num_items - max(map(len, histories)))
    best = model.recommend(histories, top_k=count, return_contributions=True)
    codes, vectors = semantic_ids(model), similarity_vectors(model)
    users = []
    for place, (user, history) in enumerate(zip(chosen.tolist(), histories)):
        recommended = []
        for rank, row in enumerate(best.items[place].tolist()):
            parts = {name: float(part[place, rank]) for name, part in best.contributions.items()}
            reason = shared_codes(row, history, codes, data.titles)
            if reason is None and (alike := most_alike(row, history, vectors)) is not None:
                modality, other = alike
                reason = f"is most like “{data.titles[other] or data.item_ids[other]}” by {modality}"
            reason = reason or most_of_its_score(parts)
            recommended.append({"row": row, "score": float(best.scores[place, rank]), "reason": reason}
                               | {"contributions": parts})  # fmt: skip
        # Bars of one user have one scale.
        lengths = [sum(max(part, 0) for part in item["contributions"].values()) for item in recommended]
        users.append(
            {
                "user_id": test.user_ids[user],
                "earlier": max(len(history) - NUM_HISTORY, 0),
                "history": [{"row": row} for row in history[-NUM_HISTORY:]],
                "recommended": recommended,
                "target": {"row": int(test.targets[user])},
                "largest": max(*lengths, 1e-9),
            }
        )
    shown = [item for user in users for item in (*user["history"], *user["recommended"], user["target"])]
    pictures = thumbnails(data, {item["row"] for item in shown})
    for item in shown:
        row = item["row"]
        item |= {"item_id": data.item_ids[row], "title": data.titles[row] or data.item_ids[row]}
        item |= {"picture": pictures.get(row)}
    return users


def shared_codes(row: int, history: list[int], codes: dict[str, torch.Tensor], titles: list[str]) -> str | None:
    """The item of the history whose semantic ID begins most like that of the recommended one, in words; `None` if not
    even the first code is the same."""
    best = (0, "", 0)
    for modality, table in codes.items():
        # -1 stands for a modality that is missing.
        equal = (table[history] == table[row]) & (table[history] >= 0)
        shared = equal.long().cumprod(1).sum(1)
        # The latest of equals.
        place = len(history) - 1 - int(shared.flip(0).argmax())
        best = max(best, (int(shared[place]), modality, history[place]), key=lambda one: one[0])
    count, modality, other = best
    if count == 0:
        return None
    levels = codes[modality].shape[1]
    codes_word = "its first code" if count == 1 else f"its first {count} codes"
    shared_words = f"all {levels} codes" if count == levels else codes_word
    return f"shares {shared_words} of {modality} with “{titles[other] or other}”"


def thumbnails(data: PreparedDataset, rows: set[int]) -> dict[int, str]:
    """Small pictures of the items that have one, by row, as addresses that hold them."""
    if "image" not in data.features:
        return {}
    pictures, first = {}, 1
    # Row group by row group: a catalogue's pictures may be larger than memory.
    with pq.ParquetFile(data.path / ITEMS_FILE) as file:
        for group in range(file.num_row_groups):
            size = file.metadata.row_group(group).num_rows
            wanted = sorted(row for row in rows if first <= row < first + size)
            column = file.read_row_group(group, columns=["image"])["image"] if wanted else []
            for row in wanted:
                if (stored := column[row - first].as_py()) is not None:
                    with Image.open(io.BytesIO(stored["bytes"])) as picture:
                        small, content = picture.convert("RGB"), io.BytesIO()
                    small.thumbnail((THUMBNAIL, THUMBNAIL))
                    small.save(content, "JPEG", quality=80)
                    pictures[row] = inline(content.getvalue(), "jpeg")
            first += size
    return pictures


def without_pictures(users: list[dict]) -> list[dict]:
    """The users as `report.json` keeps them: what is printed of them."""
    return [
        {
            "history": [item["title"] for item in user["history"]],
            "recommended": [
                {name: item[name] for name in ("title", "contributions", "reason")} for item in user["recommended"]
            ],
        }
        for user in users
    ]


def print_users(users: list[dict]) -> None:
    """The first recommendations of some of the users, with their reasons."""
    for chosen in np.linspace(0, len(users) - 1, min(NUM_PRINTED_USERS, len(users))).astype(int):
        user = users[chosen]
        print(f"After {'; '.join(map(printable, user['history'][-3:]))}:")
        for place, item in enumerate(user["recommended"][:NUM_PRINTED_ITEMS], start=1):
            # What would be told as 0.00 is left out.
            counted = {name: part for name, part in item["contributions"].items() if abs(part) >= 0.005}
            parts = ", ".join(f"{source_label(name)} {part:+.2f}" for name, part in counted.items())
            reason = f"; {item['reason']}" if item["reason"] else ""
            print(f"  {place}. " + printable(f"{item['title']} ({parts}{reason})"))
        print()


if __name__ == "__main__":
    run_as_script("report", main)
