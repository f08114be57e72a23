"""keygen.py --qr: the encoder against ISO/IEC 18004, a decoder of our own, and zbar.

Everything the decoder knows of a symbol is spelt out here once more, in other words than in the
encoder: a mistake would have to be made twice.
"""

import fcntl
import functools
import itertools
import os
import pty
import re
import struct
import subprocess
import sys
import tempfile
import termios
import unittest
from typing import Dict, Iterator, List, Tuple

import keygen
from tests.support import needs_programs
from tests.test_keygen import SCRIPT, WORK, FileTestCase, call, program


# Table 9 for versions 1 to 15: codewords of data in all blocks, of error correction in one block,
# and blocks.
TABLE = {
    "L": [(19, 7, 1), (34, 10, 1), (55, 15, 1), (80, 20, 1), (108, 26, 1), (136, 18, 2),
          (156, 20, 2), (194, 24, 2), (232, 30, 2), (274, 18, 4), (324, 20, 4), (370, 24, 4),
          (428, 26, 4), (461, 30, 4), (523, 22, 6)],
    "M": [(16, 10, 1), (28, 16, 1), (44, 26, 1), (64, 18, 2), (86, 24, 2), (108, 16, 4),
          (124, 18, 4), (154, 22, 4), (182, 22, 5), (216, 26, 5), (254, 30, 5), (290, 22, 8),
          (334, 22, 9), (365, 24, 9), (415, 24, 10)],
    "Q": [(13, 13, 1), (22, 22, 1), (34, 18, 2), (48, 26, 2), (62, 18, 4), (76, 24, 4), (88, 18, 6),
          (110, 22, 6), (132, 20, 8), (154, 24, 8), (180, 28, 8), (206, 26, 10), (244, 24, 12),
          (261, 20, 16), (295, 30, 12)],
    "H": [(9, 17, 1), (16, 28, 1), (26, 22, 2), (36, 16, 4), (46, 22, 4), (60, 28, 4), (66, 26, 5),
          (86, 26, 6), (100, 24, 8), (122, 28, 8), (140, 24, 11), (158, 28, 11), (180, 22, 16),
          (197, 24, 16), (223, 24, 18)],
}
ALIGNMENT = {1: [], **{version: [6, 4 * version + 10] for version in range(2, 7)},
             7: [6, 22, 38], 8: [6, 24, 42], 9: [6, 26, 46], 10: [6, 28, 50], 11: [6, 30, 54],
             12: [6, 32, 58], 13: [6, 34, 62], 14: [6, 26, 46, 66], 15: [6, 26, 48, 70]}
# Table C.1 after masking: level and mask, as all 32 read.
FORMATS = {
    "L": "111011111000100 111001011110011 111110110101010 111100010011101 110011000101111 "
         "110001100011000 110110001000001 110100101110110",
    "M": "101010000010010 101000100100101 101111001111100 101101101001011 100010111111001 "
         "100000011001110 100111110010111 100101010100000",
    "Q": "011010101011111 011000001101000 011111100110001 011101000000110 010010010110100 "
         "010000110000011 010111011011010 010101111101101",
    "H": "001011010001001 001001110111110 001110011100111 001100111010000 000011101100010 "
         "000001001010101 000110100001100 000100000111011",
}
VERSIONS = (0x07C94, 0x085BC, 0x09A99, 0x0A4D3, 0x0BBF6, 0x0C762, 0x0D847, 0x0E60D, 0x0F928)
# qrencode 4.1.1, `-8 -l M`, says this for GOLDEN_TEXT: a number for each row.
GOLDEN_TEXT = b"KEY_BASE64:" + b"Zm9v" * 4 + b" HMAC_KEY_BASE64:" + b"YmFy" * 8
GOLDEN = """
1fd5ec6b7f 105dc06d41 1746e6385d 1751c21d5d 174210d55d 104e3f4541 1fd555557f 0017224700 16e6c5254b
0dbbe74daf 04eedd3108 189bd51d4e 025731697f 0b2d6cfb54 126083484e 0a0df2e6e0 087009e31b 158a4f7488
0aff4543e3 018dfc20a9 07c8f4f625 1991f92ca6 11c51475ee 022bfa0cac 026470eddb 0a0e4237fa 0acc8f5542
153c609111 07da1f51fd 0014c36517 1fd7f5455d 1052cc331b 174b11bdf6 1752b16bed 175a602d38 104c2279cc
1fd9c2dcc3"""


def capacity(version: int, level: str) -> int:
    """Return the longest text of a symbol."""
    return TABLE[level][version - 1][0] - (2 if version < 10 else 3)


def text_of(length: int) -> bytes:
    """Return a text of this length in the alphabet of keys, always the same."""
    alphabet = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/=:_"
    return bytes(alphabet[(7 * i * i + 3 * i + length) % len(alphabet)] for i in range(length))


# ------------------------------------------------------------------- a decoder

def inverted(mask: int, y: int, x: int) -> bool:
    """Say whether a mask inverts a module (table 10)."""
    product = y * x
    if mask < 4:
        return (y + x, y, x, y + x)[mask] % (2, 2, 3, 3)[mask] == 0
    return (y // 2 + x // 3, product % 2 + 2 * (product % 3), product % 2 + product % 3,
            (y + x) % 2 + product % 3)[mask - 4] % (2, 6, 2, 2)[mask - 4] == 0


def is_data(version: int, y: int, x: int) -> bool:
    """Say whether a module belongs to the data, by the areas of all that does not."""
    size = 17 + 4 * version
    if y == 6 or x == 6 or (y < 9 and x < 9) or (y < 9 and x >= size - 8) \
            or (y >= size - 8 and x < 9):
        return False
    if version >= 7 and ((y < 6 and x >= size - 11) or (x < 6 and y >= size - 11)):
        return False
    for row, column in itertools.product(ALIGNMENT[version], repeat=2):
        corner = (row, column) in ((6, 6), (6, size - 7), (size - 7, 6))
        if not corner and abs(y - row) <= 2 and abs(x - column) <= 2:
            return False
    return True


@functools.lru_cache(maxsize=None)
def data_places(version: int) -> List[Tuple[int, int]]:
    """Return row and column of all modules of the data, in the order of 7.7.3."""
    return [(y, x) for y, x in zigzag(17 + 4 * version) if is_data(version, y, x)]


def zigzag(size: int) -> Iterator[Tuple[int, int]]:
    """Yield row and column of all modules, two columns up, the next two down."""
    x, up = size - 1, True
    while x > 0:
        for y in range(size - 1, -1, -1) if up else range(size):
            yield y, x
            yield y, x - 1
        x, up = x - 2, not up
        if x == 6:
            x = 5


def field_tables() -> Tuple[List[int], Dict[int, int]]:
    """Return the powers of 2 in GF(256), and their logarithms."""
    powers = [1]
    for _ in range(254):
        double = powers[-1] * 2
        powers.append(double ^ 0x11D if double > 255 else double)
    return powers, {power: k for k, power in enumerate(powers)}


POWERS, LOGS = field_tables()


def divisible(block: List[int], count: int) -> bool:
    """Say whether a block with its error correction is a multiple of g(x): g's roots are its."""
    for root in range(count):
        value = 0
        for codeword in block:
            value = (POWERS[(LOGS[value] + root) % 255] if value else 0) ^ codeword
        if value:
            return False
    return True


def decode(rows: List[bytearray]) -> Tuple[bytes, int, str, int]:
    """Return text, version, level and mask of a symbol; AssertionError when anything is wrong."""
    size = len(rows)
    version = (size - 17) // 4
    assert size == 17 + 4 * version and all(len(row) == size for row in rows)
    copies = [[rows[8][x] for x in (0, 1, 2, 3, 4, 5, 7, 8)] + [rows[y][8] for y in
                                                                (7, 5, 4, 3, 2, 1, 0)],
              [rows[y][8] for y in range(size - 1, size - 8, -1)] + [rows[8][x] for x in
                                                                     range(size - 8, size)]]
    first, second = ("".join(map(str, copy)) for copy in copies)
    assert first == second and rows[size - 8][8] == 1
    level, mask = next((level, words.split().index(first)) for level, words in FORMATS.items()
                       if first in words.split())
    if version >= 7:
        word = sum((VERSIONS[version - 7] >> bit & 1) != rows[bit // 3][size - 11 + bit % 3]
                   or (VERSIONS[version - 7] >> bit & 1) != rows[size - 11 + bit % 3][bit // 3]
                   for bit in range(18))
        assert word == 0, "version information"
    bits = [rows[y][x] ^ inverted(mask, y, x) for y, x in data_places(version)]
    words = [int("".join(map(str, bits[at:at + 8])), 2) for at in range(0, len(bits) - 7, 8)]
    assert not any(bits[len(words) * 8:]), "remainder bits"
    total, count, blocks = TABLE[level][version - 1]
    assert len(words) == total + count * blocks
    lengths = [total // blocks] * (blocks - total % blocks) + [total // blocks + 1] * (
        total % blocks)
    parts: List[List[int]] = [[] for _ in range(blocks)]
    source = iter(words)
    for at in range(max(lengths)):
        for part, length in zip(parts, lengths):
            if at < length:
                part.append(next(source))
    data = [word for part in parts for word in part]
    for _ in range(count):
        for part in parts:
            part.append(next(source))
    assert all(divisible(part, count) for part in parts)
    stream = "".join(f"{word:08b}" for word in data)
    width = 8 if version < 10 else 16
    length = int(stream[4:4 + width], 2)
    end = 4 + width + 8 * length
    assert stream[:4] == "0100" and set(stream[end:end + 4]) <= {"0"}
    pads = stream[end + 4:]
    assert pads == ("1110110000010001" * len(pads))[:len(pads)]
    return (bytes(int(stream[at:at + 8], 2) for at in range(4 + width, end, 8)), version, level,
            mask)


class StandardTest(unittest.TestCase):
    """The parts, against what the standard prints."""

    def test_error_correction_of_annex_i(self) -> None:
        """The example of a 1-M symbol."""
        data = bytes.fromhex("10200C566180EC11EC11EC11EC11EC11")
        self.assertEqual("a524d4c1ed36c7872c55", keygen.error_correction(data, 10).hex())

    def test_format_information(self) -> None:
        """All 32 words of table C.1."""
        for level, words in FORMATS.items():
            for mask, word in enumerate(words.split()):
                code = keygen.bch_code(keygen.LEVELS[level][0] << 3 | mask, 0x537) ^ 0x5412
                self.assertEqual(word, f"{code:015b}")

    def test_version_information(self) -> None:
        """The words of table D.1."""
        self.assertEqual(VERSIONS, tuple(keygen.bch_code(version, 0x1F25)
                                         for version in range(7, 16)))

    def test_blocks(self) -> None:
        """The encoder's compact table says what table 9 says."""
        for level, rows in TABLE.items():
            for version, (data, count, blocks) in enumerate(rows, 1):
                _, counts, numbers = keygen.LEVELS[level]
                self.assertEqual((count, blocks),
                                 (int(counts[version - 1], 36), int(numbers[version - 1], 36)))
                self.assertEqual(keygen.CODEWORDS[version - 1], data + count * blocks)

    def test_a_whole_symbol(self) -> None:
        """Module by module that of qrencode, in the mask that it chose."""
        rows = keygen.qr_symbol(GOLDEN_TEXT, "M", [3])
        self.assertEqual(GOLDEN.split(), [f"{int(''.join(map(str, row)), 2):010x}"
                                          for row in rows])

    def test_penalty(self) -> None:
        """Each of the four rules of table 11, on symbols made for it."""
        def symbol(*rows: str) -> List[bytearray]:
            return [bytearray(map(int, row)) for row in rows]

        def squares(rows: List[str]) -> int:
            return sum(len({rows[y + i][x + j] for i in (0, 1) for j in (0, 1)}) == 1
                       for y in range(11) for x in range(11))
        light = symbol(*["0" * 21] * 21)
        self.assertEqual(42 * (3 + 16) + 3 * 400 + 10 * 10, keygen.penalty(light))
        chess = ["01" * 6, "10" * 6] * 6
        self.assertEqual(0, keygen.penalty(symbol(*chess)))
        for row, score in (("000001010101", 3), ("000000101010", 4)):  # with its neighbour: squares
            rows = [row if at == 6 else line for at, line in enumerate(chess)]
            self.assertEqual(score + 3 * squares(rows), keygen.penalty(symbol(*rows)))
        finder = chess[:6] + ["10111010000" + chess[6][11:]] + chess[7:]
        self.assertEqual(40 + 3 * squares(finder), keygen.penalty(symbol(*finder)))

    def test_the_mask_with_the_least_penalty_is_taken(self) -> None:
        """Try all eight masks, with texts whose best mask differs."""
        chosen = set()
        for length in range(1, 60, 3):
            rows = keygen.qr_symbol(text_of(length), "L")
            scores = [keygen.penalty(keygen.qr_symbol(text_of(length), "L", [mask]))
                      for mask in range(8)]
            self.assertEqual(min(scores), keygen.penalty(rows))
            chosen.add(decode(rows)[3])
        self.assertGreater(len(chosen), 3)


class DecodeTest(unittest.TestCase):
    """Every symbol says its text again, in the smallest version."""

    def test_every_length(self) -> None:
        """1 to 520 characters; levels and masks take turns. A portable run leaves some out."""
        step = 7 if os.environ.get("SPA_PORTABLE") == "1" else 1
        for length in [*range(1, 100), *range(100, capacity(15, "L") + 1, step)]:
            level = next(level for level in ("LMQH" * 2)[length % 4:]
                         if length <= capacity(15, level))
            text, version, found, mask = decode(
                keygen.qr_symbol(text_of(length), level, [length % 8]))
            self.assertEqual((text_of(length), level, length % 8), (text, found, mask))
            self.assertLessEqual(length, capacity(version, level))
            self.assertTrue(version == 1 or length > capacity(version - 1, level))

    def test_every_boundary_of_versions(self) -> None:
        """The longest text of each version and level, which leaves no room for padding."""
        for level in TABLE:
            for version in range(1, 16):
                text = text_of(capacity(version, level))
                self.assertEqual((text, version, level),
                                 decode(keygen.qr_symbol(text, level, [version % 8]))[:3])

    def test_no_text_and_too_much(self) -> None:
        """Empty is possible, one character more than the largest version holds is not."""
        self.assertEqual(b"", decode(keygen.qr_symbol(b"", "H"))[0])
        for level in TABLE:
            with self.assertRaises(ValueError):
                keygen.qr_symbol(bytes(capacity(15, level) + 1), level)

    def test_the_decoder_finds_mistakes(self) -> None:
        """One wrong module of any kind is an error, or these tests would prove nothing."""
        good = keygen.qr_symbol(text_of(100), "L", [2])
        for y, x in ((8, 0), (len(good) - 8, 8), (20, 20), (len(good) - 1, len(good) - 1)):
            bad = [bytearray(row) for row in good]
            bad[y][x] ^= 1
            with self.subTest(place=(y, x)), self.assertRaises((AssertionError, StopIteration)):
                decode(bad)


# ------------------------------------------------------------------- on a terminal

def picture_lines(text: str) -> List[str]:
    """Return the lines with colours, of all that is printed."""
    return [line for line in text.splitlines() if line.startswith("\033")]


def shown(text: str) -> List[List[int]]:
    """Return the picture that a terminal shows: rows of square pixels, 1 for a dark one.

    A colour that was not said is no pixel but a KeyError: it could be the terminal's own.
    """
    colours = {"30": 1, "40": 1, "38;5;16": 1, "97": 0, "107": 0, "48;5;231": 0}
    pixels: List[List[int]] = []
    for line in picture_lines(text):
        upper, lower, front, back = [], [], "", ""
        for escape, letter in re.findall("\033\\[([0-9;]+)m|(.)", line):
            if escape:
                front, back = re.findall(r"38;5;\d+|48;5;\d+|^30|^97|40|107", escape) \
                    if escape != "0" else ("", "")
                continue
            on, off = colours[front], colours[back]
            upper.append(on if letter in "\u2580\u2588#" else off)
            lower.append(on if letter in "\u2584\u2588#" else off)
        pixels += [upper, lower]
    return pixels


def modules(text: str) -> List[bytearray]:
    """Return the symbol that a terminal shows, after looking at its quiet zone."""
    pixels = shown(text)
    if "#" in "".join(picture_lines(text)):  # two characters, which are as high as wide together
        pixels = [row[::2] for row in pixels[::2]]
    inside = [row[4:-4] for row in pixels][4:len(pixels[0]) - 4]
    edge = sum(map(sum, pixels)) - sum(map(sum, inside))
    assert edge == 0 and len(pixels) - len(pixels[0]) in (0, 1)
    return [bytearray(row) for row in inside]


class TerminalTest(FileTestCase):
    """The output of --qr."""

    def check(self, out: str) -> None:
        """Decode the picture, and compare it with the keys that are printed before it."""
        keys = re.findall(r"^(?:HMAC_)?KEY_BASE64:? +(\S+)$", out, re.M)[:2]
        text, version, level, _ = decode(modules(out))
        self.assertEqual(f"KEY_BASE64:{keys[0]} HMAC_KEY_BASE64:{keys[1]}", text.decode())
        self.assertEqual((8, "L"), (version, level))

    def test_blocks_where_the_encoding_has_them(self) -> None:
        """57 columns and 29 lines: it fits a terminal of 80 by 30."""
        for encoding in ("utf-8", "cp437"):
            answer = program("--qr", encoding=encoding)
            self.assertEqual((0, b""), (answer.returncode, answer.stderr))
            out = answer.stdout.decode(encoding)
            self.check(out)
            lines = [re.sub("\033.*?m", "", line) for line in picture_lines(out)]
            self.assertEqual((29, {57}), (len(lines), {len(line) for line in lines}))
            self.assertNotIn("#", "".join(lines))

    def test_size_of_the_terminal(self) -> None:
        """Below a picture that a terminal can't show whole stands the size that it needs."""
        for encoding, columns, lines, needed in (
                ("utf-8", 80, 30, ""), ("utf-8", 57, 30, ""),
                ("utf-8", 80, 24, "57 columns and 30"), ("utf-8", 56, 50, "57 columns and 30"),
                ("ascii", 114, 58, ""), ("utf-8", 0, 0, ""),
                ("ascii", 80, 24, "114 columns and 58"), ("ascii", 113, 99, "114 columns and 58")):
            with self.subTest(encoding=encoding, columns=columns, lines=lines):
                master, slave = pty.openpty()
                fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", lines, columns, 0, 0))
                with subprocess.Popen([sys.executable, "-S", SCRIPT, "--qr"], stdout=slave,
                                      env={**os.environ, "PYTHONIOENCODING": encoding}) as keygen_:
                    os.close(slave)
                    shown, part = b"", b"x"
                    while part:
                        try:
                            part = os.read(master, 4096)
                        except OSError:  # its end, on Linux
                            part = b""
                        shown += part
                os.close(master)
                self.assertEqual(0, keygen_.returncode)
                said = [line for line in shown.decode(encoding).splitlines() if "needs" in line]
                self.assertEqual([
                    f"# The picture needs {needed} lines; this terminal has {columns} and {lines}."
                    " Enlarge it, or take a smaller font"] if needed else [], said)

    def test_ascii_elsewhere(self) -> None:
        """Not one byte beyond ASCII."""
        for encoding in ("ascii", "latin-1", "cp1252"):
            answer = program("--qr", encoding=encoding)
            self.assertEqual((0, b""), (answer.returncode, answer.stderr))
            self.check(answer.stdout.decode("ascii"))

    def test_with_stanzas(self) -> None:
        """Behind both, or alone when both went to files; a warning if others can read it."""
        answer = program(*WORK, "--qr", encoding="utf-8")
        self.check(answer.stdout.decode().split("\n\n", 1)[1])
        rc, out = self.path("rc"), self.path("out", "", 0o644)
        with open(out, "wb") as stream:
            answer = program(*WORK, "--qr", "--rc-file", rc, "--access-file", self.path("access"),
                             encoding="utf-8", stdout=stream)
        self.assertEqual(0, answer.returncode)
        self.assertIn(b"standard output is open to others", answer.stderr)
        self.check(self.read(rc) + self.read(out))

    def test_longest_keys(self) -> None:
        """All that the options allow has a picture."""
        code, out, _ = call("--qr", "--hmac-key-len", "128")
        self.assertEqual((0, 244), (code, len(decode(modules(out))[0])))


@needs_programs("zbarimg")
class ZbarTest(unittest.TestCase):
    """A scanner reads them from images."""

    def scan(self, images: List[List[List[int]]], scale: int = 3) -> List[str]:
        """Return what zbarimg reads from images, which are rows of pixels, one line for each."""
        with tempfile.TemporaryDirectory() as top:
            paths = []
            for number, pixels in enumerate(images):
                paths.append(os.path.join(top, f"{number:03}.pgm"))
                with open(paths[-1], "wb") as stream:
                    stream.write(b"P5 %d %d 255\n" % (len(pixels[0]) * scale, len(pixels) * scale))
                    for row in pixels:
                        stream.write(b"".join((b"\xff", b"\0")[pixel] * scale for pixel in row)
                                     * scale)
            answer = subprocess.run(
                ["zbarimg", "-q", "--nodbus", "--raw", "-Sdisable", "-Sqrcode.enable", *paths],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                timeout=300)
        self.assertEqual(0, answer.returncode, answer.stderr)
        return answer.stdout.decode().splitlines()

    def test_both_sides_of_every_boundary_of_versions(self) -> None:
        """The longest and the shortest text of each version, on all four levels."""
        for level in TABLE:
            texts = [text_of(length) for version in range(1, 16) for length in
                     {capacity(version, level), version > 1 and capacity(version - 1, level) + 1}
                     if length]
            images = [shown(keygen.terminal_text(keygen.qr_symbol(text, level), True))
                      for text in texts]
            with self.subTest(level):
                self.assertEqual([text.decode() for text in texts], self.scan(images))

    def test_every_mask(self) -> None:
        """A scanner unmasks all eight."""
        text = text_of(160)
        images = [shown(keygen.terminal_text(keygen.qr_symbol(text, "M", [mask]), True))
                  for mask in range(8)]
        self.assertEqual([text.decode()] * 8, self.scan(images))

    def test_what_the_terminal_shows(self) -> None:
        """Both ways to draw, as the program prints them."""
        for encoding in ("utf-8", "ascii"):
            out = program("--qr", encoding=encoding).stdout.decode(encoding)
            keys = re.findall(r"KEY_BASE64: (\S+)", out)
            self.assertEqual([f"KEY_BASE64:{keys[0]} HMAC_KEY_BASE64:{keys[1]}"],
                             self.scan([shown(out)]))


if __name__ == "__main__":
    unittest.main()
