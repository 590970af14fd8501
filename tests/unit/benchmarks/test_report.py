import pytest

from benchmarks.figures import Load
from benchmarks.report import documented, goals, memory_growth_percent, tables
from benchmarks.results import Cost, Memory, Overload, PeerResult, Results, read, write


def load(per_s, p50=1.0, p99=2.0, errors=0):
    return Load(per_s, p50, p99, 1_000, errors)


def peer(**loads):
    return PeerResult("A server", "2026-01-01", {point.replace("_", "-"): [each] for point, each in loads.items()})


def line(results, what):
    (found,) = [each for each in goals(results) if each.what.startswith(what)]
    return found


def test_a_ratio_is_reached_at_its_target():
    results = Results(peers={"millrace": peer(iris_32=load(6_000)), "fastapi": peer(iris_32=load(1_000))})
    found = line(results, "requests/s, 32, to FastAPI")
    assert (found.figure, found.reached) == ("6.0 ×", True)


def test_a_ratio_below_its_target_is_not_reached():
    results = Results(peers={"millrace": peer(iris_128=load(3_400)), "asgi": peer(iris_128=load(10_000))})
    found = line(results, "requests/s, 128, to a bare ASGI")
    assert (found.figure, found.reached) == ("34 %", False)


def test_what_was_not_measured_is_neither_reached_nor_missed():
    assert {each.reached for each in goals(Results())} == {None}


def test_p99_is_compared_with_the_best_server_that_has_a_model():
    results = Results(
        peers={
            "millrace": peer(iris_32=load(1, p99=5.0)),
            "kserve": peer(iris_32=load(1, p99=20.0)),
            "bentoml": peer(iris_32=load(1, p99=4.0)),
            "asgi": peer(iris_32=load(1, p99=1.0)),
        }
    )
    found = line(results, "p99")
    assert (found.reached, "bentoml" in found.figure) == (False, True)


def test_rows_are_compared_with_the_fastest_protocol_of_mlserver():
    results = Results(peers={"millrace": peer(rows_binary=load(1_000)), "mlserver": peer(rows_json=load(100), rows_grpc=load(250))})
    found = line(results, "rows/s")
    assert (found.figure, found.reached) == ("4.0 × (grpc)", False)


def test_the_cost_is_between_medians():
    results = Results(cost=[Cost("iris-32", [88.0, 90.0, 10.0], [100.0, 99.0, 101.0])])
    found = line(results, "cost")
    assert (found.figure, found.reached) == ("12.0 %", True)


def test_memory_that_grows_in_the_first_minute_only_is_flat():
    samples = [(float(second), 100 + min(second, 55)) for second in range(0, 601, 2)]
    assert memory_growth_percent(samples) == 0


def test_memory_that_goes_on_growing_is_seen():
    samples = [(float(second), 1_000 + second) for second in range(0, 601, 2)]
    growth = memory_growth_percent(samples)
    assert growth == pytest.approx(100 * (1_570 / 1_090 - 1), abs=0.5)
    assert line(Results(memory=Memory(samples)), "gateway memory").reached is False


def test_goodput_is_compared_for_each_deadline():
    def found(times, deadline_ms, answered):
        return Overload(times, deadline_ms, 100 * times, answered, 0, 0, 1, 2)

    results = Results(overload=[found(1.0, 0, 100), found(3.0, 0, 95), found(1.0, 1_000, 100), found(3.0, 1_000, 80)])
    assert line(results, "goodput at 3 × capacity to goodput at capacity, default deadline").reached is True
    assert line(results, "goodput at 3 × capacity to goodput at capacity, deadline 1000 ms").reached is False


def test_a_server_that_cannot_be_measured_stands_in_the_table_with_its_reason():
    results = Results(peers={"kserve": PeerResult("KServe", "2026-01-01", problem="no network")})
    rows = [row for table in tables(results) for row in table.rows]
    assert any(row[:2] == ["KServe", "no network"] for row in rows)


def test_errors_stand_beside_the_figure_they_spoil():
    results = Results(peers={"kserve": peer(iris_32=load(1_234, errors=7))})
    cells = [cell for table in tables(results) for row in table.rows for cell in row]
    assert "1 234 · 1.00 ms · 2.00 ms · 7 errors" in cells


def test_a_page_keeps_what_is_around_the_figures():
    page = "before <!-- figures -->old<!-- /figures --> after"
    written = documented(page, Results(peers={"kserve": peer(iris_32=load(1))}))
    assert written.startswith("before ")
    assert written.endswith(" after")
    assert "old" not in written
    assert documented(written, Results()) == documented(page, Results())


def test_a_page_without_marks_is_refused():
    with pytest.raises(ValueError, match="figures"):
        documented("nothing", Results())


def test_what_is_kept_is_read_again(tmp_path):
    results = Results(
        machine="two cores",
        peers={"kserve": peer(iris_32=load(1))},
        cost=[Cost("iris-32", [1.0], [2.0])],
        memory=Memory([(0.0, 1), (2.0, 2)]),
        measured_at={"peers": "2026-01-01"},
    )
    write(tmp_path / "results.json", results)
    assert read(tmp_path / "results.json") == results


def test_no_file_holds_no_results(tmp_path):
    assert read(tmp_path / "none.json") == Results()
