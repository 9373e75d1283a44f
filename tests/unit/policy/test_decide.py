"""Verdicts, attribute by attribute, and the words in which they are told."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest

from kbusd.policy import configuration, decide
from kbusd.policy.decide import ClientPolicy, Message, Verdict

CALL, RETURN, ERROR, SIGNAL = 1, 2, 3, 4
DRIVER = ("org.freedesktop.DBus",)


class Who(NamedTuple):
    uid: int = 1000
    gid: int = 1000
    groups: tuple[int, ...] = ()
    anonymous: bool = False


USER = Who()


class Policies:
    """Makes the policy of one client out of XML."""

    def __init__(self, directory: Path) -> None:
        self.file = directory / "bus.conf"

    def of(
        self, body: str, who: Who = USER, at_console: bool = False, owner: int = 1
    ) -> ClientPolicy:
        self.file.write_text(f"<busconfig><listen>unix:path=/x</listen>\n{body}\n</busconfig>")
        loaded = configuration.load(str(self.file), environment={})
        return ClientPolicy(loaded.policy, who, at_console=at_console, owner=owner)

    def default(self, *rules: str) -> ClientPolicy:
        return self.of("".join(f'<policy context="default">\n{rule}</policy>' for rule in rules))


@pytest.fixture
def policies(tmp_path: Path) -> Policies:
    return Policies(tmp_path)


def call(**fields: object) -> Message:
    whole: dict[str, object] = {
        "type": CALL,
        "path": "/p",
        "interface": "a.I",
        "member": "M",
        "destination": "a.b",
    }
    return Message(**{**whole, **fields})  # type: ignore[arg-type]


def signal(**fields: object) -> Message:
    return call(**{"type": SIGNAL, "destination": None, **fields})


def reply(**fields: object) -> Message:
    return Message(**{"type": RETURN, "destination": ":1.5", **fields})  # type: ignore[arg-type]


def failure(**fields: object) -> Message:
    return reply(**{"type": ERROR, "error_name": "a.E", **fields})


# -- one rule against one message ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("attributes", "message", "names", "matches"),
    [
        ('type="*"', call(), ("a.b",), True),
        ('type="method_call"', call(), ("a.b",), True),
        ('type="method_call"', signal(), ("a.b",), False),
        ('type="signal"', signal(), ("a.b",), True),
        ('type="method_return"', reply(), (":1.5",), True),
        ('type="error"', reply(), (":1.5",), False),
        ('type="error"', failure(), (":1.5",), True),
        ('path="/p"', call(), ("a.b",), True),
        ('path="/q"', call(), ("a.b",), False),
        ('path="/q"', reply(), (":1.5",), True),
        ('path="*"', call(), ("a.b",), True),
        ('interface="a.I"', call(), ("a.b",), True),
        ('interface="a.J"', call(), ("a.b",), False),
        ('interface="*"', call(interface=None), ("a.b",), True),
        ('interface="a.I" {}_member="M"', call(), ("a.b",), True),
        ('interface="a.I" {}_member="N"', call(), ("a.b",), False),
        ('interface="a.I" {}_member="*"', call(), ("a.b",), True),
        ('path="/p" {}_member="M"', call(interface=None), ("a.b",), True),
        ('path="/p" {}_member="N"', call(interface=None), ("a.b",), False),
        ('error="a.E"', failure(), (":1.5",), True),
        ('error="a.F"', failure(), (":1.5",), False),
        ('error="a.F"', call(), ("a.b",), True),
        ('{peer}="a.b"', call(), ("a.b",), True),
        ('{peer}="a.b"', call(), (":1.5", "x.y", "a.b"), True),
        ('{peer}="a.b"', call(), ("a.b.c",), False),
        ('{peer}=":1.5"', call(), (":1.5", "a.b"), True),
        ('{peer}="a.b"', signal(), ("a.b",), True),
        ('{peer}="*"', signal(), (), True),
        ('type="method_call" min_fds="1"', call(fds=0), ("a.b",), False),
        ('type="method_call" min_fds="1"', call(fds=1), ("a.b",), True),
        ('type="method_call" max_fds="1"', call(fds=1), ("a.b",), True),
        ('type="method_call" max_fds="1"', call(fds=2), ("a.b",), False),
        ('type="method_call" min_fds="1" max_fds="2"', call(fds=3), ("a.b",), False),
    ],
)
def test_what_a_rule_matches(
    policies: Policies, attributes: str, message: Message, names: tuple[str, ...], matches: bool
) -> None:
    for side, peer in (("send", "destination"), ("receive", "sender")):
        rule = f"{side}_{attributes}".replace("{}", side).replace("{peer}", peer)
        allow = policies.default(f"<allow {rule}/>")
        deny = policies.default(f'<allow {side}_requested_reply="false"/>', f"<deny {rule}/>")
        # Allow rules are about requested replies, deny rules about the others.
        for policy, requested, allowed in ((allow, True, matches), (deny, False, not matches)):
            ask = policy.can_send if side == "send" else policy.can_receive
            assert ask(message, names, requested).allowed is allowed


@pytest.mark.parametrize("side", ["send", "receive"])
def test_a_call_without_interface_passes_no_interface_rule(policies: Policies, side: str) -> None:
    """An allow that names an interface must not let it through, a deny must not let it out."""
    message = call(interface=None)
    allow = policies.default(f'<allow {side}_interface="a.I"/>')
    deny = policies.default(f'<allow {side}_type="*"/>', f'<deny {side}_interface="a.I"/>')
    for policy in (allow, deny):
        ask = policy.can_send if side == "send" else policy.can_receive
        assert not ask(message, ("a.b",), False).allowed


@pytest.mark.parametrize(
    ("names", "matches"),
    [
        (("a.b",), True),
        (("a.b.c",), True),
        ((":1.5", "a.b.c.d"), True),
        (("a.bc",), False),
        (("a",), False),
        ((":1.5",), False),
    ],
)
def test_destination_prefix(policies: Policies, names: tuple[str, ...], matches: bool) -> None:
    allow = policies.default('<allow send_destination_prefix="a.b"/>')
    assert allow.can_send(call(destination=names[-1]), names, False).allowed is matches


@pytest.mark.parametrize(
    ("value", "message", "matches"),
    [
        ("true", signal(), True),
        ("true", signal(destination=":1.5"), False),
        ("true", call(), False),
        ("false", signal(), False),
        ("false", signal(destination=":1.5"), True),
        ("false", call(), True),
    ],
)
def test_broadcast(policies: Policies, value: str, message: Message, matches: bool) -> None:
    allow = policies.default(f'<allow send_broadcast="{value}"/>')
    assert allow.can_send(message, (":1.5",), False).allowed is matches


@pytest.mark.parametrize("side", ["send", "receive"])
@pytest.mark.parametrize(
    ("rule", "requested", "unrequested"),
    [
        ('<allow {}_type="error"/>', True, False),
        ('<allow {}_type="error" {}_requested_reply="true"/>', True, False),
        ('<allow {}_type="error" {}_requested_reply="false"/>', True, True),
        ('<allow {}_type="error" eavesdrop="true"/>', True, True),
        ('ALL<deny {}_type="error"/>', True, False),
        ('ALL<deny {}_type="error" {}_requested_reply="false"/>', True, False),
        ('ALL<deny {}_type="error" {}_requested_reply="true"/>', False, False),
    ],
)
def test_requested_replies(
    policies: Policies, side: str, rule: str, requested: bool, unrequested: bool
) -> None:
    everything = f'<allow {side}_requested_reply="false" {side}_type="error"/>'
    policy = policies.default(rule.replace("{}", side).replace("ALL", everything))
    ask = policy.can_send if side == "send" else policy.can_receive
    assert ask(failure(), (":1.5",), True).allowed is requested
    assert ask(failure(), (":1.5",), False).allowed is unrequested


@pytest.mark.parametrize("side", ["send", "receive"])
def test_requested_reply_is_about_replies_only(policies: Policies, side: str) -> None:
    policy = policies.default(f'<allow {side}_requested_reply="true"/>')
    ask = policy.can_send if side == "send" else policy.can_receive
    assert ask(call(), ("a.b",), False).allowed


@pytest.mark.parametrize(
    ("rule", "mine", "others"),
    [
        ('<allow receive_type="*"/>', True, False),
        ('<allow receive_type="*" eavesdrop="false"/>', True, False),
        ('<allow receive_type="*" eavesdrop="true"/>', True, True),
        ('<allow eavesdrop="true"/>', True, True),
        ('ALL<deny receive_type="signal"/>', False, False),
        ('ALL<deny receive_type="signal" eavesdrop="true"/>', True, False),
    ],
)
def test_eavesdropping(policies: Policies, rule: str, mine: bool, others: bool) -> None:
    policy = policies.default(rule.replace("ALL", '<allow eavesdrop="true"/>'))
    message = signal(destination=":1.9")
    assert policy.can_receive(message, (":1.5",), False).allowed is mine
    assert policy.can_receive(message, (":1.5",), False, eavesdropping=True).allowed is others


def test_the_last_match_decides(policies: Policies) -> None:
    rules = ['<deny send_destination="a.b"/>', '<allow send_type="method_call"/>']
    assert policies.default(*rules).can_send(call(), ("a.b",), False).allowed
    assert not policies.default(*rules[::-1]).can_send(call(), ("a.b",), False).allowed


def test_of_several_names_the_last_rule_counts(policies: Policies) -> None:
    """Denied under one name is denied under all, if that rule is the later one."""
    rules = ['<allow send_destination="a.b"/>', '<deny send_destination="c.d"/>']
    for names in (("a.b", "c.d"), ("c.d", "a.b")):
        assert not policies.default(*rules).can_send(call(), names, False).allowed
        assert policies.default(*rules[::-1]).can_send(call(), names, False).allowed


def test_without_a_rule_nothing_is_allowed(policies: Policies) -> None:
    policy = policies.of("")
    assert policy.can_send(call(), ("a.b",), False) == Verdict(False)
    assert policy.can_receive(call(), ("a.b",), False) == Verdict(False)
    assert policy.can_own("a.b") == Verdict(False)


def test_a_blanket_rule_cancels_what_was_before_it_as_in_dbus_daemon(policies: Policies) -> None:
    policy = policies.default('<allow send_type="*"/>', '<allow send_broadcast="true"/>')
    assert policy.can_send(signal(), (), False).allowed
    assert not policy.can_send(call(), ("a.b",), False).allowed


# -- owning -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "name", "allowed"),
    [
        (['<allow own="a.b"/>'], "a.b", True),
        (['<allow own="a.b"/>'], "a.b.c", False),
        (['<allow own="*"/>'], "x.y", True),
        (['<allow own_prefix="a.b"/>'], "a.b", True),
        (['<allow own_prefix="a.b"/>'], "a.b.c.d", True),
        (['<allow own_prefix="a.b"/>'], "a.bc", False),
        (['<allow own="*"/>', '<deny own="a.b"/>'], "a.b", False),
        (['<allow own="*"/>', '<deny own="a.b"/>'], "a.c", True),
        (['<deny own="a.b"/>', '<allow own="*"/>'], "a.b", True),
        (['<deny own_prefix="a"/>', '<allow own="a.b"/>'], "a.b", True),
        (['<allow own="a.b"/>', '<deny own_prefix="a"/>'], "a.b", False),
    ],
)
def test_own(policies: Policies, rules: list[str], name: str, allowed: bool) -> None:
    assert policies.default(*rules).can_own(name).allowed is allowed


# -- contexts ---------------------------------------------------------------------------------

CONTEXTS = ('context="default"', 'group="2000"', 'user="1000"', "console", 'context="mandatory"')


@pytest.mark.parametrize("at_console", [True, False])
@pytest.mark.parametrize("later", range(len(CONTEXTS)))
def test_contexts_apply_in_order(policies: Policies, later: int, at_console: bool) -> None:
    """Whatever the order in the file, `later` overrides all contexts before it."""
    console = f'at_console="{"true" if at_console else "false"}"'
    bodies = [
        f"<policy {context}><{'allow' if place == later else 'deny'} own='a.b'/></policy>"
        for place, context in enumerate(CONTEXTS[: later + 1])
    ]
    for order in (bodies, bodies[::-1]):
        body = "".join(order).replace("console>", f"{console}>")
        assert policies.of(body, Who(groups=(2000,)), at_console).can_own("a.b").allowed


@pytest.mark.parametrize(
    ("policy", "applies"),
    [
        ('user="1000"', True),
        ('user="1001"', False),
        ('group="1000"', True),
        ('group="2000"', True),
        ('group="3000"', False),
        ('at_console="true"', False),
        ('at_console="false"', True),
    ],
)
def test_only_what_concerns_the_client_applies(
    policies: Policies, policy: str, applies: bool
) -> None:
    body = f'<policy {policy}><allow own="a.b"/></policy>'
    assert policies.of(body, Who(groups=(2000,))).can_own("a.b").allowed is applies


# -- connecting -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "uid", "allowed"),
    [
        ("", 1000, True),
        ("", 1001, False),
        ("", 0, False),
        ('<policy context="default"><allow user="*"/></policy>', 1001, True),
        ('<policy context="default"><deny user="1000"/></policy>', 1000, False),
        ('<policy context="default"><allow group="2000"/></policy>', 1001, True),
        ('<policy context="default"><allow group="1001"/></policy>', 1001, True),
        ('<policy context="default"><allow group="3000"/></policy>', 1001, False),
        (
            '<policy context="mandatory"><deny user="1001"/></policy>\n'
            + '<policy context="default"><allow user="*"/></policy>',
            1001,
            False,
        ),
        (
            '<policy context="default"><allow user="*"/><deny group="*"/><allow user="0"/></policy>',
            0,
            True,
        ),
        ('<policy at_console="false"><allow user="*"/></policy>', 1001, False),
    ],
)
def test_connect(policies: Policies, body: str, uid: int, allowed: bool) -> None:
    who = Who(uid=uid, gid=uid, groups=(2000,))
    assert policies.of(body, who, owner=1000).can_connect().allowed is allowed


def test_an_anonymous_client_has_what_all_have_less_what_it_is_denied(policies: Policies) -> None:
    body = """<policy context="default"><allow own="all.a"/><allow own="all.b"/></policy>
      <policy group="2000"><deny own="all.b"/><allow own="groups"/></policy>
      <policy user="1000"><allow own="users"/></policy>
      <policy at_console="false"><allow own="console"/></policy>
      <policy context="mandatory"><allow own="must"/></policy>"""
    names = "all.a", "all.b", "groups", "users", "console", "must"
    who = Who(groups=(2000,))
    known = policies.of(body, who)
    hidden = known.of(who._replace(anonymous=True))
    assert [n for n in names if known.can_own(n).allowed] == [n for n in names if n != "all.b"]
    assert [n for n in names if hidden.can_own(n).allowed] == ["all.a", "must"]
    assert hidden.can_connect().allowed


# -- what callers may skip or cache -----------------------------------------------------------


def test_the_session_bus_has_nothing_to_decide() -> None:
    policy = ClientPolicy(configuration.load(configuration.SESSION_FILE).policy, Who())
    assert policy.allows_everything_to_own
    assert policy.allows_everything_to_send
    assert policy.allows_everything_to_receive


@pytest.mark.parametrize(
    ("rules", "everything"),
    [
        ('<allow send_type="*" eavesdrop="true"/>', True),
        ('<allow send_type="*" eavesdrop="true"/><allow send_type="signal"/>', True),
        ('<deny send_type="signal"/><allow send_type="*" eavesdrop="true"/>', True),
        ('<allow send_type="*"/>', False),
        ('<allow send_type="*" eavesdrop="true"/><deny send_path="/x"/>', False),
        ('<allow send_type="*" eavesdrop="true" max_fds="1"/>', False),
        ('<allow send_type="*" eavesdrop="true" log="true"/>', False),
        ('<allow send_broadcast="false" eavesdrop="true"/>', False),
        ('<allow eavesdrop="true"/>', False),
    ],
)
def test_allows_everything_to_send(policies: Policies, rules: str, everything: bool) -> None:
    assert policies.default(rules).allows_everything_to_send is everything


@pytest.mark.parametrize("field", ["path", "interface", "error", "fds", "broadcast"])
def test_depends_names_what_a_cache_must_key_on(policies: Policies, field: str) -> None:
    attribute = {"fds": 'send_type="*" max_fds="0"', "broadcast": 'send_broadcast="true"'}.get(
        field, f'send_{field}="x"'
    )
    policy = policies.default(f"<deny {attribute}/>")
    assert {name: value for name, value in policy.send_depends._asdict().items() if value} == {
        field: True
    }
    assert not any(policy.receive_depends)


# -- words ------------------------------------------------------------------------------------

INFOS = {
    "sender": ":1.7",
    "sender_info": decide.login_info(1000, 42, "prog", "some_t"),
    "receiver_info": decide.login_info(0, 1, "init"),
}


def test_a_refusal_names_the_rule(policies: Policies) -> None:
    policy = policies.default(
        '<deny send_type="method_call"/>', '<deny send_interface="a.I"\n send_path="/p"/>'
    )
    message = call()
    verdict = policy.can_send(message, ("a.b",), False)
    assert decide.explain(verdict) == f"denied by rule {policies.file}:4"
    assert decide.complaint(verdict, message, "send", requested_reply=False, **INFOS) == (
        'Rejected send message, 2 matched rules; type="method_call", sender=":1.7" '
        '(uid=1000 pid=42 comm="prog" label="some_t") interface="a.I" member="M" '
        'error name="(unset)" requested_reply="0" destination="a.b" '
        f'(uid=0 pid=1 comm="init") (denied by rule {policies.file}:4)'
    )


def test_a_refusal_for_want_of_a_rule_says_so(policies: Policies) -> None:
    message = failure(destination=None)
    verdict = policies.of("").can_receive(message, DRIVER, True)
    text = decide.complaint(verdict, message, "receive", requested_reply=True, **INFOS)
    assert text.startswith('Rejected receive message, 0 matched rules; type="error"')
    assert 'interface="(unset)" member="(unset)" error name="a.E" requested_reply="1"' in text
    assert 'destination="org.freedesktop.DBus"' in text
    assert text.endswith("(no rule allows it)")


def test_an_allowed_message_may_be_logged(policies: Policies) -> None:
    policy = policies.default('<allow send_type="*"/><allow send_path="/p" log="true"/>')
    verdict = policy.can_send(call(), ("a.b",), False)
    assert verdict.allowed and verdict.log
    text = decide.complaint(verdict, call(), "send", requested_reply=False, **INFOS)
    assert text.startswith("Would reject message, 2 matched rules; ")
    assert text.endswith(f"(allowed by rule {policies.file}:3)")
    assert not policy.can_send(call(path="/q"), ("a.b",), False).log


def test_owning_is_refused_in_words(policies: Policies) -> None:
    policy = policies.default('<deny own="*"/>')
    assert decide.own_rejection(policy.can_own("a.b"), ":1.7", "a.b") == (
        'Connection ":1.7" is not allowed to own the service "a.b" due to security policies in '
        f"the configuration file (denied by rule {policies.file}:3)"
    )


def test_the_installed_system_bus_decides_as_intended() -> None:
    policy = configuration.load(configuration.SYSTEM_FILE).policy
    user = ClientPolicy(policy, Who())
    root = ClientPolicy(policy, Who(0, 0))
    stats = call(destination="org.freedesktop.DBus", interface="org.freedesktop.DBus.Debug.Stats")
    assert root.can_send(stats, DRIVER, False).allowed
    assert not user.can_send(stats, DRIVER, False).allowed
    assert not user.can_send(call(), ("a.b",), False).allowed
    assert user.can_send(signal(), ("a.b",), False).allowed
    assert user.can_send(reply(), (":1.5",), True).allowed
    assert not user.can_send(reply(), (":1.5",), False).allowed
    assert not user.can_own("a.b").allowed
    assert user.can_connect().allowed
    assert "/usr/share/dbus-1/system.conf:" in decide.explain(user.can_own("a.b"))
