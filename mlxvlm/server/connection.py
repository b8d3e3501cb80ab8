"""A client that may leave at any moment. Knows ASGI's two directions, nothing of what is said."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine

from starlette.types import Receive


async def unless_gone(receive: Receive, work: Coroutine[None, None, None]) -> None:
    """Does the work, and stops it as soon as the client has left: nobody is there then to be told.

    The body must have been read: what comes next can then only be the end.
    """
    answering, leaving = asyncio.create_task(work), asyncio.create_task(_left(receive))
    try:
        await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (answering, leaving):
            if not task.done():
                task.cancel()
        await asyncio.wait({answering, leaving})
    if not answering.cancelled():
        answering.result()


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
