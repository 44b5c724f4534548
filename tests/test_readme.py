"""The README tells the truth about the code."""

import re
from dataclasses import fields

from conftest import ROOT
from trl import DPOConfig

from spin_trl import SPINConfig


README = (ROOT / "README.md").read_text()


def documented_fields() -> dict[str, str]:
    """Default, as written in the README's table, by field."""
    section = README.split("## Configuration")[1].split("\n## ")[0]
    return dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", section, re.MULTILINE))


def test_table_lists_every_new_field_with_its_default():
    inherited = {field.name for field in fields(DPOConfig)}
    new = {field.name: field.default for field in fields(SPINConfig) if field.name not in inherited}
    documented = documented_fields()
    assert set(documented) == set(new)
    for name, default in new.items():
        written = "unset" if default is None else f"`{default!r}`"
        assert documented[name] == written, name


def test_every_make_target_and_file_it_names_exists():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:^|`)make ([a-z-]+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for path in re.findall(r"(?:recipes|benchmarks|scripts)/[\w./-]+\.(?:py|yaml|sh)", README):
        assert (ROOT / path).is_file(), path


def test_its_example_is_the_one_that_is_tested():
    example = README.split("```python\n")[1].split("```")[0]
    tested = (ROOT / "tests" / "test_vllm_server.py").read_text()
    for line in ("from spin_trl import SPINConfig, SPINTrainer", "trainer.train()", "prompt + completion"):
        assert line in example and line in tested
