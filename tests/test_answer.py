"""The answer to a packet: its bytes, its texts, and above all when there is none."""

import contextlib
import hashlib
import hmac
import ipaddress
import json
import os
import random
import socket
import unittest
from typing import Any, List, Optional, Tuple  # noqa: F401
from unittest import mock

import spa_server as server
from tests.support import TOP, read, write
from tests.test_packet import NOW, Sender, encrypt
from tests.test_server import CLIENT, KEYS, ServerCase, datagram

with open(os.path.join(TOP, "tests", "vectors", "answer.json")) as _file:
    VECTORS = json.load(_file)["vectors"]  # type: List[Any]
KEY, HMAC_KEY = b"s3cretRijndael", b"hmacKey-for-tests"
ACCESS = "SOURCE ANY\n" + KEYS + "ANSWER Y\n"
HOUR = server.CLOCK_SECONDS


def open_answer(answer: bytes, packet: bytes, key: bytes = KEY, hmac_key: bytes = HMAC_KEY
                ) -> Optional[Tuple[int, str]]:
    """Return status and text of an answer, or None: as tests/spec/answer.md says, not as we do."""
    digest = hashlib.sha256(packet).digest()
    mac_key = hmac.new(hmac_key, b"spa answer authentication" + digest, "sha256").digest()
    body, tag = answer[:-32], answer[-32:]
    if body[:1] != b"\1" or hmac.new(mac_key, body, "sha256").digest() != tag:
        return None
    enc_key = hmac.new(key, b"spa answer encryption" + digest, "sha256").digest()
    cipher = body[9:]
    plain = encrypt("CTR", enc_key, body[1:9] + bytes(8), cipher + bytes(-len(cipher) % 16))
    return plain[0], plain[1:len(cipher)].decode("ascii")


class SealTest(unittest.TestCase):
    """The bytes."""

    def test_vectors(self) -> None:
        """Each intermediate value, and what ours makes of the text."""
        for each in VECTORS:
            values = {name[:-4]: bytes.fromhex(value) for name, value in each.items()
                      if name.endswith("_hex")}
            packet = each["packet"].encode()
            with self.subTest(each["name"]):
                self.assertEqual(values["digest"], hashlib.sha256(packet).digest())
                for name in ("encryption", "authentication"):
                    key = values["key" if name == "encryption" else "hmac_key"]
                    label = b"spa answer " + name.encode() + values["digest"]
                    self.assertEqual(values[name + "_key"], hmac.new(key, label, "sha256").digest())
                answer = server.seal_answer(packet, values["key"], values["hmac_key"],
                                            not each["status"], each["text"], values["nonce"])
                self.assertEqual(values["answer"].hex(), answer.hex())
                self.assertLessEqual(len(answer), len(packet))
                self.assertEqual((each["status"], each["text_sent"]), open_answer(
                    answer, packet, values["key"], values["hmac_key"]))

    def test_never_longer_and_printable(self) -> None:
        """Whatever the text and the packet are."""
        for size in (server.MIN_PAYLOAD, 141, 200, server.MAX_PAYLOAD):
            packet = b"A" * size
            for length in (0, 1, size - 43, size - 42, size - 41, 3000):
                answer = server.seal_answer(packet, KEY, HMAC_KEY, False, "x" * length, bytes(8))
                found = open_answer(answer, packet)
                assert found is not None
                self.assertLessEqual(len(answer), size)
                cut = length > size - 42
                self.assertEqual("x" * (size - 45) + "..." if cut else "x" * length, found[1])
        answer = server.seal_answer(packet, KEY, HMAC_KEY, True, "a\n\x7f\xe4\u20ac~ b", bytes(8))
        self.assertEqual((0, "a????~ b"), open_answer(answer, packet))

    def test_is_no_packet(self) -> None:
        """Neither for this server, nor for another one with the same keys, in any alphabet."""
        packet = Sender().packet()
        answer = server.seal_answer(packet, KEY, HMAC_KEY, True, "x" * 200, bytes(8))
        for payload in (answer, answer[1:], b"\1" * 140):
            self.assertRaises(server.NotSpa, server.check_payload, payload)
        self.assertIsNone(open_answer(answer, Sender().packet(timestamp=NOW + 1)))
        for at in range(0, len(answer), 7):
            changed = answer[:at] + bytes([answer[at] ^ 1]) + answer[at + 1:]
            self.assertIsNone(open_answer(changed, packet))


class GateCase(ServerCase):
    """A server whose answers are kept."""

    def setUp(self) -> None:
        """Make the socket that keeps them."""
        super().setUp()
        self.clock.mono_time = 1e6  # the host has run for days
        self.sender, self.count = Sender(), 0
        self.sent = []  # type: List[bytes]
        self.socket = mock.Mock()
        self.socket.sendmsg = lambda parts, *rest: self.sent.append(parts[0])

    def gate(self, access: str = ACCESS, conf: str = "", seconds: float = 3 * HOUR) -> Any:
        """Return a server that has run for some seconds, with a new memory or (0) the old one."""
        if seconds and os.path.exists(self.path):
            os.unlink(self.path)
        made = self.serve(access, conf, seconds)
        made.gate.memory.answers = made.configuration.answers
        made.gate.answer_sockets.sockets = {(62201, 4): self.socket, (62201, 16): self.socket}
        return made

    def packet(self, sender: Optional[Sender] = None, ahead: int = 0, **fields: Any) -> bytes:
        """Return a new packet of a client whose clock is ahead."""
        self.count += 1
        fields.setdefault("timestamp", int(self.clock.wall_time) + ahead)
        return (sender or self.sender).packet(rand="%016d" % self.count, **fields)

    def take(self, made: Any, payload: bytes, **fields: Any) -> Optional[Tuple[int, str]]:
        """Return how the server answers; None if it does not."""
        self.sent.clear()
        made.gate.receive(datagram(payload)._replace(**fields))
        if not self.sent:
            return None
        self.assertEqual(1, len(self.sent))
        self.assertLessEqual(len(self.sent[0]), len(payload))
        found = open_answer(self.sent[0], payload)
        assert found is not None, "an answer that its client can't read"
        return found


OPENED = 0, "opened tcp/22 for 30 seconds"


class TextTest(GateCase):
    """What is told, and to whom."""

    def test_texts(self) -> None:
        """Each verdict has its text; a packet sent again has none."""
        rows = (
            ("", {}, OPENED),
            ("FW_ACCESS_TIMEOUT 7\n", {"text": "10.55.0.2,udp/53,tcp/22"},
             (0, "opened tcp/22, udp/53 for 7 seconds")),
            ("OPEN_PORTS tcp/22\n", {"text": "10.55.0.2,tcp/23,tcp/22"},
             (1, "tcp/23 is not in OPEN_PORTS")),
            ("RESTRICT_PORTS tcp/22, tcp/25\n", {"text": "10.55.0.2,tcp/25,tcp/80"},
             (1, "tcp/25 is in RESTRICT_PORTS")),
            ("ACCESS_EXPIRE_EPOCH %d\n" % NOW, {}, (1, "Access stanza has expired.")),
            ("REQUIRE_USERNAME alice\n", {}, (1, "user bob is not allowed")),
            ("REQUIRE_SOURCE_ADDRESS Y\n", {"text": "0.0.0.0,tcp/22"},
             (1, "Got 0.0.0.0 when valid source IP was required.")),
            ("REQUIRE_SAME_ADDRESS Y\n", {"text": "10.55.0.9,tcp/22"},
             (1, "The packet is for 10.55.0.9, and did not come from there "
                 "(REQUIRE_SAME_ADDRESS).")),
            ("FW_ACCESS_TIMEOUT 0\n", {},
             (1, "FW_ACCESS_TIMEOUT is 0 and the client asked for no time.")),
            ("KNOCK_SEQUENCE 7000,8000\nREQUIRE_KNOCK Y\n", {},
             (1, "No knock sequence came before the packet (REQUIRE_KNOCK).")),
            ("", {"text": "10.55.0.2,id", "kind": 0},
             (1, "SPA Command messages are not allowed in the current configuration.")),
            ("ENABLE_CMD_EXEC Y\n", {"text": "10.55.0.2,/bin/true", "kind": 0},
             (0, "command started")),
            ("CMD_CYCLE_OPEN /bin/true\nCMD_CYCLE_CLOSE NONE\n", {}, (0, "command started")),
            ("", {"kind": 2, "extra": [b"MTAuNjYuMC4yLDIy"]},
             (1, "SPA packet from 10.55.0.2 requested NAT access, but is not enabled/supported")),
            ("", {"ahead": -412}, (1, "the clock is 412 s behind")),
            ("", {"ahead": 600}, (1, "the clock is 600 s ahead")),
            ("", {"ahead": -HOUR}, (1, "the clock is 3600 s behind")),
            ("", {"ahead": -HOUR - 1}, None), ("", {"ahead": HOUR + 2}, None))  # type: Any
        for lines, fields, expected in rows:
            made = self.gate(ACCESS + lines)
            made.commands.start_open = lambda cycle: None
            payload = self.packet(**fields)
            with self.subTest(lines=lines, fields=fields):
                self.assertEqual(expected, self.take(made, payload), self.logged())
                self.assertIsNone(self.take(made, payload))
                self.assertNotIn("error", made.tally.counts)

    def test_failures(self) -> None:
        """A firewall or a command that fails, doors that are too many, and test mode."""
        made = self.gate()
        self.firewall.failures = 2
        self.assertEqual((1, "nothing was opened: the firewall failed"),
                         self.take(made, self.packet()))
        with mock.patch.object(server, "MAX_GRANTS", 0):
            self.assertEqual((1, "0 doors of this stanza are open, and 0 are the limit"),
                             self.take(made, self.packet()))
        self.assertEqual(OPENED, self.take(made, self.packet()))
        made.commands.test = True
        self.assertEqual((1, "--test mode: nothing is opened"), self.take(made, self.packet()))
        made = self.gate(ACCESS + "CMD_CYCLE_OPEN /bin/true\nCMD_CYCLE_CLOSE NONE\n")
        made.commands.start_open = mock.Mock(side_effect=server.CommandError("no more"))
        self.assertEqual((1, "a command could not be started"), self.take(made, self.packet()))

    def test_several_stanzas(self) -> None:
        """The one that opens answers; else the first whose keys were right, as in the log."""
        other = ACCESS.replace("s3cretRijndael", "another")
        for access, expected in (
                (ACCESS + "OPEN_PORTS tcp/23\n" + ACCESS, OPENED),
                (other + ACCESS, OPENED), (ACCESS.replace("ANSWER Y", "") + ACCESS, None),
                (ACCESS.replace("ANSWER Y", "OPEN_PORTS tcp/9") + ACCESS, OPENED),
                (ACCESS + "OPEN_PORTS tcp/9\n" + ACCESS.replace("ANSWER Y", ""), None),
                (ACCESS + "OPEN_PORTS tcp/9\n" + ACCESS + "REQUIRE_USERNAME eve\n",
                 (1, "tcp/22 is not in OPEN_PORTS"))):
            with self.subTest(access):
                self.assertEqual(expected, self.take(self.gate(access), self.packet()))

    def test_a_nat_host_is_looked_up_first(self) -> None:
        """The answer comes with what comes of it; none if a reload came between."""
        conf = "ENABLE_IPT_FORWARDING Y;\nENABLE_NAT_DNS Y;\n"
        for address, revoked, expected in (
                ("10.66.0.2", False, OPENED), ("10.66.0.2", True, None),
                (None, False, (1, "Unable to resolve Hostname in NAT SPA message"))):
            made = self.gate(conf=conf)
            made.gate.resolver.look_up = mock.Mock(return_value=True)
            payload = self.packet(kind=2, extra=[b"aW5uZXIsMjI"])  # inner,22
            with mock.patch.object(server, "is_own_address", lambda address: False):
                self.assertIsNone(self.take(made, payload))
                made.gate.stanzas = [] if revoked else made.gate.stanzas
                made.gate.resolver.look_up.call_args[0][2](
                    server.parse_address(address) if address else None)
            self.assertEqual([expected] if expected else [],
                             [open_answer(each, payload) for each in self.sent])

    def test_the_door_is_open_first(self) -> None:
        """The client may connect as soon as it has the answer."""
        made, seen = self.gate(), []  # type: Tuple[Any, List[Any]]
        self.socket.sendmsg = lambda *_: seen.append(self.firewall.doors())
        made.gate.receive(datagram(self.packet()))
        self.assertEqual([["10.55.0.2 -> 0.0.0.0/0 tcp/22"]], seen)

    def test_a_refused_packet_is_on_file_first(self) -> None:
        """A crash after the answer must not let a copy be answered."""
        made, seen = self.gate(), []  # type: Tuple[Any, List[str]]
        self.socket.sendmsg = lambda *_: seen.append(read(self.path))
        payload = self.packet(ahead=-600)
        made.gate.receive(datagram(payload))
        self.assertEqual(1, len(seen))
        self.assertIn("\n# refused %s %d stale\n" % (
            server.digest_of(payload), int(self.clock.wall_time) - 600), seen[0])

    def test_a_nat_target_of_others(self) -> None:
        """The log names the other stanza's door; the answer does not."""
        made = self.gate()
        door = server.Door(ipaddress.ip_network("10.9.9.9"), None, "tcp", 22, server.DNAT,
                           server.parse_address("10.66.0.2"), 22)
        made.grants.enter(server.Grant(door, NOW + 60, self.clock.mono_time + 60, 2))
        with mock.patch.object(server, "judge", lambda *_: server.Verdict(
                [door._replace(target_port=23)], 30)):
            self.assertEqual((1, "the port leads elsewhere already, by another stanza"),
                             self.take(made, self.packet()))
        self.assertIn("10.9.9.9 -> 0.0.0.0/0 tcp/22 leads to 10.66.0.2:22 already", self.logged())

    def test_ports(self) -> None:
        """Each kind of socket has its port; without ANSWER, and for a file, there is none."""
        everything = [kind.__new__(kind) for kind in (
            server.PacketCapture, server.UdpCapture, server.OspaCapture, server.KnockCapture,
            server.FileCapture)]  # type: List[Any]
        packet, udp, _, knock, file = everything
        udp.port = 7000
        for access, conf, captures, ports in (
                (ACCESS, "", [packet], {62201}), (ACCESS, "PCAP_FILTER udp port 5000;\n", [packet],
                                                  {5000}),
                (ACCESS, "PCAP_FILTER udp;\nUDPSERV_PORT 6000;\n", [packet], {6000}),
                (ACCESS, "PCAP_FILTER udp dst portrange 1-9;\n", [packet], {62201}),
                (ACCESS, "", everything, {62201, 7000, 22211}), (ACCESS, "", [knock, file], set()),
                (ACCESS.replace("ANSWER Y", ""), "", everything, {22211})):
            made = self.gate(access, conf)
            self.assertEqual(ports, made.configuration.answer_ports(captures), conf)

    def test_configuration(self) -> None:
        """ANSWER needs both keys; an error names the line."""
        gpg = "GPG_DECRYPT_ID AB\nGPG_ALLOW_NO_PW Y\nGPG_DISABLE_SIG Y\nHMAC_KEY h\n"
        error = "access.conf:2: ANSWER: expected KEY and HMAC_KEY with it"
        for lines in ("KEY a\n", gpg, gpg + "KEY k\nENCRYPTION_MODE Asymmetric\n",
                      "OPENSPA_CLIENTS /tmp\n", "KNOCK_SEQUENCE 1,2\nOPEN_PORTS tcp/22\n"):
            with self.subTest(lines), self.assertRaisesRegex(server.ConfigError, error):
                self.stanzas("SOURCE ANY\nANSWER Y\n" + lines)
        self.stanzas("SOURCE ANY\nKEY_BASE64 YWE=\nHMAC_KEY_BASE64 YmI=\nANSWER Y\n")
        self.assertFalse(self.stanzas("SOURCE ANY\n" + KEYS)[0].answer)


class SilenceTest(GateCase):
    """No answer, whoever asks with a packet that is not new, genuine and over UDP."""

    def test_who_has_no_keys(self) -> None:
        """Junk, a wrong key of either kind, and what no client makes."""
        made, right = self.gate(), self.packet()
        malformed = self.sender.seal(self.sender.plain(b"1234567890123456:a:b:c:d:e:f"))
        for payload in (b"", b"x", b"!" * 200, b"A" * 200, right[:-1], right[:-1] + b"A",
                        b"A" + right[1:], self.packet(Sender(hmac_key=b"wrong")),
                        self.packet(Sender(key=b"wrong")), self.packet(Sender(hmac_key=b"")),
                        malformed, b"A" * 600, os.urandom(200)):
            self.assertIsNone(self.take(made, payload))
        self.assertNotIn("error", made.tally.counts)
        self.assertEqual(OPENED, self.take(made, right))
        self.sent.clear()
        for size in (200, 600):  # from 400 on it is GPG's, which KEY has not made
            made.gate.answer(datagram(b"A" * size), (made.gate.stanzas[0], "text"))
        self.assertEqual([200], [max(200, len(each)) for each in self.sent])

    def test_where_it_came_in(self) -> None:
        """Over TCP or ICMP, at another port, or of a family without a socket."""
        made = self.gate()
        del made.gate.answer_sockets.sockets[62201, 16]
        six = bytes(15) + b"\1"
        for fields in ({"protocol": server.TCP}, {"protocol": server.ICMP},
                       {"destination_port": 62202}, {"source": six, "destination": six}):
            with self.subTest(fields=fields):
                self.assertIsNone(self.take(made, self.packet(), **fields))
        self.assertEqual({"accepted": 4}, made.tally.counts)

    def test_a_socket_that_fails(self) -> None:
        """A full buffer or a source that can't be sent to: the loop goes on, all is open."""
        made = self.gate()
        self.socket.sendmsg = mock.Mock(side_effect=BlockingIOError(11, "full"))
        self.assertIsNone(self.take(made, self.packet()))
        flags, peer = self.socket.sendmsg.call_args[0][2:]
        self.assertEqual((socket.MSG_DONTWAIT, (CLIENT, 60208)), (flags, peer))
        self.assertEqual({"accepted": 1}, made.tally.counts)

    def lose(self, made: Any, how: str) -> Any:
        """Return the server as it is after a restart or something worse."""
        made.gate.memory.close()
        conf = ""
        if how == "deleted":
            os.unlink(self.path)
        elif how == "emptied":
            write(self.path, "")
        elif how == "reboot":
            self.clocks = self.clock.clocks("boot-%d" % random.randrange(10 ** 9))
        elif how == "no file":
            conf = "ENABLE_DIGEST_PERSISTENCE N;\n"
        return self.gate(conf=conf, seconds=0)

    def test_a_captured_packet(self) -> None:
        """Opened, stale or from the future: no second answer, after whatever happened."""
        for how in ("", "killed", "deleted", "emptied", "reboot", "no file"):
            for ahead in (0, -600, 600, -HOUR, HOUR, HOUR - 200):
                for wait in (1, 130, 600, HOUR - 130, HOUR, HOUR + 130, 2 * HOUR):
                    made = self.gate()
                    payload = self.packet(ahead=ahead)
                    self.assertIsNotNone(self.take(made, payload))
                    made = self.lose(made, how) if how else made
                    self.clock.pass_seconds(wait)
                    with self.subTest(how=how, ahead=ahead, wait=wait):
                        for _ in range(2):
                            found = self.take(made, payload)
                            # After a loss a clock that was ahead can open again (README).
                            again = how not in ("", "killed") and abs(ahead - wait) <= 120
                            self.assertIn(found, (None, OPENED if again else None))
                            self.take(made, self.packet())

    def test_a_new_memory_is_silent_for_an_hour(self) -> None:
        """It does not know what came before; what it can open, it answers."""
        for how in ("deleted", "reboot", "no file"):
            made = self.lose(self.gate(), how)
            for passed in range(100, 2 * HOUR, 100):
                self.clock.pass_seconds(100)
                self.assertEqual(OPENED, self.take(made, self.packet()))
                for ahead, text in ((-300, "300 s behind"), (400, "400 s ahead")):
                    expected = (1, "the clock is " + text) if passed + ahead > HOUR else None
                    self.assertEqual(expected, self.take(made, self.packet(ahead=ahead)), how)

    def test_the_first_memory_answers_at_once(self) -> None:
        """Nothing came since the boot; the boot itself may have lost a memory."""
        for uptime, text in ((601, "600 s behind"), (599, "")):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path + "-began")
            self.clock.mono_time = uptime + 1
            made = self.gate(seconds=1)
            behind, ahead = self.packet(ahead=-600), self.packet(ahead=600)
            self.assertEqual((1, "the clock is " + text) if text else None, self.take(made, behind))
            self.assertEqual((1, "the clock is 600 s ahead"), self.take(made, ahead))
            for how in ("killed", "deleted", "deleted", "no file", "killed"):
                made = self.lose(made, how)
                for payload in (behind, ahead):
                    self.assertIsNone(self.take(made, payload), how)

    def test_a_memory_of_an_earlier_version(self) -> None:
        """Its file lacks the time of silence: the memory is as a new one, and rejects no more."""
        made = self.gate()
        made.gate.memory.rewrite()
        text = read(self.path).split("\n")
        text[1] = text[1].rsplit(" ", 2)[0]
        made.gate.memory.close()
        write(self.path, "\n".join(text))
        made = self.gate(seconds=0)
        self.assertIsNone(self.take(made, self.packet(ahead=-600)))
        self.assertEqual(OPENED, self.take(made, self.packet()))

    def test_the_memory_is_bounded(self) -> None:
        """A flood by a key holder makes it forget: then it is silent about that time."""
        made = self.gate()
        first, stale = self.packet(), self.packet(ahead=-600)
        for payload in (first, stale):
            self.assertIsNotNone(self.take(made, payload))
        with mock.patch.object(server, "ANSWERED_KNOWN", 10), mock.patch.object(
                server, "REFUSED_KNOWN", 10):
            self.clock.pass_seconds(300)
            for _ in range(20):
                self.take(made, self.packet())
                self.take(made, self.packet(ahead=-599))
            self.assertLessEqual(len(made.gate.memory.seen), 21)  # fresh ones stay
            self.assertEqual(10, len(made.gate.memory.refused))
        self.assertIsNone(self.take(made, first))
        self.assertIsNone(self.take(made, stale))
        self.assertEqual((1, "the clock is 150 s behind"), self.take(made, self.packet(ahead=-150)))
        made.gate.memory.rewrite()
        made = self.lose(made, "killed")
        self.assertIsNone(self.take(made, stale))

    def test_refused_packets_that_are_forgotten(self) -> None:
        """Those too have a time up to which nothing is answered, and it is on file."""
        made = self.gate()
        payloads = [self.packet(ahead=ahead) for ahead in (-500, 300, -400, -300)]
        with mock.patch.object(server, "REFUSED_KNOWN", 2):
            for payload in payloads:
                self.assertIsNotNone(self.take(made, payload))
        self.clock.pass_seconds(100)
        self.assertIsNone(self.take(made, payloads[1]))
        self.assertIsNone(self.take(made, self.packet(ahead=200)))
        made.gate.memory.rewrite()
        made = self.lose(made, "killed")
        self.assertIsNone(self.take(made, self.packet(ahead=199)))
        self.assertEqual((1, "the clock is 201 s ahead"), self.take(made, self.packet(ahead=201)))

    def test_a_clock_that_is_set_after_a_loss(self) -> None:
        """Forward, as on a router without a clock of its own, or back: the silence stays."""
        for before, after, wait in ((-36000, 36000, 60), (0, -5000, 3000)):
            made, payload = self.gate(), self.packet(ahead=-600)
            self.assertIsNotNone(self.take(made, payload))
            self.clock.jump(before)
            made = self.lose(made, "deleted")
            self.clock.jump(after)
            self.clock.pass_seconds(wait)
            self.assertIsNone(self.take(made, payload))
            self.clock.jump(-before - after)

    def test_for_an_hour_only_with_answers(self) -> None:
        """Without ANSWER the memory forgets as before."""
        for access, known in ((ACCESS, 2), ("SOURCE ANY\n" + KEYS, 1)):
            made = self.gate(access, "ENABLE_DIGEST_PERSISTENCE N;\n")
            self.take(made, self.packet())
            self.clock.pass_seconds(HOUR)
            self.take(made, self.packet())
            self.assertEqual(known, len(made.gate.memory.seen))

    def test_at_random(self) -> None:
        """Days of packets, of copies sent again, and of restarts, jumps and losses in between."""
        draw = random.Random(14)
        made, sent, answered = self.gate(), [], 0  # type: Tuple[Any, List[bytes], int]
        for _ in range(3000):
            self.clock.pass_seconds(draw.choice((1, 10, 100, 700)))
            what = draw.random()
            if what < 0.5:
                ahead = draw.choice((0, 0, 50, -50, -600, 600, draw.randrange(-HOUR, HOUR)))
                sent.append(self.packet(ahead=ahead))
                answered += self.take(made, sent[-1]) is not None
            elif what < 0.96 and sent:
                found = self.take(made, draw.choice(sent[-40:]))
                self.assertFalse(found and "clock" in found[1], found)
            elif what < 0.98:
                made = self.lose(made, draw.choice(("killed", "deleted", "reboot")))
                self.stream.truncate(0)
            elif what > 0.99:
                self.clock.jump(draw.choice((-4000, -100, 100, 4000)))
        self.assertGreater(answered, 100)


if __name__ == "__main__":
    unittest.main()
