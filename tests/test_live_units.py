"""Live: what a server tells systemd, and one that is an ordinary user with two capabilities."""

import os
import shutil
import signal
import socket
import sys

from tests.netns import CLIENT4, CLIENT6, SERVER4, SERVER6, STANZA, CableCase, Server
from tests.support import TIMEOUT, TOP, needs_programs, needs_root, run, wait_for

GUARD = "FIREWALL_TYPE nft;\nGUARD_PORTS tcp/22;\n"
BOTH = "+net_admin,+net_raw"
# As systemd starts what has User=, AmbientCapabilities= and NoNewPrivileges=.
AS_NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--no-new-privs",
             "--inh-caps=" + BOTH, "--ambient-caps=" + BOTH, "--bounding-set=-all," + BOTH]


@needs_root
@needs_programs("ip", "nft")
class NotifyTest(CableCase):
    """A socket that hears what systemd would."""

    def test_life(self) -> None:
        """READY=1 comes with the first knock that can open, then WATCHDOG=1, then each change."""
        path = self.host.path("notify")
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.bind(path)
            manager.settimeout(TIMEOUT)
            server = Server(self.host, GUARD, launcher=[
                "env", "NOTIFY_SOCKET=" + path, "WATCHDOG_USEC=400000"])
            server.launch()

            def hear(text: str) -> str:
                """Return the next message that is no sign of life, which has to begin so."""
                while True:
                    message = manager.recv(4096).decode()
                    if message != "WATCHDOG=1" or text == message:
                        self.assertTrue(message.startswith(text), message)
                        return message

            self.assertEqual("READY=1", hear(""))
            self.assertIn(server.READY, server.log())
            for _ in range(3):
                hear("WATCHDOG=1")
            for files, said in ((GUARD, "Re-starting"),
                                ("GUARD_PORTS 1;\n", "going on with the old")):
                server.configure(files)
                server.send_signal(signal.SIGHUP)
                self.assertRegex(hear("RELOADING=1"), r"\nMONOTONIC_USEC=[0-9]+$")
                hear("READY=1")
                server.wait_for(said)
            server.send_signal(signal.SIGTERM)
            hear("STOPPING=1")
            self.assertEqual(0, server.running().popen.wait(TIMEOUT))


@needs_root
@needs_programs("ip", "nft", "setpriv")
class UnprivilegedTest(CableCase):
    """The server of --print-unit systemd-unprivileged, after root's guard."""

    def start(self, config: str, access: str = STANZA) -> Server:
        """Let nobody serve files of root's that nobody's group can read."""
        python = next((each for each in (sys.executable, "/usr/bin/python3") if run(
            AS_NOBODY + ["sh", "-c", 'test -x "$0"', each]).returncode == 0), "")
        if not python:
            self.skipTest("no Python that an ordinary user can run")
        server = Server(self.host, config, access)
        os.chmod(self.cable.temporary.name, 0o755)
        run_directory = os.path.join(server.directory, "run")
        os.mkdir(run_directory, 0o700)
        os.chown(run_directory, 65534, 65534)
        for path in (server.config_file, server.access_file):
            os.chown(path, 0, 65534)
            os.chmod(path, 0o640)
        script = shutil.copy(os.path.join(TOP, "spa_server.py"), server.directory + "/spa.py")
        if "GUARD_PORTS" in config:
            self.assertEqual(0, server.command("--guard")[0])
        server.process = self.host.start(*AS_NOBODY, python, "-I", script, *server.files)
        return server

    def test_a_life(self) -> None:
        """It opens, reloads, puts back what was flushed, and obeys root; and it is no root."""
        self.host.listen(22)
        server = self.start(GUARD)
        server.wait_for(server.READY)
        with open(f"/proc/{server.running().popen.pid}/status") as file:
            status = file.read()
        self.assertIn("Uid:\t65534\t65534\t65534\t65534\n", status)
        self.assertIn("CapEff:\t0000000000003000\n", status)
        for source, address in ((CLIENT4, SERVER4), (CLIENT6, SERVER6)):
            self.assertFalse(self.client.reaches(address, 22, source))
            server.knock(self.client, "-A", "tcp/22", "-a", source, "-D", address)
            self.assertTrue(self.client.reaches(address, 22, source))
        mark = server.mark()
        server.send_signal(signal.SIGHUP)
        server.wait_for("Re-starting fwknopd", mark)
        self.host.run_code("nft", "flush", "ruleset")
        wait_for(lambda: self.client.reaches(SERVER4, 22, CLIENT4), "the grant that was flushed")
        for options, said in ((["--open", "tcp/22", "192.0.2.1"], "Opened 192.0.2.1"),
                              (["--close", CLIENT4], "Closed " + CLIENT4),
                              (["-S"], "is running"), (["--fw-list"], CLIENT6),
                              (["--fw-flush"], "has closed all"), (["-K"], "Killed fwknopd")):
            code, text = server.command(*options)
            self.assertEqual((0, True), (code, said in text), text)
        self.assertFalse(self.client.reaches(SERVER4, 22, CLIENT4))  # the guard stays

    @needs_programs("iptables-nft", "iptables-legacy")
    def test_iptables(self) -> None:
        """iptables-nft serves; iptables-legacy, which opens root's lock file, ends the start."""
        config = "FIREWALL_TYPE iptables;\nFIREWALL_EXE %s;\n"
        server = self.start(config % shutil.which("iptables-nft"))
        server.wait_for(server.READY)
        server.knock(self.client, "-A", "tcp/22", "-a", CLIENT4, "-D", SERVER4)
        server.stop()
        server = self.start(config % shutil.which("iptables-legacy"))
        wait_for(lambda: server.running().popen.poll() == 1, server.log)
        self.assertIn("hint: run it as root", server.log())

    def test_commands(self) -> None:
        """A stanza's command runs as the server's user; as another user it fails, and is logged."""
        access = STANZA + "ENABLE_CMD_EXEC Y\nREQUIRE_SOURCE_ADDRESS N\n"
        server = self.start("FIREWALL_TYPE none;\n", access)
        server.wait_for(server.READY)
        server.knock(self.client, "-C", "touch " + server.directory + "/run/made", "-a", CLIENT4,
                     "-D", SERVER4, expect="CMD_EXEC")
        wait_for(lambda: os.path.exists(server.directory + "/run/made"), "a file")
        self.assertEqual(65534, os.stat(server.directory + "/run/made").st_uid)
        server.configure(access=access + "CMD_EXEC_USER root\n")
        os.chown(server.access_file, 0, 65534)
        os.chmod(server.access_file, 0o640)
        server.send_signal(signal.SIGHUP)
        server.wait_for("Re-starting")
        server.knock(self.client, "-C", "id", "-a", CLIENT4, "-D", SERVER4,
                     expect="could not be started")
