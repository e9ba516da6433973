"""What the pages say: links lead somewhere, commands name files that exist, examples do what is printed beside them."""

import re
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import unquote

import pytest

from data_schemas.dataset import DatasetSpec, load_spec
from data_schemas.errors import SpecError
from pipeline.config import UpdateConfig
from pipeline.data.ingest import ingest_landing
from pipeline.data.lake import ClickLog, Quarantine
from pipeline.settings_page import renewed, sections_of, settings_page

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]
DATA_PAGE = ROOT / "docs" / "data.md"

_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
_NAMED_FILE = re.compile(
    r"(?<![\w./-])(?:flows|data_schemas|sampling|models|pipeline|benchmarks|docs|tests|requirements)/[\w./-]*\w"
)
_FORBIDDEN = {
    "a package registry's host": re.compile(
        r"(?:pypi|pythonhosted|anaconda|jfrog|artifactory)\.(?:org|com|io)|download\.pytorch\.org"
    ),
    "an absolute path of one machine": re.compile(r"(?<![\w.:/>}*])/(?:home|Users|root|work|workspace|mnt|opt)/\w"),
    "an address on which every machine could call": re.compile(r"\b0\.0\.0\.0\b|\[::\]|--host[ =](?!127\.0\.0\.1)"),
    "a word about assistants": re.compile(
        r"\b(?:chat[g]pt|c[l]aude|co[p]ilot|anthro[p]ic|open[a]i|a[i] (?:assistant|agent)|generated with a[i])s?\b",
        re.IGNORECASE,
    ),
}


def blocks(page: Path, language: str) -> list[str]:
    return [text for kind, text in _BLOCK.findall(page.read_text(encoding="utf-8")) if kind == language]


def anchors(page: Path) -> set[str]:
    headings = _HEADING.findall(_BLOCK.sub("", page.read_text(encoding="utf-8")))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def tracked_texts() -> Iterator[tuple[str, str]]:
    """Every tracked file that is text."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z"]
    try:
        listed = subprocess.run(command, capture_output=True, check=True).stdout.decode().split("\0")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout: there is no list of tracked files")
    for name in filter(None, listed):
        path = ROOT / name
        content = path.read_bytes() if path.is_file() else b""
        if b"\0" not in content:
            yield name, content.decode()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    text = _BLOCK.sub("", page.read_text(encoding="utf-8"))
    lost = []
    for link in _LINK.findall(text):
        if "://" in link or link.startswith("mailto:"):
            continue
        name, _, anchor = unquote(link).partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            lost.append(link)
    assert lost == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_of_ours_that_a_page_names_exists(page: Path) -> None:
    named = sorted({name.rstrip(".") for name in _NAMED_FILE.findall(page.read_text(encoding="utf-8"))})
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_every_target_of_make_that_the_readme_names_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = {name for block in blocks(README, "bash") for name in re.findall(r"^make ([a-z-]+)", block, re.MULTILINE)}
    assert named
    assert named <= targets


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_page_has_a_blank_that_waits_to_be_filled(page: Path) -> None:
    assert re.findall(r"@@\w*|TODO|FIXME|XXX", page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("what", _FORBIDDEN)
def test_no_tracked_file_holds(what: str) -> None:
    found = [
        f"{name}:{number}: {line.strip()[:80]}"
        for name, text in tracked_texts()
        for number, line in enumerate(text.splitlines(), start=1)
        if _FORBIDDEN[what].search(line)
    ]
    assert found == []


def test_the_page_of_settings_is_what_is_generated() -> None:
    page = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert page == settings_page(), "run: python -m pipeline.settings_page > docs/settings.md"


def test_the_list_of_settings_of_a_declaration_is_what_is_generated() -> None:
    page = DATA_PAGE.read_text(encoding="utf-8")
    assert page == renewed(page), "run: python -m pipeline.settings_page docs/data.md"


@pytest.mark.parametrize("kind", [UpdateConfig, DatasetSpec])
def test_every_setting_says_what_it_means(kind: type[UpdateConfig] | type[DatasetSpec]) -> None:
    silent = [setting.name for section in sections_of(kind) for setting in section.settings if not setting.meaning]
    assert silent == []


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """A folder with the worked example of the page of data sets: its declaration, and its file in the landing folder."""
    (declaration, *_), (rows,) = blocks(DATA_PAGE, "toml"), blocks(DATA_PAGE, "csv")
    (tmp_path / "shop.toml").write_text(declaration, encoding="utf-8")
    (tmp_path / "landing").mkdir()
    (tmp_path / "landing" / "2026-03-29.csv").write_text(rows, encoding="utf-8")
    return tmp_path


def test_the_worked_example_is_ingested_and_quarantined_as_printed(
    shop: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told, _, quarantined = blocks(DATA_PAGE, "text")
    spec = load_spec(shop / "shop.toml")
    log = ClickLog.open_or_create(shop / "state" / "click_log", spec)
    quarantine = Quarantine.open_or_create(shop / "state" / "quarantine")
    report = ingest_landing(str(shop / "landing"), log, quarantine, spec, now=datetime(2026, 4, 1, tzinfo=UTC))
    assert "\n".join(report.lines()) + "\n" == told
    monkeypatch.chdir(shop)
    (script,) = blocks(DATA_PAGE, "python")
    exec(compile(script, DATA_PAGE.name, "exec"), {})
    assert capsys.readouterr().out == quarantined


def test_a_wrong_declaration_is_refused_as_printed(shop: Path) -> None:
    _, printed, _ = blocks(DATA_PAGE, "text")
    wrong = [
        ("Europe/Berlin", "Mars/Base"),
        ('"integer"', '"int"'),
        ("capacity = 256", "capcity = 256"),
        ('"category"]]', '"tags"]]'),
    ]
    declaration = (shop / "shop.toml").read_text(encoding="utf-8")
    messages = []
    for old, new in wrong:
        (shop / "shop.toml").write_text(declaration.replace(old, new, 1), encoding="utf-8")
        with pytest.raises(SpecError) as caught:
            load_spec(shop / "shop.toml")
        messages.append(str(caught.value))
    assert messages == printed.splitlines()
