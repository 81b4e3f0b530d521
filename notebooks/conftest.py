"""nbval compares text; pictures are compared as files; what libraries print to stderr isn't ours.

A printed decimal may differ by one in its last digit: what lies on the edge of rounding falls
either way, by the processor.
"""

import re
from decimal import Decimal

_DECIMAL = re.compile(r"\d+\.\d+")


class Printed(str):
    """Text that equals another with the same words and decimals, each to within one last digit."""

    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        pairs = zip(_DECIMAL.findall(self), _DECIMAL.findall(other), strict=False)
        words = _DECIMAL.sub("#", self) == _DECIMAL.sub("#", other)
        return words and all(_close(*pair) for pair in pairs)

    def __ne__(self, other: object) -> bool:
        return not self == other


def _close(a: str, b: str) -> bool:
    a, b = Decimal(a), Decimal(b)
    place = a.as_tuple().exponent
    return place == b.as_tuple().exponent and abs(a - b) <= Decimal((0, (1,), place))


def pytest_collectstart(collector):
    if hasattr(collector, "skip_compare"):
        collector.skip_compare += ("image/png", "stderr", "text/html")


def pytest_collection_modifyitems(items):
    # the longest first, so that none runs alone at the end
    items.sort(key=lambda item: item.path.name[:2] not in ("00", "02", "08", "10"))
    for item in items:
        if hasattr(item, "sanitize"):  # a notebook's cell: nbval compares what this returns
            item.sanitize = lambda output, clean=item.sanitize: (
                Printed(clean(output)) if isinstance(output, str) else output
            )
