"""The pages of docs are true: the map names every module and nothing that is not there, and README quotes the code."""

import ast
import re

import pytest
from test_layers import LAYERS, PACKAGE

ROOT = PACKAGE.parent
MAP = (ROOT / "docs" / "architecture.md").read_text("utf-8")
PLACES = (ROOT, PACKAGE)
# Files of this project; those of a database stand in a block of their own.
FILE = re.compile(r"[\w./-]+(?:/|\.(?:py|md|toml))")
README = (ROOT / "README.md").read_text("utf-8")
CODE = {path: path.read_text("utf-8") for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {path: ast.parse(text) for path, text in CODE.items()}


def named(page: str) -> list[str]:
    """What a page has in backticks, blocks aside."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", page, flags=re.DOTALL))


def missing_modules(page: str) -> set[str]:
    found = {name.removeprefix("rapidin_vdb/").split("/")[0].removesuffix(".py") for name in named(page)}
    return set(LAYERS) - found


def files_that_are_not_there(page: str) -> set[str]:
    names = {name for name in named(page) if FILE.fullmatch(name)}
    return {name for name in names if not any((place / name).exists() for place in PLACES)}


def functions_that_are_not_there(page: str) -> set[tuple[str, str]]:
    """Of those that stand before their file: `function` in `file.py`, or in the cells of a table."""
    told = re.findall(r"`([\w.]+)` ?(?:in|\|)\s`([\w/]+\.py)`", page)
    return {(name, file) for name, file in told if not _defines(file, name)}


def _defines(file: str, name: str) -> bool:
    path = next((place / file for place in PLACES if (place / file).is_file()), None)
    if path is None:
        return False
    body = ast.parse(path.read_text("utf-8")).body
    for part in name.split("."):
        found = [node for node in body if part in _names(node)]
        if not found:
            return False
        body = getattr(found[0], "body", [])
    return True


def _names(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.Assign):
        return {target.id for target in node.targets if isinstance(target, ast.Name)}
    return {getattr(node, "name", "")}


def section(heading: str) -> str:
    (found,) = re.findall(rf"^## {heading}\n(.*?)(?=^## )", README + "\n## \n", re.DOTALL | re.MULTILINE)
    return found


def test_the_map_names_every_module():
    assert missing_modules(MAP) == set()


def test_what_the_map_names_is_there():
    assert files_that_are_not_there(MAP) == set()
    assert functions_that_are_not_there(MAP) == set()
    assert len(re.findall(r"`[\w.]+` ?(?:in|\|)\s`[\w/]+\.py`", MAP)) > 80, "functions are told with their files"


def test_the_layers_of_the_map_are_those_of_the_code():
    rows = re.findall(r"^\| (\d+) \| (.*) \|$", MAP, re.MULTILINE)
    assert {name: int(layer) for layer, names in rows for name in re.findall(r"`(\w+)`", names)} == LAYERS


@pytest.mark.parametrize(
    ("wrong", "found_out"),
    [
        (
            ("`corpus/files.py`", "`corpus/flies.py`"),
            lambda page: files_that_are_not_there(page) == {"corpus/flies.py"},
        ),
        (
            ("| `make_plan` | `plan.py` |", "| `make_plans` | `plan.py` |"),
            lambda page: functions_that_are_not_there(page) == {("make_plans", "plan.py")},
        ),
        (
            ("`SampleTable.append` in", "`SampleTable.apend` in"),
            lambda page: functions_that_are_not_there(page) == {("SampleTable.apend", "store/table.py")},
        ),
        (("`estimate", "`guess"), lambda page: missing_modules(page) == {"estimate"}),
    ],
    ids=["file", "function", "method", "module"],
)
def test_a_wrong_name_is_found_out(wrong, found_out):
    assert wrong[0] in MAP
    assert found_out(MAP.replace(*wrong))


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda path: path.name
)
def test_links_between_pages_lead_somewhere(page):
    for link, heading in re.findall(r"\]\(([^)#\s]*)(?:#([\w-]+))?\)", page.read_text("utf-8")):
        if "://" in link:
            continue
        target = page.parent / link if link else page
        assert target.exists(), f"{page.name}: {link}"
        assert not heading or heading in headings(target.read_text("utf-8")), f"{page.name}: {link}#{heading}"


def headings(page: str) -> set[str]:
    """The headings of a page, as links name them."""
    return {
        re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in re.findall(r"^#+ (.*)$", page, re.MULTILINE)
    }


def test_every_page_is_in_the_index_of_pages():
    index = (ROOT / "docs" / "README.md").read_text("utf-8")
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert {page for page in pages if f"]({page})" not in index} == set()


def test_errors_that_the_readme_quotes_are_those_of_the_code():
    """Each part of a message between dots is a text of the code, or stands in one."""
    texts = [
        "…".join(part.value if isinstance(part, ast.Constant) else "" for part in node.values)
        if isinstance(node, ast.JoinedStr)
        else node.value
        for tree in TREES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))
    ]
    rows = re.findall(r"^\| (.*?) \|", section("When it goes wrong"), re.MULTILINE)[2:]
    quoted = [message for row in rows for message in re.findall(r"`([^`]+)`", row)]
    assert len(quoted) >= 15
    parts = [part.strip() for message in quoted for part in message.split("...") if part.strip()]
    assert [part for part in parts if not any(part in text for text in texts)] == []


def test_the_readme_tells_every_variable_of_the_environment_that_is_read():
    read = set()
    for path, text in CODE.items():
        read |= set(re.findall(r"environ(?:\.get|\.setdefault)?[\[(]\s*\"([A-Z][A-Z0-9_]+)\"", text))
        read |= set(re.findall(r"envvar=\"([A-Z_]+)\"", text))
        # Those that are named apart from where they are read.
        if path.name in ("settings.py", "ledger.py", "bucket.py"):
            read |= set(re.findall(r"\"([A-Z]+(?:_[A-Z0-9]+)+)\"", text))
    assert {"RAPIDIN_TOKEN", "RAPIDIN_VDB_CACHE", "AWS_REGION", "SQLITE_TMPDIR"} <= read
    for path in (ROOT / "tests").glob("*.py"):
        read |= set(re.findall(r"\"((?:RAPIDIN|AWS)_[A-Z_]+)\"", path.read_text("utf-8")))
    assert {"RAPIDIN_KILLS", "AWS_SESSION_TOKEN"} <= read, "those of tests too"
    told = section("Environment variables")
    assert {name for name in read if f"`{name}`" not in told} == set()
