"""What a terminal shows after some output: as much of an ANSI terminal as pytest and a status line use."""

import re

TOKEN = re.compile(r"\x1b\[([0-9;]*)([A-Za-z])|\x1b\]9;4[^\x1b]*\x1b\\|[\r\n]|[^\x1b\r\n]")


class Screen:
    """Rows of text, as many as it takes. Anything that is not known here raises."""

    def __init__(self, columns, output=""):
        self.columns, self.rows, self.row, self.column = columns, [""], 0, 0
        self.feed(output)

    def feed(self, output):
        at = 0
        while at < len(output):
            token = TOKEN.match(output, at)
            assert token is not None, f"unknown control sequence: {output[at : at + 20]!r}"
            at = token.end()
            self._control(token[1], token[2]) if token[2] else self._write(token[0])

    def _write(self, character):
        if character == "\r":
            self.column = 0
        elif character == "\n":
            self._down()
        elif not character.startswith("\x1b"):
            if self.column == self.columns:
                self.column = 0
                self._down()
            before = self.rows[self.row].ljust(self.column)
            self.rows[self.row] = before[: self.column] + character + before[self.column + 1 :]
            self.column += 1

    def _down(self):
        self.row += 1
        if self.row == len(self.rows):
            self.rows.append("")

    def _control(self, number, kind):
        if kind == "A":
            self.row = max(0, self.row - int(number or 1))
        elif kind == "G":
            self.column = int(number or 1) - 1
        elif kind == "J":
            assert number in ("", "0")
            self.rows[self.row :] = [self.rows[self.row][: self.column]]
        elif kind == "K":
            assert number == "2"
            self.rows[self.row] = ""
        else:
            assert kind == "m", f"unknown control sequence ending in {kind}"

    @property
    def text(self):
        return "\n".join(row.rstrip() for row in self.rows)
