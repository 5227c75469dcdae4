"""What is written in one turn of the event loop is one write of the transport, and nothing is lost or turned around."""

import asyncio

import pytest

from mili.server.gathered_writes import GatheredWrites


class Transport:
    """Records what happens to it."""

    def __init__(self) -> None:
        self.calls: list[bytes | str] = []
        self.closing = False

    def write(self, data: bytes) -> None:
        self.calls.append(bytes(data))

    def close(self) -> None:
        self.calls.append("close")
        self.closing = True

    def is_closing(self) -> bool:
        return self.closing

    def pause_reading(self) -> None:
        self.calls.append("pause")


def written(*turns) -> list[bytes | str]:
    """What reaches the transport when `turns` are called one after the other, each in a turn of its own."""
    transport = Transport()

    async def main():
        gathered = GatheredWrites(transport, asyncio.get_running_loop())
        for turn in turns:
            turn(gathered, transport)
            await asyncio.sleep(0)

    asyncio.run(main())
    return transport.calls


def test_the_writes_of_a_turn_are_one():
    def two(gathered, transport):
        gathered.write(b"head ")
        gathered.write(b"body")
        assert not transport.calls

    def one(gathered, transport):
        gathered.write(b"more")

    assert written(two, one) == [b"head body", b"more"]


def test_what_was_written_leaves_before_the_connection_closes():
    def last(gathered, transport):
        gathered.write(b"last")
        gathered.close()
        assert gathered.is_closing()

    assert written(last) == [b"last", "close"]


@pytest.mark.parametrize("sizes", [[70_000], [40_000, 40_000, 5]])
def test_much_is_not_kept_for_the_next_turn(sizes):
    def much(gathered, transport):
        for size in sizes:
            gathered.write(b"x" * size)
        assert len(transport.calls) == 1

    assert b"".join(written(much)) == b"x" * sum(sizes)


def test_nothing_is_written_to_a_connection_that_was_lost():
    def lost(gathered, transport):
        gathered.write(b"late")
        transport.closing = True

    assert written(lost) == []


def test_the_rest_is_the_transports_own():
    assert written(lambda gathered, transport: gathered.pause_reading()) == ["pause"]
