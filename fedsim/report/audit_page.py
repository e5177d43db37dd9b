"""F5. The page of an audit: what attacks read out of an update, as figures and as pictures."""

from __future__ import annotations

import base64
import struct
import zlib
from typing import Any

import numpy as np
from torch import Tensor

from fedsim.audit import METHODS, Audit
from fedsim.report.formats import seconds
from fedsim.report.page import Grid, Page, Section, Table

MOST = 24
"""Pictures that are shown."""


def render(name: str, facts: dict[str, Any], audit: Audit) -> str:
    """The page as HTML. `facts` is what is to be said of the update and the attack."""
    figures = audit.figures()
    lead = f"What a curious server reads out of client {facts['client']}'s update of round {facts['round']}; labels are known to it."
    tiles = [(METHODS[kind], f"{each['psnr']:.1f} dB", f"SSIM {each['ssim']:.2f}") for kind, each in figures.items()]
    shown = min(MOST, len(audit.truth))
    count = f"the first {shown} of {len(audit.truth)}" if shown < len(audit.truth) else f"all {shown}"
    rows_of = {"true": audit.truth} | {METHODS[kind]: like.pictures for kind, like in audit.likeness.items()}
    grid = Grid([(label, [data_uri(x) for x in pictures[:shown]]) for label, pictures in rows_of.items()])
    sections = [
        Section("Pictures", f"Each column is a picture of the client's, {count}; below it what was matched to it.", grid=grid),
        Section("Figures", "Means over all pictures.", tables=[Table(*table(figures))]),
        Section("What was attacked, and how", facts=[(key.replace("_", " "), str(value)) for key, value in facts.items()]),
    ]
    return Page("Audit", name, lead, verdict(figures), tiles, sections).html()


def verdict(figures: dict[str, dict[str, Any]]) -> str:
    """The outcome, in a sentence."""
    blind, best = figures["blind"], max(("baseline", "sme"), key=lambda kind: figures[kind]["psnr"])
    gain = figures[best]["psnr"] - blind["psnr"]
    if gain <= 0:
        return "No attack came nearer to the pictures than the mean picture of other people's data: this update gave nothing away to them."
    return f"{METHODS[best]} came {gain:.1f} dB nearer to the pictures than the mean picture of other people's data."


def table(figures: dict[str, dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """The head and the rows of a table of figures."""
    return ["", "PSNR, dB", "SSIM", "objective", "a", "time"], [[METHODS[kind], *_texts(each)] for kind, each in figures.items()]


def _texts(each: dict[str, Any]) -> list[str]:
    texts = [f"{each['psnr']:.2f}", f"{each['ssim']:.3f}"]
    return texts + ([f"{each['objective']:.4f}", f"{each['a']:.2f}", seconds(each["seconds"])] if "a" in each else ["-"] * 3)


def data_uri(picture: Tensor) -> str:
    """A picture on the scale [0, 1] as an address that holds it, PNG. `[C, H, W]`; of other than three channels the first is shown."""
    values = (picture.clamp(0, 1).cpu().numpy() * 255).round().astype(np.uint8)
    pixels = values.transpose(1, 2, 0) if len(values) == 3 else values[0][..., None]
    return "data:image/png;base64," + base64.b64encode(png(pixels)).decode()


def png(pixels: np.ndarray) -> bytes:
    """A PNG file of bytes `[H, W, 1 or 3]`."""
    height, width, channels = pixels.shape

    def part(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2 if channels == 3 else 0, 0, 0, 0)
    lines = b"".join(b"\0" + row.tobytes() for row in pixels)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", header) + part(b"IDAT", zlib.compress(lines, 9)) + part(b"IEND", b"")
