"""Recipes: TOML files with the constants that differ for one experiment."""

import difflib
import json
import tomllib
from pathlib import Path

from captioning.common.files import RECIPE_FILE, write_atomically


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
