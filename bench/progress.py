"""Progress: a bar for a person, a log line now and then for a file."""

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

log = logging.getLogger(__name__)
QUIET_SECONDS = 20.0
T = TypeVar("T")


def track(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    """Yield `items`, showing how many of `total` are done."""
    if sys.stderr.isatty():
        yield from tqdm(items, total=total, desc=what)
        return
    begin = shown = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - shown > QUIET_SECONDS or done == total:
            shown = now
            log.info("%s: %d of %d, %.0f s", what, done, total, now - begin)
