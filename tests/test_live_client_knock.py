"""Our client's hits: on the wire as those of the real `knock`, for knockd, and for our server."""

import itertools
import os
import signal
import sys
import unittest
from typing import Any, List, Tuple

from tests.netns import (CLIENT4, CLIENT6, KEYS, SERVER4, SERVER6, SPA_CLIENT, STANZA, Cable,
                         CableCase, Server)
from tests.support import TIMEOUT, TOP, needs_programs, needs_root, read, wait_for, write

OURS = [sys.executable, os.path.join(TOP, "spa_client.py"), "--knock"]
THEIRS = ["knock"]
TCP, UDP, ICMP, ICMP6 = 6, 17, 1, 58
SYN = 2
LATER = 999  # the port that says that what came before has been seen
ADDRESSES = {SERVER4: CLIENT4, SERVER6: CLIENT6}

KNOCKD = """[options]
    LogFile = %s
    Interface = eth0
[door]
    sequence = 7000,8000:udp,%s9000
    seq_timeout = 20
    tcpflags = syn
"""
DOOR = "%s: door: OPEN SESAME"
SEQUENCE = ["7000", "8000:UDP", "9000"]
ACCESS = "SOURCE ANY\nOPEN_PORTS tcp/22\nKNOCK_SEQUENCE 7000,8000:udp,9000\n"
RC = "[home]\nSPA_SERVER %s\nKNOCK_SEQUENCE 7000,8000:udp,9000\n"

Seen = Tuple[int, int, int, bytes]  # protocol, destination port or ICMP type, flags, what it has


def decode(packet: bytes) -> Seen:
    """A TCP segment with the kinds of its options; a UDP datagram or ICMP message with its data."""
    protocol, start = (packet[6], 40) if packet[0] >> 4 == 6 else (packet[9], 20)
    body = packet[start:]
    port = int.from_bytes(body[2:4], "big")
    if protocol != TCP:
        return protocol, body[0] if protocol in (ICMP, ICMP6) else port, 0, body[8:]
    options, kinds = body[20:(body[12] >> 4) * 4], b""
    while options:
        kinds += options[:1]
        options = options[1 if options[0] < 2 else options[1]:]
    return TCP, port, body[13], kinds


class Wire:
    """What the server's kernel gets from the client: tcpdump's idea of it."""

    def __init__(self, cable: Cable) -> None:
        self.client = cable.client
        self.dump = cable.server.start(
            "tcpdump", "-l", "--immediate-mode", "-n", "-x", "-Q", "in", "-i", "eth0",
            "tcp or udp or icmp[icmptype] == icmp-echo or (icmp6 and ip6[40] == 128)")
        self.dump.wait_for("listening on eth0")

    def mark(self) -> None:
        """Let a part end here."""
        self.client.send(SERVER4, LATER, "end")

    def packets(self) -> List[Seen]:
        """What has come so far, but for the last one, which may be half written."""
        return [decode(bytes.fromhex("".join(
            "".join(line.split()[1:]) for line in block.splitlines() if "\t0x" in line)))
            for block in self.dump.output().split(" IP")[1:-1]]

    def parts(self, count: int) -> List[List[Seen]]:
        """What came up to each of so many marks, and what came after them.

        That is known when a SYN has come twice that was sent after them all: the client's kernel
        has by then repeated all that it would ever repeat so early.
        """
        later = (TCP, LATER, SYN)

        def repeated() -> bool:
            """Send one, and a mark to be the packet that may be half written."""
            self.client.reaches(SERVER4, LATER, seconds=1.5)
            self.mark()
            return sum(hit[:3] == later for hit in self.packets()) >= 2

        wait_for(repeated, "a SYN that is sent again")
        parts = [[]]  # type: List[List[Seen]]
        for hit in self.packets():
            if hit[:2] == (UDP, LATER):
                parts.append([])
            elif hit[:3] != later:
                parts[-1].append(hit)
        assert len(parts) > count, parts
        return parts[:count] + [[hit for part in parts[count:] for hit in part]]


@needs_root
@needs_programs("ip", "knock", "nft", "tcpdump")
class WireTest(CableCase):
    """The same packets as `knock` sends, no more."""

    def setUp(self) -> None:
        super().setUp()
        self.cable.server.listen(*range(7771, 7775))
        self.cable.server.run(
            "nft", "-f", "-", input="table inet t { chain c { type filter hook input priority 0; "
            "tcp dport != 7771-7774 drop; udp dport 1-9999 drop; }; }")
        self.wire = Wire(self.cable)

    def hit(self, program: List[str], address: str, *words: str) -> None:
        """Run a command line, which is to put a part on the wire."""
        self.client.run(*program, address, *words)
        self.wire.mark()

    def test_dropped(self) -> None:
        """One SYN with the kernel's options, none repeated; one byte of UDP; both families."""
        cases = list(itertools.product(ADDRESSES, (
            ["7000", "8000:udp", "9000:tcp", "7000"], ["-u", "8001", "8002"])))
        for address, words in cases:
            for program in (THEIRS, OURS):
                self.hit(program, address, *words)
        *parts, rest = self.wire.parts(2 * len(cases))
        self.assertEqual([], rest)
        for (address, words), theirs, ours in zip(cases, parts[::2], parts[1::2]):
            with self.subTest(address=address, words=words):
                self.assertEqual(theirs, ours)
                ports = [int(word.partition(":")[0]) for word in words if word != "-u"]
                self.assertEqual(ports, [port for _, port, _, _ in ours])
                for protocol, _, flags, data in ours:
                    self.assertIn((protocol, flags), ((TCP, SYN), (UDP, 0)))
                    if protocol == UDP:
                        self.assertEqual(b"\0", data)

    def test_open(self) -> None:
        """Where something listens, it is one SYN as well; the rest is up to who is faster."""
        cases = list(enumerate(itertools.product(ADDRESSES, (THEIRS, OURS)), 7771))
        for port, (address, program) in cases:
            self.hit(program, address, str(port))
        hits = [hit for part in self.wire.parts(len(cases)) for hit in part]
        for port, case in cases:
            with self.subTest(case):
                flags = [hit[2] for hit in hits if hit[1] == port]
                self.assertEqual((SYN, 1), (flags[0], flags.count(SYN)))

    def test_icmp(self) -> None:
        """Echo requests, from root and from who may only ping; else an error and no hit at all."""
        weak = ["setpriv", "--bounding-set=-net_raw", "--inh-caps=-net_raw", *OURS]
        words = ["7000", "100:icmp", ":icmp"]
        for address in ADDRESSES:
            self.client.run("sysctl", "-w", "net.ipv4.ping_group_range=1 0")  # nobody
            self.hit(OURS, address, *words)
            code, said = self.client.run_code(*weak, address, *words)
            self.assertEqual(1, code)
            self.assertIn("net.ipv4.ping_group_range", said)
            self.wire.mark()
            self.client.run("sysctl", "-w", "net.ipv4.ping_group_range=0 0")
            self.hit(weak, address, *words)
        *parts, rest = self.wire.parts(6)
        self.assertEqual([], rest)
        for place, kinds in ((0, (ICMP, 8)), (3, (ICMP6, 128))):
            expected = [(TCP, 7000), kinds, kinds]
            with self.subTest(kinds):
                for hits, right in zip(parts[place:], (expected, [], expected)):
                    self.assertEqual(right, [hit[:2] for hit in hits])
                    self.assertEqual([bytes(100), bytes(56)][:len(right)],
                                     [hit[3] for hit in hits[1:]])

    def test_no_route(self) -> None:
        """An error, where `knock` ends with 0."""
        for address in ("10.56.0.1", "fd56::1"):
            self.assertEqual(0, self.client.run_code(*THEIRS, address, "7000")[0])
            code, said = self.client.run_code(*OURS, address, "7000")
            self.assertEqual((1, "spa_client.py: %s: Network is unreachable\n" % address),
                             (code, said))


class KnockCase(CableCase):
    """Two hosts and an rc file; no server yet."""

    def named(self, text: str, *words: str, **options: Any) -> Tuple[int, str]:
        """Exit code and output of our client with this rc file and its stanza [home]."""
        path = write(self.client.path("rc"), text)
        program = [word for word in SPA_CLIENT if word != "--no-rc-file"]
        return self.client.run_code(*program, "--rc-file", path, "-n", "home", *words, **options)

    def write_knockd_conf(self, more: str = "") -> str:
        """The path of a knockd.conf, whose sequence may have more steps before the last."""
        self.log = self.host.path("log")
        return write(self.host.path("knockd.conf"), KNOCKD % (self.log, more))

    def read_log(self) -> str:
        """What the log of knockd.conf says."""
        return read(self.log)

    def wait_door(self, source: str, count: int) -> None:
        """Wait until the door has opened so often for an address."""
        wait_for(lambda: self.read_log().count(DOOR % source) == count, "the door")

    def serve(self, config: str, access: str, *options: str) -> Server:
        """Our server, running."""
        self.server = Server(self.host, config, access, *options).start()
        return self.server


@needs_root
@needs_programs("ip", "knockd")
class KnockdTest(KnockCase):
    """The real knockd opens to our client."""

    def setUp(self) -> None:
        super().setUp()
        self.host.start("knockd", "-c", self.write_knockd_conf())
        wait_for(lambda: "listening on eth0" in self.read_log(), "knockd")

    def test_opens(self) -> None:
        """As `knock`, with and without delay, and from a stanza, over both families."""
        for address, source in ADDRESSES.items():
            self.client.run(*OURS, address, *SEQUENCE)
            self.wait_door(source, 1)
            self.client.run(*OURS, "-d", "10-30", address, *SEQUENCE)
            self.wait_door(source, 2)
            self.assertEqual((0, ""), self.named(RC % address))
            self.wait_door(source, 3)

    def test_both_families(self) -> None:
        """A name with two addresses: each gets the whole sequence."""
        with self.client.names("%s gate\n%s gate\n" % (SERVER6, SERVER4)):
            self.assertEqual((0, ""), self.client.run_code(*OURS, "gate", *SEQUENCE))
        self.wait_door(CLIENT4, 1)
        self.wait_door(CLIENT6, 1)

    def test_wrong_order(self) -> None:
        """What is no sequence opens nothing."""
        self.client.run(*OURS, SERVER4, "9000", "8000:udp", "7000")
        self.client.run(*OURS, SERVER6, *SEQUENCE)
        self.wait_door(CLIENT6, 1)
        self.assertNotIn(DOOR % CLIENT4, self.read_log())


@needs_root
@needs_programs("ip", "nft")
class ServerTest(KnockCase):
    """Our server opens to our client."""

    def test_stanza(self) -> None:
        """A port that was closed is open after the sequence, for both families."""
        self.host.listen(22)
        self.serve("FIREWALL_TYPE nft;\nGUARD_PORTS tcp/22;\n", ACCESS)
        for address in ADDRESSES:
            self.assertFalse(self.client.reaches(address, 22))
            code, said = self.named(RC % address + "ACCESS tcp/22\n", "--wait", "300")
            self.assertRegex(said, r"\Atcp/22 of %s opened after \S+ seconds\n\Z" % address)
            self.assertEqual(0, code)
            self.assertTrue(self.client.reaches(address, 22))

    def test_knocked_again(self) -> None:
        """--wait knocks until the server takes it, which is strict: SYNs in between would reset."""
        self.host.listen(22)
        server = self.serve("FIREWALL_TYPE nft;\nGUARD_PORTS tcp/22;\n",
                            ACCESS.replace("7000,", "7001,"))
        mark = server.mark()
        waiting = self.client.start(*OURS, "-d", "300", SERVER4, *SEQUENCE, "--wait", "300",
                                    "--wait-port", "22")
        wire = self.host.start("tcpdump", "-l", "-n", "-i", "eth0", "tcp dst port 22")
        wire.wait_for("Flags [S]")  # the first knock is over
        server.configure(access=ACCESS)
        server.send_signal(signal.SIGHUP)
        server.wait_for("%s: (stanza #1): OPEN SESAME" % CLIENT4, mark)
        waiting.wait_for("tcp/22 of %s opened after" % SERVER4)
        self.assertEqual(0, waiting.popen.wait(TIMEOUT))

    def test_then_a_packet(self) -> None:
        """REQUIRE_KNOCK: neither alone opens; both together do, over both families."""
        self.serve("", STANZA + ACCESS.partition("\n")[2] + "REQUIRE_KNOCK Y\n", "-t")
        keys = "ACCESS tcp/22\nALLOW_IP source\nKEY testkey\nHMAC_KEY hmackey\n"
        for address, source in ADDRESSES.items():
            with self.subTest(address):
                mark = self.server.mark()
                self.client.run(*SPA_CLIENT, *KEYS, "-A", "tcp/22", "-s", "-D", address)
                self.server.wait_for("No knock sequence came before the packet", mark)
                self.assertEqual((0, ""), self.named(RC % address))
                self.server.wait_for("%s: (stanza #1): OPEN SESAME" % source, mark)
                self.assertNotIn(" opened ", self.server.log(mark))
                self.assertEqual((0, ""), self.named(RC % address + keys))
                self.server.wait_opened(source, 22, mark)

    def test_knockd_conf(self) -> None:
        """The same knockd.conf as knockd's, with an ICMP step that only ours knows."""
        self.serve("", STANZA, "-t", "--knockd-conf", self.write_knockd_conf("100:icmp,"))
        for address, source in ADDRESSES.items():
            self.client.run(*OURS, address, "7000", "8000:udp", "101:icmp", "9000")
            self.client.run(*OURS, address, "7000", "8000:udp", "100:icmp", "9000")
            self.wait_door(source, 1)

    def test_proxy_and_exec(self) -> None:
        """The connection is relayed, and the command runs, once the sequence has opened."""
        self.host.listen(22)
        self.serve("FIREWALL_TYPE nft;\nGUARD_PORTS tcp/22;\n", ACCESS)
        self.assertEqual((0, "hello"), self.named(RC % SERVER4, "--proxy", SERVER4, "22", "-q",
                                                  input="hello"))
        code, said = self.named(RC % SERVER6 + "ACCESS tcp/22\n", "-q", "--exec", "echo", "there")
        self.assertEqual((0, "there\n"), (code, said))


if __name__ == "__main__":
    unittest.main()
