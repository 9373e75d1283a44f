"""What a worker does before its client comes reaches as far as a real client gets."""

import os
from pathlib import Path

import pytest

from kbusd.policy import configuration
from kbusd.sandbox.compiled import Compiled
from kbusd.workers import worker
from kbusd.workers.context import Context
from kbusd.workers.rehearsal import Rehearsal
from tests.unit.descriptors import descriptors

GUID = "00112233445566778899aabbccddeeff"
EVERYTHING = """<busconfig><listen>unix:tmpdir=/tmp</listen><policy context="default">
<allow user="*"/><allow send_destination="*"/><allow receive_sender="*"/><allow own="*"/>
</policy></busconfig>"""


NOTHING = """<busconfig><listen>unix:tmpdir=/tmp</listen><auth>ANONYMOUS</auth>
<limit name="auth_timeout">0</limit><limit name="max_message_size">0</limit>
<policy context="default"><deny user="*"/></policy></busconfig>"""


def context(directory: Path, text: str = EVERYTHING) -> Context:
    file = directory / "bus.conf"
    file.write_text(text)
    data = configuration.encode(configuration.load(str(file)))
    nothing = Compiled(name="none", title="none", files=(), required=frozenset())
    return Context.make(GUID, os.getpid(), data, nothing, log_fd=-1)


@pytest.mark.parametrize("text", [EVERYTHING, NOTHING], ids=["all allowed", "nothing allowed"])
def test_the_play_ends_with_the_answer_to_hello(tmp_path: Path, text: str) -> None:
    got = Rehearsal(context(tmp_path, text)).play(worker.serve)
    assert got.startswith(b"DATA\r\nOK " + GUID.encode() + b"\r\nAGREE_UNIX_FD\r\n")
    assert b"NameAcquired" in got
    assert got.count(b":1.1\0") == 4  # the reply and the signal: destination and body of each


def test_it_is_played_as_well_once_the_configuration_was_read_again(tmp_path: Path) -> None:
    """Nobody is there who would answer if the policy were fetched."""
    made = context(tmp_path).with_configuration(
        configuration.encode(configuration.load(str(tmp_path / "bus.conf"))), 1
    )
    assert b"NameAcquired" in Rehearsal(made).play(worker.serve)


def test_nothing_of_it_stays_open(tmp_path: Path) -> None:
    made = context(tmp_path)
    before = descriptors()
    Rehearsal(made).play(worker.serve)
    assert descriptors() == before
