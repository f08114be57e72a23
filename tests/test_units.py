"""The files of --print-unit, the program of --print-launcher, and what systemd is told."""

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from typing import Dict, List, Tuple

import spa_server as server
from tests.support import TOP, DirectoryCase, compiled, needs_programs, read, run, write

SCRIPT = os.path.join(TOP, "spa_server.py")
KINDS = ("systemd", "systemd-unprivileged", "openrc", "procd")
SYSTEMD, INIT_D = "/etc/systemd/system/", "/etc/init.d/"
FIREWALLS = ("nftables", "netfilter-persistent", "iptables", "ufw", "firewalld")
STANZA = "SOURCE ANY\nKEY testkey\nHMAC_KEY hmackey\n"

# Units of two hosts, as their packages order them. Debian's cloud-init has the network up before
# sysinit.target: a guard that waited for that target would wait for itself. firewalld waits for it.
BEFORE = "Wants=network-pre.target\nBefore=network-pre.target\n"
EARLY = "DefaultDependencies=no\n"
HOSTS = {"cloud": {"nftables": EARLY + BEFORE, "netfilter-persistent": EARLY + BEFORE,
                   "ufw": EARLY + BEFORE,
                   "networking": EARLY + "After=network-pre.target\nBefore=network.target\n",
                   "cloud-init": EARLY + "After=networking.service\nRequires=networking.service\n"
                                         "Before=sysinit.target\n"},
         "firewalld": {"firewalld": BEFORE, "iptables": BEFORE,
                       "NetworkManager": "After=network-pre.target\nBefore=network.target\n"}}
# Debian's, of fwknop-server 2.6.10.
FWKNOP_SERVER = """[Unit]
Description=Firewall Knock Operator Daemon
Wants=network-online.target
After=network-online.target

[Service]
Type=forking
ExecStart=/usr/sbin/fwknopd
ExecReload=/bin/kill -HUP $MAINPID
Restart=on-failure

[Install]
WantedBy=multi-user.target
"""


def parse_unit(text: str) -> Dict[str, List[str]]:
    """Return the words of each name in a unit; a name may be there more than once."""
    found: Dict[str, List[str]] = {}
    for name, words in re.findall(r"^(\w+)=(.*)$", text, re.M):
        found.setdefault(name, []).extend(words.split())
    return found


class UnitCase(DirectoryCase):
    """Files of a server, and the units that it prints."""

    def setUp(self) -> None:
        """Write the files."""
        super().setUp()
        self.options = ["-c", write(self.place("fwknopd.conf"), "GUARD_PORTS tcp/22;\n"),
                        "-a", write(self.place("access.conf"), STANZA), "-r", self.place("run")]

    def run_server(self, *options: str) -> "subprocess.CompletedProcess[str]":
        """Run the script itself, as Python compiles it."""
        return run([sys.executable, compiled(SCRIPT), *options], cwd=self.directory)

    def printed(self, kind: str, *options: str) -> Tuple[str, Dict[str, str]]:
        """Return the steps, and each file by its path."""
        done = self.run_server("--print-unit", kind, *(options or self.options))
        self.assertEqual(0, done.returncode, done.stderr)
        steps, *files = re.split(r"^# (/\S+)\n", done.stdout, flags=re.M)
        return steps, dict(zip(files[::2], files[1::2]))


class PrintUnitTest(UnitCase):
    """What is printed, of each kind."""

    def test_paths_and_options(self) -> None:
        """The commands have this Python, this script and the options; the files are all there."""
        expected = [sys.executable, "-I", os.path.realpath(compiled(SCRIPT)), *self.options]
        for kind in KINDS:
            with self.subTest(kind=kind):
                steps, files = self.printed(kind)
                folder = SYSTEMD if kind.startswith("systemd") else INIT_D
                self.assertEqual(
                    [SYSTEMD + name for name in ("spa_guard.service", "spa_server.service",
                                                 "spa_server.service.d/sandbox.conf")]
                    if folder == SYSTEMD else [INIT_D + "spa_guard", INIT_D + "spa_server"],
                    list(files))
                command = " ".join(expected)
                self.assertIn(command + " --guard", files[next(iter(files))])
                self.assertIn(command + " --unguard\n", steps)
                self.assertNotRegex("".join(files.values()), "[{}]{2}|None")
                for path in files:
                    self.assertIn(os.path.basename(path).partition(".")[0].replace("sandbox", ""),
                                  steps)
        unit = parse_unit(self.printed("systemd")[1][SYSTEMD + "spa_server.service"])
        self.assertEqual(expected, unit["ExecStart"])
        self.assertEqual([*expected, "-R"], unit["ExecReload"])
        self.assertEqual(["process"], unit["KillMode"])
        relative = self.printed("systemd", "-cfwknopd.conf", "--daemon", "-r", "run", "-v")[1]
        self.assertEqual(["-c", self.place("fwknopd.conf"), "-r", self.place("run"), "-v"],
                         parse_unit(relative[SYSTEMD + "spa_server.service"])["ExecStart"][3:])

    def test_bad_options(self) -> None:
        """Errors that name the option or the word; nothing is printed."""
        os.mkdir(self.place("a b"))
        for options, code, text in (
                (["--print-unit", "upstart"], 2, "expected systemd, systemd-unprivileged, openrc"),
                (["--print-unit"], 2, "requires an argument"),
                (["--print-unit", "systemd", "--trial", "30"], 2, "--trial"),
                (["--print-unit", "systemd", "-K"], 2, "'-K' does not go with"),
                (["--print-unit", "systemd", "-P", "udp port 1"], 1, "'udp port 1' would need"),
                (["--print-unit", "procd", "-r", "a b"], 1, "a b' would need quotes"),
                (["--print-unit", "procd", "-r", "x;id"], 1, "x;id' would need quotes"),
                (["--print-unit", "systemd", "-r", "a%n"], 1, "a%n' would need quotes"),
                (["--print-unit", "systemd", "-c", "none"], 3, "none: No such file"),
                (["--print-launcher", "-S"], 2, "does not go with")):
            with self.subTest(options=options):
                done = self.run_server("-c", write(self.place("empty"), ""), *options)
                self.assertEqual((code, ""), (done.returncode, done.stdout), done.stderr)
                self.assertIn(text, done.stderr)
        for line, path in (("METRICS_FILE /var/a b/c", "/var/a b"),
                           ("DIGEST_FILE /x/%n/c", "/x/%n"),
                           ("DIGEST_FILE sub/c", None),
                           ("FWKNOP_RUN_DIR /run/x y", "/run/x y")):
            write(self.options[1], line + ";\n")
            done = self.run_server("--print-unit", "systemd", *self.options[:4])
            self.assertEqual((1, ""), (done.returncode, done.stdout), line)
            wanted = f"'{path}' would need quotes" if path else (
                f"path, and a service starts in /\nhint: DIGEST_FILE {self.place('sub/c')}")
            self.assertIn(wanted, done.stderr)

    def test_no_guard(self) -> None:
        """Where the settings close no ports there is no unit that would; later there may be."""
        write(self.options[1], "FIREWALL_TYPE iptables;\n")
        for kind in KINDS:
            steps, files = self.printed(kind)
            self.assertFalse([path for path in files if "guard" in path])
            self.assertNotIn("spa_guard", steps)

    def test_a_script_of_others(self) -> None:
        """Whoever can write to the script is named."""
        script = shutil.copy(compiled(SCRIPT), self.place("spa_server.py"))
        for mode, expected in ((0o755, False), (0o775, True), (0o757, True)):
            os.chmod(script, mode)
            done = run([sys.executable, script, "--print-unit", "procd", *self.options])
            warned = f"{script} is not root's alone" in done.stderr
            self.assertEqual(0, done.returncode)
            self.assertEqual(expected or os.geteuid() != 0, warned, done.stderr)

    def test_a_directory_of_others_above(self) -> None:
        """Whoever has a directory above can put another one in place of the script's."""
        theirs = self.place("theirs")
        os.makedirs(os.path.join(theirs, "a/b"))
        script = shutil.copy(compiled(SCRIPT), os.path.join(theirs, "a/b/spa_server.py"))
        for mode, expected in ((0o755, False), (0o1777, False), (0o777, True)):
            os.chmod(theirs, mode)
            done = run([sys.executable, script, "--print-unit", "procd", *self.options])
            self.assertEqual(expected or os.geteuid() != 0,
                             f"{theirs} is not root's alone" in done.stderr, done.stderr)

    def test_the_steps_of_installing(self) -> None:
        """The pipe that the steps name makes just these files."""
        for kind in KINDS:
            with self.subTest(kind=kind), tempfile.TemporaryDirectory() as root:
                steps, files = self.printed(kind)
                made = re.search(r"^#   mkdir -p (.*)\n#   (.* \| )(awk .*)$", steps, re.M)
                assert made
                run(["mkdir", "-p", *[root + folder for folder in made[1].split()]])
                run(["sh", "-ec", f"{made[2]} sed 's,^# /,# {root}/,' | {made[3]}"])
                self.assertEqual(files, {path: read(root + path) for path in files})
                self.assertEqual(INIT_D[:-1] == made[1], "chmod 755 spa_guard spa_server;" in steps)

    def test_shells(self) -> None:
        """A shell takes the init scripts; procd and OpenRC get the command and its words."""
        stubs = ('procd_set_param() { echo "$@"; }; procd_open_instance() { :; }; ebegin() { :; }\n'
                 'procd_close_instance() { :; }; eend() { return $1; }\n')
        for kind, ask, expected in (
                ("procd", "start_service", ["command " + sys.executable, "respawn 3600 5 0"]),
                ("openrc", 'echo "$command $command_args"', [sys.executable + " -I"])):
            guard, unit = self.printed(kind)[1].values()
            for text in (guard, unit):
                subprocess.run(["sh", "-n"], input=text.encode(), check=True)
            said = run(["sh", "-ec", f"{stubs}{unit}\n{ask}"]).stdout
            for words in [*expected, *self.options]:
                self.assertIn(words, said)
            broken = run(["sh", "-c", f"{stubs}{guard.replace('--guard', '--none')}\nstart"])
            self.assertEqual(2, broken.returncode)  # the guard's failure is the script's

    def test_check_knows_them(self) -> None:
        """--check says that the server starts after a boot; a guard alone is no server."""
        for kind in KINDS:
            with self.subTest(kind=kind), tempfile.TemporaryDirectory() as root:
                files = self.printed(kind)[1]
                folder = root + {"openrc": "/etc/runlevels/boot", "procd": "/etc/rc.d"}.get(
                    kind, SYSTEMD + "multi-user.target.wants")
                os.makedirs(folder)
                for name, expected in (("spa_guard", "Nothing starts"), ("spa_server", "Starts")):
                    text = next(text for path, text in files.items() if name in path)
                    path = os.path.join(folder, {"procd": "S95" + name}.get(kind, name))
                    write(path, text)
                    check = server.Checkup(server.Arguments(self.options), root)
                    found = [text for _, text in server.check_boot(check)]
                    self.assertRegex(found[0], "^" + expected)


class SystemdTest(UnitCase):
    """What systemd makes of the units."""

    def test_order(self) -> None:
        """The guard comes before the network, and after whatever loads the host's rules."""
        files = self.printed("systemd")[1]
        guard = files[SYSTEMD + "spa_guard.service"]
        self.assertIn("\nBefore=network-pre.target\n", guard)
        unit = parse_unit(guard)
        self.assertIn("network-pre.target", unit["Wants"])
        self.assertEqual({name + ".service" for name in FIREWALLS},
                         set(unit["After"]) - {"local-fs.target"})
        self.assertIn("spa_guard.service",
                      parse_unit(files[SYSTEMD + "spa_server.service"])["After"])

    @needs_programs("systemd-analyze")
    def test_verify(self) -> None:
        """No complaint and no cycle on two hosts; with the usual order a guard makes one."""
        for kind in ("systemd", "systemd-unprivileged"):
            for host in HOSTS:
                self.assertEqual((0, ""), self.verify(self.printed(kind)[1], host))
        files = {path: text.replace(EARLY, "") for path, text in self.printed("systemd")[1].items()}
        self.assertIn("ordering cycle", self.verify(files, "cloud")[1])

    def verify(self, files: Dict[str, str], host: str) -> Tuple[int, str]:
        """Return what systemd-analyze says of these files on a host that starts all its units."""
        with tempfile.TemporaryDirectory() as folder:
            os.mkdir(folder + "/spa_server.service.d")
            paths = [self.put(folder, path[len(SYSTEMD):], text) for path, text in files.items()]
            paths += [self.put(folder, name + ".service", (
                f"[Unit]\n{order}\n[Service]\nType=oneshot\nExecStart=/bin/true\n"))
                for name, order in HOSTS[host].items()]
            units = [path for path in paths if path.endswith(".service")]
            wants = " ".join(map(os.path.basename, units))
            units.append(self.put(folder, "all.target", f"[Unit]\nWants={wants}\n"))
            done = run(["systemd-analyze", "verify", "--man=no", *units])
            return done.returncode, done.stdout + done.stderr

    @needs_programs("systemd-analyze")
    def test_drop_in(self) -> None:
        """README's lines for Debian's fwknop-server start ours; a slip in them is found."""
        section = read(os.path.join(TOP, "README.md")).partition("#### In place of Debian's")[2]
        text = section.partition("```ini\n")[2].partition("```")[0]
        text = text.replace("/usr/bin/python3 -I /usr/local/sbin/spa_server.py",
                            f"{sys.executable} -I {SCRIPT}")
        for lines, code in ((text, 0), (text.replace("ExecStart=\n", ""), 1)):
            with tempfile.TemporaryDirectory() as folder:
                os.mkdir(folder + "/fwknop-server.service.d")
                self.put(folder, "fwknop-server.service.d/override.conf", lines)
                done = run(["systemd-analyze", "verify", "--man=no", self.put(
                    folder, "fwknop-server.service", FWKNOP_SERVER)])
                self.assertEqual((code, not code), (done.returncode, not done.stderr), done.stderr)

    @needs_programs("systemd-analyze")
    def test_security(self) -> None:
        """The exposure that systemd computes is below 2.5 of 10, and lower for a user."""
        for kind, most in (("systemd", 2.5), ("systemd-unprivileged", 2.2)):
            with tempfile.TemporaryDirectory() as folder:
                os.mkdir(folder + "/spa_server.service.d")
                paths = [self.put(folder, path[len(SYSTEMD):], text)
                         for path, text in self.printed(kind)[1].items()]
                done = run(["systemd-analyze", "security", "--no-pager", "--offline=true",
                            paths[1]])
                if "unrecognized option" in done.stderr:
                    self.skipTest("this systemd-analyze has no --offline")
                found = re.search(r"Overall exposure level for \S+: ([0-9.]+)", done.stdout)
                assert found, done.stderr
                self.assertLess(float(found[1]), most)

    def put(self, folder: str, name: str, text: str) -> str:
        """Write a unit, and return its path."""
        return write(os.path.join(folder, name), text, 0o644)


class LauncherTest(DirectoryCase):
    """The steps that a launcher names, done in another directory; then it runs."""

    def install(self, name: str) -> str:
        """Return the launcher's path."""
        script = os.path.join(TOP, name + ".py")
        text = run([sys.executable, script, "--print-launcher"]).stdout
        local = self.place("local")
        steps = "\n".join(re.findall("^#   (.*)$", text, re.M))
        bin_folder = "sbin" if name == "spa_server" else "bin"
        os.makedirs(os.path.join(local, bin_folder))
        steps = steps.replace("/usr/local", local).replace(
            "--print-launcher", f"--print-launcher | sed 's,/usr/local,{local},'")
        environment = {"PATH": os.environ["PATH"]}  # without PYTHONDONTWRITEBYTECODE
        done = run(["sh", "-exc", "umask 077\n" + steps], env=environment)
        self.assertEqual(0, done.returncode, done.stderr)
        return os.path.join(local, bin_folder, name)

    def test_both(self) -> None:
        """Each does as its script does, from the compiled form, and under another name, too."""
        for name, other, help in (("spa_server", "knockd", "Usage: knockd"),
                                  ("spa_client", "knock", "Usage: spa_client.py --knock")):
            with self.subTest(name=name):
                launcher = self.install(name)
                self.assertEqual(4, len([line for line in read(launcher).splitlines()
                                         if not line.startswith("#")]))
                script = os.path.join(TOP, name + ".py")
                self.assertEqual(run([sys.executable, script, "-V"]).stdout,
                                 run([launcher, "-V"]).stdout)
                traced = run([sys.executable, "-v", "-IS", launcher, "-V"]).stderr
                self.assertRegex(traced, rf"code object from '\S*/{name}\.\S*pyc'")
                os.symlink(launcher, self.place(other))
                self.assertIn(help, run([self.place(other), "-h"]).stdout)
                self.assertEqual(2, run([launcher, "--none"]).returncode)

    def test_unit(self) -> None:
        """A unit that the launcher prints starts the launcher."""
        launcher = self.install("spa_server")
        done = run([launcher, "-c", write(self.place("f"), ""), "--print-unit", "systemd"])
        self.assertIn(f"\nExecStart={launcher} -c {self.place('f')}\n", done.stdout)


class ManagerTest(DirectoryCase):
    """What systemd is told, through both kinds of addresses."""

    def test_messages(self) -> None:
        """READY=1 when told; WATCHDOG=1 at half of the time; nothing for another process."""
        now = [100.0]
        clocks = server.Clocks(monotonic=lambda: now[0])
        for shown in (self.place("notify"), f"@spa-test-{os.getpid()}"):
            with self.subTest(address=shown), socket.socket(
                    socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
                manager.bind(shown.replace("@", "\0"))
                manager.setblocking(False)
                told = server.ServiceManager(clocks, {
                    "NOTIFY_SOCKET": shown, "WATCHDOG_USEC": "3000000",
                    "WATCHDOG_PID": str(os.getpid())})
                told.tell("RELOADING=1", "MONOTONIC_USEC=5")
                self.assertEqual(b"RELOADING=1\nMONOTONIC_USEC=5", manager.recv(100))
                for seconds, heard in ((0.0, True), (1.4, False), (0.2, True), (0.0, False)):
                    now[0] += seconds
                    told.keep_alive()
                    if heard:
                        self.assertEqual(b"WATCHDOG=1", manager.recv(100))
                    with self.assertRaises(BlockingIOError):
                        manager.recv(100)

    def test_nobody_asks(self) -> None:
        """Without a socket, and with one that is gone, the server goes on."""
        gone = {"NOTIFY_SOCKET": self.place("none")}
        for environment in ({}, gone, dict(gone, WATCHDOG_USEC="0"),
                            dict(gone, WATCHDOG_USEC="\xb2"),
                            {**gone, "WATCHDOG_USEC": "9", "WATCHDOG_PID": "1"}):
            told = server.ServiceManager(server.CLOCKS, environment)
            told.tell("READY=1")
            told.keep_alive()
            self.assertEqual(server.FOR_EVER, told.due)
