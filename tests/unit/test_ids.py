"""Names and uids: what a session may be called, and what is a uid."""

from __future__ import annotations

import pytest

from sterna.errors import UsageError
from sterna.ids import check_name, uid_of

UID = "0123456789abcdef0123456789abcdef"


@pytest.mark.parametrize("name", ["main", "a", "0", "Work-2.b_c", "a" * 63, "f" * 31, "f" * 33, UID[:-1] + "g"])
def test_a_session_may_be_called_so(name: str) -> None:
    assert check_name(name) == name
    assert uid_of(name) is None


@pytest.mark.parametrize("name", ["", "-a", ".a", "a b", "a/b", "ä", "a" * 64, "a\n", "\x1b[m"])
def test_a_session_may_not_be_called_so(name: str) -> None:
    with pytest.raises(UsageError, match="is no session name"):
        check_name(name)
    assert uid_of(name) is None


@pytest.mark.parametrize("name", [UID, UID.upper(), "0" * 32, "a" * 32])
def test_what_reads_as_a_uid_is_no_name(name: str) -> None:
    """Else a session could be called as another one's uid is, and get what is meant for that one."""
    with pytest.raises(UsageError, match="32 hex digits"):
        check_name(name)
    assert uid_of(name) == bytes.fromhex(name)


@pytest.mark.parametrize("name", [UID + "\n", " " + UID[1:], "٠" * 32, "01 2" * 8])
def test_what_python_also_takes_for_hex_is_no_uid(name: str) -> None:
    assert uid_of(name) is None
