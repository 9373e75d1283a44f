"""A file that close(2) waits for: its file system never answers when it is closed (FLUSH)."""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kbusd.cuse import abi, replies, requests
from kbusd.supervisor.mount import mount, unmount

_NODE, _BUFFER = 2, 1 << 18


@contextmanager
def hanging(place: Path) -> Iterator[int]:
    """A descriptor of it; afterwards that is closed, and nobody waits any more."""
    path, fuse, _ = mount(str(place))
    os.set_blocking(fuse, True)
    server = _Server(fuse)
    server.start()
    slow = os.open(place / "file", os.O_RDONLY)
    try:
        yield slow
    finally:
        server.free()
        os.close(slow)
        unmount(path)
        server.join()
        os.close(fuse)


class _Server(threading.Thread):
    """Ends when nobody has the file any more."""

    def __init__(self, fuse: int) -> None:
        super().__init__(daemon=True)
        self.fuse = fuse
        self.lock = threading.Lock()
        self.closing: list[int] | None = []

    def free(self) -> None:
        with self.lock:
            for unique in self.closing or ():
                with suppress(FileNotFoundError):  # whoever asked has been killed
                    os.write(self.fuse, replies.reply(unique))
            self.closing = None

    def run(self) -> None:
        while True:
            try:
                request = requests.decode(os.read(self.fuse, _BUFFER))
            except OSError as error:
                if error.errno == errno.ENODEV:
                    return
                raise
            with self.lock:
                if answer := self.answer(request.header, request.body):
                    with suppress(FileNotFoundError):
                        os.write(self.fuse, answer)

    def answer(self, head: requests.Header, body: requests.Body) -> bytes | None:
        file = replies.Attributes(_NODE, stat.S_IFREG | 0o444, 0, 0)
        root = replies.Attributes(abi.ROOT_NODE, stat.S_IFDIR | 0o555, 0, 0)
        match body:
            case requests.Init(_, _, readahead, flags):
                return replies.init(head.unique, flags, readahead, _BUFFER // 2)
            case requests.Lookup():
                return replies.entry(head.unique, file, 0)
            case requests.GetAttr():
                return replies.attributes(head.unique, root if head.node == root.node else file)
            case requests.Open():
                return replies.opened(head.unique, 1, 0)
            case requests.Release():
                return replies.reply(head.unique)
            case requests.Flush() if self.closing is not None:
                self.closing.append(head.unique)
                return None
            case requests.Forget() | requests.Interrupt():
                return None
            case _:
                return replies.failure(head.unique, errno.ENOSYS)
