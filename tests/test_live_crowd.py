"""Live: knocks, and all else that the server does, while junk comes from forged addresses."""

import unittest

from spa_server import UNTRIED
from tests.bench import many_stanzas, paced_flood, wrong_keys
from tests.firewalls import (IPTABLES_NFT, NFT, OLD_KERNEL, Setup, Site, launcher, needs_firewalls,
                             six)
from tests.netns import CLIENT4, KEYS, SERVER4, SPA_CLIENT, in_parallel

LITTLE, TOO_MUCH = 400, 10000  # packets a second


@needs_firewalls
class LiveCrowdTest(unittest.TestCase):
    """Little junk, which makes the captures rest, and more than 300 stanzas can try."""

    def test_floods(self) -> None:
        """Knocks open, a flushed guard comes back, requests are answered, SIGTERM is obeyed."""
        def run(setup: Setup) -> None:
            """Go through both floods with one backend."""
            flush = "nft flush ruleset" if setup.backend == NFT else "; ".join(
                "%s -t mangle -F" % program for program in (setup.backend, six(setup.backend)))
            with Site(setup, access=many_stanzas(300), launcher=launcher(OLD_KERNEL)) as site:
                server, before = site.server, 0
                for rate, port in ((LITTLE, 22), (TOO_MUCH, 24)):
                    with paced_flood(site.cable, rate, 62201, wrong_keys(), forged=True):
                        site.client.run(*SPA_CLIENT, *KEYS, "-A", "tcp/%d" % port, "-a", CLIENT4,
                                        "-D", SERVER4, "--wait", "60")
                        mark = server.mark()
                        site.host.run("sh", "-c", flush)
                        server.wait_for("Somebody changed ", mark)
                        code, text = server.command("--open", "tcp/25", CLIENT4, "10m")
                        self.assertEqual(0, code, text)
                        server.wait_for("by hand", before)
                        if rate == TOO_MUCH:
                            server.wait_for(UNTRIED)
                            self.assertEqual(0, server.stop())
                            server.wait_for("untried, ")
                    before = server.mark()

        in_parallel(self, [Setup(NFT, "guard"), Setup(IPTABLES_NFT, "guard")], run)


if __name__ == "__main__":
    unittest.main()
