"""Hostile input: every parser is fed mutations of valid input, the same ones for the same seed.

  python3 -m tests.fuzz [TARGET...] [--seconds N] [--cases N] [--seed S] [--input BYTES] [--atheris]

A target is a parser with valid inputs for it and the exceptions that its docstring names. Any other
exception is a fault, and so is a grant that nobody with a key asked for, an error that shows a key,
and a valid input that is no longer understood after the others. Memory must not grow either. A
fault is printed with its target, the seed and the input; each target draws by itself, so that
`TARGET --seed S` comes to the same input again, and `TARGET --input BYTES` tries it alone.

Without --seconds and --cases it runs for ten seconds. --atheris gives one target to atheris, which
looks for inputs that reach other lines, where that is installed.
"""

import argparse
import ast
import contextlib
import gc
import io
import ipaddress
import itertools
import os
import random
import re
import socket
import struct
import sys
import tempfile
import time
import traceback
import types
from typing import (Any, Callable, Dict, Iterable, Iterator, List, NamedTuple, Optional, Tuple,
                    Type)
from unittest import mock

import keygen
import spa_client as client
import spa_server as server
from tests.support import write
from tests.test_capture import (FILTERS, PayloadFilterTest, make_packets, passes, request,
                                write_pcap)
from tests.test_gpg import GOOD, SIGNED, status
from tests.test_keygen_rotate import ACCESS, RC
from tests.test_openspa import FIRST, VECTORS, GateTest, key
from tests.test_openspa_client import ospa
from tests.test_packet import NAT, NOW, Sender, b64, read_vectors
from tests.test_server import CLIENT, DOOR22, HOST, KEYS, datagram, run_filter

SECRETS = (b"s3cretRijndael", b"hmacKey-for-tests")  # of KEYS: no error may show one
SHOWN = "\n" + "".join(map(chr, range(32, 127)))  # characters of the log
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # files there cost less
ROUND = 1000  # cases of all targets together; after so many of its own a target is checked


is_own_address = server.is_own_address  # Ground puts another one in its place


class Fault(Exception):
    """A target did with an input what it must not do."""


# ------------------------------------------------------------------- mutations

PIECES = [each.encode("latin-1") for each in (
    "", "0", "-1", "+", "1e9", "nan", "inf", "0x1", "1_0", "9" * 20, "9" * 400, "65536", "\xb2",
    "\0", "\n", "\r\n", "\n\n", " ", "\t", ";", "#", ":", ",", "/", "=", "==", "-", "_", "%s", "$",
    "$IP", "{0}", "..", "[", "]", "(", "not ", "\xa0", "\x85", "\xff", "\xef\xbb\xbf", "\x80",
    "A" * 70, "::ffff:1.2.3.4", "0.0.0.0", "::", "fe80::1%eth0", "01.2.3.4", "1.2.3.4/33", "tcp/22",
    "4294967295", "\x7f")]
WORD = re.compile(b"([ \n:,;=]+)")


class Mutator(random.Random):
    """A source of mutations: of valid inputs it makes others that are nearly valid."""

    def below(self, limit: int) -> int:
        """Return a number from 0 up to before `limit`."""
        return int(self.random() * limit)

    def mutate(self, seeds: List[bytes]) -> bytes:
        """Return one of these inputs with one to three changes."""
        data = seeds[self.below(len(seeds))]
        for _ in range(1 + self.below(3)):
            data = self.CHANGES[self.below(len(self.CHANGES))](self, data, seeds)
        return data

    def flip(self, data: bytes, _: List[bytes]) -> bytes:
        """Change one bit."""
        at = self.below(len(data))
        return data[:at] + bytes([data[at] ^ 1 << self.below(8)]) + data[at + 1:] if data else b"\1"

    def cut(self, data: bytes, _: List[bytes]) -> bytes:
        """Leave out some bytes, or all from somewhere on."""
        at = self.below(len(data))
        return data[:at] + (data[at + 1 + self.below(9):] if self.random() < 0.7 else b"")

    def grow(self, data: bytes, _: List[bytes]) -> bytes:
        """Put bytes in, or a text that parsers stumble on."""
        at = self.below(len(data) + 1)
        new = PIECES[self.below(len(PIECES))] if self.random() < 0.7 else bytes(
            [self.below(256)]) * (1 + self.below(300 if self.random() < 0.1 else 4))
        return data[:at] + new + data[at + self.below(2) * len(new):]

    def splice(self, data: bytes, seeds: List[bytes]) -> bytes:
        """Put the end of another input behind the beginning of this one."""
        other = seeds[self.below(len(seeds))]
        return data[:self.below(len(data) + 1)] + other[self.below(len(other) + 1):]

    def repeat(self, data: bytes, _: List[bytes]) -> bytes:
        """Repeat a part, or put it elsewhere."""
        begin, at = self.below(len(data) + 1), self.below(len(data) + 1)
        part = data[begin:begin + 1 + self.below(40)]
        return data[:at] + part * (1 + self.below(3)) + data[at:]

    def respell(self, data: bytes, _: List[bytes]) -> bytes:
        """Write base64 otherwise: spare bits, padding, the alphabet of URLs, another case."""
        at = self.below(len(data))
        return (data[:-1] + server.ALPHABET[self.below(64):][:1], data + b"=" * (1 + self.below(3)),
                data.replace(b"+", b"-"), data.replace(b"/", b"_"), data[:at] + data[at:].swapcase()
                )[self.below(5)]

    def replace(self, data: bytes, seeds: List[bytes]) -> bytes:
        """Put a text that parsers stumble on, or a word of another input, in a word's place."""
        words, others = WORD.split(data), PIECES
        if self.random() < 0.6:
            others = WORD.split(seeds[self.below(len(seeds))])
        words[self.below(len(words))] = others[self.below(len(others))]
        return b"".join(words)

    CHANGES = (flip, flip, cut, grow, grow, splice, repeat, respell, replace)


# ------------------------------------------------------------------- targets

class Work(NamedTuple):
    """What a target does: valid inputs, what takes one, and a check that it still works."""

    seeds: List[bytes]
    feed: Callable[[bytes], object]
    check: Callable[[], object] = bool


def be_strict(made: Any) -> Any:
    """Return a server that raises a mistake of its own, and does not only log it."""
    reject = made.tally.reject

    def strictly(came: Any, why: Exception, stanza_number: int = 0) -> None:
        reject(came, why, stanza_number)
        if not isinstance(why, server.PacketRejected):
            raise why
    made.tally.reject = strictly
    return made


class Ground(GateTest):
    """A directory, clocks, a log and a firewall that obeys, for the servers of a target."""

    def strict(self, access: str, conf: str = "") -> Any:
        """Return a server for these files that raises its own mistakes."""
        return be_strict(self.serve(access, conf))

    def expect(self, right: object, what: str) -> None:
        """Raise Fault, with the end of the log, unless it is `right`."""
        if not right:
            raise Fault(f"{what}; open: {self.firewall.doors()}; log: {self.logged()[-1000:]}")

    def closed(self) -> None:
        """Raise Fault if a door is open."""
        self.expect(not self.firewall.rules, "a door is open")

    def opens(self, made: Any, take: Callable[[], object]) -> None:
        """Check that `take` opens tcp/22 for the client, and nothing else; then let time pass."""
        take()
        self.expect(self.firewall.doors() == [DOOR22], "a valid packet does not open its door")
        self.expect(set(made.tally.counts) <= set(server.REASONS), "a reason that nobody counts")
        made.grants.flush()
        self.clock.pass_seconds(31)
        text = self.logged()
        self.expect(not (set(text) - set(SHOWN) or any(key.decode() in text for key in SECRETS)),
                    "a key or a control character is in the log")


class Target(NamedTuple):
    """A target: how many of 1,000 cases it gets, the exceptions that are no fault, how to begin."""

    share: int
    documented: Tuple[Type[Exception], ...]
    prepare: Callable[[Ground], Work]


TARGETS: Dict[str, Target] = {}


def target(share: int, *documented: Type[Exception]) -> Callable[[Callable[[Ground], Work]], None]:
    """Return a decorator that makes a target of a function; its name is the function's."""
    def register(prepare: Callable[[Ground], Work]) -> None:
        TARGETS[prepare.__name__.replace("_", "-")] = Target(share, documented, prepare)
    return register


def gate_work(ground: Ground, made: Any, seeds: List[bytes],
              come: Callable[[bytes], Any] = datagram,
              wrap: Callable[[bytes], bytes] = bytes, sender: Optional[Sender] = None) -> Work:
    """Return the work of a gate at which nothing but the check's packets may open a door."""
    for each in seeds:  # what is valid among them is a replay later
        made.gate.receive(come(each))
    made.grants.flush()
    seeds, numbers = [b""] + seeds, itertools.count()

    def feed(data: bytes) -> None:
        made.gate.receive(come(data))
        ground.closed()

    def check() -> None:  # the first seed is what has opened last: a replay
        seeds[0] = wrap((sender or Sender()).packet(
            timestamp=int(ground.clock.wall_time), rand="%016d" % next(numbers)))
        ground.opens(made, lambda: made.gate.receive(come(seeds[0])))
    return Work(seeds, feed, check)


@target(220)
def packet(ground: Ground) -> Work:
    """Packets for stanzas with HMAC: of their keys, of the other's, of the real client."""
    made = ground.strict("SOURCE ANY\n" + KEYS + "SOURCE 10.55.0.0/24\nKEY other\nHMAC_KEY hm4c\n"
                         "HMAC_DIGEST_TYPE SHA512\nANSWER Y\n")
    senders = Sender(), Sender(b"other", b"hm4c", hmac_type="SHA512"), Sender(hmac_key=b"")
    return gate_work(ground, made, [each.packet() for each in senders] + [
        each["packet"].encode() for each in read_vectors("fwknop.json")["vectors"]])


@target(15)
def packet_without_hmac(ground: Ground) -> Work:
    """Packets that only decryption proves, in three modes."""
    sender, text = Sender(hmac_key=b""), "SOURCE ANY\nKEY s3cretRijndael\n"
    modes = "CTR", "LEGACY"
    made = ground.strict(text + "".join(f"{text}ENCRYPTION_MODE {mode}\n" for mode in modes))
    return gate_work(ground, made, [Sender(hmac_key=b"", mode=mode).packet() for mode in modes],
                     sender=sender)


@target(60)
def http(ground: Ground) -> Work:
    """HTTP requests with a packet, as proxies send them on."""
    made = ground.strict("SOURCE ANY\n" + KEYS, "ENABLE_SPA_OVER_HTTP Y;\n"
                         "ENABLE_X_FORWARDED_FOR Y;\n")

    def wrap(payload: bytes, path: str = "/", forwarded: str = CLIENT) -> bytes:
        target = path + payload.decode().replace("+", "-").replace("/", "_")
        return request(target, "User-Agent: Fwknop/2.6.10", "X-Forwarded-For: " + forwarded)

    seeds = [wrap(Sender().packet(), *more) for more in (
        ("http://gate.example/", "1.2.3.4, 10.55.0.2"), ("/", "[::1]:80"), ("/", "10.55.0.2:4000"))]
    return gate_work(ground, made, seeds + [seeds[0].replace(b"\r\n", b"\n"), b"GET /\n\n"],
                     lambda data: datagram(data)._replace(protocol=server.TCP), wrap)


MESSAGES = [b":".join([b"1234567890123456:eHt5fQ:%d:3.0.0" % NOW, kind, b64(text)] + extra)
            for kind, text, extra in (
                (b"1", b"10.55.0.2,tcp/22", []), (b"3", b"10.55.0.2,tcp/22,udp/53", [b"60"]),
                (b"1", b"::,tcp/22", [b64(b"auth")]), (b"2", b"10.55.0.2,tcp/22", [NAT]),
                (b"4", b"0.0.0.0,udp/53", [NAT, b"9"]), (b"0", b"10.55.0.2,id", []),
                (b"5", b"10.55.0.2,tcp/22", [b64(b"10.55.0.1,80")]),
                (b"6", b"10.55.0.2,tcp/22", [b64(b"gate.example,80"), b"7"]))]
LIMITED = "REQUIRE_SAME_ADDRESS Y\nOPEN_PORTS tcp/22,udp/53\nMAX_FW_TIMEOUT 99\n"


def check_doors(ground: Ground, made: Any, with_nat: bool = False) -> None:
    """Raise Fault for a door that a holder of the keys to LIMITED can't have; close the doors."""
    for door, grant in ground.firewall.rules.items():
        may_be_any = with_nat and door.kind != server.DNAT  # the port that DNAT leads to
        ground.expect(str(door.source) == CLIENT + "/32" and (
            may_be_any or (door.protocol, door.port) in (("tcp", 22), ("udp", 53))),
                      f"{door!r} is open")
        ground.expect(grant.ends - ground.clock.mono_time <= 99, "a door is open for too long")
    if ground.firewall.rules:
        made.grants.flush()


@target(60, server.PacketRejected)
def plaintext(ground: Ground) -> Work:
    """What a holder of the keys may put into a packet, with a right digest behind it."""
    made = ground.strict("SOURCE ANY\n" + KEYS + LIMITED, "ENABLE_IPT_FORWARDING Y;\n"
                         "ENABLE_IPT_LOCAL_NAT Y;\nENABLE_IPT_SNAT Y;\nENABLE_NAT_DNS N;\n")
    sender, stanza, came = Sender(), made.gate.stanzas[0], datagram(b"x")

    def feed(data: bytes) -> None:
        found = server.decode_packet(sender.plain(data))
        assert found.dump(b"", stanza.keys) and found.timeout <= server.MAX_TIMEOUT
        try:
            made.gate.ask_and_answer(server.Request.of_packet(found, came), stanza)
        finally:
            check_doors(ground, made, found.type in server.NAT_TYPES)

    def check() -> None:
        ground.opens(made, lambda: made.gate.ask_and_answer(server.Request.of_packet(
            server.decode_packet(sender.plain(MESSAGES[0])), came), stanza))
    return Work(MESSAGES + [sender.plain(MESSAGES[0])], feed, check)


@target(2)
def sealed_plaintext(ground: Ground) -> Work:
    """The same on the whole way: encrypted and with the HMAC of the right keys, in VERBOSE."""
    made, sender = ground.strict("SOURCE ANY\n" + KEYS + LIMITED + "ANSWER Y\n"), Sender()
    made.log.level = server.DEBUG
    made.gate.answer_sockets.send = lambda answer, came: None
    work = gate_work(ground, made, MESSAGES)

    def feed(data: bytes) -> None:
        ground.clock.pass_seconds(0.01)  # later than the memory began, and than other packets
        plain = sender.plain(data)
        for payload in (sender.seal(plain), sender.seal_blocks((plain + bytes(15))[:len(
                plain) // 16 * 16 or 16])):
            made.gate.receive(datagram(payload))
            check_doors(ground, made)
    return work._replace(seeds=[sender.plain(each) for each in MESSAGES] + MESSAGES, feed=feed)


class Flood(server.Capture):  # type: ignore[misc]
    """A capture with datagrams that came faster than they can be tried."""

    is_fair = True

    def __init__(self) -> None:
        self.queue: List[Any] = []
        self.name = "flood"

    def receive(self) -> Any:
        """Return the next datagram."""
        if not self.queue:
            raise BlockingIOError
        return self.queue.pop()


@target(1)
def crowd(ground: Ground) -> Work:
    """Junk from sources that an attacker chooses, 20 at once: what waits has a bound."""
    made, flood, junk = ground.strict("SOURCE ANY\n" + KEYS), Flood(), b"8" * 200

    def tick() -> float:
        ground.clock.pass_seconds(0.001)
        return ground.clock.mono_time
    made.clocks = made.crowd.clocks = made.clocks._replace(monotonic=tick)

    def feed(data: bytes) -> None:
        flood.queue += [datagram(junk, "10.55.%d.%d" % (data[at], data[at + 1]))._replace(
            source_port=data[at] & 3) for at in range(len(data) - 1)]
        made.drain(flood)
        assert not flood.waiting or len(flood.waiting) <= server.MOST_WAITING
        ground.closed()

    def drain() -> None:
        while flood.queue or flood.waiting:
            made.drain(flood)

    def check() -> None:
        feed(bytes(range(256)) * 5)
        drain()
        feed(bytes(range(100)))
        flood.queue.append(datagram(Sender().packet(
            timestamp=int(ground.clock.wall_time), rand="%016d" % ground.clock.mono_time)))
        ground.opens(made, drain)
    return Work([bytes(5), bytes(range(30))], feed, check)


LINKS = sorted(set(server.LINK_TYPES.values()), key=str)


@target(120)
def ip(ground: Ground) -> Work:
    """IPv4 and IPv6 packets in frames, also as knock packets, and filters that look at them."""
    packets = list(make_packets().values())
    trees = [server.parse_packet_filter(text) for text in FILTERS[:40:3]]
    heads = [(b"\0" * 12 + b"\x81\0\0\1\x08\0" if link[1] == 12 else b"\0" * link[0])
             for link in LINKS]

    def feed(data: bytes) -> None:
        kind = data[0] if data else 0
        packet = server.decode_frame(data[1:], LINKS[kind % len(LINKS)], kind > 127)
        for found in (server.decode_ip(packet), server.decode_knock(packet)):
            assert found is None or (
                len(found.source) == len(found.destination) in (4, 16) and found.payload in packet
                and 0 <= found.destination_port < 65536 and 0 <= found.source_port < 65536)
        with contextlib.suppress(IndexError):
            server.matches(trees[kind % len(trees)], packet)

    return Work([bytes([number]) + head + packet for number, head in enumerate(heads)
                 for packet in packets], feed)


@target(12)
def kernel_filter(ground: Ground) -> Work:
    """What the kernel drops: no packet that decode_ip() finds a client's payload in."""
    valid = [Sender(b"k").packet(), Sender(hmac_key=b"", mode="CTR", salt=bytes(8)).packet()] + [
        each["packet"].encode() for each in read_vectors("fwknop.json")["vectors"][::7]]
    code = server.compile_filter(server.parse_packet_filter("ip or ip6"), False,
                                 server.payload_filter(http=False))

    def feed(data: bytes) -> None:
        found = server.decode_ip(data)
        if found is not None and found.payload in valid and len(data) <= server.MAX_PAYLOAD:
            assert run_filter(code, data), "the kernel drops a client's packet"
    return Work([carry(each) for each in valid for _, *carriers in PayloadFilterTest.carriers
                 for carry in carriers], feed)


@target(80)
def knock(ground: Ground) -> Work:
    """Knock packets: a door opens only for a source that has sent all steps in their order."""
    made = ground.strict("SOURCE ANY\nOPEN_PORTS tcp/22\nKNOCK_SEQUENCE 7000,8000:udp,9000\n")
    made.knocks.is_own_address = lambda packed, now: len(packed) in (4, 16)
    steps = [(server.TCP, 7000), (server.UDP, 8000), (server.TCP, 9000)]
    seen: Dict[bytes, List[Tuple[int, int]]] = {}  # the steps of each source so far
    packets = [each for each in make_packets().values() if server.decode_knock(each)]

    def at(packet: bytes, port: int) -> bytes:
        start = 40 if packet[0] >> 4 == 6 else (packet[0] & 15) * 4
        return packet[:start + 2] + struct.pack(">H", port) + packet[start + 4:start + 13] + (
            b"\2" + packet[start + 14:])

    def feed(data: bytes) -> None:
        found = server.decode_knock(data)
        if found is None:
            return
        if len(seen) > 5000:  # not for as long as an attempt may go on
            ground.clock.pass_seconds(60)
            made.knocks.expire()
            seen.clear()
        done = seen.setdefault(found.source, [])
        if steps[len(done):len(done) + 1] == [(found.protocol, found.destination_port)]:
            done.append(steps[len(done)])
        made.knocks.take_knock(found, list(made.knocks.owners))
        if ground.firewall.rules:
            ground.expect(len(done) == 3, "a door is open for one who did not knock")
            made.grants.flush()
            seen.clear()

    def check() -> None:
        ground.clock.pass_seconds(60)
        made.knocks.expire()
        source = server.parse_address(CLIENT).packed
        ground.opens(made, lambda: [made.knocks.take_knock(server.Datagram(
            b"", source, 0, server.parse_address(HOST).packed, port, protocol,
            2 if protocol == server.TCP else 0), list(made.knocks.owners))
            for protocol, port in steps])
    return Work([at(each, port) for each in packets for port in (7000, 8000, 9000, 9)], feed, check)


# ------------------------------------------------------------------- the kernel and programs

def netlink_message(kind: int, body: bytes) -> bytes:
    """Return a message as the kernel sends it."""
    return struct.pack("=IHHII", len(body) + 16, kind, 2, 1, 55) + body + b"\0" * (-len(body) % 4)


class NetlinkSocket:
    """A socket on which the kernel says `data` to every question."""

    def __init__(self, *_: Any) -> None:
        self.waiting: List[bytes] = []

    data = b""

    def getsockname(self) -> Tuple[int, int]:
        """Return our port."""
        return 55, 0

    def sendto(self, question: bytes, _: Any) -> None:
        """Answer a question."""
        self.waiting = [NetlinkSocket.data]

    def recv(self, size: int, _: int = 0) -> bytes:
        """Return what waits."""
        if not self.waiting:
            raise BlockingIOError
        return self.waiting.pop()

    def __enter__(self) -> "NetlinkSocket":
        return self

    def close(self, *_: Any) -> None:
        """Nothing is open."""

    __exit__ = close


@target(30, server.CommandError)
def netlink(ground: Ground) -> Work:
    """Answers of nf_tables and of the routing table, and announcements."""
    name, item, nested = server.name_attribute, server.attribute, server.NESTED
    guard, kind = server.GUARD_TABLE, server.SetType(4, 32, False, server.INPUT, True)
    spoken: Any = NetlinkSocket()
    made = server.Netlink(spoken)
    firewall = server.NftFirewall("nft", (), frozenset([("tcp", 22)]), [kind], made, ground.log,
                                  clocks=ground.clocks)
    watch: Any = server.FirewallWatch(mock.Mock(firewall=firewall), ground.log, ground.clocks)
    watch.events, watch.mend_guard = spoken, bool
    module = types.SimpleNamespace(**dict(vars(socket), socket=NetlinkSocket))
    expression = item(1, name(1, "immediate") + item(2 | nested, item(2 | nested, item(
        2 | nested, name(2, "closed")))))
    head = b"\1\0\0\0" + name(1, guard.table)
    element = item(1 | nested, item(1 | nested, item(1, kind.key(server.Door(
        ipaddress.ip_network(CLIENT), None, "tcp", 22)))) + item(5, bytes(6) + b"\1\1"))
    bodies = [head + item(3 | nested, element * 2), head + name(2, "guard") + item(
        3, bytes(8)) + item(4 | nested, expression) + item(7, b"\0\5" + server.COMMENT.encode()),
              head + item(2, b"\0\0\0\2") + item(7, b"\0\0\0\7"), head + name(3, "guard"), head]
    route = struct.pack("=8BI", 2, 32, 0, 0, 0, 2, 0, 1, 0) + item(1, bytes([10, 55, 0, 1]))
    done = netlink_message(3, bytes(4))

    def ask() -> Iterator[Callable[[], object]]:
        yield lambda: made.rules(guard)
        yield lambda: made.table_numbers(guard)
        yield lambda: [(str(door), left) for door, left in firewall.read_set(guard, kind)]
        yield lambda: [server.is_untracked(each) for each in made.dump(server.GET_RULE, 1, b"")]
        yield lambda: [texts for texts, _ in server.nft_leftovers(made, set(), server.REST)]
        yield lambda: made.commit([(server.NEW_ELEMENT, 1, b"")])
        yield watch.hear
        yield lambda: is_own_address(server.parse_address(HOST))

    def feed(data: bytes) -> None:
        NetlinkSocket.data = data
        with mock.patch.object(server, "socket", module):
            for question in ask():
                spoken.waiting = [data]
                with contextlib.suppress(server.CommandError):
                    question()
    return Work([netlink_message(server.NEW_ELEMENT, each) + done for each in bodies] + [
        netlink_message(server.NEW_ROUTE, route),
        netlink_message(server.NLMSG_ERROR, b"\xfe\xff\xff\xff" + bytes(16)),
        netlink_message(server.NFT, bodies[-1]) + done], feed)


RULES = """\
table inet filter {
\tset spa4_to { type ipv4_addr; }
\tchain input {
\t\ttype filter hook input priority filter; policy drop;
\t\tiif "lo" accept
\t\tct state vmap { established : accept, related : accept, invalid : drop }
\t\ttcp dport { 22, 80-90 } counter packets 1 bytes 60 jump more comment "x"
\t}
\tchain more {
\t\tip saddr 10.0.0.0/8 reject with icmp type port-unreachable
\t}
}
-P INPUT DROP
-N FWKNOP_INPUT
-A INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A INPUT ! -i lo -p tcp -m multiport --dports 22,80:90 -j DROP
-A FWKNOP_INPUT -s 10.55.0.2/32 -p tcp -m tcp --dport 22 -m comment --comment "_exp_17" -j ACCEPT
-A FWKNOP_PREROUTING -s 10.55.0.2/32 -p tcp --dport 22 -m comment --comment _exp_17 \
-j DNAT --to-destination 10.0.0.1:80
spa4_to_24_once
user 'bob' opened 10.55.0.2 -> 0.0.0.0/0 tcp/22, tcp/80
"""


@target(8)
def rules(ground: Ground) -> Work:
    """What nft and iptables print, and names of sets, and doors in the log."""
    chains = (server.GrantChain("filter", "FWKNOP_INPUT", "ACCEPT"),
              server.GrantChain("nat", "FWKNOP_PREROUTING", "DNAT", kind=server.DNAT))

    def feed(data: bytes) -> None:
        text = data.decode("latin-1")
        for found in server.nft_host_chains(text):
            found.verdicts(("tcp", 22))
        for line in text.splitlines():
            server.host_rules(line, ("more", "INPUT"))
            if line.startswith("-A ") and line[3:].strip():
                server.iptables_rule(line)
            for chain in chains:
                server.parse_rule(line, chain)
            server.parse_set_name(line)
            server.cut_target(line)
    return Work([RULES.encode(), RULES[:400].encode(), RULES[400:].encode()], feed)


@target(30, server.PacketRejected)
def gpg(ground: Ground) -> Work:
    """The status lines of gpg: only those that it writes for the right keys prove a packet."""
    stanza = ground.stanzas(SIGNED)[0]
    fingerprints = frozenset(line.split()[1] for line in GOOD.split("\n")
                             if line.startswith("DECRYPTION_KEY"))
    good = status(GOOD)

    def feed(data: bytes) -> None:
        found = server.GpgAnswer(b"", server.parse_gpg_status(data), True)
        server.check_decrypted(found, fingerprints)
        signer = server.check_signature(found, stanza)
        assert signer.encode("latin-1") in data and b"GOODSIG" in data and b"GOODMDC" in data

    return Work([good, good.replace(b"GOODSIG", b"EXPSIG"), status("NODATA 1\nNO_SECKEY x")], feed,
                lambda: feed(good))


# ------------------------------------------------------------------- files

SERVER_CONF = """\
VERBOSE 0;
PCAP_INTF eth0;  # here
PCAP_FILTER udp port 62201 and not src net 10.0.0.0/8;
ENABLE_UDP_SERVER Y
UDPSERV_PORT 62201
MAX_SPA_PACKET_AGE +120;
GUARD_PORTS tcp/22, udp/1194;
NFT_ACCEPT_CHAINS inet filter input;
IPT_INPUT_ACCESS ACCEPT, filter, INPUT, 1, FWKNOP_INPUT, 1;
SNAT_TRANSLATE_IP 192.0.2.1;
SYSLOG_FACILITY LOG_LOCAL3;
FWKNOP_RUN_DIR /run/fwknop
DIGEST_FILE $FWKNOP_RUN_DIR/digest.cache;
OPENSPA_ADK_SECRET 7O4ZIRI;
PCAP_LOOP_SLEEP 100000;
"""
STANZA_LINES = """\
DESTINATION 10.55.0.1, 2001:db8::/32
OPEN_PORTS tcp/22, udp/53  # two
RESTRICT_PORTS tcp/25;
HMAC_DIGEST_TYPE sha512
ENCRYPTION_MODE legacy
FW_ACCESS_TIMEOUT 30
ACCESS_PREFIX6 56
REQUIRE_SOURCE_ADDRESS Y
REQUIRE_USERNAME bob
ACCESS_EXPIRE 12/31/2030
ACCESS_EXPIRE_EPOCH 1900000000
KNOCK_SEQUENCE 7000, 8000:udp, 100:icmp
KNOCK_TCPFLAGS syn,!ack
REQUIRE_KNOCK Y
FORCE_NAT 192.168.1.2 22
CMD_CYCLE_OPEN /bin/true $IP $PORT
CMD_CYCLE_CLOSE NONE
CMD_CYCLE_TIMER 9
"""
KNOCKD_CONF = """\
[options]
\tUseSyslog
\tLogFile = /var/log/knockd.log
\tInterface = eth0
[door]
\tsequence    = 7000,8000:udp,9000
\tseq_timeout = 5  # seconds
\ttcpflags    = syn,!ack
\tcommand     = /sbin/open %IP% 22
\tcmd_timeout = 10
\tstop_command =
[other]
\tOne_Time_Sequences = /no/such/file
\tTarget = 10.0.0.1
"""


def is_known(name: str) -> bool:
    """Return whether this is a directive of any file."""
    return name in client.ROWS or name in server.INCLUDES or bool(server.file_of(name))


def file_work(ground: Ground, name: str, seeds: Iterable[str], read: Callable[[str], object],
              *checked: str) -> Work:
    """Return the work of a reader of files: good ones stay so, and no error shows a secret."""
    path, texts = ground.place(name), [each.encode("latin-1") for each in seeds]

    def feed(data: bytes) -> None:
        write(path, data)
        try:
            read(path)
        except server.SpaError as error:
            shown = f"{error} {error.hint}".encode("latin-1", "replace")
            for secret in filter(shown.__contains__, SECRETS):
                names = [line.decode("latin-1").replace("\t", " ").partition(" ")[0].strip(":;")
                         for line in data.split(b"\n") if secret in line]
                if not any(map(is_known, names)):  # else it may be another directive's value
                    raise Fault(f"an error shows a key: {error}") from None
            raise

    def check() -> None:
        for text in checked:
            feed(text.encode("latin-1"))
    return Work(texts, feed, check)


@target(7, server.SpaError)
def fwknopd_conf(ground: Ground) -> Work:
    """fwknopd.conf, with its warnings and its dump."""
    def read(path: str) -> None:
        settings = server.ServerSettings()
        server.read_server_settings(path, settings)
        settings.set_defaults()
        assert settings.warnings() is not None and settings.packet_port and settings.dump()
    return file_work(ground, "fwknopd.conf", [SERVER_CONF, SERVER_CONF.replace("\n", "\r\n")], read,
                     SERVER_CONF)


@target(7, server.SpaError)
def access_conf(ground: Ground) -> Work:
    """access.conf: stanzas with all that they may have, and keys from another file."""
    write(ground.place("keys"), KEYS)
    begin = "SOURCE ANY\n" + KEYS
    each = [begin + line + "\n" for line in STANZA_LINES.splitlines()]
    whole = begin + STANZA_LINES
    more = (begin + "%include_keys keys\n%include keys\nSOURCE: 10.0.0.0/8;\n"
            "KEY_BASE64: c2VjcmV0;\nHMAC_KEY_BASE64 aG1hY2tleQ==\n")

    def read(path: str) -> None:
        for stanza in server.read_stanzas(path, directory=ground.directory)[0]:
            assert all(text == "<see the access.conf file>" for row, text in stanza.dump()
                       if row.secret and stanza.is_set(row))
    return file_work(ground, "access.conf", each + [whole, more, SIGNED], read, begin, SIGNED,
                     begin + "SOURCE ANY\nOPEN_PORTS tcp/22\nKNOCK_SEQUENCE 7000,9000,8000\n")


@target(7, server.SpaError)
def knockd_conf(ground: Ground) -> Work:
    """knockd.conf, with the commands for an address."""
    good = KNOCKD_CONF[:KNOCKD_CONF.index("[other]")]

    def read(path: str) -> None:
        found = server.read_knockd(path)
        assert list(found.dump())
        for door in found.doors:
            door.commands(server.parse_address(CLIENT))
    return file_work(ground, "knockd.conf", [good, KNOCKD_CONF], read, good)


@target(4, server.SpaError)
def one_time_file(ground: Ground) -> Work:
    """A file of sequences that open once: each line is used up, and then none is left."""
    def read(path: str) -> None:
        found = server.read_one_time_file(path)
        while found.lines:
            assert found.steps
            found.mark_used()
        assert not server.read_one_time_file(path).lines
    return file_work(ground, "once", ["7000,8000:udp\n#7,8\n\n 100:icmp,1\r\n9000, 9001"], read)


@target(6, server.SpaError)
def digest_cache(ground: Ground) -> Work:
    """digest.cache: what is in it, a new packet opens and opens once."""
    came = datagram(b"x" * 200)
    memory = ground.memory()
    for number in range(3):
        memory.remember(b"%d" % number, came)
        memory.refuse(b"%d" % (number + 7), "stale", NOW)
    with open(ground.path) as file:
        good = file.read()
    began = good.split("\n")[1]

    def read(path: str) -> None:
        made = server.ReplayMemory(path, 120, ground.log, ground.clocks)
        try:
            made.open_file()
            ground.clock.pass_seconds(1)
            with contextlib.suppress(server.NotFresh):
                made.check_fresh(int(ground.clock.wall_time))
            made.would_know(NOW)
            made.remember(b"new", came)
            try:
                made.remember(b"new", came)
            except server.NotFresh:
                pass
            else:
                raise Fault("a packet is new twice")
            made.clocks = server.Clocks(lambda: NOW + 10.0 ** 6, lambda: 10.0 ** 6, str)
            made.prune()
        finally:
            made.close()
            ground.logged()
    seeds = [good, good + good[good.index("\n") + 1:], good.replace(began, began[:30])]
    return file_work(ground, "digest.cache", seeds, read, good)


@target(15, server.SpaError, EOFError)
def capture_file(ground: Ground) -> Work:
    """Files of tcpdump -w, of each link type and byte order."""
    packets = list(make_packets().values())[:6]
    path, tree = ground.place("pcap"), server.parse_packet_filter("udp port 62201")

    def feed(data: bytes) -> None:
        write(path, data)
        capture = server.open_capture_file(path, tree, False)
        try:
            while True:
                capture.receive()
        finally:
            capture.close()
    return Work([write_pcap(packets, link, order) for link in (1, 0, 101, 113, 276)
                 for order in "<>"], feed)


@target(40, ValueError)
def packet_filter(ground: Ground) -> Work:
    """PCAP_FILTER texts: the kernel's program says the same of packets as our own evaluation."""
    packets = list(make_packets().values())

    def feed(data: bytes) -> None:
        tree = server.parse_packet_filter(data.decode("latin-1"))
        code = server.compile_filter(tree)
        for packet in packets[len(data) % 17::17]:
            assert run_filter(code, packet) is passes(tree, packet)
    return Work([each.encode() for each in FILTERS if len(each) < 200] + [
        b"not " * 390 + b"udp", b"(" * 190 + b"udp" + b")" * 190], feed, lambda: feed(b"udp"))


# ------------------------------------------------------------------- OpenSPA

TLVS = [bytes.fromhex(each["decoded"]["packet_tlv"]) for vector in VECTORS["vectors"]
        for each in vector["packets"]]
PEMS = [FIRST[name] for name in ("client_public_pem", "client_private_pem", "server_public_pem")]


@target(120, ValueError)
def tlv(ground: Ground) -> Work:
    """Containers and fields, of requests and answers: what is decoded is encoded alike."""
    def feed(data: bytes) -> None:
        is_answer = bool(len(data) & 1)
        fields = server.decode_ospa(data, is_answer)
        assert len(fields.target) in (4, 16)
        if not is_answer:
            assert vars(server.decode_ospa(fields.encode(), False)) == dict(
                vars(fields), seconds=0)
    return Work(TLVS, feed)


@target(40, ValueError)
def der(ground: Ground) -> Work:
    """Keys in DER."""
    return Work([server.read_pem(text)[1] for text in PEMS], server.read_integers)


@target(15, ValueError)
def pem(ground: Ground) -> Work:
    """Keys in PEM: PKCS#1, PKCS#8, SubjectPublicKeyInfo; keygen reads its own."""
    def feed(data: bytes) -> None:
        text = data.decode("latin-1")
        with contextlib.suppress(keygen.ConfigError):
            keygen.public_pem(text)
        server.RsaKey.parse(text, b"PRIVATE" in data, bytes)
    return Work([text.encode() for text in PEMS + [keygen.public_pem(
        FIRST["server_private_pem"])]], feed, lambda: feed(PEMS[0].encode()))


def ospa_fields(port: int, age: int = 0) -> Any:
    """Return the fields of a request for this port, by the client of the first vector."""
    uuid = bytes.fromhex(FIRST["client_uuid"].replace("-", ""))
    return server.OspaFields(6, (port, port), b"\x0a\x37\0\1", b"\x0a\x37\0\2",
                             NOW - age, uuid)


@target(4)
def openspa(ground: Ground) -> Work:
    """Requests of a client. RSA is slow: what it makes of a valid one is known."""
    made, pattern = be_strict(ground.gate()), ground.request()
    made.gate.memory.max_age = None
    ground.other.random_bytes = lambda size: b"\1" * size
    stranger = key(FIRST["server_private_pem"], True)
    seeds = [bytes.fromhex(FIRST["packets"][0]["hex"])] + [server.seal_ospa(
        pattern.payload[:8], ospa_fields(port, age).encode(), signer, ground.other,
        bytes([age]) * 48, b"abc") for age, port, signer in (
            (1, 23, ground.own), (2, 22, ground.own), (3, 22, stranger))]
    decrypt = made.ospa.key.decrypt
    known = {block: decrypt(block, 48) for block in (
        server.decode_tlv(each[8:])[2] for each in seeds)}
    made.ospa.key.decrypt = lambda block, size: known.get(block) or decrypt(block, size)
    made.ospa.receive(pattern._replace(payload=seeds[2]))  # which is a replay later
    made.grants.flush()

    def feed(data: bytes) -> None:
        made.ospa.rsa_until = 0.0
        made.ospa.receive(pattern._replace(payload=data))
        ground.closed()
        made.ospa.answers.clear()

    def check() -> None:
        ground.opens(made, lambda: made.ospa.receive(ground.request()))
    return Work(seeds, feed, check)


@target(3, ValueError, server.PacketRejected)
def openspa_fields(ground: Ground) -> Work:
    """Fields that a client has signed."""
    made, came = be_strict(ground.gate(LIMITED)), ground.request()
    stanza = made.ospa.stanzas[0]

    def feed(data: bytes) -> None:
        fields = server.decode_ospa(data, False)
        try:
            assert made.ospa.ask(came, fields, [], FIRST["client_uuid"], stanza, ground.own)
        finally:
            check_doors(ground, made)
        made.gate.memory.check_fresh(fields.timestamp)
    good = ospa_fields(22).encode()
    return Work([good] + [each for each in TLVS if server.decode_tlv(each).get(2)], feed,
                lambda: feed(good))


# ------------------------------------------------------------------- from root

@target(15)
def control(ground: Ground) -> Work:
    """Requests on the control socket: each has an answer that says whether it was done."""
    made = ground.strict("SOURCE ANY\n" + KEYS)
    made.commands.test = True  # so that a flush looks at no other firewall

    def feed(data: bytes) -> None:
        said = made.command(data.decode("ascii", "replace").strip())
        assert said.partition("\n")[0] == "ok" or said.startswith("error: "), said

    def check() -> None:
        made.grants.flush()
        feed(b"open root tcp/22 10.55.0.2 10m")
        ground.expect(ground.firewall.doors() == [DOOR22], "--open does not open")
        feed(b"close 10.55.0.2")
        ground.closed()
        ground.clock.pass_seconds(31)
        ground.logged()
    return Work([b"open root tcp/22,udp/53 10.55.0.2 10m", b"open (uid=0) tcp/22 2001:db8::1 1d",
                 b"close #1", b"close 10.55.0.0/16", b"close bob", b"guard", b"flush"], feed, check)


# ------------------------------------------------------------------- the client

@target(40, client.SpaError)
def stun(ground: Ground) -> Work:
    """Answers of STUN servers."""
    identity = b"identity-12b"
    seeds = [b"\1\1\0\0" + client.STUN_MAGIC + identity + struct.pack(
        ">HHH", 0x20, len(address) + 4, family) + b"\1\2" + address + b"\x80\x22\0\4abcd"
        for family, address in ((1, b"\x10\x20\x30\x40"), (2, b"\x10\x20" * 8))]

    def feed(data: bytes) -> None:
        found = client.decode_stun(data, identity)
        if found is not None:
            server.parse_address(client.check_own(found, "STUN"))
    return Work(seeds, feed, lambda: feed(seeds[0]))


class PageLink:
    """A connection to a web server that says one thing."""

    def __init__(self, data: bytes) -> None:
        self.pieces = [data[at:at + 4096] for at in range(0, len(data), 4096)][::-1]

    def recv(self, _: int) -> bytes:
        """Return what comes next."""
        return self.pieces.pop() if self.pieces else b""

    def sendall(self, *_: Any) -> None:
        """Take a question."""

    close = settimeout = sendall


@target(15, client.SpaError)
def own_address_page(ground: Ground) -> Work:
    """Web pages that tell our address: status, length, and lines."""
    page = client.parse_url("http://192.0.2.1/ip")
    settings: Any = types.SimpleNamespace(resolve_http_only=True, resolve_url=page, wget=None,
                                     user_agent="Fwknop/2.6")
    seeds = [b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body) for body in (
        b"192.0.2.7\n", b"<html>\n  2001:db8::7\n", b"::ffff:192.0.2.7\n")]

    def feed(data: bytes) -> None:
        with mock.patch.object(client, "find_addresses", lambda *_: [(2, ())]), \
                mock.patch.object(client, "open_socket", lambda *_: PageLink(data)):
            server.parse_address(client.resolve_address(settings, 0, None))
    return Work(seeds, feed, lambda: feed(seeds[0]))


RC_LINES = """\
SPA_SERVER gate.example
SPA_SERVER_PORT 62201
SPA_SERVER_PROTO http
ACCESS tcp/22, udp/53
ALLOW_IP stun:192.0.2.1:3478
KEY s3cretRijndael
HMAC_KEY hmacKey-for-tests
USE_HMAC Y
HMAC_DIGEST_TYPE SHA512
DIGEST_TYPE SHA1
ENCRYPTION_MODE legacy
FW_TIMEOUT 30
NAT_ACCESS 192.168.1.2,22
TIME_OFFSET -5m
SPOOF_USER bob
RESOLVE_URL https://gate.example/ip
KNOCK_SEQUENCE 7000, 8000:udp, 100:icmp
WGET_CMD /usr/bin/wget
"""


def rc_values(text: str, name: str) -> Optional[Dict[str, str]]:
    """Return what a stanza of an rc file sets; None if it is missing or broken."""
    with contextlib.suppress(client.SpaError):
        given = client.parse_stanza(text, "rc", name)
        return None if given is None else {each: given[each].text for each in given}
    return None


@target(10, client.SpaError)
def fwknoprc(ground: Ground) -> Work:
    """The client's ~/.fwknoprc: read, checked, and written again with the same values."""
    def read(path: str) -> None:
        text = client.read_private(path)
        given = client.parse_stanza(text, path, "gate") or {}
        settings = client.Settings(given)
        settings.check(str)
        again = client.edit_stanza(text, "new", client.stanza_values(given), set())
        values = rc_values(again, "new") or {}
        values.pop("USE_HMAC", "")
        assert {name: given[name].text for name in given if name != "USE_HMAC"}.keys() >= (
            values.keys()), "other values"
    good = "[default]\nVERBOSE N\n[gate]\n"
    return file_work(ground, ".fwknoprc", [good + RC_LINES] + [
        good + "ACCESS tcp/22\nSPA_SERVER gate\n" + line for line in RC_LINES.split("\n")], read,
        good + "ACCESS tcp/22\nSPA_SERVER gate\n")


@target(15, client.SpaError)
def pasted_stanza(ground: Ground) -> Work:
    """--import: no stanza that is there changes, and no new one names a program to run."""
    before, names = RC.replace("SHA512 ;", "sha512 ;"), ("default", "Work", "joe")
    values = [rc_values(before, name) for name in names]
    seeds = [b"[gate]\n" + "\n".join(RC_LINES.split("\n")[:number]).encode()
             for number in (2, 8, 17, 18)] + [b"# x\n[a]\nKEY k\n\n[b]\nACCESS udp/53\n"]

    def feed(data: bytes) -> None:
        after, _ = client.add_pasted(before, client.decode_text(data))
        assert values == [rc_values(after, name) for name in names], "an old stanza changed"
        for name in client.stanza_names(after)[2:]:
            found = rc_values(after, name)
            assert found and not found.keys() & {"GPG_EXE", "GPG_HOMEDIR", "WGET_CMD"}, found
    return Work(seeds, feed, lambda: feed(seeds[0]))


@target(30, ValueError)
def answer_datagram(ground: Ground) -> Work:
    """Answers to a packet: no other than the real one counts."""
    vector, *others = read_vectors("answer.json")["vectors"]
    question = client.Question(vector["packet"].encode(), *(
        bytes.fromhex(vector[name]) for name in ("key_hex", "hmac_key_hex")))
    seeds = [bytes.fromhex(each["answer_hex"]) for each in (vector, *others)]

    def feed(data: bytes) -> None:
        question.decode(data)
        if data != seeds[0]:
            raise Fault("an answer that nobody gave")
    return Work(seeds, feed, lambda: feed(seeds[0]))


@target(8, ValueError)
def openspa_answer(ground: Ground) -> Work:
    """The same for OpenSPA."""
    raw, good = (bytes.fromhex(each["hex"]) for each in FIRST["packets"])
    values, mine = client.parse_ospa(ospa(), "f"), client.decode_tlv(good[8:])
    session = values[client.PRIVATE].decrypt(mine[2], 48)
    values[client.PRIVATE].decrypt = lambda block, size: (
        session if block == mine[2] else bytes(size))  # as it does for a wrong one, but faster
    request = client.OspaRequest.__new__(client.OspaRequest)
    request.keys, request.header = (values[client.PRIVATE], values[client.SERVER_KEY]), raw[:8]
    request.fields = client.decode_ospa(
        server.unseal_ospa(raw, key(FIRST["server_private_pem"], True))[1], False)

    def feed(data: bytes) -> None:
        assert request.decode_answer(data) == 30
        outer = client.decode_tlv(data[8:])
        if data[:8] != good[:8] or outer[1] != mine[1] or outer[2] != mine[2]:
            raise Fault("an answer that nobody gave")
    return Work([good, raw], feed, lambda: feed(good))


@target(6, client.SpaError)
def ospa_file(ground: Ground) -> Work:
    """OSPA files."""
    def feed(data: bytes) -> None:
        try:
            client.parse_ospa(data.decode("latin-1"), "f")
        except client.ConfigError as error:
            if any(line.strip() and line.strip() in str(error)
                   for line in FIRST["client_private_pem"].split("\n")):
                raise Fault("an error shows a key") from None
            raise
    return Work([ospa().encode(), ospa(adk="7O4ZIRI", port='"22211"').encode()], feed,
                lambda: feed(ospa().encode()))


@target(20, keygen.SpaError)
def keygen_files(ground: Ground) -> Work:
    """access.conf and ~/.fwknoprc as keygen.py changes them: other stanzas stay."""
    keys = {"KEY_BASE64": "TkVX", "HMAC_KEY_BASE64": "TkVXIEhNQUM="}

    def feed(data: bytes) -> None:
        text = data.decode("latin-1")
        mark = "[work]" if text.startswith("[") else "# work"
        changed, lines = keygen.rotate_stanza(text, mark, lambda digest: keys), text.split("\n")
        begin, end = keygen.find_stanza(lines, mark)
        assert changed.startswith("\n".join(lines[:begin])) and keys["KEY_BASE64"] in changed and (
            changed.endswith("\n".join(lines[end:]))), "another stanza changed"
        if mark[0] == "#":
            keygen.retire_stanza(changed, "# old work")
        keygen.add_settings(keygen.add_stanza(text, "# new\nSOURCE ANY\n"), {"OPENSPA_PORT": "1"})
    seeds = [each.encode("latin-1", "replace") for each in (ACCESS, RC)]
    return Work(seeds, feed, lambda: list(map(feed, seeds)))


# ------------------------------------------------------------------- runs

class Running:
    """A target at work: its inputs, in an order that depends on the seed alone."""

    def __init__(self, name: str, seed: int, targets: Dict[str, Target]) -> None:
        self.name, self.seed, self.target = name, seed, targets[name]
        self.ground, self.draw = Ground("gate"), Mutator(f"{name} {seed}")
        with mock.patch.object(tempfile, "tempdir", MEMORY):
            self.ground.setUp()
        self.cases, self.slowest = 0, (0.0, b"")
        try:
            self.work = self.target.prepare(self.ground)
            self.check()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Remove what it made."""
        self.ground.doCleanups()

    def check(self) -> None:
        """Check that valid input is still understood; raise Fault."""
        try:
            self.work.check()
        except Exception as error:
            raise self.fault(error, b"(valid input)") from error

    def step(self) -> None:
        """Draw an input, and try it."""
        self.cases += 1
        self.take(self.draw.mutate(self.work.seeds))
        if self.cases % ROUND == 0:
            self.check()

    def take(self, data: bytes) -> None:
        """Try an input; raise Fault for what the target must not do."""
        began = time.perf_counter()
        try:
            self.work.feed(data)
        except self.target.documented:
            pass
        except Exception as error:
            raise self.fault(error, data) from error
        took = time.perf_counter() - began
        if took > self.slowest[0]:
            self.slowest = took, data

    def fault(self, error: Exception, data: bytes) -> Fault:
        """Return the fault of an input, with all that is needed to repeat it."""
        trace = "".join(traceback.format_exception(type(error), error, error.__traceback__)[-4:])
        return Fault(f"target {self.name}, seed {self.seed}, case {self.cases}, input\n{data!r}\n"
                     f"{trace}")


class Run:
    """Some targets, which share the cases."""

    def __init__(self, names: Iterable[str] = (), seed: int = 1,
                 targets: Dict[str, Target] = TARGETS) -> None:
        self.running = [Running(name, seed, targets) for name in names or targets]
        self.blocks: List[int] = []  # of memory, now and then

    def close(self) -> None:
        """Remove what the targets made, the last one's first: each puts back what it replaced."""
        for each in self.running[::-1]:
            each.close()

    @property
    def cases(self) -> int:
        """Return how many inputs were tried."""
        return sum(each.cases for each in self.running)

    def round(self) -> None:
        """Try as many inputs as a round has."""
        whole = sum(each.target.share for each in self.running)
        for each in self.running:
            for _ in range(max(1, ROUND * each.target.share // whole)):
                each.step()

    def go(self, cases: int = 0, seconds: float = 0) -> None:
        """Try so many inputs, or for so long; raise Fault, also if memory grew in the last half."""
        end, due = time.monotonic() + seconds, 0
        with contextlib.redirect_stderr(io.StringIO()) as said:
            while self.cases < cases if cases else time.monotonic() < end:
                self.round()
                said.seek(0)
                said.truncate()
                if self.cases >= due:
                    due += 10 * ROUND
                    gc.collect()
                    self.blocks.append(sys.getallocatedblocks())
            for each in self.running:
                each.check()
        later = self.blocks[len(self.blocks) // 2:]  # some memories have a bound, and fill up
        if len(later) > 3 and min(later[-2:]) - max(later[:2]) > 5000 + len(later) * ROUND // 5:
            raise Fault(f"memory grows: {later} blocks")


def run_atheris(running: Running, seconds: float) -> None:
    """Let atheris mutate the inputs of a target for so long, in a child: it ends its process."""
    if os.fork():
        if os.wait()[1]:
            raise Fault(f"target {running.name}: atheris has shown its input above")
        return
    import atheris  # type: ignore[import-untyped]
    for each in gc.get_objects():
        if isinstance(each, types.FunctionType) and each.__module__ in (
                "spa_server", "spa_client", "keygen"):
            atheris.instrument_func(each)
    corpus = running.ground.place("corpus/")
    os.mkdir(corpus)
    for number, data in enumerate(running.work.seeds):
        write(f"{corpus}{number}", data)
    atheris.Setup([sys.argv[0], corpus, f"-artifact_prefix={corpus}",
                   f"-max_total_time={seconds:.0f}"], running.take)
    atheris.Fuzz()


def main() -> None:
    """Run as the command line says."""
    parser = argparse.ArgumentParser(usage=(__doc__ or "").split("\n\n")[1].strip())
    parser.add_argument("targets", nargs="*", choices=[[], *TARGETS], metavar="TARGET")
    parser.add_argument("--seconds", type=float, default=0)
    parser.add_argument("--cases", type=int, default=0)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--input", type=ast.literal_eval)
    parser.add_argument("--atheris", action="store_true")
    options = parser.parse_args()
    made = Run(options.targets, options.seed)
    try:
        if options.input is not None or options.atheris:
            for each in made.running:
                if options.atheris:
                    run_atheris(each, options.seconds or 10)
                else:
                    each.take(options.input)
            return
        began = time.monotonic()
        made.go(options.cases, options.seconds or 10)
        print(f"{made.cases} cases, seed {options.seed}, {time.monotonic() - began:.0f} s, "
              f"blocks of memory {made.blocks[0]} to {made.blocks[-1]}")
    except Fault as fault:
        sys.exit(f"FAULT: {fault}")
    finally:
        for each in made.running:
            seconds, data = each.slowest
            print(f"  {each.name:<20} {each.cases:9} cases, the slowest took {1000 * seconds:7.1f} "
                  f"ms: {data[:40]!r}")
        made.close()


if __name__ == "__main__":
    main()
