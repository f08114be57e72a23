"""Knock sequences in the real server: the real knock at it, and the real knockd beside it.

Packet sockets do not take packets away from each other, so that several servers on one host hear
the same knocks: what one line of a table says of knockd and of ours is one packet's doing.
"""

import itertools
import os
import re
import shutil
import signal
import socket
import stat
import sys
import time
import unittest
from typing import Any, Callable, Dict, Iterable, List, NamedTuple, Optional, Tuple

from tests.netns import (
    CLIENT4,
    CLIENT6,
    FWKNOP,
    KEYS,
    OTHER4,
    OTHER6,
    SERVER4,
    SERVER6,
    SPA_SERVER,
    STANZA,
    Cable,
    Host,
    Process,
    Server,
    in_parallel,
    wait_for,
)
from tests.support import TOP, needs_programs, needs_root
from tests.test_live_firewall import NFT, Setup, Site

REAL, NAMED, BESIDE = "knockd", "ours, called knockd", "ours, --knockd-conf beside a stanza"
NO_FIREWALL = "FIREWALL_TYPE none;\n"
SESAME = "%s: %s: OPEN SESAME"
DOOR = "[door]\nsequence = 7000,8000,9000\nseq_timeout = 20\ntcpflags = syn\n"
READY = "[ready]\nsequence = 1:udp,2:udp\n"  # who knocks at it learns that all before was heard
DATE = re.compile(r"^\[\d{4}-\d\d-\d\d \d\d:\d\d\] ", re.M)

# Sends one SYN to each port from 1 up, as a scanner does; what comes back is dropped.
SCAN = """
import socket, sys
for port in range(1, 65536):
    hit = socket.socket()
    hit.setblocking(False)
    hit.connect_ex((sys.argv[1], port))
    hit.close()
"""

# Sends SYNs with sources that are not its own to a port, so many a second; prints how many.
FLOOD = """
import os, socket, struct, sys, time
server, port, seconds, rate = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
segment = struct.pack(">HHIIBBHHH", 4000, port, 1, 0, 5 << 4, 2, 1000, 0, 0)
end = struct.pack(">4s", socket.inet_aton(server)) + segment
begin, sent = time.monotonic(), 0
while time.monotonic() < begin + seconds:
    if sent > (time.monotonic() - begin) * rate:
        time.sleep(0.001)
        continue
    source = b"\\x0b" + os.urandom(3)
    raw.sendto(struct.pack(">BBHHHBBH4s", 0x45, 0, 40, 0, 0, 64, 6, 0, source) + end, (server, 0))
    sent += 1
print(sent)
"""


def write(path: str, text: str, mode: int = 0o600) -> str:
    """Write a file anew, and return its path."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "w") as file:
        file.write(text)
    return path


def read(path: str) -> str:
    """Return what is in a file, nothing when there is none."""
    try:
        with open(path, errors="replace") as file:
            return file.read()
    except FileNotFoundError:
        return ""


class Knockd:
    """A knockd.conf on a host, and who serves it: the real knockd, or ours in one of two ways."""

    def __init__(self, host: Host, kind: str, doors: str, options: str = "Interface = eth0") -> None:
        self.host, self.kind, self.stanza = host, kind, STANZA
        self.directory = host.path("knockd")
        os.mkdir(self.directory)
        self.conf, self.log_file, self.pid_file = (
            os.path.join(self.directory, name) for name in ("knockd.conf", "log", "pid")
        )
        self.configure(doors, options)
        self.process = None  # type: Optional[Process]

    def configure(self, doors: str, options: str = "Interface = eth0") -> None:
        """Write the file anew."""
        files = "LogFile = %s\nPidFile = %s\n" % (self.log_file, self.pid_file)
        write(self.conf, "[options]\n%s%s\n%s%s" % (files, options, READY, doors))

    def command(self) -> List[str]:
        """Return how it is started."""
        if self.kind == REAL:
            return ["knockd", "-c", self.conf]
        if self.kind == NAMED:
            name = os.path.join(self.directory, "knockd")
            if not os.path.exists(name):
                os.symlink(SPA_SERVER[-1], name)
            return [sys.executable, name, "-c", self.conf]
        files = Server(self.host, NO_FIREWALL, self.stanza).files
        return [*SPA_SERVER, *files, "--knockd-conf", self.conf]

    def start(self, client: Host, *launcher: str) -> "Knockd":
        """Start it, and wait until it hears what the client sends."""
        mark = len(self.log())
        self.process = self.host.start(*launcher, *self.command())

        def ready() -> bool:
            """Say whether it has heard another one."""
            assert self.process is not None
            if self.process.popen.poll() is not None:
                raise AssertionError(self.process.output())
            return bool(re.search("tarting (up|fwknopd main)", self.log()[mark:]))

        wait_for(ready, "a start")
        settle(client, [self])
        return self

    def log(self) -> str:
        """Return its log file."""
        return read(self.log_file)

    def lines(self, start: int = 0) -> List[str]:
        """Return the lines of the log without date, empty lines and what tells that it is ready."""
        lines = DATE.sub("", self.log()[start:]).splitlines()
        return [line for line in lines if line.strip() and ": ready: " not in line]

    def wait_for(self, text: str, start: int = 0) -> None:
        """Wait until the log has a text."""
        wait_for(lambda: text in self.log()[start:], repr((self.kind, text, self.log()[start:])))

    def opened(self, source: str, door: str = "door") -> int:
        """Return how often a source has come to the end of a door's sequence."""
        return self.log().count("] " + SESAME % (source, door))

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End it, and return the exit code."""
        assert self.process is not None
        return self.process.end(number)


def settle(client: Host, servers: Iterable[Knockd]) -> None:
    """Wait until each server has heard all that was sent before."""
    left = [(server, server.opened(OTHER4, "ready")) for server in servers]

    def heard() -> bool:
        """Knock once more, and say whether all have heard one within a moment."""
        hit(client, OTHER4, "1:udp", "2:udp")
        end = time.monotonic() + 0.5
        while time.monotonic() < end:
            if all(server.opened(OTHER4, "ready") > count for server, count in left):
                return True
            time.sleep(0.005)
        return False

    wait_for(heard, "servers that listen")


def hit(client: Host, source: str, *steps: str, server: str = SERVER4) -> None:
    """Hit ports from an address as knock does: one SYN each, or a datagram."""
    for step in steps:
        port, _, protocol = step.partition(":")
        if protocol == "udp":
            client.send(server, int(port), "x", source=source)
        elif protocol == "open":  # a whole connection
            assert client.reaches(server, int(port), source, seconds=5)
        else:
            client.ask("probe", [(source, server, int(port))], 0)


class KnockCase(unittest.TestCase):
    """Hosts that are taken away at the end, and a directory for what commands write."""

    def cable(self) -> Cable:
        """Return two hosts."""
        cable = Cable()
        self.addCleanup(cable.close)
        return cable


def commands(directory: str, seconds: int) -> str:
    """Return the lines of a door whose commands write a line each into a file."""
    return (
        "start_command = echo start %%IP%% >> %s/got\ncmd_timeout = %d\n"
        "stop_command = echo stop %%IP%% >> %s/got\n" % (directory, seconds, directory)
    )


@needs_root
@needs_programs("ip", "knock", "iptables", "ip6tables", "nft")
class RealKnockTest(KnockCase):
    """The real knock, and commands that change a real firewall."""

    IPTABLES = (
        "start_command = iptables -I INPUT -s %IP% -p tcp --dport 22 -j ACCEPT\n"
        "stop_command = iptables -D INPUT -s %IP% -p tcp --dport 22 -j ACCEPT\n"
        "start_command_6 = ip6tables -I INPUT -s %IP% -p tcp --dport 22 -j ACCEPT\n"
        "stop_command_6 = ip6tables -D INPUT -s %IP% -p tcp --dport 22 -j ACCEPT\n"
    )
    SETS = (
        "start_command = nft add element ip t four { %IP% }\n"
        "stop_command = nft delete element ip t four { %IP% }\n"
        "start_command_6 = nft add element ip6 t six { %IP% }\n"
        "stop_command_6 = nft delete element ip6 t six { %IP% }\n"
    )
    RULES = """
table ip t { set four { type ipv4_addr; }; chain c { type filter hook input priority 0;
  tcp dport 22 ip saddr != @four drop; }; }
table ip6 t { set six { type ipv6_addr; }; chain c { type filter hook input priority 0;
  tcp dport 22 ip6 saddr != @six drop; }; }
"""

    def test_a_port_opens_and_closes(self) -> None:
        """For who knocked, for its time; TCP, UDP, both, flags; IPv4 and IPv6."""

        def check(case: Tuple[str, str, str]) -> None:
            """One way to start it, one firewall, one sequence."""
            kind, lines, sequence = case
            cable = self.cable()
            client, host = cable.client, cable.server
            host.listen(22)
            if lines == self.SETS:
                host.run("nft", "-f", "-", input=self.RULES)
            else:
                for program in ("iptables", "ip6tables"):
                    host.run(program, "-A", "INPUT", "-p", "tcp", "--dport", "22", "-j", "DROP")
            door = "[Door 1]\n%s\nSeq_Timeout = 9\nCmd_Timeout = 3 # seconds\n%s"
            server = Knockd(host, kind, door % (sequence, lines)).start(client)
            ports = re.findall(r"\d+[:\w]*", sequence.partition("\n")[0].lower())
            for source, other, address in ((CLIENT4, OTHER4, SERVER4), (CLIENT6, OTHER6, SERVER6)):
                self.assertFalse(client.reaches(address, 22))
                began = time.monotonic()
                client.run("knock", address, *ports)
                wait_for(lambda: client.reaches(address, 22, source), "access")  # noqa: B023
                self.assertFalse(client.reaches(address, 22, other))
                server.wait_for("%s: Door 1: command timeout" % source)
                self.assertGreater(time.monotonic(), began + 2.9)
                wait_for(lambda: not client.reaches(address, 22, source), "no access")  # noqa: B023
            self.assertNotIn("non-zero", server.log())
            self.assertEqual(0, server.stop())

        tcp = "sequence = 7000,8000,9000\ntcpflags = syn,!ack"
        in_parallel(
            self,
            [
                (NAMED, self.IPTABLES, tcp),
                (BESIDE, self.SETS, "sequence = 7000:udp, 8000:tcp, 9000:UDP"),
            ],
            check,
        )

    def test_stop_commands(self) -> None:
        """One start and one stop, at its time, whatever becomes of the server meanwhile."""

        def check(way: str) -> None:
            """One thing that happens while the door is open."""
            cable = self.cable()
            client, host = cable.client, cable.server
            server = Knockd(host, NAMED, "")
            server.configure(DOOR + commands(server.directory, 4))
            server.start(client)

            def got() -> List[str]:
                """Return what the commands have written."""
                return read(os.path.join(server.directory, "got")).splitlines()

            client.run("knock", SERVER4, "7000", "8000", "9000")
            wait_for(got, "start")
            began, mark = time.monotonic(), len(server.log())
            assert server.process is not None
            if way == "stop":
                self.assertEqual(0, server.stop())
                self.assertEqual(2, len(got()))
                self.assertLess(time.monotonic(), began + 3.5)
            elif way == "kill":
                server.stop(signal.SIGKILL)
                self.assertEqual(1, len(got()))
                server.start(client)
            elif way == "knock again":
                time.sleep(1.5)  # so that the second end is another one
                client.run("knock", SERVER4, "7000", "8000", "9000")
                began += 1.4
            else:
                bad = "[door\n"
                server.configure(bad if way == "bad reload" else DOOR.replace("7000", "7001"))
                server.process.popen.send_signal(signal.SIGHUP)
                server.wait_for("re-reading config file: " + server.conf, mark)
                if way == "bad reload":
                    server.wait_for("expected a section", mark)
                else:
                    settle(client, [server])
                client.run("knock", SERVER4, "7001", "8000", "9000")
                settle(client, [server])
                self.assertEqual(1 + (way == "reload"), server.opened(CLIENT4))
            wait_for(lambda: len(got()) == 2, "stop")
            if way != "stop":
                self.assertGreater(time.monotonic(), began + 3.8)
            if way == "bad reload":  # the old ones are in force
                client.run("knock", SERVER4, "7000", "8000", "9000")
                wait_for(lambda: len(got()) == 3, "another start")
                self.assertEqual("start " + CLIENT4, got()[2])
            server.stop()
            name = host.name
            wait_for(lambda: len(host.run("ip", "netns", "pids", name).split()) < 3, "switches")
            self.assertEqual(
                ["start " + CLIENT4, "stop " + CLIENT4] * (1 + (way == "bad reload")), got()
            )

        in_parallel(self, ["stop", "kill", "reload", "bad reload", "knock again"], check)


class Row(NamedTuple):
    """Hits, and how often they open: knockd's door, ours, with StrictDuplicates, with Strict."""

    what: str
    steps: str
    opens: Tuple[int, int, int, int]
    door: str = "door"


# The rows of knockd spec 1.3. `other` is 7100,7200; `twice` 7300,7300; `one` 7400.
ROWS = [
    Row("one port, three times", "7400 7400 7400", (3, 3, 3, 3), "one"),
    Row("no delay", "7000 8000 9000", (1, 1, 1, 1)),
    Row("ports of no door in between", "7000 7001 8000 4444 9000", (1, 1, 1, 0)),
    Row("a port in the wrong place", "7000 9000 8000 9000", (0, 0, 0, 0)),
    Row("and then from the start", "7000 9000 7000 8000 9000", (1, 1, 1, 1)),
    Row("the first again", "7000 7000 8000 9000", (0, 1, 1, 1)),
    Row("the first three times", "7000 7000 7000 8000 9000", (1, 1, 1, 1)),
    Row("the second again", "7000 8000 8000 9000", (0, 1, 0, 1)),
    Row("a port of another door", "7000 7100 8000 9000", (0, 1, 1, 1)),
    Row("both doors, one in the other", "7000 7100 8000 7200 9000", (0, 1, 1, 1), "other"),
    Row("UDP to its port", "7000 8000:udp 8000 9000", (1, 1, 1, 1)),
    Row("ports that are open", "7000:open 8000:open 9000:open", (1, 1, 1, 1)),
    Row("the same port twice", "7300 7300", (1, 1, 1, 1), "twice"),
    Row("three hits of it", "7300 7300 7300", (1, 1, 1, 1), "twice"),
]


@needs_root
@needs_programs("ip", "knock", "knockd", "iptables")
class TableTest(KnockCase):
    """What opens a door of the real knockd, and what opens ours; each hears the same packets."""

    OPTIONS = (
        (REAL, "Interface = eth0"),
        (NAMED, "Interface = eth0"),
        (NAMED, "Interface = eth0\nStrictDuplicates"),
        (NAMED, "Interface = eth0\nStrict"),
    )

    def servers(self, cable: Cable, doors: str) -> List[Knockd]:
        """Return the servers of the table, on one host."""
        return [
            Knockd(cable.server, kind, doors, options).start(cable.client)
            for kind, options in self.OPTIONS
        ]

    def test_rows(self) -> None:
        """Each from an address of its own."""
        cable = self.cable()
        client = cable.client
        cable.server.listen(7000, 8000, 9000)
        doors = DOOR + (
            "[other]\nsequence = 7100,7200\ntcpflags = syn\n"
            "[twice]\nsequence = 7300,7300\ntcpflags = syn\n"
            "[one]\nsequence = 7400\ntcpflags = syn\n"
        )
        sources = ["10.55.0.%d" % (number + 20) for number in range(len(ROWS))]
        client.run(
            "ip",
            "-batch",
            "-",
            input="".join("addr add %s/24 dev eth0\n" % source for source in sources),
        )
        servers = self.servers(cable, doors)
        for source, row in zip(sources, ROWS):
            hit(client, source, *row.steps.split())
            settle(client, servers)
            with self.subTest(row.what):
                opened = tuple(server.opened(source, row.door) for server in servers)
                self.assertEqual(row.opens, opened, servers[1].log())
        hit(client, CLIENT4, "7000", "8000")
        hit(client, CLIENT6, "9000", server=SERVER6)
        settle(client, servers)
        self.assertEqual([0] * 4, [server.opened(CLIENT4) for server in servers])
        self.assertEqual([0] * 4, [server.opened(CLIENT6) for server in servers])

    def test_repeated_syns_and_a_scan(self) -> None:
        """Connects that wait at a firewall that drops; a scan of all ports."""

        def check(scan: bool) -> None:
            """One of both, on hosts of its own."""
            cable = self.cable()
            client, host = cable.client, cable.server
            host.run("iptables", "-A", "INPUT", "-p", "tcp", "-j", "DROP")
            servers = self.servers(cable, DOOR)
            stanza = "SOURCE ANY\nKNOCK_SEQUENCE 7000,8000,9000\nOPEN_PORTS tcp/22\n"
            strict = Server(host, NO_FIREWALL, stanza).start()
            loose = Server(host, NO_FIREWALL, stanza + "KNOCK_STRICT N\n").start()
            opens = "a knock sequence opened " + CLIENT4

            def opened() -> List[int]:
                """Return how often each door is opened, and both stanzas."""
                settle(client, servers)
                return [server.opened(CLIENT4) for server in servers] + [
                    server.log().count(opens) for server in (strict, loose)
                ]

            if scan:
                client.run(sys.executable, "-I", "-S", "-c", SCAN, SERVER4)
                loose.wait_for(opens)
                self.assertEqual([1, 1, 1, 0, 0, 1], opened())
            else:
                for port in (7000, 8000):
                    client.ask("connect", "", "", SERVER4, port, 1.4)
                hit(client, CLIENT4, "9000")
                strict.wait_for(opens)
                loose.wait_for(opens)
                self.assertEqual([0, 1, 0, 1, 1, 1], opened())
            before = opened()
            client.run("knock", SERVER4, "7000", "8000", "9000")
            wait_for(lambda: opened() == [count + 1 for count in before], "all doors open")

        in_parallel(self, [True, False], check)


STANZA_KNOCK = "SOURCE ANY\nKNOCK_SEQUENCE 7000, 8000:udp, 9000\nOPEN_PORTS tcp/22\n"
PORTS = ["7000", "8000:udp", "9000"]
KNOCKED = "a knock sequence opened %s"


@needs_root
@needs_programs("ip", "knock", "fwknop", "nft", "iptables-nft", "ip6tables-nft")
class StanzaTest(KnockCase):
    """KNOCK_SEQUENCE in access.conf: grants that the kernel ends."""

    def test_a_sequence_is_a_way_to_a_grant(self) -> None:
        """Closed, open for who knocked, closed again; killed, the kernel closes."""

        def check(setup: Setup) -> None:
            """One firewall in one mode."""
            with Site(setup, access=STANZA_KNOCK + "FW_ACCESS_TIMEOUT 4\n") as site:
                self.assertTrue(site.all_closed())
                for killed in (False, True):
                    mark, began = site.server.mark(), time.monotonic()
                    site.client.run("knock", SERVER4, *PORTS)
                    site.server.wait_for(KNOCKED % CLIENT4, mark)
                    site.client.run("knock", SERVER6, *PORTS)
                    site.server.wait_for(KNOCKED % CLIENT6, mark)
                    wait_for(site.is_open, "access")
                    if killed:
                        site.server.stop(signal.SIGKILL)
                    closed = site.wait_closed(("", SERVER4, 22), ("", SERVER6, 22))
                    self.assertGreater(closed, began + 3.9)
                    self.assertTrue(site.all_closed())

        backends = (NFT, "iptables-nft")
        in_parallel(
            self, [Setup(*pair) for pair in itertools.product(backends, ("accept", "guard"))], check
        )

    def test_a_packet_after_a_sequence(self) -> None:
        """With REQUIRE_KNOCK neither opens alone, and only from the same address."""
        access = STANZA + STANZA_KNOCK.replace("SOURCE ANY\n", "") + (
            "REQUIRE_KNOCK Y\nKNOCK_TIMEOUT 3\n"
        )
        packet = ["-A", "tcp/22", "-a", CLIENT4, "-D", SERVER4]
        with Site(Setup(NFT, "guard"), access=access) as site:
            none = "No knock sequence came before the packet (REQUIRE_KNOCK)."

            def send(expect: str) -> None:
                """Send a packet of the real client's."""
                site.server.knock(site.client, *packet, program=FWKNOP, expect=expect)

            send(none)
            self.assertTrue(site.all_closed())
            hit(site.client, OTHER4, *PORTS)
            site.server.wait_for(SESAME % (OTHER4, "(stanza #1)"))
            send(none)
            began = time.monotonic()
            site.client.run("knock", SERVER4, *PORTS)
            site.server.wait_for(SESAME % (CLIENT4, "(stanza #1)"))
            self.assertTrue(site.all_closed())
            send(" opened %s" % CLIENT4)
            self.assertTrue(site.client.reaches(SERVER4, 22))
            time.sleep(max(0.0, began + 4 - time.monotonic()))
            send(none)

    def test_who_may_knock(self) -> None:
        """SOURCE holds for a sequence as for a packet."""
        access = STANZA_KNOCK.replace("ANY", OTHER4)
        with Site(Setup(NFT, "guard"), access=access) as site:
            site.client.run("knock", SERVER4, *PORTS)
            site.server.wait_for("No access data found for source IP: " + CLIENT4)
            self.assertTrue(site.all_closed())
            hit(site.client, OTHER4, *PORTS)
            site.server.wait_for(KNOCKED % OTHER4)
            self.assertEqual(
                [True, False], site.client.probe((OTHER4, SERVER4, 22), (CLIENT4, SERVER4, 22))
            )

    def test_beside_a_knockd_conf(self) -> None:
        """A packet that two sockets hear is one hit, for a stanza and for a door."""
        cable = self.cable()
        client = cable.client
        doors = "[one]\nsequence = 7000\n[twice]\nsequence = 7000,7000\n"
        server = Knockd(cable.server, BESIDE, doors, "Interface = any")
        server.stanza = STANZA + STANZA_KNOCK.replace("SOURCE ANY\n", "")
        server.start(client)
        client.run("knock", SERVER4, *PORTS)
        server.wait_for(KNOCKED % CLIENT4)
        settle(client, [server])
        self.assertEqual(
            [1, 0, 1],
            [server.opened(CLIENT4, door) for door in ("one", "twice", "(stanza #1)")],
        )


@needs_root
@needs_programs("ip", "knock")
class OneTimeTest(KnockCase):
    """Sequences that open once."""

    def test_each_opens_once(self) -> None:
        """In IPv4 and IPv6, the last one too; heard and sent again they open nothing."""
        cable = self.cable()
        client = cable.client
        server = Knockd(cable.server, NAMED, "")
        path = os.path.join(server.directory, "sequences")
        text = "# mine\n\n 7000,8000\n7001,99999\n 7002:udp,8002\n7003,8003,9003\n"
        write(path, text)
        server.configure(
            "[once]\none_time_sequences = %s\ntcpflags = syn\n%s[other]\nsequence = 7777\n"
            % (path, commands(server.directory, 0).replace("stop_", "#"))
        )
        server.start(client)
        self.assertIn(path + ":4: expected ", server.log())
        sequences = [["7000", "8000"], ["7002:udp", "8002"], ["7003", "8003", "9003"]]
        addresses = [(CLIENT4, SERVER4), (CLIENT6, SERVER6), (CLIENT4, SERVER4)]
        for number, (source, address) in enumerate(addresses):
            for steps in sequences[number + 1 :] + sequences[:number]:  # not yet, and not again
                client.run("knock", address, *steps)
            settle(client, [server])
            self.assertEqual(number, server.log().count("once: OPEN SESAME"), server.log())
            client.run("knock", address, *sequences[number])
            server.wait_for(SESAME % (source, "once"))
            for _, each in addresses[:2]:
                client.run("knock", each, *sequences[number])
            settle(client, [server])
            self.assertEqual(number + 1, server.log().count("once: OPEN SESAME"), server.log())
        server.wait_for(
            "no more sequences left in the one time sequences file for door once --> disabling"
        )
        self.assertEqual(
            "# mine\n\n#7000,8000\n7001,99999\n#7002:udp,8002\n#003,8003,9003\n", read(path)
        )
        client.run("knock", SERVER4, "7777")
        server.wait_for(SESAME % (CLIENT4, "other"))
        got = read(os.path.join(server.directory, "got")).splitlines()
        self.assertEqual(["start " + source for source, _ in addresses], got)
        server.stop()
        code, said = cable.server.run_code(*server.command())
        self.assertEqual((3, True), (code, "expected a sequence that is not used up" in said))

    def test_a_stanza(self) -> None:
        """A file of sequences for a grant; a line that can't be marked opens nothing."""
        cable = self.cable()
        client = cable.client
        path = write(cable.server.path("sequences"), "7000,8000\n7001,8001\n")
        access = "SOURCE ANY\nKNOCK_ONE_TIME_FILE %s\nOPEN_PORTS tcp/22\n" % path
        server = Server(cable.server, NO_FIREWALL, access).start()
        client.run("knock", SERVER4, "7000", "8000")
        server.wait_for(KNOCKED % CLIENT4)
        self.assertEqual("#000,8000\n7001,8001\n", read(path))
        os.remove(path)
        mark = server.mark()
        client.run("knock", SERVER4, "7001", "8001")
        server.wait_for("(stanza #1): nothing is opened: %s: No such file" % path, mark)
        self.assertNotIn(" opened ", server.log(mark))
