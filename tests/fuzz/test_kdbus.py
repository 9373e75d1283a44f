"""A short run of the fuzzer of kdbus commands and FUSE requests, the same one each time."""

from tests.fuzz import kdbus


def test_commands_and_requests() -> None:
    verdicts = kdbus.run(range(1500), seed=1)
    for spec in kdbus.SPECS.values():
        assert verdicts[spec.name, "valid"], f"no {spec.name} was valid"
        assert verdicts[spec.name, "EINVAL"], f"no {spec.name} was invalid"
    assert len({verdict for _, verdict in verdicts}) > 20
