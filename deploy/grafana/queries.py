"""PromQL for the dashboards.

Two rules hold everywhere: every selector is limited to the dashboard's `$job` and `$instance`, and an idle server
gives 0 or nothing, never NaN. What would be 0 / 0 is filtered out: a quotient has a positive divisor, and a comparison
drops the NaN that `histogram_quantile` returns for empty buckets.
"""

from __future__ import annotations

from typing import Final

_TARGETS: Final = ('job=~"$job"', 'instance=~"$instance"')
_WINDOW: Final = "[$__rate_interval]"
BUDGET_CLASS: Final = 'budget_class=~"$budget_class"'


def select(metric: str, *matchers: str) -> str:
    """An instant vector of the dashboard's targets."""
    return f"{metric}{{{', '.join((*_TARGETS, *matchers))}}}"


def total(metric: str, *matchers: str, by: str = "") -> str:
    """The sum of a gauge."""
    return f"{_sum(by)}({select(metric, *matchers)})"


def rate(counter: str, *matchers: str, by: str = "") -> str:
    """How much a counter grows in a second."""
    return f"{_sum(by)}(rate({select(counter, *matchers)}{_WINDOW}))"


def increase(counter: str, *matchers: str, by: str = "") -> str:
    """How much a counter has grown in the dashboard's time range."""
    return f"{_sum(by)}(increase({select(counter, *matchers)}[$__range]))"


def quantile(share: float, histogram: str, *matchers: str, by: str = "") -> str:
    """A quantile of a histogram; nothing where nothing was observed."""
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({share:g}, {rate(f'{histogram}_bucket', *matchers, by=labels)}) >= 0"


def mean(histogram: str, *matchers: str, by: str = "") -> str:
    """The mean of a histogram's observations."""
    return ratio(rate(f"{histogram}_sum", *matchers, by=by), rate(f"{histogram}_count", *matchers, by=by))


def ratio(part: str, whole: str) -> str:
    """A quotient; nothing where the whole is 0."""
    return f"{part} / ({whole} > 0)"


def _sum(by: str) -> str:
    return f"sum by ({by}) " if by else "sum"
