"""Imports between the rooms of the package run one way: down the table in `scripts/rooms.py`, never up or around."""

import sys
from graphlib import TopologicalSorter

import pytest
from conftest import ROOT


sys.path.insert(0, str(ROOT / "scripts"))  # scripts, not a package

from rooms import FLOORS, PACKAGE, files, imports_of, name_of, upward_imports  # noqa: E402


@pytest.mark.parametrize("file", files(), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_only_rooms_below_its_own(file):
    own = name_of(file).split(".")[0]
    assert not own or own in FLOORS, f"{own} has no line in the table of rooms: give it one"
    upward = upward_imports(file)
    assert not upward, f"{own} lies below what it imports: {sorted(upward)}"


def test_files_import_each_other_in_no_circle():
    TopologicalSorter({name_of(file): imports_of(file) for file in files() if name_of(file)}).prepare()
