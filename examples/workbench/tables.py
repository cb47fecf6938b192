"""Tables of figures in Markdown."""

import statistics
from collections.abc import Iterable, Sequence


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]], names: int = 1) -> str:
    """A table whose first columns are `names`, and the others figures."""
    rule = ["---"] * names + ["---:"] * (len(columns) - names)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, rule, *rows))


def spread(values: Sequence[float], digits: int | None = None) -> str:
    """ "mean ± standard deviation", or the one value there is."""
    if digits is None:
        digits = 2 if max(map(abs, values)) < 10 else 1
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean
