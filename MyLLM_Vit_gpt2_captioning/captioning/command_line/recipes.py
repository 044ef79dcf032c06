"""Recipes: TOML files with the constants that differ for one experiment."""

import dataclasses
import json
import math
import tomllib
from pathlib import Path

from captioning.common.config import as_type, nearest
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
        section = next((name for name, config in sections.items() if key in vars(config)), None)
        if section is None:
            near = nearest(key, [key for config in sections.values() for key in vars(config)])
            raise ValueError(f"{path}: unknown constant {key}" + (f"; did you mean {near}?" if near else ""))
        kind = next(field.type for field in dataclasses.fields(sections[section]) if field.name == key)
        try:
            found[section][key] = as_type(key, value, kind)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    return found


def recipe_constants(recipe, given, folder, root, model_config, train_config):
    """The constants of a run: those `given` on the command line, on top of those of a recipe (or None), on top of the
    defaults in `model_config` and `train_config` -> {"model_config": {key: value}, "train_config": {key: value}}.

    With a captioner to start from (`start_from`), only what was chosen on top of it stays in "model_config": it brings
    the rest. A recipe's constants are chosen on top of the captioner that the recipe itself names.
    """
    sections = dict(model_config=model_config, train_config=train_config)
    from_recipe = {name: {} for name in sections}
    if recipe:
        from_recipe = _resolved(read_recipe(recipe, folder, **sections), given, root)
    train = from_recipe["train_config"] | given["train_config"]
    model = from_recipe["model_config"] | given["model_config"]
    start_from = model.get("start_from", model_config.start_from)
    if not start_from:
        model = vars(model_config) | model
    elif "start_from" in given["model_config"] or "start_from" not in model:
        model = given["model_config"] | {"start_from": start_from}
    return {"model_config": model, "train_config": train}


def _resolved(constants, given, root):
    """Constants of a recipe, with paths relative to `root`; without options and weights of an encoder that the command
    line replaces."""
    for name, values in constants.items():
        for key, value in values.items():
            own_run = key == "start_from" and value.startswith("captioner/")  # else a hub id or an absolute path
            if isinstance(value, Path) or (value and (key in ("captions_file", "exclude") or own_run)):
                values[key] = type(value)(root / value)
        if "encoder" in given[name]:
            for key in ("encoder_options", "encoder_weights", "preprocessing"):
                values.pop(key, None)
    return constants


def as_toml(**sections):
    """Configs, or other objects with attributes, as the text of a recipe that gives them again."""

    def plain(value):
        if isinstance(value, dict):
            return "{" + ", ".join(f"{json.dumps(key)} = {plain(item)}" for key, item in value.items()) + "}"
        if isinstance(value, (list, tuple)):
            return "[" + ", ".join(plain(item) for item in value) + "]"
        if isinstance(value, float) and math.isinf(value):
            return str(value)  # inf, which JSON would write in another way
        return json.dumps(str(value) if isinstance(value, Path) else value, ensure_ascii=False)

    lines = []
    for name, section in sections.items():
        lines += [f"# {name}", *(f"{key} = {plain(v)}" for key, v in vars(section).items() if v is not None), ""]
    return "\n".join(lines)


def write_recipe(folder, model_config, train_config):
    """Print the constants of a run, and write `folder`/recipe.toml, a recipe that repeats the run from its beginning,
    also where it was a resumed one."""
    print(as_toml(model_config=model_config, train_config=train_config))
    text = as_toml(model_config=model_config, train_config=dataclasses.replace(train_config, resume=""))
    write_atomically(Path(folder) / RECIPE_FILE, lambda path: path.write_text(text, encoding="utf-8"))
