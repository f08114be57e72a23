"""The commands that a packet may start, their arguments, and how they run and end.

The programs are real ones, small scripts in a directory of the test's own; the firewall is a fake.
"""

import fcntl
import ipaddress
import os
import pwd
import shlex
import signal
import time
import unittest
from typing import Any, Callable, Dict, List, Optional, Tuple  # noqa: F401  (in type comments)
from unittest import mock

import spa_server as server
from tests.support import TIMEOUT, read, slowness, wait_for, write
from tests.test_packet import NOW, Sender, judge
from tests.test_server import CLIENT, DOOR22, KEYS, ServerCase, datagram

SH = "/bin/sh"
ROOT = os.geteuid() == 0


def group_of(leader: int) -> List[int]:
    """Return the processes of a group that have not ended."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open("/proc/%s/stat" % name) as stream:
                words = stream.read().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if words[0] not in "ZX" and int(words[2]) == leader:
            found.append(int(name))
    return found


class CommandCase(ServerCase):
    """A server, scripts to run, and packets of every type."""

    made: server.Server
    sender = Sender()
    count = 0

    def setUp(self) -> None:
        """Make a directory that everybody may look into."""
        super().setUp()
        began = time.monotonic()  # commands take their own time
        self.clocks = self.clocks._replace(
            monotonic=lambda: self.clock.mono() + time.monotonic() - began)
        os.chmod(self.directory, 0o755)

    def end_all(self, made: Any) -> None:
        """End all that a server still runs, and let it see that."""
        self.made, commands = made, made.commands
        commands.notices.clear()
        commands.cycles, cycles = {}, commands.cycles
        for cycle in cycles.values():
            commands.end_switch(cycle)
        for child in commands.running:
            if child.closes:
                commands.end_switch(child.cycle)
            child.closes = False
            server.end_group(child.popen, signal.SIGKILL)
        self.wait_for(lambda: not commands.running and not commands.switches, "an end of all")
        for child in commands.survived:  # another process of its group had the pipe a moment longer
            commands.read(child, last=True)

    def script(self, text: str, name: str = "script") -> str:
        """Return the path of a program that /bin/sh runs."""
        return write(self.place(name), "#!/bin/sh\ncd %s\n%s\n" % (shlex.quote(self.directory),
                                                                  text), 0o755)

    def hurry(self, **constants: float) -> None:
        """Shorten times of the server in this test."""
        for name, seconds in constants.items():
            patch = mock.patch.object(server, name, seconds)
            patch.start()
            self.addCleanup(patch.stop)

    def read(self, name: str) -> str:
        """Return the text of a file that a script wrote; "" if there is none."""
        return read(self.place(name))

    def serve(self, access: str, conf: str = "", seconds: float = 1000) -> server.Server:
        """Return a server with one stanza of these lines."""
        self.made = super().serve("SOURCE ANY\n" + KEYS + access + "\n", conf, seconds)
        self.addCleanup(self.end_all, self.made)
        return self.made

    def knock(self, text: str = "10.55.0.2,tcp/22", kind: int = 1, timeout: Optional[int] = None,
              user: str = "bob", source: str = CLIENT) -> str:
        """Send a new packet, and return the log lines that it caused."""
        CommandCase.count += 1
        extra = [] if timeout is None else [b"%d" % timeout]
        self.made.gate.receive(datagram(self.sender.packet(
            text, kind, extra, user, int(self.clock.wall_time), "%016d" % self.count), source))
        return self.logged()

    def wait_for(self, condition: Callable[[], Any], what: str) -> None:
        """Run the server's loop until a condition is true."""
        def go_on() -> Any:
            """Check the condition; if it is false, run one turn."""
            found = condition()
            if not found:
                for key, _ in self.made.selector.select(0.01):
                    key.data()
                self.made.commands.reap()
            return found

        wait_for(go_on, lambda: "%s; log:\n%s" % (what, self.stream.getvalue()), pause=0)

    def wait_until_ended(self) -> str:
        """Wait until no command runs, and return the new lines of the log."""
        self.wait_for(lambda: not self.made.commands.running, "the end of the commands")
        return self.logged()


# ------------------------------------------------------------------- what may be run

ALLOWED = "ENABLE_CMD_EXEC Y\n"
# (stanza lines, message, words or why not)
COMMANDS = (
    (ALLOWED, "10.55.0.2,id", ["id"]),
    (ALLOWED, "0.0.0.0,id", ["id"]),
    (ALLOWED, "10.55.0.2,/bin/echo a 'b c' \"d\"", ["/bin/echo", "a", "'b", "c'", '"d"']),
    (ALLOWED, "10.55.0.2,a;b | c & d > e $(f) `g` $IP ~ *",
     ["a;b", "|", "c", "&", "d", ">", "e", "$(f)", "`g`", "$IP", "~", "*"]),
    (ALLOWED, "10.55.0.2,  a\t\tb\n c,d ", ["a", "b", "c,d"]),
    (ALLOWED, "10.55.0.2,a\xa0b\x85c\x1cd", ["a\xa0b\x85c\x1cd"]),  # no blanks but ASCII's
    (ALLOWED, "10.55.0.2," + " ".join("abcdefghijklmnopqrstuvwxyzABCD"),
     list("abcdefghijklmnopqrstuvwxyzABCD")),
    (ALLOWED, "10.55.0.2," + " ".join("abcdefghijklmnopqrstuvwxyzABCDE"), "command"),
    (ALLOWED, "10.55.0.2, \t ", "command"),
    (ALLOWED, "10.55.0.2,id\0", "command"),
    (ALLOWED, "10.55.0.2,-a x id", "command"),
    ("", "10.55.0.2,id", "command"),
    ("ENABLE_CMD_EXEC N", "10.55.0.2,id", "command"),
    ("ENABLE_CMD_SUDO_EXEC Y", "10.55.0.2,id", "command"),
    (ALLOWED + "CMD_CYCLE_OPEN /bin/sh\nCMD_CYCLE_CLOSE NONE", "10.55.0.2,id", "command"),
    # ports have nothing to do with it, the rest of the policy has
    (ALLOWED + "OPEN_PORTS tcp/22", "10.55.0.2,id", ["id"]),
    (ALLOWED + "FW_ACCESS_TIMEOUT 0", "10.55.0.2,id", ["id"]),
    (ALLOWED + "ACCESS_EXPIRE_EPOCH %d" % NOW, "10.55.0.2,id", "expired stanza"),
    (ALLOWED + "REQUIRE_SOURCE Y", "0.0.0.0,id", "no address"),
    (ALLOWED + "REQUIRE_USERNAME joe", "10.55.0.2,id", "user"),
    # sudo: nothing of the client's is an option or a variable of it
    (ALLOWED + "ENABLE_CMD_SUDO_EXEC Y", "10.55.0.2,-u root id",
     ["SUDO", "--", "-u", "root", "id"]),
    (ALLOWED + "ENABLE_CMD_SUDO_EXEC Y\nCMD_SUDO_EXEC_USER nobody", "10.55.0.2,LD_PRELOAD=x id",
     ["SUDO", "-u", "nobody", "--", "LD_PRELOAD=x", "id"]),
    (ALLOWED + "ENABLE_CMD_SUDO_EXEC Y\nCMD_SUDO_EXEC_USER nobody\nCMD_SUDO_EXEC_GROUP root",
     "10.55.0.2,id -u", ["SUDO", "-u", "nobody", "-g", "root", "--", "id", "-u"]),
    (ALLOWED + "ENABLE_CMD_SUDO_EXEC N\nCMD_SUDO_EXEC_USER nobody", "10.55.0.2,id", ["id"]),
)

CYCLE = "CMD_CYCLE_OPEN %s open\nCMD_CYCLE_CLOSE %s close\nCMD_CYCLE_TIMER 7\n" % (SH, SH)
# (stanza lines, message, type, the client's timeout, seconds or why not)
CYCLES = (
    (CYCLE, "10.55.0.2,tcp/22", 1, None, 7),
    (CYCLE, "10.55.0.2,tcp/22", 3, 20, 20),
    (CYCLE, "10.55.0.2,tcp/22", 3, 0, 7),
    (CYCLE, "10.55.0.2,tcp/22", 3, 9999, 300),
    (CYCLE + "MAX_FW_TIMEOUT 10", "10.55.0.2,tcp/22", 3, 9999, 10),
    (CYCLE + "MAX_FW_TIMEOUT 5", "10.55.0.2,tcp/22", 1, None, 7),
    (CYCLE + "FW_ACCESS_TIMEOUT 0", "10.55.0.2,tcp/22", 1, None, 7),
    (CYCLE + "ACCESS_EXPIRE_EPOCH %d" % (NOW + 3), "10.55.0.2,tcp/22", 1, None, 3),
    (CYCLE + "OPEN_PORTS tcp/22", "10.55.0.2,tcp/22", 1, None, 7),
    (CYCLE + "OPEN_PORTS tcp/22", "10.55.0.2,tcp/22,tcp/23", 1, None, "ports"),
    (CYCLE + "RESTRICT_PORTS tcp/22", "10.55.0.2,tcp/22", 1, None, "ports"),
    (CYCLE + "REQUIRE_SOURCE Y", "0.0.0.0,tcp/22", 1, None, "no address"),
    (CYCLE + "REQUIRE_USERNAME joe", "10.55.0.2,tcp/22", 1, None, "user"),
    (CYCLE + "ACCESS_EXPIRE_EPOCH %d" % NOW, "10.55.0.2,tcp/22", 1, None, "expired stanza"),
    ("CMD_CYCLE_OPEN /bin/sh\nCMD_CYCLE_CLOSE NONE", "10.55.0.2,tcp/22", 1, None, 30),
)

# (stanza lines, template, message, source of the packet, what becomes of it)
VARIABLES = (
    ("", "$IP $SRC $PKT_SRC $DST $PORT $PROTO $CLIENT_TIMEOUT $TIMEOUT", "10.9.9.9,tcp/22", CLIENT,
     "10.9.9.9 10.9.9.9 10.55.0.2 10.55.0.1 22 6 7 %d" % (NOW + 7)),
    ("", "$IP $PKT_SRC $PORT/$PROTO", "0.0.0.0,udp/53", CLIENT, "10.55.0.2 10.55.0.2 53/17"),
    ("", "-s$IP,$PORT x$IPy $IP_$PORT $PORT$PROTO", "10.55.0.2,tcp/22", CLIENT,
     "-s10.55.0.2,22 x10.55.0.2y 10.55.0.2_22 226"),  # as fwknopd does it
    ("", "$IP $PKT_SRC $DST", "2001:db8::7,tcp/22", "2001:db8::9", "2001:db8::7 2001:db8::9 ::1"),
    ("", "$IP", "::ffff:10.1.2.3,tcp/22", CLIENT, "10.1.2.3"),
    ("ACCESS_PREFIX4 24", "$IP $PKT_SRC", "10.9.9.9,tcp/22", CLIENT, "10.9.9.0/24 10.55.0.2"),
    ("ACCESS_PREFIX6 56", "$SRC", "2001:db8:1:2ff::7,tcp/22", CLIENT, "2001:db8:1:200::/56"),
    ("", "'$IP' \"a b\" ; # | $(x)".replace("$(x)", "`x`"), "10.9.9.9,tcp/22", CLIENT,
     "'10.9.9.9' \"a b\""),  # what follows a semicolon is a comment of the file's
)


class WordsTest(CommandCase):
    """Packet, stanza and datagram go in, command lines come out; nothing runs."""

    def packet(self, text: str, kind: int, timeout: Optional[int] = None) -> Any:
        """Return a packet off the wire."""
        extra = [] if timeout is None else [b"%d" % timeout]
        return server.unlock(self.sender.packet(text, kind, extra), self.sender.keys())[0]

    def stanza(self, lines: str) -> Any:
        """Return the stanza of these lines."""
        return self.stanzas("SOURCE ANY\n" + KEYS + lines + "\n")[0]

    def test_command_messages(self) -> None:
        """Blanks separate arguments, without shell and quotes. Bad commands are rejected."""
        for lines, text, expected in COMMANDS:
            with self.subTest(lines=lines, text=text):
                packet, stanza = self.packet(text, 0), self.stanza(lines)
                try:
                    self.assertEqual(([], 0, True), judge(packet, stanza, datagram()))
                    words = [word.decode("latin-1") for word in
                             server.client_command(packet.command, stanza, "SUDO").argv]
                except server.PacketRejected as rejection:
                    self.assertEqual(expected, rejection.reason)
                else:
                    self.assertEqual(expected, words)

    def test_cycles(self) -> None:
        """Ports, times and the rest of the policy hold for cycles as for the firewall."""
        for lines, text, kind, timeout, expected in CYCLES:
            with self.subTest(lines=lines, text=text, timeout=timeout):
                try:
                    seconds = judge(self.packet(text, kind, timeout), self.stanza(lines),
                                    datagram()).seconds
                except server.PacketRejected as rejection:
                    seconds = rejection.reason
                self.assertEqual(expected, seconds)

    def test_variables(self) -> None:
        """Each variable gets its value, and stays within its argument."""
        for lines, template, text, source, expected in VARIABLES:
            with self.subTest(template=template, text=text):
                stanza = self.stanza("CMD_CYCLE_OPEN %s %s\nCMD_CYCLE_CLOSE %s x %s\n"
                                     "CMD_CYCLE_TIMER 7\n%s" % (SH, template, SH, template, lines))
                came = datagram(b"", source, "10.55.0.1" if "." in source else "::1")
                doors, seconds, _ = judge(self.packet(text, 1), stanza, came)
                made = server.door_commands(
                    stanza, (stanza.cycle_open, stanza.cycle_close), doors[0], came, seconds, NOW)
                self.assertEqual([SH + " " + expected, SH + " x " + expected],
                                 [str(command) for command in made])
                self.assertEqual(1 + len(template.partition(";")[0].split()), len(made[0].argv))

    def test_bytes_of_the_file_are_those_of_the_command(self) -> None:
        """A name in UTF-8 stays one argument, even with bytes that are blanks in Latin-1."""
        path = self.script("", "voil\xe0")
        with open(os.path.join(self.directory, "a"), "wb") as stream:
            stream.write(("SOURCE ANY\n" + KEYS + "CMD_CYCLE_OPEN " + path + "\tb\n"
                          "CMD_CYCLE_CLOSE NONE\n").encode("utf-8"))
        stanza = server.read_stanzas(os.path.join(self.directory, "a"))[0][0]
        door = server.Door(ipaddress.ip_network("10.0.0.1"), None, "tcp", 22)
        opening, closing = server.door_commands(
            stanza, (stanza.cycle_open, stanza.cycle_close), door, datagram(), 7, NOW)
        self.assertEqual((path.encode("utf-8"), b"b"), opening.argv)
        self.assertEqual((), closing.argv)

    def test_accounts(self) -> None:
        """Users and groups by name, each from its own database."""
        nobody = pwd.getpwnam("nobody")
        self.assertIsNone(self.stanza("").account)
        account = self.stanza("CMD_EXEC_USER nobody").account
        self.assertEqual(("nobody", nobody.pw_uid, nobody.pw_gid),
                         (account.user, account.uid, account.gid))
        self.assertEqual(sorted(os.getgrouplist("nobody", nobody.pw_gid)), sorted(account.groups))
        account = self.stanza("CMD_EXEC_USER nobody\nCMD_EXEC_GROUP tty").account
        gid = server.parse_group("tty")
        self.assertEqual(("nobody", "tty", nobody.pw_uid, gid, (gid,)), tuple(account))
        with self.assertRaises(KeyError, msg="or the test shows nothing"):
            pwd.getpwnam("tty")

    def test_warnings(self) -> None:
        """The server warns of commands that run as root, and not of those with a user or sudo."""
        for lines, said in (("", False), (ALLOWED, True),
                            (ALLOWED + "CMD_EXEC_USER nobody\n", False),
                            (ALLOWED + "ENABLE_CMD_SUDO_EXEC Y\n", False)):
            path = os.path.join(self.directory, "access.conf")
            with open(path, "w") as stream:
                stream.write("SOURCE ANY\n" + KEYS + lines)
            self.assertIs(said, "run commands as root" in " ".join(server.read_stanzas(path)[1]))

    def test_only_cycles_need_no_firewall(self) -> None:
        """The server prepares one only if a stanza opens by it, or ports are guarded."""
        plain, cycle = "SOURCE ANY\n" + KEYS, "SOURCE ANY\n" + KEYS + CYCLE
        for access, conf, type_needed in (
                (cycle, "", False), (cycle + cycle, "", False), (cycle + plain, "", True),
                (cycle, "GUARD_PORTS tcp/22;", True)):
            with self.subTest(access=access, conf=conf):
                settings = server.ServerSettings()
                path = os.path.join(self.directory, "fwknopd.conf")
                with open(path, "w") as stream:
                    stream.write("FIREWALL_TYPE nft;\nFIREWALL_EXE /no/such/nft;\n" + conf)
                server.read_server_settings(path, settings)
                settings.set_defaults()
                if type_needed:
                    with self.assertRaises(server.ConfigError):
                        server.choose_firewall(settings, self.stanzas(access), False, self.log)
                else:
                    firewall = server.choose_firewall(settings, self.stanzas(access), False,
                                                      self.log)
                    self.assertIs(server.Firewall, type(firewall))


# ------------------------------------------------------------------- how they run

class RunTest(CommandCase):
    """Programs that really run."""

    def run_command(self, words: str, conf: str = "", access: str = "") -> str:
        """Return the log of a command message's command from the packet to the command's end."""
        self.serve(ALLOWED + access, conf)
        text = self.knock("10.55.0.2," + words, 0)
        return text + self.wait_until_ended()

    def test_log_lines(self) -> None:
        """The log has fwknopd's lines, the output, and the user who asked for it."""
        path = self.script('echo "out: $*"; echo err >&2; exit 3')
        text = self.run_command(path + " a 'b c'")
        label = "[10.55.0.2] (stanza #1) "
        self.assertIn(label + "Processing SPA Command message: command='%s a 'b c''.\n" % path,
                      text)
        self.assertIn(label + "Running command '%s a 'b c''\n" % path, text)
        self.assertIn("(stanza #1) user 'bob' (client 3.0.0) ran a command\n", text)
        self.assertTrue(text.endswith(
            f"CMD_EXEC: out: a 'b c'\nCMD_EXEC: err\n{label}CMD_EXEC: command returned 3, "
            "pid_status: 3\n"), text)
        self.assertEqual(1, self.made.tally.counts["accepted"])
        self.assertEqual({}, self.firewall.rules)

    def test_what_a_command_gets(self) -> None:
        """Directory, environment, umask, descriptors, session and signals."""
        path = self.script("""
            exec > got 2>&1
            umask; env; readlink /proc/$$/fd/0
            ls -l /proc/$$/fd > fds
            exec cat /proc/self/status""")
        os.environ["SPA_TEST_SECRET"] = "1"
        self.addCleanup(os.environ.pop, "SPA_TEST_SECRET")
        old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        self.addCleanup(signal.signal, signal.SIGHUP, old)
        self.addCleanup(os.umask, os.umask(0o077))
        reader, writer = os.pipe()
        os.set_inheritable(writer, True)
        self.run_command(path)
        os.close(reader)
        os.close(writer)
        got = self.read("got")
        self.assertIn("0022\n", got)
        self.assertIn("\n/dev/null\n", got)
        self.assertNotIn("SPA_TEST_SECRET", got)
        names = {line.partition("=")[0] for line in got.splitlines() if "=" in line}
        self.assertEqual({"PATH"}, names - {"PWD", "OLDPWD", "SHLVL", "_"})  # the shell's own
        status = dict(line.split(":\t") for line in got.splitlines() if ":\t" in line)
        self.assertEqual((status["Pid"], status["Pid"]), (status["NSpgid"], status["NSsid"]))
        opened = [line.partition(" -> ")[2] for line in self.read("fds").splitlines()[1:]]
        self.assertIn("/dev/null", opened)  # all others are what the script itself has opened
        self.assertEqual([], [name for name in opened if name != "/dev/null"
                              and not name.startswith(os.path.realpath(self.directory))])
        self.assertEqual((0, 0), (int(status["SigBlk"], 16), int(status["SigIgn"], 16)))

    def test_directory(self) -> None:
        """A command starts in /."""
        self.assertIn("CMD_EXEC: /\n", self.run_command("pwd"))

    def test_programs_that_are_not_there(self) -> None:
        """The log has the shell's reason and the exit code."""
        for words, code in (("/no/such a", 127), ("no-such-program", 127), ("/etc/passwd", 126),
                            ("/", 126)):
            with self.subTest(words=words):
                text = self.run_command(words)
                self.assertIn(words.split()[0] + ": ", text)
                self.assertIn("CMD_EXEC: command returned %d, pid_status: %d\n" % (code, code),
                              text)

    def test_what_can_not_be_started(self) -> None:
        """Without a shell the packet is rejected, with the reason."""
        with mock.patch.object(server, "RUN", (b"/no/such",)):
            text = self.run_command("id a")
        self.assertIn("/no/such id a: No such file or directory\n", text)
        self.assertIn("a command could not be started", text)
        self.assertEqual({"command": 1}, dict(self.made.tally.counts))
        self.assertEqual([], self.made.commands.running)

    def test_a_program_that_its_owner_holds_back(self) -> None:
        """A lease on the program delays execve() until it is given up; the server goes on."""
        path = self.script("echo run")
        with open(path, "r+") as held:
            old = signal.signal(signal.SIGIO, signal.SIG_IGN)
            self.addCleanup(signal.signal, signal.SIGIO, old)
            fcntl.fcntl(held, fcntl.F_SETLEASE, fcntl.F_WRLCK)
            self.serve(ALLOWED)
            begin = time.monotonic()
            self.assertIn("ran a command", self.knock("10.55.0.2," + path, 0))
            self.assertLess(time.monotonic() - begin, 5 * slowness())
        self.wait_until_ended()

    def test_output_is_bounded(self) -> None:
        """The log gets few lines and bytes, and the command's pipe never fills up."""
        limit, most = server.MAX_OUTPUT, server.MAX_OUTPUT_LINES
        for text, lines, last in (
                ("i=0; while [ $i -lt 100 ]; do echo $i; i=$((i+1)); done", most + 1, "(and more)"),
                ("dd if=/dev/zero bs=1024 count=1024 2>/dev/null | tr '\\0' x", 2, "(and more)"),
                ("printf 'a\\nb'", 2, "b"), ("printf 'a\\033[2Jb\\377'", 1, "a\\x1b[2Jb\\xff"),
                ("exec >&- 2>&-; exit 0", 0, ""), (":", 0, "")):
            with self.subTest(text=text):
                said = self.run_command(self.script(text))
                shown = [line.partition("CMD_EXEC: ")[2] for line in said.splitlines()
                         if "CMD_EXEC: " in line]
                self.assertEqual("command returned 0, pid_status: 0", shown.pop())
                self.assertEqual(lines, len(shown))
                self.assertEqual(last, shown[-1] if shown else "")
                self.assertLessEqual(sum(map(len, shown)), limit + 100)

    def test_what_it_leaves_behind_is_not_waited_for(self) -> None:
        """A command ends with its process, even if another one still holds its output."""
        begin = time.monotonic()
        text = self.run_command(self.script("sleep 60 & echo $! > pid; echo done"))
        os.kill(int(self.read("pid")), signal.SIGKILL)
        self.assertIn("CMD_EXEC: done\n[10.55.0.2] (stanza #1) CMD_EXEC: command returned 0", text)
        self.assertLess(time.monotonic() - begin, 30 * slowness())

    def test_timeout(self) -> None:
        """All processes of the command get SIGTERM, and then SIGKILL."""
        self.hurry(GRACE_SECONDS=0.5)
        self.run_command(self.script("""
            (trap '' TERM; echo $$ > leader; sleep 60) &
            trap 'echo term >> got' TERM
            while :; do sleep 60; done"""), "CMD_EXEC_TIMEOUT 1;")
        self.assertEqual("term\n", self.read("got"))
        self.wait_for(lambda: not group_of(int(self.read("leader"))), "the end of the group")

    def test_timeout_is_said(self) -> None:
        """A command that obeys SIGTERM ends at once."""
        text = self.run_command("sleep 60", "CMD_EXEC_TIMEOUT 1;")
        self.assertIn("CMD_EXEC: sleep 60: command runs for too long (CMD_EXEC_TIMEOUT)\n", text)
        self.assertIn("CMD_EXEC: command returned -15, pid_status: -15\n", text)

    def test_user(self) -> None:
        """Under root the command runs as nobody; another server can't run it at all."""
        text = self.run_command("id", access="CMD_EXEC_USER nobody\nCMD_EXEC_GROUP tty")
        nobody, tty = pwd.getpwnam("nobody").pw_uid, server.parse_group("tty")
        self.assertIn("Running command 'id' setuid/setgid user/group to nobody/tty (UID=%d,GID=%d)"
                      % (nobody, tty), text)
        if ROOT:
            self.assertIn("CMD_EXEC: uid=%d(nobody) gid=%d(tty) groups=%d(tty)\n"
                          % (nobody, tty, tty), text)
        else:
            self.assertIn("a command could not be started", text)
            self.assertNotIn("uid=", text)

    def test_too_many(self) -> None:
        """A packet that would start too many is rejected, before it starts any."""
        made = self.serve(ALLOWED)
        one = type("Child", (), {"cycle": mock.Mock(owner=(False, 1))})  # type: Any
        made.commands.running, running = [one] * server.MAX_RUNNING, made.commands.running
        text = self.knock("10.55.0.2,touch %s/got" % self.directory, 0)
        made.commands.running = running
        self.assertIn("too many commands: %d of stanza #1 run" % server.MAX_RUNNING, text)
        self.assertIn("a command could not be started", text)
        one.cycle.owner = (False, 2)  # others keep nobody out
        made.commands.running = [one] * server.MAX_RUNNING
        self.knock("10.55.0.2,id", 0)
        del made.commands.running[:server.MAX_RUNNING]
        self.assertIn("CMD_EXEC: command returned 0", self.wait_until_ended())
        self.assertFalse(os.path.exists(os.path.join(self.directory, "got")))

    def test_test_mode(self) -> None:
        """Nothing runs, and the log says what would run."""
        path = self.script("touch got")
        for access, kind, text in ((ALLOWED, 0, "10.55.0.2," + path),
                                   ("CMD_CYCLE_OPEN %s $IP\nCMD_CYCLE_CLOSE %s\nCMD_CYCLE_TIMER 1"
                                    % (path, path), 1, "10.55.0.2,tcp/22")):
            made = self.serve(access)
            made.commands.test = True
            said = self.knock(text, kind)
            self.assertIn("--test mode enabled, not running: " + path, said)
            self.assertEqual(([], {}), (made.commands.running, made.commands.cycles))
        self.assertEqual("", self.read("got"))


class CycleTest(CommandCase):
    """Commands that open and close in place of the firewall."""

    def cycle(self, lines: str = "", opening: str = "", seconds: int = 1, words: str = "$IP $PORT",
              closing: str = "") -> str:
        """Return the stanza of a cycle that notes in the file `got` what it does."""
        path = self.script('%s\necho "open $*" >> got' % opening, "open")
        self.closer = self.script('%s\necho "close $*" >> got' % closing, "close")
        return "CMD_CYCLE_OPEN %s %s\nCMD_CYCLE_CLOSE %s %s\nCMD_CYCLE_TIMER %d\n%s" % (
            path, words, self.closer, words, seconds, lines)

    def got(self) -> List[str]:
        """Return what the commands have done so far, in order."""
        return self.read("got").splitlines()

    def pass_the_time(self) -> str:
        """Let the commands end, and then the time of a cycle; return the log.

        The server's clock is moved by hand; only a switch, which is a program, really waits.
        """
        text = self.wait_until_ended()
        self.clock.pass_seconds(max(cycle.ends - self.clocks.monotonic()
                                    for cycle in self.made.commands.cycles.values()))
        return text

    def wait_until_closed(self) -> str:
        """Wait until all cycles have closed, and return the log."""
        self.wait_for(lambda: not self.made.commands.cycles, "the end of the cycles")
        self.wait_for(lambda: not self.made.commands.running and not self.made.commands.switches,
                      "the end of commands and switches")
        return self.logged()

    def test_opens_and_closes(self) -> None:
        """The log has fwknopd's lines, and the firewall stays as it is."""
        self.serve(self.cycle())
        text = self.knock() + self.pass_the_time() + self.wait_until_closed()
        self.assertEqual(["open 10.55.0.2 22", "close 10.55.0.2 22"], self.got())
        label, path = "[10.55.0.2] (stanza #1) ", self.directory
        lines = [label + "Running CMD_CYCLE_OPEN command: %s/open 10.55.0.2 22" % path,
                 label + "Running CMD_CYCLE_CLOSE command in 1 seconds: %s/close 10.55.0.2 22"
                 % path,
                 "(stanza #1) user 'bob' (client 3.0.0) opened 10.55.0.2 -> 0.0.0.0/0 tcp/22 for 1 "
                 "seconds", label + "CMD_CYCLE_OPEN: command returned 0, pid_status: 0",
                 label + "Timer expired, running CMD_CYCLE_CLOSE command: %s/close 10.55.0.2 22"
                 % path, label + "CMD_CYCLE_CLOSE: command returned 0, pid_status: 0"]
        self.assertEqual(lines, text.splitlines()[-len(lines):])
        self.assertEqual(0, self.firewall.prepared)

    def test_every_port(self) -> None:
        """Every port of a request opens, not only the first."""
        self.serve(self.cycle(words="$IP $PORT $PROTO"))
        self.knock("2001:db8::7,tcp/22,udp/53")
        self.pass_the_time()
        self.wait_until_closed()
        self.assertEqual(["2001:db8::7 22 6", "2001:db8::7 53 17"],
                         sorted(line[5:] for line in self.got() if line.startswith("open ")))
        self.assertEqual(["2001:db8::7 22 6", "2001:db8::7 53 17"],
                         sorted(line[6:] for line in self.got() if line.startswith("close ")))

    def test_again_while_open(self) -> None:
        """The cycle closes once and later; the command that opens does not run again."""
        made = self.serve(self.cycle(seconds=60))
        self.knock()
        (cycle,) = made.commands.cycles.values()
        switch = cycle.switch
        assert switch is not None
        self.wait_until_ended()
        text = self.knock(kind=3, timeout=200)
        self.assertIn("Running CMD_CYCLE_CLOSE command in 200 seconds", text)
        self.assertNotIn("Running CMD_CYCLE_OPEN", text)
        self.assertIn("Running CMD_CYCLE_CLOSE command in 200 seconds",
                      self.knock(kind=3, timeout=5))  # never less than was granted
        self.wait_for(lambda: switch.poll() is not None, "the end of the first switch")
        self.assertEqual(1, len(made.commands.cycles))
        made.commands.stop()
        self.assertEqual(["open 10.55.0.2 22", "close 10.55.0.2 22"], self.got())

    def test_others_are_others(self) -> None:
        """Other clients and ports have cycles of their own."""
        made = self.serve(self.cycle(seconds=60))
        for text in ("10.55.0.2,tcp/22", "10.55.0.3,tcp/22", "10.55.0.2,tcp/23"):
            self.knock(text)
        self.assertEqual(3, len(made.commands.cycles))
        self.wait_until_ended()
        made.commands.stop()
        self.assertEqual(3, sum(line.startswith("close ") for line in self.got()))

    def test_an_open_command_with_other_words_is_another_one(self) -> None:
        """A command with the time in its arguments runs again, and closes only once."""
        path = self.cycle(seconds=60)
        made = self.serve(path.replace("open $IP $PORT", "open $IP $CLIENT_TIMEOUT"))
        self.knock()
        self.wait_until_ended()
        self.knock(kind=3, timeout=200)
        self.wait_until_ended()
        made.commands.stop()
        self.assertEqual(["open 10.55.0.2 60", "open 10.55.0.2 200", "close 10.55.0.2 22"],
                         self.got())

    def test_what_fails_to_open_is_closed_and_may_be_tried_again(self) -> None:
        """It may have done half its work. A client may knock again before it is closed."""
        made = self.serve(self.cycle(opening="echo try >> got; exit 4", seconds=60))
        self.knock()
        self.assertIn("CMD_CYCLE_OPEN: command returned 4", self.wait_until_ended())
        self.knock()
        self.wait_until_ended()
        self.assertEqual(1, len(made.commands.cycles))
        made.commands.stop()
        self.assertEqual(["try", "try", "close 10.55.0.2 22"], self.got())

    def test_what_can_not_be_started_leaves_nothing(self) -> None:
        """The packet is rejected, and no switch is left to close what was not opened."""
        made = self.serve(self.cycle(seconds=60))
        with mock.patch.object(server, "RUN", (b"/no/such",)):
            text = self.knock()
        self.assertIn("/open 10.55.0.2 22: No such file or directory\n", text)
        self.assertIn("a command could not be started", text)
        self.assertEqual({}, made.commands.cycles)
        self.wait_for(lambda: not made.commands.switches, "the end of the switch")
        self.assertEqual([], self.got())

    def test_a_close_that_can_not_be_started_is_left_to_the_switch(self) -> None:
        """The switch tries again when it is due, a little later than the server."""
        self.hurry(SWITCH_SECONDS=1)
        self.serve(self.cycle())
        self.knock()
        self.pass_the_time()
        with mock.patch.object(server, "launch", side_effect=server.CommandError("no memory")):
            self.wait_for(lambda: not self.made.commands.cycles, "the close")
        self.assertIn("no memory; its switch tries it again\n", self.logged())
        self.wait_for(lambda: len(self.got()) == 2, "the switch's close")
        self.assertEqual("close 10.55.0.2 22", self.got()[1])

    def test_a_close_that_fails_is_tried_again(self) -> None:
        """A close that fails or is killed runs again a moment later, and then never again."""
        self.hurry(SWITCH_SECONDS=1)
        for failing in ("exit 3", "kill -9 $$"):
            self.serve(self.cycle(closing="[ -e once ] || { touch once; %s; }" % failing))
            self.knock()
            self.pass_the_time()
            text = self.wait_until_closed()
            self.assertRegex(text, "CMD_CYCLE_CLOSE: command returned (3|-9), ")
            self.assertIn("CMD_CYCLE_CLOSE: command returned 0, ", text)
            self.assertEqual(["open 10.55.0.2 22", "close 10.55.0.2 22"], self.got()[-2:])
            os.unlink(os.path.join(self.directory, "once"))
        self.assertEqual(4, len(self.got()))

    def test_a_close_that_fails_twice_is_left_to_the_switch(self) -> None:
        """The switch waits for as long as a close may take, and tries once more."""
        self.hurry(SWITCH_SECONDS=1, GRACE_SECONDS=0.5)
        made = self.serve(self.cycle(closing="[ -e may ] || exit 3"), "CMD_EXEC_TIMEOUT 1;")
        self.knock()
        self.pass_the_time()
        self.wait_for(lambda: "has failed twice; its switch tries it again" in
                      self.stream.getvalue(), "the second failure")
        self.assertEqual((1, 1), (len(made.commands.switches), len(self.got())))
        self.script("", "may")
        self.wait_for(lambda: not made.commands.switches, "the end of the switch")
        self.assertEqual(["open 10.55.0.2 22", "close 10.55.0.2 22"], self.got())

    def test_no_try_to_close_is_left_when_the_same_opens_again(self) -> None:
        """The close runs before the opening. So no second try, switch, or switch of an earlier
        server closes what is open now, and no rule is added twice."""
        self.hurry(SWITCH_SECONDS=1)
        closing = "[ ! -e locked ] && rm door || { echo failed >> got; exit 3; }"
        lines = self.cycle(opening="[ ! -e door ] || echo twice >> got; touch door",
                           closing=closing).replace("TIMER 1", "TIMER 60")

        def check(pending: str, gone: bool) -> None:
            """Open again while one try is pending, after somebody has closed or nobody has."""
            made = self.serve(lines)
            self.script("", "locked")
            write(self.place("got"), "")
            self.knock()
            self.wait_until_ended()
            if pending == "old server":
                old, made = made, self.serve(lines)
            else:
                made.commands.close_all(server.FLUSHED)
                (cycle,) = made.commands.closing
                self.wait_for(lambda: cycle.retried and (
                    pending == "second try" or not made.commands.running), "what is left")
            os.unlink(self.place("door" if gone else "locked"))
            self.knock()
            self.wait_until_ended()
            self.wait_for(lambda: not made.commands.switches, "the end of what was left")
            self.assertEqual([], made.commands.closing)
            if pending == "old server":
                (cycle,) = old.commands.cycles.values()
                assert cycle.switch is not None
                self.assertEqual(-signal.SIGKILL, cycle.switch.wait(TIMEOUT))
                self.end_all(old)
            self.assertEqual(["failed" if gone else "close 10.55.0.2 22", "open 10.55.0.2 22"],
                             self.got()[-2:])
            self.assertNotIn("twice", self.got())
            self.assertEqual(1, len(made.commands.cycles))
            os.unlink(self.place("door"))
            self.end_all(made)

        for pending in ("second try", "switch", "old server"):
            for gone in (True, False):
                with self.subTest(pending=pending, gone=gone):
                    check(pending, gone)

    def test_a_slow_close_is_not_run_twice(self) -> None:
        """The switch waits until a slow close has ended."""
        self.hurry(SWITCH_SECONDS=1)
        self.serve(self.cycle(closing="sleep %d" % (server.SWITCH_SECONDS + 2)))
        self.knock()
        self.pass_the_time()
        self.wait_until_closed()
        self.assertEqual(["open 10.55.0.2 22", "close 10.55.0.2 22"], self.got())

    def test_one_close_for_many_ports_ends_all_that_open(self) -> None:
        """A close ends every slow command that opens the same."""
        made = self.serve(self.cycle(opening="sleep 60").replace("close $IP $PORT", "close $IP"))
        self.knock("10.55.0.2,tcp/22,tcp/23")
        self.knock("10.55.0.2,tcp/24")
        self.assertEqual((1, 3), (len(made.commands.cycles), len(made.commands.running)))
        self.clock.pass_seconds(1)
        self.assertEqual(3, self.wait_until_closed().count("CMD_CYCLE_OPEN: command returned -9"))
        self.assertEqual(["close 10.55.0.2"], self.got())

    def test_a_slow_open_is_ended_by_the_close(self) -> None:
        """The close ends a slow command, which would otherwise open after it, for ever."""
        self.serve(self.cycle(opening="sleep 60"))
        self.knock()
        self.clock.pass_seconds(1)
        text = self.wait_until_closed()
        self.assertIn("CMD_CYCLE_OPEN: command returned -9", text)
        self.assertEqual(["close 10.55.0.2 22"], self.got())

    def test_the_switch_alone(self) -> None:
        """The switch closes two seconds late, or at once on SIGTERM; the server notices."""
        made = self.serve(self.cycle(seconds=1))
        self.knock()
        (cycle,) = made.commands.cycles.values()
        switch = cycle.switch
        assert switch is not None
        wait_for(lambda: len(self.got()) == 2, "a close; the server does not look")
        switch.wait(TIMEOUT)
        self.assertIn("CMD_CYCLE_CLOSE: its switch has run the command, which returned 0",
                      self.wait_until_closed())
        self.assertEqual(["open 10.55.0.2 22", "close 10.55.0.2 22"], self.got())
        self.serve(self.cycle(seconds=60))
        self.knock()
        self.wait_until_ended()
        (cycle,) = self.made.commands.cycles.values()
        switch = cycle.switch
        assert switch is not None
        # A shell that has not become `sleep` yet may still catch the signal.
        self.wait_for(lambda: "sleep\n" in [read("/proc/%d/comm" % pid)
                                            for pid in group_of(switch.pid)], "the switch's sleep")
        os.killpg(switch.pid, signal.SIGTERM)
        self.wait_for(lambda: len(self.got()) == 4, "the close")
        switch.wait(TIMEOUT)
        self.knock()  # what the switch has closed is opened again
        self.wait_until_ended()
        self.assertEqual("open 10.55.0.2 22", self.got()[4])

    def test_too_many_cycles(self) -> None:
        """A packet that exceeds the limit opens no port; open ones may be prolonged.

        Those of another stanza do not count.
        """
        made = self.serve(self.cycle(seconds=60))
        self.knock()
        self.wait_until_ended()
        one = type("Cycle", (), {"owner": (False, 1), "ends": 1e99})  # type: Any
        others = [(number,) for number in range(server.MAX_CYCLES - 2)]  # type: List[Any]
        made.commands.cycles.update(dict.fromkeys(others, one))
        text = self.knock("10.55.0.2,tcp/23,tcp/24")
        self.assertIn("%d wait to close" % (server.MAX_CYCLES - 1), text)
        self.assertEqual(server.MAX_CYCLES - 1, len(made.commands.cycles))
        self.knock("10.55.0.2,tcp/22,tcp/23")
        self.assertEqual(server.MAX_CYCLES, len(made.commands.cycles))
        self.assertIn(" opened ", self.knock())
        one.owner = (False, 2)
        self.assertIn(" opened ", self.knock("10.55.0.2,tcp/24"))
        for key in others:
            del made.commands.cycles[key]
        self.wait_until_ended()
        self.assertEqual(["open 10.55.0.2 22", "open 10.55.0.2 23", "open 10.55.0.2 24"],
                         self.got())

    def test_a_flush_closes_at_once(self) -> None:
        """A flush closes cycles as well as grants, and the server goes on."""
        made = self.serve(self.cycle(seconds=60))
        self.knock()
        self.wait_until_ended()
        with mock.patch.object(server, "remove_leftovers") as leftovers:
            made.flush()
        self.assertTrue(leftovers.called)
        self.wait_until_closed()
        self.assertEqual(["open 10.55.0.2 22", "close 10.55.0.2 22"], self.got())

    def test_no_close(self) -> None:
        """With NONE nothing waits, there is no switch, and each knock opens."""
        path = self.script('echo "open $*" >> got', "open")
        made = self.serve("CMD_CYCLE_OPEN %s $CLIENT_TIMEOUT\nCMD_CYCLE_CLOSE NONE" % path)
        for _ in range(2):
            text = self.knock()
            self.assertNotIn("CMD_CYCLE_CLOSE", text)
            self.wait_until_ended()
        self.assertEqual((["open 30"] * 2, {}, []),
                         (self.got(), made.commands.cycles, made.commands.switches))

    def test_reload_keeps_what_waits(self) -> None:
        """An open cycle closes by the old command at the old time, whatever the new files say."""
        made = self.serve(self.cycle(seconds=2))
        self.knock()
        made.reload(server.Configuration(made.settings, self.stanzas("SOURCE ANY\n" + KEYS), []),
                    self.firewall)
        self.assertEqual(1, len(made.commands.cycles))
        self.pass_the_time()
        self.wait_until_closed()
        self.assertEqual(["open 10.55.0.2 22", "close 10.55.0.2 22"], self.got())

    def test_stop_waits_only_a_while(self) -> None:
        """A close that hangs does not delay a stop for long, and goes on."""
        self.hurry(STOP_SECONDS=1.0)
        made = self.serve(self.cycle(seconds=60, closing="echo $$ > pid; sleep 60"))
        self.knock()
        self.wait_until_ended()
        begin = time.monotonic()
        made.commands.stop()
        self.assertTrue(group_of(int(self.read("pid"))))
        self.assertGreater(time.monotonic() - begin, server.STOP_SECONDS - 0.5)
        self.assertLess(time.monotonic() - begin, server.STOP_SECONDS + 10 * slowness())


class NoticeTest(CommandCase):
    """ON_OPEN and ON_CLOSE: commands beside the firewall."""

    def notices(self, lines: str = "", opening: str = "", words: str = "$IP $PORT") -> str:
        """Return a stanza that notes in the file `got` what it opens and closes."""
        return "ON_OPEN %s %s\nON_CLOSE %s %s\nFW_ACCESS_TIMEOUT 5\n%s" % (
            self.script('%s\necho "open $*" >> got' % opening, "open"), words,
            self.script('echo "close $*" >> got', "close"), words, lines)

    def got(self) -> List[str]:
        """Let all commands run; return what they have done so far, in order."""
        self.wait_for(lambda: not self.made.commands.running and not self.made.commands.notices,
                      "the end of the commands")
        return self.read("got").splitlines()

    def test_each_end(self) -> None:
        """It closes once: by the timer, by hand, by a flush, a stop or a reload."""
        def pass_the_time(made: server.Server) -> None:
            self.clock.pass_seconds(6)
            made.grants.expire()
            made.grants.expire()

        def reload(made: server.Server) -> None:
            with mock.patch.object(self.firewall, "chains_for", lambda door: []):
                made.grants.move(self.firewall)

        for name, end in (
                ("timer", pass_the_time), ("flush", lambda made: made.grants.flush()),
                ("--close", lambda made: made.access.close_by_hand("bob")),
                ("stop", lambda made: made.stop()), ("reload", reload)):
            with self.subTest(name):
                made = self.serve(self.notices())
                text = self.knock()
                self.assertNotIn("ON_OPEN", text)  # not before the packet is done with
                self.assertLess(text.index("Added access rule"), text.index("opened"))
                self.assertEqual(["open 10.55.0.2 22"], self.got())
                self.assertIn("[10.55.0.2] (stanza #1) Running ON_OPEN command: %s/open "
                              "10.55.0.2 22\n[10.55.0.2] (stanza #1) ON_OPEN: command returned 0"
                              % self.directory, self.logged())
                end(made)
                self.assertEqual(["open 10.55.0.2 22", "close 10.55.0.2 22"], self.got())
                self.assertEqual({}, made.access.notices)
                self.assertEqual([], self.firewall.doors())
                self.end_all(made)
                os.unlink(self.place("got"))

    def test_a_close_that_fails_is_no_end(self) -> None:
        """As long as the firewall has the grant, nothing says that it is closed."""
        made = self.serve(self.notices())
        self.knock()
        self.firewall.failing_flushes = self.firewall.failing_closes = 1
        self.assertRaises(server.CommandError, made.grants.flush)
        made.grants.expire()
        self.assertEqual(["open 10.55.0.2 22"], self.got())
        self.clock.pass_seconds(server.RETRY_SECONDS)
        made.grants.expire()
        self.assertEqual(["open 10.55.0.2 22", "close 10.55.0.2 22"], self.got())

    def test_prolonged(self) -> None:
        """A grant that lasts longer opens once and closes once; other doors have their own."""
        made = self.serve(self.notices())
        self.knock()
        self.clock.pass_seconds(3)
        self.knock("10.55.0.2,tcp/22,udp/53")
        self.clock.pass_seconds(3)
        made.grants.expire()
        self.assertEqual(["open 10.55.0.2 22", "open 10.55.0.2 53"], sorted(self.got()))
        self.clock.pass_seconds(3)
        made.grants.expire()
        self.assertEqual(["close 10.55.0.2 22", "close 10.55.0.2 53"], sorted(self.got())[:2])
        self.knock()
        self.assertEqual("open 10.55.0.2 22", self.got()[-1])

    def test_the_door_never_depends_on_it(self) -> None:
        """It opens and closes in time whatever its command does, and all of that is logged."""
        for name, opening, said in (
                ("fails", "echo no; exit 3", "ON_OPEN: no\n[10.55.0.2] (stanza #1) ON_OPEN: "
                 "command returned 3,"),
                ("hangs", "sleep 60", "command runs for too long (CMD_EXEC_TIMEOUT)"),
                ("is gone", "", "ON_OPEN: command returned 127,")):
            with self.subTest(name):
                made = self.serve(self.notices(opening=opening), "CMD_EXEC_TIMEOUT 1;")
                if name == "is gone":
                    os.unlink(self.place("open"))
                self.knock()
                self.assertEqual([DOOR22], self.firewall.doors())
                made.commands.reap()
                if name != "hangs":
                    self.got()
                self.clock.pass_seconds(6)
                made.grants.expire()
                self.assertEqual([], self.firewall.doors())
                self.assertEqual("close 10.55.0.2 22", self.got()[-1])
                self.assertIn(said, self.logged())
        made = self.serve(self.notices())
        with mock.patch.object(server, "RUN", (b"/no/such",)):
            self.knock()
            made.commands.reap()
        self.assertIn("/open 10.55.0.2 22: No such file or directory\n", self.logged())
        self.assertEqual([DOOR22], self.firewall.doors())

    def test_many(self) -> None:
        """Of a stanza only so many run, and the rest waits. They keep no other command waiting."""
        self.hurry(MAX_RUNNING=2, MAX_NOTICES=3, STOP_SECONDS=0.2)
        made = self.serve(self.notices(ALLOWED, "while [ ! -e go ]; do sleep 0.05; done"))
        said = ""
        for number in range(1, 7):
            said += self.knock("10.55.0.2,tcp/%d" % number)
            made.commands.reap()
            made.commands.reap()
            self.assertLessEqual(len(made.commands.running), 2)
        self.assertEqual(6, len(self.firewall.doors()))
        self.assertGreater(made.commands.next_due(), 0)
        self.assertIn("(stanza #1) too many ON_OPEN commands wait; not running: %s/open 10.55.0.2 6"
                      % self.directory, said)
        self.knock("10.55.0.2,touch %s" % self.place("go"), 0)
        self.assertEqual(["open 10.55.0.2 %d" % number for number in range(1, 6)],
                         sorted(self.got()))
        os.unlink(self.place("go"))
        for number in range(1, 5):
            self.knock("10.55.0.3,tcp/%d" % number)
        made.commands.stop()
        self.assertIn("1 ON_OPEN and ON_CLOSE commands had no time left to run", self.logged())

    def test_a_client_s_text_reaches_no_shell(self) -> None:
        """Only parsed addresses and numbers get into the words, each within its own."""
        words = "$IP&$SRC|$PKT_SRC $DST $PORT $PROTO $CLIENT_TIMEOUT x$TIMEOUT `id` 'a b'"
        self.serve(self.notices(words=words))
        for text, user in (("10.55.0.2,tcp/22;id", "bob"), ("10.55.0.2$(id),tcp/22", "bob"),
                           ("10.55.0.2,tcp/22", "$(id) `id`;")):
            self.knock(text, user=user)
        self.knock(kind=3, timeout=7)
        (line,) = set(self.got())
        self.assertRegex(line, r"^open 10.55.0.2&10.55.0.2\|10.55.0.2 10.55.0.1 22 6 (7|5) "
                               r"x\d{10} `id` 'a b'$")

    def test_test_mode(self) -> None:
        """Nothing runs, and the log says what would run."""
        made = self.serve(self.notices())
        made.commands.test = True
        self.knock()
        made.grants.flush()
        self.assertEqual([], self.got())
        for name in ("open", "close"):
            self.assertIn("--test mode enabled, not running: %s 10.55.0.2 22" % self.place(name),
                          self.stream.getvalue())

    def test_one_connection(self) -> None:
        """The connection that ended a grant ends it here as well, at a look or the next knock."""
        made = self.serve(self.notices("ONE_CONNECTION Y"))
        self.knock()
        self.assertEqual(["open 10.55.0.2 22"], self.got())
        self.firewall.rules.clear()
        self.knock()
        self.assertEqual([DOOR22], self.firewall.doors())
        self.assertEqual(["close 10.55.0.2 22", "open 10.55.0.2 22"], sorted(self.got()[1:]))
        self.firewall.rules.clear()
        with mock.patch.object(made.grants, "restore", side_effect=AssertionError):
            self.knock()  # a client that knocks all the time does not make it look all the time
        self.firewall.rules.clear()
        made.grants.restore()
        self.assertEqual("close 10.55.0.2 22", self.got()[-1])

    def test_nat(self) -> None:
        """One notice for the doors that lead a client to another host, with the inner port."""
        for lines, words in (("FORCE_NAT 10.9.0.2 2222", "2222 6"), (
                "FORCE_NAT 10.9.0.2 2222\nFORWARD_ALL Y", "0 0")):
            made = self.serve(self.notices(lines, words="$PORT $PROTO"),
                              "ENABLE_IPT_FORWARDING Y;")
            self.knock()
            made.grants.flush()
            self.assertEqual(["close " + words, "open " + words], sorted(self.got()))
            os.unlink(self.place("got"))

    def test_a_stop_that_fails(self) -> None:
        """Commands still have their time if the firewall does not let its grants go."""
        made = self.serve(self.notices())
        self.knock()
        self.firewall.failing_flushes = 1
        with mock.patch.object(self.firewall, "withdraw", side_effect=server.CommandError("no")):
            self.assertRaises(server.CommandError, made.stop)
        self.assertEqual(["open 10.55.0.2 22"], self.got())

    def test_without_a_firewall(self) -> None:
        """A notice of an opening that can't be is refused, with its line."""
        settings = server.ServerSettings()
        settings.set_line(server.Line("f", 1, "FIREWALL_TYPE", "none"))
        settings.set_defaults()
        with self.assertRaises(server.ConfigError) as caught:
            server.choose_firewall(settings, self.stanzas(
                "SOURCE ANY\n" + KEYS + "ON_CLOSE /bin/sh x\n"), True, self.log)
        self.assertIn("access.conf:4: ON_CLOSE: expected a firewall, not FIREWALL_TYPE none",
                      str(caught.exception))

    def test_whose_grant(self) -> None:
        """A grant that was adopted, or opened by hand, gets notices with the first knock for it."""
        made = self.serve(self.notices())
        made.access.open_by_hand(*server.parse_hand("tcp/22", "10.55.0.2", "60"), "root")
        self.assertEqual([], self.got())
        self.knock()
        made.access.close_by_hand("10.55.0.2")
        self.assertEqual(["open 10.55.0.2 22", "close 10.55.0.2 22"], self.got())


if __name__ == "__main__":
    unittest.main()
