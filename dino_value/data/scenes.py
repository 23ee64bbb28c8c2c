"""The embedded data set: small ray-cast rooms with class ids, depth and a room type, for which layout says nothing.

The camera looks any way and is held any way, so that where a pixel lies does not tell what it shows: labels of another
image are worth nothing. A class is told by its pattern (tiles, stripes, boards, flutes) and shape, depth by haze and by
the size of patterns; paint is drawn anew for every surface and says neither. Plain DINO tells images apart by paint;
labels ask for what it has no use for.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dino_value.data.labelled import LabelledTensors

CLASSES = ("floor", "wall", "ceiling", "ball", "crate", "column", "panel", "cone")
ROOM_TYPES = ("gallery", "store", "hall", "studio", "court")
# What stands in each type of room: probabilities over the five kinds of object.
_FURNISHING = np.array(
    [
        [0.10, 0.10, 0.15, 0.55, 0.10],
        [0.10, 0.60, 0.10, 0.10, 0.10],
        [0.05, 0.10, 0.60, 0.15, 0.10],
        [0.15, 0.15, 0.05, 0.15, 0.50],
        [0.60, 0.10, 0.10, 0.05, 0.15],
    ]
)
Split = Literal["unlabeled", "training", "validation", "tuning"]
# `tuning` is for choosing settings: the numbers that are shown come from `validation`, which no choice has seen.
_SPLIT_SEED = {"unlabeled": 0, "training": 1, "validation": 2, "tuning": 3}
COUNTS = {"unlabeled": 2048, "training": 640, "validation": 384, "tuning": 384}


class Scenes(NamedTuple):
    """`images` uint8 [n 3 s s], `classes` int64 [n s s], `depth` float32 [n s s] metres, `room` int64 [n]."""

    images: Tensor
    classes: Tensor
    depth: Tensor
    room: Tensor


@lru_cache(maxsize=8)
def scenes(split: Split, size: int = 64, count: int | None = None) -> Scenes:
    """The scenes of one split; no scene is shared between splits."""
    count = COUNTS[split] if count is None else count
    rendered = [render(np.random.default_rng([_SPLIT_SEED[split], index]), size) for index in range(count)]
    images, classes, depth, room = (np.stack(part) for part in zip(*rendered, strict=True))
    return Scenes(
        torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(),
        torch.from_numpy(classes),
        torch.from_numpy(depth),
        torch.from_numpy(room),
    )


def render(rng: np.random.Generator, size: int) -> tuple[np.ndarray, ...]:
    """One scene: image uint8 [s s 3], classes int64 [s s], depth float32 [s s] (metres along the optical axis), room
    type."""
    room = int(rng.integers(len(ROOM_TYPES)))
    axis = (np.arange(size) + 0.5) / size * 2 - 1
    rays = np.stack(np.broadcast_arrays(axis[None, :], axis[:, None], np.ones((1, 1))), axis=-1) * [0.75, 0.75, 1.0]
    caster = _Caster(rays @ _turned(rng).T)

    sides = rng.uniform(2.0, 3.2, size=2)
    floor, ceiling, back = rng.uniform(1.1, 1.6), -rng.uniform(1.1, 1.8), rng.uniform(3.5, 6.0)
    paint = rng.uniform(0.25, 0.85, size=(3, 3))  # says nothing of the class
    for class_id, normal, offset in (
        (0, (0, -1, 0), -floor),
        (2, (0, 1, 0), ceiling),
        (1, (0, 0, -1), -back),
        (1, (0, 0, 1), -2.0),
        (1, (1, 0, 0), -sides[0]),
        (1, (-1, 0, 0), -sides[1]),
    ):
        caster.plane(class_id, np.array(normal, float), offset, paint[class_id], 0.5)

    for _ in range(int(rng.integers(5, 10))):
        kind = int(rng.choice(5, p=_FURNISHING[room]))
        colour = rng.uniform(0.1, 0.95, size=3)
        turn, far = rng.uniform(-1.2, 1.2), rng.uniform(1.6, 3.5)
        x, z = np.clip(far * np.sin(turn), 0.3 - sides[0], sides[1] - 0.3), min(far * np.cos(turn), back - 0.5)
        if kind == 0:
            radius = rng.uniform(0.35, 0.7)
            caster.ball(3, np.array([x, rng.uniform(ceiling, floor), z]), radius, colour)
        elif kind == 1:
            side = rng.uniform(0.35, 0.65, size=3)
            caster.crate(4, np.array([x, rng.uniform(ceiling, floor), z]), side, rng.uniform(0, np.pi / 2), colour)
        elif kind == 2:
            caster.column(5, np.array([x, z]), rng.uniform(0.18, 0.32), floor, ceiling, colour)
        elif kind == 3:
            extent = np.array([rng.uniform(0.6, 1.1), rng.uniform(0.4, 0.7), 0.03])
            caster.crate(6, np.array([x, rng.uniform(-0.5, 0.5), back - 0.05]), extent, 0.0, colour)
        else:
            caster.cone(7, np.array([x, floor, z]), rng.uniform(0.4, 0.65), rng.uniform(0.9, 1.6), colour)

    image = caster.shaded(light=np.array([rng.uniform(-1, 1), -1.0, rng.uniform(-1.0, 0.2)]))
    image += rng.normal(0, 0.015, size=image.shape)
    return (
        (np.clip(image, 0, 1) * 255).astype(np.uint8),
        caster.classes,
        caster.depth.astype(np.float32),
        np.int64(room),
    )


def _turned(rng: np.random.Generator) -> np.ndarray:
    """A camera that looks any way and is held any way: where a pixel lies says nothing of what it shows."""
    yaw, pitch, roll = rng.uniform(-0.7, 0.7), rng.uniform(-0.5, 0.5), rng.uniform(-np.pi, np.pi)
    turns = []
    for a, (i, j) in ((yaw, (0, 2)), (pitch, (1, 2)), (roll, (0, 1))):
        turn = np.eye(3)
        turn[[i, j], [i, j]], turn[i, j], turn[j, i] = np.cos(a), np.sin(a), -np.sin(a)
        turns.append(turn)
    return turns[0] @ turns[1] @ turns[2]


class _Caster:
    """A z-buffer over one ray per pixel [s s 3]; each primitive writes where it is nearest."""

    def __init__(self, rays: np.ndarray) -> None:
        self.rays = rays
        self.depth = np.full(rays.shape[:2], 1e9)
        self.classes = np.zeros(rays.shape[:2], dtype=np.int64)
        self.normals = np.zeros_like(rays)
        self.albedo = np.zeros_like(rays)

    def _write(self, class_id: int, z: np.ndarray, normals: np.ndarray, albedo: np.ndarray) -> None:
        nearer = (z > 0.3) & (z < self.depth)
        self.depth[nearer] = z[nearer]
        self.classes[nearer] = class_id
        self.normals[nearer] = np.broadcast_to(normals, self.rays.shape)[nearer]
        self.albedo[nearer] = np.broadcast_to(albedo, self.rays.shape)[nearer]

    def plane(self, class_id: int, normal: np.ndarray, offset: float, hue: np.ndarray, period: float) -> None:
        facing = self.rays @ normal
        with np.errstate(divide="ignore"):
            z = np.where(facing < 0, offset / facing, 1e9)
        z = np.minimum(z, 1e8)
        points = self.rays * z[..., None]
        along = points[..., [axis for axis in range(3) if normal[axis] == 0]] / period
        if class_id == 0:  # tiles
            pattern = np.floor(along).sum(-1) % 2
        elif class_id == 1:  # stripes, upright or level
            pattern = np.floor(2 * along[..., -1 if normal[1] == 0 and normal[0] == 0 else 0]) % 2
        else:
            pattern = np.ones_like(z)
        self._write(class_id, z, normal, hue * np.where(pattern, 1.0, 0.6)[..., None])

    def ball(self, class_id: int, centre: np.ndarray, radius: float, colour: np.ndarray) -> None:
        a, b, c = (self.rays**2).sum(-1), self.rays @ centre, centre @ centre - radius**2
        z = _nearest_root(a, b, c)
        self._write(class_id, z, (self.rays * z[..., None] - centre) / radius, colour)

    def crate(self, class_id: int, centre: np.ndarray, half: np.ndarray, turn: float, colour: np.ndarray) -> None:
        cos, sin = np.cos(turn), np.sin(turn)
        rotate = np.array([[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]])
        origin, rays = -rotate @ centre, self.rays @ rotate.T
        with np.errstate(divide="ignore", invalid="ignore"):
            low, high = (-half - origin) / rays, (half - origin) / rays
        enter, leave = np.fmin(low, high), np.fmax(low, high)
        near = np.nanmax(enter, axis=-1)
        z = np.where(near < np.nanmin(leave, axis=-1), near, 1e9)
        face = np.argmax(enter, axis=-1)
        normals = -np.sign(np.take_along_axis(rays, face[..., None], -1)) * np.eye(3)[face]
        boards = np.floor((rays[..., 1] * z + origin[1]) / (half[1] / 2.5)) % 2
        self._write(class_id, z, normals @ rotate, colour * np.where(boards, 1.0, 0.75)[..., None])

    def column(
        self, class_id: int, centre: np.ndarray, radius: float, floor: float, ceiling: float, colour: np.ndarray
    ) -> None:
        flat = self.rays[..., [0, 2]]
        z = _nearest_root((flat**2).sum(-1), flat @ centre, centre @ centre - radius**2)
        height = self.rays[..., 1] * z
        z = np.where((height < floor) & (height > ceiling), z, 1e9)
        radial = (flat * z[..., None] - centre) / radius
        normals = np.stack([radial[..., 0], np.zeros_like(z), radial[..., 1]], axis=-1)
        flutes = np.where(np.sin(14 * np.arctan2(radial[..., 0], -radial[..., 1])) > 0, 1.0, 0.8)
        self._write(class_id, z, normals, colour * flutes[..., None])

    def cone(self, class_id: int, foot: np.ndarray, radius: float, height: float, colour: np.ndarray) -> None:
        slope = (radius / height) ** 2
        apex = foot - [0, height, 0]
        signs = np.array([1.0, -slope, 1.0])
        a, b, c = (self.rays**2 * signs).sum(-1), (self.rays * signs) @ apex, (apex**2 * signs).sum()
        z = _nearest_root(a, b, c)
        points = self.rays * z[..., None] - apex
        inside = (points[..., 1] > 0) & (points[..., 1] < height)
        normals = points * signs
        normals = normals / np.maximum(np.linalg.norm(normals, axis=-1, keepdims=True), 1e-9)
        self._write(class_id, np.where(inside, z, 1e9), normals, colour)

    def shaded(self, light: np.ndarray) -> np.ndarray:
        light = light / np.linalg.norm(light)
        lambert = np.clip(self.normals @ light, 0, 1)
        fog = np.exp(-self.depth / 4)[..., None]
        return fog * self.albedo * (0.5 + 0.7 * lambert)[..., None] + (1 - fog) * 0.75


def _nearest_root(a: np.ndarray, b: np.ndarray, c: float) -> np.ndarray:
    """The smaller root of a·z² − 2·b·z + c = 0, or far away where there is none."""
    discriminant = b**2 - a * c
    with np.errstate(divide="ignore", invalid="ignore"):
        z = (b - np.sqrt(np.maximum(discriminant, 0))) / a
    return np.where((discriminant > 0) & np.isfinite(z), z, 1e9)


def labelled(layout: str, split: Split, size: int = 64) -> LabelledTensors:
    """The embedded scenes as a labelled set: classes for `ade20k`, depth for `nyuv2`, room types for `imagefolder`."""
    data = scenes(split, size)
    if layout == "ade20k":
        return LabelledTensors("seg", data.images, data.classes, CLASSES)
    if layout == "nyuv2":
        return LabelledTensors("depth", data.images, data.depth)
    return LabelledTensors("classes", data.images, data.room, ROOM_TYPES)
