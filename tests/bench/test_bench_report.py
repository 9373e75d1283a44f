"""The benchmark's report, on figures recorded from dbus-daemon and dbus-broker (recorded.json,
a quick run). kbusd's samples are dbus-broker's, scaled by a factor that each test chooses."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import msgspec
import pytest
import report
from measure import CpuTime, cpu_used

RECORDED = Path(__file__).parent / "recorded.json"


@pytest.fixture
def recorded() -> report.Recording:
    return msgspec.json.decode(RECORDED.read_bytes(), type=report.Recording)


def with_kbusd(recorded: report.Recording, speed: float) -> report.Recording:
    """As if kbusd had run too, `speed` times as fast as dbus-broker in everything."""
    ours = []
    for sample in recorded.samples:
        if sample.bus != report.BROKER:
            continue
        metrics = {
            name: figure * speed if "per_second" in name else figure / speed
            for name, figure in sample.metrics.items()
        }
        ours.append(report.Sample(report.OURS, sample.test, sample.round, metrics))
    return msgspec.structs.replace(recorded, samples=[*recorded.samples, *ours])


def line_of(table: str, start: str) -> str:
    """Its cells, one blank between them."""
    line = next(line for line in table.splitlines() if line.startswith(start))
    return " ".join(line.split())


def test_every_promised_figure_is_measured(recorded: report.Recording) -> None:
    for row in report.FIGURES:
        assert report.value(recorded, report.DAEMON, row.test, row.metric), row.label


def test_every_plotted_figure_is_measured(recorded: report.Recording) -> None:
    for label, test, metric, _ in report.PLOTTED:
        assert report.ratio(recorded, report.BROKER, report.DAEMON, test, metric), label


def test_a_faster_bus_passes_and_a_slower_one_misses(recorded: report.Recording) -> None:
    faster = report.figures_table(with_kbusd(recorded, 1.1))
    slower = report.figures_table(with_kbusd(recorded, 0.8))
    assert "1.10 (1.10–1.10) ≥ 1 pass" in line_of(faster, "pipelined calls")
    assert "0.800 (0.800–0.800) ≥ 1 MISS" in line_of(slower, "pipelined calls")
    assert "0.909 (0.909–0.909) ≤ 1.15 pass" in line_of(faster, "round trip")
    assert "1.25 (1.25–1.25) ≤ 1.15 MISS" in line_of(slower, "round trip")
    assert not [line for line in report.missed(with_kbusd(recorded, 1.1)) if "broker" in line]
    assert [line for line in report.missed(with_kbusd(recorded, 0.8)) if "broker" in line]


def test_ratios_pair_the_samples_of_a_round() -> None:
    # A machine that became twice as slow between the rounds: the ratio must not see it.
    samples = [
        report.Sample(bus, "round-trip", number, {"p50_us": figure})
        for bus, figures in (("kbusd", (50.0, 100.0)), ("dbus-daemon", (100.0, 200.0)))
        for number, figure in enumerate(figures)
    ]
    recording = report.Recording(1, "", {}, {}, {}, samples)
    assert report.ratio(recording, "kbusd", "dbus-daemon", "round-trip", "p50_us") == (
        report.Spread(0.5, 0.5, 0.5)
    )


def test_a_failed_measurement_is_shown_and_counts_nothing(recorded: report.Recording) -> None:
    broken = msgspec.structs.replace(
        recorded,
        samples=[
            *recorded.samples,
            report.Sample(report.OURS, "pipelined", 0, error="calls: the bus is dead"),
        ],
    )
    text = report.text(broken)
    assert "round 0, pipelined on kbusd: calls: the bus is dead" in text
    assert "not measured" in line_of(report.figures_table(broken), "pipelined calls")


def test_the_report_begins_with_what_it_cannot_show(recorded: report.Recording) -> None:
    assert report.text(recorded).startswith("What these figures can't show.")


def test_the_plot_is_svg_with_a_bar_for_each_figure_and_peer(recorded: report.Recording) -> None:
    root = ElementTree.fromstring(report.svg(with_kbusd(recorded, 2.0)))
    width = float(root.attrib["width"])
    bars = [
        element
        for element in root.iter("{http://www.w3.org/2000/svg}rect")
        if element.attrib["fill"] != "white" and element.attrib["height"] != "10"
    ]
    assert len(bars) == len(report.PLOTTED) * 2  # dbus-daemon is the line at 1
    for bar in bars:
        assert (
            0
            <= float(bar.attrib["x"])
            <= float(bar.attrib["x"]) + float(bar.attrib["width"])
            <= width
        )


def test_cpu_of_a_process_that_came_and_went_is_counted_by_its_parent() -> None:
    before = {1: CpuTime(1_000_000_000, 0), 2: CpuTime(5_000_000_000, 0)}
    after = {1: CpuTime(1_500_000_000, 30_000_000), 3: CpuTime(200_000_000, 0)}
    assert cpu_used(before, after) == pytest.approx(0.73)


def test_kdbusfs_is_judged_by_itself_and_against_the_socket_of_its_bus() -> None:
    samples = [
        report.Sample("kdbusfs", test, 0, {"p50_us": figure})
        for test, figure in (
            ("kdbusfs-calls/ioctl", 31.0),
            ("kdbusfs-message/device", 150.0),
            ("kdbusfs-message/socket", 15.0),
            ("kdbusfs-memfd/memfd", 900.0),
            ("kdbusfs-memfd/socket", 1000.0),
        )
    ]
    recording = report.Recording(1, "", {}, {}, {}, samples)
    table = report.device_table(recording)
    assert line_of(table, "ioctl") == "ioctl 31.0 (31.0–31.0) ≤ 30 MISS"
    assert line_of(table, "SEND").endswith("150 (150–150) ≤ 200 pass 10.0 (10.0–10.0)")
    assert line_of(table, "1 MiB by memfd").endswith("0.900 (0.900–0.900) ≤ 1 pass")
    assert report.missed(recording) == ["kdbusfs, ioctl: 31.0 µs, wanted 30"]


def test_a_recording_without_kdbusfs_says_nothing_of_it(recorded: report.Recording) -> None:
    assert report.device_table(recorded) == ""


def test_confinement_is_judged_against_kbusd_without_it() -> None:
    samples = [
        report.Sample(bus, test, 0, figures)
        for bus, test, figures in (
            ("kbusd", "confined-pipelined", {report.IN_TURNS: 0.9}),
            ("kbusd", "connect/spaced", {"p50_us": 120.0}),
            ("unconfined", "connect/spaced", {"p50_us": 100.0}),
            ("kbusd", "filter-load", {"filter_load_ms": 0.1}),
        )
    ]
    recording = report.Recording(1, "", {}, {}, {}, samples)
    table = report.confinement_table(recording)
    assert line_of(table, "pipelined") == (
        "pipelined calls, throughput 0.900 (0.900–0.900) ≥ 0.95 MISS"
    )
    assert line_of(table, "connect + Hello, p50").endswith("1.20 (1.20–1.20) ≤ 1.3 pass")
    assert line_of(table, "filter load").endswith("0.100 (0.100–0.100) ≤ 0.2 pass")
    assert report.missed(recording) == ["pipelined calls, throughput, confined: 0.900, wanted 0.95"]


def test_a_recording_of_one_kbusd_says_nothing_of_confinement(recorded: report.Recording) -> None:
    assert report.confinement_table(recorded) == ""


def test_a_bus_is_measured_by_what_its_clients_need_without_one() -> None:
    samples = [
        report.Sample(bus, "payload-1MiB", 0, {"p50_us": figure})
        for bus, figure in (
            ("kbusd", 500.0),
            ("dbus-daemon", 2500.0),
            (report.WHOLE, 400.0),
            (report.STREAMED, 250.0),
        )
    ]
    table = report.direct_table(report.Recording(1, "", {}, {}, {}, samples))
    assert line_of(table, "read when it is whole") == (
        "read when it is whole 6.25 (6.25–6.25) 1.25 (1.25–1.25)"
    )
    assert line_of(table, "read while it is written").endswith("2.00 (2.00–2.00)")


def test_a_recording_without_clients_alone_says_nothing_of_them(
    recorded: report.Recording,
) -> None:
    assert report.direct_table(recorded) == ""


def test_kdbusfs_stands_beside_what_fuse_takes_without_it() -> None:
    samples = [
        report.Sample("kdbusfs", "kdbusfs-calls/ioctl", 0, {"p50_us": 28.0}),
        report.Sample(report.ALONE, "kdbusfs-calls", 0, {"p50_us": 7.0}),
        report.Sample(report.PASSED_ON, "kdbusfs-calls", 0, {"p50_us": 17.0}),
    ]
    table = report.device_table(report.Recording(1, "", {}, {}, {}, samples))
    assert line_of(table, "floor: FUSE alone") == "floor: FUSE alone 7.00 (7.00–7.00)"
    assert line_of(table, "floor: FUSE, a process behind it").endswith("17.0 (17.0–17.0)")
