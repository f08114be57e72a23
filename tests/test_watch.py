"""What watches the server: METRICS_FILE, and the README's filter for fail2ban; and --man."""

import os
import re
import shutil
import socket
import stat
import unittest
from typing import Any, Callable, Dict, List, Tuple
from unittest import mock

import spa_server as server
from tests.support import TOP, captured, manual_complaints, read, run, skip, write
from tests.test_log import PACKETS, STANZA, LogCase
from tests.test_packet import Sender
from tests.test_server import datagram

SAMPLE = re.compile(r'(spa_\w+)(?:\{(\w+)="([^"\\{}]*)"\})? (nan|[0-9.]+)')


def samples(text: str) -> Dict[Tuple[str, str], float]:
    """Return the values of a file in Prometheus's text format, by name and label's value.

    Fail unless the lines about a metric stand together, HELP and TYPE first.
    """
    found: Dict[Tuple[str, str], float] = {}
    assert text.endswith("\n")
    for part in text.split("# HELP ")[1:]:
        about, kind, *lines = part.splitlines()
        name = about.split()[0]
        assert len(about.split()) > 2 and kind == "# TYPE %s %s" % (
            name, "counter" if name.endswith("_total") else "gauge"), part
        for line in lines:
            match = SAMPLE.fullmatch(line)
            assert match and match.group(1) == name, line
            assert (name, match.group(3) or "") not in found, line
            found[name, match.group(3) or ""] = float(match.group(4))
    return found


class MetricsTest(LogCase):
    """METRICS_FILE."""

    def setUp(self) -> None:
        """Name the file."""
        super().setUp()
        self.file = self.place("spa.prom")

    def watched(self, access: str = STANZA) -> Any:
        """Return a server that writes the file."""
        return self.serve(access, "METRICS_FILE %s;\n" % self.file)

    def written(self, made: Any) -> Dict[Tuple[str, str], float]:
        """Return what the server writes now, but for what is 0."""
        made.metrics.write()
        return {key: value for key, value in samples(read(self.file)).items() if value}

    def test_contents(self) -> None:
        """Each count, once; no packet adds a line; whatever the umask is, all may read it."""
        made = self.watched()
        self.addCleanup(os.umask, os.umask(0o077))
        made.metrics.write()
        before = samples(read(self.file))
        self.assertEqual({name for name, _, _ in server.METRICS}, {name for name, _ in before})
        self.assertEqual(0o644, stat.S_IMODE(os.stat(self.file).st_mode))
        self.assertFalse(os.path.exists(self.file + ".new"))
        payload = self.packet(made)
        self.packet(made, payload)
        for _ in range(3):
            self.packet(made, sender=Sender(hmac_key=b"wrong"))
        made.tally.counts['evil"} 1\n'] += 1  # such as a reason that digest.cache has
        found = self.written(made)
        self.assertEqual({("spa_up", server.VERSION): 1, ("spa_start_time_seconds", ""): made.since,
                          ("spa_packets_total", "accepted"): 1, ("spa_packets_total", "replay"): 1,
                          ("spa_packets_total", "wrong HMAC"): 3, ("spa_grants", ""): 1,
                          ("spa_firewall_checked_timestamp_seconds", ""): made.watch.looked}, found)
        self.assertEqual(before.keys(), samples(read(self.file)).keys())
        self.clock.pass_seconds(31)
        made.grants.expire()
        made.running = False
        self.assertEqual({("spa_up", server.VERSION): 1, ("spa_grants", ""): 1}, {
            key: value for key, value in found.items() if key not in self.written(made)})

    def test_every_reason_is_in_the_set(self) -> None:
        """The reasons in the script, and those of the set."""
        source = read(server.__file__)
        used = set(re.findall(r'(?:PacketRejected|WrongKey|NotSpa|TooFast|NotFresh)\(\s*"([^"]+)"',
                              source))
        used |= set(re.findall(r'\("(stale)"|\("(from the future)"', source).pop(0))
        self.assertGreater(len(used), 35)
        self.assertEqual(set(), used - set(server.REASONS) - {""})
        self.assertEqual({"accepted", "knock", "from the future", "untried"},
                         set(server.REASONS) - used)
        self.assertEqual(len(server.REASONS), len(set(server.REASONS)))

    def test_knocks(self) -> None:
        """A complete sequence counts as a knock, and as accepted when it has opened."""
        made = self.watched("SOURCE ANY\nKNOCK_SEQUENCE 7000,8000\nOPEN_PORTS tcp/22\n")
        made.knocks.is_own_address = lambda packed, now: True
        for port in (7000, 7000, 8000, 7000):
            made.knocks.take_knock(datagram()._replace(
                destination_port=port, protocol=6, flags=2), list(made.knocks.owners))
        found = self.written(made)
        self.assertEqual((1, 1, 1), tuple(found[name] for name in (
            ("spa_knocks_total", ""), ("spa_packets_total", "accepted"), ("spa_grants", ""))))

    def test_firewall(self) -> None:
        """Failures, by their number; the last look that did not fail."""
        made = self.watched()
        failures, looked = (("spa_firewall_failures_total", ""),
                            ("spa_firewall_checked_timestamp_seconds", ""))
        self.clock.pass_seconds(5)
        made.watch.restore()
        self.assertEqual(self.clock.wall_time, self.written(made)[looked])
        self.assertNotIn(failures, self.written(made))
        self.firewall.failures = 2  # the first try, and the second
        self.packet(made)
        self.assertEqual(1, self.written(made)[failures])
        self.assertEqual(1, self.written(made)["spa_packets_total", "firewall"])
        self.packet(made)
        self.firewall.failing_closes = 1
        self.clock.pass_seconds(31)
        made.grants.expire()
        self.assertEqual(2, self.written(made)[failures])
        self.firewall.failing_flushes = 1
        made.command("flush")
        with mock.patch.object(self.firewall, "grants", side_effect=server.CommandError("no")):
            self.clock.pass_seconds(5)
            made.watch.restore()
        found = self.written(made)
        self.assertEqual((4, self.clock.wall_time - 36), (found[failures], found[looked]))

    def test_dropped_lines(self) -> None:
        """Lines that the log has told about, and lines that it has not."""
        made = self.watched()
        takes: List[bool] = []
        with mock.patch.object(self.log.stream, "send", lambda *line: takes.pop(0)):
            for taken in ([False], [False], [True, True], [False], [False]):
                takes[:] = taken
                made.log.info("line")
            self.assertEqual(4, self.written(made)["spa_log_dropped_lines_total", "stderr"])

    def test_kernel_drops(self) -> None:
        """Datagrams that find the buffer full, also when the socket is closed since."""
        made, capture = self.watched(), server.UdpCapture(
            server.open_port_socket(socket.AF_INET, socket.SOCK_DGRAM, 0), 0)
        made.captures = [capture]
        capture.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            for _ in range(100):
                sender.sendto(b"A" * 200, ("127.0.0.1", capture.socket.getsockname()[1]))
        key, got = ("spa_kernel_dropped_packets_total", ""), 0
        made.ears.captures.register(capture, 1)
        if str(capture.lost()) == "nan":
            skip("this kernel does not tell what it dropped")
        before = self.written(made)[key]
        with self.assertRaises(BlockingIOError):
            while capture.receive():
                got += 1
        self.assertEqual(100, got + before)
        made.listen([])
        self.assertEqual(before, self.written(made)[key])
        self.assertEqual("nan", str(capture.lost()))

    def test_when(self) -> None:
        """Every 15 seconds; from a reload on, or up to it."""
        made = self.watched()
        made.metrics.write()
        for seconds, there in ((14, False), (1, True), (14, False), (1, True)):
            os.rename(self.file, self.place("taken"))
            self.clock.pass_seconds(seconds)
            made.turn()
            self.assertEqual(there, os.path.exists(self.file))
            os.rename(self.place("taken"), self.file)
        for conf, there in (("", False), ("METRICS_FILE %s;\n" % self.file, True)):
            os.unlink(self.file)
            settings = server.ServerSettings()
            server.read_server_settings(write(self.place("fwknopd.conf"), (
                "PCAP_INTF lo;\nFWKNOP_RUN_DIR %s;\n" % self.directory) + conf), settings)
            settings.set_defaults()
            with mock.patch.object(server.Configuration, "open_captures", return_value=[]):
                made.reload(server.Configuration(settings, self.stanzas(STANZA), []), self.firewall)
            self.assertEqual(there, os.path.exists(self.file))
            write(self.file, "")
            self.assertEqual(there, made.metrics.due < server.FOR_EVER)

    def test_a_capture_file(self) -> None:
        """Whoever has a file judged does not write over what the service says."""
        self.serve(STANZA, "METRICS_FILE %s;\nPCAP_FILE /capture;\n" % self.file).metrics.write()
        self.assertFalse(os.path.exists(self.file))

    def test_what_can_fail(self) -> None:
        """One line in the log, the server goes on, and so does the file once it can."""
        made, kept = self.watched(), write(self.place("kept"), "kept")
        self.lines()
        cases: Tuple[Tuple[str, Callable[[], Any], str, str], ...] = (
            ("a link", lambda: os.symlink(kept, self.file), "expected a regular file", self.file),
            ("a FIFO", lambda: os.mkfifo(self.file), "expected a regular file", self.file),
            ("a directory", lambda: os.mkdir(self.file), "expected a regular file", self.file),
            ("no directory", lambda: os.rename(self.directory, self.directory + "-"),
             "No such file or directory", ""))
        for name, make, error, hindrance in cases:
            with self.subTest(name):
                make()
                for _ in range(3):
                    made.metrics.write()
                if hindrance:
                    (os.rmdir if os.path.isdir(hindrance) else os.unlink)(hindrance)
                else:
                    os.rename(self.directory + "-", self.directory)
                lines = self.lines()
                self.assertEqual(1, len(lines), lines)
                self.assertRegex(lines[0], "%s.*: %s.*; METRICS_FILE is not written" % (
                    self.file, error))
                made.metrics.write()
                self.assertEqual([], self.lines())
                samples(read(self.file))
                os.unlink(self.file)
        self.assertEqual("kept", read(kept))

    def test_a_directory_of_others(self) -> None:
        """What others put there, such as a second name for root's file, is not written to."""
        made, new = self.watched(), self.file + ".new"
        kept, theirs = write(self.place("kept"), "kept"), write(self.place("theirs"), "")
        os.chmod(self.directory, 0o1777)
        for name, make in (("a link", lambda: os.symlink(kept, new)),
                           ("a second name", lambda: os.link(kept, new)),
                           ("a FIFO", lambda: os.mkfifo(new)),
                           ("a file that he keeps open", lambda: os.link(theirs, new))):
            with self.subTest(name):
                make()
                made.metrics.write()
                samples(read(self.file))
                self.assertEqual(("kept", 0o600, ""), (
                    read(kept), stat.S_IMODE(os.stat(kept).st_mode), read(theirs)))


class FailtobanTest(LogCase):
    """The README's filter for fail2ban."""

    filter = "".join(re.findall(r"    (\[Definition\]\n)    (failregex = .*\n)",
                                read(os.path.join(TOP, "README.md")))[0])

    def syslog(self) -> Tuple[List[str], List[str]]:
        """Return log lines of events that may ban, as syslog writes them, and of those that not."""
        groups: Tuple[List[str], List[str]] = ([], [])
        others = "opened", "received", "old", "from the future", "no address", "user", "port", \
            "command", "NAT", "destination"
        for event in [row[0] for row in PACKETS] + ["replay"]:
            groups[event in others].extend(line for line in self.after(event)
                                           if event in others or "from IP: " not in line)
        made = self.serve(STANZA)
        self.lines()
        made.gate.receive(datagram(b"x" * 20, source="2001:db8::7", destination="2001:db8::1"))
        groups[0].extend(self.lines())
        # Somebody with the keys who tries to have another address banned gets his own banned.
        made = self.serve(STANZA + "REQUIRE_USERNAME bob\n")
        self.lines()
        for user in ("eve] [10.9.9.9] Error creating x", "x: [10.9.9.9] (stanza #1) Error creating",
                     "a b: Replay detected from source IP: 10.9.9.9,"):
            self.packet(made, user=user)
        groups[0].extend(line for line in self.lines() if "received with" not in line)
        return groups[0], groups[1]

    def logs(self) -> Tuple[List[str], List[str]]:
        """Return both kinds of lines, with the beginning that syslog gives them."""
        prefix = "Nov 29 13:31:55 gate fwknopd[77]: "
        bad, good = ([prefix + line for line in group] for group in self.syslog())
        bad += [bad[0].replace("fwknopd", name) for name in ("spa_server", "python3.11")]
        good.append(bad[0].replace("fwknopd", "webapp"))  # a line of which others may say the text
        return bad, good

    def test_regex(self) -> None:
        """Python's re finds the address in each line of junk, and in no other line."""
        bad, good = self.logs()
        self.assertGreater(len(bad), 7)
        self.assertGreater(len(good), 9)
        pattern = self.filter.partition("failregex = ")[2].strip()
        self.assertEqual(1, pattern.count("<HOST>"))
        regex = re.compile(pattern.replace("<HOST>", r"\[?(?P<host>[0-9a-f.:]+)\]?"))
        for line in bad + good:
            match = regex.search(line[len("Nov 29 13:31:55"):])
            found = match.group("host") if match else None
            with self.subTest(line=line):
                self.assertEqual(None if line in good else "2001:db8::7" if "2001:" in line else
                                 "10.55.0.2", found)

    def test_with_fail2ban(self) -> None:
        """fail2ban-regex counts the same lines."""
        if not shutil.which("fail2ban-regex"):
            skip("fail2ban-regex is not installed")
        bad, good = self.logs()
        log = write(self.place("log"), "\n".join(bad + good) + "\n")
        done = run(["fail2ban-regex", log, write(self.place("spa.conf"), self.filter)])
        self.assertRegex(done.stdout, r"Lines: %d lines, 0 ignored, %d matched, %d missed" % (
            len(bad + good), len(bad), len(good)))


class ManualTest(unittest.TestCase):
    """spa_server.py --man."""

    def test_man(self) -> None:
        """Every option and directive; no complaint of a formatter."""
        code, page, err = captured(lambda: server.main(["--man"]))
        self.assertEqual((0, ""), (code, err))
        plain = page.replace("\\-", "-")
        names = [option.format("").strip() for option in server.OPTIONS]
        for table in (server.ServerSettings, server.Stanza, server.KnockdOptions,
                      server.KnockdDoor):
            names += [" / ".join(row.names) for row in table.rows()]
        for name in names:
            self.assertIn("\n.B %s\n" % name, plain)
        for text in ("port of that socket (default: 62201)", "is needed (ignored)", "1 failed; 2 w",
                     "To undo them: -K, then --fw-flush", "--init tcp/22` makes keys and files"):
            self.assertIn(text.replace("is needed", "is always needed"), plain)
        self.assertEqual([], manual_complaints(page))


if __name__ == "__main__":
    unittest.main()
