"""Rows against Redis' records."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.value_store.calibration import Calibration
from services.value_store.table import RECORD, Table, new_record


def test_records_survive_the_way_to_redis_and_back() -> None:
    table = Table()
    ids = [f"{i:016x}" for i in (7, 2**64 - 1, 0)]
    table.put(ids, [new_record(0.5 + i, 1.5, "train" if i else "eval", f"source {i % 2} é", 9.0) for i in range(3)])
    rows = np.arange(3)
    again = Table()
    again.put(ids, table.records(rows, visits=np.array([1, 2, 3]), z_last=np.array([0.1, 0.2, 0.3])))
    assert again.alpha.tolist() == [0.5, 1.5, 2.5]
    assert again.visits.tolist() == [1, 2, 3]
    assert again.z_last.tolist() == [0.1, 0.2, 0.3]
    assert again.version.tolist() == [-1, -1, -1]
    assert [again.id(row) for row in rows] == ids
    assert [again.sources[n] for n in again.source] == ["source 0 é", "source 1 é", "source 0 é"]
    assert again.split.tolist() == [1, 0, 0]
    assert np.isnan(table.z_last).all()
    assert RECORD.itemsize == 41


def test_rows_stay_where_they_are_as_the_table_grows() -> None:
    table = Table()
    for start in range(0, 5000, 700):
        ids = [f"{i:016x}" for i in range(start, start + 700)]
        table.put([*ids, ids[0]], [new_record(1.0 + int(i, 16), 1.0, "train", "s", 0.0) for i in (*ids, ids[0])])
    assert len(table) == 5600
    assert table.row(f"{4321:016x}") == 4321
    assert table.alpha[4321] == 4322.0
    assert table.row("f" * 16) is None


@given(st.lists(st.lists(st.integers(0, 40) | st.integers(2**64 - 9, 2**64 - 1), max_size=12), max_size=12))
def test_the_index_is_a_dictionary(batches: list[list[int]]) -> None:
    table, rows = Table(), dict[int, int]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("services.value_store.table.SORTED_AT_LEAST", 5)
        for batch in batches:
            table.put([f"{i:016x}" for i in batch], [new_record(i + 1.0, 1.0, "train", "s", 0.0) for i in batch])
            for i in batch:
                rows.setdefault(i, len(rows))
            for i in (*range(42), *range(2**64 - 10, 2**64)):
                assert table.row(f"{i:016x}") == rows.get(i)
                assert (f"{i:016x}" in table) == (i in rows)
    assert len(table) == len(rows)
    assert table.id_number.tolist() == list(rows)
    assert table.alpha.tolist() == [i + 1.0 for i in rows]


def test_overwriting_keeps_the_flight() -> None:
    table = Table()
    table.put(["0" * 16], [new_record(1.0, 1.0, "train", "s", 0.0)])
    table.in_flight[0] = True
    table.put(["0" * 16], [new_record(2.0, 1.0, "train", "s", 0.0)])
    assert table.in_flight[0]
    assert table.alpha[0] == 2.0


def test_calibration_by_hand() -> None:
    sums = Calibration().with_evidence(np.array([0.25, 0.29, 1.0]), np.array([0.0, 1.0, 1.0]))
    assert np.isclose(sums.brier or 0.0, (0.25**2 + 0.71**2 + 0.0) / 3)
    low, high = Calibration(sums.pack()).table()
    assert (low["count"], low["v_hat_low"], low["reward_mean"]) == (2, 0.2, 0.5)
    assert (high["count"], high["v_hat_mean"]) == (1, 1.0)
    assert np.isclose(sums.error or 0.0, abs(1.0 - 0.54) / 3)
    assert (Calibration().brier, Calibration().error) == (None, None)
