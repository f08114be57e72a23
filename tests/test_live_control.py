"""Live: the life of the server as its administrator sees it, beside the real fwknopd.

Started through the name fwknopd, second instances, -S, -K and -R at any time, what --fw-list shows
and SIGUSR1 tells. Each test has a network namespace of its own.
"""

import concurrent.futures
import functools
import os
import re
import selectors
import signal
import sys
import time
import unittest
from typing import Any, Dict, List, Tuple

import spa_server
from tests.firewalls import OLD_KERNEL, launcher
from tests.netns import (CLIENT4, CLIENT6, FWKNOP, KEYS, OTHER4, SERVER4, SERVER6, SPA_CLIENT,
                         SPA_SERVER, STANZA, Cable, CableCase, Server, in_parallel)
from tests.support import compiled, needs_programs, needs_root, read, wait_for, write

TWO_STANZAS = STANZA + "OPEN_PORTS tcp/22\n" + STANZA.replace("KEY ", "KEY other") + \
    "OPEN_PORTS tcp/22, tcp/80\n"
OTHER_KEYS = ["--key-rijndael", "othertestkey", "--key-hmac", "otherhmackey"]
BACKENDS = ("GUARD_PORTS tcp/22;\nFIREWALL_TYPE nft;\n", "FIREWALL_TYPE iptables;\n")


class ControlTest(CableCase):
    """A test with two hosts."""

    def knock(self, server: Server, *options: str, **more: Any) -> str:
        """Knock from the client's first address."""
        return server.knock(self.client, "-a", CLIENT4, "-D", SERVER4, *options, **more)

    def end_later(self, pid: int) -> None:
        """End a process in the background with the test, if it is still there."""
        def end() -> None:
            if is_alive(pid):
                os.kill(pid, signal.SIGKILL)
        self.addCleanup(end)


def is_alive(pid: int) -> bool:
    """Say whether a process is there, and no zombie."""
    try:
        with open("/proc/%d/stat" % pid) as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


class Daemon:
    """fwknopd, the real one or ours by that name, with files of its own."""

    def __init__(self, test: ControlTest, command: List[str], access: str = STANZA) -> None:
        self.host, self.command, self.directory = test.host, command, test.host.path("fwknopd")
        os.mkdir(self.directory)
        os.mkdir(os.path.join(self.directory, "run"))
        for name, text in (("f.conf", "PCAP_INTF lo;\n"), ("a.conf", access)):
            write(self.path(name), text)

    def path(self, name: str) -> str:
        """Return the path of one of its files."""
        return os.path.join(self.directory, name)

    def words(self, *options: str) -> List[str]:
        """Return the command; its files are named by paths that are relative to their directory."""
        return [*self.command, "-c", "f.conf", "-a", "a.conf", "-r", self.path("run"), *options]

    def run(self, *options: str) -> Tuple[int, str]:
        """Return exit code and output, with PID for the pid, and without names and warnings."""
        code, text = self.host.run_code(*self.words(*options), cwd=self.directory)
        text = re.sub(r"(?m)^spa_server\.py: (?=An instance)", "[*] ", text)
        lines = [line for line in text.splitlines()
                 if not re.search("REQUIRE_SOURCE|every port|^-t: ", line)]
        return code, re.sub(r"(?i)(?<=pid=)\d+", "PID", "\n".join(lines))

    @property
    def pid(self) -> int:
        """Return the pid in the pid file, 0 if there is none."""
        return int(read(self.path("run/fwknopd.pid")) or 0)


def our_daemon(test: ControlTest, access: str = STANZA) -> Daemon:
    """Return our server by the name fwknopd."""
    link = os.path.join(test.host.path("bin"), "fwknopd")
    os.mkdir(os.path.dirname(link))
    os.symlink(compiled(SPA_SERVER[1]), link)
    return Daemon(test, [sys.executable, link, "-t"], access)


@needs_root
@needs_programs("ip")
class NameTest(ControlTest):
    """Started as fwknopd."""

    def life(self, daemon: Daemon, reloads: bool = True) -> List[Any]:
        """Return the output and the exit code of each step of a life."""
        steps = [daemon.run()]
        wait_for(lambda: daemon.pid, "the pid file")
        pid = daemon.pid
        self.end_later(pid)
        for options in (["-S"], [], ["-f"], ["-R"] if reloads else ["-S"]):
            steps.append(daemon.run(*options))
        wait_for(lambda: daemon.run("-S")[0] == 0, "the end of the reload")
        for options in (["-S"], ["-f"], ["-S"], ["-R"] if reloads else ["-S"]):
            steps.append(daemon.run(*options))
        self.assertTrue(is_alive(pid))
        self.assertEqual(pid, daemon.pid)
        steps.append(daemon.run("-K"))
        wait_for(lambda: not is_alive(pid), "the end of pid %d" % pid)
        steps.append(daemon.run("-S"))
        return steps

    def test_life(self) -> None:
        """Start in the background, a second start there and in front, reload, status and end."""
        running = "[*] An instance of fwknopd is already running: (PID=PID)."
        self.assertEqual([
            (0, ""), (0, "Detected fwknopd is running (pid=PID)."), (0, running), (1, running),
            (0, "Sent restart signal to fwknopd (pid=PID)"),
            (0, "Detected fwknopd is running (pid=PID)."), (1, running),
            (0, "Detected fwknopd is running (pid=PID)."),
            (0, "Sent restart signal to fwknopd (pid=PID)"),
            (0, "Killed fwknopd (pid=PID) via SIGTERM"), (1, "No running fwknopd detected."),
        ], self.life(our_daemon(self)))

    @needs_programs("fwknopd", "iptables")
    def test_the_same_life_as_fwknopd(self) -> None:
        """Every message and exit code is that of the real one, which a reload ends or unlocks."""
        daemons = (Daemon(self, ["fwknopd"]), our_daemon(self))
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            theirs, ours = pool.map(lambda daemon: self.life(daemon, reloads=False), daemons)
        self.assertEqual(theirs, ours)
        said = []
        for daemon in (Daemon(self, ["fwknopd"]), our_daemon(self)):
            daemon.run()
            wait_for(lambda: daemon.pid, "the pid file")  # noqa: B023
            self.end_later(daemon.pid)
            said.append(daemon.run("-R"))
        self.assertEqual(said[0], said[1])

    def test_kill_comes_back_after_the_end(self) -> None:
        """The next line of a script finds neither the process nor its lock."""
        daemon = our_daemon(self)
        for _ in range(3):
            self.assertEqual((0, ""), daemon.run())
            self.end_later(daemon.pid)
            self.assertEqual((0, "Killed fwknopd (pid=PID) via SIGTERM"), daemon.run("-K"))
            self.assertEqual((1, "No running fwknopd detected."), daemon.run("-S"))

    def test_a_number_in_the_pid_file(self) -> None:
        """Scripts that start, restart and stop in quick succession find one at any time."""
        daemon = our_daemon(self)
        pids = []
        for _ in range(2):
            for options in ([], ["-R"], ["-R"], ["-K"]):
                self.assertEqual(0, daemon.run(*options)[0])
                pids.append(daemon.pid)
                self.end_later(pids[-1])
        self.assertEqual([pids[0]] * 4 + [pids[4]] * 4, pids)
        self.assertNotIn(0, pids)

    def test_relative_paths_in_the_background(self) -> None:
        """A reload reads from where the server was started; a missing file stops no server."""
        daemon = our_daemon(self, "%include more\n")
        write(daemon.path("more"), STANZA)
        self.assertEqual((0, ""), daemon.run())
        pid = daemon.pid
        self.end_later(pid)
        self.assertEqual("/", os.readlink("/proc/%d/cwd" % pid))
        digests = daemon.path("run/digest.cache")

        def knock(key: str) -> None:
            """Have a packet made with this key remembered."""
            with open(digests) as file:
                before = len(file.read().splitlines())

            def remembered() -> bool:
                """Knock until it is: a reload takes a moment."""
                self.host.run(*SPA_CLIENT, "-A", "tcp/22", "-a", CLIENT4, "-D", "127.0.0.1",
                              "--key-rijndael", key, "--key-hmac", "hmackey")
                with open(digests) as file:
                    return len(file.read().splitlines()) > before
            wait_for(remembered, "a packet of " + key)

        knock("testkey")
        with open(daemon.path("more"), "w") as file:
            file.write(STANZA.replace("testkey", "newkey"))
        daemon.run("-R")
        knock("newkey")
        os.rename(daemon.path("more"), daemon.path("gone"))
        daemon.run("-R")
        knock("newkey")
        self.assertEqual(pid, daemon.pid)
        self.assertEqual((0, "Killed fwknopd (pid=PID) via SIGTERM"), daemon.run("-K"))

    def test_a_start_that_fails(self) -> None:
        """The server says why on stderr and by the exit code, and leaves no lock behind."""
        daemon = our_daemon(self, "%include none\n")
        code, text = daemon.run()
        self.assertEqual(3, code, text)
        self.assertIn("a.conf:1: %%include: Access file: '%s' was not found." % daemon.path("none"),
                      text)
        self.assertEqual((1, "No running fwknopd detected."), daemon.run("-S"))


@needs_root
@needs_programs("ip", "iptables", "nft")
class ListTest(ControlTest):
    """--fw-list and --fw-list-all."""

    def listed(self, server: Server, option: str = "--fw-list") -> List[List[str]]:
        """Return the columns of each grant, and who opened it."""
        code, text = server.command(option)
        self.assertEqual(0, code, text)
        rows = re.findall(r"(?m)^\d+ +ACCEPT +(\w+) +-- +(\S+) +(\S+) +\w+ dpt:(\d+) "
                          r"/\* _exp_(\d+) \*/ (\d+) seconds left, (.*)$", text)
        for row in rows:
            self.assertAlmostEqual(int(row[4]) - time.time(), int(row[5]), delta=10)
        return sorted([*row[:4], row[6]] for row in rows)

    def test_who_opened_what(self) -> None:
        """The list has stanza and user, also after a restart; of two, the one with more time."""
        def check(config: str) -> None:
            """One backend."""
            with Cable() as cable:
                server = Server(cable.server, config + "FLUSH_IPT_AT_EXIT N;\n",
                                TWO_STANZAS).start()
                knock = functools.partial(server.knock, cable.client, "-a", CLIENT4, "-D", SERVER4)
                self.assertEqual([], self.listed(server))
                knock("-A", "tcp/22", "-U", "alice", "-f", "200")
                knock("-A", "tcp/80", "-U", "bob", "-a", OTHER4, keys=OTHER_KEYS)
                alice = ["tcp", CLIENT4, "0.0.0.0/0", "22", "stanza #1, user 'alice'"]
                bob = ["tcp", OTHER4, "0.0.0.0/0", "80", "stanza #2, user 'bob'"]
                self.assertEqual([alice, bob], self.listed(server))
                knock("-A", "tcp/22", "-U", "eve", "-f", "5", keys=OTHER_KEYS)
                self.assertEqual([alice, bob], self.listed(server))  # it was open for longer
                server.stop(signal.SIGKILL)
                self.assertEqual([alice, bob], self.listed(server))
                server.start()
                knock("-A", "tcp/22", "-U", "carol", "-f", "300", keys=OTHER_KEYS)
                alice[4] = "stanza #2, user 'carol'"
                self.assertEqual([alice, bob], self.listed(server))
                os.unlink(os.path.join(server.directory, "run", "grants"))
                self.assertEqual(["-", "-"], [row[4] for row in self.listed(server)])
                server.command("--fw-flush")
                self.assertEqual([], self.listed(server))
                server.stop()

        in_parallel(self, BACKENDS, check)

    @needs_programs("fwknopd")
    def test_shape_of_fwknopd(self) -> None:
        """The real one lists the same rules in the same columns, ours after theirs."""
        server = Server(self.host, "FIREWALL_TYPE iptables;\n").start()
        for port in (22, 80, 443):
            self.knock(server, "-A", "tcp/%d,udp/%d" % (port, port))
        code, mine = server.command("--fw-list")
        self.assertEqual(0, code, mine)
        theirs = self.host.run("fwknopd", *server.files, "--fw-list")
        head = "num  target     prot opt source               destination"
        self.assertIn(head, mine.splitlines())
        self.assertIn(head, [line.rstrip() for line in theirs.splitlines()])

        def rules(text: str) -> List[Any]:
            """Return number, target, addresses, port and expiry of each line."""
            return re.findall(r"(?m)^(\d+)    (ACCEPT)     \w+ +--  (\S+ +\S+ +)(\w+ dpt:\d+)"
                              r".* (/\* _exp_\d+ \*/)", text)
        self.assertEqual(6, len(rules(mine)), mine)
        self.assertEqual(sorted(rule[1:] for rule in rules(theirs)),
                         sorted(rule[1:] for rule in rules(mine)))
        self.assertEqual([rule[0] for rule in rules(theirs)], [rule[0] for rule in rules(mine)])

    def test_foreign_rules(self) -> None:
        """Each chain has a head, and rules of others in it; they are no change of ours."""
        server = Server(self.host, "FIREWALL_TYPE iptables;\n").start()
        mark = server.mark()
        for rule in ("-I FWKNOP_INPUT -s 10.9.9.9 -p tcp --dport 99 -j ACCEPT",
                     "-A FWKNOP_INPUT -s 10.9.9.8 -j DROP"):
            self.host.run("iptables", *rule.split())
            self.knock(server, "-A", "tcp/22")
        text = server.command("--fw-list")[1]
        self.assertRegex(text, r"(?m)^Listing rules in fwknopd iptables chains\.\.\.\n\n"
                         r"Chain FWKNOP_INPUT \(1 references\)\nnum  target +prot opt source +"
                         r"destination\n1 +ACCEPT +\w+ +-- +10\.9\.9\.9 .*dpt:99\n"
                         r"2 +DROP +\w+ +-- +10\.9\.9\.8 .*\n"
                         r"3 +ACCEPT .*dpt:22 /\* _exp_\d+ \*/ .*seconds left, stanza #1")
        self.assertNotIn("Somebody changed", server.log(mark))

    def test_two_servers_on_a_host(self) -> None:
        """They share a chain, or have one each; what one closes when it ends is its own."""
        for chains in (("FWKNOP_INPUT", "FWKNOP_INPUT"), ("FWKNOP_ONE", "FWKNOP_TWO")):
            first, second = [Server(self.host, (
                f"FIREWALL_TYPE iptables;\nPCAP_FILTER udp port {port};\n"
                f"IPT_INPUT_ACCESS ACCEPT, filter, INPUT, 1, {chain}, 1;\n")).start()
                for port, chain in zip((6221, 6222), chains)]
            self.knock(first, "-A", "tcp/22", "-p", "6221")
            self.knock(second, "-A", "tcp/80", "-p", "6222")
            first.stop()
            wait_for(lambda: re.search(r"-A INPUT -j (\w+)\n(.*\n)*-A \1 .*--dport 80 ",
                                       self.host.run("iptables", "-S")), "the rules of the second")
            self.knock(second, "-A", "tcp/443", "-p", "6222")
            second.stop()
            self.assertNotIn("FWKNOP", self.host.run("iptables", "-S"))

    def test_foreign_rules_of_nftables(self) -> None:
        """In NAT's table they stay, and are listed; in the guard they are taken out at once, also
        if an older kernel lets somebody put them there. What never ends is listed, too."""
        server = Server(self.host, "FIREWALL_TYPE nft;\nGUARD_PORTS tcp/22;\n"
                        "ENABLE_IPT_LOCAL_NAT Y;\n", launcher=launcher(OLD_KERNEL))
        self.host.run("nft", "flush", "ruleset")
        self.assertNotIn("Chain", server.command("--fw-list")[1])  # no guard is there
        server.start()
        rule = "ip saddr 10.9.9.9 counter accept".split()
        seen = r"(?m)^Chain %s \(1 references\)\nnum  target .*\n" \
               r"1    ip saddr 10\.9\.9\.9 counter packets 0 bytes 0 accept$"
        mark = server.mark()
        self.host.run("nft", "insert", "rule", "inet", "spa_nat", "prerouting", *rule)
        self.knock(server, "-A", "tcp/22")
        self.assertRegex(server.command("--fw-list")[1], seen % "inet spa_nat prerouting")
        self.host.run("nft", "insert", "rule", "inet", "spa", "closed", *rule)
        server.wait_for("Somebody changed the guard (inet spa guard); put back", mark)
        self.assertNotIn("10.9.9.9", self.host.run("nft", "list", "table", "inet", "spa"))
        self.assertNotIn("changed our rules", server.log(mark))
        self.host.run("nft", "flush", "chain", "inet", "spa_nat", "prerouting")
        server.wait_for("Somebody changed our rules in the firewall", mark)
        self.host.run("nft", "add", "element", "inet", "spa", "spa4", "{ 10.9.9.7 . tcp . 22 }")
        server.stop(signal.SIGKILL)
        self.host.run("nft", "insert", "rule", "inet", "spa", "closed", *rule)
        text = server.command("--fw-list")[1]
        self.assertRegex(text, seen % "inet spa closed")
        self.assertRegex(text, r"(?m)^\d    ACCEPT +tcp +--  10\.9\.9\.7 .*never ends, not ours$")

    def test_list_all(self) -> None:
        """The list also has what the firewall prints: chains, sets and the rules around them."""
        for config, expected in zip(BACKENDS, (
                ["table inet ", "elements = { ", CLIENT4, "expires"],
                ["Chain INPUT (policy ", "Chain FWKNOP_INPUT (1 references)", "TIME until date",
                 CLIENT4, CLIENT6])):
            with self.subTest(config=config):
                server = Server(self.host, config).start()
                self.knock(server, "-A", "tcp/22")
                server.knock(self.client, "-A", "tcp/22", "-a", CLIENT6, "-D", SERVER6)
                code, text = server.command("--fw-list-all")
                self.assertEqual(0, code, text)
                self.assertEqual(2, len(self.listed(server, "--fw-list-all")))
                tail = text.partition("\nListing all %s rules in applicable tables...\n"
                                      % config.split()[-1][:-1])[2]
                for words in expected:
                    self.assertIn(words, tail)
                server.stop()

    def test_nothing_to_list(self) -> None:
        """Nothing is listed before the first start; a wrong file hides nothing that is open."""
        for config in BACKENDS:
            server = Server(self.host, config)
            self.assertEqual([], self.listed(server))
            self.knock(server.start(), "-A", "tcp/22")
            server.configure(access="SOURCE ANY\n%include /no/keys\n")
            self.assertEqual([CLIENT4], [row[1] for row in self.listed(server)])
            self.assertIn("access.conf:2: %include: Access file: '/no/keys' was not found.",
                          server.command("--fw-list")[1])
            server.configure(config + "NO_SUCH Y;\n")
            self.assertEqual([CLIENT4], [row[1] for row in self.listed(server)])
            server.stop()


@needs_root
@needs_programs("ip")
class SignalTest(ControlTest):
    """Signals, the lock, and the digest cache."""

    def test_the_control_socket_answers_root_alone(self) -> None:
        """Another user who can reach the socket gets no answer: the kernel tells the user."""
        directory = self.host.directory
        os.chmod(directory, 0o711)
        asked: Dict[str, str] = {}
        selector = selectors.DefaultSelector()
        self.addCleanup(selector.close)
        path = os.path.join(directory, "pid")
        control = spa_server.Control(path, selector,
                                     lambda request: asked.setdefault(request, "ok"))
        control.listen()
        self.assertEqual(0o600, os.stat(control.path).st_mode & 0o777)
        os.chmod(control.path, 0o666)
        for user in (65534, 0):
            child = os.fork()
            if not child:
                try:
                    os.setuid(user)
                    os._exit(spa_server.ask_server(path, "flush") == "ok")
                finally:
                    os._exit(0)
            status = None
            while status is None:
                for key, _ in selector.select(0.1):
                    key.data()
                ended, code = os.waitpid(child, os.WNOHANG)
                status = code >> 8 if ended else None
            self.assertEqual(user == 0, status == 1)
        self.assertEqual({"flush": "ok"}, asked)
        control.close()
        self.assertFalse(os.path.exists(control.path))

    def test_usr1_tells_and_goes_on(self) -> None:
        """SIGUSR1 logs counters by reason, grants (none with -t) and the time they began."""
        server = Server(self.host, "", STANZA, "-t").start()
        self.knock(server, "-A", "tcp/22")
        self.knock(server, "-A", "tcp/22", keys=["--key-rijndael", "k", "--key-hmac", "x"],
                   expect="HMAC_COMPAREFAIL")
        for accepted in (1, 2):
            mark = server.mark()
            server.send_signal(signal.SIGUSR1)
            self.assertRegex(
                server.wait_for("Packets seen", mark),
                r"^Packets seen: %d accepted; rejected: 1 wrong HMAC; 0 grants are open; "
                r"since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d$" % accepted)
            self.knock(server, "-A", "tcp/22")
        self.assertEqual(0, server.command("-S")[0])

    def test_the_lock_is_never_lost(self) -> None:
        """Reloads, good and bad, and any number of -S, -D and second starts between them."""
        server = Server(self.host, "", STANZA, "-t").start()
        pid = server.running().popen.pid
        detected = (0, "Detected fwknopd is running (pid=%d).\n" % pid)
        for text in (STANZA, "%include /no/file\n", STANZA):
            server.configure(access=text)
            mark = server.mark()
            server.send_signal(signal.SIGHUP)
            server.wait_for("going on with the old" if "include" in text else "Re-starting fwknopd",
                            mark)
            self.assertEqual(detected, server.command("-S"))
            self.assertEqual(detected, server.command("-S"))
            server.command("-D")
            server.command("--exit-parse-digest-cache")
            if "include" not in text:
                self.assertEqual(1, server.command("-t")[0])
            with open(os.path.join(server.directory, "run", "fwknopd.pid")) as file:
                self.assertEqual(pid, int(file.read()))
        self.assertIn("access.conf:1: %include: Access file: '/no/file' was not found.; going on",
                      server.log())
        self.knock(server, "-A", "tcp/22")
        self.assertEqual((0, "Killed fwknopd (pid=%d) via SIGTERM\n" % pid), server.command("-K"))
        self.assertEqual(0, server.running().popen.wait(1))

    def test_an_included_file_is_read_again(self) -> None:
        """SIGHUP: a new key file counts, an old key does not."""
        server = Server(self.host, "", "", "-t")
        keys = os.path.join(server.directory, "keys")
        server.configure(access="SOURCE ANY\n%%include_keys %s\n" % keys)
        for key in ("first", "second"):
            write(keys, "KEY %s\nHMAC_KEY h\n" % key)
            if server.process is None:
                server.start()
            else:
                server.send_signal(signal.SIGHUP)
                server.wait_for("Re-starting fwknopd")
            self.knock(server, "-A", "tcp/22", keys=["--key-rijndael", key, "--key-hmac", "h"])
        self.knock(server, "-A", "tcp/22", keys=["--key-rijndael", "first", "--key-hmac", "h"],
                   expect="Decryption failed")
        self.assertEqual(2, server.log().count("Including key file: '%s'" % keys))

    @needs_programs("fwknop")
    def test_rotated_digests(self) -> None:
        """The old file stays beside the new one; its packets still open nothing."""
        server = Server(self.host, "", STANZA, "-t").start()
        path = self.client.path("packet")
        options = ["-A", "tcp/22", "-a", CLIENT4, "-D", SERVER4]
        self.client.run(*FWKNOP, *KEYS, *options, "-B", path, "-T")
        with open(path) as file:
            packet = file.read().strip()
        made = int(time.time())
        mark = server.mark()
        self.client.send(SERVER4, 62201, packet)
        server.wait_for(" opened ", mark)
        code, text = server.command("-t", "--rotate-digest-cache")
        self.assertEqual(1, code, text)  # not while a server writes it
        self.client.send(SERVER4, 62201, packet)
        server.wait_for("Replay detected", mark)
        names = ["digest.cache", "digest.cache-began", "fwknopd.pid", "fwknopd.pid.sock"]
        self.assertEqual(names, self.state(server))
        server.stop()
        wait_for(lambda: int(time.time()) > made, "the next second, in which a memory can begin")
        server.start("--rotate-digest-cache")
        self.assertIn("Rotating digest cache file.\n", server.log())
        self.assertEqual([*names[:2], "digest.cache-old", *names[2:]], self.state(server))
        self.client.send(SERVER4, 62201, packet)
        server.wait_for("before this replay memory began")
        self.knock(server, "-A", "tcp/22")
        self.assertEqual(1, server.log().count(" opened "))

    @staticmethod
    def state(server: Server) -> List[str]:
        """Return the names of the files in the run directory."""
        return sorted(os.listdir(os.path.join(server.directory, "run")))


@needs_root
@needs_programs("ip", "iptables", "fwknopd", "fwknop")
class LogTest(ControlTest):
    """The same knocks at the real fwknopd and at ours give the same lines."""

    ACCESS = ("SOURCE %s\nKEY testkey\nHMAC_KEY hmackey\nOPEN_PORTS tcp/22\nFW_ACCESS_TIMEOUT 2\n"
              "REQUIRE_USERNAME bob\nREQUIRE_SOURCE_ADDRESS Y\n" % CLIENT4)
    KNOCKS = (  # (part of the line that tells of it, options)
        ("Added access rule", ["-A", "tcp/22", "-a", CLIENT4]),
        ("was denied per access.conf", ["-A", "tcp/23", "-a", CLIENT4]),
        ("does not match required", ["-A", "tcp/22", "-a", CLIENT4, "-U", "eve"]),
        ("valid source IP was required", ["-A", "tcp/22", "-s"]),
        ("time difference", ["-A", "tcp/22", "-a", CLIENT4, "--time-offset-minus", "500"]),
        ("HMAC_COMPAREFAIL", ["-A", "tcp/22", "-a", CLIENT4, "--key-hmac", "x"]),
        ("Decryption failed", ["-A", "tcp/22", "-a", CLIENT4, "--key-rijndael", "x"]),
    )
    # Ours needs no look at iptables' matches.
    LESS = ("iptables 'comment' match is available", "Gracefully leaving")

    def lines(self, *command: str) -> List[str]:
        """Return the log of a life, with N for numbers that differ each time."""
        process = self.host.start(*command)
        process.wait_for(Server.READY)
        for expect, options in self.KNOCKS:
            mark = process.mark()
            self.client.run(*FWKNOP, "-D", SERVER4, "-U", "bob", *KEYS, *options)
            process.wait_for(expect, mark)
        process.wait_for("Removed rule")
        process.popen.send_signal(signal.SIGHUP)
        process.wait_for("Re-starting fwknopd")
        mark = process.mark()

        def reloaded() -> bool:
            """Knock until it listens again."""
            self.client.run(*FWKNOP, "-D", SERVER4, *KEYS, "-A", "tcp/22", "-a", CLIENT4)
            return "does not match required" in process.output(mark)
        wait_for(reloaded, "the end of the reload")
        process.end()
        return [re.sub(r"\d{9,}|\d+(?= seconds\))", "N", line)  # the clock goes on between both
                for line in process.output().splitlines()]

    def test_lines_of_a_life(self) -> None:
        """Each line of fwknopd's is there, in its order and its words; ours may go on."""
        site = Server(self.host, "PCAP_INTF eth0;\n", self.ACCESS)
        os.mkdir(os.path.join(site.directory, "run"))
        theirs = self.lines("fwknopd", "-f", *site.files)
        reload = theirs.index("Re-starting fwknopd")
        wanted = [line for line in theirs[:reload + 1] if not any(part in line
                                                                  for part in self.LESS)]
        self.assertEqual(22, len(wanted), theirs)
        wanted += [Server.READY, *theirs[-3:]]
        self.assertEqual(1, sum(Server.READY in line for line in theirs[reload:]))
        os.unlink(os.path.join(site.directory, "run", "digest.cache"))
        mine = self.lines(*SPA_SERVER, *site.files)
        rest = iter(mine)
        for line in wanted:
            self.assertTrue(any(each.startswith(line) for each in rest),
                            "%s\nis not in its place in\n%s" % (line, "\n".join(mine)))


if __name__ == "__main__":
    unittest.main()
