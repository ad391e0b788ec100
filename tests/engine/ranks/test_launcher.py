"""What a launcher says of a process is whole and in order, or one line says what is not."""

import os
from unittest import mock

import pytest
import torch
from cdpo.engine.basics.errors import RecipeError
from cdpo.engine.ranks.launch import joined_ranks
from cdpo.engine.ranks.launcher import Launched, launched
from refusals import refused

TWO = {
    "WORLD_SIZE": "2",
    "RANK": "1",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


@pytest.fixture
def environment(monkeypatch):
    def only(variables):
        for name in (*TWO, "LOCAL_SIZE", "LOCAL_WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return only


@pytest.mark.parametrize(
    ("variables", "is_read_as"),
    [
        ({}, Launched()),
        ({"WORLD_SIZE": "1"}, Launched()),
        (TWO, Launched(1, 2, 1, 2)),
        (TWO | {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}, Launched(1, 2, 0, 1)),
    ],
)
def test_one_rank_alone_or_one_of_several(environment, variables, is_read_as):
    environment(variables)
    assert launched() == is_read_as


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
@pytest.mark.parametrize("value", [None, ""])
def test_what_several_ranks_need_and_do_not_have(environment, name, value):
    others = {key: text for key, text in TWO.items() if key != name}
    environment(others if value is None else others | {name: value})
    with refused(RecipeError, "missing", name):
        launched()


@pytest.mark.parametrize("name", ["WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT", "LOCAL_SIZE"])
@pytest.mark.parametrize("value", ["two", "1.5", "-1", "0x1", "1e3", "²", " ", "9" * 5000, "nan"])
def test_no_number(environment, name, value):
    environment(TWO | {name: value})
    with refused(RecipeError, "wrong-type", name):
        launched()


@pytest.mark.parametrize(
    ("variables", "name"),
    [
        (TWO | {"RANK": "2"}, "RANK"),
        (TWO | {"LOCAL_RANK": "2"}, "LOCAL_RANK"),
        (TWO | {"LOCAL_WORLD_SIZE": "1"}, "LOCAL_RANK"),
        (TWO | {"LOCAL_WORLD_SIZE": "3"}, "LOCAL_WORLD_SIZE"),
        (TWO | {"MASTER_PORT": "65536"}, "MASTER_PORT"),
        (TWO | {"MASTER_PORT": "0"}, "MASTER_PORT"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE"),
        ({"RANK": "1"}, "RANK"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT"),
    ],
)
def test_numbers_that_contradict_each_other(environment, variables, name):
    environment(variables)
    with refused(RecipeError, "out-of-range", name):
        launched()


def test_a_group_leaves_the_number_of_threads_as_it_was():
    """Benchmarks join one in a process that goes on, whose results would have other last bits."""
    before = torch.get_num_threads()
    with mock.patch.dict(os.environ), joined_ranks(threads=before + 2):
        assert torch.get_num_threads() == before + 2
    assert torch.get_num_threads() == before
