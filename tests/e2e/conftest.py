"""A node with its web page and a browser: one of each for every module with tests of the page."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.e2e.browser import Chromium, Web


@pytest.fixture(scope="module")
def paged() -> Iterator[Web]:
    """A node with its web page."""
    from tests.e2e.browser import web_running

    with web_running() as web:
        yield web


@pytest.fixture(scope="module")
def _chromium() -> Iterator[Chromium]:
    from tests.e2e.browser import Chromium

    with Chromium() as chromium:
        yield chromium


@pytest.fixture
def chromium(_chromium: Chromium, paged: Web) -> Iterator[Chromium]:
    """The browser, without any device yet; at the end of a test none of its views may complain."""
    from tests.e2e.browser import clean

    with clean(_chromium, paged):
        yield _chromium
