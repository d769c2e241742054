"""What holds of every drawing, wherever it comes from: boxes hold what is in them, and neighbours do not touch."""

from __future__ import annotations


def check_geometry(places: dict[str, dict[str, float]], inside: dict[str, str | None]) -> None:
    """Children stand within what they are in, and no two of them touch."""
    families: dict[str, list[str]] = {}
    for key, outer in inside.items():
        if outer is not None:
            families.setdefault(outer, []).append(key)
            a, b = places[key], places[outer]
            assert b["x"] <= a["x"] and a["x"] + a["width"] <= b["x"] + b["width"] + 0.01, (key, outer)
            assert b["y"] <= a["y"] and a["y"] + a["height"] <= b["y"] + b["height"] + 0.01, (key, outer)
    for children in families.values():
        boxes = sorted((places[key] for key in children), key=lambda place: place["y"])
        for i, one in enumerate(boxes):
            for other in boxes[i + 1 :]:
                if other["y"] >= one["y"] + one["height"]:
                    break
                assert one["x"] + one["width"] <= other["x"] or other["x"] + other["width"] <= one["x"], (one, other)
