"""What a configuration file means, what is refused, and that refusals name file, line and reason."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kbusd.policy import configuration
from kbusd.policy.configuration import Configuration, ConfigurationError
from kbusd.policy.rules import MAX_FDS, Rule

LISTEN = "<listen>unix:tmpdir=/tmp</listen>"
DATA = Path("/usr/lib/dbus-1.0/debug-build/libexec/installed-tests/dbus/data")


def load(directory: Path, body: str, **options: object) -> Configuration:
    path = directory / "bus.conf"
    path.write_text(f"<busconfig>{LISTEN}\n{body}\n</busconfig>")
    return configuration.load(str(path), environment={}, **options)  # type: ignore[arg-type]


def rules(directory: Path, *elements: str) -> tuple[Rule, ...]:
    body = f'<policy context="default">{"".join(elements)}</policy>'
    return load(directory, body).policy.default


# -- settings ---------------------------------------------------------------------------------


def test_every_setting_is_taken_up(tmp_path: Path) -> None:
    found = load(
        tmp_path,
        """
        <type>system</type><type>custom</type>
        <user>messagebus</user><fork/><keep_umask/><syslog/><allow_anonymous/>
        <pidfile>/run/bus.pid</pidfile>
        <listen>unix:path=/run/a;unix:abstract=b</listen>
        <auth>EXTERNAL</auth><auth>ANONYMOUS</auth><auth>EXTERNAL</auth>
        <servicedir>/srv/one</servicedir><servicedir>two</servicedir><servicedir>/srv/one</servicedir>
        <servicehelper>helper</servicehelper>
        <limit name="max_message_size">4096</limit>
        <selinux>
          <associate own="a.b" context="old_t"/><associate own="a.b" context="new_t"/>
        </selinux>
        <apparmor mode="required"/>
        """,
    )
    assert (found.type, found.user, found.pidfile) == ("custom", "messagebus", "/run/bus.pid")
    assert found.fork and found.keep_umask and found.syslog and found.allow_anonymous
    assert found.listen == ("unix:tmpdir=/tmp", "unix:path=/run/a;unix:abstract=b")
    assert found.auth == ("EXTERNAL", "ANONYMOUS")
    assert found.service_dirs == ("/srv/one", str(tmp_path / "two"))
    assert found.service_helper == str(tmp_path / "helper")
    assert found.limits == configuration.DEFAULT_LIMITS | {"max_message_size": 4096}
    assert found.selinux == {"a.b": "new_t"}
    assert found.apparmor == "required"
    (file,) = found.files
    assert file.path == str(tmp_path / "bus.conf")
    assert file.mtime == os.stat(file.path).st_mtime_ns


def test_what_is_not_said_is_off(tmp_path: Path) -> None:
    found = load(tmp_path, "")
    assert not (found.fork or found.keep_umask or found.syslog or found.allow_anonymous)
    assert (found.type, found.user, found.pidfile, found.auth) == ("", "", "", ())
    assert found.limits["auth_timeout"] == 30_000
    assert found.limits["reply_timeout"] == -1


@pytest.mark.parametrize(
    ("text", "value"),
    [("12", 12), (" 12\n", 12), ("0x10", 16), ("010", 8), ("0", 0), ("12 bees", 12)],
)
def test_numbers_are_read_as_dbus_daemon_does(tmp_path: Path, text: str, value: int) -> None:
    found = load(tmp_path, f'<limit name="max_incoming_bytes">{text}</limit>')
    assert found.limits["max_incoming_bytes"] == value
    assert bool(found.warnings) == ("bees" in text)


def test_predefined_and_character_entities_are_text(tmp_path: Path) -> None:
    found = load(tmp_path, "<user>a&lt;b&#99;</user>")
    assert found.user == "a<bc"


def test_a_comment_does_not_split_text(tmp_path: Path) -> None:
    assert load(tmp_path, "<user>mess<!-- x -->agebus</user>").user == "messagebus"


# -- rules ------------------------------------------------------------------------------------


def test_wildcards_match_anything(tmp_path: Path) -> None:
    (send, receive, own, user, group) = rules(
        tmp_path,
        '<allow send_destination="*" send_interface="*" send_member="*" send_path="*" '
        'send_type="*"/>',
        '<deny receive_sender="*" receive_type="*"/>',
        '<allow own="*"/>',
        '<allow user="*"/>',
        '<deny group="*"/>',
    )
    for rule in (send, receive):
        assert (rule.type, rule.path, rule.interface, rule.member, rule.error, rule.name) == (
            (0,) + (None,) * 5
        )
    assert own.name is None and not own.prefix
    assert user.id is None and group.id is None


def test_a_rule_knows_its_place(tmp_path: Path) -> None:
    (_, second) = rules(tmp_path, '<allow own="*"/>', '\n\n<deny\n own="a.b"/>')
    assert second.place == f"{tmp_path / 'bus.conf'}:4"


@pytest.mark.parametrize(
    ("attributes", "field", "value"),
    [
        ('send_type="error"', "type", 3),
        ('send_path="/a"', "path", "/a"),
        ('send_interface="a.b"', "interface", "a.b"),
        ('send_interface="a.b" send_member="C"', "member", "C"),
        ('send_path="/" send_member="C"', "member", "C"),
        ('send_error="a.E"', "error", "a.E"),
        ('send_destination="a.b"', "name", "a.b"),
        ('send_destination_prefix="a.b"', "prefix", True),
        ('send_broadcast="true"', "broadcast", True),
        ('send_broadcast="false" send_destination="a.b"', "broadcast", False),
        ('send_broadcast="true" send_destination="*"', "broadcast", True),
        ('send_type="signal" eavesdrop="true"', "eavesdrop", True),
        ('eavesdrop="true"', "eavesdrop", True),
        ('send_type="signal" max_fds="0"', "max_fds", 0),
        ('receive_type="signal" min_fds="1"', "min_fds", 1),
        ('receive_type="signal"', "max_fds", MAX_FDS),
        ('send_type="signal" log="true"', "log", True),
        ('receive_type="signal" log="true"', "log", False),
        ('receive_sender="a.b"', "name", "a.b"),
        ('own="a.b" log="true"', "name", "a.b"),
        ('own_prefix="a.b"', "prefix", True),
        ('user="root"', "id", 0),
        ('user="4242"', "id", 4242),
        ('group="root"', "id", 0),
    ],
)
def test_attributes(tmp_path: Path, attributes: str, field: str, value: object) -> None:
    for element in ("allow", "deny"):
        (rule,) = rules(tmp_path, f"<{element} {attributes}/>")
        assert rule.allow is (element == "allow")
        assert getattr(rule, field) == value


def test_requested_reply_defaults_differ_for_allow_and_deny(tmp_path: Path) -> None:
    found = rules(
        tmp_path,
        '<allow send_type="error"/>',
        '<deny send_type="error"/>',
        '<allow send_requested_reply="false"/>',
        '<deny receive_requested_reply="true"/>',
    )
    assert [rule.requested_reply for rule in found] == [True, False, False, True]


def test_policies_go_where_they_say(tmp_path: Path) -> None:
    policy = load(
        tmp_path,
        """
        <policy context="mandatory"><deny own="m.m"/></policy>
        <policy user="root"><allow own="u.1"/></policy>
        <policy user="0"><allow own="u.2"/></policy>
        <policy group="root"><allow own="g.g"/></policy>
        <policy at_console="true"><allow own="c.t"/></policy>
        <policy at_console="false"><allow own="c.f"/></policy>
        <policy context="default"><allow own="d.1"/></policy>
        <policy context="default"><allow own="d.2"/></policy>
        """,
    ).policy

    def names(found: tuple[Rule, ...]) -> list[str | None]:
        return [rule.name for rule in found]

    assert names(policy.default) == ["d.1", "d.2"]
    assert names(policy.mandatory) == ["m.m"]
    assert {uid: names(found) for uid, found in policy.users.items()} == {0: ["u.1", "u.2"]}
    assert {gid: names(found) for gid, found in policy.groups.items()} == {0: ["g.g"]}
    assert names(policy.at_console) == ["c.t"]
    assert names(policy.not_at_console) == ["c.f"]


def test_rules_about_unknown_people_are_dropped_with_a_warning(tmp_path: Path) -> None:
    found = load(
        tmp_path,
        '<policy user="no-such-user"><allow own="a.b"/><allow user="root"/></policy>\n'
        '<policy group="no-such-group"><allow own="a.b"/></policy>\n'
        '<policy context="default"><deny user="no-such-user"/><allow own="x.y"/></policy>',
    )
    assert [rule.name for rule in found.policy.default] == ["x.y"]
    assert found.policy.users == {} and found.policy.groups == {}
    file = tmp_path / "bus.conf"
    assert [warning.split(" ")[0] for warning in found.warnings] == [
        f"{file}:2:",
        f"{file}:3:",
        f"{file}:4:",
    ]


# -- refusals ---------------------------------------------------------------------------------


def in_policy(element: str) -> str:
    return f'<policy context="default">\n{element}</policy>'


@pytest.mark.parametrize(
    ("body", "line", "reason"),
    [
        ("<bees/>", 2, "<bees> is not allowed inside <busconfig>"),
        ("\n<fork>\n<syslog/></fork>", 4, "<syslog> is not allowed inside <fork>"),
        ("<fork> x</fork>", 2, "<fork> takes no text"),
        ('<fork now="yes"/>', 2, 'attribute "now" is not known on <fork>'),
        ('<listen a="b">unix:path=/a</listen>', 2, 'attribute "a" is not known on <listen>'),
        ("<user/>", 2, "<user> is empty"),
        ("<type></type>", 2, "<type> is empty"),
        ("\nstray", 3, "<busconfig> takes no text"),
        ("<listen>nonsense</listen>", 2, "not a D-Bus address"),
        ("<listen>unix:path= x</listen>", 2, "not a D-Bus address"),
        ("<auth>KERBEROS</auth>", 2, "not an authentication mechanism"),
        ("<auth> EXTERNAL</auth>", 2, "not an authentication mechanism"),
        ("<limit>5</limit>", 2, "<limit> needs a name="),
        ('<limit name="max_bees">5</limit>', 2, 'no limit called "max_bees"'),
        ('<limit name="max_bees"/>', 2, 'no limit called "max_bees"'),
        ('<limit name="auth_timeout"/>', 2, "<limit> is empty"),
        ('<limit name="auth_timeout">soon</limit>', 2, '"soon" is not a number'),
        ('<limit name="auth_timeout">-1</limit>', 2, "negative"),
        ('<limit name="auth_timeout">2147483648</limit>', 2, "too large"),
        ('<limit name="max_message_size">9223372036854775808</limit>', 2, "too large"),
        ('<include ignore_missing="maybe">x</include>', 2, 'must be "yes" or "no"'),
        ('<include if_selinux_enabled="1">x</include>', 2, 'must be "yes" or "no"'),
        ("\n<include>missing.conf</include>", 3, "No such file or directory"),
        ("<include>/</include>", 2, "not a regular file"),
        ("<include>bus.conf</include>", 2, "includes itself"),
        ("<include>./bus.conf</include>", 2, "includes itself"),
        ('<include selinux_root_relative="yes">x</include>', 2, "SELinux is not enabled"),
        ("<includedir>bus.conf</includedir>", 2, "Not a directory"),
        ("<policy/>", 2, "exactly one of"),
        ('<policy user="root" context="default"/>', 2, "exactly one of"),
        ('<policy hat="top"/>', 2, 'attribute "hat" is not known on <policy>'),
        ('<policy context="sometimes"/>', 2, "must be default or mandatory"),
        ('<policy at_console="maybe"/>', 2, "must be true or false"),
        ('<policy context="default">\nx</policy>', 3, "<policy> takes no text"),
        (in_policy("<permit/>"), 3, "<permit> is not allowed inside <policy>"),
        (in_policy("<allow/>"), 3, "says nothing"),
        (in_policy('<allow log="true"/>'), 3, "says nothing"),
        (in_policy('<allow max_fds="1"/>'), 3, "says nothing"),
        (in_policy('<allow species="stoat"/>'), 3, 'attribute "species" is not known on <allow>'),
        (in_policy('<deny send_member="M"/>'), 3, "send_member on <deny> needs send_interface"),
        (in_policy('<deny receive_member="M"/>'), 3, "receive_member on <deny> needs"),
        (in_policy('<allow own="a.b" user="*"/>'), 3, "each stand alone"),
        (in_policy('<allow own="a.b" own_prefix="a"/>'), 3, "each stand alone"),
        (in_policy('<allow own="a.b" eavesdrop="true"/>'), 3, "each stand alone"),
        (in_policy('<allow own="a.b" max_fds="0"/>'), 3, "each stand alone"),
        (in_policy('<allow user="*" send_type="signal"/>'), 3, "each stand alone"),
        (in_policy('<allow send_type="*" receive_type="*"/>'), 3, "mixes send_ and receive_"),
        (in_policy('<allow send_error="E" send_interface="I"/>'), 3, "cannot stand beside"),
        (in_policy('<allow receive_error="E" receive_interface="I"/>'), 3, "cannot stand beside"),
        (
            in_policy('<allow send_destination="a" send_destination_prefix="a"/>'),
            3,
            "exclude each other",
        ),
        (
            in_policy('<allow send_destination="a.b" send_broadcast="true"/>'),
            3,
            "can match nothing",
        ),
        (in_policy('<allow send_type="letter"/>'), 3, '"letter" is not a message type'),
        (in_policy('<allow eavesdrop="yes"/>'), 3, 'must be "true" or "false"'),
        (in_policy('<allow send_broadcast="1"/>'), 3, 'must be "true" or "false"'),
        (in_policy('<allow send_requested_reply="1"/>'), 3, 'must be "true" or "false"'),
        (in_policy('<allow receive_requested_reply="1"/>'), 3, 'must be "true" or "false"'),
        (in_policy('<allow send_type="*" max_fds="-1"/>'), 3, "must be a number from 0"),
        (in_policy('<allow send_type="*" min_fds="few"/>'), 3, "must be a number from 0"),
        (in_policy(f'<allow send_type="*" max_fds="{MAX_FDS + 1}"/>'), 3, "must be a number"),
        (in_policy('<allow own="a.b"><deny own="x"/></allow>'), 3, "not allowed inside <allow>"),
        ('<policy user="root"><allow user="*"/></policy>', 2, "not allowed in <policy user>"),
        ('<policy group="root"><deny group="*"/></policy>', 2, "not allowed in <policy group>"),
        ("<selinux><own/></selinux>", 2, "<own> is not allowed inside <selinux>"),
        ('<selinux><associate own="a.b"/></selinux>', 2, "needs both own= and context="),
        ('<selinux mode="x"/>', 2, 'attribute "mode" is not known'),
        ('<apparmor mode="maybe"/>', 2, "must be"),
        ('<apparmor style="x"/>', 2, 'attribute "style" is not known'),
        ("<user>root</fork>", 2, "not well-formed XML: mismatched tag"),
        ('<limit name="a" name="b">1</limit>', 2, "duplicate attribute"),
        ("\n<user>&nobody;</user>", 3, "undefined entity"),
    ],
)
def test_refused_with_line_and_reason(tmp_path: Path, body: str, line: int, reason: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load(tmp_path, body)
    assert reason in caught.value.reason
    assert str(caught.value) == f"{tmp_path / 'bus.conf'}:{line}: {caught.value.reason}"


@pytest.mark.parametrize(
    ("document", "line", "reason"),
    [
        ("", 1, "no element found"),
        ("<busconfig>\n", 2, "no element found"),
        ("<bus/>", 1, "the root element is <bus>"),
        ("<busconfig/>\n<busconfig/>", 2, "junk after document element"),
        ("<busconfig>\n<fork/>\n</busconfig>", 3, "no <listen> address"),
        (
            '<!DOCTYPE busconfig [\n<!ENTITY a "aaaaaaaaaa">]><busconfig/>',
            2,
            "entity declarations are not accepted",
        ),
        (
            '<!DOCTYPE busconfig [\n<!ENTITY a SYSTEM "/etc/passwd">]><busconfig/>',
            2,
            "entity declarations are not accepted",
        ),
        (
            '<!DOCTYPE busconfig PUBLIC "x" "http://nowhere/">\n<busconfig><user>&a;</user>',
            2,
            "unknown entity &a;",
        ),
    ],
)
def test_refused_documents(tmp_path: Path, document: str, line: int, reason: str) -> None:
    path = tmp_path / "bus.conf"
    path.write_text(document)
    with pytest.raises(ConfigurationError) as caught:
        configuration.load(str(path), environment={})
    assert (caught.value.line, caught.value.file) == (line, str(path))
    assert reason in caught.value.reason


def test_a_file_beyond_the_size_limit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="larger than 1048576 bytes"):
        load(tmp_path, f"<!--{'x' * configuration.MAX_FILE_SIZE}-->")


# -- includes ---------------------------------------------------------------------------------


def test_includes_take_effect_where_they_stand(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.conf").write_text(
        '<busconfig><user>inner</user><policy context="default"><deny own="*"/></policy>'
        '<limit name="auth_timeout">7</limit><servicedir>here</servicedir></busconfig>'
    )
    found = load(
        tmp_path,
        '<user>outer</user><limit name="auth_timeout">5</limit>'
        '<policy context="default"><allow own="a.b"/></policy>'
        "<include>sub/a.conf</include>"
        '<policy context="default"><allow own="c.d"/></policy>',
    )
    assert found.user == "inner"
    assert found.limits["auth_timeout"] == 7
    assert [rule.name for rule in found.policy.default] == ["a.b", None, "c.d"]
    assert found.service_dirs == (str(tmp_path / "sub" / "here"),)
    assert [file.path for file in found.files] == [
        str(tmp_path / "bus.conf"),
        str(tmp_path / "sub/a.conf"),
    ]


def test_a_file_may_be_included_twice(tmp_path: Path) -> None:
    (tmp_path / "a.conf").write_text(
        '<busconfig><policy user="0"><allow own="a.b"/></policy></busconfig>'
    )
    found = load(tmp_path, "<include>a.conf</include><include>a.conf</include>")
    assert len(found.policy.users[0]) == 2


def test_a_missing_include_may_be_ignored(tmp_path: Path) -> None:
    load(tmp_path, '<include ignore_missing="yes">missing.conf</include>')


def test_ignore_missing_does_not_ignore_what_is_missing_further_in(tmp_path: Path) -> None:
    (tmp_path / "a.conf").write_text("<busconfig>\n<include>missing.conf</include></busconfig>")
    with pytest.raises(ConfigurationError, match=r"a\.conf:2: cannot read .*missing\.conf"):
        load(tmp_path, '<include ignore_missing="yes">a.conf</include>')


def test_includedir_reads_conf_files_by_name(tmp_path: Path) -> None:
    directory = tmp_path / "bus.d"
    directory.mkdir()
    for name in ("b.conf", "a.conf", "c.conf.bak"):
        (directory / name).write_text(f"<busconfig><user>{name}</user></busconfig>")
    found = load(tmp_path, "<includedir>bus.d</includedir><includedir>no.d</includedir>")
    assert found.user == "b.conf"
    assert [os.path.basename(file.path) for file in found.files[1:]] == ["a.conf", "b.conf"]


def test_a_fault_in_an_includedir_is_not_skipped(tmp_path: Path) -> None:
    (tmp_path / "bus.d").mkdir()
    (tmp_path / "bus.d" / "a.conf").write_text("<busconfig>\n<bees/></busconfig>")
    with pytest.raises(ConfigurationError, match=r"bus\.d/a\.conf:2: <bees>"):
        load(tmp_path, "<includedir>bus.d</includedir>")


def test_a_circle_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.conf").write_text("<busconfig>\n\n<include>./bus.conf</include></busconfig>")
    with pytest.raises(ConfigurationError, match=r"a\.conf:3: .*bus\.conf includes itself"):
        load(tmp_path, "<include>a.conf</include>")


def test_selinux_includes(tmp_path: Path) -> None:
    body = '<include if_selinux_enabled="yes" selinux_root_relative="yes">x.conf</include>'
    root = tmp_path / "selinux"
    root.mkdir()
    (root / "x.conf").write_text(
        '<busconfig><selinux><associate own="a.b" context="x_t"/></selinux></busconfig>'
    )
    assert load(tmp_path, body).selinux == {}
    assert load(tmp_path, body, selinux_root=str(root)).selinux == {"a.b": "x_t"}


# -- standard directories ---------------------------------------------------------------------


def test_standard_session_directories() -> None:
    environment = {
        "XDG_RUNTIME_DIR": "/run/user/7",
        "XDG_DATA_HOME": "/h/data",
        "XDG_DATA_DIRS": "/one::/two",
    }
    found = configuration.standard_session_directories(environment)
    assert [(directory.path, directory.strict) for directory in found] == [
        ("/run/user/7/dbus-1/services", True),
        ("/h/data/dbus-1/services", False),
        ("/one/dbus-1/services", False),
        ("/two/dbus-1/services", False),
        ("/usr/share/dbus-1/services", False),
    ]
    assert [
        directory.path for directory in configuration.standard_session_directories({"HOME": "/h"})
    ] == [
        "/h/.local/share/dbus-1/services",
        "/usr/local/share/dbus-1/services",
        "/usr/share/dbus-1/services",
        "/usr/share/dbus-1/services",
    ]


def test_standard_directories_are_listed_once(tmp_path: Path) -> None:
    found = load(tmp_path, "<standard_session_servicedirs/>" * 2)
    assert found.service_dirs == (
        "/usr/local/share/dbus-1/services",
        "/usr/share/dbus-1/services",
    )
    found = load(tmp_path, "<standard_system_servicedirs/>")
    assert found.service_dirs[-1] == "/lib/dbus-1/system-services"


# -- what is installed ------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(Path("/usr/share/dbus-1").glob("*.conf")), ids=str)
def test_installed_configurations_parse(path: Path) -> None:
    found = configuration.load(str(path))
    assert found.listen and found.policy.default
    assert configuration.decode(configuration.encode(found)) == found


@pytest.mark.parametrize(
    "path", sorted(Path("/usr/share/dbus-1").glob("*.d/*.conf")), ids=lambda path: path.name
)
def test_installed_drop_ins_parse(tmp_path: Path, path: Path) -> None:
    found = load(tmp_path, f"<include>{path}</include>")
    policy = found.policy
    assert policy.default or policy.users or policy.groups or policy.mandatory


@pytest.mark.skipif(not DATA.exists(), reason="needs Debian's dbus-tests")
@pytest.mark.parametrize(
    "path", sorted(DATA.glob("invalid-config-files/*.conf")), ids=lambda p: p.name
)
def test_what_dbus_refuses_is_refused(path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"\.conf:[0-9]+: ."):
        configuration.load(str(path))


@pytest.mark.skipif(not DATA.exists(), reason="needs Debian's dbus-tests")
@pytest.mark.parametrize(
    "path", sorted(DATA.glob("valid-config-files*/*.conf")), ids=lambda p: p.name
)
def test_what_dbus_takes_is_taken(path: Path) -> None:
    if path.name == "entities.conf":
        # Its address is not one: dbus-daemon finds that when it is about to listen.
        with pytest.raises(ConfigurationError, match="not a D-Bus address"):
            configuration.load(str(path))
    else:
        configuration.load(str(path))


@pytest.mark.parametrize(
    ("body", "line", "reason"),
    [
        ('<apparmor mode="required"/>', 2, "AppArmor is required, but kbusd does not ask it"),
        ("\n<user>no-such-user</user>", 3, 'there is no user "no-such-user"'),
        ("<user>4242424</user>", 2, 'there is no user "4242424"'),
        ("<auth>DBUS_COOKIE_SHA1</auth>", 2, "nobody could authenticate"),
    ],
)
def test_what_a_bus_cannot_be_started_with(
    tmp_path: Path, body: str, line: int, reason: str
) -> None:
    load(tmp_path, body)
    with pytest.raises(ConfigurationError, match=reason) as caught:
        load(tmp_path, body, to_start=True)
    assert caught.value.line == line
    later = "<user>root</user><auth>EXTERNAL</auth><apparmor mode='disabled'/>"
    load(tmp_path, f"{body}{later}", to_start=True)


# -- the reader process -----------------------------------------------------------------------


def read(*arguments: str, **options: object) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "kbusd.policy.reader", *arguments]
    return subprocess.run(command, check=False, capture_output=True, timeout=60, **options)  # type: ignore[call-overload,no-any-return]


def test_reader_writes_the_configuration(tmp_path: Path) -> None:
    load(tmp_path, "<user>1</user>")
    path = str(tmp_path / "bus.conf")
    done = read("--config-file", path, "--address", "unix:path=/a", "--address", "unix:path=/b")
    assert (done.returncode, done.stderr) == (0, b"")
    found = configuration.decode(done.stdout)
    assert found.user == "daemon"
    assert found.listen == ("unix:path=/a", "unix:path=/b")


def test_reader_knows_the_standard_files() -> None:
    assert configuration.decode(read("--session").stdout).type == "session"
    assert configuration.decode(read("--system").stdout).type == "system"


def test_reader_fails_with_one_line(tmp_path: Path) -> None:
    path = tmp_path / "bus.conf"
    path.write_text("<busconfig>\n\n<bees/></busconfig>")
    done = read("--config-file", str(path))
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.decode() == f"{path}:3: <bees> is not allowed inside <busconfig>\n"
    missing = read("--config-file", "/nonexistent")
    assert missing.returncode == 1
    assert (
        missing.stderr == b"/nonexistent:1: cannot read /nonexistent: No such file or directory\n"
    )


def test_reader_reads_a_descriptor_wherever_its_offset_is(tmp_path: Path) -> None:
    load(tmp_path, "<user>daemon</user>")
    fd = os.memfd_create("configuration")
    try:
        os.write(fd, (tmp_path / "bus.conf").read_bytes())
        done = read(f"--config-file=/proc/self/fd/{fd}", pass_fds=(fd,))
    finally:
        os.close(fd)
    assert configuration.decode(done.stdout).user == "daemon"


def test_a_service_directory_whose_name_is_not_utf8_ended_the_reader(tmp_path: Path) -> None:
    """It could not tell the bus of it: nothing was read at all."""
    path = tmp_path / "t.conf"
    path.write_text(f"<busconfig>{LISTEN}<standard_session_servicedirs/></busconfig>")
    loaded = configuration.load(str(path), environment={"XDG_DATA_DIRS": "/\udcff"})
    assert loaded.service_dirs == ("/usr/share/dbus-1/services",)
    assert [line.rpartition(": ")[2] for line in loaded.warnings] == ["its name is not UTF-8"]
    assert configuration.decode(configuration.encode(loaded)) == loaded


def test_a_policy_file_whose_name_is_not_utf8_is_refused_not_left_out(tmp_path: Path) -> None:
    included = tmp_path / "d"
    included.mkdir()
    (included / "\udcff.conf").write_text("<busconfig/>")
    path = tmp_path / "t.conf"
    path.write_text(f"<busconfig>{LISTEN}\n<includedir>{included}</includedir></busconfig>")
    with pytest.raises(configuration.ConfigurationError, match=r"t\.conf:2: .*UTF-8") as refused:
        configuration.load(str(path))
    str(refused.value).encode()
