"""`spa_server.py --check` on rules as text, on files and clocks. test_live_check has real hosts."""

import os
import subprocess
import sys
import time
import unittest
from typing import Any, Dict, List, Tuple

import spa_server as server
from tests.support import DirectoryCase, needs_root, skip, wait_for, write
from tests.test_config import NO_FIREWALL

ACCEPT, DROP, BOTH, NAT = {"accept"}, {"drop"}, {"accept", "drop"}, {"accept", "dnat"}
KEYED = "SOURCE ANY\nKEY one_k3y\nHMAC_KEY tw0_keys\nREQUIRE_SOURCE_ADDRESS Y\nOPEN_PORTS tcp/22\n"

# Rules of one chain whose policy is to drop; what becomes of a new packet to tcp/22, and of one of
# an established connection.
NFT_RULES: Tuple[Tuple[str, Any, Any], ...] = (
    ("", DROP, DROP),
    ("tcp dport 22 accept", ACCEPT, ACCEPT),
    ("tcp dport { 21-23, 80 } counter packets 1 bytes 60 accept comment \"drop it, tcp dport 1\"",
     ACCEPT, ACCEPT),
    ("tcp dport { 80, 443 } accept", DROP, DROP),
    ("udp dport 22 accept", DROP, DROP),
    ("icmp type echo-request accept", DROP, DROP), ("icmpv6 type { 1, 2 } accept", DROP, DROP),
    ("esp spi 1-255 accept", DROP, DROP),
    ("tcp dport 22 reject with icmp type port-unreachable\naccept", DROP, DROP),
    ("tcp dport != 22 accept", DROP, DROP),
    ("tcp dport @web accept", BOTH, BOTH),
    ("meta l4proto { tcp, udp } th dport 22 accept", ACCEPT, ACCEPT),
    ("meta l4proto . th dport { tcp . 22 } accept", BOTH, BOTH),
    ("ct state established,related accept", DROP, ACCEPT),
    ("ct state { established, related } accept", DROP, ACCEPT),
    ("ct state vmap { established : accept, related : accept, invalid : drop }", DROP, ACCEPT),
    ("ct state new tcp dport 22 accept", ACCEPT, DROP),
    ("tcp dport vmap { 22 : accept, 23 : drop }", ACCEPT, ACCEPT),
    ("tcp dport vmap @ports", BOTH, BOTH),
    ("ip saddr 192.0.2.0/24 tcp dport 22 accept", BOTH, BOTH),
    ("tcp dport 22 limit rate 3/minute burst 5 packets accept", BOTH, BOTH),
    ("iifname \"lo\" accept", DROP, DROP),
    ("iifname != \"lo\" accept", ACCEPT, ACCEPT),
    ("iifname { \"lo\", \"eth1\" } accept", BOTH, BOTH),
    ("fib daddr type local accept", ACCEPT, ACCEPT),
    ("ct status dnat accept", DROP, DROP),  # what NAT leads on is judged before
    ("log prefix \"accept tcp dport 22 \" level info", DROP, DROP),
    ("tcp dport 22 queue flags bypass to 1", BOTH, BOTH),
    ("tcp dport 22 reject with icmpx port-unreachable\naccept", DROP, DROP),
    ("jump ssh", ACCEPT, ACCEPT), ("goto ssh", ACCEPT, ACCEPT),
    ("jump back\naccept", ACCEPT, ACCEPT), ("goto back\naccept", DROP, DROP),
    ("ip saddr 192.0.2.1 goto back\naccept", BOTH, BOTH),
    ("xt match \"tcp\" counter packets 0 bytes 0 accept", BOTH, BOTH),
    ("a statement of a later nft accept", BOTH, BOTH))
IPTABLES_RULES: Tuple[Tuple[str, Any, Any], ...] = (
    ("-p tcp -m tcp --dport 22 -j ACCEPT", ACCEPT, ACCEPT),
    ("-p tcp -m tcp --dport 20:25 -m comment --comment \"-j DROP here\" -j ACCEPT", ACCEPT, ACCEPT),
    ("-p tcp -m multiport --dports 80,21:23 -j ACCEPT", ACCEPT, ACCEPT),
    ("-p udp -m udp --dport 22 -j ACCEPT", DROP, DROP),
    ("-p tcp -m tcp ! --dport 22 -j ACCEPT", DROP, DROP),
    ("-s 192.0.2.0/24 -p tcp -m tcp --dport 22 -j ACCEPT", BOTH, BOTH),
    ("-m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT", DROP, ACCEPT),
    ("-m state --state NEW -j ACCEPT", ACCEPT, DROP),
    ("-i lo -j ACCEPT", DROP, DROP), ("! -i lo -j ACCEPT", ACCEPT, ACCEPT),
    ("-m addrtype --dst-type LOCAL -j ssh", ACCEPT, ACCEPT),
    ("-m set --match-set friends src -j ACCEPT", BOTH, BOTH),
    ("-p tcp -m tcp --dport 22 -m limit --limit 3/min -j ACCEPT", BOTH, BOTH),
    ("-j REJECT --reject-with icmp-port-unreachable\n-j ACCEPT", DROP, DROP),
    ("-j LOG --log-prefix \"-j ACCEPT\"", DROP, DROP),
    ("-j NFQUEUE --queue-num 0", BOTH, BOTH),
    ("-j back\n-j ACCEPT", ACCEPT, ACCEPT), ("-g back\n-j ACCEPT", DROP, DROP),
    ("! -i docker0 -p tcp -m tcp --dport 22 -j DNAT --to-destination 172.17.0.2:22",
     {"drop", "dnat"}, {"drop", "dnat"}))
OTHER_CHAINS = {"ssh": {"nft": "tcp dport 22 accept",
                        "iptables": "-p tcp -m tcp --dport 22 -j ACCEPT"},
                "back": {"nft": "return", "iptables": "-j RETURN"}}

RULESET = """
table inet filter {
	set web {
		type inet_service
		elements = { 22, 80 }
	}
	chain input {
		comment "is printed first"
		type filter hook input priority filter; policy drop;
		tcp dport 22 accept comment "spa_server.py:12345678"
		jump more
	}
	chain more {
		tcp dport 80 accept
	}
	chain forward {
		type filter hook forward priority filter; policy drop;
	}
}
table ip nat {
	counter forward {
		packets 0 bytes 0
	}

	chain forward {
		type nat hook prerouting priority dstnat; policy accept;
		tcp dport 8080 dnat to 172.17.0.2:80
	}
}
table inet spa {
	chain input {
		type filter hook input priority -110; policy accept;
	}
}
table netdev t {
	chain in {
		type filter hook ingress device "eth0" priority 0; policy drop;
	}
}
"""


# As firewalld and OpenWrt's fw4 make them, shortened.
MANAGED = """
table inet firewalld {
	chain filter_INPUT {
		type filter hook input priority filter + 10; policy accept;
		ct state { established, related } accept
		ct status dnat accept
		iifname "lo" accept
		jump filter_INPUT_ZONES
		ct state invalid drop
		reject with icmpx admin-prohibited
	}
	chain filter_INPUT_ZONES {
		iifname "eth1" goto filter_IN_trusted
		goto filter_IN_public
	}
	chain filter_IN_trusted {
		accept
	}
	chain filter_IN_public {
		jump filter_IN_public_allow
		meta l4proto { icmp, ipv6-icmp } accept
		reject with icmpx admin-prohibited
	}
	chain filter_IN_public_allow {
		tcp dport 22 accept
		ip6 daddr fe80::/64 udp dport 546 accept
	}
}
table inet fw4 {
	chain input {
		type filter hook input priority filter; policy drop;
		iifname "lo" accept comment "!fw4: Accept traffic from loopback"
		ct state vmap { established : accept, related : accept } comment "!fw4: Handle inbound"
		tcp flags syn / fin,syn,rst,ack jump syn_flood comment "!fw4: Rate limit TCP syn packets"
		iifname "br-lan" jump input_lan comment "!fw4: Handle lan IPv4/IPv6 input traffic"
		iifname "wan" jump input_wan comment "!fw4: Handle wan IPv4/IPv6 input traffic"
		jump handle_reject
	}
	chain syn_flood {
		limit rate 25/second burst 50 packets return comment "!fw4: Accept SYN packets below limit"
		drop comment "!fw4: Drop excess packets"
	}
	chain input_lan {
		jump accept_from_lan
	}
	chain accept_from_lan {
		iifname "br-lan" counter packets 4 bytes 240 accept comment "!fw4: accept lan traffic"
	}
	chain input_wan {
		meta nfproto ipv4 udp dport 68 counter packets 0 bytes 0 accept
		tcp dport 8443 counter packets 0 bytes 0 accept
		jump reject_from_wan
	}
	chain reject_from_wan {
		iifname "wan" counter packets 0 bytes 0 jump handle_reject
	}
	chain handle_reject {
		meta l4proto tcp reject with tcp reset comment "!fw4: Reject TCP traffic"
		reject comment "!fw4: Reject any other traffic"
	}
}
"""


def chain_of(kind: str, lines: str) -> Any:
    """Return a chain of these rules whose policy is to drop."""
    texts = {"in": lines, **{name: both[kind] for name, both in OTHER_CHAINS.items()}}
    rules = {name: [rule for line in text.splitlines() for rule in server.host_rules(line, texts)]
             for name, text in texts.items()}
    return server.HostChain("a b in", (4,), "drop", "in", rules)


class FirewallTest(unittest.TestCase):
    """What the host's rules do with a packet."""

    def test_rules(self) -> None:
        """Each rule of the tables lets packets in, drops them, or nobody can tell."""
        for kind, table in (("nft", NFT_RULES), ("iptables", IPTABLES_RULES)):
            for lines, new, established in table:
                with self.subTest(kind=kind, rules=lines):
                    chain = chain_of(kind, lines)
                    self.assertEqual((new, established), (
                        chain.verdicts(("tcp", 22)), chain.verdicts(("tcp", 22), "established")))

    def test_interface(self) -> None:
        """Where packets come by WAN0."""
        for rule, expected in (
                ("iifname \"WAN0\" accept", ACCEPT), ("iifname \"eth1\" accept", DROP),
                ("iifname != { \"lo\", \"eth1\" } accept", ACCEPT), ("iifname @lans accept", BOTH),
                ("iifname \"wan*\" accept", BOTH), ("iifname . ip saddr @lans accept", BOTH),
                ("iifname vmap { \"lo\" : accept, \"WAN0\" : jump ssh }", ACCEPT)):
            chain = chain_of("nft", rule)._replace(interface="WAN0")
            self.assertEqual(expected, chain.verdicts(("tcp", 22)), rule)
        for rule, expected in (("-i WAN0 -j ACCEPT", ACCEPT), ("! -i WAN0 -j ACCEPT", DROP),
                               ("-i eth+ -j ACCEPT", BOTH)):
            chain = chain_of("iptables", rule)._replace(interface="WAN0")
            self.assertEqual(expected, chain.verdicts(("tcp", 22)), rule)

    def test_managed(self) -> None:
        """What firewalld and fw4 let in depends on the interface, which may be known."""
        firewalld, fw4 = server.nft_host_chains(MANAGED)
        self.assertEqual([BOTH, BOTH], [firewalld.verdicts(("tcp", 80)), fw4.verdicts(("tcp", 22))])
        firewalld = firewalld._replace(interface="eth0")
        for port, state, expected in ((22, "new", ACCEPT), (80, "new", DROP),
                                      (80, "established", ACCEPT), (80, "invalid", DROP)):
            self.assertEqual(expected, firewalld.verdicts(("tcp", port), state))
        for interface, port, state, expected in (
                ("wan", 22, "new", DROP), ("wan", 22, "related", ACCEPT),
                ("br-lan", 22, "new", BOTH), ("wan", 8443, "new", BOTH)):  # fw4 limits SYNs, too
            self.assertEqual(
                expected, fw4._replace(interface=interface).verdicts(("tcp", port), state))
        self.assertEqual(ACCEPT, firewalld._replace(interface="eth1").verdicts(("tcp", 80)))

    def test_ruleset(self) -> None:
        """The chains of nft's output: not ours, not those of other hooks."""
        chains = {each.where: each for each in server.nft_host_chains(RULESET)}
        self.assertEqual({"inet filter input": (4, 6), "ip nat forward": (4,)},
                         {name: each.versions for name, each in chains.items()})
        ends = [server.host_verdicts(list(chains.values()), version, ("tcp", port))
                for version in (4, 6) for port in (22, 80, 8080)]
        # Our own rule is a grant's, and no rule of the host.
        self.assertEqual([DROP, ACCEPT, {"accept", "drop", "dnat"}, DROP, ACCEPT, DROP], ends)
        self.assertEqual({"dnat"}, chains["ip nat forward"].verdicts(("tcp", 8080)))
        self.assertEqual([], list(server.nft_host_chains("")))
        self.assertEqual(ACCEPT, server.host_verdicts([], 4, ("tcp", 22)))


class Checked(server.Checkup):
    """A context whose programs and clock are the test's."""

    def __init__(self, options: List[str], root: str, says: Dict[str, str], wall: float) -> None:
        super().__init__(server.Arguments(options), root)
        self.says, self.clocks = says, server.Clocks(wall=lambda: wall)

    def ask(self, name: str, *arguments: str) -> str:
        """Return what the test says."""
        return self.says.get(name, "")


class CheckCase(DirectoryCase):
    """Files in a directory, and what the checks find."""

    def check(self, access: str = KEYED, config: str = "", root: bool = False, wall: float = 0.0,
              **says: str) -> List[str]:
        """Return the lines."""
        write(self.place("access.conf"), access)
        write(self.place("fwknopd.conf"), NO_FIREWALL + config)
        check = Checked(self.options(), self.directory, says, wall or time.time())
        return list(server.find_all(check, root))

    def options(self) -> List[str]:
        """The options that name the files."""
        return ["-c", self.place("fwknopd.conf"), "-a", self.place("access.conf"),
                "-r", self.place("run")]

    def assert_found(self, expected: str, lines: List[str]) -> None:
        """Fail unless a line begins so."""
        self.assertTrue(any(line.startswith(expected) for line in lines), (expected, lines))


class CheckTest(CheckCase):
    """The checks that need no firewall."""

    def test_order(self) -> None:
        """Worst first; an ordinary user is told what was not looked at."""
        lines = self.check("SOURCE 0.0.0.0\n" + KEYED.partition("\n")[2])
        self.assertEqual(sorted(lines, key=lambda line: "!-+".index(line[1])), lines)
        self.assert_found("[!] No server runs with these files", lines)
        self.assert_found("[-] Only root can look at the firewall", lines)
        self.assert_found("[!] (stanza #1) SOURCE 0.0.0.0: no packet can come from there; ANY",
                          lines)
        self.assertEqual(len(lines), len(set(lines)))

    def test_stanzas(self) -> None:
        """Stanzas that open nothing, and keys that anybody can guess."""
        for line, expected in (
                ("RESTRICT_PORTS tcp/22, tcp/23", "[!] (stanza #1) RESTRICT_PORTS has all of"),
                ("DESTINATION 192.0.2.77", "[!] (stanza #1) DESTINATION 192.0.2.77: no packet can"),
                ("DESTINATION 224.0.0.1", "[!] (stanza #1) DESTINATION 224.0.0.1: no packet"),
                ("ACCESS_EXPIRE_EPOCH 1000000000", "[!] (stanza #1) has expired"),
                ("KEY ChangeMe_now", "[!] (stanza #1) KEY or HMAC_KEY is easy to guess"),
                ("KEY 11111111", "[!] (stanza #1) KEY or HMAC_KEY is easy to guess"),
                ("ON_OPEN /bin/echo $IP", "[+] (stanza #1) ON_OPEN runs beside the firewall: /"),
                ("REQUIRE_SOURCE_ADDRESS N", "[+] (stanza #1) Warning: REQUIRE_SOURCE")):
            name = line.split()[0]
            rest = "".join(each + "\n" for each in KEYED.splitlines() if not each.startswith(
                name + " "))
            with self.subTest(line=line):
                self.assert_found(expected, self.check(rest + line + "\n"))
        for harmless in ("DESTINATION 127.0.0.1", "DESTINATION 192.0.2.0/24", "SOURCE 192.0.2.1",
                         "RESTRICT_PORTS tcp/23"):
            with self.subTest(harmless=harmless):
                access = (harmless + "\n" + KEYED.partition("\n")[2] if "SOURCE" in harmless else
                          KEYED + harmless + "\n")
                self.assertEqual([], [each for each in self.check(access) if "stanza" in each])

    def test_clock(self) -> None:
        """Wrong, off, not synchronised, right, or nobody knows."""
        tracking = "A9FEA9FE,ntp,3,1796000000.0,%s,0,0,0,0,0,0,0,64,Normal"
        no, yes = "NTPSynchronized=no", "NTPSynchronized=yes"
        for wall, chronyc, timedatectl, expected in (
                (1000.0, "", yes, "[!] The clock is wrong: 1970-01-01"),
                (0.0, tracking % "-71.5", yes, "[!] The clock is off by 72 s"),
                (0.0, tracking % "0.000012", "", "[+] The clock is synchronised"),
                (0.0, "", no, "[-] The clock is not synchronised"),
                (0.0, "", yes, "[+] The clock is synchronised"),
                (0.0, "506 Cannot talk to daemon", "", "[+] Nothing here knows"),
                (0.0, "", "", "[+] Nothing here knows")):
            with self.subTest(chronyc=chronyc, timedatectl=timedatectl, wall=wall):
                self.assert_found(expected, self.check(wall=wall, chronyc=chronyc,
                                                       timedatectl=timedatectl))

    def test_boot(self) -> None:
        """Anything that starts the program by its name counts."""
        missing = "[-] Nothing starts this server after a boot"
        self.assert_found(missing, self.check())
        for name in ("etc/systemd/system/multi-user.target.wants/spa.service", "etc/rc.local",
                     "etc/rc.d/S99spa", "etc/rc3.d/S02spa", "etc/runlevels/default/spa",
                     "etc/cron.d/spa", "var/spool/cron/crontabs/root"):
            with self.subTest(name=name):
                path = self.place(name)
                os.makedirs(os.path.dirname(path), exist_ok=True)
                write(path, "@reboot root /usr/sbin/other\n")
                self.assert_found(missing, self.check())
                write(path, "ExecStart=/usr/local/sbin/spa_server.py -f\n")
                self.assert_found("[+] Starts after a boot: " + path, self.check())
                os.unlink(path)

    def test_other_servers(self) -> None:
        """The running server is named, and another one beside it is a finding."""
        script = write(self.place("spa_server.py"), "import time; print(1, flush=True)\n"
                       "time.sleep(600)\n")
        other = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE)
        self.addCleanup(other.wait)
        self.addCleanup(other.kill)
        assert other.stdout
        self.addCleanup(other.stdout.close)
        other.stdout.readline()
        if not os.path.exists("/proc/%d/cmdline" % other.pid):
            skip("no /proc")
        expected = "[-] Another spa_server.py runs (pid=%d)" % other.pid
        # Our own children are our commands and switches.
        self.assertFalse([each for each in self.check() if each.startswith(expected)])
        launcher = write(self.place("spa_server"), "import time; time.sleep(600)\n")
        script_text = ("import subprocess, sys; print(subprocess.Popen(sys.argv[1:], "
                       "stdout=subprocess.DEVNULL).pid)")
        grandchild = int(subprocess.check_output([sys.executable, "-c", script_text,
                                                  sys.executable, "-IS", launcher]))
        self.addCleanup(os.kill, grandchild, 9)
        expected = "[-] Another spa_server runs (pid=%d)" % grandchild
        wait_for(lambda: any(each.startswith(expected) for each in self.check()), expected)

    def test_findings_of_a_port(self) -> None:
        """A port that the guard leaves alone: what is said of it."""
        write(self.place("fwknopd.conf"), NO_FIREWALL)
        write(self.place("access.conf"), KEYED)
        check = Checked(self.options(), self.directory, {}, 0.0)
        nat = chain_of("iptables", IPTABLES_RULES[-1][0])._replace(policy="accept")
        related = "ct state established accept\n"
        for chains, expected in (
                ([], ["[!] open to everybody"]),
                ([chain_of("nft", related)], ["[+] closed to everybody without a grant"]),
                ([chain_of("nft", "")], ["[+] closed to", "[!] no rule lets established"]),
                ([chain_of("nft", related + "ip saddr 192.0.2.1 accept")],
                 ["[+] closed without a grant, but for those"]),
                ([nat], ["[!] led elsewhere by NAT"])):
            check.chains = chains
            found = [server.MARKS[rank] + text
                     for rank, text in server.port_findings(check, False, 4, ("tcp", 22))]
            self.assertEqual(len(expected), len(found), found)
            for begin, line in zip(expected, found):
                self.assertTrue(line.startswith(begin), found)

    @needs_root
    def test_run_directory(self) -> None:
        """Others may not write there; the server must be able to."""
        def found() -> List[str]:
            """Return the lines about it."""
            check = Checked(self.options(), self.directory, {}, time.time())
            return [text for _, text in [*server.check_run_directory(check), *check.findings]]

        write(self.place("access.conf"), KEYED)
        write(self.place("fwknopd.conf"), NO_FIREWALL)
        self.assertEqual([], found())
        os.mkdir(self.place("run"))
        os.chmod(self.place("run"), 0o777)
        self.assertRegex(found()[0], "^folder: .*run is writable by others")
        os.chmod(self.place("run"), 0o700)
        self.assertEqual([], found())
        write(self.place("fwknopd.conf"), NO_FIREWALL + "DIGEST_FILE /proc/self/digests;\n")
        self.assertRegex(found()[0], "^/proc/self: (not writable|the disk is full): a restart")


if __name__ == "__main__":
    unittest.main()
