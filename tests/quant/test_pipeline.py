"""Reading ahead keeps the order, writing behind keeps its promises, and an error on any side ends both."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from lightship.quant.journal import Journal
from lightship.quant.layout import Shards
from lightship.quant.pipeline import WAITING, Tensors, Writer, cached_ahead, read_ahead
from lightship.quant.plan import PlannedOutput

pytestmark = pytest.mark.timeout(20)
COUNT = 4 * WAITING


class BrokenError(Exception):
    """What the tests plant."""


@pytest.fixture
def work(tmp_path: Path) -> Iterator[tuple[Shards, Journal]]:
    shards = Shards(tmp_path / "result", [PlannedOutput(f"t{i}", "F32", (4,)) for i in range(COUNT)], 64)
    shards.reserve()
    journal = Journal(tmp_path)
    yield shards, journal
    shards.close()
    journal.close()


def tensor(number: int) -> Tensors:
    return [(f"t{number}", torch.full((4,), float(number)))]


def broken_tensor() -> Tensors:
    yield from tensor(0)
    raise BrokenError


def test_reads_come_in_order_whichever_ends_first() -> None:
    def read(key: int) -> int:
        time.sleep(0.01 * (key % 3))
        return key * key

    assert list(read_ahead(read, range(20))) == [(key, key * key) for key in range(20)]


def test_reads_are_under_way_before_they_are_asked_for() -> None:
    second = threading.Event()

    def read(key: int) -> int:
        if key == 0:
            assert second.wait(5), "the second read begins only after the first"
        second.set()
        return key

    assert [key for key, _ in read_ahead(read, range(3))] == [0, 1, 2]


def test_a_failed_read_is_raised_at_its_place() -> None:
    def read(key: int) -> int:
        if key == 5:
            raise BrokenError
        return key

    pairs = read_ahead(read, range(50))
    assert [next(pairs) for _ in range(5)] == [(key, key) for key in range(5)]
    with pytest.raises(BrokenError):
        next(pairs)


def test_after_a_flush_everything_is_written_and_journaled_in_order(
    work: tuple[Shards, Journal], tmp_path: Path
) -> None:
    shards, journal = work
    with Writer(shards, journal) as writer:
        for number in range(COUNT):
            writer.put(f"u{number}", tensor(number))
        writer.flush()
        assert list(Journal(tmp_path).done) == [f"u{n}" for n in range(COUNT)]
    assert all(shards.read(f"t{n}").eq(n).all() for n in range(COUNT))


def test_a_unit_is_journaled_after_its_tensors_are_on_the_disk(
    work: tuple[Shards, Journal], monkeypatch: pytest.MonkeyPatch
) -> None:
    shards, journal = work
    deeds: list[str] = []
    for target, name in ((shards, "write"), (shards, "sync"), (journal, "append")):
        do = getattr(target, name)

        def noted(*args: object, do: Callable[..., object] = do, name: str = name) -> object:
            deeds.append(name)
            return do(*args)

        monkeypatch.setattr(target, name, noted)
    with Writer(shards, journal) as writer:
        writer.put("u", tensor(0))
    assert deeds == ["write", "sync", "append"]


def test_a_failed_write_is_raised_and_its_unit_is_not_journaled(work: tuple[Shards, Journal], tmp_path: Path) -> None:
    def use() -> None:
        with Writer(*work) as writer:
            writer.put("good", tensor(1))
            writer.flush()
            writer.put("bad", broken_tensor())
            for number in range(COUNT):
                writer.put(f"after {number}", tensor(number))

    with pytest.raises(BrokenError):
        use()
    assert "good" in Journal(tmp_path).done
    assert "bad" not in Journal(tmp_path).done


@pytest.mark.parametrize("flush", [True, False], ids=["by flush", "when the context is left"])
def test_a_failed_write_is_raised_at_the_latest(work: tuple[Shards, Journal], flush: bool) -> None:
    after: list[str] = []

    def use() -> None:
        with Writer(*work) as writer:
            writer.put("bad", broken_tensor())
            if flush:
                writer.flush()
            after.append("reached")

    with pytest.raises(BrokenError):
        use()
    assert bool(after) is not flush


def test_a_failed_computation_ends_the_writer(work: tuple[Shards, Journal]) -> None:
    def use() -> None:
        with Writer(*work) as writer:
            writer.put("u", tensor(0))
            raise BrokenError

    with pytest.raises(BrokenError):
        use()
    assert not {thread.name for thread in threading.enumerate()} & {"write", "sync"}


def test_what_comes_before_and_after_a_unit_is_done_in_its_place(work: tuple[Shards, Journal], tmp_path: Path) -> None:
    shards, journal = work
    journaled: dict[str, bool] = {}

    def noted(when: str) -> Callable[[], None]:
        return lambda: journaled.update({when: "u" in Journal(tmp_path).done})

    with Writer(shards, journal) as writer:
        writer.put("u", tensor(0), before=noted("before"), after=noted("after"))
    assert journaled == {"before": False, "after": True}


def test_a_failure_before_a_unit_keeps_it_out_of_the_journal(work: tuple[Shards, Journal], tmp_path: Path) -> None:
    def fail() -> None:
        raise BrokenError

    with pytest.raises(BrokenError), Writer(*work) as writer:
        writer.put("u", tensor(0), before=fail)
    assert "u" not in Journal(tmp_path).done


def test_many_units_share_one_wait_for_the_disk(work: tuple[Shards, Journal], monkeypatch: pytest.MonkeyPatch) -> None:
    shards, journal = work
    synced: list[int] = []
    monkeypatch.setattr(shards, "sync", lambda names: synced.append(len(names)))
    with Writer(shards, journal) as writer:
        for number in range(COUNT):
            writer.put(f"u{number}", tensor(number))
    assert sum(synced) == COUNT
    assert len(synced) <= 3, "the first, those that came meanwhile, and at the end those that were left"


def test_a_flush_does_not_wait_for_more_units(work: tuple[Shards, Journal], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightship.quant.pipeline.SYNC_SECONDS", 60.0)
    with Writer(*work) as writer:
        for number in range(3):
            writer.put(f"u{number}", tensor(number))
            writer.flush()


def test_what_is_read_into_the_cache_is_read_meanwhile_and_ends_with_its_context() -> None:
    read: list[int] = []
    begun = threading.Event()

    def note(key: int) -> None:
        read.append(key)
        begun.set()
        time.sleep(0.001)

    with cached_ahead(note, range(100_000)):
        assert begun.wait(5), "nothing is read while the context is open"
    count = len(read)
    assert 0 < count < 100_000
    time.sleep(0.05)
    assert len(read) == count


def test_a_failure_to_read_into_the_cache_is_raised() -> None:
    def fail(_: int) -> None:
        raise BrokenError

    with pytest.raises(BrokenError), cached_ahead(fail, range(1000)):
        time.sleep(0.1)
