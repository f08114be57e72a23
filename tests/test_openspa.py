"""OpenSPA v2: RSA, keys, the packet and the server's gate, on the reference programs' packets."""

import base64
import functools
import json
import os
import socket
import struct
import unittest
from unittest import mock
from typing import Any, Dict, List  # noqa: F401

import spa_server as server
from tests.support import TOP, write
from tests.test_server import ServerCase, ipv4, ipv6, run_filter, udp

with open(os.path.join(TOP, "tests", "vectors", "openspa.json")) as _file:
    VECTORS = json.load(_file)  # type: Dict[str, Any]
FIRST = VECTORS["vectors"][0]


def key(pem: str, private: bool = False, rand: Any = os.urandom) -> server.RsaKey:
    """Return a key from PEM."""
    return server.RsaKey.parse(pem, private, rand)


# Why ours rejects what the reference accepts (tests/spec/openspa.md 1.13, 1.14), by the counter.
STRICTER = {
    "timestamp 0 (1970)": "stale",
    "no timestamp item": "OpenSPA length",  # 592 bytes are none of the lengths of 1.6
    "type bit = response": "OpenSPA header", "version 1": "OpenSPA header",
    "cipher suite 99": "OpenSPA header",
    "1 trailing byte 0xAA": "OpenSPA length",
    "port 1 byte": "OpenSPA length"}
# What both drop: ours looks at the length first, then at what is encrypted.
DROPPED = {
    "nonce 2 bytes": "OpenSPA length", "no nonce": "OpenSPA length",
    "no end port": "OpenSPA length", "packet of 1500 bytes": "OpenSPA length",
    "8 byte header only": "OpenSPA length",
    "both client v4+v6": "OpenSPA decryption", "start 10 end 8": "OpenSPA decryption",
    "protocol 47 GRE": "OpenSPA decryption", "wrong signature": "OpenSPA signature",
    "unknown uuid": "OpenSPA signature"}


class RsaTest(unittest.TestCase):
    """RFC 8017 and the files that keys are in."""

    def test_all_keys_of_the_vectors(self) -> None:
        """Each signs and decrypts what its public key verifies and encrypts."""
        for vector in VECTORS["vectors"]:
            for name in ("server", "client"):
                with self.subTest(vector["name"], key=name):
                    private = key(vector[name + "_private_pem"], True)
                    public = key(vector[name + "_public_pem"])
                    self.assertEqual(vector[name + "_key_bits"], 8 * public.size)
                    signature = private.sign(b"text")
                    self.assertTrue(public.verify(b"text", signature))
                    self.assertFalse(public.verify(b"test", signature))
                    self.assertFalse(public.verify(b"text", signature[:-1]))
                    block = public.encrypt(b"k" * 48)
                    self.assertEqual(b"k" * 48, private.decrypt(block, 48))
                    self.assertEqual(private.sign(b"text"), signature, "blinding changes nothing")

    def test_wrong_padding_gives_a_random_session(self) -> None:
        """Whatever is wrong with it: the size, one of the bytes before, or the number."""
        private, public = key(FIRST["server_private_pem"], True), key(FIRST["server_public_pem"])
        size = public.size
        for padded in (b"\0\1" + b"\1" * (size - 51) + b"\0" + b"k" * 48,
                       b"\0\2" + b"\1" * (size - 52) + b"\0" + b"k" * 49,
                       b"\0\2" + b"\1" * (size - 51) + b"\1" + b"k" * 48,
                       b"\0\2\0" + b"\1" * (size - 52) + b"\0" + b"k" * 48):
            self.assertEqual(size, len(padded))
            block = pow(int.from_bytes(padded, "big"), public.exponent, public.modulus)
            found = private.decrypt(block.to_bytes(size, "big"), 48)
            self.assertEqual((48, False), (len(found), found == b"k" * 48))
        for block_bytes in (b"", b"\xff" * size, public.encrypt(b"k" * 48) + b"x"):
            self.assertNotEqual(b"k" * 48, private.decrypt(block_bytes, 48))

    def test_a_fault_gives_no_prime_away(self) -> None:
        """A half that was calculated wrongly is never given out."""
        private = key(FIRST["client_private_pem"], True)
        p, q, dp, dq, inverse = private.primes
        private.primes = p, q, dp + 2, dq, inverse
        self.assertRaises(ArithmeticError, private.sign, b"text")

    def test_other_forms(self) -> None:
        """PKCS#8, and a public key in PKCS#1, are the same keys."""
        private = FIRST["client_private_pem"]
        _, body = server.read_pem(private)

        def item(tag: int, data: bytes) -> bytes:
            """Return an item of DER."""
            size = len(data).to_bytes((len(data).bit_length() + 7) // 8, "big")
            return bytes([tag] + [128 + len(size)] * (len(data) > 127)) + size + data

        def pem(label: str, data: bytes) -> str:
            """Return a block of PEM."""
            return "-----BEGIN %s-----\n%s-----END %s-----\n" % (
                label, base64.encodebytes(data).decode(), label)

        pkcs8 = item(0x30, b"\x02\x01\0" + server.RSA_ALGORITHM + item(0x04, body))
        made = key(private, True)
        self.assertEqual(made.primes, key(pem("PRIVATE KEY", pkcs8), True).primes)
        modulus = item(2, b"\0" + made.modulus.to_bytes(made.size, "big"))
        public = item(0x30, modulus + b"\x02\x03\x01\x00\x01")
        self.assertEqual(made.modulus, key(pem("RSA PUBLIC KEY", public)).modulus)
        self.assertEqual(made.modulus, key("a comment\n" + FIRST["client_public_pem"]).modulus)
        for bad, reason in (
                (pem("RSA PUBLIC KEY", public + b"\0"), "nothing behind"),
                (pem("RSA PUBLIC KEY", item(0x30, modulus + b"\x02\x01\x03")), "65537 or more"),
                (pem("RSA PUBLIC KEY", item(0x30, modulus + b"\x02\x04\0\1\0\1")), "numbers"),
                (pem("RSA PUBLIC KEY", item(0x30, modulus)), "2 numbers"),
                (pem("RSA PUBLIC KEY", item(0x30, item(2, b"\x7f" * 64) + b"\x02\x03\1\0\1")),
                 "modulus of 1024 to 4096 bits, not of 511"),
                (pem("RSA PUBLIC KEY", item(0x30, item(2, b"\0" + (made.modulus + 1).to_bytes(
                    made.size, "big")) + b"\x02\x03\1\0\1")), "odd modulus"),
                (pem("RSA PUBLIC KEY", b"\x30\x84\0\0\0\5" + public), "short lengths"),
                (pem("RSA PUBLIC KEY", public[:-1]), "in DER"),
                (pem("RSA PUBLIC KEY", b"\x30\x80" + public), "short lengths"),
                (pem("PUBLIC KEY", public), "key for RSA"), (private, "a public key, not RSA PRI"),
                (private * 2, "one PEM block"), ("", "one PEM block"), ("x" * 100000, "one PEM"),
                (pem("RSA PUBLIC KEY", public).replace("\n", "\n!", 2), "base64")):
            with self.subTest(reason), self.assertRaisesRegex(ValueError, reason):
                key(bad)
        with self.assertRaisesRegex(ValueError, "belong together"):
            number = made.primes[4].to_bytes(made.size // 2, "big")
            key(pem("RSA PRIVATE KEY", body.replace(number, number[:-1] + b"\1")), True)


class PacketTest(unittest.TestCase):
    """Containers and packets."""

    def test_tlv(self) -> None:
        """The rules of tests/spec/openspa.md 1.3."""
        for text, items in (("", {}), ("00", {}), ("0100", {1: b""}), ("01", None), ("0105", None),
                            ("1002090a110104", {16: b"\x09\x0a", 17: b"\4"}), ("01020a", None),
                            ("010166010166", None), ("010166ff", {1: b"f"}),
                            ("0103010203000103040506", {1: b"\1\2\3"}),
                            ("01ff" + "61" * 255 + "012d" + "62" * 45, {1: b"a" * 255 + b"b" * 45}),
                            ("01ff" + "61" * 255 + "0100", None)):
            with self.subTest(text):
                if items is None:
                    self.assertRaises(ValueError, server.decode_tlv, bytes.fromhex(text))
                else:
                    self.assertEqual(items, server.decode_tlv(bytes.fromhex(text)))
        self.assertEqual("0100000100" + "02ff" + "61" * 255 + "0201" + "61", server.encode_tlv(
            [(1, b""), (1, b""), (2, b"a" * 256)]).hex())

    def test_packets_of_the_reference(self) -> None:
        """Each is decrypted, verified, decoded and encoded again to the byte."""
        for vector in VECTORS["vectors"]:
            keys = {name: key(vector[name + "_private_pem"], True) for name in ("server", "client")}
            for packet in vector["packets"]:
                request = packet["direction"] == "request"
                own, other = keys["server" if request else "client"], keys[
                    "client" if request else "server"]
                datagram, decoded = bytes.fromhex(packet["hex"]), packet["decoded"]
                with self.subTest(vector["name"], direction=packet["direction"]):
                    header, text, signature = server.unseal_ospa(datagram, own)
                    self.assertEqual((decoded["packet_tlv"], decoded["signature"]),
                                     (text.hex(), signature.hex()))
                    self.assertTrue(other.verify(header + text, signature))
                    fields = server.decode_ospa(text, not request)
                    self.assertEqual(text, fields.encode())
                    block = server.decode_tlv(datagram[8:])[2]
                    padded = own.apply_private(int.from_bytes(block, "big"))
                    padding = padded.to_bytes(own.size, "big")[2:-49]
                    session = bytes.fromhex(decoded["session_iv"] + decoded["session_key"])
                    own.random_bytes = lambda size, padding=padding: padding  # type: ignore[misc]
                    self.assertEqual(datagram, server.seal_ospa(
                        header, fields.encode(), other, own, session,
                        bytes.fromhex(decoded["nonce"])))
                    if request:
                        self.assertIn(len(datagram), server.ospa_lengths(own.size))
                        self.check_filters(datagram, own.size)

    def check_filters(self, request: bytes, modulus: int) -> None:
        """The filters of both kinds of socket take a request, and nothing that differs in form."""
        test = functools.partial(server.ospa_filter, 22211, modulus)
        whole = server.compile_filter(server.transport_filter((17,), (17,), test))
        plain = server.compile_filter(test(0, 0), any_direction=True)
        for payload, port, passes in (
                (request, 22211, True), (b"\x20\xff" + request[2:], 22211, True),
                (request, 22212, False), (request + b"x", 22211, False),
                (request[:-1], 22211, False), (b"\xa0" + request[1:], 22211, False),
                (request[:2] + b"\2" + request[3:], 22211, False),
                (request[:3] + b"\1" + request[4:], 22211, False)):
            body = udp(payload, port)
            self.assertEqual([passes] * 3, [run_filter(whole, ipv4(body, options=b"\1" * 4)),
                                            run_filter(whole, ipv6(body)), run_filter(plain, body)])

    def test_adk(self) -> None:
        """The proofs of the reference."""
        for item in VECTORS["adk"]["items"]:
            self.assertEqual(item["proof"], server.adk_proof(
                server.parse_adk_secret(item["secret"]), item["unix_time"]))
        for text in ("", "7O4ZIR", "7O4ZIRIA", "7o4ziri", "7O4ZIR1"):
            with self.assertRaises(ValueError):
                server.parse_adk_secret(text)


class GateTest(ServerCase):
    """A request's way through the server."""

    def setUp(self) -> None:
        """Make a server for the first vector's client, and its keys."""
        super().setUp()
        os.mkdir(self.place("clients"))
        write(self.place("clients/%s.pem" % FIRST["client_uuid"]), FIRST["client_public_pem"])
        write(self.place("key.pem"), FIRST["server_private_pem"])
        self.own = key(FIRST["client_private_pem"], True)
        self.other = key(FIRST["server_public_pem"])
        self.replies = []  # type: List[bytes]
        self.addCleanup(setattr, server, "is_own_address", server.is_own_address)
        server.is_own_address = lambda address: str(address) == "10.55.0.1"

    def gate(self, lines: str = "OPEN_PORTS tcp/22\n", conf: str = "") -> server.Server:
        """Return a server whose answers go to `replies`."""
        access = "SOURCE ANY\nOPENSPA_CLIENTS %s\n%s" % (self.place("clients"), lines)
        made = self.serve(access, "OPENSPA_PRIVATE_KEY %s;\n%s" % (self.place("key.pem"), conf))
        configuration = made.configuration._replace(
            ospa_key=server.read_ospa_keys(made.settings, made.gate.stanzas)[0])
        made.ospa.configure(configuration)
        made.gate.answer_sockets.send = (  # type: ignore[method-assign]
            lambda answer, datagram: self.replies.append(answer))
        return made

    def request(self, header: bytes = b"", **fields: Any) -> server.Datagram:
        """Return a request as the client makes it, with some fields changed."""
        uuid = bytes.fromhex(FIRST["client_uuid"].replace("-", ""))
        values: Dict[str, Any] = {
            "protocol": 6, "ports": (22, 22), "target": b"\x0a\x37\0\1", "uuid": uuid,
            "client": b"\x0a\x37\0\2", "timestamp": int(self.clock.wall_time)}
        values.update(fields)
        header = header or struct.pack(server.OSPA_HEADER, server.OSPA_REQUEST, 7, 1, 0, 0)
        packet = server.OspaFields(**values).encode()
        payload = server.seal_ospa(header, packet, self.own, self.other, os.urandom(48), b"abc")
        return server.Datagram(payload, b"\x0a\x37\0\2", 4000, b"\x0a\x37\0\1", 22211)

    def test_opens_and_answers(self) -> None:
        """The answer is signed and says for how long; a repeat is answered, and opens nothing."""
        made = self.gate("OPEN_PORTS tcp/22\nFW_ACCESS_TIMEOUT 77\n")
        datagram = self.request()
        made.ospa.receive(datagram)
        self.assertEqual(["10.55.0.2 -> 0.0.0.0/0 tcp/22"], self.firewall.doors())
        header, packet, signature = server.unseal_ospa(self.replies[0], self.own)
        self.assertTrue(self.other.verify(header + packet, signature))
        self.assertEqual(b"\xa0\x07\x01\0\0\0\0\0", header)
        fields = server.decode_ospa(packet, True)
        self.assertEqual((6, (22, 22), b"\x0a\x37\0\1", 77), (
            fields.protocol, fields.ports, fields.target, fields.seconds))
        made.ospa.receive(datagram)
        self.assertEqual((2, {"accepted": 1}), (len(self.replies), made.tally.counts))
        self.assertEqual(self.replies[0], self.replies[1])
        made.ospa.receive(datagram._replace(source=b"\x0a\x37\0\3"))
        self.clock.pass_seconds(11)
        made.ospa.receive(datagram)
        self.assertEqual((2, {"accepted": 1, "replay": 2}), (len(self.replies), made.tally.counts))
        self.assertIn("user '%s' (client OpenSPA 2.0) opened" % FIRST["client_uuid"], self.logged())

    def test_two_requests_of_one_second(self) -> None:
        """They may differ in their seal alone; then the second is answered like a repeat."""
        made = self.gate()
        first, second = self.request(), self.request()
        self.assertNotEqual(first.payload, second.payload)
        made.ospa.receive(first)
        made.ospa.receive(second._replace(source_port=4001))
        self.assertEqual((2, {"accepted": 1}), (len(self.replies), made.tally.counts))
        made.ospa.receive(self.request()._replace(source=b"\x0a\x37\0\3"))
        self.clock.pass_seconds(11)
        made.ospa.receive(self.request(timestamp=int(self.clock.wall_time) - 11))
        self.assertEqual((2, {"accepted": 1, "replay": 2}), (len(self.replies), made.tally.counts))

    def test_test_mode_answers_nothing(self) -> None:
        """An answer says that ports are open, and there is none that says they are not."""
        made = self.gate()
        made.commands.test = True
        made.ospa.receive(self.request())
        self.assertEqual(({"accepted": 1}, []), (made.tally.counts, self.replies))

    def test_what_is_rejected(self) -> None:
        """By each rule, with its reason; nothing is opened and nothing answered."""
        control = struct.pack(server.OSPA_HEADER, server.OSPA_ANSWER, 7, 1, 0, 0)
        for lines, more, reason in (
                ("", {"header": control}, "OpenSPA header"),
                ("", {"timestamp": int(self.clock.wall_time) - 500}, "stale"),
                ("", {"ports": (22, 23)}, "ports"), ("", {"ports": (1, 200)}, "ports"),
                ("", {"protocol": 1}, "protocol"), ("", {"protocol": 17}, "ports"),
                ("", {"ports": (0, 0)}, "protocol"), ("", {"target": b"\x0a\x37\0\2"}, "target"),
                ("", {"client": b"\x0a\x37\0\3"}, "other address"),
                ("", {"uuid": bytes(16)}, "OpenSPA signature"),
                ("REQUIRE_USERNAME bob\n", {}, "user"), ("ACCESS_EXPIRE_EPOCH 1000\n", {},
                                                         "expired stanza")):
            with self.subTest(reason, more=more):
                self.clock.pass_seconds(1)
                made = self.gate("OPEN_PORTS tcp/22\n" + lines)
                made.ospa.receive(self.request(**more))
                self.assertEqual({reason: 1}, made.tally.counts)
        self.assertEqual(([], []), (self.firewall.doors(), self.replies))
        self.clock.pass_seconds(1)
        made = self.gate("OPEN_PORTS tcp/22\nREQUIRE_SAME_ADDRESS N\n")
        made.ospa.receive(self.request(client=b"\x0a\x37\0\3"))
        self.assertEqual(["10.55.0.3 -> 0.0.0.0/0 tcp/22"], self.firewall.doors())

    def test_a_ration(self) -> None:
        """RSA gets a tenth of the time: a flood of the right length is rejected without it."""
        made = self.gate()
        junk = bytes([server.OSPA_REQUEST, 0, 1, 0]) + bytes(4)
        spent = [self.clock.mono_time]

        def unseal(*_: Any) -> Any:
            """Take 10 ms, as RSA does."""
            self.clock.pass_seconds(0.01)
            raise ValueError("junk")

        patch = mock.patch.object(server, "unseal_ospa", unseal)
        patch.start()
        self.addCleanup(patch.stop)
        for number in range(3000):
            made.ospa.receive(server.Datagram(junk + number.to_bytes(600, "big"), bytes(4), 1,
                                              bytes(4), 22211))
            self.clock.pass_seconds(0.0005)
        passed = self.clock.mono_time - spent[0]
        tried = made.tally.counts["OpenSPA decryption"]
        self.assertLess(0.01 * tried, 0.1 * passed + server.OSPA_BURST + 0.02)
        self.assertGreater(tried, 50)
        self.assertEqual(3000 - tried, made.tally.counts["OpenSPA too fast"])

    def test_adk(self) -> None:
        """Without the minute's proof nothing is decrypted."""
        made = self.gate(conf="OPENSPA_ADK_SECRET 7O4ZIRI;\n")
        proof = server.adk_proof(server.parse_adk_secret("7O4ZIRI"), self.clock.wall_time)
        for number, count in ((0, 0), (proof ^ 1, 0), (proof, 1)):
            made.ospa.receive(self.request(struct.pack(server.OSPA_HEADER, 32, 7, 1, 0, number)))
            self.assertEqual(count, len(self.replies))
        self.assertEqual({"OpenSPA ADK": 2, "accepted": 1}, made.tally.counts)

    def test_a_client_is_a_file(self) -> None:
        """It comes and goes without a reload; a bad file is told by its name."""
        made = self.gate()
        path = self.place("clients/%s.pem" % FIRST["client_uuid"])
        os.rename(path, self.place("clients/%s" % FIRST["client_uuid"]))
        made.ospa.receive(self.request())
        self.assertEqual(1, len(self.replies))
        os.unlink(self.place("clients/%s" % FIRST["client_uuid"]))
        made.ospa.receive(self.request(timestamp=int(self.clock.wall_time) + 1))
        write(path, "x")
        made.ospa.receive(self.request(timestamp=int(self.clock.wall_time) + 2))
        self.assertEqual((1, {"accepted": 1, "OpenSPA signature": 2}),
                         (len(self.replies), made.tally.counts))
        self.assertIn(path + ": expected one PEM block", self.logged())

    def test_crafted_requests(self) -> None:
        """The verdicts on requests that the reference has judged: the same, or stricter."""
        server.is_own_address = lambda address: str(address) == "10.99.0.1"
        for item in VECTORS["crafted_requests"]["items"]:
            with self.subTest(item["name"]):
                made = self.gate()
                made.gate.memory = server.ReplayMemory("", 120, self.log, self.clocks)
                self.clock.wall_time = 1795368310.0  # two seconds after they were made
                made.gate.memory.began = 0.0
                made.ospa.receive(server.Datagram(bytes.fromhex(item["hex"]), b"\x0a\x63\0\2", 4000,
                                                  b"\x0a\x63\0\1", 22211))
                dropped = item["reference_verdict"] == "dropped"
                reason = (DROPPED if dropped else STRICTER).get(item["name"], "accepted")
                self.assertEqual({reason: 1}, made.tally.counts)

    def test_a_void_stanza_opens_nothing(self) -> None:
        """A user's broken key file must not lift the rest of the stanza, such as its expiry."""
        keys = write(self.place("keys"), "KEY\n")
        made = self.gate("OPEN_PORTS tcp/22\n%%include_keys %s\nACCESS_EXPIRE_EPOCH 1000\n" % keys)
        self.assertTrue(made.gate.stanzas[0].void)
        made.ospa.key = server.read_rsa_key(self.place("key.pem"), True)
        made.ospa.lengths = server.ospa_lengths(made.ospa.key.size)
        made.ospa.receive(self.request())
        self.assertEqual(([], []), (self.firewall.doors(), self.replies))

    def test_two_files_of_a_client(self) -> None:
        """Neither counts: the first by name may be an old key, put aside."""
        made = self.gate()
        path = self.place("clients/%s." % FIRST["client_uuid"])
        os.rename(path + "pem", path + "old")
        write(path + "pem", VECTORS["vectors"][1]["client_public_pem"])
        made.ospa.receive(self.request())
        self.assertEqual(({"OpenSPA signature": 1}, []), (made.tally.counts, self.replies))
        self.assertIn("expected one file for a client, not %s.old and" % FIRST["client_uuid"],
                      self.logged())

    def test_files_are_read_within_the_ration(self) -> None:
        """Our public key is enough to have them read, and to have errors of them logged."""
        made = self.gate()

        def read(*_: Any) -> Any:
            """Take 20 ms, as a large directory does."""
            self.clock.pass_seconds(0.02)
            raise server.ConfigError("a bad file")

        with mock.patch.object(server, "read_client_key", read):
            for number in range(60):
                made.ospa.receive(self.request(timestamp=number))
        self.assertLessEqual(made.tally.counts["OpenSPA signature"], 29)
        self.assertGreater(made.tally.counts["OpenSPA too fast"], 30)
        self.assertLess(self.logged().count("a bad file"), 29)

    def test_an_answer_does_not_wait(self) -> None:
        """Answers that wait for a neighbour's address fill the buffer: the loop must go on."""
        made = self.gate()
        del made.gate.answer_sockets.send
        sender = mock.Mock()
        sender.sendmsg.side_effect = BlockingIOError(11, "full")
        made.gate.answer_sockets.sockets = {(22211, 4): sender}
        made.ospa.receive(self.request())
        (_, control, flags, peer), _ = sender.sendmsg.call_args
        self.assertEqual((socket.MSG_DONTWAIT, ("10.55.0.2", 4000)), (flags, peer))
        self.assertEqual([(0, 8, b"\0\0\0\0\x0a\x37\0\1\0\0\0\0")], control)
        self.assertEqual({"accepted": 1}, made.tally.counts)

    def test_addresses_of_no_host(self) -> None:
        """0.0.0.0, `::`, broadcast and multicast are rejected, whoever may name other addresses."""
        made = self.gate("OPEN_PORTS tcp/22\nREQUIRE_SAME_ADDRESS N\n")
        hosts = bytes(4), bytes(16), b"\xff" * 4, b"\xe0\0\0\1", b"\xff\2" + bytes(14)
        for host in hosts:
            made.ospa.receive(self.request(client=host))
        self.assertEqual(({"no address": len(hosts)}, []), (made.tally.counts, self.replies))

    def test_source_comes_before_rsa(self) -> None:
        """Junk from where no client is uses up nothing of the ration."""
        made = self.gate("OPEN_PORTS tcp/22\nDESTINATION 10.55.0.9\n")
        with mock.patch.object(server, "unseal_ospa", side_effect=AssertionError):
            made.ospa.receive(self.request())
        self.assertEqual({"source": 1}, made.tally.counts)

    def test_a_knock_comes_first(self) -> None:
        """REQUIRE_KNOCK needs no KEY beside OpenSPA; without the knock nothing opens."""
        made = self.gate("OPEN_PORTS tcp/22\nKNOCK_SEQUENCE 7000,8000\nREQUIRE_KNOCK Y\n")
        made.ospa.receive(self.request())
        self.assertEqual(({"no knock": 1}, []), (made.tally.counts, self.replies))
        made.knocks.knocked[1, b"\x0a\x37\0\2"] = self.clock.mono_time + 5
        self.clock.pass_seconds(1)
        made.ospa.receive(self.request())
        self.assertEqual(1, len(self.replies))

    def test_a_reload_loses_no_request(self) -> None:
        """What waits in a capture is taken before another one takes its place."""
        made = self.gate()
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.addCleanup(there.close)
        capture, datagram = server.OspaCapture(here, 0, "any"), self.request()
        capture.decode = lambda _: datagram  # type: ignore[method-assign]
        made.listen([capture])
        made.gate.answer_sockets.close()
        there.send(b"x")
        made.listen([])
        self.assertEqual(1, len(self.replies))


class ConfigurationTest(ServerCase):
    """Files and directives."""

    def test_errors(self) -> None:
        """The key, the directory and each client's file, by name."""
        os.mkdir(self.place("clients"))
        path = write(self.place("key.pem"), FIRST["server_private_pem"])
        stanzas = self.stanzas("SOURCE ANY\nOPENSPA_CLIENTS %s\n" % self.place("clients"))
        settings = server.ServerSettings()
        settings.set_defaults()
        with self.assertRaisesRegex(server.ConfigError, "OPENSPA_PRIVATE_KEY: expected the server"):
            server.read_ospa_keys(settings, stanzas)
        settings.set_line(server.Line("f", 1, "OPENSPA_PRIVATE_KEY", path))
        uuid = FIRST["client_uuid"]
        write(self.place("clients/" + uuid), FIRST["client_private_pem"])
        os.chmod(path, 0o600)
        os.chmod(self.place("clients"), 0o700)
        found, warnings = server.read_ospa_keys(settings, stanzas)
        self.assertIsNotNone(found)
        self.assertEqual(["(stanza #1) %s: expected a public key, not RSA PRIVATE KEY"
                          % self.place("clients/" + uuid)], warnings)
        os.chmod(path, 0o644)
        os.chmod(self.place("clients"), 0o777)
        for text in server.read_ospa_keys(settings, stanzas)[1][:2]:
            self.assertRegex(text, r"key\.pem permissions should|clients is writable by others")
        write(path, FIRST["server_public_pem"])
        with self.assertRaisesRegex(server.ConfigError, "key.pem: expected a private key, not PUB"):
            server.read_ospa_keys(settings, stanzas)
        write(path, FIRST["server_private_pem"])
        write(self.place("clients/%s.old" % uuid), FIRST["client_public_pem"])
        with mock.patch.object(os, "scandir", side_effect=AssertionError):  # once a client is slow
            self.assertIn("expected one file for a client, not %s and %s.old" % (uuid, uuid),
                          server.read_ospa_keys(settings, stanzas)[1][-1])
        stanzas = self.stanzas("SOURCE ANY\nOPENSPA_CLIENTS /no/such\n")
        with self.assertRaisesRegex(server.ConfigError, "OPENSPA_CLIENTS: .*No such file"):
            server.read_ospa_keys(settings, stanzas)
