"""The house stays true: the map lists what exists, the limits hold what they say, nothing speaks out of turn."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import tokenize
import zipfile
from pathlib import Path
from tokenize import COMMENT, STRING

import pytest

from router.settings import config_load

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("policies", "engine", "router", "loadgen")


def source_files() -> set[str]:
    found = (path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    return {str(path.relative_to(ROOT)) for path in found if path.read_text().strip()}


def table_rows(page: str) -> list[list[str]]:
    lines = [line for line in (ROOT / page).read_text().splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def limit_rows() -> list[list[str]]:
    return table_rows("docs/limits.md")


def test_the_map_names_every_source_file_and_no_other() -> None:
    listed = {row[0].strip("`") for row in table_rows("docs/map.md")}
    assert listed == source_files()


@pytest.mark.parametrize("row", limit_rows(), ids=lambda row: row[0])
def test_a_limit_has_the_default_that_the_page_says(row: list[str]) -> None:
    name, default, metric, test = (cell.strip("`") for cell in row[:4])
    module_name, _, attribute = name.partition(":")
    value: object = importlib.import_module(module_name)
    for part in attribute.split("."):
        fields = getattr(value, "__dataclass_fields__", None)
        value = fields[part].default if fields and part in fields else getattr(value, part)
    assert str(value) == default
    assert metric == "-" or any(metric in path.read_text() for path in (ROOT / "router").rglob("*.py"))
    path, _, function = test.partition("::")
    assert f"def {function}(" in (ROOT / path).read_text()


def test_the_configuration_page_lists_every_key_and_no_other() -> None:
    written = {row[0].strip("`").replace('"', "") for row in table_rows("docs/configuration.md")}
    twins = ("classes.background-agent", "classes.data-processor")  # said once, for chatbot+
    keys = {".".join(key) for key in config_load._schema()}
    assert written == {key for key in keys if not key.startswith(twins)}
    assert [row[0] for row in table_rows("docs/configuration.md") if not row[2]] == []


def spoken(path: Path) -> list[str]:
    """A file's comments, docstrings and other strings."""
    with path.open("rb") as file:
        return [token.string for token in tokenize.tokenize(file.readline) if token.type in (COMMENT, STRING)]


def stands(name: str) -> bool:
    """Whether a module of this name exists, or one that holds its last part."""
    module, _, last = name.rpartition(".")
    whole, holder = (ROOT / part.replace(".", "/") for part in (name, module))
    text = holder.with_suffix(".py").read_text() if holder.with_suffix(".py").exists() else ""
    return whole.is_dir() or whole.with_suffix(".py").exists() or re.search(rf"\b{last}\b", text) is not None


def test_comments_name_modules_that_exist_and_no_page_that_is_not_here() -> None:
    named = re.compile(rf"(?<![\w/.-])(?:{'|'.join(PACKAGES)})(?:\.[A-Za-z_]\w*)+(?![\w/]|\.\w)")
    elsewhere = re.compile(r"\bdecision \d|\(R\d+[,)]|§")
    texts = {name: "\n".join(spoken(ROOT / name)) for name in source_files()}

    assert [(name, said) for name, text in texts.items() for said in named.findall(text) if not stands(said)] == []
    assert [(name, said[0]) for name, text in texts.items() if (said := elsewhere.search(text))] == []


def headings(page: Path) -> set[str]:
    """As links name them."""
    plain = [re.sub(r"[^\w\- ]", "", line.lower()) for line in re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)]
    return {line.strip().replace(" ", "-") for line in plain}


def test_links_between_pages_lead_somewhere() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    found = [(page, link) for page in pages for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text())]
    links = [(page, *link.partition("#")[::2]) for page, link in found if "://" not in link]
    targets = [(page.name, page.parent / file if file else page, heading) for page, file, heading in links]

    assert len(targets) > 50
    assert [(name, str(target)) for name, target, _ in targets if not target.exists()] == []
    assert [(name, heading) for name, target, heading in targets if heading and heading not in headings(target)] == []


def test_nothing_speaks_of_the_machine_it_was_written_on() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    foreign = re.compile(r"/work/|/farm/|/root/\.|\bhelper-\d\b")
    spoken = [name for name in tracked if (ROOT / name).suffix in {".py", ".md", ".toml", ".yml", ".c", ""}]
    texts = {name: (ROOT / name).read_text(errors="replace") for name in spoken if (ROOT / name).is_file()}
    assert [name for name, text in texts.items() if name != "tests/test_house.py" and foreign.search(text)] == []


def test_the_wheel_holds_the_four_packages_and_nothing_else(tmp_path: Path) -> None:
    build = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(tmp_path),
        str(ROOT),
    ]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == set(PACKAGES)
    assert all(f"{package}/py.typed" in names for package in PACKAGES)


def test_the_api_page_names_every_route() -> None:
    listener = ROOT / "router" / "listener"
    source = (listener / "app.py").read_text() + (listener / "admin.py").read_text()
    routes = {route.replace("{model:path}", "{model}") for route in re.findall(r'"(/[a-z0-9_/.:{}]*)"', source)}
    page = (ROOT / "docs" / "api.md").read_text()

    assert len(routes) > 10
    assert sorted(route for route in routes if f"{route}`" not in page and f"{route}?" not in page) == []
