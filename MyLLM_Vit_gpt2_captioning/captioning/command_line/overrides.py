"""Typed overrides of the constants at the top of the script, as `--key value`; `--help` shows their comments."""

import argparse
import ast
import dataclasses
import io
import json
import tokenize
from pathlib import Path

from captioning.common.config import nearest


def constant_comments(source_file, class_names):
    """The comment behind each field of the dataclasses `class_names` in a source file -> {field: comment}."""
    source = Path(source_file).read_text(encoding="utf-8")
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comment_on_line = {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}
    return {
        field.target.id: comment_on_line.get(field.end_lineno, "")
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef) and node.name in class_names
        for field in node.body
        if isinstance(field, ast.AnnAssign)
    }


def _boolean(text):
    if text.lower() not in ("true", "false"):
        raise ValueError
    return text.lower() == "true"


def _mapping(text):
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError
    return value


_boolean.__name__, _mapping.__name__ = "true or false", "JSON object"  # what argparse calls them in its errors
PARSERS = {bool: _boolean, dict: _mapping}  # of the types whose constructor does not read what a user types


def parse_overrides(argv, source_file, **sections):
    """Read `argv` -> ({section: {key: value}}, holding only what was given; recipe, a name, path or None; download).

    `sections`: the `Config`s with the defaults, whose classes stand in `source_file`. `-` and `_` in a key are the
    same. An unknown key ends the program (status 2) with the nearest known one, a value of the wrong type with what was
    expected; `--help` prints every constant with its comment and default.
    """
    comments = constant_comments(source_file, {type(section).__name__ for section in sections.values()})
    parser = argparse.ArgumentParser(
        prog=Path(source_file).name,
        description=ast.get_docstring(ast.parse(Path(source_file).read_text(encoding="utf-8"))),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage="%(prog)s [--recipe NAME] [--download] [--key value ...] [--sweep key=value,value ...]",
    )
    parser.add_argument("--recipe", metavar="NAME", help="constants of recipes/NAME.toml, or of another TOML file")
    parser.add_argument("--download", action="store_true", help="fetch the public dataset that is not there yet")
    parser.add_argument(
        "--sweep", nargs="+", metavar="KEY=VALUE,VALUE", help="a run for every combination, each in its own folder"
    )
    for name, section in sections.items():
        group = parser.add_argument_group(name)
        for field in dataclasses.fields(section):
            default = getattr(section, field.name)
            shown = json.dumps(default) if isinstance(default, (dict, bool)) else str(default)
            group.add_argument(
                f"--{field.name}",
                type=PARSERS.get(field.type, field.type),
                default=argparse.SUPPRESS,
                metavar=field.type.__name__,
                help=f"{comments[field.name]} (default: {shown or 'empty'})".replace("%", "%%"),
            )
    given, unknown = parser.parse_known_args(with_underscores(argv))
    if given.sweep:
        parser.error("--sweep is for the command line of the script: these are the constants of one run")
    if unknown:
        key = unknown[0].partition("=")[0]
        near = nearest(key, [f"--{key}" for section in sections.values() for key in vars(section)])
        parser.error(f"unknown option {key}" + (f"; did you mean {near}?" if near else "; see --help"))
    overrides = {
        name: {key: value for key, value in vars(given).items() if key in vars(section)}
        for name, section in sections.items()
    }
    return overrides, given.recipe, given.download


def with_underscores(argv):
    """["--batch-size=8", ...] -> ["--batch_size=8", ...]: both spellings are fine; values stay as they are."""
    words = [word.partition("=") if word.startswith("--") else (word, "", "") for word in argv]
    return [
        "--" + key[2:].replace("-", "_") + equals + value if key.startswith("--") else key
        for key, equals, value in words
    ]
