"""Several processes, each sending to all others at once through real shared memory.

Each frame tells how many frames every process had sent to every other in its causal past. Whoever
gets it checks: the next one of its sender (none lost, none twice, none out of order), its bytes,
and that all in its past that were for this receiver have come before. Rings are small, so that
they wrap, run full and Broadcasts overtake readers; processes sleep by the doorbell protocol, and
one that is not woken in time fails.
"""

from __future__ import annotations

import os
import random
import select
import signal
import struct
import sys
import time
import traceback

import pytest

from kbusd.rings.doorbell import heard
from kbusd.rings.ring import Ring, RingReader

from .worker import Worker, introduce

# Order is what we test, so readers wait as long as it takes; the limit has its test elsewhere.
PATIENCE = 10**11  # ns
LOST_WAKEUP = 5.0  # seconds; far above any scheduling delay


def pattern(serial: int, size: int) -> bytes:
    return bytes([serial & 0xFF]) * size


class Process:
    """Runs `worker` in a child: sends `quota` messages, and reads until all others are done.

    `gone` is a pipe per peer that ends when that peer was killed; `victim` is who gets killed."""

    def __init__(self, worker: Worker, count: int, quota: int, seed: int) -> None:
        self.worker = worker
        self.me = worker.name
        self.count = count
        self.quota = quota
        self.random = random.Random(seed * 1000 + self.me)
        self.sent = 0
        self.matrix = [0] * (count * count)  # [from * count + to]: frames known to be sent
        self.delivered = [0] * count
        self.format = struct.Struct(f"<I{count}B{count * count}I")
        self.done: set[int] = set()
        self.dead: set[int] = set()
        self.frames = 0

    def others(self) -> list[int]:
        return [name for name in range(self.count) if name != self.me and name not in self.dead]

    def send(self) -> None:
        others = self.others()
        if not others:
            return
        last = self.sent == self.quota
        if last:
            to = others
        elif self.random.random() < 0.4:
            to = self.random.sample(others, self.random.randint(1, len(others)))
        else:
            to = [self.random.choice(others)]
        for name in to:
            self.matrix[self.me * self.count + name] += 1
        flags = [0] * self.count
        for name in to:
            flags[name] = 1
        size = self.random.choice((0, 8, 60, 200, 700, 2000))
        size = self.random.randint(0, size)
        body = self.format.pack(self.sent, *flags, *self.matrix) + pattern(self.sent, size)
        serial = 0xFFFF if last else self.sent & 0x7FFF
        if last or len(to) > 1 or self.random.random() < 0.3:
            self.worker.signal(to, body, serial)
        else:
            self.worker.unicast(to[0], body, serial)
        self.sent += 1

    def deliver(self, sender: int, serial: int, body: bytes) -> None:
        number, *rest = self.format.unpack_from(body)
        count, me = self.count, self.me
        if not rest[me]:
            return  # for others: our rules do not match it
        past = rest[count:]
        self.frames += 1
        assert body[self.format.size :] == pattern(number, len(body) - self.format.size), "bytes"
        for name in range(count):
            known = past[name * count + me] - (name == sender)
            if name == sender:
                assert known == self.delivered[name], (
                    f"{me}: from {sender}: {known} before it, {self.delivered[name]} have come"
                )
            elif name not in self.dead:
                assert known <= self.delivered[name], (
                    f"{me}: {number} of {sender} came before {known} of {name}"
                )
        self.delivered[sender] += 1
        self.matrix = list(map(max, self.matrix, past))
        if serial == 0xFFFF:
            self.done.add(sender)

    def receive(self) -> bool:
        worker = self.worker
        if worker.merge.scan() <= 0:
            worker.merge.release()
            return False
        taken = worker.merge.one()
        while taken is not None:
            reader, frame = taken
            self.deliver(worker.source[reader], frame.serial, frame.body)
            if self.random.random() < 0.1:
                worker.merge.release()
            taken = worker.merge.one()
        worker.merge.release()
        broken = worker.merge.put_aside()
        assert not broken, [
            (text, worker.source[reader], reader.statistics(), worker.merge.statistics())
            for reader, text in broken
        ]
        return True

    def flush(self) -> bool:
        done = True
        for name, out in self.worker.to.items():
            if name not in self.dead:
                done &= out.flush()
        return self.worker.end() and done

    def bury(self, name: int) -> None:
        """A peer was killed: what it had published is read, what waits for it forgotten."""
        while self.receive():
            pass
        self.dead.add(name)
        out = self.worker.to.pop(name)
        self.worker.fanout.leave(out.subscriber)
        for reader, peer in list(self.worker.source.items()):
            if peer == name:
                self.worker.merge.remove(reader)

    def run(self, gone: dict[int, int]) -> None:
        worker = self.worker
        poll = select.poll()
        for bell in worker.bells.values():
            poll.register(bell.fd, select.POLLIN)
        names = {fd: name for name, fd in gone.items()}
        for fd in gone.values():
            poll.register(fd, select.POLLIN)
        while True:
            busy = self.receive()
            flushed = self.flush()
            if flushed and self.sent <= self.quota:
                # What waits for a full ring holds up its sender, as in the engine: causal order.
                for _ in range(self.random.randint(1, 30)):
                    self.send()
                    if not worker.end():
                        break
                    if self.sent > self.quota:
                        break
                busy = True
            if worker.end() and self.random.random() < 0.01:
                for out in worker.to.values():
                    if self.random.random() < 0.5 and not out.subscriber.joined:
                        worker.join(out.subscriber.owner)
                    elif self.random.random() < 0.1 and out.subscriber.joined:
                        worker.demote(out.subscriber.owner)
            worker.ring()
            if self.sent > self.quota and worker.end() and set(self.others()) <= self.done:
                return
            if busy:
                continue
            worker.status.sleep(True)
            timeout = LOST_WAKEUP * 1000
            if worker.merge.more():
                timeout = 1 if worker.merge.holding else 0
            elif not worker.end():
                if self.flush():
                    timeout = 0
                worker.ring()
            events = poll.poll(timeout)
            worker.status.sleep(False)
            assert events or timeout <= 1, (
                f"{self.me}: nobody rang; sent={self.sent} done={self.done}"
                f" waiting={[len(o.waiting) for o in worker.to.values()]}"
                f" {worker.merge.statistics()}"
            )
            for fd, _ in events:
                if fd in names:
                    poll.unregister(fd)
                    self.bury(names[fd])
                else:
                    heard(fd)


def stress(
    count: int,
    quota: int,
    seed: int,
    ring: int,
    broadcast: int,
    kill: bool = False,
    idle: int = 0,
) -> tuple[int, int]:
    """Frames delivered and demotions, in all processes. Raises AssertionError with their texts.

    idle: rings of each process between the others' in which nothing ever happens."""
    workers = [Worker(name, ring, broadcast, PATIENCE) for name in range(count)]
    silent = Ring(4096)
    for a in range(count):
        for b in range(a):
            introduce(workers[a], workers[b])
        for worker in workers:
            for _ in range(idle // count):
                worker.merge.add(RingReader(silent.fd, worker.status, worker.status.take_slot()))
    for worker in workers:
        for name in worker.to:
            worker.join(name)
    victim = count - 1 if kill else -1
    pipes = {name: os.pipe() for name in range(count) if name != victim} if kill else {}
    children = []
    results = []
    for worker in workers:
        out_read, out_write = os.pipe()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                process = Process(worker, count, quota if worker.name != victim else 1 << 40, seed)
                gone = {}
                if kill and worker.name != victim:
                    gone[victim] = pipes[worker.name][0]
                for fd in [pipe[1] for pipe in pipes.values()]:
                    os.close(fd)
                process.run(gone)
                demotions = worker.fanout.statistics().demotions
                os.write(out_write, f"{process.frames} {demotions}".encode())
                code = 0
            except BaseException:  # noqa: BLE001  (its text goes to the parent)
                os.write(out_write, traceback.format_exc()[-3000:].encode())
            finally:
                sys.stdout.flush()
                os._exit(code)
        os.close(out_write)
        children.append(pid)
        results.append(out_read)
    for pipe in pipes.values():
        os.close(pipe[0])
    if kill:
        # In the midst of its work, wherever that is.
        deadline = time.monotonic() + 20
        broadcast_of = workers[victim].fanout.broadcast
        while time.monotonic() < deadline:
            if any(out.ring.fd >= 0 for out in workers[victim].to.values()) and _busy(
                workers[(victim + 1) % count], victim
            ):
                break
            time.sleep(0.01)
        assert broadcast_of.fd >= 0
        os.kill(children[victim], signal.SIGKILL)
        os.waitpid(children[victim], 0)
        children[victim] = 0
        for pipe in pipes.values():
            os.close(pipe[1])
    texts = []
    total = demoted = 0
    open_fds = {fd: b"" for name, fd in enumerate(results) if name != victim}
    try:
        while open_fds:
            for fd in select.select(list(open_fds), [], [])[0]:
                part = os.read(fd, 65536)
                open_fds[fd] += part
                if part:
                    continue
                words = open_fds.pop(fd).decode()
                if words.replace(" ", "").isdigit():
                    total += int(words.split()[0])
                    demoted += int(words.split()[1])
                    continue
                texts.append(words)
                for pid in children:  # they would wait for the one that failed
                    if pid:
                        os.kill(pid, signal.SIGKILL)
    finally:
        for fd in results:
            os.close(fd)
        for pid in children:
            if pid:
                os.waitpid(pid, 0)
    assert not texts, "\n".join(texts)
    return total, demoted


def _busy(worker: Worker, victim: int) -> bool:
    """Whether the victim's ring to `worker` has gone round some times."""
    for reader, name in worker.source.items():
        if name == victim:
            return reader.statistics().unread > 20 * reader.size
    return False


@pytest.mark.parametrize("seed", range(3))
def test_order_and_completeness(seed: int) -> None:
    frames, demotions = stress(4, 5000, seed, 8192, 8192)
    assert frames > 20_000
    assert demotions > 0


def test_what_changes_during_a_scan() -> None:
    """With so many rings a scan takes so long that one look at each would not do."""
    for seed in range(2):
        assert stress(4, 4000, seed, 65536, 65536, idle=2000)[0] > 10_000


def test_a_killed_peer_holds_up_nobody() -> None:
    frames, _ = stress(4, 4000, 7, 16384, 16384, kill=True)
    assert frames > 10_000


def test_a_demotion_that_takes_longer_than_a_scan() -> None:
    """What a reader has taken out of a Ring between two scans of it was looked at once more, though
    the producer may have overwritten it: an honest peer was put aside as hostile."""
    reader, writer = Worker(0, 4096, 65536, PATIENCE), Worker(1, 4096, 65536, PATIENCE)
    introduce(reader, writer)
    followed = reader.followed[1]
    silent = Ring(4096)  # makes the time between the scans long enough to fill the peer's Ring
    for _ in range(1000):
        reader.merge.add(RingReader(silent.fd, reader.status, reader.status.take_slot()))
    bodies = 0
    pid = os.fork()
    if pid == 0:
        try:
            while True:
                writer.join(0)
                for _ in range(200):
                    writer.signal([0], bytes(900))
                    while not writer.to[0].flush():
                        pass
                    writer.end()
        finally:
            os._exit(1)
    try:
        while bodies < 4000:
            while reader.merge.statistics().following and followed.statistics().unread < 65536:
                pass  # until it is overrun
            bodies += len(reader.merge.take())
            assert not reader.merge.put_aside()
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("ring", "broadcast"), [(4096, 4096), (65536, 16384), (262144, 1048576)])
def test_millions(ring: int, broadcast: int) -> None:
    total = 0
    for seed in range(4):
        total += stress(5, 40_000, seed, ring, broadcast)[0]
    assert total > 1_000_000


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_kills() -> None:
    for seed in range(20):
        stress(4, 3000, seed, 8192, 8192, kill=True)
