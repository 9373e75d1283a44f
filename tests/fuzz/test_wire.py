"""A short run of each wire fuzzer, so that the suite notices when one finds something at once."""

from tests.fuzz import wire


def test_messages() -> None:
    verdicts = wire.run(2.0, seed=1)
    assert verdicts[""] > 100, "hardly any input was valid: the fuzzer looks at refusals only"
    assert len(verdicts) > 30, "hardly any rule was broken"
