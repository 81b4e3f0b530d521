"""nbval compares text; pictures are compared as files, and what libraries print to stderr isn't ours to fix.

A printed decimal may differ by one in its last digit: what lies on the edge of rounding falls either way, by the processor.
"""

import re
from decimal import Decimal

_DECIMAL = re.compile(r"\d+\.\d+")


class Printed(str):
    """Text that equals another with the same words and the same decimals, each to within one unit of its last digit."""

    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        pairs = zip(_DECIMAL.findall(self), _DECIMAL.findall(other), strict=False)
        return _DECIMAL.sub("#", self) == _DECIMAL.sub("#", other) and all(_close(*pair) for pair in pairs)

    def __ne__(self, other: object) -> bool:
        return not self == other


def _close(a: str, b: str) -> bool:
    a, b = Decimal(a), Decimal(b)
    return a.as_tuple().exponent == b.as_tuple().exponent and abs(a - b) <= Decimal((0, (1,), a.as_tuple().exponent))


def pytest_collectstart(collector):
    if hasattr(collector, "skip_compare"):
        collector.skip_compare += ("image/png", "stderr", "text/html")


def pytest_collection_modifyitems(items):
    # the long ones first: no process waits for the last of them; 04 and 05 use again what 03 has computed by then
    items.sort(key=lambda item: item.path.name.replace("03_", "06_"), reverse=True)
    for item in items:
        if hasattr(item, "sanitize"):  # a notebook's cell: nbval compares what this returns
            item.sanitize = lambda output, clean=item.sanitize: Printed(clean(output)) if isinstance(output, str) else output
