"""Without a hub nothing is asked twice: what is cached is read, the rest is refused at once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import _http

from dynmoe import network
from dynmoe.data.text.tokens import load_tokenizer
from dynmoe.errors import ConfigError


class Session:
    def __init__(self) -> None:
        self.asked: list[str] = []

    def head(self, url: str, timeout: float) -> None:
        self.asked.append(url)
        raise OSError("Name or service not known")


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[Session]:
    session = Session()
    monkeypatch.setattr("huggingface_hub.utils.get_session", lambda: session)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    network.go_offline_if_unreachable.cache_clear()
    yield session
    network.go_offline_if_unreachable.cache_clear()


def test_the_hub_is_asked_once(nowhere: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    def request(*args: object, **kwargs: object) -> None:
        raise AssertionError("a request without a network")

    monkeypatch.setattr(_http, "_http_backoff_base", request)
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"backbone\.model=no/such.*backbone\.path=FOLDER"):
            load_tokenizer(None, "no/such")
    assert nowhere.asked == [constants.ENDPOINT]


def test_a_user_who_is_offline_is_not_asked(
    nowhere: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert network.go_offline_if_unreachable() is False
    assert nowhere.asked == []
