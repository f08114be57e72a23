"""What is captured: IP packets, frames of capture files, HTTP requests, and the filter before them.

The filter speaks tcpdump's language, and tcpdump's verdicts are the measure: they are recorded in
vectors/filters.json, and made anew and compared where tcpdump is installed.

    python3 -m tests.test_capture --write    record them
"""

import itertools
import json
import os
import random
import resource
import select
import socket
import struct
import subprocess
import sys
import unittest
from typing import Any, Dict, List, Optional, Set, Tuple

import spa_server as server
from tests.support import TIMEOUT, TOP, needs_programs, wait_for
from tests.test_packet import NOW, Sender, read_vectors
from tests.test_server import KEYS, Clock, ServerCase, ipv4, ipv6, run_filter, udp

VERDICTS = os.path.join(TOP, "tests", "vectors", "filters.json")
RAW = 101  # the link type of packets that begin with their IP header


def tcp(
    payload: bytes,
    port: int = 62201,
    source_port: int = 40000,
    flags: int = 0x18,
    options: bytes = b"",
) -> bytes:
    """Return a TCP header and payload (RFC 9293)."""
    return (
        struct.pack(
            ">HHIIBBHHH", source_port, port, 1, 1, (20 + len(options)) << 2, flags, 32767, 0, 0
        )
        + options
        + payload
    )


def icmp(payload: bytes, kind: int = 8) -> bytes:
    """Return an ICMP header and payload (RFC 792)."""
    return struct.pack(">BBHHH", kind, 0, 0, 7, 1) + payload


def extension(following: int, size: int = 8) -> bytes:
    """Return an IPv6 extension header (RFC 8200 section 4)."""
    return bytes([following, size // 8 - 1]) + bytes(size - 2)


def at(packet: bytes, offset: int, text: str) -> bytes:
    """Return a packet with another address at an offset."""
    packed = socket.inet_pton(socket.AF_INET6 if ":" in text else socket.AF_INET, text)
    return packet[:offset] + packed + packet[offset + len(packed) :]


# ------------------------------------------------------------------- the filter language


def make_packets() -> Dict[str, bytes]:
    """Return packets by name, each with something that a filter may look at."""
    packets = {}
    for name, body, number in (
        ("udp 62201", udp(b"x"), 17),
        ("udp 53", udp(b"x", 53), 17),
        ("udp from 62201", udp(b"x", 9, 62201), 17),
        ("udp 62201 62201", udp(b"x", 62201, 62201), 17),
        ("udp 1000 1001", udp(b"x", 1000, 1001), 17),
        ("udp 999 65535", udp(b"x", 999, 65535), 17),
        ("tcp 62201", tcp(b"x"), 6),
        ("tcp 80", tcp(b"x", 80), 6),
        ("tcp SYN", tcp(b"", 80, 9, 2), 6),
        ("tcp from 80", tcp(b"x", 9, 80), 6),
        ("sctp 62201", udp(b"x"), 132),
        ("icmp", icmp(b"x"), 1),
        ("icmp6", icmp(b"x", 128), 58),
        ("gre", b"\0" * 20, 47),
    ):
        packets["4 " + name], packets["6 " + name] = ipv4(body, number), ipv6(body, number)
    body = udp(b"x" * 20)
    for name, packet in (
        ("4 options", ipv4(body, options=b"\1" * 4)),
        ("4 all options", ipv4(tcp(b"x"), 6, 0, b"\1" * 40)),
        ("4 first fragment", ipv4(body, fragment=0x2000)),
        ("4 later fragment", ipv4(body, fragment=0x2001)),
        ("4 last fragment", ipv4(body, fragment=0x1FFF)),
        ("4 whole", ipv4(body, fragment=0x4000)),
        ("4 other source", at(ipv4(body), 12, "10.55.1.2")),
        ("4 other destination", at(ipv4(tcp(b"x"), 6), 16, "192.168.7.9")),
        ("4 far away", at(at(ipv4(body), 12, "198.51.100.3"), 16, "203.0.113.250")),
        ("6 other source", at(ipv6(body), 8, "2001:db8:1::7")),
        ("6 other destination", at(ipv6(tcp(b"x"), 6), 24, "2001:db8:1:2::9")),
        ("6 fragment of udp", ipv6(extension(17) + body, 44)),
        ("6 fragment of tcp", ipv6(extension(6) + tcp(b"x"), 44)),
        ("6 fragment of icmp6", ipv6(extension(58) + icmp(b"x"), 44)),
        ("6 hop-by-hop", ipv6(extension(17) + body, 0)),
        ("4 cut in the ports", ipv4(body)[:22]),
        ("4 cut header", ipv4(body)[:10]),
        ("6 cut in the ports", ipv6(body)[:42]),
        ("6 cut header", ipv6(body)[:30]),
        ("version 5", b"\x55" + ipv4(body)[1:]),
        ("arp", b"\0\1\x08\0\6\4\0\1" + bytes(20)),
        ("one byte", b"\x45"),
    ):
        packets[name] = packet
    return packets


FILTERS = (
    "udp",
    "tcp",
    "icmp",
    "icmp6",
    "ip",
    "ip6",
    "udp port 62201",
    "tcp port 62201",
    "port 62201",
    "udp dst port 62201",
    "udp src port 62201",
    "src port 80",
    "dst port 80",
    "tcp src or dst port 80",
    "src and dst port 62201",
    "udp dst or src port 53",
    "udp dst and src port 62201",
    "portrange 1000-1001",
    "udp portrange 1001-1000",
    "udp dst portrange 999-1000",
    "tcp portrange 1-65535",
    "src portrange 1001-65535",
    "host 10.55.0.2",
    "src host 10.55.0.2",
    "dst host 10.55.0.2",
    "src 10.55.0.2",
    "host fd55::1",
    "dst host fd55::1",
    "ip host 192.168.7.9",
    "ip6 host 2001:db8:1::7",
    "ip6 src fd55::2",
    "net 10.55.0.0/16",
    "src net 10.55.1.0/24",
    "dst net 192.168.0.0/16",
    "net 2001:db8:1::/48",
    "src and dst net 10.55.0.0/24",
    "net 2001:db8:1:2::/63",
    "net 0.0.0.0/0",
    "net 10.55.0.2",
    "src or dst host 203.0.113.250",
    "ip net 10.0.0.0/8",
    "net 128.0.0.0/1",
    "net ::/0",
    "port 62201 or 80",
    "tcp port 80 or 62201",
    "udp dst port 62201 or 53 or 9",
    "not port 62201",
    "not udp",
    "! tcp and ! udp",
    "not not ip6",
    "udp port 62201 or icmp",
    "udp or tcp port 80",
    "host 10.55.0.2 and port 53 or 80",
    "udp port 53 or tcp and host 10.55.0.2",
    "tcp and host fd55::2 or udp port 53",
    "udp port 53 or (tcp and host 10.55.0.2)",
    "(tcp or udp) and (port 62201 or port 80)",
    "not (udp port 62201 or tcp port 62201)",
    "!(host 10.55.0.2)&&!(host fd55::2)",
    "udp&&port 53||icmp6",
    "ip and not udp and not tcp",
    "port 53 or (80 or 62201)",
    "not port 62201 and 80",
    "host 10.55.0.2 or fd55::2",
    "src host 10.55.0.2 and not dst port 62201",
    "ip6 and (udp or tcp) and not port 80",
    "host 198.51.100.3 or net 192.168.7.0/24 and tcp",
    "not net 10.55.0.0/24 and not net fd55::/64",
    "not src portrange 40000-40000 and udp",
    "port 1 or " + " or ".join(map(str, range(2, 90))),
)
# What tcpdump understands and this does not, and what neither does.
BAD_FILTERS = (
    "",
    "udp port",
    "udp port 0",
    "udp port 65536",
    "udp port x",
    "udp port 62201 or",
    "or udp",
    "udp port 1 and",
    "(udp",
    "udp)",
    "()",
    "not",
    "udp tcp",
    "port 1 2",
    "port 80-90",
    "portrange 80",
    "portrange 1-",
    "portrange -1",
    "icmp port 1",
    "ip port 1",
    "62201",
    "udp or 53",
    "udp src",
    "src",
    "src or dst",
    "src or src port 1",
    "host",
    "host 10.55.0.256",
    "host 010.1.1.1",
    "host 10.55.0.0/16",
    "net 10.55.0.1/16",
    "net 10",
    "net 10.0.0.0/33",
    "ip host fd55::1",
    "ip6 host 10.0.0.1",
    "tcp host 10.0.0.1",
    "udp net 10.0.0.0/8",
    "host example.org",
    "host fe80::1%eth0",
    "ether host 1:2:3:4:5:6",
    "vlan",
    "vlan 5 and udp",
    "tcp[13] & 2 != 0",
    "len > 100",
    "udp port 1; drop",
    "greater 100",
    "gateway x",
    "proto 17",
    "ip proto udp",
    "sctp",
    "UDP PORT 1",
    "port 1 or not",
    "port (1 or 2)",
    "udp port \xb2",
    "udp port 1_0",
    "port +1",
    "(" * 5000,
    "not " * 5000 + "udp",
    " or ".join(["port 1"] * 2000),
    "( " * 300 + "udp" + " )" * 300,
    "portrange 1-2 or " + " or ".join("%d-%d" % (n, n + 1) for n in range(1, 199)),
)


def write_pcap(
    packets: List[bytes], link: int = RAW, order: str = "<", magic: int = 0xA1B2C3D4, cut: int = 0
) -> bytes:
    """Return a capture file; `cut` bytes are missing at the end of each packet.

    The number of a packet is its time.
    """
    text = struct.pack(order + "IHHiIII", magic, 2, 4, 0, 0, 65535, link)
    for number, packet in enumerate(packets):
        kept = packet[: max(0, len(packet) - cut)]
        text += struct.pack(order + "IIII", number, 0, len(kept), len(packet)) + kept
    return text


def tcpdump_verdicts(text: str, packets: List[bytes]) -> str:
    """Return 0 or 1 for each packet: whether tcpdump lets it pass."""
    done = subprocess.run(
        ["tcpdump", "-r", "-", "-w", "-", "--", text],
        check=True,
        input=write_pcap(packets),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    passed, offset = set(), 24
    while offset < len(done.stdout):
        number, _, length, _ = struct.unpack_from("<IIII", done.stdout, offset)
        passed.add(number)
        offset += 16 + length
    return "".join(str(int(number in passed)) for number in range(len(packets)))


def passes(tree: Any, packet: bytes) -> bool:
    """Return whether our own evaluation lets a packet pass."""
    try:
        return bool(server.matches(tree, packet))
    except IndexError:
        return False


class FilterLanguageTest(unittest.TestCase):
    """PCAP_FILTER: tcpdump's verdicts, from the kernel's program and from our own evaluation."""

    def setUp(self) -> None:
        """Read the recorded verdicts."""
        with open(VERDICTS) as file:
            recorded = json.load(file)
        self.packets = {name: bytes.fromhex(text) for name, text in recorded["packets"].items()}
        self.verdicts = recorded["verdicts"]  # type: Dict[str, str]

    def test_the_record_is_whole(self) -> None:
        """Every packet and filter of this file, and each filter lets some pass and some not."""
        self.assertEqual(make_packets(), self.packets)
        self.assertEqual(set(FILTERS), set(self.verdicts))
        self.assertGreater(len(FILTERS), 60)
        self.assertGreater(len(set(self.verdicts.values())), 45)

    def test_verdicts(self) -> None:
        """Both of ours agree with tcpdump on every packet."""
        for text, verdicts in self.verdicts.items():
            tree = server.parse_packet_filter(text)
            code = server.compile_filter(tree)
            for (name, packet), verdict in zip(self.packets.items(), verdicts):
                with self.subTest(filter=text[:60], packet=name):
                    self.assertIs(verdict == "1", run_filter(code, packet))
                    self.assertIs(verdict == "1", passes(tree, packet))

    @needs_programs("tcpdump")
    def test_the_tcpdump_of_this_machine(self) -> None:
        """It says what is recorded."""
        for text, verdicts in self.verdicts.items():
            with self.subTest(filter=text[:60]):
                self.assertEqual(verdicts, tcpdump_verdicts(text, list(self.packets.values())))

    def test_outgoing(self) -> None:
        """What this host sends is not looked at, unless that is asked for."""
        for text in ("udp port 62201", "not tcp", "ip"):
            tree, packet = server.parse_packet_filter(text), self.packets["4 udp 62201"]
            self.assertEqual(
                [True, True, False],
                [run_filter(server.compile_filter(tree), packet, kind) for kind in (0, 1, 4)],
            )
            self.assertTrue(run_filter(server.compile_filter(tree, True), packet, 4))

    def test_bad_filters(self) -> None:
        """A ValueError that says what is understood."""
        for text in BAD_FILTERS:
            with self.subTest(filter=text[:60]):
                self.assertRaisesRegex(ValueError, "^expected", server.parse_packet_filter, text)


# ------------------------------------------------------------------- the filter of payloads

GET = b"GET /8XqE HTTP/1.0\r\nUser-Agent: Fwknop/2.6.10\r\n\r\n"
# Payloads that the log tells of, or that are no packets and pass all the same; then those that the
# kernel drops; and whether the first one of these is right where HTTP is enabled.
KNOWN = [b"8" + b"A" * 139, b"+" + b"/" * 398, b"E" + b"z" * 1499, b"hF4D" + b"A" * 200,
         b"wV4D" + b"9" * 200, b"U2FsdGVkX18" + b"A" * 200, b"hQEMA" + b"A" * 400,
         b"A" * 200, b"8XqE" + b"A" * 196 + b"\n", b"8Xq:" + b"A" * 197, b"9" + b"A" * 150 + b"=="]
DROPPED = [GET, b"", b"8", b"8" + b"A" * 138, b"E" + b"A" * 1500, b"B" * 399, b"8" + bytes(150),
           b"8" + b"\xff" * 150, b"8" + b"A" * 24 + b" " + b"A" * 150, b"!" + b"A" * 200,
           b"8" + b"A" * 59 + b"-" + b"A" * 100, "\u00e9".encode() * 300]


def any_payload(draw: random.Random) -> bytes:
    """Return random bytes, of any length that a datagram may have."""
    size = draw.randrange(1501)
    return draw.getrandbits(8 * size + 1).to_bytes(size + 1, "big")[1:]


def right_payloads() -> List[bytes]:
    """Return packets of fwknop's client, and some of each mode with each digest and HMAC type."""
    found = [each["packet"].encode() for each in read_vectors("fwknop.json")["vectors"]]
    for mode, mac in itertools.product(server.MODES, ("", *server.DIGESTS)):
        found += [Sender(mode=mode, digest=digest, hmac_type=mac or "SHA256", salt=os.urandom(8),
                         hmac_key=b"mac" if mac else b"").packet()
                  for digest in (mac or "MD5", "SHA3_512")]
    return found


class PayloadFilterTest(unittest.TestCase):
    """What the kernel drops unseen: random bytes; and what it must not drop."""

    carriers = (
        ("udp", lambda payload: ipv4(udp(payload)), lambda payload: ipv6(udp(payload))),
        ("icmp or icmp6", lambda payload: ipv4(icmp(payload), 1, options=b"\1" * 8),
         lambda payload: ipv6(icmp(payload, 128), 58)),
        ("tcp", lambda payload: ipv4(tcp(payload, options=b"\1" * 12), 6, options=b"\1" * 40),
         lambda payload: ipv6(tcp(payload, flags=2, options=b"\1" * 40), 6)),
        ("not icmp", lambda payload: ipv4(tcp(payload), 6),
         lambda payload: ipv6(tcp(payload), 6)))

    def verdicts(self, payload: bytes, http: bool = False) -> Set[bool]:
        """Return what the filters of all carriers, and of a UDP socket, say to a payload."""
        tree = server.payload_filter(http)
        found = {run_filter(server.compile_udp_filter(tree), udp(payload))}
        for text, *packets in self.carriers:
            code = server.compile_filter(server.parse_packet_filter(text), False, tree)
            found |= {run_filter(code, packet(payload)) for packet in packets}
            self.assertFalse(any(run_filter(code, packet(payload), 4) for packet in packets))
        return found

    def test_right_payloads(self) -> None:
        """Each packet that a client makes passes, by every carrier, and so does a near miss."""
        for payload in right_payloads() + KNOWN:
            for http in (False, True):
                self.assertEqual({True}, self.verdicts(payload, http), payload)

    def test_dropped(self) -> None:
        """Other lengths, alphabets and beginnings; HTTP passes where it is enabled."""
        for payload in DROPPED:
            self.assertEqual({False}, self.verdicts(payload), payload)
            self.assertEqual({payload == GET}, self.verdicts(payload, http=True), payload)
        for request in (b"get http://10.0.0.1/8 HTTP/1.1\r\n\r\n", GET + b"A" * 4000):
            self.assertEqual({True}, self.verdicts(request, http=True))

    def test_random_bytes(self) -> None:
        """None passes, whatever its length."""
        draw, code = random.Random(3), server.compile_udp_filter(server.payload_filter(True))
        self.assertFalse(any(run_filter(code, udp(any_payload(draw))) for _ in range(1000)))

    def test_other_packets(self) -> None:
        """Fragments and other protocols are dropped; extension headers hide what is behind them."""
        code = server.compile_filter(server.parse_packet_filter("ip or ip6"), False,
                                     server.payload_filter(False))
        body = udp(KNOWN[0])
        for packet, passes_it in (
                (ipv4(body, fragment=0x4000), True), (ipv4(body, fragment=0x2000), False),
                (ipv4(body, fragment=1), False), (ipv4(body, 132), False), (ipv4(body, 0), False),
                (ipv6(body, 50), False), (ipv6(extension(17) + body, 60), True),
                (ipv6(body, 44), False), (b"\x55" + ipv4(body)[1:], False),
                (ipv4(tcp(b""), 6), False), (ipv4(b"", 6), False), (b"\x45", False)):
            self.assertIs(passes_it, run_filter(code, packet), packet)

    def test_the_kernel(self) -> None:
        """It takes the filter of a UDP socket, and says the same of each payload."""
        heard = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        for each in (heard, sender):
            self.addCleanup(each.close)
        heard.bind(("127.0.0.1", 0))
        server.attach_filter(heard, server.compile_udp_filter(server.payload_filter(False)))
        sender.connect(heard.getsockname())
        draw = random.Random(4)
        for payload in right_payloads() + KNOWN:
            for junk in DROPPED[1:] + [any_payload(draw)]:
                sender.send(junk)
            sender.send(payload)
            heard.settimeout(TIMEOUT)
            self.assertEqual(payload, heard.recv(2000))
        heard.settimeout(0)
        self.assertRaises(BlockingIOError, heard.recv, 1)


# ------------------------------------------------------------------- packets and frames


class DecodeTest(unittest.TestCase):
    """The datagram in an IP packet."""

    def check(self, packet: bytes, payload: bytes, ports: Tuple[int, int], protocol: int) -> None:
        """Compare a datagram with its packet."""
        found = server.decode_ip(packet)
        assert found is not None
        six = packet[0] >> 4 == 6
        self.assertEqual(
            (
                payload,
                packet[8:24] if six else packet[12:16],
                ports[0],
                packet[24:40] if six else packet[16:20],
                ports[1],
                protocol,
                0,
            ),
            tuple(found),
        )

    def test_protocols(self) -> None:
        """UDP, TCP with and without options, a SYN with payload, ICMP of both families."""
        for body, ports, number in (
            (udp(b"spa"), (40000, 62201), 17),
            (tcp(b"spa"), (40000, 62201), 6),
            (tcp(b"spa", flags=2), (40000, 62201), 6),
            (tcp(b"spa", options=b"\1" * 40), (40000, 62201), 6),
        ):
            for packet in (
                ipv4(body, number),
                ipv4(body, number, options=b"\1" * 40),
                ipv4(body, number, 0x4000),
                ipv4(body, number) + bytes(10),
                ipv6(body, number),
                ipv6(body, number) + bytes(10),
            ):
                self.check(packet, b"spa", ports, number)
        for kind in (0, 8, 13):
            self.check(ipv4(icmp(b"spa", kind), 1), b"spa", (0, 0), 1)
        self.check(ipv6(icmp(b"spa", 128), 58), b"spa", (0, 0), 58)

    def test_extension_headers(self) -> None:
        """Hop-by-hop and destination options and routing, a few of them, but no fragment."""
        body = udp(b"spa")
        for first, rest in (
            (0, extension(17)),
            (60, extension(17, 24)),
            (43, extension(17)),
            (0, extension(43) + extension(60, 64) + extension(17)),
            (60, extension(60) * 7 + extension(17)),
        ):
            self.check(ipv6(rest + body, first), b"spa", (40000, 62201), 17)
        self.check(ipv6(extension(58) + icmp(b"spa"), 0), b"spa", (0, 0), 58)
        for first, rest in (
            (44, extension(17)),
            (0, extension(44) + extension(17)),
            (60, extension(60) * 8 + extension(17)),
            (0, extension(59)),
            (50, extension(17)),
            (60, b"\x11\xff" + bytes(6)),
        ):
            self.assertIsNone(server.decode_ip(ipv6(rest + body, first)))

    def test_no_datagram(self) -> None:
        """Fragments, what is cut, no payload, other protocols, ICMP of the other family."""
        body = udp(b"spa")
        for packet in (
            b"",
            ipv4(body, fragment=0x2000),
            ipv4(body, fragment=1),
            ipv4(body, 17, 0x2001),
            ipv4(tcp(b"spa"), 6, 0x2000),
            ipv4(icmp(b"spa"), 1, 0x2000),
            ipv4(tcp(b"spa"), 6)[:-1],
            ipv4(icmp(b"spa"), 1)[:-1],
            ipv4(tcp(b""), 6),
            ipv6(tcp(b""), 6),
            ipv6(tcp(b"spa"), 6)[:-1],
            ipv4(tcp(b"spa")[:19], 6),
            ipv4(tcp(b"spa")[:12] + b"\x40" + tcp(b"spa")[13:], 6),
            ipv4(tcp(b"spa")[:12] + b"\xf0" + tcp(b"spa")[13:], 6),
            ipv4(body, 132),
            ipv4(icmp(b"spa"), 58),
            ipv6(icmp(b"spa"), 1),
            ipv4(icmp(b"")[:7], 1),
            b"\x44" + ipv4(body)[1:],
            b"\x55" + ipv4(body)[1:],
            ipv6(body)[:39],
            ipv4(body, options=b"\1" * 40)[:40],
        ):
            with self.subTest(packet=packet):
                self.assertIsNone(server.decode_ip(packet))


ETHERNET = bytes(range(12))
IP, IP6 = b"\x08\x00", b"\x86\xdd"
TAG, OUTER = b"\x81\0\0\7", b"\x88\xa8\0\1"


class FrameTest(unittest.TestCase):
    """The IP packet in a frame of each link type."""

    def test_link_types(self) -> None:
        """What is before the IP header is taken off, with VLAN tags."""
        packet = ipv4(udp(b"spa"))
        for link, header in (
            (1, ETHERNET + IP),
            (1, ETHERNET + TAG + IP),
            (1, ETHERNET + OUTER + TAG + IP),
            (1, ETHERNET + b"\x91\0\0\1" + TAG + IP6),
            (1, ETHERNET + TAG * 4 + IP),
            (113, bytes(14) + IP),
            (113, bytes(14) + TAG + IP6),
            (276, IP + bytes(18)),
            (276, IP6 + bytes(18)),
            (0, b"\2\0\0\0"),
            (108, b"\0\0\0\x1e"),
            (12, b""),
            (14, b""),
            (101, b""),
            (228, b""),
            (229, b""),
        ):
            with self.subTest(link=link, header=header):
                found = server.decode_frame(header + packet, server.LINK_TYPES[link], False)
                self.assertEqual(packet, found)

    def test_no_packet(self) -> None:
        """Other protocols, too many tags, and frames that end before."""
        packet = ipv4(udp(b"spa"))
        for link, frame in (
            (1, ETHERNET + b"\x08\x06" + packet),
            (1, ETHERNET + TAG * 5 + IP + packet),
            (1, ETHERNET),
            (1, b""),
            (1, ETHERNET + TAG),
            (113, bytes(16) + packet),
            (276, b""),
        ):
            self.assertEqual(b"", server.decode_frame(frame, server.LINK_TYPES[link], False))

    def test_direction(self) -> None:
        """What the host itself sent, where the frame tells."""
        packet = ipv4(udp(b"spa"))
        for link, header in (
            (113, b"\0\4" + bytes(12) + IP),
            (276, IP + bytes(8) + b"\4" + bytes(9)),
        ):
            for any_direction, found in ((False, b""), (True, packet)):
                self.assertEqual(
                    found,
                    server.decode_frame(header + packet, server.LINK_TYPES[link], any_direction),
                )


# ------------------------------------------------------------------- capture files


class FileTest(ServerCase):
    """PCAP_FILE, from the file to the door."""

    def read(self, text: bytes, conf: str = "", limit: int = 1000) -> Any:
        """Return a server that has read a file of these bytes."""
        path = os.path.join(self.directory, "x.pcap")
        with open(path, "wb") as file:
            file.write(text)
        made = self.serve("SOURCE ANY\n" + KEYS, "PCAP_FILE %s;\n%s" % (path, conf))
        made.gate.memory.max_age = None
        made.start(False)
        for _ in range(limit):
            if not made.running:
                break
            made.turn()
        made.listen([])
        return made

    def packet(self) -> bytes:
        """Return an SPA packet that was not there before."""
        return bytes(Sender(salt=os.urandom(8)).packet(timestamp=NOW))

    def test_byte_orders_and_times(self) -> None:
        """Both, in microseconds and nanoseconds."""
        for order in "<>":
            for magic in (0xA1B2C3D4, 0xA1B23C4D):
                self.firewall.rules = {}
                made = self.read(write_pcap([ipv4(udp(self.packet()))], RAW, order, magic))
                self.assertEqual(["10.55.0.2 -> 0.0.0.0/0 tcp/22"], self.firewall.doors())
                self.assertEqual(0, made.exit_code)

    def test_filter_and_counts(self) -> None:
        """Only what passes PCAP_FILTER is judged; what is cut is counted; then it ends."""
        packets = [
            ipv4(udp(self.packet())),
            ipv4(udp(self.packet(), 53)),
            ipv4(tcp(self.packet()), 6),
            b"",
            b"\x45",
            ipv6(udp(self.packet())),
        ]
        made = self.read(write_pcap(packets))
        self.assertEqual((2, 0), (made.tally.counts["accepted"], made.exit_code))
        log = self.logged()
        self.assertIn("x.pcap: 6 packets, 2 of them pass PCAP_FILTER, 0 are cut short", log)
        self.assertIn("Gracefully leaving the fwknopd event loop.", log)
        self.read(write_pcap(packets, cut=1))
        self.assertIn("6 packets, 0 of them pass PCAP_FILTER, 5 are cut short", self.logged())

    def test_packet_limit(self) -> None:
        """Ends after so many, though the file goes on."""
        made = self.read(
            write_pcap([ipv4(udp(self.packet())) for _ in range(9)]), "PACKET_LIMIT 4;\n"
        )
        self.assertEqual(4, made.tally.counts["accepted"])
        self.assertIn("Packet count limit (4) reached. Exiting...", self.logged())

    def test_broken_files(self) -> None:
        """Before the first packet they stop the start; behind it they end the reading, with 1."""
        whole = write_pcap([ipv4(udp(self.packet()))] * 2)
        for text in (
            whole[:23],
            b"",
            b"\x0a\x0d\x0d\x0a" + whole[4:],
            b"GIF89a" + whole,
            whole[:20] + b"\x63\0\0\0" + whole[24:],
        ):
            with self.assertRaisesRegex(server.SpaError, "x.pcap: ") as caught:
                self.read(text)
            self.assertEqual(text.startswith(b"\x0a\x0d"), "editcap" in caught.exception.hint)
        for text in (
            whole[:-1],
            whole[: 24 + 7],
            whole + b"\0",
            whole[:32] + b"\xff" * 4 + whole[36:],
        ):
            made = self.read(text)
            self.assertEqual(1, made.exit_code)
            self.assertRegex(self.logged(), r"x\.pcap: broken after [0-2] packets")


# ------------------------------------------------------------------- HTTP and TCP


def request(target: str = "/abc-_", *headers: str, end: str = "\r\n") -> bytes:
    """Return an HTTP request."""
    return end.join(["GET %s HTTP/1.0" % target, *headers, "", "body: x", ""]).encode("latin-1")


AGENT = "User-Agent: Fwknop/2.6.10"


class RequestTest(ServerCase):
    """SPA over HTTP (tests/spec/fwknop.md 1.14)."""

    def test_packets(self) -> None:
        """Path or absolute form, any case and line end, - and _ for + and /."""
        for text in (
            request("/abc-_", AGENT),
            request("/abc+/", AGENT, end="\n"),
            request("http://h.example/abc-_", AGENT),
            request("HTTP://[::1]:80/abc-_", AGENT),
            request("/abc-_", "user-agent:Fwknop"),
            request("/abc-_", "X: y", "USER-AGENT:  Fwknop"),
            b"get /abc-_\r\n" + AGENT.encode(),
            b"GET /abc-_\t\nUser-Agent: Fwknop",
        ):
            self.assertEqual((b"abc+/", None), server.decode_request(text, False), text)
        self.assertEqual(b"abc+/", server.decode_request(request(), True)[0])

    def test_no_packets(self) -> None:
        """Another agent, or no path."""
        for text in (
            request(),
            request("/abc", "User-Agent: curl"),
            request("/abc", "X-Agent: Fwknop"),
            request("/abc", "User-Agent: fwknop"),
            request("abc", AGENT),
            request("*", AGENT),
            request("https://h/abc", AGENT),
            b"GET ",
            b"GET \n",
            b"GET  \r\n" + AGENT.encode(),
            request("/abc", "", AGENT),
        ):
            with self.assertRaises(server.NotSpa):
                server.decode_request(text, False)

    def test_forwarded_for(self) -> None:
        """The last address of the last such header."""
        for headers, last in (
            (["X-Forwarded-For: 1.2.3.4"], "1.2.3.4"),
            (["x-forwarded-for:1.1.1.1,1.2.3.4"], "1.2.3.4"),
            (["X-Forwarded-For: 1.1.1.1", "X-Forwarded-For: ::1 , 2::2 "], "2::2"),
            (["X-Forwarded-For:"], ""),
            (["X-Forwarded-For: 1.1.1.1,"], ""),
        ):
            found = server.decode_request(request("/abc", AGENT, *headers), False)
            self.assertEqual((b"abc", last), found)

    def receive(self, made: Any, payload: bytes, protocol: int = 6) -> str:
        """Let a server receive a payload, and return what it says then."""
        made.gate.receive(server.Datagram(payload, b"\x0a\x37\0\2", 9, b"\x0a\x37\0\1", 80,
                                          protocol))
        return self.logged()

    def test_server(self) -> None:
        """Off by default; on; and whose address it is."""
        packet = Sender(salt=os.urandom(8)).packet("0.0.0.0,tcp/22", timestamp=NOW).decode()
        packet = packet.replace("+", "-").replace("/", "_")
        text = request("/" + packet, AGENT, "X-Forwarded-For: 203.0.113.9")
        made = self.serve("SOURCE ANY\n" + KEYS)
        self.assertNotIn("opened", self.receive(made, text))
        self.assertEqual({"HTTP": 1}, dict(made.tally.counts))
        made = self.serve("SOURCE ANY\n" + KEYS, "ENABLE_SPA_OVER_HTTP Y;\n")
        self.assertNotIn("opened", self.receive(made, text, 17), "nobody sends HTTP over UDP")
        self.assertIn("opened 10.55.0.2 ->", self.receive(made, text))
        made = self.serve(
            "SOURCE ANY\n" + KEYS, "ENABLE_SPA_OVER_HTTP Y;\nENABLE_X_FORWARDED_FOR Y;\n"
        )
        self.assertIn(
            "Replay detected from source IP: 203.0.113.9, Destination proto/port: 6/80, "
            "Original source IP: 10.55.0.2",
            self.receive(made, text),
        )
        for cut in (
            request("/" + packet, AGENT),
            text.partition(b"\r\n\r\n")[0],
            text.partition(b"\r\n\r\n")[0] + b"\r\n",
            text.replace(b"203.0", b"X: " + b"a" * server.MAX_REQUEST)[: server.MAX_REQUEST],
        ):
            self.assertIn("there is none, or the request has no end", self.receive(made, cut))
        said = self.receive(made, request("/" + packet, AGENT, "X-Forwarded-For: {0}\x1b"))
        self.assertIn("Error parsing X-Forwarded-For header: value '{0}\\x1b' is not", said)

    def test_other_traffic_is_no_news(self) -> None:
        """On TCP and ICMP it is counted, and in the log with VERBOSE only, within the limit."""
        made = self.serve("SOURCE ANY\n" + KEYS)
        for payload in (b"x!" * 99, b"\0" * 200, b"", b"GET / HTTP/1.1\r\n\r\n", b"A" * 2000):
            for protocol in (6, 1, 58):
                self.assertEqual("", self.receive(made, payload, protocol))
        self.assertEqual(15, sum(made.tally.counts.values()))
        self.log.level = server.DEBUG
        self.assertIn("error 4098", self.receive(made, b"\0" * 200))
        for _ in range(99):
            self.receive(made, b"\0" * 200)
        self.assertEqual("", self.receive(made, b"\0" * 200))


class TcpTest(unittest.TestCase):
    """Connections that bring packets, on the loopback."""

    def setUp(self) -> None:
        """Listen on a port that nobody has."""
        self.clock = Clock()
        self.capture = server.TcpCapture(server.open_port_socket(
            socket.AF_INET, socket.SOCK_STREAM, 0), 0, self.clock.clocks())
        self.addCleanup(self.capture.close)
        self.address = self.capture.socket.getsockname()
        self.kept = []  # type: List[socket.socket]

    def tearDown(self) -> None:
        """Close the clients' ends."""
        for each in self.kept:
            each.close()

    def connect(self, text: bytes = b"", source: str = "127.0.0.1") -> socket.socket:
        """Return a connection on which this was sent."""
        made = socket.socket()
        self.kept.append(made)
        made.settimeout(TIMEOUT)
        made.bind((source, 0))
        made.connect(("127.0.0.1", self.address[1]))
        made.sendall(text)
        return made

    def drain(self, count: Optional[int] = None) -> List[bytes]:
        """Return the payloads that come, `count` of them or what there is."""
        found = []  # type: List[bytes]

        def drained() -> bool:
            """Take what there is."""
            try:
                while True:
                    datagram = self.capture.receive()
                    found.extend([datagram.payload] if datagram else [])
            except BlockingIOError:
                return len(found) >= (count or 0)

        wait_for(drained, "so many packets: %s" % count)
        return found

    def test_ends(self) -> None:
        """The end of the connection, of a header, or of what there is room for."""
        for text, end, found in (
            (b"A" * 200, True, b"A" * 200),
            (b"A" * 1501, False, b"A" * 1501),
            (b"GET /x\r\nA: b\r\n\r\n", False, b"GET /x\r\nA: b\r\n\r\n"),
            (b"get /x\n\n", False, b"get /x\n\n"),
            (b"GET /x\r\n", True, b"GET /x\r\n"),
        ):
            made = self.connect(text)
            if end:
                made.shutdown(socket.SHUT_WR)
            self.assertEqual([found], self.drain(1))
            self.assertEqual(b"", made.recv(9), "no answer")
        self.connect(b"A" * 5000)
        (text,) = self.drain(1)
        self.assertTrue(server.MAX_PAYLOAD < len(text) <= server.MAX_REQUEST + 1)

    def test_parts(self) -> None:
        """Text that comes in parts, and a connection without any."""
        made = self.connect(b"A" * 100)
        self.assertEqual([], self.drain())
        made.sendall(b"B" * 100)
        made.close()
        self.assertEqual([b"A" * 100 + b"B" * 100], self.drain(1))
        self.connect().close()
        self.assertEqual([], self.drain())

    def test_time(self) -> None:
        """What has come when the time is over is the packet; who says nothing is sent away."""
        self.assertEqual(float("inf"), self.capture.due)
        for text, least, most, found in ((b"", 4, 5, []), (b"A" * 200, 1, 2, [b"A" * 200])):
            self.connect(text)
            self.assertEqual([], self.drain())
            self.clock.pass_seconds(least)
            self.assertEqual([], self.drain())
            self.clock.pass_seconds(most - least)
            self.assertEqual(found, self.drain())
            self.assertEqual({}, self.capture.connections)

    def test_slow_bytes_win_no_time(self) -> None:
        """The end stays where the first byte put it."""
        made = self.connect(b"A")
        self.drain()
        end = self.capture.due
        made.sendall(b"A")
        self.assertTrue(select.select(self.capture.connections, [], [], TIMEOUT)[0])
        self.assertEqual([], self.drain())
        self.assertEqual(end, self.capture.due)

    def test_too_many(self) -> None:
        """The oldest of a network makes room for its next; what it brought is not lost."""
        first = self.connect(b"A" * 200)
        for _ in range(3):
            self.connect()
        self.assertEqual([], self.drain())
        self.connect()
        self.assertEqual([b"A" * 200], self.drain())
        with self.assertRaises(ConnectionResetError):  # nothing is left of it here
            first.recv(9)
        for number in range(2, 40):
            for _ in range(3):
                self.connect(source="127.0.0.%d" % number)
            self.drain()
            self.assertLessEqual(len(self.capture.connections), server.MAX_CONNECTIONS)
        self.connect(b"GET /x\n\n", "127.0.0.99")
        self.assertEqual([b"GET /x\n\n"], self.drain(1))

    def test_no_descriptor_is_left(self) -> None:
        """It waits for a second, or until a connection ends, instead of trying again and again."""
        first = self.connect(b"A" * 100)
        self.assertEqual([], self.drain())
        self.connect(b"GET /x\n\n")
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)

        def wait() -> None:
            """Find it readable, and not any more once there was no descriptor for it."""
            free = os.dup(0)
            os.close(free)
            resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
            self.addCleanup(resource.setrlimit, resource.RLIMIT_NOFILE, limits)
            self.assertEqual([], self.drain())
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            self.assertEqual(([], []), (self.capture.selector.select(0), self.drain()))
            self.assertEqual(server.ACCEPT_PAUSE, self.capture.due - self.clock.mono())

        wait()
        first.close()
        self.assertEqual([b"A" * 100, b"GET /x\n\n"], self.drain(2))
        self.connect(b"GET /y\n\n")
        wait()
        self.clock.pass_seconds(server.ACCEPT_PAUSE)
        self.assertEqual([b"GET /y\n\n"], self.drain(1))
        self.assertEqual(float("inf"), self.capture.due)

    def test_addresses(self) -> None:
        """Both ends of the connection, as a packet socket would have them."""
        peer = self.connect(b"GET /\n\n").getsockname()
        while True:
            datagram = self.capture.receive()
            if datagram:
                break
        self.assertEqual(
            (b"\x7f\0\0\1", peer[1], b"\x7f\0\0\1", 6),
            (datagram.source, datagram.source_port, datagram.destination, datagram.protocol),
        )


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        made = make_packets()
        found = {text: tcpdump_verdicts(text, list(made.values())) for text in FILTERS}
        with open(VERDICTS, "w", encoding="ascii") as out:
            json.dump(
                {
                    "about": "Whether `tcpdump FILTER` lets each packet pass (DLT_RAW): a digit "
                    "for each, in their order. Made by tests/test_capture.py --write.",
                    "packets": {name: packet.hex() for name, packet in made.items()},
                    "verdicts": found,
                },
                out,
                indent=1,
            )
            out.write("\n")
    else:
        unittest.main()
