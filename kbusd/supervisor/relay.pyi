import threading
from collections.abc import Callable
from typing import Any

from kbusd.rings.line import Line
from kbusd.supervisor.aside import Aside

MAX_REQUEST: int
MAX_AHEAD: int
MAX_RANGES: int
MAX_OWED: int
MAX_PUSHED: int

class Room: ...

class Wish:
    def __init__(self, at_argument: int, ranges: tuple[tuple[int, int], ...]) -> None: ...

class End:
    line: Line
    lock: threading.Lock
    late: Callable[[Any], None]
    ahead: dict[int, Wish]
    uid: int
    node: int
    kernel_handle: int
    events_at: int
    fd: int
    pool: int
    why: int
    owed: int
    gone: bool
    released: bool

class Relay:
    fuse: int
    where: str
    closings: Any
    files: dict[int, Any]
    held: dict[int, tuple[Any, bytes]]
    copying: dict[int, bool]
    def __init__(self, aside: Aside, where: str, fuse: int) -> None: ...
    def take(self, room: Room) -> bool: ...
    def give(self, request: bytes) -> None: ...
    def take_back(self, unique: int) -> bool: ...
    def hear(self, end: Any, room: Room) -> bool | None: ...
    def wake(self, end: End) -> None: ...
    def write(self, reply: bytes) -> bool: ...
