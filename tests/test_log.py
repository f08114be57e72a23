"""The log in fwknopd's words: patterns of fail2ban, logwatch and logcheck for it match here, too.

Each line is one of tests/spec/fwknop.md 3.10, whole, or with words of ours after it where a row
says so. That the real fwknopd writes the same is shown by tests/test_live_control.py.
"""

import ipaddress
import os
import re
import signal
import subprocess
import sys
import unittest
from typing import Any, Callable, Dict, List, Tuple
from unittest import mock

import spa_server as server
from tests.test_packet import NOW, Sender, b64
from tests.test_server import KEYS, ServerCase, datagram

STANZA = "SOURCE ANY\n" + KEYS
FROM = r"\[10\.55\.0\.2\] \(stanza #1\) "
CONTEXT = FROM + "Error creating fko context: "
DOOR = r"10\.55\.0\.2 -> 0\.0\.0\.0/0 tcp/22"

# (event, access.conf, what is other in the packet, fwknopd's line, what ours says after it)
PACKETS: Tuple[Tuple[str, str, Dict[str, Any], str, str], ...] = (
    ("opened", STANZA, {}, r"Added access rule to FWKNOP_INPUT for %s, expires at \d+" % DOOR, ""),
    ("received", STANZA, {},
     r"\(stanza #1\) SPA Packet from IP: 10\.55\.0\.2 received with access source match", ""),
    ("destination", STANZA + "DESTINATION 192.0.2.1\n", {},
     r"\(stanza #1\) SPA packet \(10\.55\.0\.2 -> 10\.55\.0\.1\) filtered by SOURCE and/or "
     r"DESTINATION criteria", ""),
    ("no stanza", "SOURCE 192.0.2.1\n" + KEYS, {},
     r"No access data found for source IP: 10\.55\.0\.2", ""),
    ("wrong HMAC", STANZA, {"sender": Sender(hmac_key=b"wrong")},
     CONTEXT + "Args contain invalid data: FKO_ERROR_INVALID_DATA_HMAC_COMPAREFAIL", ""),
    ("wrong key", STANZA, {"sender": Sender(key=b"wrong")},
     CONTEXT + "Decryption failed or decrypted data is invalid", ""),
    ("old", STANZA, {"timestamp": NOW - 500},
     FROM + r"SPA data time difference is too great \(500 seconds\)\.",
     r" The packet is old, or the client's clock is behind\."),
    ("from the future", STANZA, {"timestamp": NOW + 500},
     FROM + r"SPA data time difference is too great \(500 seconds\)\.",
     r" The client's clock is ahead\."),
    ("no address", STANZA + "REQUIRE_SOURCE_ADDRESS Y\n", {"text": "0.0.0.0,tcp/22"},
     FROM + r"Got 0\.0\.0\.0 when valid source IP was required\.", ""),
    ("user", STANZA + "REQUIRE_USERNAME pyuser\n", {"user": "eve"},
     FROM + r"Username in SPA data \(eve\) does not match required username: pyuser", ""),
    ("port", STANZA + "OPEN_PORTS tcp/1\n", {},
     FROM + r"One or more requested protocol/ports was denied per access\.conf\.",
     r" \(tcp/22\)"),
    ("command", STANZA, {"kind": 0, "text": "10.55.0.2,id"},
     FROM + r"SPA Command messages are not allowed in the current configuration\.", r"( \(.*\))?"),
    ("NAT", STANZA, {"kind": 2, "extra": [b64(b"1.2.3.4,22")]},
     r"\(stanza #1\) SPA packet from 10\.55\.0\.2 requested NAT access, but is not "
     r"enabled/supported", r"( \(.*\))?"),
    ("short", STANZA, {"payload": b"x" * 20},
     r"\[10\.55\.0\.2\] preprocess_spa_data\(\) returned error 4097: 'Not enough data to be a "
     r"valid SPA message' for incoming packet\.", ""),
    ("alphabet", STANZA, {"payload": b"!" * 200},
     r"\[10\.55\.0\.2\] preprocess_spa_data\(\) returned error 4098: 'Data is not an SPA message' "
     r"for incoming packet\.", ""),
    ("GnuPG prefix", STANZA, {"payload": b"hQ" + b"A" * 200},
     FROM + "Error creating fko context: Args contain invalid data",
     ": 202 characters, which begin as a GPG packet does"),
    ("long GnuPG prefix", STANZA, {"payload": b"hQ" + b"A" * 400},
     r"\[10\.55\.0\.2\] preprocess_spa_data\(\) returned error 4096: 'Data is not a valid SPA "
     r"message format' for incoming packet\.", ""),
    ("a tag too much", "SOURCE ANY\n" + KEYS.splitlines()[0], {}, CONTEXT +
     "Args contain invalid data: FKO_ERROR_INVALID_DATA_DECODE_NON_ASCII", ""),
    ("prefix", STANZA, {"payload": b"U2FsdGVkX1" + b"A" * 200},
     r"\[10\.55\.0\.2\] preprocess_spa_data\(\) returned error 4096: 'Data is not a valid SPA "
     r"message format' for incoming packet\.", ""),
)

# What public filters for fwknopd look for: fail2ban's <HOST> is a group here; logcheck's lines
# are those of Debian's package.
FILTERS = (
    ("wrong HMAC", r"\[(?P<host>\S+)\] \(stanza #\d+\) Error creating fko context: .*HMAC_COMPARE"),
    ("wrong key", r"\[(?P<host>\S+)\] \(stanza #\d+\) Error creating fko context: Decryption"),
    ("old", r"\[(?P<host>\S+)\] \(stanza #\d+\) SPA data time difference is too great"),
    ("port", r"\[(?P<host>\S+)\] \(stanza #\d+\) One or more requested protocol/ports was denied"),
    ("no stanza", r"No access data found for source IP: (?P<host>\S+)$"),
    ("opened", r"Added access rule to \S+ for (?P<host>\S+) -> \S+ \S+, expires at \d+$"),
    ("replay", r"Replay detected from source IP: (?P<host>[^ ,]+), Destination proto/port: "),
)


class LogCase(ServerCase):
    """Lines that events make."""

    def lines(self) -> List[str]:
        """Return the log since the last call."""
        return self.logged().splitlines()

    def assert_line(self, pattern: str, lines: List[str]) -> None:
        """Fail unless a whole line is as the pattern says."""
        self.assertTrue([line for line in lines if re.match("(?:%s)$" % pattern, line)],
                        "no line is %s in\n%s" % (pattern, "\n".join(lines)))

    def packet(self, made: Any, payload: bytes = b"", sender: Any = None, **fields: Any) -> bytes:
        """Let a packet come; return it."""
        self.count = getattr(self, "count", 0) + 1
        fields.setdefault("timestamp", NOW)
        fields.setdefault("rand", "%016d" % self.count)
        payload = payload or (sender or Sender()).packet(**fields)
        made.gate.receive(datagram(payload))
        return payload

    def after(self, event: str) -> List[str]:
        """Return the lines of an event of the table."""
        if event == "replay":
            made = self.serve(STANZA)
            payload = self.packet(made)
            self.lines()
            self.packet(made, payload)
            return self.lines()
        self.firewall.flush()
        access, fields = next((row[1], dict(row[2])) for row in PACKETS if row[0] == event)
        made = self.serve(access)
        self.packet(made, **fields)
        return self.lines()


class PacketLineTest(LogCase):
    """Lines about packets."""

    def test_lines(self) -> None:
        """Each of the table; without words of ours after it, the line ends as fwknopd's does."""
        for event, _access, _fields, pattern, more in PACKETS:
            with self.subTest(event=event):
                self.assert_line(pattern + more, self.after(event))

    def test_filters(self) -> None:
        """Find the address in them."""
        for event, pattern in FILTERS:
            found = [match.group("host") for line in self.after(event)
                     for match in [re.search(pattern, line)] if match]
            with self.subTest(event=event):
                self.assertEqual(["10.55.0.2"], found)

    def test_replay(self) -> None:
        """When the packet came first, and where from."""
        self.assert_line(
            r"Replay detected from source IP: 10\.55\.0\.2, Destination proto/port: 17/62201, "
            r"Original source IP: 10\.55\.0\.2, Original dst proto/port: 17/62201, Entry created: "
            r"\d\d/\d\d/\d\d \d\d:\d\d:\d\d", self.after("replay"))

    def test_end_of_a_grant(self) -> None:
        """fwknopd's line, and the door, which it does not tell."""
        made = self.serve(STANZA)
        self.packet(made)
        self.clock.pass_seconds(31)
        made.grants.expire()
        self.assert_line(r"Removed rule 1 from FWKNOP_INPUT with expire time of \d+ \(%s\)" % DOOR,
                         self.lines())

    def test_who_opened(self) -> None:
        """A line of ours: the stanza, the user and his client."""
        self.assert_line(r"\(stanza #1\) user 'bob' \(client \S+\) opened %s for 30 seconds" % DOOR,
                         self.after("opened"))

    def test_source_match(self) -> None:
        """The line stands once for each stanza whose SOURCE fits, before its keys are looked at."""
        other, no_hmac = "SOURCE ANY\nKEY a\nHMAC_KEY b\n", "SOURCE ANY\nKEY a\n"
        match = "(stanza #%d) SPA Packet from IP: 10.55.0.2 received with access source match"
        for access, fields, numbers, then in (
                (STANZA, {}, [1], "Added"),
                (other + "SOURCE 192.0.2.1\n" + KEYS + STANZA + STANZA, {}, [1, 3], "Added"),
                (STANZA + "OPEN_PORTS tcp/1\n" + STANZA, {}, [1, 2], "Added"),
                (no_hmac + other + STANZA, {"sender": Sender(hmac_key=b"x")}, [1, 2, 3],
                 "(stanza #1) Error creating"),
                (no_hmac + other + STANZA, {}, [1, 2, 3], "Added"),
                (STANZA, {"timestamp": NOW - 500}, [1], "time difference"),
                (STANZA, {"sender": Sender(hmac_key=b"x")}, [1], "HMAC_COMPAREFAIL"),
                (STANZA, {"sender": Sender(key=b"x")}, [1], "Decryption failed"),
                ("SOURCE ANY\n" + KEYS.splitlines()[0], {"sender": Sender(hmac_key=b"")}, [1],
                 "Added"),
                (STANZA, {"payload": b"A" * 1200}, [1], "(stanza #1) No stanza encryption mode"),
                ("SOURCE 192.0.2.1\n" + KEYS, {}, [], "No access data"),
                (STANZA, {"payload": b"!" * 200}, [], "error 4098")):
            with self.subTest(access=access, fields=fields):
                self.firewall.flush()
                made = self.serve(access)
                self.packet(made, **fields)
                lines = [line for line in self.lines() if " enabled" not in line]
                found = [number for line in lines for number in range(9) if line == match % number]
                self.assertEqual(numbers, found, lines)
                last = max([0] + [lines.index(match % number) for number in numbers])
                self.assertTrue([line for line in lines[last:] if then in line], lines)

    def test_source_match_in_a_flood(self) -> None:
        """Junk gets some of the lines, a packet that is genuine always has its own."""
        made = self.serve(STANZA)
        for _ in range(1000):
            self.packet(made, b"A" * 200)
        self.assertEqual(server.BURST, self.logged().count("source match"))
        self.packet(made)
        self.assertEqual(1, self.logged().count("source match\n"))
        self.clock.pass_seconds(1)
        self.packet(made, b"A" * 200)
        self.assertIn("%d more packets had an access source match" % (1001 - server.BURST),
                      self.logged())

    def test_denials_in_a_flood(self) -> None:
        """With VERBOSE and a stanza without HMAC, junk does not get a line for each stanza."""
        made = self.serve("SOURCE 192.0.2.1\n" + KEYS + "SOURCE ANY\nKEY bare\n" + STANZA * 18)
        self.log.level = server.DEBUG
        for _ in range(100):
            self.packet(made, b"8" * 200)
        lines = self.lines()
        found = [line for line in lines if "COMPAREFAIL" in line or "filtered by SOURCE" in line]
        self.assertEqual(server.STEP_BURST, len(found))
        self.assertLess(len(lines), server.STEP_BURST + 3 * server.BURST)

    def test_stanzas_before_the_one_that_opens(self) -> None:
        """Their denials are told, too, but not counted; -v tells of those whose SOURCE is wrong."""
        made = self.serve("SOURCE 192.0.2.1\n" + KEYS + STANZA + "OPEN_PORTS tcp/1\n" + STANZA)
        for level in (server.INFO, server.DEBUG):
            self.log.level = level
            self.packet(made)
            lines = self.lines()
            self.assert_line(r"\[10\.55\.0\.2\] \(stanza #2\) One or more requested protocol/ports "
                             r"was denied per access\.conf\. .*", lines)
            self.assertEqual(level == server.DEBUG, (
                "(stanza #1) SPA packet (10.55.0.2 -> 10.55.0.1) filtered by SOURCE and/or "
                "DESTINATION criteria") in lines, lines)
        self.assertEqual({"accepted": 2}, made.tally.counts)

    def test_what_is_open_already(self) -> None:
        """Is not added, whether it stays open for longer or not."""
        made = self.serve(STANZA)
        self.packet(made)
        for seconds in (0, 5):
            self.lines()
            self.clock.pass_seconds(seconds)
            self.packet(made, timestamp=NOW + seconds)
            lines = self.lines()
            self.assert_line(r"access rule already exists in FWKNOP_INPUT for %s, expires at %d"
                             % (DOOR, NOW + seconds + 30), lines)
            self.assertNotIn("Added", "\n".join(lines))

    def test_a_user_with_words_of_ours(self) -> None:
        """A name can't end its quotes."""
        made = self.serve(STANZA)
        self.packet(made, user="a' (client 9) opened all")
        self.assert_line(r"\(stanza #1\) user 'a\\x27 \(client 9\) opened all' \(client 3\.0\.0\) "
                         "opened .*", self.lines())


class LifeLineTest(LogCase):
    """Lines about the server itself."""

    def after_signal(self, number: int, made: Any, read: Callable[[], Any]) -> List[str]:
        """Return the lines of a signal."""
        self.lines()
        server.obey_signal(number, made, read)
        return self.lines()

    def test_signals(self) -> None:
        """The end, a reload, and one that fails."""
        made = self.serve(STANZA, "ENABLE_UDP_SERVER Y;\n")

        def fail() -> Any:
            raise server.ConfigError("a:1: X: unknown directive")

        def again() -> Any:
            return server.Configuration(made.settings, made.gate.stanzas, [], test=True)

        self.assertEqual(["Got SIGHUP. Re-reading configs.", "Re-starting fwknopd",
                          "Starting fwknopd main event loop."],
                         self.after_signal(signal.SIGHUP, made, again))
        self.assertEqual(["Got SIGHUP. Re-reading configs.", "a:1: X: unknown directive; going on "
                          "with the old settings"], self.after_signal(signal.SIGHUP, made, fail))
        self.assertRegex(self.after_signal(signal.SIGHUP, made, lambda: 1 // 0)[1],
                         r"^internal error: ZeroDivisionError in line \d+; going on with the old ")
        self.assertTrue(made.running)
        for number in (signal.SIGTERM, signal.SIGINT):
            self.assertEqual(["Gracefully leaving the fwknopd event loop.", "Got %s. Exiting..."
                              % number.name], self.after_signal(number, made, again))
            self.assertFalse(made.running)

    def test_closing_all_where_a_look_at_the_kernel_fails(self) -> None:
        """SIGUSR2 while nobody can say what other settings have left: the server goes on."""
        made = self.serve(STANZA)
        self.packet(made)
        self.assertEqual(1, len(self.firewall.rules))
        with mock.patch.object(server, "remove_leftovers",
                               side_effect=server.CommandError("no luck")):
            lines = self.after_signal(signal.SIGUSR2, made, dict)
        self.assertEqual("no luck; what earlier settings opened may be left", lines[-1])
        self.assertEqual({}, self.firewall.rules)
        self.assertTrue(made.running)

    def test_counters(self) -> None:
        """SIGUSR1: packets by reason, what is open, since when; and nothing else happens."""
        made = self.serve(STANZA)

        def read() -> Any:
            raise AssertionError("read")

        def told() -> str:
            lines = self.after_signal(signal.SIGUSR1, made, read)
            self.assertEqual(1, len(lines), lines)
            return lines[0]

        self.assertRegex(told(), r"^Packets seen: 0 accepted; rejected: none; 0 grants are "
                         r"open; since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d$")
        payload = self.packet(made)
        for _ in range(30):  # more than have a line of their own
            self.packet(made, payload)
        self.assertRegex(told(), "^Packets seen: 1 accepted; rejected: 30 replay; 1 grants are "
                         "open; since ")
        self.assertTrue(made.running)
        made.grants.flush()
        self.assertRegex(told(), "; 0 grants are open; ")

    def test_background(self) -> None:
        """On the way there, stderr gets what went wrong and syslog gets all."""
        self.log.stream_level = server.ERROR
        self.log.syslog = mock.Mock()
        self.log.info("Starting fwknopd")
        self.log.warning("careful")
        self.log.error("broken")
        self.assertEqual(["broken"], self.lines())
        self.assertEqual([(6, "Starting fwknopd"), (4, "careful"), (3, "broken")],
                         [call[0] for call in self.log.syslog.write.call_args_list])


class OpenersTest(LogCase):
    """The file from which --fw-list knows who opened what."""

    def test_an_end_that_is_a_second_off(self) -> None:
        """The kernel's time and ours are rounded at different moments; two seconds are another."""
        door = server.Door(ipaddress.ip_network("10.55.0.2/32"), None, "tcp", 22)
        grant = server.Grant(door, 1000, 0.0)
        openers = {server.grant_key(grant): "stanza #1, user 'joe'"}
        found = [server.find_opener(openers, grant._replace(expires=expires)).split(",")[0]
                 for expires in range(998, 1003)]
        self.assertEqual(["-", "stanza #1", "stanza #1", "stanza #1", "-"], found)

    def knock(self, made: Any, count: int, user: str) -> None:
        """Open a port for as many addresses, one after the other."""
        for number in range(count):
            self.packet(made, user=user, text="10.1.0.%d,tcp/22" % number)

    def openers(self, made: Any) -> List[Tuple[str, str]]:
        """Return source and opener of each grant in the listing."""
        text = server.list_grants(made.grants.firewall,
                                  server.read_openers(server.openers_file(made.settings)))
        return [(line.split()[4], line.rpartition("left, ")[2]) for line in text.splitlines()[4:]]

    def test_it_stays_small(self) -> None:
        """However often it is written, and without a word of what is open being lost."""
        made = self.serve(STANZA)
        path = server.openers_file(made.settings)
        with mock.patch.object(server, "OPENERS_BYTES", 500):
            made.access.openers_limit = 500
            self.knock(made, 3, "alice")
            size = os.stat(path).st_size
            self.clock.pass_seconds(10)
            for _ in range(20):
                self.clock.pass_seconds(1)
                self.knock(made, 2, "bob")
        self.assertLess(os.stat(path).st_size, 500 + 2 * size)
        self.assertEqual([("10.1.0.0", "stanza #1, user 'bob'"),
                          ("10.1.0.1", "stanza #1, user 'bob'"),
                          ("10.1.0.2", "stanza #1, user 'alice'")], sorted(self.openers(made)))
        self.assertEqual(0o600, os.stat(path).st_mode & 0o777)

    def test_it_is_tidied_each_time_it_has_doubled(self) -> None:
        """Not with each packet, when much is open: each would cost as much as all before it."""
        made = self.serve(STANZA)
        with mock.patch.object(server, "OPENERS_BYTES", 500), \
                mock.patch.object(server, "grant_key", side_effect=server.grant_key) as keys:
            made.access.openers_limit = 500
            self.knock(made, 200, "alice")
        self.assertLess(keys.call_count, 200 + 2 * 200)
        self.assertEqual(200, len(self.openers(made)))
        self.assertNotIn("-", [opener for _, opener in self.openers(made)])

    def test_doors_in_another_form(self) -> None:
        """A firewall that keeps a door without an address of it has its opener all the same."""
        made = self.serve("SOURCE ANY\n" + KEYS, "ENABLE_DESTINATION_RULE Y;\n")
        self.firewall.normalise = (  # type: ignore[assignment]
            lambda door: door._replace(destination=None))
        self.packet(made)
        self.assertEqual(1, len(self.openers(made)))
        self.assertNotIn("-", [opener for _, opener in self.openers(made)])

    def test_without_the_file(self) -> None:
        """A grant is listed without a name; one that can't be written down opens all the same."""
        made = self.serve(STANZA)
        path = server.openers_file(made.settings)
        os.mkdir(path)
        self.knock(made, 1, "alice")
        self.assertEqual([("10.1.0.0", "-")], self.openers(made))
        os.rmdir(path)
        os.mkfifo(path)  # as a local user can, where the pid file is in /tmp
        self.knock(made, 1, "alice")
        self.assertEqual([("10.1.0.0", "-")], self.openers(made))
        os.unlink(path)
        if os.geteuid() == 0:
            self.knock(made, 1, "alice")
            self.assertNotEqual([("10.1.0.0", "-")], self.openers(made))
            os.chown(path, 65534, 65534)
            self.assertEqual([("10.1.0.0", "-")], self.openers(made))
            os.unlink(path)
        with open(path, "wb") as file:
            file.write(b"\xff\n\t\nno tab\n10.1.0.0 -> 0.0.0.0/0 tcp/22 _exp_1\teve\n")
        self.assertEqual([("10.1.0.0", "-")], self.openers(made))

    def test_who_asks_for_less_is_not_the_opener(self) -> None:
        """Of a door that is open for longer already."""
        made = self.serve(STANZA)
        self.knock(made, 1, "alice")
        self.packet(made, user="bob", kind=3, extra=[b"5"], text="10.1.0.0,tcp/22")
        self.assertEqual([("10.1.0.0", "stanza #1, user 'alice'")], self.openers(made))


class OutputTest(LogCase):
    """What is printed, when it can't be."""

    def test_a_full_disk(self) -> None:
        """Is told in one line, however much is printed; exit code 1."""
        for option in ("-V", "--help"):
            with open("/dev/full", "w") as full:
                done = subprocess.run([sys.executable, server.__file__, option], stdout=full,
                                      stderr=subprocess.PIPE, env={})
            self.assertEqual((1, b"spa_server.py: standard output: No space left on device\n"),
                             (done.returncode, done.stderr))


class KillTest(LogCase):
    """-K, with a server that takes its time."""

    def test_patience_has_an_end(self) -> None:
        """It says that the server has not ended, and does not say that it has."""
        path = os.path.join(self.directory, "fwknopd.pid")
        self.addCleanup(os.close, server.lock_pid_file(path, self.log))
        arguments = server.Arguments(["-K", "-p", path, "-c", os.devnull])
        with mock.patch("os.kill") as kill, mock.patch.object(server, "ANSWER_SECONDS", 0.2), \
                mock.patch("builtins.print") as said, \
                self.assertRaisesRegex(server.SpaError, r"\(pid=%d\) has not ended yet"
                                       % os.getpid()):
            server.signal_server(arguments)
        kill.assert_called_once_with(os.getpid(), signal.SIGTERM)
        said.assert_not_called()


if __name__ == "__main__":
    unittest.main()
