"""
The settings of a stage, read from the source text of the classes that declare them: `mmesid <stage> --help` and the
plan of a recipe need names, types, defaults and help, and do not wait for torch.
"""

import ast
import functools
import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path


STAGES_DIR = Path(__file__).parents[1] / "stages"
_ENTRY = re.compile(r"(?P<name>\w+) ?\(.*?\): (?P<help>.*)")


@dataclass(frozen=True)
class Setting:
    """A flag, by its name without dashes, which is also the key in a recipe."""

    name: str
    # The annotation and the default, as written; no default where a value is required.
    type: str
    default: str | None
    # The docstring's entry, and the heading below which it stands.
    help: str
    group: str
    # The class that explains it, and the default that it had there.
    owner: str
    first_default: str | None


@dataclass(frozen=True)
class Declaration:
    """A class as its source text says it."""

    file: Path
    node: ast.ClassDef

    @property
    def settings(self) -> dict[str, Setting]:
        """The settings of the class and of its bases, in the order of the docstrings; a subclass redeclares."""
        settings: dict[str, Setting] = {}
        for base in self.node.bases:
            if (declaration := find_class(self.file, ast.unparse(base))) is not None:
                settings |= declaration.settings
        helps = dict(_docstring_entries(ast.get_docstring(self.node) or ""))
        for item in self.node.body:
            if isinstance(item, ast.AnnAssign) and not ast.unparse(item.annotation).startswith("ClassVar"):
                name, hint, default = ast.unparse(item.target), ast.unparse(item.annotation), self._default(item.value)
                if name in settings and name not in helps:
                    settings[name] = replace(settings[name], type=hint, default=default)
                else:
                    group, help = helps.get(name, ("", ""))
                    settings[name] = Setting(name, hint, default, help, group, self.node.name, default)
        # Those of the class itself first, in the order of its docstring.
        return {name: settings[name] for name in helps if name in settings} | settings

    def _default(self, value: ast.expr | None) -> str | None:
        """The default as it is written, of `field(...)` what is inside; `None` where there is none."""
        if isinstance(value, ast.Call) and ast.unparse(value.func) == "field":
            given = {keyword.arg: keyword.value for keyword in value.keywords}
            factory = given.get("default_factory")
            value = given.get("default", factory.body if isinstance(factory, ast.Lambda) else factory)
        if isinstance(value, ast.Call) and ast.unparse(value.func) == "list":
            value = value.args[0]
        if isinstance(value, ast.Name) and value.id == "list":
            # An empty one: nothing is set.
            return "None"
        if isinstance(value, ast.Name) and (found := _find(self.file, value.id)) is not None:
            value = getattr(found[1], "value", value)
        return None if value is None else ast.unparse(value)

    def constant(self, name: str) -> str:
        """The value that the class body gives a name, as written; empty where it gives none."""
        found = (item.value for item in self.node.body if isinstance(item, ast.Assign) and _defines(item, name))
        return next(map(ast.unparse, found), "")


def stage_settings(stage: str) -> dict[str, Setting]:
    """All settings of a stage by name: its own, those of the model that it offers, and those of the training."""
    declaration = stage_declaration(stage)
    settings = declaration.settings
    if (config := find_class(declaration.file, declaration.constant("config_class"))) is not None:
        for group, names in ast.literal_eval(declaration.constant("model_settings")).items():
            settings |= {name: replace(config.settings[name], group=group) for name in names}
    if (training := find_class(declaration.file, declaration.constant("training_class"))) is not None:
        # Last the stage's own again: they stand for those of the same name.
        settings = settings | training.settings | settings
    return settings


def stage_declaration(stage: str) -> Declaration:
    """The arguments class of a stage: the one class of its file whose name ends in `Arguments`."""
    file = STAGES_DIR / f"{stage}.py"
    nodes = [node for node in _tree(file).body if isinstance(node, ast.ClassDef) and node.name.endswith("Arguments")]
    return Declaration(file, nodes[-1])


def find_class(file: Path, name: str) -> Declaration | None:
    """A class by the name that a module knows it by, imports followed; `None` for one of another library than this
    project and transformers' modules."""
    home, node = _find(file, name) or (file, None)
    return Declaration(home, node) if isinstance(node, ast.ClassDef) else None


def _find(file: Path, name: str) -> tuple[Path, ast.stmt] | None:
    """The file and the statement that define a name of a module."""
    for node in _tree(file).body:
        if _defines(node, name):
            return file, node
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name and (source := _module_file(file, node)) is not None:
                    return _find(source, alias.name)
    return None


def _defines(node: ast.stmt, name: str) -> bool:
    if isinstance(node, ast.ClassDef):
        return node.name == name
    return isinstance(node, ast.Assign) and any(isinstance(one, ast.Name) and one.id == name for one in node.targets)


def _module_file(file: Path, node: ast.ImportFrom) -> Path | None:
    parts = (node.module or "").split(".")
    if node.level:
        base = file.parents[node.level - 1]
    elif parts[0] in ("modeling_mmesid", "transformers"):
        spec = importlib.util.find_spec(parts[0])
        base, parts = Path(str(spec and spec.origin)).parent, parts[1:]
    else:
        return None
    path = base.joinpath(*parts)
    return next((found for found in (path.with_suffix(".py"), path / "__init__.py") if found.is_file()), None)


@functools.cache
def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def _docstring_entries(docstring: str) -> Iterator[tuple[str, tuple[str, str]]]:
    """Name, heading and help of every entry below `Args:` or `Parameters:`, in the style of transformers."""
    _, found, section = docstring.partition("\nArgs:\n")
    section = section if found else docstring.partition("\nParameters:\n")[2]
    # The section ends where the next one is as little indented as its own heading.
    section = re.split(r"\n(?=\S)", section)[0]
    group = ""
    for block in re.split(r"\n(?=    \S)|^    ", section):
        text = " ".join(block.split())
        if text.startswith("> "):
            group = text.removeprefix("> ")
        elif (entry := _ENTRY.fullmatch(text)) is not None:
            yield entry["name"], (group, entry["help"])
