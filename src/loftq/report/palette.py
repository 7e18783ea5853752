"""The colours of every picture: a method has the same one everywhere.

Okabe and Ito's colours, which stay apart for colour-blind readers, and two of Tol's for the published data-aware methods.
There are more methods than colours that the eye keeps apart: those of one kind share a colour and differ in line and marker.
"""

from __future__ import annotations

from typing import NamedTuple


class Style(NamedTuple):
    """How matplotlib draws a method."""

    colour: str
    line: str = "-"
    marker: str = "o"


GREY = "#666666"
ORANGE, SKY, GREEN, BLUE, RED, PINK = "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7"
WINE, OLIVE = "#882255", "#999933"

METHODS = {
    # the original weights, or an adapter on them
    "float": Style(GREY, ":", ""),
    "lora": Style(GREY, "-", "s"),
    # this project's
    "loftq-data": Style("black"),
    "auto": Style("black", "--", "s"),
    "loftq-data-zero": Style(GREEN, "-", "D"),
    "refined": Style(RED, "-", "^"),
    # plain rounding, and with error feedback
    "qlora": Style(ORANGE, "-", "v"),
    "rtn": Style(ORANGE, "--", "s"),
    "gptq": Style(SKY, "-", "^"),
    # an adapter that makes up for the quantization: of the weights from Q or from the SVD on, and of the outputs
    "loftq": Style(BLUE, "-", "s"),
    "loftq-svd-first": Style(PINK, "-", "D"),
    "pissa": Style(PINK, ":", "v"),
    "qpissa": Style(PINK, "--"),
    "qera": Style(WINE, "-", "D"),
    "qera-approx": Style(WINE, "--", "s"),
    "lqer": Style(WINE, ":", "v"),
    "srr": Style(WINE, "-.", "^"),
    "lq-lora": Style(OLIVE),
    "caldera": Style(OLIVE, "--", "s"),
    "cloq": Style(OLIVE, ":", "v"),
}

BITS = {2: SKY, 3: BLUE, 4: "#003D66", 8: "black"}
"""Darker with more bits, in pictures of one method."""


def style(method: str) -> Style:
    """Of a method by its name; grey for one that is not of this project."""
    return METHODS.get(method, Style(GREY, "-.", "D"))
