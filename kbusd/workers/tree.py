"""The tree of kdbusfs: a spare worker that answers what the kernel asks of names and of who may open.

    /                 the mount point
    /control          where buses are made
    /0-system         a directory for each bus: the uid of its owner, its name; for whom the bus was made
    /0-system/bus     a file for each endpoint; opening it is what opening /dev/kdbus/... was

Every look-up of a file is a new node, so that each open file has a page cache, and so a pool, of its
own. A node can be opened once: who opens it again, by way of /proc/self/fd, is told to look it up anew
(ESTALE). Hostile: names, and from whom they come. Who may open is checked by the kernel
(default_permissions) against the owner and the access bits that stand here.
"""

from __future__ import annotations

import errno
import select
import stat
from dataclasses import dataclass

import msgspec

from kbusd.cuse import abi, replies, requests
from kbusd.rings import entries
from kbusd.rings.line import Line

MAX_WRITE = 128 << 10
FILE_SIZE = 1 << 40  # as large as any pool: what is behind the end can't be mapped
_IGNORED = 0b1111_1111_0000  # FATTR_ATIME to FATTR_KILL_SUIDGID: times, and what goes with a change


@dataclass
class File:
    """What one look-up found; `seen`: how it was last, if it is no more."""

    bus: str
    endpoint: str
    seen: entries.Node
    lookups: int = 1
    opened: bool = False


class Tree:
    """Answers one request after another; does no I/O."""

    def __init__(self, start: entries.Tree) -> None:
        self.next = start.first
        self.buses: dict[str, dict[str, entries.Node]] = {"": {}}
        self.directories = {abi.ROOT_NODE: ""}  # their names
        # The directories, with no endpoint's name.
        self.above = {"": _above(start.nodes[0], 0o555, "")}
        self.files: dict[int, File] = {}
        self.changed: entries.Changed | None = None
        """By the last request, which is answered only when that is said."""
        self.plant(start.nodes)
        for node in start.changed:
            self._set(node)

    def plant(self, nodes: tuple[entries.Node, ...]) -> None:
        """These are the nodes from now on. One that was there before is as it was."""
        before, self.buses = self.buses, {"": {}}
        for node in nodes:
            known = before.get(node.bus, {}).get(node.endpoint, node)
            self.buses.setdefault(node.bus, {})[node.endpoint] = known
            # The first one is the bus's own.
            self.above.setdefault(node.bus, _above(node, 0o500 | _passing(node.mode), node.bus))
        left = {number: bus for number, bus in self.directories.items() if bus in self.buses}
        self.directories = left
        self.above = {bus: above for bus, above in self.above.items() if bus in self.buses}
        for bus in self.buses.keys() - set(left.values()):
            self.directories[self._number()] = bus

    def know(self, file: entries.Open) -> None:
        """There is this one, which a tree before has found. Of an endpoint that is no more nothing is known."""
        node = self.buses.get(file.bus, {}).get(file.endpoint)
        if node is not None:
            known = File(file.bus, file.endpoint, node, opened=True)
            self.files.setdefault(file.number, known)

    def _number(self) -> int:
        self.next += 1
        return self.next - 1

    def answer(self, request: bytes) -> bytes | entries.Opened | None:
        """A reply for the kernel, or a file to be opened, or nothing. Raises requests.Malformed."""
        asked = requests.decode(request)
        head, body = asked.header, asked.body
        match body:
            case requests.Forget():
                for node, count in body.nodes:
                    self._forget(node, count)
                return None
            case requests.Interrupt():
                return None  # nothing here takes long
            case requests.Init():
                return replies.init(head.unique, body.flags, body.max_readahead, MAX_WRITE)
            case requests.StatFs():
                return replies.statfs(head.unique, len(self.directories))
            case requests.Unknown():
                return replies.failure(head.unique, errno.ENOSYS)
            case requests.Destroy() | requests.ReleaseDir():
                return replies.reply(head.unique)
        return self._of_node(head, body)

    def _of_node(self, head: requests.Header, body: requests.Body) -> bytes | entries.Opened:
        attributes = self._attributes(head.node)
        if attributes is None:
            return replies.failure(head.unique, errno.ESTALE)
        directory = self.directories.get(head.node)
        match body:
            case requests.Lookup() if directory is not None:
                return self._lookup(head.unique, directory, body.name)
            case requests.GetAttr():
                return replies.attributes(head.unique, attributes)
            case requests.SetAttr() if not body.other & ~_IGNORED:
                return self._change(head, body)
            case requests.OpenDir() if directory is not None:
                return replies.opened(head.unique, 0, 0)
            case requests.ReadDir() if directory is not None:
                return self._list(head, directory, body)
            case requests.Open() if directory is None:
                file = self.files[head.node]
                if file.opened:
                    return replies.failure(head.unique, errno.ESTALE)
                file.opened = True
                return entries.Opened(head.unique, file.bus, file.endpoint, body.flags)
        return replies.failure(head.unique, errno.EPERM)

    def _attributes(self, node: int) -> replies.Attributes | None:
        if (bus := self.directories.get(node)) is not None:
            above = self.above[bus]
            mode = stat.S_IFDIR | above.mode
            links = 1 + (len(self.directories) if node == abi.ROOT_NODE else 1)
            return replies.Attributes(node, mode, above.uid, above.gid, links=links)
        if (file := self.files.get(node)) is None:
            return None
        of = file.seen = self.buses.get(file.bus, {}).get(file.endpoint, file.seen)
        return replies.Attributes(node, stat.S_IFREG | of.mode, of.uid, of.gid, FILE_SIZE)

    def _lookup(self, unique: int, directory: str, name: bytes) -> bytes:
        text = name.decode("utf-8", "replace")
        if text in self.buses[directory]:
            node = self._number()
            self.files[node] = File(directory, text, self.buses[directory][text])
        elif directory == "":
            node = next((n for n, bus in self.directories.items() if bus == text and bus), 0)
        else:
            node = 0
        attributes = self._attributes(node)
        if attributes is None:
            return replies.failure(unique, errno.ENOENT)
        return replies.entry(unique, attributes, 0)

    def _forget(self, node: int, count: int) -> None:
        if (file := self.files.get(node)) is not None:
            file.lookups -= count
            if file.lookups <= 0:
                del self.files[node]

    def _change(self, head: requests.Header, body: requests.SetAttr) -> bytes:
        """chmod and chown of an endpoint or a directory; the kernel has checked who does so."""
        file = self.files.get(head.node)
        if file is None:
            of = self.above.get(self.directories[head.node])
        else:
            of = self.buses.get(file.bus, {}).get(file.endpoint)
        if of is None:
            return replies.failure(head.unique, errno.ESTALE)  # it is no more
        mode = of.mode if body.mode is None else body.mode & 0o777
        uid = of.uid if body.uid is None else body.uid
        gid = of.gid if body.gid is None else body.gid
        node = msgspec.structs.replace(of, mode=mode, uid=uid, gid=gid)
        self._set(node)
        self.changed = entries.Changed(head.unique, node)
        attributes = self._attributes(head.node)
        assert attributes is not None
        return replies.attributes(head.unique, attributes)

    def _set(self, node: entries.Node) -> None:
        """The access bits and owners of what is there by this name, if it is."""
        found = self.buses.get(node.bus, {}) if node.endpoint else self.above
        name = node.endpoint or node.bus
        if name in found:
            found[name] = node

    def _list(self, head: requests.Header, directory: str, asked: requests.ReadDir) -> bytes:
        found = [(endpoint, stat.S_IFREG) for endpoint in self.buses[directory]]
        if directory == "":
            found += [(bus, stat.S_IFDIR) for bus in self.buses if bus]
        found = [(".", stat.S_IFDIR), ("..", stat.S_IFDIR), *found]
        listed = [
            replies.Entry(head.node, name.encode(), mode, at)
            for at, (name, mode) in enumerate(found, 1)
        ]
        return replies.directory(head.unique, listed[asked.offset :], asked.size)


def _above(node: entries.Node, mode: int, bus: str) -> entries.Node:
    return msgspec.structs.replace(node, bus=bus, endpoint="", mode=mode)


def _passing(mode: int) -> int:
    """Who may read a bus's own endpoint when it is made may list its directory, and pass (kdbus_bus_new)."""
    read = mode & 0o444
    return read | read >> 2


def serve(line: Line, start: entries.Tree) -> None:
    """Answer until the supervisor closes the line."""
    tree = Tree(start)
    poller = select.epoll(flags=select.EPOLL_CLOEXEC)
    poller.register(line.fileno(), select.EPOLLIN)
    while True:
        poller.poll(0.01 if line.queue else None)
        try:
            while (received := line.receive()) is not None:
                match received[0]:
                    case entries.Nodes(nodes):
                        tree.plant(nodes)
                        continue
                    case entries.Open() as file:
                        tree.know(file)
                        continue
                answer = tree.answer(received[0].request)
                if tree.changed is not None:
                    line.send(tree.changed)
                    tree.changed = None
                if isinstance(answer, bytes):
                    line.send(entries.Answered(answer))
                elif answer is not None:
                    line.send(answer)
            line.flush()
        except (EOFError, ConnectionError):
            return
