"""Live: --open and --close by hand, with a running server and without one."""

import os
import signal
import sys
import unittest
from typing import Tuple
from unittest import mock

import spa_server
from tests.firewalls import BACKENDS, NFT, SETUPS, Setup, Site, launcher, needs_firewalls
from tests.netns import (CLIENT4, CLIENT6, INNER4, OTHER4, OTHER6, SERVER4, SERVER6, SPA_SERVER,
                         STANZA, Gateway, in_parallel)
from tests.support import needs_programs, read, wait_for, write

TALKER = """
import socket, time
listener = socket.socket()
listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
listener.bind(("%s", 24))
listener.listen(1)
print("ready", flush=True)
peer = listener.accept()[0]
while True:
    peer.send(b"more")
    time.sleep(0.02)
""" % SERVER4
LISTENER = """
import socket
peer = socket.create_connection(("%s", 24), 10, ("%s", 0))
print("connected", flush=True)
try:
    while peer.recv(100): pass
except ConnectionResetError:
    print("ended", flush=True)
"""
NOTHING = "nothing that is open or connected belongs to"


class HandCase(unittest.TestCase):
    """A site, and what the administrator types there."""

    def done(self, site: Site, *options: str) -> str:
        """Return the output of a command that must succeed."""
        code, text = site.server.command(*options)
        self.assertEqual(0, code, text)
        return text

    def refused(self, site: Site, code: int, said: str, *options: str) -> None:
        """See that a command ends with this code and says this."""
        found, text = site.server.command(*options)
        self.assertEqual(code, found, text)
        self.assertIn(said, text)


@needs_firewalls
@needs_programs("conntrack", "ss")
class HandTest(HandCase):
    """Each backend in both modes."""

    def test_open_and_close(self) -> None:
        """Ports for an address of each family, with and without a server; connections are cut."""
        def check(case: Tuple[Setup, bool]) -> None:
            setup, serves = case
            with Site(setup) as site:
                if not serves:
                    site.server.stop(signal.SIGKILL if setup.mode == "guard" else signal.SIGTERM)
                for source, other, address in ((CLIENT4, OTHER4, SERVER4),
                                               (CLIENT6, OTHER6, SERVER6)):
                    mark = site.server.mark()
                    text = self.done(site, "--open", "TCP/22, udp/53", source, "10m")
                    line = r"ed %s -> \S+ tcp/22, (600|599) seconds left, by hand, root\n" % source
                    self.assertRegex(text, line)
                    self.assertIn("udp/53, ", text)
                    self.assertRegex(self.done(site, "--fw-list"), "seconds left, by hand, root")
                    self.assertEqual([True, False, False], site.client.probe(
                        (source, address, 22), (other, address, 22), (source, address, 24)))
                    kept = site.client.connect(address, 22, source)
                    text = self.done(site, "--close", source)
                    self.assertRegex(text, "Clos" + line.replace("(600|599)", r"\d+"))
                    self.assertIn("Cut 1 connections from %s" % source, text)
                    self.assertFalse(kept.answers(0.3))
                    self.assertFalse(site.client.reaches(address, 22, source))
                    self.assertEqual(0, site.count_grants())
                    if serves:  # also not by the watch
                        log = site.server.log(mark)
                        self.assertIn("by hand, root: opened %s -> " % source, log)
                        self.assertIn("Closed by hand: %s -> " % source, log)
                        self.assertNotIn("Put back", log)
                self.refused(site, 1, NOTHING + " '%s'" % CLIENT4, "--close", CLIENT4)

        for backend in BACKENDS:
            in_parallel(self, [(setup, serves) for setup in SETUPS if setup.backend == backend
                               for serves in (True, False)], check)

    def test_odd_names(self) -> None:
        """Whoever opens and closes may have a name with blanks, or with bytes that are no text."""
        with Site(Setup(NFT, "guard")) as site:
            for name in (b"DOM\\john doe", b"x tcp/24 10.9.9.9 5", b"a\x1b[31m", b"\xff", b""):
                with mock.patch.dict(os.environ, SUDO_USER=os.fsdecode(name)):
                    shown = "".join(chr(each) if 32 < each < 127 else "?" for each in name)
                    self.assertIn("seconds left, by hand, %s\n" % (shown or "root"),
                                  self.done(site, "--open", "tcp/22", CLIENT4))
                    self.done(site, "--close", CLIENT4)
            self.refused(site, 1, NOTHING, "--close", os.fsdecode(b"\xff joe"))

    def test_whose(self) -> None:
        """A user's, a stanza's, an address's and a network's; others stay open."""
        access = STANZA.replace("KEY ", "KEY other") + STANZA + "ACCESS_PREFIX6 64\n"

        def check(setup: Setup) -> None:
            with Site(setup, "", access) as site:
                def knock(user: str, source: str, port: int = 22) -> None:
                    server = SERVER6 if ":" in source else SERVER4
                    site.server.knock(site.client, "-U", user, "-A", "tcp/%d" % port, "-a", source,
                                      "-D", server)

                def reached() -> str:
                    return "".join(str(int(each)) for each in site.client.probe(
                        (CLIENT4, SERVER4, 22), (OTHER4, SERVER4, 22), (OTHER4, SERVER4, 24)))

                knock("joe", CLIENT4)
                knock("ann", OTHER4)
                knock("joe", OTHER4, 24)
                self.assertEqual("111", reached())
                for who in ("jo", "joe'", "#1", "#", "10.55.0.9", "fd55::/64", "010.55.0.2"):
                    self.refused(site, 1, NOTHING, "--close", who)
                self.assertIn("stanza #2, user 'joe'", self.done(site, "--close", "joe"))
                self.assertEqual("010", reached())
                knock("joe", CLIENT4)
                self.done(site, "--close", "10.55.0.3/32")
                self.assertEqual("100", reached())
                knock("x' user 'ann", OTHER4)
                self.refused(site, 1, NOTHING, "--close", "ann")
                self.assertIn(r"user 'x\x27 user \x27ann'", self.done(site, "--close", "#2"))
                self.assertEqual("000", reached())
                knock("joe", CLIENT6)  # and its whole network
                self.assertIn("Closed fd55::/64 -> ", self.done(site, "--close", OTHER6))

        in_parallel(self, [Setup(NFT, "guard"), Setup("iptables-nft", "guard")], check)

    def test_connections_of_an_old_grant(self) -> None:
        """A grant that is over has connections, which a host that sends would revive."""
        def check(setup: Setup) -> None:
            with Site(setup, "", STANZA.replace("300", "1")) as site:
                site.server.knock(site.client, "-U", "joe", "-A", "tcp/22", "-a", CLIENT4, "-D",
                                  SERVER4)
                joe, other = site.client.connect(SERVER4, 22, CLIENT4), None
                site.server.knock(site.client, "-A", "tcp/22", "-a", OTHER4, "-D", SERVER4)
                other = site.client.connect(SERVER4, 22, OTHER4)
                site.wait_closed((CLIENT4, SERVER4, 22), (OTHER4, SERVER4, 22))
                self.assertTrue(joe.answers() and other.answers())
                site.server.stop(signal.SIGKILL)
                site.server.start()  # its guard knows connections from before it
                self.assertIn("Cut 1 connections from %s/32 to tcp/22" % CLIENT4,
                              self.done(site, "--close", "joe"))
                self.assertFalse(joe.answers(0.3))
                self.assertTrue(other.answers())
                if setup.mode == "guard":
                    self.done(site, "--close", OTHER4)
                    self.assertFalse(other.answers(0.3))

        in_parallel(self, [Setup(NFT, "guard"), Setup(NFT, "accept"),
                           Setup("iptables-nft", "guard"), Setup("iptables-nft", "accept")], check)

    def test_a_host_that_sends(self) -> None:
        """The kernel must not begin the connection anew, with the next packet from here."""
        with Site(Setup(NFT, "guard")) as site:
            site.host.start(sys.executable, "-I", "-S", "-c", TALKER).wait_for("ready")
            self.done(site, "--open", "tcp/24", CLIENT4)
            listener = site.client.start(sys.executable, "-I", "-S", "-c", LISTENER % (
                SERVER4, CLIENT4))
            listener.wait_for("connected")
            self.assertIn("Cut 1", self.done(site, "--close", CLIENT4))
            listener.wait_for("ended")

    def test_published_port(self) -> None:
        """A connection that the host's NAT leads on is forgotten by connection tracking."""
        with Site(Setup(NFT, "guard"), cable=Gateway()) as site:
            assert isinstance(site.cable, Gateway)
            site.cable.inner.listen(80)
            site.host.run("nft", "-f", "-", input="table ip docker {\nchain pre { type nat hook "
                          "prerouting priority dstnat\ntcp dport 24 dnat to %s:80\n}\n}\n" % INNER4)
            self.done(site, "--open", "tcp/24", CLIENT4)
            kept = site.client.connect(SERVER4, 24, CLIENT4)
            self.assertIn("Cut 1", self.done(site, "--close", CLIENT4))
            self.assertFalse(kept.answers(0.3))

    def test_commands_close(self) -> None:
        """Doors that commands opened are closed by their command."""
        with Site(Setup(NFT, "guard")) as site:
            log = site.host.path("done")
            script = write(site.host.path("cycle"), "#!/bin/sh\necho $* >> %s\n" % log, 0o755)
            mark = site.server.mark()
            site.server.configure(access=STANZA + "CMD_CYCLE_OPEN %s open $SRC\nCMD_CYCLE_CLOSE %s "
                                  "close $SRC\nCMD_CYCLE_TIMER 300\n" % (script, script))
            site.server.send_signal(signal.SIGHUP)
            site.server.wait_for("Re-starting fwknopd", mark)
            site.server.knock(site.client, "-U", "joe", "-A", "tcp/22", "-a", CLIENT4, "-D",
                              SERVER4, expect="Running CMD_CYCLE_CLOSE")
            self.refused(site, 1, NOTHING, "--close", "ann")
            self.assertRegex(self.done(site, "--close", "joe"),
                             r"Closed %s -> \S+ tcp/22, \d+ seconds left, stanza #1, user 'joe'"
                             % CLIENT4)
            wait_for(lambda: read(log).splitlines() == ["open " + CLIENT4, "close " + CLIENT4],
                     "both commands")
            self.refused(site, 1, NOTHING, "--close", "joe")

    def test_bad_input(self) -> None:
        """Nothing is opened, and the error says what was expected."""
        with Site(Setup(NFT, "guard")) as site:
            for options, said in (
                    (["tcp/22"], "--open: expected PORTS ADDRESS [TIME]\nhint: such as --open"),
                    (["tcp/22", "gate.example"], "--open: expected an IP address"),
                    (["tcp/22", "10.55.0.0/24"], "--open: expected an IP address"),
                    (["tcp/22", "010.55.0.2"], "without leading zeros"),
                    (["tcp/22", "0.0.0.0"], "--open: expected the IP address of a host"),
                    (["tcp/22", "224.0.0.1"], "expected the IP address of a host"),
                    (["tcp/22", "::"], "expected the IP address of a host"),
                    (["tcp/22", "ff02::1"], "expected the IP address of a host"),
                    (["tcp/0", CLIENT4], "--open: expected tcp/PORT or udp/PORT"),
                    (["ssh", CLIENT4], "expected tcp/PORT"), (["", CLIENT4], "expected tcp/PORT"),
                    *((["tcp/22", CLIENT4, time], "expected a time like 30, 10m, 1h or 2d")
                      for time in ("0", "h", "1w", "1.5h", "98d", "99999999", "\u0661h")),
                    (["tcp/22", CLIENT4, "1h", "more"], "unexpected argument 'more'"),
                    (["tcp/22", CLIENT4, "--close", "joe"], "does not go with the one before")):
                with self.subTest(options=options):
                    self.refused(site, 2, said, "--open", *options)
            self.refused(site, 2, "unexpected argument", "--close", "joe", CLIENT4)
            for request in ("open", "open root", "open root tcp/22 0.0.0.0 30", "open root tcp/22 "
                            + CLIENT4 + " 0", "open root  tcp/22 30", "opened root tcp/22 ::1 30"):
                self.assertRegex(spa_server.ask_server(os.path.join(
                    site.server.directory, "run", "fwknopd.pid"), request), "^error: ")
            self.assertEqual(0, site.count_grants())
            text = self.done(site, "--open", "tcp/25,tcp/22", CLIENT4)
            self.assertIn("tcp/25 is not in GUARD_PORTS: --open changes nothing for it", text)
            self.assertRegex(text, "tcp/22, (30|29) seconds left")
            site.server.stop()
            site.host.run("nft", "delete", "table", "inet", "spa")
            self.refused(site, 1, "no server runs and no guard stands", "--open", "tcp/22", CLIENT4)
            site.server.configure("FIREWALL_TYPE none;\n")
            site.server.start()
            for _ in range(2):
                self.refused(site, 1, "no firewall to open it in (FIREWALL_TYPE none", "--open",
                             "tcp/22", CLIENT4)
                site.server.stop()

    def test_without_a_server(self) -> None:
        """A broken access.conf hinders nothing; where no kernel ends a grant, none is given."""
        with Site(Setup("iptables-nft", "accept")) as site:
            site.server.stop()
            site.server.configure(access="KEY a\n")
            self.assertIn("expected a SOURCE line first",
                          self.done(site, "--open", "tcp/22", CLIENT4))
            self.assertIn("Closed ", self.done(site, "--close", CLIENT4))
            code, text = site.host.run_code(
                *launcher("spa_server.Iptables.ends_grants = lambda self: False"), *SPA_SERVER,
                *site.server.files, "--open", "tcp/22", CLIENT4)
            self.assertEqual(1, code)
            self.assertIn("iptables has no time match here", text)
            self.assertEqual(0, site.count_grants())

    def test_trial(self) -> None:
        """To open by hand does not show that a knock opens."""
        with Site(Setup(NFT, "guard")) as site:
            site.server.stop()
            site.server.start("--trial", "100")
            self.done(site, "--open", "tcp/22", CLIENT4)
            self.assertNotIn("closed for good", site.server.log())
            site.server.knock(site.client, "-A", "tcp/22", "-a", CLIENT4, "-D", SERVER4,
                              expect="closed for good")

    def test_what_can_not_be_cut(self) -> None:
        """It says which connections may go on: without a program, or if the kernel ends none."""
        find = "spa_server.find_program = lambda name, real=spa_server.find_program: " \
            "real(%s.get(name, name))"
        for programs, said in (
                ({"ss": "no-ss", "conntrack": "no-conntrack"},
                 ("no program ss: TCP connections of this host may go on", "no program conntrack: "
                  "forwarded connections and UDP may go on")),
                ({"ss": "true"}, ("connections from %s/32 to tcp/22 may go on: " % CLIENT4,))):
            with self.subTest(programs=programs), Site(Setup(NFT, "guard")) as site:
                self.done(site, "--open", "tcp/22", CLIENT4)
                kept = site.client.connect(SERVER4, 22, CLIENT4)
                code, text = site.host.run_code(*launcher(find % programs), *SPA_SERVER,
                                                *site.server.files, "--close", CLIENT4)
                self.assertEqual(0, code, text)
                for line in said:
                    self.assertIn(line, text)
                self.assertEqual("conntrack" in programs, kept.answers(0.3))


if __name__ == "__main__":
    unittest.main()
