from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.llm.fake_endpoint import Fake, serving


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    """A fake endpoint that no key opens and that no proxy hides."""
    for name in ("JAXALIGN_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving() as fake:
        yield fake
