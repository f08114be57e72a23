"""Knock sequences: which packets complete one, which attempts are kept, which lines are used up.

How they are configured is in test_knock_conf.py, what they open in test_knock_open.py.
"""

import ipaddress
import os
import random
import socket
import stat
import time
import unittest
from typing import Any, Dict, Iterable, List, Tuple  # noqa: F401  (in type comments)
from unittest import mock

import spa_server as server
from tests.support import needs_packet_sockets, write
from tests.test_capture import extension, icmp, tcp
from tests.test_server import ServerCase, ipv4, ipv6, run_filter, udp

TCP, UDP, ICMP, ANY = server.TCP, server.UDP, server.ICMP, server.ANY_SIZE
SYN, ACK = 2, 16
SYN_ONLY = (SYN | ACK, SYN)  # the flags of KNOCK_TCPFLAGS' default
ONE, TWO = b"\x0a\x37\0\x02", ipaddress.ip_address("fd55::2").packed


def knock(step: Any, source: bytes = ONE, flags: int = SYN) -> Any:
    """Return a knock packet to a TCP port, or for a step."""
    protocol, port = step if isinstance(step, tuple) else (TCP, step)
    return server.Datagram(b"", source, 0, b"\x0a\x37\0\1", port, protocol,
                           flags if protocol == TCP else 0)


def sequence(text: str, seconds: float = 25, flags: Tuple[int, int] = SYN_ONLY,
             strict: bool = False, exact: bool = False) -> Any:
    """Return the sequence of a text."""
    return server.Sequence(server.parse_steps(text), seconds, flags, strict, exact)


def knocks(text: str) -> Iterable[Tuple[float, Any]]:
    """Return times and knock packets of a text: 7000, 8000u, 9000a, 9000f, 9000v, +SECONDS.

    The letters are UDP, SYN with ACK, FIN, and the same host in IPv6.
    """
    now = 0.0
    for word in text.split():
        now += 0.001
        if word[0] == "+":
            now += float(word[1:])
            continue
        port, mark = int(word.rstrip("uafv")), word.lstrip("0123456789")
        yield now, knock((UDP if mark == "u" else TCP, port), TWO if mark == "v" else ONE,
                       {"a": SYN | ACK, "f": 1}.get(mark, SYN))


def opened(made: Any, text: str) -> int:
    """Return how often the packets of a text complete a sequence."""
    return sum(made.follow(each, now) == len(made.steps) for now, each in knocks(text))


# Each row of the table of knockd.md 1.3, with the door 7000,8000,9000 unless another is named:
# (stimulus, packets, how often knockd opens, how often ours does, how often a strict one of ours)
TABLE = (
    ("no delay", "7000 8000 9000", 1, 1, 1),
    ("ports of no door between", "7000 7001 8000 4444 9000", 1, 1, 0),
    ("a listed port out of turn", "7000 9000 8000 9000", 0, 0, 0),
    ("begun anew after that", "7000 9000 7000 8000 9000", 1, 1, 1),
    ("a SYN that came twice", "7000 7000 8000 9000", 0, 1, 1),
    ("a SYN that came three times", "7000 7000 7000 8000 9000", 1, 1, 1),
    ("each SYN twice, as blocking connects send them", "7000 +1 7000 8000 +1 8000 9000", 0, 1, 1),
    ("UDP to a port of TCP", "7000 8000u 8000 9000", 1, 1, 1),
    ("segments with other flags", "7000 7000f 9000a 4444a 8000 9000", 1, 1, 1),
    ("half by IPv6", "7000 8000 9000v", 0, 0, 0),
    ("from the first to the last in time", "7000 +12 8000 +12 9000", 1, 1, 1),
    ("too late", "7000 +12 8000 +13 9000", 0, 0, 0),
    ("a wrong step, and it is a first one", "7000 8000 7000 8000 9000", 0, 1, 1),
)


class SequenceTest(unittest.TestCase):
    """How a sequence follows knock packets."""

    def test_the_table_of_knockd(self) -> None:
        """Ours differs only where a SYN comes again, or a wrong step is a first one."""
        self.assertEqual(["a SYN that came twice", "each SYN twice, as blocking connects send them",
                          "a wrong step, and it is a first one"],
                         [stimulus for stimulus, _, theirs, ours, _ in TABLE if theirs != ours])
        for stimulus, text, _, ours, strict in TABLE:
            with self.subTest(stimulus=stimulus):
                self.assertEqual(ours, opened(sequence("7000,8000,9000"), text))
                self.assertEqual(strict, opened(sequence("7000,8000,9000", strict=True), text))

    def test_rows_of_other_doors(self) -> None:
        """A sequence may repeat a port, have one, several protocols, or its first port last."""
        for steps, text, count in (
                ("7000,7000", "7000 7000", 1), ("7000,7000", "7000 7000 7000", 1),
                ("7000,7000", "7000 7000 7000 7000", 2), ("7000", "7000 7000 7000", 3),
                ("7000,7000,7000", "7000 7000", 0), ("7000,7000,8000", "7000 7000 7000 8000", 1),
                ("7000:udp,8000,9000:udp", "7000u 8000 9000u", 1),
                ("7000:udp,8000,9000:udp", "7000 8000 9000u", 0),
                ("7000,8000,7000", "7000 7000 8000 8000 7000", 1),
                ("1,2,1,3", "1 2 1 2 1 3", 0), ("1,2,1,3", "1 2 1 3", 1)):
            for strict in (False, True):
                with self.subTest(steps=steps, text=text, strict=strict):
                    self.assertEqual(count, opened(sequence(steps, strict=strict), text))

    def test_exact(self) -> None:
        """With StrictDuplicates a repeated step is wrong; it may be a new first one."""
        for text, count in (("7000 8000 9000", 1), ("7000 8000 8000 9000", 0),
                            ("7000 7000 8000 9000", 1), ("7000 8000 9000 9000", 1)):
            self.assertEqual(count, opened(sequence("7000,8000,9000", exact=True), text), text)
        self.assertEqual(1, opened(sequence("7000,7000", exact=True), "7000 7000"))

    def test_flags(self) -> None:
        """Flags must be set or clear; without any each segment counts; UDP and ICMP have none."""
        for flags, given, seen in (
                ((2, 2), 2, True), ((2, 2), 18, True), ((18, 2), 18, False),
                ((18, 2), 2 | 0xC0, True),
                ((0, 0), 16, True), ((0, 0), 4, True), ((2, 0), 2, False), ((63, 41), 41, True)):
            made = server.Sequence(((TCP, 7000), (UDP, 1)), 5, flags)
            self.assertEqual(int(seen), made.follow(knock(7000, flags=given), 1.0), (flags, given))
        self.assertEqual(2, made.follow(knock((UDP, 1)), 1.0))

    def test_icmp(self) -> None:
        """Echo requests of a size or of any size count, in both families."""
        for source in (ONE, TWO):
            made = sequence("100:icmp,:icmp,7000", strict=True)
            self.assertEqual([0, 1, 2, 2, 3], [
                made.follow(knock(step, source), 1.0) or done for done, step in zip(
                    (0, 0, 0, 2, 0), ((ICMP, 99), (ICMP, 100), (ICMP, 5), (ICMP, 6), 7000))])

    def test_time(self) -> None:
        """Time counts from the first packet, and in fractions of a second."""
        for seconds, second, third, count in (
                (1, 0.5, 0.999, 1), (1, 0.2, 1.0, 0), (1, 0.9, 1.7, 0), (25, 24.0, 24.999, 1),
                (25, 0.1, 25.0, 0)):
            made = sequence("1,2,3", seconds)
            done = [made.follow(knock(port), 1000.93 + at)
                    for port, at in ((1, 0), (2, second), (3, third))]
            self.assertEqual(count, done.count(3), (seconds, second, third))
        made = sequence("1,2", 5)
        made.follow(knock(1), 10.0)
        made.follow(knock(1), 14.0)  # a repeated one gives no more time
        self.assertEqual(0, made.follow(knock(2), 15.5))
        self.assertEqual([1, 2], [made.follow(knock(port), 16.0) for port in (1, 2)])

    def test_neighbours(self) -> None:
        """Sequences may share first steps; a port of another one resets only a strict one."""
        for first, second in (("7000,8000", "7000,8000,9000"), ("7000,8000,9000", "7000,8000")):
            pair = [sequence(first, strict=True), sequence(second, strict=True)]
            self.assertEqual([1, 1], [opened(each, "7000 8000 9000") for each in pair])
        for strict, times in ((False, 1), (True, 0)):
            pair = [sequence("1,2,3", strict=strict), sequence("11,12,13", strict=strict)]
            self.assertEqual([times] * 2, [opened(each, "1 11 2 12 3 13") for each in pair])
        # A port between two of a sequence would let a scan through, whoever else has it.
        pair = [sequence("7000,7002", strict=True), sequence("7001,5000", strict=True)]
        scan = " ".join(map(str, range(4990, 7010)))
        self.assertEqual([0, 0], [opened(each, scan) for each in pair])
        pair = [sequence("9:icmp,8:icmp", strict=True), sequence("1,:icmp")]
        self.assertEqual([1, 0, 0], [pair[0].follow(knock((ICMP, size)), 1.0)
                                     for size in (9, 77, 8)])

    def test_scans(self) -> None:
        """A scan of all 65,535 ports, up, down or in any order, opens nothing strict."""
        mixed = list(range(1, 65536))
        random.Random(1).shuffle(mixed)
        everything = list(range(1, 65536))
        for steps in ("7000,8000,9000", "9000,7000"):
            for ports in (everything, everything[::-1], mixed):
                made = sequence(steps, strict=True)
                last = len(made.steps)
                self.assertNotIn(last, [made.follow(knock(port), 1.0) for port in ports])
        made = sequence("7000,8000,9000")  # or the test shows nothing
        self.assertIn(3, [made.follow(knock(port), 1.0) for port in everything])

    def test_against_a_model(self) -> None:
        """A slow model that keeps lists of packets agrees, on random packets of few ports."""
        chance = random.Random(5)
        for _ in range(400):
            steps = tuple((TCP, chance.randrange(1, 4)) for _ in range(chance.randrange(1, 5)))
            strict, exact = chance.random() < 0.5, chance.random() < 0.5
            made = server.Sequence(steps, 10, (0, 0), strict, exact)
            seen = {}  # type: Dict[bytes, List[Any]]
            began, now = {}, 100.0  # type: Dict[bytes, float], float
            for _ in range(40):
                now += chance.choice((0.1, 0.4, 3.0))
                source, step = chance.choice((ONE, TWO)), (TCP, chance.randrange(1, 6))
                old = tuple(seen.get(source, ())) if now < began.get(source, 0) + 10 else ()
                new = old + (step,)
                if new == steps[:len(new)]:
                    expected = len(new)
                elif old and ((old[-1] == step and not exact) or not (strict or step in steps)):
                    expected, new = 0, old
                else:
                    new = (step,) if step == steps[0] else ()
                    expected = len(new)
                if len(new) == 1 and expected:
                    began[source] = now
                seen[source] = [] if new == steps else list(new)
                done = made.follow(knock(step, source), now)
                self.assertEqual(expected, done, (steps, old, step))
                if chance.random() < 0.1:
                    made.expire(now)

    def test_flood(self) -> None:
        """200,000 spoofed first steps are bounded; clients that are late or further on open."""
        made = sequence("7000,8000,9000", strict=True)
        most = server.MAX_ATTEMPTS
        early, late, further = b"\xfe\0\0\1", b"\xfe\0\0\2", b"\xfe\0\0\3"
        made.follow(knock(7000, further), 1.0)
        made.follow(knock(8000, further), 1.0)
        made.follow(knock(7000, early), 1.0)
        for number in range(200000):
            if number == 200000 - most + 2:  # "further" is one of the most
                made.follow(knock(7000, late), 2.0)
            made.follow(knock(7000, number.to_bytes(4, "big")), 2.0)
        self.assertEqual(most, len(made.attempts))
        self.assertEqual([3, 2, 0], [made.follow(knock(port, source), 3.0) for port, source in (
            (9000, further), (8000, late), (8000, early))])
        self.assertEqual(3, made.follow(knock(9000, late), 3.0))
        for number in range(most + 1000):  # by somebody who knows two steps
            for port in (7000, 8000):
                made.follow(knock(port, number.to_bytes(4, "big")), 4.0)
        self.assertEqual(most, len(made.attempts))
        self.assertEqual([1, 2, 3], [made.follow(knock(port, late), 4.0)
                                     for port in (7000, 8000, 9000)])
        self.assertEqual(most - 1, len(made.expire(100.0)))
        self.assertEqual(0, len(made.attempts))

    def test_flood_while_many_are_further_on(self) -> None:
        """Nearly all clients that are further on still open, and so do those that come later."""
        made = sequence("7000,8000,9000")
        made.most, many = 4096, 40
        sources = [b"\xfe\0\0" + bytes([number]) for number in range(many)]
        for source in sources:
            made.follow(knock(7000, source), 1.0)
            made.follow(knock(8000, source), 1.0)
        for number in range(3 * made.most):
            made.follow(knock(7000, number.to_bytes(4, "big")), 2.0)
        done = [made.follow(knock(9000, source), 3.0) for source in sources]
        self.assertGreater(done.count(3), many - server.MOST_SPARED)
        self.assertEqual(made.most, len(made.attempts) + done.count(3))

    def test_flood_by_somebody_who_knows_two_steps(self) -> None:
        """Others can still begin: at most an eighth of all attempts is spared."""
        made = sequence("7000,8000,9000")
        made.most = 4096
        for number in range(5 * made.most):
            made.follow(knock(7000, number.to_bytes(4, "big")), 2.0)
            if number % 5 == 0:
                made.follow(knock(8000, number.to_bytes(4, "big")), 2.0)
        further = [done for done, _ in made.attempts.values() if done > 1]
        self.assertEqual(made.further, len(further))
        self.assertLess(len(further), made.most // 3)
        self.assertEqual(made.most, len(made.attempts))
        made.expire(100.0)
        self.assertEqual((0, 0), (made.further, len(made.attempts)))

    def test_expiry(self) -> None:
        """expire() returns each attempt once, and next_due() is never too early."""
        made = sequence("1,2,3", 5)
        self.assertEqual(float("inf"), made.next_due())
        for number, at in ((1, 10.0), (2, 11.0), (3, 12.0)):
            made.follow(knock(1, bytes([number])), at)
        made.follow(knock(2, b"\3"), 12.5)
        made.follow(knock(2, b"\1"), 14.0)
        told = []  # type: List[Tuple[float, bytes, int]]
        for _ in range(10):
            due = made.next_due()
            if due == float("inf"):
                break
            told += [(due, source, done) for source, done in made.expire(due)]
            self.assertGreater(made.next_due(), due, "a busy loop")
        self.assertEqual([(15.0, b"\1", 2), (16.0, b"\2", 1), (17.0, b"\3", 2)], told)
        self.assertEqual({}, dict(made.attempts))
        made.follow(knock(1), 20.0)
        made.follow(knock(2), 20.0)
        made.follow(knock(3), 20.0)  # done, so that nothing can be over
        self.assertEqual([], made.expire(made.next_due()))
        self.assertEqual(float("inf"), made.next_due())

    def test_random_expiry(self) -> None:
        """next_due() is never later than an attempt ends; expire() leaves none that is over."""
        chance, made, now = random.Random(3), sequence("1,2,3", 5), 0.0
        for _ in range(3000):
            now += chance.random()
            made.follow(knock(chance.choice((1, 2, 3, 1)), bytes([chance.randrange(30)])), now)
            ends = [due for _, due in made.attempts.values()]
            self.assertLessEqual(made.next_due(), min(ends, default=float("inf")))
            if chance.random() < 0.3:
                made.expire(now)
                self.assertGreater(made.next_due(), now)
                self.assertFalse([due for _, due in made.attempts.values() if due <= now])


# ------------------------------------------------------------------- what comes from the network

class HitTest(unittest.TestCase):
    """How IP packets become knock packets, and the kernel's filter before that."""

    def check(self, packet: bytes, *expected: Any) -> None:
        """Fail unless the packet is a step of this protocol, port and flags; or is none."""
        made = server.decode_knock(packet)
        self.assertEqual(expected, () if made is None else (
            made.protocol, made.destination_port, made.flags))
        if made is not None:
            six = packet[0] >> 4 == 6
            addresses = packet[8:40] if six else packet[12:20]
            self.assertEqual(addresses, made.source + made.destination)

    def test_protocols(self) -> None:
        """TCP has its flags, UDP any content, an echo request its size, in both families."""
        for wrap, echo, number in ((ipv4, 8, 1), (ipv6, 128, 58)):
            self.check(wrap(tcp(b"", 7000, 9, SYN), 6), TCP, 7000, SYN)
            self.check(wrap(tcp(b"xyz", 1, 9, 0x3F, b"\1" * 40), 6), TCP, 1, 0x3F)
            self.check(wrap(udp(b"\0", 8000)), UDP, 8000, 0)
            self.check(wrap(udp(b"", 65535)), UDP, 65535, 0)
            self.check(wrap(icmp(b"", echo), number), ICMP, 0, 0)
            self.check(wrap(icmp(b"x" * 100, echo), number), ICMP, 100, 0)
            self.check(wrap(icmp(b"x", echo + 1), number))
            self.check(wrap(icmp(b"x", 3), number))
            self.check(wrap(udp(b"x"), 132))
        self.check(ipv4(udp(b"x", 7), options=b"\1" * 40), UDP, 7, 0)
        self.check(ipv6(extension(17) + udp(b"x", 7), 0), UDP, 7, 0)
        self.check(ipv6(extension(60, 16) + extension(6, 24) + tcp(b"", 7, 9, SYN), 43),
                   TCP, 7, SYN)

    def test_no_steps(self) -> None:
        """Fragments, cut headers, wrong lengths and parts of echo requests are no steps."""
        whole = tcp(b"", 7000, 9, SYN)
        self.check(ipv4(whole, 6, 0x2000), TCP, 7000, SYN)  # its first fragment
        self.check(ipv4(whole, 6, 0x2001))
        self.check(ipv4(whole, 6, 0x0100))
        self.check(ipv4(icmp(b"x" * 100), 1, 0x2000))
        self.check(ipv6(extension(6) + whole, 44))
        for packet in (ipv4(whole, 6), ipv6(whole, 6), ipv4(udp(b"")), ipv4(icmp(b""), 1),
                       ipv6(icmp(b"", 128), 58), ipv4(whole, 6, 0, b"\1" * 20)):
            self.assertIsNotNone(server.decode_knock(packet))
            for size in range(len(packet)):
                self.check(packet[:size])
        self.check(b"\x44" + ipv4(whole, 6)[1:])
        self.check(b"\x55" + ipv4(whole, 6)[1:])
        short = bytearray(ipv4(icmp(b"x" * 9), 1))
        for length in (0, 20, 27):
            short[2:4] = length.to_bytes(2, "big")
            self.check(bytes(short))
        short[2:4] = b"\0\x1c"
        self.check(bytes(short), ICMP, 0, 0)

    def packets(self) -> List[bytes]:
        """Return packets of all kinds to a few ports."""
        found = []
        for port in (1, 7000, 7001, 8000, 9000, 65535):
            for wrap in (ipv4, ipv6):
                found += [wrap(tcp(b"", port, 9, flags), 6) for flags in (0, 1, 2, 16, 18, 0xC2)]
                found += [wrap(udp(b"x", port)), wrap(udp(b"x", 9, port)),
                          wrap(udp(b"x", port), 132)]
            found += [ipv4(tcp(b"", port, 9, SYN), 6, 0x2000, b"\1" * 8),
                      ipv4(tcp(b"", port, 9, SYN), 6, 0x2001), ipv4(udp(b"x", port), 17, 0x1FFF)]
        for kind in (0, 3, 8, 128, 129):
            found += [ipv4(icmp(b"x" * 100, kind), 1), ipv6(icmp(b"x" * 100, kind), 58),
                      ipv4(icmp(b"x", kind), 1, 0x2001)]
        return found + [b"", b"\x45", ipv4(udp(b"x"))[:21], ipv6(udp(b"x"))[:41]]

    def test_filters(self) -> None:
        """The kernel lets every step of a sequence pass, and as little else as it can.

        Its program and matches() agree on every packet.
        """
        for texts, flags, strict, passing in (
                (["7000,8000,9000"], SYN_ONLY, False, {TCP}), (["7000"], (0, 0), False, {TCP}),
                (["7000,8000:udp"], SYN_ONLY, False, {TCP, UDP}),
                ([":icmp"], SYN_ONLY, False, {ICMP}),
                (["100:icmp,7000"], (63, 2), False, {ICMP, TCP}), (["1,2"], SYN_ONLY, True, {TCP}),
                (["7000:udp"], SYN_ONLY, True, {UDP}), (["1:udp", "7000", "9:icmp"], (2, 2), False,
                                                        {TCP, UDP, ICMP})):
            made = [sequence(text, flags=flags, strict=strict) for text in texts]
            tree = server.sequence_filter(made)
            code, seen = server.compile_filter(tree), set()
            wanted = {step for each in made for step in each.steps}
            for packet in self.packets():
                passed = run_filter(code, packet)
                try:
                    self.assertEqual(passed, server.matches(tree, packet), (texts, packet.hex()))
                except IndexError:
                    self.assertFalse(passed)
                self.assertFalse(run_filter(code, packet, server.PACKET_OUTGOING))
                got = server.decode_knock(packet)
                if got is None:
                    continue
                looked_at = any((strict and got.protocol == protocol) or (protocol, port) in (
                    (got.protocol, got.destination_port), (got.protocol, ANY))
                                for protocol, port in wanted)
                if got.protocol == TCP and (got.flags & flags[0]) != flags[1]:
                    looked_at = False
                plain = packet[0] in (0x45, 0x47, 0x60)
                if got.protocol == ICMP:
                    looked_at = any(protocol == ICMP for protocol, _ in wanted)
                self.assertEqual(looked_at and plain, passed, (texts, got))
                seen |= {got.protocol} if passed else set()
            self.assertEqual(passing, seen)

    def doors(self, count: int, flags: int) -> List[Any]:
        """Return doors of 32 ports, with so many sets of flags."""
        chance = random.Random(count)
        return [server.Sequence(tuple((chance.choice((TCP, UDP)), chance.randrange(1, 65536))
                                      for _ in range(32)), 5, (each % flags, each % flags))
                for each in range(count)]

    def test_many_doors(self) -> None:
        """With any number of doors the kernel takes the program, and every port passes."""
        for count, flags in ((1, 1), (9, 9), (10, 1), (40, 1), (40, 40), (64, 64), (200, 33)):
            with self.subTest(count=count, flags=flags):
                made = self.doors(count, flags)
                code = server.compile_filter(server.sequence_filter(made))
                self.assertLessEqual(len(code) // 8, server.MAX_INSTRUCTIONS)
                for each in made[::7]:
                    for protocol, port in each.steps[::9]:
                        body = (udp(b"", port) if protocol == UDP else
                                tcp(b"", port, 9, each.flags[1]))
                        self.assertTrue(run_filter(code, ipv4(body, protocol)))
                        self.assertTrue(run_filter(code, ipv6(body, protocol)))

    @needs_packet_sockets
    def test_a_packet_socket(self) -> None:
        """The kernel takes the largest program, and lets the knock packets pass."""
        for made in (self.doors(40, 40), self.doors(9, 9)):
            captures = []  # type: List[Any]
            server.open_knock_captures([(("lo", "any"), made)], False, server.Log(), captures)
            self.assertEqual([made] * 3, [each.sequences for each in captures])
            for each in captures:
                each.close()
        for four_only in (False, True):
            captures = []
            server.open_knock_captures([(("lo",), [sequence("61234,61235:udp,61236")])], four_only,
                                       server.Log(), captures)
            (capture,) = captures
            self.addCleanup(capture.close)
            for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
                for kind, port in ((socket.SOCK_STREAM, 61234), (socket.SOCK_STREAM, 61235),
                                   (socket.SOCK_DGRAM, 61235), (socket.SOCK_STREAM, 61236)):
                    with socket.socket(family, kind) as opened_socket:
                        opened_socket.connect_ex((address, port))
                        if kind == socket.SOCK_DGRAM:
                            opened_socket.send(b"")
            got = []
            while True:
                try:
                    each = capture.receive()
                except BlockingIOError:
                    break
                if each and each.destination_port in (61234, 61235, 61236):
                    got.append((len(each.source), each.protocol, each.destination_port,
                                each.flags))
            of_four = [(4, TCP, 61234, SYN), (4, UDP, 61235, 0), (4, TCP, 61236, SYN)]
            self.assertEqual(of_four if four_only else of_four + [
                (16, TCP, 61234, SYN), (16, UDP, 61235, 0), (16, TCP, 61236, SYN)],
                [each for each in got if each[3] in (SYN, 0)], got)


# ------------------------------------------------------------------- sequences that open once

def make_fifo(path: str) -> None:
    """Put a FIFO in the place of an empty directory."""
    os.rmdir(path)
    os.mkfifo(path)


class OneTimeTest(ServerCase):
    """A file of sequences: the line that is marked, and when."""

    def write(self, text: bytes) -> str:
        """Write the file, and return its path."""
        return write(self.place("codes"), text)

    def read(self) -> bytes:
        """Return the content of the file."""
        with open(self.place("codes"), "rb") as stream:
            return stream.read()

    def test_marks(self) -> None:
        """The used line is marked, whatever is around it, and nothing else changes."""
        for text, marked in (
                (b" 1,2\n 3,4\n", b"#1,2\n 3,4\n"), (b"1,2\n3,4", b"#,2\n3,4"),
                (b"#1,2\n 3,4", b"#1,2\n#3,4"),
                (b"\n \t\r\n# x\r\n 3,4:udp\r\n", b"\n \t\r\n# x\r\n#3,4:udp\r\n"),
                (b"70000\n 1,2\n", b"70000\n#1,2\n"),
                (b"x\xff\n\xe9\n 1,2\n", b"x\xff\n\xe9\n#1,2\n"),
                (b"  # x\n\t7:icmp", b"  # x\n#7:icmp"),
                (b"\xef\xbb\xbf1,2\n", b"#\xbb\xbf1,2\n")):
            with self.subTest(text=text):
                made = server.read_one_time_file(self.write(text))
                made.mark_used()
                self.assertEqual(marked, self.read())

    def test_in_order(self) -> None:
        """Lines are used in order, each once; none is left after the last, nor after a restart."""
        path = self.write(b"# codes\n 1,2\nbad\n 3,4\n 5,6\n")
        made = server.Sequence((), 5, file=server.read_one_time_file(path))
        told = (path + ":3: expected ports such as `7000, 8000:udp, 100:icmp`, without quotes; "
                "this line opens nothing")
        self.assertEqual([told], made.warnings(alone=False))
        self.assertEqual(told, made.warnings(alone=True)[0])
        self.assertIn("a scan of all ports opens it", made.warnings(alone=True)[1])
        self.assertEqual([(TCP, port) for port in (5, 6, 3, 4, 1, 2)], made.all_steps())
        for first, more in ((1, True), (3, True), (5, False)):
            self.assertEqual(((TCP, first), (TCP, first + 1)), made.steps)
            made.follow(knock(first, TWO), 1.0)  # others have to begin the next one anew
            self.assertEqual([1, 2], [made.follow(knock(port), 1.0) for port in (first, first + 1)])
            self.assertIs(more, made.mark_used())
            self.assertEqual({}, dict(made.attempts))
        self.assertEqual(b"# codes\n#1,2\nbad\n#3,4\n#5,6\n", self.read())
        self.assertEqual([0] * 6, [made.follow(knock(port), 2.0) for port in range(1, 7)])
        made = server.Sequence((), 5, file=server.read_one_time_file(path))
        self.assertEqual(path + ": no sequence is left; this opens nothing",
                         made.warnings(alone=True)[-1])
        self.assertEqual([0] * 6, [made.follow(knock(port), 3.0) for port in range(1, 7)])

    def test_what_can_not_be_marked_opens_nothing(self) -> None:
        """A file that was changed, is gone or can't be written is an error; the line stays next."""
        path = self.write(b" 1,2\n 3,4\n")
        made = server.read_one_time_file(path)
        for change in (b" 1,3\n 3,4\n", b" 1,", b"", b"#1,2\n 3,4\n", b"\n 1,2\n 3,4\n"):
            self.write(change)
            with self.assertRaisesRegex(server.SpaError, "somebody changed it"):
                made.mark_used()
            self.assertEqual(change, self.read())
        for spoil in (lambda: os.unlink(path), lambda: os.mkdir(path),
                      lambda: make_fifo(path)):
            spoil()
            with self.assertRaises(server.SpaError):
                made.mark_used()
        self.assertEqual(((TCP, 1), (TCP, 2)), made.steps)

    def test_on_disk_before_it_opens(self) -> None:
        """fsync() follows the mark; if it fails, the line does not count as used."""
        path, calls = self.write(b" 1,2\n 3,4\n"), []  # type: str, List[bytes]
        made = server.read_one_time_file(path)
        with mock.patch.object(os, "fsync", side_effect=lambda _: calls.append(self.read())):
            made.mark_used()
        self.assertEqual([b"#1,2\n 3,4\n"], calls)
        failing = mock.patch.object(os, "fsync", side_effect=OSError(5, "I/O error"))
        with failing, self.assertRaisesRegex(server.SpaError, "codes: I/O error"):
            made.mark_used()
        self.assertEqual(((TCP, 3), (TCP, 4)), made.steps)

    def test_files_that_are_none(self) -> None:
        """A missing file, a directory and a FIFO without a writer are errors."""
        path = self.write(b"# 1,2\n\n70000\n")
        for spoil, expected in (
                (lambda: os.unlink(path), "No such"),
                (lambda: os.mkdir(path), "Is a directory"),
                (lambda: make_fifo(path), "a regular file")):
            spoil()
            with self.assertRaisesRegex(server.ConfigError, "^%s: .*%s" % (path, expected)):
                server.read_one_time_file(path)
        self.assertTrue(stat.S_ISFIFO(os.stat(path).st_mode))

    def test_long_files(self) -> None:
        """A long file is read in a moment, and the kernel's filter does not grow with it."""
        path = self.write(b"".join(b" %d,%d,%d\n" % (n, n + 1, n + 2) for n in range(1, 20000)))
        begin = time.monotonic()
        made = server.Sequence((), 5, SYN_ONLY, file=server.read_one_time_file(path))
        self.assertLess(time.monotonic() - begin, 5)
        assert made.file is not None
        self.assertEqual(19999, len(made.file.lines))
        code = server.compile_filter(server.sequence_filter([made]))
        self.assertLess(len(code) // 8, 100)
        self.assertEqual([True, False], [run_filter(code, ipv4(tcp(b"", 7000, 9, flags), 6))
                                         for flags in (SYN, 16)])  # connections are not looked at


if __name__ == "__main__":
    unittest.main()
