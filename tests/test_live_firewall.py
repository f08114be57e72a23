"""Grants in real firewalls: every backend in both modes and families, with real TCP connections.

Each check has two hosts of its own. Most of their time goes by in waiting for grants to end, so
the checks of a test run at the same time, one for each backend and mode.
"""

import functools
import os
import re
import shutil
import signal
import sys
import time
import unittest
from typing import Any, Callable, List, Tuple, Type

from tests import firewalls
from tests.firewalls import (ANNOUNCED, IPTABLES_LEGACY, IPTABLES_NFT, NFT, NFT_HOST, OLD_KERNEL,
                             SETUPS, Setup, close_host, launcher, needs_firewalls, six)
from tests.netns import (CLIENT4, CLIENT6, FWKNOP, GATE4, GATE6, INNER4, INNER6, KEYS, OTHER4,
                         OTHER6, SERVER4, SERVER6, SPA_CLIENT, SPA_SERVER, STANZA, Cable, Gateway,
                         Host, Process, Server, in_parallel)
from tests.support import TOP, long_enough, needs_programs, read, wait_for, write

GRANTED = [("", SERVER4, 22), ("", SERVER6, 22)]
NOT_GRANTED = [("", SERVER4, 24), ("", SERVER6, 24), (OTHER4, SERVER4, 22), (OTHER6, SERVER6, 22)]
TO4 = ["-a", CLIENT4, "-D", SERVER4]
TO6 = ["-a", CLIENT6, "-D", SERVER6]

NFT_HOST_OLD = """
table ip filter { chain input { type filter hook input priority 0; policy drop;
  ct state established,related accept; iifname lo accept; }; }
table ip6 filter { chain input { type filter hook input priority 0; policy drop;
  ct state established,related accept; iifname lo accept; meta l4proto ipv6-icmp accept; }; }
"""

# Connects to port 22 of two addresses from two others, all the time, and says when that works.
INTRUDER = r"""
import socket, sys, time
waiting = []
print("knocks", flush=True)
while True:
    for source, address in (sys.argv[1:3], sys.argv[3:5]):
        made = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
        made.setblocking(False)
        made.bind((source, 0))
        made.connect_ex((address, 22))
        waiting.append(made)
    time.sleep(0.002)
    for made in waiting[:]:
        try:
            print("got in to", made.getpeername()[0], flush=True)
            waiting.remove(made)
        except OSError:
            pass
    del waiting[:-200]
"""

# Whether this kernel lets the server own a table that it leaves behind.
OWNED = tuple(map(int, os.uname().release.split(".")[:2])) >= (6, 9)
ACCEPT_SETUPS = [setup for setup in SETUPS if setup.mode == "accept"]
GUARD_SETUPS = [setup for setup in SETUPS if setup.mode == "guard"]


class Site(firewalls.Site):
    """Two hosts, the server's firewall closed, and our server on it."""

    def knock(self, *options: str, program: List[str] = SPA_CLIENT,
              expect: str = " opened ") -> str:
        """Knock for tcp/22 unless the options say otherwise."""
        return self.server.knock(self.client, "-A", "tcp/22", *options, program=program,
                                 expect=expect)

    def knock_both(self) -> None:
        """Open tcp/22 for both addresses."""
        self.knock(*TO4)
        self.knock(*TO6)

    def is_open(self) -> bool:
        """Return whether what was granted is open, and nothing else is."""
        return all(self.client.probe(*GRANTED)) and not any(self.client.probe(*NOT_GRANTED))

    def all_closed(self) -> bool:
        """Return whether nothing is open."""
        return not any(self.client.probe(*GRANTED, *NOT_GRANTED))

    def reload(self) -> None:
        """Send SIGHUP, and wait until it was done."""
        mark = self.server.mark()
        self.server.send_signal(signal.SIGHUP)
        self.server.wait_for("Got SIGHUP", mark)
        self.knock("-A", "tcp/9", *TO4)

    def listed(self) -> List[Tuple[str, int]]:
        """Return each grant in --fw-list: its door, and when it expires."""
        code, text = self.server.command("--fw-list")
        assert code == 0, text
        columns = r"^\d+ +ACCEPT +(\w+) +-- +(\S+) +(\S+) +\w+ dpt:(\d+) /\* _exp_(\d+) \*/ "
        return [
            ("%s -> %s %s/%s" % (source, destination, protocol, port), int(expires))
            for protocol, source, destination, port, expires in re.findall(columns, text, re.M)
        ]

    def iptables(self, *options: str) -> None:
        """Run iptables and ip6tables."""
        for program in (self.setup.backend, six(self.setup.backend)):
            self.host.run(program, *options)


# Starts the server with a flag for tables in place of the one that kernels have since 6.9.

class OldSite(Site):
    """Our server as on a kernel that does not let it own the guard's table."""

    def __init__(self, setup: Setup, *statements: str) -> None:
        super().__init__(setup, launcher=launcher(OLD_KERNEL, *statements))


@needs_firewalls
class RoundTripTest(unittest.TestCase):
    """From closed to open to closed."""

    @needs_programs("fwknop")
    def test_round_trip(self) -> None:
        """Closed; a knock opens that door only; it expires; the connection lives on."""
        seconds = long_enough(2)

        def check(setup: Setup) -> None:
            """One backend in one mode."""
            access = STANZA.replace("TIMEOUT 300", "TIMEOUT %d" % seconds)
            with Site(setup, access=access) as site:
                self.assertTrue(site.all_closed())
                guard = setup.mode == "guard"
                self.assertEqual([guard] * 2,
                                 site.client.probe(("", SERVER4, 25), ("", SERVER6, 25)))
                mark, began = site.server.mark(), time.monotonic()
                site.knock(*TO4, program=FWKNOP)
                site.knock(*TO6)
                knocked = time.monotonic()
                connections = [site.client.connect(SERVER4, 22), site.client.connect(SERVER6, 22)]
                self.assertEqual([False] * 4, site.client.probe(*NOT_GRANTED))
                site.wait_closed(*GRANTED, earliest=began + seconds, latest=knocked + seconds)
                for client in (CLIENT4, CLIENT6):
                    self.assertRegex(site.server.wait_for("(%s -> " % client, mark),
                                     "^Removed rule ")
                self.assertEqual(0, site.count_grants(), site.rules())
                self.assertEqual([], site.listed())
                self.assertEqual([True] * 2, [each.answers() for each in connections])
                self.assertEqual(0, site.server.stop(), site.server.log())
                self.assertTrue(site.all_closed())
                self.assertEqual([True] * 2, [each.answers() for each in connections])
                if not guard:
                    self.assertNotRegex(site.rules(), r"FWKNOP|\bspa")

        in_parallel(self, SETUPS, check)

    def test_a_knock_for_what_is_open_extends_it(self) -> None:
        """A grant stays one rule or element, with the later end and never an earlier one."""

        def check(setup: Setup) -> None:
            """One backend in one mode."""
            with Site(setup) as site:
                knocks = []
                for seconds in (100, 300, 5):
                    began = time.time()
                    for where in (TO4, TO6):
                        site.knock(*where, "-f", str(seconds))
                    knocks.append((began + seconds, time.time() + seconds))
                    earliest, latest = max(knocks)
                    listed = site.listed()
                    self.assertEqual(2, len({door for door, _ in listed}))
                    self.assertEqual(2, site.count_grants(), site.rules())
                    for _, expires in listed:
                        self.assertTrue(earliest - 1 < expires < latest + 2)  # whole seconds
                self.assertTrue(site.is_open())

        in_parallel(self, SETUPS, check)


@needs_firewalls
class LifeTest(unittest.TestCase):
    """Grants when the server ends, or reads its files again."""

    def test_kill_with_open_grants(self) -> None:
        """The kernel closes on time alone; a new server goes on with the rest."""
        first = long_enough(2)
        second = 3 * first

        def check(setup: Setup) -> None:
            """One backend in one mode."""
            with Site(setup) as site:
                began = time.monotonic()
                site.knock(*TO6, "-A", "tcp/24", "-f", str(second))
                site.knock(*TO4, "-f", str(first))
                knocked = time.monotonic()
                site.server.stop(signal.SIGKILL)
                self.assertEqual([True, True],
                                 site.client.probe(("", SERVER4, 22), ("", SERVER6, 24)))
                connection = site.client.connect(SERVER4, 22)
                site.wait_closed(("", SERVER4, 22), latest=knocked + first)
                self.assertTrue(site.client.reaches(SERVER6, 24))
                self.assertTrue(connection.answers())
                site.server.start()
                self.assertRegex(site.server.wait_for(CLIENT6 + " -> ::/0 tcp/24"),
                                 "^Found access rule in ")
                self.assertTrue(site.client.reaches(SERVER6, 24))
                self.assertEqual([False] * 2,
                                 site.client.probe(("", SERVER4, 22), ("", SERVER4, 24)))
                site.wait_closed(("", SERVER6, 24), earliest=began + second,
                                 latest=knocked + second)
                site.server.wait_for("(%s -> ::/0 tcp/24)" % CLIENT6)
                self.assertEqual(0, site.count_grants(), site.rules())

        in_parallel(self, SETUPS, check)

    def test_reload_stop_and_start(self) -> None:
        """SIGHUP keeps grants; FLUSH_IPT_AT_EXIT and FLUSH_IPT_AT_INIT do what they say."""

        def check(setup: Setup) -> None:
            """One backend in one mode."""
            with Site(setup) as site:
                site.knock_both()
                before = site.listed()
                descriptors = "/proc/%d/fd" % site.server.running().popen.pid
                count = len(os.listdir(descriptors))
                site.server.configure(setup.config() + "FLUSH_IPT_AT_EXIT N;\n")
                site.reload()
                wait_for(lambda: count == len(os.listdir(descriptors)), "closed descriptors", 5)
                self.assertTrue(site.is_open())
                self.assertEqual(dict(before).keys(),
                                 dict(site.listed()).keys() - {"%s -> 0.0.0.0/0 tcp/9" % CLIENT4})
                self.assertNotIn("Put back", site.server.log())
                self.assertEqual(0, site.server.stop())
                self.assertTrue(site.is_open(), "FLUSH_IPT_AT_EXIT N")
                site.server.configure(setup.config() + "FLUSH_IPT_AT_INIT Y;\n")
                site.server.start()
                self.assertTrue(site.all_closed(), "FLUSH_IPT_AT_INIT Y")
                site.knock_both()
                site.server.configure(setup.config())
                site.server.stop(signal.SIGKILL)
                site.server.start()
                self.assertEqual(2, site.server.log().count("Found access rule in "))
                self.assertTrue(site.is_open(), "adopted")
                connection = site.client.connect(SERVER6, 22)
                self.assertEqual(0, site.server.stop())
                self.assertTrue(site.all_closed(), "a clean stop")
                self.assertEqual(0, site.count_grants())
                self.assertTrue(connection.answers())
                site.server.configure(setup.config() + "FLUSH_IPT_AT_EXIT N;\n")
                site.server.start()
                site.knock(*TO4, "-f", "2")
                ends = time.monotonic() + 2
                self.assertEqual(0, site.server.stop())
                site.wait_closed(("", SERVER4, 22), latest=ends)

        in_parallel(self, SETUPS, check)


FAIL = """if %(changes)s && [ -e %(flag)s ]; then echo "no luck" >&2; exit 4; fi
exec %(real)s "$@"
"""
HANG = """if %(changes)s && mv %(flag)s %(flag)s.hung 2>/dev/null; then
  grep -q before %(flag)s.hung || %(real)s "$@"; sleep 100; fi
exec %(real)s "$@"
"""  # once, before its work or after it


def make_programs(host: Host, backend: str, script: str = FAIL) -> Tuple[str, str]:
    """Return the path of a firewall program that a script stands for, and that of its flag."""
    directory = host.path("programs")
    os.mkdir(directory)
    flag = os.path.join(directory, "flag")
    names = ["nft"]
    if backend != NFT:
        names = [name + suffix for name in ("iptables", "ip6tables")
                 for suffix in ("", "-restore")]
    for name in names:
        real = shutil.which(
            name if backend == NFT else name.replace("tables", "tables-" + backend[9:], 1))
        changes = "true" if name == "nft" or "restore" in name else "false"
        write(os.path.join(directory, name),
              "#!/bin/sh\n" + script % {"changes": changes, "flag": flag, "real": real}, 0o755)
    return os.path.join(directory, names[0]), flag


@needs_firewalls
@needs_programs("strace", "fwknop")
class StepTest(unittest.TestCase):
    """A server that is killed at any step of a grant's life."""

    # What changes something: files and log, netlink, and the start of a program, in each Python.
    STEPS = "write,pwrite64,sendto,ftruncate,rename,vfork,fork,clone,clone3"

    def trace(self, site: Site, *options: str) -> Process:
        """Return strace at work on the server, which goes on without the programs it starts."""
        pid = site.server.running().popen.pid
        strace = site.host.start("strace", "-p", pid, "-e", "trace=" + self.STEPS, *options)
        strace.wait_for("attached")
        return strace

    def live(self, site: Site) -> str:
        """Let a new packet open, and the grant end, unless the server dies; return the packet."""
        path = site.host.path("packet")
        site.client.run(*FWKNOP, *KEYS, "-A", "tcp/22", *TO4, "-T", "-B", path)
        packet, mark = read(path).strip(), site.server.mark()
        site.client.send(SERVER4, 62201, packet)
        wait_for(lambda: site.server.running().popen.poll() is not None
                 or "Removed rule" in site.server.log(mark), "the end of grant or server")
        return packet

    def check_killed(self, site: Site, step: str, number: int) -> bool:
        """Kill the server before it does a step, and return whether it got there."""
        strace = self.trace(site, "-e", "inject=%s:signal=KILL:when=%d" % (step, number))
        cache = os.path.join(site.server.directory, "run", "digest.cache")
        before = read(cache).count(CLIENT4)
        packet = self.live(site)
        killed = site.server.running().popen.poll() is not None
        remembered = read(cache).count(CLIENT4) > before
        if not killed:
            strace.end(signal.SIGINT)
        elif site.client.reaches(SERVER4, 22):
            self.assertTrue(remembered, "open before it was remembered")
        site.wait_closed(("", SERVER4, 22))
        if killed:
            site.server.start()
        mark = site.server.mark()
        site.client.send(SERVER4, 62201, packet, packet)
        wait_for(lambda: site.server.log(mark).count("Replay detected") == 1 + remembered,
                 "the packet to be a replay")
        log = site.server.log(mark)
        self.assertEqual(not remembered, " opened " in log, log)
        site.wait_closed(("", SERVER4, 22))
        wait_for(lambda: not site.count_grants(), "the end of all grants")
        return killed

    def test_kill_at_each_step(self) -> None:
        """Nothing is open that was not remembered, nothing stays open, and no packet opens twice.
        """
        access = STANZA + "FW_ACCESS_TIMEOUT 1\n"
        cases: List[Tuple[Setup, str, range]] = []

        def find_steps(setup: Setup) -> None:
            """Add the steps of one backend; what the server does often in parts of five."""
            with Site(setup, access=access) as site:
                self.live(site)  # imports what is imported late
                strace = self.trace(site, "-c")
                self.live(site)
                strace.end(signal.SIGINT)
                columns = [line.split() for line in strace.output().splitlines()]
                steps = [(each[-1], int(each[3])) for each in columns
                         if each and each[-1] in self.STEPS.split(",")]
                self.assertGreaterEqual(len(steps), 2, strace.output())
                cases.extend((setup, step, range(first, min(first + 5, count + 1)))
                             for step, count in steps for first in range(1, count + 1, 5))

        def check(case: Tuple[Setup, str, range]) -> None:
            """Some steps of a kind; at least the first has to be done in each life."""
            setup, step, numbers = case
            with Site(setup, access=access) as site:
                self.live(site)
                killed = [self.check_killed(site, step, number) for number in numbers]
                self.assertTrue(killed[0] or numbers[0] > 1, step)

        in_parallel(self, [Setup(NFT, "guard"), Setup(IPTABLES_NFT, "accept")], find_steps)
        in_parallel(self, cases, check)


@needs_firewalls
class TamperTest(unittest.TestCase):
    """Somebody changes the firewall behind the server's back."""

    def attacks(self, site: Site) -> List[Tuple[str, Callable[[], Any]]]:
        """Return changes of our chains, sets and rules, by name."""
        host, setup = site.host, site.setup
        if setup == Setup(NFT, "guard"):
            return [
                (line, functools.partial(host.run, "nft", line))
                for line in ("flush ruleset", "delete table inet spa",
                             "flush set inet spa spa4; flush set inet spa spa6",
                             "flush chain inet spa guard", "flush chain inet spa closed",
                             "add table inet spa { flags dormant; }",
                             "delete chain inet spa guard; add chain inet spa guard",
                             "insert rule inet spa closed accept")
            ]
        if setup == Setup(NFT, "accept"):

            def delete_our_rules() -> None:
                """Delete the rules with our comment."""
                listing = host.run("nft", "-a", "list", "chain", "inet", "filter", "input")
                for handle in re.findall(r'comment "spa_server.py.*" # handle (\d+)', listing):
                    host.run("nft", "delete rule inet filter input handle " + handle)

            def reload_host() -> None:
                """Load the host's firewall anew, as its administrator does."""
                host.run("nft", "-f", "-", input="flush ruleset\n" + NFT_HOST)

            return [
                ("flush set",
                 lambda: host.run("nft", "flush set inet filter spa4; flush set inet filter spa6")),
                ("delete our rules", delete_our_rules),
                ("reload", reload_host),
                ("flush chain",
                 lambda: host.run("nft",
                                  "flush chain inet filter input; add rule "
                                  "inet filter input ip6 nexthdr icmpv6 accept")),
            ]
        if setup.mode == "guard":
            commands = [
                ["-t", "mangle", "-F", "FWKNOP_GUARDED"],
                ["-t", "mangle", "-F", "FWKNOP_GUARD"],
                ["-t", "mangle", "-D", "PREROUTING", "-j", "FWKNOP_GUARD"],
                ["-t", "mangle", "-D", "FWKNOP_GUARDED", "1"],
                ["-t", "mangle", "-I", "FWKNOP_GUARDED", "-j", "RETURN"],
                ["-t", "mangle", "-I", "FWKNOP_GUARDED", "-m", "comment", "--comment", "_exp_9",
                 "-j", "RETURN"],  # what is for everybody is no grant
            ]
            everything = ["-t", "mangle"]
        else:
            commands = [["-F", "FWKNOP_INPUT"], ["-D", "INPUT", "-j", "FWKNOP_INPUT"]]
            everything = []

        def flush_everything() -> None:
            """Flush everything, as a firewall script begins."""
            for program in (setup.backend, six(setup.backend)):
                host.run(program, *everything, "-F")
                host.run_code(program, *everything, "-X")  # fails where the guard is back already
            if setup.mode == "accept":
                close_host(host, setup.backend)

        return [
            (" ".join(words), functools.partial(site.iptables, *words)) for words in commands
        ] + [("-F and -X", flush_everything)]

    def test_what_somebody_took_is_put_back(self) -> None:
        """The server notices (by the kernel's events, or a poll for legacy), says so, and mends."""

        def check(setup: Setup) -> None:
            """One backend in one mode, one attack after the other."""
            with OldSite(setup, *ANNOUNCED) as site:
                site.knock_both()
                before = dict(site.listed())
                for name, attack in self.attacks(site):
                    mark = site.server.mark()
                    attack()

                    def mended(mark: int = mark) -> bool:
                        """Return whether all is as before, and the log says so."""
                        log = site.server.log(mark)
                        return site.is_open() and bool(re.search("[Pp]ut(ting)? .*back", log))

                    wait_for(mended, lambda: "%s to be mended after %s; the log:\n%s\n%s" % (
                        setup, name, site.server.log(mark), site.rules()))  # noqa: B023
                    after = dict(site.listed())
                    self.assertEqual(before.keys(), after.keys(), name)
                    for door, expires in after.items():
                        self.assertAlmostEqual(before[door], expires, delta=1, msg=name)
                    self.assertEqual(2, site.count_grants(), name)
                self.assertEqual(0, site.server.stop())
                self.assertTrue(site.all_closed())

        in_parallel(self, SETUPS, check)

    def test_a_change_while_the_last_one_is_mended(self) -> None:
        """The server does not miss it: somebody's changes rarely come alone."""

        def check(setup: Setup) -> None:
            """One backend that announces changes."""
            with OldSite(setup, *ANNOUNCED) as site:
                site.knock_both()
                command = ["nft", "flush set inet spa spa4"]
                if setup.backend != NFT:
                    command = [setup.backend, "-t", "mangle", "-F", "FWKNOP_GUARDED"]
                for milliseconds in range(10, 130, 10):
                    site.host.run(*command)
                    time.sleep(milliseconds / 1000)  # time is the thing: during the server's work
                    site.host.run(*command)
                    # The announcement comes among those of the server's own changes.
                    wait_for(site.is_open, lambda: "what was changed %d ms after the first change; "
                             "the log:\n%s" % (milliseconds, site.server.log()))  # noqa: B023

        in_parallel(self, [Setup(NFT, "guard"), Setup(IPTABLES_NFT, "guard")], check)

    def test_a_flush_in_the_middle_of_the_mending(self) -> None:
        """Somebody deletes a part right after a program has put it back."""

        def check(setup: Setup) -> None:
            """One backend."""
            flush = "nft flush ruleset"
            if setup.backend != NFT:
                flush = "%s -t mangle -F; %s -t mangle -F" % (setup.backend, six(setup.backend))
            with OldSite(setup) as site:
                program, flag = make_programs(
                    site.host, setup.backend, '%(real)s "$@" || exit\n'
                    "if %(changes)s && rm %(flag)s 2>/dev/null; then " + flush + "; fi\n")
                site.server.stop()
                site.server.configure(re.sub("FIREWALL_EXE .*;", "", setup.config())
                                      + "FIREWALL_EXE %s;\n" % program)
                site.server.start()
                site.knock_both()
                write(flag, "")
                site.host.run("sh", "-c", flush)
                wait_for(lambda: not os.path.exists(flag) and site.is_open(), str(setup), 20)

        in_parallel(self, GUARD_SETUPS, check)

    def test_the_hosts_chain_is_away_for_a_while(self) -> None:
        """The server rejects knocks meanwhile; sets and rules come back with the chain."""
        with Site(Setup(NFT, "accept")) as site:
            site.knock_both()
            mark = site.server.mark()
            site.host.run("nft", "delete table inet filter")
            site.server.wait_for("the firewall is not as it should be, trying again", mark)
            site.knock(*TO4, "-A", "tcp/25", expect="nothing was opened: the firewall failed")
            mark = site.server.mark()
            site.host.run("nft", "-f", "-", input=NFT_HOST)
            site.server.wait_for("Put back 2 grants", mark)
            self.assertTrue(site.is_open())
            self.assertEqual(2, len(site.listed()))

    def test_a_chain_that_is_not_there(self) -> None:
        """A start without the chain that NFT_ACCEPT_CHAINS names fails and names it."""
        with Cable() as cable:
            server = Server(cable.server, Setup(NFT, "accept").config())
            code, text = server.command()
            self.assertNotEqual(0, code)
            # nft says "/dev/stdin:1:14-19: Error: No such file or directory", and some kernels
            # answer the question for the rules of a missing chain with an empty list, no error.
            self.assertIn("inet filter input", text)

    def test_our_own_changes_are_not_taken_for_somebodys(self) -> None:
        """The server logs no repair when grants open, extend and end."""

        def check(setup: Setup) -> None:
            """One backend in one mode."""
            with Site(setup) as site:
                for number in range(5):
                    site.knock("-A", "tcp/%d,udp/53" % (100 + number), *TO4, "-f", "1")
                    site.knock(*TO6)
                wait_for(lambda: "tcp/104)" in site.server.log(), "the last to end")
                site.knock(*TO4)
                self.assertNotRegex(site.server.log(), "[Pp]ut(ting)? .*back|Somebody changed")

        in_parallel(self, SETUPS, check)


@needs_firewalls
class FailureTest(unittest.TestCase):
    """A program of the firewall that fails."""

    def test_a_failing_iptables(self) -> None:
        """Nothing opens, the server lives, and the kernel closes what the server can't."""
        seconds = long_enough(2)

        def check(setup: Setup) -> None:
            """One variant in one mode."""
            with Site(setup) as site:
                program, broken = make_programs(site.host, setup.backend)
                site.server.stop()
                config = re.sub("FIREWALL_EXE .*;", "FIREWALL_EXE %s;" % program, setup.config())
                site.server.configure(config)
                site.server.start()
                site.knock(*TO4, "-A", "tcp/24", "-f", str(seconds))
                ends = time.monotonic() + seconds
                with open(broken, "w"):
                    mark = site.server.mark()
                    site.knock(
                        *TO4,
                        expect="[%s] (stanza #1) nothing was opened: the firewall failed" % CLIENT4)
                    site.server.wait_for("failed: no luck", mark)
                    self.assertEqual([False] * 2, site.client.probe(*GRANTED))
                    self.assertNotRegex(site.rules(), "dport 22 .*_exp_")
                    self.assertNotIn(" opened ", site.server.log(mark))
                    site.server.wait_for("trying to close 1 grants again", mark)
                    site.wait_closed(("", SERVER4, 24), latest=ends)
                    mark = site.server.mark()
                    site.server.send_signal(signal.SIGHUP)
                    # Taken for "no time match", the failure would turn self-ending grants off.
                    site.server.wait_for("going on with the old settings", mark)
                os.unlink(broken)
                site.server.wait_for("tcp/24)", mark)
                self.assertEqual(0, site.count_grants(), site.rules())
                site.knock_both()
                self.assertTrue(site.is_open())
                site.server.stop()
                with open(broken, "w"):
                    code, text = site.server.command()
                    self.assertEqual(1, code, text)
                    self.assertIn("failed: no luck", text)

        in_parallel(self, [setup for setup in SETUPS if setup.backend != NFT], check)

    def test_an_iptables_that_hangs(self) -> None:
        """It takes one knock five seconds at most. What it has done counts; what is over meanwhile
        is not opened; and to wait for the lock is not to hang."""

        def has_grants(site: Site, count: int) -> bool:
            """Say whether there are so many; what is over goes in the loop's next turn."""
            return site.count_grants() == count

        def check(setup: Setup) -> None:
            """One variant in one mode."""
            with Site(setup) as site:
                program, hang = make_programs(site.host, setup.backend, HANG)
                site.server.stop()
                config = re.sub("FIREWALL_EXE .*;", "FIREWALL_EXE %s;" % program, setup.config())
                site.server.configure(config)
                site.server.start()
                failed = "nothing was opened: the firewall failed"
                for where, port, seconds, expect, count in (
                        ("before", 22, 2, failed, 0), ("before", 22, 60, " opened ", 1),
                        ("after", 24, 60, " opened ", 2), ("after", 25, 2, failed, 2)):
                    write(hang, where)
                    began, mark = time.monotonic(), site.server.mark()
                    site.knock(*TO4, "-A", "tcp/%d" % port, "-f", str(seconds), expect=expect)
                    self.assertLess(time.monotonic() - began, 5.5)
                    self.assertEqual(expect == failed, failed in site.server.log(mark))
                    wait_for(functools.partial(has_grants, site, count), site.rules())
                self.assertTrue(all(site.client.probe(("", SERVER4, 22), ("", SERVER4, 24))))
                if setup.backend == IPTABLES_LEGACY:
                    site.host.start("flock", "/run/xtables.lock", "sh", "-c",
                                    "echo locked; sleep 0.8").wait_for("locked")
                    mark = site.server.mark()
                    site.knock(*TO6)
                    self.assertNotIn("looking whether", site.server.log(mark))

        in_parallel(self, [setup for setup in SETUPS if setup.backend != NFT], check)

    def test_a_failing_nft(self) -> None:
        """The server logs it and rejects a knock; when nft works again, all is well."""
        with OldSite(Setup(NFT, "guard")) as site:
            program, broken = make_programs(site.host, NFT)
            site.server.stop()
            site.server.configure(site.setup.config() + "FIREWALL_EXE %s;\n" % program)
            site.server.start()
            site.knock(*TO4)
            with open(broken, "w"):
                mark = site.server.mark()
                site.host.run("nft", "delete table inet spa")
                site.server.wait_for("failed: no luck", mark)
                site.knock(*TO6, expect="nothing was opened: the firewall failed")
            os.unlink(broken)
            site.knock(*TO6)
            self.assertTrue(site.is_open())


# Opens many doors in a chain of nft's and in NAT's map, lets `nft` do what the arguments say,
# closes all of them, and prints how many are left.
CLOSE_MANY = """
import ipaddress, subprocess, sys, time
sys.dont_write_bytecode = True
sys.path.insert(0, sys.argv[1])
import spa_server as server
source, target = ipaddress.ip_network("10.55.0.2/32"), ipaddress.ip_address("10.66.0.2")
doors = [server.Door(source, None, "tcp", port) for port in range(1, 250)]
doors += [server.Door(source, None, "tcp", port, server.DNAT, target, 22) for port in range(1, 4)]
log = server.Log()
log.open_stream(sys.stderr)
firewall = server.NftFirewall("nft", server.parse_nft_chains("inet filter input"), frozenset(),
                              [server.SetType(4, 32, False, kind) for kind in ("access", "DNAT")],
                              server.Netlink.open(), log)
firewall.prepare()
ends = time.monotonic() + 300
grants = [server.Grant(door, 0, ends) for door in doors]
for start in range(0, len(grants), 100):
    firewall.add(grants[start:start + 100], [])
assert len(firewall.grants()) == len(grants)
for line in sys.argv[2:]:
    subprocess.check_call(["nft", line])
firewall.remove(grants)
print(len(firewall.grants()))
"""


@needs_firewalls
class CloseManyTest(unittest.TestCase):
    """Many elements of nft's sets, deleted in one transaction."""

    def test_what_is_gone_or_changed_keeps_no_other_open(self) -> None:
        """An element that ended, a set that is gone and a changed target keep no other open."""

        def check(lines: Tuple[str, ...]) -> None:
            """One of them, on hosts of its own."""
            with Cable() as cable:
                close_host(cable.server, NFT)
                self.assertEqual("0\n", cable.server.run(sys.executable, "-I", "-S", "-c",
                                                         CLOSE_MANY, TOP, *lines))

        in_parallel(self, (
            (),
            ("delete element inet filter spa4 { 10.55.0.2 . tcp . 120 }",),
            ("flush chain inet filter input", "delete set inet filter spa4"),
            ("delete element inet spa_nat spa4_dnat { 10.55.0.2 . tcp . 2 }",
             "add element inet spa_nat spa4_dnat { 10.55.0.2 . tcp . 2 : 10.66.0.9 . 23 }"),
        ), check)


# The same for iptables and ip6tables in the mode that the arguments say, with rules of others among
# ours. It also hears what nf_tables announces, and counts the programs that a look takes.
MANY_RULES = """
import ipaddress, subprocess, sys
sys.dont_write_bytecode = True
sys.path.insert(0, sys.argv[1])
import spa_server as server
variant, mode, legacy = sys.argv[2], sys.argv[3], "legacy" in sys.argv[2]
guarded = frozenset([("tcp", 22)] if mode == "guard" else [])
table, chain = ("mangle", "FWKNOP_GUARDED") if guarded else ("filter", "FWKNOP_INPUT")
access = [] if guarded else [
    server.GrantChain(table, chain, "ACCEPT", from_chain="INPUT", position=1)]
log = server.Log()
programs = {4: variant, 6: variant.replace("iptables", "ip6tables")}
firewall = server.IptablesFirewall(programs, legacy, access, guarded, log)
left, runs = firewall.seconds_left, []
for each in firewall.programs.values():
    each.seconds_left = lambda: runs.append(1) or left()
grants = server.Grants(firewall, log)
watch = server.FirewallWatch(grants, log, server.CLOCKS)
watch.events = server.open_netlink_events(12, 7)

def others(*words):
    for program in programs.values():
        subprocess.check_call([program, *words])

def looks(look=grants.restore):
    before = len(runs)
    assert look() is not False
    return len(runs) - before

firewall.prepare()
doors = [server.Door(ipaddress.ip_network(source), None, "tcp", port)
         for port in range(1, 60) for source in ("10.55.0.2/32", "2001:db8::2/128")]
grants.grant(doors[:100], 300)
others("-t", table, "-A", "PREROUTING" if guarded else chain, "-p", "tcp", "-m", "comment",
       "--comment", "theirs", "-j", "RETURN")
grants.grant(doors[100:], 300)
watch.hear()
print("looks", looks(), looks(), looks())
grants.close([grants.live[door] for door in doors[10:80]])
grants.grant(doors[10:12], 300)
print("own changes heard", watch.hear())
print("looks", looks(), looks(watch.restore), looks(watch.restore))
others("-t", "raw", "-N", "THEIRS")
print("changes of another table heard", watch.hear())
print("looks", looks(watch.restore))
others("-t", table, "-N", "THEIRS")
print("a look", looks(watch.restore) > 0)
print("changes of the table heard", watch.hear())
assert {grant.door for grant in firewall.grants()} == set(doors[:12] + doors[80:])
print("theirs", sum("theirs" in line for each in firewall.programs.values()
                    for line in each.list(table)))
others("-t", table, "-F", chain)
grants.restore()
assert {grant.door for grant in firewall.grants()} == set(doors[:12] + doors[80:])
grants.close(list(grants.live.values()))
print("left", len(firewall.grants()), firewall.intact())
"""


@needs_firewalls
class ManyRulesTest(unittest.TestCase):
    """Many rules of iptables: deleted together, put back together, and watched at little cost."""

    def test_many(self) -> None:
        """Ours go, those of others stay; own changes are no reason to look, and no change is one
        program for each IP version."""

        def check(setup: Setup) -> None:
            """One variant in one mode."""
            with Cable() as cable:
                text = cable.server.run(sys.executable, "-I", "-S", "-c", MANY_RULES, TOP, *setup)
                announced = setup.backend == IPTABLES_NFT
                self.assertEqual(
                    ["looks 4 2 2", "own changes heard False",
                     "looks 4 2 0" if announced else "looks 4 2 2",
                     "changes of another table heard False",
                     "looks 0" if announced else "looks 2", "a look True",
                     "changes of the table heard %s" % announced, "theirs 2", "left 0 True"],
                    text.splitlines(), text)

        in_parallel(self, [setup for setup in SETUPS if setup.backend != NFT], check)


@needs_firewalls
class ShapeTest(unittest.TestCase):
    """The texts of rules and elements, and what directives change in them."""

    TIME = (
        r"-m time --datestop \d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?: --utc)? "  # ours, fwknopd has none
    )
    EXPIRES = r"-m comment --comment _exp_\d{10} -j ACCEPT"

    def check_rules(self, config: str, knock: List[str], *lines: str) -> None:
        """Compare the rules of fwknop's kind after a knock with regular expressions for lines."""

        def check(backend: str) -> None:
            """One variant."""
            with Site(Setup(backend, "accept"), config) as site:
                site.knock(*TO4, *knock)
                found = [
                    line
                    for line in site.host.run(backend, "-S").splitlines()
                    if re.search("FWKNOP|MYSPA", line) and not line.startswith("-N ")
                ]
                self.assertEqual(len(lines), len(found), found)
                for line, text in zip(lines, found):
                    line = line.replace("TIME ", self.TIME).replace("EXPIRES", self.EXPIRES)
                    self.assertRegex(text, "^" + line + "$")
                self.assertTrue(site.client.connect(SERVER4, 22).answers())

        in_parallel(self, (IPTABLES_NFT, IPTABLES_LEGACY), check)

    def test_output_rules(self) -> None:
        """ENABLE_IPT_OUTPUT: a second chain for the answers (tests/spec/fwknop.md 3.6)."""
        self.check_rules("ENABLE_IPT_OUTPUT Y;\n", ["-A", "tcp/22,udp/53"],
                         "-A INPUT -j FWKNOP_INPUT", "-A OUTPUT -j FWKNOP_OUTPUT",
                         "-A FWKNOP_INPUT -s 10.55.0.2/32 -p tcp -m tcp --dport 22 TIME EXPIRES",
                         "-A FWKNOP_INPUT -s 10.55.0.2/32 -p udp -m udp --dport 53 TIME EXPIRES",
                         "-A FWKNOP_OUTPUT -d 10.55.0.2/32 -p tcp -m tcp --sport 22 TIME EXPIRES",
                         "-A FWKNOP_OUTPUT -d 10.55.0.2/32 -p udp -m udp --sport 53 TIME EXPIRES")

    def test_destination_rules(self) -> None:
        """ENABLE_DESTINATION_RULE: only the address that was knocked at."""
        self.check_rules(
            "ENABLE_DESTINATION_RULE Y;\nENABLE_IPT_OUTPUT Y;\n", [], "-A INPUT -j FWKNOP_INPUT",
            "-A OUTPUT -j FWKNOP_OUTPUT",
            "-A FWKNOP_INPUT -s 10.55.0.2/32 -d 10.55.0.1/32 -p tcp -m tcp --dport 22 TIME EXPIRES",
            "-A FWKNOP_OUTPUT -s 10.55.0.1/32 -d 10.55.0.2/32 -p tcp -m tcp --sport 22 TIME "
            "EXPIRES")

    def test_prepended_rules(self) -> None:
        """ENABLE_RULE_PREPEND: the last port is first."""
        self.check_rules("ENABLE_RULE_PREPEND Y;\n", ["-A", "tcp/22,udp/53"],
                         "-A INPUT -j FWKNOP_INPUT",
                         "-A FWKNOP_INPUT -s 10.55.0.2/32 -p udp -m udp --dport 53 TIME EXPIRES",
                         "-A FWKNOP_INPUT -s 10.55.0.2/32 -p tcp -m tcp --dport 22 TIME EXPIRES")

    def test_a_chain_of_another_name(self) -> None:
        """IPT_INPUT_ACCESS: its name and position, also one that the chain does not have yet."""
        for position in (2, 99):
            self.check_rules(f"IPT_INPUT_ACCESS ACCEPT, filter, INPUT, {position}, MYSPA, 1;\n", [],
                             '-A INPUT -m comment --comment "spa_server.py" -j MYSPA',
                             "-A MYSPA -s 10.55.0.2/32 -p tcp -m tcp --dport 22 TIME EXPIRES")

    def test_output_rules_let_answers_out(self) -> None:
        """Where the host lets nothing out, they do; a grant is one for fwknopd as well."""

        def check(backend: str) -> None:
            """One variant."""
            with Site(Setup(backend, "accept"), "ENABLE_IPT_OUTPUT Y;\n") as site:
                for program in (backend, six(backend)):
                    site.host.run(program, "-P", "OUTPUT", "DROP")
                site.host.run(six(backend), "-A", "OUTPUT", "-p", "ipv6-icmp", "-j", "ACCEPT")
                site.knock_both()
                self.assertRegex(site.server.log(), "Added OUTPUT rule to FWKNOP_OUTPUT for "
                                 r"10.55.0.2 -> 0.0.0.0/0 tcp/22, expires at \d{10}\n")
                self.assertTrue(site.is_open())
                self.assertEqual(2, len(site.listed()))
                site.server.stop()
                self.assertTrue(site.all_closed())

        in_parallel(self, (IPTABLES_NFT, IPTABLES_LEGACY), check)

    def test_prefixes_destination_and_families(self) -> None:
        """ACCESS_PREFIX4 and 6 open to the network around, a destination rule to one address."""
        inside = [("10.55.0.2", SERVER4, 22), (OTHER4, SERVER4, 22), ("fd55:0:0:1::2", SERVER6, 22)]
        outside = [
            ("10.56.0.2", SERVER4, 22),
            ("fd55:0:0:100::2", SERVER6, 22),
            ("", "10.55.0.9", 22),
            ("", "fd55::9", 22),
            (OTHER4, SERVER4, 24),
        ]

        def check(case: Tuple[Setup, str]) -> None:
            """One backend in one mode, perhaps with tables of one family each."""
            setup, chains = case
            with Site(setup) as site:
                server = site.server
                server.stop()
                if chains:
                    site.host.run("nft", "-f", "-", input="flush ruleset\n" + NFT_HOST_OLD)
                server.configure(setup.config() + chains + "ENABLE_DESTINATION_RULE Y;\n",
                                 STANZA + "ACCESS_PREFIX4 24\nACCESS_PREFIX6 56\n")
                site.client.run(
                    "ip", "-batch", "-", input="""
                    addr add 10.56.0.2/32 dev eth0
                    addr add fd55:0:0:1::2/128 dev eth0 nodad preferred_lft 0
                    addr add fd55:0:0:100::2/128 dev eth0 nodad preferred_lft 0""")
                site.host.run(
                    "ip", "-batch", "-", input="""
                    addr add 10.55.0.9/24 dev eth0
                    addr add fd55::9/64 dev eth0 nodad preferred_lft 0
                    route add 10.56.0.0/24 dev eth0
                    route add fd55:0:0:1::/64 dev eth0
                    route add fd55:0:0:100::/64 dev eth0""")
                server.start()
                self.assertFalse(any(site.client.probe(*inside, *outside)))
                line = site.knock(*TO4)
                self.assertIn("opened 10.55.0.0/24 -> 10.55.0.1 tcp/22", line)
                self.assertIn("opened fd55::/56 -> fd55::1 tcp/22", site.knock(*TO6))
                self.assertEqual([True] * 3, site.client.probe(*inside, seconds=5), site.rules())
                self.assertFalse(any(site.client.probe(*outside)))
                listed = {"10.55.0.0/24 -> 10.55.0.1 tcp/22", "fd55::/56 -> fd55::1 tcp/22"}
                self.assertEqual(listed, set(dict(site.listed())))
                server.stop(signal.SIGKILL)
                server.start()
                self.assertEqual(2, server.log().count("Found access rule in "), server.log())
                server.stop()
                self.assertFalse(any(site.client.probe(*inside, *outside)))

        cases = [(setup, "") for setup in SETUPS]
        cases.append(
            (Setup(NFT, "accept"), "NFT_ACCEPT_CHAINS ip filter input, ip6 filter input;\n"))
        in_parallel(self, cases, check)


# Lets a shell do something often, in pairs, and prints when each began and ended.
FLUSHES = """
import random, subprocess, sys, time
for _ in range(int(sys.argv[1])):
    for longest in sys.argv[2:4]:
        began = time.monotonic()
        subprocess.check_call(["sh", "-c", sys.argv[4]])
        print(began, time.monotonic(), flush=True)
        time.sleep(random.uniform(0.5, 1) * float(longest) if longest == sys.argv[3]
                   else random.uniform(0, float(longest)))
"""

# Sends a SYN to port 22 of each address every few milliseconds, and prints when one was sent that
# got in. With it the longest time so far that this program, too, had to wait on a busy machine.
SYNS = """
import select, socket, sys, time
longest, last = 0, time.monotonic()
while True:
    waiting = [socket.socket(socket.AF_INET6 if ":" in each else socket.AF_INET)
               for each in sys.argv[1:]]
    for each, address in zip(waiting, sys.argv[1:]):
        each.setblocking(False)
        each.connect_ex((address, 22))
    sent = time.monotonic()
    time.sleep(0.003)
    longest, last = max(longest, time.monotonic() - last), time.monotonic()
    for each in select.select([], waiting, [], 0)[1]:
        if not each.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            print(sent, longest, flush=True)
    for each in waiting:
        each.close()
"""


@needs_firewalls
class GuardTest(unittest.TestCase):
    """Packets that the guard drops and accepts, and how long it stays."""

    def test_the_guard_stays_until_it_is_taken_away(self) -> None:
        """It outlives the server; --fw-flush closes grants; --unguard says what it opens."""

        def check(setup: Setup) -> None:
            """One backend."""
            with Site(setup) as site:
                loopback = [("", "127.0.0.1", 22), ("", "::1", 22), *GRANTED]
                self.assertEqual([True] * 4, site.host.probe(*loopback))
                site.knock_both()
                self.assertEqual(
                    {"%s -> 0.0.0.0/0 tcp/22" % CLIENT4, "%s -> ::/0 tcp/22" % CLIENT6},
                    {door for door, _ in site.listed()})
                for end in (signal.SIGKILL, signal.SIGTERM):
                    site.server.stop(end)
                    self.assertEqual(end == signal.SIGTERM, site.all_closed())
                    if end == signal.SIGKILL:
                        self.assertTrue(site.is_open())
                        code, text = site.server.command("--fw-flush")
                        self.assertEqual(0, code, text)
                        self.assertTrue(site.all_closed())
                        site.server.start()
                        site.knock_both()
                self.assertEqual([True] * 4, site.host.probe(*loopback))
                code, text = site.server.command("--unguard")
                self.assertEqual(0, code, text)
                self.assertIn("tcp/22, tcp/24", text)
                self.assertEqual([True] * 6, site.client.probe(*GRANTED, *NOT_GRANTED))
                self.assertNotRegex(site.rules(), r"FWKNOP|\bspa")

        in_parallel(self, GUARD_SETUPS, check)

    def test_a_stranger_gets_in_only_right_after_a_flush(self) -> None:
        """Somebody flushes the firewall 400 times at random moments, in pairs; legacy: 24 times."""

        def check(case: Tuple[Type[Site], Setup]) -> None:
            """One backend; nobody gets in where the server owns the table."""
            kind, setup = case
            window, count, pauses = (1.2, 12, (0.3, 2.4)) if setup.backend == IPTABLES_LEGACY else (
                0.05, 200, (0.05, 0.08))
            flush = "nft flush ruleset"
            if setup.backend != NFT:
                flush = "%s -t mangle -F; %s -t mangle -F" % (setup.backend, six(setup.backend))
            with kind(setup) as site:
                stranger = site.client.start(sys.executable, "-c", SYNS, SERVER4, SERVER6)
                flushes = site.host.start(sys.executable, "-c", FLUSHES, count, *pauses, flush)
                wait_for(lambda: flushes.popen.poll() is not None, "the flushes", 120)
                self.assertTrue(site.all_closed())
                stranger.end(signal.SIGKILL)
                times = [tuple(map(float, line.split())) for line in flushes.output().splitlines()]
                self.assertEqual(2 * count, len(times))
                if kind is Site and OWNED:
                    self.assertEqual("", stranger.output())
                for line in stranger.output().splitlines():
                    sent, waited = map(float, line.split())
                    began, ended = max(pair for pair in times if pair[0] <= sent)
                    # As far as this machine is busy, which the flushes of that second show: they,
                    # and our change that follows, wait for the processors and for the kernel.
                    slow = waited + 2 * max(pair[1] - pair[0] for pair in times
                                            if abs(pair[0] - began) < 1)
                    self.assertLess(sent - ended, window + slow, setup)

        in_parallel(self, [(Site, Setup(NFT, "guard"))] + [
            (OldSite, setup) for setup in GUARD_SETUPS], check)

    def test_a_table_that_the_server_owns(self) -> None:
        """Nobody else can change it while the server lives; a flush takes it from a dead one."""
        flush = "nft", "flush ruleset"
        with Site(Setup(NFT, "guard")) as site:
            site.knock_both()
            for line in ("delete table inet spa", "flush chain inet spa guard",
                         "add element inet spa spa4 { 10.55.0.9 . tcp . 22 }"):
                code, text = site.host.run_code("nft", line)
                self.assertEqual(OWNED, code == 1 and "not permitted" in text, text)
            for _ in range(2):
                site.host.run(*flush)
                wait_for(site.is_open, "both grants")
                site.reload()
            self.assertEqual(not OWNED, "put" in site.server.log(), site.server.log())
            site.server.stop(signal.SIGKILL)
            self.assertTrue(site.is_open())
            site.server.start()
            site.host.run(*flush)
            wait_for(site.is_open, "both grants")
            site.server.stop(signal.SIGKILL)
            site.host.run(*flush)
            self.assertTrue(all(site.client.probe(*NOT_GRANTED)))

    def test_flush_while_the_server_runs(self) -> None:
        """Doors that --fw-flush closes stay closed."""

        def check(setup: Setup) -> None:
            """One backend."""
            with Site(setup, launcher=launcher(*ANNOUNCED)) as site:
                site.knock_both()
                code, text = site.server.command("--fw-flush")
                self.assertEqual(0, code, text)
                end = time.monotonic() + 2
                while time.monotonic() < end:  # time is the thing: they must not be put back
                    self.assertTrue(site.all_closed(), site.server.log())
                site.knock_both()
                self.assertTrue(site.is_open())
                with open(os.path.join(site.server.directory, "run", "fwknopd.pid"), "w"):
                    pass  # as a full disk leaves it
                code, text = site.server.command("--fw-flush")
                self.assertIn("The server has closed all that was open.", text)
                self.assertEqual((0, True), (code, site.all_closed()))

        in_parallel(self, GUARD_SETUPS, check)

    def test_connections_from_before_the_guard(self) -> None:
        """Connections live on, also if the kernel tracked none until the guard asked for it.

        Idle ones, of which the client says the next word; and their address opens nothing new.
        """

        def check(setup: Setup) -> None:
            """One backend."""
            with Cable() as cable:
                cable.server.listen(22)
                idle = [cable.client.connect(address, 22) for address in (SERVER4, SERVER6)]
                Server(cable.server, setup.config()).start()
                for connection in idle:
                    self.assertTrue(connection.answers())
                self.assertFalse(cable.client.reaches(SERVER4, 22))
                self.assertFalse(cable.client.reaches(SERVER6, 22))

        in_parallel(self, GUARD_SETUPS, check)

    def test_the_guard_needs_nothing_of_the_host(self) -> None:
        """The guard stands, and comes back, while a chain of the host's is missing."""
        config = "FIREWALL_TYPE nft;\nGUARD_PORTS tcp/22;\nNFT_ACCEPT_CHAINS inet filter input;\n"
        with Cable() as cable:
            cable.server.listen(22)
            server = Server(cable.server, config, launcher=launcher(OLD_KERNEL))
            code, text = server.command()
            self.assertEqual(1, code, text)
            self.assertIn("inet filter input", text)
            self.assertIn("Closed to everybody from now on, until a server runs or --unguard: "
                          "tcp/22", text)
            self.assertFalse(cable.client.reaches(SERVER4, 22))
            cable.server.run("nft", "-f", "-", input=NFT_HOST)
            server.start()
            cable.server.run("nft", "delete table inet filter")
            cable.server.run("nft", "delete table inet spa")
            wait_for(lambda: not cable.client.reaches(SERVER4, 22), "the guard")
            server.wait_for("the firewall is not as it should be")
            time.sleep(4)  # time is the thing: it must not go round in circles
            self.assertLess(server.log().count("the firewall is not as it should be"), 7)
            cable.server.run("nft", "-f", "-", input=NFT_HOST)
            listing = ("nft", "list table inet filter")
            wait_for(lambda: "@spa4" in cable.server.run(*listing), "the rule")
            self.assertEqual(0, server.stop())

    def test_all_tables_or_none(self) -> None:
        """The server undoes a grant in the guard when the host's table fails."""

        def check(setup: Setup) -> None:
            """One backend; its accept rules have a target that there is not."""
            access = "IPT_INPUT_ACCESS NOSUCHTARGET, filter, INPUT, 1, FWKNOP_INPUT, 1;\n"
            with Site(setup, access) as site:
                site.knock(*TO4, expect="nothing was opened: the firewall failed")
                self.assertEqual(0, site.count_grants(), site.rules())
                self.assertTrue(site.all_closed())

        in_parallel(self, [setup for setup in GUARD_SETUPS if setup.backend != NFT], check)

    def test_a_reload_without_a_place_for_a_grant(self) -> None:
        """The reload closes the grant and says so; the server goes on."""
        with Site(Setup(NFT, "guard"), access=STANZA + "ACCESS_PREFIX4 24\n") as site:
            site.knock_both()
            mark = site.server.mark()
            site.server.configure(access=STANZA)
            site.server.send_signal(signal.SIGHUP)
            site.server.wait_for("the new settings have no place for it", mark)
            wait_for(lambda: not site.client.reaches(SERVER4, 22), "a closed port")
            self.assertTrue(site.client.reaches(SERVER6, 22))
            site.knock(*TO4)
            self.assertTrue(site.client.reaches(SERVER4, 22))
            self.assertNotIn("not as it should be", site.server.log(mark))

    def test_a_reload_that_fails_half_way(self) -> None:
        """The old sockets stay, and no guard stays that no knock opens."""
        accept = "FIREWALL_TYPE nft;\nNFT_ACCEPT_CHAINS inet filter input;\n"
        with Cable() as cable:
            cable.server.listen(22)
            close_host(cable.server, NFT)
            server = Server(cable.server, accept).start()
            mark = server.mark()
            server.configure(config=accept.replace("input", "inptu")
                             + "GUARD_PORTS tcp/22;\nPCAP_FILTER udp port 5000;\n")
            server.send_signal(signal.SIGHUP)
            server.wait_for("going on with the old settings", mark)
            self.assertNotIn("table inet spa", cable.server.run("nft", "list ruleset"))
            server.knock(cable.client, "-A", "tcp/22", *TO4)
            self.assertTrue(cable.client.reaches(SERVER4, 22))

    def test_a_reload_from_one_backend_to_the_other(self) -> None:
        """The reload moves guard and grants, both ways; nft's socket stays whatever its port."""
        seconds = str(long_enough(2))
        with Site(Setup(IPTABLES_NFT, "guard")) as site:
            for setup in (Setup(NFT, "guard"), Setup(NFT, "guard"), Setup(IPTABLES_NFT, "guard")):
                site.knock_both()
                site.server.configure(config=setup.config())
                site.reload()
                wait_for(site.is_open, "the grants in " + setup.backend)
                self.assertNotIn("descriptor", site.server.log())
                site.knock(*TO4, "-A", "tcp/24", "-f", seconds)
                self.assertTrue(site.client.reaches(SERVER4, 24))
                site.wait_closed(("", SERVER4, 24))

    def test_a_reload_to_another_chain(self) -> None:
        """The reload moves the grants, and leaves nothing in the old chain."""
        chain = "IPT_INPUT_ACCESS ACCEPT, %s, 1, FWKNOP_INPUT, 1;\n"

        def check(setup: Setup) -> None:
            """One backend; the new chain has the same name in another table."""
            with Site(setup, chain % "filter, INPUT") as site:
                site.knock_both()
                site.server.configure(config=setup.config() + chain % "mangle, PREROUTING")
                site.reload()
                for program in (setup.backend, six(setup.backend)):
                    self.assertNotIn("FWKNOP", site.host.run(program, "-S"))
                    self.assertIn("_exp_", site.host.run(program, "-t", "mangle", "-S"))
                self.assertEqual(0, site.server.stop())
                self.assertNotIn("FWKNOP", site.rules())

        in_parallel(self, [setup for setup in ACCEPT_SETUPS if setup.backend != NFT], check)

    def test_a_chain_that_is_not_there(self) -> None:
        """The error names the directive and the chain, and says what to do."""
        with Cable() as cable:
            server = Server(cable.server, "NFT_ACCEPT_CHAINS inet filter input;\n")
            code, text = server.command()
            self.assertEqual(1, code)
            self.assertIn("NFT_ACCEPT_CHAINS: there is no chain inet filter input", text)
            self.assertIn("start after the service that makes it", text)

    def test_a_broken_iptables_beside_nft(self) -> None:
        """The server starts and --unguard works, since neither runs iptables."""
        with Cable() as cable:
            cable.server.listen(22)
            directory = cable.server.path("programs")
            os.mkdir(directory)
            ran = os.path.join(directory, "ran")
            for name in ("iptables", "iptables-restore", "ip6tables", "ip6tables-restore"):
                write(os.path.join(directory, name),
                      "#!/bin/sh\n: >%s\necho no luck >&2\nexit 1\n" % ran, 0o755)
            path = "PATH=%s:%s" % (directory, os.environ["PATH"])
            server = Server(cable.server, "FIREWALL_TYPE nft;\nGUARD_PORTS tcp/22;\n",
                            launcher=["env", path]).start()
            self.assertFalse(cable.client.reaches(SERVER4, 22))
            server.stop()
            code, text = cable.server.run_code("env", path, *SPA_SERVER, *server.files, "--unguard")
            self.assertEqual(0, code, text)
            self.assertIn("The guard is gone", text)
            self.assertTrue(cable.client.reaches(SERVER4, 22))
            self.assertFalse(os.path.exists(ran))

    def test_two_chains_of_one_table(self) -> None:
        """Both chains share their sets; a clean stop removes rules and sets."""
        host = NFT_HOST.replace("chain input", "chain first {\n}\nchain input", 1)
        with Cable() as cable:
            cable.server.run("nft", "-f", "-", input=host)
            config = "NFT_ACCEPT_CHAINS inet filter input, inet filter first;\n"
            server = Server(cable.server, "FIREWALL_TYPE nft;\n" + config).start()
            server.knock(cable.client, "-A", "tcp/22", *TO4)
            self.assertEqual(0, server.stop(), server.log())
            self.assertNotIn("spa", cable.server.run("nft", "list ruleset"))

    def test_flush_of_what_somebody_added(self) -> None:
        """--fw-flush closes an element without an end as well."""
        with OldSite(Setup(NFT, "guard")) as site:
            for running in (True, False):
                site.host.run("nft", "add element inet spa spa4 { %s . tcp . 22 }" % CLIENT4)
                self.assertTrue(site.client.reaches(SERVER4, 22))
                code, text = site.server.command("--fw-flush")
                self.assertEqual(0, code, text)
                wait_for(lambda: not site.client.reaches(SERVER4, 22), "a closed port")
                if running:
                    site.server.stop()

    def test_a_guard_from_earlier_settings(self) -> None:
        """The start warns of it, and --unguard removes it whatever the settings are now."""

        def check(setup: Setup) -> None:
            """One backend."""
            with Site(setup) as site:
                site.server.stop()
                program = "/usr/sbin/" + setup.backend if setup.backend != NFT else "/usr/sbin/nft"
                other = "FIREWALL_TYPE iptables;\n"
                if setup.backend != NFT:
                    other += "FIREWALL_EXE %s;\n" % program
                site.server.configure(config=other)
                site.server.start()
                site.server.wait_for("A guard from earlier settings still closes ports")
                self.assertFalse(site.client.reaches(SERVER4, 22))
                site.server.stop()
                code, text = site.server.command("--unguard")
                self.assertEqual(0, code, text)
                self.assertIn("The guard is gone", text)
                self.assertTrue(site.client.reaches(SERVER4, 22))
                self.assertTrue(site.client.reaches(SERVER6, 22))
                self.assertIn("There is no guard.", site.server.command("--unguard")[1])

        in_parallel(self, GUARD_SETUPS, check)

    def test_unguard_while_the_server_runs(self) -> None:
        """--unguard does what it says, or refuses."""

        def check(setup: Setup) -> None:
            """One backend."""
            with Site(setup, launcher=launcher(*ANNOUNCED)) as site:
                code, text = site.server.command("--unguard")
                end = time.monotonic() + 2
                while code == 0 and time.monotonic() < end:  # time is the thing
                    self.assertTrue(site.client.reaches(SERVER4, 22, seconds=1), text)
                if setup.backend == NFT and OWNED:
                    other = ("-r", site.host.path("other"))
                    owner = (r"table inet spa belongs to \S+ \(pid=%d\)"
                             % site.server.running().popen.pid)
                    for option in ("--unguard", "--guard"):
                        code, text = site.server.command(option, *other)
                        self.assertEqual(1, code, text)
                        self.assertRegex(text, owner + "(?s:.*)kill PID ends that server")

        in_parallel(self, GUARD_SETUPS, check)

    def test_translated_and_routed(self) -> None:
        """The guard comes before destination NAT, and lets be what is only routed through.

        All addresses of this host are guarded, whatever interface or routing table they stand in.
        """

        def check(setup: Setup) -> None:
            """One backend."""
            gateway = Gateway()
            config = "GUARD_PORTS tcp/22, tcp/24, tcp/2222, tcp/8080;\n"
            with Site(setup, config, cable=gateway) as site:
                gateway.inner.listen(22)
                redirect(site)
                translated = [("", SERVER4, 2222), ("", SERVER4, 8080)]
                self.assertEqual(
                    [True] * 2,
                    site.client.probe(("", INNER4, 22), ("", INNER6, 22), seconds=10),
                    "routed")
                self.assertFalse(any(site.client.probe(*translated, ("", SERVER4, 22))))
                site.knock("-A", "tcp/2222,tcp/8080", *TO4)
                self.assertEqual([True] * 2, site.client.probe(*translated, seconds=10))
                for port in (2222, 8080):
                    self.assertTrue(site.client.connect(SERVER4, port).answers())
                self.assertFalse(any(site.client.probe(
                    ("", SERVER4, 22), (OTHER4, SERVER4, 8080), ("", GATE4, 22), ("", GATE6, 22))))
                for version, address in (("-4", SERVER4), ("-6", SERVER6)):
                    site.host.run("ip", version, "-batch", "-", input=POLICY_ROUTE.format(address))
                self.assertFalse(any(site.client.probe(*GRANTED)))
                site.knock_both()
                self.assertEqual([True] * 3, site.client.probe(
                    *GRANTED, ("", SERVER4, 2222), seconds=10))
                self.assertFalse(any(site.client.probe(*NOT_GRANTED)))

        in_parallel(self, GUARD_SETUPS, check)


@needs_firewalls
class BrakeTest(unittest.TestCase):
    """The needs, texts and leftovers of --fw-flush, --unguard and --guard."""

    NAT = ("ENABLE_IPT_FORWARDING Y;\nENABLE_IPT_LOCAL_NAT Y;\nENABLE_IPT_SNAT Y;\n"
           "ENABLE_IPT_OUTPUT Y;\nIPT_INPUT_ACCESS ACCEPT, filter, INPUT, 1, MINE, 1;\n"
           "NFT_FORWARD_CHAINS inet filter forward;\nNFT_ACCEPT_CHAINS inet filter input;\n")

    @staticmethod
    def state(site: Site) -> List[str]:
        """Return the rules of all backends, and what holds them; none of an empty table."""
        texts = [site.host.run("nft", "list ruleset")]
        for program in (IPTABLES_LEGACY, six(IPTABLES_LEGACY)):
            texts.append(site.host.run(program + "-save"))
        lines = "\n".join(texts).splitlines()
        return [re.sub(r" (packets|bytes) \d+", "", line) for line in lines
                if re.search(r"^-[AN]|^\t\t(?!type )\S|chain [a-z]|FWKNOP|spa|MINE", line)]

    def test_nothing_is_left(self) -> None:
        """--fw-flush and --unguard need no readable file, and leave the host's own rules."""

        def check(setup: Setup) -> None:
            """One backend in one mode, with NAT and a chain that only its jump tells of."""
            with Cable() as cable:
                close_host(cable.server, setup.backend)
                cable.server.run("iptables-legacy", "-t", "mangle", "-N", "THEIRS")
                site = Site.__new__(Site)
                site.setup, site.cable, site.host, site.client = (
                    setup, cable, cable.server, cable.client)
                before = self.state(site)
                config = setup.config().replace("NFT_ACCEPT_CHAINS inet filter input;\n", "")
                site.server = Server(cable.server, config + self.NAT).start()
                site.knock(*TO4)
                site.knock(*TO6)
                site.knock(*TO4, "-A", "tcp/80", "-N", "10.66.0.2,22")
                self.assertNotEqual(before, self.state(site))
                site.server.stop(signal.SIGKILL)
                site.server.configure("GUARD_PORTS what;\nno value\n", "%include /none\n")
                files = ["-c", "/none", *site.server.files[-2:]]
                code, text = site.server.command("--fw-flush")
                self.assertEqual(0, code, text)
                self.assertEqual(0, site.count_grants(), text)
                guard = setup.mode == "guard"
                self.assertEqual(guard, "The guard stays until --unguard" in text, text)
                code, more = site.host.run_code(*SPA_SERVER, *files, "--unguard")
                self.assertEqual(0, code, more)
                self.assertIn("The guard is gone." if guard else "There is no guard.", more)
                self.assertEqual(before, self.state(site), text + more)
                code, text = site.host.run_code(*SPA_SERVER, *files, "--fw-flush")
                self.assertEqual((0, ["Deleting any existing firewall rules...",
                                      "Nothing is open now."]), (code, text.splitlines()[-2:]))

        in_parallel(self, SETUPS, check)

    def test_a_guard_before_the_network(self) -> None:
        """--guard needs no network and no access.conf; a server adopts it, and nobody gets in."""

        def check(setup: Setup) -> None:
            """One backend."""
            with Cable() as cable:
                host, client = cable.server, cable.client
                host.listen(22)
                server = Server(host, setup.config(), "%include /none\n")
                self.assertTrue(client.reaches(SERVER4, 22))
                cable.unplug()
                closed = (0, "Closed to everybody without a grant: tcp/22, tcp/24\n")
                self.assertEqual(closed, server.command("--guard"))
                cable.plug()
                stranger = client.start(sys.executable, "-c", INTRUDER, OTHER4, SERVER4, OTHER6,
                                        SERVER6)
                stranger.wait_for("knocks")
                self.assertFalse(any(client.probe(*GRANTED)))
                server.configure(access=STANZA)
                server.start()
                for where, target in ((TO4, GRANTED[0]), (TO6, GRANTED[1])):
                    server.knock(client, "-A", "tcp/22", *where)
                    self.assertTrue(client.reaches(target[1], 22))
                code, text = server.command("--guard")
                self.assertEqual(0, code, text)
                self.assertEqual("A server is running (pid=%d). %s"
                                 % (server.running().popen.pid, closed[1]), text)
                server.stop(signal.SIGKILL)
                self.assertEqual(closed, server.command("--guard"))
                self.assertTrue(all(client.probe(*GRANTED)), "a guard that is put up again")
                server.command("--fw-flush")
                self.assertFalse(any(client.probe(*GRANTED)))
                self.assertEqual("knocks\n", stranger.output())
                server.command("--unguard")
                stranger.wait_for("got in to " + SERVER4)
                stranger.wait_for("got in to " + SERVER6)

        in_parallel(self, GUARD_SETUPS, check)

    def test_no_guard_to_put_up(self) -> None:
        """--guard refuses: no GUARD_PORTS, a broken fwknopd.conf, a server without a guard."""
        with Cable() as cable:
            server = Server(cable.server, "FIREWALL_TYPE iptables;\n").start()
            for config, expected, message in (
                    ("", 3, "the ports that --guard closes\nhint: set GUARD_PORTS tcp/22 in /"),
                    ("GUARD_PORTS 22;\n", 3, "fwknopd.conf:1: GUARD_PORTS: expected"),
                    ("GUARD_PORTS tcp/22;\n", 1, "is running (pid=")):
                server.configure(config)
                code, text = server.command("--guard")
                self.assertEqual(expected, code, text)
                self.assertIn(message, text)
                self.assertNotRegex(cable.server.run("nft", "list ruleset"), "inet spa|_GUARD")

    def test_a_kernel_without_the_time_match(self) -> None:
        """auto takes nftables where it does all that is set; else the start says what a kill leaves
        open, and --fw-flush closes it."""
        refuse = ('#!/bin/sh\ntext=$(cat)\ncase "$text" in *"-m time"*) exit 2;; esac\n'
                  'echo "$text" | exec %s "$@"\n')

        def check(config: str) -> None:
            """One configuration; only that with GUARD_PORTS alone can be had from nftables."""
            with Cable() as cable:
                cable.server.listen(22)
                directory = cable.server.path("programs")
                os.mkdir(directory)
                for name in ("iptables-nft", "ip6tables-nft"):
                    real = str(shutil.which(name + "-restore"))
                    os.symlink(str(shutil.which(name)), os.path.join(directory, name))
                    write(os.path.join(directory, name + "-restore"), refuse % real, 0o755)
                program = "FIREWALL_EXE %s/iptables-nft;\nGUARD_PORTS tcp/22;\n" % directory
                server = Server(cable.server, program + config).start()
                says = "what is open when this server is killed stays open"
                self.assertEqual((not config, bool(config)), (
                    "has no time match, so that" in server.log(), says in server.log()))
                server.knock(cable.client, "-A", "tcp/22", "-f", "3", *TO4)
                expires = time.time() + 3
                server.stop(signal.SIGKILL)
                if config:
                    while time.time() < expires + 1.5:  # time is the thing
                        self.assertTrue(cable.client.reaches(SERVER4, 22, seconds=5))
                    code, text = server.command("--fw-flush")
                    self.assertEqual(0, code, text)
                wait_for(lambda: not cable.client.reaches(SERVER4, 22), "a closed port", 5)

        in_parallel(self, ("", "FIREWALL_TYPE iptables;\n", "ENABLE_IPT_OUTPUT Y;\n"), check)

    def test_rules_of_the_host_that_are_in_the_way(self) -> None:
        """The start tells of drops in another backend, and of rules that stop tracking."""
        guard, accept = Setup(NFT, "guard"), Setup(IPTABLES_NFT, "accept")
        legacy = Setup(IPTABLES_LEGACY, "accept")
        raw = ("-t", "raw", "-A", "PREROUTING", "-p", "tcp", "-j")
        untracked = "turn connection tracking off (%s)"
        nft_raw = ("nft", "add table inet t; add chain inet t pre { type filter hook prerouting "
                   "priority raw; }; add rule inet t pre tcp dport 22 notrack")

        def check(case: Tuple[Setup, Tuple[str, ...], str]) -> None:
            """Compare the log of a start after one command."""
            setup, command, expected = case
            with Cable() as cable:
                cable.server.run(*command)
                log = Server(cable.server, setup.config()).start().log()
                said = re.findall("connection tracking off|as well, and no knock", log)
                self.assertEqual(bool(expected), bool(said), log)
                self.assertIn(expected, log)

        in_parallel(self, (
            (guard, nft_raw, untracked % "t pre"),
            (guard, ("iptables-nft", *raw, "CT", "--notrack"), untracked % "raw PREROUTING"),
            (guard, ("ip6tables-nft", *raw, "NOTRACK"), untracked % "raw PREROUTING"),
            (guard, ("iptables-nft", *raw, "CT", "--zone", "1"), ""),
            (guard, ("ip6tables-legacy", *raw, "CT", "--notrack"),
             untracked % "raw of iptables-legacy"),
            (accept, nft_raw, ""),
            (accept, ("iptables-legacy", "-P", "INPUT", "DROP"),
             "firewall (iptables-legacy filter INPUT) closes tcp/22 as well"),
            (accept, ("iptables-legacy", "-A", "INPUT", "-i", "lo", "-j", "ACCEPT"), ""),
            (legacy, ("nft", "add table ip h; add chain ip h in { type filter hook input priority "
                      "0; policy drop; }"), "firewall (ip h in) closes tcp/22 as well")), check)

    def test_a_chain_in_a_table_that_has_an_owner(self) -> None:
        """The start says whose table it is, and that the guard needs nothing of it."""
        with Cable() as cable:
            fifo = cable.server.path("fifo")
            os.mkfifo(fifo)
            cable.server.start("sh", "-c", "exec nft -i < " + fifo)
            with open(fifo, "w") as file:
                file.write("table inet t { flags owner; chain input { type filter hook input "
                           "priority 0; policy drop; }; }\n")
                file.flush()
                listing = ("nft", "list ruleset")
                wait_for(lambda: "chain input" in cable.server.run(*listing), "a table")
                server = Server(cable.server, "NFT_ACCEPT_CHAINS inet t input;\n")
                code, text = server.command()
            self.assertEqual(1, code, text)
            self.assertRegex(text, r"table inet t belongs to nft \(pid=\d+\), and nobody else can")
            self.assertIn("use GUARD_PORTS", text)


# Deliver an address by another table than `local`, as policy routing and VRFs do.
POLICY_ROUTE = """rule add pref 5 lookup 100
route add local {0} dev eth0 table 100
route del local {0} dev eth0 table local
"""


def redirect(site: Site) -> None:
    """Let the host's firewall send port 2222 to 22, and 8080 to the third host, as Docker does."""
    if site.setup.backend == NFT:
        site.host.run(
            "nft", "-f", "-",
            input="table ip nat { chain prerouting { type nat hook prerouting "
            "priority dstnat; tcp dport 2222 redirect to :22; tcp dport 8080 dnat to 10.66.0.2:22; "
            "}; }")
        return
    for port, target in ((2222, ["REDIRECT", "--to-ports", "22"]),
                         (8080, ["DNAT", "--to-destination", "10.66.0.2:22"])):
        site.host.run(site.setup.backend, "-t", "nat", "-A", "PREROUTING", "-d", SERVER4, "-p",
                      "tcp", "--dport", port, "-j", *target)


if __name__ == "__main__":
    unittest.main()
