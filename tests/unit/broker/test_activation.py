"""Activation: who is answered what, and when; texts as dbus-daemon 1.14 words them."""

from __future__ import annotations

from typing import Any

import pytest

from kbusd.broker.connection import MAX_WAITING
from kbusd.broker.watching import CHANGING_SECONDS, QUIET_SECONDS, READ_SECONDS
from kbusd.policy.configuration import Configuration, File
from kbusd.rings import entries as e
from tests.unit.broker.world import ADDRESS, Event, World, service

ERROR = "org.freedesktop.DBus.Error."
STARTER = {"DBUS_STARTER_ADDRESS": ADDRESS}
SESSION = STARTER | {
    "DBUS_STARTER_BUS_TYPE": "session",
    "DBUS_SESSION_BUS_ADDRESS": ADDRESS,
}


def world_with(*names: str, **settings: Any) -> World:
    return World(services=tuple(service(name) for name in names), **settings)


def failure(request: int, error: str, text: str) -> e.Failure:
    return e.Failure(request, ERROR + error, text)


def test_all_who_asked_are_answered_once_the_name_has_an_owner() -> None:
    world = world_with("a.b")
    a, b, c = world.client(1), world.client(2), world.client(3)
    assert world.ask(a, e.StartService(2, "a.b", False)) == [
        ("launch", e.Launch(1, "a.b", ("/bin/true",), "", SESSION))
    ]
    assert world.ask(b, e.StartService(2, "a.b", True)) == []
    assert world.ask(c, e.RequestName(2, "a.b", 0)) == [
        ("log", e.NameOwnerChanged("a.b", 0, 3)),
        (1, e.Reply(2, 1)),
        (2, e.Reply(2, 1)),
        (3, e.Reply(2, 1)),
    ]
    assert world.ask(a, e.StartService(3, "a.b", False)) == [(1, e.Reply(3, 2))]
    assert world.bus.deadline() is None
    world.events.clear()
    world.bus.activation.ended(1, 256, "")
    assert world.taken() == []


def test_unknown_service() -> None:
    world = world_with("a.b")
    for request, name in enumerate(("a.c", ":1.1", "org.freedesktop.DBus", "bad", ""), 2):
        a = world.client(request)
        text = f"The name {name} was not provided by any .service files"
        assert world.ask(a, e.StartService(9, name, False)) == [
            (request, failure(9, "ServiceUnknown", text))
        ]


@pytest.mark.parametrize(
    ("status", "error", "name", "text"),
    [
        (
            0,
            "No such file or directory",
            "Spawn.ExecFailed",
            "Failed to execute program a.b: No such file or directory",
        ),
        (3 << 8, "", "Spawn.ChildExited", "Process a.b exited with status 3"),
        (9, "", "Spawn.ChildSignaled", "Process a.b received signal 9"),
        (9 | 0x80, "", "Spawn.ChildSignaled", "Process a.b received signal 9"),
    ],
)
def test_a_service_that_fails(status: int, error: str, name: str, text: str) -> None:
    world = world_with("a.b")
    a = world.client(1)
    world.ask(a, e.StartService(2, "a.b", False))
    world.events.clear()
    world.bus.activation.ended(1, status, error)
    assert world.taken() == [(1, failure(2, name, text))]
    assert world.ask(a, e.StartService(3, "a.b", False))[0][0] == "launch"


def test_a_service_that_exits_well_may_have_forked_and_is_waited_for() -> None:
    world = world_with("a.b", limits={"service_start_timeout": 1500})
    a = world.client(1)
    world.ask(a, e.StartService(2, "a.b", False))
    world.events.clear()
    world.bus.activation.ended(1, 0, "")
    assert world.taken() == []
    world.time += 1.5
    world.bus.tick()
    text = "Failed to activate service 'a.b': timed out (service_start_timeout=1500ms)"
    assert world.taken() == [("end", 1), (1, failure(2, "TimedOut", text))]


def test_limit_of_services_being_started() -> None:
    world = world_with("a.b", "a.c", limits={"max_pending_service_starts": 1})
    a = world.client(1)
    world.ask(a, e.StartService(2, "a.b", False))
    text = (
        "The maximum number of pending activations has been reached, activation of a.c failed"
        " (max_pending_service_starts=1)"
    )
    assert world.ask(a, e.StartService(3, "a.c", False)) == [
        (1, failure(3, "LimitsExceeded", text))
    ]


def test_who_waits_for_a_service_counts_as_one_more() -> None:
    world = world_with("a.b", limits={"max_pending_service_starts": 2})
    a, b = world.client(1), world.client(2)
    assert world.ask(a, e.StartService(2, "a.b", False))[0][0] == "launch"
    assert world.ask(b, e.StartService(2, "a.b", False)) == []
    text = (
        "The maximum number of pending activations has been reached, activation of a.b failed"
        " (max_pending_service_starts=2)"
    )
    assert world.ask(b, e.StartService(3, "a.b", False)) == [
        (2, failure(3, "LimitsExceeded", text))
    ]


def test_one_who_left_is_not_answered_but_the_service_starts() -> None:
    world = world_with("a.b")
    world.ask(world.client(1), e.StartService(2, "a.b", False))
    world.bus.gone(1)
    b = world.client(2)
    assert world.ask(b, e.RequestName(2, "a.b", 0))[1:] == [(2, e.Reply(2, 1))]


def test_environment_reaches_services_started_later() -> None:
    world = world_with("a.b")
    owner = world.client(1, uid=500)
    variables = {"LANG": "de", "": "x", "A=B": "x", "C": "\0", "DBUS_STARTER_ADDRESS": "x"}
    assert world.ask(owner, e.UpdateEnvironment(2, variables)) == [(1, e.Reply(2))]
    ((_, launch),) = world.ask(owner, e.StartService(3, "a.b", False))
    assert launch.environment == SESSION | {"LANG": "de"}


def test_environment_is_for_the_owner_of_the_bus_and_never_on_a_system_bus() -> None:
    world = world_with("a.b")
    (answer,) = world.ask(world.client(1, uid=7), e.UpdateEnvironment(2, {"A": "x"}))
    assert answer[1].error == ERROR + "AccessDenied"
    world = world_with("a.b", type="system")
    text = "Cannot change activation environment on a system bus."
    assert world.ask(world.client(1, uid=0), e.UpdateEnvironment(2, {"A": "x"})) == [
        (1, failure(2, "AccessDenied", text))
    ]


def test_users_of_services_count_where_a_helper_is_configured() -> None:
    services = (service("a.b", "/x", "y", user="daemon"), service("a.c", "/x"))
    world = World(services=services, type="system", service_helper="/helper")
    text = "Cannot do system-bus activation with no user\n"
    assert world.ask(world.client(2), e.StartService(2, "a.c", False)) == [
        (2, failure(2, "Spawn.FileInvalid", text))
    ]
    ((_, launch),) = world.ask(world.client(1), e.StartService(2, "a.b", False))
    assert launch.user == "daemon"
    assert launch.environment["DBUS_STARTER_BUS_TYPE"] == "system"
    world = World(services=services, type="")
    ((_, launch),) = world.ask(world.client(1), e.StartService(2, "a.b", False))
    assert launch.user == ""
    assert launch.environment == STARTER


def test_when_the_launcher_dies_its_services_have_failed() -> None:
    world = world_with("a.b")
    a = world.client(1)
    world.ask(a, e.StartService(2, "a.b", False))
    world.events.clear()
    world.bus.activation.launcher_gone()
    assert world.taken() == [
        (1, failure(2, "Spawn.Failed", "The launcher of a.b ended")),
    ]


def test_one_connection_cannot_wait_for_too_much() -> None:
    world = world_with("a.b", limits={"max_pending_service_starts": 2 * MAX_WAITING})
    a, b = world.client(1), world.client(2)
    for request in range(MAX_WAITING):
        world.ask(a, e.StartService(request, "a.b", False))
    assert world.ask(a, e.StartService(1, "a.b", False))[0][1].error == ERROR + "LimitsExceeded"
    assert world.ask(a, e.ReloadConfig(1))[0][1].error == ERROR + "LimitsExceeded"
    assert world.ask(b, e.StartService(1, "a.b", False)) == []
    world.bus.activation.ended(1, 256, "")
    assert world.ask(a, e.ReloadConfig(1)) == [("reload",)]
    assert a.waiting == 1


# -- services that came later ----------------------------------------------------------------------

UNKNOWN = "The name a.c was not provided by any .service files"


def looking_world() -> World:
    world = world_with("a.b", watched=(File("/s", 5),))
    world.bus.activation.watching.launcher_ready()
    assert world.taken() == [("look", ("/s",))]
    looked(world, 5)
    world.time += 60
    return world


def later(world: World, *names: str, mtime: int = 6) -> Configuration:
    services = tuple(service(name) for name in names)
    return World(services=services, watched=(File("/s", mtime),)).configuration


def looked(world: World, mtime: int, changed: bool = False) -> list[Event]:
    """The launcher looked at /s; what happened because of that."""
    world.events.clear()
    world.bus.activation.watching.looked(e.Looked({"/s": mtime}, changed))
    return world.taken()


def reads(world: World, *names: str, mtime: int = 6) -> list[Event]:
    """A configuration with these services was read; what happened because of that."""
    world.events.clear()
    world.bus.reconfigure(later(world, *names, mtime=mtime), world.bus.generation + 1)
    return world.taken()


def test_an_unknown_name_costs_one_look_while_nothing_changed() -> None:
    world = looking_world()
    a = world.client(1)
    assert world.ask(a, e.StartService(2, "a.c", False)) == [("look", ("/s",))]
    assert looked(world, 5) == [(1, failure(2, "ServiceUnknown", UNKNOWN))]


def test_who_asked_after_the_look_got_the_answer_of_before() -> None:
    """What he wanted may have come since; his answer is that of the next look."""
    world = looking_world()
    a, b = world.client(1), world.client(2)
    world.ask(a, e.StartService(2, "a.c", False))
    assert world.ask(b, e.StartService(3, "a.c", False)) == []
    assert looked(world, 5) == [("look", ("/s",)), (1, failure(2, "ServiceUnknown", UNKNOWN))]
    assert looked(world, 6) == [("reload",)]
    assert ("look", ("/s",)) in reads(world, "a.b")
    assert looked(world, 6) == []


@pytest.mark.parametrize(("mtime", "changed"), [(6, False), (5, True)])
def test_a_changed_service_directory_is_read_again_before_the_answer(
    mtime: int, changed: bool
) -> None:
    world = looking_world()
    a = world.client(1)
    world.ask(a, e.StartService(2, "a.c", False))
    assert looked(world, mtime, changed) == [("reload",)]
    look, log, activatable, launch = reads(world, "a.b", "a.c")
    assert look == ("look", ("/s",))
    assert log == ("log", e.PolicyChanged(1))
    assert activatable == ("log", e.ActivatableChanged(("a.b", "a.c")))
    assert launch[1].name == "a.c"
    world.events.clear()
    world.ask(a, e.RequestName(3, "a.c", 0))
    assert (1, e.Reply(2, 1)) in world.taken()


def test_a_service_that_is_still_unknown_after_reading_again() -> None:
    world = looking_world()
    a = world.client(1)
    world.ask(a, e.StartService(2, "a.c", False))
    looked(world, 6)
    assert reads(world, "a.b")[-1] == (1, failure(2, "ServiceUnknown", UNKNOWN))


def test_a_service_that_came_just_after_reading_was_refused() -> None:
    """Reading again is limited in rate; who asks meanwhile waits for that."""
    world = looking_world()
    a = world.client(1)
    world.ask(a, e.StartService(2, "a.c", False))
    looked(world, 6)
    reads(world, "a.b")
    looked(world, 6)
    world.ask(a, e.StartService(3, "a.c", False))
    assert looked(world, 7) == []
    deadline = world.bus.deadline()
    assert deadline == world.time + READ_SECONDS
    world.time = deadline
    world.bus.tick()
    assert world.taken() == [("reload",)]
    assert reads(world, "a.b", "a.c", mtime=7)[-1][0] == "launch"


def test_a_broken_configuration_is_read_once_for_each_change() -> None:
    world = looking_world()
    a = world.client(1)
    world.ask(a, e.StartService(2, "a.c", False))
    looked(world, 6)
    world.events.clear()
    world.bus.reconfigure(None)
    assert world.taken() == [(1, failure(2, "ServiceUnknown", UNKNOWN))]
    world.time += 60
    world.ask(a, e.StartService(3, "a.c", False))
    assert looked(world, 6) == [(1, failure(3, "ServiceUnknown", UNKNOWN))]


# -- files that change -----------------------------------------------------------------------------


def test_many_changes_are_read_once_when_they_are_over() -> None:
    world = looking_world()
    for _ in range(5):
        world.bus.activation.watching.changed()
        world.time += QUIET_SECONDS / 2
        world.bus.tick()
    assert world.taken() == []
    world.time += QUIET_SECONDS / 2
    world.bus.tick()
    assert world.taken() == [("reload",)]
    assert world.bus.deadline() is None


def test_changes_that_never_end_are_read_all_the_same() -> None:
    world = looking_world()
    begun = world.time
    while not world.taken():
        world.bus.activation.watching.changed()
        world.time += QUIET_SECONDS / 2
        world.bus.tick()
    assert world.time - begun < CHANGING_SECONDS + QUIET_SECONDS


def test_a_change_while_the_configuration_was_being_read_was_missed() -> None:
    world = looking_world()
    world.bus.reload()
    world.bus.activation.watching.changed()
    world.time += 1
    world.bus.tick()
    assert world.taken() == [("reload",)]
    assert ("reload",) in reads(world, "a.b")


def test_what_changed_before_the_launcher_watched_is_read() -> None:
    world = looking_world()
    world.bus.activation.launcher_gone()
    world.bus.activation.watching.launcher_ready()
    looked(world, 6)
    world.time += 1
    world.bus.tick()
    assert world.taken() == [("reload",)]


def test_a_directory_that_came_before_the_first_look_was_never_read() -> None:
    """It was taken for the one for this session's services, which the bus itself makes at its start."""
    world = world_with("a.b", watched=(File("/s", 0),))
    world.bus.activation.watching.launcher_ready()
    looked(world, 5)
    world.time += 1
    world.bus.tick()
    assert world.taken() == [("reload",)]


def test_a_busy_directory_had_the_configuration_read_again_and_again() -> None:
    """What changes in it is not read; so each reading found it changed since the last, for ever."""
    world = looking_world()
    a = world.client(1)
    world.ask(a, e.StartService(2, "a.c", False))
    assert looked(world, 6) == [("reload",)]
    reads(world, "a.b", mtime=6)
    assert looked(world, 7) == []
    assert world.bus.deadline() is None
    world.time += 60
    world.ask(a, e.StartService(3, "a.c", False))
    assert looked(world, 8) == [("reload",)]  # where nobody tells of changes it may be a service
    assert reads(world, "a.b", mtime=8)[-1] == (1, failure(3, "ServiceUnknown", UNKNOWN))


def test_changes_put_off_what_somebody_waited_for() -> None:
    world = looking_world()
    a = world.client(1)
    world.ask(a, e.StartService(2, "a.c", False))
    looked(world, 6)
    reads(world, "a.b")
    looked(world, 6)
    world.ask(a, e.StartService(3, "a.c", False))
    looked(world, 7)
    deadline = world.bus.deadline()
    world.time += READ_SECONDS - 0.01
    world.bus.activation.watching.changed()
    assert world.bus.deadline() == deadline


def test_who_asked_for_an_unknown_name_waited_for_a_launcher_that_hung() -> None:
    """With all that it sent since. It may hang at a directory of a server that is gone."""
    world = looking_world()
    a, b = world.client(1), world.client(2)
    world.ask(a, e.StartService(2, "a.c", False))
    world.ask(b, e.StartService(3, "a.c", False))
    world.events.clear()
    for answered in (failure(2, "ServiceUnknown", UNKNOWN), failure(3, "ServiceUnknown", UNKNOWN)):
        deadline = world.bus.deadline()
        assert deadline is not None
        world.time = deadline
        world.bus.tick()
        assert world.taken()[-1][1] == answered
        world.events.clear()
    assert world.bus.deadline() is None
    world.ask(a, e.StartService(4, "a.b", False))
    assert looked(world, 5) == []


def test_who_waited_for_the_next_look_waited_for_ever_if_the_one_before_him_had_left() -> None:
    world = looking_world()
    a, b = world.client(1), world.client(2)
    world.ask(a, e.StartService(2, "a.c", False))
    world.ask(b, e.StartService(3, "a.c", False))
    world.bus.gone(1)
    for _ in range(2):
        deadline = world.bus.deadline()
        assert deadline is not None
        world.time = deadline
        world.events.clear()
        world.bus.tick()
    assert world.taken() == [(2, failure(3, "ServiceUnknown", UNKNOWN))]


def test_who_asked_once_the_one_before_him_had_left_got_the_answer_of_before() -> None:
    world = looking_world()
    a, b = world.client(1), world.client(2)
    world.ask(a, e.StartService(2, "a.c", False))
    world.bus.gone(1)
    assert world.ask(b, e.StartService(3, "a.c", False)) == []
    assert looked(world, 5) == [("look", ("/s",))]
    assert looked(world, 6) == [("reload",)]


def test_who_asked_after_the_launcher_had_hung_got_the_answer_of_before() -> None:
    world = looking_world()
    a, b = world.client(1), world.client(2)
    world.ask(a, e.StartService(2, "a.c", False))
    deadline = world.bus.deadline()
    assert deadline is not None
    world.time = deadline
    world.bus.tick()
    assert world.ask(b, e.StartService(3, "a.c", False)) == [("look", ("/s",))]
    assert looked(world, 5) == []
    assert looked(world, 6) == [("reload",)]
