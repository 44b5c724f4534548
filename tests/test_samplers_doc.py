"""The example of `docs/samplers.md` is a sampler."""

import re

import pytest
from conftest import ROOT

from spin_trl import Completion
from spin_trl.generation.sampler import CompletionRequest, SamplingParams


EXAMPLE = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "samplers.md").read_text(), re.DOTALL)[1]


@pytest.fixture
def sampler():
    names = {}
    exec(EXAMPLE, names)
    return names["TableSampler"]({(5, 6): [7, 2], (8,): [2]})


def test_example_answers_and_has_defaults_for_the_rest(sampler):
    assert len([line for line in EXAMPLE.splitlines() if line.strip()]) <= 15
    requests = [CompletionRequest((0, 0), [5, 6], seed=1), CompletionRequest((1, 0), [8], seed=2)]
    expected = [Completion((0, 0), [7, 2], "stop"), Completion((1, 0), [2], "stop")]
    sampler.publish(0, None)
    sampler.select(0, None)
    assert list(sampler.sample(requests, SamplingParams(4, (2,)))) == expected
    assert list(sampler.sample_each(requests, SamplingParams(4, (2,))).values()) == [expected]
    assert not sampler.plays_several
    sampler.close()
