"""The form of what a file of others holds, compared before it is used: a number where a text belongs fails far behind
the place where it was read.

A form is a value made of types: `int`, `(float, None)` for one of several, `[str]` for a list, `{str: float}` for a
dict with any keys, `{"epoch": int, ...}` for a dict with at least these, `Tensor` or any other class. An int is taken
for a float, a bool for no number.
"""

LARGEST_FLOAT = 2**1023  # of whole numbers, which Python turns into a float


def check(value, form, place=""):
    """Raise ValueError that says where a value does not have the `form`."""
    if found := misfit(value, form, place):
        raise ValueError(f"{found[:100]} is not what belongs there")


def misfit(value, form, place=""):
    """Where a value does not have the `form` -> the first such place, as `place["epoch"][3]`; None where it fits."""
    if isinstance(form, tuple):
        return None if any(misfit(value, one) is None for one in form) else place or "it"
    if form is None or isinstance(form, type):
        return None if _is(value, form) else place or "it"
    if not isinstance(value, type(form)):
        return place or "it"
    if isinstance(form, list):
        parts = [(f"[{i}]", part, form[0]) for i, part in enumerate(value)]
    elif all(isinstance(key, str) for key in form):
        if missing := form.keys() - value.keys():
            return f"{place}[{min(missing)!r}]"
        parts = [(f"[{key!r}]", value[key], form[key]) for key in form]
    else:
        [(of_key, of_value)] = form.items()
        if not all(_is(key, of_key) for key in value):
            return place or "it"
        parts = [(f"[{key!r:.40}]", part, of_value) for key, part in value.items()]
    return next((found for where, part, one in parts if (found := misfit(part, one, place + where))), None)


def _is(value, kind):
    if kind is None:
        return value is None
    if isinstance(value, bool):
        return kind in (bool, object)
    if kind is float and isinstance(value, int):
        return abs(value) < LARGEST_FLOAT
    return isinstance(value, kind)


def form_of(value):
    """The form of a value that is as it must be, for dicts of dicts of single values."""
    if isinstance(value, dict):
        return {key: form_of(part) for key, part in value.items()}
    return None if value is None else type(value)
