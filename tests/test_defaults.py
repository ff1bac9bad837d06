"""Defaults stand in several places, for Python, the terminal and the server, and are the same in all of them."""

import dataclasses
import inspect

import pytest

import rapidin_vdb
from rapidin_vdb.cli import commands
from rapidin_vdb.database import Database
from rapidin_vdb.question import Question
from rapidin_vdb.reading import SampleReader
from rapidin_vdb.recipe import read_recipe

# What a command calls otherwise than Python does.
NAMES = {"db": "self", "index_name": "index"}


def defaults_of(function) -> dict:
    """Its arguments, without those that gather what is left, with their defaults."""
    return {
        name: parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is not inspect.Parameter.VAR_POSITIONAL
    }


def serve():
    pytest.importorskip("fastapi")
    from rapidin_vdb.web import serve

    return serve


@pytest.mark.parametrize(
    ("command", "function", "of_command", "of_python"),
    [
        (commands.init, lambda: rapidin_vdb.init, {"self"}, {"path"}),
        (commands.ingest, lambda: Database.ingest, {"files"}, {"progress"}),
        (commands.index, lambda: Database.index, set(), {"progress"}),
        (commands.query, lambda: Database.query, {"as_json", "html"}, {"queries", "histogram", "progress"}),
        (commands.delete, lambda: Database.delete, set(), set()),
        (commands.clean, lambda: SampleReader.clean, {"files"}, set()),
        (commands.compare, lambda: Database.compare, {"as_json"}, {"queries", "progress"}),
        (commands.serve, serve, {"self"}, {"database", "say", "opening"}),
    ],
    ids=lambda value: getattr(value, "__name__", None) if inspect.isfunction(value) else None,
)
def test_a_command_has_the_defaults_of_its_function(command, function, of_command, of_python):
    here = {NAMES.get(name, name): value for name, value in defaults_of(command).items() if name not in of_command}
    there = defaults_of(function())
    here, there = (
        {k: v for k, v in side.items() if k not in out} for side, out in ((here, of_command), (there, of_python))
    )
    assert here.keys() == there.keys()
    if command in (commands.query, commands.compare):
        assert (here.pop("focus"), there.pop("focus")) == (None, ()), "both are no focus"
    if command is commands.index:
        assert read_recipe(here.pop("recipe")) == read_recipe(there.pop("recipe"))
    assert here == there


def test_a_question_has_the_defaults_of_a_query():
    asked = {field.name: field.default for field in dataclasses.fields(Question)}
    there = defaults_of(Database.query)
    assert {name: there[name] for name in asked.keys() & there.keys()} == {
        name: value for name, value in asked.items() if name not in ("spans", "most_groups", "most_numbers")
    }


def test_requests_have_the_defaults_of_what_they_ask_for():
    pytest.importorskip("fastapi")
    from rapidin_vdb.web.shapes import GenerateRequest, IngestRequest, Search

    asked = {field.name: field.default for field in dataclasses.fields(Question)}
    search = {name: field.default for name, field in Search.model_fields.items()}
    assert tuple(search["focus"]) == asked["focus"]
    assert search | {"focus": ()} == {name: value for name, value in asked.items() if name in search}
    assert asked.keys() - search.keys() == {"spans", "most_groups", "most_numbers"}
    for shape, function in ((IngestRequest, Database.ingest), (GenerateRequest, Database.generate)):
        there = defaults_of(function)
        for name, field in shape.model_fields.items():
            if name != "records":
                assert field.default == (list(there[name]) if there[name] == () else there[name]), name
