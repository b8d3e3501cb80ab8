"""A client that may leave at any moment. Knows ASGI's two directions, nothing of what is said."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine

from starlette.types import Receive

_log = logging.getLogger(__name__)


async def unless_gone(receive: Receive, work: Coroutine[None, None, None]) -> None:
    """Does the work, and stops it as soon as the client has left: nobody is there then to be told.

    Its TimeoutError tells of a client that takes too long to read, which is cut off. The body must have been read:
    what comes next can then only be the end.
    """
    answering, leaving = asyncio.create_task(work), asyncio.create_task(_left(receive))
    try:
        await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (answering, leaving):
            if not task.done():
                task.cancel()
        await asyncio.wait({answering, leaving})
    if answering.cancelled():
        return
    try:
        answering.result()
    except TimeoutError:
        _log.warning("a client that takes too long to read its answer is cut off")


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
