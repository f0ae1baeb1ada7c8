"""`mmesid <stage> --help`: from the source text of the classes that declare the settings, without importing them."""

import ast
import re
import textwrap
from collections.abc import Iterable

from .declarations import Declaration, Setting, find_class, stage_declaration, stage_settings


HELP_FLAGS = frozenset({"-h", "--help", "--help_all"})
WIDTH = 100
_PAGE = """# Settings

Every setting of every stage, and of the models' configurations, written by `make settings` from the docstrings that
also make `mmesid <stage> --help`. A setting is a flag (`--max_history 30`) and a key of a recipe."""


def stage_help(stage: str, all_settings: bool = False) -> str:
    """The help of a stage: the settings that this project declares, grouped, then one line on those of
    [`~transformers.TrainingArguments`], or, with `all_settings`, these too."""
    settings = stage_settings(stage).values()
    own = [setting for setting in settings if setting.owner != "TrainingArguments"]
    inherited = [setting for setting in settings if setting.owner == "TrainingArguments"]
    summary = (ast.get_docstring(stage_declaration(stage).node) or "").partition("\n\n")[0]
    first = ast.literal_eval(stage_declaration(stage).constant("positional") or "None") or "[settings.yaml]"
    lines = [f"usage: mmesid {stage} {first} [--flag value ...]", "", *_wrapped(summary, 0)]
    for group in dict.fromkeys(setting.group for setting in own):
        lines += ["", f"{group}:", *(line for one in own if one.group == group for line in _explained(one))]
    if inherited and all_settings:
        lines += ["", "transformers.TrainingArguments:", *(line for one in inherited for line in _explained(one))]
    elif inherited:
        changed = (f"{one.name} {_shown(one.default)}" for one in inherited if one.default != one.first_default)
        text = f"The flags of transformers.TrainingArguments besides (by default {', '.join(changed)}): --help_all "
        lines += ["", *_wrapped(text + "explains them.", 0)]
    return "\n".join(lines)


def settings_page(stages: Iterable[str]) -> str:
    """`docs/settings.md`: the settings of all stages and of the models that they make, as tables."""
    page = [_PAGE]
    configurations: dict[str, Declaration] = {}
    for stage in stages:
        declaration = stage_declaration(stage)
        summary = (ast.get_docstring(declaration.node) or "").partition("\n\n")[0]
        page += [f"\n## mmesid {stage}\n", " ".join(summary.split())]
        settings = stage_settings(stage).values()
        own = [setting for setting in settings if setting.owner != "TrainingArguments"]
        for group in dict.fromkeys(setting.group for setting in own):
            page += _table(group, [one for one in own if one.group == group])
        changed = [one for one in settings if one.owner == "TrainingArguments" and one.default != one.first_default]
        if changed:
            defaults = ", ".join(f"`{one.name}` {_shown(one.default)}" for one in changed)
            page.append(f"\nOf `transformers.TrainingArguments` other defaults: {defaults}.")
        name = declaration.constant("config_class")
        if (configuration := find_class(declaration.file, name)) is not None:
            configurations[name] = configuration
    for name, configuration in configurations.items():
        page += [f"\n## {name}", *_table("", list(configuration.settings.values()))]
    return "\n".join(page) + "\n"


def _table(group: str, settings: list[Setting]) -> list[str]:
    rows = [f"\n| {group or 'setting'} | takes | default | |", "| --- | --- | --- | --- |"]
    for one in settings:
        default = "required" if one.default is None else "" if one.default == "None" else f"`{_shown(one.default)}`"
        cells = f"`{one.name}`", _kind(one.type), default, one.help
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return rows


def _explained(setting: Setting) -> list[str]:
    value = "required" if setting.default is None else f"default: {_shown(setting.default)}"
    if setting.default == "None":
        value = "optional"
    return [f"  --{setting.name} {_kind(setting.type)}  ({value})", *_wrapped(setting.help, 6)]


def choices_of(annotation: str) -> list[str]:
    """What a flag chooses from, as its text; empty where it takes anything."""
    if choices := re.search(r"Literal\[(.*?)\]", annotation):
        return list(map(str, ast.literal_eval(f"[{choices[1]}]")))
    return ["true", "false"] if re.search(r"\bbool\b", annotation) and "float" not in annotation else []


def _kind(annotation: str) -> str:
    """What a flag takes: its choices, or the word for its type."""
    if "Literal" in annotation:
        return "{" + ",".join(choices_of(annotation)) + "}"
    if members := re.search(r"\blist\[?(\w*)", annotation):
        return f"{(members[1] or 'str').upper()} ..."
    names = [name for name in annotation.split(" | ") if name not in ("None", "dict")]
    return "FLOAT" if "float" in names else "true|false" if "bool" in names else names[0].upper()


def _shown(default: str | None) -> str:
    """A default as it would be given: lists and words without Python's signs."""
    try:
        value = ast.literal_eval(default or "None")
    except ValueError:
        return str(default)
    if isinstance(value, list | tuple):
        return " ".join(map(str, value)) or "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _wrapped(text: str, indent: int) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=" " * indent, subsequent_indent=" " * indent)
