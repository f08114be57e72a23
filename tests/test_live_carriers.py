"""Packets that come by other ways than UDP: the real fwknop client, real kernels and networks.

Nearly every server runs with --test, so that what it would open stands in its log.
"""

import json
import os
import re
import signal
import struct
import sys
import time
import unittest
from typing import Any, List

from tests.netns import (CLIENT4, CLIENT6, FWKNOP, KEYS, OTHER4, SERVER4, SERVER6, SPA_CLIENT,
                         STANZA, Process, Server)
from tests.support import needs_programs, needs_root, slowness, wait_for
from tests.test_live import KNOCK4, KNOCK6, LiveTest
from tests.test_server import ipv4, ipv6, udp

BY_SOURCE = ["-A", "tcp/22", "-s", "-D", SERVER4]  # opens the address that the packet comes from
CARRIERS = ("udp", "tcp", "http", "tcpraw", "udpraw", "icmp")
NUMBERS = {"udp": 17, "udpraw": 17, "icmp": 1}  # the others are TCP

# Connects, does what the words on its command line say, and prints what came back.
TALK = r"""
import json, socket, sys, time
family = socket.AF_INET6 if ":" in sys.argv[2] else socket.AF_INET
kept = []
def connect():
    made = socket.socket(family)
    if sys.argv[1]:
        made.bind((sys.argv[1], 0))
    made.settimeout(20)
    made.connect((sys.argv[2], int(sys.argv[3])))
    kept.append(made)
connect()
for word, argument in json.loads(sys.argv[4]):
    if word == "send":
        kept[-1].sendall(argument.encode())
    elif word == "end":
        try:
            kept[-1].shutdown(socket.SHUT_WR)
        except OSError:
            pass  # the server was faster
    elif word == "more":
        for _ in range(argument):
            connect()
    elif word == "hold":
        print("ready", flush=True)
        time.sleep(1000)
    elif word == "read":
        try:
            print(repr(kept[-1].recv(100)), flush=True)
        except ConnectionResetError:
            print("b''", flush=True)
"""


class CarrierTest(LiveTest):
    """A test with two hosts, whose client also speaks TCP by hand."""

    def talk(self, *words: Any, address: str = SERVER4, port: int = 62201, source: str = "") -> str:
        """Connect, do what these words say, and return what came back."""
        return self.client.run(sys.executable, "-I", "-S", "-c", TALK, source, address, port,
                               json.dumps(words))

    def hold(self, *words: Any, address: str = SERVER4, port: int = 62201) -> Process:
        """Do the same in the background, and keep the connections."""
        more = json.dumps([*words, ("hold", 0)])
        process = self.client.start(sys.executable, "-I", "-S", "-c", TALK, "", address, port, more)
        process.wait_for("ready")
        return process

    def request(self, packet: str, *headers: str, form: str = "GET /%s HTTP/1.1") -> str:
        """Return an HTTP request that carries a packet."""
        text = packet.replace("+", "-").replace("/", "_")
        return "\r\n".join([form % text, "Host: x", *headers, "", ""])

    def digests(self, server: Server) -> List[List[str]]:
        """Return the words of each line that the server's memory has."""
        with open(os.path.join(server.directory, "run", "digest.cache")) as file:
            return [line.split() for line in file if not line.startswith("#")]

    def check_count(self, server: Server, start: int, opened: int) -> None:
        """So many packets were opened in all, and no other one seen."""
        log = server.log(start)
        self.assertEqual(opened, log.count(" opened "), log)
        self.assertNotIn("Replay", log)


@needs_root
@needs_programs("ip", "fwknop")
class SniffTest(CarrierTest):
    """What the packet socket sees of it."""

    def test_the_real_client(self) -> None:
        """Each -P of fwknop opens once, and is remembered with its protocol and ports."""
        self.cable.server.listen(62201)
        server = self.serve("PCAP_FILTER port 62201 or icmp;\nENABLE_SPA_OVER_HTTP Y;\n")
        mark = server.mark()
        for carrier in CARRIERS:
            with self.subTest(carrier=carrier):
                server.knock(self.client, *KNOCK4, "-P", carrier, program=FWKNOP)
                words = self.digests(server)[-1]
                number = NUMBERS.get(carrier, 6)
                self.assertEqual([str(number), CLIENT4, SERVER4], [words[1], words[2], words[4]])
                self.assertEqual("0" if number == 1 else "62201", words[5])
        server.knock(self.client, *KNOCK4, "-P", "icmp", "--icmp-type", "8", program=FWKNOP)
        server.knock(self.client, *BY_SOURCE, "-P", "udpraw", "-Q", "10.55.0.77", program=FWKNOP,
                     expect="opened 10.55.0.77 ->")
        self.check_count(server, mark, len(CARRIERS) + 2)

    def test_ipv6_and_replay(self) -> None:
        """TCP, HTTP and ICMPv6 over IPv6; what comes again by another carrier is a replay."""
        self.cable.server.listen(62201)
        server = self.serve("PCAP_FILTER tcp port 62201 or icmp6;\nENABLE_SPA_OVER_HTTP Y;\n")
        packets = [self.make_packet(*KEYS) for _ in range(3)]
        mark = server.mark()
        self.talk(("send", packets[0]), address=SERVER6)
        server.wait_for(" opened ", mark)
        self.talk(("send", self.request(packets[1], "User-Agent: Fwknop/1")), address=SERVER6)
        wait_for(lambda: server.log(mark).count(" opened ") == 2, "the second")
        self.assertEqual(
            [["6", CLIENT6, SERVER6, "62201"]] * 2,
            [[words[1], words[2], words[4], words[5]] for words in self.digests(server)])
        code = (
            "import socket, sys\n"
            "s = socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6)\n"
            "s.sendto(b'\\x81' + bytes(7) + sys.argv[1].encode(), ('%s', 0))\n" % SERVER6
        )
        self.client.run(sys.executable, "-I", "-S", "-c", code, packets[2])
        wait_for(lambda: server.log(mark).count(" opened ") == 3, "the third")
        self.assertEqual(["58", CLIENT6, "0"], [self.digests(server)[-1][n] for n in (1, 2, 5)])
        self.talk(("send", self.request(packets[2], "User-Agent: Fwknop/1")))
        self.assertIn(
            "Destination proto/port: 6/62201, Original source IP: %s, Original dst proto/port: "
            "58/0, " % CLIENT6,
            server.wait_for("Replay detected from source IP: " + CLIENT4, mark))

    def test_http_is_off_by_default(self) -> None:
        """The kernel drops a request, unless VERBOSE shows it in fwknopd's words; plain TCP opens.
        """
        self.cable.server.listen(62201)
        quiet = self.serve("PCAP_FILTER tcp port 62201;\n")
        self.client.run(*FWKNOP, *KEYS, *KNOCK4, "-P", "http")
        quiet.knock(self.client, *KNOCK4, "-P", "tcp", program=FWKNOP)
        quiet.configure("PCAP_FILTER tcp port 62201;\nENABLE_SPA_OVER_HTTP Y;\n")
        quiet.send_signal(signal.SIGHUP)
        quiet.wait_for("Re-starting fwknopd")
        quiet.knock(self.client, *KNOCK4, "-P", "http", program=FWKNOP)
        quiet.stop()
        self.assertNotIn("4099", quiet.log())
        self.assertIn("2 accepted; rejected: none", quiet.wait_for("Packets seen"))
        verbose = self.serve("PCAP_FILTER tcp port 62201;\nVERBOSE 1;\n")
        self.assertIn(
            "error 4099: 'SPA via HTTP request, but ENABLE_SPA_OVER_HTTP is not set'",
            verbose.knock(self.client, *KNOCK4, "-P", "http", program=FWKNOP, expect="[10.55.0.2]"))

    @needs_programs("tcpdump")
    def test_vlan(self) -> None:
        """A frame with one tag is seen on its interface and on any, and with two in a capture."""
        path = self.cable.server.path("pcap")
        dump = self.cable.server.start("tcpdump", "-U", "--immediate-mode", "-i", "eth0", "-w",
                                       path, "vlan")
        dump.wait_for("listening on")
        servers = [self.serve("", STANZA, "-i", name) for name in ("eth0", "any")]
        tag = struct.pack(">HH", 0x8100, 7)
        packet = ipv4(udp(self.make_packet(*KEYS).encode()))
        self.send_frame(tag + b"\x08\0" + packet)
        for server in servers:
            server.wait_for(" opened ")
            self.check_count(server, 0, 1)
        packet = ipv6(udp(self.make_packet(*KEYS).encode()))
        self.send_frame(struct.pack(">HH", 0x88A8, 9) + tag + b"\x86\xdd" + packet)
        wait_for(lambda: os.path.getsize(path) > 2 * len(packet), "the frames in the capture")
        dump.end()
        again = Server(self.cable.server, "", STANZA, "-t").launch("--pcap-file", path)
        self.assertEqual(0, again.popen.wait(30))
        self.assertEqual(2, again.output().count(" opened "), again.output())

    def send_frame(self, frame: bytes) -> None:
        """Send an Ethernet frame to the server, from its EtherType on."""
        link = self.cable.server.run("ip", "link", "show", "eth0")
        match = re.search(r"link/ether ([0-9a-f:]{17})", link)
        assert match, link
        there = bytes.fromhex(match.group(1).replace(":", ""))
        code = (
            "import socket, sys\n"
            "s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)\n"
            "s.bind(('eth0', 0))\n"
            "s.send(bytes.fromhex(sys.argv[1]))\n"
        )
        text = (there + b"\x02\0\0\0\0\x42" + frame).hex()
        self.client.run(sys.executable, "-I", "-S", "-c", code, text)

    def test_what_this_host_sends(self) -> None:
        """Is looked at with --pcap-any-direction only."""
        servers = [self.serve(), self.serve("", STANZA, "--pcap-any-direction")]
        self.cable.server.run(*FWKNOP, *KEYS, *KNOCK4[:-1], CLIENT4)
        servers[1].wait_for(" opened ")
        mark = servers[1].mark()
        servers[0].knock(self.client, *KNOCK4)
        servers[1].wait_for(" opened ", mark)
        self.check_count(servers[0], 0, 1)
        self.check_count(servers[1], 0, 2)

    def test_promiscuous(self) -> None:
        """ENABLE_PCAP_PROMISC hears frames for other hosts, which have another hardware address."""
        self.cable.server.run("ip", "link", "set", "eth0", "promisc", "off")
        server = self.serve("PCAP_INTF eth0;\nENABLE_PCAP_PROMISC Y;\n")
        self.assertRegex(self.cable.server.run("ip", "-d", "link", "show", "eth0"),
                         r"promiscuity 1 ")
        self.client.run("ip", "neigh", "replace", "10.55.0.88", "lladdr", "02:00:00:00:00:99",
                        "dev", "eth0")
        server.knock(self.client, *KNOCK4[:-1], "10.55.0.88")
        server.stop()
        self.assertRegex(self.cable.server.run("ip", "-d", "link", "show", "eth0"),
                         r"promiscuity 0 ")

    def test_the_kernel_obeys_a_long_filter(self) -> None:
        """More ports than a jump of 8 bits can cross, and brackets and not around them."""
        ports = " or ".join(str(port) for port in range(3000, 3090))
        text = "not (tcp or host %s) and (dst port %s)" % (OTHER4, ports)
        server = self.serve("PCAP_FILTER %s;\n" % text)
        self.assertIn("PCAP filter is: '%s'" % text, server.log())
        mark = server.mark()
        for port in (2999, 3090, 62201):
            self.client.run(*SPA_CLIENT, *KEYS, *KNOCK4, "-p", port)
        for port in (3000, 3001, 3044, 3089):
            server.knock(self.client, *KNOCK4, "-p", str(port))
            server.knock(self.client, *KNOCK6, "-p", str(port))
        self.check_count(server, mark, 8)


@needs_root
@needs_programs("ip", "fwknop")
class TcpServerTest(CarrierTest):
    """ENABLE_TCP_SERVER."""

    config = "ENABLE_TCP_SERVER Y;\nENABLE_SPA_OVER_HTTP Y;\nPCAP_FILTER port 62201;\n"

    def test_the_real_client(self) -> None:
        """TCP and HTTP open once each, though the packet socket looks at the same port."""
        for more in ("", "ENABLE_UDP_SERVER Y;\n"):
            server = self.serve(self.config + more)
            self.assertIn("Kicking off TCP server to listen on port 62201.", server.log())
            mark = server.mark()
            for carrier in ("tcp", "http", "udp"):
                server.knock(self.client, *KNOCK4, "-P", carrier, program=FWKNOP)
                words = self.digests(server)[-1]
                self.assertEqual([str(NUMBERS.get(carrier, 6)), CLIENT4, SERVER4, "62201"],
                                 [words[1], words[2], words[4], words[5]])
            self.check_count(server, mark, 3)
            self.assertEqual(0, server.stop())

    @needs_programs("setpriv")
    def test_without_cap_net_raw(self) -> None:
        """UDP and TCP sockets of both families, on a port of choice."""
        server = self.serve(
            self.config + "TCPSERV_PORT 7000;\n",
            launcher=["setpriv", "--bounding-set", "-net_raw", "--inh-caps", "-net_raw"])
        self.assertIn("listening on UDP port 62201 instead", server.log())
        mark = server.mark()
        server.knock(self.client, *KNOCK4)
        server.knock(self.client, *KNOCK4, "-P", "tcp", "-p", "7000", program=FWKNOP)
        self.talk(("send", self.make_packet(*KEYS)), address=SERVER6, port=7000)
        wait_for(lambda: server.log(mark).count(" opened ") == 3, "three")

    def test_how_a_packet_ends(self) -> None:
        """By its connection's end, by quiet, by the end of a header; and nobody is answered."""
        server = self.serve(self.config)
        for words in (
            lambda packet: [("send", packet), ("end", 0), ("read", 0)],
            lambda packet: [("send", packet[:99]), ("send", packet[99:]), ("read", 0)],
            lambda packet: [("send", self.request(packet, "User-Agent: Fwknop")), ("read", 0)],
            lambda packet: [("send",
                             "get http://h.example/%s\nuser-agent:fwknop\nUSER-AGENT: Fwknop/9\n"
                             % (packet.replace("+", "-").replace("/", "_"))),
                            ("send", "cookie: %s\n\n" % ("c" * 3000)),
                            ("read", 0)],
        ):
            for address in (SERVER4, SERVER6):
                mark = server.mark()
                said = self.talk(*words(self.make_packet(*KEYS)), address=address)
                self.assertEqual("b''\n", said)
                server.wait_for(" opened ", mark)
                self.check_count(server, mark, 1)

    @needs_programs("curl")
    def test_curl(self) -> None:
        """The request that a reader of the README types."""
        server = self.serve(self.config)
        text = self.make_packet(*KEYS).replace("+", "-").replace("/", "_")
        code, _ = self.client.run_code("curl", "-s", "-A", "Fwknop",
                                       "http://%s:62201/%s" % (SERVER4, text))
        self.assertEqual(52, code, "curl says that nothing came back")
        server.wait_for(" opened ")

    def test_bad_requests(self) -> None:
        """Other agents, methods and texts open nothing; ALLOW_ANY_USER_AGENT lets agents in."""
        agent = "User-Agent: Fwknop/2"
        server = self.serve(self.config)
        mark = server.mark()
        packet = self.make_packet(*KEYS)
        for text in (self.request(packet, "User-Agent: curl/8"),
                     self.request(packet),
                     self.request(packet, agent, form="POST /%s HTTP/1.1"),
                     self.request(packet, agent, form="GET /x/%s HTTP/1.1"),
                     self.request(packet, agent, form="GET /?q=%s HTTP/1.1"),
                     self.request(packet, agent, form="GET https://h/%s HTTP/1.1"),
                     self.request(packet, agent, form="GET %s HTTP/1.1"),
                     self.request("", agent),
                     packet + "\n",
                     "A" * 9000,
                     "GET /" + "A" * 9000,
                     "\0" * 300,
                     "GET "):
            self.assertEqual("b''\n", self.talk(("send", text), ("end", 0), ("read", 0)))
        server.knock(self.client, *KNOCK4)
        self.check_count(server, mark, 1)
        server.configure(self.config + "ALLOW_ANY_USER_AGENT Y;\n")
        server.send_signal(signal.SIGHUP)
        server.wait_for("Got SIGHUP", mark)
        self.talk(("send", self.request(packet, "User-Agent: curl/8")), ("read", 0))
        wait_for(lambda: server.log(mark).count(" opened ") == 2, "the packet of curl")

    def test_idle_connections_do_not_lock_out(self) -> None:
        """Thousands from one address, and a few from each of many, leave room for a knock."""
        server = self.serve(self.config)
        pid = server.running().popen.pid
        self.client.run(
            "ip", "-batch", "-",
            input="".join("addr add 10.55.0.%d/24 dev eth0\n" % n for n in range(100, 140)))
        keepers = [self.hold(("more", 300), ("send", "A" * 100))]
        server.knock(self.client, *KNOCK4, "-P", "tcp", program=FWKNOP)
        for number in range(100, 140):
            self.talk(("more", 3), ("send", "A" * 500), source="10.55.0.%d" % number)
        keepers.append(self.hold(("more", 50), ("send", "GET /")))
        server.knock(self.client, *KNOCK4, "-P", "http", program=FWKNOP)
        server.knock(self.client, *KNOCK6)
        self.assertLess(len(os.listdir("/proc/%d/fd" % pid)), 100)
        wait_for(lambda: len(os.listdir("/proc/%d/fd" % pid)) < 25, "the end of idle connections")
        for keeper in keepers:
            keeper.end(signal.SIGKILL)
        server.knock(self.client, *KNOCK4, "-P", "tcp", program=FWKNOP)

    def test_reload(self) -> None:
        """Sockets that fit stay as they are, others come and go; a taken port changes nothing."""
        server = self.serve(self.config)

        def reload(config: str, expect: str) -> None:
            """Read other files, and wait for what is said of it."""
            mark = server.mark()
            server.configure(config)
            server.send_signal(signal.SIGHUP)
            server.wait_for(expect, mark)

        def knock(*options: str) -> None:
            server.knock(self.client, *KNOCK4, *options, program=FWKNOP)

        self.cable.server.listen(9000)
        reload(self.config + "TCPSERV_PORT 9000;\n", "TCP port 9000: Address already in use")
        knock("-P", "tcp")
        reload(self.config + "PCAP_FILTER udp port 7000;\n", "PCAP filter is: 'udp port 7000'")
        knock("-P", "tcp")
        knock("-p", "7000")
        reload(self.config + "TCPSERV_PORT 7000;\nENABLE_UDP_SERVER Y;\n", "on port 7000.")
        knock("-P", "tcp", "-p", "7000")
        knock()
        self.assertFalse(self.client.reaches(SERVER4, 62201))
        reload(self.config + "PCAP_FILE /x.pcap;\n", "going on with the old settings")
        reload("ENABLE_UDP_SERVER Y;\nTCPSERV_PORT 7000;\n", "Kicking off UDP server")
        wait_for(lambda: not self.client.reaches(SERVER4, 7000), "the end of the TCP server")
        knock()
        self.assertEqual(0, server.stop())

    def test_an_interface_that_comes_back(self) -> None:
        """The TCP server goes on meanwhile, and its port is not opened again."""
        server = self.serve(self.config + "PCAP_INTF eth0;\n")
        mark = server.mark()
        self.cable.unplug()
        server.wait_for("going on when it is back", mark)
        self.cable.plug()
        server.wait_for("Sniffing interface: eth0", mark)
        wait_for(lambda: self.client.reaches(SERVER4, 62201), "the link")
        server.knock(self.client, *KNOCK4, "-P", "tcp", program=FWKNOP)
        server.knock(self.client, *KNOCK4)
        self.assertEqual(1, server.log(mark).count("Sniffing interface"), server.log(mark))

    def test_a_port_that_is_taken(self) -> None:
        """Stops the start before the firewall is touched."""
        self.cable.server.listen(62201)
        code, text = Server(self.cable.server, self.config + "GUARD_PORTS tcp/22;\n").command()
        self.assertEqual(1, code, text)
        self.assertIn("TCP port 62201: Address already in use", text)
        self.cable.server.listen(22)
        self.assertTrue(self.client.reaches(SERVER4, 22))


@needs_root
@needs_programs("ip", "fwknop")
class ProxyTest(CarrierTest):
    """-H, and X-Forwarded-For."""

    config = "ENABLE_TCP_SERVER Y;\nENABLE_SPA_OVER_HTTP Y;\n"

    def test_the_form_for_proxies(self) -> None:
        """fwknop -H sends the absolute form, which fwknopd does not understand."""
        server = self.serve(self.config)
        server.knock(self.client, *KNOCK4, "-H", SERVER4 + ":62201", program=FWKNOP)

    def test_forwarded_for(self) -> None:
        """Opens for the last address, where that is enabled, and else for the peer."""
        agent = "User-Agent: Fwknop/2.6.10"
        on = self.config + "ENABLE_X_FORWARDED_FOR Y;\n"
        for config, headers, opened in (
                (self.config, ["X-Forwarded-For: 203.0.113.9"], CLIENT4),
                (self.config, [], CLIENT4),
                (on, ["X-Forwarded-For: 203.0.113.9"], "203.0.113.9"),
                (on, ["x-forwarded-for:198.51.100.1, 203.0.113.10"], "203.0.113.10"),
                (on,
                 ["X-Forwarded-For: 198.51.100.1", "X-Forwarded-For: 203.0.113.11"],
                 "203.0.113.11"),
                (on, ["X-Forwarded-For: 198.51.100.1:40000, [2001:db8::7]:80"], "2001:db8::7")):
            with self.subTest(headers=headers, opened=opened):
                server = self.serve(config)
                path = self.client.path("packet")
                self.client.run(*FWKNOP, *KEYS, "-T", "-B", path, *BY_SOURCE)
                with open(path) as file:
                    packet = file.read().strip()
                self.talk(("send", self.request(packet, agent, *headers)), ("read", 0))
                self.assertIn("opened %s ->" % opened, server.wait_for(" opened "))
                self.assertEqual(opened, self.digests(server)[0][2])
                self.assertEqual(0, server.stop())

    def test_a_request_past_the_proxy(self) -> None:
        """Has no header, or is cut, and opens nothing."""
        server = self.serve(self.config + "ENABLE_X_FORWARDED_FOR Y;\n")
        packet, agent = self.make_packet(*KEYS), "User-Agent: Fwknop/2.6.10"
        self.talk(("send", self.request(packet, agent)), ("read", 0))
        server.wait_for("there is none, or the request has no end")
        self.assertNotIn(" opened ", server.log())

    def test_bad_addresses(self) -> None:
        """Are told, and open nothing."""
        server = self.serve(self.config + "ENABLE_X_FORWARDED_FOR Y;\n")
        packet = self.make_packet(*KEYS)
        for text in ("unknown",
                     "1.2.3.4, ",
                     "1.2.3",
                     "010.1.1.1",
                     "1.2.3.4:0",
                     "[1.2.3.4]x:80",
                     "a" * 900,
                     "\x1b["):
            mark = server.mark()
            self.talk(
                ("send", self.request(packet, "User-Agent: Fwknop", "X-Forwarded-For: " + text)))
            line = server.wait_for("Error parsing X-Forwarded-For header: value '", mark)
            self.assertLess(len(line), 200)
            self.assertNotIn("\x1b", line)
        self.assertNotIn(" opened ", server.log())


@needs_root
@needs_programs("ip", "fwknop", "tcpdump")
class CaptureFileTest(CarrierTest):
    """--pcap-file."""

    def record(self, *options: str) -> str:
        """Return a capture of a knock by each carrier, made by tcpdump on the server's side."""
        path = self.cable.server.path("pcap")
        dump = self.cable.server.start("tcpdump", "-U", "--immediate-mode", "-w", path, *options,
                                       "port 62201 or icmp")
        dump.wait_for("listening on")
        for carrier in CARRIERS:
            self.client.run(*FWKNOP, *KEYS, *KNOCK4, "-P", carrier)

        def whole() -> bool:
            """Whether the packet of the last carrier is there."""
            text = self.cable.server.run("tcpdump", "-nn", "-r", path, "icmp[0] == 0")
            return "ICMP echo reply" in text

        wait_for(whole, "the knock over ICMP")
        dump.end()
        return path

    def read(self, path: str, config: str, *options: str, access: str = STANZA) -> Any:
        """Return exit code, output and the lines of the memory of a server that reads a file."""
        server = Server(self.cable.server, config, access, "-t")
        process = server.launch("--pcap-file", path, *options)
        code = process.popen.wait(60)
        return code, process.output(), self.digests(server)

    def test_a_capture_of_all_carriers(self) -> None:
        """On an interface, on any, and on any as it was once; each opens, and then it ends."""
        self.cable.server.listen(62201)
        config = "PCAP_FILTER port 62201 or icmp;\nENABLE_SPA_OVER_HTTP Y;\n"
        for options in (["-i", "eth0"], ["-i", "any"], ["-i", "any", "-y", "LINUX_SLL"]):
            with self.subTest(options=options):
                path = self.record(*options)
                code, output, digests = self.read(path, config)
                self.assertEqual(0, code, output)
                self.assertEqual(len(CARRIERS), output.count(" opened "), output)
                self.assertEqual([str(NUMBERS.get(carrier, 6)) for carrier in CARRIERS],
                                 [words[1] for words in digests])
                self.assertRegex(output, r"Reading pcap file: .*\nPCAP filter is: 'port 62201 or i")
                self.assertRegex(
                    output, r"End of %s: \d+ packets, \d+ of them pass PCAP_FILTER, 0 are" % path)
                code, output, _ = self.read(path, "PCAP_FILTER udp port 62201;\n")
                self.assertEqual(2, output.count(" opened "), output)
                code, output, _ = self.read(path, config, "-C", "2")
                self.assertEqual(0, code)
                self.assertEqual(2, output.count("received with access source match"), output)
                self.assertIn("Packet count limit (2) reached. Exiting...", output)

    def test_packets_of_any_age(self) -> None:
        """Are accepted, as by fwknopd, but not twice; ENABLE_SPA_PACKET_AGING Y changes that."""
        path = self.cable.server.path("pcap")
        dump = self.cable.server.start("tcpdump", "-U", "--immediate-mode", "-i", "eth0", "-w",
                                       path, "udp port 62201")
        dump.wait_for("listening on")
        packet = self.make_packet(*KEYS, "--time-offset-minus", "9000s")
        self.client.send(SERVER4, 62201, packet, packet)
        wait_for(lambda: os.path.getsize(path) > 2 * len(packet), "the packets")
        dump.end()
        code, output, _ = self.read(path, "")
        self.assertEqual([0, 1, 1], [code, output.count(" opened "), output.count("Replay")],
                         output)
        self.assertNotIn("ENABLE_SPA_PACKET_AGING", output)
        code, output, _ = self.read(path, "ENABLE_SPA_PACKET_AGING Y;\n")
        self.assertEqual((0, 0), (code, output.count(" opened ")), output)
        self.assertIn("SPA data time difference is too great", output)

    def test_cut_and_broken_files(self) -> None:
        """Say what is wrong with them, end with 1, and leave the firewall as it was."""
        self.cable.server.listen(62201)
        path = self.record("-i", "eth0", "-s", "100")
        config = "PCAP_FILTER port 62201 or icmp;\n"
        code, output, _ = self.read(path, config)
        self.assertEqual((0, 0), (code, output.count(" opened ")), output)
        self.assertRegex(output, r"End of .*, (6|7|8|9|\d\d) are cut short")
        whole = self.record("-i", "eth0")
        with open(whole, "rb") as file:
            text = file.read()
        for content, expect in (
                (text[:-1], "broken after"),
                (text[:24] + text[24:32] + b"\xff" * 8 + text[40:], "broken after 0 packets"),
                (text[:23], "expected a capture file in the pcap format"),
                (b"", "expected a capture file in the pcap format"),
                (text[:20] + b"\x69\0\0\0" + text[24:],
                 "frames of link type 105; expected one of 0, 1, 12"),
                (b"\x0a\x0d\x0d\x0a" + text[4:], "hint: tcpdump -r FILE -w NEW")):
            with open(path, "wb") as file:
                file.write(content)
            with self.subTest(expect=expect):
                code, output, _ = self.read(path, config)
                self.assertEqual(1, code, output)
                self.assertIn(expect, output)
        for wrong, expect in (("/nowhere/x.pcap", "No such file"),
                              ("/dev/null", "regular file"),
                              (self.cable.server.directory, "regular file")):
            code, output = Server(self.cable.server, "", STANZA, "-t").command("--pcap-file", wrong)
            self.assertEqual(1, code, output)
            self.assertIn(expect, output)

    def test_it_ends_early(self) -> None:
        """A signal ends it, and packets are judged while it reads on."""
        self.cable.server.listen(62201)
        path = self.record("-i", "eth0")
        with open(path, "rb") as file:
            text = file.read()
        with open(path, "wb") as file:
            file.write(text + text[24:] * 60000)
        server = Server(self.cable.server, "PCAP_FILTER udp port 62201;\n", STANZA, "-t")
        process = server.launch("--pcap-file", path)
        process.wait_for(" opened ")
        began = time.monotonic()
        self.assertEqual(0, process.end(signal.SIGTERM))
        self.assertLess(time.monotonic() - began, 10 * slowness())
        self.assertIn("Got SIGTERM", process.output())


@needs_root
@needs_programs("ip")
class PacketLimitTest(LiveTest):
    """-C."""

    def test_packet_limit(self) -> None:
        """So many packets that look like SPA, good or not; junk does not count."""
        server = self.serve("", STANZA, "-C", "3")
        self.client.send(SERVER4, 62201, "no base64! " * 20, "short")
        server.knock(self.client, *KNOCK4)
        self.client.send(SERVER4, 62201, "8" * 200)
        server.knock(self.client, *KNOCK4)
        self.assertEqual(0, server.running().popen.wait(30))
        self.assertIn("Packet count limit (3) reached. Exiting...", server.log())


if __name__ == "__main__":
    unittest.main()
