import pytest

from surpass.judge.sandbox import SandboxUnavailable


@pytest.fixture
def no_sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which nothing can isolate a program."""

    def refuse() -> str:
        raise SandboxUnavailable("bwrap: not installed; unshare: not installed")

    monkeypatch.setattr("surpass.judge.sandbox.check_sandbox", refuse)
