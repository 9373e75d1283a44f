"""Turns recorded figures into the table of ratios, the list of medians and a plot.

Pure functions of a `Recording`: no process, no clock, no file. A ratio is taken within each
round, where the buses were measured seconds apart, and the median of those is shown with their
spread: the machine's drift then falls out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from statistics import median
from xml.sax.saxutils import escape

import msgspec

OURS = "kbusd"
DAEMON = "dbus-daemon"
BROKER = "dbus-broker"
KDBUSFS = "kdbusfs"
STREAMED = "direct, streamed"  # no bus
WHOLE = "direct, whole"
ALONE = "direct, alone"
PASSED_ON = "direct, passed on"
UNCONFINED = "unconfined"

CAVEATS = """\
What these figures can't show. The clients share the cores with the bus and cost about as much
CPU as it does, so on a machine of few cores a bus that works in parallel has no spare core to
show it on, and its worker processes compete with the clients for what there is. On a virtual
machine the neighbours are part of every figure, and the cost of a wake-up is the hypervisor's as
much as the kernel's. All clients are one lean C program with blocking sockets: real libraries
spend more per message, so in real programs the buses differ by less than here. Everything is
allowed by the policy, nothing is activated, and nobody reads slowly. Latencies under saturation
are those of a queue whose length the benchmark chose. Compare ratios, not microseconds."""


class Sample(msgspec.Struct, frozen=True):
    """One measurement of one bus. `error` is set where it failed; then there are no metrics."""

    bus: str
    test: str
    round: int
    metrics: dict[str, float] = {}
    error: str = ""


class Recording(msgspec.Struct, frozen=True):
    """A run of the benchmark, as bench.json holds it."""

    schema: int
    date: str
    machine: dict[str, str]
    versions: dict[str, str]
    settings: dict[str, str | float]
    samples: list[Sample]


class Row(msgspec.Struct, frozen=True):
    """A figure that was promised. `at_least`: more is better; else less is. The targets are
    ratios to a peer, or, `absolute`, a value in the metric's own unit."""

    label: str
    test: str
    metric: str
    at_least: bool
    daemon: float | None = None
    broker: float | None = None
    absolute: float | None = None


FIGURES = (
    Row("round trip, time", "round-trip", "p50_us", False, 1.0, 1.15),
    Row("pipelined calls, throughput", "pipelined", "per_second", True, 1.25, 1.0),
    Row("two independent pairs, throughput", "pairs-2", "per_second", True, 1.3, 1.0),
    Row("fan-out to 64, deliveries/s", "fanout-64/saturated", "deliveries_per_second", True, 2, 1),
    Row("64 KiB payload, throughput", "payload-64KiB", "mb_per_second", True, 1.6, 1.0),
    Row("1 MiB payload, throughput", "payload-1MiB", "mb_per_second", True, 6.0, 1.0),
    Row("connect + Hello, p50, µs", "connect/spaced", "p50_us", False, absolute=600),
    Row(
        "connect + Hello sustained, ms",
        "connect/sustained",
        "ms_per_connect",
        False,
        absolute=2.5,
    ),
    Row("PSS per idle connection, MB", "idle", "pss_mb_each", False, absolute=2.5),
)


# What a bus would reach that costs nothing (direct.c).
DIRECT_FIGURES = (
    ("read when it is whole", WHOLE),
    ("read while it is written", STREAMED),
)


class DeviceRow(msgspec.Struct, frozen=True):
    """The same of kdbusfs: µs (p50), and the ratio to the same over the socket of the same bus."""

    label: str
    test: str
    socket: str = ""
    absolute: float | None = None
    ratio: float | None = None


DEVICE_FIGURES = (
    DeviceRow("read of a page", "kdbusfs-calls/read", absolute=30),
    DeviceRow("write", "kdbusfs-calls/write", absolute=30),
    DeviceRow("ioctl", "kdbusfs-calls/ioctl", absolute=30),
    DeviceRow(
        "SEND + poll + RECV + FREE of 64 B",
        "kdbusfs-message/device",
        "kdbusfs-message/socket",
        absolute=200,
    ),
    DeviceRow("1 MiB by memfd", "kdbusfs-memfd/memfd", "kdbusfs-memfd/socket", ratio=1.0),
    DeviceRow("1 MiB by vector", "kdbusfs-memfd/vector", "kdbusfs-memfd/socket"),
    DeviceRow("one SEND to 64", "kdbusfs-fanout-64/device", "kdbusfs-fanout-64/socket"),
)

# What an ioctl would take that costs nothing (fuse.c).
FLOORS = (
    ("floor: FUSE alone", ALONE),
    ("floor: FUSE, a process behind it", PASSED_ON),
)

IN_TURNS = "throughput_ratio"  # is over kbusd unconfined already
# kbusd over kbusd without its profiles: what confinement costs.
CONFINED = (
    Row("connect + Hello, p50", "connect/spaced", "p50_us", False, 1.3),
    Row("connect + Hello, sustained", "connect/sustained", "ms_per_connect", False, 1.3),
    Row("round trips, throughput", "confined-round-trip", IN_TURNS, True, 0.95),
    Row("pipelined calls, throughput", "confined-pipelined", IN_TURNS, True, 0.95),
    Row("64 KiB payload, throughput", "confined-64KiB", IN_TURNS, True, 0.95),
)
FILTER_LOAD = Row("filter load, ms a worker", "filter-load", "filter_load_ms", False, absolute=0.2)

# What the plot shows: a label, the test, the metric, and whether more is better.
PLOTTED = (
    ("round trip", "round-trip", "p50_us", False),
    ("round trip, one core", "round-trip-one-core", "p50_us", False),
    ("pipelined calls", "pipelined", "per_second", True),
    ("2 pairs", "pairs-2", "per_second", True),
    ("4 pairs", "pairs-4", "per_second", True),
    ("fan-out to 1", "fanout-1/saturated", "deliveries_per_second", True),
    ("fan-out to 8", "fanout-8/saturated", "deliveries_per_second", True),
    ("fan-out to 64", "fanout-64/saturated", "deliveries_per_second", True),
    ("signal to 64, latency", "fanout-64/single", "p50_us", False),
    ("payload 64 B", "payload-64B", "mb_per_second", True),
    ("payload 1 KiB", "payload-1KiB", "mb_per_second", True),
    ("payload 4 KiB", "payload-4KiB", "mb_per_second", True),
    ("payload 16 KiB", "payload-16KiB", "mb_per_second", True),
    ("payload 64 KiB", "payload-64KiB", "mb_per_second", True),
    ("payload 256 KiB", "payload-256KiB", "mb_per_second", True),
    ("payload 1 MiB", "payload-1MiB", "mb_per_second", True),
    ("payload 8 MiB", "payload-8MiB", "mb_per_second", True),
    ("connect + Hello", "connect/spaced", "p50_us", False),
    ("connects in a row", "connect/sustained", "per_second", True),
)


class Spread(msgspec.Struct, frozen=True):
    """Median, least and greatest of a figure over the rounds."""

    median: float
    least: float
    greatest: float


def _spread(values: list[float]) -> Spread | None:
    return Spread(median(values), min(values), max(values)) if values else None


def _by_round(recording: Recording, bus: str, test: str, metric: str) -> dict[int, float]:
    return {
        sample.round: sample.metrics[metric]
        for sample in recording.samples
        if sample.bus == bus and sample.test == test and metric in sample.metrics
    }


def value(recording: Recording, bus: str, test: str, metric: str) -> Spread | None:
    """The figure of one bus, None if it was never measured."""
    return _spread(list(_by_round(recording, bus, test, metric).values()))


def ratio(recording: Recording, bus: str, peer: str, test: str, metric: str) -> Spread | None:
    """`bus`'s figure over `peer`'s, paired by round; None without a round that has both."""
    ours = _by_round(recording, bus, test, metric)
    theirs = _by_round(recording, peer, test, metric)
    return _spread([ours[n] / theirs[n] for n in ours if theirs.get(n)])


def buses(recording: Recording) -> list[str]:
    """Those that are compared and were measured, ours first."""
    seen = {sample.bus for sample in recording.samples}
    return [bus for bus in (OURS, DAEMON, BROKER) if bus in seen]


def _columns(recording: Recording) -> list[str]:
    """All that were measured."""
    seen = {sample.bus for sample in recording.samples}
    others = (KDBUSFS, UNCONFINED, WHOLE, STREAMED)
    return [*buses(recording), *(bus for bus in others if bus in seen)]


def _number(figure: float) -> str:
    if not figure:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(figure))))
    return f"{figure:,.{min(digits, 4)}f}"


def _align(rows: Iterable[list[str]], left: int = 1) -> str:
    """Columns as wide as they need be; the first `left` to the left, the others to the right."""
    table = list(rows)
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    )


def _judged(at_least: bool, figure: Spread | None, target: float | None) -> list[str]:
    """Cells: the figure with its spread, the target, and whether it is reached."""
    shown, wanted, verdict = "", "", ""
    if figure is not None:
        shown = f"{_number(figure.median)} ({_number(figure.least)}–{_number(figure.greatest)})"
    if target is not None:
        wanted = f"{'≥' if at_least else '≤'} {target:g}"
        verdict = "not measured"
        if figure is None:
            shown = "–"
        else:
            reached = figure.median >= target if at_least else figure.median <= target
            verdict = "pass" if reached else "MISS"
    return [shown, wanted, verdict]


def missed(recording: Recording) -> list[str]:
    """The promised figures that were measured and not reached, one line each."""
    lines = []
    for row in FIGURES:
        for peer, target in ((DAEMON, row.daemon), (BROKER, row.broker), ("", row.absolute)):
            if target is None:
                continue
            figure = (
                ratio(recording, OURS, peer, row.test, row.metric)
                if peer
                else value(recording, OURS, row.test, row.metric)
            )
            if _judged(row.at_least, figure, target)[2] == "MISS":
                against = f" against {peer}" if peer else ""
                lines.append(f"{row.label}{against}: {_number(figure.median)}, wanted {target:g}")
    for row in CONFINED:
        over = _over_unconfined(recording, row)
        if over is not None and _judged(row.at_least, over, row.daemon)[2] == "MISS":
            lines.append(f"{row.label}, confined: {_number(over.median)}, wanted {row.daemon:g}")
    for each in DEVICE_FIGURES:
        own, over = _device_figures(recording, each)
        for found, target, what in ((own, each.absolute, "µs"), (over, each.ratio, "× the socket")):
            if found is not None and _judged(False, found, target)[2] == "MISS":
                lines.append(
                    f"kdbusfs, {each.label}: {_number(found.median)} {what}, wanted {target:g}"
                )
    return lines


def figures_table(recording: Recording) -> str:
    """The promised figures: kbusd over each peer, and the absolute ones."""
    ratios = [["kbusd over", DAEMON, "target", "", BROKER, "target", ""]]
    absolutes = [["kbusd alone", "value", "target", ""]]
    for row in FIGURES:
        if row.absolute is not None:
            own = value(recording, OURS, row.test, row.metric)
            absolutes.append([row.label, *_judged(row.at_least, own, row.absolute)])
            continue
        cells = [row.label]
        for peer, target in ((DAEMON, row.daemon), (BROKER, row.broker)):
            figure = ratio(recording, OURS, peer, row.test, row.metric) if target else None
            cells += _judged(row.at_least, figure, target)
        ratios.append(cells)
    return f"{_align(ratios)}\n\n{_align(absolutes)}"


def direct_table(recording: Recording) -> str:
    """How much longer each bus takes than the clients alone; "" if that was not measured."""
    table = [["1 MiB payload, time over that without a bus", DAEMON, BROKER, OURS]]
    for label, phase in DIRECT_FIGURES:
        over = [
            ratio(recording, bus, phase, "payload-1MiB", "p50_us") for bus in (DAEMON, BROKER, OURS)
        ]
        if any(over):
            table.append([label, *(_judged(True, each, None)[0] for each in over)])
    return _align(table) if len(table) > 1 else ""


def confinement_table(recording: Recording) -> str:
    """kbusd over kbusd unconfined; "" if that was not measured."""
    table = [["kbusd over kbusd unconfined", "ratio", "target", ""]]
    for row in CONFINED:
        over = _over_unconfined(recording, row)
        if over is not None:
            table.append([row.label, *_judged(row.at_least, over, row.daemon)])
    own = value(recording, OURS, FILTER_LOAD.test, FILTER_LOAD.metric)
    if own is not None:
        table.append([FILTER_LOAD.label, *_judged(False, own, FILTER_LOAD.absolute)])
    return _align(table) if len(table) > 1 else ""


def _over_unconfined(recording: Recording, row: Row) -> Spread | None:
    if row.metric == IN_TURNS:
        return value(recording, OURS, row.test, row.metric)
    return ratio(recording, OURS, UNCONFINED, row.test, row.metric)


def device_table(recording: Recording) -> str:
    """kdbusfs by itself, and over the socket of the same bus; "" if there was none."""
    table = [["kdbusfs", "p50 µs", "target", "", "over the socket", "target", ""]]
    for row in DEVICE_FIGURES:
        own, over = _device_figures(recording, row)
        if own is not None:
            table.append(
                [row.label, *_judged(False, own, row.absolute), *_judged(False, over, row.ratio)]
            )
    for label, phase in FLOORS:
        floor = value(recording, phase, "kdbusfs-calls", "p50_us")
        if floor is not None:
            table.append([label, *_judged(False, floor, None), "", "", ""])
    return _align(table) if len(table) > 1 else ""


def _device_figures(recording: Recording, row: DeviceRow) -> tuple[Spread | None, Spread | None]:
    """Microseconds, and the ratio."""
    ours = _by_round(recording, KDBUSFS, row.test, "p50_us")
    plain = _by_round(recording, KDBUSFS, row.socket, "p50_us")
    return _spread(list(ours.values())), _spread([ours[n] / plain[n] for n in ours if n in plain])


_SHOWN = (
    ("p50_us", "p50 µs"),
    ("p99_us", "p99 µs"),
    ("per_second", "per s"),
    ("deliveries_per_second", "deliveries/s"),
    ("mb_per_second", "MB/s"),
    ("us_per_call", "µs per call"),
    ("us_per_delivery", "µs per delivery"),
    ("daemon_cpu_us_each", "bus CPU µs each"),
    ("clients_cpu_us_each", "clients' CPU µs each"),
    ("daemon_cpu_s", "bus CPU s"),
    ("clients_cpu_s", "clients' CPU s"),
    ("ms_per_connect", "ms each"),
    ("pss_mb_each", "PSS MB each"),
    ("processes_after", "processes"),
    ("filter_load_ms", "ms"),
    (IN_TURNS, "over unconfined"),
)


def medians_table(recording: Recording) -> str:
    """Every figure: the median over the rounds, for each bus."""
    names = _columns(recording)
    rows = [["test", "figure", *names]]
    tests = dict.fromkeys(sample.test for sample in recording.samples)
    for test in tests:
        first = True
        for metric, label in _SHOWN:
            figures = [value(recording, bus, test, metric) for bus in names]
            if all(figure is None for figure in figures):
                continue
            shown = ["–" if figure is None else _number(figure.median) for figure in figures]
            rows.append([test if first else "", label, *shown])
            first = False
    return _align(rows, left=2)


def failures(recording: Recording) -> list[str]:
    """One line for each measurement that did not work."""
    return [
        f"round {sample.round}, {sample.test} on {sample.bus}: {sample.error}"
        for sample in recording.samples
        if sample.error
    ]


def text(recording: Recording) -> str:
    """The whole report."""
    facts = {**recording.machine, **recording.versions}
    parts = [
        CAVEATS,
        "\n".join(f"{name}: {fact}" for name, fact in facts.items()),
        medians_table(recording),
        figures_table(recording) if OURS in buses(recording) else "kbusd was not measured.",
    ]
    tables = (direct_table(recording), device_table(recording), confinement_table(recording))
    parts += filter(None, tables)
    if broken := failures(recording):
        parts.append("FAILED:\n" + "\n".join(broken))
    return "\n\n".join(parts) + "\n"


_COLOURS = {OURS: "#d9694f", BROKER: "#5b93c9"}
_BAR, _GAP, _LEFT, _WIDTH, _TOP = 12, 8, 170, 560, 72


def svg(recording: Recording) -> str:
    """Speed of the other buses over dbus-daemon's (the line at 1), on a logarithmic axis.

    A bar is the median, the thin line across its end the spread over the rounds.
    """
    names = [bus for bus in buses(recording) if bus != DAEMON]
    rows: list[tuple[str, dict[str, Spread]]] = []
    for label, test, metric, more in PLOTTED:
        speeds = {}
        for bus in names:
            figure = ratio(recording, bus, DAEMON, test, metric)
            if figure is not None and figure.least > 0:
                speeds[bus] = (
                    figure
                    if more
                    else Spread(1 / figure.median, 1 / figure.greatest, 1 / figure.least)
                )
        if speeds:
            rows.append((label, speeds))
    every = [speed for _, speeds in rows for speed in speeds.values()]
    low = math.floor(math.log2(min([0.5, *(speed.least for speed in every)])))
    high = math.ceil(math.log2(max([2.0, *(speed.greatest for speed in every)])))

    def x(speed: float) -> float:
        return _LEFT + (math.log2(speed) - low) / (high - low) * _WIDTH

    block = _BAR * len(names) + _GAP
    height = _TOP + block * len(rows) + 40
    total = _LEFT + _WIDTH + 70
    out = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{total}" height="{height}" '
            f'viewBox="0 0 {total} {height}" font-family="sans-serif" font-size="11">'
        ),
        f'<rect width="{total}" height="{height}" fill="white"/>',
        (
            f'<text x="{_LEFT}" y="20" font-size="14">Speed, dbus-daemon = 1 '
            "(logarithmic; longer to the right is faster)</text>"
        ),
        (
            f'<text x="{_LEFT}" y="36" fill="#555">'
            f"{escape(recording.date)}, {escape(recording.machine.get('cpu', ''))}</text>"
        ),
    ]
    for i, bus in enumerate(names):
        left = _LEFT + i * 240
        named = escape(recording.versions.get(bus) or bus)
        out.append(
            f'<rect x="{left}" y="46" width="10" height="10" fill="{_COLOURS[bus]}"/>'
            f'<text x="{left + 15}" y="55">{named}</text>'
        )
    bottom = _TOP + block * len(rows)
    for power in range(low, high + 1):
        at = x(2.0**power)
        out.append(
            f'<line x1="{at:.1f}" y1="{_TOP - 8}" x2="{at:.1f}" y2="{bottom}" '
            f'stroke="{"#333" if power == 0 else "#ddd"}"/>'
            f'<text x="{at:.1f}" y="{bottom + 16}" text-anchor="middle">{2.0**power:g}×</text>'
        )
    for i, (label, speeds) in enumerate(rows):
        top = _TOP + i * block
        middle = top + _BAR * len(names) / 2 + 4
        out.append(
            f'<text x="{_LEFT - 8}" y="{middle:.1f}" text-anchor="end">{escape(label)}</text>'
        )
        for j, bus in enumerate(names):
            if bus not in speeds:
                continue
            speed = speeds[bus]
            start, end = sorted((x(1), x(speed.median)))
            y = top + j * _BAR
            out.append(
                f'<rect x="{start:.1f}" y="{y}" width="{max(end - start, 1.5):.1f}" '
                f'height="{_BAR - 1}" fill="{_COLOURS[bus]}"/>'
                f'<line x1="{x(speed.least):.1f}" y1="{y + _BAR / 2 - 0.5}" '
                f'x2="{x(speed.greatest):.1f}" y2="{y + _BAR / 2 - 0.5}" stroke="#222"/>'
                f'<text x="{max(end, x(speed.greatest)) + 4:.1f}" y="{y + 9}" font-size="9" '
                f'fill="#333">{speed.median:.2f}</text>'
            )
    out.append("</svg>\n")
    return "\n".join(out)
