"""What a genuine packet may open, and what the server remembers, opens, closes and says.

The firewall is a fake that obeys: it keeps open doors, so the tests say what is open. Clocks are
fakes too. The live firewalls have tests of their own.
"""

import contextlib
import errno
import fcntl
import hashlib
import inspect
import io
import ipaddress
import itertools
import os
import random
import re
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import traceback
import unittest
from functools import partial
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple  # noqa: F401
from unittest import mock

import spa_server as server
from tests.support import TOP, DirectoryCase, needs_root, read, run, skip, write
from tests.test_packet import NOW, Sender, b64, judge

CLIENT, HOST = "10.55.0.2", "10.55.0.1"


class Clock:
    """Wall time and monotonic time, moved by hand."""

    def __init__(self) -> None:
        self.wall_time, self.mono_time = float(NOW), 5000.0

    def wall(self) -> float:
        """Return what time.time() would."""
        return self.wall_time

    def mono(self) -> float:
        """Return what time.monotonic() would."""
        return self.mono_time

    def clocks(self, boot: str = "boot-1") -> server.Clocks:
        """Return both as the server takes them."""
        return server.Clocks(self.wall, self.mono, lambda: boot)

    def pass_seconds(self, seconds: float) -> None:
        """Let time pass."""
        self.wall_time += seconds
        self.mono_time += seconds

    def jump(self, seconds: float) -> None:
        """Set the wall clock, as an administrator or NTP does."""
        self.wall_time += seconds


class FakeFirewall(server.Firewall):  # type: ignore[misc]
    """A kernel that keeps doors, ends them in time, and says when it is asked for nonsense."""

    keeps = True

    def __init__(self, clock: Clock) -> None:
        super().__init__("", server.Log(), clock.clocks())
        self.clock, self.rules = clock, {}  # type: Tuple[Clock, Dict[Any, Any]]
        self.failures, self.failing_closes, self.failing_flushes, self.prepared = 0, 0, 0, 0
        self.whole, self.most, self.slow = True, 0, 0.0
        self.refused: Any = None

    def describe(self, door: Any = None) -> str:
        """Return where grants go."""
        return "FWKNOP_INPUT"

    def prepare(self) -> None:
        """Make what prepare() makes."""
        self.prepared, self.whole = self.prepared + 1, True

    def intact(self) -> bool:
        """Return whether nobody took our rules away."""
        return self.whole

    def add(self, grants: List[Any], replaced: List[Any]) -> None:
        """All or none, as a transaction does it."""
        if self.failures:
            self.failures -= 1
            raise server.CommandError("fake-restore failed: no reason given")
        if not self.whole:
            raise server.CommandError("fake-restore failed: no such chain")
        if self.refused in [grant.door for grant in grants]:
            raise server.CommandError("fake-restore: line 2 failed")
        rules, self.most = dict(self.rules), max(self.most, len(grants))
        for grant in replaced:
            if rules.pop(grant.door, None) is None:
                raise server.CommandError("fake-restore failed: no such rule")
        for grant in grants:
            assert grant.door not in rules, "a second rule for the same door"
            rules[grant.door] = grant
        self.rules = rules

    def remove(self, grants: List[Any]) -> None:
        """Delete rules; what is gone already is no error."""
        self.clock.pass_seconds(self.slow)
        if self.failing_closes:
            self.failing_closes -= 1
            raise server.CommandError("fake failed: Resource temporarily unavailable")
        for grant in grants:
            self.rules.pop(grant.door, None)

    def grants(self) -> List[Any]:
        """Return the rules that are there."""
        return list(self.rules.values())

    def flush(self) -> None:
        """Delete all rules."""
        if self.failing_flushes:
            self.failing_flushes -= 1
            raise server.CommandError("fake failed: no luck")
        self.rules = {}

    def withdraw(self) -> None:
        """Nothing more to take away."""
        self.whole = False

    def unguard(self) -> None:
        """No guard here."""

    def doors(self) -> List[str]:
        """Return what can be passed right now, in the log's words."""
        return sorted(str(door) for door, grant in self.rules.items()
                      if grant.ends > self.clock.mono_time)


def datagram(payload: bytes = b"", source: str = CLIENT,
             destination: str = HOST) -> server.Datagram:
    """Return a datagram from and to these addresses."""
    return server.Datagram(payload, ipaddress.ip_address(source).packed, 60208,
                           ipaddress.ip_address(destination).packed, 62201)


class ServerCase(DirectoryCase):
    """A directory, clocks, a log and a firewall, and the server on top of them."""

    def setUp(self) -> None:
        """Make all but the server, which needs stanzas."""
        super().setUp()
        self.path = self.place("digest.cache")
        self.clock = Clock()
        self.clocks = self.clock.clocks()
        self.firewall = FakeFirewall(self.clock)
        self.stream = io.StringIO()
        self.log = server.Log(self.clock.mono)
        self.log.open_stream(self.stream)

    def memory(self, boot: str = "boot-1", path: Optional[str] = None, max_age: Optional[int] = 120
               ) -> server.ReplayMemory:
        """Return a replay memory on the fake clocks, as a start of the server makes it."""
        made = server.ReplayMemory(self.path if path is None else path, max_age, self.log,
                                   self.clock.clocks(boot))
        made.open_file()
        self.addCleanup(made.close)
        return made

    def stanzas(self, text: str) -> List[server.Stanza]:
        """Return the stanzas of an access.conf."""
        return list(server.read_stanzas(write(self.place("access.conf"), text))[0])

    def serve(self, access: str, conf: str = "", seconds: float = 1000) -> server.Server:
        """Return a server for these files that has run for some seconds."""
        settings = server.ServerSettings()
        text = "FWKNOP_RUN_DIR %s;\n%s" % (self.directory, conf)
        server.read_server_settings(write(self.place("fwknopd.conf"), text), settings)
        settings.set_defaults()
        self.clock.pass_seconds(-seconds)
        made = server.Server(server.Configuration(settings, self.stanzas(access), []),
                             self.firewall, self.log, self.clocks)
        made.gate.memory = server.open_memory(settings, self.log, self.clocks)
        made.remembers = True
        self.clock.pass_seconds(seconds)
        made.grants.adopt()
        self.addCleanup(self.close, made)
        return made

    def close(self, made: server.Server) -> None:
        """Close what a server has open: start() and reload() open some of it."""
        made.gate.memory.close()
        for each in (made.selector, made.ears.captures, made.watch.events, made.link_events):
            if each is not None:
                each.close()

    def logged(self) -> str:
        """Return the log since the last call."""
        text = self.stream.getvalue()
        self.stream.seek(0)
        self.stream.truncate()
        return text


KEYS = "KEY s3cretRijndael\nHMAC_KEY hmacKey-for-tests\n"
DOOR22 = "10.55.0.2 -> 0.0.0.0/0 tcp/22"
NO_DECRYPTION = mock.patch.object(server.PacketKeys, "decrypt", side_effect=AssertionError)


# ------------------------------------------------------------------- judgement

# (stanza lines, message, type, timeout, user, what is opened for how long, or why not)
JUDGED = (
    ("", "10.55.0.2,tcp/22", 1, 0, "bob", "10.55.0.2 tcp/22 30"),
    ("", "10.55.0.2,tcp/22,udp/53", 1, 0, "bob", "10.55.0.2 tcp/22 udp/53 30"),
    ("", "10.9.9.9,tcp/22", 1, 0, "bob", "10.9.9.9 tcp/22 30"),
    ("", "0.0.0.0,tcp/22", 1, 0, "bob", "10.55.0.2 tcp/22 30"),
    ("", "::,tcp/22", 1, 0, "bob", "10.55.0.2 tcp/22 30"),
    ("", "2001:db8::7,tcp/22", 1, 0, "bob", "2001:db8::7 tcp/22 30"),
    # OPEN_PORTS: the request is a subset, whatever stands twice in either
    ("OPEN_PORTS tcp/22", "10.55.0.2,tcp/22", 1, 0, "bob", "10.55.0.2 tcp/22 30"),
    ("OPEN_PORTS tcp/22", "10.55.0.2,tcp/22,tcp/22", 1, 0, "bob", "10.55.0.2 tcp/22 30"),
    ("OPEN_PORTS tcp/22", "10.55.0.2,udp/22", 1, 0, "bob", "ports"),
    ("OPEN_PORTS tcp/22", "10.55.0.2,tcp/23", 1, 0, "bob", "ports"),
    ("OPEN_PORTS tcp/22", "10.55.0.2,tcp/22,tcp/23", 1, 0, "bob", "ports"),
    ("OPEN_PORTS tcp/22, tcp/22", "10.55.0.2,tcp/22", 1, 0, "bob", "10.55.0.2 tcp/22 30"),
    ("OPEN_PORTS tcp/22, tcp/22", "10.55.0.2,tcp/22,tcp/9999", 1, 0, "bob", "ports"),
    ("OPEN_PORTS tcp/22, tcp/22", "10.55.0.2,tcp/9999,tcp/22", 1, 0, "bob", "ports"),
    ("OPEN_PORTS tcp/1,udp/2", "10.55.0.2,udp/2,tcp/1", 1, 0, "bob", "10.55.0.2 udp/2 tcp/1 30"),
    ("RESTRICT_PORTS tcp/25", "10.55.0.2,tcp/25", 1, 0, "bob", "ports"),
    ("RESTRICT_PORTS tcp/25", "10.55.0.2,tcp/22,tcp/25", 1, 0, "bob", "ports"),
    ("RESTRICT_PORTS tcp/25", "10.55.0.2,tcp/22", 1, 0, "bob", "10.55.0.2 tcp/22 30"),
    ("OPEN_PORTS tcp/22,tcp/25\nRESTRICT_PORTS tcp/25", "10.55.0.2,tcp/25", 1, 0, "bob", "ports"),
    # time
    ("FW_ACCESS_TIMEOUT 7", "10.55.0.2,tcp/22", 1, 0, "bob", "10.55.0.2 tcp/22 7"),
    ("FW_ACCESS_TIMEOUT 7", "10.55.0.2,tcp/22", 3, 60, "bob", "10.55.0.2 tcp/22 60"),
    ("FW_ACCESS_TIMEOUT 7", "10.55.0.2,tcp/22", 3, 0, "bob", "10.55.0.2 tcp/22 7"),
    ("FW_ACCESS_TIMEOUT 0", "10.55.0.2,tcp/22", 1, 0, "bob", "no time"),
    ("FW_ACCESS_TIMEOUT 0", "10.55.0.2,tcp/22", 3, 0, "bob", "no time"),
    ("FW_ACCESS_TIMEOUT 0", "10.55.0.2,tcp/22", 3, 5, "bob", "10.55.0.2 tcp/22 5"),
    ("", "10.55.0.2,tcp/22", 3, 65536, "bob", "10.55.0.2 tcp/22 300"),
    ("MAX_FW_TIMEOUT 10", "10.55.0.2,tcp/22", 3, 11, "bob", "10.55.0.2 tcp/22 10"),
    ("MAX_FW_TIMEOUT 10", "10.55.0.2,tcp/22", 1, 0, "bob", "10.55.0.2 tcp/22 30"),
    # who
    ("REQUIRE_SOURCE_ADDRESS Y", "0.0.0.0,tcp/22", 1, 0, "bob", "no address"),
    ("REQUIRE_SOURCE_ADDRESS Y", "::,tcp/22", 1, 0, "bob", "no address"),
    ("REQUIRE_SOURCE_ADDRESS Y", "::ffff:0.0.0.0,tcp/22", 1, 0, "bob", "no address"),
    ("REQUIRE_SOURCE_ADDRESS Y", "10.1.1.1,tcp/22", 1, 0, "bob", "10.1.1.1 tcp/22 30"),
    ("REQUIRE_USERNAME bob", "10.55.0.2,tcp/22", 1, 0, "bob", "10.55.0.2 tcp/22 30"),
    ("REQUIRE_USERNAME bob", "10.55.0.2,tcp/22", 1, 0, "Bob", "user"),
    ("REQUIRE_USERNAME bob", "10.55.0.2,tcp/22", 1, 0, "bob ", "user"),
    ("REQUIRE_USERNAME bob smith", "10.55.0.2,tcp/22", 1, 0, "bob smith",
     "10.55.0.2 tcp/22 30"),
    ("ACCESS_EXPIRE_EPOCH %d" % NOW, "10.55.0.2,tcp/22", 1, 0, "bob", "expired stanza"),
    # a grant does not outlive its stanza
    ("ACCESS_EXPIRE_EPOCH %d" % (NOW + 1), "10.55.0.2,tcp/22", 1, 0, "bob", "10.55.0.2 tcp/22 1"),
    ("ACCESS_EXPIRE_EPOCH %d" % (NOW + 9), "10.55.0.2,tcp/22", 3, 60, "bob", "10.55.0.2 tcp/22 9"),
    ("ACCESS_EXPIRE_EPOCH %d" % (NOW + 31), "10.55.0.2,tcp/22", 1, 0, "bob",
     "10.55.0.2 tcp/22 30"),
    ("ACCESS_EXPIRE 11/01/2026", "10.55.0.2,tcp/22", 1, 0, "bob", "expired stanza"),
    ("ACCESS_EXPIRE 12/31/2026", "10.55.0.2,tcp/22", 1, 0, "bob", "10.55.0.2 tcp/22 30"),
    # carrier NAT
    ("ACCESS_PREFIX4 24", "10.55.0.2,tcp/22", 1, 0, "bob", "10.55.0.0/24 tcp/22 30"),
    ("ACCESS_PREFIX4 24", "::,tcp/22", 1, 0, "bob", "10.55.0.0/24 tcp/22 30"),
    ("ACCESS_PREFIX6 56", "2001:db8:1:2ff::7,tcp/22", 1, 0, "bob",
     "2001:db8:1:200::/56 tcp/22 30"),
    ("ACCESS_PREFIX6 56", "10.55.0.2,tcp/22", 1, 0, "bob", "10.55.0.2 tcp/22 30"),
)


class JudgeTest(ServerCase):
    """A pure function of packet, stanza, datagram and time."""

    def packet(self, text: str, kind: int = 1, timeout: int = 0, user: str = "bob") -> Any:
        """Return a packet with these fields, off the wire."""
        extra = [b"%d" % timeout] if kind == 3 else []
        sender = Sender()
        return server.unlock(sender.packet(text, kind, extra, user), sender.keys())[0]

    def judge(self, lines: str, packet: Any, came: Any, rule: bool = False) -> str:
        """Return what is opened, or the reason of the rejection."""
        stanza = self.stanzas("SOURCE ANY\n" + KEYS + lines + "\n")[0]
        settings = server.ServerSettings()
        settings.set_line(server.Line("", 1, "ENABLE_DESTINATION_RULE", "NY"[rule]))
        try:
            doors, seconds, _ = judge(packet, stanza, came, settings)
        except server.PacketRejected as rejection:
            return str(rejection.reason)
        sources = {str(door.source).replace("/32", "").replace("/128", "") for door in doors}
        self.assertEqual(1, len(sources))
        there = {str(door.destination) for door in doors if door.destination is not None}
        return " ".join([sources.pop()] + ["%s/%d" % (door.protocol, door.port) for door in doors]
                        + ["to " + each for each in there] + [str(seconds)])

    def test_table(self) -> None:
        """Each row of the table."""
        for lines, text, kind, timeout, user, expected in JUDGED:
            with self.subTest(lines=lines, text=text, kind=kind, timeout=timeout, user=user):
                packet = self.packet(text, kind, timeout, user)
                self.assertEqual(expected, self.judge(lines, packet, datagram()))

    def test_source_of_the_packet_in_ipv6(self) -> None:
        """`::` and 0.0.0.0 mean where the packet came from, in its own family."""
        for text in ("0.0.0.0,tcp/22", "::,tcp/22"):
            came = datagram(source="2001:db8::9", destination="2001:db8::1")
            self.assertEqual("2001:db8::9 tcp/22 30", self.judge("", self.packet(text), came))
            self.assertEqual("2001:db8::/64 tcp/22 30",
                             self.judge("ACCESS_PREFIX6 64", self.packet(text), came))

    def test_destination_rule(self) -> None:
        """ENABLE_DESTINATION_RULE opens only where the packet was sent to."""
        packet = self.packet("10.55.0.2,tcp/22")
        self.assertEqual("10.55.0.2 tcp/22 to 10.55.0.1 30",
                         self.judge("", packet, datagram(), True))
        self.assertEqual("family", self.judge("", self.packet("2001:db8::7,tcp/22"), datagram(),
                                              True))
        self.assertEqual("family", self.judge("", packet, datagram(
            source="2001:db8::9", destination="2001:db8::1"), True))

    def test_source_and_destination_of_stanzas(self) -> None:
        """admits() for addresses, networks, netmasks, both families and ANY."""
        for lines, source, destination, expected in (
                ("SOURCE ANY", "1.2.3.4", HOST, True), ("SOURCE any", "::1", "::2", True),
                ("SOURCE 10.55.0.2", "10.55.0.2", HOST, True),
                ("SOURCE 10.55.0.2", "10.55.0.3", HOST, False),
                ("SOURCE 10.55.0.0/24", "10.55.0.255", HOST, True),
                ("SOURCE 10.55.0.0/24", "10.55.1.0", HOST, False),
                ("SOURCE 10.55.0.9/255.255.0.0", "10.55.7.7", HOST, True),
                ("SOURCE 10.55.0.9/255.255.0.0", "10.56.0.9", HOST, False),
                ("SOURCE 1.1.1.1, 10.0.0.0/8", "10.9.9.9", HOST, True),
                ("SOURCE 1.1.1.1,10.0.0.0/8", "1.1.1.2", HOST, False),
                ("SOURCE 0.0.0.0/0", "9.9.9.9", HOST, True),
                ("SOURCE 0.0.0.0/0", "2001:db8::1", "2001:db8::2", False),
                ("SOURCE ::/0", "9.9.9.9", HOST, False),
                ("SOURCE 2001:db8::/32", "2001:db8:ffff::1", "::1", True),
                ("SOURCE 2001:db8::/32", "2001:db9::1", "::1", False),
                ("SOURCE 2001:db8::1, 10.0.0.1", "10.0.0.1", HOST, True),
                ("SOURCE ANY\nDESTINATION 10.55.0.1", CLIENT, HOST, True),
                ("SOURCE ANY\nDESTINATION 10.55.0.9", CLIENT, HOST, False),
                ("SOURCE ANY\nDESTINATION 2001:db8::/32", CLIENT, HOST, False),
                ("SOURCE ANY\nDESTINATION 2001:db8::/32", "::1", "2001:db8::1", True),
                ("SOURCE 10.0.0.0/8\nDESTINATION ANY", CLIENT, HOST, True)):
            with self.subTest(lines=lines, source=source, destination=destination):
                stanza = self.stanzas(lines + "\n" + KEYS)[0]
                self.assertIs(expected, stanza.admits(datagram(b"", source, destination)))


# ------------------------------------------------------------------- the whole way

class ReceiveTest(ServerCase):
    """A datagram from its arrival to the open door."""

    sender = Sender()

    def knock(self, made: Any, sender: Optional[Sender] = None, source: str = CLIENT,
              **fields: Any) -> bytes:
        """Send a packet of now; return it."""
        fields.setdefault("timestamp", int(self.clock.wall_time))
        self.count = getattr(self, "count", 0) + 1
        payload = (sender or self.sender).packet(rand="%016d" % self.count, **fields)
        made.gate.receive(datagram(payload, source))
        return payload

    def test_a_knock_opens_and_the_time_closes(self) -> None:
        """The main job."""
        made = self.serve("SOURCE ANY\n" + KEYS)
        self.knock(made)
        self.assertEqual([DOOR22], self.firewall.doors())
        text = self.logged()
        self.assertIn("(stanza #1) SPA Packet from IP: 10.55.0.2 received with access source "
                      "match\n", text)
        self.assertIn("Added access rule to FWKNOP_INPUT for 10.55.0.2 -> 0.0.0.0/0 tcp/22, "
                      "expires at %d\n" % (NOW + 30), text)
        self.clock.pass_seconds(29.9)
        made.grants.expire()
        self.assertEqual([DOOR22], self.firewall.doors())
        self.clock.pass_seconds(0.1)
        made.grants.expire()
        self.assertEqual({}, self.firewall.rules)
        self.assertIn("Removed rule 1 from FWKNOP_INPUT with expire time of %d" % (NOW + 30),
                      self.logged())

    def test_test_mode_says_so(self) -> None:
        """Or its log would read as if a door were open (tests/spec/fwknop.md 3.1)."""
        words = "; --test mode enabled, skipping firewall manipulation"
        for test, end in ((False, ""), (True, words)):
            made = self.serve("SOURCE ANY\n" + KEYS)
            made.commands.test = test
            self.knock(made)
            self.assertIn("for 30 seconds%s\n" % end, self.logged())

    def test_stanza_order(self) -> None:
        """The first stanza that opens something ends it; a failure goes on to the next."""
        other = Sender(b"other", b"other-hmac")
        access = ("SOURCE 192.0.2.1\n" + KEYS + "FW_ACCESS_TIMEOUT 1\n"
                  "SOURCE ANY\nKEY other\nHMAC_KEY other-hmac\nFW_ACCESS_TIMEOUT 2\n"
                  "SOURCE ANY\n" + KEYS + "OPEN_PORTS tcp/25\nFW_ACCESS_TIMEOUT 3\n"
                  "SOURCE ANY\n" + KEYS + "FW_ACCESS_TIMEOUT 4\n"
                  "SOURCE ANY\n" + KEYS + "FW_ACCESS_TIMEOUT 5\n")
        for sender, text, source, number, seconds in (
                (self.sender, "10.55.0.2,tcp/22", CLIENT, 4, 4),
                (self.sender, "10.55.0.2,tcp/25", CLIENT, 3, 3),
                (other, "10.55.0.2,tcp/22", CLIENT, 2, 2),
                (self.sender, "10.55.0.2,tcp/22", "192.0.2.1", 1, 1)):
            with self.subTest(number=number):
                self.firewall.flush()
                made = self.serve(access)
                self.knock(made, sender, source, text=text)
                self.assertEqual([NOW + seconds],
                                 [grant.expires for grant in self.firewall.grants()])
                self.assertIn("(stanza #%d) user 'bob'" % number, self.logged())

    def test_nothing_opens_for_strangers(self) -> None:
        """No stanza for the source; wrong HMAC; wrong key; each with fwknopd's words."""
        for access, sender, fields, expected in (
                ("SOURCE 192.0.2.1\n" + KEYS, self.sender, {},
                 "No access data found for source IP: 10.55.0.2\n"),
                ("SOURCE ANY\n" + KEYS, Sender(hmac_key=b"wrong"), {},
                 "[10.55.0.2] (stanza #1) Error creating fko context: Args contain invalid data: "
                 "FKO_ERROR_INVALID_DATA_HMAC_COMPAREFAIL\n"),
                ("SOURCE ANY\n" + KEYS, Sender(key=b"wrong"), {},
                 "[10.55.0.2] (stanza #1) Error creating fko context: Decryption failed or "
                 "decrypted data is invalid\n"),
                ("SOURCE ANY\n" + KEYS, self.sender, {"timestamp": NOW - 500},
                 "[10.55.0.2] (stanza #1) SPA data time difference is too great (500 seconds)."),
                ("SOURCE ANY\n" + KEYS, self.sender, {"timestamp": NOW + 500},
                 "[10.55.0.2] (stanza #1) SPA data time difference is too great (500 seconds)."),
                ("SOURCE ANY\n" + KEYS + "REQUIRE_SOURCE Y", self.sender,
                 {"text": "0.0.0.0,tcp/22"},
                 "[10.55.0.2] (stanza #1) Got 0.0.0.0 when valid source IP was required."),
                ("SOURCE ANY\n" + KEYS + "REQUIRE_USERNAME pyuser", self.sender, {"user": "eve"},
                 "[10.55.0.2] (stanza #1) Username in SPA data (eve) does not match required "
                 "username: pyuser\n"),
                ("SOURCE ANY\n" + KEYS + "OPEN_PORTS tcp/1", self.sender, {},
                 "[10.55.0.2] (stanza #1) One or more requested protocol/ports was denied per "
                 "access.conf."),
                ("SOURCE ANY\n" + KEYS, self.sender, {"kind": 0, "text": "10.55.0.2,id"},
                 "[10.55.0.2] (stanza #1) SPA Command messages are not allowed in the current "
                 "configuration."),
                ("SOURCE ANY\n" + KEYS, self.sender, {"kind": 2, "extra": [b64(b"1.2.3.4,22")]},
                 "(stanza #1) SPA packet from 10.55.0.2 requested NAT access, but is not "
                 "enabled/supported")):
            with self.subTest(expected=expected):
                self.logged()
                made = self.serve(access + "\n")
                self.knock(made, sender, **fields)
                self.assertIn(expected, self.logged())
                self.assertEqual({}, self.firewall.rules)
                self.assertEqual(1, sum(made.tally.counts.values()))

    def test_form_and_gpg(self) -> None:
        """Junk never reaches a key; GPG packets are told by their length."""
        made = self.serve("SOURCE ANY\n" + KEYS)
        for payload, expected in (
                (b"x" * 20, "[10.55.0.2] preprocess_spa_data() returned error 4097"),
                (b"!" * 200, "[10.55.0.2] preprocess_spa_data() returned error 4098: 'Data is not "
                             "an SPA message' for incoming packet."),
                (b"U2FsdGVkX1" + b"A" * 200, "preprocess_spa_data() returned error 4096"),
                (b"A" * 600, "No stanza encryption mode match for encryption type: 2.")):
            made.gate.receive(datagram(payload))
            self.assertIn(expected, self.logged())

    def test_junk_leaves_nothing_behind(self) -> None:
        """Neither in the replay memory nor at the rejection that all packets of a stanza share."""
        made = self.serve("SOURCE ANY\n" + KEYS)
        payload = Sender(hmac_key=b"another").packet(timestamp=NOW)
        for _ in range(50):
            made.gate.receive(datagram(payload))
        self.assertEqual({"wrong HMAC": 50}, made.tally.counts)
        trace = made.gate.stanzas[0].wrong_hmac.__traceback__
        self.assertLess(len(list(traceback.walk_tb(trace))), 9)
        self.assertEqual(({}, {}), (made.gate.memory.seen, made.gate.memory.refused))

    def test_an_hmac_is_looked_at_before_anything_else(self) -> None:
        """Without the right tag nothing is decoded or decrypted, in any stanza."""
        made = self.serve("SOURCE ANY\n" + KEYS + "SOURCE ANY\nKEY k\nHMAC_KEY h\n")
        with NO_DECRYPTION:
            for payload in (Sender(hmac_key=b"x").packet(), Sender(hmac_key=b"").packet(),
                            b"A" * 200, b"=" * 200, b"A" * 140 + b"="):
                made.gate.receive(datagram(payload))
        self.assertEqual({"wrong HMAC": 5}, made.tally.counts)

    def test_braces_in_a_packet(self) -> None:
        """A user name may have braces, which mean nothing in a log line."""
        made = self.serve("SOURCE ANY\n" + KEYS + "REQUIRE_USERNAME {pyuser}\n")
        for user in ("{}", "{0}", "{source}", "{source}{x}", "{text", "}{", "%s%d", "{source!r}",
                     "{stanza.__class__}"):
            with self.subTest(user=user):
                self.knock(made, user=user)
                self.assertIn("Username in SPA data (%s) does not match required username: "
                              "{pyuser}\n" % user, self.logged())
        self.assertEqual({"user": 9}, made.tally.counts)
        self.knock(made, user="{pyuser}")
        self.assertEqual([DOOR22], self.firewall.doors())
        self.assertIn("user '{pyuser}' ", self.logged())

    def test_control_characters_never_reach_the_log(self) -> None:
        """A message of a holder of the keys may hold any byte."""
        made = self.serve("SOURCE ANY\n" + KEYS)
        for text in ("10.55.0.2,echo\x1b[31m\n<30>fake line", "10.55.0.2\x1b,tcp/22",
                     "10.55.0.2,tcp/22\nStarting fwknopd", "\x00,\x00", "\x9b,\x9b", "\xff\xfe,x"):
            for kind in (0, 1):
                self.knock(made, text=text, kind=kind)
                for line in self.logged().split("\n"):
                    self.assertFalse([c for c in line if not " " <= c <= "~"], line)
        self.log.info("a\nb\x1b[0m\x7f\t")
        self.assertEqual("a\\x0ab\\x1b[0m\\x7f\\x09\n", self.logged())
        # 80 to 9f are control characters as well: 9b begins a terminal sequence.
        self.log.info("\x85\x9b")
        self.assertEqual("\\x85\\x9b\n", self.logged())

    def test_a_replay_costs_no_decryption_and_no_line_of_its_own(self) -> None:
        """A captured packet that is sent thousands of times is less work than junk with a key."""
        made = self.serve("SOURCE ANY\n" + KEYS)
        payload = self.knock(made)
        stale = Sender().packet(timestamp=NOW - 500)
        made.gate.receive(datagram(stale))
        self.logged()
        with NO_DECRYPTION:
            for _ in range(3000):
                made.gate.receive(datagram(payload))
                made.gate.receive(datagram(stale))
        self.assertEqual(3000, made.tally.counts["replay"])
        self.assertEqual(3001, made.tally.counts["stale"])
        self.assertNotIn("error", made.tally.counts)
        self.assertLess(len(self.logged().splitlines()), 30)

    def test_refused_packets_are_known_within_bounds(self) -> None:
        """The memory of them does not grow."""
        made = self.serve("SOURCE ANY\n" + KEYS)
        for number in range(server.REFUSED_KNOWN + 50):
            made.gate.memory.refused["%d" % number] = number, "stale"
        made.gate.receive(datagram(Sender().packet(timestamp=NOW - 500)))
        self.assertEqual(server.REFUSED_KNOWN, len(made.gate.memory.refused))

    def test_what_is_known_as_refused(self) -> None:
        """Any packet that an HMAC proves and that opened nothing, and then for the same reason.

        One of the same HMAC key, which another stanza can decrypt, is not among them.
        """
        other = KEYS.replace("s3cretRijndael", "another")
        rows = (
            ({"timestamp": NOW - 500}, Sender(), "stale", KEYS),
            ({"timestamp": NOW + 500}, Sender(), "from the future", KEYS),
            ({"timestamp": NOW - 100}, Sender(), "before memory", KEYS),
            ({}, Sender(key=b"wrong"), "wrong key", KEYS),
            ({}, Sender(hmac_key=b"wrong"), "", KEYS), ({}, Sender(), "", KEYS),
            ({}, Sender(), "", other + "SOURCE ANY\n" + KEYS),
            ({}, Sender(key=b"wrong", hmac_key=b""), "", "KEY k\n"))  # type: Any
        for fields, sender, reason, stanzas in rows:
            made = self.serve("SOURCE ANY\n" + stanzas, "ENABLE_DIGEST_PERSISTENCE N;\n", 10)
            with self.subTest(fields=fields, reason=reason):
                self.knock(made, sender, **fields)
                payload = self.knock(made, sender, **fields)
                self.assertEqual([reason] * 2 if reason else [],
                                 [why for _, why in made.gate.memory.refused.values()])
                if reason:
                    with NO_DECRYPTION:
                        made.gate.receive(datagram(payload))
                    self.assertEqual({reason: 3}, made.tally.counts)

    def test_a_failing_firewall(self) -> None:
        """Opens nothing, is an error in the log, and the packet stays remembered."""
        made = self.serve("SOURCE ANY\n" + KEYS)
        self.firewall.failures = 2
        payload = self.knock(made)
        self.assertEqual({}, self.firewall.rules)
        self.assertEqual({}, made.grants.live)
        self.assertEqual({"firewall": 1}, made.tally.counts)
        text = self.logged()
        self.assertIn("fake-restore failed: no reason given", text)
        self.assertIn("nothing was opened: the firewall failed", text)
        made.gate.receive(datagram(payload))
        self.assertIn("Replay detected", self.logged())
        self.assertEqual({}, self.firewall.rules)
        self.knock(made)
        self.assertEqual([DOOR22], self.firewall.doors())

    def test_one_failure_of_the_firewall_is_tried_again(self) -> None:
        """Once: somebody may have changed our chains since we looked."""
        made = self.serve("SOURCE ANY\n" + KEYS)
        for harm in ("failures", "whole"):
            setattr(self.firewall, harm, 1 if harm == "failures" else False)
            self.knock(made)
            self.assertEqual([DOOR22], self.firewall.doors())
            made.grants.flush()

    def test_remembered_before_opened(self) -> None:
        """When the door opens, the digest is in the file: a crash there allows no replay. The log
        comes later, in its order."""
        made = self.serve("SOURCE ANY\n" + KEYS)
        seen = []  # type: List[str]
        opened = self.firewall.add
        self.logged()

        def look(grants: List[Any], replaced: List[Any]) -> None:
            with open(self.path) as stream:
                seen.append(stream.read())
            self.assertEqual("", self.logged())
            opened(grants, replaced)

        self.firewall.add = look  # type: ignore[assignment]
        payload = self.knock(made)
        digest = b64(hashlib.sha256(payload).digest()).decode()
        self.assertIn(digest, seen[0])
        self.assertRegex(self.logged(), r"access source match\nAdded .*\n\(stanza #1\) user ")

    def test_what_is_remembered(self) -> None:
        """Opened and refused packets are; stale ones and those without the keys are not."""
        access = ("SOURCE ANY\n" + KEYS + "OPEN_PORTS tcp/22\nREQUIRE_USERNAME bob\n")
        for fields, sender, remembered in (
                ({}, self.sender, True), ({"user": "eve"}, self.sender, True),
                ({"text": "1.1.1.1,tcp/1"}, self.sender, True),
                ({"timestamp": NOW - 121}, self.sender, False),
                ({"timestamp": NOW + 121}, self.sender, False),
                ({}, Sender(hmac_key=b"wrong"), False), ({}, Sender(key=b"wrong"), False)):
            made = self.serve(access)
            before = len(made.gate.memory.seen)
            self.knock(made, sender, **fields)
            with self.subTest(fields=fields):
                self.assertEqual(before + remembered, len(made.gate.memory.seen))

    def test_rejections_are_limited_in_the_log_and_counted(self) -> None:
        """A burst, then one a second, and how many were left out; the counts miss none."""
        made = self.serve("SOURCE ANY\n" + KEYS)
        self.logged()
        for _ in range(1000):
            made.gate.receive(datagram(b"!" * 150))
        self.assertEqual(server.BURST, len(self.logged().splitlines()))
        self.clock.pass_seconds(1)
        for _ in range(1000):
            made.gate.receive(datagram(b"!" * 150))
        lines = self.logged().splitlines()
        self.assertEqual(2, len(lines))
        self.assertIn("%d more packets were rejected" % (1000 - server.BURST), lines[0])
        self.assertEqual({"not an SPA packet": 2000}, made.tally.counts)
        self.knock(made)
        self.assertIn("opened", self.logged(), "what opens is logged, whatever else comes")

    def test_ipv6(self) -> None:
        """The same over IPv6, from packet to door."""
        made = self.serve("SOURCE 2001:db8::/32\n" + KEYS + "ACCESS_PREFIX6 64\n")
        payload = self.sender.packet("2001:db8::2,tcp/22", timestamp=NOW)
        made.gate.receive(datagram(payload, "2001:db8::2", "2001:db8::1"))
        self.assertEqual(["2001:db8::/64 -> ::/0 tcp/22"], self.firewall.doors())
        made.gate.receive(datagram(payload, "2001:db8::2", "2001:db8::1"))
        self.assertIn("Replay detected from source IP: 2001:db8::2,", self.logged())

    def test_bit_games_without_hmac(self) -> None:
        """The four of tests/spec/fwknop.md 1.13 are replays."""
        made = self.serve("SOURCE ANY\nKEY s3cretRijndael\n")
        packet = self.knock(made, Sender(hmac_key=b""))
        self.firewall.flush()
        made.grants.live.clear()
        alphabet = server.ALPHABET
        last = alphabet.index(packet[-1:])
        first = alphabet.index(packet[:1])
        for variant in ([packet, packet + b"=", packet + b"=="]
                        + [alphabet[n:n + 1] + packet[1:] for n in range(64) if n & 3 == first & 3]
                        + [packet[:-1] + alphabet[n:n + 1]
                           for n in range(last & ~3, (last & ~3) + 4)]):
            made.gate.receive(datagram(variant))
            self.assertEqual({}, self.firewall.rules, variant)

    def test_a_key_with_and_without_hmac(self) -> None:
        """Two stanzas have it: a packet opens once, with its tag or without, in any order."""
        kinds = itertools.product(("MD5", "SHA256", "SHA512"), (1, -1), (1, -1))
        for number, (kind, order, turn) in enumerate(kinds):
            stanzas = ["SOURCE ANY\n%sHMAC_DIGEST_TYPE %s\n" % (KEYS, kind),
                       "SOURCE ANY\nKEY s3cretRijndael\n"]
            made = self.serve("".join(stanzas[::order]))
            payload = Sender(hmac_type=kind).packet(timestamp=NOW, rand="%016d" % number)
            keys = made.gate.stanzas[order < 0].keys
            assert keys is not None
            forms = [payload, payload[:-keys.tag_length]]
            with self.subTest(kind=kind, order=order, turn=turn):
                for form in 2 * forms[::turn]:
                    made.gate.receive(datagram(form))
                self.assertEqual({"accepted": 1, "replay": 3}, made.tally.counts, self.logged())

    def test_stanzas_that_share_an_hmac_key(self) -> None:
        """One look is for all of them; the first that can opens, in the file's order."""
        mac = KEYS.partition("\n")[2]
        access = ["SOURCE 10.55.0.9\n" + KEYS, "SOURCE ANY\nKEY other\n" + mac,
                  "SOURCE ANY\n" + KEYS + "HMAC_DIGEST_TYPE SHA3_256\n",
                  "SOURCE ANY\nHMAC_DIGEST_TYPE SHA512\n" + KEYS, "SOURCE ANY\nKEY bare\n",
                  "SOURCE ANY\n" + KEYS]
        for order, opened_by in ((1, 6), (-1, 1)):
            made = self.serve("".join(access[::order]))
            self.assertEqual({(43, False): 1, (43, True): 1, (86, True): 1, (0, True): 1}, {
                kind: len(locks) for kind, locks in
                made.gate.locks[server.SALTED_PREFIX].items()})
            self.logged()
            self.knock(made)
            self.assertIn("(stanza #%d) user 'bob'" % opened_by, self.logged())
            for kind, number in (("SHA3_256", 3), ("SHA512", 4)):
                self.knock(made, Sender(hmac_type=kind))
                self.assertIn("(stanza #%d)" % (number if order > 0 else 7 - number),
                              self.logged().splitlines()[-1])


# ------------------------------------------------------------------- replay memory

class PromiseTest(ServerCase):
    """The functions that run before a key is proven: the script and the README tell them all."""

    def test_until_a_key_is_proven(self) -> None:
        """Junk of the right form passes the functions that the docstring names, and no others."""
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        made, null = self.serve("SOURCE ANY\n" + KEYS), open(os.devnull, "w")
        for each in (near, far, null):
            self.addCleanup(each.close)
        self.log.open_stream(null)
        capture = server.PacketCapture.__new__(server.PacketCapture)
        server.Capture.__init__(capture, near, "any")
        payload = b"A" * 200
        udp = struct.pack(">4H", 4000, 62201, 8 + len(payload), 0) + payload
        far.send(struct.pack(">BxHxxxxBBxx4s4s", 0x45, 20 + len(udp), 64, 17, b"\x0a\x37\0\2",
                             b"\x0a\x37\0\1") + udp)
        seen = []  # type: List[Any]

        def note(frame: Any, event: str, _: Any) -> None:
            """Note the code of each function of the script that is called."""
            code = frame.f_code
            if (event == "call" and code.co_filename == server.__file__ and code not in seen
                    and code.co_name[0] != "<"):  # such as <listcomp>: it is in a function
                seen.append(code)

        sys.setprofile(note)
        try:
            made.drain(capture)
        finally:
            sys.setprofile(None)
        self.assertEqual({"wrong HMAC": 1}, made.tally.counts)
        names = {each.__code__: each.__qualname__ for owner in vars(server).values()
                 for each in (vars(owner).values() if isinstance(owner, type) else [owner])
                 if hasattr(each, "__code__")}
        lines = sum(len(inspect.getsourcelines(code)[0]) for code in seen)
        promise = "%d functions of %d lines" % (len(seen), lines)
        told = re.search(r"key is proven, (\d+ functions of \d+ lines) .*?\n\n(.*?)\n\n",
                         server.__doc__ or "", re.DOTALL)
        assert told
        self.assertEqual(told.group(2).replace(",", "").split(),
                         [names.get(code, code.co_name) for code in seen])
        self.assertEqual(promise, told.group(1))
        self.assertIn(promise, read(os.path.join(TOP, "README.md")))
        self.assertLessEqual(len(seen), 20)
        self.assertLessEqual(lines, 200)


class LogTest(ServerCase):
    """Where a line goes, and with what severity."""

    def test_journal(self) -> None:
        """Lines to the stream that systemd names begin with the severity (sd-daemon(3))."""
        with tempfile.NamedTemporaryFile("w+") as stream:
            status = os.fstat(stream.fileno())
            for value, prefixed in (("%d:%d" % (status.st_dev, status.st_ino), True),
                                    ("%d:%d" % (status.st_dev, status.st_ino + 1), False),
                                    (None, False)):
                os.environ.pop("JOURNAL_STREAM", None)
                if value is not None:
                    os.environ["JOURNAL_STREAM"] = value
                self.addCleanup(os.environ.pop, "JOURNAL_STREAM", None)
                stream.truncate(0)
                stream.seek(0)
                log = server.Log()
                log.open_stream(stream)
                log.error("e")
                log.warning("w")
                log.info("i")
                log.debug("d")
                stream.seek(0)
                self.assertEqual("<3>e\n<4>w\n<6>i\n" if prefixed else "e\nw\ni\n", stream.read())

    def receiver(self, kind: int, path: str) -> socket.socket:
        """Return a socket like syslog's; another one may have been there."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        made = socket.socket(socket.AF_UNIX, kind)
        self.addCleanup(made.close)
        made.settimeout(10)
        made.bind(path)
        return made

    def test_syslog(self) -> None:
        """The lines of the C library, without a stream only there; also to a syslog that is new."""
        log, path = server.Log(), self.place("log")
        for facility, with_pid, expected in (
                ("LOG_DAEMON", True, r"^<27>%%s me\[%d\]: e$" % os.getpid()),
                ("LOG_LOCAL7", False, r"^<187>%s me: e$")):
            log.syslog = server.SyslogOutlet("me", facility, with_pid, path)
            assert log.syslog
            self.addCleanup(log.syslog.close)
            for _ in range(2):
                made = self.receiver(socket.SOCK_DGRAM, path)
                log.error("e")
                self.assertRegex(made.recv(99).decode(),
                                 expected % r"[A-Z][a-z]{2} [ 123]\d \d\d:\d\d:\d\d")
                for line in ("w\n", "i"):
                    (log.warning if "w" in line else log.info)(line)
                log.debug("d")
                self.assertTrue(made.recv(99).endswith(b": w\\x0a"))
                self.assertTrue(made.recv(99).endswith(b": i"))
                made.close()
        log.error("nobody takes this")
        made = self.receiver(socket.SOCK_STREAM, path)
        made.listen(5)
        log.error("e")
        peer = made.accept()[0]
        peer.close()
        log.error("again")
        peer = made.accept()[0]
        self.addCleanup(peer.close)
        self.assertRegex(peer.recv(99), rb"^<187>[^\0]* me: again\0$")

    def test_full(self) -> None:
        """No place for lines is waited for: they are dropped, and counted when it goes on."""
        reader, writer = os.pipe()
        os.mkfifo(self.place("fifo"))
        fifo = os.open(self.place("fifo"), os.O_RDONLY | os.O_NONBLOCK)
        near, far = socket.socketpair()
        terminal, end = os.openpty()
        made = self.receiver(socket.SOCK_DGRAM, self.place("log"))
        made.setblocking(False)
        syslog = server.SyslogOutlet("me", "LOG_DAEMON", False, self.place("log"))
        self.addCleanup(syslog.close)
        streams = [stack.enter_context(os.fdopen(each, "w")) for stack in [contextlib.ExitStack()]
                   for each in (writer, near.detach(), end)]
        for each in (reader, fifo, far.fileno(), terminal):
            os.set_blocking(each, False)
        outlets = [server.StreamOutlet(stream) for stream in streams]
        for outlet, read_some in (
                (outlets[0], partial(os.read, reader)),
                (outlets[1], far.recv),
                (outlets[2], partial(os.read, terminal)),
                (server.FileOutlet(self.place("fifo")), partial(os.read, fifo)),
                (syslog, made.recv)):
            with self.subTest(outlet=type(outlet).__name__):
                wrote = 0
                while outlet.dropped < 3 and wrote < 1000:
                    outlet.write(server.INFO, "x" * 3000)
                    wrote += 1
                found = b""
                for _ in range(2):
                    with contextlib.suppress(BlockingIOError):
                        for text in iter(partial(read_some, 65536), b""):
                            found += text
                    outlet.write(server.INFO, "it goes on")
                dropped = map(int, re.findall(rb"(\d+) lines of the log were dropped: ", found))
                self.assertEqual(wrote, found.count(b"x" * 3000) + sum(dropped))
                self.assertEqual(wrote < 1000, b"it goes on" in found)
        for stream in streams:
            stream.close()
        for each in (reader, fifo, terminal):
            os.close(each)
        far.close()

    def test_long_lines(self) -> None:
        """A pipe gets as much of a line as it takes at once."""
        reader, writer = os.pipe()
        with os.fdopen(writer, "w") as stream:
            log = server.Log()
            log.open_stream(stream)
            log.info("x" * 9000)
            log.close_stream()
        with open(reader, "rb") as file:
            self.assertEqual(b"x" * (select.PIPE_BUF - 1) + b"\n", file.read())

    def test_verbose(self) -> None:
        """VERBOSE shows the packet, without what may be a password in it."""
        made = self.serve("SOURCE ANY\n" + KEYS)
        self.log.level = server.DEBUG
        made.gate.receive(datagram(Sender().packet(timestamp=NOW, extra=(b64(b"s3cret"),))))
        text = self.logged()
        for line in ("       Username: bob", " Message String: 10.55.0.2,tcp/22",
                     "    Server Auth: (not shown)"):
            self.assertIn("\n" + line + "\n", text)
        self.assertNotIn("s3cret", text)
        self.assertNotIn("SPA Field", self.logged())
        made.gate.receive(datagram(Sender(hmac_key=b"other").packet(timestamp=NOW)))
        self.assertNotIn("SPA Packet: '", self.logged())  # of what anybody can send

    def test_verbose_stanzas(self) -> None:
        """VERBOSE 2 shows the stanzas in force, without keys."""
        made = self.serve("SOURCE ANY\n" + KEYS + "OPEN_PORTS tcp/22\n")
        self.log.level = server.DEBUG
        for verbose in (1, 2):
            vars(made.settings)["verbose"] = verbose
            server.Configuration(made.settings, made.gate.stanzas, []).tell(self.log)
            lines = self.logged().splitlines()
            for line in ("SOURCE (1):  ANY", "                 OPEN_PORTS:  tcp/22"):
                self.assertEqual(verbose > 1, line in lines, lines)
            self.assertNotIn("s3cret", "".join(lines))

    def test_internal_error(self) -> None:
        """VERBOSE shows message and frames of a mistake of ours, without what it quotes."""
        made = self.serve("SOURCE ANY\n" + KEYS)
        payload = Sender().packet(timestamp=NOW)
        for level, error, expected in (
                (server.INFO, KeyError("s3cret"), r"KeyError in line \d+"),
                (server.DEBUG, KeyError("s3cret"), r"KeyError in line (\d+): '...' "
                 r"\(receive \d+, admit \d+, let_in \d+, check_unseen \d+, .*\)"),
                (server.DEBUG, ValueError("bad '%s': \"%r\"" % (KEYS, payload)),
                 r"ValueError in line \d+: bad '...\" \(receive \d+, .*\)"),
                (server.DEBUG, OSError(24, "Too many open files"),
                 r"OSError in line (\d+): line \1: Too many open files \(receive \d+, .*\)")):
            with self.subTest(error=error), mock.patch.object(server, "digest_of",
                                                              side_effect=error):
                self.log.level = level
                self.logged()
                made.gate.receive(datagram(payload))
                text = self.logged()
                self.assertRegex(text, r"^\[10.55.0.2\] internal error: %s\n$" % expected)
                self.assertNotIn("s3cret", text)

    def test_nobody_reads(self) -> None:
        """A closed stream does not end the server."""
        stream = io.StringIO()
        log = server.Log()
        log.open_stream(stream)
        stream.close()
        log.error("e")


class MemoryTest(ServerCase):
    """What was seen is not taken twice, and what is fresh is taken."""

    def accept(self, memory: Any, name: str, timestamp: Optional[float] = None) -> str:
        """Return why a packet is rejected, or nothing."""
        try:
            memory.check_fresh(int(self.clock.wall_time if timestamp is None else timestamp))
            memory.remember(name.encode(), datagram())
        except server.NotFresh as rejection:
            return str(rejection.reason)
        return ""

    def test_replay(self) -> None:
        """The second time is told, with the words of fwknopd."""
        memory = self.memory()
        self.assertEqual("", self.accept(memory, "a"))
        self.assertEqual("replay", self.accept(memory, "a"))
        self.assertEqual("", self.accept(memory, "b"))
        with self.assertRaises(server.NotFresh) as caught:
            memory.remember(b"a", datagram(source="10.55.0.3"))
        self.assertRegex(str(caught.exception), (
            r"^Replay detected from source IP: 10\.55\.0\.3, Destination proto/port: 17/62201, "
            r"Original source IP: 10\.55\.0\.2, Original dst proto/port: 17/62201, "
            r"Entry created: \d\d/\d\d/\d\d \d\d:\d\d:\d\d$"))

    def test_file(self) -> None:
        """fwknopd's format, mode 0600, and our beginning as a comment."""
        memory = self.memory()
        self.accept(memory, "a")
        with open(self.path) as stream:
            lines = stream.read().splitlines()
        digest = b64(hashlib.sha256(b"a").digest()).decode()
        self.assertEqual("# <digest> <proto> <src_ip> <src_port> <dst_ip> <dst_port> <time>",
                         lines[0])
        self.assertRegex(lines[1], r"^# began [0-9.]+ boot-1 0 [0-9]+ [0-9.]+ 120$")
        self.assertEqual(["%s 17 10.55.0.2 60208 10.55.0.1 62201 %d" % (digest, NOW)], lines[2:])
        self.assertEqual(43, len(digest))
        self.assertEqual(0o600, os.stat(self.path).st_mode & 0o777)
        self.assertEqual("replay", self.accept(self.memory(), "a"))

    def test_file_of_fwknopd(self) -> None:
        """Is loaded: what it has seen is a replay, and it began to be ours now."""
        digest = b64(hashlib.sha256(b"a").digest()).decode()
        with open(self.path, "w") as stream:
            stream.write("# <digest> <proto> <src_ip> <src_port> <dst_ip> <dst_port> <time>\n"
                         "%s 17 10.55.0.2 60208 0.0.0.0 62201 %d\n" % (digest, NOW - 10))
        memory = self.memory()
        self.assertEqual("before memory", self.accept(memory, "b", NOW - 5))
        self.assertEqual("replay", self.accept(memory, "a"))
        self.assertEqual("", self.accept(memory, "c"))
        with open(self.path) as stream:
            self.assertIn(digest, stream.read())

    def test_broken_files(self) -> None:
        """Are loaded as far as they can be, and stop neither the start nor a knock."""
        digest = b64(hashlib.sha256(b"a").digest()).decode()
        line = digest + " 17 10.55.0.2 60208 10.55.0.1 62201 "
        for text in (b"", b"\0" * 500, b"\n\n\n", bytes(range(256)) * 9, b"# began\n",
                     b"# began x y z\n",
                     b"# began 1 boot-1 x\n", line.encode() + b"x\n", b"a b c d e f 1\n" * 3,
                     line.encode()[:50], b"# began nan boot-1 0\n",
                     # str.isdigit() is true of this, and int() is not possible
                     line.encode() + b"\xb2\n",
                     # more than time.localtime() or a float can hold
                     line.encode() + b"9" * 18 + b"\n", line.encode() + b"9" * 400 + b"\n",
                     b"# refused a " + b"9" * 5000 + b" stale\n", b"# refused a \xb2 b\n",
                     b"# began 1 boot-1 0 0 nan nan\n", b"# began 1 boot-1 0 0 nan nan nan\n",
                     b"# began -inf boot-1 0\n", b"# at 12 boot-1 99999999999\n"):
            with self.subTest(text=text[-30:]):
                with open(self.path, "wb") as stream:
                    stream.write(text)
                memory = self.memory()
                self.clock.pass_seconds(not text)  # an empty file is one that was given up
                self.assertIn(self.accept(memory, "a"), ("", "replay"))
                self.assertEqual("", self.accept(memory, "b"))
                memory.close()

    def test_age(self) -> None:
        """Differences greater than MAX_SPA_PACKET_AGE on either side, and how many seconds."""
        for offset, expected in ((0, ""), (-120, ""), (120, ""), (-121, "stale"),
                                 (121, "from the future"), (2 ** 32, "from the future"),
                                 (-NOW, "stale")):
            self.clock.pass_seconds(-1000)
            memory = self.memory(path="")
            self.clock.pass_seconds(1000)
            with self.subTest(offset=offset):
                self.assertEqual(expected, self.accept(memory, "a", NOW + offset))
        with self.assertRaises(server.NotFresh) as caught:
            memory.check_fresh(NOW - 500)
        self.assertIn("(500 seconds)", str(caught.exception))

    def test_pruning_is_bounded(self) -> None:
        """Memory and file hold what could be fresh, and not what can't."""
        memory = self.memory()
        for number in range(3000):
            self.assertEqual("", self.accept(memory, str(number)))
            self.clock.pass_seconds(1)
        self.assertLessEqual(len(memory.seen), 243)
        with open(self.path) as stream:
            self.assertLessEqual(len(stream.readlines()), 2 + 243 + server.REWRITE_AFTER)
        self.assertEqual("replay", self.accept(memory, "2999"))
        self.assertEqual("stale", self.accept(memory, "0", NOW))

    def test_aging_off(self) -> None:
        """ENABLE_SPA_PACKET_AGING N: nothing is pruned, and any age passes, once."""
        memory = self.memory(max_age=None)
        for number, age in enumerate((0, 10 ** 6, -10 ** 6)):
            self.assertEqual("", self.accept(memory, str(number), NOW - age))
        for number in range(1500):
            self.accept(memory, "x%d" % number)
            self.clock.pass_seconds(10)
        self.assertEqual(1503, len(memory.seen))
        self.assertEqual("replay", self.accept(memory, "0", NOW))
        self.assertEqual("replay", self.accept(self.memory("boot-2", max_age=None), "0", NOW))

    def test_another_age(self) -> None:
        """What came by a greater MAX_SPA_PACKET_AGE opens once, after a reload or kill -9."""
        for first, ahead in ((120, 100), (3600, 3500), (None, 5000)):
            for starts in (False, True):
                memory, name = self.memory(max_age=10), "%s %s" % (first, starts)
                self.assertEqual("", self.accept(memory, name + " before"))
                memory.set_age(first)
                sent = int(self.clock.wall_time) + ahead
                self.assertEqual("", self.accept(memory, name, sent))
                if starts:
                    memory = self.memory(max_age=10)
                memory.set_age(10)
                for _ in range(ahead // 10):
                    self.clock.pass_seconds(10)
                    self.assertEqual("", self.accept(memory, str(self.clock.wall_time)))
                with self.subTest(name):
                    self.assertEqual("replay", self.accept(memory, name, sent))
                self.clock.pass_seconds(6000)  # in the end it forgets
                self.assertEqual("", self.accept(memory, name + " after"))
                self.assertEqual(1, len(memory.seen))
                self.assertEqual("stale", self.accept(memory, name, sent))
                memory.close()
                os.unlink(self.path)

    def test_persistence_off(self) -> None:
        """ENABLE_DIGEST_PERSISTENCE N: no file, replays are still told, older ones are rejected."""
        made = self.serve("SOURCE ANY\n" + KEYS, "ENABLE_DIGEST_PERSISTENCE N;\n")
        self.assertEqual("", made.gate.memory.path)
        payload = Sender().packet(timestamp=NOW)
        made.gate.receive(datagram(payload))
        made.gate.receive(datagram(payload))
        self.assertEqual({"accepted": 1, "replay": 1}, made.tally.counts)
        self.assertFalse(os.path.exists(self.path))
        self.clock.pass_seconds(10)
        self.assertEqual("before memory", self.accept(self.memory(path=""), "other", NOW))

    # name of scenario: steps. pass and jump move the clocks; restart, reboot (new boot, same file)
    # and lose (new boot, no file) start anew; new and old knock: a fresh packet is taken, and one
    # that was seen is not, whatever the clock says.
    SCENARIOS = {
        "nothing happens": "new old pass:60 old new pass:200 old new",
        "restart": "new restart old new pass:50 old restart old new",
        "reboot keeps the file": "new pass:5 reboot old pass:1 new old",
        "lost file": "new pass:5 lose old pass:1 new old",
        "forward": "new jump:3600 old new old pass:300 old new",
        "forward and back": "new jump:3600 new jump:-3600 old new pass:300 old new",
        "back": "new jump:-60 old new jump:-30 old pass:10 old new",
        "far back": "new jump:-3600 old new old",
        # FORGOTTEN must not be in the future, or honest packets are rejected for an hour.
        "far back for long": "new jump:-3600 pass:300 new pass:300 new old",
        "back and there again": "new jump:-600 pass:300 old pass:300 old pass:10 new",
        "back after it was forgotten": "new pass:300 new jump:-300 old restart old",
        "forward, restart, back": "new jump:3600 restart old jump:-3600 old",
        "back and restart": "new jump:-100 restart old pass:10 new old pass:95 old new",
        "wrong clock at boot": "jump:-99999999 lose pass:20 new jump:99999999 new old",
        "restart in a jump": "new jump:-200 restart old new jump:200 restart old new",
    }

    def test_scenarios(self) -> None:
        """No replay is taken and nobody honest is locked out, whatever the clock does."""
        for name, steps in self.SCENARIOS.items():
            with self.subTest(scenario=name):
                self.clock.__init__()  # type: ignore[misc]
                if os.path.exists(self.path):
                    os.unlink(self.path)
                self.play(steps)

    def play(self, steps: str) -> None:
        """Do the steps of a scenario."""
        boot, memory = 1, self.memory("boot-1")
        sent = []  # type: List[Tuple[str, float]]
        for position, step in enumerate(steps.split()):
            word, _, number = step.partition(":")
            if word == "pass":
                self.clock.pass_seconds(float(number))
            elif word == "jump":
                self.clock.jump(float(number))
            elif word == "new":
                sent.append(("packet-%d" % position, self.clock.wall_time))
                self.assertEqual("", self.accept(memory, *sent[-1]), "step %d" % position)
            elif word == "old":
                for packet in sent:
                    self.assertNotEqual("", self.accept(memory, *packet), "step %d" % position)
            else:
                memory.close()
                if word == "lose":
                    os.unlink(self.path)
                if word in ("lose", "reboot"):
                    boot, self.clock.mono_time = boot + 1, 12.0
                memory = self.memory("boot-%d" % boot)

    def test_a_time_from_the_future_in_the_file(self) -> None:
        """One line of a wrong clock does not lock everybody out for ever."""
        with open(self.path, "w") as stream:
            stream.write("x 17 10.55.0.2 1 10.55.0.1 62201 %d\n" % (NOW + 10 ** 8))
        memory = self.memory()
        for name in ("a", "b"):
            self.clock.pass_seconds(300)
            self.assertEqual("", self.accept(memory, name))

    def test_a_file_that_can_not_be_made_stops_the_start(self) -> None:
        """A directory in its place, or a file in place of its directory."""
        for path in (self.directory, write(self.place("file"), "") + "/digest.cache"):
            with self.assertRaisesRegex(server.SpaError, "^%s: " % path):
                self.memory(path=path)

    @contextlib.contextmanager
    def room(self, size: int) -> Iterator[None]:
        """Let no file be longer, which looks as a full disk does: write() is short."""
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    def test_a_full_disk(self) -> None:
        """Knocks open, the file is no record any more, and becomes one again when there is room."""
        memory = self.memory()
        self.accept(memory, "first")
        with self.room(os.path.getsize(self.path) + 20):
            for name, said in (("second", "%s: No space left on device; only this process remembers"
                                % self.path), ("third", "")):
                self.assertEqual("", self.accept(memory, name))
                self.assertEqual(0, os.path.getsize(self.path))
                self.assertEqual(said, self.logged()[:len(said) or None])
        for room in (1 << 20, 10):  # a start, in the same second
            write(self.path, "")
            with self.room(room):
                again = self.memory()
                for name in ("first", "second", "other"):
                    self.assertEqual("before memory", self.accept(again, name))
        with self.room(10):
            self.clock.pass_seconds(60)
            self.logged()
            self.assertEqual("", self.accept(memory, "fourth"))
            self.assertIn("only this process", self.logged())
        self.clock.pass_seconds(60)
        self.assertEqual("", self.accept(memory, "fifth"))
        self.assertEqual("%s: packets are written to it again\n" % self.path, self.logged())
        for made in (memory, self.memory()):
            for name in ("first", "second", "third", "fourth", "fifth"):
                self.assertEqual("replay", self.accept(made, name))

    def test_a_start_that_can_not_write_trusts_no_beginning(self) -> None:
        """The server before may have taken packets that the file does not have."""
        self.accept(self.memory(), "first")
        self.clock.pass_seconds(9)
        with mock.patch("os.rename", side_effect=OSError(30, "Read-only file system")), \
                mock.patch.object(server, "empty_file"):
            memory = self.memory()
        self.assertIn("%s: Read-only file system; only" % self.path, self.logged())
        for expected in ({"before memory"}, {"replay", ""}):
            self.assertEqual(expected, {self.accept(memory, name) for name in ("first", "second")})
            self.clock.pass_seconds(1)
        self.assertNotIn("digest.cache.new", os.listdir(self.directory))

    def test_a_file_that_somebody_touches(self) -> None:
        """Moved away, deleted, emptied, or another one in its place: the next packet mends it."""
        memory = self.memory()
        harms: Dict[str, Callable[[], Any]] = {
            "move": lambda: os.rename(self.path, self.place("old")),
            "delete": lambda: os.unlink(self.path), "empty": lambda: os.truncate(self.path, 0),
            "replace": lambda: os.replace(write(self.place("new"), "x"), self.path),
            "link": lambda: os.replace(self.place("link"), self.path)}
        os.symlink(write(self.place("foreign"), ""), self.place("link"))
        self.accept(memory, "first")
        for name, harm in harms.items():
            with self.subTest(harm=name):
                harm()
                self.logged()
                self.assertEqual("", self.accept(memory, name))
                self.assertEqual("%s: somebody moved, deleted or changed it; writing it anew\n"
                                 % self.path, self.logged())
                again = self.memory()
                self.assertEqual({"replay"}, {self.accept(again, each) for each in ("first", name)})
                memory.written = server.file_state(self.path)  # the start wrote it anew
                memory.file, again.file = again.file, memory.file
        self.assertEqual("", self.logged() + read(self.place("foreign")))

    def test_a_failing_rewrite_leaks_nothing(self) -> None:
        """Each leaves what was remembered, and no open descriptor behind."""
        memory = self.memory()
        self.accept(memory, "a")
        os.unlink(self.path)
        os.mkdir(self.path)
        before = len(os.listdir("/proc/self/fd"))
        for number in range(5):
            self.assertEqual("", self.accept(memory, str(number)))
            self.clock.pass_seconds(60)
        self.assertEqual(before - 1, len(os.listdir("/proc/self/fd")))
        self.assertEqual("replay", self.accept(memory, "a"))

    def test_links_are_not_followed(self) -> None:
        """Nobody makes root read or write somewhere else."""
        for path in (self.path, self.path + ".new"):
            target = write(self.place("target"), "# began 1 boot-1 0\n")
            os.symlink(target, path)
            self.assertEqual("before memory", self.accept(self.memory(), "a", NOW - 1))
            self.assertEqual("# began 1 boot-1 0\n", read(target))
            os.unlink(self.path)

    def test_why_a_packet_is_too_old_for_the_memory(self) -> None:
        """Made before it began, or at a time that was forgotten, by which the clock is back."""
        memory = self.memory()
        self.clock.pass_seconds(10)
        memory.forgotten = int(self.clock.wall_time) + 5
        for timestamp, reason, words in (
                (NOW - 1, "before memory", "1 seconds before this replay memory began"),
                (NOW + 10, "forgotten", "clock was set back; a new one will do in 6 seconds")):
            with self.assertRaisesRegex(server.NotFresh, words) as caught:
                memory.check_fresh(timestamp)
            self.assertEqual(reason, caught.exception.reason)


# ------------------------------------------------------------------- grants

def door(text: str) -> Any:
    """Return the door of `SOURCE PROTOCOL/PORT [DESTINATION]`."""
    source, port, *rest = text.split()
    protocol, number = port.split("/")
    there = ipaddress.ip_address(rest[0]) if rest else None
    return server.Door(ipaddress.ip_network(source), there, protocol, int(number))


class GrantsTest(ServerCase):
    """The register of open doors, on a firewall that obeys."""

    def setUp(self) -> None:
        """Make the register."""
        super().setUp()
        self.ssh, self.dns = door("10.55.0.2/32 tcp/22"), door("10.55.0.2/32 udp/53")
        self.grants = server.Grants(self.firewall, self.log, self.clocks)

    def later(self, seconds: float) -> List[str]:
        """Let time pass and close what is due; return what is in the firewall."""
        self.clock.pass_seconds(seconds)
        self.grants.expire()
        return sorted("%s/%d" % (each.protocol, each.port) for each in self.firewall.rules)

    def test_extension(self) -> None:
        """A second knock makes the rule last longer; there is never a second one."""
        self.grants.grant([self.ssh], 30)
        self.clock.pass_seconds(20)
        self.grants.grant([self.ssh], 30)
        self.assertEqual(NOW + 50, self.firewall.rules[self.ssh].expires)
        self.assertEqual(["tcp/22"], self.later(29))
        self.assertEqual([], self.later(1))
        self.assertEqual(server.FOR_EVER, self.grants.next_due())

    def test_never_shortened(self) -> None:
        """A knock for less time changes nothing, and the log tells the later time."""
        self.grants.grant([self.ssh], 300)
        self.grants.grant([self.ssh, self.dns], 5)
        self.assertIn("tcp/22, expires at %d" % (NOW + 300), self.logged())
        self.assertEqual(["tcp/22"], self.later(6))
        self.assertEqual([], self.later(294))

    def test_next_due(self) -> None:
        """Tells the loop when to come back."""
        self.assertEqual(server.FOR_EVER, self.grants.next_due())
        self.grants.grant([self.ssh], 30)
        self.grants.grant([self.dns], 10)
        self.assertEqual(5010.0, self.grants.next_due())

    def test_many_end_together(self) -> None:
        """And all are closed."""
        doors = [door("10.1.%d.%d/32 tcp/22" % (n >> 8, n & 255)) for n in range(1000)]
        for each in doors:
            self.grants.grant([each], 10)
        self.assertEqual(1000, len(self.firewall.rules))
        self.assertEqual([], self.later(10))

    def test_prolonged_for_hours(self) -> None:
        """By a client that does not stop: ends that no longer count are not kept."""
        self.grants.grant([self.ssh], 30)
        self.grants.grant([self.dns], 3600)
        for _ in range(2 * server.MAX_GRANTS):
            grant = self.grants.live[self.ssh]
            self.grants.enter(grant._replace(ends=grant.ends + 0.01))
        self.grants.grant([self.ssh], 1800)
        self.assertLess(len(self.grants.ends), server.MAX_GRANTS + 5)
        self.assertEqual(["tcp/22", "udp/53"], self.later(1799))
        self.assertEqual(["udp/53"], self.later(1))
        self.assertEqual([], self.later(1800))

    def test_the_wall_clock_does_not_keep_a_door_open(self) -> None:
        """Jumps in both directions leave the time as it was."""
        for seconds in (-3600, 3600):
            self.grants.grant([self.ssh], 30)
            self.clock.jump(seconds)
            self.assertEqual(["tcp/22"], self.later(29))
            self.assertEqual([], self.later(2))

    def test_failing_close(self) -> None:
        """Is logged, tried again after a second, and never forgotten."""
        self.grants.grant([self.ssh, self.dns], 10)
        self.firewall.failing_closes = 3
        self.assertEqual(["tcp/22", "udp/53"], self.later(10))
        self.assertIn("trying to close 2 grants again", self.logged())
        self.assertEqual(self.clock.mono_time + server.RETRY_SECONDS, self.grants.next_due())
        self.assertEqual(2, len(self.later(0.5)))
        self.assertEqual(2, len(self.later(1)))
        self.assertEqual(2, len(self.later(1)))
        self.assertEqual([], self.later(1))
        self.assertEqual({}, self.grants.live)

    def test_close_before_the_time(self) -> None:
        """At once, and nothing puts it back; a failure is told, and it is tried again."""
        self.grants.grant([self.ssh, self.dns], 100)
        self.grants.close([self.grants.live[self.ssh]])
        self.grants.restore()
        self.assertEqual(["udp/53"], self.later(1))
        self.firewall.failing_closes = 1
        with self.assertRaisesRegex(server.CommandError, "still open: .* udp/53"):
            self.grants.close([self.grants.live[self.dns]])
        self.assertEqual(["udp/53"], self.later(0.5))
        self.assertEqual([], self.later(1))
        self.assertEqual({}, self.grants.live)

    def test_open_while_close_fails(self) -> None:
        """A knock in between extends the door that could not be closed."""
        self.grants.grant([self.ssh], 10)
        self.firewall.failing_closes = 1
        self.later(10)
        self.grants.grant([self.ssh], 30)
        self.assertEqual(["tcp/22"], self.later(20))
        self.assertEqual([], self.later(10))

    def test_all_or_none(self) -> None:
        """A failure opens no door of the packet, and takes none away."""
        self.grants.grant([self.ssh], 30)
        self.firewall.failures = 2
        with self.assertRaises(server.CommandError):
            self.grants.grant([self.ssh, self.dns], 60)
        self.grants.restore()
        self.assertEqual(["tcp/22"], self.later(29))
        self.assertEqual([], self.later(1))

    def test_a_knock_that_fails_to_prolong_closes_nothing(self) -> None:
        """The server's next turn opens again what was open, and again until that works."""
        made = self.serve("SOURCE ANY\n" + KEYS)
        made.grants.grant([self.ssh], 30)
        self.firewall.failures = 3
        with self.assertRaises(server.CommandError):
            made.grants.grant([self.ssh, self.dns], 60)
        with mock.patch.object(made.ears, "wait", return_value=(False, [])):
            made.watch.check_rest = server.FOR_EVER
            for rules, due in (({}, server.RETRY_SECONDS), (made.grants.live, server.POLL_SECONDS)):
                made.turn()
                self.assertEqual(rules, self.firewall.rules)
                now = made.clocks.monotonic()
                self.assertAlmostEqual(due, made.watch.check_due - now, delta=0.5)
                made.watch.check_due = 0.0
        self.assertEqual([NOW + 30], [each.expires for each in self.firewall.rules.values()])

    def test_check_puts_back(self) -> None:
        """Rules first, then the grants still due; not those that end anyway."""
        self.grants.grant([self.ssh], 30)
        self.grants.grant([self.dns], 10)
        self.firewall.flush()
        self.firewall.whole = False
        self.clock.pass_seconds(9.8)
        self.grants.restore()
        self.assertEqual(1, self.firewall.prepared)
        self.assertEqual([self.ssh], list(self.firewall.rules))
        self.assertEqual(5030.0, self.firewall.rules[self.ssh].ends)
        self.assertIn("Put back 1 grants", self.logged())
        self.grants.restore()
        self.assertEqual("", self.logged())
        self.assertEqual([], self.later(21))

    def test_two_servers_with_one_chain(self) -> None:
        """What one closes before its time, the other does not open again, but for its own."""
        other = server.Grants(self.firewall, self.log, self.clocks)
        other.grant([self.ssh, self.dns], 30)
        self.grants.restore()
        self.grants.move(self.firewall)  # as at a reload
        self.grants.grant([self.dns], 60, 1)
        other.close([other.live[self.ssh]])
        self.grants.restore()
        self.assertEqual([self.dns], list(self.firewall.rules))
        other.flush()
        self.grants.restore()
        self.assertEqual([self.dns], list(self.firewall.rules))
        self.assertEqual([self.dns], list(self.grants.live))

    def test_check_puts_back_many(self) -> None:
        """In transactions that the kernel takes."""
        doors = [door("10.0.%d.%d tcp/22" % divmod(number, 250)) for number in range(950)]
        self.grants.grant(doors, 30)
        self.firewall.flush()
        self.firewall.most = 0
        self.grants.restore()
        self.assertEqual(set(doors), set(self.firewall.rules))
        self.assertIn(self.firewall.most, range(1, server.GRANTS_AT_ONCE + 1))

    def test_one_that_is_refused_keeps_no_other_closed(self) -> None:
        """Many go back together, the others half by half; the caller hears why one did not."""
        doors = [door("10.0.%d.%d tcp/22" % divmod(number, 250)) for number in range(950)]
        self.grants.grant(doors, 30)
        for limit, most in ((server.GRANTS_AT_ONCE, server.GRANTS_AT_ONCE), (1000, 475)):
            self.firewall.flush()
            self.firewall.grants_at_once, self.firewall.most = limit, 0
            self.firewall.refused = doors[700]
            with self.assertRaisesRegex(server.CommandError, "line 2 failed"):
                self.grants.restore()
            self.assertEqual(set(doors) - {doors[700]}, set(self.firewall.rules))
            self.assertEqual(most, self.firewall.most)
        self.firewall.refused = None
        self.grants.restore()
        self.assertEqual(set(doors), set(self.firewall.rules))

    def test_slow_closing_leaves_time_for_knocks(self) -> None:
        """A firewall that takes long rests as long, or a second; one that fails, a second."""
        for slow, wait in ((0.0, 0.0), (0.01, 0.02), (0.2, 0.4), (2, 3.0)):
            self.grants.grant([self.ssh, self.dns], 1)
            self.firewall.slow, began = slow, self.clock.mono() + 1
            self.assertEqual([], self.later(1))
            self.assertAlmostEqual(began + wait, self.grants.not_before)
        self.grants.grant([self.ssh], 10)
        self.firewall.failing_closes, began = 1, self.clock.mono() + 10
        self.assertEqual(["tcp/22"], self.later(10))
        self.assertAlmostEqual(began + 3, self.grants.not_before)

    def test_a_stanza_has_its_limit(self) -> None:
        """Many doors of one keep no other out, and what is open already may be extended."""
        limit = server.MAX_GRANTS
        self.assertGreater(limit, 5000)  # one stanza may serve all the users of a busy host
        doors = [door("10.0.%d.%d tcp/22" % divmod(number, 250)) for number in range(limit)]
        self.grants.grant(doors, 30, 1)
        for more in ([self.ssh], [doors[0], self.ssh]):
            with self.assertRaisesRegex(
                    server.PacketRejected, "^%d doors of this stanza" % limit) as no:
                self.grants.grant(more, 30, 1)
            self.assertEqual("grants", no.exception.reason)
        self.grants.grant([doors[0]], 60, 1)
        self.grants.grant([self.ssh], 60, 2)
        self.assertEqual(["tcp/22"] * 2, self.later(31))
        self.grants.grant(doors[1:], 30, 1)

    def test_check_adopts_what_is_too_much(self) -> None:
        """A grant that nobody here knows of is closed in time, too."""
        stranger = server.Grant(self.ssh, 0, self.clock.mono() + 5)
        self.firewall.rules[self.ssh] = stranger
        self.grants.restore()
        self.assertEqual([self.ssh], list(self.grants.live))
        self.assertEqual([], self.later(6))

    def test_a_flush_that_fails_is_tried_again(self) -> None:
        """Also for what only the firewall knows of; and the caller is told."""
        self.grants.grant([self.ssh], 30)
        self.firewall.rules[self.dns] = server.Grant(self.dns, 0, self.clock.mono() + 30)
        self.firewall.failing_flushes = 1
        with self.assertRaises(server.CommandError):
            self.grants.flush()
        self.assertEqual([], self.later(2))

    def test_adopt(self) -> None:
        """A restarted server knows what is open, and closes it in time, at once when it is over."""
        self.grants.grant([self.ssh], 30)
        self.grants.grant([self.dns], 10)
        self.clock.pass_seconds(10)
        self.grants = server.Grants(self.firewall, self.log, self.clocks)
        self.grants.adopt()
        self.assertEqual(["tcp/22"], self.later(0))
        self.grants.grant([self.ssh], 30)
        self.assertEqual(["tcp/22"], self.later(29))
        self.assertEqual([], self.later(1))

    def test_flush(self) -> None:
        """Closes all, and nothing is put back."""
        self.grants.grant([self.ssh, self.dns], 30)
        self.grants.flush()
        self.grants.restore()
        self.assertEqual([], self.later(0))
        self.assertEqual(server.FOR_EVER, self.grants.next_due())


class LifeTest(ServerCase):
    """Start, reload and stop of the server, on the fake firewall and real UDP sockets."""

    def free_port(self) -> int:
        """Return a UDP port that nobody has."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.bind(("127.0.0.1", 0))
            return int(probe.getsockname()[1])

    def configuration(self, lines: str) -> Any:
        """Return a configuration with a UDP server."""
        settings = server.ServerSettings()
        path = os.path.join(self.directory, "new.conf")
        with open(path, "w") as stream:
            stream.write("FWKNOP_RUN_DIR %s;\nENABLE_UDP_SERVER Y;\n%s" % (self.directory, lines))
        server.read_server_settings(path, settings)
        settings.set_defaults()
        return server.Configuration(settings, self.stanzas("SOURCE ANY\n" + KEYS), [])

    def start(self, port: int) -> Any:
        """Return a server that listens."""
        made = self.serve("SOURCE ANY\n" + KEYS, "ENABLE_UDP_SERVER Y;\nUDPSERV_PORT %d;\n" % port)
        made.start(False)
        self.addCleanup(lambda: server.close_captures(made.captures, ()))
        return made

    def knock(self, made: Any, port: int, text: str = "127.0.0.1,tcp/22") -> None:
        """Send a packet over the loopback, and let the server take a turn."""
        payload = Sender(salt=os.urandom(8)).packet(text, timestamp=int(self.clock.wall_time))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.sendto(payload, ("127.0.0.1", port))
        for capture in made.captures:
            made.drain(capture)

    def test_udp_socket(self) -> None:
        """A datagram with its addresses, from the socket to the door."""
        port = self.free_port()
        made = self.start(port)
        self.knock(made, port)
        self.assertEqual(["127.0.0.1 -> 0.0.0.0/0 tcp/22"], self.firewall.doors())
        with open(self.path) as stream:
            self.assertRegex(stream.read(), r" 17 127\.0\.0\.1 \d+ 127\.0\.0\.1 %d %d\n$"
                             % (port, NOW))

    def test_reload_keeps_grants(self) -> None:
        """And takes the new stanzas and the new port."""
        port, other = self.free_port(), self.free_port()
        made = self.start(port)
        self.knock(made, port)
        made.reload(self.configuration("UDPSERV_PORT %d;\n" % other), self.firewall)
        self.assertEqual(1, len(self.firewall.doors()))
        self.knock(made, other, "127.0.0.2,tcp/22")
        self.assertEqual(2, len(self.firewall.doors()))

    def test_reload_tells_where_it_listens(self) -> None:
        """Also the one that brings the first stanza, beside the doors of a knockd.conf."""
        port, made = self.free_port(), self.start(self.free_port())
        new = self.configuration("UDPSERV_PORT %d;\n" % port)
        made.gate.configure(made.configuration._replace(stanzas=[]))
        self.logged()
        made.reload(new, self.firewall)
        self.assertIn("Kicking off UDP server to listen on port %d." % port, self.logged())

    def test_reload_that_fails_keeps_listening(self) -> None:
        """A port that is taken is a bad setting: the old one stays in force."""
        port, taken = self.free_port(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.addCleanup(taken.close)
        taken.bind(("0.0.0.0", 0))
        made = self.start(port)
        with self.assertRaises(server.SpaError):
            made.reload(self.configuration("UDPSERV_PORT %d;\n" % taken.getsockname()[1]),
                        self.firewall)
        self.knock(made, port)
        self.assertEqual(1, len(self.firewall.doors()))
        self.assertEqual(port, made.settings.udp_port)

    def test_a_firewall_that_takes_long_to_read(self) -> None:
        """Is read again the later for it, so that packets have most of the time; but soon if it is
        read quickly, or if something was missing. Where it is seen at once whether our rules are
        there, only the grants have to wait.
        """
        made = self.serve("SOURCE ANY\n" + KEYS)
        if made.watch.events is not None:  # root's
            made.watch.events.close()
        made.watch.events, kernel = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.addCleanup(kernel.close)
        self.addCleanup(made.watch.events.close)
        made.watch.events.setblocking(False)
        self.firewall.netlink = mock.Mock(port=55)
        self.firewall.netlink.generation.side_effect = object  # always another
        looks = []  # type: List[float]

        def check(seconds: float, all_well: bool) -> bool:
            looks.append(self.clock.mono())
            self.clock.pass_seconds(seconds)
            return all_well

        def hear() -> float:
            for port in (55, 77):  # the first is ours
                self.assertEqual(server.POLL_SECONDS, made.watch.check_due - self.clock.mono())
                kernel.send(struct.pack("=IHHIII", 20, 0, 0, 0, port, 0))
                made.watch.hear()
            return float(made.watch.check_due - self.clock.mono())

        soon = server.SETTLE_SECONDS
        for seconds, all_well, quickly, wait, rest in (
                (0.01, True, False, soon, 0), (2, True, False, 6.0, 0),
                (2, False, False, soon, 0), (60, True, False, server.POLL_SECONDS, 0),
                (2, True, True, soon, 6.0 - soon)):
            self.clock.pass_seconds(100)
            self.firewall.quickly_intact = quickly
            with mock.patch.object(made.grants, "restore", partial(check, seconds, all_well)):
                made.watch.restore()
                self.assertAlmostEqual(wait, hear())
                self.clock.pass_seconds(wait)
                del looks[:]
                made.watch.restore()
                self.assertEqual(0 if rest else 1, len(looks))
                if rest:
                    self.assertAlmostEqual(rest, made.watch.check_due - self.clock.mono())
                    self.firewall.whole = False
                    made.watch.restore()
                    self.assertEqual(1, len(looks))

    def test_an_idle_server_reads_nothing(self) -> None:
        """As long as nf_tables announces no change by somebody else, and has had none unannounced;
        but no announcement tells that a connection has ended a grant."""
        made = self.serve("SOURCE ANY\n" + KEYS)
        watch = made.watch
        watch.events, kernel = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        for each in watch.events, kernel:
            self.addCleanup(each.close)
        watch.events.setblocking(False)
        self.firewall.netlink = mock.Mock(port=55)
        numbers = iter((b"1", b"1", b"1", b"2", b"2", b"2"))
        self.firewall.netlink.generation = lambda: next(numbers)
        once = door("10.55.0.2/32 tcp/22")._replace(kind=server.ONCE)
        with mock.patch.object(made.grants, "restore", return_value=True) as restore:
            for live, port, looks in (([], 55, 1), ([], 55, 1), ([once], 55, 2), ([], 55, 3),
                                      ([], 55, 3), ([], 77, 4)):
                made.grants.live = {each: mock.Mock() for each in live}
                kernel.send(struct.pack("=IHHIII", 20, 0, 0, 0, port, 0))
                watch.hear()
                self.clock.pass_seconds(100)
                watch.restore()
                self.assertEqual(looks, restore.call_count)

    def test_a_program_that_is_not_used(self) -> None:
        """FIREWALL_EXE may be wrong where nothing is opened by it; that is said."""
        made = self.serve("SOURCE ANY\n" + KEYS)
        new = self.configuration("FIREWALL_TYPE none;\nFIREWALL_EXE /no/such/nft;\n")
        firewall = new.choose_firewall(self.log)
        self.logged()
        server.warn_of_host(new, firewall, self.log)
        self.assertRegex(self.logged(), r":4: FIREWALL_EXE: expected an nft or iptables program")
        with mock.patch.object(server.Server, "reload"):
            server.obey_signal(signal.SIGHUP, made, lambda: new)
        self.assertNotIn("old settings", self.logged())

    def test_stop(self) -> None:
        """Closes all grants, unless FLUSH_IPT_AT_EXIT is N."""
        for conf, left in (("", 0), ("FLUSH_IPT_AT_EXIT N;\n", 1)):
            made = self.serve("SOURCE ANY\n" + KEYS, conf)
            made.gate.receive(datagram(Sender(salt=os.urandom(8)).packet(timestamp=NOW)))
            made.stop()
            self.assertEqual(left, len(self.firewall.rules))
            self.firewall.whole = True

    def test_stop_behind_a_guard(self) -> None:
        """It says until when the guard stays; one that somebody else made outlasts the trial."""
        soon = server.Trial(NOW + 300, self.clock.mono_time + 300)
        for trial, until in ((None, "a server runs"), (server.TRIAL_OVER, "a server runs"),
                             (soon, str(soon))):
            made = self.serve("SOURCE ANY\n" + KEYS)
            self.firewall.trial, self.firewall.guard_ports = trial, frozenset([("tcp", 22)])
            self.logged()
            with mock.patch.object(self.firewall, "guarded", return_value=True):
                made.stop()
            self.assertIn("Closed to everybody from now on, until %s or --unguard: tcp/22" % until,
                          self.logged())

    def test_start_adopts_or_flushes(self) -> None:
        """FLUSH_IPT_AT_INIT decides."""
        for flush, left in ((False, 1), (True, 0)):
            self.firewall.rules = {door("10.55.0.2/32 tcp/22"): server.Grant(
                door("10.55.0.2/32 tcp/22"), NOW + 30, 5030.0)}
            made = self.serve("SOURCE ANY\n" + KEYS, "ENABLE_UDP_SERVER Y;\nUDPSERV_PORT %d;\n"
                              % self.free_port())
            with mock.patch.object(server, "remove_leftovers") as leftovers:
                made.start(flush)
            self.assertEqual(flush, leftovers.called)
            self.assertEqual((left, left), (len(self.firewall.rules), len(made.grants.live)))
            self.assertIs(made.watch.well, self.firewall)  # nothing was announced since
            for capture in made.captures:
                capture.close()


# ------------------------------------------------------------------- pid file

HOLDER = """
import fcntl, os, sys
file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
try:
    getattr(fcntl, sys.argv[2])(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    print("free", flush=True)
    sys.stdin.read()
except OSError:
    print("locked")
"""


class PidFileTest(ServerCase):
    """One server at a time, and a status that changes nothing; a pid at any time."""

    def lock(self, path: str) -> int:
        """Lock a pid file, for this process."""
        return int(server.lock_pid_file(path, self.log))

    def test_lock(self) -> None:
        """A second server is told the pid of the first."""
        path = os.path.join(self.directory, "run", "fwknopd.pid")
        self.assertIsNone(server.running_server(path))
        self.assertFalse(os.path.exists(path), "asking makes no file")
        file = self.lock(path)
        self.assertEqual(os.getpid(), server.running_server(path))
        with self.assertRaises(server.SpaError) as caught:
            self.lock(path)
        self.assertEqual("An instance of fwknopd is already running: (PID=%d)." % os.getpid(),
                         str(caught.exception))
        answer = run([sys.executable, "-c", HOLDER, path, "flock"])
        self.assertEqual("locked\n", answer.stdout)
        os.close(file)
        self.assertIsNone(server.running_server(path))
        os.close(self.lock(path))

    def test_the_lock_of_fwknopd(self) -> None:
        """Is of another kind, and keeps a server away from the pid in its file as well."""
        path = os.path.join(self.directory, "fwknopd.pid")
        write(path, "4711\n")
        with subprocess.Popen([sys.executable, "-c", HOLDER, path, "lockf"],
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
            assert holder.stdin and holder.stdout
            self.assertEqual(b"free\n", holder.stdout.readline())
            with self.assertRaisesRegex(server.SpaError, "already running: [(]PID=4711[)]"):
                self.lock(path)
            self.assertEqual("4711\n", read(path))
            holder.stdin.close()
        os.close(self.lock(path))

    def test_a_file_left_by_a_dead_server(self) -> None:
        """Is no running server, and gets the pid of the next."""
        path = os.path.join(self.directory, "fwknopd.pid")
        for text in ("1\n", "", "garbage", "99999999\n"):
            with open(path, "w") as stream:
                stream.write(text)
            self.assertIsNone(server.running_server(path))
            file = self.lock(path)
            self.assertEqual(os.getpid(), server.running_server(path))
            os.close(file)
            self.assertEqual("%d\n" % os.getpid(), read(path))
            path += "x"

    def test_a_link_is_refused(self) -> None:
        """Whoever owns the directory must not have root write a pid somewhere else."""
        path, target = self.place("pid"), write(self.place("target"), "root's\n")
        os.symlink(target, path)
        for ask in (self.lock, server.running_server):
            with self.assertRaisesRegex(OSError, "expected a file, not a symbolic link"):
                ask(path)
        self.assertEqual("root's\n", read(target))

    @needs_root
    def test_a_file_of_another_user_is_refused(self) -> None:
        """In /tmp a user could lock a pid file that has the pid of another program of root's."""
        path = write(self.place("pid"), "1\n")
        os.chown(path, 1234, 1234)
        with subprocess.Popen([sys.executable, "-c", HOLDER, path, "flock"],
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
            assert holder.stdin and holder.stdout
            self.assertEqual(b"free\n", holder.stdout.readline())
            for ask in (self.lock, server.running_server):
                with self.assertRaisesRegex(OSError, "it is another user's"):
                    ask(path)
            holder.stdin.close()
        os.chown(self.directory, 1234, 1234)  # whose server it is, then
        self.assertIsNone(server.running_server(path))

    @needs_root
    def test_nobody_leads_root_to_a_file_of_roots(self) -> None:
        """By a link to a file or to a directory on the way, or by a second name."""
        place = self.place
        for name in ("joe", "joe/sub", "etc"):
            os.mkdir(place(name))
        target = write(place("etc/target"), "root's\n")
        os.symlink("../etc/target", place("joe/file"))
        os.symlink(place("etc"), place("joe/dir"))
        os.symlink("joe/file", place("ours"))
        os.link(target, place("joe/hard"))
        for name in ("joe", "joe/sub", "joe/file", "joe/dir"):
            os.lchown(place(name), 1234, 1234)
        before = len(os.listdir("/proc/self/fd"))
        for name in ("joe/file", "joe/dir/target", "joe/dir/new", "ours", "joe/hard",
                     "joe/sub/../file"):
            for flags in (os.O_APPEND, os.O_TRUNC, os.O_EXCL):
                with self.subTest(name, flags=flags), self.assertRaises(OSError):
                    server.open_ours(place(name), os.O_WRONLY | os.O_CREAT | flags)
            self.assertFalse(server.FileOutlet(place(name)).send(server.INFO, "line"))
            with self.assertRaises(server.SpaError):
                server.write_new_files({place(name): "text"})
        self.assertEqual(("root's\n", ["target"], before), (
            read(target), os.listdir(place("etc")), len(os.listdir("/proc/self/fd"))))
        os.symlink("joe/new", place("own"))
        self.assertTrue(server.FileOutlet(place("own")).send(server.INFO, "line"))
        self.assertIn("line", read(place("joe/new")))
        self.assertTrue(server.FileOutlet("/dev/null").send(server.INFO, "line"))

    def test_it_is_never_empty(self) -> None:
        """Whenever somebody looks: at each call of the system by which it is made and locked."""
        path, seen = self.place("pid"), set()

        def look(frame: Any, event: str, argument: Any) -> None:
            """Note what is in the file."""
            if os.path.exists(path):
                seen.add(read(path).strip())

        for before in (None, "1234567\n"):
            if before:
                write(path, before)
            sys.setprofile(look)
            try:
                file = self.lock(path)
            finally:
                sys.setprofile(None)
            os.close(file)
            os.unlink(path)
        self.assertEqual({"1234567", str(os.getpid())}, seen)

    def test_the_lock_is_not_inherited_by_programs(self) -> None:
        """Programs that the server starts do not hold its lock."""
        file = self.lock(os.path.join(self.directory, "fwknopd.pid"))
        self.addCleanup(os.close, file)
        self.assertTrue(fcntl.fcntl(file, fcntl.F_GETFD) & fcntl.FD_CLOEXEC)


# ------------------------------------------------------------------- kernel packet filter

def run_filter(code: bytes, packet: bytes, kind: int = 0) -> bool:
    """Return whether a classic BPF program accepts a packet (linux/bpf_common.h)."""
    program = list(struct.iter_unpack("=HBBI", code))
    assert 0 < len(program) <= 4096
    address, accumulator, index = 0, 0, 0
    for _ in range(len(program)):
        opcode, when_true, when_false, k = program[address]
        address += 1
        if opcode == 0x06:
            return bool(k > 0)
        if opcode in (0x20, 0x28, 0x30, 0x40, 0x48, 0x50):  # load: word, half, byte; from the index
            size = {0: 4, 8: 2, 16: 1}[opcode & 0x18]
            if k == 0xFFFFF000 + 4:
                accumulator = kind
                continue
            at = k + (index if opcode & 0x40 else 0)
            if at + size > len(packet):
                return False
            accumulator = int.from_bytes(packet[at:at + size], "big")
        elif opcode == 0xB1:
            if k >= len(packet):
                return False
            index = (packet[k] & 15) * 4
        elif opcode in (0x01, 0x07):
            index = k if opcode == 0x01 else accumulator
        elif opcode in (0x04, 0x0C, 0x1C, 0x54, 0x74, 0x80, 0x87):
            accumulator = {0x04: accumulator + k, 0x0C: accumulator + index,
                           0x1C: accumulator - index, 0x54: accumulator & k,
                           0x74: accumulator >> k % 32, 0x80: len(packet),
                           0x87: index}[opcode] & 0xFFFFFFFF
        elif opcode == 0x05:
            address += k
        elif opcode in (0x15, 0x25, 0x35):
            true = accumulator == k if opcode == 0x15 else accumulator >= k + (opcode == 0x25)
            address += when_true if true else when_false
        else:
            raise AssertionError("opcode %#x" % opcode)
    raise AssertionError("the program does not end")


def udp(payload: bytes, port: int = 62201, source_port: int = 40000) -> bytes:
    """Return a UDP header and payload (RFC 768)."""
    return struct.pack(">HHHH", source_port, port, len(payload) + 8, 0) + payload


def ipv4(body: bytes, protocol: int = 17, fragment: int = 0, options: bytes = b"") -> bytes:
    """Return an IPv4 header and body (RFC 791)."""
    return struct.pack(">BBHHHBBH4s4s", 0x45 + len(options) // 4, 0, 20 + len(options) + len(body),
                       7, fragment, 64, protocol, 0, b"\x0a\x37\0\2",
                       b"\x0a\x37\0\1") + options + body


def ipv6(body: bytes, following: int = 17) -> bytes:
    """Return an IPv6 header and body (RFC 8200)."""
    return struct.pack(">IHBB16s16s", 6 << 28, len(body), following, 64,
                       ipaddress.ip_address("fd55::2").packed,
                       ipaddress.ip_address("fd55::1").packed) + body


class FilterTest(unittest.TestCase):
    """The kernel's program, run by an interpreter of this file."""

    def test_packets(self) -> None:
        """What arrives, is UDP, is whole or the first fragment, and has the port."""
        body = udp(b"x" * 150)
        other, answer = udp(b"x" * 150, 53), udp(b"x" * 150, 53, 62201)
        packets = (
            ("IPv4", ipv4(body), 0, True, True), ("broadcast", ipv4(body), 1, True, True),
            ("outgoing", ipv4(body), 4, False, False), ("IPv6", ipv6(body), 0, True, True),
            ("outgoing IPv6", ipv6(body), 4, False, False),
            ("another port", ipv4(other), 0, False, False),
            ("another port in IPv6", ipv6(other), 0, False, False),
            ("from the port", ipv4(answer), 0, True, False),
            ("from the port in IPv6", ipv6(answer), 0, True, False),
            ("TCP", ipv4(body, 6), 0, False, False),
            ("TCP in IPv6", ipv6(body, 6), 0, False, False),
            ("ICMP", ipv4(body, 1), 0, False, False),
            ("options", ipv4(body, options=b"\1" * 4), 0, True, True),
            ("all options", ipv4(body, options=b"\1" * 40), 0, True, True),
            ("port only in the options", ipv4(other, options=body[:4]), 0, False, False),
            ("do not fragment", ipv4(body, fragment=0x4000), 0, True, True),
            ("first fragment", ipv4(body, fragment=0x2000), 0, True, True),
            ("later fragment", ipv4(body, fragment=0x2001), 0, False, False),
            ("last fragment", ipv4(body, fragment=0x1FFF), 0, False, False),
            ("fragment in the middle", ipv4(body, fragment=0x3000), 0, False, False),
            ("fragment header", ipv6(b"\x11\0\0\0\0\0\0\0" + body, 44), 0, False, False),
            ("hop-by-hop header", ipv6(b"\x11\0\0\0\0\0\0\0" + body, 0), 0, False, False),
            ("ARP", b"\0\1\x08\0\6\4\0\1" + bytes(20), 0, False, False),
            ("nothing", b"", 0, False, False), ("one byte", b"\x45", 0, False, False),
            ("cut header", ipv4(body)[:21], 0, False, False),
            ("cut header in IPv6", ipv6(body)[:41], 0, False, False))
        for text, column in (("udp port 62201", 3), ("udp dst port 62201", 4)):
            code = server.compile_filter(server.parse_packet_filter(text))
            for row in packets:
                with self.subTest(filter=text, packet=row[0]):
                    self.assertIs(row[column], run_filter(code, row[1], row[2]))

    def test_many_ports(self) -> None:
        """Each of the most ports there may be, in both families, and no other."""
        ports = list(range(1000, 1080))
        for form, between in (("udp port %d", " or "), ("udp dst port %d", " || ")):
            code = server.compile_filter(server.parse_packet_filter(
                between.join(form % port for port in ports)))
            for port in [999] + ports + [1080, 0, 65535]:
                for packet in (ipv4(udp(b"x", port)), ipv6(udp(b"x", port))):
                    self.assertIs(port in ports, run_filter(code, packet))


class CaptureTest(ServerCase):
    """What comes out of a packet socket."""

    def receive(self, packet: bytes) -> Any:
        """Return the datagram in a packet."""
        capture = server.PacketCapture.__new__(server.PacketCapture)
        capture.socket = mock.Mock(recv=lambda size: packet[:size])
        return capture.receive()

    def test_datagrams(self) -> None:
        """Addresses, ports and payload, with options and with padding behind them."""
        body = udp(b"payload")
        for packet in (ipv4(body), ipv4(body, options=b"\1" * 8), ipv4(body) + bytes(20)):
            self.assertEqual((b"payload", b"\x0a\x37\0\2", 40000, b"\x0a\x37\0\1", 62201, 17, 0),
                             tuple(self.receive(packet)))
        found = self.receive(ipv6(body))
        self.assertEqual((b"payload", "fd55::2", "fd55::1"),
                         (found.payload, server.socket_text(found.source),
                          server.socket_text(found.destination)))

    def test_cut_packets(self) -> None:
        """A length that is not there, or less than a header, is no datagram."""
        for packet in (ipv4(udp(b"payload"))[:-1], ipv4(udp(b""))[:27], ipv6(udp(b"x"))[:47],
                       ipv4(struct.pack(">HHHH", 1, 62201, 7, 0) + b"x"),
                       ipv4(struct.pack(">HHHH", 1, 62201, 0, 0) + b"x"),
                       ipv4(struct.pack(">HHHH", 1, 62201, 65535, 0) + b"x")):
            with self.subTest(packet=packet):
                self.assertIsNone(self.receive(packet))

    def test_headers_that_lie(self) -> None:
        """What the filter lets through never ends the server, whatever its header says."""
        # A header length of less than 20 bytes in a short packet once gave an address of less than
        # 4, and the log line about it raised ValueError: one packet from the link ended the server.
        code = server.compile_filter(server.parse_packet_filter("udp port 62201"))
        made = self.serve("SOURCE ANY\n" + KEYS)
        draw, passed = random.Random(11), 0
        for _ in range(3000):
            packet = bytearray(draw.randrange(256) for _ in range(draw.randrange(10, 60)))
            packet[0], packet[6:8] = draw.choice((0x40, 0x41, 0x42, 0x43, 0x44, 0x45)), b"\0\0"
            packet[9] = 17
            start = (packet[0] & 15) * 4
            packet[start + 2:start + 4] = struct.pack(">H", 62201)
            packet[start + 4:start + 6] = struct.pack(">H", max(8, len(packet) - start))
            if run_filter(code, bytes(packet)):
                passed += 1
                found = self.receive(bytes(packet))
                if found is not None:
                    made.gate.receive(found)
                    self.assertEqual((4, 4), (len(found.source), len(found.destination)))
        self.assertGreater(passed, 500)
        self.assertNotIn("error", made.tally.counts)


# ------------------------------------------------------------------- firewall texts

class IptablesTest(unittest.TestCase):
    """Rules as text, there and back. Live tests show what the kernel makes of them."""

    def program(self, dated: bool = True) -> Any:
        """Return the programs, which are not started."""
        made = server.Iptables("iptables")
        made.dated = dated
        return made

    def test_rules_are_those_of_fwknopd(self) -> None:
        """tests/spec/fwknop.md 3.6, to the letter, where the kernel has no time match."""
        ssh = server.Grant(door("10.55.0.2/32 tcp/22"), 1795370283, 0.0)
        there = server.Grant(door("10.55.0.2/32 tcp/22 10.55.0.1"), 1795370285, 0.0)
        into = server.GrantChain("filter", "FWKNOP_INPUT", "ACCEPT")
        out = server.GrantChain("filter", "FWKNOP_OUTPUT", "ACCEPT", True)
        for chain, grant, expected in (
                (into, ssh, "-s 10.55.0.2/32 -p tcp -m tcp --dport 22 -m comment --comment "
                            "_exp_1795370283 -j ACCEPT"),
                (out, ssh, "-d 10.55.0.2/32 -p tcp -m tcp --sport 22 -m comment --comment "
                           "_exp_1795370283 -j ACCEPT"),
                (into, there, "-s 10.55.0.2/32 -d 10.55.0.1/32 -p tcp -m tcp --dport 22 -m comment "
                              "--comment _exp_1795370285 -j ACCEPT"),
                (out, there, "-s 10.55.0.1/32 -d 10.55.0.2/32 -p tcp -m tcp --sport 22 -m comment "
                             "--comment _exp_1795370285 -j ACCEPT")):
            self.assertEqual(expected, self.program(dated=False).rule(chain, grant))
        self.assertIn("-m time --datestop 2026-11-22T18:38:02 -m comment",
                      self.program().rule(into, ssh._replace(expires=1795372683)))

    def test_rule_and_parse_rule_are_inverse(self) -> None:
        """Random doors of both families come back from their rules."""
        draw = random.Random(36)
        for _ in range(500):
            version = draw.choice((4, 6))
            bits = 32 if version == 4 else 128
            address = (ipaddress.IPv4Address if version == 4 else ipaddress.IPv6Address)
            prefix = draw.choice((bits, bits, bits - 8, bits - 72 if version == 6 else 24))
            source = ipaddress.ip_network("%s/%d" % (address(draw.randrange(1, 2 ** bits)), prefix),
                                          strict=False)
            made = server.Door(source, draw.choice((None, address(draw.randrange(2 ** bits)))),
                               draw.choice(("tcp", "udp")), draw.randint(1, 65535))
            grant = server.Grant(made, draw.randrange(1, 2 ** 31), 0.0)
            chain = server.GrantChain("filter", "MYSPA", "ACCEPT", draw.choice((True, False)))
            text = self.program(draw.choice((True, False))).rule(chain, grant)
            self.assertEqual((made, grant.expires), server.parse_rule("-A MYSPA " + text, chain))
            self.assertIsNone(server.parse_rule("-A OTHER " + text, chain))

    def test_rules_that_are_no_grants(self) -> None:
        """Rules of other chains, without our comment, or of another form are no grants."""
        chain = server.GrantChain("filter", "FWKNOP_INPUT", "ACCEPT")
        rest = " -m comment --comment _exp_1795370283 -j ACCEPT"
        for line in (
                "", "-N FWKNOP_INPUT", "-P INPUT ACCEPT", "-A INPUT -j FWKNOP_INPUT",
                "-A FWKNOP_INPUT -s 10.0.0.1/32 -p tcp -m tcp --dport 22 -j ACCEPT",
                "-A FWKNOP_INPUT -p tcp -m tcp --dport 22" + rest,
                "-A FWKNOP_INPUT -s 10.0.0.1/32" + rest,
                "-A FWKNOP_INPUT -s 10.0.0.1/32 -p icmp" + rest,
                "-A FWKNOP_INPUT -s 10.0.0.1/32 -p tcp -m tcp --dport 1:22" + rest,
                "-A FWKNOP_INPUT -s 10.0.0.1/32 -p tcp -m tcp --dport 22 -m comment --comment "
                "_exp_x -j ACCEPT",
                "-A FWKNOP_INPUT -s 10.0.0.1/32 -p tcp -m tcp --dport 22 -m comment --comment "
                "\"my rule\" -j ACCEPT",
                "-A FWKNOP_INPUT -s host -p tcp -m tcp --dport 22" + rest,
                # the opposite of a grant to this address
                "-A FWKNOP_INPUT ! -s 10.0.0.1/32 -p tcp -m tcp --dport 22" + rest):
            with self.subTest(line=line):
                self.assertIsNone(server.parse_rule(line, chain))

    def test_older_tables_are_asked_of_no_more_than_needed(self) -> None:
        """A look for a guard runs a program only where /proc names the guard's table."""
        netlink, settings = mock.Mock(**{"dump.return_value": []}), server.ServerSettings()
        settings.set_defaults()
        ran = []  # type: List[str]

        def run_program(arguments: List[str], *_: Any) -> str:
            ran.append(" ".join(arguments[1:4]))
            return "-N FWKNOP_GUARDED\n"

        for names, expected in (("", []), ("filter\nraw", []),
                                ("filter\nmangle", ["-V", "-t mangle -S"] * 2)):
            with mock.patch.object(server, "read_proc", return_value=names), \
                    mock.patch.object(server, "find_program", lambda name: "/x/" + name), \
                    mock.patch.object(server, "run_program", run_program):
                found = server.leftovers(server.GUARD, settings, mock.Mock(), netlink)
            self.assertEqual((expected, len(expected) // 2), (ran, len(found)))


class ProgramTest(unittest.TestCase):
    """Programs of the firewall."""

    def test_ends(self) -> None:
        """Output and input longer than a pipe holds; an end long after that of the output; an exit
        code; one that never ends, with what it started."""
        text, script = "x" * 200000, "exec <&- >&- 2>&-; sleep 0.%d; exit 3"
        self.assertEqual(text, server.run_program(["/bin/cat"], text))
        for number in range(3):
            with self.assertRaisesRegex(server.CommandError, "exit 3 failed: no reason given$"):
                server.run_program(["/bin/sh", "-c", script % number], text)
        with self.assertRaisesRegex(server.CommandError, "^/bin/sh: killed after 0.1 seconds$"):
            server.run_program(["/bin/sh", "-c", "sleep 60 & wait"], seconds=0.1)


class AnsweringSocket:
    """A socket on which the kernel answers with these bytes."""

    def __init__(self, answer: bytes) -> None:
        self.answer, self.ready = answer, []  # type: Tuple[bytes, List[bytes]]

    def sendto(self, *_: Any) -> None:
        """Ask."""
        self.ready = [self.answer]

    def recv(self, *_: Any) -> bytes:
        """Return the answer, once."""
        if not self.ready:
            raise BlockingIOError
        return self.ready.pop()


class NetlinkTest(unittest.TestCase):
    """Errors of the socket before the kernel answers."""

    def test_errors_are_command_errors(self) -> None:
        """An error of the socket is one that the server tries again, and does not end it."""
        if not hasattr(socket, "AF_NETLINK"):
            skip("no netlink on this system")
        netlink = server.Netlink.open()
        netlink.close()
        full = mock.Mock(side_effect=OSError(105, "No buffer space available"))
        netlink.socket = mock.Mock(recv=full, sendto=full)
        for call in (lambda: netlink.commit([(server.DELETE_ELEMENT, 1, b"")]),
                     lambda: netlink.dump(server.GET_RULE, 1, b"")):
            with self.assertRaises(server.CommandError) as caught:
                call()
            self.assertEqual(105, caught.exception.number)


class NftTest(unittest.TestCase):
    """The types of sets, their elements, and netlink attributes."""

    def test_key_and_door_are_inverse(self) -> None:
        """Every kind of door comes back from the bytes of its element."""
        for text in ("10.55.0.2/32 tcp/22", "10.55.0.0/24 udp/53",
                     "10.55.0.2/32 tcp/65535 10.0.0.1", "2001:db8::7/128 tcp/1",
                     "2001:db8:1:200::/56 udp/53",
                     "2001:db8::7/128 tcp/22 2001:db8::1"):
            with self.subTest(door=text):
                set_type = server.set_type_of(door(text))
                key = set_type.key(door(text))
                self.assertEqual(0, len(key) % 4)
                self.assertEqual(door(text), set_type.door(key))

    def test_key_bytes(self) -> None:
        """Each field on four bytes, big-endian, as nf_tables concatenates them."""
        self.assertEqual(b"\x0a\x37\0\2" b"\6\0\0\0" b"\0\x16\0\0",
                         server.set_type_of(door("10.55.0.2/32 tcp/22")).key(
                             door("10.55.0.2/32 tcp/22")))

    def test_foreign_elements(self) -> None:
        """Another length or protocol is no door."""
        set_type = server.SetType(4, 32, False)
        for key in (b"", bytes(11), bytes(13), b"\x0a\x37\0\2" b"\x84\0\0\0" b"\0\x16\0\0"):
            self.assertIsNone(set_type.door(key))

    def test_names_of_sets(self) -> None:
        """Each type has its name, and the name its type."""
        for set_type, name in (((4, 32, False), "spa4"), ((4, 24, True), "spa4_24_to"),
                            ((6, 128, True), "spa6_to"), ((6, 56, False), "spa6_56")):
            self.assertEqual(name, server.SetType(*set_type).name)
            self.assertEqual(server.SetType(*set_type), server.parse_set_name(name))
        for name in ("", "spa", "spa4_32", "spa4_x", "spa5", "spa4_to_24", "blocked4", "spa4_24_"):
            self.assertIsNone(server.parse_set_name(name))

    def test_set_language(self) -> None:
        """Declaration and match have the same fields, and a prefix masks the source."""
        set_type = server.SetType(6, 56, True)
        self.assertEqual("add set inet spa spa6_56_to { type ipv6_addr . ipv6_addr . inet_proto . "
                         "inet_service; flags timeout; }", set_type.creation(server.GUARD_TABLE))
        self.assertEqual("ip6 saddr & ffff:ffff:ffff:ff00:: . ip6 daddr . meta l4proto . th dport "
                         "@spa6_56_to", set_type.match())
        self.assertEqual("ip saddr . meta l4proto . th dport @spa4",
                         server.SetType(4, 32, False).match())

    def test_attributes(self) -> None:
        """Any values come back, in order, with their padding gone; the last of several stays."""
        draw = random.Random(12)
        for _ in range(200):
            values = [bytes(draw.randrange(256) for _ in range(draw.randrange(12)))
                      for _ in range(draw.randrange(6))]
            data = b"".join(server.attribute(n + 1, value) for n, value in enumerate(values))
            self.assertEqual(0, len(data) % 4)
            self.assertEqual(dict(enumerate(values, 1)), server.attributes(data))
            self.assertEqual(values, [each for _, each in server.attribute_list(data)])
        nested = server.attribute(server.NESTED | 3, server.attribute(1, b"x"))
        self.assertEqual({1: b"x"}, server.attributes(server.attributes(nested)[3]))

    def test_broken_netlink_data(self) -> None:
        """An attribute of three bytes is an error that is tried again; tests/fuzz.py has more."""
        with self.assertRaises(server.CommandError):
            server.attributes(b"\3\0\1\0zzzz")

    def test_messages(self) -> None:
        """One answer of the kernel may hold several messages."""
        one = struct.pack("=IHHII", 20, 5, 0, 1, 77) + b"body"
        two = struct.pack("=IHHII", 21, 6, 0, 1, 78) + b"xxxxx\0\0\0"
        self.assertEqual([(5, 77, b"body"), (6, 78, b"xxxxx")],
                         list(server.netlink_messages(one + two)))

    def test_what_the_kernel_ends_by_itself(self) -> None:
        """A grant whose time has come costs no netlink; one that ends in between, a second look."""
        doors = [door("10.55.0.2/32 tcp/%d" % port) for port in (1, 2, 3)]
        chain, clock = server.parse_nft_chains("inet filter input"), Clock()
        netlink = mock.Mock()
        firewall = server.NftFirewall("nft", chain, frozenset(), [server.set_type_of(doors[0])],
                                      netlink, mock.Mock(), clocks=clock.clocks())
        now = clock.mono()
        firewall.remove([server.Grant(each, 0, now) for each in doors])
        self.assertEqual([], netlink.mock_calls)
        for seconds, count in ((0.01, 0), (0.1, 1), (server.FOR_EVER, 0)):
            with mock.patch.object(firewall, "read_set", return_value=[(doors[0], seconds)]):
                self.assertEqual(count, len(firewall.grants()), "one that ends now comes not back")
        looks = [doors, doors[1:], doors[1:]]
        missing = server.CommandError("gone", errno.ENOENT)
        for failures in ([missing, None], [missing] * 9, [server.CommandError("no", errno.EPERM)]):
            netlink.commit.reset_mock(side_effect=True)
            netlink.commit.side_effect = failures
            with mock.patch.object(firewall, "read_set", side_effect=[
                    [(each, 9.0) for each in look] for look in looks * 3]):
                grants = [server.Grant(doors[0], 0, now + 9), server.Grant(doors[1], 0, now + 9),
                          server.Grant(doors[2], 0, now, early=True)]
                if failures[-1]:
                    self.assertRaises(server.CommandError, firewall.remove, grants)
                    self.assertLess(netlink.commit.call_count, 9)
                    continue
                firewall.remove(grants)
            self.assertEqual([[server.element_message(server.DELETE_ELEMENT, chain[0], each)
                               for each in look] for look in looks[:2]],
                             [each[0][0] for each in netlink.commit.call_args_list])

    def test_a_change_that_takes_long(self) -> None:
        """The kernel counts from the change on, so it would end the grant too late: we close it."""
        clock, first = Clock(), door("10.55.0.2/32 tcp/1")
        netlink = mock.Mock()
        firewall = server.NftFirewall("nft", server.parse_nft_chains("inet filter input"),
                                      frozenset(), [server.set_type_of(first)], netlink,
                                      mock.Mock(), clocks=clock.clocks())
        grants = server.Grants(firewall, mock.Mock(level=server.INFO), clock.clocks())
        for seconds, took, again, closes in ((9, 0.01, False, 0), (9, 3.0, False, 1),
                                             (2, 3.0, False, 1), (9, 0.01, True, 1)):
            with self.subTest(seconds=seconds, took=took, again=again):
                netlink.commit.side_effect = lambda _: clock.pass_seconds(took)  # noqa: B023
                with contextlib.ExitStack() as stack:
                    if took > seconds:
                        stack.enter_context(self.assertRaises(server.CommandError))
                    grants.grant([first], seconds)
                with mock.patch.multiple(firewall, read_set=lambda *_: [], intact=lambda: True):
                    self.assertFalse(again and grants.restore(), "the grant was gone")
                netlink.commit.side_effect = None
                netlink.commit.reset_mock()
                clock.pass_seconds(seconds)
                with mock.patch.object(firewall, "read_set", return_value=[(first, took)]):
                    grants.expire()
                self.assertEqual(closes, netlink.commit.call_count)
                self.assertEqual({}, grants.live)

    def test_cut_answers(self) -> None:
        """An answer of the kernel that is cut anywhere is a CommandError, or a shorter list."""
        set_type = server.SetType(4, 32, False)
        element = server.attribute(server.ELEMENT_KEY, server.attribute(
            server.DATA_VALUE, set_type.key(door("10.55.0.2/32 tcp/22"))))
        element += server.attribute(server.ELEMENT_EXPIRATION, struct.pack(">Q", 9000))
        body = bytes(4) + server.attribute(server.LIST_ELEMENTS,
                                           server.attribute(server.LIST_ITEM, element))
        answer = struct.pack("=IHHII", 16 + len(body), server.NEW_ELEMENT, 0, 1, 0) + body
        answer += struct.pack("=IHHIIi", 20, server.NLMSG_DONE, 0, 1, 0, 0)
        answer += struct.pack("=IHHIIi", 20, server.NLMSG_ERROR, 0, 1, 0, 0)
        netlink = server.Netlink.open()
        netlink.close()
        for length in range(len(answer) + 1):
            for whole in (False, True):  # the first message, and what is in it is cut
                data = bytearray(answer[:length])
                if whole and length >= 4:
                    struct.pack_into("=I", data, 0, min(length, 16 + len(body)))
                for ask in (lambda: netlink.commit([(server.DELETE_ELEMENT, 1, b"")]),
                            lambda: server.NftFirewall.read_set(
                                mock.Mock(netlink=netlink), server.GUARD_TABLE, set_type)):
                    answering = AnsweringSocket(bytes(data))
                    netlink.socket = mock.Mock(sendto=answering.sendto, recv=answering.recv)
                    with contextlib.suppress(server.CommandError):
                        ask()


if __name__ == "__main__":
    unittest.main()
