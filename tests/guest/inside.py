"""What runs in the guest for the plugin outside: pytest, with each report written to a file.

A file of JSON, one value a line: "begin"; for each test its reports, each as {"report": ...}, and
{"finish": NODEID}. Synced line by line, as the guest may die at any moment.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPORTS, TESTS = "reports", "tests"
# A system call costs ten times what it does outside; a test that hangs still has to end in time.
TIMEOUT = 60.0


class Reporter:
    """Writes what happens to `path`. Failures come with what the kernel said during the test."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("a", encoding="utf-8")
        self.kernel = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)

    def write(self, value: object) -> None:
        self.file.write(json.dumps(value, default=str) + "\n")
        self.file.flush()
        os.fsync(self.file.fileno())

    def said(self) -> Iterator[str]:
        """The kernel's messages since the last time; one a read, fields before a semicolon."""
        while True:
            try:
                yield os.read(self.kernel, 8192).decode(errors="replace").partition(";")[2]
            except BrokenPipeError:
                yield "(messages were lost)\n"
            except BlockingIOError:
                return

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        self.config = session.config
        self.write("begin")

    def pytest_runtest_logstart(self) -> None:
        os.lseek(self.kernel, 0, os.SEEK_END)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            report.sections.append(("kernel log of the guest", "".join(self.said())))
        data = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        self.write({"report": data})

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.write({"finish": nodeid})


def main(root: str) -> int:
    """Run the tests that are listed in the shared directory; `root` is pytest's."""
    shared = Path(os.environ["KBUSD_GUEST"])
    tests = json.loads((shared / TESTS).read_text())
    options = ["--rootdir", root, "--basetemp", "/run/pytest", "-p", "no:cacheprovider"]
    options += ["-vv", "--color", "no", "--tb", "short", "-o", f"timeout={TIMEOUT}"]
    return pytest.main([*options, *tests], plugins=[Reporter(shared / REPORTS)])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
