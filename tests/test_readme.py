"""The README and the pages in `docs/` tell the truth about the code."""

import re
import runpy
from dataclasses import fields

import pytest
from conftest import ROOT
from trl import DPOConfig

from spin_trl import SPINConfig


README = (ROOT / "README.md").read_text()
CONFIGURATION = (ROOT / "docs" / "configuration.md").read_text()
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
}


def test_every_new_field_is_documented_with_its_default_as_the_docstring_says_it():
    inherited = {field.name for field in fields(DPOConfig)}
    new = {field.name: field.default for field in fields(SPINConfig) if field.name not in inherited}
    documented = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", CONFIGURATION, re.MULTILINE))
    assert set(documented) == set(new)
    for name, default in new.items():
        written = "unset" if default is None else f"`{default!r}`"
        assert documented[name] == written, name
    page = runpy.run_path(str(ROOT / "scripts" / "document_fields.py"))["rewritten"](CONFIGURATION)
    assert page == CONFIGURATION, "run `make docs`"


@pytest.mark.parametrize("page", PAGES)
def test_every_make_target_and_file_that_a_page_names_exists(page):
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:^|`)make ([a-z-]+)", PAGES[page], re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for path in re.findall(r"(?:recipes|benchmarks|scripts|docs|tests)/[\w./-]+\.(?:py|yaml|sh|md)", PAGES[page]):
        assert (ROOT / path).is_file(), path


def test_every_file_of_the_package_that_contributors_are_sent_to_exists():
    package = ROOT / "spin_trl"
    rooms = "|".join(path.name for path in package.iterdir() if path.is_dir())
    named = re.findall(rf"`((?:{rooms})/[\w/.]*)`", PAGES["docs/contributing.md"] + README)
    assert len(set(named)) > 10
    assert [path for path in named if not (package / path).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_link_to_another_page_leads_somewhere(page):
    """Links within the repository: the file exists, and the heading too where one is named."""
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", PAGES[page]):
        path, _, anchor = target.partition("#")
        linked = (ROOT / page).parent / path if path else ROOT / page
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}, (
                target
            )


def test_readme_is_read_in_one_sitting_and_every_page_is_in_the_table_of_contents():
    assert len(README.splitlines()) <= 200
    contents = re.findall(r"\]\(([\w/.]+\.md)\)", PAGES["docs/README.md"])
    assert {f"docs/{path}" for path in contents if "/" not in path} == {
        page for page in PAGES if page.startswith("docs/") and page != "docs/README.md"
    }
