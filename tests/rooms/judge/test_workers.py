"""Workers: a verifier that hangs, dies or raises costs its own answer only."""

import os
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surpass.judge.workers import WorkerPool

TARGET = f"{Path(__file__).parent / 'misbehaving.py'}:verify"


def test_a_hanging_verifier_is_killed_and_the_others_go_on():
    pool = WorkerPool(TARGET, workers=2, time_limit=1.0)
    texts = ["1", "hang", "2", "sleep", "1"]
    outcomes = pool.run([(text, 1) for text in texts])
    assert [o.score for o in outcomes] == [1.0, None, 0.0, None, 1.0]
    assert [o.failure for o in outcomes] == [None, "timeout", None, "timeout", None]
    assert "within 1.0 seconds" in outcomes[1].message
    pool.close()


def test_a_dying_or_raising_verifier_is_an_error_with_its_story():
    pool = WorkerPool(TARGET, time_limit=20.0, memory_limit=1 << 30)
    outcomes = pool.run([(text, "x") for text in ("die", "raise", "nan", "memory", "x")])
    assert [o.failure for o in outcomes] == ["error"] * 4 + [None]
    assert "exit status 7" in outcomes[0].message
    assert "KeyError: 'no such thing'" in outcomes[1].message
    assert "returned nan" in outcomes[2].message
    assert "MemoryError" in outcomes[3].message
    assert outcomes[4].score == 1.0
    pool.close()


def test_workers_are_reused_and_other_processes():
    pool = WorkerPool(TARGET)
    first, second = (pool.run([("pid", None)])[0].score for _ in range(2))
    assert first == second
    assert first != os.getpid()
    pool.close()
    assert pool.run([("pid", None)])[0].score != first
    pool.close()


def test_works_off_the_main_thread():
    pool, outcomes = WorkerPool(TARGET, time_limit=1.0), []
    thread = threading.Thread(target=lambda: outcomes.extend(pool.run([("hang", 1), ("1", 1)])))
    thread.start()
    thread.join()
    assert [o.failure for o in outcomes] == ["timeout", None]
    pool.close()


@pytest.fixture(scope="module")
def pool():
    pool = WorkerPool(TARGET, workers=2, time_limit=30.0)
    yield pool
    pool.close()


@settings(max_examples=15, deadline=None)
@given(
    st.lists(
        st.tuples(st.text(max_size=5).filter(lambda t: not t.isascii() or t.isspace()), st.booleans()),
        max_size=20,
    )
)
def test_order_and_text_survive(pool, cases):
    outcomes = pool.run([(text, text if right else text + "!") for text, right in cases])
    assert [o.score for o in outcomes] == [float(right) for _, right in cases]


def test_long_completions_pass_the_pipe(pool):
    text = "é" * 300_000
    assert [o.score for o in pool.run([(text, text), (text, "")])] == [1.0, 0.0]


def test_a_verifier_that_cannot_be_imported_stops_at_once(tmp_path):
    with pytest.raises(RuntimeError, match=r"(?s)exit status 1.*there is no file .*no\.py"):
        WorkerPool(f"{tmp_path / 'no.py'}:verify").run([("a", "b")])


def test_unusable_settings():
    with pytest.raises(ValueError, match="at least one worker"):
        WorkerPool(TARGET, workers=0)
    with pytest.raises(ValueError, match="must be positive"):
        WorkerPool(TARGET, time_limit=0)
