import csv
import io
import json

import pytest

from lightning_easyscale.simulation.result import JobRecord, Result, percentile


def two_jobs():
    a = JobRecord("a", "w", 2, 0.0, 0.0, 10.0, 8.0, 20.0, 0, 0, ((0.0, (2, 0)), (10.0, None)))
    b = JobRecord("b", "w", 4, 0.0, 5.0, 20.0, 5.0, 45.0, 1, 0, ((5.0, (1, 2)), (10.0, (3, 0)), (20.0, None)))
    return Result("p", ("x", "y"), (4, 2), [a, b], 20.0)


def test_usage_is_the_sum_of_the_jobs():
    times, levels = two_jobs().usage()
    assert times == [0.0, 5.0, 10.0, 20.0]
    assert levels == [(2, 0), (3, 2), (3, 0), (0, 0)]
    assert two_jobs().used_at([-1.0, 7.0, 99.0]) == [(0, 0), (3, 2), (0, 0)]


def test_summary_by_hand():
    summary = two_jobs().summary()
    assert summary["avg_jct_s"] == 15.0
    assert summary["median_jct_s"] == 15.0
    assert summary["avg_queueing_s"] == 2.5
    assert summary["utilisation"] == pytest.approx(65 / 120)
    assert summary["rescales"] == 1
    last = two_jobs()
    last.serving = [(0.0, (1, 0)), (2.0, (0, 0))]
    # until b is submitted at 0 s nothing was there to use; with c at 10 s: 20 + 5 x 3 device-seconds, 2 of serving
    assert summary["total_utilisation_until_last_submission"] == 0.0
    last.records.append(JobRecord("c", "w", 1, 10.0, 10.0, 20.0, 5.0, 10.0, 0, 0, ((10.0, (1, 0)), (20.0, None))))
    found = last.summary()["total_utilisation_until_last_submission"]
    assert found == pytest.approx((20 + 15 + 2) / (10 * 6))
    # demand is 6 of 6 devices until 10 s, then 4: nobody's share is below what it asked for
    assert two_jobs().rho() == [pytest.approx(10 / 8), pytest.approx(20 / 5)]


def test_percentile_interpolates():
    assert percentile([1.0, 2.0, 3.0, 4.0], 0.5) == 2.5
    assert percentile([1.0], 0.95) == 1.0


def test_files_hold_every_job():
    result = two_jobs()
    body = json.loads(result.to_json())
    assert [j["name"] for j in body["jobs"]] == ["a", "b"]
    rows = list(csv.DictReader(io.StringIO(result.to_csv())))
    assert rows[1]["devices"] == "5.000:1/2 10.000:3/0 20.000:-"
