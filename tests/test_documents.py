"""What the pages show runs: recipes are recipes, Python is Python, links lead somewhere."""

import re
import shlex
from pathlib import Path

import pytest

from mmesid.trainer.cli import STAGES
from mmesid.trainer.data.prepared import PreparedDataset
from mmesid.trainer.data.sources import SOURCES
from mmesid.trainer.recipes import plan, read_recipe
from mmesid.trainer.running.help import settings_page
from mmesid.trainer.stages import prepare


ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "AGENTS.md", *ROOT.glob("docs/*.md"), *ROOT.glob("skills/*/*.md")])


def fences(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_to_pages_and_headings(path):
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", path.read_text(encoding="utf-8")):
        name, _, anchor = target.partition("#")
        page = path.parent / name if name else path
        assert page.exists(), target
        assert not anchor or anchor in anchors(page), target


def test_python_on_the_pages_compiles():
    blocks = [(path.name, block) for path in PAGES for block in fences(path, "python")]
    assert len(blocks) >= 5
    for name, block in blocks:
        compile(block, name, "exec")


def test_recipes_on_the_pages_are_recipes(tmp_path):
    blocks = [block for path in PAGES for block in fences(path, "yaml") if block.startswith("output_dir")]
    assert len(blocks) >= 2
    for block in blocks:
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(block)
        assert "evaluate" in dict(plan(recipe, read_recipe(recipe, STAGES), STAGES))


DATA = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
# All but the one that reads from the Hub.
PREPARE = [
    command
    for command in re.findall(r"^    mmesid prepare (--source (?:.*\\\n)*.*)", DATA, re.MULTILINE)
    if "McAuley" not in command
]


@pytest.fixture(scope="module")
def files_of_the_page(tmp_path_factory):
    """The files that the page of data formats shows, each under the name that stands above it."""
    root = tmp_path_factory.mktemp("data_page")
    names: list[str] = []
    for paragraph in DATA.split("\n\n"):
        if paragraph.startswith("```\n"):
            # One file, or the second of two that the paragraph before names.
            path = root / names.pop(0)
            path.parent.mkdir(exist_ok=True)
            path.write_text(paragraph.removeprefix("```\n").removesuffix("```"), encoding="utf-8")
        else:
            assert not names, names
            names = re.findall(r"`([\w/-]+\.(?:csv|txt|jsonl?|inter|dat))`", paragraph) if paragraph[-1] == ":" else []
    return root


@pytest.mark.parametrize("command", PREPARE)
def test_the_files_on_the_page_of_data_formats_are_read(command, files_of_the_page, monkeypatch):
    monkeypatch.chdir(files_of_the_page)
    flags = shlex.split(command.replace("\\\n", " "))
    prepare.main(flags)
    data = PreparedDataset.load(flags[flags.index("--output_dir") + 1])
    users = 3 if "sequences" in flags else 1
    assert (data.num_items, len(data.sequences("test")), data.statistics["interactions"]) == (3, users, 3 * users)
    has_titles = "log.inter" not in flags
    assert all(bool(title) == has_titles for title in data.titles[1:])
    assert any("Teapot" in text or "Peach" in text for text in data.texts) == has_titles


def test_every_source_has_files_on_the_page_of_data_formats():
    assert {command.split()[1] for command in PREPARE} == set(SOURCES) - {"synthetic"}


def test_the_page_of_settings_is_that_of_the_docstrings():
    page = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert page == settings_page(STAGES), "docs/settings.md is out of date; run `make settings`"
