"""The few shapes that the block picture is made of, as SVG text. Everything is placed by absolute coordinates."""

import sys
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"
SANS = "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, 'DejaVu Sans', sans-serif"
STYLE = f"""
text {{ font-family: {SANS}; font-size: 11px; fill: #475569; }}
.op {{ font-family: {MONO}; font-size: 11.5px; font-weight: 600; fill: #0f172a; }}
.name {{ font-family: {MONO}; font-size: 11.5px; fill: #0f172a; }}
.variant {{ font-family: {MONO}; font-size: 10.5px; fill: #0f172a; }}
.shape {{ font-family: {MONO}; font-size: 10.5px; fill: #334155; }}
.lane {{ font-size: 11.5px; font-weight: 600; fill: #64748b; }}
.title {{ font-size: 17px; font-weight: 700; fill: #0f172a; }}
.flow {{ fill: none; stroke: #475569; stroke-width: 1.4; marker-end: url(#tip); }}
.stem {{ fill: none; stroke: #475569; stroke-width: 1.4; }}
.streams {{ fill: none; stroke: #0f766e; stroke-width: 3; marker-end: url(#wide-tip); }}
.mix {{ fill: none; stroke: #0f766e; stroke-width: 1.4; stroke-dasharray: 4 3; marker-end: url(#mix-tip); }}
"""
MARKERS = """<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6.5" markerHeight="6.5" \
orient="auto"><path d="M0 0.5 L8 4 L0 7.5 z" fill="#475569"/></marker>
<marker id="mix-tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6.5" markerHeight="6.5" \
orient="auto"><path d="M0 0.5 L8 4 L0 7.5 z" fill="#0f766e"/></marker>
<marker id="wide-tip" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="4" markerHeight="4" \
orient="auto"><path d="M0 0.5 L8 4 L0 7.5 z" fill="#0f766e"/></marker>"""

Point = tuple[float, float]
Place = tuple[float, float, float, float]  # x, y, width, height
Colours = tuple[str, str]  # fill, stroke


@dataclass
class Canvas:
    """A white sheet with rounded corners; `parts` are drawn in order."""

    width: int
    height: int
    title: str
    parts: list[str] = field(default_factory=list)

    def add(self, tag: str, content: str = "", **attributes) -> None:
        """One element; underscores in attribute names become hyphens, a trailing one is dropped (`class_`)."""
        names = {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items()}
        listed = "".join(f' {name}="{escape(str(value))}"' for name, value in names.items())
        self.parts.append(f"<{tag}{listed}>{content}</{tag}>" if content else f"<{tag}{listed}/>")

    def text(self, at: Point, content: str, class_: str = "note", anchor: str = "middle") -> None:
        self.add("text", escape(content), x=at[0], y=at[1], class_=class_, text_anchor=anchor)

    def box(self, place: Place, ops: tuple[str, ...], colours: Colours, note: str = "") -> None:
        """Rectangle with op names and below them a note, centred together."""
        x, y, width, height = place
        fill, stroke = colours
        self.add("rect", x=x, y=y, width=width, height=height, rx=6, fill=fill, stroke=stroke, stroke_width=1.3)
        lines = [(op, "op") for op in ops] + ([(note, "note")] if note else [])
        first = y + height / 2 - 14 * (len(lines) - 1) / 2 + 4
        for number, (line, class_) in enumerate(lines):
            self.text((x + width / 2, first + 14 * number), line, class_)

    def store(self, place: Place, name: str, notes: tuple[str, ...], colours: Colours) -> None:
        """A drum for a piece of state."""
        x, y, width, height = place
        fill, stroke = colours
        rim = 5
        sides = f"M{x} {y + rim} v{height - 2 * rim} a{width / 2} {rim} 0 0 0 {width} 0 v{2 * rim - height}"
        self.add("path", d=f"{sides} a{width / 2} {rim} 0 0 0 {-width} 0 z", fill=fill, stroke=stroke, stroke_width=1.3)
        self.add("path", d=f"M{x} {y + rim} a{width / 2} {rim} 0 0 0 {width} 0", fill="none", stroke=stroke)
        first = y + rim / 2 + height / 2 - 13 * len(notes) / 2 + 5
        self.text((x + width / 2, first), name, "name")
        for number, note in enumerate(notes):
            self.text((x + width / 2, first + 13 * (number + 1)), note)

    def line(self, *points: Point, class_: str = "flow") -> None:
        """A polyline through the points."""
        path = " L".join(f"{x} {y}" for x, y in points)
        self.add("path", d=f"M{path}", class_=class_)

    def lane(self, place: Place, labels: tuple[str, ...], fill: str, anchor: str = "start") -> None:
        """A tinted background with lines of text in its top left (or, anchor "end", top right) corner."""
        x, y, width, height = place
        self.add("rect", x=x, y=y, width=width, height=height, rx=9, fill=fill)
        for number, label in enumerate(labels):
            at = (x + 10 if anchor == "start" else x + width - 10, y + 18 + 15 * number)
            self.text(at, label, "lane", anchor)

    def __str__(self) -> str:
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" width="{self.width}" '
            f'height="{self.height}" role="img">\n<title>{escape(self.title)}</title>\n<style>{STYLE}</style>\n'
            f"<defs>{MARKERS}</defs>\n"
            f'<rect x="0.5" y="0.5" width="{self.width - 1}" height="{self.height - 1}" rx="14" fill="#ffffff" '
            'stroke="#d0d7de"/>\n'
        )
        return head + "\n".join(self.parts) + "\n</svg>\n"


def publish(target: Path, picture: str | None, nothing: str) -> int:
    """Write a script's picture, or with `--check` compare it with what is there; the script's exit status.

    Without a picture there is no file, and `nothing` says why.
    """
    drawn = target.read_text(encoding="utf-8") if target.is_file() else None
    if sys.argv[1:] == ["--check"]:
        return int(drawn != picture)
    if picture is None:
        target.unlink(missing_ok=True)
        print(nothing, file=sys.stderr)
    else:
        target.write_text(picture, encoding="utf-8")
    return 0
