"""Knock sequences in the real server: the real knock at it, and the real knockd beside it.

Packet sockets do not take packets away from each other, so that several servers on one host hear
the same knocks: what one line of a table says of knockd and of ours is one packet's doing.
"""

import itertools
import os
import re
import signal
import socket
import sys
import threading
import time
import unittest
from typing import List, NamedTuple, Optional, Tuple

from tests.firewalls import NFT, Setup
from tests.knockd import (ALONE, BESIDE, FLOOD, NAMED, NO_FIREWALL, REAL, SESAME, Knockd, hit,
                          is_news, settle)
from tests.netns import (CLIENT4, CLIENT6, FWKNOP, OTHER4, OTHER6, SERVER4, SERVER6, STANZA, Cable,
                         Host, Process, Server, in_parallel)
from tests.support import long_enough, needs_programs, needs_root, read, wait_for, write
from tests.test_live_firewall import Site

DOOR = "[door]\nsequence = 7000,8000,9000\nseq_timeout = 300\ntcpflags = syn\n"

# What Debian's package has as /etc/knockd.conf.
PACKAGE = """\
[options]
	UseSyslog

[openSSH]
	sequence    = 7000,8000,9000
	seq_timeout = 5
	command     = /sbin/iptables -A INPUT -s %IP% -p tcp --dport 22 -j ACCEPT
	tcpflags    = syn

[closeSSH]
	sequence    = 9000,8000,7000
	seq_timeout = 5
	command     = /sbin/iptables -D INPUT -s %IP% -p tcp --dport 22 -j ACCEPT
	tcpflags    = syn

[openHTTPS]
	sequence    = 12345,54321,24680,13579
	seq_timeout = 5
	command     = /usr/local/sbin/knock_add -i -c INPUT -p tcp -d 443 -f %IP%
	tcpflags    = syn

"""

# Sends one SYN to each port from 1 up, as a scanner does; what comes back is dropped.
SCAN = """
import socket, sys
for port in range(1, 65536):
    hit = socket.socket()
    hit.setblocking(False)
    hit.connect_ex((sys.argv[1], port))
    hit.close()
"""


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
        seconds = long_enough(2)

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
            door = "[Door 1]\n%s\nSeq_Timeout = 300\nCmd_Timeout = %d # seconds\n%s"
            server = Knockd(host, kind, door % (sequence, seconds, lines)).start(client)
            ports = re.findall(r"\d+[:\w]*", sequence.partition("\n")[0].lower())
            families = (("", SERVER4, 22), ("", SERVER6, 22))
            self.assertFalse(any(client.probe(*families)))
            began = time.monotonic()
            for _, address, _ in families:
                client.run("knock", address, *ports)
            wait_for(lambda: all(client.probe(*families)), "access")
            others = client.probe((OTHER4, SERVER4, 22), (OTHER6, SERVER6, 22))
            self.assertFalse(any(others))
            for source in (CLIENT4, CLIENT6):
                server.wait_for("%s: Door 1: command timeout" % source)
                self.assertGreater(time.monotonic(), began + seconds - 0.1)
            wait_for(lambda: not any(client.probe(*families)), "no access")
            self.assertNotIn("non-zero", server.log())
            self.assertEqual(0, server.stop())

        tcp = "sequence = 7000,8000,9000\ntcpflags = syn,!ack"
        in_parallel(self,
                    [(NAMED, self.IPTABLES, tcp),
                     (ALONE, self.SETS, "sequence = 7000:udp, 8000:tcp, 9000:UDP")],
                    check)

    def test_the_file_of_the_package(self) -> None:
        """The doors that knockd comes with open a port and close it again."""
        cable = self.cable()
        client, host = cable.client, cable.server
        server = Knockd(host, NAMED, "")
        write(server.conf, PACKAGE)
        more = ["-g", server.log_file, "-p", server.pid_file, "-i", "eth0", "-v"]
        process = host.start(*server.command(), *more)
        process.wait_for("starting up, listening on eth0")  # UseSyslog alone: not to stderr

        def rules() -> int:
            """Return how many rules let the client in."""
            return host.run("iptables", "-S", "INPUT").count("-s %s/32 " % CLIENT4)

        for ports, count in (("7000 8000 9000", 1), ("9000 8000 7000", 0), ("7000 8000 9000", 1)):
            client.run("knock", SERVER4, *ports.split())
            wait_for(lambda: rules() == count, "a rule")  # noqa: B023
        self.assertEqual(0, process.end())
        self.assertEqual(1, rules())

    def test_a_stop_at_once(self) -> None:
        """With Cmd_Timeout 0 the stop follows the start's end."""
        cable = self.cable()
        server = Knockd(cable.server, NAMED, "")
        path = os.path.join(server.directory, "got")
        server.configure("[door]\nsequence = 7000,8000\ncommand = sleep 0.2; date +%%s.%%N >> %s\n"
                         "cmd_timeout = 0\nstop_command = date +%%s.%%N >> %s\n" % (path, path))
        server.start(cable.client)

        def at_once() -> bool:
            """Knock, and say whether not half a second was between both."""
            count = read(path).count("\n") + 2
            cable.client.run("knock", SERVER4, "7000", "8000")
            wait_for(lambda: read(path).count("\n") == count, "both")
            start, stop = read(path).split()[-2:]
            return float(stop) - float(start) < 0.5

        wait_for(at_once, "a stop at once")

    def test_what_a_command_leaves(self) -> None:
        """A program that it has started in the background goes on, though it prints."""
        cable = self.cable()
        server = Knockd(cable.server, NAMED, "")
        path = os.path.join(server.directory, "got")
        command = "(sleep 0.3; seq 99999; echo $? > %s.new; mv %s.new %s) &" % (path, path, path)
        server.configure("[door]\nsequence = 7000,8000\ncommand = %s\n" % command)
        server.start(cable.client)
        cable.client.run("knock", SERVER4, "7000", "8000")
        wait_for(lambda: read(path), "its end")
        self.assertEqual("0\n", read(path))
        self.assertLess(len(server.lines()), 10)

    def test_stop_commands(self) -> None:
        """One start and one stop, at its time, whatever becomes of the server meanwhile."""
        seconds = long_enough(3)

        def check(way: str) -> None:
            """One thing that happens while the door is open."""
            cable = self.cable()
            client, host = cable.client, cable.server
            server = Knockd(host, NAMED, "")
            server.configure(DOOR + commands(server.directory, 600 if way == "stop" else seconds))
            server.start(client)

            def got() -> List[str]:
                """Return what the commands have written."""
                return read(os.path.join(server.directory, "got")).splitlines()

            def programs() -> int:
                """Return how many programs the host has."""
                return len(host.run("ip", "netns", "pids", host.name).split())

            idle = programs()
            client.run("knock", SERVER4, "7000", "8000", "9000")
            wait_for(got, "start")
            began, mark = time.monotonic(), len(server.log())
            assert server.process is not None
            if way == "stop":
                self.assertEqual(0, server.stop())
                self.assertEqual(2, len(got()))
            elif way == "kill":
                server.stop(signal.SIGKILL)
                self.assertEqual(1, len(got()))
                server.start(client)
            elif way == "knock again":
                time.sleep(0.7)  # time is the thing: the second end is to be another one
                began = time.monotonic()
                client.run("knock", SERVER4, "7000", "8000", "9000")
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
                self.assertGreater(time.monotonic(), began + seconds - 0.2)
            if way == "bad reload":  # the old ones are in force
                # A stop that has written, and has not ended, would run again before the start.
                wait_for(lambda: programs() <= idle, "the stop's end")
                client.run("knock", SERVER4, "7000", "8000", "9000")
                wait_for(lambda: len(got()) == 3, "another start")
                self.assertEqual("start " + CLIENT4, got()[2])
            server.stop()
            wait_for(lambda: programs() < idle, "switches")
            self.assertEqual(["start " + CLIENT4, "stop " + CLIENT4] * (1 + (way == "bad reload")),
                             got())

        in_parallel(self, ["stop", "kill", "reload", "bad reload", "knock again"], check)

    def test_a_reload_between_steps(self) -> None:
        """However close it comes behind a step, the steps before it count, and each once."""
        cable = self.cable()
        doors = DOOR + "[other]\nsequence = 7100,7200,7300\n"
        server = Knockd(cable.server, NAMED, doors).start(cable.client)
        assert server.process is not None
        for count in range(1, 21):
            mark = len(server.log())
            hit(cable.client, CLIENT4, "7000", "8000")
            server.configure(doors.replace("7200", str(7200 + count)))
            server.process.popen.send_signal(signal.SIGHUP)
            server.wait_for("re-reading config file: ", mark)
            hit(cable.client, CLIENT4, "9000")
            server.wait_for(SESAME % (CLIENT4, "door"), mark)
            self.assertEqual(count, server.opened(CLIENT4))


class Row(NamedTuple):
    """Hits, and how often they open: knockd's door, ours, with StrictDuplicates, with Strict."""

    what: str
    steps: str
    opens: Tuple[int, int, int, int]
    door: str = "door"


# The rows of tests/spec/knockd.md 1.3. `other` is 7100,7200; `twice` 7300,7300; `one` 7400.
ROWS = [
    Row("one port, three times", "7400 7400 7400", (3, 3, 3, 3), "one"),
    Row("no delay", "7000 8000 9000", (1, 1, 1, 1)),
    Row("ports of no door in between", "7000 7001 8000 4444 9000", (1, 1, 1, 0)),
    Row("a port in the wrong place", "7000 9000 8000 9000", (0, 0, 0, 0)),
    Row("and then from the start", "7000 9000 7000 8000 9000", (1, 1, 1, 1)),
    Row("the first again", "7000 7000 8000 9000", (0, 1, 1, 1)),
    Row("the first three times", "7000 7000 7000 8000 9000", (1, 1, 1, 1)),
    Row("the second again", "7000 8000 8000 9000", (0, 1, 0, 1)),
    Row("a port of another door", "7000 7100 8000 9000", (0, 1, 1, 0)),
    Row("both doors, one in the other", "7000 7100 8000 7200 9000", (0, 1, 1, 0), "other"),
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
            "[one]\nsequence = 7400\ntcpflags = syn\n")
        sources = ["10.55.0.%d" % (number + 20) for number in range(len(ROWS))]
        client.run("ip", "-batch", "-",
                   input="".join("addr add %s/24 dev eth0\n" % source for source in sources))
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

    def test_doors_and_clients_do_not_disturb_each_other(self) -> None:
        """Who comes to the end, or to a door whose sequence begins alike, spoils nobody's knock."""
        cable = self.cable()
        client = cable.client
        doors = (
            "[short]\nsequence = 7000,8000\ntcpflags = syn\n"
            "[long]\nsequence = 7000,8000,9000\ntcpflags = syn\n"
        )
        servers = self.servers(cable, doors)
        sources = ["10.55.0.20", "10.55.0.21"]
        for source in sources:
            client.run("ip", "addr", "add", source + "/24", "dev", "eth0")
        hit(client, sources[0], "7000")
        hit(client, sources[1], "7000", "8000")
        hit(client, sources[0], "8000", "9000")
        settle(client, servers)
        for door, knockds in (("short", 1), ("long", 0)):
            opened = [server.opened(sources[0], door) for server in servers]
            self.assertEqual([knockds, 1, 1, 1], opened, door)

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
                    server.log().count(opens) for server in (strict, loose)]

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
        seconds = long_enough(3)

        def check(case: Tuple[str, str, bool]) -> None:
            """One firewall in one mode."""
            backend, mode, killed = case
            access = STANZA_KNOCK + "FW_ACCESS_TIMEOUT %d\n" % seconds
            with Site(Setup(backend, mode), access=access) as site:
                self.assertTrue(site.all_closed())
                began = time.monotonic()
                for source, address in ((CLIENT4, SERVER4), (CLIENT6, SERVER6)):
                    site.client.run("knock", address, *PORTS)
                    site.server.wait_for(KNOCKED % source)
                wait_for(site.is_open, "access")
                if killed:
                    site.server.stop(signal.SIGKILL)
                site.wait_closed(("", SERVER4, 22), ("", SERVER6, 22), earliest=began + seconds)
                self.assertTrue(site.all_closed())

        backends = (NFT, "iptables-nft")
        in_parallel(self, itertools.product(backends, ("accept", "guard"), (False, True)), check)

    def test_a_packet_after_a_sequence(self) -> None:
        """With REQUIRE_KNOCK neither opens alone, and only from the same address."""
        access = STANZA + STANZA_KNOCK.replace("SOURCE ANY\n", "") + (
            "REQUIRE_KNOCK Y\nKNOCK_TIMEOUT 300\n")
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
            site.client.run("knock", SERVER4, *PORTS)
            site.server.wait_for(SESAME % (CLIENT4, "(stanza #1)"))
            self.assertTrue(site.all_closed())
            send(" opened %s" % CLIENT4)
            self.assertTrue(site.client.reaches(SERVER4, 22))

    def test_who_may_knock(self) -> None:
        """SOURCE holds for a sequence as for a packet."""
        access = STANZA_KNOCK.replace("ANY", OTHER4)
        with Site(Setup(NFT, "guard"), access=access) as site:
            site.client.run("knock", SERVER4, *PORTS)
            site.server.wait_for("No access data found for source IP: " + CLIENT4)
            self.assertTrue(site.all_closed())
            hit(site.client, OTHER4, *PORTS)
            site.server.wait_for(KNOCKED % OTHER4)
            self.assertEqual([True, False],
                             site.client.probe((OTHER4, SERVER4, 22), (CLIENT4, SERVER4, 22)))

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
        self.assertEqual([1, 0, 1],
                         [server.opened(CLIENT4, door) for door in ("one", "twice", "(stanza #1)")])


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
            % (path, commands(server.directory, 0).replace("stop_", "#")))
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
            "no more sequences left in the one time sequences file for door once --> disabling")
        self.assertEqual("# mine\n\n#7000,8000\n7001,99999\n#7002:udp,8002\n#003,8003,9003\n",
                         read(path))
        client.run("knock", SERVER4, "7777")
        server.wait_for(SESAME % (CLIENT4, "other"))
        expected = ["start " + source for source, _ in addresses]
        got = os.path.join(server.directory, "got")
        wait_for(lambda: read(got).splitlines() == expected, "each command once")
        server.stop()
        server.start(client)
        self.assertIn("no sequence is left; this opens nothing", server.log())
        server.stop()

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


@needs_root
@needs_programs("ip", "knock", "ping")
class ReachTest(KnockCase):
    """Where hits come in, and for whom they are."""

    DOORS = (
        "[door]\nsequence = 7000,8000\ntcpflags = syn\n"
        "[icmp]\nsequence = 100:icmp, :icmp, 7002:udp\n"
        "[target]\nsequence = 7100,7200\ntarget = 10.55.0.9\n"
    )

    def setUp(self) -> None:
        """Connect the hosts, and start a server that hears all and one that hears two cables."""
        self.both = self.cable()
        self.client, self.host = self.both.client, self.both.server
        self.plug(1)
        self.named = Knockd(self.host, NAMED, self.DOORS, "Interface = eth0, late")
        self.every = Knockd(self.host, NAMED, self.DOORS, "Interface = any")
        for server in (self.every, self.named):
            server.start(self.client)

    def plug(self, number: int, name: str = "") -> None:
        """Connect the hosts by one more cable, whose addresses are 10.56.`number`.1 and .2."""
        name = name or "eth%d" % number
        there = "type veth peer name %s netns %s" % (name, self.host.name)
        self.client.run("ip", "link", "add", name, *there.split())
        for host, last in ((self.host, 1), (self.client, 2)):
            host.run("ip", "addr", "add", "10.56.%d.%d/24" % (number, last), "dev", name)
            host.run("ip", "link", "set", name, "up")

    def opened(self, source: str, door: str = "door") -> List[int]:
        """Return how often a source has opened a door, of all interfaces and of those named."""
        settle(self.client, [self.every, self.named])
        return [server.opened(source, door) for server in (self.every, self.named)]

    def knock(self, address: str, *ports: str) -> None:
        """Let the real knock hit a sequence."""
        self.client.run("knock", address, *(ports or ("7000", "8000")))

    def test_icmp(self) -> None:
        """Echo requests of a size, of any, and a datagram; IPv4 and IPv6."""
        for address, source in ((SERVER4, CLIENT4), (SERVER6, CLIENT6)):
            for first in ("99", "100"):
                for size in (first, "7"):
                    self.client.run("ping", "-c", "1", "-s", size, address)
                self.knock(address, "7002:udp")
                self.assertEqual([int(first == "100")] * 2, self.opened(source, "icmp"))

    def test_interfaces(self) -> None:
        """Those that are named, also one that comes later and one that comes back; or all."""
        self.knock("10.56.1.1")
        self.assertEqual([1, 0], self.opened("10.56.1.2"))
        for count in (1, 2):
            self.plug(2, "late")

            def opens(before: int = self.opened("10.56.2.2")[1]) -> bool:
                """Knock there, and say whether that opens."""
                self.knock("10.56.2.1")
                return self.opened("10.56.2.2")[1] > before

            wait_for(opens, "an interface that was added")
            self.client.run("ip", "link", "del", "late")
            self.host.run("ip", "link", "set", "eth0", "down")
            self.host.run("ip", "link", "set", "eth0", "up")
            wait_for(lambda: not self.client.run_code("ping", "-c1", "-W1", SERVER4)[0], "a link")
            self.knock(SERVER4)
            self.assertEqual([count, count], self.opened(CLIENT4))

    def test_addresses(self) -> None:
        """Only this host's count, as soon as they are; of a door with a target only that."""
        self.host.run("ip", "link", "set", "eth0", "promisc", "on")
        link = self.host.run("cat", "/sys/class/net/eth0/address").strip()
        self.client.run("ip", "neigh", "add", "10.55.0.9", "lladdr", link, "dev", "eth0")
        self.knock("10.55.0.9")
        self.assertEqual([0, 0], self.opened(CLIENT4))
        self.knock(SERVER4, "7100", "7200")
        self.assertEqual([0, 0], self.opened(CLIENT4, "target"))
        self.host.run("ip", "addr", "add", "10.55.0.9/24", "dev", "eth0")

        def opens() -> bool:
            """Knock, and say whether both have opened."""
            self.knock("10.55.0.9")
            return 0 not in self.opened(CLIENT4)

        wait_for(opens, "an address that was added")
        self.knock("10.55.0.9", "7100", "7200")
        self.assertEqual([1, 1], self.opened(CLIENT4, "target"))
        self.host.run("ip", "link", "set", "eth0", "promisc", "off")

    def test_forwarded(self) -> None:
        """What goes through this host to another one is no hit here."""
        inner = Host(self.host.name + "i", self.both.temporary.name)
        self.addCleanup(inner.remove)
        there = "type veth peer name eth0 netns %s" % inner.name
        self.host.run("ip", "link", "add", "in0", *there.split())
        self.host.run("sysctl", "-qw", "net.ipv4.ip_forward=1")
        for host, name, last in ((self.host, "in0", 1), (inner, "eth0", 2)):
            host.run("ip", "addr", "add", "10.66.0.%d/24" % last, "dev", name)
            host.run("ip", "link", "set", name, "up")
        inner.run("ip", "route", "add", "default", "via", "10.66.0.1")
        self.client.run("ip", "route", "add", "10.66.0.0/24", "via", SERVER4)
        inner.listen(7000, 8000)
        hit(self.client, CLIENT4, "7000:open", "8000:open", server="10.66.0.2")
        self.assertEqual([0, 0], self.opened(CLIENT4))
        self.knock("10.66.0.1")  # of this host, on the other side
        self.assertEqual([1, 1], self.opened(CLIENT4))


def resident(process: Optional[Process]) -> int:
    """Return the kilobytes of memory that a process has resident."""
    assert process is not None
    status = read("/proc/%d/status" % process.popen.pid)
    return int(status.partition("VmRSS:")[2].split()[0])


@needs_root
@needs_programs("ip", "knock", "iptables")
class FloodTest(KnockCase):
    """First hits from everywhere."""

    def test_a_flood_of_first_hits(self) -> None:
        """An honest client comes through, memory and log stay small."""
        cable = self.cable()
        client = cable.client
        cable.server.run("iptables", "-A", "INPUT", "-p", "tcp", "-j", "DROP")
        server = Knockd(cable.server, NAMED, DOOR).start(client)
        before = resident(server.process)
        flood = client.start(sys.executable, "-I", "-S", "-c", FLOOD, SERVER4, "7000", "900",
                             "15000")

        def arrived() -> int:
            """Return how many have come: what the rule has counted."""
            return int(cable.server.run("iptables", "-nvxL", "INPUT").splitlines()[2].split()[0])

        def opens() -> bool:
            """Knock in the middle of it, and say whether that or a knock before has opened."""
            client.run("knock", "-d", "500", SERVER4, "7000", "8000", "9000")
            return server.opened(CLIENT4) > 0

        wait_for(lambda: resident(server.process) > before + 500, "a server that hears it")
        wait_for(opens, "access")
        wait_for(lambda: arrived() > 40000, "more sources than it remembers")
        self.assertIsNone(flood.popen.poll())
        flood.end()
        settle(client, [server])
        self.assertLess(resident(server.process), before + 40000)
        self.assertLess(len(server.lines()), 100)


@needs_root
@needs_programs("ip", "knock", "knockd")
class LogTest(KnockCase):
    """What stands in the log."""

    DOORS = (
        "[door]\nsequence = 7000,8000,9000\nseq_timeout = 2\ntcpflags = syn\n"
        "start_command = : start %IP%\ncmd_timeout = 1\nstop_command = : stop %IP%\n"
        "[a fault]\nsequence = 7100:udp,7200\nstart_command = exit 3\n"
        "start_command_6 = exit 4\n"
        "[nothing]\nsequence = 7300\ntcpflags = syn\nstop_command = echo never\n"
    )

    def syslog(self, path: str) -> List[str]:
        """Return what comes to a socket like syslog's, as it comes."""
        got = []  # type: List[str]
        log, end = (socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in range(2))
        log.bind(path)
        end.connect(path)

        def listen() -> None:
            """Take what comes."""
            with log, end:
                for text in iter(lambda: log.recv(1000), b""):
                    got.append(text.decode())

        thread = threading.Thread(target=listen)
        thread.start()
        self.addCleanup(thread.join)
        self.addCleanup(end.send, b"")
        return got

    def test_lines(self) -> None:
        """Of one life, ours has the same lines as the real knockd, in the file and in syslog."""
        cable = self.cable()
        client = cable.client
        servers, logs = [], []  # type: List[Knockd], List[List[str]]
        doors = self.DOORS.replace("seq_timeout = 2", "seq_timeout = %d" % long_enough(2))
        for kind in (REAL, NAMED):
            server = Knockd(cable.server, kind, doors, "UseSyslog\nInterface = eth0")
            path = os.path.join(server.directory, "syslog")
            logs.append(self.syslog(path))
            code = (
                "mkdir $0.dev && mount --rbind /dev $0.dev && mount -t tmpfs dev /dev &&"
                " ln -s $0 /dev/log && ln -s $0.dev/null $0.dev/urandom /dev && exec \"$@\""
            )
            servers.append(server.start(client, "unshare", "-m", "sh", "-c", code, path))

        def live(text: str) -> None:
            """Wait until both have logged this."""
            for server in servers:
                server.wait_for(text)

        client.run("knock", SERVER4, "7000", "8000", "9000")
        live(CLIENT4 + ": door: command timeout")
        live("door: running command: : stop " + CLIENT4)
        client.run("knock", SERVER6, "7000", "8000", "9000")
        live(CLIENT6 + ": door: command timeout")
        live("door: running command: : stop " + CLIENT6)
        for address, status in ((SERVER4, 3), (SERVER6, 4)):
            client.run("knock", address, "7100:udp", "7200")
            live("a fault: command returned non-zero status code (%d)" % status)
        client.run("knock", SERVER4, "7300")
        live(SESAME % (CLIENT4, "nothing"))
        client.run("knock", SERVER4, "7000", "8000")
        servers[1].wait_for(": door: sequence timeout (stage 2)")
        client.run("knock", SERVER4, "7300")  # only then knockd looks at the clock
        live(": door: sequence timeout (stage 2)")
        settle(client, servers)
        for server in servers:
            assert server.process is not None
            server.process.popen.send_signal(signal.SIGHUP)
            server.wait_for("re-reading config file: ")
        settle(client, servers)
        for server in servers:
            server.stop()
        real, ours = (
            [line.replace(server.conf, "CONF") for line in server.lines()] for server in servers
        )
        self.assertEqual(real, ours)
        for server, lines in zip(servers, logs):
            form = re.compile(r"<(\d+)>\w{3} [ \d]\d \d\d:\d\d:\d\d knockd: (.*)")
            found = [each for each in map(form.match, lines) if each and is_news(each.group(2))]
            text = [each.group(2).replace(server.conf, "CONF") for each in found]
            self.assertEqual(real, [line for line in text if "re-opening" not in line])
            usual = {each.group(1) for each in found if " non-zero " not in each.group(2)}
            self.assertEqual({"29"}, usual)

    def test_it_says_more_with_debug(self) -> None:
        """Why it ended, and what came of the knocks."""
        cable = self.cable()
        server = Knockd(cable.server, NAMED, DOOR).start(cable.client)
        server.stop(signal.SIGINT)
        self.assertNotIn("SIGINT", server.log())
        process = cable.server.start(*server.command(), "-D")
        process.wait_for("starting up, listening on eth0")
        self.assertEqual(0, process.end())
        self.assertIn("Got SIGTERM. Exiting...\nPackets seen: 0 accepted; ", process.output())


@needs_root
@needs_programs("ip", "setpriv")
class BadTest(KnockCase):
    """What keeps a server from starting."""

    def test_bad_files(self) -> None:
        """File, line and what was expected; nothing is run, and nothing listens."""
        host = self.cable().server
        server = Knockd(host, NAMED, "")
        path = os.path.join(server.directory, "got")
        for text, line, expected in (
                ("[door", 1, "expected a section: its name between [ and ]"),
                ("sequence = 7000", 1, "expected a section first: "),
                ("[door]\nsequence = 7000,", 2, "sequence: expected ports such as "),
                ("[door]\nsequence = 7000\ntcpflags = syn, ack", 3, "tcpflags: expected fin, "),
                ("[door]\nsequence = 7000\nopen = x", 3, "open: "),
                ("[door]\ncommand = touch %s" % path, 1, "expected Sequence or One_Time_Sequences"),
                (f"[door]\none_time_sequences = {path}", 0, path + ": No such file"),
                ("[options]\nUseSyslog = 1", 2, "expected UseSyslog alone")):
            with self.subTest(text):
                write(server.conf, text + "\n")
                code, said = host.run_code(*server.command())
                self.assertEqual(3, code, said)
                self.assertIn("%s:%d: " % (server.conf, line) if line else "", said)
                self.assertIn(expected, said)
                self.assertEqual(1, len(said.splitlines()), said)
                self.assertEqual("", server.log())
        self.assertFalse(os.path.exists(path))
        os.remove(server.conf)
        code, said = host.run_code(*server.command())
        self.assertEqual((3, True), (code, server.conf + ": No such file" in said), said)

    def test_without_cap_net_raw(self) -> None:
        """There is no other way to hear knocks, and it says so."""
        host = self.cable().server
        less = ["setpriv", "--bounding-set", "-net_raw", "--inh-caps", "-net_raw"]
        for kind in (NAMED, BESIDE):
            server = Knockd(host, kind, DOOR)
            code, said = host.run_code(*less, *server.command())
            self.assertEqual(1, code, said)
            self.assertIn("knock sequences need packet sockets, and so CAP_NET_RAW\n", said)
            self.assertNotIn("starting up", said)
            self.assertNotIn("Traceback", said)

    def test_a_second_server(self) -> None:
        """It does not start beside the first, whose pid file it would take."""
        cable = self.cable()
        server = Knockd(cable.server, NAMED, DOOR).start(cable.client)
        code, said = cable.server.run_code(*server.command())
        assert server.process is not None
        pid = server.process.popen.pid
        self.assertEqual(1, code)
        self.assertIn("An instance of knockd is already running: (PID=%d)." % pid, said)
        self.assertEqual("%d\n" % pid, read(server.pid_file))

    def test_an_interface_without_a_file(self) -> None:
        """-i goes before Interface, LogFile before -g; -d serves in the background."""
        cable = self.cable()
        host, client = cable.server, cable.client
        server = Knockd(host, NAMED, DOOR, "Interface = nonexistent")
        other = os.path.join(server.directory, "other")
        host.run(*server.command(), "-d", "-i", "eth0", "-g", other)
        self.addCleanup(lambda: os.kill(int(read(server.pid_file)), signal.SIGKILL))
        self.assertEqual(["starting up, listening on eth0"], server.lines())
        client.run("knock", SERVER4, "7000", "8000", "9000")
        server.wait_for(SESAME % (CLIENT4, "door"))
        self.assertEqual("", read(other))


if __name__ == "__main__":
    unittest.main()
