"""Tests of spa_client.py --ospa: the OSPA file, the request, and the wait for its answer."""

import base64
import json
import os
import socket
import struct
import threading
import time
from typing import Any, Callable, Dict, List, Tuple
from unittest import mock

import spa_client as client
import spa_server as server
from tests.support import TIMEOUT, TOP, captured, skip
from tests.test_client import Case

with open(os.path.join(TOP, "tests", "vectors", "openspa.json"), encoding="ascii") as stream:
    VECTORS = json.load(stream)["vectors"]  # type: List[Any]
FIRST = VECTORS[0]
HOST, UUID, SUITE = "127.0.0.1", FIRST["client_uuid"], "CipherSuite_RSA_SHA256_AES256CBC"
PRIVATE, PUBLIC = FIRST["client_private_pem"], FIRST["client_public_pem"]
SERVER_PUBLIC = FIRST["server_public_pem"]

# An OSPA file; %(name)s are the values, and PEM stands in blocks.
OSPA = """version: %(version)s
clientUUID: %(uuid)s
serverHost: %(host)s
serverPort: %(port)s
adk:
  secret: %(adk)s
crypto:
  cipherSuitePriority: %(suites)s
  rsa:
    client:
      privateKey: |
%(private)s
      publicKey: |
%(public)s
    server:
      publicKey: |
%(server)s
"""


def indented(pem: str, blanks: int = 8) -> str:
    """The lines of PEM for a block of YAML."""
    return "\n".join(" " * blanks + line for line in pem.strip().split("\n"))


def ospa(**more: Any) -> str:
    """The text of an OSPA file with some other values."""
    return OSPA % dict({"version": '"0.2"', "uuid": UUID, "host": HOST, "port": 22211, "adk": '""',
                        "suites": '["%s"]' % SUITE, "private": indented(PRIVATE),
                        "public": indented(PUBLIC), "server": indented(SERVER_PUBLIC)}, **more)


def key(pem: str) -> Any:
    """A key as the server reads it."""
    return server.RsaKey.parse(pem, "PRIVATE" in pem)


class FileTest(Case):
    """The reader of OSPA files."""

    def error(self, text: str) -> str:
        """The error for a file that must be refused."""
        with self.assertRaises(client.ConfigError) as caught:
            client.parse_ospa(text, "f")
        for line in PRIVATE.split("\n")[1:-2]:
            self.assertNotIn(line, str(caught.exception))
        return str(caught.exception)

    def test_values(self) -> None:
        """All keys, as their users want them."""
        found = client.parse_ospa(ospa(adk="7O4ZIRI"), "f")
        self.assertEqual((UUID, HOST, 22211, base64.b32decode("7O4ZIRI=")),
                         tuple(found[name] for name in ("clientUUID", "serverHost", "serverPort",
                                                        client.ADK)))
        self.assertEqual(key(PRIVATE).primes, found[client.PRIVATE].primes)
        self.assertEqual(key(SERVER_PUBLIC).modulus, found[client.SERVER_KEY].modulus)
        self.assertEqual(key(PUBLIC).modulus, found[client.PUBLIC].modulus)

    def test_good_forms(self) -> None:
        """What YAML allows in such files means the same."""
        plain, wanted = ospa(), client.parse_ospa(ospa(), "f")
        top, maps = plain[:plain.index("adk:")], plain[plain.index("adk:"):]
        compact = UUID.replace("-", "")
        for text in (
                plain.rstrip("\n"), plain.replace("\n", "\r\n"), plain.replace("\n", "  \n"),
                plain.replace("\n", "\n\n"), maps + top,
                "\n".join(line + " " * 9 for line in plain.split("\n")),
                "".join(" " * (2 * (len(line) - len(line.lstrip()))) + line.lstrip()
                        for line in plain.splitlines(True)),
                "# begin\n" + plain.replace("\n", " # end\n", 10).replace(
                    "privateKey: | # end", "privateKey: |"),
                plain.replace("crypto:\n", "  # deeper\ncrypto:\n      # another\n"),
                plain.replace("|", "|-"), plain.replace("|", "|+"), plain.replace("|", "| # key"),
                plain.replace('adk:\n  secret: ""\n', ""), plain.replace('secret: ""', "secret:"),
                plain.replace('  secret: ""\n', ""), plain.replace('""', "''"),
                plain.replace("      publicKey: |\n" + indented(PUBLIC) + "\n", ""),
                ospa(version="0.2"), ospa(version="'0.2'"), ospa(version="   0.2"),
                ospa(port='"22211"'), ospa(host='"%s"' % HOST),
                ospa(uuid=UUID.upper()), ospa(uuid="urn:uuid:" + UUID), ospa(uuid=compact),
                ospa(uuid='"{%s}"' % UUID),
                ospa(suites="[%s]" % SUITE), ospa(suites="[ '%s' ] # one" % SUITE),
                ospa(suites="\n  - " + SUITE), ospa(suites="# list\n    - '%s' # x" % SUITE),
                plain.replace("        ", "         ")):
            with self.subTest(text):
                found = client.parse_ospa(text, "f")
                for name in ("clientUUID", "serverHost", "serverPort"):
                    self.assertEqual(wanted[name], found[name])
                for name in (client.PRIVATE, client.SERVER_KEY):
                    self.assertEqual(vars(wanted[name])["modulus"], found[name].modulus)
                self.assertFalse(found.get(client.ADK))
        for host in ("gate", "gate.example.org", "2001:db8::1", "::1", "'fe80::1%eth0'"):
            self.assertEqual(host.strip("'"), client.parse_ospa(ospa(host=host), "f")["serverHost"])

    def test_keys_of_the_vectors(self) -> None:
        """All sizes, and public keys of both forms."""
        for vector in VECTORS:
            with self.subTest(vector["name"]):
                found = client.parse_ospa(ospa(
                    private=indented(vector["client_private_pem"]),
                    public=indented(vector["client_public_pem"]),
                    server=indented(vector["server_public_pem"])), "f")
                self.assertEqual((vector["client_key_bits"], vector["server_key_bits"]), tuple(
                    found[name].modulus.bit_length() for name in (
                        client.PRIVATE, client.SERVER_KEY)))

    def test_bad_files(self) -> None:
        """The line and the key, never the text."""
        word = "expected one plain or quoted word, a list of one, or lines below `|`"
        plain, secret = ospa(), "expected 7 characters of base32 that are 4 bytes"
        suites = "8: crypto.cipherSuitePriority: "
        for text, expected in (
                ("---\n" + plain, "1: expected 0 blanks and a key of OSPA 0.2, once"),
                ("\n  " + plain, "2: expected 0 blanks and a key"),
                (plain.replace("version", "Version"), "1: expected 0 blanks and a key"),
                (plain.replace("version: ", "version:"), "1: expected 0 blanks and a key"),
                (plain.replace("version:", "version :"), "1: expected 0 blanks and a key"),
                (plain.replace("version:", '"version":'), "1: expected 0 blanks and a key"),
                (plain.replace("version:", "\tversion:"), "1: expected 0 blanks and a key"),
                (plain.replace("version", "ver\ud800sion"), "1: expected 0 blanks and a key"),
                (plain + "version: '0.2'\n", "%d: expected 0 blanks and a key of OSPA 0.2, once"
                 % (plain.count("\n") + 1)),
                (plain + "adk:\n", "%d: expected 0 blanks" % (plain.count("\n") + 1)),
                (plain.replace("secret", "secrets"), "6: expected 2 blanks and a key"),
                (plain.replace("  secret", "\tsecret"), "6: expected 0 blanks and a key"),
                (plain.replace("  secret", "secret"), "6: expected 0 blanks and a key"),
                (plain.replace("    client:", "   client:"), "49: expected 3 blanks"),
                (plain.replace("  rsa:", "     rsa:"), "8: crypto.cipherSuitePriority: " + word),
                (plain.replace("adk:", "adk: x"), "5: expected 0 blanks and a key"),
                (plain.replace("adk:", "adk: {secret: ''}"), "5: " + word),
                (plain.replace("adk:", "adk: &a"), "5: " + word),
                (plain + "crypto.rsa.client.privateKey: x\n", "%d: expected 0 blanks and a key"
                 % (plain.count("\n") + 1)),
                ("crypto.rsa:\n  client:\n" + plain, "1: expected 0 blanks and a key"),
                (ospa(suites="[" * 9999 + "]" * 9999), suites + word),
                (ospa(suites="[[%s]]" % SUITE), suites + word),
                (ospa(suites="[%s]]" % SUITE), suites + word),
                (ospa(suites="- " + SUITE + "\n  - x" * 9999), suites + word),
                (ospa(version="0.1"), "1: version: expected one of 0.2"),
                (ospa(version='["0.2"]'), "1: version: expected one of 0.2"),
                (ospa(version="\n- 0.2"), "1: version: expected one of 0.2"),
                (ospa(version=""), "1: version: expected one of 0.2"),
                (ospa(version="!!str 0.2"), "1: version: " + word),
                (ospa(version='"0.2'), "1: version: " + word),
                (ospa(version="'0.2\""), "1: version: " + word),
                (ospa(version='"0.2" x'), "1: version: " + word),
                (ospa(version='"\\x30.2"'), "1: version: " + word),
                (ospa(version="0.2\n  0"), "1: version: " + word),
                (ospa(version=">\n  0.2"), "1: version: " + word),
                (ospa(version="|2\n  0.2"), "1: version: " + word),
                (ospa(uuid=UUID[:-1]), "2: clientUUID: expected a UUID"),
                (ospa(uuid=UUID[:-1] + "g"), "2: clientUUID: expected a UUID"),
                (ospa(uuid=""), "2: clientUUID: expected a UUID"),
                (ospa(uuid="{%s}" % UUID), "2: clientUUID: " + word),
                (ospa(host=""), "3: serverHost: expected a value"),
                (ospa(host="~"), "3: serverHost: " + word),
                (ospa(host="*a"), "3: serverHost: " + word),
                (ospa(host="a: b"), "3: serverHost: " + word),
                (ospa(host="b\u00fccher"), "3: serverHost: " + word),
                (ospa(port=0), "4: serverPort: expected a port number, 1 to 65535"),
                (ospa(port=65536), "4: serverPort: expected a port number"),
                (ospa(port="0x10"), "4: serverPort: expected a port number"),
                (ospa(adk="7O4ZIR"), "6: adk.secret: " + secret),
                (ospa(adk="7O4ZIRIA"), "6: adk.secret: " + secret),
                (ospa(adk="7o4ziri"), "6: adk.secret: " + secret),
                (ospa(adk="7O4ZIR1"), "6: adk.secret: " + secret),
                (ospa(adk="7O4ZIRJ"), "6: adk.secret: " + secret),  # three bits too many
                (ospa(suites=SUITE), suites + "expected one of"),
                (ospa(suites="[]"), suites + "expected one of"),
                (ospa(suites="[CipherSuite_NoSecurity]"), suites + "expected one of"),
                (ospa(suites="[%s, CipherSuite_NoSecurity]" % SUITE), suites + word),
                (ospa(suites="[%s" % SUITE), suites + word),
                (ospa(suites="\n   -%s" % SUITE), suites + "expected one of"),
                (ospa(private="        x"), "11: " + client.PRIVATE + ": expected one PEM block"),
                (ospa(private=""), "11: " + client.PRIVATE + ": expected one PEM block"),
                (ospa(private=indented(PRIVATE, 6)), "11: " + client.PRIVATE + ": expected one"),
                (ospa(private=indented(PRIVATE[:-90])), "11: " + client.PRIVATE + ": expected one"),
                (ospa(private=indented(PUBLIC)),
                 "11: " + client.PRIVATE + ": expected a private key, not PUBLIC KEY"),
                (ospa(private=indented(PRIVATE.replace("A", "B", 9))), "11: " + client.PRIVATE),
                (ospa(server=indented(PRIVATE)), client.SERVER_KEY + ": expected a public key"),
                (ospa(public=indented("x")), client.PUBLIC + ": expected one PEM block"),
                (plain.replace("privateKey: |\n", "privateKey: >\n"),
                 "11: " + client.PRIVATE + ": " + word)):
            with self.subTest(text.splitlines()[:11], expected=expected):
                error = self.error(text)
                self.assertRegex(error, r"\Af:\d+: ")
                self.assertIn(":" + expected if expected[0].isdigit() else expected, error)

    def test_missing_keys(self) -> None:
        """They are named; the file has no line for them."""
        self.assertEqual("f: expected clientUUID serverPort", self.error("".join(
            line for line in ospa().splitlines(True) if line[:8] not in ("clientUU", "serverPo"))))
        for text in ("", "# nothing\n", "\n\n"):
            error = self.error(text)
            self.assertEqual(7, len(error.split()) - 2, error)  # all but adk.secret, publicKey
        self.assertIn("f: expected crypto", self.error(ospa().partition("crypto:")[0]))

    def test_file(self) -> None:
        """It must exist; others who can read it are worth a warning; one may come from a pipe."""
        words = ["-T", "-A", "tcp/22", "--ospa"]
        path = self.place("none.ospa")
        self.assertEqual(path + ": cannot be read: No such file or directory",
                         self.failure(3, *words, path))
        self.assertEqual(self.directory + ": cannot be read: Is a directory",
                         self.failure(3, *words, self.directory))
        path = self.write("version: 1\n", "bad.ospa")
        self.assertEqual(path + ":1: version: expected one of 0.2", self.failure(3, *words, path))
        code, out, err = self.run_main(*words, self.write("\ufeff" + ospa(), "open.ospa", 0o644))
        self.assertEqual((0, 1), (code, err.count("\n")))
        self.assertIn("open.ospa: permissions should only be user read/write (0600, -rw", err)


class FakeServer:
    """A UDP port that answers requests as `act` wants it: it gets the request and `self`."""

    def __init__(self, act: "Callable[[FakeServer, bytes, Any], None]", host: str = HOST,
                 secret: bytes = b"") -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.act, self.secret, self.seconds = act, secret, 30
        self.key, self.client_key = key(FIRST["server_private_pem"]), key(PUBLIC)
        self.socket = socket.socket(family, socket.SOCK_DGRAM)
        self.socket.bind((host, 0))
        self.address = self.socket.getsockname()
        self.port = str(self.address[1])
        self.requests = []  # type: List[bytes]
        self.times = []  # type: List[float]
        self.problems = []  # type: List[BaseException]
        self.thread = threading.Thread(target=self.serve, daemon=True)

    def __enter__(self) -> "FakeServer":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with socket.socket(self.socket.family, socket.SOCK_DGRAM) as link:
            link.sendto(b"", self.address)
        self.thread.join()
        self.socket.close()
        if self.problems:
            raise self.problems[0]

    def serve(self) -> None:
        """Take requests until an empty one comes."""
        while True:
            request, peer = self.socket.recvfrom(2000)
            if not request:
                return
            self.requests.append(request)
            self.times.append(time.monotonic())
            try:
                self.act(self, request, peer)
            except Exception as problem:
                self.problems.append(problem)

    def open(self, request: bytes) -> Any:
        """Check a request as a server does, and return its fields."""
        header, packet, signature = server.unseal_ospa(request, self.key)
        assert self.client_key.verify(header + packet, signature)
        control, _, suite, reserved, proof = struct.unpack(server.OSPA_HEADER, header)
        assert (control, suite, reserved) == (0x20, 1, 0)
        fields = server.decode_ospa(packet, False)
        assert proof == (server.adk_proof(self.secret, fields.timestamp) if self.secret else 0)
        assert fields.encode() == packet  # in the order of the reference
        return fields

    def answer(self, request: bytes, **changes: Any) -> bytes:
        """The answer to a request, or one with other fields, header or signer."""
        asked = self.open(request)
        values = dict({"protocol": asked.protocol, "ports": asked.ports, "target": asked.target,
                       "seconds": self.seconds}, **changes)
        signer, header = values.pop("signer", self.key), bytearray(struct.pack(
            server.OSPA_HEADER, values.pop("control", 0xA0),
            (request[1] + values.pop("later", 0)) % 256, values.pop("suite", 1), 0,
            values.pop("proof", 0)))
        made = server.OspaFields(values["protocol"], values["ports"], values["target"],
                                 seconds=values["seconds"])
        return server.seal_ospa(bytes(header), made.encode(), signer, self.client_key,
                                os.urandom(48), os.urandom(3))

    def send(self, datagram: bytes, peer: Any) -> None:
        """Send from the server's port."""
        self.socket.sendto(datagram, peer)


def answers(fake: FakeServer, request: bytes, peer: Any) -> None:
    """Answer each request."""
    fake.send(fake.answer(request), peer)


def keeps_silent(fake: FakeServer, request: bytes, peer: Any) -> None:
    """Check a request, and answer nothing."""
    fake.open(request)


class OspaCase(Case):
    """Knocks at a fake server."""

    def file(self, fake: FakeServer, **more: Any) -> str:
        """The OSPA file for a server."""
        return self.write(ospa(**dict({"host": fake.address[0], "port": fake.port}, **more)),
                          "client.ospa")

    def knock(self, *words: str) -> Tuple[int, str, List[str]]:
        """Exit code, output, and the lines on standard error without the program's name."""
        with mock.patch.dict(os.environ, self.environment, clear=True):
            code, out, err = captured(lambda: client.main(list(words)))
        return code, out, [line.partition(": ")[2] for line in err.splitlines()]

    def good(self, fake: FakeServer, *words: str, **more: Any) -> str:
        """What a knock that does well prints."""
        code, out, err = self.knock("--ospa", self.file(fake, **more), *words)
        self.assertEqual((0, []), (code, err))
        return out


class RequestTest(OspaCase):
    """What is sent."""

    def test_fields(self) -> None:
        """Protocol, ports, addresses, time, UUID; the socket's own address unless -a says more."""
        for words, protocol, ports, address in (
                ("-A tcp/22", 6, (22, 22), HOST), ("-A udp/53 -s", 17, (53, 53), HOST),
                ("-A tcp/8000-8100 -a 192.0.2.7", 6, (8000, 8100), "192.0.2.7"),
                ("-A udp/65535-65535 -a 2001:db8::7", 17, (65535, 65535), "2001:db8::7")):
            with self.subTest(words), FakeServer(answers) as fake:
                before = int(time.time())
                out = self.good(fake, *words.split())
                fields = fake.open(fake.requests[0])
                self.assertEqual((protocol, ports), (fields.protocol, fields.ports))
                self.assertEqual(HOST, socket.inet_ntoa(fields.target))
                self.assertEqual(address, server.socket_text(fields.client))
                self.assertEqual(UUID.replace("-", ""), fields.uuid.hex())
                self.assertLessEqual(before, fields.timestamp)
                self.assertLessEqual(fields.timestamp, time.time())
                self.assertEqual(1, len(fake.requests))
                self.assertIn(len(fake.requests[0]), (608, 616, 624))
                self.assertEqual(f"{HOST}: opened {words.split()[1]} for 30 seconds\n", out)

    def test_adk(self) -> None:
        """With a secret the header has its proof of this minute."""
        with FakeServer(answers, secret=base64.b32decode("7O4ZIRI=")) as fake:
            self.good(fake, "-A", "tcp/22", adk="7O4ZIRI")
            self.assertNotEqual(bytes(4), fake.requests[0][4:8])

    def test_each_request_is_fresh(self) -> None:
        """Session, nonce and transaction are random."""
        with FakeServer(answers) as fake:
            for _ in range(4):
                self.good(fake, "-A", "tcp/22")
        self.assertGreater(len({request[1] for request in fake.requests}), 1)
        self.assertEqual(4, len({request[-256:] for request in fake.requests}))

    def test_several_entries(self) -> None:
        """Each entry of -A is a request."""
        with FakeServer(answers) as fake:
            out = self.good(fake, "-A", "tcp/22,udp/53", "-q")
            self.assertEqual([(6, (22, 22)), (17, (53, 53))], [
                (fields.protocol, fields.ports) for fields in map(fake.open, fake.requests)])
        self.assertEqual("", out)

    def test_time_offset(self) -> None:
        """As always."""
        with FakeServer(answers, secret=base64.b32decode("7O4ZIRI=")) as fake:
            self.good(fake, "-A", "tcp/22", "--time-offset-minus", "1h", adk="7O4ZIRI")
            self.assertAlmostEqual(time.time() - 3600, fake.open(fake.requests[0]).timestamp,
                                   delta=TIMEOUT)

    def test_ipv6(self) -> None:
        """Target and client are of the socket's family; a scope is not sent."""
        try:
            fake = FakeServer(answers, "::1")
        except OSError as error:
            skip(f"no IPv6: {error}")
        with fake:
            out = self.good(fake, "-A", "tcp/22")
            fields = fake.open(fake.requests[0])
            self.assertEqual((bytes(15) + b"\1",) * 2, (fields.target, fields.client))
        self.assertEqual("::1: opened tcp/22 for 30 seconds\n", out)

    def test_test(self) -> None:
        """-T prints a request, which the server would take, and sends nothing."""
        with FakeServer(answers) as fake:
            path = self.file(fake)
            for words in ([], ["-a", "192.0.2.7"]):
                code, out, err = self.knock("--ospa", path, "-A", "tcp/22", "-T", *words)
                self.assertEqual((0, []), (code, err))
                about, datagram, end = out.splitlines()
                self.assertRegex(about, r"\AOpenSPA request of %s at \d+: open tcp/22 of %s for"
                                 r" %s\Z" % (UUID, HOST, words[-1] if words else HOST))
                self.assertEqual("test mode enabled, SPA packet not actually sent.", end)
                fake.open(bytes.fromhex(datagram))
            code, out, err = self.knock("--ospa", path, "-A", "tcp/22", "-v")
            self.assertEqual((0, []), (code, err))
            self.assertIn(fake.requests[0].hex(), out)
            self.assertIn("send_spa_packet: bytes sent: 608\n", out)
        self.assertEqual(1, len(fake.requests))

    def test_knock_sequence_first(self) -> None:
        """KNOCK_SEQUENCE comes before the request, which needs no KEY."""
        with FakeServer(answers) as fake, mock.patch.object(client, "send_knock_packet") as hit:
            self.good(fake, "-A", "tcp/22", "--knock-sequence", "7001,7002")
        self.assertEqual((2, 1), (hit.call_count, len(fake.requests)))

    def test_own_address_of_others(self) -> None:
        """-R and --resolve-stun ask as always."""
        with FakeServer(answers) as fake, \
                mock.patch.object(client, "resolve_address", return_value="192.0.2.9"), \
                mock.patch.object(client, "ask_stun", return_value="192.0.2.8"):
            self.assertIn("for 192.0.2.9\n", self.good(fake, "-A", "tcp/22", "-R", "-v"))
            self.assertIn("for 192.0.2.8\n", self.good(fake, "-A", "tcp/22", "-v",
                                                          "--resolve-stun", "x"))


class SettingsTest(OspaCase):
    """Options and directives."""

    def test_rc_file(self) -> None:
        """OSPA_FILE in a stanza does the same; keys for packets do not matter."""
        with FakeServer(answers) as fake:
            self.write("[default]\nKEY_BASE64 AAAA\nUSE_HMAC Y\n[gate]\nOSPA_FILE %s\n"
                       "ACCESS tcp/22\n" % self.file(fake))
            code, out, err = self.knock("-n", "gate")
            self.assertEqual((0, []), (code, err))
            self.assertEqual(f"{HOST}: opened tcp/22 for 30 seconds\n", out)
            with open(self.place(".fwknop.run")) as file:
                self.assertEqual("fwknop -n gate\n", file.read())
            self.knock("-n", "gate", "-q", "--ospa", self.file(fake))
            code, out, err = self.knock("-l", "-q")
            self.assertEqual((0, "", []), (code, out, err))
        self.assertEqual(3, len(fake.requests))

    def test_save_stanza(self) -> None:
        """--save-rc-stanza writes OSPA_FILE."""
        with FakeServer(answers) as fake:
            path = self.file(fake)
            self.good(fake, "-A", "tcp/22", "-n", "new", "--save-rc-stanza")
        with open(self.place(".fwknoprc")) as file:
            self.assertRegex(file.read(), r"\[new\]\nACCESS +tcp/22\nOSPA_FILE +%s\n" % path)

    def test_server(self) -> None:
        """-D and -p go before the file."""
        with FakeServer(answers) as fake:
            for words, more in ((["-D", HOST], {"host": "192.0.2.1"}), (["-p", fake.port], {
                    "port": 9}), (["-D", "localhost", "-4", "-p", fake.port], {"port": 9})):
                self.good(fake, "-A", "tcp/22", *words, **more)
        self.assertEqual(3, len(fake.requests))

    def test_what_it_does_not_know(self) -> None:
        """Exit code 2, and nothing is sent."""
        with FakeServer(answers) as fake:
            path = self.file(fake)
            for words in ("-C id", "-f 30", "-N 10.0.0.1:22", "--nat-local", "--nat-port 5", "-r",
                          "-P tcp", "-P icmp", "-H proxy:80", "-B x"):
                with self.subTest(words):
                    access = [] if words == "-C id" else ["-A", "tcp/22"]
                    self.assertEqual("OpenSPA knows no -B, -C, -f, -r, NAT, or carrier other than"
                                     " udp", self.failure(2, "--ospa", path, *access,
                                                          *words.split()))
            self.assertTrue(self.failure(2, "--ospa", path).startswith("no ports to open given"))
        self.assertEqual([], fake.requests)

    def test_ranges(self) -> None:
        """The lower port comes first, and fwknop's packets know none."""
        self.assertEqual("-A: expected single ports; only --ospa knows ranges",
                         self.failure(2, "-A", "tcp/1-2", "-D", HOST, "-s", "--key-rijndael", "x"))
        for text, expected in (("tcp/2-1", "expected the lower port first"),
                               ("tcp/-1", "expected a port number"), ("tcp/1-", "expected a port"),
                               ("tcp/1-2-3", "expected a port number"), ("icmp/1", "expected tcp/"),
                               ("tcp/1-65536", "expected a port number"),
                               ("tcp/1-000022", "expected tcp/PORT")):
            self.assertTrue(self.failure(2, "--ospa", "x", "-A", text).startswith(
                "-A: " + expected), text)

    def test_help(self) -> None:
        """--help, the manual page and all completions have --ospa."""
        for words in (["--help"], ["--man"], ["--completion", "bash"], ["--completion", "zsh"],
                      ["--completion", "fish"]):
            code, out, err = self.knock(*words)
            self.assertRegex(out.replace("\\-", "-"), "(--|-l )ospa", words)

    def test_no_imports(self) -> None:
        """A request needs no more modules than a packet."""
        with FakeServer(answers) as fake:
            path, needed = self.file(fake, adk="7O4ZIRI"), []
            fake.secret = base64.b32decode("7O4ZIRI=")
            tell = "import atexit, sys\natexit.register(lambda: print(*sorted(sys.modules)))"
            for words in (["--ospa", path], ["-D", HOST, "-p", fake.port, "--key-rijndael", "k"]):
                with mock.patch.object(fake, "act", answers if "--ospa" in words else mock.Mock()):
                    done = self.script(["-A", "tcp/22", "-a", HOST, "-q", *words], before=tell)
                self.assertEqual((0, b""), (done.returncode, done.stderr))
                needed.append(set(done.stdout.decode().split()))
        self.assertLessEqual(needed[0] - needed[1], {"_sha1", "_sha256", "_sha2"})


class AnswerTest(OspaCase):
    """Which answers are taken."""

    def test_answers_of_the_reference(self) -> None:
        """Those of the vectors belong to their requests."""
        count = 0
        for vector in VECTORS:
            packets = {each["direction"]: each for each in vector["packets"]}
            if "response" not in packets:
                continue
            raw = bytes.fromhex(packets["request"]["hex"])
            values = client.parse_ospa(ospa(private=indented(vector["client_private_pem"]),
                                            server=indented(vector["server_public_pem"])), "f")
            request = client.OspaRequest.__new__(client.OspaRequest)
            request.keys = values[client.PRIVATE], values[client.SERVER_KEY]
            request.header, packet, _ = server.unseal_ospa(raw, key(vector["server_private_pem"]))
            request.fields = client.decode_ospa(packet, False)
            answer = bytes.fromhex(packets["response"]["hex"])
            with self.subTest(vector["name"]):
                self.assertEqual(packets["response"]["decoded"]["fields"]["duration"],
                                 request.decode_answer(answer))
                for bad in (answer[:-1], answer[1:], answer + bytes(1444), b"", raw,
                            answer[:1] + bytes([answer[1] ^ 1]) + answer[2:],
                            answer[:40] + bytes([answer[40] ^ 1]) + answer[41:]):
                    with self.assertRaises(ValueError):
                        request.decode_answer(bad)
            count += 1
        self.assertEqual(9, count)

    def test_wrong_calculation(self) -> None:
        """A signature that this machine got wrong is not sent: it could give the key away."""
        with FakeServer(answers) as fake, \
                mock.patch.object(client.RsaKey, "sign", side_effect=ArithmeticError("wrong")):
            self.assertEqual("wrong", self.failure(1, "--ospa", self.file(fake), "-A", "tcp/22"))
        self.assertEqual([], fake.requests)

    def test_strays(self) -> None:
        """Whatever else comes, also from the server's address and port, the answer counts."""
        other = key(FIRST["client_private_pem"])

        def act(fake: FakeServer, request: bytes, peer: Any) -> None:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
                stranger.sendto(fake.answer(request, seconds=99), peer)
            good = fake.answer(request)
            for stray in (b"\0", b"\xa0", os.urandom(576), good[:8], good[:-1], good + bytes(900),
                          request, good[:100] + os.urandom(100) + good[200:],
                          fake.answer(request, signer=other), fake.answer(request, later=1),
                          fake.answer(request, later=255), fake.answer(request, control=0x20),
                          fake.answer(request, control=0xB0), fake.answer(request, suite=2),
                          fake.answer(request, proof=1), fake.answer(request, protocol=17),
                          fake.answer(request, ports=(22, 23)), fake.answer(request, seconds=0),
                          fake.answer(request, target=bytes(4)),
                          fake.answer(request, target=bytes(16)), bytes(60000)):
                fake.send(stray, peer)
            fake.send(good, peer)

        with mock.patch.object(client, "OSPA_SECONDS", TIMEOUT), FakeServer(act) as fake:
            self.assertEqual(f"{HOST}: opened tcp/22 for 30 seconds\n",
                             self.good(fake, "-A", "tcp/22"))
        self.assertEqual(1, len(fake.requests))

    def test_same_bytes_again(self) -> None:
        """A lost request or answer is sent again after a second; another answer does no harm."""
        def act(fake: FakeServer, request: bytes, peer: Any) -> None:
            if len(fake.requests) > 1:
                answers(fake, request, peer)
                answers(fake, request, peer)

        with FakeServer(act) as fake:
            fake.seconds = 16777215
            self.assertIn(" 16777215 seconds\n", self.good(fake, "-A", "tcp/22"))
        self.assertGreaterEqual(len(fake.requests), 2)
        self.assertEqual(1, len(set(fake.requests)))
        self.assertGreater(fake.times[1] - fake.times[0], 0.9)

    def check_failure(self, fake: FakeServer) -> None:
        """Knock in vain: exit code 1, the reasons, three times the same bytes."""
        with mock.patch.object(client, "OSPA_SECONDS", 0.3):
            begin = time.monotonic()
            code, out, err = self.knock("--ospa", self.file(fake), "-A", "tcp/22")
            self.assertGreater(time.monotonic() - begin, 0.85)
            self.assertEqual((1, ""), (code, out))
            self.assertEqual(1, len(err))
            self.assertRegex(err[0], (
                r"\A%s: no answer \(perhaps udp/%s can't be reached, or no server runs there; it"
                r" does not know the key of %s, or allow tcp/22 for %s \(NAT\? -R, -a\); or a clock"
                r" is wrong: ours says \w+ \w+ .* UTC\)\Z") % (HOST, fake.port, UUID, HOST))
        self.assertFalse(os.path.exists(self.place(".fwknop.run")))

    def test_no_answer(self) -> None:
        """Three times the same bytes."""
        with FakeServer(keeps_silent) as fake:
            self.check_failure(fake)
        self.assertEqual([fake.requests[0]] * 3, fake.requests)

    def test_wrong_answers_only(self) -> None:
        """They are as good as none."""
        other = key(FIRST["client_private_pem"])
        for changes in ({"signer": other}, {"later": 1}):  # type: Dict[str, Any]
            def act(fake: FakeServer, request: bytes, peer: Any,
                    changes: Dict[str, Any] = changes) -> None:
                fake.send(fake.answer(request, **changes), peer)

            with self.subTest(changes), FakeServer(act) as fake:
                self.check_failure(fake)

    def test_port_unreachable(self) -> None:
        """It does not end the wait: anybody could send it."""
        fake = FakeServer(answers)
        fake.socket.close()
        self.check_failure(fake)

    def test_port_opens_late(self) -> None:
        """After "port unreachable" the second request is answered."""
        fake = FakeServer(answers)
        fake.socket.close()

        def start() -> None:
            fake.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            fake.socket.bind(fake.address)
            fake.thread.start()

        timer = threading.Timer(0.3, start)
        timer.start()
        self.assertIn("opened tcp/22", self.good(fake, "-A", "tcp/22"))
        timer.join()
        fake.__exit__()

    def test_several_addresses(self) -> None:
        """One that answers is enough, with a warning for the other."""
        with FakeServer(answers) as fake, FakeServer(keeps_silent) as silent:
            both = [(socket.AF_INET, each.address) for each in (silent, fake)]
            with mock.patch.object(client, "find_addresses", return_value=both), \
                    mock.patch.object(client, "OSPA_TRIES", 1):
                code, out, err = self.knock("--ospa", self.file(fake), "-A", "tcp/22", "-D", "gate")
        self.assertEqual((0, f"{HOST}: opened tcp/22 for 30 seconds\n"), (code, out))
        self.assertIn(f"warning: one address of gate got no packet: {HOST}: no answer (", err[-1])

    def test_several_stanzas(self) -> None:
        """The next server has its turn after one that does not answer."""
        with FakeServer(answers) as fake, FakeServer(keeps_silent) as silent:
            self.write("[default]\nACCESS tcp/22\n[a]\nOSPA_FILE %s\nSPA_SERVER_PORT %s\n"
                       "[b]\nOSPA_FILE %s\n" % (self.file(fake), silent.port, self.file(fake)))
            with mock.patch.object(client, "OSPA_TRIES", 1):
                code, out, err = self.knock("-n", "a,b")
        self.assertEqual((1, f"[b] {HOST}: opened tcp/22 for 30 seconds\n"), (code, out))
        self.assertEqual("1 of 2 knocks failed", err[-1])
        self.assertIn(f"[a] {HOST}: no answer (perhaps ", err[-2])


class AfterTest(OspaCase):
    """--wait, --proxy and --exec."""

    def setUp(self) -> None:
        super().setUp()
        self.tcp = socket.socket()
        self.addCleanup(self.tcp.close)
        self.tcp.bind((HOST, 0))
        self.port = str(self.tcp.getsockname()[1])

    def test_wait(self) -> None:
        """The port opens; as long as it should be open, nobody asks again."""
        timer = threading.Timer(1.3, self.tcp.listen, [1])
        with FakeServer(answers) as fake:
            timer.start()
            out = self.good(fake, "-A", "tcp/" + self.port, "--wait", "60")
            timer.join()
        self.assertRegex(out, r"(?s)\A%s: opened tcp/%s for .*tcp/%s of %s opened after"
                         % (HOST, self.port, self.port, HOST))
        self.assertEqual(1, len(fake.requests))

    def test_wait_asks_again(self) -> None:
        """When the time of the answer is over, a fresh request follows."""
        def act(fake: FakeServer, request: bytes, peer: Any) -> None:
            fake.send(fake.answer(request, seconds=1), peer)
            if len(fake.requests) == 2:
                self.tcp.listen(1)

        with FakeServer(act) as fake:
            out = self.good(fake, "-A", f"tcp/{self.port}-65535", "--wait", "60")
        self.assertEqual(2, out.count("\n"))
        self.assertGreaterEqual(len(set(fake.requests)), 2)

    def test_no_port(self) -> None:
        """UDP alone has nothing to wait for."""
        with FakeServer(answers) as fake:
            self.assertEqual("there is no TCP port in -A to wait for (--wait-port names one)",
                             self.failure(2, "--ospa", self.file(fake), "-A", "udp/53", "--wait",
                                          "9"))

    def test_exec(self) -> None:
        """The command gets the terminal for itself; without an answer it does not run."""
        self.tcp.listen(1)
        with FakeServer(answers) as fake:
            words = ["--ospa", self.file(fake), "-A", "tcp/" + self.port, "--exec", "echo", "hello"]
            done = self.script(words)
            self.assertEqual((0, b"hello\n", b""), (done.returncode, done.stdout, done.stderr))
        with FakeServer(keeps_silent) as fake:
            done = self.script(["--ospa", self.file(fake), *words[2:]])
            self.assertEqual((1, b"", 1), (done.returncode, done.stdout, done.stderr.count(b"\n")))

    def test_proxy(self) -> None:
        """Standard output has only what the connection brings."""
        self.tcp.listen(1)

        def serve() -> None:
            with self.tcp.accept()[0] as link:
                link.sendall(b"hello\n")

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        with FakeServer(answers) as fake:
            done = self.script(["--ospa", self.file(fake), "-A", "tcp/22", "--proxy", HOST,
                                self.port])
        thread.join()
        self.assertEqual((0, b"hello\n", b""), (done.returncode, done.stdout, done.stderr))
