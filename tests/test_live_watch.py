"""Live: METRICS_FILE of a server under a flood; read by Prometheus's own programs where there are.

Debian's packages prometheus-node-exporter and prometheus have them.
"""

import os
import shutil
import signal
import subprocess
import sys
import unittest
from typing import Dict, List, Tuple

from tests.firewalls import BACKENDS, Setup, needs_firewalls
from tests.netns import CLIENT4, SERVER4, STANZA, Cable, Host, Server, in_parallel
from tests.support import TIMEOUT, read, wait_for
from tests.test_watch import samples

FLOOD = 12000  # packets: more than RECEIVE_BUFFER takes
FETCH = """
import urllib.request
print(urllib.request.urlopen("http://127.0.0.1:9100/metrics").read().decode())
"""


def fetched(host: Host) -> str:
    """Return what node_exporter serves on a host."""
    return host.run(sys.executable, "-c", FETCH)


@needs_firewalls
class LiveWatchTest(unittest.TestCase):
    """The file through a life of the server."""

    def test_life(self) -> None:
        """Start, knocks, a replay, a flood while the server sleeps, reload, stop."""
        def run(backend: str) -> None:
            """Go through it with one backend."""
            with Cable() as cable:
                directory = cable.server.path("textfile")
                os.mkdir(directory)
                path = os.path.join(directory, "spa.prom")
                server = Server(cable.server, Setup(backend, "guard").config()
                                + "METRICS_FILE %s;\n" % path, STANZA).start()
                if shutil.which("prometheus-node-exporter"):
                    cable.server.start("prometheus-node-exporter", "--collector.disable-defaults",
                                       "--collector.textfile", "--collector.textfile.directory",
                                       directory).wait_for("9100")

                def now() -> Dict[Tuple[str, str], float]:
                    """Return what the file says after a reload, but for what is 0."""
                    before = os.stat(path).st_ino
                    server.send_signal(signal.SIGHUP)
                    wait_for(lambda: os.stat(path).st_ino != before, "another file")
                    return {key: value for key, value in samples(read(path)).items() if value}

                started = samples(read(path))
                self.assertEqual(1, sum(value for (name, _), value in started.items()
                                        if name == "spa_up"))
                packet = os.path.join(server.directory, "packet")
                options = "-A", "tcp/22", "-a", CLIENT4, "-D", SERVER4, "-B", packet
                server.knock(cable.client, *options)
                server.knock(cable.client, *options)
                cable.client.send(SERVER4, 62201, read(packet).strip())
                server.wait_for("Replay detected")
                server.send_signal(signal.SIGSTOP)
                cable.client.send(SERVER4, 62201, *["8" * 200] * FLOOD)
                server.send_signal(signal.SIGCONT)

                counts: List[float] = []

                def all_counted() -> Dict[Tuple[str, str], float]:
                    """Return what the file says, once it has every packet of the flood."""
                    found = now()
                    count = sum(found.get(key, 0) for key in (
                        ("spa_packets_total", "wrong HMAC"), ("spa_packets_total", "untried"),
                        ("spa_kernel_dropped_packets_total", "")))
                    counts.append(count)
                    return found if counts[-2:] == [count, count] and count > 0.9 * FLOOD else {}

                found = wait_for(all_counted, "the end of the flood")
                self.assertLessEqual(counts[-1], FLOOD)
                self.assertGreater(found["spa_kernel_dropped_packets_total", ""], 0)
                for name, label, value in (
                        ("spa_grants", "", 1), ("spa_packets_total", "replay", 1),
                        ("spa_packets_total", "accepted", 2)):
                    self.assertEqual(value, found[name, label], name)
                self.assertLess(found["spa_start_time_seconds", ""],
                                found["spa_firewall_checked_timestamp_seconds", ""])
                server.send_signal(signal.SIGUSR1)
                rejected = ", ".join("%d %s" % (found["spa_packets_total", each], each)
                                     for each in ("replay", "untried", "wrong HMAC")
                                     if ("spa_packets_total", each) in found)
                server.wait_for("Packets seen: 2 accepted; rejected: %s; 1 grants" % rejected)
                if shutil.which("prometheus-node-exporter"):
                    text = fetched(cable.server)
                    self.assertIn("\nnode_textfile_scrape_error 0\n", text)
                    self.assertIn('\nspa_packets_total{verdict="accepted"} 2\n', text)
                    self.assertIn("\n# TYPE spa_packets_total counter\n", text)
                if shutil.which("promtool"):
                    with open(path) as file:
                        done = subprocess.run(["promtool", "check", "metrics"], stdin=file,
                                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                              timeout=TIMEOUT)
                    self.assertEqual((0, b""), (done.returncode, done.stdout))
                self.assertEqual(0, server.stop())
                left = samples(read(path))
                self.assertEqual([0, 0], [value for (name, _), value in left.items()
                                          if name in ("spa_up", "spa_grants")])

        in_parallel(self, BACKENDS, run)


if __name__ == "__main__":
    unittest.main()
