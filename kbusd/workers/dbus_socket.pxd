from libc.stdint cimport uint8_t, uint32_t, uint64_t

from kbusd.rings.broadcast cimport Broadcast, BroadcastReader
from kbusd.rings.bulk cimport Bulk, BulkView
from kbusd.rings.clock cimport Clock
from kbusd.rings.doorbell cimport Doorbell
from kbusd.rings.fanout cimport Fanout
from kbusd.rings.frame cimport FrameHead
from kbusd.rings.merge cimport Merge
from kbusd.rings.status cimport StatusPage
from kbusd.wire.header cimport Header
from kbusd.workers.input cimport Input
from kbusd.workers.libc cimport epoll_event
from kbusd.workers.output cimport Output
from kbusd.workers.peer cimport Peer, Template

cdef class Route:
    cdef bytes envelope
    cdef object facts
    cdef Peer peer
    cdef tuple subscribers
    cdef str destination
    cdef bint to_bus
    cdef bint to_self
    cdef bint broadcast
    cdef bint depends
    cdef bint well_known
    cdef bint met
    cdef object error
    cdef object activate
    cdef tuple refusals
    cdef long long epoch
    cdef long long matches

cdef class Engine:
    cdef object context, journal, line, replica, driver, router, credentials
    cdef object hello, due, shares
    cdef object requests, activating, monitor_rules
    cdef Clock clock
    cdef StatusPage status
    cdef Doorbell doorbell
    cdef Broadcast broadcast
    cdef Fanout fanout
    cdef BroadcastReader log
    cdef Merge merge
    cdef Input input
    cdef Output output
    cdef Peer me
    cdef dict peers, routes, pending, by_source
    cdef list touched, backlogged, bulks
    cdef int epoll, client, supervisor
    cdef long long id, epoch, names_version
    cdef uint32_t serial
    cdef int request
    cdef int slow, fetching, held
    cdef set meeting
    cdef bint stopped  # whole messages of our client wait for us
    cdef bint begun, busy, leaving, everyone, unix_fds, reading, writing, wake, loaded, monitor
    cdef uint64_t tidy_at, stall_ns, stall_until, leave_until, poll_ns, poll_from, reply_ns
    cdef size_t max_message, max_outgoing, max_pending, max_outgoing_fds, uncounted, fd_cost
    cdef uint32_t max_fds

    cdef void _loop(self) except *
    cdef int _poll(self, epoll_event *events) except -3
    cdef int _sleep(self, epoll_event *events, int timeout) except -3
    cdef void _watch_client(self) except *
    cdef int _timeout(self) except -2
    cdef bint _stalled(self) except -1
    cdef void _begin(self, uint64_t stamp) noexcept
    cdef void _end(self) noexcept
    cdef bint _waits(self) except -1
    cdef void _messages(self) except *
    cdef bint _begin_large(self, uint8_t *data, size_t total, size_t have) except -1
    cdef bint _message(self, uint8_t *data, size_t size, bint large) except -1
    cdef bint _begin_bulk(self, Header *header, uint8_t *data) except -1
    cdef Bulk _bulk(self, Peer peer)
    cdef bint _must_wait(self, Route route) except -1
    cdef Route _route(self, uint8_t *data, Header *header, const uint8_t *body)
    cdef void _forward(self, Route route, Header *header, const uint8_t *body, tuple fds, int large_fd, Bulk bulk) except *
    cdef void _publish(self, Route route, FrameHead *head, const uint8_t *body, tuple fds) except *
    cdef void _publish_large(self, Route route, FrameHead *head, const uint8_t *body, tuple fds, int own) except *
    cdef uint8_t *_reserve(self, Route route, size_t length) except? NULL
    cdef void _send(self, Peer peer, FrameHead *head, bytes envelope, const uint8_t *body, tuple fds) except *
    cdef void _to_myself(self, Route route, FrameHead *head, const uint8_t *body, tuple fds) except *
    cdef void _inbound(self) except *
    cdef void _deliver(self, Peer peer, FrameHead *head, const uint8_t *payload, tuple own_fds) except *
    cdef void _deliver_copy(self, Peer peer, FrameHead *head, const uint8_t *payload, tuple fds) except *
    cdef void _emit(self, Template template, FrameHead *head, const uint8_t *body, tuple fds, BulkView view) except *
    cdef const uint8_t *_bulk_body(self, Peer peer, FrameHead *head) except NULL
    cdef void _bells(self) except *
    cdef void _flush(self) except *
    cdef bint _crowded(self) noexcept
    cdef bint _over_the_limit(self) except -1
