"""`spa_server.py --check` on hosts with real firewalls: nftables and both kinds of iptables."""

import os
import re
import shutil
import signal
import sys
import unittest
from typing import List, Tuple

from tests.firewalls import (BACKENDS, IPTABLES_NFT, NFT, Setup, close_host, needs_firewalls,
                             six)
from tests.netns import CLIENT4, SERVER4, SPA_SERVER, STANZA, Cable, Server, in_parallel
from tests.support import TOP, needs_programs, skip

ACCESS = STANZA + "OPEN_PORTS tcp/22, tcp/24\nREQUIRE_SOURCE_ADDRESS Y\n"
# These depend on the machine that the tests run on.
ITS_OWN = re.compile(r"\[.\] (The clock|Nothing here knows|Nothing starts|Starts after)")
DROPS = ("add table ip host; add chain ip host in { type filter hook input priority 5; "
         "policy drop; }; add rule ip host in ct state established accept")


def check(server: Server) -> Tuple[int, List[str]]:
    """Return the exit code of --check and its lines, without those about the machine."""
    code, text = server.command("--check")
    lines = text.splitlines()
    findings = [line for line in lines if not line.startswith("[+]")]
    others = [line for line in findings if not ITS_OWN.match(line)]
    # The code is that of all lines: that of the others is known if there is no other finding.
    return (code if others or not findings else 0), [
        line for line in lines if not ITS_OWN.match(line)]


@needs_firewalls
class LiveCheckTest(unittest.TestCase):
    """What it says, and that this is so."""

    def assert_lines(self, lines: List[str], *expected: str) -> None:
        """Fail unless each expression matches the beginning of a line."""
        for pattern in expected:
            self.assertTrue(any(re.match(pattern, line) for line in lines), (pattern, lines))

    def test_guard(self) -> None:
        """Well; a grant; the host drops too; a second server; other settings; a dead server."""
        def run(backend: str) -> None:
            """Go through it with one backend."""
            with Cable() as cable:
                setup = Setup(backend, "guard")
                server = Server(cable.server, setup.config(), ACCESS).start()
                code, lines = check(server)
                self.assertEqual(0, code, lines)
                self.assert_lines(lines, r"\[\+\] A server runs", r"\[\+\] Sniffing interface: any",
                                  r"\[\+\] tcp/22: closed by the guard to everybody without a gr")
                self.assertFalse([line for line in lines if line[1] != "+"], lines)
                server.knock(cable.client, "-A", "tcp/22", "-a", CLIENT4, "-D", SERVER4)
                self.assert_lines(check(server)[1],
                                  r"\[\+\] tcp/22: opened by stanza #1; open now for "
                                  r"%s/32 until \d" % CLIENT4)
                before = cable.server.run("nft", "list", "ruleset")
                cable.server.run("nft", DROPS)
                code, lines = check(server)
                self.assertEqual(1, code)
                self.assert_lines(lines, r"\[!\] The host's own firewall \(ip host in\) closes "
                                         r"tcp/22, tcp/24 as well, and no knock opens that")
                self.assertTrue(lines[0].startswith("[!]"), lines)
                cable.server.run("nft", "add rule ip host in tcp dport { 22, 24 } accept")
                self.assertEqual((0, []), (check(server)[0], [
                    line for line in check(server)[1] if "as well" in line]))
                cable.server.run("nft", "flush chain ip host in; add rule ip host in iifname "
                                 "eth7 accept")
                self.assertFalse([line for line in check(server)[1] if "as well" in line])
                cable.server.run("ip", "route", "add", "default", "via", CLIENT4)
                self.assert_lines(check(server)[1], r"\[!\] The host's own firewall \(ip host in\) "
                                  "closes tcp/22, tcp/24 as well to what comes by eth0, and")
                cable.server.run("ip", "route", "del", "default")
                cable.server.run("nft", "delete table ip host")
                other = Server(cable.server, "GUARD_PORTS tcp/99;\n", ACCESS, "-t").start()
                self.assert_lines(check(server)[1], r"\[-\] Another spa_server.py runs \(pid=%d\)"
                                  % other.running().popen.pid)
                other.stop()
                server.configure(setup.config() + "GUARD_PORTS tcp/22, tcp/80;\n")
                self.assert_lines(check(server)[1], r"\[!\] The server's guard is an older one",
                                  r"\[-\] tcp/80: opened by stanza \(none\); open now for nobody")
                server.configure(setup.config())
                # It has changed nothing.
                counters = re.compile(r"packets \d+ bytes \d+|expires \d\S+")
                self.assertEqual(counters.sub("", before), counters.sub(
                    "", cable.server.run("nft", "list", "ruleset")))
                server.stop(signal.SIGKILL)
                self.assert_lines(check(server)[1], r"\[!\] No server runs",
                                  r"\[\+\] tcp/22: closed by the guard")
                server.command("--fw-flush")
                server.command("--unguard")
                code, lines = check(server)
                self.assertEqual(1, code)
                self.assert_lines(lines, r"\[!\] tcp/22: no guard closes it")

        in_parallel(self, BACKENDS, run)

    def test_rules_without_a_target(self) -> None:
        """Such a rule only counts; the server starts beside it, and the check understands it."""
        def run(backend: str) -> None:
            """Have one in each backend's table."""
            with Cable() as cable:
                program = backend if backend != NFT else IPTABLES_NFT
                cable.server.run(program, "-A", "INPUT")
                cable.server.run(program, "-A", "INPUT", "-p", "tcp", "--dport", "24", "-j", "DROP")
                server = Server(cable.server, Setup(backend, "guard").config(), ACCESS).start()
                self.assert_lines(check(server)[1], r"\[!\] The host's own firewall \(\S+ filter "
                                                    r"INPUT\) closes tcp/24 as well")

        in_parallel(self, BACKENDS, run)

    def test_accept(self) -> None:
        """The host drops; it drops nothing; it cuts connections; it lets some in; NAT; both."""
        closed = r"\[\+\] tcp/22: closed to everybody without a grant"
        opened = r"\[!\] tcp/22: open to everybody"

        def run(backend: str) -> None:
            """Go through it with one backend, without a server."""
            with Cable() as cable:
                host, v4 = cable.server, backend
                server = Server(host, Setup(backend, "accept").config(), ACCESS)

                def assert_found(*expected: str) -> List[str]:
                    """Compare the lines of a run."""
                    code, lines = check(server)
                    self.assertEqual(1, code)
                    self.assert_lines(lines, *expected)
                    return lines

                if backend == NFT:
                    assert_found(r"\[!\] NFT_ACCEPT_CHAINS: there is no chain", r"\[!\] No server")
                else:
                    assert_found(opened, r"\[!\] No server runs with these files")
                close_host(host, backend)
                lines = assert_found(closed)
                self.assertEqual(["[!] No server"], [line[:13] for line in lines if line[1] != "+"])
                if backend == NFT:
                    host.run("nft", "flush chain inet filter input")
                    assert_found(closed, r"\[!\] tcp/22: no rule lets established connections")
                    host.run("nft", "add rule inet filter input ip saddr 192.0.2.1 accept")
                    assert_found(r"\[\+\] tcp/22: closed without a grant, but for those")
                    host.run("nft", "add rule inet filter input tcp dport 22 accept")
                    assert_found(opened)
                    host.run("nft", "delete table inet filter; " + DROPS)
                    host.run("nft", "add table inet filter; add chain inet filter input { type "
                             "filter hook input priority 0; policy accept; }")
                    assert_found(r"\[!\] tcp/22 \(IPv6\): open to everybody",
                                 r"\[\+\] tcp/22 \(IPv4\): closed to everybody without a grant",
                                 r"\[!\] The host's own firewall \(ip host in\) closes tcp/22, tc")
                    return
                host.run(v4, "-F", "INPUT")
                assert_found(r"\[!\] tcp/22 \(IPv4\): no rule lets established connections go on")
                host.run(six(v4), "-P", "INPUT", "ACCEPT")
                assert_found(r"\[!\] tcp/22 \(IPv6\): open to everybody")
                host.run(v4, "-A", "INPUT", "-p", "tcp", "-m", "multiport", "--dports", "22,80",
                         "-j", "ACCEPT")
                assert_found(opened)
                host.run(v4, "-F", "INPUT")
                host.run(v4, "-t", "nat", "-N", "DOCKER")
                host.run(v4, "-t", "nat", "-A", "PREROUTING", "-m", "addrtype", "--dst-type",
                         "LOCAL", "-j", "DOCKER")
                host.run(v4, "-t", "nat", "-A", "DOCKER", "!", "-i", "docker0", "-p", "tcp",
                         "--dport", "22", "-j", "DNAT", "--to-destination", "172.17.0.2:22")
                assert_found(r"\[!\] tcp/22 \(IPv4\): led elsewhere by NAT, as Docker does")

        in_parallel(self, BACKENDS, run)

    def test_bad_files(self) -> None:
        """What can't be read is a finding as well, and the rest is looked at."""
        with Cable() as cable:
            server = Server(cable.server, Setup(NFT, "guard").config(), ACCESS)
            for config, access, expected in (
                    (None, "SOURCE ANY\nKEY\n", r"\[!\] .*access.conf:2: KEY: expected a value"),
                    (None, "SOURCE ANY\nOPEN_PORTS tcp/0\n", r"\[!\] .*access.conf:2: OPEN_PORTS"),
                    ("GUARD_PORTS tcp/22;\nUDPSERV_PRT 1;\n", ACCESS, r"\[!\] .*fwknopd.conf:2: "),
                    ("FIREWALL_TYPE nft;\n", ACCESS, r"\[!\] GUARD_PORTS: expected it")):
                with self.subTest(expected=expected):
                    server.configure(config or Setup(NFT, "guard").config(), access)
                    code, lines = check(server)
                    self.assertEqual(3, code, lines)
                    self.assert_lines(lines, expected, r"\[!\] No server runs")
            server.configure("GUARD_PORTS tcp/22;\nPCAP_INTF eth7;\nNONSENSE 1;\n", ACCESS)
            os.chmod(server.access_file, 0o644)
            code, lines = check(server)
            self.assertEqual(1, code)
            self.assert_lines(lines, r"\[!\] Interface eth7 does not exist",
                              r"\[-\] .*fwknopd.conf:3: NONSENSE is ignored",
                              r"\[-\] file: .*access.conf permissions should only be user")
            for word in ("--fw-list", "-t"):
                code, text = server.command("--check", word)
                self.assertEqual(2, code, text)
            missing = server.command("--check", "-c", "/nonexistent")
            self.assertEqual(3, missing[0], missing)

    def test_sockets(self) -> None:
        """A UDP socket that the guard or the host closes hears nothing."""
        with Cable() as cable:
            server = Server(cable.server, "", ACCESS)
            for config, command in (("GUARD_PORTS tcp/22, udp/62201;\n", ""),
                                    ("GUARD_PORTS tcp/22;\n", DROPS)):
                server.configure("ENABLE_UDP_SERVER Y;\n" + config)
                if command:
                    cable.server.run("nft", command)
                self.assert_lines(check(server)[1], r"\[!\] udp/62201: no SPA packet reaches this")

    @needs_programs("setpriv")
    def test_no_right_to_capture(self) -> None:
        """The server then listens on a UDP port, and --check says so."""
        with Cable() as cable:
            server = Server(cable.server, "GUARD_PORTS tcp/22;\n", ACCESS)
            text = cable.server.run_code("setpriv", "--bounding-set", "-net_raw", *SPA_SERVER,
                                         *server.files, "--check")[1]
            self.assert_lines(text.splitlines(), r"\[-\] No CAP_NET_RAW .* only UDP port 62201 ")

    def test_an_ordinary_user(self) -> None:
        """The files and the clock are looked at; the rest needs root."""
        with Cable() as cable:
            server = Server(cable.server, Setup(IPTABLES_NFT, "guard").config(), ACCESS)
            os.chmod(cable.temporary.name, 0o755)
            os.chmod(server.directory, 0o755)
            os.chmod(server.config_file, 0o644)
            os.chmod(server.access_file, 0o644)
            user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
            # Python's own files may be in root's directory.
            pythons = [each for each in (sys.executable, "/usr/bin/python3") if not
                       cable.server.run_code(*user, each, "-c", "import hashlib, glob")[0]]
            if not pythons:
                skip("no Python here that an ordinary user can run")
            script = shutil.copy(os.path.join(TOP, "spa_server.py"), cable.temporary.name)
            words = [*user, pythons[0], script, *server.files, "--check"]
            code, text = cable.server.run_code(*words)
            self.assertEqual(1, code, text)
            self.assert_lines(text.splitlines(), r"\[-\] Only root can look at the firewall")
            self.assertNotIn("Permission", text)
            os.chmod(server.access_file, 0o600)
            code, text = cable.server.run_code(*words)
            self.assertEqual(3, code, text)
            self.assert_lines(text.splitlines(), r"\[!\] .*access.conf: Permission denied",
                              r"\[-\] Only root can look")


if __name__ == "__main__":
    unittest.main()
