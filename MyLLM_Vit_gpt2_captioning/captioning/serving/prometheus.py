"""Counters, gauges and histograms in Prometheus' text format, https://prometheus.io/docs/instrumenting/exposition_formats."""

import itertools
import threading

_lock = threading.Lock()  # the event loop and the thread of the model both count


class Counter:
    """A number that grows, one for each combination of values of the `labels`."""

    def __init__(self, name, help, labels=()):
        self.name, self.help, self.labels, self.values = name, help, labels, {} if labels else {(): 0}

    def add(self, *values, amount=1):
        with _lock:
            self.values[values] = self.values.get(values, 0) + amount

    def lines(self):
        with _lock:
            values = sorted(self.values.items())
        return [*_head(self, "counter"), *(f"{self.name}{_braces(self.labels, of)} {value:g}" for of, value in values)]


class Gauge:
    """A number that is asked for when it is read: `value()`."""

    def __init__(self, name, help, value):
        self.name, self.help, self.value = name, help, value

    def lines(self):
        return [*_head(self, "gauge"), f"{self.name} {self.value():g}"]


class Histogram:
    """How many of the values that were seen are at most each of `bounds`."""

    def __init__(self, name, help, bounds):
        self.name, self.help, self.bounds = name, help, (*bounds, float("inf"))
        self.counts, self.sum = [0] * len(self.bounds), 0.0

    def see(self, value):
        with _lock:
            self.counts[next(i for i, bound in enumerate(self.bounds) if value <= bound)] += 1
            self.sum += value

    def lines(self):
        with _lock:
            totals, total_sum = list(itertools.accumulate(self.counts)), self.sum
        names = ["+Inf" if bound == float("inf") else f"{bound:g}" for bound in self.bounds]
        buckets = [f"{self.name}_bucket{_braces(('le',), (name,))} {n}" for name, n in zip(names, totals, strict=True)]
        return [
            *_head(self, "histogram"), *buckets, f"{self.name}_sum {total_sum:g}", f"{self.name}_count {totals[-1]}",
        ]  # fmt: skip


def text(metrics):
    """Counters, gauges and histograms -> the page that Prometheus reads."""
    return "".join(f"{line}\n" for metric in metrics for line in metric.lines())


def _head(metric, kind):
    return [f"# HELP {metric.name} {metric.help}", f"# TYPE {metric.name} {kind}"]


def _braces(labels, values):
    pairs = ",".join(f'{label}="{value}"' for label, value in zip(labels, values, strict=True))
    return f"{{{pairs}}}" if pairs else ""
