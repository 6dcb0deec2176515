"""The examples in docstrings give what they say."""

import doctest
import importlib
import pkgutil

import pytest

import weightproof
import weightproof_callbacks

MODULES = sorted(
    module.name
    for package in (weightproof, weightproof_callbacks)
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0


def test_there_are_examples():
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = [test for name in MODULES for test in finder.find(importlib.import_module(name)) if test.examples]
    assert len(found) >= 8
