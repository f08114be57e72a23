"""The first minutes: --init, --print-client, and what a host that does not fit is told."""

import os
import re
import shutil
import signal
import subprocess
import sys
import unittest
from typing import Any, List

import spa_server as server
from tests.firewalls import launcher
from tests.netns import (CLIENT4, SERVER4, SERVER6, SPA_CLIENT, SPA_SERVER, CableCase, Process,
                         Server)
from tests.support import TOP, needs_programs, needs_root, read, wait_for, write
from tests.test_config import HMAC64, KEY32, ConfigCase

KEYS = f"KEY_BASE64 {KEY32}\nHMAC_KEY_BASE64 {HMAC64}\n"
# Two stanzas as keygen.py writes them, the second after --rotate, and some more.
ACCESS = f"""# All stanzas of this host

# gate
SOURCE ANY
OPEN_PORTS tcp/22, tcp/80
{KEYS}REQUIRE_SOURCE_ADDRESS Y

# joe
SOURCE ANY
{KEYS}HMAC_DIGEST_TYPE SHA512
REQUIRE_USERNAME joseph

# old joe
# (until keygen.py --retire joe)
SOURCE ANY
{KEYS}REQUIRE_USERNAME joseph

SOURCE ANY
REQUIRE_USERNAME ann
ONE_CONNECTION Y
KEY a raw key
ENCRYPTION_MODE CTR

# knocks
SOURCE ANY
OPEN_PORTS tcp/22
KNOCK_SEQUENCE 7000, 8000:udp

# gpg
SOURCE ANY
GPG_DECRYPT_ID ABCD1234
GPG_ALLOW_NO_PW Y
GPG_REMOTE_ID 1234ABCD

# both
SOURCE ANY
{KEYS}KNOCK_SEQUENCE 7000, 8000:udp
REQUIRE_KNOCK Y
"""


def without_python_names(platform: str, modules: List[str], names: List[str]) -> List[str]:
    """Return a command that runs spa_server.py on a Python that lacks these things."""
    return [sys.executable, "-I", "-c", "\n".join([
        "import os, select, selectors, signal, socket, subprocess, sys",
        f"sys.path.insert(0, {TOP!r})", "sys.dont_write_bytecode = True",
        f"sys.modules.update(dict.fromkeys({modules!r})); sys.platform = {platform!r}",
        f"for name in {names!r}:",
        "    module, _, name = name.partition('.')",
        "    vars(sys.modules[module]).pop(name, None)",
        "import spa_server", "sys.exit(spa_server.main(sys.argv[1:]))"])]


POSIX_ONLY = """os.geteuid os.fork os.setsid os.pipe2 os.pread os.O_NOFOLLOW os.O_NONBLOCK
    os.O_CLOEXEC os.O_PATH os.O_NOCTTY select.poll select.epoll select.PIPE_BUF
    selectors.EpollSelector
    signal.SIGHUP signal.SIGUSR1 signal.SIGUSR2 signal.SIGPIPE signal.SIGCHLD signal.SIGKILL
    socket.AF_UNIX socket.AF_NETLINK socket.AF_PACKET socket.MSG_DONTWAIT""".split()

# Begins as root: Python's own files may be in root's directory.
AS_USER = launcher("import os", "os.setgroups([]); os.setgid(65534); os.setuid(65534)")


class StanzaTest(ConfigCase):
    """--print-client, and what needs no firewall."""

    def printed(self, *words: str, access: str = ACCESS, conf: str = "") -> Any:
        """Return exit code, output and errors of --print-client."""
        return self.main_with(access, conf or "GUARD_PORTS tcp/22;\n", "--print-client", *words)

    def test_stanzas(self) -> None:
        """A name, number or user finds a stanza; the client gets what the server expects."""
        for name, header, wanted in (
                ("gate", "gate", f"ACCESS tcp/22,tcp/80|KEY_BASE64 {KEY32}|HMAC_DIGEST_TYPE SHA256|"
                 f"HMAC_KEY_BASE64 {HMAC64}|USE_HMAC Y"),
                ("joe", "joe", f"ALLOW_IP source|SPOOF_USER joseph|KEY_BASE64 {KEY32}|"
                 f"HMAC_DIGEST_TYPE SHA512|HMAC_KEY_BASE64 {HMAC64}|USE_HMAC Y"),
                ("ann", "ann", "ALLOW_IP source|SPOOF_USER ann|KEY_BASE64 YSByYXcga2V5|"
                 "ENCRYPTION_MODE CTR|ONE_CONNECTION Y"),
                ("both", "both", f"ALLOW_IP source|KEY_BASE64 {KEY32}|HMAC_DIGEST_TYPE SHA256|"
                 f"HMAC_KEY_BASE64 {HMAC64}|USE_HMAC Y|KNOCK_SEQUENCE 7000, 8000:udp")):
            numbers = {"gate": "1", "joe": "#2", "ann": "#4", "both": "7"}
            for word in (name, numbers[name]):
                with self.subTest(word=word):
                    code, out, err = self.printed(word)
                    self.assertEqual((0, ""), (code, err))
                    lines = out.partition(f"\n[{header}]\n")[2].strip().split("\n")
                    self.assertIn(f"spa_client.py -n {header} --wait 10\n", out)
                    self.assertEqual(wanted.split("|"), [
                        re.sub(" {2,}", " ", line) for line in lines if "SPA_SERVER" not in line])
                    self.assertEqual(1, sum(line.startswith("SPA_SERVER  ") for line in lines))

    def test_names(self) -> None:
        """One that a shell or an rc file would take for something else is not used."""
        for name, wanted in (("joe_2.x@y-z", "joe_2.x@y-z"), ("old joe", "server"),
                             ("Default", "server"), ("a;reboot", "server"), ("$(x)", "server"),
                             ("a]", "server"), ("\xe9", "server"), ("", "server")):
            out = self.printed(access=f"# {name}\nSOURCE ANY\n{KEYS}")[1]
            self.assertIn(f"-n {wanted} --wait 10\n\n[{wanted}]\n", out)

    def test_the_port(self) -> None:
        """It is the one that the server looks at."""
        for conf, wanted in (("PCAP_FILTER udp dst port 7000;\n", "7000"),
                             ("ENABLE_UDP_SERVER Y;\nUDPSERV_PORT 7001;\n", "7001"),
                             ("PCAP_FILTER udp;\n", ""), ("ENABLE_UDP_SERVER Y;\n", "")):
            out = self.printed("gate", conf=conf)[1]
            self.assertEqual([wanted] if wanted else [], re.findall("SPA_SERVER_PORT +(.*)", out))

    def test_no_or_many_stanzas(self) -> None:
        """The names that there are, or why there is nothing to print, and never a key."""
        names = ("--print-client: expected the number or the name of one stanza\nhint: there are "
                 "1 gate, 2 joe, 3 old joe, 4 ann, 5 knocks, 6 gpg, 7 both")
        for words, text in (([], names), (["jo"], names),
                            (["knocks"], "#5 has no KEY to print: only a knock sequence"),
                            (["gpg"], "#6 has no KEY to print: its client alone has the key"),
                            (["a", "b"], "unexpected argument 'b'")):
            with self.subTest(words=words):
                code, out, err = self.printed(*words)
                self.assertEqual((2 if len(words) > 1 else 1, ""), (code, out))
                self.assertIn(text, err)
        self.assertEqual(2, self.main("gate", "--init", "tcp/22")[0])

    def test_no_key_goes_to_the_journal(self) -> None:
        """Where others can read it."""
        access = self.write("access.conf", ACCESS)
        for words in (["--print-client", "gate"], ["--init", "tcp/22"]):
            with open(self.place("journal"), "wb") as file:
                status = os.fstat(file.fileno())
                stream = f"{status.st_dev}:{status.st_ino}"
                done = subprocess.run([*SPA_SERVER, "-a", access, "-c", self.place("new"), *words],
                                      env={**os.environ, "JOURNAL_STREAM": stream}, stdout=file,
                                      stderr=subprocess.PIPE)
            self.assertEqual((2, b"spa_server.py: expected a terminal or file to print the keys "
                              b"to\n"), (done.returncode, done.stderr))
            self.assertEqual("", read(self.place("journal")))
        self.assertFalse(os.path.exists(self.place("new")))

    def test_other_systems(self) -> None:
        """One line on Windows and macOS, whatever their Python lacks, and no file."""
        path = self.place("access.conf")
        for platform, modules, names in (
                ("win32", ["fcntl", "grp", "pwd", "termios"], POSIX_ONLY),
                ("darwin", [], [each for each in POSIX_ONLY if "AF_" in each or "poll" in each])):
            for words in (["--init", "tcp/22", "-a", path, "-c", path + "2"], ["--help"], []):
                done = subprocess.run([*without_python_names(platform, modules, names), *words],
                                      stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
                self.assertEqual((1, b"spa_server.py: this server needs Linux; the client does not"
                                  b"\n"), (done.returncode, done.stdout))
        self.assertEqual([], os.listdir(self.directory))

    def test_what_to_install(self) -> None:
        """The command is that of the package manager that is there."""
        for name, wanted in (("apk", "apk add"), ("dnf", "dnf install"), ("nosuch", "install")):
            with self.subTest(name=name):
                done = subprocess.run(
                    [*launcher(f"spa_server.find_program = {({name: '/x'})!r}.get"), *SPA_SERVER,
                     "-c", self.place("f.conf"), "--init", "tcp/22", "-a", self.place("a.conf"),
                     "-r", self.place("run")],
                    stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
                self.assertEqual((3, "spa_server.py: there is no nft and no iptables program\n"
                                  f"hint: {wanted} nftables\n"),
                                 (done.returncode, done.stdout.decode()))
        self.assertEqual([], os.listdir(self.directory))

    def test_all_files_or_none(self) -> None:
        """A file that can't be written takes those with it that were; others stay."""
        new, there = self.place("new/f.conf"), self.write("there", "x")
        with self.assertRaisesRegex(server.SpaError, "there: File exists"):
            server.write_new_files({new: "y", there: "y"})
        self.assertEqual((["there"], "x"), (os.listdir(self.directory), read(there)))
        with self.assertRaisesRegex(server.SpaError, "there/f.conf: File exists"):
            server.write_new_files({there + "/f.conf": "y"})
        server.write_new_files({new: "y"})
        self.assertEqual("y", read(new))


@needs_root
@needs_programs("ip", "nft", "iptables-nft", "unshare", "setpriv")
class InitTest(CableCase):
    """--init on a host."""

    def setUp(self) -> None:
        """Choose where the files will be."""
        super().setUp()
        self.directory = self.host.path("init")
        os.mkdir(self.directory, 0o755)
        os.chmod(self.cable.temporary.name, 0o755)  # for an ordinary user
        self.files = [os.path.join(self.directory, "etc", name)
                      for name in ("fwknopd.conf", "access.conf")]
        self.options = ["-c", self.files[0], "-a", self.files[1], "-r", self.directory + "/run"]

    def init(self, *words: str, before: Any = (), ssh: str = "") -> Process:
        """Start --init tcp/22, as from a session of ssh."""
        return self.host.start("env", "SSH_CONNECTION=" + ssh, *before, *SPA_SERVER, *self.options,
                               "--init", "tcp/22", *words)

    def hiding(self, *programs: str) -> List[str]:
        """Return a command before another one, which then finds nothing at these programs."""
        mounts = ["mount --bind /dev/null " + os.path.realpath(str(shutil.which(name)))
                  for name in programs]
        return ["unshare", "-m", "sh", "-ec", "; ".join(mounts) + '; exec "$@"', "sh"]

    def import_stanza(self, text: str) -> List[str]:
        """Return the client's command with an rc file that took the stanza in a text."""
        client = [*SPA_CLIENT[:2], "--rc-file", self.client.path("rc")]
        self.client.run(*client, "--import", input=text[text.index("# On the client"):])
        return [*client, "-n", re.findall(r"(?m)^\[(.*)\]$", text)[-1]]

    def test_a_client_gets_in(self) -> None:
        """By the stanza of --init, on both kinds of firewalls, and by that of --print-client."""
        for hidden, ssh, address in (("iptables", f"{CLIENT4} 5 {SERVER4} 22", SERVER4),
                                     ("nft", f"fd55::2 5 {SERVER6} 22", SERVER6)):
            with self.subTest(hidden=hidden):
                process = self.init(before=self.hiding(hidden), ssh=ssh)
                process.wait_for(Server.READY)
                text = process.output().partition("\n# Here")[0] + "\n"
                self.assertIn(f"\nSPA_SERVER                  {address}\n", text)
                again = self.host.run("env", "SSH_CONNECTION=" + ssh, *SPA_SERVER, *self.options,
                                      "--print-client")
                self.assertEqual(text.strip(), again.strip())
                self.host.listen(22) if hidden == "iptables" else None
                self.assertFalse(self.client.reaches(address, 22))
                self.client.run(*self.import_stanza(again))
                process.wait_for(" opened ")
                self.assertTrue(self.client.connect(address, 22).answers())
                # A second one is refused while the first runs, and has nothing to make afterwards.
                keys = read(self.files[1])
                self.assertEqual(0, process.end())
                process = self.init(before=self.hiding(hidden), ssh=ssh)
                process.wait_for(Server.READY)
                self.assertIn("There is a configuration already; serving it. ", process.output())
                os.rename(self.files[1], self.files[1] + ".moved")
                second = self.init(before=self.hiding(hidden))
                second.wait_for(f"a server is running (pid={process.popen.pid})")
                self.assertEqual(keys, read(self.files[1] + ".moved"))
                self.assertFalse(os.path.exists(self.files[1]))
                process.end()
                self.host.run(*self.hiding(hidden), *SPA_SERVER, *self.options, "--unguard")
                shutil.rmtree(self.directory + "/etc")

    def test_the_address(self) -> None:
        """It is the one that ssh came to, if it is this host's; sudo does not hide that."""
        self.host.run("ip", "route", "add", "default", "via", "fd55::2")
        shown = ("ip", "-6", "-o", "addr", "show", "dev", "eth0", "scope", "link")
        wait_for(lambda: "tentative" not in self.host.run(*shown), "an address that is ready")
        link = self.host.run(*shown).split("inet6 ")[1].split("/")[0]
        access = write(self.host.path("access.conf"), ACCESS)
        for ssh, wanted in (
                (f"{CLIENT4} 5 {SERVER4} 22", SERVER4), (f"fd55::2 5 {SERVER6} 22", SERVER6),
                (f"8.8.8.8 5 {SERVER4} 22", SERVER4 + "    # behind a NAT, put its public address "
                 "here"),
                (f"fe80::9%eth0 5 {link}%eth0 22", link + "%eth0    # put the client's interface "
                 "after the %"), (f"fe80::9 5 {link}%eth7 22", ""), (f"8.8.8.8 5 {CLIENT4} 22", ""),
                ("127.0.0.1 5 127.0.0.1 22", ""), ("8.8.8.8 5 0.0.0.0 22", ""), ("a b c d", ""),
                (f"{CLIENT4} {SERVER4}", ""), (f"{CLIENT4} 5 {SERVER4}\nX Y 22", ""), ("", ""),
                ("\xff" * 9, "")):
            with self.subTest(ssh=ssh):
                text = self.host.run("env", "SSH_CONNECTION=" + ssh, "sh", "-c",
                                     'env -u SSH_CONNECTION "$@"; :', "sh", *SPA_SERVER, "-a",
                                     access, "--print-client", "gate")
                self.assertIn("\nSPA_SERVER                  %s\n" % (wanted or SERVER6), text)

    def test_nothing_is_left_where_it_can_not_work(self) -> None:
        """Each reason is told before there is a key, and no file, directory or rule is made."""
        write(os.path.join(self.directory, "small"), "")
        small = ["unshare", "-m", "sh", "-ec", f"mount -t tmpfs -o size=4k,mode=755 none "
                 f"{self.directory}; \"$@\" || code=$?; ls {self.directory}; exit $code", "sh"]
        for before, words, code, text in (
                (self.hiding("nft", "iptables"), (), 3,
                 "there is no nft and no iptables program\nhint: apt install nftables\n"),
                (AS_USER, (), 1, "Operation not permitted\nhint: run it as root\n"),
                (self.hiding("nft") + AS_USER, (), 1,
                 "(you must be root)\nhint: run it as root\n"),
                (("setpriv", "--bounding-set", "-net_admin"), (), 1, "Operation not permitted\n"
                 "hint: even root may not do that here; a container needs CAP_NET_ADMIN\n"),
                (small, (), 1, "access.conf: No space left on device\n"),
                ((), ("--trial", "300", "-t"), 3, "--trial: there is no guard to try\n"
                 "hint: set GUARD_PORTS tcp/22, and leave --test out\n"),
                ((), ("-i", "nosuch0"), 1, "Interface nosuch0 does not exist, so no knock would be "
                 "heard\nhint: `ip link` lists those that there are\n"),
                ((), ("-i", "any", "-U", "-O", "/nonexistent"), 3, "No such file or directory\n")):
            with self.subTest(text=text):
                process = self.init(*words, before=before)
                wait_for(lambda: process.popen.poll() is not None, "the end")  # noqa: B023
                self.assertEqual(code, process.popen.returncode)
                self.assertEqual(text, process.output()[-len(text):], process.output())
                self.assertNotIn("KEY", process.output())
                self.assertEqual(["small"], os.listdir(self.directory))
                self.assertNotIn("spa", self.host.run("nft", "list", "ruleset"))
        # A port that somebody has is told when the UDP server is asked for.
        holder = self.host.start(sys.executable, "-c", "import socket, time\ns = socket.socket("
                                 "socket.AF_INET, socket.SOCK_DGRAM)\ns.bind(('', 62201))\n"
                                 "print('bound', flush=True)\ntime.sleep(600)")
        holder.wait_for("bound")
        process = self.init("-U")
        process.wait_for("UDP port 62201: Address already in use")
        self.assertEqual(["small"], os.listdir(self.directory))

    def test_an_ordinary_user(self) -> None:
        """Files in a directory of root's alone are not "missing": each option says so."""
        process = self.init("-t")
        process.wait_for(Server.READY)
        self.assertTrue(process.output().startswith("-t: nothing is closed or opened; "))
        self.assertEqual("", self.host.run("nft", "list", "ruleset"))
        os.chmod(self.directory + "/etc", 0o700)
        for words in ([], ["-D"], ["--print-client"], ["--guard"], ["--fw-list"], ["-S"]):
            with self.subTest(words=words):
                code, text = self.host.run_code(*AS_USER, *SPA_SERVER, *self.options[:-2], "-r",
                                                self.directory, *words)
                self.assertIn(code, (1, 3))
                self.assertRegex(text, r"(?s)(Permission denied|not permitted).*\nhint: run it as "
                                 "root\n$")
                self.assertNotIn("No such file", text)

    def test_knockd_with_syslog(self) -> None:
        """Its warnings come to the terminal as well; without a syslog, all that it says."""
        program, conf = (os.path.join(self.directory, name) for name in ("knockd", "knockd.conf"))
        os.symlink(SPA_SERVER[1], program)
        write(conf, "[options]\nUseSyslog\nInterface = nosuch0,nosuch1\n[door]\n"
              "Sequence = 7000\nCommand = true\n")
        dev = ("mkdir -p $0 && mount --rbind /dev $0 && mount -t tmpfs dev /dev && "
               "ln -s $0/null /dev && ")
        for syslog in ("ln -s $0/null /dev/log; ", ""):
            process = self.host.start(
                "unshare", "-m", "sh", "-c", dev + syslog + 'exec "$@"', program + ".dev",
                sys.executable, program, "-c", conf, "-p", program + ".pid")
            process.wait_for("Interface nosuch1 does not exist")
            if syslog:
                self.assertNotIn("starting up", process.output())
                process.end()
        self.assertEqual("starting up, listening on nosuch0,nosuch1",
                         process.wait_for("starting up"))
        process.popen.send_signal(signal.SIGHUP)
        self.assertEqual("re-reading config file: " + conf, process.wait_for("re-reading"))
        self.assertIn("UseSyslog: there is no /dev/log, as in most containers", process.output())


if __name__ == "__main__":
    unittest.main()
