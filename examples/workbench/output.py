"""Files that commands write their results to."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from workbench.datasets.bad_images import shown


@contextmanager
def writing(flag: str, path: Path) -> Iterator[None]:
    """Wraps the writing of results: turns an error of the file system into one line."""
    try:
        yield
    except OSError as error:
        raise SystemExit(f"{flag} {shown(str(path))} cannot be written: {error.strerror}".lstrip()) from None
