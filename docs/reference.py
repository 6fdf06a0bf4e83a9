"""Make docs/reference.md: every key of the configuration, from conf/ and the schemas in fmexp/config.

`python docs/reference.py` writes it; with `--check` it writes nothing, and exits with 1 where the page is out of date.
"""

import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from fmexp import compose
from fmexp.config import Config, conf_dir, flat
from fmexp.config.plugin_options import PACKAGE
from fmexp.sweep import plugins

PAGE = Path(__file__).with_name("reference.md")
INTRO = """\
# Reference

Every key of the configuration, by group. `key=value` sets one, `group=option` chooses. `python docs/reference.py` makes
this page from `conf/` and the schemas in `fmexp/config/options.py`, whose comments are the meanings below. How to
begin is in [tutorial.md](tutorial.md), options of your own are in [own.md](own.md).
"""
WORDS = {int: "integer", float: "number", str: "text", bool: "true or false", type(None): "null", Any: "anything"}
LIMITS = {"least": "at least", "most": "at most", "above": "above", "below": "below"}


@cache
def page() -> str:
    """The whole text."""
    root = conf_dir() / "config.yaml"
    chosen = {str(group): name for entry in _raw(root)["defaults"] if isinstance(entry, dict)
              for group, name in entry.items()}  # fmt: skip
    parts = [INTRO, f"## Of no group\n\n{_said(root)}\n", _table(_keys_of_no_group(root))]
    for folder in sorted(path for path in conf_dir().iterdir() if path.is_dir() and path.name != "hydra"):
        parts.append(f"## {folder.name}\n")
        for path in sorted(folder.glob("*.yaml")):
            default = " (the default)" if chosen.get(folder.name) == path.stem else ""
            parts += [f"### `{folder.name}={path.stem}`{default}\n" if folder.name != "stage" else f"### {path.stem}\n"]
            parts += [f"{_said(path)}\n", *_option(folder.name, path)]
    return "\n".join([*parts, *_hydra(root)])


def _option(group: str, path: Path) -> Iterator[str]:
    """The tables of an option: its keys, or, where it speaks of several groups, what it sets."""
    if path.read_text().startswith("# @package _global_"):
        yield _table(_settings(path), heads=("Key", "Value"))
        return
    if group == "stage":
        node = _composed().stage.get(path.stem) or _composed(f"+stage={path.stem}").stage[path.stem]
        prefix, inside = f"stage.{path.stem}.", f"{path.stem}."
    else:
        node, prefix, inside = _composed(f"{group}={path.stem}")[group], f"{group}.", ""
    schema = OmegaConf.get_type(node)
    values = OmegaConf.to_container(node, resolve=False, enum_to_str=True)
    here, there = _comments(path), _notes(schema)
    yield _table(
        (prefix + name, _shown(values[name]), kind, here.get(inside + name) or there.get(name))
        for name, kind in _kinds(schema).items()
    )


def _keys_of_no_group(path: Path) -> Iterator[tuple[str, ...]]:
    written, comments = flat(_raw(path)), _comments(path)

    def rows(schema: type, prefix: str) -> Iterator[tuple[str, ...]]:
        hints = get_type_hints(schema)
        for name, kind in _kinds(schema).items():
            if is_dataclass(hints[name]):
                yield from rows(hints[name], f"{prefix}{name}.")
            elif prefix + name in written:
                yield prefix + name, _shown(written[prefix + name]), kind, comments.get(prefix + name, "")

    yield from rows(Config, "")


def _settings(path: Path) -> Iterator[tuple[str, ...]]:
    """The options that a file chooses and the keys that it sets."""
    content = _raw(path)
    for entry in content.pop("defaults", []):
        for group, name in entry.items() if isinstance(entry, dict) else ():
            yield group.removeprefix("override /"), _shown(name)
    for key, value in flat(content).items():
        yield key.replace(r"\.", "."), _shown(value)  # a key of Hydra's sweeper is a name with dots


def _hydra(root: Path) -> Iterator[str]:
    """Hydra's own keys and groups, as far as fmexp sets them."""
    yield "## hydra\n\nWhat fmexp sets of Hydra's own keys; `--hydra-help` and Hydra's manual have the others.\n"
    written, comments = _raw(root)["hydra"], _comments(root)
    yield _table(
        ((f"hydra.{key}", _shown(value), comments.get(f"hydra.{key}")) for key, value in flat(written).items()),
        heads=("Key", "Default", "Meaning"),
    )
    for path in sorted((conf_dir() / "hydra").rglob("*.yaml")):
        yield f"### `hydra/{path.parent.name}={path.stem}`\n\n{_said(path)}\n"
    store = ConfigStore.instance()
    for group in ("launcher", "sweeper"):
        for file in sorted(store.list(f"hydra/{group}")):
            node = store.load(f"hydra/{group}/{file}").node
            package, _, name = OmegaConf.to_container(node)["_target_"].rpartition(".")
            if package != PACKAGE:
                continue
            about = inspect.cleandoc(getattr(plugins, name).__doc__).partition("\n\n")[0]
            yield f"### `hydra/{group}={file.removesuffix('.yaml')}`\n\n{' '.join(about.split())}\n"
            schema = OmegaConf.get_type(node)
            values, notes = OmegaConf.to_container(node, resolve=False), _notes(schema)
            yield _table(
                (f"hydra.{group}.{key}", _shown(values[key]), kind, notes[key])
                for key, kind in _kinds(schema).items() if not key.startswith("_")
            )  # fmt: skip


# Reading


@cache
def _composed(*overrides: str) -> DictConfig:
    return compose(overrides)


def _raw(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(path.read_text())
    return content


def _said(path: Path) -> str:
    """The sentence with which a file begins, and a link to the file."""
    line = next(line for line in path.read_text().splitlines() if not line.startswith("# @package"))
    place = path.relative_to(conf_dir().parent)
    return f"{line.removeprefix('# ')} [{place}](../{place})"


def _comments(path: Path) -> dict[str, str]:
    """The comments behind the values of a YAML file, by the key with its dots."""
    lines = path.read_text().splitlines()

    def walk(node: Any, prefix: str) -> Iterator[tuple[str, str]]:
        for key, value in node.value:
            name = f"{prefix}{key.value}"
            if isinstance(value, yaml.MappingNode):
                yield from walk(value, f"{name}.")
            end = value.end_mark if value.end_mark.line == key.end_mark.line else key.end_mark
            if said := re.fullmatch(r"[\s:}]*#\s*(.*)", lines[end.line][end.column :]):
                yield name, said[1]

    return dict(walk(yaml.compose(path.read_text()), ""))


def _notes(schema: type) -> dict[str, str]:
    """The comments at the fields of a schema and its bases: at the end of the line, or in the line above."""
    found = {}
    for base in reversed(schema.__mro__[:-1]):
        above = ""
        for line in map(str.strip, inspect.getsource(base).splitlines()):
            field = re.fullmatch(r"(\w+): .*?(?:  # (.*))?", line)
            if field and (said := field[2] or above):
                found[field[1]] = said
            above = line.removeprefix("# ") if line.startswith("# ") else ""
    return found


def _kinds(schema: type) -> dict[str, str]:
    """Type and range of each field, in words."""
    hints = get_type_hints(schema)
    return {field.name: _kind(hints[field.name], dict(field.metadata)) for field in fields(schema)}


def _kind(hint: Any, limits: dict[str, Any]) -> str:
    if "one_of" in limits:
        return "list of " * ("each" in limits) + _either([_shown(value) for value in limits["one_of"]])
    ranges = [f"{LIMITS[name]} {limit:g}" if isinstance(limit, float) else f"{LIMITS[name]} {limit}"
              for name, limit in limits.items() if name in LIMITS]  # fmt: skip
    kind = f"{limits['word']} or {WORDS[int]}" if "word" in limits else _type(hint)
    return ", ".join([kind, *ranges])


def _type(hint: Any) -> str:
    parts = get_args(hint)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return _either([one.name for one in hint])
    if get_origin(hint) is list:
        return f"list of {_type(parts[0])}s"
    if get_origin(hint) is dict:
        return "mapping"
    if get_origin(hint) is tuple:
        return f"{len(parts)} {_type(parts[0])}s"
    return _either([_type(part) for part in parts]) if parts else WORDS.get(hint, "")


# Writing


def _either(words: list[str]) -> str:
    return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def _shown(value: Any) -> str:
    """A value as YAML has it in one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=10_000, sort_keys=False).splitlines()[0]


def _table(rows: Any, heads: tuple[str, ...] = ("Key", "Default", "Type and range", "Meaning")) -> str:
    """Markdown; the first two columns are code."""
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for key, value, *words in rows:
        if not all(words):
            raise SystemExit(f"{key} has no comment that says what it means, neither in YAML nor in the schema.")
        cells = [f"`{key}`", f"`{value}`", *(word.replace("<", "\\<").replace("|", "\\|") for word in words)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(words: list[str], path: Path = PAGE) -> None:
    """Write the page, or check it."""
    text = page()
    if words == ["--check"]:
        if not path.is_file() or path.read_text() != text:
            raise SystemExit(f"{path.name} is out of date; make it again with: python docs/reference.py")
    elif words:
        raise SystemExit("usage: python docs/reference.py [--check]")
    else:
        path.write_text(text)


if __name__ == "__main__":
    main(sys.argv[1:])
