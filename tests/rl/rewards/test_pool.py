"""Make scorers fail in every way, each in a real process. One pool serves most tests: a process
costs more than a test."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from blip3o_jax.config import RewardConfig, UserError
from blip3o_jax.rl.rewards.pool import BREAKER, CHUNK, PoolResult, RewardPool, check_failed

ROOT = pathlib.Path(__file__).parents[3]
OBEDIENT = RewardConfig("python:tests.rl.rewards.scorers.obedient", weight=2.0)
# Long enough that no sound scorer is taken for a hung one on a busy machine, short enough to wait
# for.
TIMEOUT = 1.0


@pytest.fixture(scope="module")
def pool():
    with RewardPool((OBEDIENT,), workers=2, timeout=TIMEOUT) as pool:
        yield pool


def images(count: int) -> np.ndarray:
    """Return images of which image i is i everywhere: its brightness is i / 255."""
    return np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, 8, 8, 3))


def score(pool: RewardPool, what: dict[int, dict], count: int = 6) -> PoolResult:
    metadata = [what.get(i, {}) for i in range(count)]
    return pool.submit(images(count), ["x" * i for i in range(count)], metadata).result()


def assert_others_are_scored(result: PoolResult, *failed: int) -> None:
    count = len(result.total_B)
    wanted = 2.0 * np.arange(count, dtype=np.float32) / 255
    wanted[list(failed)] = 0
    np.testing.assert_array_equal(result.failed_B, [i in failed for i in range(count)])
    np.testing.assert_allclose(result.total_B, wanted, rtol=1e-6)  # one rounding to float32
    assert result.failed_B.mean() == len(failed) / count and sum(result.reasons.values()) == len(
        failed
    )


def test_scores_come_back_in_order_whoever_scored_them(pool):
    result = score(pool, {}, count=4 * CHUNK + 1)
    assert_others_are_scored(result)
    np.testing.assert_array_equal(result.parts["obedient/length"], np.arange(4 * CHUNK + 1))
    np.testing.assert_allclose(result.parts["obedient"] * 2, result.total_B, rtol=1e-6)
    assert (
        result.reasons == {}
        and 0 < result.seconds["median"] <= result.seconds["max"] < result.seconds["total"]
    )


def test_submitting_does_not_wait(pool):
    """Check that the scores of one rollout do not wait for those of another."""
    hung = pool.submit(images(1), [""], [{"do": "hang"}])
    assert_others_are_scored(score(pool, {}))
    assert not hung.done()
    assert hung.result().failed_B.all()


@pytest.mark.parametrize(
    ("do", "reason"),
    [
        ("hang", f"obedient: took longer than {TIMEOUT:g} s an image"),
        ("crash", "obedient: ended its process (exit code 3)"),
        ("raise", "obedient: RuntimeError: no mood"),
        ("nan", "obedient: its score is nan"),
        ("huge", "obedient: its score is beyond 1e+06; set clip if that is meant"),
        ("short", "obedient: ValueError: returned scores of shape [0] for 1 images"),
    ],
)
def test_one_bad_image_fails_alone(pool, do, reason):
    result = score(pool, {1: {"do": do}})
    assert_others_are_scored(result, 1)
    assert result.reasons == {reason: 1}
    # Alone the others of its chunk were scored after all.
    assert np.isnan(result.parts["obedient/length"]).tolist() == [
        i == 1 and do not in ("nan", "huge") for i in range(6)
    ]


def test_what_fails_once_is_scored_again(pool, tmp_path):
    result = score(pool, {0: {"do": "once", "path": str(tmp_path / "done")}})
    assert_others_are_scored(result)
    assert (tmp_path / "done").exists()


def test_a_hung_scorer_is_killed(pool):
    """Check that the process is killed, and another one replaces it."""
    assert_others_are_scored(score(pool, {}))
    before = processes_of(os.getpid())
    assert score(pool, {0: {"do": "hang"}}, count=1).failed_B.all()
    assert_others_are_scored(score(pool, {}))
    after = processes_of(os.getpid())
    assert len(before) == len(after) == 2 and len(before - after) >= 1


def test_a_scorer_that_only_fails_is_given_up(pool, tmp_path):
    """Check that each chunk is tried once until the breaker opens. Chunks that were sent before are
    still answered."""
    chunks = 8 * BREAKER
    result = score(pool, {i: {"do": "raise"} for i in range(chunks * CHUNK)}, count=chunks * CHUNK)
    assert result.failed_B.all()
    given_up = result.reasons[f"given up: {BREAKER} chunks in a row failed"]
    assert given_up >= (chunks - BREAKER - 2) * CHUNK
    # In the next rollout an image is tried again as ever.
    assert_others_are_scored(
        score(pool, {0: {"do": "once", "path": str(tmp_path / "done")}}, count=1)
    )


def test_a_share_of_failures_stops_the_run():
    reasons = {"a: b": 1, "c: d": 2}
    failed_B = np.arange(10) < 3
    check_failed(failed_B, reasons, 0.3)
    with pytest.raises(UserError) as e:
        check_failed(failed_B, reasons, 0.29)
    assert str(e.value) == (
        "3 of 10 images have no reward, a larger fraction than rl.max_failed_fraction=0.29: 2 x c: "
        "d; 1 x a: b"
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("python:tests.rl.rewards.scorers.nothing", "has no function nothing"),
        ("shpes", "unknown reward 'shpes': did you mean shapes?"),
    ],
)
def test_a_reward_that_cannot_be_made_stops_the_run_with_its_message(name, message):
    with RewardPool((RewardConfig(name),), workers=1) as pool:
        with pytest.raises(UserError, match=message):
            pool.check([("a", {})])
        with pytest.raises(UserError, match=message):
            pool.submit(images(1), [""], [{}]).result()


def test_processes_that_end_while_they_start_stop_the_run():
    with (
        RewardPool(
            (RewardConfig("python:tests.rl.rewards.ends_when_imported.score"),), workers=1
        ) as pool,
        pytest.raises(UserError, match="processes of reward score end while they start"),
    ):
        pool.submit(images(1), [""], [{}]).result()


def test_processes_that_hang_while_they_start_stop_the_run():
    reward = RewardConfig("python:tests.rl.rewards.hangs_when_imported.score")
    with (
        RewardPool((reward,), workers=1, timeout=0.1, start_timeout=1.0) as pool,
        pytest.raises(UserError, match="no process of reward score has started within 1 s"),
    ):
        pool.submit(images(1), [""], [{}]).result()


def test_an_idle_process_that_is_killed_is_replaced(pool):
    """Kill it from outside, as the system does for lack of memory."""
    assert_others_are_scored(score(pool, {}))
    for pid in processes_of(os.getpid()):
        os.kill(pid, signal.SIGKILL)
    assert_others_are_scored(score(pool, {}))


def processes_of(parent: int) -> set[int]:
    """Return the children of a process that were spawned to work, without resource trackers."""
    found = set()
    for status in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
            command = (status.parent / "cmdline").read_bytes()
        except OSError:  # it has ended meanwhile
            continue
        if int(fields[1]) == parent and fields[0] != "Z" and b"spawn_main" in command:
            found.add(int(status.parent.name))
    return found


SCRIPT = """
import sys
import numpy as np
from blip3o_jax.config import RewardConfig
from blip3o_jax.rl.rewards.pool import RewardPool

if __name__ == "__main__":
    pool = RewardPool((RewardConfig("python:tests.rl.rewards.scorers.obedient"),), workers=2)
    pool.check([("a", {})])
    pending = pool.submit(np.zeros((8, 8, 8, 3), np.uint8), ["a"] * 8, [{"do": "hang"}] * 8)
    print("hanging", flush=True)
    if sys.argv[1] == "raise":
        sys.stdin.readline()
        raise RuntimeError("a bug")
    pending.result()
"""


@pytest.mark.parametrize("end", ["kill", "raise"])
def test_no_process_outlives_the_run(end, tmp_path):
    """Check it while all of them hang in a scorer."""
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    run = subprocess.Popen(
        [sys.executable, script, end],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert run.stdout.readline() == "hanging\n"
    workers = processes_of(run.pid)
    assert len(workers) == 2
    if end == "kill":
        run.kill()
    run.communicate("\n", timeout=20)
    deadline = time.monotonic() + 10
    while (
        any(pathlib.Path(f"/proc/{pid}").exists() for pid in workers)
        and time.monotonic() < deadline
    ):
        time.sleep(0.05)
    assert not any(pathlib.Path(f"/proc/{pid}").exists() for pid in workers)


def test_images_prompts_and_metadata_belong_together(pool):
    with pytest.raises(ValueError, match="2 images, 1 prompts, 2 metadata"):
        pool.submit(images(2), [""], [{}, {}])


def test_the_processes_start_light():
    """Check that they have no jax, no accelerator for it if a reward imports it, and one thread
    each."""
    with RewardPool((RewardConfig("python:tests.rl.rewards.scorers.light"),), workers=1) as pool:
        result = pool.submit(images(1), [""], [{}]).result()
    assert result.reasons == {} and result.total_B.tolist() == [1.0]
