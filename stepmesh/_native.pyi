from typing import Any, Generic, TypeVar

PostedT = TypeVar("PostedT", bound=tuple[int, int, int])
HeaderT = TypeVar("HeaderT", bound=tuple[Any, ...])

class Board(Generic[PostedT]):
    """Twin of stepmesh.transports.shm.Board."""

    def __init__(self, memory: memoryview, num_slots: int, posted_type: type[PostedT]) -> None: ...
    def post(self, slot: int, seq: int, bell_fd: int) -> int: ...
    def poll(self) -> list[PostedT] | tuple[()]: ...
    def address(self) -> int: ...

def write_frame(
    memory: memoryview,
    kind: int,
    flags: int,
    epoch: int,
    generation: int,
    seq: int,
    step: int,
    gang_id: int,
    compute_ns: int,
    member_mask_low: int,
    member_mask_high: int,
    num_tokens: int,
    gang_tokens: int,
    payload_bytes: int,
    stream: int,
    layer: int,
    top_k: int,
    wire_dtype: int,
    checksum_kind: int,
    /,
) -> None: ...
def read_frame(
    memory: memoryview, rules: tuple[int, ...], posted: tuple[int, int, int], header_type: type[HeaderT], /
) -> HeaderT | None: ...
def may_follow(rule: int, frame: bytes, last: bytes, max_tokens: int, row_bytes: int, /) -> bool: ...
def await_any(signs: tuple[object, ...], seconds: float, /) -> bool: ...
