"""The numbers behind the metrics: those that are counted, and those that are read when somebody asks.

The one rule: everything is bounded. A family holds at most `budget` sets of label values; what comes beyond
them is counted together, as `other`. A value is cut to a length and to what can be printed.
"""

import itertools
from bisect import bisect_left
from collections.abc import Iterable, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.utils import floatToGoString

from llorch.measures import Family

UNKNOWN = "unknown"
OTHER = "other"
MAX_VALUE_CHARS = 80

Values = tuple[str | None, ...]


def label(value: str | None) -> str:
    """A label's value: `unknown` for none, no control character, at most MAX_VALUE_CHARS."""
    if not value:
        return UNKNOWN
    value = value[:MAX_VALUE_CHARS]
    if value.isprintable():
        return value
    return "".join(char if char.isprintable() else "\ufffd" for char in value)


class Counter:
    """Numbers that only grow."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self._values: dict[tuple[str, ...], int] = {}

    def add(self, labels: Values, amount: int = 1) -> None:
        """Count `amount`; 0 makes the series appear, so that its first rise is seen as one."""
        key = _key(self.family, labels, self._values)
        self._values[key] = self._values.get(key, 0) + amount

    def metric(self) -> Metric:
        """All of it, as prometheus-client writes it out."""
        metric = CounterMetricFamily(self.family.name, self.family.help, labels=self.family.labels)
        for key, value in self._values.items():
            metric.add_metric(key, value)
        return metric


class Histogram:
    """How often a value was at most each of the family's buckets, and the sum of all values."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self._bounds = (*map(floatToGoString, family.buckets), "+Inf")
        self._counts: dict[tuple[str, ...], list[int]] = {}
        self._sums: dict[tuple[str, ...], float] = {}

    def prepare(self, labels: Values) -> None:
        """Make the series appear before its first value."""
        key = _key(self.family, labels, self._counts)
        self._counts.setdefault(key, [0] * len(self._bounds))
        self._sums.setdefault(key, 0)

    def observe(self, labels: Values, value: float) -> None:
        """Note one value."""
        self.prepare(labels)
        key = _key(self.family, labels, self._counts)
        self._counts[key][bisect_left(self.family.buckets, value)] += 1
        self._sums[key] += value

    def metric(self) -> Metric:
        """All of it, as prometheus-client writes it out."""
        metric = HistogramMetricFamily(self.family.name, self.family.help, labels=self.family.labels)
        for key, counts in self._counts.items():
            cumulative = itertools.accumulate(counts)
            metric.add_metric(key, list(zip(self._bounds, cumulative, strict=True)), self._sums[key])
        return metric


def gauge(family: Family, rows: Iterable[tuple[Values, float]]) -> Metric:
    """What is now; of two rows with the same labels the last counts, beyond the budget none."""
    values = {tuple(map(label, labels)): value for labels, value in rows}
    metric = GaugeMetricFamily(family.name, family.help, labels=family.labels)
    for key, value in itertools.islice(values.items(), family.budget):
        metric.add_metric(key, value)
    return metric


def _key(family: Family, labels: Values, known: Mapping[tuple[str, ...], object]) -> tuple[str, ...]:
    key = tuple(map(label, labels))
    if key in known or len(known) < family.budget - 1 or not labels:
        return key
    return (OTHER,) * len(labels)
