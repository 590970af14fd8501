import asyncio
import os
import signal

import pytest

from libs import lifecycle


class Part:
    """A component that writes down what is done to it."""

    def __init__(self, name: str, journal: list[str], *, start=None, run=None, stop=None) -> None:
        self.name = name
        self._journal = journal
        self._start, self._run, self._stop = start, run, stop

    async def start(self) -> None:
        self._journal.append(f"start {self.name}")
        if self._start is not None:
            await self._start()

    async def run(self) -> None:
        await (self._run or asyncio.Event().wait)()

    async def stop(self) -> None:
        self._journal.append(f"stop {self.name}")
        if self._stop is not None:
            await self._stop()


async def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.Event().wait()


async def fails() -> None:
    raise KeyError("broken")


async def run(*parts, **options) -> None:
    async with asyncio.timeout(5):
        await lifecycle.run(parts, **options)


async def test_components_start_in_order_and_stop_in_reverse_on_sigterm():
    journal: list[str] = []
    await run(Part("a", journal), Part("b", journal, run=terminate))
    assert journal == ["start a", "start b", "stop b", "stop a"]


async def test_a_component_that_fails_to_start_stops_those_before_it_and_itself():
    journal: list[str] = []
    with pytest.raises(KeyError, match="broken"):
        await run(Part("a", journal), Part("b", journal, start=fails), Part("c", journal))
    assert journal == ["start a", "start b", "stop b", "stop a"]


async def test_a_component_that_ends_ends_the_process_with_its_error():
    journal: list[str] = []
    with pytest.raises(KeyError, match="broken"):
        await run(Part("a", journal, run=fails), Part("b", journal))
    assert journal[-2:] == ["stop b", "stop a"]


async def test_a_component_that_fails_while_another_starts_is_noticed():
    journal: list[str] = []
    with pytest.raises(KeyError, match="broken"):
        await run(Part("a", journal, run=fails), Part("b", journal, start=asyncio.Event().wait))
    assert journal == ["start a", "start b", "stop b", "stop a"]


async def test_a_signal_during_the_start_stops_what_was_started():
    journal: list[str] = []
    await run(Part("a", journal), Part("b", journal, start=terminate), Part("c", journal))
    assert journal == ["start a", "start b", "stop b", "stop a"]


async def test_a_component_that_fails_to_stop_does_not_keep_the_others_from_stopping(caplog):
    journal: list[str] = []
    await run(Part("a", journal), Part("b", journal, run=terminate, stop=fails))
    assert journal[-2:] == ["stop b", "stop a"]
    assert "Part did not stop cleanly" in caplog.text


async def test_stop_is_called_while_run_still_runs():
    working = asyncio.Event()

    async def work() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        try:
            await asyncio.Event().wait()
        finally:
            working.set()

    async def stop() -> None:
        assert not working.is_set()

    await run(Part("a", [], run=work, stop=stop))
    assert working.is_set()


async def test_the_ready_file_holds_the_process_id_while_all_run_and_is_gone_afterwards(tmp_path):
    ready, seen = tmp_path / "run" / "ready", []

    async def look() -> None:
        while not ready.exists():  # noqa: ASYNC110 - files have no event
            await asyncio.sleep(0)
        seen.append(ready.read_text())
        await terminate()

    await run(Part("a", [], run=look), ready_file=ready)
    assert seen == [str(os.getpid())]
    assert not ready.exists()


async def test_a_process_that_does_not_get_ready_writes_no_ready_file(tmp_path):
    ready = tmp_path / "ready"
    with pytest.raises(KeyError):
        await run(Part("a", [], start=fails), ready_file=ready)
    assert not ready.exists()
