"""The reading loop under junk: rests, who goes first when it is too much, what is dropped."""

import os
import select
import selectors
import socket
import time
import unittest
from typing import Any, Dict, List, Tuple
from unittest import mock

import spa_server as server
from tests.test_knock import knock
from tests.test_knock_open import ALL_THREE, KEYLESS
from tests.test_packet import Sender
from tests.test_server import KEYS, Clock, ServerCase, datagram


class EarsTest(unittest.TestCase):
    """How long the captures rest, and what still wakes the server."""

    def setUp(self) -> None:
        """Make one, with a clock that is moved by hand."""
        self.clock = Clock()
        others = selectors.DefaultSelector()
        self.ears = server.Ears(others, self.clock.clocks())
        for each in (others, self.ears.captures):
            self.addCleanup(each.close)

    def rest(self, junk: int) -> None:
        """Let the captures rest after so much junk, read now."""
        self.ears.woken = self.clock.mono_time
        self.ears.rest(junk)

    def rests(self, rate: float, seconds: float) -> Tuple[int, float]:
        """Return how often the server wakes up for junk that comes evenly, and the last rest."""
        begin = now = self.clock.mono_time
        read = wakes = 0
        while now < begin + seconds:
            waiting = int((now - begin) * rate) - read
            if not waiting:
                now = max(begin + (read + 1) / rate + 1e-6, now)
                continue
            self.clock.pass_seconds(now - self.clock.mono_time)
            self.rest(waiting)
            read, wakes, now = read + waiting, wakes + 1, max(self.ears.rest_end, now)
        return wakes, self.ears.rest_end - self.clock.mono_time

    def test_length(self) -> None:
        """None for little junk; 30 ms at most, and less if the socket's buffer would be full."""
        for rate, most_wakes, rest in ((1, 5, 0.0), (40, 200, 0.0), (100, 230, 0.03),
                                       (1000, 200, 0.03), (10000, 180, 0.03), (100000, 350, 0.015)):
            with self.subTest(rate=rate):
                self.clock.pass_seconds(60)
                wakes, last = self.rests(rate, 5)
                self.assertLessEqual(wakes, most_wakes)
                self.assertAlmostEqual(rest, max(last, 0.0), delta=0.002)
                self.clock.pass_seconds(0.85)
                self.rest(1)
                self.assertLessEqual(self.ears.rest_end, self.clock.mono_time, "quiet again")

    def test_a_small_buffer(self) -> None:
        """Without CAP_NET_ADMIN, a socket gets less: the rest ends before its buffer is full."""
        self.ears.room = 2 * 212992  # the default of Linux before 6.17, as the kernel counts it
        self.assertAlmostEqual(0.0075, self.rests(10000, 5)[1], delta=0.001)

    def test_a_burst_and_what_opens(self) -> None:
        """A client's steps and a few packets cause no rest; after many, it falls in a second."""
        for seconds, count, rest in ((9, 10, 0.0), (0.1, 5, 0.0), (0.1, 10, 0.005), (0.1, -10, 0.0),
                                     (9, 10 ** 5, 0.03), (0.1, 0, 0.0), (0.5, 1, 0.001)):
            self.clock.pass_seconds(seconds)
            self.rest(count)
            self.assertAlmostEqual(rest, max(0.0, self.ears.rest_end - self.clock.mono_time))

    def test_wait(self) -> None:
        """While the captures rest, other events wake the server; captures are read afterwards."""
        pairs = [socket.socketpair() for _ in range(2)]
        for near, far in pairs:
            for each in (near, far):
                self.addCleanup(each.close)
        (capture, junk), (other, event) = pairs
        self.ears.captures.register(capture, select.EPOLLIN)
        called: List[int] = []
        self.ears.others.register(other, selectors.EVENT_READ, lambda: called.append(1))

        def woken(seconds: float) -> Tuple[bool, bool, int]:
            """Return whether a wait finds other events and the capture, and how often it reacts."""
            called.clear()
            found, readable = self.ears.wait(self.clock.mono_time + seconds)
            return found, capture.fileno() in readable, len(called)

        self.assertEqual((False, False, 0), woken(0))
        junk.send(b"x")
        self.assertEqual((False, True, 0), woken(60))
        event.send(b"x")
        self.assertEqual((True, True, 1), woken(60))
        self.ears.rest_end = self.clock.mono_time + 60
        self.assertEqual((True, False, 1), woken(60))
        other.recv(1)
        self.assertEqual((False, False, 0), woken(0.01))
        self.clock.pass_seconds(60)
        self.assertEqual((False, True, 0), woken(60))


class FakeCapture(server.Capture):  # type: ignore[misc]
    """A socket's queue, without the socket."""

    is_fair, name = True, "fake"

    def __init__(self, *datagrams: Any) -> None:
        self.queue = list(datagrams)

    def fileno(self) -> int:
        """Return no descriptor."""
        return -1

    def receive(self) -> Any:
        """Return the oldest."""
        if not self.queue:
            raise BlockingIOError
        return self.queue.pop(0)


def junk(number: int, network: int = 9, port: int = 4000) -> Any:
    """Return a datagram of the right form from an address and a port."""
    return server.Datagram(b"A" * 200, bytes([network, 0, number >> 8, number & 255]), port,
                           bytes(4), 62201)


class CrowdTest(ServerCase):
    """Who goes first."""

    def setUp(self) -> None:
        """Make a crowd whose lots say that of the first ones the last are kept."""
        super().setUp()
        self.tally = server.Tally(self.log)
        self.crowd = server.Crowd(self.tally, self.log, self.clocks, lambda count: b"".join(
            number.to_bytes(4, "little") for number in range(count // 4)))

    def batch(self, capture: Any, tries: int) -> List[Any]:
        """Return what is tried if there is time for so many."""
        call = self.crowd.line_up(capture)
        tried: List[Any] = []
        try:
            while len(tried) < tries:
                tried.append(call())
        except BlockingIOError:
            return tried
        self.crowd.thin_out(capture, tries)
        return tried

    def late(self, *datagrams: Any, tries: int = 0) -> FakeCapture:
        """Return a capture with this queue after a batch that could try so many."""
        capture = FakeCapture(*datagrams)
        self.crowd.thin_out(capture, tries)
        return capture

    def test_when(self) -> None:
        """It begins when time is over, lasts until all is tried, and keeps order when it can."""
        queue = [junk(number) for number in range(10)]
        capture = FakeCapture()
        self.assertEqual((None, server.FOR_EVER), (capture.waiting, capture.due))
        capture = self.late(*queue, tries=10)
        self.assertEqual(([], 0.0), (capture.waiting, capture.due))
        self.assertEqual(queue[:4], self.batch(capture, 4))
        self.assertEqual((queue[4:], 0.0), (capture.waiting, capture.due))
        capture.tries = 10
        capture.queue = [None, junk(77)]  # None: a fragment
        self.assertEqual(queue[4:] + [junk(77)], self.batch(capture, 100))
        self.assertEqual((None, server.FOR_EVER), (capture.waiting, capture.due))
        knocks = server.KnockCapture.__new__(server.KnockCapture)
        self.crowd.thin_out(knocks, 5)
        self.assertIsNone(knocks.waiting)  # the kernel keeps them, in their order

    def test_standings(self) -> None:
        """Known sources, those that come again, unseen ones, tried ones; each the newest first."""
        self.tally.accept(junk(1, 10))
        dropped, tried = [junk(number, 11) for number in range(1100)], junk(1, 12)
        self.assertEqual([tried], self.batch(self.late(*dropped, tried), 1))
        self.assertEqual(100, self.tally.counts["untried"])
        again, other_port = dropped[50], tried._replace(source_port=4001)
        known, unseen, kept = junk(1, 10), junk(1, 13), dropped[500]
        queue = [again, known, unseen, tried, other_port, kept]
        for seconds, expected in (
                (0, [known, again, kept, other_port, unseen, tried]),
                (server.MARK_SECONDS, [known, kept, other_port, tried, unseen, again])):
            self.clock.pass_seconds(seconds)
            capture = self.late(*queue)
            self.assertEqual(
                [queue.index(each) for each in expected],
                [queue.index(each) for each in self.batch(capture, 6)])

    def test_shares(self) -> None:
        """Forged known addresses get half of the tries; the newest of all get a fourth."""
        for number in range(100):
            self.tally.accept(junk(number, 10))
        unseen = [junk(number) for number in range(100)]
        tried = self.batch(self.late(*unseen, *[junk(number, 10) for number in range(100)]), 40)
        self.assertLessEqual(sum(each.source[0] == 9 for each in tried[:4]), 2)
        self.assertEqual(10, sum(each.source[0] == 9 for each in tried))
        # Of one source, only four are tried before others, once its flow was tried.
        self.clock.pass_seconds(server.MARK_SECONDS)
        flood, tried = [junk(1, 10) for _ in range(100)], []
        for _ in range(2):
            tried = self.batch(self.late(*unseen, *flood), 40)
        self.assertLessEqual(sum(each.source[0] == 10 for each in tried), 4 + 10)

    def test_an_unknown_client_comes_again(self) -> None:
        """Under 10,000 forged packets a second, with time for 600, two knocks are enough."""
        client, capture, tried = junk(1, 8), self.late(), []  # type: Any, Any, List[Any]
        for number in range(0, 16000, 200):
            capture.queue = [junk(each) for each in range(number, number + 200)]
            if number % 10000 == 2000:
                capture.queue.insert(100, client)
            tried += self.batch(capture, 12)
            self.clock.pass_seconds(0.02)
        self.assertIn(client, tried)

    def test_flows_that_were_tried(self) -> None:
        """After all others only a few are tried again; few are kept, and too many not even read."""
        flood, client = [junk(1)] * 1500, junk(2)
        capture = self.late(*flood)
        self.batch(capture, 5)
        self.assertEqual(495, self.tally.counts["untried"])
        capture.queue = [client] + flood[:1000]
        tried = self.batch(capture, 10 ** 6)
        self.assertIn(client, tried[:4])
        self.assertLessEqual(len(tried), server.MOST_AGAIN + 4)
        self.assertEqual(1495, self.tally.counts["untried"])
        self.assertEqual(1001 - len(tried), len(capture.waiting or ()))
        for _ in range(5):
            tried += self.batch(capture, 10 ** 6)
        self.assertEqual((1001, None), (len(tried), capture.waiting))

    def test_what_is_no_tried_flow(self) -> None:
        """A known source is read at the port of its last packet; and so is a flow that only shares
        its mark with a source that was dropped."""
        self.tally.accept(junk(1, 10))
        known, other, flood = junk(1, 10), junk(1, 11), [junk(number) for number in range(1100)]
        self.assertEqual([known], self.batch(self.late(known), 1))
        capture = self.late(*flood)
        self.batch(capture, 0)
        flow = other.source, other.source_port
        self.crowd.marks[hash(flow) % server.SLOTS] = self.crowd.second
        self.assertEqual([1, 0], self.crowd.order([(b"unseen", 1), flow]))
        capture.queue = [known, other]
        tried = self.batch(capture, 4)
        self.assertIn(other, tried)
        self.assertEqual(known, tried[0])

    def test_what_is_dropped(self) -> None:
        """Only what is too much, by lot; counted, and told every ten seconds."""
        queue = [junk(number) for number in range(server.MOST_READ + 5)]
        capture = self.late(*queue)
        for seconds, line in ((0, "2990 "), (1, ""), (9, "7980 ")):
            self.clock.pass_seconds(seconds)
            capture.queue = queue[:]
            self.assertEqual(10, len(self.batch(capture, 10)))
            self.assertEqual(server.MOST_WAITING, len(capture.waiting or ()))
            self.assertEqual(line + server.UNTRIED + "\n" if line else "", self.logged())
        self.assertEqual(2990 + 7980, self.tally.counts["untried"])
        self.assertEqual(server.SLOTS, len(self.crowd.marks))

    def test_known_addresses_are_few(self) -> None:
        """The latest stay; of IPv6, a network counts."""
        for number in range(server.MOST_KNOWN + 10):
            self.tally.accept(junk(number))
            self.tally.accept(junk(0))
        self.assertEqual(server.MOST_KNOWN, len(self.tally.known))
        self.assertIn(junk(0).source, self.tally.known)
        self.assertNotIn(junk(5).source, self.tally.known)
        self.tally.accept(datagram(source="2001:db8::1"))
        self.assertIn(datagram(source="2001:db8::77").source[:8], self.tally.known)


class DrainTest(ServerCase):
    """The server's own loop."""

    def slow(self, access: str = "SOURCE ANY\n" + KEYS) -> Any:
        """Return a server on whose clock each look takes a millisecond."""
        made = self.serve(access)

        def mono() -> float:
            """Let time pass."""
            self.clock.pass_seconds(0.001)
            return self.clock.mono_time

        made.clocks = made.clocks._replace(monotonic=mono)
        return made

    def packet(self, source: str, port: int = 22) -> Any:
        """Return a genuine packet."""
        return datagram(Sender(salt=os.urandom(8)).packet(
            f"{source},tcp/{port}", timestamp=int(self.clock.wall_time)), source)

    def test_a_known_client_goes_first(self) -> None:
        """Its packet is tried in the next batch, though it came first; all are counted."""
        made = self.slow()
        capture = FakeCapture(self.packet("10.55.0.2"))
        made.drain(capture)
        self.assertEqual(1, len(self.firewall.doors()))
        capture.queue = [junk(number) for number in range(3000)]
        made.drain(capture)
        self.assertEqual([], capture.waiting)
        capture.queue[:0] = [self.packet("10.55.0.2", 23), self.packet("10.55.0.2", 24)]
        made.drain(capture)
        self.assertEqual(["10.55.0.2 -> 0.0.0.0/0 tcp/%d" % port for port in (22, 23, 24)],
                         self.firewall.doors())
        while capture.due < self.clock.mono_time:
            made.drain(capture)
        self.assertEqual(3000, made.tally.counts["untried"] + made.tally.counts["wrong HMAC"])
        self.assertRegex(str(made.tally), r"3 accepted; rejected: \d+ untried, \d+ wrong HMAC")

    def test_a_replay_stays_one(self) -> None:
        """Whatever the order, a packet opens once."""
        made, copies = self.slow(), [self.packet("10.55.0.2")] * 5
        capture = FakeCapture(*copies[:2], *[junk(number) for number in range(200)], *copies[2:])
        for _ in range(100):
            made.drain(capture)
        counts: Dict[str, int] = dict(made.tally.counts)
        self.assertEqual({"accepted": 1, "replay": 4, "wrong HMAC": 200}, counts)

    def test_sequences_keep_their_order(self) -> None:
        """Knock packets are taken as they came, also if they are too many for a batch."""
        made = self.slow(KEYLESS)
        made.knocks.is_own_address = lambda packed, now: True
        steps = [knock(step) for step in ALL_THREE]
        capture: Any = server.KnockCapture.__new__(server.KnockCapture)
        queue = [knock(7000, bytes([10, 55, 1, number])) for number in range(100)] + steps
        capture.receive = FakeCapture(*queue).receive
        capture.sequences = list(made.knocks.owners)
        for _ in range(20):
            made.drain(capture)
        self.assertEqual(1, len(self.firewall.doors()))

    def test_turn(self) -> None:
        """Junk makes the captures rest; what opens does not; a late capture goes on at once."""
        made = self.serve("SOURCE ANY\n" + KEYS)
        made.watch.check_due = made.watch.guard_due = self.clock.mono_time + 60
        capture = FakeCapture()
        made.captures = [capture]
        for waiting, rest in (([junk(1)], 0.0), ([junk(1)] * 20, 0.01), ([], 0.0),
                              ([self.packet("10.55.0.%d" % number) for number in range(50)], 0.0)):
            self.clock.pass_seconds(5)
            made.ears.rest_end = self.clock.mono_time
            made.watch.check_due = made.watch.guard_due = self.clock.mono_time
            capture.queue, capture.waiting = list(waiting), []
            made.turn()
            self.assertEqual(([], None), (capture.queue, capture.waiting))
            self.assertAlmostEqual(rest, max(0.0, made.ears.rest_end - self.clock.mono_time), 4)

    def test_the_smallest_buffer(self) -> None:
        """The server reads as often as its socket with the smallest buffer needs."""
        made = self.serve("SOURCE ANY\n" + KEYS)
        captures = [server.UdpCapture(socket.socket(socket.AF_INET, socket.SOCK_DGRAM), 62201)
                    for _ in range(2)]
        got = captures[0].socket.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
        self.assertEqual([got] * 2, [each.room for each in captures])
        captures[0].room = 40000
        made.listen(list(captures))
        self.assertEqual(40000, made.ears.room)
        made.listen([])
        self.assertEqual(2 * server.RECEIVE_BUFFER, made.ears.room)

    def test_what_is_due_is_done(self) -> None:
        """However much junk comes: a turn takes look after look, and ends when something is due."""
        made: Any = self.serve("SOURCE ANY\n" + KEYS)
        capture: Any = FakeCapture()
        looks: List[float] = []
        near, far = socket.socketpair()
        for each in (near, far):
            self.addCleanup(each.close)
        far.send(b"x")

        def receive() -> Any:
            """Return junk at every other call."""
            looks.append(time.monotonic())
            if len(looks) % 2:
                return junk(len(looks))
            raise BlockingIOError

        capture.receive, capture.fileno = receive, near.fileno
        made.clocks = made.ears.clocks = server.CLOCKS
        made.captures = [capture]
        made.ears.captures.register(near, select.EPOLLIN)
        made.watch.guard_due = server.FOR_EVER
        due = made.watch.check_due = time.monotonic() + 0.3
        made.turn()
        self.assertGreaterEqual(time.monotonic(), due)
        self.assertGreater(len(looks), 2)
        before, made.gate.runs = len(looks), [mock.Mock(due=server.FOR_EVER, has_ended=bool)]
        made.watch.check_due = time.monotonic() + 60
        made.ears.rest_end = 0.0
        made.turn()
        self.assertEqual(before + 2, len(looks))  # so that gpg can be started


if __name__ == "__main__":
    unittest.main()
