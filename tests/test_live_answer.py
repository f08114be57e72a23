"""Answers on real sockets and firewalls: to our client, to fwknop's, and to nobody else."""

import os
import signal
import sys
import time
import unittest
from typing import Any, Optional, Tuple

from tests.firewalls import IPTABLES_NFT, NFT, Setup, Site, needs_firewalls
from tests.netns import (CLIENT4, CLIENT6, FWKNOP, HMAC_KEY, KEY, KEYS, SERVER4, SERVER6,
                         SPA_CLIENT, STANZA, in_parallel, start_fwknopd)
from tests.support import needs_programs, write
from tests.test_answer import open_answer
from tests.test_packet import Sender

SECOND4, SECOND6 = "10.55.0.9", "fd55::9"  # more addresses of the server's host
ACCESS = STANZA + "OPEN_PORTS tcp/22, tcp/24\nANSWER Y\n"
OPENED = 0, "opened tcp/22 for 300 seconds"

# Sends a datagram, and prints in hex what comes back from the same address and port.
ASK = r"""
import socket, sys
source, server, data, seconds = sys.argv[1:]
link = socket.socket(socket.AF_INET6 if ":" in server else socket.AF_INET, socket.SOCK_DGRAM)
link.bind((source, 0))
link.connect((server, 62201))
link.settimeout(float(seconds))
link.send(data.encode())
try:
    print(link.recv(2000).hex())
except socket.timeout:
    print("silence")
except ConnectionRefusedError:
    print("unreachable")
"""

# Keeps a UDP port of both families.
TAKE = r"""
import socket, time
link = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
link.bind(("::", 62201))
print("taken", flush=True)
time.sleep(1000)
"""


class AnsweredSite(Site):
    """A site whose client asks, and whose server has a memory that began with the boot."""

    count = 0

    def prepare(self) -> None:
        """Give the host second addresses."""
        super().prepare()
        self.host.run("ip", "addr", "add", SECOND4 + "/24", "dev", "eth0")
        self.host.run("ip", "addr", "add", SECOND6 + "/64", "dev", "eth0", "nodad")

    def packet(self, text: str = CLIENT4 + ",tcp/22", ahead: int = 0) -> bytes:
        """Return a packet that nobody has sent."""
        self.count += 1
        return Sender(KEY.encode(), HMAC_KEY.encode(), salt=os.urandom(8)).packet(
            text, timestamp=int(time.time()) + ahead, rand="%016d" % self.count)

    def ask(self, packet: bytes, target: str = SERVER4, seconds: float = 20) -> Any:
        """Return status and text of the answer to a packet, or the word for what came instead."""
        source = CLIENT6 if ":" in target else CLIENT4
        said = self.client.run(sys.executable, "-I", "-S", "-c", ASK, source, target,
                               packet.decode(), seconds).strip()
        return said if said.isalpha() and len(said) < 20 else open_answer(
            bytes.fromhex(said), packet, KEY.encode(), HMAC_KEY.encode())

    def is_silent(self, packet: bytes, target: str = SERVER4) -> bool:
        """Return whether nothing comes back, not even the kernel's "port unreachable"."""
        mark = self.server.mark()
        found = self.ask(packet, target, 0.3)
        # The server's next answer: whatever it had to say about the packet it has said.
        assert self.ask(self.packet())[0] == 0, self.server.log(mark)
        return bool(found == "silence")

    def restart(self, change: Tuple[str, str] = ("", "")) -> None:
        """Kill the server, change digest.cache, and start it again."""
        self.server.stop(signal.SIGKILL)
        path = os.path.join(self.server.directory, "run", "digest.cache")
        with open(path) as file:
            text = file.read()
        write(path, text.replace(*change) if change[0] else text)
        self.server.start()


@needs_firewalls
class AnswerTest(unittest.TestCase):
    """The whole way, with programs of their own on both ends."""

    def site(self, setup: Optional[Setup] = None, config: str = "", access: str = ACCESS,
             *options: str) -> AnsweredSite:
        """Return a site that is taken away after the test."""
        made = AnsweredSite(setup or Setup(NFT, "guard"), config, access, options=options)
        self.addCleanup(made.cable.close)
        return made

    def test_opens_and_answers(self) -> None:
        """On each backend, over both families, from the address asked; a refusal as well."""
        def check(setup: Setup) -> None:
            """One backend in one mode."""
            site = self.site(setup)
            for target, client in ((SERVER4, CLIENT4), (SERVER6, CLIENT6), (SECOND4, CLIENT4),
                                   (SECOND6, CLIENT6)):
                packet = site.packet(client + ",tcp/22")
                self.assertEqual(OPENED, site.ask(packet, target), site.server.log())
                self.assertTrue(site.client.reaches(target, 22, client, 5))
                self.assertEqual((1, "tcp/25 is not in OPEN_PORTS"),
                                 site.ask(site.packet(client + ",tcp/25"), target))
                self.assertTrue(site.is_silent(packet, target))
                self.assertTrue(site.is_silent(b"8" * 200, target))
            said = site.client.run(*SPA_CLIENT, *KEYS, "-A", "tcp/24", "-a", CLIENT4, "-D", SERVER4,
                                   "--answer", "20")
            self.assertIn(SERVER4 + ": opened tcp/24 for 300 seconds", said)

        in_parallel(self, [Setup(backend, mode) for backend in (NFT, IPTABLES_NFT)
                           for mode in ("guard", "accept")], check)

    def test_a_captured_packet(self) -> None:
        """What opened, and what had a wrong clock: silence, also after kill -9."""
        site = self.site()
        opened, ahead = site.packet(), site.packet(ahead=3500)
        self.assertEqual(OPENED, site.ask(opened))
        status, text = site.ask(ahead)
        self.assertRegex("%d %s" % (status, text), r"^1 the clock is 3\d\d\d s ahead$")
        behind = time.monotonic() > 700  # what the boot may have forgotten is not answered
        if behind:
            self.assertRegex(site.ask(site.packet(ahead=-600))[1], "^the clock is 6.. s behind$")
        for _ in range(2):
            self.assertTrue(site.is_silent(opened))
            self.assertTrue(site.is_silent(ahead))
            site.restart()
        site.restart(("# refused", "# lost"))  # then it would have told
        self.assertEqual(1, site.ask(ahead)[0])

    def test_a_lost_memory(self) -> None:
        """A wrong clock is not answered, and the log says so to the administrator alone."""
        site = self.site()
        ahead = site.packet(ahead=600)
        self.assertEqual(1, site.ask(ahead)[0])
        site.server.stop(signal.SIGKILL)
        os.unlink(os.path.join(site.server.directory, "run", "digest.cache"))
        site.server.start()
        time.sleep(2.1)  # until then a packet is from before this memory
        for packet in (ahead, site.packet(ahead=-600)):
            self.assertTrue(site.is_silent(packet))
        site.server.wait_for("SPA data time difference is too great (60")

    def test_the_port_is_taken(self) -> None:
        """The start warns and goes on; a reload after the other has gone answers."""
        site = self.site()
        site.server.stop()
        other = site.host.start(sys.executable, "-c", TAKE)
        other.wait_for("taken")
        site.server.start()
        line = "UDP port 62201: Address already in use; its clients get no answer"
        site.server.wait_for(line)
        self.assertEqual(1, site.server.log().count(line))
        mark = site.server.mark()
        self.assertEqual("silence", site.ask(site.packet(), seconds=0.3))
        site.server.wait_opened(CLIENT4, 22, mark)
        other.end(signal.SIGKILL)
        self.reload(site)
        self.assertEqual(OPENED, site.ask(site.packet()))

    def reload(self, site: AnsweredSite, config: Optional[str] = None,
               access: Optional[str] = None) -> None:
        """Let the server read its files again."""
        site.server.configure(config and site.config + config, access)
        mark = site.server.mark()
        site.server.send_signal(signal.SIGHUP)
        site.server.wait_for("Re-starting fwknopd", mark)

    def test_reload(self) -> None:
        """SIGHUP turns answers on and off, from either kind of socket; an error changes nothing."""
        site = self.site(access=ACCESS.replace("ANSWER Y\n", ""))
        self.assertEqual("unreachable", site.ask(site.packet()))
        for config in ("\n", "ENABLE_UDP_SERVER Y;\n", "\n"):
            self.reload(site, config, ACCESS)
            self.assertEqual(OPENED, site.ask(site.packet()), config)
            self.assertEqual(OPENED, site.ask(site.packet(CLIENT6 + ",tcp/22"), SERVER6), config)
        site.server.configure(access=STANZA.replace("HMAC_KEY", "#") + "ANSWER Y\n")
        mark = site.server.mark()
        site.server.send_signal(signal.SIGHUP)
        site.server.wait_for("ANSWER: expected KEY and HMAC_KEY with it", mark)
        self.assertEqual(OPENED, site.ask(site.packet()))
        self.reload(site, access=ACCESS.replace("ANSWER Y\n", ""))
        self.assertEqual("unreachable", site.ask(site.packet()))

    def test_test_mode(self) -> None:
        """It says that nothing is opened."""
        site = self.site(None, "", ACCESS, "--test")
        self.assertEqual((1, "--test mode: nothing is opened"), site.ask(site.packet()))

    @needs_programs("fwknop", "fwknopd")
    def test_fwknop(self) -> None:
        """Its client ends before the answer comes, and its kernel's error harms nobody; its server
        reads the memory of ours and knows the packets in it, and skips the directive."""
        site = self.site()
        for _ in range(5):
            mark = site.server.mark()
            site.client.run(*FWKNOP, *KEYS, "-A", "tcp/22", "-a", CLIENT4, "-D", SERVER4)
            site.server.wait_opened(CLIENT4, 22, mark)
        self.assertTrue(site.client.reaches(SERVER4, 22))
        packet, ahead = site.packet(), site.packet(ahead=3000)
        self.assertEqual(OPENED, site.ask(packet))
        self.assertEqual(1, site.ask(ahead)[0])
        site.server.stop()
        path = os.path.join(site.server.directory, "run", "digest.cache")
        with open(path) as file:
            text = file.read()
        self.assertIn("\n# refused ", text)
        daemon = start_fwknopd(site.host, STANZA + "ANSWER Y\n", digests=text)
        site.client.send(SERVER4, 62201, packet.decode())
        daemon.wait_for("Replay detected")


if __name__ == "__main__":
    unittest.main()
