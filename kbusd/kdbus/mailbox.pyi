from collections.abc import Callable, Sequence

from kbusd.kdbus.message import Memfd
from kbusd.kdbus.parcel import Parcel
from kbusd.kdbus.pool import Pool, Quota, Slice
from kbusd.kdbus.port import Known, Memory
from kbusd.kdbus.queue import Queue

class Entry:
    @property
    def slice(self) -> Slice: ...
    @property
    def user(self) -> int: ...
    @property
    def memory(self) -> int: ...
    @property
    def counted(self) -> int: ...
    fds: Sequence[int]
    fds_at: tuple[int, ...]
    incomplete: bool
    no_reply: bool
    expects: tuple[int, int] | None
    answers: tuple[int, int] | None
    kept: tuple[Known, Parcel, Sequence[bytes | int | Memfd]] | None

class Mailbox:
    untold: int
    hand: Callable[[Entry], int] | None
    def __init__(self, size: int, memory: Memory) -> None: ...
    @property
    def pool(self) -> Pool: ...
    @property
    def quota(self) -> Quota: ...
    @property
    def queue(self) -> Queue[Entry]: ...
    @property
    def memory(self) -> Memory: ...
    @property
    def installing(self) -> dict[int, tuple[int, ...]]: ...
    def place(
        self,
        header: tuple[int, ...],
        parts: Sequence[bytes | int | Memfd],
        fds: int,
        dst_name: str | None,
        notice: bytes,
        attached: bytes,
        user: int,
        accounted: bool,
    ) -> Entry: ...
    def unqueue(self, ticket: int) -> Entry: ...
    def recv(self, command: bytes) -> tuple[int, tuple[tuple[int, bytes], ...]] | None: ...
    def promise(self, command: bytes) -> tuple[int, int, bytes] | None: ...
    def received(self, freed: bool) -> None: ...
    def free(self, command: bytes) -> tuple[int, tuple[tuple[int, bytes], ...]] | None: ...
