"""What a knock sequence opens: a stanza's grant, the packet that has to follow, a door's commands.

test_knock.py shows which packets complete a sequence. The firewall is a fake; the commands of
knockd's doors are small scripts that really run.
"""

import ipaddress
import os
import subprocess
import unittest
from typing import Any, List  # noqa: F401  (in type comments)
from unittest import mock

import spa_server as server
from tests.support import TIMEOUT, wait_for
from tests.test_commands import CommandCase
from tests.test_knock import ACK, ONE, SYN, TCP, knock
from tests.test_server import CLIENT, HOST, KEYS, ServerCase

SEQUENCE = "KNOCK_SEQUENCE 7000,9000,8000\n"
ALL_THREE = (7000, 9000, 8000)
KEYLESS = "SOURCE ANY\nOPEN_PORTS tcp/22\n" + SEQUENCE
KEYED = "SOURCE ANY\n" + KEYS
OPENED = "10.55.0.2 -> 0.0.0.0/0 tcp/22"


class KnockCase(CommandCase):
    """A server for sequences, whose address is HOST, and knock packets to it."""

    def serve_for(self, access: str = "", knockd: str = "", conf: str = "") -> server.Server:
        """Return a server for an access.conf, a knockd.conf, or both."""
        self.made = ServerCase.serve(self, access or KEYED, conf)
        self.addCleanup(self.end_all, self.made)
        for name in ("open_captures", "open_knock_captures"):
            sockets = mock.patch.object(server, name, return_value=[])
            sockets.start()
            self.addCleanup(sockets.stop)
        configuration = self.made.configuration
        if knockd:
            path = os.path.join(self.directory, "knockd.conf")
            with open(path, "w") as stream:
                stream.write(knockd)
            configuration = configuration._replace(knockd=server.read_knockd(path))
        if not access:
            configuration = configuration._replace(stanzas=[])
        self.made.configuration = configuration
        self.made.gate.configure(configuration)
        self.made.knocks.configure(configuration)
        self.made.knocks.own_until = float("inf")
        for text in (HOST, "fd55::1"):
            self.made.knocks.own[ipaddress.ip_address(text).packed] = True
        return self.made

    def hit(self, *ports: Any, source: str = CLIENT, destination: str = "",
            flags: int = SYN) -> str:
        """Hit these ports, and return what the server logged."""
        for port in ports:
            protocol, number = port if isinstance(port, tuple) else (TCP, port)
            self.made.knocks.take_knock(server.Datagram(
                b"", ipaddress.ip_address(source).packed, 0, ipaddress.ip_address(
                    destination or (HOST if "." in source else "fd55::1")).packed,
                number, protocol, flags if protocol == TCP else 0), list(self.made.knocks.owners))
        return self.logged()


class StanzaTest(KnockCase):
    """A sequence is one more way to a grant."""

    def test_memory_is_shared(self) -> None:
        """Many sequences remember less each, and never too little."""
        for count, most in ((1, server.MAX_ATTEMPTS), (4, server.MAX_ATTEMPTS // 4),
                            (20, server.LEAST_ATTEMPTS)):
            made = self.serve_for(KEYLESS * count)
            self.assertEqual([most] * count, [each.most for each in made.knocks.owners])

    def test_opens(self) -> None:
        """OPEN_PORTS, for as long as the stanza says, by the firewall; both families."""
        made = self.serve_for(KEYLESS + "OPEN_PORTS udp/53,tcp/22\nFW_ACCESS_TIMEOUT 7\n")
        self.assertEqual("", self.hit(*ALL_THREE[:2]))
        text = self.hit(ALL_THREE[2])
        self.assertEqual([OPENED, OPENED.replace("tcp/22", "udp/53")], self.firewall.doors())
        self.assertIn("10.55.0.2: (stanza #1): Stage 3\n10.55.0.2: (stanza #1): OPEN SESAME\n",
                      text)
        self.assertIn("(stanza #1) a knock sequence opened %s, %s for 7 seconds\n" % (
            OPENED, OPENED.replace("tcp/22", "udp/53")), text)
        self.hit(*ALL_THREE, source="fd55::2")
        self.assertIn("fd55::2 -> ::/0 tcp/22", self.firewall.doors())
        with open(server.openers_file(made.settings)) as stream:
            self.assertIn("\tstanza #1, a knock sequence\n", stream.read())
        self.clock.pass_seconds(7)
        made.grants.expire()
        self.assertEqual({}, self.firewall.rules)

    def test_policy(self) -> None:
        """SOURCE, DESTINATION, expiry, prefixes, flags and foreign addresses."""
        for lines, source, expected in (
                ("SOURCE 10.55.0.0/24\n", CLIENT, [OPENED]), ("SOURCE 10.56.0.0/24\n", CLIENT, []),
                ("SOURCE ANY\nDESTINATION 10.55.0.1\n", CLIENT, [OPENED]),
                ("SOURCE ANY\nDESTINATION 10.55.0.9\n", CLIENT, []),
                ("SOURCE ANY\nACCESS_EXPIRE_EPOCH 1000\n", CLIENT, []),
                ("SOURCE ANY\nACCESS_PREFIX4 24\n", CLIENT, ["10.55.0.0/24 -> 0.0.0.0/0 tcp/22"]),
                ("SOURCE fd55::/16\n", "fd55::2", ["fd55::2 -> ::/0 tcp/22"])):
            with self.subTest(lines=lines):
                self.firewall.rules = {}
                self.serve_for(lines + "OPEN_PORTS tcp/22\n" + SEQUENCE)
                text = self.hit(*ALL_THREE, source=source)
                self.assertEqual(expected, self.firewall.doors())
                if not expected:
                    self.assertRegex(text, "No access data found for source IP|has expired")
        self.firewall.rules = {}
        self.serve_for(KEYLESS)
        self.hit(*ALL_THREE, flags=SYN | ACK)
        self.made.knocks.own[ipaddress.ip_address("10.55.0.77").packed] = False
        self.hit(*ALL_THREE, destination="10.55.0.77")
        self.hit(*ALL_THREE[:2])
        self.hit(1, ALL_THREE[2])
        self.assertEqual([], self.firewall.doors())

    def test_expired_stanzas_and_strangers_use_up_no_line(self) -> None:
        """Who is not in SOURCE is rejected before a one-time sequence is marked."""
        path = os.path.join(self.directory, "codes")
        with open(path, "w") as stream:
            stream.write(" 1,3,2\n 4,6,5\n")
        self.serve_for("SOURCE 10.55.0.2\nOPEN_PORTS tcp/22\nKNOCK_ONE_TIME_FILE %s\n" % path)
        text = self.hit(1, 3, 2, source="10.55.0.3")
        self.assertIn("No access data found for source IP: 10.55.0.3", text)
        self.assertNotIn("SESAME", text)
        self.assertEqual(" 1,3,2\n 4,6,5\n", self.read("codes"))
        self.assertIn("SESAME", self.hit(1, 3, 2))
        self.assertEqual("#1,3,2\n 4,6,5\n", self.read("codes"))
        self.assertEqual([OPENED], self.firewall.doors())
        self.firewall.rules = {}
        self.made.grants.live.clear()
        self.assertEqual("", self.hit(1, 3, 2))
        with open(path, "w") as stream:
            stream.write("changed\n")
        self.assertIn("(stanza #1): nothing is opened: %s: somebody changed it" % path,
                      self.hit(4, 6, 5))
        self.assertEqual([], self.firewall.doors())
        with open(path, "w") as stream:
            stream.write("#1,3,2\n 4,6,5\n")
        self.assertIn("no more sequences left in the one time sequences file for door (stanza #1) "
                      "--> disabling the door\n", self.hit(4, 6, 5))
        self.assertEqual([OPENED], self.firewall.doors())
        self.assertEqual("", self.hit(4, 6, 5))

    def test_beside_keys(self) -> None:
        """Packets for other stanzas go on; a keyless stanza takes none."""
        for order in ((KEYLESS, KEYED), (KEYED, KEYLESS)):
            self.firewall.rules = {}
            self.serve_for("".join(order))
            self.assertIn("opened 10.55.0.2 -> 0.0.0.0/0 tcp/23", self.knock("10.55.0.2,tcp/23"))
            self.assertIn("a knock sequence opened " + OPENED, self.hit(*ALL_THREE))
        self.serve_for(KEYLESS)
        self.assertIn("No access data found for source IP", self.knock())

    def test_require_knock(self) -> None:
        """The sequence, then the packet, from the same address, and in time."""
        made = self.serve_for(KEYED + SEQUENCE + "REQUIRE_KNOCK Y\nREQUIRE_USERNAME bob\n")
        refused = "No knock sequence came before the packet (REQUIRE_KNOCK).\n"
        self.assertIn(refused, self.knock())
        self.assertIn("OPEN SESAME", self.hit(*ALL_THREE))
        self.assertEqual({}, self.firewall.rules)
        self.assertIn(refused, self.knock(source="10.55.0.3"))
        self.assertIn("does not match required username", self.knock(user="joe"))
        self.assertIn("user 'bob' (client 3.0.0) opened " + OPENED, self.knock())
        self.assertIn(refused, self.knock("10.55.0.2,tcp/23"))  # one packet for a knock
        self.hit(*ALL_THREE)
        self.assertIn(refused, self.knock("66.66.66.66,tcp/23"))  # opens to who has knocked alone
        self.clock.pass_seconds(25.1)
        self.assertIn(refused, self.knock("10.55.0.2,tcp/24"))
        self.hit(*ALL_THREE)
        self.assertIn(" opened ", self.knock("10.55.0.2,tcp/25"))
        self.assertIn(refused, self.knock("10.55.0.2,tcp/26"))
        self.assertEqual(6, made.tally.counts["no knock"])

    def test_a_packet_that_overtakes_the_last_hit(self) -> None:
        """What waits in the sockets for knocks is taken before the packet is rejected."""
        made = self.serve_for(KEYED + SEQUENCE + "REQUIRE_KNOCK Y\n")
        self.hit(*ALL_THREE[:2])
        waiting = [knock(ALL_THREE[2])]
        capture = mock.Mock(spec=server.KnockCapture, sequences=list(made.knocks.owners),
                            waiting=None, is_fair=False,
                            batch_seconds=server.Capture.batch_seconds)
        capture.receive.side_effect = lambda: waiting.pop() if waiting else self.nothing()
        made.captures.append(capture)
        self.assertIn(" opened ", self.knock())
        self.assertEqual([], waiting)

    @staticmethod
    def nothing() -> None:
        """A socket in which nothing waits."""
        raise BlockingIOError

    def test_require_knock_is_bounded(self) -> None:
        """However many have knocked, and the latest stay."""
        made = self.serve_for(KEYED + SEQUENCE + "REQUIRE_KNOCK Y\n")
        with mock.patch.object(server, "MAX_ATTEMPTS", 10):
            for number in range(30):
                self.hit(*ALL_THREE, source="10.55.1.%d" % number)
        self.assertEqual(10, len(made.knocks.knocked))
        self.assertIn(" opened ", self.knock("10.55.1.29,tcp/25", source="10.55.1.29"))

    def test_a_reload_between_steps(self) -> None:
        """Steps and credit count if the sequence is the same, wherever its stanza is now."""
        other = "SOURCE 10.9.9.9\n" + KEYS + SEQUENCE.replace("7000", "7001") + "REQUIRE_KNOCK Y\n"
        required = KEYED + SEQUENCE + "REQUIRE_KNOCK Y\n"
        for before, after, opens in (
                (KEYLESS, KEYLESS, True), (KEYLESS, other + KEYLESS, True),
                (KEYLESS, KEYLESS.replace("7000", "7001"), False),
                (KEYLESS, KEYLESS + "KNOCK_STRICT Y\n", True),  # it is the default
                (KEYLESS, KEYLESS + "KNOCK_TIMEOUT 4\n", False),
                (required, required, True), (required, other + required, True),
                (required, required + "KNOCK_STRICT N\n", False)):
            with self.subTest(before=before, after=after):
                made = self.serve_for(before)
                self.hit(*ALL_THREE[:2 if before == KEYLESS else 3])
                made.reload(made.configuration._replace(stanzas=self.stanzas(after)), self.firewall)
                self.assertIs(opens, " opened " in (
                    self.hit(ALL_THREE[2]) if before == KEYLESS else self.knock()))
                made.grants.flush()

    def test_nat(self) -> None:
        """FORCE_NAT holds for a sequence as for a packet."""
        self.serve_for(KEYLESS + "FORCE_NAT 10.66.0.2 2222\n", conf="ENABLE_IPT_FORWARDING Y;\n")
        text = self.hit(*ALL_THREE)
        self.assertIn("DNAT %s to 10.66.0.2:2222" % OPENED, text)

    def test_cycle_commands(self) -> None:
        """CMD_CYCLE_OPEN runs instead of the firewall."""
        path = self.script('echo "$*" >> got')
        self.serve_for(KEYLESS + "CMD_CYCLE_OPEN %s open $SRC $PORT\n"
                       "CMD_CYCLE_CLOSE %s close $SRC\nCMD_CYCLE_TIMER 60\n" % (path, path))
        self.assertIn("a knock sequence opened", self.hit(*ALL_THREE))
        self.wait_until_ended()
        self.made.commands.stop()
        self.assertEqual("open 10.55.0.2 22\nclose 10.55.0.2\n", self.read("got"))
        self.assertEqual({}, self.firewall.rules)

    def test_a_firewall_that_fails(self) -> None:
        """Is told, and the next knock may open."""
        self.serve_for(KEYLESS)
        self.firewall.failures = 2
        self.assertIn("nothing was opened: the firewall failed", self.hit(*ALL_THREE))
        self.hit(*ALL_THREE)
        self.assertEqual([OPENED], self.firewall.doors())

    def test_a_mistake_does_not_end_the_server(self) -> None:
        """Nor does it keep a hit from the sequences after it."""
        made = self.serve_for(KEYLESS + KEYLESS)
        first = next(iter(made.knocks.owners))
        with mock.patch.object(first, "follow", side_effect=ZeroDivisionError("oh")):
            text = self.hit(*ALL_THREE)
        self.assertIn("(stanza #1) ", text)
        self.assertIn("ZeroDivisionError", text)
        self.assertEqual([OPENED], self.firewall.doors())

    def test_floods_do_not_fill_the_log(self) -> None:
        """First steps, further ones, and openings of one port; what was opened is always told."""
        made = self.serve_for(KEYLESS)
        for number in range(2000):
            self.hit(7000, source="10.1.%d.%d" % divmod(number, 256))
        made.log.level = server.DEBUG
        for number in range(2000):
            self.made.knocks.take_knock(knock(7000, number.to_bytes(4, "big")),
                                        list(made.knocks.owners))
        self.assertLessEqual(len(self.logged().splitlines()), server.BURST)
        for number in range(2000):
            self.made.knocks.take_knock(knock(9000, number.to_bytes(4, "big")),
                                        list(made.knocks.owners))
        self.assertLessEqual(len(self.logged().splitlines()), server.STEP_BURST)
        self.clock.pass_seconds(1.5)
        self.assertIn("1000 more knocks came without a line in the log\n",
                      self.hit(9000, source="10.1.0.9"))

    def test_nobody_hides_an_opening(self) -> None:
        """Neither first steps nor what others complete holds back the lines of a sequence."""
        made = self.serve_for(KEYLESS + KEYLESS.replace("7000,9000,8000", "5000,6000"))
        made.log.level = server.DEBUG
        for number in range(1200):
            for port in (7000, 9000):
                made.knocks.take_knock(knock(port, number.to_bytes(4, "big")),
                                       list(made.knocks.owners))
        for number in range(2 * server.BURST):
            self.hit(8000, source="0.0.0.%d" % number)
        self.assertIn("10.55.0.2: (stanza #2): OPEN SESAME\n", self.hit(5000, 6000))

    def test_packets_after_a_start_with_sequences_only(self) -> None:
        """Are remembered in the file from the reload on, or a restart would take them again."""
        made = self.serve_for(KEYLESS)
        path = made.settings.digest_file
        if os.path.exists(path):
            os.unlink(path)
        made.gate.memory, made.remembers = server.ReplayMemory("", None, made.log), False
        stanzas = self.stanzas(KEYED)
        made.reload(made.configuration._replace(stanzas=stanzas), self.firewall)
        self.assertEqual((path, True), (made.gate.memory.path, os.path.exists(path)))
        memory = made.gate.memory
        made.reload(made.configuration._replace(stanzas=self.stanzas(KEYLESS)), self.firewall)
        made.reload(made.configuration._replace(stanzas=stanzas), self.firewall)
        self.assertIs(memory, made.gate.memory)

    def test_a_reload_that_fails_leaves_no_memory_open(self) -> None:
        """It goes on with sequences only, and the file of packets is closed again."""
        made = self.serve_for(KEYLESS)
        made.gate.memory, made.remembers = server.ReplayMemory("", None, made.log), False
        new = made.configuration._replace(stanzas=self.stanzas(KEYED))
        memory = server.open_memory(made.settings, made.log)
        with mock.patch.object(server, "open_memory", return_value=memory), \
                mock.patch.object(self.firewall, "prepare", side_effect=server.CommandError("no")):
            self.assertRaises(server.CommandError, made.reload, new, self.firewall)
        self.assertIsNone(memory.file)
        self.assertEqual(("", False), (made.gate.memory.path, made.remembers))

    def test_a_reload_that_fails_too_late(self) -> None:
        """The new keys are known by then, and so are the memory and the age of their packets."""
        made = self.serve_for(KEYLESS)
        made.gate.memory, made.remembers = server.ReplayMemory("", None, made.log), False
        new = made.configuration._replace(stanzas=self.stanzas(KEYED))
        with mock.patch.object(made.grants, "move", side_effect=OSError("no")):
            self.assertRaises(OSError, made.reload, new, self.firewall)
        gate = made.gate
        self.assertEqual((1, 120, made.settings.digest_file), (
            len(gate.keyed[server.SALTED_PREFIX]), gate.memory.max_age, gate.memory.path))

    def test_captures(self) -> None:
        """A hit meets the sequences of the socket that heard it, and no others, so that it counts
        once where stanzas and doors listen at the same place.
        """
        made = self.serve_for(KEYLESS.replace("7000,9000,8000", "7000,7000"),
                              "[d]\nSequence = 7000,7000\n")
        stanza, door = made.knocks.owners
        for each in (stanza, door):
            made.knocks.take_knock(knock(7000), [each])
        self.assertEqual([], self.firewall.doors())
        self.assertEqual([1, 1], [len(each.attempts) for each in (stanza, door)])
        self.assertEqual([[stanza], [door]], [sequences for _, sequences in
                                              made.configuration.listenings()])


DOOR = "[d]\nSequence = 7000,9000,8000\n"


class DoorTest(KnockCase):
    """A knockd.conf's door: commands, and knockd's lines in the log."""

    def door(self, start: str = "echo start %IP% >> got", stop: str = "echo stop %IP% >> got",
             seconds: int = 0, more: str = "") -> Any:
        """Return a server with one door, whose commands run in the test's directory."""
        lines = "".join("%s = %s\n" % (name, text and "cd %s; %s" % (self.directory, text))
                        for name, text in (("Start_Command", start), ("Stop_Command", stop)))
        return self.serve_for("", DOOR + lines + "Cmd_Timeout = %d\n%s" % (seconds, more))

    def wait_until_closed(self) -> str:
        """Wait until all is over, and return the log."""
        commands = self.made.commands
        self.wait_for(lambda: not (commands.cycles or commands.running or commands.switches),
                      "the end")
        return self.logged()

    def test_log(self) -> None:
        """Every line as knockd has it, and no other."""
        self.door()
        text = self.hit(*ALL_THREE) + self.wait_until_closed()
        command = "d: running command: cd %s; echo %%s 10.55.0.2 >> got" % self.directory
        self.assertEqual([
            "10.55.0.2: d: Stage 1", "10.55.0.2: d: Stage 2", "10.55.0.2: d: Stage 3",
            "10.55.0.2: d: OPEN SESAME", command % "start", "10.55.0.2: d: command timeout",
            command % "stop"], text.splitlines())
        self.assertEqual("start 10.55.0.2\nstop 10.55.0.2\n", self.read("got"))
        self.assertEqual(1, self.made.tally.counts["accepted"])

    def test_output_and_codes(self) -> None:
        """What a command prints, and how it failed; the stop runs all the same."""
        self.door("echo said; exit 3", "echo no")
        text = self.hit(*ALL_THREE) + self.wait_until_closed()
        self.assertIn("d: said\n", text)
        self.assertIn("d: command returned non-zero status code (3)\n", text)
        self.assertEqual(1, text.count("d: no\n"))
        self.assertNotIn("pid_status", text)

    def test_sequence_timeout(self) -> None:
        """Its line, for each stage, when the time has come."""
        self.door()
        self.hit(7000, source="fd55::2")
        self.hit(*ALL_THREE[:2])
        self.clock.pass_seconds(25.1)
        self.made.knocks.expire()
        self.assertEqual(["fd55::2: d: sequence timeout (stage 1)",
                          "10.55.0.2: d: sequence timeout (stage 2)"], self.logged().splitlines())

    def test_families(self) -> None:
        """The commands of IPv6 for its clients, empty ones too."""
        for more, expected in (
                ("", "start fd55::2\nstop fd55::2\n"), ("Start_Command_6 =\n", ""),
                ("Stop_Command_6 =\n", "start fd55::2\n"),
                ("Command_6 = echo six %%IP%% >> %s/got\n" % self.directory,
                 "six fd55::2\nstop fd55::2\n")):
            with self.subTest(more=more):
                self.door(more=more)
                text = self.hit(*ALL_THREE, source="fd55::2")
                self.assertIn("fd55::2: d: OPEN SESAME\n", text)
                self.wait_until_closed()
                self.assertEqual(expected, self.read("got"))
                if expected:
                    os.unlink(os.path.join(self.directory, "got"))

    def test_time_of_the_stop(self) -> None:
        """From the end of a slow Start_Command, also when it is knocked for again meanwhile."""
        self.door("sleep 1; touch begun; echo start >> got", "touch ended; echo stop >> got", 1)
        self.hit(*ALL_THREE)
        self.hit(*ALL_THREE)
        self.wait_until_closed()
        begun, ended = (os.stat(os.path.join(self.directory, name)).st_mtime
                        for name in ("begun", "ended"))
        self.assertGreater(ended - begun, 0.9)
        self.assertEqual("start\nstop\n", self.read("got"))

    def test_again_while_open(self) -> None:
        """It is not started again, and closes once and later; each door by itself."""
        made = self.door(seconds=60, more=DOOR.replace("[d]", "[e]") + "Command = :\n")
        self.hit(*ALL_THREE)
        self.wait_until_ended()
        (cycle,) = made.commands.cycles.values()
        self.clock.pass_seconds(30)
        self.assertNotIn("d: running", self.hit(*ALL_THREE))
        self.wait_until_ended()
        (cycle,) = made.commands.cycles.values()
        self.assertGreater(cycle.ends - self.clocks.monotonic(), 50)
        self.hit(*ALL_THREE, source="10.55.0.3")
        self.assertEqual(2, len(made.commands.cycles))
        self.wait_until_ended()
        made.commands.stop()
        self.assertEqual(["start 10.55.0.2"] + ["start 10.55.0.3"], [
            line for line in self.read("got").splitlines() if "start" in line])
        self.assertEqual(2, self.read("got").count("stop"))

    def test_without_a_stop(self) -> None:
        """Each knock runs the command; without a start there is no stop, and only the lines."""
        self.door(stop="")
        for _ in range(2):
            self.hit(*ALL_THREE)
            self.wait_until_closed()
        self.assertEqual("start 10.55.0.2\n" * 2, self.read("got"))
        self.door(start="")
        self.assertTrue(self.hit(*ALL_THREE).endswith("OPEN SESAME\n"))
        self.assertEqual(({}, []), (self.made.commands.cycles, self.made.commands.running))

    def test_a_start_that_outlives_the_server(self) -> None:
        """One that closes by itself does so when nobody reads what it prints any more."""
        made = self.door("while ! test -e gone; do sleep 0.05; done; echo x; echo b >> got", "")
        self.hit(*ALL_THREE)
        (child,) = made.commands.running
        made.commands.selector.unregister(child.output)
        child.output.close()  # as at the server's death
        open(os.path.join(self.directory, "gone"), "w").close()
        self.wait_for(lambda: child.popen.poll() is not None, "the end of the command")
        self.assertEqual("b\n", self.read("got"))

    def test_the_time_begins_when_start_has_ended(self) -> None:
        """Also for a server that was killed meanwhile: the start, all of it, and then the stop."""
        made = self.door("while ! test -e go; do sleep 0.05; done; echo start >> got",
                         "echo stop >> got")
        with mock.patch.object(server, "SWITCH_SECONDS", 0):
            self.hit(*ALL_THREE)
        (cycle,) = made.commands.cycles.values()
        self.assertEqual(float("inf"), cycle.ends)
        with self.assertRaises(subprocess.TimeoutExpired):
            cycle.switch.wait(0.3)
        open(os.path.join(self.directory, "go"), "w").close()
        cycle.switch.wait(TIMEOUT)  # the server does not look: it is gone
        self.assertEqual("start\nstop\n", self.read("got"))

    def test_doors_with_the_same_stop(self) -> None:
        """Each closes at its own time, for each client."""
        made = self.serve_for("", "".join(
            "[%s]\nSequence = %s\nCommand = true\nCmd_Timeout = 60\nStop_Command = true\n" % each
            for each in (("a", "7000,9000,8000"), ("b", "5000,6000"))))
        self.hit(*ALL_THREE)
        self.hit(5000, 6000)
        self.hit(5000, 6000, source="10.55.0.3")
        self.assertEqual(3, len(made.commands.cycles))

    def test_the_switch(self) -> None:
        """It stops what the server no longer can; a clean stop and a reload leave nothing open."""
        made = self.door(seconds=0)
        self.hit(*ALL_THREE)
        (cycle,) = made.commands.cycles.values()
        wait_for(lambda: "stop" in self.read("got"), "a stop; the server does not look: it is gone")
        self.assertEqual("start 10.55.0.2\nstop 10.55.0.2\n", self.read("got"))
        cycle.switch.wait(TIMEOUT)
        self.assertIn("d: its switch has run the command, which returned 0\n",
                      self.wait_until_closed())
        made = self.door(seconds=60)
        self.hit(*ALL_THREE)
        self.wait_until_ended()
        made.reload(made.configuration._replace(knockd=None), self.firewall)
        self.assertEqual(1, len(made.commands.cycles))
        made.commands.stop()
        self.assertEqual(4, len(self.read("got").splitlines()))
        self.assertIn("10.55.0.2: d: shutting down\n", self.logged())

    def test_too_many(self) -> None:
        """Of one door: nothing is run, the door is named, and the log does not fill."""
        made = self.door()
        one = type("Child", (), {"cycle": mock.Mock(owner=(False, -1))})  # type: Any
        most = server.KnockdCycle.most_running
        made.commands.running = [one] * most
        text = "".join(self.hit(*ALL_THREE) for _ in range(50))
        made.commands.running = []
        self.assertIn("d: nothing is opened: too many commands: %d of d run" % most,
                      text)
        self.assertLessEqual(text.count("nothing is opened"), server.BURST)
        self.assertEqual((50, ""), (made.tally.counts["knock"], self.read("got")))

    def test_one_time(self) -> None:
        """Marked before it runs; after the last the others go on."""
        path = os.path.join(self.directory, "codes")
        with open(path, "w") as stream:
            stream.write(" 1,3,2\n")
        conf = ("[o]\nOne_Time_Sequences = %s\nCommand = cat %s > %s/got\n[p]\nSequence = 9\n"
                % (path, path, self.directory))
        made = self.serve_for("", conf)
        with mock.patch.object(made.commands, "test", True):
            self.assertIn("--test mode enabled, not running", self.hit(1, 3, 2))
        self.assertEqual(" 1,3,2\n", self.read("codes"))
        made = self.serve_for("", conf)
        with mock.patch.object(server.KnockdCycle, "most_running", 0):
            self.assertIn("nothing is opened: too many commands", self.hit(1, 3, 2))
        self.assertEqual(" 1,3,2\n", self.read("codes"))
        text = self.hit(1, 3, 2, source="fd55::2") + self.wait_until_ended()
        self.assertEqual("#1,3,2\n", self.read("got"))
        self.assertIn("no more sequences left in the one time sequences file for door o --> "
                      "disabling the door\n", text)
        self.assertIn("10.55.0.2: p: OPEN SESAME", self.hit(1, 3, 2, 9))

    def test_target(self) -> None:
        """That address alone, be it this host's or not; without it any of this host's."""
        self.serve_for("", "[t]\nSequence = 1\nTarget = 10.55.0.50\n[a]\nSequence = 1\n")
        self.made.knocks.own[ipaddress.ip_address("10.55.0.50").packed] = False
        self.assertEqual(["10.55.0.2: t: Stage 1", "10.55.0.2: t: OPEN SESAME"],
                         self.hit(1, destination="10.55.0.50").splitlines())
        self.assertEqual(["10.55.0.2: a: Stage 1", "10.55.0.2: a: OPEN SESAME"],
                         self.hit(1).splitlines())

    def test_own_addresses(self) -> None:
        """The kernel is asked at most once a second for an address, and for so many at most."""
        made = self.door()
        asked = []  # type: List[Any]
        with mock.patch.object(server, "is_own_address", side_effect=asked.append):
            made.knocks.own.clear()
            made.knocks.own_until = 0.0
            for now in (10.0, 10.5, 11.0, 11.2):
                made.knocks.is_own_address(ONE, now)
            self.assertEqual(2, len(asked))
            for number in range(3000):
                made.knocks.is_own_address(number.to_bytes(4, "big"), 11.3)
            self.assertLessEqual(len(made.knocks.own), server.MAX_OWN + 1)


if __name__ == "__main__":
    unittest.main()
