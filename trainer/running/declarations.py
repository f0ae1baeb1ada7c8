"""
The settings of a stage, read from the source text of the classes that declare them: `mmesid <stage> --help` and the
plan of a recipe need names, types, defaults and help, and do not wait for torch.
"""

import ast
import dataclasses
import functools
import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


STAGES_DIR = Path(__file__).parents[1] / "stages"
_ENTRY = re.compile(r"(?P<name>\w+) ?\(.*?\): (?P<help>.*)")


@dataclass(frozen=True)
class Setting:
    """
    Args:
        name (`str`): The flag without its dashes, and the key in a recipe.
        type (`str`): The annotation, as written.
        default (`str`, *optional*): The default, as written; `None` where a value is required.
        help (`str`): The docstring's entry; empty where the class redeclares a setting of a base class.
        group (`str`): The heading in the docstring below which the entry stands.
    """

    name: str
    type: str
    default: str | None
    help: str = ""
    group: str = ""


@dataclass(frozen=True)
class Declaration:
    """A class as its source text says it: what it is, its own settings by name, and its constants."""

    file: Path
    node: ast.ClassDef

    @property
    def base(self) -> "Declaration | None":
        """The first class that this one extends."""
        return next(self.bases, None)

    @property
    def bases(self) -> Iterator["Declaration | None"]:
        """The classes that this one extends."""
        return (find_class(self.file, ast.unparse(base)) for base in self.node.bases)

    @property
    def settings(self) -> dict[str, Setting]:
        """The settings of the class and of its bases, in the order of the docstrings; a subclass redeclares."""
        settings: dict[str, Setting] = {}
        for base in self.bases:
            settings |= base.settings if base is not None else {}
        helps = dict(_docstring_entries(ast.get_docstring(self.node) or ""))
        for item in self.node.body:
            if isinstance(item, ast.AnnAssign) and not ast.unparse(item.annotation).startswith("ClassVar"):
                name = ast.unparse(item.target)
                inherited = settings.get(name)
                group, help = helps.get(name, (inherited.group, inherited.help) if inherited else ("", ""))
                default = self._default(item.value)
                settings[name] = Setting(name, ast.unparse(item.annotation), default, help, group)
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
        if isinstance(value, ast.Name) and (found := _find(self.file, value.id)) is not None:
            value = getattr(found[1], "value", value)
        return None if value is None else ast.unparse(value)

    def constant(self, name: str) -> ast.expr | None:
        """The value that the class body gives a name, or `None`."""
        found = (item.value for item in self.node.body if isinstance(item, ast.Assign) and _defines(item, name))
        return next(found, None)

    def named_class(self, constant: str) -> "Declaration | None":
        """The class that a constant of this class names."""
        value = self.constant(constant)
        return None if value is None else find_class(self.file, ast.unparse(value))


def stage_settings(stage: str) -> dict[str, Setting]:
    """All settings of a stage by name: its own, those of the model that it offers, and those of the training."""
    declaration = stage_declaration(stage)
    training = declaration.named_class("training_class")
    own = declaration.settings | _model_settings(declaration)
    return own | {name: one for name, one in (training.settings if training else {}).items() if name not in own}


def inherited_settings(stage: str) -> dict[str, Setting]:
    """The settings of a stage that [`~transformers.TrainingArguments`] declares, as it declares them, less those that
    the stage declares itself."""
    declaration = stage_declaration(stage)
    ancestor = declaration.named_class("training_class")
    while ancestor is not None and ancestor.base is not None:
        ancestor = ancestor.base
    settings = ancestor.settings if ancestor else {}
    return {name: one for name, one in settings.items() if name not in declaration.settings}


def stage_summary(stage: str) -> str:
    """What a stage does, in the first sentences of its docstring."""
    docstring = ast.get_docstring(stage_declaration(stage).node) or ""
    return " ".join(docstring.partition("\n\n")[0].split())


def stage_declaration(stage: str) -> Declaration:
    """The arguments class of a stage: the one class of its file whose name ends in `Arguments`."""
    file = STAGES_DIR / f"{stage}.py"
    nodes = [node for node in _tree(file).body if isinstance(node, ast.ClassDef) and node.name.endswith("Arguments")]
    return Declaration(file, nodes[-1])


def _model_settings(declaration: Declaration) -> dict[str, Setting]:
    names, config = declaration.constant("model_settings"), declaration.named_class("config_class")
    if names is None or config is None:
        return {}
    return {
        name: dataclasses.replace(config.settings[name], group=group)
        for group, members in ast.literal_eval(names).items()
        for name in members
    }


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
