"""Progress: a bar for a person, a log line now and then for a file."""

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

from bench import replicas

log = logging.getLogger(__name__)
QUIET_SECONDS = 20.0
T = TypeVar("T")


def track(
    items: Iterable[T], total: int, what: str, status: Callable[[], str] = lambda: ""
) -> Iterator[T]:
    """Yield `items`, showing how many of `total` are done, the time left and `status()`."""
    if sys.stderr.isatty() and replicas.rank() == 0:
        bar = tqdm(items, total=total, desc=what)
        for item in bar:
            yield item
            bar.set_postfix_str(status(), refresh=False)
        return
    begin = shown = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - shown > QUIET_SECONDS or done == total:
            shown = now
            left = (now - begin) * (total - done) / done
            parts = [f"{done} of {total}", f"{now - begin:.0f} s", f"{left:.0f} s left", status()]
            log.info("%s: %s", what, ", ".join(filter(None, parts)))
