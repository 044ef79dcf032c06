"""Typed overrides for the constants at the top of the script, from a recipe or as `--key value`, and a `--help` made
from their comments.

A recipe is a TOML file with the constants that differ for one experiment: `key = value`, in any order.
"""

import argparse
import ast
import difflib
import io
import json
import tokenize
from pathlib import Path
from types import SimpleNamespace


def constant_comments(source_file, names):
    """The comment behind each keyword of `name = SimpleNamespace(key=value,  # comment ...)` -> {key: comment}."""
    source = Path(source_file).read_text(encoding="utf-8")
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comment_on = {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}
    return {
        keyword.arg: comment_on.get(keyword.value.end_lineno, "")
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Call)
        and getattr(node.targets[0], "id", None) in names
        for keyword in node.value.keywords
    }


def _parser_of(default):
    """The function that turns the text of an override into the type of the constant's default."""

    def boolean(text):
        if text.lower() not in ("true", "false"):
            raise ValueError
        return text.lower() == "true"

    def mapping(text):
        value = json.loads(text)
        if not isinstance(value, dict):
            raise ValueError
        return value

    kind = type(default)
    boolean.__name__, mapping.__name__ = "true or false", "JSON object"
    return {bool: boolean, dict: mapping, type(Path()): Path}.get(kind, kind)


def _plain(default):
    return json.dumps(default) if isinstance(default, (dict, bool)) else str(default)


def parse_overrides(argv, source_file, **sections):
    """Read `argv` -> ({section: {key: value}}, holding only what was given; recipe, a name, path or None; download).

    `sections` are the SimpleNamespaces with the defaults, under their names in `source_file`. `-` and `_` in a key
    are the same. An unknown key ends the program (status 2) with the nearest known one, a value of the wrong type
    with what was expected; `--help` prints every constant with its comment and default.
    """
    comments = constant_comments(source_file, set(sections))
    parser = argparse.ArgumentParser(
        prog=Path(source_file).name,
        description=ast.get_docstring(ast.parse(Path(source_file).read_text(encoding="utf-8"))),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage="%(prog)s [--recipe NAME] [--download] [--key value ...]",
    )
    parser.add_argument("--recipe", metavar="NAME", help="constants of recipes/NAME.toml, or of another TOML file")
    parser.add_argument("--download", action="store_true", help="fetch the public dataset that is not there yet")
    for name, section in sections.items():
        group = parser.add_argument_group(name)
        for key, default in vars(section).items():
            text = f"{comments.get(key, '')} (default: {_plain(default) or 'empty'})"
            group.add_argument(
                f"--{key}",
                type=_parser_of(default),
                default=argparse.SUPPRESS,
                metavar=type(default).__name__,
                help=text.replace("%", "%%").strip(),
            )
    given, unknown = parser.parse_known_args(with_underscores(argv))
    if unknown:
        key = unknown[0].partition("=")[0]
        near = difflib.get_close_matches(key, [f"--{key}" for s in sections.values() for key in vars(s)], n=1)
        parser.error(f"unknown option {key}" + (f"; did you mean {near[0]}?" if near else "; see --help"))
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


def with_defaults(config, defaults):
    """A copy of `config` in which every attribute it lacks has the value it has in `defaults`."""
    return SimpleNamespace(**{**vars(defaults), **vars(config)})


def what_to_give(model_config, gpt2_repo):
    """For a run without network: what it would have downloaded, and how to give it from local files -> text."""
    if model_config.start_from:
        return f"The captioner to start from, {model_config.start_from}, was not to be had: --start_from FOLDER"
    needs = []
    if model_config.tokenizer == "gpt2" or model_config.decoder_weights == "pretrained":
        needs.append(
            f"    GPT-2's tokenizer and weights ({gpt2_repo}): set the environment variable HF_GPT2_REPO=FOLDER,\n"
            "        a folder with vocab.json, merges.txt and, unless --decoder_weights scratch, config.json and\n"
            "        model.safetensors"
        )
    if "/" in str(model_config.encoder):
        needs.append(
            f"    the vision model {model_config.encoder}: --encoder FOLDER, its folder as transformers saves it"
        )
    elif model_config.encoder_weights == "pretrained":
        needs.append(
            f"    the weights of {model_config.encoder}: --encoder_weights FILE, a .safetensors or .pth file with\n"
            "        timm's key names"
        )
    return "\n".join([
        "This run needs, from the network or from local copies:", *needs,
        "or train from random weights, which takes far longer to get good:",
        "    --tokenizer bpe --decoder_weights scratch --encoder_weights scratch",
    ])  # fmt: skip
