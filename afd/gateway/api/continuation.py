"""A prompt that ends inside the last message, so that the model goes on with it (`continue_final_message`). Pure.

Templates close every message. The end of the last one is marked before the template runs, and what the template writes
behind the mark is cut off.
"""

from __future__ import annotations

from afd.errors import RequestError
from afd.gateway.templating import Message

_MARK = "\ue000end of the message to go on with\ue000"  # private use characters: nobody's text
_PARAM = "continue_final_message"


def with_mark(messages: list[Message]) -> list[Message]:
    """The messages with the end of the last one marked. RequestError (400) when there is no text to go on with."""
    last = messages[-1]
    if not last.get("content"):
        raise RequestError("the last message has no text to go on with", param=_PARAM)
    return [*messages[:-1], {**last, "content": f"{last['content']}{_MARK}"}]


def up_to_mark(text: str) -> str:
    """The template's text as far as the mark. RequestError (400) when the template has left the message out."""
    head, mark, _ = text.rpartition(_MARK)
    if not mark:
        raise RequestError("the chat template does not write out the last message", param=_PARAM)
    return head.replace(_MARK, "")
