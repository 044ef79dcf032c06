"""Typed constants: dataclasses that refuse an attribute they do not have, and name the nearest one."""

import dataclasses
import difflib
import numbers
from pathlib import Path

import torch


class Config:
    """Base of the dataclasses `ModelConfig` and `TrainConfig` in the script.

    A dataclass alone would take `config.dept = 2` for a new attribute, and the run would go on with the old depth.
    """

    def __new__(cls, **values):
        names = [field.name for field in dataclasses.fields(cls)]
        for name in values.keys() - set(names):
            raise TypeError(unknown_constant(name, names, cls.__name__))
        return super().__new__(cls)

    def __setattr__(self, name, value):
        names = [field.name for field in dataclasses.fields(self)]
        if name not in names:
            raise AttributeError(unknown_constant(name, names, type(self).__name__))
        super().__setattr__(name, value)


def nearest(name, names):
    """The one of `names` that is most like `name`, or None."""
    return next(iter(difflib.get_close_matches(name, list(names), n=1)), None)


def unknown_constant(name, names, owner):
    """The error message for an attribute that `owner` does not have."""
    near = nearest(name, names)
    return f"{owner} has no {name}" + (f"; did you mean {near}?" if near else "")


def complete(given, defaults):
    """An object with some or all of the attributes of a `Config` -> a new `Config` of the type of `defaults`, with the
    values of `defaults` for the attributes that `given` lacks.

    `given` may be a SimpleNamespace, a dict, a `Config` or None. Its values are converted to the type of the field: a
    Path to str for a text, a str to Path for a path, an int to float; dicts are copied. Raises ValueError that names
    the constant for an attribute that does not exist, and for a value of another type, also among the defaults.
    """
    values = attributes(given)
    owner, fields = type(defaults).__name__, dataclasses.fields(defaults)
    names = [field.name for field in fields]
    for name in values:
        if name not in names:
            raise ValueError(unknown_constant(name, names, owner))
    values = vars(defaults) | values
    return type(defaults)(**{field.name: as_type(field.name, values[field.name], field.type) for field in fields})


def attributes(given):
    """The attributes of an object, a class, a dict or None -> dict."""
    values = given if isinstance(given, dict) else vars(given) if given is not None else {}
    return {name: value for name, value in values.items() if not name.startswith("__")}


def as_type(name, value, kind):
    """The value of the constant `name` as `kind` (bool, int, float, str, dict or Path), where nothing is lost by it.

    Raises ValueError that names the constant, the value and the type it must have.
    """
    if value is None and kind in (Path, str):  # a path that is looked for; a text that is empty
        return value if kind is Path else ""
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is str and isinstance(value, (Path, torch.device)):
        return str(value)
    if kind is dict and isinstance(value, dict):
        return dict(value)
    if kind in (int, float):
        wanted = numbers.Integral if kind is int else numbers.Real  # NumPy's numbers, too
        if isinstance(value, wanted) and not isinstance(value, bool):
            return kind(value)
    elif isinstance(value, kind):
        return value
    raise ValueError(f"{name} is {repr(value)[:60]}, but must be of type {kind.__name__}")
