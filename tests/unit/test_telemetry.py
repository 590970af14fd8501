import json
import logging

import pytest
from opentelemetry.sdk.trace import TracerProvider

from libs import telemetry
from libs.settings import TelemetrySettings

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def lines(capsys):
    """Sets a format; gives what is logged in it."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level

    def configured(log_format: str):
        telemetry._configure_logs("tester", TelemetrySettings(log_format=log_format))
        return lambda: capsys.readouterr().err

    yield configured
    root.handlers[:] = handlers
    root.setLevel(level)


def test_json_lines_carry_the_fields_of_the_line_the_context_and_the_trace(lines):
    logged = lines("json")
    tracer = TracerProvider().get_tracer("test")
    with telemetry.log_context(event_id="e1", model=None), tracer.start_as_current_span("work") as span:
        logging.getLogger("x").info("did %s", "it", extra={"fields": {"duration_s": 0.5}})
    line = json.loads(logged())
    assert line["message"] == "did it"
    assert line["level"] == "INFO"
    assert line["service"] == "tester"
    assert (line["event_id"], line["duration_s"]) == ("e1", 0.5)
    assert line["trace_id"] == f"{span.get_span_context().trace_id:032x}"
    assert "model" not in line


def test_text_lines_are_one_readable_line(lines):
    logged = lines("text")
    with telemetry.log_context(event_id="e1"):
        logging.getLogger("x").warning("careful")
    assert logged().endswith("WARNING tester: careful event_id=e1\n")


@pytest.mark.parametrize("log_format", ["json", "text"])
def test_a_traceback_is_part_of_its_line_or_follows_it(lines, log_format):
    logged = lines(log_format)
    try:
        raise KeyError("gone")
    except KeyError:
        logging.getLogger("x").exception("failed")
    line = logged()
    assert "KeyError: 'gone'" in line
    assert log_format == "text" or "KeyError" in json.loads(line)["exception"]


def test_values_that_are_not_json_are_written_as_text(lines):
    logged = lines("json")
    logging.getLogger("x").info("did it", extra={"fields": {"path": json}})
    assert "module" in json.loads(logged())["path"]


def test_the_libraries_below_are_quiet(lines):
    logged = lines("json")
    for name in ("aiokafka.client", "faust.app", "mode.services", "httpx", "libs.messaging.faust_app"):
        logging.getLogger(name).info("chatter")
    assert logged() == ""


def test_context_ends_with_its_block_and_nests():
    with telemetry.log_context(a="1"):
        with telemetry.log_context(b="2"):
            assert telemetry._log_context.get() == {"a": "1", "b": "2"}
        assert telemetry._log_context.get() == {"a": "1"}
    assert telemetry._log_context.get() == {}


def test_outside_of_a_span_there_is_no_traceparent():
    assert telemetry.current_traceparent() is None


def test_a_span_started_from_a_traceparent_joins_its_trace():
    tracer = TracerProvider().get_tracer("test")
    with tracer.start_as_current_span("work", telemetry.extract(TRACEPARENT)) as span:
        assert f"{span.parent.span_id:016x}" == "b7ad6b7169203331"
        assert telemetry.current_traceparent().startswith("00-0af7651916cd43dd8448eb211c80319c-")


@pytest.mark.parametrize("traceparent", [None, "", "nonsense", TRACEPARENT[:-3], "00-" + "0" * 32 + "-b7ad6b7169203331-01"])
def test_an_invalid_traceparent_is_none(traceparent):
    assert telemetry.checked_traceparent(traceparent) is None


def test_a_valid_traceparent_stays_as_it_is():
    assert telemetry.checked_traceparent(TRACEPARENT) == TRACEPARENT


def test_what_aiokafka_repeats_while_the_broker_is_away_is_left_to_our_own_lines(lines):
    logged = lines("text")
    logging.getLogger("aiokafka.conn").error("Unable connect to node")
    logging.getLogger("libs.messaging.retry").warning("attempt 1 failed")
    assert logged().count("\n") == 1
