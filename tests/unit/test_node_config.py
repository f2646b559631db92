"""The node's configuration: which place wins, what an error says, and that the documentation lists every setting."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sterna.errors import ConfigError, SternaError
from sterna.node.config import FILE_MAX_BYTES, SETTINGS, NodeConfig, load

DOCUMENT = Path(__file__).parents[2] / "docs" / "operations.md"


@pytest.fixture
def home(tmp_path: Path) -> dict[str, str]:
    """An environment with nothing in it but places of its own."""
    return {"HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path / "c"), "XDG_STATE_HOME": str(tmp_path / "s")}


def written(path: Path, text: str, mode: int = 0o600) -> str:
    path.write_text(text, encoding="utf-8")
    path.chmod(mode)
    return str(path)


def test_flags_beat_environment_beats_file_beats_default(home: dict[str, str], tmp_path: Path) -> None:
    path = written(tmp_path / "node.toml", 'port = 1001\nhost = "192.0.2.1"\nlog_level = "debug"\ncold_seconds = 5\n')
    environ = {**home, "STERNA_NODE_PORT": "1002", "STERNA_NODE_HOST": "192.0.2.2"}
    config = load({"port": 1003, "host": None, "names": ()}, environ, path)
    assert (config.port, config.host, config.log_level) == (1003, "192.0.2.2", "debug")
    assert config.cold_seconds == 5
    assert config.retention_seconds == NodeConfig().retention_seconds
    assert load({}, environ, path).port == 1002
    assert load({}, home, path).port == 1001
    assert load({}, home).port == 7220


def test_the_file_in_its_usual_place_is_found_but_need_not_be_there(home: dict[str, str], tmp_path: Path) -> None:
    assert load({}, home).metrics_port == 0
    (tmp_path / "c" / "sterna").mkdir(parents=True)
    written(tmp_path / "c" / "sterna" / "node.toml", "metrics_port = 9100\n")
    assert load({}, home).metrics_port == 9100
    with pytest.raises(ConfigError, match="does not exist"):
        load({}, home, str(tmp_path / "other.toml"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('port = "7220"', r"node\.toml: port cannot be '7220': expected a whole number from 0 to 65535\."),
        ("port = 65536", r"node\.toml: port cannot be 65536: expected a whole number from 0 to 65535\."),
        ("prot = 1", r"there is no setting 'prot'; did you mean port\?"),
        ("zzzzzz = 1", r"there is no setting 'zzzzzz'; docs/operations\.md"),
        ('on_full = "stop"', r"on_full cannot be 'stop': expected \"overwrite\" or \"pause\"\."),
        ("names = 'a'", r"names cannot be 'a': expected a list of texts\."),
        ('tenant_uids = {acme = "1"}', r"tenant_uids cannot be .*: expected a table"),
        ("tenant_uids = {a_b = [1]}", r"tenant_uids names an impossible tenant"),
        ("tenant_uids = {acme = [-1]}", r"tenant_uids has impossible user ids for acme"),
        ('keeper = "ftp://keeper"', r"keeper is no URL of a Keeper: expected https://"),
        ('keeper = "https://u:p@keeper"', r"keeper has more than host, port and path"),
        ('keeper = "https://keeper:99999"', r"keeper is no URL of a Keeper"),
        ('tls_key = "x"', r"tls_key is of no use without tls_cert"),
        ('host = ""', r"host is empty"),
        ('state = "a\\u0007"', r"state is no text for a setting"),
        ("ring_bytes = 1048576\njournal_quota_bytes = 131072", r"ring_bytes does not fit"),
        ("journal_quota_bytes = 131072", r"journal_quota_bytes does not fit"),
        ("port = ", r"is not valid TOML"),
        ("names = " + "[" * 5000, r"is not valid TOML"),
        ("#" * (FILE_MAX_BYTES + 1), r"is larger than"),
    ],
    ids=lambda text: text[:30],
)
def test_an_error_names_place_key_and_what_was_expected(
    home: dict[str, str], tmp_path: Path, text: str, said: str
) -> None:
    path = written(tmp_path / "node.toml", text)
    with pytest.raises(ConfigError, match=said) as caught:
        load({}, home, path)
    assert "node.toml" in str(caught.value)


def test_an_error_of_the_environment_names_the_variable(home: dict[str, str]) -> None:
    # What Kubernetes puts there for a Service called sterna-node.
    with pytest.raises(ConfigError, match=r"STERNA_NODE_PORT: port cannot be 'tcp://10\.0\.0\.1:7220'"):
        load({}, {**home, "STERNA_NODE_PORT": "tcp://10.0.0.1:7220"})
    with pytest.raises(ConfigError, match="The command line: keeper is no URL"):
        load({"keeper": "keeper"}, home)


def test_lists_and_maps_in_the_environment(home: dict[str, str]) -> None:
    environ = {
        **home,
        "STERNA_NODE_NAMES": "a.example, b.example",
        "STERNA_NODE_TENANT_UIDS": "acme=1000,acme=1001,b=7",
    }
    config = load({}, environ)
    assert config.names == ["a.example", "b.example"]
    assert config.tenant_uids == {"acme": [1000, 1001], "b": [7]}
    with pytest.raises(ConfigError, match="STERNA_NODE_TENANT_UIDS: tenant_uids cannot be 'acme'"):
        load({}, {**home, "STERNA_NODE_TENANT_UIDS": "acme"})


def test_a_token_comes_from_a_private_file_and_is_never_shown(home: dict[str, str], tmp_path: Path) -> None:
    secret = "s3cret-of-the-node"
    path = written(tmp_path / "t", secret + "\n")
    assert load({"token": "@" + path}, home).token == secret
    assert load({}, {**home, "STERNA_NODE_TOKEN": secret}).token == secret
    open_to_all = written(tmp_path / "u", secret, 0o644)
    with pytest.raises(SternaError, match="is open to other users"):
        load({"token": "@" + open_to_all}, home)
    with pytest.raises(ConfigError, match="does not exist"):
        load({"token": "@" + path + "x"}, home)
    with pytest.raises(ConfigError) as caught:
        load({"token": secret + " " + secret}, home)
    assert secret not in str(caught.value)
    with pytest.raises(ConfigError) as wrong:
        load({}, home, written(tmp_path / "n.toml", f'token = ["{secret}"]'))
    assert secret not in str(wrong.value)


def test_a_file_with_a_token_in_clear_must_be_private(home: dict[str, str], tmp_path: Path) -> None:
    assert load({}, home, written(tmp_path / "a.toml", 'token = "abc"')).token == "abc"
    with pytest.raises(SternaError, match="is open to other users"):
        load({}, home, written(tmp_path / "b.toml", 'token = "abc"', 0o644))


def test_the_documentation_lists_every_setting_as_it_is() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \| (.*?) \| (.*?) \|$", DOCUMENT.read_text(encoding="utf-8"), re.M)
    documented = {key: (variable, default, about) for key, variable, default, about in rows}
    assert list(documented) == list(SETTINGS)
    for key, setting in SETTINGS.items():
        default = f"`{setting.default}`" if setting.default not in ("", None, [], {}) else "–"
        assert documented[key] == (setting.variable, default, setting.about), "run the table through SETTINGS again"
