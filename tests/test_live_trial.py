"""Guards on trial in real firewalls: they open again by themselves unless a knock succeeds in time.

Each check has two hosts of its own, and most of its time is that of a trial.
"""

import datetime
import os
import re
import shutil
import signal
import time
import unittest
from typing import Any, List, Tuple

import spa_server
from tests.firewalls import (IPTABLES_LEGACY, IPTABLES_NFT, NFT, OLD_KERNEL, Setup, Site, launcher,
                             needs_firewalls, six)
from tests.netns import (CLIENT4, FWKNOP, OTHER4, OTHER6, SERVER4, SERVER6, STANZA, Cable, Server,
                         in_parallel)
from tests.support import long_enough, needs_programs, wait_for, write

SETUPS = [Setup(backend, "guard") for backend in (NFT, IPTABLES_NFT, IPTABLES_LEGACY)]
STRANGERS = [(OTHER4, SERVER4, 22), (OTHER4, SERVER4, 24), (OTHER6, SERVER6, 22)]
CLOSED, OPEN = [False] * len(STRANGERS), [True] * len(STRANGERS)
TO4 = ["-a", CLIENT4, "-D", SERVER4]
ENDED = "Trial: no knock opened a guarded port in time. Open to everybody until a new start: "
STAYS = ": closed for good. Closed to everybody without a grant: tcp/22, tcp/24"
SESAME = "SOURCE ANY\nOPEN_PORTS tcp/24\nKNOCK_SEQUENCE 7000,8000\nFW_ACCESS_TIMEOUT 300\n"


class TrialSite(Site):
    """Two hosts, and our server with a guard on trial."""

    def __init__(self, setup: Setup, seconds: int, access: str = STANZA, config: str = "",
                 flushable: bool = False) -> None:
        # A flush passes by a table that the server owns, so nft gets none where one is to count.
        words = launcher(OLD_KERNEL) if flushable and setup.backend == NFT else []
        super().__init__(setup, config, access, words, options=["--trial", str(seconds)])

    def end(self) -> float:
        """Return when the trial ends, as the log says."""
        line = self.server.wait_for("Trial: closed until ")
        date = re.findall("until (.*), then open again unless a knock has opened one of these: "
                          "tcp/22, tcp/24$", line)[0]
        return datetime.datetime.strptime(date, "%Y-%m-%d %H:%M:%S %z").timestamp()

    def strangers(self) -> List[bool]:
        """Return which ports anybody reaches."""
        return self.client.probe(*STRANGERS)

    def wait_open(self, ends: float) -> None:
        """Wait until everybody gets in, which must not be before `ends`."""
        wait_for(lambda: self.strangers() == OPEN, lambda: "an open guard in\n" + self.rules())
        assert time.time() > ends - 0.1, "%s: open too early" % (self.setup,)
        # It is the kernel that opens, and within a second: a busy machine sees that late.
        assert time.time() < ends + 10, "%s: open too late" % (self.setup,)

    def flush(self) -> None:
        """Flush the guard, as a script that loads the host's rules does."""
        programs = [self.setup.backend, six(self.setup.backend)]
        for command in ([["nft", "flush ruleset"]] if self.setup.backend == NFT else
                        [[program, "-t", "mangle", "-F"] for program in programs]):
            self.host.run(*command)

    def flush_and_wait(self, text: str) -> None:
        """Flush the guard, and wait for the line in the log about it."""
        mark = self.server.mark()
        self.flush()
        self.server.wait_for("Somebody changed ", mark)
        self.server.wait_for(text, mark)

    def reload(self, text: str) -> None:
        """Let the server read its files again, and wait for a line in the log after that."""
        mark = self.server.mark()
        self.server.send_signal(signal.SIGHUP)
        self.server.wait_for("Re-starting fwknopd", mark)
        self.server.wait_for(text, mark)


@needs_firewalls
class TrialTest(unittest.TestCase):
    """The two ends of a trial, and what must not change them."""

    def test_the_kernel_opens_a_dead_servers_guard(self) -> None:
        """Closed at once; open after kill -9 when the time is up; a new start begins anew."""
        seconds = long_enough(4)

        def check(setup: Setup) -> None:
            """One backend."""
            with TrialSite(setup, seconds) as site:
                ends = site.end()
                self.assertLess(abs(ends - time.time() - seconds), seconds)
                self.assertEqual(CLOSED, site.strangers())
                site.server.stop(signal.SIGKILL)
                self.assertIn("The guard stays until --unguard, or the end of its trial.",
                              site.server.command("--fw-flush")[1])
                self.assertEqual(CLOSED, site.strangers())
                site.wait_open(ends)
                self.assertIn("no guard closes it", site.server.command("--check")[1])
                site.server.start("--trial", "3600")
                self.assertIn("closed by the guard", site.server.command("--check")[1])
                self.assertEqual(CLOSED, site.strangers())
                self.assertGreater(site.end(), time.time() + 3000)
                site.server.stop()
                self.assertRegex(site.server.log(),
                                 r"from now on, until 2\S+ \S+ \S+ or --unguard: tcp/22, tcp/24")
                self.assertEqual((0, "Closed to everybody without a grant: tcp/22, tcp/24\n"),
                                 site.server.command("--guard"))
                self.assertNotRegex(site.rules(), "@trial|datestop")
                self.assertEqual(CLOSED, site.strangers())

        in_parallel(self, SETUPS, check)

    def test_an_open_end(self) -> None:
        """Flush and reload keep the time that is left, and close nothing once it is up."""
        seconds = long_enough(10)

        def check(setup: Setup) -> None:
            """One backend."""
            with TrialSite(setup, seconds, flushable=True) as site:
                ends = site.end()
                until = " (pid=%d). Trial: closed until " % site.server.running().popen.pid
                site.flush_and_wait("put")
                wait_for(lambda: site.strangers() == CLOSED, "the guard")
                if setup.backend == NFT:
                    site.host.run("nft", "flush set inet spa trial")
                    wait_for(lambda: site.strangers() == CLOSED, "the guard's elements")
                site.reload("Trial: closed until ")
                self.assertEqual(0, site.server.command("--fw-flush")[0])
                self.assertEqual(CLOSED, site.strangers())
                self.assertIn(until, site.server.command("--guard")[1])
                self.assertEqual(ends, site.end(), site.server.log())
                site.server.wait_for(ENDED + "tcp/22, tcp/24")
                site.wait_open(ends)
                site.reload(ENDED)
                site.flush_and_wait("putting them back")
                site.server.knock(site.client, "-A", "tcp/22", *TO4)
                self.assertIn("no guard closes it", site.server.command("--check")[1])
                self.assertEqual(OPEN, site.strangers())
                self.assertIn(ENDED, site.server.command("--guard")[1])
                self.assertNotIn("for good", site.server.log())
                self.assertEqual(0, site.server.command("-K")[0])
                self.assertNotIn("from now on", site.server.log())
                self.assertEqual(OPEN, site.strangers())
                self.assertEqual(0, site.server.command("--unguard")[0])
                self.assertNotRegex(site.rules(), r"FWKNOP|\bspa")

        in_parallel(self, SETUPS, check)

    @needs_programs("fwknop", "knock")
    def test_closed_for_good(self) -> None:
        """A knock for a guarded port ends the trial, and no command or other port does."""
        seconds = long_enough(10)

        def check(setup: Setup) -> None:
            """One backend; a packet or a sequence."""
            access = STANZA + "ENABLE_CMD_EXEC Y\n" + SESAME
            with TrialSite(setup, seconds, access, flushable=True) as site:
                ends, server, client = site.end(), site.server, site.client
                mark = server.mark()
                server.knock(client, "--server-cmd", "true", *TO4, program=FWKNOP,
                             expect="ran a command")
                server.knock(client, "-A", "tcp/25", *TO4)
                self.assertNotIn("Trial: ", server.log(mark))
                self.assertRegex(site.rules(), "@trial|datestop")
                port = 22
                if setup.backend == IPTABLES_NFT:
                    port = 24
                    client.run("knock", SERVER4, "7000", "8000")
                else:
                    server.knock(client, "-A", "tcp/22", *TO4)
                server.wait_for("Trial: a knock has opened tcp/%d%s" % (port, STAYS), mark)
                self.assertLess(time.time(), ends, "this machine is too slow for the test")
                self.assertNotIn("@trial", site.rules())
                self.assertEqual(CLOSED, site.strangers())
                site.flush_and_wait("put")
                site.reload("")
                self.assertTrue(client.reaches(SERVER4, port))
                self.assertEqual(1, server.log(mark).count("Trial: "))
                server.stop(signal.SIGKILL)
                while time.time() < ends + 1.5:  # time is the thing
                    self.assertEqual(CLOSED, site.strangers())
                self.assertTrue(client.reaches(SERVER4, port))

        in_parallel(self, SETUPS, check)

    def test_a_firewall_that_fails_at_that_moment(self) -> None:
        """The server makes the guard stay as soon as nft works again."""
        with Cable() as cable:
            cable.server.listen(22)
            program, flag = cable.server.path("nft"), cable.server.path("flag")
            os.mkdir(program)
            program = write(os.path.join(program, "nft"), "#!/bin/sh\n[ ! -e %s ] || exit 4\n"
                            "exec %s \"$@\"\n" % (flag, shutil.which("nft")), 0o755)
            server = Server(cable.server, "FIREWALL_EXE %s;\nGUARD_PORTS tcp/22;\n" % program)
            server.start("--trial", "3600")
            write(flag, "")
            server.knock(cable.client, "-A", "tcp/22", *TO4)
            server.wait_for("the firewall is not as it should be, trying again")
            self.assertTrue(cable.client.reaches(SERVER4, 22))
            os.unlink(flag)
            wait_for(lambda: "trial counter" not in cable.server.run("nft", "list ruleset"),
                     "a guard that stays")
            self.assertFalse(cable.client.reaches(SERVER4, 22, OTHER4))

    def test_in_the_background(self) -> None:
        """The terminal is told until when, though the log goes to syslog; also with --init."""
        with Cable() as cable:
            cable.server.listen(22)
            server = Server(cable.server, "")
            os.unlink(server.config_file)
            os.unlink(server.access_file)
            code, text = server.command("--init", "tcp/22", "--daemon", "--trial", "60")
            try:
                self.assertEqual(0, code, text)
                self.assertFalse(cable.client.reaches(SERVER4, 22))
                self.assertRegex(text, "(?m)^Trial: closed until 2.*: tcp/22$")
            finally:
                self.assertEqual(0, server.command("-K")[0])

    def test_refusals(self) -> None:
        """No trial without a guard, a server, or a kernel that ends it: and nothing is closed."""
        refuse = ('#!/bin/sh\ntext=$(cat)\ncase "$text" in *"-m time"*) exit 2;; esac\n'
                  'echo "$text" | exec %s "$@"\n')
        number = "--trial: expected a number of seconds, 1 to 604800"
        guard = "GUARD_PORTS tcp/22;\n"
        with Cable() as cable:
            directory = cable.server.path("programs")
            os.mkdir(directory)
            for name in ("iptables-nft", "ip6tables-nft"):
                real = str(shutil.which(name + "-restore"))
                os.symlink(str(shutil.which(name)), os.path.join(directory, name))
                write(os.path.join(directory, name + "-restore"),
                      refuse % real if name.startswith("ip6") else
                      "#!/bin/sh\nexec %s \"$@\"\n" % real, 0o755)
            old = "FIREWALL_EXE %s/iptables-nft;\nFIREWALL_TYPE iptables;\n" % directory
            server = Server(cable.server, guard)
            cases: List[Tuple[str, List[str], int, str]] = [
                *[(guard, ["--trial", text], 2, number) for text in ("0", "abc", "604801", "-1")],
                (guard, ["--trial="], 2, number),
                (guard, ["--trial"], 2, "option '--trial' requires an argument"),
                ("FIREWALL_TYPE iptables;\n", ["--trial", "9"], 3,
                 "--trial: there is no guard to try\nhint: set GUARD_PORTS tcp/22"),
                (guard, ["-t", "--trial", "9"], 3, "--trial: there is no guard to try"),
                (guard + old, ["--trial", "9"], 3,
                 "--trial: %s/ip6tables-nft has no time match" % directory),
                *[(guard, ["--trial", "9", option], 2, "--trial: only a server that hears knocks")
                  for option in ("--guard", "--unguard", "-D", "-K")]]
            for config, options, expected, message in cases:
                with self.subTest(options=options):
                    server.configure(config)
                    code, text = server.command(*options)
                    self.assertEqual(expected, code, text)
                    self.assertIn(message, text)
                    self.assertNotRegex(cable.server.run("nft", "list ruleset"), "spa|FWKNOP")


class EndTest(unittest.TestCase):
    """By which clock and by which doors a trial ends."""

    def test_what_proves_that_a_knock_opens_the_guard(self) -> None:
        """A door to a guarded port of this host, also one for one connection; no other."""
        now, any4 = [50.0], spa_server.any_source(4)
        clocks = spa_server.Clocks(lambda: 1000.0, lambda: now[0])
        for kind, protocol, port, at, ends in (
                (spa_server.INPUT, "tcp", 22, 60.0, True), (spa_server.ONCE, "tcp", 22, 60.0, True),
                (spa_server.INPUT, "udp", 22, 60.0, False),
                (spa_server.INPUT, "tcp", 23, 60.0, False),
                (spa_server.DNAT, "tcp", 22, 60.0, False),
                (spa_server.FORWARD, "tcp", 22, 60.0, False),
                (spa_server.INPUT, "tcp", 22, 350.0, False)):
            with self.subTest(kind=kind, protocol=protocol, port=port, at=at):
                now[0] = 50.0
                firewall = spa_server.Firewall("", spa_server.Log(), clocks)
                firewall.guard_ports = frozenset([("tcp", 22), ("udp", 24)])
                spa_server.start_trial(firewall, 300)
                now[0] = at
                door = spa_server.Door(any4, None, protocol, port, kind)
                spa_server.Grants(firewall, spa_server.Log(), clocks).keep_guard([door])
                self.assertEqual(ends, firewall.trial is None)

    def test_a_wall_clock_that_jumps(self) -> None:
        """iptables follows it, as its time match does; a reload that takes the guard ends both."""
        wall = 1000.5
        clocks = spa_server.Clocks(lambda: wall, lambda: 50.0)
        ports, log = frozenset([("tcp", 22)]), spa_server.Log()
        plain = spa_server.Firewall("", log, clocks)
        plain.guard_ports = ports
        spa_server.start_trial(plain, 300)
        self.assertEqual(300.5, plain.trial_left())  # its end is a whole second
        firewall = spa_server.IptablesFirewall({4: "iptables"}, False, [], ports, log, clocks)
        firewall.succeed(plain)

        def guarded() -> Any:
            """Return the rules of the chain that closes."""
            return spa_server.iptables_guard_rules(ports, firewall.trial, 4)["FWKNOP_GUARDED"]

        self.assertEqual(["-m time --datestop 1970-01-01T00:21:40 -j DROP"], guarded())
        wall += 200
        self.assertEqual((100.5, 300.5), (firewall.trial_left(), plain.trial_left()))
        without = spa_server.IptablesFirewall({4: "iptables"}, False, [], frozenset(), log, clocks)
        without.succeed(firewall)
        self.assertEqual(float("inf"), without.trial_left())
        firewall.trial = spa_server.TRIAL_OVER
        self.assertEqual((float("inf"), []), (firewall.trial_left(), guarded()))


if __name__ == "__main__":
    unittest.main()
