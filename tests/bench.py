"""Speed, side by side with the peers that are installed, in one run on one machine.

    sudo python3 -m tests.bench            all rows
    sudo python3 -m tests.bench client     one of: open junk rates flood fair stanzas grants
                                                   knock openspa client proxy start

`rates` shows the CPU that junk takes. `flood` counts the honest packets that open, each sent once,
while junk comes; `fair` is for more junk than can be tried, from forged addresses. `stanzas` and
`grants` show how cost grows with their number. `grants` also shows how many a minute reaches, what
an idle server and its programs take then, how long it takes to put back what somebody flushed, and
how late the last is closed when 1,000 end together. `knock` is for knock sequences, ours beside
knockd: from the last of three SYNs to the first answer, and the CPU for each first hit of a flood
from many addresses. `openspa` is for requests of clients with RSA keys, beside the time that the
RSA itself takes in the same run.

Rows print medians if they do not say otherwise, and for the peers the ratio to ours. Machines are
noisy: compare ratios, and numbers of one run only. Traffic stays in network namespaces that are
made for it.
"""

import contextlib
import glob
import os
import py_compile
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import types
from functools import partial
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import spa_client as client
from spa_server import read_client_key
from tests.knockd import FLOOD as FLOOD_OF_HITS
from tests.knockd import NAMED, REAL, SESAME, Knockd, hit
from tests.netns import (CLIENT4, COMPILE_BEFORE, FWKNOP, HMAC_KEY, KEY, KEYS, SERVER4, SPA_CLIENT,
                         SPA_SERVER, Cable, Host, Process, Server)
from tests.support import TIMEOUT, TOP, read, slowness, wait_for

ROUNDS = 21
JUNK_SECONDS = 4.0
STANZA = "SOURCE ANY\nKEY %s\nHMAC_KEY %s\nFW_ACCESS_TIMEOUT 300\n" % (KEY, HMAC_KEY)
DROP = """
table inet filter {
  chain input {
    type filter hook input priority 0; policy drop;
    iifname "lo" accept
    ct state established,related accept
    icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept
  }
}
"""

# Behind SEND_PACKET or SEND_HITS: for each line sends what it says from an address, then probes
# the UDP port that this opens, every 0.15 ms, until the kernel there answers that nobody serves it:
# no process has to wake up for that. Prints milliseconds.
OPENED = """
import select, socket, sys, time
server = sys.argv[1]
for line in sys.stdin:
    source, port, knock = line.split()
    probe = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    probe.bind((source, 0))
    probe.connect((server, int(port)))
    begin = send(source, knock)
    while time.perf_counter() < begin + 60:
        probe.send(b"x")
        if select.select([probe], [], [], 0.0001)[0]:
            print("%.3f" % ((time.perf_counter() - begin) * 1000), flush=True)
            break
    else:
        print("never", flush=True)
    time.sleep(0.2)
"""

# For each line, whose packets are separated by commas, sends one a second from an address, as
# `spa_client.py --wait` does, until the UDP port answers. Prints milliseconds and how many it took.
KNOCKS_AGAIN = """
import select, socket, sys, time
server = sys.argv[1]
for line in sys.stdin:
    source, port, packets = line.split()
    probe, knocker = (socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2))
    for link, where in (probe, int(port)), (knocker, 62201):
        link.bind((source, 0))
        link.connect((server, where))
    sent, begin, packets = 0, time.perf_counter(), packets.split(",")
    while time.perf_counter() < begin + len(packets):
        if time.perf_counter() >= begin + sent:
            knocker.send(packets[sent].encode())
            sent += 1
        try:
            probe.send(b"x")
            if select.select([probe], [], [], 0.002)[0]:
                probe.recv(10)
                break
        except ConnectionRefusedError:
            pass
    else:
        sent += 1
    print((time.perf_counter() - begin) * 1000, sent, flush=True)
    time.sleep(0.2)
"""

# These send, and return when they began with the last.
SEND_PACKET = """
def send(source, packet):
    knocker = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    begin = time.perf_counter()
    knocker.sendto(packet.encode(), (server, 62201))
    return begin
"""
SEND_HITS = """
def send(source, ports):
    for port in ports.split(","):
        hit = socket.socket()
        hit.setblocking(False)
        hit.bind((source, 0))
        begin = time.perf_counter()
        hit.connect_ex((server, int(port)))
        hit.close()
    return begin
"""

# For each OpenSPA request prints milliseconds: of two powers, as one private operation needs them,
# then from the request until the port answers, and until the server has answered.
REQUESTED = """
import select, socket, sys, time
server, p, dp, q, dq = sys.argv[1], *map(int, sys.argv[2:])
def milliseconds(begin):
    return (time.perf_counter() - begin) * 1000
for line in sys.stdin:
    source, port, request = line.split()
    begin = time.perf_counter()
    pow(p // 3, dp, p), pow(q // 3, dq, q)
    times = {"pow": milliseconds(begin)}
    links = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2)]
    for link, where in zip(links, (int(port), 22211)):
        link.bind((source, 0))
        link.connect((server, where))
    begin = time.perf_counter()
    links[1].send(bytes.fromhex(request))
    while len(times) < 3 and milliseconds(begin) < 20000:
        if links[0] not in times:
            links[0].send(b"x")
        for link in select.select(links, [], [], 0.0002)[0]:
            link.recv(2000)
            times.setdefault(link, milliseconds(begin))
    print(times["pow"], *[times.get(link, "never") for link in links], flush=True)
    time.sleep(0.2)
"""

# Answers UDP datagrams on a range of ports.
ECHO = """
import select, socket, sys
sockets = []
for port in range(int(sys.argv[1]), int(sys.argv[2])):
    echo = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    echo.bind(("", port))
    sockets.append(echo)
print("ready", flush=True)
while True:
    for echo in select.select(sockets, [], [])[0]:
        data, peer = echo.recvfrom(100)
        echo.sendto(data, peer)
"""

# Sends the packets of stdin, in hex, in turn as fast as it can for some seconds; prints how many.
FLOOD = """
import socket, sys, time
packets = [bytes.fromhex(line) for line in sys.stdin]
flood = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
flood.connect((sys.argv[1], int(sys.argv[3])))
end, sent = time.monotonic() + float(sys.argv[2]), 0
while time.monotonic() < end:
    for packet in packets:
        try:
            flood.send(packet)
        except OSError:
            continue
        sent += 1
        time.sleep(float(sys.argv[4])) if len(sys.argv) > 4 else None
print(sent)
"""

# Sends them so many a second until SIGTERM, and then prints how many a second these were. With a
# fourth argument, each comes from an address of its own.
PACED_FLOOD = """
import os, signal, socket, struct, sys, time
packets = [bytes.fromhex(line) for line in sys.stdin]
server, rate, port = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
def forged(payload):
    return struct.pack(">BBHHHBBH4s4sHHHH", 0x45, 0, 28 + len(payload), 0, 0, 64, 17, 0,
                       b"\\x0b" + os.urandom(3), socket.inet_aton(server), 4000, port,
                       8 + len(payload), 0) + payload
flood, datagram = socket.socket(socket.AF_INET, socket.SOCK_DGRAM), bytes
if len(sys.argv) > 4:
    flood, datagram = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW), forged
flood.connect((server, port))
begin, sent = time.monotonic(), 0
def stop(*_):
    print(int(sent / (time.monotonic() - begin)), flush=True)
    os._exit(0)
signal.signal(signal.SIGTERM, stop)
print("ready", flush=True)
while True:
    due = int(rate * (time.monotonic() - begin))
    while sent < due:
        try:
            flood.send(datagram(packets[sent % len(packets)]))
        except OSError:
            pass
        sent += 1
    time.sleep(max(0, (sent + 1) / rate - (time.monotonic() - begin)))
"""

# Takes connections on two ports: fills those on the first, empties those on the second.
PIPE = """
import socket, sys, threading
size, chunk = int(sys.argv[1]), bytes(1 << 20)
def fill(link):
    for _ in range(size // len(chunk)):
        link.sendall(chunk)
    link.close()
def empty(link):
    count = 0
    while True:
        got = link.recv_into(buffer)
        if not got:
            break
        count += got
    print("got", count, flush=True)
    link.close()
buffer = bytearray(1 << 20)
def serve(port, work):
    listener = socket.socket()
    listener.bind(("", port))
    listener.listen(5)
    while True:
        work(listener.accept()[0])
threading.Thread(target=serve, args=(22, fill), daemon=True).start()
threading.Thread(target=serve, args=(23, empty), daemon=True).start()
print("ready", flush=True)
threading.Event().wait()
"""


def median(values: List[float]) -> float:
    """The middle one."""
    return sorted(values)[len(values) // 2]


def show(title: str, rows: Dict[str, Optional[float]], unit: str) -> None:
    """Prints a row of results; the first is ours, to which the others are compared."""
    print("\n%s" % title)
    first = next(iter(rows.values()))
    for name, value in rows.items():
        if value is None:
            print("  %-44s not installed" % name)
        else:
            ratio = "  x %.2f" % (value / first) if first and value is not first else ""
            print("  %-44s %10.2f %s%s" % (name, value, unit, ratio))
    sys.stdout.flush()


def make_packet(access: str, key: str = KEY, hmac_key: str = HMAC_KEY, seconds: int = 0,
                source: str = CLIENT4) -> str:
    """An SPA packet of our client's, made now, that asks to open for so long."""
    message = client.Message(client.random_digits(), "bench", int(time.time()), 3 if seconds else 1,
                             "%s,%s" % (source, access), "", seconds)
    plaintext = client.encode_message(message, "SHA256")
    data = client.encrypt_salted("CBC", key.encode(), os.urandom(8), plaintext)
    return str(client.seal(data, hmac_key.encode(), "SHA256"))


def start_fwknopd(host: Host, udp: bool, access: str = STANZA) -> Process:
    """The real fwknopd with these stanzas, on iptables: its rules go before a policy of drop."""
    directory = host.path("fwknopd")
    os.mkdir(directory)
    config, stanzas = (os.path.join(directory, name) for name in ("fwknopd.conf", "access.conf"))
    for path, text in ((config, "PCAP_INTF eth0;\n"), (stanzas, access)):
        with open(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), "w") as file:
            file.write(text)
    process = host.start("fwknopd", "-f", "-c", config, "-a", stanzas, "-r", directory,
                         *["-U"] * udp)
    process.wait_for("Kicking off UDP server" if udp else "Starting fwknopd main event loop")
    return process


def measure(cable: Cable, send: str, knocks: List[str]) -> float:
    """Milliseconds from the last packet of each knock until the firewall lets one in, median."""
    return median(measure_each(cable, send, knocks))


def measure_each(cable: Cable, send: str, knocks: List[str]) -> List[float]:
    """The same, all of them."""
    cable.server.run("sysctl", "-qw", "net.ipv4.icmp_ratelimit=0")
    answers = cable.client.run(sys.executable, "-I", "-S", "-c", send + OPENED, SERVER4,
                               input="".join(knocks)).split()
    if "never" in answers or len(answers) != ROUNDS:
        raise AssertionError("not all knocks opened: %s" % answers)
    return [float(answer) for answer in answers]


def measure_open(cable: Cable) -> float:
    """The same for packets, each for a port of its own."""
    return measure(cable, SEND_PACKET, packets_for_ports())


def measure_fastest(cable: Cable) -> float:
    """The fastest of the same: what other processes do does not hide how cost grows."""
    return min(measure_each(cable, SEND_PACKET, packets_for_ports()))


def packets_for_ports() -> List[str]:
    """A line for SEND_PACKET with a packet for each port."""
    return ["%s %d %s\n" % (CLIENT4, port, make_packet("udp/%d" % port))
            for port in range(20000, 20000 + ROUNDS)]


def bench_open() -> None:
    """Knock to open: ours on each backend, fwknopd with both captures."""
    ports = ", ".join("udp/%d" % port for port in range(20000, 20000 + ROUNDS))
    rows: Dict[str, Optional[float]] = {}
    for name, config, rules in (
            ("spa_server.py, nft guard", "FIREWALL_TYPE nft;\nGUARD_PORTS %s;\n" % ports, ""),
            ("spa_server.py, nft accept",
             "FIREWALL_TYPE nft;\nNFT_ACCEPT_CHAINS inet filter input;\n", DROP),
            ("spa_server.py, iptables guard",
             "FIREWALL_TYPE iptables;\nGUARD_PORTS %s;\n" % ports, ""),
            ("spa_server.py, iptables accept", "FIREWALL_TYPE iptables;\n", "iptables")):
        with Cable() as cable:
            drop_all(cable.server, rules)
            server = Server(cable.server, config, STANZA).start()
            rows[name] = measure_open(cable)
            server.stop()
    for name, udp in (("fwknopd, pcap", False), ("fwknopd, UDP server", True)):
        rows[name] = None
        if shutil.which("fwknopd"):
            with Cable() as cable:
                drop_all(cable.server, "iptables")
                if udp:
                    cable.server.run("iptables", "-A", "INPUT", "-p", "udp", "--dport", "62201",
                                     "-j", "ACCEPT")
                process = start_fwknopd(cable.server, udp)
                rows[name] = measure_open(cable)
                process.end()
    show("knock to open, median of %d" % ROUNDS, rows, "ms")


KNOCK_DOOR = """[door]
sequence = 7000,8000,9000
tcpflags = syn
start_command = iptables -I INPUT -s %IP% -p udp --dport 20000 -j ACCEPT
cmd_timeout = 20
stop_command = iptables -D INPUT -s %IP% -p udp --dport 20000 -j ACCEPT
"""
KNOCK_STANZA = ("SOURCE ANY\nKNOCK_SEQUENCE 7000,8000,9000\nOPEN_PORTS udp/20000\n"
                "FW_ACCESS_TIMEOUT 300\n")
FIRST_HITS, HIT_SECONDS = 5000, 4.0  # a second, and how many seconds


def measure_knock(cable: Cable) -> float:
    """The same for three hits, each time from an address of its own."""
    sources = ["10.55.0.%d" % (number + 20) for number in range(ROUNDS)]
    for source in sources:
        cable.client.run("ip", "addr", "add", source + "/24", "dev", "eth0")
    return measure(cable, SEND_HITS,
                   [source + " 20000 7000,8000,9000\n" for source in sources])


def bench_knock() -> None:
    """Sequences: to open, and a flood of first hits; knockd runs the same commands as ours."""
    rows: Dict[str, Optional[float]] = {}
    for name, config, rules in (
            ("spa_server.py, stanza, nft", "FIREWALL_TYPE nft;\n"
             "NFT_ACCEPT_CHAINS inet filter input;\n", DROP),
            ("spa_server.py, stanza, iptables", "FIREWALL_TYPE iptables;\n", "iptables")):
        with Cable() as cable:
            drop_all(cable.server, rules)
            server = Server(cable.server, config, KNOCK_STANZA).start()
            rows[name] = measure_knock(cable)
            server.stop()
    kinds = {"spa_server.py, knockd.conf, runs iptables": NAMED, "knockd, runs iptables": REAL}
    for name, kind in kinds.items():
        rows[name] = None
        if kind == NAMED or shutil.which("knockd"):
            with Cable() as cable:
                drop_all(cable.server, "iptables")
                knockd = Knockd(cable.server, kind, KNOCK_DOOR).start(cable.client)
                rows[name] = measure_knock(cable)
                knockd.stop(signal.SIGKILL)  # at SIGTERM, knockd waits for a command that waits
    show("last hit of a sequence to open, median of %d" % ROUNDS, rows, "ms")
    flood: Dict[str, Optional[float]] = {}
    for name, kind in (("spa_server.py", NAMED), ("knockd", REAL)):
        flood[name] = flood_of_hits(kind) if kind == NAMED or shutil.which("knockd") else None
    show("CPU for a first hit, %d a second from as many addresses" % FIRST_HITS, flood, "us")


def flood_of_hits(kind: str) -> float:
    """Microseconds of CPU for each hit that was heard."""
    with Cable() as cable:
        drop_all(cable.server, "iptables")
        knockd = Knockd(cable.server, kind, KNOCK_DOOR).start(cable.client)
        assert knockd.process is not None
        pid = knockd.process.popen.pid
        before = cpu_seconds(pid)
        sent = int(cable.client.run(sys.executable, "-I", "-S", "-c", FLOOD_OF_HITS, SERVER4, 7000,
                                    HIT_SECONDS, FIRST_HITS))
        wait_until_idle(pid)
        used = cpu_seconds(pid) - before
        knockd.process.end(signal.SIGKILL)
        heard = knockd.log().count("door: Stage 1") if kind == REAL else sent  # ours logs not all
        return used / heard * 1e6


def drop_all(host: Host, rules: str) -> None:
    """A host firewall that drops: "" for none, iptables' name, or nft's text."""
    if rules.startswith("iptables"):
        host.run("sh", "-c", "iptables -P INPUT DROP; iptables -A INPUT -i lo -j ACCEPT; iptables "
                 "-A INPUT -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT".replace(
                     "iptables", rules))
    elif rules:
        host.run("nft", "-f", "-", input=rules)


def cpu_seconds(pid: int) -> float:
    """User and system time of a process and of the programs that it ran, so far.

    Its own to the nanosecond where the kernel counts so.
    """
    fields = read("/proc/%d/stat" % pid).rpartition(")")[2].split()
    own, others = [sum(map(int, fields[start:start + 2])) / os.sysconf("SC_CLK_TCK")
                   for start in (11, 13)]
    with contextlib.suppress(OSError, IndexError):  # where CONFIG_SCHED_INFO is off
        own = sum(int(read(path).split()[0]) for path in glob.glob(
            "/proc/%d/task/*/schedstat" % pid)) / 1e9
    return own + others


def bench_junk() -> None:
    """CPU for a packet that opens nothing, when more come than can be looked at."""
    garbage = [("!" + os.urandom(100).hex()).encode() for _ in range(200)]
    for title, packets in (("wrong key", wrong_keys()), ("garbage", garbage)):
        rows: Dict[str, Optional[float]] = {
            name: junk_ours(packets, config, STANZA) for name, config in (
                ("spa_server.py, packet socket", ""),
                ("spa_server.py, UDP server", "ENABLE_UDP_SERVER Y;\n"))}
        rows["fwknopd, UDP server"] = junk_fwknopd(packets) if shutil.which("fwknopd") else None
        show("CPU for a junk packet (%s), saturated" % title, rows, "us")


def wrong_keys() -> List[bytes]:
    """Packets of the right form that nobody's keys have made."""
    return [make_packet("tcp/22", hmac_key="wrong").encode() for _ in range(200)]


def to_hex(packets: List[bytes]) -> str:
    """Packets as FLOOD and PACED_FLOOD read them."""
    return "".join(packet.hex() + "\n" for packet in packets)


def junk_ours(packets: List[bytes], config: str, access: str, port: int = 62201,
              *pause: float) -> float:
    """Microseconds of CPU for each packet that our server looked at; for each one that was sent if
    the kernel dropped them all. With a `pause`, they come one at a time, so many seconds apart."""
    with Cable() as cable:
        server = Server(cable.server, "FIREWALL_TYPE none;\n" + config, access).start()
        pid = server.running().popen.pid
        before = cpu_seconds(pid)
        sent = cable.client.run(sys.executable, "-I", "-S", "-c", FLOOD, SERVER4, JUNK_SECONDS,
                                port, *pause, input=to_hex(packets))
        wait_until_idle(pid)
        used = cpu_seconds(pid) - before
        server.stop()
        seen = server.wait_for("Packets seen: ").partition("rejected: ")[2].partition(";")[0]
        counts = [int(each.split()[0]) for each in seen.replace("none", sent).split(", ")
                  if "untried" not in each]
        return used / sum(counts) * 1e6


def wait_until_idle(pid: int) -> None:
    """Waits until a process does nothing for a moment."""
    def idle() -> bool:
        before = cpu_seconds(pid)
        time.sleep(0.3)
        return cpu_seconds(pid) - before < 0.02
    wait_for(idle, "an idle process", TIMEOUT)  # it may have much to do still


def junk_fwknopd(packets: List[bytes], access: str = STANZA, *pause: float) -> float:
    """The same for fwknopd's UDP server: what it looked at is what the kernel did not drop."""
    with Cable() as cable:
        process = start_fwknopd(cable.server, True, access)
        before = cpu_seconds(process.popen.pid)
        sent = int(cable.client.run(sys.executable, "-I", "-S", "-c", FLOOD, SERVER4, JUNK_SECONDS,
                                    62201, *pause, input=to_hex(packets)))
        wait_until_idle(process.popen.pid)
        used = cpu_seconds(process.popen.pid) - before
        line = next(line for line in cable.server.run("cat", "/proc/net/udp").splitlines()
                    if ":F2F9 " in line)
        process.end()
        return used / (sent - int(line.split()[-1])) * 1e6


FLOODS = ((3000, 1), (30000, 1), (100000, 1), (5900, 50))  # junk packets a second, and stanzas
HONEST, HONEST_SECONDS = 20, 0.2  # knocks during a flood, and between two of them


def servers(access: str = STANZA) -> Dict[str, Callable[[Host], Process]]:
    """Functions that start each server on iptables, by name: ours, and fwknopd where it is."""
    found: Dict[str, Callable[[Host], Process]] = {
        "spa_server.py, packet socket": partial(start_ours, "", access=access),
        "spa_server.py, UDP server": partial(
            start_ours, "ENABLE_UDP_SERVER Y;\n", access=access)}
    if shutil.which("fwknopd"):
        found["fwknopd, pcap"] = partial(start_fwknopd, udp=False, access=access)
        found["fwknopd, UDP server"] = partial(start_fwknopd, udp=True, access=access)
    return found


def bench_flood() -> None:
    """How many of some honest packets, each sent once, open while junk with a wrong key comes."""
    for rate, stanzas in FLOODS:
        rows: Dict[str, Optional[float]] = {}
        for name, start in servers(many_stanzas(stanzas)).items():
            opened, reached = survive(rate, start)
            rows["%s (%d a second)" % (name, reached)] = opened
        rows["knockd, its sequences"] = survive_knocks(rate) if shutil.which("knockd") else None
        show("of %d knocks under %d junk packets a second opened, stanzas: %d"
             % (HONEST, rate, stanzas), rows, "")


RATES, RATE_SECONDS = (100, 1000, 10000), 5  # junk packets a second, and for how long


def bench_rates() -> None:
    """How much of a core junk takes, by its rate, and how long a knock takes meanwhile."""
    for title, packets in (("well-formed", wrong_keys()),
                           ("random bytes", [os.urandom(200) for _ in range(200)])):
        for rate in RATES:
            rows: Dict[str, Optional[float]] = {name: load(rate, packets, start)
                                                for name, start in servers().items()}
            show("%d junk packets a second, %s" % (rate, title), rows, "% of a core")
    times: Dict[int, List[float]] = {}
    for rate in RATES:
        with Cable() as cable:
            Server(cable.server, GUARD, STANZA).start()
            with paced_flood(cable, rate, 62201, wrong_keys()):
                times[rate] = measure_each(cable, SEND_PACKET, packets_for_ports())
    for title, choose in (("median", median), ("worst", max)):
        show("knock to open meanwhile, nft guard, %s of %d" % (title, ROUNDS), {
            "%d junk packets a second" % rate: choose(each) for rate, each in times.items()}, "ms")


def load(rate: int, packets: List[bytes], start: Callable[[Host], Process]) -> float:
    """How much of a core a server takes while these packets come."""
    with Cable() as cable:
        drop_all(cable.server, "iptables")
        cable.server.run("iptables", "-A", "INPUT", "-p", "udp", "--dport", "62201", "-j", "ACCEPT")
        pid = start(cable.server).popen.pid
        with paced_flood(cable, rate, 62201, packets):
            time.sleep(1.5)
            before, begin = cpu_seconds(pid), time.perf_counter()
            time.sleep(RATE_SECONDS)
            return (cpu_seconds(pid) - before) / (time.perf_counter() - begin) * 100


FAIR_RATE, FAIR_STANZAS, FAIR_KNOCKERS, FAIR_KNOCKS = 10000, 300, 10, 5


def bench_fair() -> None:
    """Knocks under more junk than can be tried, from forged addresses: of addresses for which a
    port was opened before, and of others."""
    rows: List[Dict[str, Optional[float]]] = [{} for _ in range(4)]
    for name, start in servers(many_stanzas(FAIR_STANZAS)).items():
        if "UDP server" in name:
            continue  # Linux drops packets from forged addresses before a UDP socket
        with Cable() as cable:
            drop_all(cable.server, "iptables")
            start(cable.server)
            knock_often(cable, [CLIENT4], 20000)
            with paced_flood(cable, FAIR_RATE, 62201, wrong_keys(), forged=True):
                known = knock_often(cable, [CLIENT4] * FAIR_KNOCKERS, 20001)
                unknown = knock_often(cable, ["10.55.0.%d" % (20 + number)
                                              for number in range(FAIR_KNOCKERS)], 20000)
        for row, figure in zip(rows, (
                median([each[0] for each in known]), max(each[0] for each in known),
                max(each[1] for each in known), max(each[1] for each in unknown))):
            row[name] = figure
    for row, title, unit in zip(rows, (
            "known address: median of %d" % FAIR_KNOCKERS, "known address: worst",
            "known address: most knocks, one a second (%d: never)" % (FAIR_KNOCKS + 1),
            "unknown address: most knocks"), ("ms", "ms", "", "")):
        show("%d stanzas, %d junk packets a second from forged addresses; %s"
             % (FAIR_STANZAS, FAIR_RATE, title), row, unit)


def knock_often(cable: Cable, sources: List[str], port: int) -> List[Tuple[float, int]]:
    """Knocks from each address for a port of its own, once a second until the port answers;
    returns milliseconds and how many knocks that took."""
    for source in set(sources) - {CLIENT4}:
        cable.client.run("ip", "addr", "add", source + "/24", "dev", "eth0")
    echo = cable.server.start(sys.executable, "-I", "-S", "-c", ECHO, port, port + len(sources))
    echo.wait_for("ready")
    lines = cable.client.run(
        sys.executable, "-I", "-S", "-c", KNOCKS_AGAIN, SERVER4,
        input="".join("%s %d %s\n" % (source, port + number, ",".join(
            make_packet("udp/%d" % (port + number), source=source) for _ in range(FAIR_KNOCKS)))
            for number, source in enumerate(sources))).splitlines()
    echo.end(signal.SIGKILL)
    return [(float(line.split()[0]), int(line.split()[1])) for line in lines]


@contextlib.contextmanager
def paced_flood(cable: Cable, rate: int, port: int, packets: List[bytes],
                forged: bool = False) -> Iterator[List[float]]:
    """Sends these packets to a port of the server meanwhile, so many a second.

    The list that it gives has the rate that was reached, at the end.
    """
    reached: List[float] = []
    flood = subprocess.Popen(
        cable.client.command([sys.executable, "-I", "-S", "-c", PACED_FLOOD, SERVER4, rate, port]
                             + ["forged"] * forged),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, universal_newlines=True)
    assert flood.stdin and flood.stdout
    with flood:
        flood.stdin.write(to_hex(packets))
        flood.stdin.close()
        flood.stdout.readline()
        try:
            yield reached
        finally:
            flood.terminate()
            reached.append(float(flood.stdout.readline()))


def start_ours(config: str, host: Host, access: str = STANZA, kind: str = "iptables") -> Process:
    """Ours with these stanzas, on iptables or nft."""
    return Server(host, "FIREWALL_TYPE %s;\n" % kind + config, access).start().running()


def survive(rate: int, start: Callable[[Host], Process]) -> Tuple[float, float]:
    """How many honest knocks of HONEST opened their port on a server that `start` starts, and the
    rate that the flood reached."""
    with Cable() as cable:
        drop_all(cable.server, "iptables")
        cable.server.run("iptables", "-A", "INPUT", "-p", "udp", "--dport", "62201", "-j", "ACCEPT")
        process = start(cable.server)
        with paced_flood(cable, rate, 62201, wrong_keys()) as reached:
            for port in range(20000, 20000 + HONEST):
                cable.client.send(SERVER4, 62201, make_packet("udp/%d" % port))
                time.sleep(HONEST_SECONDS)
        wait_until_idle(process.popen.pid)
        rules = cable.server.run("iptables", "-S")
        process.end()
        return (float(sum("--dport %d " % port in rules for port in range(20000, 20000 + HONEST))),
                reached[0])


def survive_knocks(rate: int) -> float:
    """How many of HONEST sequences knockd heard under as much junk for our port."""
    sources = ["10.55.0.%d" % (number + 20) for number in range(HONEST)]
    with Cable() as cable:
        drop_all(cable.server, "iptables")
        for source in sources:
            cable.client.run("ip", "addr", "add", source + "/24", "dev", "eth0")
        knockd = Knockd(cable.server, REAL, KNOCK_DOOR).start(cable.client)
        with paced_flood(cable, rate, 62201, wrong_keys()):
            for source in sources:
                hit(cable.client, source, "7000", "8000", "9000")
                time.sleep(HONEST_SECONDS)
        assert knockd.process is not None
        wait_until_idle(knockd.process.popen.pid)
        knockd.process.end(signal.SIGKILL)
        return float(sum(SESAME % (source, "door") in knockd.log() for source in sources))


STANZAS, OPENSPA_CLIENTS = (1, 10, 100, 1000, 10000), (100, 1000, 10000)
PAUSE = 0.05  # seconds between packets that come one at a time


def many_stanzas(count: int) -> str:
    """Returns an access.conf of `count` stanzas; STANZA is the last."""
    return "".join("SOURCE ANY\nKEY key%d\nHMAC_KEY hmac%d\n" % (number, number)
                   for number in range(1, count)) + STANZA


def bench_stanzas() -> None:
    """What a junk packet costs, and what a server needs, by the number of stanzas."""
    rows: List[Dict[str, Optional[float]]] = [{} for _ in range(5)]
    for count in STANZAS:
        stanzas = many_stanzas(count)
        with Cable() as cable:
            server = Server(cable.server, GUARD, stanzas).start()
            pid = server.running().popen.pid
            figures = [cpu_seconds(pid) * 1000, memory_kilobytes(pid) / 1024,
                       measure_fastest(cable)]
            server.stop()
        figures += [junk_ours(wrong_keys(), "", stanzas, 62201, *pause)
                    for pause in ((), (PAUSE,))]
        for row, figure in zip(rows, figures):
            row["stanzas: %d" % count] = figure
    rows[-1]["fwknopd, UDP server, stanzas: 1000"] = junk_fwknopd(
        wrong_keys(), many_stanzas(1000), PAUSE) if shutil.which("fwknopd") else None
    for title, unit, row in zip((
            "CPU of a start; goal: at most 3000 ms with 10,000",
            "most memory resident (VmHWM); goal: at most 120 MB with 10,000",
            "knock with the keys of the last stanza to open, nft guard, fastest of %d" % ROUNDS,
            "CPU for a junk packet (wrong key), saturated",
            "the same, one at a time; goal: at most 2200 us with 1,000"),
            ("ms", "MB", "ms", "us", "us"), rows):
        show(title, row, unit)
    show("to look for an OpenSPA client's file, fastest of %d" % ROUNDS,
         {"files: %d" % count: find_client(count) for count in OPENSPA_CLIENTS}, "ms")


def find_client(count: int) -> float:
    """Milliseconds to look for a client's file in a directory with so many others."""
    with tempfile.TemporaryDirectory() as directory:
        for number in range(count):
            with open(os.path.join(directory, "%032x.pem" % number), "w"):
                pass
        times = []
        for _ in range(ROUNDS):
            begin = time.perf_counter()
            assert read_client_key(directory, "f" * 32) is None
            times.append((time.perf_counter() - begin) * 1000)
        return min(times)


GRANTS = (0, 1000, 5000)
# An idle server asks every 30 seconds whether it missed an announcement of a change.
REACH_SECONDS, IDLE_SECONDS, ENDING = 60, 65, 1000


def bench_grants() -> None:
    """Thousands of grants: reach them, the next one, nothing to do, a flush, and the end."""
    cases: Dict[str, Tuple[str, Callable[[Host], Process], List[str]]] = {
        "spa_server.py, nft": (DROP, partial(start_ours, "NFT_ACCEPT_CHAINS inet filter input;\n",
                                             kind="nft"),
                               ["nft", "flush set inet filter spa4"])}
    for program in ("iptables-nft", "iptables-legacy"):
        exe = "FIREWALL_EXE %s;\n" % shutil.which(program)
        cases["spa_server.py, " + program] = (
            program, partial(start_ours, exe), [program, "-F", "FWKNOP_INPUT"])
    if shutil.which("fwknopd"):
        cases["fwknopd, UDP server, iptables"] = "iptables", partial(start_fwknopd, udp=True), []
    rows: Dict[Tuple[str, str], Dict[str, Optional[float]]] = {}
    for name, (rules, start, flush) in cases.items():
        for count in GRANTS:
            with Cable() as cable:
                drop_all(cable.server, rules)
                process = start(cable.server)
                if not flush:
                    cable.server.run("iptables", "-A", "INPUT", "-p", "udp", "--dport", "62201",
                                     "-j", "ACCEPT")
                reached, took = reach(cable, process, count)
                if count == GRANTS[-1]:
                    rows.setdefault(("%d grants: reached in %d s" % (count, REACH_SECONDS), ""),
                                    {})[name] = reached
                    rows.setdefault(("the time for it", "s"), {})[name] = took
                    rows.setdefault(("then, nothing to do", "% CPU"), {})[name] = idle_share(
                        process.popen.pid)
                rows.setdefault(("knock to open with %d grants, fastest of %d" % (count, ROUNDS),
                                 "ms"), {})[name] = measure_fastest(cable)
                if count == GRANTS[-1] and flush:
                    mark, begin = process.mark(), time.perf_counter()
                    cable.server.run(*flush)
                    process.wait_for("Put back", mark)
                    rows.setdefault(("put back after a flush", "s"), {})[name] = (
                        time.perf_counter() - begin)
                process.end(signal.SIGKILL)
        if flush:
            with Cable() as cable:
                drop_all(cable.server, rules)
                rows.setdefault(("%d end together: the last is closed so late" % ENDING, "ms"), {})[
                    name] = end_together(cable, start(cable.server))
    for (title, unit), row in rows.items():
        show(title, row, unit)


def reach(cable: Cable, process: Process, count: int) -> Tuple[float, float]:
    """Returns how many grants a server opens in a minute, of `count`, and the seconds it took.

    Up to 50 packets wait for it.
    """
    packets = [make_packet("udp/%d" % port) for port in range(30000, 30000 + count)]
    begin, sent, opened, took = time.monotonic(), 0, 0, 0.0
    while opened < count and took < REACH_SECONDS:
        cable.client.send(SERVER4, 62201, *packets[sent:opened + 50])
        sent = max(sent, min(opened + 50, count))
        time.sleep(0.02)
        opened = process.output().count("Added access rule")
        took = time.monotonic() - begin
    return opened, took


def idle_share(pid: int) -> float:
    """Returns how much of a core a process and its programs take, in percent."""
    wait_until_idle(pid)
    before = cpu_seconds(pid)
    time.sleep(IDLE_SECONDS)
    return (cpu_seconds(pid) - before) / IDLE_SECONDS * 100


def end_together(cable: Cable, process: Process) -> float:
    """Milliseconds from the end of many grants until the server has closed the last of them."""
    end, last = time.time() + 30 * slowness(), 0.0
    for port in range(30000, 30000 + ENDING):
        seconds = int(end - time.time()) + 1
        cable.client.send(SERVER4, 62201, make_packet("udp/%d" % port, seconds=seconds))
        last = max(last, time.time() + seconds)
        if port % 50 == 49:  # what waits for the server would end later
            wait_for(lambda: process.output().count("Added access rule")
                     > port - 30000, "grants")  # noqa: B023
    wait_for(lambda: process.output().count("Removed rule") == ENDING, "the end of all grants",
             2 * TIMEOUT)
    return (time.time() - last) * 1000


OPENSPA_JUNK, OPENSPA_ADK_JUNK = 2000, 10000  # requests a second
GUARD = "FIREWALL_TYPE nft;\nGUARD_PORTS %s;\n" % ", ".join(
    "udp/%d" % port for port in range(20000, 20000 + ROUNDS))


def bench_openspa() -> None:
    """RSA alone, request to open and to answer, junk, and the delay of a packet under junk."""
    with tempfile.TemporaryDirectory() as directory:
        config, access, ospa = make_openspa(directory)
        with Cable() as cable:
            Server(cable.server, GUARD + config, access).start()
            show_requests("OpenSPA request", cable, ospa)
        bench_openspa_junk(config, access, junk_requests(ospa))
    with tempfile.TemporaryDirectory() as directory:
        config, access, ospa = make_openspa(directory, "--adk")
        with Cable() as cable:
            Server(cable.server, GUARD + config, access).start()
            with paced_flood(cable, OPENSPA_ADK_JUNK, 22211, junk_requests(ospa)):
                show_requests("OpenSPA request with ADK, under %d junk requests a second"
                              % OPENSPA_ADK_JUNK, cable, ospa)


def show_requests(title: str, cable: Cable, ospa: Dict[str, Any]) -> None:
    """How long requests take that are sent once, beside RSA alone."""
    echo = cable.server.start(sys.executable, "-I", "-S", "-c", ECHO, 20000, 20000 + ROUNDS)
    echo.wait_for("ready")
    p, q, dp, dq, _ = ospa[client.PRIVATE].primes
    lines = cable.client.run(
        sys.executable, "-I", "-S", "-c", REQUESTED, SERVER4, p, dp, q, dq,
        input="".join("%s %d %s\n" % (CLIENT4, port, make_request(ospa, port).hex())
                      for port in range(20000, 20000 + ROUNDS))).splitlines()
    columns = list(zip(*[line.split() for line in lines]))
    if "never" in columns[1] + columns[2]:
        raise AssertionError("not all requests opened and were answered: %s" % lines)
    show("%s, nft guard, 2048 bits, median of %d" % (title, ROUNDS), {
        name: median([float(word) for word in column]) for name, column in zip(
            ("RSA private operation (its two powers)", "to open", "to answer"), columns)}, "ms")


def bench_openspa_junk(config: str, access: str, junk: List[bytes]) -> None:
    """What junk costs, and how it delays a packet of fwknop's; beside that of junk for fwknop."""
    udp = "FIREWALL_TYPE none;\nENABLE_UDP_SERVER Y;\n"
    show("CPU for a junk packet, saturated, UDP server", {
        "for fwknop (wrong key)": junk_ours(wrong_keys(), udp, STANZA),
        "OpenSPA, wrong length": junk_ours([each + b"x" for each in junk], udp + config, access,
                                           22211),
        "OpenSPA, right length": junk_ours(junk, udp + config, access, 22211)}, "us")
    times: Dict[str, List[float]] = {}
    for name, port, packets in (("for fwknop (wrong key)", 62201, wrong_keys()),
                                ("OpenSPA, right length", 22211, junk)):
        with Cable() as cable:
            Server(cable.server, GUARD + config, STANZA + access).start()
            with paced_flood(cable, OPENSPA_JUNK, port, packets):
                times[name] = measure_each(cable, SEND_PACKET, packets_for_ports())
    for title, choose in (("median", median), ("worst", max)):
        show("fwknop's packet to open, under %d junk packets a second, %s of %d"
             % (OPENSPA_JUNK, title, ROUNDS),
             {name: choose(each) for name, each in times.items()}, "ms")


def make_openspa(directory: str, *options: str) -> Tuple[str, str, Dict[str, Any]]:
    """fwknopd.conf, access.conf and a client's OSPA file, by keygen.py."""
    paths = [os.path.join(directory, name) for name in ("fwknopd.conf", "access.conf", "b.ospa")]
    subprocess.run([sys.executable, os.path.join(TOP, "keygen.py"), "--openspa", "b", "--server",
                    SERVER4, "--openspa-dir", directory, "--config-file", paths[0],
                    "--access-file", paths[1], "--timeout", "300", *options],
                   cwd=directory, check=True, stderr=subprocess.DEVNULL)
    config, access, ospa = map(read, paths)
    return config, access.replace("OPEN_PORTS", "#"), client.parse_ospa(ospa, paths[2])


def make_request(ospa: Dict[str, Any], port: int) -> bytes:
    """An OpenSPA request of our client's, made now."""
    settings: Any = types.SimpleNamespace(ospa=ospa, time_offset=0)
    return bytes(client.OspaRequest(settings, "udp/%d" % port, CLIENT4, SERVER4).datagram)


def junk_requests(ospa: Dict[str, Any]) -> List[bytes]:
    """Requests of a client that the server does not know, without ADK: RSA alone can tell."""
    stranger = dict(ospa, **{"clientUUID": "0" * 32, client.ADK: b""})
    return [make_request(stranger, 20000) for _ in range(50)]


def timed(command: List[str]) -> Callable[[], float]:
    """A function that runs a command and returns its milliseconds."""
    def run() -> float:
        begin = time.perf_counter()
        subprocess.check_call(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return (time.perf_counter() - begin) * 1000
    return run


def medians(commands: Dict[str, List[str]]) -> Dict[str, Optional[float]]:
    """The median milliseconds of commands that are run in turn; the first round does not count."""
    results: Dict[str, List[float]] = {name: [] for name in commands}
    for _ in range(ROUNDS + 1):
        for name, command in commands.items():
            results[name].append(timed(command)())
    return {name: median(each[1:]) for name, each in results.items()}


def bench_client() -> None:
    """A whole client process for one knock at loopback, in turn with a bare interpreter."""
    python = os.path.realpath(sys.executable)
    knock = KEYS + ["-A", "tcp/22", "-a", CLIENT4, "-D", "127.0.0.1"]
    script = SPA_CLIENT[1]
    commands = {"python3 -I -S spa_client.py": [python, "-I", "-S", script, "--no-rc-file"] + knock,
                "bare python3 -I -S": [python, "-I", "-S", "-c", "pass"]}
    if shutil.which("fwknop"):
        commands["fwknop (C)"] = FWKNOP + knock
    rows = medians(commands)
    show("one knock, whole client process, median of %d" % ROUNDS, rows, "ms")
    judge(rows, 5, "x bare Python")
    with installed("spa_client") as launcher:
        rows = medians({"installed, by its launcher": [launcher, "--no-rc-file"] + knock,
                        "bare python3 -I -S": [python, "-I", "-S", "-c", "pass"]})
    show("the same, compiled before", rows, "ms")
    judge(rows, 2, "x bare Python")


def judge(rows: Dict[str, Optional[float]], most: float, unit: str) -> None:
    """Say whether the first row is at most `most` times the second."""
    ours, bare = list(rows.values())[:2]
    assert ours and bare
    print("  %.2f %s; goal: at most %g" % (ours / bare, unit, most))


@contextlib.contextmanager
def installed(name: str) -> Iterator[str]:
    """A launcher of a script that is compiled, as --print-launcher prints it, but elsewhere."""
    with tempfile.TemporaryDirectory() as directory:
        script = shutil.copy(os.path.join(TOP, name + ".py"), directory)
        py_compile.compile(script)
        text = subprocess.check_output([sys.executable, script, "--print-launcher"])
        path = os.path.join(directory, name)
        with open(path, "wb") as file:
            file.write(text.replace(b'"/usr/local/lib/spa"', repr(directory).encode()))
        os.chmod(path, 0o755)
        yield path


def bench_proxy() -> None:
    """A gigabyte through --proxy and through nc, from pipes and to pipes as ssh has them."""
    size = 1 << 30
    ours = SPA_CLIENT + KEYS + ["-s", "-A", "tcp/22,tcp/23", "-D", SERVER4, "--proxy", SERVER4]
    programs = {"spa_client.py --proxy": ours}
    if shutil.which("nc"):
        programs["nc -N"] = ["nc", "-N", SERVER4]
    down: Dict[str, List[float]] = {name: [] for name in programs}
    up: Dict[str, List[float]] = {name: [] for name in programs}
    with Cable() as cable:
        far = cable.server.start(sys.executable, "-I", "-S", "-c", PIPE, size)
        far.wait_for("ready")
        for _ in range(5):
            for name, program in programs.items():
                command = " ".join(cable.client.command(program))
                begin = time.perf_counter()
                counted = subprocess.check_output("%s 22 < /dev/null | wc -c" % command, shell=True)
                down[name].append(time.perf_counter() - begin)
                assert int(counted) == size, counted
                mark = far.mark()
                begin = time.perf_counter()
                subprocess.check_call("head -c %d /dev/zero | %s 23" % (size, command), shell=True)
                far.wait_for("got %d" % size, mark)
                up[name].append(time.perf_counter() - begin)
    for title, results in (("from the server", down), ("to the server", up)):
        show("1 GB %s, and the whole process around it, median of 5" % title,
             {name: median(values) for name, values in results.items()}, "s")


def memory_kilobytes(pid: int) -> float:
    """The most memory that a process has had resident (VmHWM of proc(5))."""
    with open("/proc/%d/status" % pid) as file:
        return float(next(line for line in file if line.startswith("VmHWM")).split()[1])


def bench_start() -> None:
    """From start until it listens, and memory then."""
    names = ("python3 spa_server.py", "installed, by its launcher", "fwknopd")
    times: Dict[str, List[float]] = {name: [] for name in names}
    memory: Dict[str, Optional[float]] = dict.fromkeys(names)
    for _ in range(5):
        with Cable() as cable, installed("spa_server") as launcher:
            server = Server(cable.server, "FIREWALL_TYPE nft;\nGUARD_PORTS tcp/22;\n", STANZA)
            for name, argv in zip(names, (SPA_SERVER, [launcher])):
                begin = time.perf_counter()
                process = cable.server.start(*argv, *server.files)
                process.wait_for(server.READY)
                times[name].append((time.perf_counter() - begin) * 1000)
                memory[name] = memory_kilobytes(process.popen.pid) / 1024
                process.end()
            if shutil.which("fwknopd"):
                begin = time.perf_counter()
                process = start_fwknopd(cable.server, False)
                times["fwknopd"].append((time.perf_counter() - begin) * 1000)
                memory["fwknopd"] = memory_kilobytes(process.popen.pid) / 1024
                process.end()
    show("start until listening, median of 5; goal: at most 120 ms installed",
         {name: median(values) if values else None for name, values in times.items()}, "ms")
    show("most memory resident (VmHWM); goals: at most 36 MB, and 18 MB installed", memory, "MB")


ROWS: Dict[str, Callable[[], None]] = {
    "open": bench_open, "junk": bench_junk, "rates": bench_rates, "flood": bench_flood,
    "fair": bench_fair, "stanzas": bench_stanzas, "grants": bench_grants, "knock": bench_knock,
    "openspa": bench_openspa, "client": bench_client, "proxy": bench_proxy, "start": bench_start}


def main(words: List[str]) -> int:
    """Runs the rows that were named, or all."""
    if set(words) - set(ROWS) or os.geteuid():
        print(__doc__, file=sys.stderr)
        return 2
    print("Python %s, Linux %s, %d CPUs"
          % (sys.version.split()[0], os.uname().release, os.cpu_count() or 0))
    COMPILE_BEFORE.clear()
    for word in words or ROWS:
        ROWS[word]()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
