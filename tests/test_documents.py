"""What the pages show runs: recipes are recipes, Python is Python, links lead somewhere."""

import re
from pathlib import Path

import pytest

from mmesid.trainer.cli import STAGES
from mmesid.trainer.recipes import plan, read_recipe
from mmesid.trainer.running.help import settings_page


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


def test_the_page_of_settings_is_that_of_the_docstrings():
    page = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert page == settings_page(STAGES), "docs/settings.md is out of date; run `make settings`"
