"""Real packets between real programs: fwknop's client, fwknopd, ours; capture; and a server's life.

Firewalls are in test_live_firewall.py: here nearly every server runs with --test, so that what it
would open stands in its log and nothing has to end.
"""

import base64
import concurrent.futures
import contextlib
import functools
import os
import re
import shutil
import signal
import stat
import string
import subprocess
import sys
import time
import unittest
from typing import Any, List, NamedTuple, Tuple  # noqa: F401  (in type comments)

from tests.bench import HONEST, start_ours, survive
from tests.netns import (CLIENT4, CLIENT6, FWKNOP, KEY, KEYS, SERVER4, SERVER6, SPA_CLIENT,
                         SPA_SERVER, STANZA, Cable, CableCase, Host, Server, end_process,
                         start_fwknopd)
from tests.support import (TIMEOUT, SharedCase, needs_programs, needs_root, read, run, wait_for,
                           write)

LETTERS = string.digits + string.ascii_letters
BASE64 = string.ascii_uppercase + string.ascii_lowercase + string.digits + "+/"
DIGESTS = ("md5", "sha1", "sha256", "sha384", "sha512", "sha3_256", "sha3_512")
MODES = ("CBC", "ECB", "CFB", "OFB", "CTR")
MODES_WITHOUT_HMAC = MODES + ("legacy", "legacy")
KEY_KINDS = [(length, in_base64) for length in (1, 16, 31, 32) for in_base64 in (False, True)]
HMAC_KEY_KINDS = [(length, in_base64) for in_base64 in (False, True)
                  for length in (1, 64, 65, 127, 128)]
NO_HMAC_STANZA = "SOURCE ANY\nKEY %s\n" % KEY
KNOCK4 = ["-A", "tcp/22", "-a", CLIENT4, "-D", SERVER4]
KNOCK6 = ["-A", "tcp/22", "-a", CLIENT6, "-D", SERVER6]


class Case(NamedTuple):
    """One stanza of the matrix: what a packet is made with, and what it asks for."""

    number: int  # of the stanza, from 1
    digest: str
    hmac: str  # "" is none
    mode: str
    key: bytes
    key_in_base64: bool
    hmac_key: bytes
    hmac_key_in_base64: bool

    @property
    def port(self) -> int:
        """The port that this stanza alone may open."""
        return 1000 + self.number

    @property
    def seconds(self) -> int:
        """How long the port is opened for: every other client asks for it."""
        return (10 if self.asks else 200) + self.number

    @property
    def asks(self) -> bool:
        """Whether the client says how long (-f, message type 3)."""
        return self.number % 2 == 1

    def stanza(self) -> str:
        """The stanza in access.conf."""
        lines = [
            "SOURCE ANY",
            "OPEN_PORTS tcp/%d" % self.port,
            "REQUIRE_USERNAME user%d" % self.number,
            "ENCRYPTION_MODE " + self.mode,
            "FW_ACCESS_TIMEOUT %d" % (200 + self.number),
            "REQUIRE_SOURCE_ADDRESS Y",
            "KEY_BASE64 " + to_base64(self.key)
            if self.key_in_base64
            else "KEY " + self.key.decode(),
        ]
        if self.hmac:
            lines += [
                "HMAC_DIGEST_TYPE " + self.hmac,
                "HMAC_KEY_BASE64 " + to_base64(self.hmac_key)
                if self.hmac_key_in_base64
                else "HMAC_KEY " + self.hmac_key.decode(),
            ]
        return "\n".join(lines) + "\n"

    def options(self, destination: str = SERVER4) -> List[str]:
        """The client's options, the same for fwknop's and ours."""
        words = ["-A", "tcp/%d" % self.port, "-a", CLIENT4, "-D", destination, "-m", self.digest,
                 "-M", self.mode, "-U", "user%d" % self.number]
        words += ["-f", str(self.seconds)] if self.asks else []
        words += (["--key-base64-rijndael", to_base64(self.key)] if self.key_in_base64
                  else ["--key-rijndael", self.key.decode()])
        if self.hmac:
            words += ["--hmac-digest-type", self.hmac]
            words += (["--key-base64-hmac", to_base64(self.hmac_key)] if self.hmac_key_in_base64
                      else ["--key-hmac", self.hmac_key.decode()])
        return words


def to_base64(key: bytes) -> str:
    """Return a key as it stands in a file."""
    return base64.b64encode(key).decode()


def make_key(number: int, length: int, in_base64: bool) -> bytes:
    """Return a key of this length that no other number has; bytes of every kind when in base64."""
    if in_base64:
        return bytes((3 * number + 89 * place) % 256 for place in range(length))
    return (LETTERS[number] + LETTERS * 3)[:length].encode()


def make_cases() -> List[Case]:
    """Return every digest with every HMAC type; modes and keys go round at their own pace."""
    cases = []  # type: List[Case]
    for row, hmac in enumerate(("",) + DIGESTS):
        for column, digest in enumerate(DIGESTS):
            number = len(cases) + 1
            key_length, key_in_base64 = KEY_KINDS[(column + 3 * row) % len(KEY_KINDS)]
            hmac_length, hmac_in_base64 = HMAC_KEY_KINDS[(3 * column + row) % len(HMAC_KEY_KINDS)]
            mode = MODES[(column + row) % len(MODES)] if hmac else MODES_WITHOUT_HMAC[column]
            cases.append(
                Case(number, digest, hmac, mode, make_key(number, key_length, key_in_base64),
                     key_in_base64, make_key(61 - number, hmac_length, hmac_in_base64),
                     hmac_in_base64))
    return cases


def send_all(client: Host, program: List[str], cases: List[Case]) -> None:
    """Run a client for each case, a few at a time."""
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        for _ in pool.map(lambda case: client.run(*program, *case.options()), cases):
            pass


@needs_root
@needs_programs("ip")
class MatrixTest(SharedCase):
    """Every digest with every HMAC type, all modes and lengths of keys, by name and by base64."""

    cable: Cable
    server: Server
    cases = make_cases()

    @classmethod
    def prepare(cls, stack: contextlib.ExitStack) -> None:
        """Start one server with a stanza for each case."""
        cls.cable = stack.enter_context(Cable())
        access = "".join(case.stanza() for case in cls.cases)
        cls.server = Server(cls.cable.server, "", access, "-t").start()

    def test_the_matrix_has_every_value_twice(self) -> None:
        """The pace of modes and keys leaves nothing out."""
        columns = [
            [case.digest for case in self.cases],
            [case.hmac for case in self.cases],
            [case.mode for case in self.cases],
            [(len(case.key), case.key_in_base64) for case in self.cases],
            [(len(case.hmac_key), case.hmac_key_in_base64) for case in self.cases if case.hmac],
        ]  # type: List[List[Any]]
        for column in columns:
            for value in set(column):
                self.assertGreaterEqual(column.count(value), 2, value)
        self.assertEqual(set(MODES + ("legacy",)), {case.mode for case in self.cases})
        self.assertEqual(set(KEY_KINDS),
                         {(len(case.key), case.key_in_base64) for case in self.cases})
        self.assertEqual(
            set(HMAC_KEY_KINDS),
            {(len(case.hmac_key), case.hmac_key_in_base64) for case in self.cases if case.hmac})

    def check_opened(self, start: int) -> None:
        """Each case must have been opened by its own stanza, for its user, port and time."""
        for case in self.cases:
            with self.subTest(case=case._replace(key=b"", hmac_key=b"")):
                line = self.server.wait_for("user 'user%d' (" % case.number, start)
                self.assertEqual(
                    "(stanza #%d) user 'user%d' (client 3.0.0) opened %s -> 0.0.0.0/0 tcp/%d "
                    "for %d seconds; --test mode enabled, skipping firewall manipulation"
                    % (case.number, case.number, CLIENT4, case.port, case.seconds),
                    line)

    @needs_programs("fwknop")
    def test_fwknop_to_our_server(self) -> None:
        """The real client is understood."""
        start = self.server.mark()
        send_all(self.cable.client, FWKNOP, self.cases)
        self.check_opened(start)

    def test_our_client_to_our_server(self) -> None:
        """Ours is as well."""
        start = self.server.mark()
        send_all(self.cable.client, SPA_CLIENT, self.cases)
        self.check_opened(start)

    @needs_programs("fwknopd", "iptables")
    def test_our_client_to_fwknopd(self) -> None:
        """The real server, with the same access.conf, opens to our client what it asks for."""
        with Cable() as cable:
            daemon = start_fwknopd(cable.server, "".join(case.stanza() for case in self.cases))
            for number, case in enumerate(self.cases):
                if number % 6 == 0:  # of more at once it may lose some
                    began = time.time()
                    send_all(cable.client, SPA_CLIENT, self.cases[number:number + 6])
                with self.subTest(case=case._replace(key=b"", hmac_key=b"")):
                    line = daemon.wait_for("for %s -> 0.0.0.0/0 tcp/%d," % (CLIENT4, case.port))
                    self.assertIn("Added access rule to FWKNOP_INPUT", line)
                    expires = int(line.rpartition(" ")[2])
                    self.assertGreaterEqual(expires, int(began) + case.seconds)
                    self.assertLessEqual(expires, time.time() + case.seconds)

    def test_ipv6(self) -> None:
        """An IPv6 address in the message, over either family, and -s over IPv6."""
        case = self.cases[8]
        self.assertTrue(case.asks)
        for destination, options, opened in (
                (SERVER6, ["-a", CLIENT6], CLIENT6 + " -> ::/0"),
                (SERVER4, ["-a", CLIENT6], CLIENT6 + " -> ::/0"),
                (SERVER6, ["-a", CLIENT4], CLIENT4 + " -> 0.0.0.0/0"),
                (SERVER6, ["-a", "FD55:0:0::0003"], "fd55::3 -> ::/0")):
            with self.subTest(destination=destination, options=options):
                line = self.server.knock(self.cable.client, *case.options(destination), *options,
                                         keys=[])
                self.assertIn("opened %s tcp/%d for" % (opened, case.port), line)

    def test_the_reason_is_that_of_the_stanza_whose_keys_were_right(self) -> None:
        """Stanzas before it that do not know the packet say nothing, with and without HMAC keys."""
        for case in (self.cases[8], self.cases[20], self.cases[44]):
            with self.subTest(hmac=case.hmac):
                # To a stanza without HMAC another's tag is part of the body: its form is wrong, and
                # that must not hide the reason of the stanza that knows the packet.
                line = self.server.knock(self.cable.client, *case.options(SERVER6), "-s", keys=[],
                                         expect="[%s] " % CLIENT6)
                self.assertEqual("[%s] (stanza #%d) Got 0.0.0.0 when valid source IP was required."
                                 % (CLIENT6, case.number),
                                 line)


class LiveTest(CableCase):
    """A test with two hosts of its own, and packets of the real client."""

    def serve(self, config: str = "", access: str = STANZA, *options: str, **more: Any) -> Server:
        """Return a running server that leaves the firewall alone."""
        return Server(self.cable.server, config, access, "-t", *options, **more).start()

    def make_packet(self, *options: str) -> str:
        """Return a packet of the real client that was not sent."""
        path = self.client.path("packet")
        self.client.run(*FWKNOP, "-T", "-B", path, *KNOCK4, *options)
        with open(path) as file:
            return file.read().strip()


@needs_root
@needs_programs("ip")
class CaptureTest(LiveTest):
    """Where datagrams come from."""

    @needs_programs("nft")
    def test_the_host_firewall_may_drop_the_packet(self) -> None:
        """A packet socket sees what the firewall drops, and nothing listens on the port."""
        server = self.serve()
        self.cable.server.run(
            "nft", "-f", "-",
            input="table inet host { chain input { "
            "type filter hook input priority 0; policy drop; ip6 nexthdr icmpv6 accept; "
            "udp dport 62201 counter drop; }; }")
        server.knock(self.client, *KNOCK4)
        server.knock(self.client, *KNOCK6)
        self.assertIn("counter packets 2", self.cable.server.run("nft", "list", "ruleset"))
        self.assertNotIn("62201", self.cable.server.run("cat", "/proc/net/udp", "/proc/net/udp6"))

    def test_an_interface_that_comes_and_goes(self) -> None:
        """Servers on it and on all go on after it was down, and after it was made anew."""
        servers = [self.serve("", STANZA, "-i", "eth0"), self.serve()]
        for what, away, back in (
                ("down",
                 lambda: self.cable.server.run("ip", "link", "set", "eth0", "down"),
                 lambda: self.cable.server.run("ip", "link", "set", "eth0", "up")),
                ("deleted", self.cable.unplug, self.cable.plug)):
            with self.subTest(what):
                marks = [server.mark() for server in servers]
                away()
                servers[0].wait_for("going on when it is back", marks[0])
                back()
                if what == "deleted":
                    servers[0].wait_for("Sniffing interface: eth0", marks[0])
                wait_for(lambda: "state UP" in self.cable.server.run("ip", "link", "show", "eth0"),
                         "the link")
                self.client.run(*SPA_CLIENT, *KEYS, *KNOCK4)
                for server, mark in zip(servers, marks):
                    server.wait_for(" opened ", mark)
                    self.assertEqual(1, server.log(mark).count(" opened "), server.log())

    def test_an_interface_that_is_not_there_yet(self) -> None:
        """It is said and waited for."""
        self.cable.unplug()
        # socket.if_nametoindex() raises an OSError without an errno.
        server = self.serve("PCAP_INTF eth0;\n")
        self.assertIn("Interface eth0 does not exist; it is waited for", server.log())
        self.cable.plug()
        server.wait_for("Sniffing interface: eth0")
        server.knock(self.client, *KNOCK4)

    def test_a_named_interface_hears_no_other(self) -> None:
        """What comes in by another interface is not seen."""
        everywhere, loopback = self.serve(), self.serve("PCAP_INTF lo;\n")
        everywhere.knock(self.client, *KNOCK4)
        everywhere.knock(self.client, *KNOCK6)
        mark = loopback.mark()
        self.cable.server.run(*SPA_CLIENT, *KEYS, "-A", "tcp/1", "-a", CLIENT4, "-D", "127.0.0.1")
        loopback.wait_for(" opened ", mark)
        self.assertEqual(1, loopback.log(mark).count("SPA Packet from IP"), loopback.log())

    def test_packet_filter(self) -> None:
        """Two ports are heard, over both families, and a third one is not."""
        server = self.serve("PCAP_FILTER udp port 62201 or udp dst port 5555;\n")
        mark = server.mark()
        self.client.run(*SPA_CLIENT, *KEYS, *KNOCK4, "-p", "5556")
        for port in ("5555", "62201"):
            server.knock(self.client, *KNOCK4, "-p", port)
            server.knock(self.client, *KNOCK6, "-p", port)
        self.assertEqual(4, server.log(mark).count("SPA Packet from IP"), server.log())

    def test_udp_server(self) -> None:
        """UDP sockets of both families, on a port of choice."""
        server = self.serve("ENABLE_UDP_SERVER Y;\nUDPSERV_PORT 6000;\n")
        self.assertIn("Kicking off UDP server to listen on port 6000.", server.log())
        for knock, address in ((KNOCK4, CLIENT4), (KNOCK6, CLIENT6)):
            line = server.knock(self.client, *knock, "-p", "6000")
            self.assertIn("opened %s -> " % address, line)

    def test_random_bytes_reach_nobody(self) -> None:
        """The kernel drops them before either kind of socket, and the next knock opens."""
        code = ("import os, socket, sys\nlink = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
                "for size in range(0, 1473, 4):\n"
                "    link.sendto(os.urandom(size), (sys.argv[1], 62201))\n")
        for config in ("", "ENABLE_UDP_SERVER Y;\n"):
            server = self.serve(config)
            self.client.run(sys.executable, "-I", "-S", "-c", code, SERVER4)
            server.knock(self.client, *KNOCK4)
            server.stop()
            self.assertIn("1 accepted; rejected: none", server.wait_for("Packets seen"))

    def test_udp_server_knows_where_a_packet_was_sent_to(self) -> None:
        """DESTINATION and ENABLE_DESTINATION_RULE work with UDP sockets as well."""
        server = self.serve(
            "ENABLE_DESTINATION_RULE Y;\n",
            STANZA.replace("SOURCE ANY", "SOURCE ANY\nDESTINATION %s, %s" % (SERVER4, SERVER6)),
            "-U")
        self.assertIn("opened %s -> %s tcp/22" % (CLIENT4, SERVER4),
                      server.knock(self.client, *KNOCK4))
        self.assertIn("opened %s -> %s tcp/22" % (CLIENT6, SERVER6),
                      server.knock(self.client, *KNOCK6))
        self.cable.server.run("ip", "addr", "add", "10.55.0.9/24", "dev", "eth0")
        server.knock(self.client, "-A", "tcp/22", "-a", CLIENT4, "-D", "10.55.0.9",
                     expect="(%s -> 10.55.0.9) filtered by SOURCE and/or DESTINATION" % CLIENT4)

    @needs_programs("setpriv")
    def test_without_cap_net_raw(self) -> None:
        """It says so, and listens on UDP sockets."""
        server = self.serve(
            launcher=["setpriv", "--bounding-set", "-net_raw", "--inh-caps", "-net_raw"])
        self.assertIn("listening on UDP port 62201 instead", server.log())
        server.knock(self.client, *KNOCK4)
        server.knock(self.client, *KNOCK6)


@needs_root
@needs_programs("ip", "iptables")
class FloodTest(unittest.TestCase):
    """Junk does not keep honest packets out."""

    def test_honest_packets_under_a_flood(self) -> None:
        """Each is sent once, and each opens, from the packet socket and from the UDP socket."""
        for config in ("", "ENABLE_UDP_SERVER Y;\n"):
            with self.subTest(config=config):
                self.assertEqual(HONEST, survive(3000, functools.partial(start_ours, config))[0])


@needs_root
@needs_programs("ip")
class ReplayTest(LiveTest):
    """A packet opens once."""

    def check_replay_is_rejected(self, server: Server, packet: str) -> None:
        """Send the packet again."""
        mark = server.mark()
        self.client.send(SERVER4, 62201, packet)
        self.assertRegex(
            server.wait_for("Replay detected", mark),
            r"^Replay detected from source IP: 10\.55\.0\.2, Destination proto/port: 17/62201, "
            r"Original source IP: 10\.55\.0\.2, Original dst proto/port: 17/10\.55\.0\.1, "
            r"|^Replay detected from source IP: 10\.55\.0\.2, Destination proto/port: "
            r"17/62201, Original source IP: 10\.55\.0\.2, Original dst proto/port: 17/62201, ")
        self.assertNotIn(" opened ", server.log(mark))

    @needs_programs("fwknop")
    def test_a_captured_packet(self) -> None:
        """Neither at once, nor after SIGHUP, a restart or kill -9; from another address neither."""
        server = self.serve()
        packet = self.make_packet(*KEYS)
        self.client.send(SERVER4, 62201, packet)
        server.wait_for(" opened ")
        self.check_replay_is_rejected(server, packet)
        mark = server.mark()
        self.client.send(SERVER6, 62201, packet)
        server.wait_for("Replay detected from source IP: " + CLIENT6, mark)
        server.send_signal(signal.SIGHUP)
        server.wait_for("Got SIGHUP", mark)
        self.check_replay_is_rejected(server, packet)
        for number in (signal.SIGTERM, signal.SIGKILL):
            server.stop(number)
            server.start()
            with self.subTest(signal=number):
                self.check_replay_is_rejected(server, packet)
        server.knock(self.client, *KNOCK4)

    @needs_programs("fwknop")
    def test_the_bit_games_without_hmac(self) -> None:
        """The four changes of fwknop.md 1.13 that fwknopd takes for new packets open nothing."""
        server = self.serve("", NO_HMAC_STANZA)
        packets = (
            self.make_packet("--key-rijndael", KEY, "-U", "u" * length) for length in range(1, 30)
        )
        packet = next(packet for packet in packets if (len(packet) + 10) % 4)
        self.client.send(SERVER4, 62201, packet)
        server.wait_for(" opened ")
        first, last = BASE64.index(packet[0]), BASE64.index(packet[-1])
        unused = {2: 16, 3: 4}[(len(packet) + 10) % 4]
        games = [packet + "=", packet + "=="]
        games += [BASE64[high * 4 + first % 4] + packet[1:] for high in (0, 6, 11, 14)]
        games += [packet[:-1] + BASE64[last // unused * unused + low] for low in range(unused)]
        mark = server.mark()
        for game in games:
            self.client.send(SERVER4, 62201, game)
        server.knock(self.client, *KNOCK4, keys=["--key-rijndael", KEY])
        self.assertEqual(1, server.log(mark).count(" opened "), server.log())
        self.assertGreaterEqual(server.log(mark).count("Replay detected"), 2 + unused)

    def send_until_opened(self, server: Server) -> str:
        """Send a packet a second until one opens, as it does from the second after the start on.

        Return it. What the log says is waited for each time: it is that packet that opened.
        """
        began = time.time()

        def said(mark: int, now: float) -> str:
            """Wait for a packet's line; unless it opened, also for the next second."""
            wait_for(lambda: re.search(" opened |replay memory began", server.log(mark)), "a line")
            if " opened " not in server.log(mark):
                self.assertLess(now, began + 10, "the replay memory should have begun by now")
                wait_for(lambda: time.time() > now + 1, "the next second")
            return server.log(mark)

        while True:
            packet, mark, now = self.make_packet(*KEYS), server.mark(), time.time()
            self.client.send(SERVER4, 62201, packet)
            if " opened " in said(mark, now):
                return packet

    @needs_programs("fwknop", "mount")
    def test_a_disk_that_fails(self) -> None:
        """It is full or can't be written to, at the start or later: knocks open, and a packet that
        was taken then opens nothing again, even after kill -9; the log names each file."""
        server = Server(self.cable.server, "", STANZA, "-t")
        run_directory = os.path.join(server.directory, "run")
        os.mkdir(run_directory)
        mount = ["mount", "-t", "tmpfs", "-o", "size=32k", "none", run_directory]
        run(mount).check_returncode()
        self.addCleanup(lambda: run(["umount", run_directory]).check_returncode())
        full, cache, pid = (os.path.join(run_directory, name)
                            for name in ("full", "digest.cache", "fwknopd.pid"))

        def fill() -> None:
            """Leave no room."""
            with self.assertRaises(OSError), open(full, "ab", buffering=0) as file:
                while file.write(b"x" * 512):
                    pass

        def remount(mode: str) -> None:
            """Let it be written to, or not."""
            run(["mount", "-o", "remount," + mode, run_directory]).check_returncode()

        room = ": No space left on device; "
        read_only = ": Read-only file system; "
        for before, after, lines in (
                ([], [fill], [cache + room]), ([lambda: os.unlink(pid), fill], [], [cache + room,
                                                                                   pid + room]),
                ([lambda: remount("ro")], [],
                 [cache + read_only + "only this process remembers packets",
                  pid + read_only + "nothing keeps a second server from starting"])):
            for harm in before:
                harm()
            server.start()
            for harm in after:
                harm()
            packet = self.send_until_opened(server)
            while lines[0] not in server.log():  # the last page of the file has room for 40
                packet = self.send_until_opened(server)
            for line in lines:
                server.wait_for(line)
            self.assertNotIn("Errno", server.log())
            server.stop(signal.SIGKILL)
            server.start()
            mark = server.mark()
            self.client.send(SERVER4, 62201, packet)
            server.wait_for("before this replay memory began", mark)
            server.stop()
        remount("rw")
        os.unlink(full)
        server.start()
        packet = self.send_until_opened(server)
        self.assertNotIn(run_directory, server.log())
        server.stop(signal.SIGKILL)
        self.check_replay_is_rejected(server.start(), packet)

    @needs_programs("fwknop")
    def test_a_key_with_and_without_hmac(self) -> None:
        """Two stanzas have it: of a packet and the same without its tag, one opens, once."""
        server = self.serve("", STANZA + NO_HMAC_STANZA)
        server.wait_for("(stanza #2) another stanza has this key with an HMAC")
        for turn in (1, -1):
            packet = self.make_packet(*KEYS)
            mark = server.mark()
            self.client.send(SERVER4, 62201, *2 * [packet, packet[:-43]][::turn])
            replays = re.compile(r"Replay detected|refused before \(replay\)")
            wait_for(lambda: len(replays.findall(server.log(mark))) == 3,  # noqa: B023
                     "three replays")
            self.assertEqual(1, server.log(mark).count(" opened "), server.log(mark))

    @needs_programs("fwknop")
    def test_time_and_memory(self) -> None:
        """A clock that is off is told by how much; what is older than the memory is rejected."""
        server = self.serve()
        for option, text in (("--time-offset-minus", "behind"), ("--time-offset-plus", "ahead")):
            line = server.knock(self.client, *KNOCK4, option, "500s", program=FWKNOP,
                                expect="SPA data time difference is too great")
            self.assertRegex(line, r"^\[10\.55\.0\.2\] \(stanza #1\) .*\((49|50)\d seconds\)")
            self.assertIn(text, line)
        packet = self.make_packet(*KEYS)
        made = time.time()
        server.stop()
        os.unlink(os.path.join(server.directory, "run", "digest.cache"))
        wait_for(lambda: time.time() >= int(made) + 1, "the next second")
        server.start()
        self.client.send(SERVER4, 62201, packet)
        server.wait_for("before this replay memory began")
        server.knock(self.client, *KNOCK4)


@needs_root
@needs_programs("ip")
class LifeTest(LiveTest):
    """Start, reload, status and stop."""

    def test_signals_that_stop(self) -> None:
        """SIGTERM and SIGINT end it cleanly, with exit code 0 and fwknopd's words."""
        for number in (signal.SIGTERM, signal.SIGINT):
            with self.subTest(signal=number):
                server = self.serve()
                self.assertEqual(0, server.stop(number))
                self.assertRegex(server.log(),
                                 r"(?m)^Gracefully leaving the fwknopd event loop\.\n"
                                 r"Got %s\. Exiting\.\.\.\n(.*\n)*Shutting Down fwknopd\.$"
                                 % signal.Signals(number).name)

    def test_reload(self) -> None:
        """A good file is used; with a bad one the old settings stay, and that is said."""
        server = self.serve()
        for bad in ("SOURCE ANY\nKEY new\nHMAC_KEY newhmac\nFW_ACCESS_TIMEOUT soon\n", "KEY new\n",
                    ""):
            with self.subTest(access=bad):
                server.configure(access=bad)
                mark = server.mark()
                server.send_signal(signal.SIGHUP)
                self.assertIn(server.access_file,
                              server.wait_for("going on with the old settings", mark))
                server.knock(self.client, *KNOCK4)
        server.configure(config="PCAP_FILTER ether proto 80;\n", access=STANZA)
        mark = server.mark()
        server.send_signal(signal.SIGHUP)
        self.assertIn(server.config_file + ":1: PCAP_FILTER: expected",
                      server.wait_for("going on with the old settings", mark))
        server.knock(self.client, *KNOCK4)
        server.configure("PCAP_FILTER udp port 7000;\n", "SOURCE ANY\nKEY new\nHMAC_KEY newhmac\n")
        mark = server.mark()
        server.send_signal(signal.SIGHUP)
        server.wait_for("PCAP filter is: 'udp port 7000'", mark)
        self.client.run(*SPA_CLIENT, *KEYS, *KNOCK4)  # not heard any more
        server.knock(self.client, *KNOCK4, "-p", "7000", expect="HMAC_COMPAREFAIL")
        server.knock(self.client, *KNOCK4, "-p", "7000",
                     keys=["--key-rijndael", "new", "--key-hmac", "newhmac"])
        self.assertEqual(2, server.log(mark).count("received with access source match"),
                         server.log(mark))

    def test_one_instance(self) -> None:
        """The lock lives as long as the server, also across reloads; -S, -R and -K find it."""
        server = self.serve()
        pid = server.running().popen.pid

        def check_running() -> None:
            """Status says so, and a second server does not start."""
            self.assertEqual((0, "Detected fwknopd is running (pid=%d).\n" % pid),
                             server.command("-S"))
            code, text = server.command("-t")
            self.assertEqual(1, code, text)
            self.assertIn("An instance of fwknopd is already running: (PID=%d)." % pid, text)

        check_running()
        for _ in range(2):
            mark = server.mark()
            self.assertEqual((0, "Sent restart signal to fwknopd (pid=%d)\n" % pid),
                             server.command("-R"))
            server.wait_for("Got SIGHUP. Re-reading configs.", mark)
            check_running()
        server.knock(self.client, *KNOCK4)
        self.assertEqual((0, "Killed fwknopd (pid=%d) via SIGTERM\n" % pid), server.command("-K"))
        self.assertEqual(0, server.running().popen.wait(TIMEOUT))
        for option in ("-S", "-R", "-K"):
            self.assertEqual((1, "No running fwknopd detected.\n"), server.command(option))
        server.start()
        server.stop(signal.SIGKILL)
        self.assertEqual(1, server.command("-S")[0])
        server.start()

    def test_nothing_is_put_back_in_test_mode(self) -> None:
        """What --test does not open nobody can have taken."""
        server = self.serve()
        server.knock(self.client, *KNOCK4)
        server.send_signal(signal.SIGHUP)
        server.wait_for("Got SIGHUP")
        server.knock(self.client, *KNOCK4)
        self.assertNotIn("Put back", server.log())

    def test_daemon(self) -> None:
        """It comes back when it serves, works, and is found and ended by its pid file."""
        server = Server(self.cable.server, "", STANZA, "-t")
        code, text = server.command("-t", "--daemon")
        self.assertEqual(0, code, text)
        with open(os.path.join(server.directory, "run", "fwknopd.pid")) as file:
            pid = int(file.read())
        try:
            self.assertEqual((0, "Detected fwknopd is running (pid=%d).\n" % pid),
                             server.command("-S"))
            self.assertEqual({"/dev/null"},
                             {os.readlink("/proc/%d/fd/%d" % (pid, number)) for number in range(3)})
            self.client.run(*SPA_CLIENT, *KEYS, *KNOCK4)
            digests = os.path.join(server.directory, "run", "digest.cache")

            def remembered() -> bool:
                """Whether the packet is in the file."""
                with open(digests) as file:
                    return " %s " % CLIENT4 in file.read()

            wait_for(remembered, "the packet in " + digests)
            self.assertEqual(0, server.command("-K")[0])
            wait_for(lambda: server.command("-S")[0] == 1, "the end of the daemon")
        finally:
            if os.path.exists("/proc/%d" % pid):
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass

    def test_daemon_that_can_not_start(self) -> None:
        """The exit code tells, and so does stderr."""
        server = Server(self.cable.server,
                        "FIREWALL_EXE /nowhere/iptables;\nFIREWALL_TYPE iptables;\n")
        code, text = server.command("--daemon")
        self.assertNotEqual(0, code, text)
        self.assertIn("iptables", text)
        self.assertEqual(1, server.command("-S")[0])

    def test_junk_does_not_fill_the_log(self) -> None:
        """Of hundreds of bad packets a few have a line, the rest are counted; a good one opens."""
        server = self.serve()
        mark = server.mark()
        self.client.send(SERVER4, 62201, *(["8" * 200, "U2FsdGVkX1" * 20, "E" * 500] * 150))
        server.knock(self.client, *KNOCK4)
        self.assertLess(len(server.log(mark).splitlines()), 60, server.log(mark))

        def told() -> Any:
            """One more bad packet each time, until the others are told of."""
            self.client.send(SERVER4, 62201, "8" * 200)
            return re.search(r"^(\d+) more packets were rejected without a line", server.log(mark),
                             re.M)

        match = wait_for(told, "the count of what was left out")
        self.assertGreater(int(match.group(1)), 300)

    def test_a_log_that_nobody_reads(self) -> None:
        """Stdout and stderr are one full pipe: packets are taken, and lost lines are counted."""
        server = Server(self.cable.server, "", STANZA)
        reader, writer = os.pipe()
        self.addCleanup(os.close, reader)
        popen = subprocess.Popen(self.cable.server.command([*SPA_SERVER, *server.files, "-t"]),
                                 stdin=subprocess.DEVNULL, stdout=writer, stderr=writer)
        self.addCleanup(end_process, popen, signal.SIGKILL)
        said = b""

        def wait_said(text: bytes) -> None:
            """Read until this has come."""
            nonlocal said
            while text not in said:
                said += os.read(reader, 65536)

        wait_said(Server.READY.encode())
        with open("/proc/self/fd/%d" % writer, "wb", buffering=0,
                  opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK)) as file:
            while file.write(b"x" * 4096):
                pass
        os.close(writer)
        for count in range(1, 6):
            self.client.send(SERVER4, 62201, "8" * 200)
            self.client.run(*SPA_CLIENT, *KEYS, *KNOCK4)
            wait_for(lambda: read(os.path.join(server.directory, "run", "digest.cache")).count(
                CLIENT4) == count, "packet %d" % count)  # noqa: B023
        wait_said(b"x" * 65000)
        self.client.run(*SPA_CLIENT, *KEYS, *KNOCK4)
        wait_said(b" opened ")
        self.assertRegex(said, rb"x[23]\d lines of the log were dropped: nothing took them\n")

    @needs_programs("nft")
    def test_init_on_a_fresh_host(self) -> None:
        """--init makes keys and files, hides the port, and its stanza lets our client in."""
        host = self.cable.server
        host.run("ip", "route", "add", "default", "via", CLIENT4)
        host.listen(22)
        directory = host.path("fresh")
        files = [os.path.join(directory, name) for name in ("fwknopd.conf", "access.conf")]
        state = os.path.join(directory, "run")
        # Other live tests start what was compiled before (see support.compiled), this one the text.
        script = shutil.copy(SPA_SERVER[1], host.path("spa_server.py"))
        init = [sys.executable, script, "--init", "tcp/22", "-c", files[0], "-a", files[1], "-r",
                state]
        process = host.start(*init)
        process.wait_for(Server.READY)
        self.assertEqual([0o600, 0o600], [stat.S_IMODE(os.stat(path).st_mode) for path in files])
        wait_for(lambda: not self.client.reaches(SERVER4, 22), "the guard")
        self.assertFalse(self.client.reaches(SERVER6, 22))
        stanza = re.search(r"^\[(\S+)\]\n(?:[A-Z_0-9]+ +\S+\n)+", process.output(), re.M)
        assert stanza, process.output()
        rc_file = write(self.client.path("fwknoprc"), stanza.group(0))
        self.client.run(SPA_CLIENT[0], SPA_CLIENT[1], "--rc-file", rc_file, "-n", stanza.group(1))
        process.wait_for(" opened ")
        self.assertTrue(self.client.connect(SERVER4, 22).answers())
        self.assertFalse(self.client.reaches(SERVER6, 22))
        self.assertEqual(0, end_process(process.popen, signal.SIGTERM))
        again = host.start(*init)
        again.wait_for(Server.READY)
        self.assertNotIn("KEY", again.output())
        self.assertIn("There is a configuration already; serving it", again.output())


if __name__ == "__main__":
    unittest.main()
