"""The guide at the top of README.md, followed to the letter by somebody who begins with nothing.

The commands are those of README.md, in its order, typed on two hosts which have what the guide says
and no more: a gate with one kind of firewall, and a client. Each has its own /etc, /run and home,
and addresses of one family; only the server's address is replaced where that is IPv6. A line
without a row in Reader.steps just has to end with 0. The rows say what else is tested, and what is
not run as it is: scp and rsync print their arguments, since the hosts have no sshd; tests.bench is
looked at, not run; cron's line is run without its times; links are made in the home.
"""

import os
import re
import shutil
import signal
import sys
import unittest
from typing import List, Tuple

from tests.netns import Cable, Host, Process, Server, in_parallel
from tests.support import TOP, hearing_interrupts, needs_programs, needs_root, read, wait_for, write

SCRIPTS = ("spa_server.py", "spa_client.py", "keygen.py")
ADDRESSES = {4: ("192.0.2.10", "192.0.2.1"), 6: ("2001:db8::10", "2001:db8::1")}
HIDDEN = {"nft": ("iptables", "iptables-restore", "ip6tables", "ip6tables-restore"),
          "iptables": ("nft",)}
# A host of its own: what it writes outside of its home, and its name, are seen by nobody else.
OWN = """
mount -t tmpfs none /run
cp -a /etc /run/etc && rm -rf /run/etc/fwknop /run/etc/netns
mount --bind /run/etc /etc
hostname "$1"; shift
for each; do mount --bind /dev/null "$each"; done
exec sleep infinity
"""


def read_commands() -> List[str]:
    """Return the guide's commands in its order: the lines of fenced code, and those in the text."""
    guide = read(os.path.join(TOP, "README.md")).partition("\n## Contents\n")[0]
    found = []  # type: List[str]
    for code, inline in re.findall(r"(?ms)^```\w+\n(.*?)^```$|`((?:sudo )?python3 [^`]+)`", guide):
        found += code.splitlines() or [inline]
    return found


class Machine:
    """A host with a shell, and where to type: the three scripts are in its home."""

    def __init__(self, host: Host, name: str, hidden: Tuple[str, ...], ssh: str) -> None:
        self.host, self.home = host, host.path("home")
        os.makedirs(self.home + "/bin")
        os.mkdir(self.home + "/.ssh", 0o700)
        for script in SCRIPTS:
            shutil.copy(os.path.join(TOP, script), self.home)
        self.program("python3", f'exec {sys.executable} "$@"')
        paths = [path for path in map(shutil.which, hidden) if path]
        holder = host.start("unshare", "-m", "-u", "sh", "-ec", OWN, "sh", name, *paths)
        self.enter = ["nsenter", "-m", "-u", "-t", str(holder.popen.pid), "env",
                      "HOME=" + self.home, f"PATH={self.home}/bin:{os.environ['PATH']}",
                      "SSH_CONNECTION=" + ssh]
        wait_for(lambda: read(f"/proc/{holder.popen.pid}/comm") == "sleep\n", "the host " + name)

    def program(self, name: str, text: str) -> None:
        """Put a shell script on its PATH."""
        write(os.path.join(self.home, "bin", name), f"#!/bin/sh\n{text}\n", 0o755)

    def type(self, line: str, code: int = 0, answer: str = "") -> str:
        """Type a line, and `answer` into it; return what it prints, and expect its exit code."""
        ended, text = self.host.run_code(*self.enter, "sh", "-c", "cd; " + line, input=answer)
        if ended != code:
            raise AssertionError(f"{line}: ended with {ended}, not {code}:\n{text}")
        return text

    def start(self, line: str) -> Process:
        """Type a line that goes on until it is ended, and wait until it serves."""
        process = self.host.start(*self.enter, "sh", "-c", "cd; exec " + line)
        process.wait_for(Server.READY)
        return process


class Reader:
    """Somebody who follows the guide on a host with this firewall, in this family."""

    steps = {
        "sudo python3 -m tests.bench ": "no_command_of_the_hosts",
        "scp ": "copy",
        "python3 spa_server.py -V": "version",
        "python3 spa_server.py --init ": "init",
        "python3 spa_client.py --import": "import_stanza",
        "python3 spa_client.py -n gate --wait 10 && ": "knock_in_a_script",
        "python3 spa_client.py -n gate --wait 10": "knock",
        "python3 spa_server.py --daemon": "daemon",
        "python3 spa_server.py --print-client": "print_client",
        "python3 spa_server.py --unguard": "unguard",
        "rm -r /etc/fwknop": "begin_again",
        "python3 spa_server.py --print-unit systemd": "install_units",
        "python3 spa_client.py --print-ssh-config ": "ssh_config",
        "0 3 * * * ": "cron",
        "python3 keygen.py joe ": "add_joe",
        "python3 keygen.py --rotate ": "rotate_joe",
        "python3 keygen.py --retire ": "retire_joe",
        "python3 spa_server.py --close joe": "remove_joe",
        "python3 spa_server.py --check": "check",
        "python3 spa_client.py -n gate --answer": "answer",
        "python3 spa_server.py -t": "judge_only",
        "ln -s ": "link",
    }

    def __init__(self, cable: Cable, firewall: str, family: int) -> None:
        self.firewall = firewall
        self.address, other = ADDRESSES[family]
        bits = 24 if family == 4 else "64 nodad"
        for host, address in ((cable.server, self.address), (cable.client, other)):
            lines = f"addr flush dev eth0\naddr add {address}/{bits} dev eth0\n"
            host.run("ip", "-batch", "-", input=lines)
        self.there = cable.client
        self.gate = Machine(cable.server, "gate", HIDDEN[firewall],
                            f"{other} 50000 {self.address} 22")
        self.client = Machine(cable.client, "client", HIDDEN["nft"] + HIDDEN["iptables"], "")
        for name in ("scp", "rsync"):
            self.client.program(name, f'echo {name} "$@"')
        self.pasted = ""

    def follow(self, line: str) -> str:
        """Do what a line says, and return the row of `steps` that it has, if any."""
        line = line.replace("192.0.2.10", self.address)
        for start, step in self.steps.items():
            if line.startswith(start):
                getattr(self, step)(line)
                return start
        machine = self.client if "spa_client.py" in line else self.gate
        machine.type(line)
        return ""

    def reaches(self) -> bool:
        """Return whether the client gets in."""
        return self.there.reaches(self.address, 22)

    def expect(self, wanted: bool) -> None:
        """Wait until the client gets in, or no more."""
        wait_for(lambda: self.reaches() == wanted, "port 22 %s" % ("open" if wanted else "closed"))

    @staticmethod
    def no_command_of_the_hosts(line: str) -> None:
        """A measurement of minutes: its words must be those of tests.bench."""
        measured = line.partition("bench ")[2]
        assert f'"{measured}"' in read(os.path.join(TOP, "tests", "bench.py")), line

    def copy(self, line: str) -> None:
        """The files are those of the project."""
        names = self.client.type(line).split()[1:-1]
        assert names and set(names) < set(SCRIPTS), names

    def version(self, line: str) -> None:
        """The same number from both."""
        number = self.gate.type("sha256sum spa_server.py").split(None, 1)[0]
        assert number in self.gate.type(line)

    def init(self, line: str) -> None:
        """The port closes, and what is printed goes to the client."""
        assert self.reaches()
        self.server = self.gate.start(line)
        self.expect(False)
        self.pasted = self.server.output()
        assert "far away" not in self.pasted  # that is where --trial is what to type next

    def import_stanza(self, line: str) -> None:
        """Paste the stanza out of what was printed last."""
        stanza = re.findall(r"(?ms)^\[\w+\]\n.*^USE_HMAC +Y\n", self.pasted)[-1]
        self.client.type(line, answer=stanza)

    def knock(self, line: str) -> None:
        """What the guide says of it, and of the server's log; then Ctrl-C."""
        text = self.client.type(line)
        wanted = rf"(?m)^tcp/22 of {self.address} opened after \d\.\d+ seconds$"
        assert re.search(wanted, text), text
        self.server.wait_for("closed for good")
        self.expect(True)
        assert self.server.end(signal.SIGINT) == 0
        self.expect(False)

    def knock_in_a_script(self, line: str) -> None:
        """The program behind it runs."""
        text = self.client.type(line)
        assert f"rsync -a docs/ {self.address}:\n" in text, text

    def daemon(self, line: str) -> None:
        """The port stays closed, and opens by a knock."""
        self.gate.type(line)
        self.expect(False)
        self.client.type("python3 spa_client.py -n gate --wait 10")

    def print_client(self, line: str) -> None:
        """The same stanza again."""
        assert self.gate.type(line).split("#")[0].strip() in self.pasted

    def unguard(self, line: str) -> None:
        """The port is open as before."""
        self.expect(False)
        self.gate.type(line)
        self.expect(True)

    def begin_again(self, line: str) -> None:
        """Nothing is left; then what the rest of the guide needs, as at the start."""
        self.gate.type(line)
        self.gate.type("test ! -e /etc/fwknop")
        text = self.gate.type("python3 spa_server.py --init tcp/22 --daemon")
        os.remove(self.client.home + "/.fwknoprc")
        self.pasted = text
        self.import_stanza("python3 spa_client.py --import")

    def install_units(self, line: str) -> None:
        """The printed lines make the files; the service's command serves."""
        steps = re.findall("(?m)^#   (mkdir .*|.* [|] awk .*)$", self.gate.type(line))
        self.gate.type("\n".join(steps))
        self.expect(False)
        unit = self.gate.type("cat /etc/systemd/system/spa_server.service")
        self.gate.type(re.findall("(?m)^ExecStart=(.*)", unit)[0] + " --daemon")

    def ssh_config(self, line: str) -> None:
        """The command in it opens a connection through which ssh would speak."""
        self.client.type(line)
        config = read(self.client.home + "/.ssh/config")
        command = re.findall("ProxyCommand (.*)", config)[0]
        command = command.replace("%h", self.address).replace("%p", "22")
        assert self.client.type(command, answer="hello\n") == "hello\n"

    def cron(self, line: str) -> None:
        """The knock says nothing, so that cron has nothing to mail."""
        assert self.client.type(line.split(None, 5)[5]) == f"rsync -a docs/ {self.address}:\n"

    def add_joe(self, line: str) -> None:
        """Joe gets in with the stanza that is printed, once the server has read its files."""
        self.pasted = self.gate.type(line)
        self.gate.type("python3 spa_server.py -R")
        self.import_stanza("python3 spa_client.py --import")
        self.open_as_joe()

    def open_as_joe(self) -> None:
        """Knock as joe; he has something open then."""
        self.gate.type("python3 spa_server.py --fw-flush")
        self.expect(False)
        self.client.type("python3 spa_client.py -n joe")
        self.expect(True)

    def rotate_joe(self, line: str) -> None:
        """The old keys go on opening."""
        self.gate.type(line)
        self.gate.type("python3 spa_server.py -R")
        self.open_as_joe()

    def retire_joe(self, line: str) -> None:
        """Only the new keys are left."""
        self.gate.type(line)
        assert "# old joe" not in self.gate.type("cat /etc/fwknop/access.conf")

    def remove_joe(self, line: str) -> None:
        """What he has open is closed, although his stanza is gone."""
        self.gate.type("cp /etc/fwknop/access.conf /run/access.conf")
        self.gate.type("sed -i '/^# joe$/,$d' /etc/fwknop/access.conf")
        self.gate.type("python3 spa_server.py -R")
        self.gate.type(line)
        self.expect(False)

    def check(self, line: str) -> None:
        """The only thing to do is that nothing starts it after a boot."""
        text = self.gate.type(line, code=1)
        todo = [each for each in text.splitlines() if each.startswith(("[!]", "[-]"))]
        assert len(todo) == 1 and "after a boot" in todo[0], text

    def answer(self, line: str) -> None:
        """The server says that it has opened."""
        assert "opened tcp/22 for 30 seconds" in self.client.type(line)

    def judge_only(self, line: str) -> None:
        """Packets are judged beside another server."""
        process = self.gate.start(line)
        self.client.type("python3 spa_client.py -n gate")
        process.wait_for("--test mode enabled")
        process.end()

    def link(self, line: str) -> None:
        """The program behind the name is the other one; the link is made in the home."""
        target, path = line.split()[2:]
        machine = self.gate if "server" in target else self.client
        name = os.path.basename(path)
        machine.type(f"ln -s {target} bin/{name}")
        assert re.match(r"Usage: (knockd|\S+ --knock) ", machine.type(name + " -h"))


@needs_root
@needs_programs("ip", "nft", "iptables", "unshare", "nsenter", "hostname")
class GuideTest(unittest.TestCase):
    """README.md's guide, from its first command to its last."""

    maxDiff = None

    def follow(self, case: Tuple[str, int]) -> None:
        """Follow it on a host with one firewall, and addresses of one family."""
        cable = Cable()
        self.addCleanup(cable.close)
        cable.server.listen(22)
        reader = Reader(cable, *case)
        self.addCleanup(reader.gate.type, "python3 spa_server.py -K; true")
        used = {reader.follow(line) for line in read_commands()}
        self.assertEqual(set(reader.steps), used - {""})

    def test_to_the_letter(self) -> None:
        """With nftables and IPv4 alone, and with iptables and IPv6 alone."""
        with hearing_interrupts():
            in_parallel(self, (("nft", 4), ("iptables", 6)), self.follow)


class CommandsTest(unittest.TestCase):
    """What the other tests take out of the guide."""

    def test_code_can_be_pasted(self) -> None:
        """It has no prompt, and no placeholder."""
        commands = read_commands()
        self.assertGreater(len(commands), 25)
        bad = re.compile(r"^[$#>]|\.\.\.|[A-Z]{4}")
        self.assertEqual([], [line for line in commands if bad.search(line)])


if __name__ == "__main__":
    unittest.main()
