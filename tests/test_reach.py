"""Tests of what spa_client.py does around a knock: addresses, waiting, relaying, documents."""

import json
import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import threading
import time
import unittest
from functools import partial
from typing import Any, Callable, Dict, List, Optional
from unittest import mock

import spa_client as client
from tests.support import (TIMEOUT, as_main, compiled, find_pythons, hearing_interrupts,
                           manual_complaints, nearest_python, needs_programs, skip, wait_for, write)
from tests.test_client import (BLOCK, HERE, KEYS, KNOCK, SCRIPT, Case, Receiver, fields, python,
                               unseal)

# RFC 5769 section 2.2 and 2.3: sample responses, and the addresses in them.
IDENTITY = bytes.fromhex("b7e7a701bc34d686fa87dfae")
STUN4 = bytes.fromhex(
    "0101003c2112a442b7e7a701bc34d686fa87dfae8022000b7465737420766563746f7220002000080001a147e112"
    "a643000800142b91f599fd9e90c38c7489f92af9ba53f06be7d780280004c07d4c96")
STUN6 = bytes.fromhex(
    "010100482112a442b7e7a701bc34d686fa87dfae8022000b7465737420766563746f7220002000140002a1470113"
    "a9faa5d3f179bc25f4b5bed2b9d900080014a382954e4be67bf11784c97c8292c275bfe3ed4180280004c8fb0b4c")


def attribute(kind: int, value: bytes) -> bytes:
    """An attribute of a STUN message, padded."""
    return struct.pack(">HH", kind, len(value)) + value + bytes(-len(value) % 4)


def response(*attributes: bytes, identity: bytes = IDENTITY, kind: int = 0x0101) -> bytes:
    """A STUN message."""
    body = b"".join(attributes)
    return struct.pack(">HHI", kind, len(body), 0x2112A442) + identity + body


def xor_mapped(*address: int) -> bytes:
    """The attribute XOR-MAPPED-ADDRESS with an IPv4 address."""
    return attribute(0x0020, b"\0\1\0\0" + bytes(
        left ^ right for left, right in zip(address, client.STUN_MAGIC)))


class Door(Receiver):
    """A UDP port, and a TCP port that refuses until so many packets have come, and then echoes."""

    def __init__(self, opens_after: int) -> None:
        super().__init__()
        self.packets = []  # type: List[str]
        self.opens_after = opens_after
        self.tcp = socket.socket()
        self.tcp.bind(("127.0.0.1", 0))
        self.port = str(self.tcp.getsockname()[1])
        self.socket.settimeout(None)
        threading.Thread(target=self.watch, daemon=True).start()

    def watch(self) -> None:
        """Collect packets, and open."""
        while True:
            try:
                self.packets.append(self.packet())
            except OSError:
                return
            if len(self.packets) == self.opens_after:
                self.tcp.listen(5)
                threading.Thread(target=self.serve, daemon=True).start()

    def serve(self) -> None:
        """Echo on every connection, one at a time, until the other side has ended."""
        while True:
            try:
                link = self.tcp.accept()[0]
            except OSError:
                return
            with link:
                data = link.recv(65536)
                while data:
                    link.sendall(data)
                    data = link.recv(65536)

    def __enter__(self) -> "Door":
        return self

    def __exit__(self, *_: object) -> None:
        for each in (self.socket, self.tcp):
            try:
                each.shutdown(socket.SHUT_RDWR)  # wakes the threads
            except OSError:
                pass
            each.close()


class Addresses(Case):
    """Every address of the server gets its packet."""

    def knock_at(self, found: List[Any], *words: str) -> Any:
        """Run a knock at a name that has these addresses."""
        with mock.patch("spa_client.socket.getaddrinfo", return_value=found):
            return self.run_main("-A", "tcp/22", *KEYS, "-D", "gate", *words)

    def test_both_families(self) -> None:
        """A fresh packet for each, with our address in that family; one address once."""
        try:
            six = Receiver("::1")
        except OSError as error:
            skip(f"no IPv6 on this machine: {error}")
        with six, Receiver() as four:
            found = [(each.socket.family, 0, 0, "", each.socket.getsockname())
                     for each in (six, four, six)]
            self.assertEqual(0, self.knock_at(found)[0])
            plain = [unseal(each.packet()).split(":") for each in (six, four)]
            self.assertEqual([b"::1,tcp/22", b"127.0.0.1,tcp/22"],
                             [client.decode_base64(parts[5]) for parts in plain])
            self.assertNotEqual(plain[0][0], plain[1][0])
            self.assertTrue(six.silent() and four.silent())
            path = os.path.join(self.home, "packets")
            for _ in range(2):
                self.assertEqual((0, "", ""), self.knock_at(found, "-s", "-B", path))
                packets = [six.packet(), four.packet()]
                with open(path) as file:
                    self.assertEqual(packets, file.read().split())
                self.assertEqual(2, len(set(packets)))

    def test_test_mode(self) -> None:
        """-T looks at the way to the server for the address, and not at all when one is given."""
        with Receiver() as receiver:
            code, out, err = self.run_main("-T", "-A", "tcp/22", *KEYS, *receiver.options)
            self.assertEqual((0, "127.0.0.1,tcp/22"), (code, fields(out)["Message String"]), err)
            self.assertTrue(receiver.silent())
        with mock.patch("spa_client.socket.getaddrinfo", side_effect=AssertionError):
            self.dump(*KNOCK, *KEYS, "-D", "some.host")

    def test_one_of_two(self) -> None:
        """Sent to one is success, and a warning names the other; sent to none is none."""
        with Receiver() as receiver:
            good = (socket.AF_INET, 0, 0, "", receiver.socket.getsockname())
            bad = (socket.AF_INET, 0, 0, "", ("127.0.0.2", 9))
            real = client.open_socket

            def broken(family: int, address: Any, direct: bool = False) -> Any:
                link = real(family, address, direct)
                if address[0] == "127.0.0.1":
                    return link
                link.close()
                broken = mock.Mock()
                broken.getpeername.return_value = address
                broken.send.side_effect = OSError(1, "Not permitted")
                return broken

            with mock.patch.object(client, "open_socket", broken):
                code, _, err = self.knock_at([bad, good], "-s")
                self.assertEqual((0, "spa_client.py: warning: one address of gate got no packet: "
                                  "gate: Not permitted\n"), (code, err))
                self.assertTrue(receiver.packet())
                self.assertEqual((0, "", ""), self.knock_at([bad, good], "-s", "-q"))
                self.assertTrue(receiver.packet())
                self.assertEqual((1, "", "spa_client.py: gate: Not permitted\n"),
                                 self.knock_at([bad], "-s", "-q"))

    def test_several_names(self) -> None:
        """-n a,b: all are understood before the first packet, and a failure does not stop."""
        with Receiver() as one, Receiver() as two:
            text = "[default]\nKEY k\nALLOW_IP source\n"
            for name, receiver in (("a", one), ("B", two)):
                text += (f"[{name}]\nACCESS tcp/22\nSPA_SERVER 127.0.0.1\n"
                         f"SPA_SERVER_PORT {receiver.options[3]}\n")
            self.write(text + "[c]\nACCESS tcp/22\nSPA_SERVER nosuch.invalid\n[bad]\nACCESS 22\n"
                       "[d]\nACCESS tcp/22\n")
            for names in ("a,nosuch", "a,bad"):
                self.failure(3, "-n", names)
            self.assertEqual("[d] Must use --destination unless --test mode is used",
                             self.failure(2, "-n", "a,d"))
            self.assertIn("expected the name of a stanza",
                          self.failure(2, "-n", "a,B", "--save-rc-stanza"))
            for names in ("a,", ",", "a,,b"):
                self.assertIn("-n: expected the name of a stanza", self.failure(2, "-n", names))
            self.assertTrue(one.silent() and two.silent())
            one.socket.settimeout(TIMEOUT)
            two.socket.settimeout(TIMEOUT)
            path = os.path.join(self.home, "packets")
            self.assertEqual((0, "", ""), self.run_main("-n", "a,b", "-B", path))
            packets = [one.packet(), two.packet()]
            with open(path) as file:
                self.assertEqual(packets, file.read().split())
            self.assertEqual(2, len(set(packets)))
            with mock.patch.dict(os.environ, self.environment, clear=True), \
                    mock.patch.object(client, "tell") as tell:
                self.assertEqual(1, client.main(["-n", "c, b"]))
            self.assertRegex(tell.mock_calls[0][1][0], r"^\[c\] nosuch\.invalid: ")
            self.assertEqual([mock.call("1 of 2 knocks failed")], tell.mock_calls[1:])
            self.assertTrue(two.packet())


class Stun(Case):
    """RFC 8489."""

    def test_rfc_5769(self) -> None:
        """The sample responses."""
        self.assertEqual("192.0.2.1", client.decode_stun(STUN4, IDENTITY))
        self.assertEqual("2001:db8:1234:5678:11:2233:4455:6677",
                         client.decode_stun(STUN6, IDENTITY))

    def test_attributes(self) -> None:
        """XOR-MAPPED-ADDRESS is read; others are skipped."""
        mapped = attribute(0x0001, b"\0\1\0\0" + bytes([198, 51, 100, 7]))
        xored = xor_mapped(192, 0, 2, 1)
        plain = xored[8:]
        old = attribute(0x0005, b"\0\1\0\0" + bytes([9, 9, 9, 9]))
        for attributes, expected in (((mapped,), None), ((mapped, xored), "192.0.2.1"),
                                     ((xored, mapped), "192.0.2.1"), ((old,), None), ((), None),
                                     ((old, attribute(0x8022, b"abc"), xored), "192.0.2.1")):
            self.assertEqual(expected, client.decode_stun(response(*attributes), IDENTITY))
        nobody = xor_mapped(0, 0, 0, 0)  # in a packet it means another thing
        for wrong in (response(xored, identity=bytes(12)), response(xored, kind=0x0111),
                      response(xored, kind=0x0001), response(nobody), response(xored[:8]), b"",
                      response(attribute(0x0020, b"\0\3\0\0" + plain)), b"\1\1" * 30,
                      response(attribute(0x0020, b"\0\2\0\0" + plain))):
            self.assertIsNone(client.decode_stun(wrong, IDENTITY))

    def test_places(self) -> None:
        """Host and port."""
        for text, expected in (("a.b", ("a.b", 3478)), ("a.b:9", ("a.b", 9)),
                               ("192.0.2.1:19", ("192.0.2.1", 19)),
                               ("2001:db8::1", ("2001:db8::1", 3478)),
                               ("[2001:db8::1]", ("2001:db8::1", 3478)),
                               ("[2001:db8::1]:9", ("2001:db8::1", 9))):
            self.assertEqual(expected, client.parse_peer(text, 3478), text)
        for text in ("", ":9", "a:", "a:x", "a:70000", "[]", "[::1]:0"):
            with self.assertRaises(ValueError, msg=text):
                client.parse_peer(text, 3478)
            self.failure(2, "-A", "tcp/22", *KEYS, "-D", "127.0.0.1", "--resolve-stun", text)

    def test_asks(self) -> None:
        """The answer stands in the packet, wrong ones before it do not; also from the rc file."""
        with Receiver() as stun, Receiver() as receiver:
            place = "127.0.0.1:" + stun.options[3]
            self.write(f"[it]\nALLOW_IP stun:{place}\n")

            def answer() -> None:
                for _ in range(2):
                    question, peer = stun.socket.recvfrom(100)
                    self.assertEqual(b"\0\1\0\0" + client.STUN_MAGIC, question[:8])
                    self.assertEqual(20, len(question))
                    for identity in (bytes(12), question[8:]):
                        mapped = xor_mapped(203, 0, 113, 7 if any(identity) else 8)
                        stun.socket.sendto(response(mapped, identity=identity), peer)

            for words in (["--resolve-stun", place], ["-n", "it"]):
                thread = threading.Thread(target=answer)
                thread.start()
                self.assertEqual((0, "", ""), self.run_main(
                    "-A", "tcp/22", *KEYS, *receiver.options, *words))
                self.assertEqual(b"203.0.113.7,tcp/22", client.decode_base64(
                    unseal(receiver.packet()).split(":")[5]))
                break_off(stun, thread)

    def test_nobodys_address(self) -> None:
        """An answer that can't be is refused, and no packet sent."""
        with Receiver() as stun, Receiver() as receiver:
            def answer() -> None:
                question, peer = stun.socket.recvfrom(100)
                stun.socket.sendto(response(xor_mapped(127, 0, 0, 1), identity=question[8:]), peer)

            thread = threading.Thread(target=answer)
            thread.start()
            self.assertEqual(
                "STUN server 127.0.0.1: it says that our address is 127.0.0.1, which can't be",
                self.failure(1, "-A", "tcp/22", *KEYS, *receiver.options, "--resolve-stun",
                             "127.0.0.1:" + stun.options[3]))
            thread.join(TIMEOUT)
            self.assertTrue(receiver.silent())

    def test_no_answer(self) -> None:
        """Ask three times, then say so; report an absent server at once. Send no packet."""
        with Receiver() as stun, Receiver() as receiver, \
                mock.patch.object(client, "STUN_SECONDS", (0.05, 0.1, 0.1)):
            words = ["-A", "tcp/22", *KEYS, *receiver.options, "--resolve-stun"]
            line = self.failure(1, *words, "127.0.0.1:" + stun.options[3])
            self.assertEqual("STUN server 127.0.0.1: no answer (-a or -s need none)", line)
            self.assertEqual(1, len({stun.socket.recv(99) for _ in range(3)}))
            self.assertTrue(stun.silent())
            port = stun.options[3]
            stun.socket.close()
            self.assertIn("refused", self.failure(1, *words, "127.0.0.1:" + port))
            self.assertTrue(receiver.silent())


def break_off(receiver: Receiver, thread: threading.Thread) -> None:
    """Let a thread that waits for another question end."""
    sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sender.sendto(b"\0\1\0\0" + client.STUN_MAGIC + bytes(12), receiver.socket.getsockname())
    thread.join(TIMEOUT)
    sender.close()


class Waiting(Case):
    """--wait, --proxy and --exec on the loopback."""

    def knock(self, door: Door, *words: str, **more: Any) -> "subprocess.CompletedProcess[bytes]":
        """A knock at a door in a process of its own."""
        return self.script(["-A", "tcp/" + door.port, "-s", *KEYS, *door.options, *words], **more)

    def test_knocks_again(self) -> None:
        """Every second a fresh packet, until the port opens."""
        with Door(3) as door:
            begin = time.monotonic()
            done = self.knock(door, "--wait", "50")
            self.assertEqual((0, b""), (done.returncode, done.stderr))
            self.assertRegex(done.stdout.decode(), rf"^tcp/{door.port} of 127\.0\.0\.1 opened "
                             r"after \d+\.\d\d seconds\r?\n$")
            self.assertGreater(time.monotonic() - begin, 2.0)
            self.assertGreaterEqual(float(done.stdout.split()[5]), 2.0)
            self.assertEqual(3, len(set(door.packets)))
            self.assertEqual(1, len({tuple(unseal(packet).split(":")[5:6])
                                     for packet in door.packets}))

    def test_reasons(self) -> None:
        """Say why the port did not open; with -q, print nothing on success."""
        with Door(99) as door:
            done = self.knock(door, "--wait", "1")
            self.assertEqual((1, b""), (done.returncode, done.stdout))
            self.assertEqual(1, len(done.stderr.splitlines()))
            self.assertIn(b"did not open in 1 seconds: connections are refused.", done.stderr)
        for code, words in ((0, "nothing answers."), (113, "No route to host")):
            with mock.patch.object(client, "wait_until_open", return_value=(None, code)), \
                    Receiver() as receiver:
                self.assertIn(words, self.failure(1, *KNOCK, *KEYS, *receiver.options, "--wait",
                                                  "5"))
        with Door(1) as door:
            done = self.knock(door, "--wait", "50", "-q", "-v", "word")
            self.assertEqual((0, b"", b""), (done.returncode, done.stdout, done.stderr))

    def test_which_port(self) -> None:
        """The first TCP port of -A, or that of --wait-port."""
        for words, expected in ((["--wait", "5"], 22), (["--wait-port", "9"], 9),
                                (["--exec", "true"], 22), (["--wait", "5", "-N", "h:80"], 22),
                                (["--wait", "5", "-N", "h", "--nat-port", "99"], 99),
                                (["--wait", "5", "--nat-local", "--nat-port", "99",
                                  "--wait-port", "98"], 98)):
            settings = client.Settings(client.parse_command_line(
                ["-A", "udp/53,tcp/22,tcp/80", "-D", "gate", *words])[0])
            self.assertEqual(("gate", expected), client.find_wait_peer(settings, [], ["true"]))
        settings = client.Settings(client.parse_command_line(["-A", "tcp/22", "-D", "gate"])[0])
        self.assertIsNone(client.find_wait_peer(settings, [], []))

    def test_random_ports(self) -> None:
        """Draw and print random ports once, and keep them for all packets of a knock."""
        with Door(3) as door, mock.patch.object(client, "random_port", lambda: int(door.port)):
            code, out, err = self.run_main(
                "-A", "tcp/22", "-N", "h", "--nat-rand-port", "-s", *KEYS, *door.options,
                "--wait", "50")
            self.assertEqual((0, ""), (code, err))
            lines = out.split("\n")
            self.assertEqual(f"[+] Randomly assigned port '{door.port}' on: '0.0.0.0,tcp/"
                             f"{door.port}' will grant access to: 'h,22'", lines[0])
            self.assertRegex(lines[1], f"^tcp/{door.port} of 127.0.0.1 opened")
            self.assertEqual(["", 3], [*lines[2:], len(set(door.packets))])
            self.assertEqual({b"0.0.0.0,tcp/%d" % int(door.port)}, {
                client.decode_base64(unseal(packet).split(":")[5]) for packet in door.packets})

    def test_other_carriers(self) -> None:
        """Each second's packet goes by the carrier that was asked for."""
        with Door(99) as door, socket.socket() as tcp:
            tcp.bind(("127.0.0.1", 0))
            tcp.listen(9)
            done = self.knock(door, "--wait", "2", "-P", "tcp", "-p", str(tcp.getsockname()[1]),
                              "-B", os.path.join(self.home, "packets"))
            self.assertEqual(1, done.returncode)
            self.assertEqual([], door.packets)
            came = []
            for _ in range(2):
                with tcp.accept()[0] as link:
                    came.append(link.recv(9999).decode("ascii"))
            with open(os.path.join(self.home, "packets")) as file:
                self.assertEqual(came, file.read().split())  # -B has all of them, in their order
            self.assertEqual(2, len(set(came)))

    def test_last_arguments(self) -> None:
        """-l knocks and waits again; what came after the knock may be secret, and is not kept."""
        with Door(1) as door:
            done = self.knock(door, "--wait", "50", "-q", "--exec", python(), "-I", "-S", "-c",
                              "", "password")
            self.assertEqual((0, b"", b""), (done.returncode, done.stdout, done.stderr))
            done = self.script(["-l", *KEYS])
            self.assertEqual((0, b""), (done.returncode, done.stderr))
            self.assertIn(b" answers without a knock", done.stdout)
            done = self.script(["-l", *KEYS, "--exec", python(), "-I", "-S", "-c", "print(5)"])
            self.assertEqual(b"5", done.stdout.strip())
            with open(os.path.join(self.home, ".fwknop.run")) as file:
                text = file.read()
            self.assertIn(" --wait 50", text)
            for word in ("exec", "password", "-q", "-c"):
                self.assertNotIn(word, text)

    def test_wrong_usage(self) -> None:
        """A line that says what was expected, exit code 2, and no packet."""
        with Receiver() as receiver:
            for words, expected in (
                    (["--wait", "0"], "--wait: expected a number of seconds, 1 to 86400, not '0'"),
                    (["--wait", "x"], "--wait: expected a number of seconds"),
                    (["--wait"], "option '--wait' requires an argument"),
                    (["--wait-port", "70000"], "--wait-port: expected a port number"),
                    (["--wait", "5", "-A", "udp/53"], "no TCP port in -A to wait for (--wait-port"),
                    (["--exec", "true"], "no TCP port in -A"),
                    (["--wait", "5", "-T"], "-T sends nothing"),
                    (["--exec"], "--exec: expected a command"),
                    (["--exe"], "--exec: expected a command"),
                    (["--proxy"], "--proxy: expected HOST PORT"),
                    (["--proxy", "a"], "--proxy: expected HOST PORT"),
                    (["--proxy", "a", "22", "b"], "--proxy: expected HOST PORT"),
                    (["--proxy", "a", "ssh"], "--proxy: expected HOST PORT"),
                    (["--proxy", "a", "22", "-T"], "--proxy needs standard input"),
                    (["--proxy", "a", "22", "--save-rc-stanza"], "--proxy needs standard input"),
                    (["--proxy", "a", "22", "--nat-rand-port"], "it can't be a random one"),
                    (["--proxy", "a", "22", "--exec", "true"], "--proxy needs standard input"),
                    (["--completion", "tcsh"], "--completion: expected bash, zsh or fish")):
                ports = [] if "udp/53" in words else ["-A", "tcp/22"]
                if words == ["--exec", "true"]:
                    ports = ["-A", "udp/9"]
                self.assertIn(expected, self.failure(
                    2, *ports, "-s", *KEYS, *receiver.options, *words))
            self.failure(1, *KNOCK, *KEYS, *receiver.options, "--proxy", "nosuch.invalid", "22")
            for words in (["--wait", "5"], ["--exec", "true"], ["--proxy", "127.0.0.1", "9"]):
                self.assertIn("--destination", self.failure(2, *KNOCK, *KEYS, *words))
            self.assertTrue(receiver.silent())

    @unittest.skipIf(os.name == "nt", "no sh")
    def test_closed_standard_streams(self) -> None:
        """A relay without standard input or output is refused, before a socket takes its place."""
        with Receiver() as receiver:
            for closed in ("<&-", ">&-"):
                command = " ".join([python(), "-I", "-S", SCRIPT, *KNOCK, *KEYS, *receiver.options,
                                    "--no-rc-file", "--proxy", "127.0.0.1", "9", closed])
                done = subprocess.run(["sh", "-c", command], stderr=subprocess.PIPE,
                                      timeout=TIMEOUT)
                self.assertEqual(2, done.returncode)
                self.assertIn(b"--proxy needs standard input", done.stderr)
            self.assertTrue(receiver.silent())

    def relay(self, before: str = "", interpreter: Optional[str] = None) -> None:
        """Three megabytes through --proxy and back, and the end of the file after them."""
        text = os.urandom(3 << 20)
        with Door(1) as door:
            words = ["-A", "tcp/" + door.port, "-s", *KEYS, *door.options, "--proxy", "127.0.0.1",
                     door.port]
            command = [interpreter or python(), "-I", "-S", "-c"]
            command += [before + as_main(SCRIPT, command[0]), *words]
            done = subprocess.run(command, input=text, stdout=subprocess.PIPE, timeout=TIMEOUT,
                                  stderr=subprocess.PIPE, env=self.environment)
            self.assertEqual((0, b""), (done.returncode, done.stderr))
            self.assertTrue(text == done.stdout, len(done.stdout))

    def test_relay_on_every_python(self) -> None:
        """With all Pythons here."""
        for found in find_pythons():
            with self.subTest(str(found)):
                self.relay(interpreter=found.path)

    def test_relay_on_small_systems(self) -> None:
        """Without what OpenWrt, Debian's python3-minimal, or Windows does not have."""
        with open(os.path.join(HERE, "vectors", "openwrt_light_missing.json")) as file:
            releases = json.load(file)
        for release, lists in releases.items():
            with self.subTest(release):
                self.relay(BLOCK % sorted(set(lists["missing"]) | {"encodings.idna"}),
                           nearest_python(lists["python"]).path)
        for missing in (["hmac", "secrets", "shlex", "tempfile", "shutil", "getpass", "gettext",
                         "queue", "mmap", "resource", "termios", "ssl", "ctypes"],
                        ["pwd", "grp", "fcntl", "termios", "resource", "syslog"]):
            self.relay(BLOCK % missing)

    def test_exec(self) -> None:
        """The words behind it are the command's own; its exit code is ours."""
        code = "import sys; print(sys.argv[1:]); sys.exit(7)"
        with Door(1) as door:
            done = self.knock(door, "--exec", python(), "-I", "-S", "-c", code, "-T", "--exec",
                              "-h")
            self.assertEqual((7, b""), (done.returncode, done.stderr))
            self.assertEqual(b"['-T', '--exec', '-h']", done.stdout.strip())
        with Door(1) as door:
            done = self.knock(door, "--exec", os.path.join(self.home, "nosuch"))
            self.assertEqual((1, b""), (done.returncode, done.stdout))
            self.assertRegex(done.stderr, b"^spa_client.py: --exec: .*nosuch: No such file")

    def test_exec_leaves_no_signal_ignored(self) -> None:
        """`yes | head -1` must end: Python's own SIG_IGN is not for the command."""
        if not os.path.exists("/proc/self/status"):
            skip("no /proc")
        with Door(1) as door:
            done = self.knock(door, "--exec", "cat", "/proc/self/status")
            ignored = int(fields(done.stdout.decode().replace(":\t", ": "))["SigIgn"], 16)
            for number in (signal.SIGPIPE, signal.SIGXFSZ):
                self.assertFalse(ignored >> (number - 1) & 1, number)

    def test_exec_on_windows(self) -> None:
        """On Windows exec() would leave the console to two programs: run it, and wait."""
        with mock.patch.object(os, "name", "nt"), self.assertRaises(SystemExit) as end:
            client.become([python(), "-I", "-S", "-c", "raise SystemExit(9)"])
        self.assertEqual(9, end.exception.code)

    @unittest.skipIf(os.name == "nt", "signals are others there")
    def test_interrupted(self) -> None:
        """Ctrl-C while it waits: exit code 130, one line."""
        with Door(99) as door:
            words = ["-A", "tcp/" + door.port, "-s", *KEYS, *door.options, "--wait", "90"]
            with hearing_interrupts():
                process = subprocess.Popen([python(), "-I", "-S", SCRIPT, *words],
                                           env=self.environment, stdout=subprocess.PIPE,
                                           stderr=subprocess.PIPE)
            wait_for(lambda: door.packets or process.poll() is not None, "a knock")
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=TIMEOUT)
            self.assertEqual((130, b"", b"spa_client.py: interrupted\n"),
                             (process.returncode, out, err))

    def test_plain_knock_imports_nothing_new(self) -> None:
        """select, errno and threads are for those who wait."""
        before = ("import atexit, sys\n"
                  "atexit.register(lambda: sys.stderr.write('\\n'.join(sys.modules)))\n"
                  "known = set(sys.modules)\n")
        with Receiver() as receiver:
            done = self.script([*KNOCK, *KEYS, *receiver.options], None, before)
            self.assertTrue(receiver.packet())
        self.assertEqual(set(), set(done.stderr.decode().split()) & {
            "select", "subprocess", "signal", "threading", "socket"})


class Quiet(Case):
    """-q is for cron."""

    def test_quiet(self) -> None:
        """No warning and no note; errors stay, and so does what was asked for."""
        self.write("[default]\nKEY k\n", mode=0o644)
        with Receiver() as receiver:
            words = ["-A", "tcp/22", *receiver.options]
            code, out, err = self.run_main(*words)
            self.assertEqual((0, ""), (code, out))
            self.assertIn("permissions should only be", err)
            self.assertIn("asking to open for 127.0.0.1", err)
            self.assertEqual((0, "", ""), self.run_main(*words, "-q"))
            self.assertEqual((0, "", ""), self.run_main(*words, "--quiet", "-v", "a", "b"))
        self.assertIn("--destination", self.failure(2, "-q", "-A", "tcp/22"))
        self.assertIn("SPA Field Values:", self.run_main("-q", "-T", *KNOCK)[1])
        self.assertIn("permissions", self.run_main("-T", *KNOCK)[2])  # -q held for one run only


class Terminal:
    """A program on a terminal of its own, at which one can type."""

    def __init__(self, command: List[str], environment: Dict[str, str], directory: str) -> None:
        import pty
        code = ("import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
                "os.execvp(sys.argv[1], sys.argv[1:])")
        self.ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [python(), "-I", "-S", "-c", code, *command], stdin=theirs, stdout=theirs,
            stderr=theirs, env=environment, cwd=directory, start_new_session=True)
        os.close(theirs)
        self.shown = b""

    def type(self, keys: str) -> None:
        """Press these keys."""
        os.write(self.ours, keys.encode())

    def enter(self, line: str) -> None:
        """Type a line, and wait until the next one begins."""
        length = len(self.shown)
        self.type(line + "\r")
        self.wait(lambda: b"\n" in self.shown[length:])

    def press(self, keys: str, shown: str) -> None:
        """Press these keys, each second again, until this is shown: ^C may take keys away."""
        begin, times = time.monotonic(), 0

        def look() -> bool:
            nonlocal times
            if time.monotonic() >= begin + times:
                self.type(keys)
                times += 1
            return shown.encode() in self.shown

        self.wait(look)

    def wait(self, done: Callable[[], bool]) -> None:
        """Read what it prints until something is done."""
        def look() -> bool:
            if select.select([self.ours], [], [], 0)[0]:
                try:
                    self.shown += os.read(self.ours, 65536)
                except OSError:  # how a terminal ends on Linux
                    raise AssertionError(self.shown) from None
            return done()

        wait_for(look, lambda: f"the end of {self.shown!r}")

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.ours)


class Documents(Case):
    """The texts made from the table of options."""

    def test_examples(self) -> None:
        """Each line of --help is a command line that is understood."""
        lines = [line.partition("spa_client.py ")[2].partition(" && ")[0].rstrip('"')
                 for line in client.EXAMPLES.split("\n") if "spa_client.py" in line]
        self.assertEqual(6, len(lines))
        for line in lines:
            given, others, command = client.parse_command_line(line.split())
            self.assertEqual("gate", given["named_config"].text)
            self.assertEqual("relay" in given, others == ["%h", "%p"])
            self.assertEqual("exec" in given, command == ["ssh", "gate"])

    def test_man(self) -> None:
        """Every option that can be used, and no complaint of a formatter."""
        code, page, err = self.run_main("--man")
        self.assertEqual((0, ""), (code, err))
        plain = page.replace("\\-", "-")
        for option in client.OPTIONS:
            self.assertIn(option.format("").strip(), plain)
        for text in ('.TH SPA_CLIENT 1', "crontab", "130 interrupted", "It speaks fwknop's"):
            self.assertIn(text, plain)
        self.assertEqual([], manual_complaints(page))

    def test_ssh_config(self) -> None:
        """ssh reads what we mean, and its shell too, wherever the files are."""
        gate = ("[gate]\nKEY k\nHMAC_KEY h\nALLOW_IP source\nACCESS udp/53,tcp/2222,tcp/22\n"
                "SPA_SERVER 192.0.2.1\n[nat]\nKEY k\nACCESS tcp/22\nNAT_PORT 2022\n"
                "SPA_SERVER fe80::1%eth0\n[udp]\nKEY k\nACCESS udp/53\nSPA_SERVER gate\n")
        hostile = ("$(id)", "`id`", "a|id", "-oProxyCommand=id", "a&id", "a'b")
        self.write(gate + "".join(f"[evil{number}]\nKEY k\nACCESS tcp/22\nSPA_SERVER {host}\n"
                                  for number, host in enumerate(hostile)))
        odd = os.path.join(self.home, "a 'b' $HOME;%h")
        os.mkdir(odd)
        shutil.copy(SCRIPT, os.path.join(odd, "spa_client.py"))
        script, rc = os.path.join(odd, "spa_client.py"), write(os.path.join(odd, "rc"), gate)
        for name, host, port, options in (("gate", "192.0.2.1", "2222", []),
                                          ("nat", "fe80::1%eth0", "2022", ["--rc-file", rc])):
            done = subprocess.run([python(), script, *options, "--print-ssh-config", name],
                                  env=self.environment, stdout=subprocess.PIPE, timeout=TIMEOUT)
            config = write(self.place("config"), done.stdout)
            self.assertEqual([b"Host %s" % name.encode(), b"    Port %s" % port.encode()],
                             done.stdout.splitlines()[::2])
            command = done.stdout.decode().partition("ProxyCommand ")[2].strip()
            if shutil.which("ssh"):
                said = subprocess.run(["ssh", "-G", "-F", config, name], stderr=subprocess.PIPE,
                                      stdout=subprocess.PIPE,
                                      universal_newlines=True, timeout=TIMEOUT).stdout.split("\n")
                for line in (f"hostname {host}", f"port {port}", f"proxycommand {command}"):
                    self.assertIn(line, said)
            expanded = "%".join(part.replace("%h", host).replace("%p", port)
                                for part in command.split("%%"))
            words = subprocess.run(["sh", "-c", r"printf '%s\n' " + expanded],
                                   stdout=subprocess.PIPE, universal_newlines=True).stdout
            self.assertEqual([python(), script, *options, "-q", "-n", name, "--proxy", host, port],
                             words.splitlines())
        evil = [(f"evil{number}", 3, "SPA_SERVER: expected a name or an address for ssh")
                for number in range(len(hostile))]
        for name, code, error in (*evil, ("udp", 3, r"\[udp\]: expected SPA_SERVER, and a TCP"),
                                  ("a,b", 2, "expected a name of letters"), ("-n", 2, "a name of"),
                                  ("foo", 3, r"\[foo\] was not found")):
            found, out, err = self.run_main("--print-ssh-config=" + name)
            self.assertEqual((code, ""), (found, out), err)
            self.assertRegex(err, error)

    def completions(self, shell: str, script: str) -> List[str]:
        """Return the output of a shell for a script that follows our completions."""
        if not shutil.which(shell):
            skip(f"{shell} is not here")
        write(self.place("spa_client.py"),
              f'#!/bin/sh\nexec {python()} -I -S {compiled(SCRIPT, python())} "$@"\n', 0o755)
        environment = dict(self.environment, PATH=self.home + ":" + os.environ["PATH"])
        text = self.run_main("--completion", shell)[1]
        done = subprocess.run([shell, "-c", text + script], env=environment, cwd=self.home,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=TIMEOUT)
        self.assertEqual((0, b""), (done.returncode, done.stderr))
        return done.stdout.decode().split()

    def test_completion(self) -> None:
        """Options by their beginning, stanzas behind -n; names are not run as commands."""
        self.write("[gate]\nKEY k\n[garden]\nKEY k\n[$(touch${IFS}evil)]\nKEY k\n[other]\nKEY k\n")
        ask = ("COMPREPLY=(); _spa_client spa_client.py '%s' '%s'; echo ${COMPREPLY[@]}\n" * 3) % (
            "--wa", "", "ga", "-n", "$", "-n")
        expected = ["--wait", "--wait-port", "gate", "garden", r"\$\(touch\$\{IFS\}evil\)"]
        with self.subTest("bash"):
            self.assertEqual(expected, self.completions("bash", "\n" + ask))
        with self.subTest("zsh"):
            stubs = "autoload -U +X compinit && compinit -u -D\n"
            text = self.run_main("--completion", "zsh")[1]
            self.assertTrue(text.startswith("autoload"))
            if not shutil.which("zsh"):
                skip("zsh is not here")
            self.completions("bash", "")  # makes the program
            environment = dict(self.environment, PATH=self.home + ":" + os.environ["PATH"])
            done = subprocess.run(["zsh", "-f", "-c", stubs + text + ask],
                                  env=environment, cwd=self.home, stdout=subprocess.PIPE,
                                  stderr=subprocess.PIPE, timeout=TIMEOUT)
            self.assertEqual((0, b""), (done.returncode, done.stderr))
            found = set(done.stdout.decode().split())  # zsh itself drops options that don't match
            self.assertEqual(set(expected), {word for word in found if word[0] != "-"
                                             or word.startswith("--wa")})
        with self.subTest("fish"):
            self.assertEqual(
                ["--wait", "--wait-port", "gate", "garden"],
                [line.split("\t")[0] for line in "\n".join(self.completions(
                    "fish", "\ncomplete -C 'spa_client.py --wa' | string replace -r '\\t.*' ''\n"
                    "complete -C 'spa_client.py -n ga' | sort -r\n")).splitlines()])
        self.assertFalse(os.path.exists(os.path.join(self.home, "evil")))

    NAMES = ["we ird  name", "do$(touch evil)", "back`touch evil`", "it's $(touch evil) isn't",
             'quo"te $(touch evil) "', "semi;touch evil", "amp&touch evil", "less>evil", "tilde~*?"]

    @needs_programs("bash")  # a peer, of which all Pythons have the same
    def test_completed_names(self) -> None:
        """Typed at the shells themselves: a name is one word, and never a command."""
        self.write("".join(f"[{name}]\nKEY k\n" for name in self.NAMES))
        program = self.write(
            '#!/bin/sh\n[ "$1" = --stanza-list ] && '
            f'exec {python()} -I -S {compiled(SCRIPT, python())} "$@"\n'
            'printf "%s\\n" "$@" >$LOG.new; mv $LOG.new $LOG\n', "spa_client.py", 0o700)
        environment = dict(self.environment, TERM="dumb", ZDOTDIR=self.home,
                           PATH=os.path.dirname(program) + ":" + os.environ["PATH"])
        for shell, words, begin in (
                ("bash", ["--norc", "--noprofile", "-i"], ""),
                ("zsh", ["-f", "-i"], "autoload -U compinit && compinit -D -u; "),
                ("fish", ["--no-config", "-i"], "")):
            with self.subTest(shell):
                if not shutil.which(shell):
                    skip(f"{shell} is not here")
                completion = self.write(self.run_main("--completion", shell)[1], "completion")
                environment["LOG"] = log = os.path.join(self.home, "log-" + shell)
                with Terminal([shell, *words], environment, self.home) as terminal:
                    terminal.type(f"{begin}source {completion}; echo rea''dy\r")
                    terminal.wait(lambda: b"ready" in terminal.shown)
                    for name in self.NAMES:
                        terminal.type(f"spa_client.py -n {name[:2]}\t\r")
                        terminal.wait(partial(os.path.exists, log))
                        with open(log) as file:
                            self.assertEqual(f"-n\n{name}\n", file.read())
                        os.unlink(log)
                    for number, name in enumerate(self.NAMES * 2):
                        quote = "'\""[number % 2]  # what is offered there need not be the name
                        terminal.enter(f"spa_client.py -n {quote}{name[:2]}\t")
                        terminal.press(f"\x03\recho en''d{number}\r", f"end{number}\r")
                self.assertFalse(os.path.exists(os.path.join(self.home, "evil")))


if __name__ == "__main__":
    unittest.main()
