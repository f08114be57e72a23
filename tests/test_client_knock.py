"""Tests of spa_client.py knocking on ports: as `knock`, and with KNOCK_SEQUENCE before a packet."""

import _socket
import os
import socket
import struct
import subprocess
import time
import unittest
from typing import Any, List, Set, Tuple
from unittest import mock

import spa_client as client
from tests.support import TIMEOUT, skip
from tests.test_client import KEYS, KNOCK, SCRIPT, Case, Receiver, python
from tests.test_client_fwknop import add_up
from tests.test_reach import Door

HOST = "127.0.0.1"
STANZA = "[home]\nSPA_SERVER 127.0.0.1\nKNOCK_SEQUENCE 7001,7002:udp,7003\nKNOCK_DELAY 0\n"
EXPECTED = ("expected PORT, PORT:udp or BYTES:icmp, PORT from 1 to 65535 or the name of a service, "
            "BYTES up to 1452")
HITS = [("tcp", 7001), ("udp", 7002), ("tcp", 7003)]


class KnockCase(Case):
    """A test that notes knocks and packets in their order, instead of sending them."""

    def setUp(self) -> None:
        super().setUp()
        self.sent = []  # type: List[Tuple[str, int]]
        self.places = []  # type: List[str]
        self.problem = {}  # type: Any

        def send_knock_packet(link: Any, protocol: str, port: int) -> None:
            address = link.getpeername()[0]
            self.places.append(address)
            if port == 7002 and address in self.problem:
                raise self.problem[address]
            self.sent.append((protocol, port))

        def send_packet(settings: Any, link: Any, packet: str) -> int:
            self.sent.append(("packet", settings.port))
            return len(packet)

        for function in (send_knock_packet, send_packet):
            patch = mock.patch.object(client, function.__name__, function)
            patch.start()
            self.addCleanup(patch.stop)

    def knock(self, *words: str) -> str:
        """Run a knock that must do well, and return what it printed."""
        self.sent.clear()
        code, out, err = self.run_main(*words)
        self.assertEqual((0, ""), (code, err))
        return out

    def pauses(self, *words: str) -> List[float]:
        """The milliseconds of the pauses in a knock."""
        with mock.patch.object(time, "sleep") as sleep:
            self.knock(*words)
        return [1000 * call[0][0] for call in sleep.call_args_list]


class CommandLineTest(KnockCase):
    """--knock: the command line of `knock`."""

    def test_ports(self) -> None:
        """Protocols in any case, services by name, -u for what names none, options anywhere."""
        for words, expected in (
                ("7001 7002:udp 7003:tcp", HITS),
                ("7001 7002:UDP 7003:Tcp", HITS),
                ("7001,7002:udp 7003", HITS),
                ("-u 7001 7002:tcp 7003", [("udp", 7001), ("tcp", 7002), ("udp", 7003)]),
                ("7001,7002 --udp", [("udp", 7001), ("udp", 7002)]),
                ("7001 -4 7002:udp --delay 0 7003 --", HITS),
                ("1 65535 00022", [("tcp", 1), ("tcp", 65535), ("tcp", 22)]),
                ("100:icmp :ICMP 0:icmp", [("icmp", 100), ("icmp", 56), ("icmp", 0)])):
            with self.subTest(words), mock.patch.object(client, "open_ping"):
                self.assertEqual("", self.knock("--knock", HOST, *words.split()))
                self.assertEqual(expected, self.sent)
        services = {("ssh", "tcp"): 22, ("domain", "udp"): 53}
        with mock.patch("spa_client.socket.getservbyname", lambda *name: services[name]):
            self.knock("--knock", HOST, "ssh", "domain:udp")
        self.assertEqual([("tcp", 22), ("udp", 53)], self.sent)

    def test_bad_ports(self) -> None:
        """Name the bad port by its number, exit with 1, and send none of them."""
        for port in ("70000", "65536", "0", "7002:", "7002:foo", "7002:tcp:udp", "abc-no-service",
                     "7002:icm", ":udp", ":", "", "1453:icmp", "x:icmp", "1e3", "+7002", "7002 ",
                     "\u0661", "7001,,7003", "\udcff", "a\0b"):
            with self.subTest(port), mock.patch.object(client, "find_addresses") as found:
                text = self.failure(1, "--knock", HOST, "7001", port)
                self.assertRegex(text, "^PORT: number [23] of the ports: " + EXPECTED)
                self.assertFalse(found.called)
        text = self.failure(1, "--knock", HOST, *["7"] * 33)
        self.assertEqual("PORT: expected at most 32 ports", text)
        self.assertEqual([], self.sent)

    def test_bad_command_lines(self) -> None:
        """Every error is one line and exit code 1; nothing is sent."""
        for words, expected in (
                ([], "expected a host and ports (--help says more)"),
                ([HOST], "expected a host and ports (--help says more)"),
                ([HOST, "-1"], "invalid option -- '1' (--help lists them)"),
                ([HOST, "7", "-A", "tcp/22"], "invalid option -- 'A' (--help lists them)"),
                ([HOST, "7", "-d"], "option '-d' requires an argument"),
                ([HOST, "7", "-d", "-5"], "-d: expected milliseconds such as 100, or a range such"
                                          " as 100-300, 0 to 60000, not '-5'"),
                ([HOST, "7", "-d", "60001"], "-d: expected milliseconds such as 100, or a range"
                                             " such as 100-300, 0 to 60000, not '60001'"),
                ([HOST, "7", "-d", "30-10"],
                 "-d: expected the lower number first, not '30-10'"),
                (["", "7"], "HOST: expected a value, not ''"),
                ([HOST, "7", "--wait", "5"], "expected --wait-port with --wait"),
                ([HOST, "7", "--exec", "true"], "expected --wait-port with --exec"),
                ([HOST, "7", "--exec"], "--exec: expected a command after it"),
                (["::1", "7", "-4"], ""), ([HOST, "7", "-6"], "")):
            with self.subTest(words):
                text = self.failure(1, "--knock", *words)
                if expected:
                    self.assertEqual(expected, text)
                else:  # in the resolver's words
                    self.assertTrue(text.startswith(words[0] + ": "), text)
        with mock.patch("spa_client.socket.getaddrinfo", side_effect=OSError(-2, "Unknown")):
            self.assertEqual("gate: Unknown", self.failure(1, "--knock", "gate", "7"))
        self.assertEqual("--knock: expected before all other options",
                         self.failure(2, "-4", "--knock", HOST))
        self.assertEqual([], self.sent)

    def test_no_route(self) -> None:
        """Exit code 1, where `knock` says nothing."""
        with mock.patch.object(client, "open_socket", side_effect=OSError(101, "No way")):
            self.assertEqual(HOST + ": No way", self.failure(1, "--knock", HOST, "7001"))

    def test_verbose_and_test(self) -> None:
        """-v prints each knock as `knock` does; -T prints them, sends none and looks nothing up."""
        lines = ["tcp 127.0.0.1:7001", "udp 127.0.0.1:7002", "tcp 127.0.0.1:7003"]
        words = ["--knock", HOST, "7001", "7002:udp", "7003"]
        self.assertEqual(["hitting " + line for line in lines],
                         self.knock(*words, "-v").splitlines())
        self.assertEqual("", self.knock(*words, "-v", "-q"))
        with mock.patch.object(client, "find_addresses", side_effect=AssertionError):
            self.assertEqual(["would hit " + line for line in lines],
                             self.knock(*words, "-T").splitlines())
        self.assertEqual([], self.sent)

    def test_delay(self) -> None:
        """Pause after every knock but the last, as given or drawn from a range; by default not."""
        words = ["--knock", HOST, "1", "2", "3"]
        self.assertEqual([0, 0], self.pauses(*words))
        for delay in ("100", "100ms"):
            self.assertEqual([100, 100], self.pauses(*words, "-d", delay))
        drawn = [each for _ in range(50) for each in self.pauses(*words, "-d", "100-103")]
        self.assertEqual({100, 101, 102, 103}, {round(each) for each in drawn})

    def test_addresses(self) -> None:
        """A name is looked up once; each of its addresses gets the whole sequence, in order."""
        found = [(socket.AF_INET, 0, 0, "", (address, 9)) for address in (HOST, "127.0.0.2")]
        words = ["--knock", "gate", "7001", "7002:udp", "7003"]
        with mock.patch("spa_client.socket.getaddrinfo", return_value=found) as asked:
            self.knock(*words)
            self.assertEqual((HITS * 2, 1), (self.sent, asked.call_count))
            self.assertEqual([HOST] * 3 + ["127.0.0.2"] * 3, self.places)
            self.problem = {HOST: OSError(1, "Not permitted")}
            self.sent.clear()
            self.assertEqual((0, "", "spa_client.py: warning: one address of gate got no knock: "
                                     "gate: Not permitted\n"), self.run_main(*words))
            self.assertEqual(HITS[:1] + HITS, self.sent)
            self.problem["127.0.0.2"] = client.SpaError("something else")
            self.assertEqual("something else", self.failure(1, *words))
            del self.problem["127.0.0.2"]
            found.reverse()
            found.pop(0)
            self.assertEqual("gate: Not permitted", self.failure(1, *words))

    def test_ipv6(self) -> None:
        """Literals, bare and in brackets."""
        try:
            Receiver("::1").socket.close()
        except OSError as error:
            skip(f"no IPv6 on this machine: {error}")
        for host in ("::1", "[::1]"):
            self.assertEqual("hitting tcp ::1:7001\n", self.knock("--knock", "-v6", host, "7001"))

    def test_documents(self) -> None:
        """--help, --man and --completion tell it; --knock --help all its options, on stdout."""
        out = self.knock("--knock", "-h")
        self.assertTrue(out.startswith("Usage: spa_client.py --knock [options] HOST PORT["), out)
        for option in client.KNOCK_OPTIONS:
            self.assertRegex(out, rf" --{option.long}[ \n]")
        self.assertIn("--wait and --exec need it", out)
        names = [option.short or option.long for option in client.KNOCK_OPTIONS]
        self.assertEqual(len(names), len(set(names)))
        known = set(client.ROWS) | {"help", "version", "knock", "udp"}
        self.assertLessEqual({option.name for option in client.KNOCK_OPTIONS}, known)
        self.assertIn("SHA-256", self.knock("--knock", "-V"))
        for words, mark in ((["-h"], "--knock-sequence PORTS"), (["-h"], "--knock [options] HOST"),
                            (["--man"], r"\-\-udp"), (["--man"], r"\-\-knock [options] HOST"),
                            (["--completion", "bash"], "--knock-delay"),
                            (["--completion", "fish"], " -l knock -d ")):
            self.assertIn(mark, self.knock(*words))

    def test_nothing_is_kept(self) -> None:
        """No rc file is read, and no options are saved for -l."""
        self.write("[default]\nNO_SUCH_DIRECTIVE 1\n")
        self.knock("--knock", HOST, "7001")
        self.assertEqual([".fwknoprc"], os.listdir(self.home))


class StanzaTest(KnockCase):
    """KNOCK_SEQUENCE in the rc file."""

    def test_only_knocks(self) -> None:
        """Without keys no packet is sent, and none is asked for; ports are not needed."""
        self.write(STANZA)
        self.assertEqual("", self.knock("-n", "home"))
        self.assertEqual(HITS, self.sent)
        self.write("[default]\nHMAC_DIGEST_TYPE SHA512\nACCESS tcp/22\n" + STANZA)
        self.knock("-n", "home")
        self.assertEqual(HITS, self.sent)

    def test_a_key_that_is_missing(self) -> None:
        """Ask for a key if other directives belong to a packet: a mistake sends nothing."""
        for line in ("USE_HMAC Y\n", "ALLOW_IP 192.0.2.7\n"):
            self.write(STANZA + "ACCESS tcp/22\n" + line)
            self.sent.clear()
            code, _, err = self.run_main("-n", "home")
            self.assertEqual((False, []), (code == 0, self.sent), err)

    def test_then_a_packet(self) -> None:
        """With keys it follows, after a pause; wherever the keys come from."""
        text = STANZA + "ACCESS tcp/22\nALLOW_IP 192.0.2.7\n"
        packet = [("packet", 62201)]
        self.write(text + "KEY a\nHMAC_KEY b\n")
        self.assertEqual([0, 0, 0], self.pauses("-n", "home"))
        self.assertEqual(HITS + packet, self.sent)
        self.assertEqual([20, 20, 20], self.pauses("-n", "home", "--knock-delay", "20"))
        self.write("[default]\nKEY_BASE64 YWFh\n" + text)
        self.knock("-n", "home")
        self.assertEqual(HITS + packet, self.sent)
        self.write(text)
        self.knock("-n", "home", "-4", *KEYS)
        self.assertEqual(HITS + packet, self.sent)
        self.sent.clear()
        self.assertEqual(0, self.run_main("-n", "home", "--stdin", stdin=b"key\n")[0])
        self.assertEqual(HITS + packet, self.sent)

    def test_keys_need_ports(self) -> None:
        """A packet that can't be made is an error before the first knock."""
        self.write(STANZA + "KEY a\n")
        self.assertIn("no ports to open given", self.failure(2, "-n", "home"))
        self.write(STANZA + "KEY a\nHMAC_KEY a\nACCESS tcp/22\n")
        self.assertIn("should not be identical", self.failure(1, "-n", "home"))
        self.assertEqual([], self.sent)

    def test_options(self) -> None:
        """--knock-sequence and --knock-delay go before the file's."""
        self.write(STANZA)
        self.assertEqual([7, 7], self.pauses(
            "-n", "home", "--knock-delay", "7", "--knock-sequence", "1,2,3:udp"))
        self.assertEqual([("tcp", 1), ("tcp", 2), ("udp", 3)], self.sent)
        self.assertEqual([50], self.pauses("-D", HOST, "--knock-sequence", "1,2", "--no-rc-file"))

    def test_errors_do_not_tell_the_sequence(self) -> None:
        """They name file and line, or the option; the exit code is the usual one."""
        expected = "number 2 of the ports: " + EXPECTED
        path = self.write(STANZA.replace("7002:udp", "70002"))
        self.assertEqual(f"{path}:3: KNOCK_SEQUENCE: {expected}",
                         self.failure(3, "-n", "home"))
        self.assertEqual("--knock-sequence: " + expected,
                         self.failure(2, "-D", HOST, "--knock-sequence", "7001,7002:foo"))
        self.write(STANZA.replace("DELAY 0", "DELAY soon"))
        self.assertIn(":4: KNOCK_DELAY: expected milliseconds", self.failure(3, "-n", "home"))
        self.assertEqual([], self.sent)
        self.write("[home]\nKNOCK_SEQUENCE 7001\n")
        self.assertIn("Must use --destination", self.failure(2, "-n", "home"))

    def test_blanks(self) -> None:
        """They may stand behind commas, as in access.conf, and a comment may follow."""
        for text in ("7001, 7002:udp,\t 7003", "7001,7002:udp, 7003  # a ; b, 7004"):
            self.write(STANZA.replace("7001,7002:udp,7003", text))
            self.assertEqual("", self.knock("-n", "home"))
            self.assertEqual(HITS, self.sent)
        words = ["-D", HOST, "--knock-sequence", "7001, 7002:udp, 7003"]
        self.knock(*words)
        self.assertEqual(HITS, self.sent)
        self.knock("-n", "new", "--save-rc-stanza", *words)
        self.knock("-n", "new")
        self.assertEqual(HITS, self.sent)

    def test_half_a_sequence_is_never_sent(self) -> None:
        """Anything else in the line is one error."""
        for text, number in (("7001;7003", 1), ("7001 ;7003", 1), ("7001, ; 7003", 2),
                             ("7001 7003", 1), ("7001#7003", 1),
                             ("7001, 7003#", 2), ("7001 ,7003", 1), ("7001,7003 ;", 2),
                             ("7001, #7003", 2), ("# 7001", 1)):
            with self.subTest(text):
                path = self.write(f"[home]\nSPA_SERVER 127.0.0.1\nKNOCK_SEQUENCE {text}\n")
                self.assertEqual(f"{path}:3: KNOCK_SEQUENCE: number {number} of the ports: "
                                 + EXPECTED, self.failure(3, "-n", "home"))
                self.assertEqual([], self.sent)

    def test_test_mode(self) -> None:
        """-T prints the knocks, and the packet if there is one, and sends nothing."""
        self.write(STANZA)
        lines = ["would hit tcp 127.0.0.1:7001", "would hit udp 127.0.0.1:7002",
                 "would hit tcp 127.0.0.1:7003"]
        self.assertEqual(lines, self.knock("-n", "home", "-T").splitlines())
        out = self.knock("-n", "home", "-T", *KNOCK, *KEYS).splitlines()
        self.assertEqual(lines + ["SPA Field Values:"], out[:4])
        self.assertEqual([], self.sent)

    def test_what_is_saved(self) -> None:
        """--save-rc-stanza writes it; the options for -l are without it, as without keys."""
        words = ["-D", HOST, "--knock-sequence", "7001,7002:UDP,7003", "--knock-delay", "0-1"]
        path = os.path.join(self.home, ".fwknoprc")
        self.knock("-n", "new", "--save-rc-stanza", *words)
        with open(path) as file:
            self.assertRegex(file.read(), "KNOCK_SEQUENCE +7001,7002:UDP,7003\nKNOCK_DELAY +0-1\n")
        self.knock("-n", "new")
        self.assertEqual(HITS, self.sent)
        self.knock(*words, "-n", "new")
        self.assertEqual("Last fwknop client command line: fwknop -D 127.0.0.1 --knock-delay 0-1 "
                         "-n new\n", self.knock("--show-last"))
        self.knock("-l")
        self.assertEqual(HITS, self.sent)

    def test_through_a_proxy(self) -> None:
        """Knock at the server itself, and send the packet to the proxy."""
        self.write(STANZA)
        self.knock("-n", "home", "-H", "127.0.0.9:8080", *KNOCK, *KEYS)
        self.assertEqual([HOST] * 3, self.places)
        self.assertEqual(HITS + [("packet", 62201)], self.sent)

    def test_verbose(self) -> None:
        """-v prints the knocks, unless standard output belongs to a connection."""
        self.write(STANZA)
        self.assertEqual(3, self.knock("-n", "home", "-v").count("hitting "))


class Listening(Case):
    """The knocks that arrive."""

    def test_tcp_and_udp(self) -> None:
        """A connection without data, and one byte; a refused connection counts as well."""
        listener = socket.socket()
        self.addCleanup(listener.close)
        listener.bind((HOST, 0))
        listener.listen(5)
        listener.settimeout(TIMEOUT)
        tcp = str(listener.getsockname()[1])
        with Receiver() as receiver:
            udp = receiver.options[-1]
            self.assertEqual((0, "", ""), self.run_main(
                "--knock", HOST, "1", tcp, udp + ":udp", tcp, "1:udp"))
            for _ in range(2):
                link = listener.accept()[0]
                try:
                    self.assertEqual(b"", link.recv(1))
                except ConnectionResetError:
                    pass
                link.close()
            self.assertEqual("\0", receiver.packet())
            self.assertTrue(receiver.silent())

    def test_refused_at_once(self) -> None:
        """A knock that is refused at once is no error."""
        link = mock.Mock(family=socket.AF_INET)
        link.getpeername.return_value = (HOST, 9)
        with mock.patch.object(client, "open_socket", side_effect=ConnectionRefusedError) as asked:
            client.send_knock_packet(link, "tcp", 7001)
        asked.assert_called_once_with(socket.AF_INET, (HOST, 7001), False, 0)

    def test_echo_request(self) -> None:
        """Both families: type, code, sum (RFC 1071; the kernel makes that of IPv6), bytes."""
        for family, address, kind in ((socket.AF_INET, (HOST, 9), 8),
                                      (socket.AF_INET6, ("::1", 9, 0, 7), 128)):
            link, ping = mock.Mock(family=family), mock.Mock()
            link.getpeername.return_value = address
            with mock.patch.object(client, "open_ping", return_value=ping) as opened:
                client.send_knock_packet(link, "icmp", 101)
            (request, where), _ = ping.sendto.call_args
            self.assertEqual((address[0], 0) + address[2:], where)
            self.assertEqual((kind, 0, 1), struct.unpack(">BBxxxxH", request[:8])[:3])
            self.assertEqual((bytes(101), 0xFFFF), (request[8:], add_up(request)))
            opened.assert_called_once_with(family)
            ping.close.assert_called_once_with()

    def test_sockets_for_echo_requests(self) -> None:
        """One that needs no root, else a raw one, else a clear error before the first knock."""
        asked: List[int] = []
        refused: Set[int] = set()

        def make(family: int, kind: int, number: int) -> int:
            asked.append(kind)
            if kind in refused:
                raise PermissionError(13, "Permission denied")
            return number

        with mock.patch("spa_client.socket.socket", make):
            self.assertEqual(socket.IPPROTO_ICMP, client.open_ping(socket.AF_INET))
            self.assertEqual(socket.IPPROTO_ICMPV6, client.open_ping(socket.AF_INET6))
            refused.add(socket.SOCK_DGRAM)
            self.assertEqual(socket.IPPROTO_ICMPV6, client.open_ping(socket.AF_INET6))
        self.assertEqual([socket.SOCK_DGRAM] * 3 + [socket.SOCK_RAW], asked)
        real = _socket.socket  # as the client

        def refuse(family: int, kind: int, number: int = 0) -> Any:
            if number:
                raise PermissionError(13, "Permission denied")
            return real(family, kind)

        with mock.patch("spa_client.socket.socket", refuse), \
                mock.patch.object(client, "send_knock_packet", side_effect=AssertionError):
            self.assertEqual("ICMP: Permission denied (it needs root, or a group in "
                             "net.ipv4.ping_group_range)",
                             self.failure(1, "--knock", HOST, "7001", ":icmp"))


class NameTest(Case):
    """Started through a link."""

    def start(self, name: str, *words: str) -> "subprocess.CompletedProcess[bytes]":
        """Run the program through a link with this name."""
        link = os.path.join(self.home, name)
        if not os.path.islink(link):
            os.symlink(SCRIPT, link)
        return subprocess.run([python(), "-I", "-S", link, *words], env=self.environment,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60)

    def test_knock(self) -> None:
        """Named knock it is `knock`, also with --knock; named fwknop it is not."""
        with Receiver() as receiver:
            port = receiver.options[-1]
            for words in ([], ["--knock"]):
                done = self.start("knock", *words, "-u", "-v", HOST, port)
                self.assertEqual((0, b"hitting udp 127.0.0.1:%d\n" % int(port), b""),
                                 (done.returncode, done.stdout, done.stderr))
                self.assertEqual("\0", receiver.packet())
        done = self.start("knock", HOST, "7001:foo")
        self.assertEqual((1, b""), (done.returncode, done.stdout))
        done = self.start("fwknop", HOST, "7001:foo")
        self.assertEqual((2, b""), (done.returncode, done.stdout))

    def test_nothing_more_is_imported(self) -> None:
        """A knock loads no module that a packet does not."""
        code = ("import sys\n"
                f"sys.argv[0] = {SCRIPT!r}\n"
                "space = {'__name__': 'x', '__file__': sys.argv[0]}\n"
                f"exec(compile(open({SCRIPT!r}).read(), 'c', 'exec'), space)\n"
                "before = set(sys.modules)\n"
                "assert space['main'](['--knock', '127.0.0.1', '1:udp']) == 0\n"
                "print(sorted(set(sys.modules) - before))\n")
        done = subprocess.run([python(), "-I", "-S", "-c", code], stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, env=self.environment, timeout=60)
        self.assertEqual(b"[]\n", done.stdout)


class WaitTest(Case):
    """--wait and --exec behind a sequence."""

    def test_again_until_it_opens(self) -> None:
        """The whole sequence, also a second time when the first one got lost."""
        with Door(4) as door, mock.patch.object(client, "TRY_SECONDS", 0.2):
            ports = [door.options[-1] + ":udp"] * 2
            code, out, err = self.run_main("--knock", HOST, *ports, "--wait", "60",
                                           "--wait-port", door.port)
            self.assertEqual((0, ""), (code, err))
            self.assertRegex(out, f"^tcp/{door.port} of 127.0.0.1 opened after ")
            self.assertEqual(["\0"] * 4, door.packets[:4])

    def test_exec(self) -> None:
        """The command takes over when the port of ACCESS answers."""
        with Door(1) as door:
            self.write(f"[home]\nSPA_SERVER 127.0.0.1\nACCESS tcp/{door.port}\n"
                       f"KNOCK_SEQUENCE {door.options[-1]}:udp\n")
            done = self.script(["-n", "home", "--exec", "echo", "--knock"])
            self.assertEqual((0, b"--knock\n", b""), (done.returncode, done.stdout, done.stderr))

    def test_nothing_crosses_the_sequence(self) -> None:
        """Give up pending connections before knocking again."""
        open_now = []  # type: List[int]
        links = []  # type: List[Any]
        now = 0.0

        def connect(*_: Any) -> Any:
            links.append(socket.socket())  # never writable: select is told so
            return links[-1]

        def knock() -> None:
            open_now.append(sum(link.fileno() >= 0 for link in links))

        def sleep(seconds: float) -> None:
            nonlocal now
            now += max(seconds, 0.001)

        def select(*_: Any) -> Tuple[List[Any], List[Any], List[Any]]:
            sleep(0.02)
            return [], [], []

        with mock.patch.object(client, "open_socket", connect), \
                mock.patch.object(client, "TRY_SECONDS", 1.0), \
                mock.patch.object(time, "monotonic", lambda: now), \
                mock.patch.object(time, "sleep", sleep), \
                mock.patch("select.select", select):
            for alone in (True, False):
                now = 0.0
                open_now.clear()
                self.assertEqual((None, 0), client.wait_until_open(
                    [(socket.AF_INET, (HOST, 9))], 2, knock, client.Answers(print), alone))
                self.assertTrue(open_now)
                self.assertEqual(alone, not any(open_now), open_now)
        self.assertFalse([link for link in links if link.fileno() >= 0])


if __name__ == "__main__":
    unittest.main()
