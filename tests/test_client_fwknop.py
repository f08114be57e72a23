"""Tests of what fwknop's client can do beyond the plain knock: NAT, commands, carriers, GPG, our
own address, files."""

import _socket
import contextlib
import json
import os
import shlex
import shutil
import socket
import ssl
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from typing import Any, List, Tuple
from unittest import mock

import spa_client as client
from tests.support import (TIMEOUT, find_pythons, needs_programs, needs_root, skip, wait_for)
from tests.test_client import (BLOCK, HERE, HMAC_KEY, KEY, KEYS, KNOCK, SCRIPT, Case, Receiver,
                               fields, python, unseal)

# A server named localhost with a certificate that it signed itself; the key is nobody's secret.
CERTIFICATE = """
-----BEGIN CERTIFICATE-----
MIIBbTCCARSgAwIBAgIBATAKBggqhkjOPQQDAjAUMRIwEAYDVQQDDAlsb2NhbGhv
c3QwIBcNMjAwMTAxMDAwMDAwWhgPMjEyMDAxMDEwMDAwMDBaMBQxEjAQBgNVBAMM
CWxvY2FsaG9zdDBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABHXc4OBHLL2dxEGs
6Cm8RFrXRkKtrgGZJeL4qDNyIYEVfmLtQZ4ADDvq6pAj0jkxxjHlWm5/myqVO97i
ijU8UmWjVTBTMBQGA1UdEQQNMAuCCWxvY2FsaG9zdDAPBgNVHRMBAf8EBTADAQH/
MAsGA1UdDwQEAwIChDAdBgNVHQ4EFgQUJWV6xPn6Gou7+OuMYFfAVRqclEkwCgYI
KoZIzj0EAwIDRwAwRAIgc9/O1DcGBBkS/6r+ii4KPmUEvgaTzGZGOb9JaR9Pu5wC
IAE6EM2Bnp+gWmjR4DWd+3xomUiX+5ah4hbXVHFp1sEE
-----END CERTIFICATE-----
"""
CERTIFICATE_KEY = """
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgw8dfpSPl8XPoHIRS
n2ENY1fY32bVNm/OwNwsRbY9AXehRANCAAR13ODgRyy9ncRBrOgpvERa10ZCra4B
mSXi+KgzciGBFX5i7UGeAAw76uqQI9I5McYx5Vpuf5sqlTve4oo1PFJl
-----END PRIVATE KEY-----
"""


class WebServer:
    """A web server on the loopback that says the same to everybody and remembers what it read."""

    def __init__(self, body: bytes, status: str = "200 OK", certificate: str = "") -> None:
        self.answer = b"HTTP/1.1 %s\r\nContent-Type: text/plain\r\n\r\n%s" % (
            status.encode(), body)
        self.context = None  # type: Any
        if certificate:
            self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self.context.load_cert_chain(certificate)
            self.answer = self.answer.replace(b"\r\n\r\n", b"\r\nContent-Length: %d\r\n\r\n"
                                              % len(body), 1)
        self.requests = []  # type: List[bytes]
        self.listener = socket.socket()
        self.listener.bind(("127.0.0.1", 0))
        self.listener.listen(5)
        self.port = self.listener.getsockname()[1]
        self.thread = threading.Thread(target=self.serve, daemon=True)
        self.thread.start()

    def serve(self) -> None:
        """Answer until the listener is closed."""
        while True:
            try:
                peer = self.listener.accept()[0]
            except OSError:
                return
            peer.settimeout(TIMEOUT)
            try:
                if self.context:
                    peer = self.context.wrap_socket(peer, server_side=True)
                data = b""
                while not data.endswith(b"\r\n\r\n"):
                    piece = peer.recv(4096)
                    if not piece:
                        break
                    data += piece
                self.requests.append(data)
                peer.sendall(self.answer)
            except OSError:
                pass
            finally:
                peer.close()

    def url(self, scheme: str = "http", host: str = "127.0.0.1", path: str = "/ip") -> str:
        """Return the URL of this server."""
        return f"{scheme}://{host}:{self.port}{path}"

    def request(self) -> List[str]:
        """The lines of the only request; the client may have ended before it was read here."""
        wait_for(lambda: self.requests, "a request")
        assert len(self.requests) == 1, self.requests
        return self.requests[0].decode("ascii").split("\r\n")

    def __enter__(self) -> "WebServer":
        return self

    def __exit__(self, *_: Any) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.thread.join(TIMEOUT)


class Messages(Case):
    """The packets that the options ask for."""

    def test_vectors_from_their_options(self) -> None:
        """Each packet of the real client, byte for byte, from the options that made it."""
        with open(os.path.join(HERE, "vectors", "fwknop.json")) as file:
            vectors = json.load(file)["vectors"]
        numbers = set()
        for vector in vectors:
            decoded = vector["decoded"]
            words = shlex.split(vector["client_args"])
            for name, option in (("key", "rijndael"), ("key_base64", "base64-rijndael"),
                                 ("hmac_key", "hmac"), ("hmac_key_base64", "base64-hmac")):
                if vector[name] is not None and (vector["hmac_type"] or "hmac" not in name):
                    words = [f"--key-{option}={vector[name]}"] + words
            if "-M" not in words and vector["mode"] != "Asymmetric":
                words += ["-M", vector["mode"]]
            if vector["hmac_type"]:
                words += ["--hmac-digest-type", vector["hmac_type"]]
            if vector["mode"] == "Asymmetric":
                cipher = client.decode_base64(vector["full_b64"][:-len(vector["hmac"] or "")
                                                                 or None])
                given = []  # type: List[bytes]
                gpg = mock.patch.object(  # type: Any
                    client, "encrypt_gpg", lambda _, plain, __, given=given,
                                        cipher=cipher: given.append(plain) or cipher)
            else:
                gpg = contextlib.ExitStack()
            port = int(decoded["message"].rpartition("/")[2]) if "--nat-rand-port" in words else 0
            now = decoded["timestamp"] - client.parse_offset(
                words[words.index("--time-offset-plus") + 1]
                if "--time-offset-plus" in words else "0")
            self.environment = dict({"HOME": self.home, "LOGNAME": "root"}, **vector["env"])
            with self.subTest(vector["name"]), gpg, \
                    mock.patch.object(client, "random_digits", lambda d=decoded: d["rand"]), \
                    mock.patch.object(client, "random_port", lambda port=port: port), \
                    mock.patch.object(time, "time", lambda now=now: now), \
                    mock.patch.object(os, "urandom", lambda _, d=decoded: bytes.fromhex(
                        d.get("salt", ""))):
                shown = self.dump("-D", "127.0.0.1", "--no-rc-file", *words)
                self.assertEqual(vector["packet"], shown["Final SPA Data"])
                self.assertEqual(decoded["encoded"], shown["Encoded Data"])
                if vector["mode"] == "Asymmetric":
                    self.assertEqual(decoded["plaintext"], given[0].decode("ascii"))
                numbers.add(decoded["msg_type"])
        self.assertGreaterEqual(numbers, {0, 1, 2, 3, 4, 5, 6})

    def test_types(self) -> None:
        """The type, the text and the NAT field for each way to ask (fwknop.md 1.4, 1.5)."""
        here = ["-D", "gate.example"]
        for words, number, text, nat in (
                (["-A", "tcp/22"], 1, "tcp/22", "<NULL>"),
                (["-A", "tcp/22", "-N", "h"], 2, "tcp/22", "h,22"),
                (["-A", "tcp/00022", "-N", "h"], 2, "tcp/00022", "h,22"),
                (["-A", "tcp/22,udp/53", "-N", "1.2.3.4:80"], 2, "tcp/22,udp/53", "1.2.3.4,80"),
                (["-A", "tcp/22", "-N", "h,80", "--nat-port", "9"], 2, "tcp/9", "h,80"),
                (["-A", "udp/22", "-N", "h", "--nat-port", "9"], 2, "udp/9", "h,22"),
                (["-A", "tcp/22", "--nat-port", "9"], 1, "tcp/9", "<NULL>"),
                (["-A", "tcp/22", "-N", "2001:DB8::1"], 2, "tcp/22", "2001:DB8::1,22"),
                (["-A", "tcp/22", "-N", "[2001:db8::1]:80"], 2, "tcp/22", "2001:db8::1,80"),
                (["-A", "tcp/22", "-N", "[::1]"], 2, "tcp/22", "::1,22"),
                (["-A", "tcp/22", "-N", "::1,80"], 2, "tcp/22", "::1,80"),
                (["-A", "tcp/22", "--nat-local", *here], 5, "tcp/22", "gate.example,22"),
                (["-A", "tcp/22", "--nat-local", "-N", "h:5", *here], 5, "tcp/22", "h,5"),
                (["-C", "ls -l /"], 0, "ls -l /", "<NULL>"),
                (["-C", "a,b/c", "-A", "tcp/22"], 0, "a,b/c", "<NULL>")):
            for timeout in (0, 7):
                with self.subTest(words=words, timeout=timeout):
                    shown = self.dump(*words, "-a", "192.0.2.7", "-f", str(timeout), *KEYS)
                    timed = {1: 3, 2: 4, 5: 6, 0: 0}[number] if timeout else number
                    self.assertEqual(f"{timed} ({client.MESSAGE_TYPES[timed]})",
                                     shown["Message Type"])
                    self.assertEqual("192.0.2.7," + text, shown["Message String"])
                    self.assertEqual(nat, shown["Nat Access"])
                    self.assertEqual(str(timeout), shown["Client Timeout"])
                    parts = shown["Encoded Data"].split(":")
                    self.assertEqual(6 + (nat != "<NULL>") + (timed in (3, 4, 6)), len(parts))

    def test_directives(self) -> None:
        """NAT and a random port, from the rc file."""
        self.write("[default]\nACCESS tcp/22\nALLOW_IP 192.0.2.7\nKEY k\nNAT_ACCESS h:80\n"
                   "NAT_LOCAL Y\nNAT_PORT 99\nFW_TIMEOUT 5\nTIME_OFFSET -2m\n[r]\nNAT_LOCAL N\n"
                   "RAND_PORT Y\nNAT_RAND_PORT Y\nVERBOSE Y\n")
        shown = self.dump()
        self.assertEqual(("6 (Client timeout local NAT access msg)", "h,80", "192.0.2.7,tcp/99"),
                         (shown["Message Type"], shown["Nat Access"], shown["Message String"]))
        self.assertAlmostEqual(int(shown["Timestamp"]), time.time() - 120, delta=5)
        with mock.patch.object(client, "random_port", lambda: 12345):
            _, out, _ = self.run_main("-T", "-n", "r")
        shown = fields(out)
        self.assertEqual("12345", shown["destination port"])
        self.assertEqual("192.0.2.7,tcp/12345", shown["Message String"])
        self.assertTrue(out.startswith(
            "[+] Randomly assigned port '12345' on: '192.0.2.7,tcp/12345' will grant access to: "
            "'h,80'\n"), out)

    def test_random_ports(self) -> None:
        """From 10000 to the last one, and not always the same."""
        ports = {client.random_port() for _ in range(300)}
        self.assertGreater(len(ports), 250)
        self.assertTrue(all(10000 <= port <= 65535 for port in ports))
        for number, port in ((0, 10000), (55535, 65535), (55536, 10000)):
            with mock.patch.object(os, "urandom", lambda n, k=number: k.to_bytes(n, "big")):
                self.assertEqual(port, client.random_port())

    def test_bad_input(self) -> None:
        """Refuse nonsense with one line and exit code 2; send and write nothing."""
        packet = os.path.join(self.home, "packet")
        with Receiver() as receiver:
            for words, expected in (
                    (["-N", ""], "-N: expected a host"), (["-N", "h:0"], "expected a port"),
                    (["-N", "h:99999"], "expected a port number"), (["-N", "a b"], "a host"),
                    (["-N", "h,1,2"], "expected a host"), (["-N", "h/8"], "expected a host"),
                    (["-N", "x" * 71], "expected a host"), (["-N", "1::x"], "IPv6 address"),
                    (["-N", "h:"], "expected a port"), (["-N", ":5"], "expected a host"),
                    (["--nat-port", "0"], "expected a port"),
                    (["--nat-port", "5", "-A", "tcp/1,tcp/2"], "NAT for multiple ports"),
                    (["--nat-rand-port", "-A", "tcp/1,tcp/2"], "NAT for multiple ports"),
                    (["-C", ""], "-C: expected text"), (["-C", " "], "expected text"),
                    (["-C", "a\nb"], "expected text"),
                    (["-C", "ls", "-N", "h"], "a server command knows no NAT"),
                    (["-C", "ls", "--nat-local"], "a server command knows no NAT"),
                    (["-Q", "1.2.3.4"], "Must set -P <udpraw|tcpraw|icmp>"),
                    (["-P", "tcp", "-Q", "1.2.3.4"], "Must set -P <udpraw|tcpraw|icmp>"),
                    (["-P", "icmp", "-Q", "host"], "expected an IPv4"),
                    (["-P", "icmp", "-Q", "::1"], "expected an IPv4"),
                    (["-P", "icmp", "-6"], "the raw carriers know only IPv4"),
                    (["--icmp-type", "41"], "a type of ICMP, 0 to 40"),
                    (["--icmp-code", "16"], "a code of ICMP, 0 to 15"),
                    (["-S", "0"], "expected a port"),
                    (["-H", "proxy", "-P", "tcp"], "Cannot set --http-proxy with a non-HTTP"),
                    (["-H", "http://a:b@proxy"], "-H: expected a"),
                    (["-u", "a\r\nX: y"], "-u: expected text"),
                    (["--resolve-url", "ftp://x"], "expected a URL"),
                    (["--resolve-url", "http://x/a b"], "expected a URL"),
                    (["--resolve-url", "http://a@x/"], "expected a host"),
                    (["-g"], "Must specify --gpg-recipient-key"),
                    (["-M", "asymmetric"], "Must specify --gpg-recipient-key"),
                    (["-b"], "-b needs -B")):
                with self.subTest(words):
                    line = self.failure(2, *KNOCK, *KEYS, *receiver.options, "-B", packet, *words) \
                        if words != ["-b"] else self.failure(2, *KNOCK, *KEYS, *words,
                                                             *receiver.options)
                    self.assertIn(expected, line)
            self.assertTrue(receiver.silent())
        self.assertIn("needs -D or -N", self.failure(2, "-T", *KNOCK, *KEYS, "--nat-local"))
        self.assertIn("needs -D", self.failure(2, "-T", *KNOCK, *KEYS, "-H", "proxy"))
        self.assertIn("Must use one of [-s|-R|-a]", self.failure(
            2, "-A", "tcp/1", *KEYS, "-P", "icmp", "-Q", "1.2.3.4", "-D", "127.0.0.1"))
        self.assertEqual([], os.listdir(self.home))

    def test_bad_directives(self) -> None:
        """File, line, name and what was expected; exit code 3."""
        path = os.path.join(self.home, ".fwknoprc")
        for line, expected in (
                ("NAT_ACCESS h:x", "expected a port number"), ("NAT_PORT 0", "expected a port"),
                ("NAT_LOCAL 5", "expected Y or N"), ("SPA_SERVER_PROTO sctp", "expected one of"),
                ("SPA_SOURCE_PORT x", "expected a port"), ("USE_GPG x", "expected Y or N"),
                ("SPOOF_SOURCE_IP h", "expected an IPv4"), ("RESOLVE_URL x", "expected a URL"),
                ("GPG_SIGNING_PW_BASE64 *", "expected base64"), ("RAND_PORT 5", "Y or N"),
                ("HTTP_USER_AGENT \x01", "expected text"), ("NO_SAVE_ARGS 7", "expected Y or N")):
            with self.subTest(line):
                self.write("[default]\n" + line + "\n")
                found = self.failure(3, "-T", *KNOCK, *KEYS)
                self.assertTrue(found.startswith(f"{path}:2: {line.split()[0]}: "), found)
                self.assertIn(expected, found)

    def test_long_command(self) -> None:
        """The longest that fits, and what is said of a longer one."""
        self.assertEqual(396, len(self.dump("-C", "x" * 112, "-s", *KEYS)["Final SPA Data"]))
        line = self.failure(1, "-T", "-C", "x" * 140, "-s", *KEYS)
        self.assertIn("address and command are 148 characters", line)

    @needs_programs("fwknop")
    def test_like_the_real_client(self) -> None:
        """-T and -v of every type, line by line, but for what differs in every packet."""
        varies = ("Random Value", "Timestamp", "Encoded Data", "SPA Data Digest", "HMAC",
                  "Final SPA Data", "Username")
        with Receiver() as receiver:
            sent = ["-v", *receiver.options]
            for words in (["-N", "1.2.3.4"], ["-N", "h.example:99", "-f", "7"],
                          ["-N", "h,80", "--nat-port", "2222"], ["--nat-port", "2222"],
                          ["--nat-local", "-D", "localhost"], ["--nat-local", "-N", "h", "-f", "4"],
                          ["-C", "ls -l", "-f", "60"], ["-C", "ls", "-m", "md5"],
                          ["-N", "1.2.3.4", *sent], ["-C", "date", *sent], ["-f", "9", *sent]):
                with self.subTest(words):
                    words = ["--no-rc-file", "--no-save-args", *KNOCK, *KEYS, *words]
                    words += [] if "-v" in words else ["-T"]
                    real = subprocess.run(["fwknop"] + words, stdout=subprocess.PIPE, check=True,
                                          env=self.environment).stdout.decode("ascii")
                    ours = self.run_main(*words)[1]
                    self.assertEqual(len(real.splitlines()), len(ours.splitlines()))
                    for one, two in zip(ours.splitlines(), real.splitlines()):
                        if one.partition(": ")[0].strip() in varies:
                            self.assertEqual((one[:17], len(one)), (two[:17], len(two)))
                        else:
                            self.assertEqual(two, one)

    @needs_programs("fwknop")
    def test_a_verbose_test_looks_like_that_of_the_real_client(self) -> None:
        """-T -v: where it would go, and the second dump, whose packet has no HMAC."""
        words = ["--no-rc-file", "--no-save-args", *KNOCK, *KEYS, "-T", "-v", "-D", "127.0.0.1",
                 "-S", "40000"]
        real = subprocess.run(["fwknop"] + words, stdout=subprocess.PIPE, check=True,
                              env=self.environment).stdout.decode("ascii")
        ours = self.run_main(*words)[1]
        for begin, end in (("\nGenerating", "   Random Value"),
                           ("   FKO Version", "   Encoded Data")):
            one, two = [text[text.index("\nGenerating"):] for text in (real, ours)]
            self.assertEqual(*[text[text.index(begin):text.index(end)] for text in (one, two)])
        self.assertEqual(*[[len(line) for line in text.splitlines()] for text in (real, ours)])


def add_up(data: bytes) -> int:
    """The sum of the 16-bit words of data in one's complement; 0xFFFF where the checksum is right.
    """
    total = 0
    for word, in struct.iter_unpack(">H", data + b"\0" * (len(data) % 2)):
        total += word
        total = (total & 0xFFFF) + (total >> 16)
    return total


class Carriers(Case):
    """The bytes around a packet."""

    ADDRESSES = socket.inet_aton("192.0.2.1") + socket.inet_aton("198.51.100.2")

    def encode(self, carrier: str, payload: bytes, *more: Any) -> Tuple[bytes, bytes]:
        """The header behind that of IPv4, which is checked, and what follows it."""
        data = client.encode_raw(carrier, payload, self.ADDRESSES, (1234, 62201), *more)
        (version, _, length, _, fragment, ttl, protocol, _) = struct.unpack(">BBHHHBBH", data[:12])
        self.assertEqual((0x45, len(data), 0, 255), (version, length, fragment, ttl))
        self.assertEqual({"icmp": 1, "udpraw": 17, "tcpraw": 6}[carrier], protocol)
        self.assertEqual(self.ADDRESSES, data[12:20])
        self.assertEqual(0xFFFF, add_up(data[:20]))
        pseudo = data[12:20] + struct.pack(">BBH", 0, protocol, len(data) - 20)
        self.assertEqual(0xFFFF, add_up((b"" if carrier == "icmp" else pseudo) + data[20:]))
        self.assertEqual(payload, data[len(data) - len(payload):])
        return data[20:len(data) - len(payload)], payload

    def test_raw(self) -> None:
        """Fields, and checksums of even and odd and awkward payloads."""
        for payload in (b"x" * 204, b"x" * 205, b"", b"\xff" * 1500, os.urandom(333)):
            head, _ = self.encode("udpraw", payload)
            self.assertEqual((1234, 62201, 8 + len(payload)), struct.unpack(">HHH", head[:6]))
            head, _ = self.encode("tcpraw", payload)
            self.assertEqual((1234, 62201, 1, 0, 0x50, 2, 32767),
                             struct.unpack(">HHIIBBH", head[:16]))
            self.assertEqual(20, len(head))
            for icmp, number in (((0, 0), (0, 0)), ((8, 0), (1234, 1)), ((3, 13), (0, 0))):
                head, _ = self.encode("icmp", payload, icmp)
                self.assertEqual(icmp + number, struct.unpack(">BBxxHH", head))

    def test_udp_checksum_is_never_zero(self) -> None:
        """RFC 768: zero would mean that there is none."""
        head, _ = self.encode("udpraw", b"\0\0")
        rest = 0xFFFF - struct.unpack(">H", head[6:8])[0]
        payload = struct.pack(">H", 0xFFFF - rest)
        head, _ = self.encode("udpraw", payload)
        self.assertEqual(b"\xff\xff", head[6:8])

    def test_http(self) -> None:
        """A GET that fwknopd understands, with its + and / translated; no answer is needed."""
        with WebServer(b"") as web:
            self.assertEqual((0, "", ""), self.run_main(
                *KNOCK, *KEYS, "-P", "http", "-D", "127.0.0.1", "-p", str(web.port),
                "-B", os.path.join(self.home, "packet")))
            with open(os.path.join(self.home, "packet")) as file:
                packet = file.read().strip()
            self.assertEqual(
                ["GET /{} HTTP/1.1".format(packet.replace("+", "-").replace("/", "_")),
                 "User-Agent: Fwknop/2.6.10", "Accept: */*", "Host: 127.0.0.1",
                 "Connection: close", "", ""], web.request())
        for words, line in (([], ""), (["-D", "::1"], "\nHost: [::1]\n"),
                            (["-D", "h", "-H", "proxy"], "\nGET http://h/")):
            out = self.run_main("-T", "-v", *KNOCK, *KEYS, "-P", "http", *words)[1]
            self.assertIn(line, out)  # the request that would go
            self.assertEqual(bool(line), "GET " in out)

    def test_proxy(self) -> None:
        """The proxy gets the server's name, which is not looked up here; it answers first."""
        for words, target in ((["-H", "127.0.0.1:%d"], "http://spa.example/"),
                              (["-H", "http://127.0.0.1:%d/", "-P", "http"], "http://spa.example/"),
                              (["-H", "127.0.0.1", "-p", "%d"], "http://spa.example/"),
                              (["-H", "127.0.0.1:%d", "-p", "81"], "http://spa.example:81/"),
                              (["-H", "127.0.0.1:%d", "-D", "::1"], "http://[::1]/")):
            with self.subTest(words), WebServer(b"") as web:
                words = [word.replace("%d", str(web.port)) for word in words]
                self.assertEqual((0, "", ""), self.run_main(
                    *KNOCK, *KEYS, "-D", "spa.example", "-u", "some agent", *words))
                lines = web.request()
                self.assertTrue(lines[0].startswith("GET " + target), lines)
                self.assertIn("User-Agent: some agent", lines)

    def test_a_proxy_without_an_answer(self) -> None:
        """Warn of a proxy that closes, resets or is silent: the packet has left already."""
        reset = struct.pack("ii", 1, 0)  # SO_LINGER: on, for no time
        for option in (b"", reset, None):
            with self.subTest(option), socket.socket() as listener, \
                    mock.patch.object(client, "NETWORK_SECONDS", 0.3 if option is None else 10):
                listener.bind(("127.0.0.1", 0))
                listener.listen(1)
                came = []  # type: List[bytes]

                def serve(listener: Any, option: Any, came: List[bytes]) -> None:
                    with listener.accept()[0] as peer:
                        while not came or not came[0].endswith(b"\r\n\r\n"):
                            came[:] = [b"".join(came) + peer.recv(4096)]
                        if option:
                            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, option)
                        elif option is None:
                            peer.recv(1)  # until the client has had enough

                thread = threading.Thread(target=serve, args=(listener, option, came), daemon=True)
                thread.start()
                self.assertEqual((0, "", "spa_client.py: warning: the proxy did not answer: it may"
                                  " not have passed the packet on\n"), self.run_main(
                    *KNOCK, *KEYS, "-D", "h", "-H", f"127.0.0.1:{listener.getsockname()[1]}"))
                thread.join(TIMEOUT)
                self.assertTrue(came[0].startswith(b"GET http://h/"))

    def test_a_web_server_without_an_answer(self) -> None:
        """Do not wait for an answer, as fwknop does not."""
        with WebServer(b"") as web:
            web.answer = b""
            self.assertEqual((0, "", ""), self.run_main(
                *KNOCK, *KEYS, "-P", "http", "-D", "127.0.0.1", "-p", str(web.port)))
            self.assertIn("GET /", web.request()[0])

    def test_tcp(self) -> None:
        """The packet and nothing else."""
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen(1)
            options = ["-D", "127.0.0.1", "-p", str(listener.getsockname()[1]), "-P", "tcp"]
            code, out, _ = self.run_main(*KNOCK, *KEYS, "-v", *options)
            peer = listener.accept()[0]
            data = b""
            while True:
                piece = peer.recv(4096)
                if not piece:
                    break
                data += piece
            peer.close()
        self.assertEqual(0, code)
        self.assertEqual(fields(out)["Final SPA Data"], data.decode("ascii"))
        self.assertIn(f"send_spa_packet: bytes sent: {len(data)}\n", out)
        self.assertIn("Connection refused", self.failure(1, *KNOCK, *KEYS, *options))

    def test_next_address(self) -> None:
        """Over TCP, warn of an address that refuses, and send to the next one."""
        with WebServer(b"") as web:
            found = [(socket.AF_INET, 0, 0, "", ("127.0.0.2", 1)),
                     (socket.AF_INET, 0, 0, "", ("127.0.0.1", web.port))]
            with mock.patch("spa_client.socket.getaddrinfo", return_value=found):
                self.assertEqual((0, "", "spa_client.py: warning: one address of h got no packet: "
                                  "h: Connection refused\n"), self.run_main(
                    *KNOCK, *KEYS, "-P", "http", "-D", "h"))
            self.assertIn("GET /", web.request()[0])

    def test_source_port(self) -> None:
        """-S says that it has no effect where it has none; fwknop ignores it silently."""
        with Receiver() as receiver:
            code, _, err = self.run_main(*KNOCK, *KEYS, "-S", "5", *receiver.options)
            self.assertEqual(0, code)
            self.assertIn("warning: the source port is ignored", err)
            receiver.packet()

    def test_raw_goes_out_as_it_was_encoded(self) -> None:
        """The options reach the headers, and the raw socket of IPv4 has IP_HDRINCL."""
        raw = mock.Mock()
        raw.sendto.return_value = 232
        real = _socket.socket  # as the client
        made = []  # type: List[Any]

        def make(family: int, kind: int, *rest: int) -> Any:
            if kind != socket.SOCK_RAW:
                return real(family, kind)
            made.append((family, kind) + rest)
            return raw

        with mock.patch("spa_client.socket.socket", make):
            code, out, err = self.run_main(
                *KNOCK, *KEYS, "-v", "-P", "udpraw", "-Q", "198.51.100.9", "-S", "53",
                "-D", "127.0.0.1")
        self.assertEqual(0, code, err)
        self.assertEqual([(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)], made)
        (data, peer), _ = raw.sendto.call_args
        self.assertEqual(("127.0.0.1", 0), peer)
        self.assertEqual("198.51.100.9", socket.inet_ntoa(data[12:16]))
        self.assertEqual((53, 62201), struct.unpack(">HH", data[20:24]))
        self.assertEqual(fields(out)["Final SPA Data"], data[28:].decode("ascii"))
        self.assertEqual("53", fields(out)["source port"])
        raw.close.assert_called_once_with()


class Resolving(Case):
    """-R: the address that a web page says we have."""

    def resolved(self, *words: str) -> str:
        """The address in the packet."""
        return self.dump("-A", "tcp/22", *KEYS, *words)["Message String"].partition(",")[0]

    def test_http(self) -> None:
        """A GET of our own; the first line that is an address counts."""
        for body, address in ((b"203.0.113.9", "203.0.113.9"), (b"203.0.113.9\n", "203.0.113.9"),
                              (b"c\r\n203.0.113.9\n\r\n0\r\n\r\n", "203.0.113.9"),
                              (b"<html>\n 203.0.113.9 \n</html>", "203.0.113.9"),
                              (b"2001:DB8::1\n", "2001:db8::1")):
            with self.subTest(body), WebServer(body) as web:
                url = ["--resolve-url", web.url(path="/x?y"), "--resolve-http-only"]
                self.assertEqual(address, self.resolved("-R", *url, "-u", "me"))
                self.assertEqual(["GET /x?y HTTP/1.1", "User-Agent: me", "Accept: */*",
                                  f"Host: 127.0.0.1:{web.port}", "Connection: close", "", ""],
                                 web.request())

    def test_where_it_is_asked_for(self) -> None:
        """Options and directives; -a and -s go before, and options before the rc file."""
        with WebServer(b"203.0.113.9") as web:
            url = ["--resolve-url", web.url(), "--resolve-http-only"]
            for words in (["-R"], ["--resolve-ip-http"], ["--resolve-ip-https"],
                          ["-a", "resolve"]):
                self.assertEqual("203.0.113.9", self.resolved(*words, *url))
            for words in (["-R", "-a", "192.0.2.7"], ["-a", "192.0.2.7", "-R"]):
                self.assertEqual("192.0.2.7", self.resolved(*words, *url))
            self.assertEqual("0.0.0.0", self.resolved("-s", "--resolve-ip-http", *url))
            for line in ("ALLOW_IP resolve", "RESOLVE_IP_HTTPS Y", "RESOLVE_IP_HTTP Y"):
                self.write(f"[default]\n{line}\nRESOLVE_HTTP_ONLY Y\nRESOLVE_URL {web.url()}\n[a]\n"
                           "ALLOW_IP 192.0.2.7\n")
                self.assertEqual("203.0.113.9", self.resolved())
                self.assertEqual("192.0.2.7", self.resolved("-n", "a"))
                self.assertEqual("203.0.113.9", self.resolved("-n", "a", "-R"))

    def test_failures(self) -> None:
        """Another status, no address, no server, no answer: the URL, why, and exit code 1."""
        for body, status, expected in (
                (b"203.0.113.9", "404 Not Found", "HTTP/1.1 404 Not Found"),
                (b"203.0.113.9", "301 Moved", "HTTP/1.1 301 Moved"),
                (b"203.0.113.999\n", "200 OK", "no line of the answer is an address"),
                (b"x" * 200000, "200 OK", "no line of the answer is an address"),
                (b"", "200 OK", "no line of the answer is an address")):
            with self.subTest(status=status, body=body[:20]), WebServer(body, status) as web:
                line = self.failure(1, "-T", "-A", "tcp/1", *KEYS, "-R", "--resolve-http-only",
                                    "--resolve-url", web.url())
                self.assertEqual(f"{web.url()}: {expected}", line)
        words = ["-T", "-A", "tcp/1", *KEYS, "-R", "--resolve-http-only", "--resolve-url"]
        self.assertIn("Connection refused", self.failure(1, *words, web.url()))
        self.assertIn("nosuch.invalid: ", self.failure(1, *words, "http://nosuch.invalid/"))
        with socket.socket() as silent, mock.patch.object(client, "NETWORK_SECONDS", 0.2):
            silent.bind(("127.0.0.1", 0))
            silent.listen(1)
            url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
            self.assertIn("timed out", self.failure(1, *words, url))

    def test_half_an_answer(self) -> None:
        """A text without its end is no address; a whole one needs no end of the connection."""
        def serve(listener: socket.socket, head: bytes) -> None:
            with listener.accept()[0] as peer:
                peer.sendall(b"HTTP/1.1 200 OK\r\n" + head + b"\r\n203.0.113.9")
                peer.settimeout(TIMEOUT)
                with contextlib.suppress(ConnectionResetError):  # given up with some of it unread
                    while peer.recv(9999):
                        pass

        odd = b"Content-Length: %s\r\n"
        for head, code in ((b"", 1), (b"Content-Length: 12\r\n", 1), (b"content-length:11\r\n", 0),
                           (odd % (b"1" * 5000), 2), (odd % b"-11", 2), (odd % b"0x0b", 2)):
            with self.subTest(head[:30]), socket.socket() as listener, \
                    mock.patch.object(client, "NETWORK_SECONDS", 5 if code == 0 else 0.3):
                listener.bind(("127.0.0.1", 0))
                listener.listen(1)
                thread = threading.Thread(target=serve, args=(listener, head), daemon=True)
                thread.start()
                got, _, err = self.run_main(
                    "-T", "-A", "tcp/1", *KEYS, "-R", "--resolve-http-only", "--resolve-url",
                    f"http://127.0.0.1:{listener.getsockname()[1]}/")
                thread.join(TIMEOUT)
                self.assertEqual(min(code, 1), got, err)
                self.assertEqual(code == 1, "timed out" in err)
                self.assertEqual(code == 2, ": expected a Content-Length of at most" in err)

    def test_nobodys_address(self) -> None:
        """An address that can't be ours opens nothing; IPv4 inside IPv6 is IPv4."""
        for text in ("0.0.0.0", "127.0.0.1", "224.0.0.1", "255.255.255.255", "::", "::1", "ff02::1",
                     "::ffff:127.0.0.1", "::ffff:0.0.0.0", "0.1.2.3"):
            with self.subTest(text), WebServer(text.encode()) as web:
                line = self.failure(1, "-T", "-A", "tcp/1", *KEYS, "-R", "--resolve-http-only",
                                    "--resolve-url", web.url())
                said = text.replace("::ffff:", "")
                self.assertEqual(f"{web.url()}: it says that our address is {said}, which can't be",
                                 line)
        with WebServer(b"::ffff:203.0.113.9") as web:
            self.assertEqual("203.0.113.9", self.resolved("-R", "--resolve-http-only",
                                                          "--resolve-url", web.url()))

    def test_pages_that_moved(self) -> None:
        """A page may lead to another one, three times and never from https to http."""
        bundle = self.write(CERTIFICATE + CERTIFICATE_KEY, "pem")
        self.environment["SSL_CERT_FILE"] = bundle
        words = ["-T", "-A", "tcp/1", *KEYS, "-R", "-4", "--resolve-url"]
        with WebServer(b"203.0.113.9, 10.0.0.1\n", certificate=bundle) as last, \
                WebServer(b"", "302 Found") as web:
            for line, count, expected in (
                    (b"location: " + last.url("https", "localhost").encode(), 1, ""),
                    (b"Location: /ip", 4, ": HTTP/1.1 302 Found"),
                    (b"Location: ftp://x/", 1, "it leads to ftp://x/: expected a URL")):
                with self.subTest(line):
                    web.answer, web.requests = b"HTTP/1.1 302 Found\n" + line + b"\n\n", []
                    got, out, err = self.run_main(*words, web.url())
                    self.assertEqual((bool(expected), count), (got == 1, len(web.requests)), err)
                    self.assertIn(expected or "Message String: 203.0.113.9,tcp/1\n", err + out)
            last.answer = (b"HTTP/1.1 301 x\r\nContent-Length: 0\r\nLocation: %s\r\n\r\n"
                           % web.url().encode())
            self.assertIn(f"it leads to {web.url()}, without encryption", self.failure(
                1, *words, last.url("https", "localhost")))

    def test_insecure(self) -> None:
        """Warn of http without --resolve-http-only, and refuse https with it."""
        with WebServer(b"203.0.113.9") as web:
            code, out, err = self.run_main("-T", "-A", "tcp/1", *KEYS, "-R", "--resolve-url",
                                           web.url())
            self.assertEqual("203.0.113.9,tcp/1", fields(out)["Message String"])
            self.assertIn("should begin with 'https://'", err)
        self.assertIn("https is not supported for --resolve-http-only", self.failure(
            2, "-T", "-A", "tcp/1", *KEYS, "-R", "--resolve-http-only", "--resolve-url",
            "https://x/"))

    def test_https(self) -> None:
        """A certificate that is trusted, one that is not, and one of somebody else."""
        bundle = self.write(CERTIFICATE + CERTIFICATE_KEY, "pem")
        with WebServer(b"203.0.113.9", certificate=bundle) as web:
            words = ["-T", "-A", "tcp/1", *KEYS, "-R", "-4", "--resolve-url"]
            for trusted, host, code in ((True, "localhost", 0), (False, "localhost", 1),
                                        (True, "127.0.0.1", 1)):
                self.environment["SSL_CERT_FILE"] = bundle if trusted else os.devnull
                with self.subTest(trusted=trusted, host=host):
                    got, out, err = self.run_main(*words, web.url("https", host))
                    self.assertEqual(code, got, err)
                    if code:
                        self.assertRegex(err.lower(), "certificate|doesn't match")
                    else:
                        self.assertEqual("203.0.113.9,tcp/1", fields(out)["Message String"])
            self.assertEqual(1, len([each for each in web.requests if each]))

    def test_no_ssl(self) -> None:
        """A Python without ssl says what to do instead."""
        with WebServer(b"203.0.113.9") as web, mock.patch.dict(sys.modules, {"ssl": None}):
            self.assertIn("this Python has no ssl for https (use -w, or -a)", self.failure(
                1, "-T", "-A", "tcp/1", *KEYS, "-R", "--resolve-url", web.url("https")))

    def test_default_page(self) -> None:
        """cipherdyne's, over HTTPS or HTTP."""
        for words, url in (([], "https://www.cipherdyne.org/cgi-bin/myip"),
                           (["--resolve-http-only"], "http://www.cipherdyne.org/cgi-bin/myip")):
            with mock.patch.object(client, "fetch", return_value=b"203.0.113.9") as fetch:
                self.assertEqual("203.0.113.9", self.resolved("-R", *words))
            self.assertEqual(url, fetch.call_args[0][0][0])

    def test_wget(self) -> None:
        """-w runs it as fwknop does, without a shell."""
        log = os.path.join(self.home, "log")
        path = self.write(f'#!/bin/sh\nprintf "%s|" "$@" >{log}\necho 203.0.113.9\n', "wget",
                          0o700)
        url = "https://a.example/x?a=1&b=$(id)"
        for words, agent in (([], "-U|Fwknop/2.6.10|"), (["-u", "a b"], "-U|a b|"),
                             (["--use-wget-user-agent"], "")):
            self.assertEqual("203.0.113.9", self.resolved("-R", "-w", path, "--resolve-url", url,
                                                          *words))
            with open(log) as file:
                self.assertEqual(agent + f"--secure-protocol=auto|--quiet|-O|-|{url}|",
                                 file.read())
        self.write("#!/bin/sh\nexit 4\n", "wget", 0o700)
        words = ["-T", "-A", "tcp/1", *KEYS, "-R", "-w"]
        self.assertEqual(f"{path}: exit code 4", self.failure(1, *words, path))
        self.assertIn("No such file", self.failure(1, *words, path + "x"))


class Gpg(Case):
    """How gpg is started; tests/test_live_client.py runs the real one."""

    def fake(self, cipher: bytes = b"\x85\x01\x0cabc") -> List[str]:
        """Options that run a program which keeps its arguments and input in files, for gpg."""
        data = self.write("", "cipher")
        with open(data, "wb") as file:
            file.write(cipher)
        path = self.write(f'#!/bin/sh\nprintf "%s|" "$@" >{self.home}/argv\n'
                          f"cat >{self.home}/stdin\ncat {data}\n", "gpg", 0o700)
        return ["--gpg-exe", path, "--gpg-recipient-key", "srv"]

    def said(self) -> Tuple[str, str]:
        """Its arguments, and its input."""
        texts = []
        for name in ("argv", "stdin"):
            with open(os.path.join(self.home, name)) as file:
                texts.append(file.read())
        return texts[0], texts[1]

    def test_unsigned(self) -> None:
        """No key is asked for; what begins with hQ loses it, and the HMAC covers it."""
        shown = self.dump(*KNOCK, *self.fake(), "--key-hmac", HMAC_KEY)
        argv, stdin = self.said()
        self.assertEqual("--batch|--no-tty|--no-armor|--trust-model|always|--no-auto-key-locate|"
                         "--no-encrypt-to|--encrypt|--recipient|srv|", argv)
        self.assertEqual(shown["Encoded Data"] + ":" + shown["SPA Data Digest"], stdin)
        text = client.encode_base64(b"\x85\x01\x0cabc")
        self.assertEqual(text[2:] + client.encode_base64(client.Hmac(
            client.DIGESTS["SHA256"], HMAC_KEY.encode())(text.encode())), shown["Final SPA Data"])
        self.assertEqual(("2 (GPG)", "7 (Asymmetric)"),
                         (shown["Encryption Type"], shown["Encryption Mode"]))
        self.assertEqual(("srv", "<NULL>"), (shown["GPG recipient"], shown["GPG signer"]))

    def test_failures(self) -> None:
        """Print the end of gpg's errors in printable characters; send no empty packet."""
        words = [*KNOCK, *self.fake(b"")]
        with Receiver() as receiver:
            self.assertEqual(words[5] + ": it printed nothing",
                             self.failure(1, *words, *receiver.options))
            self.write("#!/bin/sh\nhead -c 100000 /dev/zero | tr '\\000' 'x' >&2\n"
                       "printf '\\n\\033[31mNo public key\\n' >&2\nexit 2\n", "gpg", 0o700)
            line = self.failure(1, *words, *receiver.options)
            self.assertEqual(500, len(line))
            self.assertRegex(line, r"^x+; \\x1b\[31mNo public key$")
            self.assertTrue(receiver.silent())

    def test_other_keys(self) -> None:
        """Send a packet that does not begin with hQ whole."""
        shown = self.dump(*KNOCK, *self.fake(b"\x84\x5e\x03xyz"))
        self.assertEqual(client.encode_base64(b"\x84\x5e\x03xyz"), shown["Final SPA Data"])

    def test_passphrase(self) -> None:
        """Its sources in their order; it goes by standard input, in front of the message."""
        secret = "pass phrase#1"
        signed = [*KNOCK, *self.fake(), "--gpg-signer-key", "me", "--gpg-home-dir", "/ring"]
        base64 = client.encode_base64(secret.encode())
        for words, rc, stdin in (
                (["--stdin"], "", secret + "\n"), (["--key-rijndael", secret], "", ""),
                (["--key-base64-rijndael", base64], "", ""),
                ([], f"GPG_SIGNING_PW_BASE64 {base64}\nKEY other\n", ""),
                ([], f"GPG_SIGNING_PW other\n[me]\nGPG_SIGNING_PW_BASE64 {base64}\n", "")):
            with self.subTest(words=words, rc=rc):
                self.write("[default]\n" + rc)
                shown = self.dump(*signed, *words, *(["-n", "me"] if "[me]" in rc else []),
                                  stdin=stdin.encode())
                argv, given = self.said()
                self.assertTrue(argv.endswith(
                    "--homedir|/ring|--pinentry-mode|loopback|--passphrase-fd|0|--sign|"
                    "--local-user|me|--encrypt|--recipient|srv|"), argv)
                self.assertNotIn(secret, argv)
                self.assertEqual(secret + "\n" + shown["Encoded Data"] + ":"
                                 + shown["SPA Data Digest"], given)
        self.write("[default]\nGPG_SIGNING_PW_BASE64 YQpi\n")
        self.assertIn("more than one line", self.failure(1, "-T", *signed))
        self.write("[default]\n")
        self.assertIn("no passphrase for signing given", self.failure(2, "-T", *signed))

    def test_no_passphrase(self) -> None:
        """--gpg-no-signing-pw gives an empty one, so that gpg does not ask; an agent is asked."""
        signed = [*KNOCK, *self.fake(), "--gpg-signer-key", "me"]
        self.dump(*signed, "--gpg-no-signing-pw")
        argv, given = self.said()
        self.assertIn("--passphrase-fd|0|", argv)
        self.assertTrue(given.startswith("\n"))
        shown = self.dump(*signed, "--gpg-agent")
        argv, given = self.said()
        self.assertNotIn("pass", argv)
        self.assertNotIn("loopback", argv)
        self.assertTrue(given.startswith(shown["Encoded Data"]))

    def test_directives(self) -> None:
        """USE_GPG decides; a recipient in a file alone does not, one on the command line does."""
        options = self.fake()
        lines = f"GPG_RECIPIENT r\nGPG_EXE {options[1]}\nKEY k\n"
        self.write("[default]\n" + lines)
        self.assertEqual("1 (Rijndael)", self.dump(*KNOCK)["Encryption Type"])
        self.assertEqual("2 (GPG)", self.dump(*KNOCK, *options)["Encryption Type"])
        for line in ("USE_GPG Y", "ENCRYPTION_MODE Asymmetric"):
            self.write(f"[default]\n{lines}{line}\nGPG_SIGNER s\nUSE_GPG_AGENT Y\nGPG_HOMEDIR /h\n")
            self.assertEqual("2 (GPG)", self.dump(*KNOCK)["Encryption Type"])
            self.assertTrue(self.said()[0].endswith(
                "--homedir|/h|--sign|--local-user|s|--encrypt|--recipient|r|"))
        self.write("[default]\n")
        self.dump(*KNOCK, *options, "--save-rc-stanza", "-n", "saved")
        self.assertEqual("2 (GPG)", self.dump("-n", "saved")["Encryption Type"])

    def test_too_long(self) -> None:
        """1500 characters go, more do not."""
        with Receiver() as receiver:
            words = [*KNOCK, *receiver.options]
            self.assertEqual(0, self.run_main(*words, *self.fake(b"\x84" * 1125))[0])
            self.assertEqual(1500, len(receiver.packet()))
            self.assertIn("1502 characters long, and servers look at most at 1500", self.failure(
                1, *words, *self.fake(b"\x84" * 1126)))
            self.assertTrue(receiver.silent())


class Files(Case):
    """The saved options, which never hold a key."""

    def knock(self, *words: str) -> None:
        """Send a packet somewhere."""
        with Receiver() as receiver:
            code, _, err = self.run_main(*words, *receiver.options)
            self.assertEqual(0, code, err)
            receiver.packet()

    def read(self, name: str = ".fwknoprc") -> str:
        """The text of a file in the home directory; it must be its owner's only."""
        path = os.path.join(self.home, name)
        self.assertEqual(0o600, stat.S_IMODE(os.stat(path).st_mode), name)
        with open(path, "rb") as file:
            return file.read().decode("utf-8", "surrogateescape")

    def test_save_packet(self) -> None:
        """-B writes the packet that is sent and a newline; -b appends; -T writes as well."""
        path = os.path.join(self.home, "packet")
        with Receiver() as receiver:
            words = [*KNOCK, *KEYS, *receiver.options, "-B", path]
            self.run_main(*words)
            first = receiver.packet()
            self.assertEqual(first + "\n", self.read("packet"))
            self.run_main(*words, "-b")
            second = receiver.packet()
            self.assertEqual(first + "\n" + second + "\n", self.read("packet"))
            shown = self.dump(*words)
            self.assertEqual(shown["Final SPA Data"] + "\n", self.read("packet"))
            self.assertIn("/no/packet: No such file", self.failure(1, *words, "-B", "/no/packet"))
            self.assertTrue(receiver.silent())

    def test_arguments_are_kept_without_keys(self) -> None:
        """Every option that carries a key is left out, in every spelling."""
        secret = "TheSecret"
        for words in (["--key-rijndael", secret], ["--key-rijndael=" + secret],
                      ["--key-r=" + secret], ["--key-base64-rijndael", secret + "w=="],
                      ["--key-rijndael", "k", "--key-hmac", secret],
                      ["--key-rijndael", "k", "--key-base64-hmac=" + secret + "w"],
                      ["--key-rijndael", "k", secret], ["--key-rijndael", secret, "-S", "5"]):
            with self.subTest(words):
                self.knock(*KNOCK, "-f", "9", *words)
                text = self.read(".fwknop.run")
                self.assertNotIn(secret, text)
                self.assertTrue(text.startswith("fwknop -A tcp/22 -a 192.0.2.7 -f 9 "), text)
                self.assertNotIn("--key", text)

    def test_last_arguments(self) -> None:
        """-l takes them, --show-last prints them; keys come from elsewhere, options are added."""
        self.write("[default]\nKEY k\nHMAC_KEY h\n")
        self.knock(*KNOCK, "--time-offset-minus", "5m", "-U", "some user", "-u", "a\\ b", "-m",
                   "md5", "-s")
        code, out, _ = self.run_main("--show-last")
        self.assertEqual(0, code)
        self.assertTrue(out.startswith("Last fwknop client command line: fwknop -A tcp/22 -s "))
        shown = self.dump("-l")
        self.assertEqual(("0.0.0.0,tcp/22", "some user", "1 (MD5)"), (
            shown["Message String"], shown["Username"], shown["Digest Type"]))
        self.assertAlmostEqual(int(shown["Timestamp"]), time.time() - 300, delta=5)
        self.assertEqual("2 (SHA1)", self.dump("-l", "-m", "sha1")["Digest Type"])
        given = client.parse_command_line(client.split_arguments(self.read(".fwknop.run")))[0]
        self.assertEqual("a\\ b", given["HTTP_USER_AGENT"].text)
        self.write("fwknop --key-rijndael TheSecret -A tcp/9 -a 192.0.2.7 -T \n", ".fwknop.run")
        self.assertEqual("192.0.2.7,tcp/9", self.dump("-l")["Message String"], "fwknop wrote it")
        self.assertNotIn("TheSecret", self.run_main("--show-last")[1])

    def test_when_arguments_are_kept(self) -> None:
        """After a knock, unless it is said not to; a place that can't be written stops nothing."""
        self.dump(*KNOCK, *KEYS)
        self.knock(*KNOCK, *KEYS, "--no-save-args")
        self.knock(*KNOCK, *KEYS, "--no-home-dir")
        self.failure(1, *KNOCK, *KEYS, "-D", "nosuch.invalid")
        self.assertEqual([], os.listdir(self.home))
        self.write("[default]\nNO_SAVE_ARGS Y\n")
        self.knock(*KNOCK, *KEYS)
        self.assertEqual([".fwknoprc"], os.listdir(self.home))
        path = os.path.join(self.home, "args")
        self.knock(*KNOCK, *KEYS, "-E", path, "--no-rc-file")
        self.assertIn("-A tcp/22", self.read("args"))
        self.assertEqual("192.0.2.7,tcp/22",
                         self.dump("-l", "-E", path, *KEYS)["Message String"])
        before = self.read("args")
        self.dump("-l", "-E", path, *KEYS)  # the next -l knocks again
        self.assertEqual(before, self.read("args"))
        self.dump(*KNOCK, *KEYS, "-E", path, "--no-rc-file", "-f", "8")
        self.assertIn(" -f 8\n", self.read("args"))
        with Receiver() as receiver, mock.patch.object(
                client, "wait_until_open", side_effect=KeyboardInterrupt):  # once sent, they are
            self.failure(130, *KNOCK, *KEYS, *receiver.options, "--wait", "9", "-E", path,
                         "--no-rc-file")
        self.assertIn(" --wait 9", self.read("args"))
        self.assertRegex(self.failure(3, "-l"),
                         r"Could not open args file: \S+\.fwknop\.run: cannot be read")
        self.assertIn("-l needs a home directory, or -E", self.failure(2, "-l", "--no-home-dir"))
        os.mkdir(os.path.join(self.home, ".fwknop.run"))
        self.knock(*KNOCK, *KEYS, "--no-rc-file")
        with Receiver() as receiver:
            code, _, err = self.run_main(*KNOCK, *KEYS, *receiver.options, "--no-rc-file", "-E",
                                         "/no/args")
            self.assertEqual(0, code)
            self.assertIn("warning: Could not open args file: /no/args: No such file", err)
            receiver.packet()

    STANZA = ["-T", "--save-rc-stanza", "-n", "work"]

    def test_save_stanza(self) -> None:
        """The lines of tests/spec/fwknop.md 2.3, in its order; the packet is made as well."""
        words = ("-A tcp/22 -a 10.1.2.3 -D srv.example --key-rijndael abc --key-hmac def -f 60 "
                 "--use-hmac --hmac-digest-type sha512 -P tcp -p 1234 -M cfb -m sha1 -U joe "
                 "--no-save-args").split()
        self.dump(*self.STANZA, *words)
        text = self.read()
        self.assertEqual("""[work]
DIGEST_TYPE                 SHA1
SPA_SERVER_PROTO            tcp
SPA_SERVER_PORT             1234
FW_TIMEOUT                  60
ALLOW_IP                    10.1.2.3
ENCRYPTION_MODE             CFB
SPOOF_USER                  joe
ACCESS                      tcp/22
SPA_SERVER                  srv.example
KEY                         abc
HMAC_DIGEST_TYPE            SHA512
HMAC_KEY                    def
USE_HMAC                    Y
NO_SAVE_ARGS                Y
""", text)
        shown = self.dump("-n", "work")
        self.assertEqual(("10.1.2.3,tcp/22", "joe", "5 (SHA512)", "3 (CFB)", "60"), tuple(
            shown[name] for name in ("Message String", "Username", "HMAC Type", "Encryption Mode",
                                     "Client Timeout")))

    def test_save_stanza_says_what_it_writes(self) -> None:
        """With -v, but not what a key is."""
        out = self.run_main(*self.STANZA, "-v", *KNOCK, "--key-rijndael", "TheSecret", "-D", "h")[1]
        for text in ("(17) ACCESS to tcp/22", "(18) SPA_SERVER to h", "(20) KEY to a new key"):
            self.assertIn(f"add_single_var_to_rc() : Updating param {text}\n", out)
        self.assertNotIn("TheSecret", out)

    def test_save_stanza_keeps_the_file(self) -> None:
        """Comments, order, other stanzas, odd bytes and line ends stay; values change in place."""
        before = ("# mine \udcff\n\n[default]\nKEY x\r\n\n[Work]  \n# a note\n"
                  "  ACCESS tcp/1  # why\nSPOOF_USER jim ;x\n\n; end of work\n"
                  "[other]\nACCESS tcp/2\n\n\n")
        self.write(before)
        self.dump(*self.STANZA, "-A", "tcp/22", "-s", "-f", "5", "--time-offset-minus", "5m",
                  "--key-rijndael", "new")
        self.assertEqual("# mine \udcff\n\n[default]\nKEY x\r\n\n[Work]  \n# a note\n"
                         "ACCESS                      tcp/22  # why\nSPOOF_USER jim ;x\n"
                         "FW_TIMEOUT                  5\nALLOW_IP                    0.0.0.0\n"
                         "TIME_OFFSET                 -300\nKEY                         new\n"
                         "\n; end of work\n[other]\nACCESS tcp/2\n", self.read())
        shown = self.dump("-n", "work")
        self.assertEqual("0.0.0.0,tcp/22", shown["Message String"])
        self.assertIn(shown["Encoded Data"], unseal(shown["Final SPA Data"], "new", 0))

    def test_save_stanza_asks(self) -> None:
        """Before a key changes; no keeps the old one, the end of input ends it all."""
        question = "Variable '%s' found in stanza 'work'. Overwrite [N/y] ? \n"
        before = "[work]\nKEY old\nACCESS tcp/1\n"
        words = [*self.STANZA, "-A", "tcp/2", "-s", "--key-rijndael", "new"]
        for answer, key in ((b"n\n", "old"), (b"\n", "old"), (b"y\n", "new"), (b"Yes\n", "new")):
            self.write(before)
            code, out, err = self.run_main(*words, stdin=answer)
            self.assertEqual(0, code, err)
            self.assertTrue(out.startswith(question % "KEY"), out)
            self.assertRegex(self.read(), rf"\A\[work\]\nKEY +{key}\nACCESS +tcp/2\n"
                                          r"ALLOW_IP +0.0.0.0\n\Z")
        self.write(before)
        code, out, err = self.run_main(*words)
        self.assertEqual(1, code)
        self.assertIn("standard input ended without an answer (--force-stanza does not ask)", err)
        self.assertEqual(before, self.read())
        self.dump(*words, "--force-stanza")
        self.assertIn("KEY                         new\n", self.read())
        for name, option in (("GPG_RECIPIENT", "--gpg-recipient-key"),
                             ("GPG_SIGNER", "--gpg-signer-key")):
            self.write(f"[work]\n{name} old\n")
            self.assertIn(question % name, self.run_main(
                *KNOCK, *self.STANZA, "--key-rijndael", "k", option, "new", stdin=b"n\n")[1])

    def test_save_stanza_with_keys_of_another_kind(self) -> None:
        """An old KEY would go before a new KEY_BASE64: it is asked about, and goes."""
        self.write("[work]\nKEY old\nKEY_FILE f\n")
        words = [*KNOCK, *self.STANZA, "--key-base64-rijndael", "bmV3"]
        for answers in (b"n\n", b"y\nn\n"):
            self.assertEqual(0, self.run_main(*words, stdin=answers)[0])
            self.assertNotIn("bmV3", self.read())
            self.assertIn("KEY old\nKEY_FILE f\n", self.read())
        self.dump(*words, "--force-stanza")
        self.assertNotIn("old", self.read())
        self.assertNotIn("KEY_FILE", self.read())
        self.assertIn("KEY_BASE64                  bmV3\n", self.read())

    def test_save_stanza_name(self) -> None:
        """Use the name of -n, else of -D; make a new file; obey --rc-file."""
        self.dump(*KNOCK, "--key-rijndael", "k", "--save-rc-stanza", "-D", "127.0.0.1")
        self.assertTrue(self.read().startswith("[127.0.0.1]\n"))
        path = os.path.join(self.home, "rc")
        self.dump(*KNOCK, "--key-rijndael", "k", *self.STANZA, "--rc-file", path)
        self.assertTrue(self.read("rc").startswith("[work]\n"))
        self.assertIn("needs -n or -D", self.failure(2, "-T", *KNOCK, *KEYS, "--save-rc-stanza"))
        for words in (["--no-rc-file"], ["--no-home-dir"]):
            self.assertIn("needs an rc file", self.failure(
                2, *KNOCK, *KEYS, *self.STANZA, *words))
        for name in ("", "a]b", "a\nb"):
            self.assertIn("expected the name of a stanza", self.failure(
                2, "-T", *KNOCK, *KEYS, "--save-rc-stanza", "-n", name))

    def test_save_stanza_refuses(self) -> None:
        """Values that an rc file cuts, and command lines that can't be obeyed: nothing changes."""
        before = "[work]\nACCESS tcp/1\n"
        self.write(before)
        for words in (["--key-rijndael", "a b"], ["--key-rijndael", "a#b"],
                      ["--key-hmac", "a;b"], ["-U", "a b"], ["--key-rijndael", "a\tb"],
                      ["--key-rijndael", "a\nKEY b"], ["-p", "0"], ["-Q", "1.2.3.4"]):
            with self.subTest(words):
                line = self.failure(2, *KNOCK, *self.STANZA, *words)
                self.assertNotIn("a#b", line)
                self.assertEqual(before, self.read())
        self.assertEqual([".fwknoprc"], os.listdir(self.home))

    def test_save_stanza_is_atomic(self) -> None:
        """A write that fails leaves the old file and no other; a link to it stays a link."""
        before = "[work]\nACCESS tcp/1\n"
        self.write(before, "real")
        link = os.path.join(self.home, ".fwknoprc")
        os.symlink("real", link)
        words = [*KNOCK, *KEYS, *self.STANZA]
        with mock.patch.object(os, "replace", side_effect=OSError(28, "No space")):
            self.assertIn("real: No space", self.failure(1, *words))
        self.assertEqual(before, self.read("real"))
        self.assertEqual([".fwknoprc", "real"], sorted(os.listdir(self.home)))
        self.dump(*words)
        self.assertTrue(os.path.islink(link))
        self.assertIn("tcp/22", self.read("real"))
        os.chmod(link, 0o644)
        self.assertEqual(1, self.run_main(*words, "--force-stanza")[2].count("permissions"))

    @needs_root
    def test_nobody_leads_root_to_a_file_of_roots(self) -> None:
        """By a link, whatever is to be written to it."""
        self.write("[root]\n", "real")
        link = os.path.join(self.home, ".fwknoprc")
        os.symlink("real", link)
        os.lchown(link, 1234, 1234)
        for words in ([*KEYS, *self.STANZA], [*KEYS, "--save-packet", link, "--test"]):
            self.assertIn("a link of another user's", self.failure(1, *KNOCK, *words))
        self.assertEqual("[root]\n", self.read("real"))
        os.remove(os.path.join(self.home, "real"))
        self.assertIn("a link of another user's", self.failure(1, *KNOCK, *KEYS, *self.STANZA))
        self.assertEqual([".fwknoprc"], os.listdir(self.home))

    @needs_root
    def test_nobody_leads_root_there_meanwhile(self) -> None:
        """A link that takes the file's place while the client asks is not followed either."""
        self.write("[root]\nKEY roots\n", "real")
        self.write("[work]\nKEY old\n")
        link = os.path.join(self.home, ".fwknoprc")

        def confirm(_: str) -> bool:
            os.remove(link)
            os.symlink("real", link)
            os.lchown(link, 1234, 1234)
            return True

        with mock.patch.object(client, "confirm", confirm):
            self.assertIn("a link of another user's", self.failure(
                1, "-T", *KNOCK, *KEYS, "--save-rc-stanza", "-n", "work"))
        self.assertTrue(os.path.islink(link))
        self.assertEqual([".fwknoprc", "real"], sorted(os.listdir(self.home)))

    def test_generated_keys(self) -> None:
        """-k and -K with --save-rc-stanza put the keys into the stanza, once asked."""
        path = os.path.join(self.home, ".fwknoprc")
        code, out, err = self.run_main("-k", "--save-rc-stanza", "-D", "h",
                                       "--hmac-digest-type", "sha512")
        self.assertEqual((0, f"[+] Wrote Rijndael and HMAC keys to rc file: {path}\n", ""),
                         (code, out, err))
        self.assertRegex(self.read(), r"\A\[h\]\nSPA_SERVER +h\nKEY_BASE64 +\S{43}=\n"
                         r"HMAC_DIGEST_TYPE +SHA512\nHMAC_KEY_BASE64 +\S{171}=\nUSE_HMAC +Y\n\Z")
        self.assertEqual("5 (SHA512)", self.dump(*KNOCK, "-n", "h")["HMAC Type"])
        before = self.read()
        self.assertIn("without an answer", self.run_main("-k", "--save-rc-stanza", "-n", "h")[2])
        self.assertEqual(before, self.read())
        new = os.path.join(self.home, "new")
        code, out, _ = self.run_main("-K", new, "--save-rc-stanza", "--force-stanza", "-n", "h")
        self.assertEqual(2, out.count("[+] Wrote Rijndael and HMAC keys to"))
        for line in self.read("new").splitlines():
            self.assertIn(line.split(": ")[1], self.read())
        self.assertNotEqual(before, self.read())

    def test_what_was_generated_is_what_is_said(self) -> None:
        """An old key that is to stay is not among what was written."""
        path = os.path.join(self.home, ".fwknoprc")
        for answers, said, kept in ((b"n\nn\n", "no", "ef"), (b"y\nn\n", "Rijndael", "f"),
                                    (b"n\ny\n", "HMAC", "e"),
                                    (b"y\ny\n", "Rijndael and HMAC", "")):
            self.write("[h]\nKEY_BASE64 eeee\nHMAC_KEY_BASE64 ffff\n")
            code, out, _ = self.run_main("-k", "--save-rc-stanza", "-n", "h", stdin=answers)
            self.assertEqual((0, f"[+] Wrote {said} keys to rc file: {path}"),
                             (code, out.splitlines()[-1]))
            self.assertEqual(kept, "".join(key for key in "ef" if " %s\n" % (key * 4)
                                           in self.read()))

    def test_save_stanza_at_the_same_time(self) -> None:
        """Runs at once lose no stanza."""
        names = [f"n{number}" for number in range(8)]
        runs = [subprocess.Popen(
            [python(), "-I", "-S", SCRIPT, *KNOCK, *KEYS, "-T", "--save-rc-stanza", "-n", name],
            env=self.environment, stdout=subprocess.DEVNULL) for name in names]
        self.assertEqual([0] * 8, [each.wait(60) for each in runs])
        self.assertEqual(set(names), {line[3:] for line in self.run_main(
            "--stanza-list")[1].splitlines()[1:]})
        self.assertEqual([".fwknoprc"], os.listdir(self.home))

    def test_save_stanza_meanwhile(self) -> None:
        """Keep a change that an editor saves while the client asks: begin and ask again.

        The client holds no lock while it asks, so no other run has to wait or to remove one.
        """
        self.write("[work]\nKEY old\n")
        asked = []  # type: List[str]

        def confirm(question: str) -> bool:
            if not asked:
                self.write("[other]\n[work]\nKEY theirs\n")
            asked.append(question.split("'")[1])
            self.assertEqual([".fwknoprc"], os.listdir(self.home))
            return True

        with mock.patch.object(client, "confirm", confirm):
            self.dump(*KNOCK, *self.STANZA, "--key-rijndael", "ours")
        self.assertEqual(["KEY", "KEY"], asked)
        self.assertRegex(self.read(), r"\A\[other\]\n\[work\]\nKEY +ours\n")
        self.assertEqual([".fwknoprc"], os.listdir(self.home))

    def test_save_stanza_waits_not_for_ever(self) -> None:
        """Name the file that a broken run has left, after a while, and change nothing."""
        before = "[work]\nACCESS tcp/1\n"
        path = self.write(before)
        self.write("", ".fwknoprc.updated")
        with mock.patch.object(client, "LOCK_SECONDS", 0.2):
            self.assertEqual(
                path + ".updated: another run is writing it (if there is none, remove it)",
                self.failure(1, *KNOCK, *KEYS, *self.STANZA))
        self.assertEqual(before, self.read())
        self.assertEqual("", self.read(".fwknoprc.updated"))

    def test_pipes(self) -> None:
        """A FIFO for an rc file is refused, where it would hang; what a shell opens is read."""
        path = os.path.join(self.home, ".fwknoprc")
        os.mkfifo(path, 0o600)
        for words in (["-T"], self.STANZA, ["--stanza-list"], ["-l", "-E", path]):
            self.assertEqual(("Could not open args file: " if "-l" in words else "") + path
                             + ": expected a file", self.failure(3, *KNOCK, *KEYS, *words))
        for device in ("/dev/zero", "/dev/null"):
            for words in (["--rc-file", device], ["-D", "h", "--no-rc-file", "-G", device]):
                self.assertEqual(device + ": expected a file", self.failure(3, *KNOCK, *words))
        os.unlink(path)
        if not shutil.which("bash"):
            skip("bash is not here")
        rc, keys = self.write("[default]\nFW_TIMEOUT 9\n", "rc"), self.write(f"h: {KEY}\n", "k")
        command = "{} -I -S {} -T {} -D h --rc-file <(cat {}) -G <(cat {})".format(
            python(), SCRIPT, " ".join(KNOCK), rc, keys)
        done = subprocess.run(["bash", "-c", command], env=self.environment, timeout=60,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        shown = fields(done.stdout.decode("ascii"))
        self.assertEqual("9", shown["Client Timeout"], done.stderr)
        self.assertIn(shown["Encoded Data"], unseal(shown["Final SPA Data"], KEY, 0))

    @needs_programs("fwknop")
    def test_save_stanza_like_the_real_client(self) -> None:
        """The same options make the same file; each reads what the other wrote."""
        words = ["-A", "tcp/22", "-D", "127.0.0.1", "--save-rc-stanza", "-n", "work", "-T",
                 "--no-save-args"]
        for more in (["-a", "10.1.2.3", "-f", "60", "--key-rijndael", "abc"],
                     ["-a", "10.1.2.3", "--key-rijndael", "a", "--key-hmac", "b", "-P", "udpraw",
                      "-S", "5", "-Q", "1.1.1.1", "--time-offset-plus", "2h", "-r", "-v"],
                     ["-a", "10.1.2.3", "-N", "1.1.1.1:5", "--nat-local", "--nat-port", "9",
                      "--key-base64-rijndael", "YWJj", "-u", "ua", "-w", "/y", "-M", "ctr"]):
            with self.subTest(more), tempfile.TemporaryDirectory() as home:
                self.write("")
                rc = os.path.join(home, ".fwknoprc")
                with open(os.open(rc, os.O_WRONLY | os.O_CREAT, 0o600), "w"):
                    pass
                environment = dict(self.environment, HOME=home)
                subprocess.run(["fwknop", *words, *more], env=environment, check=True, timeout=60,
                               stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
                self.run_main(*words, *more)
                with open(rc) as file:
                    self.assertEqual(file.read().lstrip("\n"), self.read())
                os.rename(os.path.join(self.home, ".fwknoprc"), rc)
                out = subprocess.run(
                    ["fwknop", "-n", "work", "-T", "--no-save-args"], env=environment, check=True,
                    timeout=60, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL).stdout
                self.assertIn("10.1.2.3,tcp/", fields(out.decode())["Message String"])


class Systems(Case):
    """The Pythons and systems."""

    def test_every_python(self) -> None:
        """HTTP, an address over HTTPS, gpg, the rc file and -l, on every Python."""
        bundle = self.write(CERTIFICATE + CERTIFICATE_KEY, "pem")
        gpg = self.write("#!/bin/sh\ncat\n", "gpg", 0o700)
        self.environment["SSL_CERT_FILE"] = bundle
        for interpreter in (found.path for found in find_pythons()):
            with self.subTest(interpreter), WebServer(b"") as web, \
                    WebServer(b"203.0.113.9", certificate=bundle) as secure:
                done = self.script(
                    ["-A", "tcp/22", "-4", "-R", "--resolve-url", secure.url("https", "localhost"),
                     "-n", "n", "--save-rc-stanza", "--force-stanza", *KEYS, "-P", "http", "-D",
                     "127.0.0.1", "-p", str(web.port)], interpreter)
                self.assertEqual((0, b"", b""), (done.returncode, done.stdout, done.stderr))
                web.thread.join(0.01)
                done = self.script(["-l", "-T", "-a", "192.0.2.7", "--force-stanza"], interpreter)
                shown = fields(done.stdout.decode("ascii"))
                self.assertEqual("192.0.2.7,tcp/22", shown["Message String"], done.stderr)
                self.assertIn(shown["Encoded Data"], unseal(shown["Final SPA Data"]))
                done = self.script(["-T", *KNOCK, "--no-rc-file", "--gpg-recipient-key", "r",
                                    "--gpg-exe", gpg], interpreter)
                self.assertEqual((0, b""), (done.returncode, done.stderr))

    def test_other_systems(self) -> None:
        """Without what only POSIX has, and without ssl: HTTP, files, options."""
        before = BLOCK % ["pwd", "grp", "fcntl", "termios", "resource", "syslog", "ssl",
                          "subprocess", "encodings.idna", "unicodedata", "logging", "urllib"]
        with WebServer(b"203.0.113.9") as web:
            done = self.script(
                ["-A", "tcp/22", "-R", "--resolve-http-only", "--resolve-url", web.url(), "-n", "n",
                 "--save-rc-stanza", *KEYS, "-P", "http", "-D", "127.0.0.1", "-p", str(web.port),
                 "-B", os.path.join(self.home, "packet")], None, before)
        self.assertEqual((0, b"", b""), (done.returncode, done.stdout, done.stderr))
        self.assertEqual([".fwknop.run", ".fwknoprc", "packet"], sorted(os.listdir(self.home)))

    def test_started_as_fwknop(self) -> None:
        """A link of that name takes fwknop's command lines."""
        link = os.path.join(self.home, "fwknop")
        os.symlink(SCRIPT, link)
        with Receiver() as receiver:
            words = [*KNOCK, *KEYS, *receiver.options, "--no-rc-file"]
            done = subprocess.run([python(), link, *words],
                                  env=self.environment, stdout=subprocess.PIPE,
                                  stderr=subprocess.PIPE, timeout=60)
            self.assertEqual((0, b"", b""), (done.returncode, done.stdout, done.stderr))
            self.assertIn("1:", unseal(receiver.packet(), KEY))

    def test_the_fastest_start(self) -> None:
        """The launcher, with the file compiled: exit codes and errors are those of the script."""
        shutil.copy(SCRIPT, self.home)
        start = os.path.join(self.home, "bin", "spa_client")
        os.mkdir(os.path.dirname(start))
        with open(start, "w") as file:
            file.write(client.launcher(start).replace("/usr/local/lib/spa", self.home))
        with Receiver() as receiver:
            self.write("[gate]\nKEY k\nACCESS tcp/22\nSPA_SERVER 127.0.0.1\n"
                       f"SPA_SERVER_PORT {receiver.options[3]}\n")
            for more, expected in ((["-s"], (0, b"", b"")),
                                   (["-p", "0"], (2, b"", b"spa_client.py: -p: expected a port "
                                                          b"number, 1 to 65535, not '0'\n"))):
                done = subprocess.run([python(), "-S", start, "-q", "-n", "gate", *more],
                                      env=self.environment, timeout=60, cwd=self.home,
                                      stdout=subprocess.PIPE, stderr=subprocess.PIPE)
                self.assertEqual(expected, (done.returncode, done.stdout, done.stderr))
            self.assertTrue(unseal(receiver.packet(), "k", 0))
        self.assertIn("__pycache__", os.listdir(self.home))

    def test_what_a_plain_knock_loads(self) -> None:
        """None of the modules that the other ways need."""
        before = ("import atexit, sys\n"
                  "atexit.register(lambda: sys.stderr.write('\\n'.join(sys.modules)))\n")
        with Receiver() as receiver:
            done = self.script([*KNOCK, *KEYS, *receiver.options], None, before)
            receiver.packet()
        loaded = set(done.stderr.decode().split())
        self.assertEqual(set(), loaded & {"ssl", "subprocess", "socket", "select", "threading",
                                          "_ssl", "http", "urllib", "tempfile", "shutil"})


if __name__ == "__main__":
    unittest.main()
