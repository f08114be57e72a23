"""Tests of what spa_client.py makes of answers: --answer, the waits, and strays."""

import hashlib
import hmac
import json
import os
import re
import socket
import threading
import time
import unittest
from typing import Any, Callable, List, Optional, Tuple
from unittest import mock

import spa_client as client
from tests.support import TIMEOUT, skip
from tests.test_client import HERE, HMAC_KEY, KEY, KEYS, Case, Receiver

Reply = Callable[["Server", bytes, Any], Optional[Tuple[int, str]]]
OPENED, REFUSED = (0, "opened tcp/22 for 30 seconds"), (1, "tcp/22 is not in OPEN_PORTS")


def answer(packet: bytes, status: int, text: str, key: str = KEY) -> bytes:
    """Return the answer to a packet, by tests/spec/answer.md; `key` is the KEY."""
    digest, nonce = hashlib.sha256(packet).digest(), os.urandom(8)
    secret = hmac.new(key.encode(), b"spa answer encryption" + digest, "sha256").digest()
    tag_key = hmac.new(HMAC_KEY.encode(), b"spa answer authentication" + digest, "sha256").digest()
    body = b"\1" + nonce + client.encrypt_blocks("CTR", secret, nonce + bytes(8), bytes(
        [status]) + text.encode("latin-1"))
    return body + hmac.new(tag_key, body, "sha256").digest()


class Server(Receiver):
    """A UDP port that answers packets as `reply` says, and keeps them; and a TCP port for waits."""

    def __init__(self, reply: Reply, host: str = "127.0.0.1", port: int = 0) -> None:
        super().__init__(host)
        if port:
            self.socket.close()
            self.socket = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
            self.socket.bind((host, port))
        self.socket.settimeout(None)
        self.reply, self.host, self.packets = reply, host, []  # type: Reply, str, List[bytes]
        self.tcp = socket.socket(self.socket.family, socket.SOCK_STREAM)
        self.tcp.bind((host, 0))
        self.port = str(self.tcp.getsockname()[1])
        self.thread = threading.Thread(target=self.serve, daemon=True)
        self.thread.start()

    def serve(self) -> None:
        """Answer until the socket is closed."""
        while True:
            packet, peer = self.socket.recvfrom(2000)
            if not packet:
                return
            self.packets.append(packet)
            told = self.reply(self, packet, peer)
            if told:
                self.socket.sendto(answer(packet, *told), peer)

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        with socket.socket(self.socket.family, socket.SOCK_DGRAM) as last:
            last.sendto(b"", self.socket.getsockname())
        self.thread.join(TIMEOUT)
        self.socket.close()
        self.tcp.close()


def opens(server: Server, *_: Any) -> Tuple[int, str]:
    """Open the TCP port, and say so."""
    server.tcp.listen(5)
    return OPENED


def says(told: Optional[Tuple[int, str]]) -> Reply:
    """Return a reply that is always the same."""
    return lambda *_: told


class QuestionTest(unittest.TestCase):
    """The answer's bytes."""

    def test_vectors(self) -> None:
        """Keys, key stream and text of all vectors; every flipped bit makes a stray."""
        with open(os.path.join(HERE, "vectors", "answer.json"), encoding="ascii") as stream:
            vectors = json.load(stream)["vectors"]
        self.assertGreaterEqual(len(vectors), 4)
        for vector in vectors:
            with self.subTest(vector["name"]):
                question = client.Question(vector["packet"].encode(), *(bytes.fromhex(
                    vector[name]) for name in ("key_hex", "hmac_key_hex")))
                self.assertEqual(vector["encryption_key_hex"], question.key.hex())
                datagram = bytes.fromhex(vector["answer_hex"])
                self.assertEqual((vector["status"] == 0, vector["text_sent"]),
                                 question.decode(datagram))
                flipped = [bytes(byte ^ (place == wrong) for place, byte in enumerate(datagram))
                           for wrong in range(len(datagram))]
                for bad in (b"", datagram[:-1], datagram + b"\0", b"\1" + bytes(41), datagram[:41],
                            bytes(len(datagram)), *flipped):
                    with self.assertRaises(ValueError):
                        question.decode(bad)

    def test_limits(self) -> None:
        """The shortest has a status only; one that is longer than its packet is a stray."""
        packet = b"8" * 99
        question = client.Question(packet, KEY.encode(), HMAC_KEY.encode())
        self.assertEqual((True, ""), question.decode(answer(packet, 0, "")))
        self.assertEqual((False, "x" * 57), question.decode(answer(packet, 7, "x" * 57)))
        with self.assertRaises(ValueError):
            question.decode(answer(packet, 0, "x" * 58))


class AnswerTest(Case):
    """--answer."""

    def ask(self, server: Server, *words: str) -> Tuple[int, str, str]:
        """Knock, by default with --answer, in this process; -s, since nothing is resolved."""
        return self.run_main("-A", "tcp/22", "-s", *KEYS, *server.options, *(words or ["--answer"]))

    def test_done(self) -> None:
        """The text, and exit code 0; nothing with -q; control characters are escaped."""
        for text, shown in (("opened tcp/22 for 30 seconds",) * 2, ("\33[2J\r\nx", r"\x1b[2J\r\nx"),
                            ("\xe9", r"\ufffd"), ("", "")):
            with Server(says((0, text))) as server:
                self.assertEqual((0, f"127.0.0.1: {shown}\n", ""), self.ask(server))
                self.assertEqual((0, "", ""), self.ask(server, "-q", "--answer=5"))
                self.assertEqual(2, len(set(server.packets)))

    def test_refused(self) -> None:
        """The server's reason and exit code 1, also with -q."""
        with Server(says(REFUSED)) as server:
            for words in (["--answer"], ["--answer", "9", "-q"]):
                self.assertEqual((1, "", "spa_client.py: 127.0.0.1: " + REFUSED[1] + "\n"),
                                 self.ask(server, *words))

    def test_silence(self) -> None:
        """The likely reasons; the time that was given holds."""
        with Server(says(None)) as server:
            begin = time.monotonic()
            done = self.script(["-A", "tcp/22", "-s", *KEYS, *server.options, "--answer", "1"])
            self.assertGreater(time.monotonic() - begin, 1)
            self.assertEqual((1, b""), (done.returncode, done.stdout))
            self.assertRegex(done.stderr.decode(), (
                r"\Aspa_client.py: 127\.0\.0\.1: no answer \(perhaps udp/%s can't be reached, or no"
                r" server runs there; it does not know these keys; its stanza has no ANSWER Y, and"
                r" may have opened all the same; or a clock is wrong: ours says .* UTC\)\r?\n\Z")
                % server.options[3])
        with Receiver() as gone:
            pass  # "port unreachable" does not end the wait: anybody can send it
        begin = time.monotonic()
        self.assertEqual(1, self.run_main("-A", "tcp/22", "-s", *KEYS, *gone.options, "-q",
                                          "--answer", "1")[0])
        self.assertGreater(time.monotonic() - begin, 1)

    def test_strays(self) -> None:
        """Junk, old answers and a flood do not count, neither do they stretch the time."""
        old = []  # type: List[bytes]

        def act(server: Server, packet: bytes, peer: Any) -> Optional[Tuple[int, str]]:
            good = answer(packet, *OPENED)
            for each in (b"", b"\1", bytes(2000), good[:-1] + b"\0", good + b"\0", *old,
                         answer(packet, 0, "x" * 500), answer(packet, *REFUSED, key=HMAC_KEY)[:-1]):
                server.socket.sendto(each, peer)
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
                other.sendto(answer(packet, *REFUSED), peer)  # right, but from another port
            old.append(good)
            return OPENED

        with Server(act) as server:
            for _ in range(2):
                self.assertEqual((0, f"127.0.0.1: {OPENED[1]}\n", ""), self.ask(server))

        def flood(server: Server, _: bytes, peer: Any) -> None:
            end = time.monotonic() + 3
            while time.monotonic() < end and not ended.is_set():
                server.socket.sendto(b"\1" * 99, peer)

        ended = threading.Event()
        with Server(flood) as server:
            begin = time.monotonic()
            self.assertEqual(1, self.ask(server, "-q", "--answer", "1")[0])
            self.assertLess(time.monotonic() - begin, 2.5)
            ended.set()

    def test_two_addresses(self) -> None:
        """One that opens is enough, and the other's reason is a warning."""
        with Server(opens) as four:
            try:
                six = Server(says(REFUSED), "::1", four.socket.getsockname()[1])
            except OSError as error:
                skip(f"no IPv6 on this machine: {error}")
            with six:
                found = [(each.socket.family, 0, 0, "", each.socket.getsockname())
                         for each in (six, four)]
                with mock.patch("spa_client.socket.getaddrinfo", return_value=found):
                    self.assertEqual(
                        (0, f"127.0.0.1: {OPENED[1]}\n",
                         f"spa_client.py: warning: ::1: {REFUSED[1]}\n"), self.ask(four))
                    four.reply = says(None)
                    self.assertEqual((1, "", f"spa_client.py: ::1: {REFUSED[1]}\n"),
                                     self.ask(four, "--answer", "1"))

    def test_several_stanzas(self) -> None:
        """A line with its name for each; one that refuses makes it 1."""
        with Server(says(OPENED)) as one, Server(says(REFUSED)) as other:
            self.write("[default]\nALLOW_IP source\nACCESS tcp/22\nKEY %s\nHMAC_KEY %s\n" % (
                KEY, HMAC_KEY) + "".join(
                    "[%s]\nSPA_SERVER 127.0.0.1\nSPA_SERVER_PORT %s\n" % (name, each.options[3])
                    for name, each in (("a", one), ("b", other))))
            done = self.script(["-n", "a,b", "--answer"])
        self.assertEqual((1, f"[a] 127.0.0.1: {OPENED[1]}\n"),
                         (done.returncode, done.stdout.decode()))
        self.assertEqual(["spa_client.py: [b] 127.0.0.1: " + REFUSED[1],
                          "spa_client.py: 1 of 2 knocks failed"],
                         done.stderr.decode().splitlines())

    def test_kept(self) -> None:
        """-l asks again; the rc file keeps it as little as --wait."""
        with Server(says(OPENED)) as server:
            self.assertEqual(0, self.ask(server, "--answer")[0])
            self.assertEqual((0, f"127.0.0.1: {OPENED[1]}\n", ""), self.run_main("-l", *KEYS))
            self.assertEqual(0, self.ask(server, "--answer", "-n", "x", "--save-rc-stanza")[0])
        with open(self.place(".fwknoprc")) as file:
            self.assertNotIn("answer", file.read().lower())

    def test_bad_usage(self) -> None:
        """Nothing is sent when no answer could come, or when the time is none."""
        seconds = "--answer: expected a number of seconds, 1 to 3600, not "
        with Receiver() as receiver:
            for words, expected in (
                    (["--answer", "abc"], seconds + "'abc'"), (["--answer", "0"], seconds + "'0'"),
                    (["--answer="], seconds + "''"), (["--answer=3601"], seconds + "'3601'"),
                    (["--answer=1.5"], seconds + "'1.5'"),
                    (["--answer", "-T"], "--answer: none comes to -T, which sends nothing"),
                    (["--answer", "-P", "tcp"], "--answer: none comes to packets over tcp"),
                    (["--answer", "-P", "icmp"], "packets over icmp"),
                    (["--answer", "-H", "127.0.0.1:9"], "packets over http"),
                    (["--answer", "-P", "udpraw", "-Q", "192.0.2.1"], "packets over udpraw"),
                    (["--answer", "-r"], "packets to random ports"),
                    (["--answer", "--gpg-recipient-key", "x"], "without KEY and HMAC_KEY")):
                self.assertIn(expected, self.failure(2, "-A", "tcp/22", "-s", *KEYS,
                                                     *receiver.options, *words))
            for words, expected in ((["--key-rijndael", "x"], "without KEY and HMAC_KEY"),
                                    (["--knock-sequence", "9:udp"], "none comes to port knocks")):
                self.assertIn(expected, self.failure(2, "-A", "tcp/22", *receiver.options, *words,
                                                     "--answer"))
            self.assertIn("unrecognized option '--answer'", self.failure(
                1, "--knock", "127.0.0.1", "9", "--answer"))
            self.assertTrue(receiver.silent())


class WaitTest(Case):
    """The waits hear answers without being asked to, and tell the truth."""

    def wait(self, server: Server, *words: str) -> Tuple[int, str, str]:
        """Knock and wait for the server's TCP port."""
        return self.run_main("-A", "tcp/" + server.port, "-s", *KEYS, *server.options, "--wait",
                             *(words or ["60"]))

    def test_opened(self) -> None:
        """The answer, and after it the port."""
        with Server(opens) as server:
            code, out, err = self.wait(server)
            self.assertEqual((0, ""), (code, err))
            self.assertRegex(out, rf"\A127\.0\.0\.1: {OPENED[1]}\ntcp/{server.port} of 127\.0\.0\.1"
                             r" opened after \d\.\d\d seconds\n\Z")

    def test_refused(self) -> None:
        """A reason ends the wait at once; of a relay, too, which prints nothing else."""
        with Server(says(REFUSED)) as server:
            begin = time.monotonic()
            for words in (["60"], ["60", "--exec", "true"]):
                self.assertEqual((1, "", f"spa_client.py: 127.0.0.1: {REFUSED[1]}\n"),
                                 self.wait(server, *words))
            self.assertLess(time.monotonic() - begin, 20)
            self.assertEqual(2, len(server.packets))

    def test_one_connection(self) -> None:
        """A port that must not be tried: with --answer the server's word is enough for --exec."""
        for reply, code, said in ((says(OPENED), 0, b"yes"), (says(REFUSED), 1, b"")):
            with Server(reply) as server:
                done = self.script(["-A", "tcp/" + server.port, "-s", *KEYS, *server.options,
                                    "--one-connection", "--answer", "--exec", "echo", "yes"])
                self.assertEqual((code, said), (done.returncode, done.stdout.strip()))

    def test_later_answers(self) -> None:
        """A lost packet is followed by another; a sequence may be broken, and is tried again."""
        def second(server: Server, *_: Any) -> Optional[Tuple[int, str]]:
            return opens(server) if len(server.packets) > 1 else None

        with Server(second) as server:
            self.assertIn(" opened after ", self.wait(server)[1])

        def third(server: Server, *_: Any) -> Optional[Tuple[int, str]]:
            return opens(server) if len(server.packets) > 1 else (1, "a sequence has to come first")

        with Server(third) as server, Receiver() as ports, \
                mock.patch.object(client, "TRY_SECONDS", 0.2):
            self.assertRegex(self.wait(server, "60", "--knock-sequence", ports.options[3] + ":udp")[
                1], f"(?s){OPENED[1]}.* opened after ")

    def test_open_already(self) -> None:
        """No server at all, a server that refuses, a sequence: the port answered before."""
        words = "answers without a knock: nothing hides it, or an earlier knock still holds"
        with Receiver() as silent, Server(says(REFUSED)) as server, Receiver() as ports:
            server.tcp.listen(9)
            for options, warning in ((silent.options, ""), (
                    server.options, f"spa_client.py: warning: 127.0.0.1: {REFUSED[1]}\n")):
                self.assertEqual(
                    (0, f"tcp/{server.port} of 127.0.0.1 {words}\n", warning),
                    self.run_main("-A", "tcp/" + server.port, "-s", *KEYS, *options, "--wait",
                                  "60"))
            _, out, _ = self.run_main("-D", "127.0.0.1", "-A", "tcp/" + server.port, "--wait", "60",
                                      "--knock-sequence", ports.options[3] + ":udp")
            self.assertEqual(f"tcp/{server.port} of 127.0.0.1 {words}\n", out)
            self.assertTrue(server.packets)
            self.assertTrue(silent.packet())  # it knocked all the same

    def test_late_first_syn(self) -> None:
        """An answer to the SYN before the knock may take longer than the knock."""
        with Server(says(None)) as server:
            address = [(socket.AF_INET, ("127.0.0.1", int(server.port)))]
            server.tcp.listen(9)
            settings = client.Settings({"SPA_SERVER": client.Given("h"), "wait": client.Given("5")})
            for seconds, expected in ((0.3, "answers without"), (1.2, "opened after")):
                knock, said = client.Knock(settings), []  # type: Any, List[str]
                knock.report = said.append
                knock.begin(address)
                knock.begun -= seconds
                knock.wait(("h", int(server.port)), address).close()
                knock.close()
                self.assertIn(expected, said[0])

    def test_reasons(self) -> None:
        """When nothing answers: the clock, what the server says, and the other family."""
        def why(words: List[str], waited: str = "192.0.2.1", number: int = 0) -> str:
            knock = client.Knock(client.Settings(client.parse_command_line(words)[0]))
            knock.chosen = {("2001:db8::1", 9, 0, 0): knock.settings.allow_ip or "2001:db8::2"}
            knock.answers.told.update(told)
            family = socket.AF_INET6 if ":" in waited else socket.AF_INET
            return knock.explain(number, [(family, (waited, 22))])

        told = {}  # type: Any
        self.assertRegex(why([], "2001:db8::1"),
                         "nothing answers.*a clock is wrong: ours says .* UTC$")
        for words, waited, expected in (
                ([], "192.0.2.1", "knock was for IPv6, and the wait went by IPv4"),
                (["-s"], "192.0.2.1", "knock was for IPv6, and the wait went by IPv4"),
                (["-a", "192.0.2.2"], "2001:db8::1", "was for IPv4, and the wait went by IPv6")):
            self.assertIn(expected, why(words, waited))
        told = {"::1": (True, OPENED[1])}
        self.assertIn(f"nothing answers, but the server says: {OPENED[1]}. Another firewall",
                      why(["-a", "192.0.2.2"]))
        self.assertIn("No route", why(["-a", "192.0.2.2"], number=113))

    def test_one_socket_for_each_packet(self) -> None:
        """A long wait keeps the newest sockets only, and closes them."""
        answers = client.Answers(print)
        question = client.Question(b"", b"", b"")
        with Receiver() as receiver:
            for _ in range(3 * client.MAX_ADDRESSES):
                link = client.open_socket(socket.AF_INET, receiver.socket.getsockname())
                answers.expect(link, question)
                self.assertEqual(-1, link.fileno())
        self.assertEqual(2 * client.MAX_ADDRESSES, len(answers.links))
        for link in list(answers.links):
            answers.drop(link)


class CheckTest(Case):
    """--check: one line for each finding, worst first."""

    def check(self, code: int, *words: str, rc: str = "", mode: int = 0o600) -> List[str]:
        """Return what --check prints; exit code 1 has a line on standard error, and 0 none."""
        self.write(rc or "[default]\nALLOW_IP source\n", mode=mode)
        got, out, err = self.run_main("--check", *words)
        lines = out.splitlines()
        findings = [line for line in lines if not line.startswith("[+] ")]
        self.assertEqual(lines, sorted(lines, key=lambda line: "!-+".index(line[1])))
        self.assertEqual((code, f"spa_client.py: lines that need a look: {len(findings)}\n" if
                          code else ""), (got, err), lines)
        self.assertEqual(bool(code), bool(findings))
        self.assertFalse(os.path.exists(self.place(".fwknop.run")))
        return lines

    def at(self, server: Server, *words: str) -> List[str]:
        """Return the options for a knock at a server of these tests."""
        return ["-A", "tcp/" + server.port, *KEYS, *server.options, *words]

    def assert_lines(self, lines: List[str], *expected: str) -> None:
        """Check that one line begins with each of these."""
        for each in expected:
            self.assertEqual(1, sum(line.startswith(each) for line in lines), (each, lines))

    def test_all_is_well(self) -> None:
        """Facts only, and exit code 0; with -q nothing."""
        with Server(opens) as server:
            lines = self.check(0, *self.at(server))
            self.assert_lines(
                lines, "[+] 127.0.0.1: the addresses are 127.0.0.1", "[+] 127.0.0.1: reached from "
                "127.0.0.1; it opens for the sender, and there is no NAT", "[+] a packet of ",
                f"[+] 127.0.0.1: {OPENED[1]}", f"[+] tcp/{server.port} of 127.0.0.1 opened after",
                f"[+] {self.place('.fwknoprc')}: mode 600", "[+] the clock: ours says ")
            self.assertEqual(7, len(lines))
        with Server(opens) as server:
            self.assertEqual([], self.check(0, *self.at(server, "-q")))

    def test_findings(self) -> None:
        """A refusal, an open port, silence, a readable file, two names, and no packet at all."""
        with Server(says((1, "the clock is 412 s behind"))) as server:
            lines = self.check(1, *self.at(server), mode=0o644)
            self.assertEqual("[!] 127.0.0.1: the clock is 412 s behind", lines[0])
            self.assert_lines(lines, f"[-] {self.place('.fwknoprc')}: permissions should only")
            server.tcp.listen(9)
            lines = self.check(1, *self.at(server))
            self.assert_lines(lines, f"[-] tcp/{server.port} of 127.0.0.1 answers without a knock",
                              "[-] 127.0.0.1: the clock is 412 s behind")
        with Server(says(None)) as server:
            lines = self.check(1, *self.at(server, "--wait", "1", "--answer=1"))
            self.assertRegex(lines[0], r"^\[!\] tcp/\d+ of 127\.0\.0\.1 did not open in 1 seconds:")
            self.assert_lines(lines, "[-] 127.0.0.1: no answer (perhaps udp/")
            server.reply = lambda *_: server.tcp.listen(9)  # type: ignore[func-returns-value]
            lines = self.check(0, *self.at(server, "--answer=1"))
            self.assert_lines(lines, "[+] 127.0.0.1: no answer (perhaps udp/")
            lines = self.check(1, *self.at(server, "--answer=1"))
            self.assert_lines(lines, "[-] 127.0.0.1: no answer (perhaps udp/", "[-] tcp/")
            lines = self.check(1, "-A", "udp/9", *KEYS, *server.options, "--answer=1")
            self.assertIn("[!] 127.0.0.1: no answer (perhaps udp/", lines[0])
        rc = ("[default]\nALLOW_IP source\nKEY k\nHMAC_KEY h\nACCESS udp/9\n[a]\nSPA_SERVER "
              "nosuch.invalid\n[b]\nSPA_SERVER 127.0.0.1\nONE_CONNECTION Y\nACCESS tcp/9\n")
        lines = self.check(1, "-n", "a,b", "--answer=1", rc=rc)
        self.assertRegex("\n".join(lines), r"\[!\] \[a\] nosuch\.invalid: .*\n"
                         r"\[!\] \[b\] 127\.0\.0\.1: no answer \(perhaps udp/62201 ")

    def test_addresses(self) -> None:
        """Whether a NAT is in between, as far as the stanza lets us know."""
        def judge(own: str, hidden: bool, asked: str, *words: str) -> Tuple[int, str]:
            link = mock.Mock(**{"getsockname.return_value": (own, 1),
                                "getpeername.return_value": ("192.0.2.1", 2)})
            settings = client.Settings(client.parse_command_line(list(words))[0])
            with mock.patch.object(client, "own_address", return_value=None if hidden else own):
                rank, line = client.judge_address(settings, link, asked)
            self.assertTrue(line.startswith(f"192.0.2.1: reached from {own}; it opens for "))
            return rank, line.partition("; it opens for ")[2]

        for arguments, rank, expected in (
                (("10.0.0.2", True, "0.0.0.0"), 2, "the sender: all behind a NAT, if there is one"),
                (("10.0.0.2", False, "0.0.0.0"), 2, "the sender, and there is no NAT"),
                (("10.0.0.2", False, "10.0.0.2"), 2, "10.0.0.2, and there is no NAT"),
                (("10.0.0.2", True, "10.0.0.2"), 1, "10.0.0.2: if a NAT is in between, use -R or"),
                (("10.0.0.2", True, "1.2.3.4", "-R"), 2, "1.2.3.4, since a NAT is in between"),
                (("1.2.3.4", False, "1.2.3.4", "-R"), 2, "1.2.3.4, and there is no NAT"),
                (("10.0.0.2", True, "1.2.3.4"), 2, "1.2.3.4: -R would ask whether that is right"),
                (("2001:db8::2", False, "1.2.3.4"), 2, "1.2.3.4: -R would ask"),
                (("1.2.3.5", False, "1.2.3.4"), 1, "1.2.3.4, which is not ours: see ALLOW_IP")):
            got = judge(*arguments)
            self.assertEqual(rank, got[0], arguments)
            self.assertTrue(got[1].startswith(expected), got)

    def test_other_knocks(self) -> None:
        """Port knocks and GPG have no answer; files that can't be used end it as ever."""
        with Receiver() as ports, Server(opens) as server:
            lines = self.check(1, "-D", "127.0.0.1", "-A", "tcp/" + server.port, "--wait", "1",
                               "--knock-sequence", ports.options[3] + ":udp", rc="[x]\n")
            self.assertIn(" did not open in 1 seconds", lines[0])
            self.assertNotIn("no answer", "".join(lines))
        for code, words, expected in (
                (2, ["-T"], "--check knocks by itself: no -T, --proxy, --exec, --save-rc-stanza"),
                (2, ["--exec", "true"], "--check knocks by itself"),
                (2, ["--proxy", "a", "22"], "--check knocks by itself"),
                (2, ["-n", "y", "--save-rc-stanza"], "--check knocks by itself"),
                (2, ["--check=1"], "option '--check' doesn't allow an argument"),
                (3, ["-n", "y"], "[y] was not found")):
            self.assertIn(expected, self.failure(code, "-A", "tcp/22", "-s", "-D", "127.0.0.1",
                                                 *KEYS, "--check", *words))


class OptionTest(Case):
    """An option whose argument may be left out."""

    def test_forms(self) -> None:
        """As users write it; what begins with a hyphen is the next option."""
        for words, expected in (
                (["--answer"], "3"), (["--answer", "5"], "5"), (["--answer=5"], "5"),
                (["--ans", "-q"], "3"), (["--answer", "--proxy", "a", "b"], "3"),
                (["--answer", "5", "x"], "5"), (["--answer", "--"], "3")):
            given = client.parse_command_line(words)[0]
            self.assertEqual(expected, given["answer"].text, words)
            self.assertEqual(("--answer", expected), given["answer"].arguments)
        self.assertRegex(client.format_help(False), r"\n      --answer \[SECONDS\] +print ")
        self.assertIsNone(re.search(r"-l answer -r", client.format_completion("fish")))


if __name__ == "__main__":
    unittest.main()
