"""Secrets of the environment stay there: an update is run with some planted, and everything that it left is searched."""

import logging
import os
from pathlib import Path

import pytest

from data_schemas.errors import ConfigError, DataError
from flows.hourly_update import hourly_update
from pipeline.config import load_config, overridden
from pipeline.data.synthetic import SyntheticConfig, write_landing

SECRET = "plover-xyzzy"
PLANTED = {
    "TIDEMARK_ALERTS__WEBHOOK_URL": f"http://127.0.0.1:9/{SECRET}",
    "MLFLOW_TRACKING_USERNAME": f"{SECRET}-name",
    "MLFLOW_TRACKING_PASSWORD": f"{SECRET}-password",
    "AWS_SECRET_ACCESS_KEY": f"{SECRET}-key",
    "FSSPEC_FTP_PASSWORD": f"{SECRET}-ftp",
}
STREAM = SyntheticConfig(hours=2, rows_per_hour=200, num_users=50, num_items=40, num_authors=8)
SETTINGS = ["model.hidden=[8]", "training.precision=fp32", "alerts.timeout_seconds=2"]


def files_with(secret: str, *folders: Path) -> list[str]:
    paths = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert len(paths) > 30, "an update leaves more than this"
    return [str(path) for path in paths if secret.encode() in path.read_bytes()]


@pytest.mark.usefixtures("temporary_server")
def test_nothing_that_an_update_leaves_holds_a_secret_of_the_environment(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    caplog.set_level(logging.DEBUG)
    write_landing(STREAM, tmp_path / "landing")
    places = {"dataset": "synthetic", "state_dir": str(tmp_path / "state"), "overrides": SETTINGS}
    hourly_update(landing=str(tmp_path / "landing"), **places)
    with pytest.raises(DataError, match="absent"):
        hourly_update(landing=str(tmp_path / "absent"), **places)
    kept = (tmp_path / "state/models/hourly/undelivered_alerts.jsonl").read_text()
    assert '"event": "failed"' in kept, "the webhook was tried"
    assert (tmp_path / "state/mlflow.db").is_file()
    assert files_with(SECRET, tmp_path, Path(os.environ["PREFECT_HOME"])) == []
    said = capfd.readouterr()
    assert "could not be delivered" in caplog.text
    assert SECRET not in caplog.text + said.out + said.err


def test_a_planted_secret_would_be_found(tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / f"{number}").write_text(SECRET if number == 7 else "")
    assert files_with(SECRET, tmp_path) == [str(tmp_path / "7")]


def test_a_password_in_the_landing_address_is_refused_and_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIDEMARK_LANDING", f"ftp://me:{SECRET}@host/clicks")
    with pytest.raises(ConfigError, match=r"landing: holds a password.* FSSPEC_FTP_PASSWORD") as caught:
        load_config()
    assert SECRET not in str(caught.value)


def test_a_password_of_a_database_is_taken_from_the_environment_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = f"postgresql://me:{SECRET}@host/mlflow"
    file = tmp_path / "settings.toml"
    file.write_text(f'[tracking]\nuri = "{uri}"\n')
    for load in (
        lambda: load_config(None, [f"tracking.uri={uri}"]),
        lambda: load_config(file),
        lambda: overridden(load_config(), [f"tracking.uri={uri}"]),
    ):
        with pytest.raises(ConfigError, match="secrets are read from the environment only") as caught:
            load()
        assert SECRET not in str(caught.value)
    monkeypatch.setenv("TIDEMARK_TRACKING__URI", uri)
    assert load_config().tracking_uri == uri
    monkeypatch.setenv("TIDEMARK_TRACKING__URI", f"https://me:{SECRET}@host")
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_PASSWORD") as caught:
        load_config()
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ('landing = "/etc"', "landing: '/etc' in the data set's .* leaves the working folder"),
        ('landing = "../other"', "landing: .* leaves the working folder"),
        ('landing = "file:///etc"', "landing: .* leaves the working folder"),
        ('state_dir = "a/../../b"', "state_dir: .* leaves the working folder"),
        ('state_dir = "~root"', "state_dir: .* leaves the working folder"),
        ('state_dir = "a\\u0000b"', "state_dir: .* leaves the working folder"),
        ("state_dir = 3", "state_dir: 3 .* leaves the working folder"),
        ('dataset = "brunch"', "dataset: no setting of a data set's"),
        ('model_name = "../x"', "model_name: "),
        ('[settings.tracking]\nuri = "sqlite:////etc/x"', "tracking.uri: no setting of a data set's"),
    ],
)
def test_a_declaration_does_not_choose_where_this_machine_reads_and_writes(tmp_path: Path, settings: str, words: str) -> None:
    declaration = tmp_path / "shop.toml"
    declaration.write_text(
        'name = "shop"\nevent_key = ["id"]\n[time]\ncolumn = "at"\n[label]\ncolumn = "clicked"\n[[categorical]]\nname = "id"\n'
        f"[settings]\n{settings}\n"
    )
    with pytest.raises(ConfigError, match=words):
        load_config(None, [f"dataset={declaration}"])


def test_a_declaration_may_name_folders_below_the_working_folder(tmp_path: Path) -> None:
    declaration = tmp_path / "shop.toml"
    declaration.write_text(
        'name = "shop"\nevent_key = ["id"]\n[time]\ncolumn = "at"\n[label]\ncolumn = "clicked"\n[[categorical]]\nname = "id"\n'
        '[settings]\nlanding = "shop/landing"\nstate_dir = "shop/state"\n'
    )
    config = load_config(None, [f"dataset={declaration}"])
    assert (config.landing, config.state_dir) == ("shop/landing", Path("shop/state"))


@pytest.mark.parametrize("setting", ["landing", "state_dir"])
def test_a_path_with_a_nul_character_is_refused(setting: str) -> None:
    with pytest.raises(ConfigError, match=f"{setting}: a path cannot hold a NUL"):
        load_config(None, [f'{setting}="a\\u0000b"'])
