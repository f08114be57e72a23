"""Commands of the real client's packets, and cycles of commands, run by the real server as root.

Each script of a test writes what it does into a file, a line for each run, so that the tests say
what was run how often. Closing is shown on a real firewall as well.
"""

import functools
import os
import signal
import stat
import subprocess
import time
import unittest
from typing import Iterator, List

from tests.firewalls import IPTABLES_NFT, NFT, Setup, Site, needs_firewalls
from tests.knockd import hit
from tests.netns import (CLIENT4, CLIENT6, FWKNOP, OTHER4, OTHER6, SERVER4, SERVER6, STANZA,
                         CableCase, Server, in_parallel)
from tests.support import long_enough, needs_programs, needs_root, read, slowness, wait_for, write

CONF = "FIREWALL_TYPE none;\n"
COMMANDS = STANZA + "ENABLE_CMD_EXEC Y\n"
TO_SERVER = ["-a", CLIENT4, "-D", SERVER4]
KNOCK = ["-A", "tcp/22"] + TO_SERVER
RETURNED = "command returned"


class CommandCase(CableCase):
    """Two hosts and a directory for scripts that every user can enter."""

    def setUp(self) -> None:
        """Make the directory."""
        super().setUp()
        os.chmod(self.cable.temporary.name, 0o755)
        self.directory = self.cable.server.path("scripts")
        os.mkdir(self.directory)
        os.chmod(self.directory, 0o777 | stat.S_ISVTX)

    def script(self, name: str, text: str) -> str:
        """Return the path of a program that /bin/sh runs in the directory."""
        return write(os.path.join(self.directory, name),
                     "#!/bin/sh\ncd %s\n%s\n" % (self.directory, text), 0o755)

    def got(self, name: str = "got") -> List[str]:
        """Return the lines that scripts have written into a file."""
        return read(os.path.join(self.directory, name)).splitlines()

    def start(self, access: str, config: str = CONF, *options: str) -> Server:
        """Start a server."""
        self.server = Server(self.cable.server, config, access)
        return self.server.start(*options)

    def command(self, words: str, expect: str = RETURNED) -> str:
        """Let the real client send a command; return the server's log up to `expect`."""
        mark = self.server.mark()
        self.server.knock(self.client, "--server-cmd", words, *TO_SERVER, program=FWKNOP,
                          expect=expect)
        return str(self.server.log(mark))

    def processes(self) -> List[str]:
        """Return the processes on the server's host."""
        name = self.cable.server.name
        return subprocess.check_output(["ip", "netns", "pids", name]).decode().split()

    def children(self) -> Iterator[str]:
        """Yield the state of each child that the server has."""
        pid = self.server.running().popen.pid
        with open("/proc/%d/task/%d/children" % (pid, pid)) as file:
            children = file.read().split()
        for child in children:
            with open("/proc/%s/stat" % child) as file:
                yield file.read().rpartition(")")[2].split()[0]


@needs_root
@needs_programs("ip", "fwknop")
class CommandTest(CommandCase):
    """Message type 0."""

    def test_a_command_of_the_real_client(self) -> None:
        """The command runs as root, in /, and prints into the log."""
        self.start(COMMANDS)
        path = self.script("script", 'echo "$# $*" >> got; id -u; echo err >&2; exit 3')
        text = self.command(path + " a 'b c' ; id")
        self.assertIn("Processing SPA Command message: command='%s a 'b c' ; id'." % path, text)
        self.assertIn("Running command '%s a 'b c' ; id'\n" % path, text)
        self.assertIn(" ran a command\n", text)
        self.assertIn("CMD_EXEC: 0\nCMD_EXEC: err\n", text)
        self.assertIn("CMD_EXEC: command returned 3, pid_status: 3\n", text)
        self.assertEqual(["5 a 'b c' ; id"], self.got())
        self.assertIn("CMD_EXEC: /\n", self.command("pwd"))
        self.assertEqual([], list(self.children()))  # also none that has ended

    def test_another_user(self) -> None:
        """User, group and groups are those of nobody; nothing of root is left."""
        self.start(COMMANDS + "CMD_EXEC_USER nobody\n")
        user = self.cable.server.run("id", "nobody").strip()
        text = self.command("id")
        self.assertIn("setuid/setgid user/group to nobody/nogroup (UID=65534,GID=65534)\n", text)
        self.assertIn("CMD_EXEC: %s\n" % user, text)
        path = self.script("script", "echo $(grep -E '^(Uid|Gid|Groups|CapEff)' /proc/$$/status)")
        text = self.command(path)
        self.assertIn("Uid: 65534 65534 65534 65534 Gid: 65534 65534 65534 65534", text)
        self.assertIn("Groups: 65534 CapEff: 0000000000000000\n", text)
        denied = self.command("cat " + self.server.access_file)
        self.assertIn("Permission denied", denied)
        self.assertIn("CMD_EXEC: command returned 1", denied)

    def test_a_group(self) -> None:
        """The name is looked up among groups, and is the command's only group."""
        self.start(COMMANDS + "CMD_EXEC_USER nobody\nCMD_EXEC_GROUP tty\n")
        text = self.command("id")
        self.assertIn("to nobody/tty (UID=65534,GID=5)\n", text)
        self.assertIn("CMD_EXEC: uid=65534(nobody) gid=5(tty) groups=5(tty)\n", text)

    def test_sudo(self) -> None:
        """SUDO_EXE gets the stanza's options; the client can't add one."""
        sudo = self.script("sudo", 'echo "$*" >> got')
        self.start(COMMANDS + "ENABLE_CMD_SUDO_EXEC Y\nCMD_SUDO_EXEC_USER nobody\n"
                   "CMD_SUDO_EXEC_GROUP tty\n",
                   CONF + "SUDO_EXE %s;\n" % sudo)
        self.command("-u root id")
        self.assertEqual(["-u nobody -g tty -- -u root id"], self.got())

    def test_a_command_that_hangs(self) -> None:
        """The server goes on meanwhile, and ends the command with all that it has started."""
        path = self.script("script", "echo hello; sleep 61 & sleep 62; echo never >> got")
        server = self.start(COMMANDS, CONF + "CMD_EXEC_TIMEOUT 2;\n")
        began = time.monotonic()
        mark = server.mark()
        server.knock(self.client, "--server-cmd", path, *TO_SERVER, program=FWKNOP, expect=" ran ")
        self.assertIn(" opened ", server.knock(self.client, *KNOCK))
        self.assertNotIn(RETURNED, server.log(mark) if time.monotonic() < began + 2 else "")
        server.wait_for("command runs for too long", mark)
        server.wait_for("CMD_EXEC: command returned -15, pid_status: -15", mark)
        self.assertIn("CMD_EXEC: hello\n", server.log(mark))
        self.assertGreaterEqual(time.monotonic(), began + 2)
        wait_for(lambda: len(self.processes()) == 1, "the end of what it has started")
        self.assertEqual([], self.got())

    def test_output_is_bounded(self) -> None:
        """However much a command prints, it ends, and the log stays small."""
        server = self.start(COMMANDS)
        began = server.mark()
        self.command("seq 1 1000000")
        self.command("head -c 5000000 /dev/zero")
        lines = [line for line in server.log(began).splitlines() if "CMD_EXEC: " in line]
        self.assertEqual(2, lines.count("CMD_EXEC: (and more)"))
        self.assertLess(len(lines), 30)
        self.assertEqual(2, lines.count(f"[{CLIENT4}] (stanza #1) CMD_EXEC: command returned 0, "
                                        "pid_status: 0"))

    def test_rejected(self) -> None:
        """Each bad command is rejected with a reason, and nothing runs."""
        path = self.script("script", "echo run >> got")
        for access, words, expect in (
            (STANZA, path, "SPA Command messages are not allowed in the current configuration."),
            (COMMANDS + "REQUIRE_USERNAME nobody-else\n", path, "does not match required username"),
            # without the path, which may make it as long as a GPG packet
            (COMMANDS, "id " + " ".join("abcdefghijklmnopqrstuvwxyz1234"), "1 to 30 words"),
            (COMMANDS, "-a " + path, "and begins with a program."),
        ):
            with self.subTest(expect=expect):
                self.start(access)
                self.command(words, expect)
                self.server.stop()
                self.assertIn("Packets seen: 0 accepted; rejected: 1 ", self.server.log())
        self.start(COMMANDS)
        self.command(path + "-not", "command returned 127, pid_status: 127")
        self.command(self.directory, "command returned 126, pid_status: 126")
        self.assertEqual([], self.got())

    def test_test_mode(self) -> None:
        """-t runs no command and says so."""
        path = self.script("script", "echo run >> got")
        self.start(COMMANDS, CONF, "-t")
        self.command(path, "--test mode enabled, not running: " + path)
        self.server.stop()
        self.assertEqual([], self.got())

    def test_bad_files(self) -> None:
        """Unknown users, groups and programs stop the start, with file and line."""
        line = STANZA.count("\n") + 1
        for text, expected in (
                ("CMD_EXEC_USER no-such-user", "CMD_EXEC_USER: expected a user of this host"),
                ("CMD_EXEC_GROUP no-such-group", "CMD_EXEC_GROUP: expected a group of this host"),
                ("CMD_CYCLE_OPEN /no/such", "CMD_CYCLE_OPEN: expected a program that can be run"),
                ("CMD_CYCLE_OPEN /bin/sh $TYPO", "CMD_CYCLE_OPEN: expected only $IP, "),
                ("CMD_CYCLE_OPEN /bin/sh", "CMD_CYCLE_OPEN: expected CMD_CYCLE_CLOSE with it")):
            with self.subTest(text=text):
                server = Server(self.cable.server, CONF, STANZA + text + "\n")
                code, said = server.command("--exit-parse-config")
                self.assertEqual(3, code)
                self.assertIn("%s:%d: %s" % (server.access_file, line, expected), said)
                self.assertEqual(1, len(said.splitlines()))


@needs_root
@needs_programs("ip")
class CycleTest(CommandCase):
    """CMD_CYCLE_OPEN, CMD_CYCLE_CLOSE and CMD_CYCLE_TIMER."""

    def cycle(self, seconds: int, lines: str = "", words: str = "$IP $PORT $PROTO") -> str:
        """Return a stanza whose scripts write a line for each run."""
        return "%sCMD_CYCLE_OPEN %s %s\nCMD_CYCLE_CLOSE %s %s\nCMD_CYCLE_TIMER %d\n%s" % (
            STANZA,
            self.script("open", 'echo "open $*" >> got'),
            words,
            self.script("close", 'echo "close $*" >> got'),
            words,
            seconds,
            lines)

    def closes(self) -> int:
        """Return how often something was closed."""
        return len([line for line in self.got() if line.startswith("close ")])

    def wait_until_open(self, count: int = 1) -> None:
        """Wait until the scripts have opened so often."""
        wait_for(lambda: len([line for line in self.got() if line.startswith("open ")]) == count,
                 "open")

    @needs_programs("fwknop")
    def test_the_real_client(self) -> None:
        """The log, each port, and the time that the client asks for are right."""
        server = self.start(self.cycle(3, "MAX_FW_TIMEOUT 2\n"))
        mark = server.mark()
        server.knock(self.client, "-A", "tcp/22,udp/53", *TO_SERVER, program=FWKNOP)
        server.wait_for("Running CMD_CYCLE_CLOSE command in 3 seconds: ", mark)
        self.wait_until_open(2)
        server.knock(self.client, "-A", "tcp/80", "-f", "9999", *TO_SERVER, program=FWKNOP)
        server.wait_for("Running CMD_CYCLE_CLOSE command in 2 seconds: ", mark)
        self.wait_until_open(3)
        wait_for(lambda: self.closes() == 3, "three closes")
        server.wait_for("Timer expired, running CMD_CYCLE_CLOSE command: ", mark)
        for words in ("22 6", "53 17", "80 6"):
            self.assertEqual(1, self.got().count("open %s %s" % (CLIENT4, words)))
            self.assertEqual(1, self.got().count("close %s %s" % (CLIENT4, words)))
        wait_for(lambda: len(self.processes()) == 1, "the end of the switches")
        self.assertEqual(3, self.closes())
        self.assertNotIn("Added access rule", server.log())

    def test_ports_that_are_denied(self) -> None:
        """OPEN_PORTS and RESTRICT_PORTS hold, and a request is never granted in part."""
        server = self.start(self.cycle(60, "OPEN_PORTS tcp/22,tcp/23\nRESTRICT_PORTS tcp/23\n"))
        for ports in ("tcp/22,tcp/24", "tcp/22,tcp/23", "udp/22"):
            self.assertIn("One or more requested protocol/ports was denied",
                          server.knock(self.client, "-A", ports, *TO_SERVER, expect="denied"))
        self.assertEqual([], self.got())

    @needs_programs("iptables")
    def test_on_a_real_firewall(self) -> None:
        """A cycle's own rules let this client in, for its time, and nobody else; IPv6 too."""
        host = self.cable.server
        host.listen(22)
        for program in ("iptables", "ip6tables"):
            host.run(program, "-A", "INPUT", "-p", "tcp", "--dport", "22", "-j", "DROP")
        rule = "INPUT -s $IP -d $DST -p $PROTO --dport $PORT -j ACCEPT"
        path = self.script("rule", 'case "$*" in *:*) p=ip6tables;; *) p=iptables;; esac; $p "$@"')
        self.start("%sCMD_CYCLE_OPEN %s -I %s\nCMD_CYCLE_CLOSE %s -D %s\nCMD_CYCLE_TIMER %d\n"
                   % (STANZA, path, rule, path, rule, long_enough(2)))
        families = ((CLIENT4, SERVER4, OTHER4), (CLIENT6, SERVER6, OTHER6))
        for address, server, other in families:
            with self.subTest(address=address):
                self.assertFalse(self.client.reaches(server, 22, address))
                self.server.knock(self.client, "-A", "tcp/22", "-a", address, "-D", server)
                wait_for(functools.partial(self.client.reaches, server, 22, address), "access")
                self.assertFalse(self.client.reaches(server, 22, other))
        wait_for(lambda: self.server.log().count("CMD_CYCLE_CLOSE: command returned 0") == 2,
                 "both closes")
        for address, server, _ in families:
            self.assertFalse(self.client.reaches(server, 22, address), address)

    def test_a_clean_stop_closes_at_once(self) -> None:
        """The cycle closes once, before the server ends."""
        server = self.start(self.cycle(600))
        server.knock(self.client, *KNOCK)
        self.wait_until_open()
        began = time.monotonic()
        self.assertEqual(0, server.stop())
        self.assertEqual(1, self.closes())
        self.assertLess(time.monotonic() - began, 20 * slowness())
        self.assertIn("Shutting down, running CMD_CYCLE_CLOSE command: ", server.log())
        self.assertIn("CMD_CYCLE_CLOSE: command returned 0", server.log())
        self.assertEqual([], self.processes())

    def test_a_reload_keeps_its_time(self) -> None:
        """The old command closes at the old time, whatever the new files say."""
        server = self.start(self.cycle(long_enough(2)))
        server.knock(self.client, *KNOCK)
        self.wait_until_open()
        server.configure(access=STANZA)
        mark = server.mark()
        server.send_signal(signal.SIGHUP)
        server.wait_for("Got SIGHUP", mark)
        server.knock(self.client, *KNOCK, expect="nothing is opened")  # the new stanza is in force
        server.wait_for("Timer expired, running CMD_CYCLE_CLOSE", mark)
        lines = [words for line in server.log(mark).splitlines() for words in ("nothing", "Timer")
                 if words in line]
        self.assertEqual(["nothing", "Timer"], lines)
        wait_for(self.closes, "the close")
        server.stop()
        self.assertEqual(["open %s 22 6" % CLIENT4, "close %s 22 6" % CLIENT4], self.got())

    def test_a_killed_server(self) -> None:
        """The switch closes at nearly the same time, once; also after a new start."""
        server = self.start(self.cycle(long_enough(2), "CMD_EXEC_USER nobody\n"))
        server.knock(self.client, *KNOCK)
        self.wait_until_open()
        began = time.monotonic()
        server.stop(signal.SIGKILL)
        self.assertEqual(0, self.closes())
        server.start()
        wait_for(self.closes, "the close")
        self.assertLess(time.monotonic() - began, 20 * slowness())
        wait_for(lambda: len(self.processes()) == 1, "the end of the switch")
        server.stop()
        self.assertEqual(1, self.closes())
        self.assertEqual(65534, os.stat(os.path.join(self.directory, "got")).st_uid)

    def test_a_close_that_an_earlier_server_has_left(self) -> None:
        """After a clean stop or kill -9, only the new server closes what it opened again."""
        access = self.cycle(600)
        self.script("open", 'touch door; echo "open $*" >> got')
        self.script("close", 'rm door && echo "close $*" >> got')
        server = self.start(access)
        for count, number in enumerate((signal.SIGTERM, signal.SIGKILL, signal.SIGTERM)):
            server.knock(self.client, *KNOCK)
            self.wait_until_open(count + 1)
            wait_for(lambda: len(self.processes()) == 3, "the server, its switch and a sleep")
            os.unlink(os.path.join(self.directory, "door"))  # as a host's reload does
            server.stop(number)
            self.assertNotEqual([], self.processes())
            server.start()
        server.knock(self.client, *KNOCK)
        self.wait_until_open(4)
        wait_for(lambda: len(self.processes()) == 3, "the end of what was left")
        self.assertIn("door", os.listdir(self.directory))
        self.assertEqual(0, self.closes())
        self.assertEqual(0, server.stop())
        self.assertEqual(1, self.closes())
        self.assertEqual([], self.processes())

    def test_a_service_that_is_ended_as_a_whole(self) -> None:
        """After a crash systemd sends SIGTERM to what is left: then it closes at once."""
        server = self.start(self.cycle(600))
        server.knock(self.client, *KNOCK)
        self.wait_until_open()
        server.stop(signal.SIGKILL)
        for pid in self.processes():
            os.kill(int(pid), signal.SIGTERM)
        wait_for(self.closes, "the close")
        wait_for(lambda: not self.processes(), "the end of the switch")
        self.assertEqual(1, self.closes())

    def test_a_knock_while_it_is_open(self) -> None:
        """The cycle closes later, and once."""
        first = long_enough(2)
        second = first + 1
        server = self.start(self.cycle(first))
        server.knock(self.client, *KNOCK)
        self.wait_until_open()
        mark = server.mark()
        began = time.monotonic()
        server.knock(self.client, "-f", str(second), *KNOCK)
        server.wait_for("Running CMD_CYCLE_CLOSE command in %d seconds: " % second, mark)
        wait_for(self.closes, "the close")
        self.assertGreater(time.monotonic() - began, second - 0.1)
        self.assertEqual(["open %s 22 6" % CLIENT4, "close %s 22 6" % CLIENT4], self.got())


@needs_firewalls
class NoticeTest(unittest.TestCase):
    """ON_OPEN and ON_CLOSE, beside grants that real firewalls have."""

    def check(self, setup: Setup) -> None:
        """By packet and by sequence: the door opens whatever the command does."""
        with Site(setup) as site:
            server, client = site.server, site.client
            directory = site.host.path("scripts")
            os.chmod(site.cable.temporary.name, 0o755)
            os.mkdir(directory)
            os.chmod(directory, 0o777)

            def script(name: str, file: str, text: str = "") -> str:
                """Return a program that notes in a file what it is told, with its variables."""
                return write(os.path.join(directory, name),
                             '#!/bin/sh\necho "%s $*" >> %s/%s\n%s\n'
                             % (name, directory, file, text), 0o755) + (
                    " $IP $PORT $PROTO $PKT_SRC $DST $CLIENT_TIMEOUT\n")

            def wait_got(name: str, *expected: str) -> None:
                """Wait until scripts have noted just this in a file, and clear it."""
                path = os.path.join(directory, name)
                wait_for(lambda: read(path).splitlines() == list(expected),
                         lambda: "%s in %s; log: %s" % (expected, read(path), server.log()))
                os.unlink(path)

            server.configure(
                setup.config() + "CMD_EXEC_TIMEOUT 1;\n",
                STANZA + "CMD_EXEC_USER nobody\nON_OPEN "
                + script("hangs", "spa", "id -un; sleep 60") + "ON_CLOSE " + script("close", "spa")
                + "SOURCE ANY\nKNOCK_SEQUENCE 7000,9000,8000\nOPEN_PORTS tcp/24\nON_OPEN "
                + script("knocked", "knock") + "ON_CLOSE " + script("over", "knock")
                + "FW_ACCESS_TIMEOUT 1\n")
            server.send_signal(signal.SIGHUP)
            server.wait_for("Re-starting fwknopd")
            hit(client, CLIENT4, "7000", "9000", "8000")
            server.wait_opened(CLIENT4, 24)
            packet = " %s 22 6 %s %s 300" % (CLIENT4, CLIENT4, SERVER4)
            for end in (["--close", CLIENT4 + "/32"], ["--fw-flush"]):
                server.knock(client, *KNOCK)
                self.assertTrue(client.reaches(SERVER4, 22, CLIENT4))  # while it hangs
                server.knock(client, *KNOCK, expect="already exists")
                wait_got("spa", "hangs" + packet)
                if end[0] == "--close":  # after the other stanza's time
                    times = " %s 24 6 %s %s 1" % (CLIENT4, CLIENT4, SERVER4)
                    wait_got("knock", "knocked" + times, "over" + times)
                    self.assertFalse(client.reaches(SERVER4, 24, CLIENT4))
                self.assertEqual(0, server.command(*end)[0])
                wait_got("spa", "close" + packet)
                self.assertFalse(client.reaches(SERVER4, 22, CLIENT4))
            server.knock(client, *KNOCK)
            wait_got("spa", "hangs" + packet)
            server.wait_for("ON_OPEN: nobody")
            server.stop(signal.SIGKILL)  # nobody is left to say that it ends,
            server.start()
            server.knock(client, *KNOCK, expect="already exists")  # until somebody knocks again
            wait_got("spa", "hangs" + packet)
            self.assertEqual(0, server.stop())
            wait_got("spa", "close" + packet)

    def test_beside_the_firewall(self) -> None:
        """On nftables with a guard, and on iptables with the host's own rules."""
        in_parallel(self, [lambda: self.check(Setup(NFT, "guard")), self.one_connection,
                           lambda: self.check(Setup(IPTABLES_NFT, "accept"))], lambda run: run())

    def one_connection(self) -> None:
        """The connection that uses a grant up ends it; the next knock sees that at the latest."""
        with Site(Setup(NFT, "guard"), "", STANZA + "ONE_CONNECTION Y\n"
                  "ON_OPEN /bin/echo up $PORT\nON_CLOSE /bin/echo down $PORT\n") as site:
            for _ in range(2):
                mark = site.server.mark()
                site.server.knock(site.client, *KNOCK)
                site.server.wait_for("ON_OPEN: up 22", mark)
                self.assertTrue(site.client.reaches(SERVER4, 22, CLIENT4))
            self.assertEqual(1, site.server.log().count("ON_CLOSE: down 22"))
            self.assertEqual(0, site.server.stop())
            self.assertEqual(2, site.server.log().count("ON_CLOSE: down 22"))


if __name__ == "__main__":
    unittest.main()
