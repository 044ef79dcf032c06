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
import tomllib
from pathlib import Path
from types import SimpleNamespace

from captioning.common.files import RECIPE_FILE, write_atomically


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


def read_recipe(recipe, folder, **sections):
    """`folder`/NAME.toml, or the path of another TOML file -> {section: {key: value}}, typed as the constants are.

    Raises FileNotFoundError that lists the recipes there are, ValueError that names file and key for one that is
    unknown or of the wrong type.
    """
    path = Path(recipe) if Path(recipe).suffix == ".toml" else Path(folder) / f"{recipe}.toml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in Path(folder).glob("*.toml")))
        raise FileNotFoundError(f"{path}: no such recipe; there are {known}")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a TOML file ({error})") from error
    found = {name: {} for name in sections}
    for key, value in values.items():
        section = next((name for name in sections if key in vars(sections[name])), None)
        if section is None:
            near = difflib.get_close_matches(key, [key for s in sections.values() for key in vars(s)], n=1)
            raise ValueError(f"{path}: unknown constant {key}" + (f"; did you mean {near[0]}?" if near else ""))
        default = vars(sections[section])[key]
        if isinstance(default, Path) and isinstance(value, str):
            value = Path(value)
        elif isinstance(default, float) and type(value) is int:
            value = float(value)
        if not isinstance(value, type(default)) or (isinstance(value, bool) and not isinstance(default, bool)):
            raise ValueError(f"{path}: {key} is {value!r}, but must be of type {type(default).__name__}")
        found[section][key] = value
    return found


def merge(given, recipe, folder, root, **sections):
    """The constants of a run: the defaults in `sections`, on top of them those of the recipe (or None), then `given`.

    -> ({section: what the recipe says}, then for each section a dict of all its values). A recipe's paths are seen from
    `root`; its encoder's options and weights do not count where another encoder is given.
    """
    said = read_recipe(recipe, folder, **sections) if recipe else {name: {} for name in sections}
    for name, values in said.items():
        for key, value in values.items():
            own_run = key == "start_from" and value.startswith("captioner/")  # else a hub id or an absolute path
            if isinstance(value, Path) or (value and (key == "captions_file" or own_run)):
                values[key] = type(value)(root / value)
        if "encoder" in given[name]:
            for key in ("encoder_options", "encoder_weights", "preprocessing"):
                values.pop(key, None)
    return said, *({**vars(sections[name]), **said[name], **given[name]} for name in sections)


def as_toml(**sections):
    """Configs (SimpleNamespaces) as the text of a recipe that gives them again."""

    def plain(value):
        if isinstance(value, dict):
            return "{" + ", ".join(f"{json.dumps(key)} = {plain(item)}" for key, item in value.items()) + "}"
        if isinstance(value, (list, tuple)):
            return "[" + ", ".join(plain(item) for item in value) + "]"
        return json.dumps(str(value) if isinstance(value, Path) else value, ensure_ascii=False)

    lines = []
    for name, section in sections.items():
        lines += [f"# {name}", *(f"{key} = {plain(v)}" for key, v in vars(section).items() if v is not None), ""]
    return "\n".join(lines)


def write_recipe(folder, **sections):
    """Print the configs of a run and write them to `folder`/recipe.toml, a recipe that gives the run again."""
    text = as_toml(**sections)
    print(text)
    write_atomically(Path(folder) / RECIPE_FILE, lambda path: path.write_text(text, encoding="utf-8"))


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


def add_decoding_arguments(parser):
    """The options that say how a tool chooses words; `decoding_options` reads them."""
    parser.add_argument("--beam", type=int, metavar="N", help="beam search with N beams (default: greedy)")
    parser.add_argument("--length_penalty", type=float, help="of beam search; above 1 longer captions (default: 1.0)")
    parser.add_argument("--sample", action="store_true", help="draw the words")
    parser.add_argument("--temperature", type=float, help="of the draws; given, words are drawn (default: 1.0)")
    parser.add_argument("--top_k", type=int, help="draw from the k likeliest words only")
    parser.add_argument("--top_p", type=float, help="draw from the likeliest words that have this probability together")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: 0)")
    parser.add_argument(
        "--precision",
        default="auto",
        help='"float32", "bf16" (on newer CPUs faster, a few words may differ) or "auto": bf16 or fp16 on CUDA only',
    )


def decoding_options(args):
    """Parsed arguments -> keyword arguments of `decoding.Options`. Raises ValueError for two ways at once."""
    draws = {key: value for key in ("temperature", "top_k", "top_p") if (value := getattr(args, key)) is not None}
    if args.sample or draws:
        if args.beam is not None or args.length_penalty is not None:
            raise ValueError("choose beam search (--beam) or sampling (--sample, --temperature, --top_k, --top_p)")
        return dict(deterministic=False, seed=args.seed, **draws)
    if args.length_penalty is not None and (args.beam or 1) < 2:
        raise ValueError("--length_penalty is for beam search: give --beam 2 or more")
    penalty = 1.0 if args.length_penalty is None else args.length_penalty
    return dict(deterministic=True, num_beams=1 if args.beam is None else args.beam, length_penalty=penalty)
