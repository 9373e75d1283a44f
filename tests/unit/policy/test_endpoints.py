"""What an endpoint lets through: against a model that is as plain as it is slow, and mistakes as they are told."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kbusd.policy import endpoints
from kbusd.policy.configuration import ConfigurationError
from kbusd.policy.endpoint_files import load, load_all
from kbusd.policy.endpoints import NONE, OWN, SEE, TALK, Asked, EndpointError, View

NAMES = ("a.b", "a.b.c", "a.bc", "a.b.c.d", "x.y")
PATTERNS = (*NAMES, "a.*", "a.b.*", "x.*")
INTERFACES = ("i.f", "i.f.g", "j.f")
PATHS = ("/", "/p", "/p/q", "/pq")
TEXTS = ("", "t", "u")

names = st.sampled_from(NAMES)
said = st.tuples(st.sampled_from(sorted(endpoints.WORDS)), st.sampled_from(PATTERNS))
rule = st.tuples(
    st.sampled_from(endpoints.RULE_WORDS),
    st.sampled_from(PATTERNS),
    st.sampled_from(("", "*", *(f"{each}.*" for each in INTERFACES), "i.f.M", "i.f.N", "j.f.M")),
    st.sampled_from((None, *PATHS, "/*", "/p/*")),
    st.lists(st.tuples(st.integers(0, 2), st.sampled_from(TEXTS)), max_size=2),
)
asked = st.tuples(
    st.sampled_from(PATHS),
    st.sampled_from((None, *INTERFACES)),
    st.sampled_from(("M", "N")),
    st.lists(st.sampled_from((None, *TEXTS)), max_size=3),
)
Said = tuple[str, str]
Rule = tuple[str, str, str, str | None, list[tuple[int, str]]]
Message = tuple[str, str | None, str, list[str | None]]


def lines(of: list[Said], rules: list[Rule]) -> list[str]:
    written = [f"{word}={pattern}" for word, pattern in of]
    for word, pattern, method, path, args in rules:
        at = "" if path is None else f"@{path}"
        texts = "".join(f" arg{number}='{text}'" for number, text in args)
        written.append(f"{word}={pattern}={method}{at}{texts}")
    return written


# -- the model ---------------------------------------------------------------------------------


def covers(pattern: str, name: str) -> bool:
    return f"{name}.".startswith(pattern[:-1]) if pattern.endswith("*") else name == pattern


def level(of: list[Said], rules: list[Rule], name: str) -> int:
    words = {word for word, pattern in of if covers(pattern, name)}
    if "hide" in words:
        return NONE
    if "own" in words:
        return OWN
    if "talk" in words or any(
        not word.startswith("deny") and covers(pattern, name) for word, pattern, *_ in rules
    ):
        return TALK
    return SEE if "see" in words else NONE


def applies(one: Rule, message: Message, deny: bool) -> bool:
    _, _, method, path, args = one
    at, interface, member, texts = message
    if method not in ("", "*"):
        wanted, _, wanted_member = method.rpartition(".")
        if interface != wanted and not (deny and interface is None):
            return False
        if wanted_member not in ("*", member):
            return False
    if path is not None:
        if path.endswith("/*"):
            if not f"{at}/".replace("//", "/").startswith(path[:-1]):
                return False
        elif path != at:
            return False
    return all(number < len(texts) and texts[number] == text for number, text in args)


def allowed(of: list[Said], rules: list[Rule], to: list[str], kind: str, message: Message) -> bool:
    reached = [name for name in to if level(of, rules, name) >= TALK]
    for one in rules:
        denied = one[0] == f"deny-{kind}" and any(covers(one[1], name) for name in to)
        if denied and applies(one, message, True):
            return False
    mine = [one for one in rules if any(covers(one[1], name) for name in reached)]
    if any(one[0] == kind and applies(one, message, False) for one in mine):
        return True
    return any(
        word in ("talk", "own") and covers(pattern, name)
        for word, pattern in of
        for name in reached
    )


@given(st.lists(said, max_size=4), st.lists(rule, max_size=4), st.lists(names, max_size=3), asked)
@example(
    of=[("talk", "a.b")],
    rules=[("deny-call", "x.y", "i.f.*", None, []), ("deny-broadcast", "x.y", "", "/p", [])],
    to=["a.b", "x.y"],
    message=("/p", "i.f", "M", []),
)
def test_what_is_let_through(
    of: list[Said], rules: list[Rule], to: list[str], message: Message
) -> None:
    view = View(endpoints.parse("one", lines(of, rules)))
    path, interface, member, texts = message
    looked = []

    def args() -> list[str | None]:
        looked.append(True)
        return texts

    question = Asked(path, interface, member, args)
    assert [view.level(name) for name in NAMES] == [level(of, rules, name) for name in NAMES]
    assert view.best(to) == max([level(of, rules, name) for name in to], default=NONE)
    assert view.may_call(to, question) == allowed(of, rules, to, "call", message)
    assert view.may_hear(to, question) == allowed(of, rules, to, "broadcast", message)
    assert view.looks_at_args or not looked


@given(st.lists(said, max_size=4), st.lists(rule, max_size=4))
def test_another_process_reads_the_same(of: list[Said], rules: list[Rule]) -> None:
    endpoint = endpoints.parse("one", lines(of, rules))
    assert endpoints.decode(endpoints.encode(endpoint)) == endpoint


def test_what_another_process_says_is_read_from_its_words() -> None:
    """One that was taken over can't say in numbers what can't be said in words."""
    honest = endpoints.parse("one", ["see=a.b"])
    forged = endpoints.Endpoint("one", honest.lines, (endpoints.Level(OWN, "", True),))
    assert endpoints.decode(endpoints.encode(forged)) == honest
    with pytest.raises(EndpointError):
        endpoints.decode(endpoints.encode(endpoints.Endpoint("../up")))
    with pytest.raises(EndpointError):
        endpoints.decode(b"\xc1")


# -- mistakes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("a.b", "begins with none of hide, see"),
        ("walk=a.b", "begins with none of"),
        ("talk=", "not a well-known name"),
        ("talk=a", "not a well-known name"),
        ("talk=:1.5", "not a well-known name"),
        ("talk=a..b", "not a well-known name"),
        ("talk=a.*b", "not a well-known name"),
        ("talk=*", "not a well-known name"),
        (f"talk=a.{'b' * 254}", "not a well-known name"),
        ("talk=org.freedesktop.DBus", "is fixed"),
        ("hide=org.freedesktop.DBus.*", "is fixed"),
        ("call=a.b=Method", "neither INTERFACE.MEMBER"),
        ("call=a.b=i..M", "neither INTERFACE.MEMBER"),
        ("call=a.b=i.*M", "neither INTERFACE.MEMBER"),
        ("call=a.b=i.M@p", "not an object path"),
        ("call=a.b=i.M@/p/", "not an object path"),
        ("call=a.b=i.M@", "not an object path"),
        ("call=a.b=i.M arg0=x", "a rule is"),
        ("call=a.b=i.M arg100='x'", "a rule is"),
        ("call=a.b=i.M arg64='x'", "arg0 to arg63"),
        ("deny-call=a.b=i.M arg0='x' arg99='x'", "arg0 to arg63"),
        ("call=a.b=i.M arg0='it's'", "a rule is"),
        ("call=a.b=" + "x" * 2000, "longer than"),
    ],
)
def test_mistakes(line: str, why: str) -> None:
    with pytest.raises(EndpointError, match=why):
        endpoints.parse("one", [line])


@pytest.mark.parametrize("name", ["", "a.b", "a/b", "..", "ä", "x" * 65, "a b", "a\n"])
def test_names_that_an_endpoint_cannot_have(name: str) -> None:
    with pytest.raises(EndpointError, match="cannot be the name"):
        endpoints.parse(name, [])


def test_limits() -> None:
    with pytest.raises(EndpointError, match="more than"):
        endpoints.parse("one", ["see=a.b"] * (endpoints.MAX_LINES + 1))
    with pytest.raises(EndpointError, match="more than"):
        endpoints.parse("one", [f"see=a.{'b' * 200}"] * 500)


# -- files -------------------------------------------------------------------------------------


def test_files_of_a_directory_are_for_one_kind_of_bus(tmp_path: Path) -> None:
    (tmp_path / "b.toml").write_text('talk = ["a.b"]\nown = ["a.c.*"]\n')
    (tmp_path / "a.toml").write_text('bus = "system"\nsocket = "/run/x"\n')
    (tmp_path / "c.toml.bak").write_text("nonsense")
    extra = tmp_path / "extra"
    extra.write_text('bus = "system"\n')
    session = load_all([str(extra)], "session", str(tmp_path))
    assert [each.endpoint.name for each in session] == ["extra", "b"]
    assert session[1].endpoint.lines == ("talk=a.b", "own=a.c.*")
    (system,) = load_all([], "system", str(tmp_path))
    assert (system.endpoint.name, system.socket) == ("a", "/run/x")
    assert load_all([], "kdbus", str(tmp_path)) == ()
    assert load_all([], "session", str(tmp_path / "none")) == ()
    with pytest.raises(ConfigurationError, match='another endpoint "b"'):
        load_all([str(tmp_path / "b.toml")], "session", str(tmp_path))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("talk = [", ":1: no TOML"),
        ('\n\nbus = "both"', ":3: bus is one of session, system"),
        ('socket = "x"', ":1: socket is an absolute path"),
        ("socket = 5", ":1: socket is an absolute path"),
        ('see = []\nsing = ["a.b"]', ":2: sing is not known: bus, socket, hide,"),
        ('talk = "a.b"', ":1: talk is a list of strings"),
        ('see = ["a.b"]\ntalk = ["b"]', ":2: talk=b: "),
    ],
)
def test_a_mistake_is_told_with_its_place(tmp_path: Path, text: str, told: str) -> None:
    file = tmp_path / "one.toml"
    file.write_text(text)
    with pytest.raises(ConfigurationError) as caught:
        load(str(file))
    assert f"{file}{told}" in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot be read"):
        load(str(tmp_path / "none.toml"))
    (tmp_path / "a.b.toml").write_text("")
    with pytest.raises(ConfigurationError, match="cannot be the name"):
        load(str(tmp_path / "a.b.toml"))
