import inspect
from http import HTTPStatus

from libs import errors
from libs.errors import MillraceError

CLASSES = [each for _, each in inspect.getmembers(errors, inspect.isclass) if issubclass(each, MillraceError)]


def test_the_tree_at_the_top_of_the_file_names_every_class():
    for each in CLASSES:
        assert each.__name__ in errors.__doc__


def test_the_tree_at_the_top_of_the_file_names_the_status_of_every_class():
    for each in set(CLASSES) - {MillraceError, errors.ConfigurationError}:
        (line,) = [line for line in errors.__doc__.splitlines() if f" {each.__name__} " in line]
        assert line.endswith(f"· {each.http_status.value}")


def test_what_may_succeed_later_is_retryable_and_nothing_else():
    retryable = {each for each in CLASSES if each.retryable}
    assert retryable == {errors.TransientError, errors.OverloadedError, errors.NotReadyError}


def test_an_error_is_its_message():
    error = errors.NotFoundError("the model 'x' does not exist")
    assert (str(error), error.message, error.http_status) == ("the model 'x' does not exist", error.message, HTTPStatus.NOT_FOUND)
