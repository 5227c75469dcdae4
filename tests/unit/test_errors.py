"""The exception tree is what its docstring draws."""

import inspect

import pytest

from mili import errors
from mili.errors import (
    ConfigError,
    EngineDeadError,
    MiliError,
    QueueFullError,
    RequestError,
    UnsupportedModelError,
    WeightError,
)

TREE = {
    MiliError: (Exception,),
    ConfigError: (MiliError, ValueError),
    UnsupportedModelError: (ConfigError,),
    WeightError: (MiliError,),
    RequestError: (MiliError, ValueError),
    QueueFullError: (MiliError,),
    EngineDeadError: (MiliError,),
}


@pytest.mark.parametrize("error", TREE, ids=lambda e: e.__name__)
def test_bases(error: type[Exception]) -> None:
    assert error.__bases__ == TREE[error]


def test_tree_is_complete_and_drawn() -> None:
    defined = {cls for _, cls in inspect.getmembers(errors, inspect.isclass) if cls.__module__ == errors.__name__}
    assert defined == set(TREE)
    assert errors.__doc__ is not None
    assert all(cls.__name__ in errors.__doc__ for cls in defined)


def test_a_weight_error_is_not_a_value_error() -> None:
    assert not issubclass(WeightError, ValueError)
