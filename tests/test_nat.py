"""NAT without a kernel: what packets may translate, the texts of rules, the bytes of elements.

What the kernel makes of them is tested in test_live_nat.
"""

import ipaddress
import random
import socket
import threading
import unittest
from typing import Any, List, Optional, Tuple  # noqa: F401  (in type comments)
from unittest import mock

import spa_server as server
from tests.support import skip
from tests.test_config import KEYED, NO_FIREWALL, ConfigCase
from tests.test_packet import NOW, Sender, b64
from tests.test_server import KEYS, Clock, ServerCase, datagram, door

OWN = {"10.55.0.1": True, "10.66.0.1": True, "fd55::1": True, "127.0.0.1": True,
       "10.66.0.0": None}  # addresses of this host, and one that no host has
FORWARDING, LOCAL = "ENABLE_IPT_FORWARDING Y;\n", "ENABLE_IPT_LOCAL_NAT Y;\n"
BOTH, SNAT = FORWARDING + LOCAL, "ENABLE_IPT_SNAT Y;\n"
TRANSLATE = SNAT + "SNAT_TRANSLATE_IP 10.55.0.9;\n"
REFUSED = "SPA packet from 10.55.0.2 requested NAT access, but is not enabled/supported"
NO_NAME = REFUSED + " (Invalid Hostname in NAT SPA message)"
C4, C6 = "10.55.0.2 -> 0.0.0.0/0 ", "fd55::2 -> ::/0 "


def address(text: str) -> Any:
    """Return an IP address."""
    return ipaddress.ip_address(text)


# ------------------------------------------------------------------- judgement

# (fwknopd.conf, stanza lines, message type, message, NAT field, the doors or why not)
JUDGED = (
    # to a host behind this one; every port, to the same target
    (FORWARDING, "", 2, "10.55.0.2,tcp/22", "192.168.10.55,8080",
     ["FORWARD 10.55.0.2 -> 192.168.10.55 tcp/8080",
      "DNAT " + C4 + "tcp/22 to 192.168.10.55:8080"]),
    (FORWARDING, "", 4, "0.0.0.0,tcp/22,udp/53,tcp/23", "192.168.10.55,8080",
     ["FORWARD 10.55.0.2 -> 192.168.10.55 tcp/8080", "FORWARD 10.55.0.2 -> 192.168.10.55 udp/8080",
      "DNAT " + C4 + "tcp/22 to 192.168.10.55:8080", "DNAT " + C4 + "udp/53 to 192.168.10.55:8080",
      "DNAT " + C4 + "tcp/23 to 192.168.10.55:8080"]),
    (FORWARDING, "", 2, "fd55::2,tcp/22", "fd66::2,8080",
     ["FORWARD fd55::2 -> fd66::2 tcp/8080", "DNAT " + C6 + "tcp/22 to [fd66::2]:8080"]),
    (FORWARDING, "ACCESS_PREFIX4 24", 2, "10.55.0.2,tcp/22", "192.168.10.55,80",
     ["FORWARD 10.55.0.0/24 -> 192.168.10.55 tcp/80",
      "DNAT 10.55.0.0/24 -> 0.0.0.0/0 tcp/22 to 192.168.10.55:80"]),
    (FORWARDING + "ENABLE_DESTINATION_RULE Y;\n", "", 2, "10.55.0.2,tcp/22", "192.168.10.55,80",
     ["FORWARD 10.55.0.2 -> 192.168.10.55 tcp/80",
      "DNAT 10.55.0.2 -> 10.55.0.1 tcp/22 to 192.168.10.55:80"]),
    # where it comes from
    (FORWARDING + SNAT, "", 2, "10.55.0.2,tcp/22", "192.168.10.55,80",
     ["FORWARD 10.55.0.2 -> 192.168.10.55 tcp/80", "DNAT " + C4 + "tcp/22 to 192.168.10.55:80",
      "MASQUERADE 10.55.0.2 -> 192.168.10.55 tcp/80"]),
    (FORWARDING + TRANSLATE, "", 2, "10.55.0.2,tcp/22", "192.168.10.55,80",
     ["FORWARD 10.55.0.2 -> 192.168.10.55 tcp/80", "DNAT " + C4 + "tcp/22 to 192.168.10.55:80",
      "SNAT 10.55.0.2 -> 192.168.10.55 tcp/80 to 10.55.0.9"]),
    (FORWARDING + TRANSLATE, "", 2, "fd55::2,tcp/22", "fd66::2,80",
     ["FORWARD fd55::2 -> fd66::2 tcp/80", "DNAT " + C6 + "tcp/22 to [fd66::2]:80",
      "MASQUERADE fd55::2 -> fd66::2 tcp/80"]),
    (FORWARDING + TRANSLATE, "FORCE_NAT 10.1.1.1 80\nFORCE_MASQUERADE Y", 1, "10.55.0.2,tcp/22",
     None, ["FORWARD 10.55.0.2 -> 10.1.1.1 tcp/80", "DNAT " + C4 + "tcp/22 to 10.1.1.1:80",
            "MASQUERADE 10.55.0.2 -> 10.1.1.1 tcp/80"]),
    (FORWARDING + TRANSLATE, "FORCE_NAT 10.1.1.1 80\nFORCE_MASQUERADE Y\nFORCE_SNAT 10.55.0.7", 1,
     "10.55.0.2,tcp/22", None,
     ["FORWARD 10.55.0.2 -> 10.1.1.1 tcp/80", "DNAT " + C4 + "tcp/22 to 10.1.1.1:80",
      "SNAT 10.55.0.2 -> 10.1.1.1 tcp/80 to 10.55.0.7"]),
    # to another port of this host; the port in the message is the outer one
    (LOCAL, "", 5, "10.55.0.2,tcp/2222", "10.55.0.1,22",
     ["10.55.0.2 -> 0.0.0.0/0 tcp/22", "DNAT " + C4 + "tcp/2222 to 10.55.0.1:22"]),
    (LOCAL + SNAT, "", 6, "10.55.0.2,tcp/2222", "10.66.0.1,22",
     ["10.55.0.2 -> 0.0.0.0/0 tcp/22", "DNAT " + C4 + "tcp/2222 to 10.66.0.1:22"]),
    (LOCAL, "", 5, "10.55.0.2,tcp/2222", ",22",
     ["10.55.0.2 -> 0.0.0.0/0 tcp/22", "DNAT " + C4 + "tcp/2222 to 10.55.0.1:22"]),
    (LOCAL, "", 5, "10.55.0.2,tcp/2222", "gate.example,22",
     ["10.55.0.2 -> 0.0.0.0/0 tcp/22", "DNAT " + C4 + "tcp/2222 to 10.55.0.1:22"]),
    (LOCAL, "", 5, "10.55.0.2,tcp/2222", "203.0.113.7,22",  # of a router in front of this host
     ["10.55.0.2 -> 0.0.0.0/0 tcp/22", "DNAT " + C4 + "tcp/2222 to 10.55.0.1:22"]),
    (LOCAL + "ENABLE_DESTINATION_RULE Y;\n", "", 5, "10.55.0.2,tcp/2222", "10.66.0.1,22",
     ["10.55.0.2 -> 10.66.0.1 tcp/22", "DNAT 10.55.0.2 -> 10.55.0.1 tcp/2222 to 10.66.0.1:22"]),
    (LOCAL, "DISABLE_DNAT Y", 5, "10.55.0.2,tcp/2222", "10.55.0.1,22",
     ["10.55.0.2 -> 0.0.0.0/0 tcp/22"]),
    # FORCE_NAT goes before what the packet names
    (FORWARDING, "FORCE_NAT 10.1.1.1 80", 1, "10.55.0.2,tcp/22,udp/53", None,
     ["FORWARD 10.55.0.2 -> 10.1.1.1 tcp/80", "FORWARD 10.55.0.2 -> 10.1.1.1 udp/80",
      "DNAT " + C4 + "tcp/22 to 10.1.1.1:80", "DNAT " + C4 + "udp/53 to 10.1.1.1:80"]),
    (LOCAL, "FORCE_NAT 10.1.1.1 80", 1, "10.55.0.2,tcp/22", None,
     ["FORWARD 10.55.0.2 -> 10.1.1.1 tcp/80", "DNAT " + C4 + "tcp/22 to 10.1.1.1:80"]),
    (FORWARDING, "FORCE_NAT 10.1.1.1 80", 2, "10.55.0.2,tcp/22", "127.0.0.1,99",
     ["FORWARD 10.55.0.2 -> 10.1.1.1 tcp/80", "DNAT " + C4 + "tcp/22 to 10.1.1.1:80"]),
    (FORWARDING, "FORCE_NAT 10.66.0.1 80", 1, "10.55.0.2,tcp/22", None,
     ["10.55.0.2 -> 0.0.0.0/0 tcp/80", "DNAT " + C4 + "tcp/22 to 10.66.0.1:80"]),
    (FORWARDING, "FORCE_NAT 10.1.1.1 80\nDISABLE_DNAT Y", 1, "10.55.0.2,tcp/22", None,
     ["FORWARD 10.55.0.2 -> 10.1.1.1 tcp/80"]),
    # FORWARD_ALL
    (FORWARDING, "FORWARD_ALL Y", 2, "10.55.0.2,tcp/22", "192.168.10.99,80",
     ["FORWARD " + C4 + "*/*", "DNAT " + C4 + "*/* to 192.168.10.99"]),
    (FORWARDING + TRANSLATE, "FORWARD_ALL Y\nFORCE_NAT 192.168.10.99 80", 1, "10.55.0.2,tcp/22",
     None, ["FORWARD " + C4 + "*/*", "DNAT " + C4 + "*/* to 192.168.10.99",
            "SNAT " + C4 + "*/* to 10.55.0.9"]),
    (FORWARDING + SNAT, "FORWARD_ALL Y\nDISABLE_DNAT Y\nFORCE_MASQUERADE Y", 1, "10.55.0.2,tcp/22",
     None, ["FORWARD " + C4 + "*/*", "MASQUERADE " + C4 + "*/*"]),
    (FORWARDING + SNAT, "FORWARD_ALL Y\nFORCE_SNAT 10.55.0.9", 1, "fd55::2,tcp/22",
     None, ["FORWARD " + C6 + "*/*", "MASQUERADE " + C6 + "*/*"]),
    (FORWARDING + SNAT, "FORWARD_ALL Y", 1, "10.55.0.2,tcp/22", None, [C4 + "tcp/22"]),
    (BOTH, "FORWARD_ALL Y", 5, "10.55.0.2,tcp/2222", "10.55.0.1,22",
     [C4 + "tcp/22", "DNAT " + C4 + "tcp/2222 to 10.55.0.1:22"]),
    (BOTH, "DISABLE_DNAT Y", 1, "10.55.0.2,tcp/22", None, [C4 + "tcp/22"]),
    # what is not enabled
    ("", "", 2, "10.55.0.2,tcp/22", "192.168.10.55,80", REFUSED),
    (SNAT, "", 4, "10.55.0.2,tcp/22", "192.168.10.55,80", REFUSED),
    (LOCAL, "", 2, "10.55.0.2,tcp/22", "192.168.10.55,80", REFUSED),
    (FORWARDING, "", 5, "10.55.0.2,tcp/22", "10.55.0.1,80", REFUSED),
    (FORWARDING, "", 6, "10.55.0.2,tcp/22", "192.168.10.55,80", REFUSED),
    (FORWARDING, "FORCE_NAT 10.1.1.1 80", 5, "10.55.0.2,tcp/22", "10.55.0.1,80", REFUSED),
    # what nobody may be led to
    (BOTH, "", 2, "10.55.0.2,tcp/22", "127.0.0.1,80", REFUSED + " (127.0.0.1 is a"),
    (BOTH, "", 5, "10.55.0.2,tcp/22", "127.0.0.1,80", REFUSED + " (127.0.0.1 is a"),
    (BOTH, "", 5, "127.0.0.1,tcp/22", "127.0.0.1,80",  # a client on this host
     ["127.0.0.1 -> 0.0.0.0/0 tcp/80", "DNAT 127.0.0.1 -> 0.0.0.0/0 tcp/22 to 127.0.0.1:80"]),
    (BOTH, "", 2, "10.55.0.2,tcp/22", "::ffff:127.0.0.1,80", REFUSED + " (127.0.0.1 is a"),
    (BOTH, "", 2, "10.55.0.2,tcp/22", "0.0.0.0,80", REFUSED + " (0.0.0.0 is not"),
    (BOTH, "", 2, "10.55.0.2,tcp/22", "224.0.0.1,80", REFUSED + " (224.0.0.1 is not"),
    (BOTH, "", 2, "10.55.0.2,tcp/22", "255.255.255.255,80", REFUSED + " (255.255.255.255 is not"),
    (BOTH, "", 2, "10.55.0.2,tcp/22", "0.1.2.3,80", REFUSED + " (0.1.2.3 is not"),
    (BOTH, "", 5, "10.55.0.2,tcp/22", "240.0.0.1,80", REFUSED + " (240.0.0.1 is not"),
    (BOTH, "", 2, "10.55.0.2,tcp/22", "10.66.0.0,80", REFUSED + " (10.66.0.0 is not"),
    (BOTH, "", 5, "10.55.0.2,tcp/22", "10.66.0.0,80", REFUSED + " (10.66.0.0 is not"),
    (BOTH, "", 2, "10.55.0.2,tcp/22", "169.254.169.254,80", REFUSED + " (169.254.169.254 is not"),
    (BOTH, "", 2, "fd55::2,tcp/22", "::1,80", REFUSED + " (::1 is a"),
    (BOTH, "", 2, "fd55::2,tcp/22", "ff02::1,80", REFUSED + " (ff02::1 is not"),
    (BOTH, "", 2, "fd55::2,tcp/22", "fe80::1,80", REFUSED + " (fe80::1 is not"),
    (BOTH, "", 2, "10.55.0.2,tcp/22", "10.55.0.1,80", REFUSED + " (10.55.0.1 is an address of"),
    (BOTH, "", 2, "10.55.0.2,tcp/22", "fd66::2,80", REFUSED + " (fd66::2 is not IPv4)"),
    (BOTH, "", 2, "fd55::2,tcp/22", "10.66.0.2,80", REFUSED + " (10.66.0.2 is not IPv6)"),
    (BOTH, "", 5, "fd55::2,tcp/22", "10.55.0.1,80", REFUSED + " (10.55.0.1 is not IPv6)"),
    (BOTH, "FORCE_NAT 10.1.1.1 80", 1, "fd55::2,tcp/22", None, REFUSED + " (10.1.1.1 is not IPv6)"),
    (BOTH, "", 2, "10.55.0.2,tcp/22", ",80", REFUSED + " (it names no host)"),
    (BOTH, "", 2, "10.55.0.2,tcp/22", "a;b,80", NO_NAME),
    (BOTH, "", 2, "10.55.0.2,tcp/22", "-f,80", NO_NAME),
    (BOTH, "", 5, "10.55.0.2,tcp/22", "h\xf6st,80", NO_NAME),
    (BOTH, "", 2, "10.55.0.2,tcp/22", "a\0b,80", NO_NAME),
    (BOTH, "", 2, "10.55.0.2,tcp/22", "fe80::1%eth0,80", NO_NAME),
    # names
    (BOTH, "", 2, "10.55.0.2,tcp/22", "inner.example,80", "look up inner.example IPv4"),
    (BOTH, "", 4, "fd55::2,tcp/22", "inner.example,80", "look up inner.example IPv6"),
    (BOTH, "", 2, "10.55.0.2,tcp/22", "010.0.0.1,80", "look up 010.0.0.1 IPv4"),
    (BOTH + "ENABLE_NAT_DNS N;\n", "", 2, "10.55.0.2,tcp/22", "inner.example,80",
     "Received Hostname in NAT SPA message, but hostname is disabled."),
    (BOTH + "ENABLE_NAT_DNS N;\n", "", 5, "10.55.0.2,tcp/22", "inner.example,80",
     "Received Hostname in NAT SPA message, but hostname is disabled."),
    # ports: the outer one is judged; and the inner one is not opened when that is forbidden
    (BOTH, "OPEN_PORTS tcp/22", 2, "10.55.0.2,tcp/23", "192.168.10.55,22", "One or more requested"),
    (BOTH, "OPEN_PORTS tcp/22", 2, "10.55.0.2,tcp/23", "inner.example,22", "One or more requested"),
    (BOTH, "OPEN_PORTS tcp/2222", 5, "10.55.0.2,tcp/2222", "10.55.0.1,22",
     [C4 + "tcp/22", "DNAT " + C4 + "tcp/2222 to 10.55.0.1:22"]),
    (BOTH, "RESTRICT_PORTS tcp/25", 5, "10.55.0.2,tcp/2222", "10.55.0.1,25",
     REFUSED + " (port 25 is in RESTRICT_PORTS)"),
    (BOTH, "RESTRICT_PORTS tcp/25", 2, "10.55.0.2,tcp/2222", "192.168.10.55,25",
     ["FORWARD 10.55.0.2 -> 192.168.10.55 tcp/25", "DNAT " + C4 + "tcp/2222 to 192.168.10.55:25"]),
    # one connection: NAT can't end with it
    (BOTH, "ONE_CONNECTION Y", 2, "10.55.0.2,tcp/22", "192.168.10.55,80",
     REFUSED + " (with ONE_CONNECTION)"),
    (BOTH, "ONE_CONNECTION Y", 1, "10.55.0.2,tcp/22", None, ["once " + C4 + "tcp/22"]),
)  # type: Any


class NatCase(ServerCase):
    """Settings, packets, and the doors that come of them."""

    def settings(self, text: str) -> Any:
        """Return the settings of these lines."""
        made = server.ServerSettings()
        for number, line in enumerate(text.splitlines(), 1):
            name, value = line.rstrip(";").split(" ", 1)
            made.set_line(server.Line("fwknopd.conf", number, name, value))
        made.set_defaults()
        return made

    def packet(self, kind: int, text: str, nat: Optional[str]) -> Any:
        """Return a packet with these fields, off the wire."""
        extra = [] if nat is None else [b64(nat.encode("latin-1"))]
        extra += [b"20"] * (kind in (3, 4, 6))
        sender = Sender()
        return server.unlock(sender.packet(text, kind, extra), sender.keys())[0]


class JudgeTest(NatCase):
    """The doors that a packet opens."""

    def judge(self, conf: str, lines: str, kind: int, text: str, nat: Optional[str],
              came: Any) -> Any:
        """Return the doors in words, or why there are none."""
        stanza = self.stanzas("SOURCE ANY\n" + KEYS + lines + "\n")[0]
        settings = self.settings(conf)
        server.check_nat(settings, [stanza])
        try:
            verdict = server.judge(server.Request.of_packet(self.packet(kind, text, nat), came),
                                   stanza, settings, lambda each: OWN.get(str(each), False), NOW)
        except server.PacketRejected as rejection:
            return str(rejection)
        if isinstance(verdict, server.Lookup):
            return "look up %s IPv%d" % verdict
        self.assertEqual(20 if kind in (4, 6) else 30, verdict.seconds)
        return [each.describe() for each in verdict.doors]

    def test_table(self) -> None:
        """Each row of the table."""
        for conf, lines, kind, text, nat, expected in JUDGED:
            with self.subTest(conf=conf, lines=lines, kind=kind, text=text, nat=nat):
                found = self.judge(conf, lines, kind, text, nat, datagram())
                if isinstance(expected, str):
                    self.assertTrue(str(found).startswith(expected), found)
                else:
                    self.assertEqual(expected, found)

    def test_a_knock_that_was_sent_to_another_host(self) -> None:
        """A packet that is only routed through is no local NAT."""
        came = datagram(destination="10.77.0.1")
        found = self.judge(LOCAL, "", 5, "10.55.0.2,tcp/2222", "gate.example,22", came)
        self.assertEqual(REFUSED + " (10.77.0.1 is no address of this host)", found)

    def test_own_addresses(self) -> None:
        """The kernel knows its own addresses."""
        if not hasattr(socket, "AF_NETLINK"):
            skip("no netlink on this system")
        for text, own in (("127.0.0.1", True), ("127.7.7.7", True), ("192.0.2.9", False),
                          ("2001:db8::9", False)):
            self.assertIs(own, server.is_own_address(address(text)), text)


class ConfigTest(ConfigCase):
    """Directives that need each other stop the start, with file and line."""

    def test_stanzas_that_lack_a_directive(self) -> None:
        """Exit code 3 and one line."""
        either = "FORCE_NAT: requires either ENABLE_IPT_FORWARDING or ENABLE_IPT_LOCAL_NAT"
        neither = ": requires either FORCE_NAT or FORWARD_ALL"
        for conf, lines, expected in (
                ("", "FORCE_NAT 10.1.1.1 22", either),
                (SNAT, "FORCE_NAT 10.1.1.1 22", either),
                (LOCAL, "FORWARD_ALL Y", "FORWARD_ALL: requires ENABLE_IPT_FORWARDING"),
                (BOTH + SNAT, "FORCE_SNAT 10.1.1.1", "FORCE_SNAT" + neither),
                (BOTH + SNAT, "FORCE_MASQUERADE Y", "FORCE_MASQUERADE" + neither),
                (BOTH, "FORCE_SNAT 10.1.1.9\nFORCE_NAT 10.1.1.1 22",
                 "FORCE_SNAT: requires ENABLE_IPT_SNAT"),
                (BOTH, "FORCE_MASQUERADE Y\nFORWARD_ALL Y",
                 "FORCE_MASQUERADE: requires ENABLE_IPT_SNAT")):
            with self.subTest(conf=conf, lines=lines):
                code, out, err = self.main_with(KEYED + lines + "\n", conf, "--exit-parse-config")
                self.assertEqual((3, ""), (code, out))
                said = [line for line in err.splitlines() if "REQUIRE_SOURCE" not in line]
                self.assertEqual(1, len(said), err)
                self.assertIn("/access.conf:4: " + expected, said[0])

    def test_ports_that_no_guard_holds(self) -> None:
        """The start tells of ports that the guard alone could close."""
        guard, stanza = "GUARD_PORTS tcp/22, udp/53;\n", "SOURCE ANY\n" + KEYS
        more = " is not in GUARD_PORTS: a knock changes nothing for it"
        for conf, access, expected in (
                (guard, "OPEN_PORTS tcp/22", []), ("", "OPEN_PORTS tcp/23", []),
                (guard, "OPEN_PORTS tcp/22,tcp/80,tcp/23", ["(stanza #1) tcp/23, tcp/80" + more]),
                (guard, "", ["(stanza #1) a knock changes nothing for ports that are not in "
                             "GUARD_PORTS"]),
                (guard, "ENABLE_CMD_EXEC Y", []),
                (guard, "OPEN_PORTS tcp/80\nCMD_CYCLE_OPEN /bin/sh\nCMD_CYCLE_CLOSE NONE", []),
                (guard + "NFT_ACCEPT_CHAINS inet f i;", "OPEN_PORTS tcp/80", []),
                (guard + "IPT_INPUT_ACCESS ACCEPT, filter, INPUT, 1, X, 1;", "OPEN_PORTS tcp/8",
                 []),
                (guard + "ENABLE_IPT_LOCAL_NAT Y;", "OPEN_PORTS tcp/80", [])):
            settings = server.ServerSettings()
            server.read_server_settings(self.write("f.conf", conf), settings)
            settings.set_defaults()
            stanzas, _ = server.read_stanzas(self.write("a.conf", stanza + access + "\n"))
            self.assertEqual(expected, server.port_warnings(settings, stanzas), (conf, access))

    def test_stanzas_that_lack_nothing(self) -> None:
        """A feature that is off needs no directive."""
        for conf, lines in (
                ("", "FORCE_MASQUERADE N\nFORWARD_ALL N\nDISABLE_DNAT Y"),
                (LOCAL, "FORCE_NAT 10.1.1.1 22"), (FORWARDING, "FORCE_NAT fd66::1 22"),
                (FORWARDING, "FORWARD_ALL Y"), (FORWARDING + SNAT, "FORWARD_ALL Y\nFORCE_SNAT ::9"),
                (LOCAL + SNAT, "FORCE_NAT 10.1.1.1 22\nFORCE_MASQUERADE Y")):
            with self.subTest(conf=conf, lines=lines):
                code, out, err = self.main_with(KEYED + lines + "\n", NO_FIREWALL + conf,
                                                "--exit-parse-config")
                self.assertEqual((0, "Configs parsed, exiting.\n"), (code, out), err)


# ------------------------------------------------------------------- rules and elements

def nat_door(kind: str, text: str, target: str = "", port: int = 0) -> Any:
    """Return a door of a kind: `SOURCE PROTOCOL/PORT [DESTINATION]`, and where it leads."""
    return door(text)._replace(kind=kind, target=address(target) if target else None,
                               target_port=port)


ALL = {"protocol": "*", "port": 0}
FORWARD_CHAIN = server.GrantChain("filter", "FWKNOP_FORWARD", "ACCEPT", kind=server.FORWARD)
DNAT_CHAIN = server.GrantChain("nat", "FWKNOP_PREROUTING", "DNAT", kind=server.DNAT)
SNAT_CHAIN = server.GrantChain("nat", "FWKNOP_POSTROUTING", "SNAT", kind=server.SNAT)
MASQUERADE_CHAIN = server.GrantChain("nat", "FWKNOP_MASQUERADE", "MASQUERADE",
                                     kind=server.MASQUERADE)
GUARD_CHAIN = server.GrantChain("mangle", "FWKNOP_GUARDED", "RETURN", first=True)
PASS_CHAIN = GUARD_CHAIN._replace(kind=server.DNAT, match=server.GUARD_PASS)


class WordsTest(NatCase):
    """What VERBOSE shows of a grant: the command that would add or delete it, and what fwknopd's
    arguments for iptables would be."""

    RULE = ("create_rule() Rule: '-t nat -p 6 -s 10.55.0.2 -d 0.0.0.0/0 --dport 22 -m comment "
            "--comment _exp_9 -j DNAT --to-destination 10.66.0.2:80' added to %s")

    def test_rules_of_fwknopd(self) -> None:
        """Their order, for each kind of door (tests/test_live_log.py has them from fwknopd)."""
        for kind, text, target, words in (
                ("access", "10.55.0.2/32 tcp/22", "", "filter -p 6 -s 10.55.0.2 -d 0.0.0.0/0 "
                 "--dport 22 %s ACCEPT"),
                ("access", "fd55::/56 udp/53", "", "filter -p 17 -s fd55::/56 -d ::/0 --dport 53 "
                 "%s ACCEPT"),
                ("FORWARD", "10.55.0.2/32 tcp/22", "", "filter -p 6 -s 10.55.0.2 --dport 22 "
                 "%s ACCEPT"),
                ("SNAT", "0.0.0.0/0 tcp/22", "10.66.0.1", "nat -p 6 -d 0.0.0.0/0 --dport 22 "
                 "%s SNAT --to-source 10.66.0.1")):
            made = nat_door(kind, text, target, 0) if target else door(text)._replace(kind=kind)
            self.assertEqual("-t " + words % "-m comment --comment _exp_9 -j",
                             server.fwknopd_rule(server.Grant(made, 9, 0.0)))

    def test_iptables(self) -> None:
        """A command for each rule."""
        firewall = server.IptablesFirewall({4: "/sbin/iptables"}, False, [DNAT_CHAIN],
                                           frozenset(), mock.Mock())
        firewall.programs[4].dated = False
        grant = server.Grant(nat_door("DNAT", "10.55.0.2/32 tcp/22", "10.66.0.2", 80), 9, 0.0)
        for is_new, option, more in ((True, "-A", [self.RULE % "FWKNOP_PREROUTING"]),
                                     (False, "-D", [])):
            self.assertEqual(
                ["iptables -t nat %s FWKNOP_PREROUTING -s 10.55.0.2/32 -p tcp -m tcp --dport 22 "
                 "-m comment --comment _exp_9 -j DNAT --to-destination 10.66.0.2:80" % option,
                 *more], server.grant_commands(firewall, grant, is_new, 0.0))

    def test_nft(self) -> None:
        """A command for each element; none for one that has ended by itself."""
        clock = Clock()
        first = nat_door("DNAT", "10.55.0.2/32 tcp/22", "10.66.0.2", 80)
        second = door("fd55::2/128 udp/53")
        firewall = server.NftFirewall(
            "nft", server.parse_nft_chains("inet filter input"), frozenset(),
            [server.set_type_of(each) for each in (first, second)], mock.Mock(), mock.Mock(),
            clocks=clock.clocks())
        for made, name, key, target in (
                (first, "inet spa_nat spa4_dnat", "10.55.0.2 . tcp . 22", " : 10.66.0.2 . 80"),
                (second, "inet filter spa6", "fd55::2 . udp . 53", "")):
            grant = server.Grant(made, 9, clock.mono() + 30)
            added = server.grant_commands(firewall, grant, True, clock.mono())
            self.assertEqual("nft add element %s { %s timeout 30s%s }" % (name, key, target),
                             added[0])
            self.assertEqual(target != "", added[1] == self.RULE % "inet spa_nat prerouting")
            self.assertEqual(["nft delete element %s { %s%s }" % (name, key, target)],
                             server.grant_commands(firewall, grant, False, clock.mono()))
            self.assertEqual([], server.grant_commands(firewall, grant._replace(ends=0.0), False,
                                                       clock.mono()))


class IptablesTest(NatCase):
    """Rules as text, there and back."""

    def rule(self, chain: Any, made: Any, dated: bool = False) -> str:
        """Return the rule of a door in a chain."""
        program = server.Iptables("iptables")
        program.dated = dated
        return str(program.rule(chain, server.Grant(made, 1795370290, 0.0)))

    def test_rules_are_those_of_fwknopd(self) -> None:
        """tests/spec/fwknop.md 3.6, to the letter, where the kernel has no time match.

        But for `--to-ports 22` of MASQUERADE, which lets one connection at a time pass.
        """
        source, anybody = "10.55.0.2/32 tcp/22", "0.0.0.0/0 tcp/8080 192.168.10.55"
        exp = " -m comment --comment _exp_1795370290 -j "
        for chain, made, expected in (
                (FORWARD_CHAIN, nat_door("FORWARD", "10.55.0.2/32 tcp/8080"),
                 "-s 10.55.0.2/32 -p tcp -m tcp --dport 8080" + exp + "ACCEPT"),
                (DNAT_CHAIN, nat_door("DNAT", source, "192.168.10.55", 8080),
                 "-s 10.55.0.2/32 -p tcp -m tcp --dport 22" + exp
                 + "DNAT --to-destination 192.168.10.55:8080"),
                (DNAT_CHAIN, nat_door("DNAT", source + " 10.55.0.1", "192.168.10.55", 8080),
                 "-s 10.55.0.2/32 -d 10.55.0.1/32 -p tcp -m tcp --dport 22" + exp
                 + "DNAT --to-destination 192.168.10.55:8080"),
                (MASQUERADE_CHAIN, nat_door("MASQUERADE", anybody),
                 "-d 192.168.10.55/32 -p tcp -m tcp --dport 8080" + exp + "MASQUERADE"),
                (SNAT_CHAIN, nat_door("SNAT", anybody, "10.55.0.1"),
                 "-d 192.168.10.55/32 -p tcp -m tcp --dport 8080" + exp
                 + "SNAT --to-source 10.55.0.1"),
                (DNAT_CHAIN, nat_door("DNAT", "10.55.0.2/32 tcp/2222", "10.55.0.1", 22),
                 "-s 10.55.0.2/32 -p tcp -m tcp --dport 2222" + exp
                 + "DNAT --to-destination 10.55.0.1:22"),
                (FORWARD_CHAIN, nat_door("FORWARD", source)._replace(**ALL),
                 "-s 10.55.0.2/32" + exp + "ACCEPT"),
                (DNAT_CHAIN, nat_door("DNAT", source, "192.168.10.99")._replace(**ALL),
                 "-s 10.55.0.2/32" + exp + "DNAT --to-destination 192.168.10.99"),
                (MASQUERADE_CHAIN, nat_door("MASQUERADE", source)._replace(**ALL),
                 "-s 10.55.0.2/32" + exp + "MASQUERADE"),
                (SNAT_CHAIN, nat_door("SNAT", source, "10.55.0.9")._replace(**ALL),
                 "-s 10.55.0.2/32" + exp + "SNAT --to-source 10.55.0.9"),
                (DNAT_CHAIN, nat_door("DNAT", "fd55::2/128 udp/53", "fd66::2", 5353),
                 "-s fd55::2/128 -p udp -m udp --dport 53" + exp
                 + "DNAT --to-destination [fd66::2]:5353")):
            self.assertEqual(expected, self.rule(chain, made))

    def test_the_guard_lets_through_what_is_translated(self) -> None:
        """The guard has a rule of its own for them. It is no grant of the port, nor the reverse."""
        made = nat_door("DNAT", "10.55.0.2/32 tcp/22", "192.168.10.55", 8080)
        text = self.rule(PASS_CHAIN, made)
        self.assertEqual("-s 10.55.0.2/32 -p tcp -m tcp --dport 22 -m conntrack --ctstate NEW "
                         "-m comment --comment _exp_1795370290 -j RETURN", text)
        line = "-A FWKNOP_GUARDED " + text
        self.assertIsNone(server.parse_rule(line, GUARD_CHAIN))
        self.assertEqual((made.match, 1795370290), server.parse_rule(line, PASS_CHAIN))
        own = "-A FWKNOP_GUARDED " + self.rule(GUARD_CHAIN, door("10.55.0.2/32 tcp/22"))
        self.assertIsNone(server.parse_rule(own, PASS_CHAIN))
        self.assertFalse(PASS_CHAIN.is_primary)

    def random_door(self, draw: random.Random, chain: Any) -> Any:
        """Return a door as it goes to a chain of this kind."""
        version = draw.choice((4, 6))
        bits = 32 if version == 4 else 128
        make = ipaddress.IPv4Address if version == 4 else ipaddress.IPv6Address
        prefix = draw.choice((bits, bits, bits - 8))
        source = ipaddress.ip_network("%s/%d" % (make(draw.randrange(1, 2 ** bits)), prefix),
                                      strict=False)
        made = server.Door(source, None, draw.choice(("tcp", "udp")), draw.randint(1, 65535),
                           chain.kind)
        if draw.random() < 0.3:
            made = made._replace(protocol="*", port=0)
        elif chain.kind in (server.SNAT, server.MASQUERADE):
            made = made._replace(source=server.any_source(version),
                                 destination=make(draw.randrange(2 ** bits)))
        if chain.kind == server.DNAT and draw.random() < 0.5:
            made = made._replace(destination=make(draw.randrange(2 ** bits)))
        if chain.kind in (server.DNAT, server.SNAT):
            made = made._replace(target=make(draw.randrange(1, 2 ** bits)))
        if chain.kind == server.DNAT and made.port:
            made = made._replace(target_port=draw.randint(1, 65535))
        return made

    def test_rule_and_parse_rule_are_inverse(self) -> None:
        """Random doors of every kind come back from their rules, in no other chain."""
        draw = random.Random(366)
        chains = (FORWARD_CHAIN, DNAT_CHAIN, SNAT_CHAIN, MASQUERADE_CHAIN)
        for _ in range(200):
            for chain in chains:
                made = self.random_door(draw, chain)
                line = "-A %s %s" % (chain.name, self.rule(chain, made, draw.random() < 0.5))
                self.assertEqual((made, 1795370290), server.parse_rule(line, chain), line)
                for other in chains:
                    if other is not chain:
                        self.assertIsNone(server.parse_rule(line, other))

    def test_rules_that_are_no_grants(self) -> None:
        """Rules of other forms than ours are no grants."""
        exp = " -m comment --comment _exp_1795370290 -j "
        port = " -p tcp -m tcp --dport 22"
        for chain, text in (
                (FORWARD_CHAIN, port + exp + "ACCEPT"), (FORWARD_CHAIN, exp + "ACCEPT"),
                (FORWARD_CHAIN, " -s 10.0.0.1/32 -p tcp" + exp + "ACCEPT"),
                (FORWARD_CHAIN, " -s 10.0.0.1/32 -p icmp" + exp + "ACCEPT"),
                (DNAT_CHAIN, " -s 10.0.0.1/32" + port + exp + "DNAT"),
                (DNAT_CHAIN, " -s 10.0.0.1/32" + port + exp + "DNAT --to-destination 10.0.0.9"),
                (DNAT_CHAIN, " -s 10.0.0.1/32" + port + exp + "DNAT --to-destination a:1"),
                (DNAT_CHAIN, " -s 10.0.0.1/32" + port + exp + "DNAT --to-destination 10.0.0.9:1-9"),
                (DNAT_CHAIN, " -s 10.0.0.1/32" + exp + "DNAT --to-destination 10.0.0.9:22"),
                (SNAT_CHAIN, port + exp + "SNAT --to-source 10.0.0.9"),
                (SNAT_CHAIN, " -d 10.0.0.1/32" + port + exp + "SNAT"),
                (MASQUERADE_CHAIN, exp + "MASQUERADE")):
            with self.subTest(text=text):
                self.assertIsNone(server.parse_rule("-A %s%s" % (chain.name, text), chain))


SHAPED = (
    ("spa4_dnat", nat_door("DNAT", "10.55.0.2/32 tcp/22", "192.168.10.55", 8080)),
    ("spa4_24_to_dnat", nat_door("DNAT", "10.55.0.0/24 udp/53 10.0.0.1", "192.168.10.55", 53)),
    ("spa6_dnat", nat_door("DNAT", "fd55::2/128 tcp/22", "fd66::2", 65535)),
    ("spa6_56_dnat_all", nat_door("DNAT", "fd55::/56 tcp/1", "fd66::2")._replace(**ALL)),
    ("spa4_to_dnat_all", nat_door("DNAT", "10.55.0.2/32 tcp/1 10.0.0.1", "10.66.0.2")._replace(
        **ALL)),
    ("spa4_to_forward", nat_door("FORWARD", "10.55.0.2/32 tcp/8080 192.168.10.55")),
    ("spa6_forward_all", nat_door("FORWARD", "fd55::2/128 tcp/1")._replace(**ALL)),
    ("spa4_to_snat", nat_door("SNAT", "10.55.0.2/32 tcp/8080 192.168.10.55", "10.55.0.1")),
    ("spa4_snat_all", nat_door("SNAT", "10.55.0.2/32 tcp/1", "10.55.0.1")._replace(**ALL)),
    ("spa6_to_masquerade", nat_door("MASQUERADE", "fd55::2/128 tcp/8080 fd66::2")),
)


class NftTest(unittest.TestCase):
    """The types of sets and maps, and their elements."""

    def test_elements_and_doors_are_inverse(self) -> None:
        """Every kind of door comes back from key and value; those of another length are none."""
        for name, made in SHAPED:
            with self.subTest(name=name):
                set_type = server.set_type_of(made)
                self.assertEqual(name, set_type.name)
                self.assertEqual(set_type, server.parse_set_name(name))
                key, value = set_type.key(made), set_type.value(made)
                self.assertEqual(made, set_type.door(key, value))
                self.assertEqual(made.target is None, value == b"")
                self.assertEqual(0, (len(key) + len(value)) % 4)
                for wrong in (value[:-1], value + b"\0\0\0\0") if value else ():
                    self.assertEqual(made.match if not wrong else None, set_type.door(key, wrong))
                self.assertEqual(made.match, set_type.door(key))
                self.assertIsNone(set_type.door(key[:-1], value))

    def test_bytes(self) -> None:
        """Key and value are those that nft itself sends."""
        made = SHAPED[0][1]
        set_type = server.set_type_of(made)
        self.assertEqual(b"\x0a\x37\0\2" b"\6\0\0\0" b"\0\x16\0\0", set_type.key(made))
        self.assertEqual(b"\xc0\xa8\x0a\x37" b"\x1f\x90\0\0", set_type.value(made))

    def test_language(self) -> None:
        """The lines for maps, sets and rules are in nft's language."""
        chain = server.NAT_TABLE
        for number, creation, rule in (
                (0, "add map inet spa_nat spa4_dnat { type ipv4_addr . inet_proto . inet_service : "
                    "ipv4_addr . inet_service; flags timeout; }",
                 "prerouting fib daddr type local dnat ip to ip saddr . meta l4proto . th dport "
                 "map @spa4_dnat"),
                (3, "add map inet spa_nat spa6_56_dnat_all { type ipv6_addr : ipv6_addr; "
                    "flags timeout; }",
                 "prerouting fib daddr type local dnat ip6 to "
                 "ip6 saddr & ffff:ffff:ffff:ff00:: map @spa6_56_dnat_all"),
                (7, "add map inet spa_nat spa4_to_snat { type ipv4_addr . ipv4_addr . inet_proto . "
                    "inet_service : ipv4_addr; flags timeout; }",
                 "postrouting snat ip to ip saddr . ip daddr . meta l4proto . th dport map "
                 "@spa4_to_snat"),
                (9, "add set inet spa_nat spa6_to_masquerade { type ipv6_addr . ipv6_addr . "
                    "inet_proto . inet_service; flags timeout; }",
                 "postrouting ip6 saddr . ip6 daddr . meta l4proto . th dport @spa6_to_masquerade "
                 "masquerade")):
            set_type = server.set_type_of(SHAPED[number][1])
            self.assertEqual(creation, set_type.creation(chain))
            self.assertEqual(rule, set_type.nat_rule())
        self.assertEqual("add set inet spa spa4_dnat { type ipv4_addr . inet_proto . inet_service; "
                         "flags timeout; }",
                         server.set_type_of(SHAPED[0][1]).creation(server.GUARD_TABLE))


# ------------------------------------------------------------------- grants and names

class GrantsTest(NatCase):
    """The register, on a firewall that obeys."""

    def setUp(self) -> None:
        """Make a register."""
        super().setUp()
        self.grants = server.Grants(self.firewall, self.log, self.clocks)

    def live(self) -> List[str]:
        """Return the open doors, and for how long."""
        self.assertEqual(self.grants.live, self.firewall.rules)
        return sorted("%s %d" % (each.door.describe(), each.ends - self.clock.mono_time)
                      for each in self.grants.live.values())

    def test_the_newest_target_takes_the_place(self) -> None:
        """The door then has the newest time, also a shorter one; others stay."""
        first, second = (nat_door("DNAT", "10.55.0.2/32 tcp/22", "10.66.0.2", port)
                         for port in (80, 81))
        other = nat_door("DNAT", "10.55.0.3/32 tcp/22", "10.66.0.2", 80)
        own = door("10.55.0.2/32 tcp/22")
        self.grants.grant([first, other, own], 100)
        self.grants.grant([second, own], 5)
        self.assertEqual(["10.55.0.2 -> 0.0.0.0/0 tcp/22 100",
                          "DNAT 10.55.0.2 -> 0.0.0.0/0 tcp/22 to 10.66.0.2:81 5",
                          "DNAT 10.55.0.3 -> 0.0.0.0/0 tcp/22 to 10.66.0.2:80 100"], self.live())
        self.clock.pass_seconds(6)
        self.grants.expire()
        self.assertNotIn(second, self.grants.live)
        self.assertNotIn(first, self.grants.live)
        self.clock.pass_seconds(100)
        self.grants.expire()
        self.assertEqual([], self.live())

    def test_a_failure_keeps_the_old_target(self) -> None:
        """Nothing changes when the firewall fails for good."""
        first, second = (nat_door("DNAT", "10.55.0.2/32 tcp/22", "10.66.0.2", port)
                         for port in (80, 81))
        self.grants.grant([first], 100)
        self.firewall.failures = 2
        with self.assertRaises(server.CommandError):
            self.grants.grant([second], 100)
        self.assertEqual([first], list(self.grants.live))

    def test_nobody_leads_another_stanzas_clients_elsewhere(self) -> None:
        """A door with the same match or a wider one is refused; the same target does no harm.

        A longer time does not make a door another stanza's, and nobody owns what was open before.
        """
        mine, theirs = (nat_door("DNAT", "10.55.0.2/32 tcp/22", "10.66.0.2", port)
                        for port in (80, 81))
        self.grants.grant([mine], 100, 1)
        everything = nat_door("DNAT", "10.55.0.2/32 tcp/22", "10.66.0.3")._replace(**ALL)
        for bad in (theirs, everything, nat_door("DNAT", "10.55.0.0/24 tcp/22", "10.66.0.3", 80),
                    nat_door("DNAT", "10.55.0.2/32 tcp/22 10.55.0.1", "10.66.0.3", 80)):
            with self.assertRaisesRegex(server.PacketRejected, "^10.55.0.2 -> 0.0.0.0/0 tcp/22 "
                                        "leads to 10.66.0.2:80 already, by another") as caught:
                self.grants.grant([door("10.55.0.2/32 tcp/81"), bad], 100, 2)
            self.assertEqual("NAT", caught.exception.reason)
        others = [nat_door("DNAT", text, "10.66.0.3", 80) for text in (
            "10.55.0.3/32 tcp/22", "10.55.0.2/32 tcp/23", "10.55.0.2/32 udp/22", "::1/128 tcp/22")]
        self.grants.grant([mine] + others, 200, 2)
        self.assertIn("DNAT 10.55.0.2 -> 0.0.0.0/0 tcp/22 to 10.66.0.2:80 200", self.live())
        with self.assertRaises(server.PacketRejected):
            self.grants.grant([theirs], 100, 2)
        self.grants.grant([theirs], 100, 1)
        self.assertNotIn(mine, self.grants.live)
        self.grants.move(self.firewall)
        with self.assertRaises(server.PacketRejected):
            self.grants.grant([mine], 100, 1)
        self.clock.pass_seconds(101)
        self.grants.expire()
        self.grants.grant([mine], 100, 2)
        self.assertIn(mine, self.grants.live)

    def test_words(self) -> None:
        """The log has fwknop's word for each kind."""
        for kind, text, word in ((server.FORWARD, "10.55.0.2/32 tcp/22", "FORWARD"),
                                 (server.DNAT, "10.55.0.2/32 tcp/22", "DNAT"),
                                 (server.MASQUERADE, "10.55.0.2/32 tcp/22", "SNAT"),
                                 (server.SNAT, "10.55.0.2/32 tcp/22", "SNAT")):
            self.grants.grant([nat_door(kind, text)], 30)
            self.assertIn("Added %s rule to FWKNOP_INPUT for 10.55.0.2 -> 0.0.0.0/0 tcp/22, "
                          "expires at %d\n" % (word, NOW + 30), self.logged())
            self.grants.grant([nat_door(kind, text)._replace(**ALL)], 30)
            self.assertIn("Added %s ALL rule to FWKNOP_INPUT for 10.55.0.2 -> 0.0.0.0/0 */*, "
                          % word, self.logged())

    def test_what_the_hosts_firewall_sees_to(self) -> None:
        """nftables has no FORWARD doors without its chains; iptables stores fewer addresses."""
        form = server.NftFirewall.normalise  # type: Any
        forward = nat_door("FORWARD", "10.55.0.2/32 tcp/80 10.66.0.2")
        self.assertIsNone(form(mock.Mock(forward=()), forward))
        chain = server.NftChain("inet", "filter", "forward")
        self.assertEqual(forward, form(mock.Mock(forward=(chain,)), forward))
        form = server.IptablesFirewall.normalise
        self.assertEqual(nat_door("FORWARD", "10.55.0.2/32 tcp/80"), form(None, forward))
        self.assertEqual(nat_door("SNAT", "0.0.0.0/0 tcp/80 10.66.0.2", "10.1.1.1"), form(
            None, nat_door("SNAT", "10.55.0.2/32 tcp/80 10.66.0.2", "10.1.1.1")))
        everything = nat_door("MASQUERADE", "fd55::2/128 tcp/1")._replace(**ALL)
        self.assertEqual(everything, form(None, everything))
        with mock.patch.object(self.firewall, "normalise", return_value=None), \
                self.assertRaisesRegex(server.CommandError, "no chain"):
            self.grants.grant([forward], 30)


class NameTest(NatCase):
    """Names on their whole way, with look-ups that end when the test says so."""

    def setUp(self) -> None:
        """Serve, with addresses for two names."""
        super().setUp()
        self.gate = threading.Event()
        self.asked = []  # type: List[Tuple[str, int]]
        self.made = self.serve("SOURCE ANY\n" + KEYS, BOTH)
        self.made.gate.resolver.resolve = self.resolve
        self.addCleanup(self.finish)

    def finish(self) -> None:
        """Let all look-ups end."""
        self.gate.set()
        while self.made.gate.resolver.busy:
            self.turn()
        for thread in set(threading.enumerate()) - {threading.main_thread()}:
            thread.join()  # an answer may be taken before its thread has ended

    def resolve(self, name: str, version: int) -> Any:
        """Return what a name server would, when the gate is open."""
        self.gate.wait(30)
        self.asked.append((name, version))
        return {"inner.example": address("192.0.2.9" if version == 4 else "2001:db8::9"),
                "loop.example": address("127.0.0.1")}.get(name)

    def turn(self) -> None:
        """Let the loop wait for one thing and do it."""
        for key, _ in self.made.selector.select(30):
            key.data()

    def knock(self, name: str, source: str = "10.55.0.2") -> bytes:
        """Send a packet of now that wants NAT to a name; return it."""
        self.count = getattr(self, "count", 0) + 1
        payload = Sender().packet("0.0.0.0,tcp/22", 2, [b64(name.encode() + b",80")],
                                  timestamp=int(self.clock.wall_time), rand="%016d" % self.count)
        self.made.gate.receive(datagram(payload, source,
                                        "10.55.0.1" if "." in source else "fd55::1"))
        return payload

    def test_a_name(self) -> None:
        """The server looks it up in the client's family, serves others, and rejects a replay."""
        payload = self.knock("inner.example")
        self.assertEqual([], self.firewall.doors())
        self.made.gate.receive(datagram(payload))
        self.assertIn("Replay detected", self.logged())
        packet = Sender().packet(timestamp=int(self.clock.wall_time))
        self.made.gate.receive(datagram(packet))
        self.assertEqual(1, len(self.firewall.doors()))
        self.knock("inner.example", "2001:db8::2")
        self.gate.set()
        while self.made.gate.resolver.busy:
            self.turn()
        self.assertEqual({("inner.example", 4), ("inner.example", 6)}, set(self.asked))
        self.assertEqual(2, self.logged().count("Resolved NAT IP in SPA message\n"))
        self.assertIn("10.55.0.2 -> 192.0.2.9 tcp/80", self.firewall.doors())
        self.assertIn("2001:db8::2 -> 2001:db8::9 tcp/80", self.firewall.doors())
        self.assertEqual(3, self.made.tally.counts["accepted"])

    def test_names_that_lead_nowhere(self) -> None:
        """No such host, this host, and too many at a time."""
        for _ in range(server.MAX_LOOKUPS - 1):
            self.knock("unknown.example")
        self.knock("loop.example")
        self.logged()
        self.knock("inner.example")
        self.assertIn("(stanza #1) too many NAT hosts are looked up", self.logged())
        self.made.gate.stanzas[0].number = 2  # another one's are not too many
        self.knock("unknown.example")
        self.assertNotIn("too many", self.logged())
        self.made.gate.stanzas[0].number = 1
        self.gate.set()
        while self.made.gate.resolver.busy:
            self.turn()
        said = self.logged()
        self.assertEqual(server.MAX_LOOKUPS,
                         said.count("Unable to resolve Hostname in NAT SPA message"))
        self.assertIn("(127.0.0.1 is a loopback address, which no other host reaches)", said)
        self.assertEqual([], self.firewall.doors())
        self.knock("inner.example")
        self.turn()
        self.assertEqual(2, len(self.firewall.doors()))

    def test_a_reload_comes_between(self) -> None:
        """Nothing opens, since the stanza may be gone."""
        self.knock("inner.example")
        stanzas = self.stanzas("SOURCE ANY\n" + KEYS)
        self.made.gate.configure(self.made.configuration._replace(stanzas=stanzas))
        self.gate.set()
        self.turn()
        self.assertIn("Unable to resolve", self.logged())
        self.assertEqual([], self.firewall.doors())

    def test_a_mistake_of_ours(self) -> None:
        """A mistake of ours does not end the server."""
        self.knock("inner.example")
        with mock.patch.object(self.made.grants, "grant", side_effect=AttributeError):
            self.gate.set()
            self.turn()
        self.assertIn("internal error: AttributeError", self.logged())

    def test_resolve_name(self) -> None:
        """Literal addresses need no server; names are bytes, so that no codec is needed."""
        self.assertEqual(address("192.0.2.7"), server.resolve_name("192.0.2.7", 4))
        self.assertIsNone(server.resolve_name("192.0.2.7", 6))
        self.assertIsNone(server.resolve_name("x" * 64 + ".", 4))

    def test_a_name_that_took_too_long(self) -> None:
        """A late answer is none: the client has given up, and may have another address by now."""
        for seconds, found in ((4.9, address("192.0.2.7")), (5.1, None)):
            tick = iter((100.0, 100.0 + seconds)).__next__
            self.assertEqual(found, server.resolve_name("192.0.2.7", 4, tick))


if __name__ == "__main__":
    unittest.main()
