"""A screen that tests write to in place of a terminal."""

import io
import re


class Terminal(io.StringIO):
    """A screen of any height that knows the codes of the view, and no others."""

    encoding = "utf-8"

    def __init__(self):
        super().__init__()
        self.rows, self.row, self.column, self.written = [""], 0, 0, ""

    def isatty(self):
        return True

    def write(self, text):
        self.written += text
        for part in re.findall(r"\x1b\[\d*[A-Z]|\x1b\[[\d;]*m|\n|\r|[^\x1b\n\r]+", text):
            line = self.rows[self.row]
            if part == "\n":
                self.row, self.column = self.row + 1, 0
                self.rows += [""] * (self.row == len(self.rows))
            elif part == "\r":
                self.column = 0
            elif part == "\x1b[K":
                self.rows[self.row] = line[: self.column]
            elif part == "\x1b[J":
                self.rows[self.row :] = [line[: self.column]]
            elif part.endswith("A"):
                self.row -= int(part[2:-1])
            elif not part.startswith("\x1b"):
                end = self.column + len(part)
                self.rows[self.row] = line[: self.column] + part + line[end:]
                self.column = end
            else:
                assert part.endswith("m"), f"the view writes {part!r}"
        return len(text)

    @property
    def shown(self):
        return [row.rstrip() for row in self.rows if row.strip()]
