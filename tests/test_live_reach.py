"""What follows a knock, against our server in two namespaces: both families, waiting, relaying."""

import contextlib
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import unittest
from typing import Any, Dict, Tuple

from tests.bench import drop_all
from tests.netns import (CLIENT4, CLIENT6, KEYS, SERVER4, SERVER6, SPA_CLIENT, STANZA, Cable,
                         CableCase, Server, start_fwknopd)
from tests.support import (TIMEOUT, TOP, hearing_interrupts, needs_programs, needs_root, wait_for,
                           write)

GUARD = "FIREWALL_TYPE nft;\nGUARD_PORTS tcp/22, tcp/80;\n"
OPENED = r"tcp/22 of \S+ opened after \d+\.\d\d seconds"
MEGABYTES = 100
CHUNK = 1 << 20

# Takes one connection on port 22, says hello and nothing more, then counts what it gets.
HALF = """
import socket
listener = socket.socket()
listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
listener.bind(("", 22))
listener.listen(5)
print("ready", flush=True)
link = listener.accept()[0]
link.sendall(b"hello")
link.shutdown(socket.SHUT_WR)
count = 0
while True:
    data = link.recv(65536)
    if not data:
        break
    count += len(data)
print("got", count, flush=True)
"""

# A STUN server on both families: answers the second time it is asked, after a wrong answer.
STUN = """
import select, socket, sys
magic = bytes.fromhex("2112a442")
def xor(left, right):
    return bytes(one ^ other for one, other in zip(left, right))
sockets, asked = [], 0
for family in (socket.AF_INET, socket.AF_INET6):
    made = socket.socket(family, socket.SOCK_DGRAM)
    if family == socket.AF_INET6:
        made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    made.bind(("", 3478))
    sockets.append(made)
print("ready", flush=True)
while True:
    for made in select.select(sockets, [], [])[0]:
        question, peer = made.recvfrom(2048)
        asked += 1
        if asked % 2:
            continue
        assert question[:4] == bytes.fromhex("00010000") and question[4:8] == magic, question
        raw = socket.inet_pton(made.family, peer[0])
        value = b"\\0" + bytes([1 if len(raw) == 4 else 2]) + b"\\0\\0" + xor(raw, question[4:20])
        body = bytes([0, 0x20, 0, len(value)]) + value
        answer = bytes([1, 1, 0, len(body)]) + question[4:20] + body
        made.sendto(answer[:19] + b"?" + answer[20:], peer)
        made.sendto(answer, peer)
        print("answered", peer[0], flush=True)
"""

SSHD = """
Port 22
HostKey %(directory)s/host
AuthorizedKeysFile %(directory)s/user.pub
StrictModes no
UsePAM no
PidFile none
"""


class Case(CableCase):
    """Two hosts, and a server that guards two ports."""

    config = GUARD

    def setUp(self) -> None:
        super().setUp()
        self.server = Server(self.host, self.config, STANZA).start()

    def knock(self, *words: str, **options: Any) -> Tuple[int, str]:
        """Exit code and output of a knock at the server, opening for where it comes from."""
        return self.client.run_code(*SPA_CLIENT, *KEYS, "-s", *words, **options)

    def popen(self, *words: str, **pipes: Any) -> "subprocess.Popen[bytes]":
        """A knock with pipes."""
        return subprocess.Popen(self.client.command([*SPA_CLIENT, *KEYS, "-s", *words]), **pipes)


@needs_root
@needs_programs("ip", "nft")
class Knocks(Case):
    """Who gets a packet."""

    def test_both_families(self) -> None:
        """One knock at a name opens its IPv4 and its IPv6 address; -4 and -6 narrow it."""
        self.host.listen(22, 80)
        with self.client.names("%s gate\n%s gate\n" % (SERVER4, SERVER6)):
            for words, port, expected in ((["-4"], 80, [True, False]), ([], 22, [True, True]),
                                          (["-6"], 80, [True, True])):
                mark = self.server.mark()
                self.assertEqual((0, ""), self.knock("-A", "tcp/%d" % port, "-D", "gate", *words))
                for address in (CLIENT4, CLIENT6)[words == ["-6"]:2 - (words == ["-4"])]:
                    self.server.wait_opened(address, port, mark)
                reached = self.client.probe(("", SERVER4, port), ("", SERVER6, port))
                self.assertEqual(expected, reached, words)
        self.assertNotIn("Replay", self.server.log())

    def test_several_names(self) -> None:
        """-n a,b knocks at each; one that can't be sent does not stop the other, and exit is 1."""
        path = write(self.client.path("rc"),
                     "[default]\nKEY testkey\nHMAC_KEY hmackey\nALLOW_IP source\n"
                     "[a]\nSPA_SERVER %s\nACCESS tcp/22\n[b]\nSPA_SERVER %s\nACCESS tcp/80\n"
                     "[c]\nSPA_SERVER nosuch.invalid\nACCESS tcp/22\n" % (SERVER4, SERVER6))
        self.host.listen(22, 80)
        program = [SPA_CLIENT[0], SPA_CLIENT[1], "--rc-file", path, "-n"]
        mark = self.server.mark()
        self.assertEqual((0, ""), self.client.run_code(*program, "a,b"))
        self.server.wait_opened(CLIENT4, 22, mark)
        self.server.wait_opened(CLIENT6, 80, mark)
        code, text = self.client.run_code(*program, "c, b", "--wait", "300")
        self.assertEqual(1, code, text)
        self.assertRegex(text, r"\[c\] nosuch.invalid: .*\n(?s:.*)1 of 2 knocks failed\n")
        self.assertIn("[b] tcp/80 of %s answers without a knock" % SERVER6, text)
        mark = self.server.mark()
        self.assertEqual(3, self.client.run_code(*program, "a,d")[0])  # d is no stanza: none sent
        self.server.knock(self.client, "-A", "tcp/80", "-s", "-D", SERVER4)
        self.assertEqual(1, self.server.log(mark).count(" opened "))

    def test_own_address_from_stun(self) -> None:
        """--resolve-stun names the client's address of each family in the packet."""
        self.server.stop()
        self.server.configure(access=STANZA + "REQUIRE_SOURCE_ADDRESS Y\n")
        self.server.start()
        stun = self.host.start(sys.executable, "-I", "-S", "-c", STUN)
        stun.wait_for("ready")
        for server, own in ((SERVER4, CLIENT4), (SERVER6, CLIENT6)):
            mark = self.server.mark()
            text = self.client.run(*SPA_CLIENT, *KEYS, "-A", "tcp/22", "-D", server, "-v",
                                   "--resolve-stun", server)
            self.assertIn("Message String: %s,tcp/22" % own, text)
            self.server.wait_opened(own, 22, mark)
            stun.wait_for("answered " + own)
        code, text = self.client.run_code(*SPA_CLIENT, *KEYS, "-A", "tcp/22", "-D", SERVER4,
                                          "--resolve-stun", "[%s]:9" % CLIENT6)
        self.assertEqual(1, code)
        self.assertIn("STUN server %s: " % CLIENT6 if "STUN" in text else CLIENT6, text)


@needs_root
@needs_programs("ip", "nft", "iptables")
class Waits(Case):
    """--wait and --exec."""

    def test_opens(self) -> None:
        """The port that was closed answers, and the line says when; silent with -q."""
        self.host.listen(22)
        self.assertFalse(self.client.reaches(SERVER4, 22))
        for server in (SERVER4, SERVER6):
            code, text = self.knock("-A", "udp/53,tcp/22", "-D", server, "--wait", "300")
            self.assertEqual(0, code, text)
            self.assertRegex(text, "^%s\n$" % OPENED)
        answer = self.knock("-A", "tcp/22", "-D", SERVER4, "--wait", "300", "-q", "-v")
        self.assertEqual((0, ""), answer)

    def test_gives_up(self) -> None:
        """With the likely reason: nobody opened, or nobody listens; exit code 1."""
        self.host.listen(22)
        code, text = self.client.run_code(*SPA_CLIENT, "--key-rijndael", "k", "--key-hmac", "wrong",
                                          "-s", "-A", "tcp/22", "-D", SERVER4, "--wait", "2")
        self.assertEqual(1, code)
        self.assertIn("tcp/22 of %s did not open in 2 seconds: nothing answers." % SERVER4, text)
        self.assertEqual(1, len(text.splitlines()))
        code, text = self.knock("-A", "tcp/80", "-D", SERVER4, "--wait", "2")
        self.assertEqual(1, code)
        self.assertIn("connections are refused. The port may be open", text)
        self.server.wait_opened(CLIENT4, 80)
        self.assertFalse(self.client.reaches(SERVER4, 22))

    def test_other_port(self) -> None:
        """--wait-port names what -A does not: here what the guard lets through anyway."""
        self.host.listen(8022)
        code, text = self.knock("-A", "udp/53", "-D", SERVER4, "--wait-port", "8022",
                                "--wait", "300")
        self.assertEqual(0, code, text)
        self.assertEqual("tcp/8022 of %s answers without a knock: nothing hides it, or an earlier"
                         " knock still holds\n" % SERVER4, text)

    def test_interrupted(self) -> None:
        """Ctrl-C: exit code 130, no traceback."""
        with hearing_interrupts():
            process = self.popen("-A", "tcp/80", "-D", SERVER4, "--wait", "300",
                                 stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.server.wait_opened(CLIENT4, 80)
        process.send_signal(signal.SIGINT)
        output = process.communicate(timeout=TIMEOUT)[0]
        self.assertEqual((130, b"spa_client.py: interrupted\n"), (process.returncode, output))

    def test_exec(self) -> None:
        """The command takes the place of the client once the port answers; its code is ours."""
        self.host.listen(22)
        code, text = self.knock(
            "-A", "tcp/22", "-D", SERVER4, "--wait", "300", "--exec", sys.executable, "-I", "-S",
            "-c", "import socket, sys; link = socket.create_connection((sys.argv[1], 22), 5);"
            "link.sendall(b'-T'); print(link.recv(9)); sys.exit(7)", SERVER4, "-T", "--nonsense")
        self.assertEqual((7, "b'-T'\n"), (code, text))
        code, text = self.knock("-A", "tcp/80", "-D", SERVER4, "--wait", "1",
                                "--exec", "echo", "no")
        self.assertEqual(1, code)
        self.assertNotIn("no\n", text)


@needs_root
@needs_programs("ip", "nft", "iptables")
class Losses(Case):
    """A network that loses datagrams."""

    config = GUARD + "ENABLE_UDP_SERVER Y;\n"

    def test_lost_datagram(self) -> None:
        """The first one is dropped on the way; the second, a second later, opens."""
        self.host.listen(22)
        self.host.run("iptables", "-A", "INPUT", "-p", "udp", "--dport", "62201", "-m", "statistic",
                      "--mode", "nth", "--every", "1000000", "--packet", "0", "-j", "DROP")
        code, text = self.knock("-A", "tcp/22", "-D", SERVER4, "--wait", "300")
        self.assertEqual(0, code, text)
        self.assertRegex(text, OPENED)
        self.assertGreaterEqual(float(text.split()[5]), 1.0)
        rule = self.host.run("iptables", "-L", "INPUT", "-nvx").splitlines()[2].split()
        self.assertEqual(["1", "DROP"], [rule[0], rule[2]])
        self.assertNotIn("Replay", self.server.log())


@needs_root
@needs_programs("ip", "iptables", "fwknopd")
class Fwknopd(unittest.TestCase):
    """The real server."""

    def test_wait(self) -> None:
        """It takes a hundred times as long, and one knock opens, too."""
        with Cable() as cable:
            cable.server.listen(22)
            drop_all(cable.server, "iptables")
            process = start_fwknopd(cable.server, STANZA)
            text = cable.client.run(*SPA_CLIENT, *KEYS, "-A", "tcp/22", "-a", CLIENT4, "-D",
                                    SERVER4, "--wait", "300")
            self.assertRegex(text, OPENED)
            process.end()


@needs_root
@needs_programs("ip", "nft")
class Relays(Case):
    """--proxy."""

    def relay(self, *words: str) -> "subprocess.Popen[bytes]":
        """A relay to port 22 of the server, with pipes."""
        return self.popen("-A", "tcp/22", "-D", SERVER4, "-v", *words, "--proxy", SERVER4, "22",
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def test_both_ways(self) -> None:
        """100 MB come back from an echo, to the last byte, and then the end of the file."""
        self.host.listen(22)
        process = self.relay()
        assert process.stdin and process.stdout and process.stderr
        piece, sent, got = os.urandom(CHUNK), hashlib.sha256(), hashlib.sha256()
        writer = os.fork()
        if writer == 0:
            with contextlib.suppress(OSError):
                process.stdout.close()
                for _ in range(MEGABYTES):
                    process.stdin.write(piece)
                process.stdin.close()
            os._exit(0)
        process.stdin.close()
        size = 0
        for data in iter(lambda: process.stdout.read(CHUNK), b""):  # type: ignore[union-attr]
            got.update(data)
            size += len(data)
        os.waitpid(writer, 0)
        for _ in range(MEGABYTES):
            sent.update(piece)
        self.assertEqual(MEGABYTES * CHUNK, size)
        self.assertEqual(sent.digest(), got.digest())
        self.assertEqual(b"", process.stderr.read())
        self.assertEqual(0, process.wait(TIMEOUT))
        process.stdout.close()
        process.stderr.close()

    def test_far_end_closes_first(self) -> None:
        """Its end of file is passed on, and what we say after it still arrives."""
        far = self.host.start(sys.executable, "-I", "-S", "-c", HALF)
        far.wait_for("ready")
        process = self.relay()
        assert process.stdin and process.stdout
        self.assertEqual(b"hello", process.stdout.read())
        process.stdin.write(b"x" * 300000)
        self.assertEqual(b"", process.communicate(timeout=TIMEOUT)[1])
        self.assertEqual(0, process.returncode)
        far.wait_for("got 300000")

    def test_nothing_runs_while_nothing_comes(self) -> None:
        """No busy loop, neither while both ends are silent nor after one has closed."""
        far = self.host.start(sys.executable, "-I", "-S", "-c", HALF)
        far.wait_for("ready")
        process = self.relay()
        assert process.stdout
        self.assertEqual(b"hello", process.stdout.read())

        def ticks() -> int:
            with open("/proc/%d/stat" % process.pid) as file:
                fields = file.read().rpartition(")")[2].split()
            return int(fields[11]) + int(fields[12])

        before = ticks()
        with self.assertRaises(subprocess.TimeoutExpired):
            process.wait(1)
        self.assertLessEqual(ticks() - before, 5)  # of 100
        process.communicate(timeout=TIMEOUT)
        self.assertEqual(0, process.returncode)

    def test_reader_goes_away(self) -> None:
        """Nobody reads standard output any more: an end without a traceback."""
        self.host.listen(22)
        process = self.relay()
        assert process.stdin and process.stdout and process.stderr
        process.stdout.close()
        with contextlib.suppress(BrokenPipeError), process.stdin:
            process.stdin.write(b"x" * CHUNK)  # the echo of the first bytes ends it
        self.assertEqual(0, process.wait(TIMEOUT))
        self.assertEqual(b"", process.stderr.read())
        process.stderr.close()

    def test_far_end_dies(self) -> None:
        """A reset connection is told in one line, exit code 1."""
        far = self.host.start(sys.executable, "-I", "-S", "-c", HALF.replace(
            "link.shutdown(socket.SHUT_WR)", "link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER,"
            " b'\\1\\0\\0\\0\\0\\0\\0\\0'); link.close(); raise SystemExit"))
        far.wait_for("ready")
        process = self.relay()
        out, err = process.communicate(timeout=TIMEOUT)
        self.assertIn(out, (b"", b"hello"))
        self.assertEqual(b"spa_client.py: the connection broke: Connection reset by peer\n", err)
        self.assertEqual(1, process.returncode)


@needs_root
@needs_programs("ip", "nft", "ssh", "sshd", "ssh-keygen")
class Ssh(Case):
    """The lines for ~/.ssh/config."""

    def test_proxy_command(self) -> None:
        """ssh, told nothing but what --print-ssh-config prints, runs a command behind the guard.

        The client behind it does not stay.
        """
        directory = self.host.path("ssh")
        os.mkdir(directory)
        words: Dict[str, str] = {"directory": directory}
        for name in ("host", "user"):
            self.host.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f",
                          os.path.join(directory, name))
        with open(os.path.join(directory, "sshd"), "w") as file:
            file.write(SSHD % words)
        os.makedirs("/run/sshd", exist_ok=True)  # or sshd does not start
        sshd = self.host.start(shutil.which("sshd", path="/usr/sbin:/sbin:/usr/local/sbin"),
                               "-D", "-e", "-f", os.path.join(directory, "sshd"))
        sshd.wait_for("Server listening on 0.0.0.0 port 22.")
        write(os.path.join(self.client.directory, ".fwknoprc"),
              "[gate]\nKEY testkey\nHMAC_KEY hmackey\nALLOW_IP source\nACCESS tcp/22\n"
              "SPA_SERVER %s\n" % SERVER4)
        with open(os.path.join(directory, "config"), "w") as file:
            file.write(self.client.run(sys.executable, os.path.join(TOP, "spa_client.py"),
                                       "--print-ssh-config", "gate") +
                       "    User root\n    IdentityFile %s/user\n    StrictHostKeyChecking no\n"
                       "    UserKnownHostsFile /dev/null\n    LogLevel ERROR\n" % directory)
        self.assertFalse(self.client.reaches(SERVER4, 22))
        code, text = self.client.run_code("ssh", "-F", os.path.join(directory, "config"), "gate",
                                          "wc -c; exit 5", input="x" * 100000)
        self.assertEqual((5, "100000\n"), (code, text))
        wait_for(lambda: " 01 " not in self.host.run("cat", "/proc/net/tcp"),
                 "the end of all established connections")


if __name__ == "__main__":
    unittest.main()
