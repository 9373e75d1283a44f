"""One open file of a bus's node: from the commands of its client to the bus, and from the bus to its pool.

Without any I/O: a command is a coroutine (`waits.py`), and what it needs of its caller and of the bus
is asked through the protocols of `port.py`. What the client wrote is decoded by `commands.py`, which
trusts nothing; what another connection sent is for the bus to check, which hands it to `receive`.

    ioctl       a command of the client            poll      what poll(2) says now
    receive     a message of another connection    deadline, tick      calls without a reply
    name_changed, id_added, id_removed             what the bus announces, and who is gone

Source: kdbus.connection(7), kdbus.message(7), ipc/kdbus/connection.c. What differs:
- No descriptor can be put into the client. One that has attached a socket (`attach.py`) gets them by that,
  and says which numbers they have (`installed`); else a message's are told as incomplete (-1), and the bus
  hands over a memfd's bytes as a vector.
"""

from __future__ import annotations

import errno
import select
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from functools import partial

import msgspec

from kbusd.kdbus import abi, commands, handle, layout, match, message, metadata, ownership
from kbusd.kdbus import parcel as parcels
from kbusd.kdbus.calls import Call, Calls
from kbusd.kdbus.commands import SPECS, Spec
from kbusd.kdbus.errors import Errno, Poke
from kbusd.kdbus.handle import State
from kbusd.kdbus.kept import Kept, Sent
from kbusd.kdbus.mailbox import Entry, Mailbox
from kbusd.kdbus.names import is_well_known
from kbusd.kdbus.parcel import Faked, Parcel
from kbusd.kdbus.pool import KERNEL_USER
from kbusd.kdbus.port import Bus, Caller, Joining, Known, Looked
from kbusd.kdbus.waits import Interrupted, Wait, start

PAGE = 4096
MAX_DBUS_CALLS = 1 << 16  # of one D-Bus client, that wait for ours to answer
FRESH_NS = 100_000_000
LEFT_NS = 2_000_000_000
_OF_PROCESS = abi.ATTACH_TID_COMM | abi.ATTACH_PID_COMM | abi.ATTACH_EXE | abi.ATTACH_CMDLINE
PEEK = 1024  # bytes that are fetched at once where the size is not known yet
READABLE = select.POLLIN | select.POLLRDNORM
_SPECIAL = abi.HELLO_ACTIVATOR | abi.HELLO_POLICY_HOLDER | abi.HELLO_MONITOR
WRITABLE = select.POLLOUT | select.POLLWRNORM
_ENDPOINTS = 1 << 33  # quotas by endpoint, above those by uid
HUNG_UP = select.POLLERR | select.POLLHUP
Part = bytes | int | message.Memfd
"""Of a payload that arrives: bytes, a number of zeroes, or a segment of a memfd of ours."""


class Done(msgspec.Struct, frozen=True):
    """A command is carried out. `stores` (address, bytes) go into the caller's memory."""

    stores: tuple[tuple[int, bytes], ...] = ()


async def fetch(caller: Caller, spec: Spec, address: int, data: bytes) -> bytes:
    """All bytes of a command's struct that begins with `data`. Raises Errno."""
    if len(data) < 8 and address % 8 == 0:
        data = await caller.peek(address, 8, PEEK)
    size = commands.total_size(spec, address, data[:8] if data else bytes(8))
    if size > len(data):
        (rest,) = await caller.copy([(address + len(data), size - len(data))])
        data += rest
    return data[:size]


async def check_writable(caller: Caller, spec: Spec, whole: bytes) -> None:
    """Whether the caller can be told what becomes of the file: else it stays as it is. Raises Errno EFAULT."""
    await caller.store(caller.argument, whole[: spec.fixed.size])


class Session:
    """`owner`: the opener owns the bus or is privileged; `custom`: the node is a custom endpoint's."""

    def __init__(self, bus: Bus, owner: bool = False, custom: bool = False) -> None:
        self.bus = bus
        self.state = State.ENDPOINT
        self.id = 0
        self.arrived = 0
        """How many messages have come, or were lost: whoever polls is to be woken when it grows."""
        self.kind = 0  # Hello.kind
        self.box: Mailbox
        """Since HELLO."""
        self.ordinary: Mailbox | None = None
        """The same as long as RECV and FREE may be carried out without a look at the bus."""
        self._owner = owner and not custom
        self._custom = custom
        self._entering = False
        self._looking_at: Caller | None = None
        self._about = self._sent_about = b""
        self._sender, self._fresh_until = 0, 0  # whom `_sent_about` is about, and until when
        self._accept_fd = False
        self._attach_send = self._attach_recv = 0
        self._matches = match.Matches()
        # Of matches about signals (True), and about what the bus announces (False).
        self._cookies: dict[bool, list[int]] = {True: [], False: []}
        self._calls = Calls()
        self._waiting: dict[Call, Wait[Entry]] = {}  # those in a synchronous SEND
        self._kept = Kept(bus.close)
        self._again: deque[tuple[Sent, int]] = deque()  # to be sent once more, and to whom
        self._moved: set[tuple[int, str]] = set()  # of whom those were, and sent to which name
        # What has moved from us and is left to its senders; and until when.
        self._left = Kept(bus.close)
        self._left_until: deque[tuple[int, Sent]] = deque()
        self.kept = 0
        """Descriptors in the queue."""
        self._owed: dict[int, dict[int, int]] = {}  # caller -> cookie -> deadline
        # By sender: the metadata items of its last message, and what they were made of.
        self._told_before: dict[int, tuple[tuple[object, ...], bytes]] = {}

    @property
    def accepts_fds(self) -> bool:
        """Whether messages with descriptors may be handed to `receive`."""
        return self._accept_fd

    @property
    def has_descriptors(self) -> bool:
        """Whether any are left that others have sent, or that are to be sent once more."""
        return self.kept > 0 or self._kept.fds > 0 or self._left.fds > 0

    # -- poll(2) -------------------------------------------------------------------------------

    def poll(self) -> int:
        """The events that hold now."""
        if self.state is not State.CONNECTION:
            return HUNG_UP
        return WRITABLE | READABLE if self.box.queue.readable else WRITABLE

    def coming_back(self) -> Wait[None] | None:
        """What our client, an activator, is to see first, if that is still on its way."""
        return self.bus.coming_back() if self.kind == abi.HELLO_ACTIVATOR else None

    # -- commands ------------------------------------------------------------------------------

    async def ioctl(self, caller: Caller, command: int, address: int, data: bytes) -> Done:
        """Carry out a command whose struct is at `address` and begins with `data`.

        Raises Errno, whose pokes are relative to `address`, or Interrupted."""
        handle.check(command, self.state, self.kind, self._owner)
        spec = SPECS[command]
        if len(data) < 8 or len(data) < commands.total_size(spec, address, data[:8]):
            data = await fetch(caller, spec, address, data)
        whole = data[: commands.total_size(spec, address, data[:8])]
        pokes: tuple[Poke, ...]
        if self.state is State.ENDPOINT:
            await check_writable(caller, spec, whole)
        if command == abi.CMD_SEND:
            return await self._send(caller, address, whole)
        match command:
            case abi.CMD_HELLO:
                pokes = await self._hello(caller, whole)
            case abi.CMD_ENDPOINT_MAKE:
                pokes = await self._make_endpoint(caller, whole)
            case abi.CMD_ENDPOINT_UPDATE:
                changed = commands.decode_endpoint_update(whole)
                pokes = changed.pokes
                if changed.value is not None:
                    with _writing(pokes):
                        await self.bus.set_endpoint(changed.value)
            case abi.CMD_BYEBYE:
                pokes = self._byebye(whole)
            case abi.CMD_RECV:
                if (wait := self.coming_back()) is not None:
                    await self._interruptible(caller, wait)
                    handle.check(command, self.state, self.kind, self._owner)
                pokes = self._recv(whole)
            case abi.CMD_FREE:
                free = commands.decode_free(whole)
                pokes = free.pokes
                if free.value is not None:
                    with _writing(pokes):
                        self.box.pool.free(free.value)
                        self.box.installing.pop(free.value, None)
            case abi.CMD_NAME_ACQUIRE:
                pokes = await self._acquire(whole)
            case abi.CMD_NAME_RELEASE:
                pokes = await self._release(whole)
            case abi.CMD_MATCH_ADD:
                pokes = await self._add_match(whole)
            case abi.CMD_MATCH_REMOVE:
                pokes = await self._remove_match(whole)
            case abi.CMD_LIST:
                listed = commands.decode_list(whole)
                pokes = listed.pokes
                if listed.value is not None:
                    with _writing(pokes):
                        pokes += commands.list_result(*self._show(self._list(listed.value)))
            case abi.CMD_CONN_INFO:
                pokes = await self._info(whole)
            case abi.CMD_BUS_CREATOR_INFO:
                pokes = self._creator(whole)
            case _:
                pokes = await self._update(whole)
        return Done(_at(address, pokes))

    async def _hello(self, caller: Caller, whole: bytes) -> tuple[Poke, ...]:
        decoded = commands.decode_hello(whole)
        hello = decoded.value
        if hello is None:
            return decoded.pokes
        with _writing(decoded.pokes):
            admitted = commands.check_hello(hello, self._owner, self._custom, PAGE)
            looked = await self._set_up(caller, "HELLO")
            memory = self.bus.make_pool(hello.pool_size)
            self._entering = True
            try:
                id, about = await self.bus.connect(caller, looked, _joining(hello, admitted))
            finally:
                self._entering = False
            self.id, self._about = id, about
            self._sent_about, self._sender = about, caller.tid
            self._fresh_until = self.bus.clock()[0] + FRESH_NS
            self.state, self.kind = State.CONNECTION, hello.kind
            self.box = Mailbox(hello.pool_size, memory)
            waits = self.kind in (abi.HELLO_POLICY_HOLDER, abi.HELLO_ACTIVATOR)
            self.box.hand = self._hand
            self.ordinary = None if waits else self.box
            self._accept_fd = bool(hello.flags & abi.HELLO_ACCEPT_FD)
            self._attach_send, self._attach_recv = admitted.attach_send, admitted.attach_recv
            try:
                memory.hand_over()
            except Errno:
                self.end()
                raise
            offset, size = self._show(commands.bloom_item(self.bus.bloom))
            result = commands.hello_result(self.bus.flags, id, offset, size, self.bus.uuid)
        return decoded.pokes + result

    async def _set_up(self, caller: Caller, what: str) -> Looked:
        """Look at who sets the file up. Who gets a signal meanwhile begins again, maybe before we know of it; so of
        two who are looked at, the last one counts. Raises Errno EBADFD."""
        if not self._entering:
            self._looking_at = caller
            looked = await self.bus.look(caller)
            if self._looking_at is caller and self.state is State.ENDPOINT:
                return looked
        raise Errno(errno.EBADFD, f"{what} while another command sets the file up")

    async def _make_endpoint(self, caller: Caller, whole: bytes) -> tuple[Poke, ...]:
        decoded = commands.decode_endpoint_make(whole)
        if decoded.value is not None:
            with _writing(decoded.pokes):
                await self._set_up(caller, "ENDPOINT_MAKE")
                self._entering = True
                try:
                    await self.bus.make_endpoint(caller, decoded.value)
                finally:
                    self._entering = False
                self.state = State.ENDPOINT_OWNER
        return decoded.pokes

    def _byebye(self, whole: bytes) -> tuple[Poke, ...]:
        decoded = commands.decode_byebye(whole)
        if decoded.value is not None:
            with _writing(decoded.pokes):
                if len(self.box.queue):
                    raise Errno(errno.EBUSY, "BYEBYE with messages in the queue")
            self.end()
        return decoded.pokes

    def _recv(self, whole: bytes) -> tuple[Poke, ...]:
        decoded = commands.decode_recv(whole)
        recv = decoded.value
        if recv is None:
            return decoded.pokes
        lost = self.box.queue.take_lost()
        try:
            ticket, entry = self.box.queue.peek(recv.priority)
        except Errno as error:
            pokes = decoded.pokes + commands.recv_result(*self.box.pool.empty, 0, lost)
            raise Errno(error.errno, error.text, pokes) from None
        if recv.flags & abi.RECV_DROP:
            self.box.unqueue(ticket)
            self._let_go(entry)
            self.box.pool.release(entry.slice)
            self._is_read(entry)
            if entry.expects is not None:
                caller, cookie = entry.expects
                if self._owed.get(caller, {}).pop(cookie, None) is not None:
                    self.bus.forsake(caller, cookie)
            return decoded.pokes + commands.recv_result(*self.box.pool.empty, 0, lost)
        offset, size = self.box.pool.publish(entry.slice)
        self.box.memory.push(offset, size)
        flags = 0
        if not recv.flags & abi.RECV_PEEK:
            flags = self._hand(entry)
            self.box.unqueue(ticket)
            self.box.pool.release(entry.slice)
            self._is_read(entry)
        return decoded.pokes + commands.recv_result(offset, size, flags, lost)

    async def _interruptible(self, caller: Caller, wait: Wait[None]) -> None:
        """Raises Interrupted if the caller gets a signal."""
        caller.waits_for = wait
        try:
            await wait
        finally:
            caller.waits_for = None

    def put_in_order(self, name: str) -> None:
        """All that moved to us with this name is there, each from its sender: the first that was sent is
        the first again."""
        moved = [
            (entry.kept[1].sent[0], ticket, entry.kept[1].priority, entry)
            for ticket, entry in self.box.queue
            if entry.kept is not None and entry.kept[1].dst_name == name
        ]
        before = [sent for sent, *_ in moved]
        if before == sorted(before):
            return
        for _, ticket, *_ in moved:
            self.box.queue.remove(ticket)
        for _, _, priority, entry in sorted(moved, key=lambda each: each[:2]):
            self.box.queue.push(entry, priority)

    def _is_read(self, entry: Entry) -> None:
        """Its sender need not send it again, wherever the name goes that it was sent to."""
        if entry.kept is not None:
            source, parcel, _ = entry.kept
            self.bus.tell_read(source.id, parcel.cookie)

    def _answered_meanwhile(self, header: message.Header) -> int | None:
        """The ticket of the reply to a call that a signal interrupted, which the system makes once more."""
        for ticket, entry in self.box.queue:
            if entry.answers is not None and entry.answers[1] == header.cookie:
                if header.dst_id in (entry.answers[0], abi.DST_ID_NAME):
                    return ticket
        return None

    def _hand(self, entry: Entry) -> int:
        """The client is about to see this message: it gets the descriptors. Returns RETURN flags."""
        complete = not entry.incomplete
        if complete and entry.fds:
            complete = self.bus.hand(entry.slice.offset, entry.fds)
            if complete:
                self.box.installing[entry.slice.offset] = entry.fds_at
        self._let_go(entry)
        return 0 if complete else abi.RECV_RETURN_INCOMPLETE_FDS

    def _let_go(self, entry: Entry) -> None:
        self.bus.close(entry.fds)
        self.kept -= len(entry.fds)
        entry.fds = ()

    def awaits(self, offset: int) -> int:
        """How many numbers of descriptors `installed` wants of the client. Raises Errno ENXIO: none."""
        if offset not in self.box.installing:
            raise Errno(errno.ENXIO, f"no descriptors were handed over for {offset}")
        return len(self.box.installing[offset])

    def installed(self, offset: int, numbers: Sequence[int]) -> None:
        """The client says which numbers have the descriptors of the message at `offset`."""
        places = self.box.installing.pop(offset)
        for at, number in zip(places, numbers, strict=True):
            self.box.memory.write(offset + at, layout.I32.pack(number))
        first, last = min(places), max(places)
        self.box.memory.push(offset + first, last + layout.I32.size - first)

    async def _acquire(self, whole: bytes) -> tuple[Poke, ...]:
        decoded = commands.decode_name_acquire(whole)
        wanted = decoded.value
        if wanted is None:
            return decoded.pokes
        with _writing(decoded.pokes):
            before = self.bus.owner(wanted.name)
            held = self.bus.held(self.id)
            waited = any(each.name == wanted.name for each in held)
            if len(held) >= abi.MAX_NAMES and not waited:
                raise Errno(errno.E2BIG, f"the connection has {len(held)} names")
            moves = before is not None and before == self.bus.activator(wanted.name)
            if moves:
                self.bus.expect(wanted.name)
            try:
                result = await self.bus.acquire(wanted.name, ownership.request_flags(wanted.flags))
                flags = ownership.acquired(result, wanted.flags, waited)
                if moves:
                    await self.bus.collect(wanted.name)
            finally:
                self.bus.expect(wanted.name, False)
        return (*decoded.pokes, commands.return_flags(flags))

    async def _release(self, whole: bytes) -> tuple[Poke, ...]:
        decoded = commands.decode_name_release(whole)
        if decoded.value is not None:
            with _writing(decoded.pokes):
                if not is_well_known(decoded.value):  # the registry would not look for it
                    raise Errno(errno.ESRCH, f"{decoded.value!r} is nobody's")
                ownership.check_released(await self.bus.release(decoded.value))
        return decoded.pokes

    async def _add_match(self, whole: bytes) -> tuple[Poke, ...]:
        decoded = commands.decode_match_add(whole, self.bus.bloom.size)
        added = decoded.value
        if added is None:
            return decoded.pokes
        with _writing(decoded.pokes):
            for_signals = not any(
                isinstance(rule, match.NameChange | match.IdChange) for rule in added.rules
            )
            cookies = self._cookies[for_signals]
            if not cookies:
                await self.bus.subscribe(for_signals, True)
            self._matches.add(added.cookie, added.rules, added.replace)
            cookies.append(added.cookie)
        return decoded.pokes

    async def _remove_match(self, whole: bytes) -> tuple[Poke, ...]:
        decoded = commands.decode_match_remove(whole)
        cookie = decoded.value
        if cookie is None:
            return decoded.pokes
        with _writing(decoded.pokes):
            self._matches.remove(cookie)
            for kind, cookies in self._cookies.items():
                left = [each for each in cookies if each != cookie]
                self._cookies[kind] = left
                if cookies and not left:
                    await self.bus.subscribe(kind, False)
        return decoded.pokes

    def _list(self, flags: int) -> bytes:
        everybody = [
            message.Listed(known.id, known.flags, self.bus.held(known.id))
            for known in self.bus.everybody()
        ]
        if flags & abi.LIST_ACTIVATORS:
            names = (
                metadata.OwnedName(name, abi.NAME_ACTIVATOR)
                for name in self.bus.startable()
                if not self.bus.activator(name)
            )
            everybody += [message.Listed(0, abi.HELLO_ACTIVATOR, (name,)) for name in names]
        return message.name_list(everybody, flags)

    async def _info(self, whole: bytes) -> tuple[Poke, ...]:
        decoded = commands.decode_conn_info(whole)
        asked = decoded.value
        if asked is None:
            return decoded.pokes
        with _writing(decoded.pokes):
            id: int | None = asked.id
            if asked.name is not None:
                id = self.bus.owner(asked.name)
                if id is None:
                    raise Errno(errno.ESRCH, f"nobody owns {asked.name}")
            known = self.bus.find(id or 0) or self.bus.monitor(id or 0)
            if known is None or not self.bus.sees(known):
                raise Errno(errno.ENXIO, f"there is no connection {id}")
            if asked.name is not None and asked.id not in (0, known.id):
                raise Errno(errno.ESRCH, f"{asked.name} is not owned by {asked.id}")
            raw = self._about if known.id == self.id else await self.bus.about(known.id)
            try:
                about = parcels.decode_about(raw)
            except parcels.ParcelError:
                about = parcels.About()
            mask = metadata.granted(about.offered, asked.attach_flags, False)
            mask &= ~abi.ATTACH_TIMESTAMP
            items = metadata.build_items(self._metadata(known, about), mask, *self.bus.maps)
            data = message.info(known.id, known.flags, items)
            return decoded.pokes + commands.info_result(*self._show(data))

    def _creator(self, whole: bytes) -> tuple[Poke, ...]:
        decoded = commands.decode_bus_creator_info(whole)
        if decoded.value is None:
            return decoded.pokes
        with _writing(decoded.pokes):
            items = metadata.build_items(self.bus.creator(), decoded.value, *self.bus.maps)
            # kdbus numbered buses; what they have here is a UUID.
            id = int.from_bytes(self.bus.uuid[:8], "little")
            data = message.bus_info(id, self.bus.flags, self.bus.name, items)
            return decoded.pokes + commands.info_result(*self._show(data))

    async def _update(self, whole: bytes) -> tuple[Poke, ...]:
        decoded = commands.decode_update(whole, self.kind)
        update = decoded.value
        if update is not None:
            with _writing(decoded.pokes):
                if update.policy is not None:
                    await self.bus.set_policy(update.policy)
                if update.attach_send is not None:
                    about = parcels.decode_about(self._about)
                    about = msgspec.structs.replace(about, offered=update.attach_send)
                    self._attach_send, self._about = update.attach_send, parcels.encode(about)
                    self._fresh_until = 0
                    await self.bus.describe(self._about)
            if update.attach_recv is not None:
                self._attach_recv = update.attach_recv
        return decoded.pokes

    def _show(self, data: bytes) -> tuple[int, int]:
        """Put an answer into the pool; the client is to free it. Raises Errno."""
        if not data:
            return self.box.pool.empty
        slice = self.box.pool.alloc(len(data), accounted=False)
        self.box.memory.write(slice.offset, data)
        self.box.memory.push(slice.offset, len(data))
        shown = self.box.pool.publish(slice)
        self.box.pool.release(slice)
        return shown

    # -- sending -------------------------------------------------------------------------------

    async def _send(self, caller: Caller, address: int, whole: bytes) -> Done:
        decoded = commands.decode_send(whole)
        if decoded.value is None:
            return await self._negotiate(caller, address, whole, decoded.pokes)
        send = decoded.value
        with _writing(decoded.pokes):
            data = await fetch(caller, commands.MESSAGE, send.address, b"")
            parsed = commands.parse_message(data)
            sync = bool(send.flags & abi.SEND_SYNC_REPLY)
            found = message.examine(parsed, sync, self.id, self.bus.bloom.size)
            cancels = [] if send.cancel_fd is None else await caller.take([send.cancel_fd])
            try:
                for fd in cancels:
                    self.bus.watch(fd, lambda: _cancel(caller))
                call = self._calls.resume(found.header.cookie) if sync else None
                if call is not None:
                    answered: Entry | None = await self._wait(caller, call, Wait())
                elif sync and (ticket := self._answered_meanwhile(found.header)) is not None:
                    answered = self.box.unqueue(ticket)
                else:
                    answered = await self._post(caller, found, sync)
            finally:
                for fd in cancels:
                    self.bus.unwatch(fd)
                self.bus.close(cancels)
        result, flags = self.box.pool.empty, 0
        if answered is not None:
            result = self.box.pool.publish(answered.slice)
            self.box.memory.push(*result)
            flags = self._hand(answered)
            self.box.pool.release(answered.slice)
        pokes = decoded.pokes
        if sync:
            pokes += commands.send_result(*result, flags)
        return Done(_at(address, pokes))

    async def _negotiate(
        self, caller: Caller, address: int, whole: bytes, pokes: tuple[Poke, ...]
    ) -> Done:
        """A SEND that only asks what SEND and messages may look like."""
        at = commands.negotiated_message(whole)
        stores = _at(address, pokes)
        if at:
            with _writing(pokes):
                data = await fetch(caller, commands.MESSAGE, at, b"")
                stores += _at(at, commands.parse(commands.MESSAGE, data).pokes)
        return Done(stores)

    async def send(self, caller: Caller, found: message.Message, data: bytes) -> Done:
        """An ordinary SEND without flags: `found` is its message, `data` the bytes of the vectors."""
        pokes = (commands.return_flags(0),)
        with _writing(pokes):
            await self._post(caller, found, False, data)
        return Done(_at(caller.argument, pokes))

    async def _post(
        self, caller: Caller, found: message.Message, sync: bool, data: bytes | None = None
    ) -> Entry | None:
        """Send a message that has been examined, with `data` in its vectors if that is known; the reply, if it is
        `sync`."""
        memfds = [part.fd for part in found.parts if isinstance(part, message.Memfd)]
        fds = await caller.take([*memfds, *found.fds]) if memfds or found.fds else []
        try:
            if data is None:
                vectors = [
                    (part.address, part.size)
                    for part in found.parts
                    if isinstance(part, message.Vector) and part.address
                ]
                data = b"".join(await caller.copy(vectors)) if vectors else b""
            return await self._pass_on(caller, found, data, fds, sync)
        finally:
            self.bus.close(fds)

    async def _pass_on(
        self, caller: Caller, found: message.Message, data: bytes, fds: Sequence[int], sync: bool
    ) -> Entry | None:
        """The same, with all that belongs to it."""
        dst_id, flags = found.header.dst_id, found.header.flags
        if sync and found.header.reply_or_timeout <= self.bus.clock()[0]:
            raise Errno(errno.ETIMEDOUT, "a synchronous call whose time is over already")
        to = None
        if dst_id != abi.DST_ID_BROADCAST:
            to = await self._destination(caller, found)
            dst_id = to.id
        sent = self.bus.clock()
        about = self._sent_about
        if caller.tid != self._sender or sent[0] >= self._fresh_until:
            about = await self._about_now(caller, sent[0])
        parcel = parcels.pack(found, self._attach_send, sent, about, dst_id)
        kept = None if parcel.dst_name is None else self._keep(parcel, data, fds)
        try:
            if to is None:
                await self.bus.publish(parcel, data, fds)
            elif flags & abi.MSG_EXPECT_REPLY:
                return await self._call(caller, to, parcel, data, fds, sync)
            elif parcel.is_reply:
                await self._reply(to, parcel, data, fds)
            else:
                await self.bus.send(to, parcel, data, fds)
        except Errno:
            if kept is not None:
                self._kept.drop(kept)
            raise
        return None

    def _keep(self, parcel: Parcel, data: bytes, fds: Sequence[int]) -> Sent | None:
        """A message that may move to another receiver, as it would be sent to that."""
        name = parcel.dst_name
        if name is None or parcel.is_reply or not self.bus.activator(name):
            return None
        return self._kept.keep(parcel, data, self.bus.keep(fds) if fds else ())

    def read(self, cookie: int) -> None:
        """The receiver of a message to a name that has an activator has read it."""
        self._kept.read(cookie)

    def send_again(self) -> None:
        """What was sent to names that have moved, to their new owners."""
        while self._again:
            sent, id = self._again.popleft()
            to = self.bus.find(id)
            if to is None or sent not in self._kept:
                continue  # it has moved once more, or was read
            own = layout.U64.pack(self.id)
            parcel = msgspec.structs.replace(sent.parcel, dst_id=id, origin=own)
            start(
                self.bus.send(to, parcel, sent.data, sent.fds, again=True),
                partial(self._sent_again, sent, id),
            )
            if not to.kdbus:
                self._kept.drop(sent)  # its client has what comes
        while self._moved:
            self.bus.tell_sent_again(*self._moved.pop())

    def others_sent_again(self, sender: int, name: str) -> None:
        """What moved from us with this name."""
        for sent in self._left.of(layout.U64.pack(sender)):
            if sent.parcel.dst_name == name:
                self._left.drop(sent)

    def _sent_again(self, sent: Sent, id: int, result: Errno | Interrupted | None) -> None:
        if result is not None:
            self._kept.drop(sent)
            if sent.parcel.flags & abi.MSG_EXPECT_REPLY:
                self.forsaken(id, sent.parcel.cookie)

    async def _about_now(self, caller: Caller, now: int) -> bytes:
        """What is told of the thread that sends, which need not be the one that said HELLO, nor be called
        as it was then. It is not asked for anew at each of many messages."""
        if self._attach_send & _OF_PROCESS:
            self._sent_about = await self.bus.refreshed(caller, self._about)
        else:
            about = parcels.decode_about(self._about)
            about = msgspec.structs.replace(about, tid=caller.tid)
            self._sent_about = parcels.encode(about)
        self._sender, self._fresh_until = caller.tid, now + FRESH_NS
        return self._sent_about

    async def _destination(self, caller: Caller, found: message.Message) -> Known:
        """Who is to get it (kdbus_pin_dst). Raises Errno: ESRCH, EADDRNOTAVAIL, EREMCHG, ENXIO."""
        id, name = found.header.dst_id, found.dst_name
        if name is not None:
            owner = self.bus.owner(name)
            if owner is None and not found.header.flags & abi.MSG_NO_AUTO_START:
                owner = await self.bus.start_service(caller, name)
            if owner is None:
                raise Errno(errno.ESRCH, f"nobody owns {name}")
            if id not in (abi.DST_ID_NAME, owner):
                raise Errno(errno.EREMCHG, f"{name} is owned by {owner}, not by {id}")
            id = owner
        known = self.bus.find(id)
        if (
            known is None
            or (name is None and known.flags & _SPECIAL)
            or not (self.bus.sees(known) or self._owes(found.header))
        ):
            raise Errno(errno.ENXIO, f"there is no ordinary connection {id}")
        if known.flags & abi.HELLO_ACTIVATOR and found.header.flags & abi.MSG_NO_AUTO_START:
            raise Errno(errno.EADDRNOTAVAIL, f"nobody but an activator owns {name}")
        return known

    def _owes(self, header: message.Header) -> bool:
        """Whether it answers a call, which somebody may have made whom our client does not see."""
        asks = header.flags & (abi.MSG_EXPECT_REPLY | abi.MSG_SIGNAL)
        return not asks and header.reply_or_timeout in self._owed.get(header.dst_id, {})

    async def _call(
        self, caller: Caller, to: Known, parcel: Parcel, data: bytes, fds: Sequence[int], sync: bool
    ) -> Entry | None:
        call = Call(to.id, parcel.cookie, parcel.reply_or_timeout, sync, parcel.dst_name)
        self._calls.add(call, self.box.untold)
        wait: Wait[Entry] = Wait()
        if sync:
            self._waiting[call] = wait
        try:
            await self.bus.send(to, parcel, data, fds)
        except Errno:
            self._calls.remove(call)
            self._waiting.pop(call, None)
            raise
        return await self._wait(caller, call, wait) if sync else None

    async def _wait(self, caller: Caller, call: Call, wait: Wait[Entry]) -> Entry:
        """The reply to a synchronous call. Raises Errno: ETIMEDOUT, EPIPE, ECANCELED; Interrupted."""
        self._waiting[call] = caller.waits_for = wait
        try:
            return await wait
        except Interrupted:
            call.interrupted = True
            raise
        except Errno:
            self._calls.remove(call)
            raise
        finally:
            caller.waits_for = None
            self._waiting.pop(call, None)

    async def _reply(self, to: Known, parcel: Parcel, data: bytes, fds: Sequence[int]) -> None:
        """Answer a call, which can be done once and in its time."""
        owed, cookie = self._owed.get(to.id, {}), parcel.reply_or_timeout
        deadline = owed.pop(cookie, 0)
        if deadline <= self.bus.clock()[0]:
            raise Errno(errno.EBADSLT, f"a reply to {cookie} of {to.id}, which nobody waits for")
        try:
            await self.bus.send(to, parcel, data, fds)
        except Errno:
            owed[cookie] = deadline
            raise

    # -- receiving -----------------------------------------------------------------------------

    def receive(
        self,
        source: Known,
        parcel: Parcel,
        parts: Sequence[Part],
        seqnum: int,
        fds: Sequence[int] = (),
    ) -> None:
        """A message of `source`; `parts` are its payload: bytes, a number of zeroes, or a memfd; `fds`
        are its descriptors. Descriptors stay the caller's; without `fds` they are told as incomplete.

        Raises Errno, which is for the sender; and ParcelError, if that is not an honest one. What
        was sent to all is lost in silence if it has no room."""
        broadcast = parcel.dst_id == abi.DST_ID_BROADCAST
        if self.kind == abi.HELLO_MONITOR:
            self._try_enqueue(source, parcel, parts, seqnum, ())
            return
        if self.kind == abi.HELLO_POLICY_HOLDER or (self.kind and parcel.dst_name is None):
            raise Errno(errno.ENXIO, f"connection {self.id} is no ordinary one")
        if parcel.flags & abi.MSG_SIGNAL:
            filter = parcels.filter_of(parcel)
            signal = match.Signal(source.id, parcel.dst_id, source.names, filter)
            if not self._matches.admits(signal):
                return
        moves = parcel.dst_name is not None and self.bus.activator(parcel.dst_name)
        if parcel.fds and not self._accept_fd:
            self._refuse_fds(source, parcel)
            if parcel.origin and moves:
                self.bus.tell_read(source.id, parcel.cookie)  # lost: it moves no more
            return
        if parcel.is_reply:
            self._receive_reply(source, parcel, parts, seqnum, fds)
            return
        most = abi.MAX_PENDING_REPLIES if source.kdbus else MAX_DBUS_CALLS
        if parcel.flags & abi.MSG_EXPECT_REPLY and len(self._owed.get(source.id, ())) >= most:
            raise Errno(errno.EMLINK, f"{most} calls of connection {source.id} wait for a reply")
        if broadcast or parcel.flags & abi.MSG_SIGNAL or parcel.origin:
            entry = self._try_enqueue(source, parcel, parts, seqnum, fds)
            if entry is None:
                if moves:
                    self.bus.tell_read(source.id, parcel.cookie)
                return
        else:
            entry = self._enqueue(source, parcel, parts, seqnum, fds)
        if moves:
            entry.kept = source, parcel, parts
        if parcel.flags & abi.MSG_EXPECT_REPLY:
            entry.expects = source.id, parcel.cookie
            self._owed.setdefault(source.id, {})[parcel.cookie] = parcel.reply_or_timeout

    def _refuse_fds(self, source: Known, parcel: Parcel) -> None:
        """We take no descriptors. Raises Errno ECOMM, for the sender; one that we wait for hears
        EREMOTEIO, and nobody hears of a signal. What has moved with its name is lost."""
        if parcel.flags & abi.MSG_SIGNAL:
            return
        if parcel.origin:
            self._lose()
            return
        text = f"connection {self.id} does not accept descriptors"
        if parcel.is_reply:
            wait = self._waiting.get(self._calls.take(source.id, parcel.reply_or_timeout))
            if wait is not None:
                wait.fail(Errno(errno.EREMOTEIO, text))
        raise Errno(errno.ECOMM, text)

    def _try_enqueue(
        self,
        source: Known,
        parcel: Parcel,
        parts: Sequence[Part],
        seqnum: int,
        fds: Sequence[int],
    ) -> Entry | None:
        """The same for what its sender is not told of if it has no room; our client is, but of a signal
        to it alone."""
        try:
            return self._enqueue(source, parcel, parts, seqnum, fds)
        except Errno:
            if not parcel.flags & abi.MSG_SIGNAL or parcel.dst_id == abi.DST_ID_BROADCAST:
                self._lose()
            return None

    def _receive_reply(
        self,
        source: Known,
        parcel: Parcel,
        parts: Sequence[Part],
        seqnum: int,
        fds: Sequence[int],
    ) -> None:
        call = self._calls.take(source.id, parcel.reply_or_timeout)
        wait = self._waiting.get(call)
        if wait is None:
            entry = self._enqueue(source, parcel, parts, seqnum, fds)
            if call.interrupted:
                entry.answers = call.callee, call.cookie
            return
        try:
            entry = self._place(source, parcel, parts, seqnum, fds, KERNEL_USER, accounted=False)
        except Errno as error:
            wait.fail(error)
            raise
        wait.done(entry)

    def _enqueue(
        self,
        source: Known,
        parcel: Parcel,
        parts: Sequence[Part],
        seqnum: int,
        fds: Sequence[int],
    ) -> Entry:
        # Who is behind a custom endpoint shares the endpoint's part, not the user's.
        user = _ENDPOINTS + source.custom if source.custom else source.uid + 1
        entry = self._place(source, parcel, parts, seqnum, fds, user, accounted=True)
        self.box.queue.push(entry, parcel.priority)
        self.arrived += 1
        return entry

    def _place(
        self,
        source: Known,
        parcel: Parcel,
        parts: Sequence[Part],
        seqnum: int,
        fds: Sequence[int],
        user: int,
        accounted: bool,
    ) -> Entry:
        """Lay a message out in the pool."""
        mask = metadata.granted(parcel.offered, self._attach_recv, False)
        attached = self._items(source, parcel, mask, seqnum) if mask else b""
        header = (
            parcel.flags,
            parcel.priority,
            parcel.dst_id,
            source.id,
            parcel.payload_type,
            parcel.cookie,
            parcel.reply_or_timeout,
        )
        memfds = [part.fd for part in parts if isinstance(part, message.Memfd)]
        kept = self.bus.keep([*memfds, *fds]) if memfds or fds else []
        try:
            entry = self.box.place(
                header, parts, parcel.fds, parcel.dst_name, b"", attached, user, accounted
            )
        except Errno:
            self.bus.close(kept)
            raise
        self.kept += len(kept)
        entry.fds = kept
        entry.incomplete = parcel.fds > len(fds)
        return entry

    def _items(self, source: Known, parcel: Parcel, mask: int, seqnum: int) -> bytes:
        """What of its metadata is attached to a message: mostly what was with the one before."""
        attached = b""
        if mask != abi.ATTACH_TIMESTAMP:
            names = self._owned(source.id) if mask & abi.ATTACH_NAMES else ()
            bus = self.bus
            case = (source, parcel.about, mask, names, bus.maps, bus.sees_pids, bus.space)
            kept = self._told_before.get(source.id)
            if kept is None or kept[0] != case:
                known = self._metadata(source, parcels.decode_about(parcel.about))
                kept = case, metadata.build_items(known, mask, *bus.maps)  # without a timestamp
                self._told_before[source.id] = kept
            attached = kept[1]
        if mask & abi.ATTACH_TIMESTAMP:  # which comes last
            attached += metadata.timestamp(metadata.Timestamp(seqnum, *parcel.sent))
        return attached

    def _lose(self) -> None:
        self.box.queue.lose()
        self.arrived += 1

    def _metadata(self, known: Known, about: parcels.About) -> metadata.Metadata:
        """What may be told of a connection: pids as our client's namespace has them, if that is the
        bus's own or the other's; else there are none."""
        told = self._told(known, about)
        if self.bus.sees_pids or told.pids is None:
            return told
        pids = metadata.Pids(0, 0, 0)
        if known.space and known.space == self.bus.space and not self._pretends(known, about):
            tid = known.inside.pid if told.pids.tid == told.pids.pid else 0
            pids = msgspec.structs.replace(known.inside, tid=tid)
        return msgspec.structs.replace(told, pids=pids)

    def _pretends(self, known: Known, about: parcels.About) -> bool:
        return about.faked is not None and self.bus.is_privileged(known)

    def _told(self, known: Known, about: parcels.About) -> metadata.Metadata:
        if about.faked is not None and self._pretends(known, about):
            faked = about.faked
            return metadata.Metadata(
                creds=None if faked.creds is None else metadata.Creds(*faked.creds),
                pids=None if faked.pids is None else metadata.Pids(*faked.pids),
                label=faked.label,
                names=self._owned(known.id),
                description=about.description,
            )
        tid, ppid = about.tid or known.pids.tid, about.ppid or known.pids.ppid
        return metadata.Metadata(
            creds=known.creds,
            pids=msgspec.structs.replace(known.pids, tid=tid, ppid=ppid),
            groups=known.groups,
            tid_comm=about.tid_comm,
            pid_comm=about.pid_comm,
            exe=about.exe,
            cmdline=about.cmdline,
            cgroup=known.cgroup,
            caps=known.caps,
            label=known.label,
            audit=known.audit,
            names=self._owned(known.id),
            description=about.description,
        )

    def _owned(self, id: int) -> tuple[metadata.OwnedName, ...]:
        held = self.bus.held(id)
        return tuple(each for each in held if not each.flags & abi.NAME_IN_QUEUE)

    # -- what the bus announces ----------------------------------------------------------------

    def name_changed(
        self,
        name: str,
        old: int,
        new: int,
        old_flags: int = 0,
        new_flags: int = 0,
        seen: bool = True,
    ) -> None:
        """A name went from one connection to another; 0 is nobody. NAME flags: what they had and have.
        `seen`: our client may know."""
        kind = abi.ITEM_NAME_CHANGE if old and new else abi.ITEM_NAME_ADD
        change = match.NameChange(abi.ITEM_NAME_REMOVE if not new else kind, name, old, new)
        if old and new and self.bus.activator(name) in (old, new):
            for sent in self._kept.to(name):
                self._calls.pass_on(name, sent.parcel.cookie, new)
                self._again.append((sent, new))
                self._moved.add((old, name))
            if old == self.id:
                self._move(name, new)
            elif self.bus.activator(name) != self.id:
                for left in self._left.to(name):  # nobody takes it of us any more
                    self._left.drop(left)
        if seen and self._hears(change):
            self._notice(message.announce_name(change, old_flags, new_flags))

    def _hears(self, change: match.Notification) -> bool:
        if self.state != State.CONNECTION:
            return False
        return self.kind == abi.HELLO_MONITOR or self._matches.announces(change)

    def _move(self, name: str, new: int) -> None:
        """A name went from its activator to an owner, or back: so does what was sent to it and nobody
        has received yet. Its senders' workers send it again. Of those who are gone nobody can vouch; we pass on
        what they had sent, and nothing is told of them."""
        to, coming = self.bus.find(new), Counter[int]()
        for ticket, entry in self.box.queue:
            if entry.kept is None or entry.kept[1].dst_name != name:
                continue
            source, parcel, parts = entry.kept
            self.box.unqueue(ticket)
            self.box.pool.release(entry.slice)
            if parcel.flags & abi.MSG_EXPECT_REPLY:
                self._owed.get(source.id, {}).pop(parcel.cookie, None)
            passed = _passed(source.id, parcel, parts, entry.fds)
            if self.bus.find(source.id) is not None:
                coming[source.id] += 1
                if source.id != self.id:
                    left = self._left.keep(*passed, entry.fds)
                    self._left_until.append((self.bus.clock()[0] + LEFT_NS, left))
                    self.kept -= len(entry.fds)
                    entry.fds = ()
            elif to is not None:
                self._forward(to, Sent(*passed, entry.fds))
            self._let_go(entry)
        if to is not None:
            self.bus.moved(to, name, coming)

    def _forward(self, to: Known, left: Sent) -> None:
        """Pass on a message of somebody who is gone."""
        parcel = msgspec.structs.replace(left.parcel, dst_id=to.id)
        self.bus.forward(to, parcel, left.data, left.fds)

    def id_added(self, id: int, flags: int) -> None:
        """A connection is new; `flags` are its HELLO flags."""
        self._id_changed(match.IdChange(abi.ITEM_ID_ADD, id), flags)

    def id_removed(self, id: int, flags: int, seen: bool = True) -> None:
        """A connection is gone: it answers nobody, and waits for nothing."""
        for call in self._calls.drop(id):
            wait = self._waiting.get(call)
            if wait is not None:
                wait.fail(Errno(errno.EPIPE, f"connection {id} went without a reply"))
            elif not call.interrupted:
                self._no_reply(abi.ITEM_REPLY_DEAD, call.cookie)
        self._owed.pop(id, None)
        self._told_before.pop(id, None)
        for left in self._left.of(layout.U64.pack(id)):
            to = self.bus.find(self.bus.owner(left.parcel.dst_name or "") or 0)
            if to is not None and to.id != self.id:
                self._forward(to, left)
            self._left.drop(left)
        if seen:
            self._id_changed(match.IdChange(abi.ITEM_ID_REMOVE, id), flags)

    def _id_changed(self, change: match.IdChange, flags: int) -> None:
        if self._hears(change):
            self._notice(message.announce_id(change, flags))

    def forsaken(self, callee: int, cookie: int) -> None:
        """The connection `callee` says that it will not answer a call."""
        try:
            call = self._calls.take(callee, cookie)
        except Errno:
            return
        wait = self._waiting.get(call)
        if wait is not None:
            wait.fail(Errno(errno.EPIPE, f"connection {callee} dropped the call {cookie}"))
        elif not call.interrupted:
            self._no_reply(abi.ITEM_REPLY_DEAD, cookie)

    def _no_reply(self, type: int, cookie: int) -> None:
        self._notice(message.announce_no_reply(type, self.id, cookie), True)

    def _notice(self, what: tuple[message.Header, bytes], no_reply: bool = False) -> None:
        header, item = what
        attached = metadata.timestamp(metadata.Timestamp(self.bus.seqnum(), *self.bus.clock()))
        fields = msgspec.structs.astuple(header)
        try:
            entry = self.box.place(fields, (), 0, None, item, attached, KERNEL_USER, True)
        except Errno:
            self._lose()
            return
        entry.no_reply = no_reply
        self.box.untold += no_reply
        self.box.queue.push(entry, 0)
        self.arrived += 1

    # -- time, and the end ---------------------------------------------------------------------

    def deadline(self) -> int | None:
        """When `tick` is to be called next (CLOCK_MONOTONIC, ns)."""
        if not self._waiting and not self._calls and not self._left_until:
            return None
        times = [call.deadline for call in self._waiting]
        times += [until for until, _ in (*self._left_until,)[:1]]
        watched = self._calls.next_deadline()
        return min(times if watched is None else [*times, watched], default=None)

    def tick(self) -> None:
        """End calls that have waited too long, and keep nothing any more of senders who are there to send it again."""
        now = self.bus.clock()[0]
        while self._left_until and self._left_until[0][0] <= now:
            self._left.drop(self._left_until.popleft()[1])
        for call in self._calls.expire(now):
            self._no_reply(abi.ITEM_REPLY_TIMEOUT, call.cookie)
        for call, wait in list(self._waiting.items()):
            if call.deadline <= now:
                self._calls.remove(call)
                wait.fail(Errno(errno.ETIMEDOUT, f"no reply to the call {call.cookie} in time"))

    def give_back(self) -> None:
        """The file is closed: names go back to their activators, and what was not received with them."""
        for each in self.bus.held(self.id):
            activator = self.bus.activator(each.name)
            if each.flags & abi.NAME_PRIMARY and activator not in (0, self.id):
                self._move(each.name, activator)

    def end(self) -> None:
        """The connection ends: BYEBYE, or its file is closed. What it still owed is forsaken."""
        if self.state != State.CONNECTION:
            return
        self.state, self.ordinary = State.GONE, None
        for wait in list(self._waiting.values()):
            wait.fail(Errno(errno.ECONNRESET, "the connection has ended"))
        for _, entry in self.box.queue:
            self._let_go(entry)
        self.bus.leave()


def _passed(
    source: int, parcel: Parcel, parts: Sequence[Part], fds: Sequence[int]
) -> tuple[Parcel, bytes]:
    """A message of `source` as it is passed on, with those of its descriptors that we have: and its bytes."""
    data = b"".join(part for part in parts if isinstance(part, bytes))
    shapes = tuple(
        (parcels.ZEROES, part, 0)
        if isinstance(part, int)
        else (parcels.BYTES, len(part), 0)
        if isinstance(part, bytes)
        else (parcels.MEMFD, part.size, part.start)
        for part in parts
    )
    count = len(fds) - sum(kind == parcels.MEMFD for kind, _, _ in shapes)
    origin = layout.U64.pack(source)
    return msgspec.structs.replace(parcel, parts=shapes, fds=count, origin=origin), data


def _joining(hello: commands.Hello, admitted: commands.Admitted) -> Joining:
    creds, pids = hello.creds, hello.pids
    faked = None
    if creds is not None or pids is not None or hello.label is not None:
        faked = Faked(
            None if creds is None else msgspec.structs.astuple(creds),
            None if pids is None else msgspec.structs.astuple(pids),
            hello.label,
        )
    return Joining(
        hello.flags,
        (hello.name or "") if hello.kind == abi.HELLO_ACTIVATOR else "",
        admitted.policy,
        hello.description,
        admitted.attach_send,
        faked,
    )


class _writing:
    """What fails inside has these pokes written back nevertheless."""

    def __init__(self, pokes: tuple[Poke, ...]) -> None:
        self._pokes = pokes

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Errno) and not error.pokes:
            raise Errno(error.errno, error.text, self._pokes) from None


def _cancel(caller: Caller) -> None:
    """The descriptor that cancels a synchronous SEND is readable."""
    if caller.waits_for is not None:
        caller.waits_for.fail(Errno(errno.ECANCELED, "the call was cancelled"))


def _at(address: int, pokes: Iterable[Poke]) -> tuple[tuple[int, bytes], ...]:
    return tuple((address + poke.offset, poke.data) for poke in pokes)
