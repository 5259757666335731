"""The subject of the sample datasets: one character in a dozen scenes, drawn with Pillow and nothing else.

    python tools/draw_subject.py [--out DIR]

It writes twelve images of 256 × 256 pixels with a caption beside each. The character is teal and pear-shaped, with one
large eye, a purple belly, stubby feet and two striped antennae. Captions say what differs from image to image and never
how the character looks: that is what a trigger word is to learn. No randomness: the same Pillow draws the same pixels.

A scene is drawn in a frame of 256 units, the character in units of its own: it stands at (0, 0), its head ends at
(0, -150), x grows to the right and y downwards.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw
from vector_drawing import Canvas, Point, Points, arc, curve, mirrored, moved, oval

FOLDER = Path(__file__).resolve().parent.parent / "lib_lora_train" / "demo" / "subject"

TEAL, TEAL_SHADE, TEAL_LIGHT, TEAL_LINE = "#22b8aa", "#159488", "#74dccf", "#0b4f52"
PURPLE, PURPLE_SHADE = "#a066e0", "#7f45c4"
ORANGE, CREAM, ORANGE_LINE = "#ff8a1c", "#fff0c8", "#8f3d05"
IRIS, PUPIL, WHITE = "#6a35b8", "#1d1233", "#ffffff"
MOUTH, TONGUE = "#5b1230", "#ff6f7d"
RED, RED_SHADE, RED_LINE = "#ee3344", "#c21a33", "#7d0d20"
YELLOW, BLUE, PINK, GREY = "#ffcf33", "#3d8bea", "#ff7fb0", "#a9b4c2"


# ---------------------------------------------------------------- the character

BODY = mirrored([(0, -150), (24, -145), (39, -126), (43, -103), (51, -80), (62, -55), (61, -27), (40, -9), (0, -5)])
FOOT = mirrored([(0, -19), (15, -15), (22, -4), (12, 1), (0, 1)])
LEG = 8  # the body stands so high above the soles
UP: tuple[Points, Points] = (((-16, -140), (-22, -164), (-36, -182)), ((16, -140), (22, -164), (36, -182)))
DROOPING: tuple[Points, Points] = (((-16, -140), (-30, -164), (-54, -160), (-62, -138)),
                                   ((16, -140), (30, -164), (54, -160), (62, -138)))
BLOWN: tuple[Points, Points] = (((-18, -138), (-34, -158), (-58, -160)), ((8, -142), (-8, -168), (-34, -182)))


@dataclass(frozen=True)
class Pose:
    """How the character stands, looks and feels."""

    turn: float = 0  # -1: turned to the left, 0: to us, 1: to the right
    gaze: Point = (0, 0)  # where the pupil is, -1 to 1 each
    eye: str = "open"  # open, asleep, glad (shut by a smile)
    lid: float = 0  # how far the upper lid is down, 0 to 1
    mouth: str = "smile"  # smile, laugh, round, sad, calm, none
    arms: tuple[Points, ...] = (((-52, -66), (-70, -52), (-70, -34)), ((52, -66), (70, -52), (70, -34)))  # behind the body
    feet: tuple[tuple[float, float, float], ...] = ((-28, 0, 0), (28, 0, 0))  # x, y, degrees
    antennae: tuple[Points, Points] = UP


def draw_character(canvas: Canvas, pose: Pose) -> None:
    """The whole character; arms that hold something are drawn later, over it."""
    for x, y, degrees in pose.feet:
        draw_foot(canvas, x, y, degrees)
    canvas = canvas.at(0, -LEG)
    for root_to_tip in pose.antennae:
        draw_antenna(canvas, curve(root_to_tip))
    for arm in pose.arms:
        draw_arm(canvas, arm)
    shift = 26 * pose.turn
    canvas.fill(BODY, TEAL_SHADE, line=TEAL_LINE, inside=[
        (moved(BODY, -10, -6), TEAL),
        (mirrored([(0, -62), (26, -56), (38, -36), (26, -17), (0, -13)]) if not shift else
         moved(oval(0, -37, 37 - 9 * abs(pose.turn), 25), 1.45 * shift, 0), PURPLE_SHADE),
        (moved(oval(-3, -40, 33 - 9 * abs(pose.turn), 21), 1.45 * shift, 0), PURPLE),
        (curve([(-32, -126), (-23, -140), (-9, -146), (-19, -138), (-27, -122), (-31, -112)], closed=True), TEAL_LIGHT),
    ])
    draw_eye(canvas.at(shift, -110), pose)
    draw_mouth(canvas.at(1.35 * shift, -72, scale=1 - 0.25 * abs(pose.turn)), pose.mouth)


def draw_antenna(canvas: Canvas, points: Points) -> None:
    """A striped antenna with its ball, from the root to the tip."""
    canvas.stroke(points, ORANGE_LINE, 13)
    canvas.stroke(points, ORANGE, 7.5)
    for part in (0.2, 0.45, 0.7):
        middle = round(part * (len(points) - 1))
        canvas.stroke(points[middle - 1:middle + 2], CREAM, 7.5, round_ends=False)
    x, y = points[-1]
    canvas.fill(oval(x, y, 12, 12), ORANGE, line=ORANGE_LINE, width=3, inside=[(oval(x - 3.5, y - 4, 4, 3.5), CREAM)])


def draw_arm(canvas: Canvas, points: Points) -> None:
    """An arm from shoulder to hand."""
    along, (x, y) = curve(points), points[-1]
    canvas.stroke(along, TEAL_LINE, 20)
    canvas.fill(oval(x, y, 13, 13), TEAL_LINE)
    canvas.stroke(along, TEAL, 13)
    canvas.fill(oval(x, y, 9.6, 9.6), TEAL)


def draw_foot(canvas: Canvas, x: float, y: float, degrees: float) -> None:
    """A foot whose sole is at (x, y), and the leg to the body if it is away from it."""
    leg = [(0.7 * x, -26), (x, y - 11)]
    canvas.stroke(leg, TEAL_LINE, 25)
    canvas.stroke(leg, TEAL_SHADE, 18)
    foot = canvas.at(x, y, turned=degrees)
    foot.fill(FOOT, TEAL_SHADE, line=TEAL_LINE, inside=[(moved(FOOT, -4, -4), TEAL)])
    for toe in (-7, 6):
        foot.stroke([(toe, -6), (toe, -1)], TEAL_LINE, 3)


def draw_eye(canvas: Canvas, pose: Pose) -> None:
    """The eye about the canvas's origin."""
    width, height = 30 - 7 * abs(pose.turn), 30
    ball = oval(0, 0, width, height)
    if pose.eye != "open":
        canvas.fill(ball, TEAL_LIGHT, line=TEAL_LINE, inside=[(moved(ball, -2, -7), TEAL)])
        down = 1 if pose.eye == "asleep" else -1
        canvas.stroke(arc(0, 4 - 6 * down, 0.62 * width, 15 * down), TEAL_LINE, 5)
        return
    x = pose.gaze[0] * 0.34 * width + 4 * pose.turn
    y = pose.gaze[1] * 0.34 * height
    inside: list[tuple[Points, str]] = [
        (oval(0, 0, width, height), "#d9e6f2"), (oval(-2, 4, width, height), WHITE),
        (oval(x, y, 18 - 2 * abs(pose.turn), 18), IRIS), (oval(x, y, 10.5 - abs(pose.turn), 10.5), PUPIL),
        (oval(x - 6, y - 7, 5.4, 5.4), WHITE), (oval(x + 6, y + 7, 2.6, 2.6), WHITE)]
    edge = -height + 2 * height * pose.lid
    if pose.lid:
        lid = [*curve([(-width - 4, edge + 4), (0, edge - 2), (width + 4, edge + 4)]), (width + 4, -height - 4),
               (-width - 4, -height - 4)]
        inside += [(moved(lid, 0, 4), TEAL_LINE), (lid, TEAL)]
    canvas.fill(ball, WHITE, line=TEAL_LINE, inside=inside)


def draw_mouth(canvas: Canvas, kind: str) -> None:
    """The mouth about the canvas's origin."""
    if kind == "smile":
        canvas.stroke(arc(0, -4, 13, 8), TEAL_LINE, 4)
    elif kind == "laugh":
        shape = [*arc(0, -7, 16, 3), *reversed(arc(0, -7, 16, 19))]
        canvas.fill(shape, MOUTH, line=TEAL_LINE, width=3, inside=[(oval(0, 12, 10, 8), TONGUE)])
    elif kind == "round":
        canvas.fill(oval(0, 1, 6, 7), MOUTH, line=TEAL_LINE, width=3)
    elif kind == "sad":
        canvas.stroke(arc(0, 5, 11, -8), TEAL_LINE, 4)
    elif kind == "calm":
        canvas.stroke(arc(0, -1, 7, 4), TEAL_LINE, 4)


# ---------------------------------------------------------------- the scenes: one function each, captioned in SCENES

def standing() -> Canvas:
    canvas = Canvas.blank(WHITE)
    draw_character(canvas.at(128, 246, scale=1.16), Pose())
    return canvas


def waving() -> Canvas:
    canvas = Canvas.blank(WHITE)
    arms = (((-50, -70), (-72, -58), (-76, -38)), ((48, -78), (74, -86), (80, -116)))
    draw_character(canvas.at(112, 244, scale=1.13, turned=-5, bend=-6),
                   Pose(turn=0.15, gaze=(0.7, -0.4), mouth="laugh", arms=arms))
    for radius in (24, 34):
        around = [math.radians(degrees) for degrees in range(-60, 21, 8)]
        canvas.stroke([(197 + radius * math.cos(a), 103 + radius * math.sin(a)) for a in around], BLUE, 5)
    return canvas


def sleeping() -> Canvas:
    canvas = Canvas.blank("#2c3a78")
    canvas.fill(oval(212, 46, 27, 27), "#ffe58a")
    canvas.fill(oval(200, 38, 24, 24), "#2c3a78")
    for x, y, size in ((26, 40, 3), (84, 22, 2.4), (60, 62, 2), (238, 104, 2.6), (184, 88, 2), (22, 104, 2.2), (152, 84, 2)):
        canvas.fill(oval(x, y, size, size), "#ffe58a")
    canvas.fill([(0, 206), (256, 206), (256, 256), (0, 256)], "#4a5aa6")
    pillow = curve([(16, 192), (70, 184), (140, 192), (150, 216), (140, 240), (74, 244), (14, 240), (6, 216)], closed=True)
    canvas.fill(pillow, "#c3ccf0", line="#1c2550", inside=[(moved(pillow, -4, -10), "#f4f6ff")])
    own = canvas.at(232, 172, scale=1.02, turned=-86, slim=0.97, bend=6)
    draw_character(own, Pose(
        eye="asleep", mouth="calm", arms=(), feet=((-36, 0, -6), (18, 4, 8)),
        antennae=(((-16, -140), (-20, -160), (-36, -178)), ((16, -140), (24, -164), (44, -172)))))
    draw_arm(own, ((44, -60), (22, -46), (-8, -52)))
    for x, y, size in ((90, 96, 8), (114, 68, 11), (148, 34, 15)):
        canvas.stroke([(x - size, y - size), (x + size, y - size), (x - size, y + size), (x + size, y + size)], WHITE,
                      size / 2.2)
    return canvas


def reading() -> Canvas:
    canvas = Canvas.blank(WHITE)
    own = canvas.at(128, 226, scale=1.14, slim=0.95)
    draw_character(own, Pose(gaze=(0, 0.95), lid=0.3, mouth="calm", arms=(), feet=((-54, 8, -24), (54, 8, 24))))
    for side in (-1, 1):
        page = [(0, -56), (20 * side, -63), (48 * side, -62), (54 * side, -14), (24 * side, -14), (0, -6)]
        own.fill(moved(page, 0, -6), CREAM, line=RED_LINE)
        own.fill(page, RED, line=RED_LINE)
        own.fill([(side * 27 + dx, dy - 38) for dx, dy in oval(0, 0, 10, 10)], YELLOW)
    own.stroke([(0, -56), (0, -6)], RED_LINE, 4)
    for side in (-1, 1):
        draw_arm(own, ((56 * side, -58), (72 * side, -44), (53 * side, -32)))
    return canvas


def holding_a_balloon() -> Canvas:
    canvas = Canvas.blank(WHITE)
    canvas.fill(oval(104, 246, 44, 6), "#d5dae2")
    canvas.stroke(curve([(163, 140), (172, 124), (180, 112), (183, 96)]), "#5c6675", 3)
    draw_character(canvas.at(92, 226, scale=0.84, turned=9), Pose(
        turn=0.2, gaze=(0.8, -0.8), mouth="laugh", feet=((-28, 4, 14), (26, 8, 24)),
        antennae=(((-16, -140), (-26, -162), (-46, -174)), ((12, -142), (10, -166), (-6, -184))),
        arms=(((-50, -66), (-72, -62), (-82, -46)), ((46, -74), (64, -84), (64, -112)))))
    balloon = mirrored([(0, -52), (30, -42), (41, -10), (28, 24), (8, 43), (0, 45)])
    there = canvas.at(194, 60, turned=12)
    there.fill([(-8, 54), (8, 54), (0, 42)], RED, line=RED_LINE, width=3)
    there.fill(balloon, RED_SHADE, line=RED_LINE, inside=[(moved(balloon, -8, -5), RED), (curve(
        [(-28, -14), (-21, -32), (-8, -39), (-16, -26), (-22, -8)], closed=True), "#ffb3b8")])
    return canvas


def under_an_umbrella() -> Canvas:
    canvas = Canvas.blank(WHITE)
    own = canvas.at(98, 248, scale=0.88)
    draw_character(own, Pose(gaze=(0.3, -0.9), arms=(((-52, -66), (-70, -52), (-70, -34)),),
                             antennae=(((-16, -140), (-26, -154), (-48, -158)), ((14, -142), (20, -158), (34, -166)))))
    there = canvas.at(137, 84, scale=0.95, turned=-4)
    for colour, width in (("#5b3a1e", 8), ("#b97f48", 4)):
        there.stroke([(10, -72), (10, 128)], colour, width)
    corners = [-108, -58, -18, 30, 70, 120]  # where the ribs end
    rim = [point for left, right in zip(corners, corners[1:], strict=False)
           for point in arc((left + right) / 2, 4, (right - left) / 2, -13)]
    dome = arc(6, 4, 114, -84)
    ribs = [curve([(10, -82), ((x + 10) / 1.8, -50), (x, 10)]) for x in corners]
    white = [([*ribs[i], *reversed(ribs[i + 1])], WHITE) for i in (1, 3)]
    there.fill([*dome, *reversed(rim)], BLUE, line="#173f80", inside=white)
    draw_arm(own, ((52, -58), (70, -52), (64, -78)))
    return canvas


def riding_a_skateboard() -> Canvas:
    canvas = Canvas.blank("#cfeafc")
    canvas.fill([(0, 214), (256, 190), (256, 256), (0, 256)], "#b9bfc9")
    canvas.fill([(0, 214), (256, 190), (256, 197), (0, 221)], "#e4e7ec")
    board = canvas.at(138, 208, turned=-5.3)
    for x in (-50, 50):
        board.fill(oval(x, 10, 11, 11), YELLOW, line="#7a5200")
        board.fill(oval(x, 10, 3, 3), "#7a5200")
    deck = curve([(-88, -16), (-80, -16), (-62, -7), (62, -7), (80, -16), (88, -16), (84, -6), (64, 4), (-64, 4), (-84, -6)],
                 closed=True)
    draw_character(canvas.at(134, 199, scale=0.86, turned=-1, slim=0.93, bend=22), Pose(
        turn=0.5, gaze=(0.6, 0), mouth="laugh", feet=((-40, 3, -6), (36, -2, -6)), antennae=BLOWN,
        arms=(((-48, -74), (-74, -88), (-92, -80)), ((50, -72), (78, -78), (92, -96)))))
    board.fill(deck, PINK, line="#8c1f55")
    for y, left, right in ((72, 10, 62), (96, 2, 34), (150, 8, 42)):
        canvas.stroke([(left, y), (right, y - 3)], WHITE, 6)
    return canvas


def eating_an_apple() -> Canvas:
    canvas = Canvas.blank(WHITE)
    own = canvas.at(124, 306, scale=1.6)
    draw_character(own, Pose(turn=-0.1, gaze=(0.35, 0.95), mouth="none", arms=(), antennae=(
        ((-16, -140), (-30, -154), (-52, -150)), ((16, -140), (32, -152), (56, -144)))))
    own.fill(oval(-30, -73, 12, 10), "#45cdbf")  # a full cheek
    own.stroke(curve([(-17, -80), (-13, -74), (-5, -73), (3, -76)]), TEAL_LINE, 4)
    apple = canvas.at(156, 213, scale=1.2, turned=-14)
    behind = canvas.image.copy()
    shape = mirrored([(0, -24), (16, -31), (36, -20), (38, 6), (22, 32), (0, 29)])
    bites = ((-30, -26, 13), (-41, -10, 12))
    apple.fill(shape, RED_SHADE, line=RED_LINE, inside=[
        (moved(shape, -7, -4), RED), (curve([(6, -18), (16, -23), (27, -16), (18, -16)], closed=True), "#ffb3b8"),
        *((oval(x, y, r + 9, r + 9), RED_LINE) for x, y, r in bites),
        *((oval(x, y, r + 6, r + 6), "#fff3cf") for x, y, r in bites)])
    mask = Image.new("1", canvas.image.size)
    for x, y, r in bites:
        ImageDraw.Draw(mask).polygon([apple.transform(point) for point in oval(x, y, r, r)], fill=1)
    canvas.image.paste(behind, mask=mask)
    apple.stroke(curve([(0, -24), (2, -34), (8, -42)]), "#5b3a1e", 5)
    apple.fill(curve([(4, -32), (18, -44), (34, -40), (22, -30)], closed=True), "#6cc644", line="#2c6b17", width=3)
    draw_arm(own, ((-54, -52), (-40, -34), (-10, -38)))
    draw_arm(own, ((58, -56), (60, -38), (42, -46)))
    return canvas


def in_the_rain() -> Canvas:
    canvas = Canvas.blank(WHITE)
    canvas.fill(oval(128, 238, 96, 14), "#a9d3f5")
    canvas.fill(oval(128, 239, 74, 8), "#cfe8fb")
    draw_character(canvas.at(128, 240, scale=0.92, slim=0.94), Pose(
        gaze=(-0.3, 0.5), lid=0.42, mouth="sad", antennae=DROOPING,
        arms=(((-50, -62), (-62, -46), (-60, -26)), ((50, -62), (62, -46), (60, -26)))))
    lumps = ((66, 50, 24), (100, 34, 28), (142, 32, 30), (182, 46, 24), (84, 54, 20), (124, 54, 22), (164, 54, 20))
    for grown, colour, up in ((3.4, "#4a5566", 0), (0, "#8592a3", 0), (-3, GREY, 5)):
        for x, y, radius in lumps:
            canvas.fill(oval(x, y - up, radius + grown, radius + grown), colour)
    for x, y in ((36, 90), (24, 138), (50, 186), (128, 90), (226, 84), (212, 104), (228, 146), (206, 190), (22, 206),
                 (236, 206)):
        drop = [(x, y - 9), (x + 5, y + 2), (x, y + 8), (x - 5, y + 2)]
        canvas.fill(curve(drop, closed=True), "#4aa3ef")
    return canvas


def with_a_party_hat() -> Canvas:
    canvas = Canvas.blank(WHITE)
    own = canvas.at(128, 250, scale=0.98, turned=4)
    draw_character(own, Pose(eye="glad", mouth="laugh", antennae=(
        ((-26, -134), (-44, -152), (-58, -174)), ((26, -134), (44, -152), (58, -174))),
        arms=(((-50, -74), (-80, -80), (-88, -112)), ((50, -74), (80, -80), (88, -112)))))
    cone = [(-29, -148), (0, -220), (29, -148), *arc(0, -148, -29, 9)]
    own.fill(cone, YELLOW, line="#8a5a00", inside=[
        ([(-40, -180), (40, -198), (40, -184), (-40, -166)], PINK), ([(-40, -152), (40, -170), (40, -156), (-40, -138)], PINK)])
    own.fill(oval(0, -220, 10, 10), PINK, line="#8c1f55", width=3)
    confetti = ((24, 60, RED), (46, 24, BLUE), (84, 44, YELLOW), (176, 36, BLUE), (206, 22, PINK), (232, 62, YELLOW),
                (18, 196, PINK), (40, 226, BLUE), (222, 210, RED), (240, 168, BLUE), (14, 110, YELLOW), (212, 240, YELLOW))
    for index, (x, y, colour) in enumerate(confetti):
        canvas.at(x, y, turned=37 * index).fill([(-7, -4), (7, -4), (7, 4), (-7, 4)], colour)
    return canvas


def jumping() -> Canvas:
    canvas = Canvas.blank(WHITE)
    canvas.fill(oval(128, 242, 46, 8), "#d5dae2")
    draw_character(canvas.at(128, 200, scale=0.92, turned=-6, slim=1.05), Pose(
        gaze=(0.1, -0.6), mouth="laugh", feet=((-38, 8, 34), (36, 8, -34)),
        antennae=(((-16, -140), (-24, -166), (-48, -176)), ((16, -140), (24, -166), (48, -176))),
        arms=(((-46, -76), (-76, -84), (-92, -116)), ((46, -76), (76, -84), (92, -116)))))
    for x, lean in ((78, -10), (178, 10)):
        canvas.stroke([(x, 212), (x + lean, 228)], GREY, 5)
    return canvas


def from_the_side() -> Canvas:
    canvas = Canvas.blank("#d8f0ff")
    canvas.fill([*curve([(0, 218), (70, 208), (150, 214), (256, 204)]), (256, 256), (0, 256)], "#8fd05a")
    canvas.fill([*curve([(0, 236), (90, 230), (180, 236), (256, 230)]), (256, 256), (0, 256)], "#74bb42")
    own = canvas.at(116, 232, scale=1.08, turned=3, bend=6)
    draw_character(own, Pose(
        turn=1, gaze=(0.7, 0), mouth="smile", feet=((-34, -2, 24), (40, -2, -16)), arms=(((30, -62), (62, -60), (78, -48)),),
        antennae=(((-14, -142), (-22, -164), (-44, -178)), ((10, -144), (12, -168), (-4, -188)))))
    draw_arm(own, ((-14, -76), (-26, -62), (-30, -42)))
    return canvas


SCENES: tuple[tuple[str, str, Callable[[], Canvas]], ...] = (
    ("01-standing", "standing, front view", standing),
    ("02-waving", "waving hello", waving),
    ("03-sleeping", "sleeping on a pillow, night, moon", sleeping),
    ("04-reading", "sitting, reading a red book", reading),
    ("05-balloon", "floating in the air, holding a red balloon", holding_a_balloon),
    ("06-umbrella", "under a blue and white umbrella", under_an_umbrella),
    ("07-skateboard", "riding a pink skateboard, street", riding_a_skateboard),
    ("08-apple", "close-up, eating a red apple", eating_an_apple),
    ("09-rain", "sad, in the rain under a grey cloud", in_the_rain),
    ("10-party-hat", "with a party hat, laughing, confetti", with_a_party_hat),
    ("11-jumping", "jumping for joy", jumping),
    ("12-side", "from the side, walking on green grass", from_the_side),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write all images and captions."""
    parser = argparse.ArgumentParser(description="Draw the subject of the sample datasets: twelve pictures with captions.")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder to write to (default: %(default)s)")
    folder = parser.parse_args(arguments).out
    folder.mkdir(parents=True, exist_ok=True)
    for name, caption, scene in SCENES:
        scene().finished().save(folder / f"{name}.png", optimize=True)
        (folder / f"{name}.txt").write_text(caption + "\n", encoding="utf-8", newline="\n")
    print(f"{len(SCENES)} pictures in {folder}")


if __name__ == "__main__":
    main()
