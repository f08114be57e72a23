"""OpenSPA between our client and our server, with keys of keygen.py, on real firewalls."""

import os
import re
import shutil
import signal
import sys
import tempfile
import unittest
from contextlib import ExitStack
from typing import Any, List

from tests.firewalls import IPTABLES_NFT, NFT, Setup, Site
from tests.netns import CLIENT4, CLIENT6, OTHER4, OTHER6, SERVER4, SERVER6, SPA_CLIENT, STANZA
from tests.support import (TOP, DirectoryCase, SharedCase, needs_programs, needs_root, read, run,
                           write)

SECOND4, SECOND6 = "10.55.0.9", "fd55::9"  # more addresses of the server's host
UDP_SERVER = "ENABLE_UDP_SERVER Y;\n"
OPEN = "%s: opened tcp/%d for 300 seconds"

# Sends a datagram, also with another one's bytes, and prints how many bytes the answer has.
ASK = r"""
import socket, sys
source, server, data, seconds = sys.argv[1:]
link = socket.socket(socket.AF_INET6 if ":" in server else socket.AF_INET, socket.SOCK_DGRAM)
link.bind((source, 0))
link.connect((server, 22211))
link.settimeout(float(seconds))
link.send(bytes.fromhex(data))
try:
    print(len(link.recv(2000)))
except socket.timeout:
    print("silence")
except ConnectionRefusedError:
    print("unreachable")
"""


class Keys:
    """The files that keygen.py makes in a directory: of a server, and of its clients."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.clients, self.key = self.path("openspa"), self.path("openspa.pem")

    def path(self, name: str) -> str:
        """Return the path of a file."""
        return os.path.join(self.directory, name)

    def add(self, name: str, *options: str, access: str = "tcp/22") -> str:
        """Make a client, and the server's files with the first one; return its OSPA file."""
        done = run([sys.executable, os.path.join(TOP, "keygen.py"), "--openspa", name, "--server",
                    SERVER4, "--access", access, "--timeout", "300", "--openspa-dir",
                    self.directory, "--config-file", self.path("fwknopd.conf"), "--access-file",
                    self.path("access.conf"), *options], cwd=self.directory)
        assert done.returncode == 0, done.stderr
        return self.path(name + ".ospa")

    def client_key(self, ospa: str) -> str:
        """Return the path of the file with the public key that the server has of a client."""
        found = re.search(r'clientUUID: "(.*)"', read(ospa))
        assert found, ospa
        return os.path.join(self.clients, found.group(1) + ".pem")

    def site(self, setup: Setup, config: str = "", access: str = "") -> Site:
        """Return a server with these files and its client's host."""
        return Site(setup, read(self.path("fwknopd.conf")) + config,
                    access or read(self.path("access.conf")))

    def stanza(self, *lines: str) -> str:
        """Return a stanza for all clients."""
        return "\n".join(["SOURCE ANY", "OPENSPA_CLIENTS " + self.clients, "OPEN_PORTS tcp/22",
                          "FW_ACCESS_TIMEOUT 300", *lines, ""])


class OspaTest(SharedCase):
    """A test with keys that are made once."""

    options: List[str] = []
    keys: Keys
    ospa: str

    @classmethod
    def prepare(cls, stack: ExitStack) -> None:
        """Make the server's keys and those of a client."""
        cls.keys = Keys(stack.enter_context(tempfile.TemporaryDirectory(prefix="spa-ospa-")))
        cls.ospa = cls.keys.add("joe", *cls.options)

    def knock(self, site: Site, *words: str, ospa: str = "", access: str = "tcp/22") -> Any:
        """Return exit code and output of our client."""
        return site.client.run_code(*SPA_CLIENT, "--ospa", ospa or self.ospa, "-A", access, *words)

    def opens(self, site: Site, server: str, client: str, **more: str) -> None:
        """A knock is answered, and a connection to port 22 is made at once."""
        code, said = self.knock(site, "-D", server, **more)
        self.assertEqual((0, OPEN % (server, 22) + "\n"), (code, said), site.server.log())
        site.server.wait_for(" opened %s -> " % client)
        self.assertTrue(site.client.connect(server, 22).answers())

    def fails(self, site: Site, address: str = CLIENT4, reason: str = "", **more: str) -> None:
        """A request for an address gets no answer and opens nothing; the server says why."""
        mark = site.server.mark()
        data = self.request(site, address, **more)
        self.assertEqual("silence", self.ask(site, CLIENT4, data, seconds=0.3))
        site.server.wait_for(reason, mark)
        self.assertNotIn(" opened ", site.server.log(mark))

    def request(self, site: Site, address: str = CLIENT4, **more: str) -> str:
        """Return the bytes of a request that is not sent, in hex."""
        code, said = self.knock(site, "-a", address, "--test", **more)
        self.assertEqual(0, code, said)
        return str(said.splitlines()[1])

    def ask(self, site: Site, source: str, data: str, server: str = SERVER4,
            seconds: float = 30.0) -> str:
        """Return what a datagram is answered with."""
        return site.client.run(sys.executable, "-I", "-S", "-c", ASK, source, server, data,
                               seconds).strip()


@needs_root
@needs_programs("ip", "nft", "iptables-nft", "ip6tables-nft")
class OpenTest(OspaTest):
    """From the client's knock to a connection."""

    def test_backends(self) -> None:
        """IPv4, and IPv6, on a host whose firewall drops the request and on one that does not."""
        for setup in (Setup(NFT, "accept"), Setup(NFT, "guard"), Setup(IPTABLES_NFT, "accept"),
                      Setup(IPTABLES_NFT, "guard")):
            with self.subTest(str(setup)), self.keys.site(setup) as site:
                for server, client, other in ((SERVER4, CLIENT4, OTHER4),
                                              (SERVER6, CLIENT6, OTHER6)):
                    self.assertFalse(site.client.reaches(server, 22))
                    self.opens(site, server, client)
                    self.assertFalse(site.client.reaches(server, 22, other))
                if setup.mode == "accept":  # the host's own rules have a policy of drop
                    self.assertEqual(2, site.count_grants())

    def test_the_kernel_does_not_answer(self) -> None:
        """A bound port keeps it from saying "unreachable", which ends with the server."""
        for config in ("", UDP_SERVER):
            with self.subTest(config), self.keys.site(Setup(NFT, "guard"), config) as site:
                for source, server in ((CLIENT4, SERVER4), (CLIENT6, SERVER6)):
                    self.assertEqual("silence", self.ask(site, source, "00", server, 0.5))
                site.server.stop()
                self.assertEqual("unreachable", self.ask(site, CLIENT4, "00"))

    def test_second_addresses(self) -> None:
        """The answer comes from the address that was asked, with both kinds of sockets."""
        for config in ("", UDP_SERVER):
            with self.subTest(config), self.keys.site(Setup(NFT, "guard"), config) as site:
                site.host.run("ip", "addr", "add", SECOND4 + "/24", "dev", "eth0")
                site.host.run("ip", "addr", "add", SECOND6 + "/64", "dev", "eth0", "nodad",
                              "preferred_lft", "0")
                for server, client in ((SECOND4, CLIENT4), (SECOND6, CLIENT6), (SERVER4, CLIENT4),
                                       (SERVER6, CLIENT6)):
                    self.opens(site, server, client)

    def test_a_port_that_is_not_allowed(self) -> None:
        """No answer, exit code 1; nor for an address that the knock does not come from."""
        with self.keys.site(Setup(NFT, "guard")) as site:
            mark = site.server.mark()
            code, said = self.knock(site, access="tcp/24")
            self.assertEqual(1, code, said)
            self.assertIn("%s: no answer" % SERVER4, said)
            self.assertNotIn(" opened ", site.server.log(mark))
            self.fails(site, access="tcp/24", reason="One or more requested protocol/ports")
            self.fails(site, OTHER4, reason="REQUIRE_SAME_ADDRESS")
            self.assertFalse(site.client.reaches(SERVER4, 24))
            self.opens(site, SERVER4, CLIENT4)

    def test_beside_fwknop(self) -> None:
        """The packets of fwknop open as they do without OpenSPA."""
        access = read(self.keys.path("access.conf")) + STANZA + "OPEN_PORTS tcp/24\n"
        for config in ("", UDP_SERVER):
            with self.subTest(config), self.keys.site(Setup(NFT, "guard"), config, access) as site:
                self.opens(site, SERVER4, CLIENT4)
                site.server.knock(site.client, "-A", "tcp/24", "-a", CLIENT4, "-D", SERVER4)
                self.assertTrue(site.client.connect(SERVER4, 24).answers())
                self.opens(site, SERVER6, CLIENT6)


@needs_root
@needs_programs("ip", "nft")
class ReplayTest(OspaTest):
    """The same bytes again."""

    def test_replay(self) -> None:
        """Its sender gets the same answer; another address and another server's life get none."""
        access = self.keys.stanza("REQUIRE_SAME_ADDRESS N")
        for config in ("", UDP_SERVER):
            with self.subTest(config), self.keys.site(Setup(NFT, "guard"), config, access) as site:
                data = self.request(site)
                mark = site.server.mark()
                answers = [self.ask(site, CLIENT4, data) for _ in range(2)]
                self.assertRegex(answers[0], r"^\d+$")
                self.assertEqual(answers[0], answers[1])
                self.assertEqual("silence", self.ask(site, OTHER4, data, seconds=0.5))
                site.server.wait_for("Replay detected from source IP: " + OTHER4)
                self.assertEqual(1, site.server.log(mark).count(" opened "))
                site.server.stop(signal.SIGKILL)
                site.server.start()
                for source in (CLIENT4, OTHER4):
                    self.assertEqual("silence", self.ask(site, source, data, seconds=0.5))
                    site.server.wait_for("Replay detected from source IP: " + source)
                self.assertNotIn(" opened ", site.server.log())
                self.assertFalse(site.client.reaches(SERVER4, 22, OTHER4))


@needs_root
@needs_programs("ip", "nft")
class ReloadTest(DirectoryCase, OspaTest):
    """Files that change while the server runs."""

    def test_a_client_is_a_file(self) -> None:
        """It can knock as soon as its file is there, and no more when it is gone."""
        ospa = self.keys.add("eve")
        path, away = self.keys.client_key(ospa), self.place("away")
        shutil.move(path, away)
        with self.keys.site(Setup(NFT, "guard"), access=self.keys.stanza()) as site:
            self.fails(site, ospa=ospa, reason="OpenSPA: no client ")
            shutil.move(away, os.path.splitext(path)[0])  # without an extension it will do, too
            self.opens(site, SERVER4, CLIENT4, ospa=ospa)
            os.unlink(os.path.splitext(path)[0])
            self.fails(site, ospa=ospa, reason="OpenSPA: no client ")

    def test_another_key_of_the_server(self) -> None:
        """SIGHUP reads it; with a file that has none the server goes on with the old one."""
        other, old = Keys(self.directory), read(self.keys.key)
        ospa = other.add("joe")
        shutil.copy(other.client_key(ospa), self.keys.clients)
        with self.keys.site(Setup(NFT, "guard"), access=self.keys.stanza()) as site:
            self.addCleanup(write, self.keys.key, old)
            for text, message in (("no key", "going on with the old settings"),
                                  (read(other.key), "Got SIGHUP")):
                self.fails(site, ospa=ospa, reason="OpenSPA: ")
                write(self.keys.key, text)
                mark = site.server.mark()
                site.server.send_signal(signal.SIGHUP)
                site.server.wait_for(message, mark)
            self.opens(site, SERVER4, CLIENT4, ospa=ospa)
            self.fails(site, reason="OpenSPA: ")


    def test_another_kind_of_socket(self) -> None:
        """SIGHUP goes from the packet socket to the UDP server, and back; a taken port to none."""
        access = read(self.keys.path("access.conf")) + STANZA
        with self.keys.site(Setup(NFT, "guard"), access=access) as site:
            site.host.listen(9000)
            taken = "ENABLE_TCP_SERVER Y;\nTCPSERV_PORT 9000;\n"
            for config, message in ((UDP_SERVER, "Re-starting"), ("", "Re-starting"),
                                    (UDP_SERVER + taken, "going on with the old settings"),
                                    (UDP_SERVER, "Re-starting")):
                mark = site.server.mark()
                site.server.configure(site.config + config)
                site.server.send_signal(signal.SIGHUP)
                site.server.wait_for(message, mark)
                self.assertEqual("silence", self.ask(site, CLIENT4, "00", seconds=0.2))
                self.opens(site, SERVER4, CLIENT4)


@needs_root
@needs_programs("ip", "nft")
class AdkTest(OspaTest):
    """A secret that all clients share."""

    options = ["--adk"]

    def test_adk(self) -> None:
        """With the right one it opens; a wrong one, or none, is rejected before RSA."""
        text = read(self.ospa)
        with self.keys.site(Setup(NFT, "guard")) as site:
            for secret in ("", "AAAAAAA"):
                path = write(site.client.path("ospa"), re.sub('secret: ".*"',
                                                              'secret: "%s"' % secret, text))
                self.fails(site, ospa=path, reason="OpenSPA: no ADK proof of this minute")
            self.opens(site, SERVER4, CLIENT4)


if __name__ == "__main__":
    unittest.main()
