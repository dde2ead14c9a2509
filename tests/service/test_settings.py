"""Settings come from flags, the environment and a file, in this order, and say where from."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from hvp_service.app.config import ServerConfig
from hvp_service.app.flags import SettingsError, descriptions, flag_of, parse_flags
from hvp_service.app.server import main
from hvp_service.app.settings import OTHER_VARIABLES, Settings, masked, read_settings
from pydantic import SecretStr

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment without variables of this machine's own."""
    for name in [name for name in os.environ if name.startswith("HVP_")]:
        monkeypatch.delenv(name)


def read(*argv: str) -> Settings:
    command = parse_flags(argv)
    return read_settings(command.values, command.file)


def refusal(*argv: str) -> str:
    with pytest.raises(SettingsError) as refused:
        read(*argv)
    return "\n".join(refused.value.problems)


def test_flags_come_before_variables_before_the_file_before_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "hvp.toml"
    file.write_text('workers = 3\ngrace_s = 4\nlease_s = 5\nstate_dir = "state"')
    monkeypatch.setenv("HVP_WORKERS", "6")
    monkeypatch.setenv("HVP_GRACE_S", "7")
    monkeypatch.setenv("HVP_DEVICE", "")  # as compose files leave it
    settings = read("--config", str(file), "--workers", "8")
    config, origins = settings.config, settings.origins
    assert (config.workers, origins["workers"]) == (8, "--workers")
    assert (config.grace_s, origins["grace_s"]) == (7.0, "HVP_GRACE_S")
    assert (config.lease_s, origins["lease_s"]) == (5.0, str(file))
    assert (config.device, origins["device"]) == ("cpu", "default")
    assert config.state_dir == tmp_path / "state"  # not where the server is started
    monkeypatch.setenv("HVP_CONFIG", str(file))
    assert read().config.lease_s == 5.0


def test_every_setting_has_words_and_a_flag_that_sets_it() -> None:
    fields = ServerConfig.model_fields
    assert descriptions().keys() == fields.keys()
    for name, field in fields.items():
        if isinstance(field.default, int | float) and not isinstance(field.default, bool):
            settings = read("--backend=ray", f"{flag_of(name)}={field.default}")
            assert getattr(settings.config, name) == field.default
            assert settings.origins[name] == flag_of(name)


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--adress", "x"], "--adress: there is no such flag; the nearest is --address"),
        (["--work=2"], "--work: there is no such flag; the nearest is --workers"),
        (["two"], "two: a value comes behind a flag"),
        (["--workers"], "--workers: expected one argument"),
        (["--workers", "two"], "--workers: must be a valid integer"),
        (["--device", "gpu"], "--device: must be 'cpu' or 'cuda', got 'gpu'"),
        (["--grace-s", "-1"], "--grace-s: must be greater than or equal to 0, got '-1'"),
        (["--config", "none.toml"], "none.toml: the file cannot be read"),
    ],
)
def test_a_wrong_flag_is_a_sentence_that_names_it(argv: list[str], told: str) -> None:
    assert told in refusal(*argv)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("stat_dir = 'x'", "stat_dir: there is no such setting; the nearest is state_dir"),
        ("state-dir = 'x'", "state-dir: there is no such setting; the nearest is state_dir"),
        ("[server]\nworkers = 2", "server: there is no such setting"),
        ("workers = true", "workers: must be NUMBER, not true or false"),
        ("workers = 'two'", "workers: must be a valid integer"),
        ("address = 7", "address: must be a valid string, got 7"),
        ("address = '7'", "address: an address is HOST:PORT"),
        ("workers = ", "this is no TOML"),
        ("\0", "this is no TOML"),
    ],
)
def test_a_wrong_file_is_a_sentence_with_its_path_and_the_key(
    tmp_path: Path, text: str, told: str
) -> None:
    file = tmp_path / "hvp.toml"
    file.write_text(text)
    assert f"{file}: {told}" in refusal("--config", str(file))


def test_all_that_is_wrong_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hvp.toml").write_text("worker = 2")
    monkeypatch.setenv("HVP_WORKER", "2")
    monkeypatch.setenv("HVP_LEASE_S", "long")
    told = refusal("--config", str(tmp_path / "hvp.toml"), "--device=gpu").splitlines()
    assert len(told) == 4
    assert "HVP_WORKER: no part of hvp reads this variable; the nearest is HVP_WORKERS" in told
    assert any(line.startswith("HVP_LEASE_S: must be a valid number") for line in told)


def test_variables_by_which_kubernetes_names_a_service_are_no_settings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("HVP", "HVP_SERVER"):
        monkeypatch.setenv(f"{name}_SERVICE_HOST", "10.0.0.1")
        monkeypatch.setenv(f"{name}_SERVICE_PORT_GRPC", "8471")
        monkeypatch.setenv(f"{name}_PORT", "tcp://10.0.0.1:8471")
        monkeypatch.setenv(f"{name}_PORT_8471_TCP_ADDR", "10.0.0.1")
    assert read().config == ServerConfig()
    monkeypatch.setenv("HVP_PORT", "8471")
    assert "HVP_PORT: no part of hvp reads this" in refusal()


def test_variables_that_other_parts_read_are_known() -> None:
    folders = ("client", "service", "workers", "protos/hvp_operations", "protos/hvp_folders")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    read = {name for path in files for name in re.findall(r"\"(HVP_[A-Z_]+)\"", path.read_text())}
    settings = {f"HVP_{name.upper()}" for name in ServerConfig.model_fields}
    assert read - settings - {"HVP_", "HVP_TEST_"} == OTHER_VARIABLES


def test_the_settings_in_force_are_printed_as_a_file_that_sets_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--print-config", f'--state-dir={tmp_path}/ü"\\', "--grace-s=1.5"]) == 0
    printed = capsys.readouterr().out
    file = tmp_path / "again.toml"
    file.write_text(printed)
    again = read("--config", str(file)).config
    assert again == read(f'--state-dir={tmp_path}/ü"\\', "--grace-s=1.5").config
    assert tomllib.loads(printed)["grace_s"] == 1.5
    assert re.search(r"^grace_s = 1.5 +# --grace-s$", printed, re.MULTILINE)


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("database_url", "postgresql://a:pass@host/db", "postgresql://a:********@host/db"),
        ("database_url", "postgresql://host/db?password=pass&x=1", None),
        ("api_token", "pass", "********"),
        ("anything", SecretStr("pass"), "********"),
        ("tls_key", Path("pass.pem"), Path("pass.pem")),  # of a file, not what it holds
        ("address", "127.0.0.1:0", "127.0.0.1:0"),
    ],
)
def test_secrets_are_masked(name: str, value: object, shown: object) -> None:
    if shown is None:
        assert "pass&" not in masked(name, value)
        assert masked(name, value).endswith("?password=********&x=1")
    else:
        assert masked(name, value) == shown


def test_the_page_of_settings_is_current(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, str(ROOT / "service" / "generate_pages.py"), str(tmp_path)], check=True
    )
    for path in tmp_path.iterdir():
        assert path.read_text() == (ROOT / "docs" / path.name).read_text(), "run `make pages`"


def test_the_file_of_settings_that_is_deployed_is_one() -> None:
    settings = read("--config", str(ROOT / "deploy" / "hvp.toml"))
    assert settings.config.state_dir == Path("/var/lib/hvp")
