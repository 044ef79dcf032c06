"""The argument parser of the tools: it reports a bad argument in one line, and checks the range of numbers."""

import argparse
import math
import sys


class ToolParser(argparse.ArgumentParser):
    """An `ArgumentParser` whose help is the tool's docstring, and whose errors are one line, without the usage."""

    def __init__(self, docstring):
        super().__init__(description=docstring, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        argument, _, problem = message.removeprefix("argument ").partition(": ")
        if problem.startswith("must be "):
            sys.exit(f"error: {argument} {problem}")
        sys.exit(f"error: {message}; --help lists the options")


def integer(low, high=None):
    """The `type` of an argument: an integer from `low` to `high` (None: without limit)."""
    allowed = f"an integer of at least {low}" if high is None else f"an integer from {low} to {high}"
    return _number(int, allowed, lambda value: value >= low and (high is None or value <= high))


def real(above=-math.inf, at_most=math.inf):
    """The `type` of an argument: a finite number larger than `above` and no larger than `at_most`."""
    limits = [f"above {above:g}"] * (above > -math.inf) + [f"at most {at_most:g}"] * (at_most < math.inf)
    allowed = " ".join(["a number", " and ".join(limits)]).strip()
    return _number(float, allowed, lambda value: math.isfinite(value) and above < value <= at_most)


def percent(text):
    """The `type` of an argument: "2%" -> 0.02; above 0% and at most 100%."""
    number = text.strip()
    try:
        value = float(number.removesuffix("%")) / 100 if number.endswith("%") else None
    except ValueError:
        value = None
    if value is None or not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be a percentage above 0% and at most 100%, as in 2%, not {text}")
    return value


def _number(convert, allowed, is_allowed):
    def parse(text):
        try:
            value = convert(text)
        except ValueError:
            value = None
        if value is None or not is_allowed(value):
            raise argparse.ArgumentTypeError(f"must be {allowed}, not {text}")
        return value

    return parse
