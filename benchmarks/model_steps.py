"""Step time and memory of models that people train, by hand, by hooks and by graphreg, beside the unregularized model and the goal."""

from __future__ import annotations

from alternate import Series, alternated
from figures import Figure, ratio
from page import arguments, chosen, progress, row, stored

from known_models import FORMS, MODELS

COLUMNS = ("by hand", "hooks", "graphreg")


def cells(found: dict[str, Series], goal: float | None) -> tuple[list[str], dict[str, object]]:
    """A row's cells, and the same as plain data."""
    plain = found["unregularized"]
    data: dict[str, object] = {"ms": sorted(plain.seconds)[len(plain.seconds) // 2] * 1e3, "kept MB": plain.facts["kept"], "goal": goal}
    shown, kept = [f"{data['ms']:.0f}"], [f"{plain.facts['kept']:.0f}"]
    for name in COLUMNS:
        series = found[name]
        if series.error:
            shown.append("fails")
            kept.append("-")
            data[name] = {"error": series.error}
            continue
        measured: Figure = ratio(series.seconds, plain.seconds)
        missed = name == "graphreg" and goal is not None and measured.median > goal
        shown.append(f"{measured}{' (missed)' if missed else ''}")
        kept.append(f"{series.facts['kept']:.0f}")
        data[name] = {"median": measured.median, "low": measured.low, "high": measured.high, "kept MB": series.facts["kept"]}
    return [*shown, "" if goal is None else f"{goal:.2f}", " / ".join(kept)], data


def main() -> None:
    options = arguments(__doc__, ("--rounds", 7), ("--sets", 1), names=MODELS)
    print(
        f"1 thread, {options.rounds} rounds in each of {options.sets} set(s) of processes. Each variant has a process of its own, and they "
        "take turns. Ratios to the unregularized step of the same round: the median, and the interval of 95 % of the median. The goal is "
        "that of graphreg, compiled. Memory: what the forward keeps for backward, in MB, unregularized / by hand / hooks / graphreg.\n"
    )
    print(row("model", "mode", "unregularized, ms", *COLUMNS, "goal", "memory"))
    print(row(*["---"] * (5 + len(COLUMNS))))
    for name, model in chosen(MODELS, options.only).items():
        for compiled in (False, True):
            progress(f"{name}, {'compiled' if compiled else 'eager'}")
            variants = {form: [name, form, compiled] for form in FORMS}
            shown, data = cells(alternated("known_models:built", variants, options.rounds, options.sets), model.goal if compiled else None)
            stored("models", f"{name}, {'compiled' if compiled else 'eager'}", data)
            print(row(name, "compiled" if compiled else "eager", *shown), flush=True)


if __name__ == "__main__":
    main()
