"""Run a coroutine test in a loop of its own, and see that it leaves no task behind."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine
from typing import Any


def async_test(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Decorator; fixtures and parameters work as for a plain test function."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        asyncio.run(_run(test(*args, **kwargs)))

    return run


async def _run(coroutine: Coroutine[Any, Any, None]) -> None:
    await coroutine
    for _ in range(20):  # cancelled tasks need a few turns of the loop to end
        left = asyncio.all_tasks() - {asyncio.current_task()}
        if not left:
            return
        await asyncio.sleep(0)
    raise AssertionError(f"tasks left behind: {left}")
